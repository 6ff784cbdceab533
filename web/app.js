import { finer, niftiBytes, putSlice, readScan, ScanError, slice, spacingAdvice, units } from "./volume.js";

const $ = (id) => document.getElementById(id);
const catalogue = await (await fetch("weights.json")).json();
let scan, result, worker, run = 0;

for (const weights of catalogue) {
  const option = new Option(`${weights.name}: ${weights.scale} times finer`, weights.name);
  $("weights").add(option);
}
const chosen = () => catalogue.find(({ name }) => name === $("weights").value);

function say(text) {
  $("status").textContent = text;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function open(files) {
  stop();
  fail("");
  say("Reading the scan");
  try {
    scan = await readScan([...files]);
  } catch (error) {
    say("");
    fail(error instanceof ScanError ? error.message : `the file cannot be read: ${error.message}`);
    return;
  }
  result = undefined;
  const [i, j, k] = scan.shape, spacing = scan.spacing.map((v) => Number(v.toPrecision(3)));
  $("facts").textContent = `${scan.name}: ${i} x ${j} x ${k} voxels of ${spacing.join(" x ")} mm, slices along axis ${scan.slices}`;
  const n = scan.shape[scan.slices];
  $("slice").max = n - 1;
  $("slice").value = Math.floor(n / 2);
  $("work").hidden = false;
  $("save").disabled = true;
  $("compare").disabled = true;
  $("numbers").textContent = "";
  advise();
  draw();
  say("Ready to upscale");
}

function advise() {
  const weights = chosen();
  $("advice").textContent = scan && weights ? spacingAdvice(scan, weights) : "";
  $("about").textContent = weights ? `${weights.summary} Licence: ${weights.licence}.` : "";
}

/** Left of the handle the input, right of it the result. */
function draw() {
  if (!scan) return;
  const k = Number($("slice").value), before = slice(scan, k), after = result && result.done > k ? slice(result.scan, k) : undefined;
  $("slice-number").textContent = `${k + 1} of ${scan.shape[scan.slices]}`;
  // the first axis of the slice runs to the right, the second one up
  const shown = after ?? before, canvas = $("view");
  canvas.width = shown.h;
  canvas.height = shown.w;
  const context = canvas.getContext("2d"), pixels = context.createImageData(shown.h, shown.w);
  scan.top ??= units(scan.data, { any_intensity: false, share: 0.995 })[1];
  const share = after ? Number($("compare").value) / 100 : 1, factor = shown.h / before.h;
  for (let x = 0; x < shown.h; x++) {
    for (let y = 0; y < shown.w; y++) {
      const left = x < share * shown.h;
      const value = left ? before.data[Math.floor(x / factor) * before.w + Math.floor(y / factor)] : after.data[x * shown.w + y];
      const at = 4 * ((shown.w - 1 - y) * shown.h + x), grey = (255 * value) / scan.top;
      pixels.data.set([grey, grey, grey, 255], at);
    }
  }
  context.putImageData(pixels, 0, 0);
  const [first, second] = [0, 1, 2].filter((axis) => axis !== scan.slices);
  canvas.style.aspectRatio = `${scan.shape[first] * scan.spacing[first]} / ${scan.shape[second] * scan.spacing[second]}`;
  canvas.setAttribute("aria-label", after ? `Slice ${k + 1}: input left of ${Math.round(share * 100)} %, result right of it` : `Slice ${k + 1} of the input`);
}

function stop() {
  run++;
  worker?.terminate();
  worker = undefined;
  $("cancel").disabled = true;
  $("start").disabled = false;
  $("progress").hidden = true;
}

async function upscale() {
  stop();
  fail("");
  const mine = ++run, weights = chosen(), n = scan.shape[scan.slices], input = scan;
  const { h, w } = slice(input, 0);
  if (Math.min(h, w) < weights.minimum_size) {
    fail(`slices are ${h}x${w} pixels, the smallest that ${weights.name} takes is ${weights.minimum_size}x${weights.minimum_size}; choose another scan`);
    return;
  }
  $("start").disabled = true;
  $("cancel").disabled = false;
  $("progress").hidden = false;
  $("progress").max = n;
  $("progress").value = 0;
  say("Loading the network");
  const given = units(input.data, weights), made = { scan: finer(input, weights.scale), done: 0, weights };
  worker = new Worker("worker.js", { type: "module" });
  worker.onerror = (event) => {
    stop();
    fail(`the network cannot run here: ${event.message}`);
  };
  const start = performance.now();
  let seconds = 0, threads = 1;
  for (let k = 0; k < n; k++) {
    const image = slice(input, k);
    const answer = await new Promise((resolve) => {
      worker.onmessage = ({ data }) => resolve(data);
      worker.postMessage({ k, model: `${weights.name}.onnx`, slice: image.data, h: image.h, w: image.w, units: given });
    });
    if (mine !== run) return;
    if (answer.error) {
      stop();
      fail(`slice ${k + 1} failed: ${answer.error}`);
      return;
    }
    putSlice(made.scan, k, answer.image);
    made.done = k + 1;
    seconds += answer.seconds;
    threads = answer.threads;
    $("progress").value = k + 1;
    say(`Slice ${k + 1} of ${n}`);
    result = made;
    if (k === Number($("slice").value)) draw();
  }
  stop();
  result = made;
  const memory = performance.memory ? `, ${Math.round(performance.memory.usedJSHeapSize / 2 ** 20)} MiB of the page's memory` : "";
  $("numbers").textContent =
    `${(seconds / n).toFixed(2)} s a slice, ${((performance.now() - start) / 1000).toFixed(1)} s in all, ${threads} thread${threads > 1 ? "s" : ""}${memory}`;
  $("save").disabled = false;
  $("compare").disabled = false;
  say("Done. Compare with the slider, then save.");
  draw();
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([niftiBytes(result.scan)], { type: "application/octet-stream" }));
  link.download = `${scan.name.replace(/\.(nii|nii\.gz|gz|dcm)$/i, "").replace(/\.nii$/i, "")}_${result.weights.name}.nii`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

$("file").addEventListener("change", () => open($("file").files));
$("weights").addEventListener("change", () => advise());
$("start").addEventListener("click", upscale);
$("cancel").addEventListener("click", () => {
  stop();
  say("Cancelled. The input is unchanged.");
});
$("save").addEventListener("click", save);
for (const id of ["slice", "compare"]) $(id).addEventListener("input", draw);
const drop = $("drop");
drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  open(event.dataTransfer.files);
});
document.documentElement.dataset.ready = "yes";
// for the tests: input and result as files
window.deformmamba = { input: () => niftiBytes(scan), result: () => niftiBytes(result.scan) };
