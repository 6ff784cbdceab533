// Runs the network, one slice at a time, in a separate thread from the page.

// the runtime's memory, so that the page can show its size
let memory;
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(limits) {
    super(limits);
    memory = this;
  }
};
const loading = import("./ort.wasm.bundle.min.mjs").then((ort) => {
  ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;
  // threads need shared memory, which a host allows by two headers; see docs/browser.md
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  return ort;
});
let session, loaded;

self.onmessage = async ({ data: message }) => {
  try {
    const ort = await loading;
    if (message.model !== loaded) {
      await session?.release();
      session = undefined;
      session = await ort.InferenceSession.create(new URL(message.model, import.meta.url).href, {
        executionProviders: ["wasm"],
        logSeverityLevel: 3,
        extra: { session: { intra_op: { allow_spinning: "0" } } }, // waiting threads leave the processor to others
      });
      loaded = message.model;
    }
    const start = performance.now();
    const { sr } = await session.run({
      lr: new ort.Tensor("float32", message.slice, [1, 1, message.h, message.w]),
      units: new ort.Tensor("float32", Float32Array.from(message.units), [3]),
    });
    const image = new Float32Array(sr.data);
    const seconds = (performance.now() - start) / 1000, bytes = memory?.buffer.byteLength;
    self.postMessage({ k: message.k, image, seconds, threads: ort.env.wasm.numThreads, bytes }, [image.buffer]);
  } catch (error) {
    self.postMessage({ k: message.k, error: String(error?.message ?? error) });
  }
};
