import { makeView } from "./view.js";
import { finer, inFolders, niftiBytes, putSlice, readScan, ScanError, slice, spacingAdvice, units } from "./volume.js";

const $ = (id) => document.getElementById(id);
const catalogue = await (await fetch("weights.json")).json();
const DARK = 0.005, BRIGHT = 0.995; // shares of the voxels that the view shows as black and as white
const STEPS = 1000; // of a contrast slider
const PLANES = ["sagittal", "coronal", "axial"];
let scan, result, worker, run = 0, opening = 0, lowest, highest;

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

async function open(given) {
  stop();
  fail("");
  say("Reading the scan");
  const mine = ++opening; // of several scans opened at once, the last one stays
  try {
    const read = await readScan([...(await given)]);
    if (mine !== opening) return;
    stop(); // an upscale of the former scan may have begun since
    scan = read;
  } catch (error) {
    if (mine !== opening) return;
    say("");
    fail(error instanceof ScanError ? error.message : `the file cannot be read: ${error.message}`);
    return;
  }
  result = undefined;
  const [i, j, k] = scan.shape, spacing = scan.spacing.map((v) => Number(v.toPrecision(3)));
  $("facts").textContent = `${scan.name}: ${i} x ${j} x ${k} voxels of ${spacing.join(" x ")} mm, ${stacked(scan)}`;
  const n = scan.shape[scan.slices];
  $("slice").max = n - 1;
  $("slice").value = Math.floor(n / 2);
  $("work").hidden = false;
  $("save").disabled = true;
  $("compare").disabled = true;
  $("numbers").textContent = "";
  advise();
  const view = await views;
  $("plane-choice").hidden = !view.planes;
  const shown = range(scan.data);
  await view.open(scan, shown);
  windowed(shown);
  draw();
  say("Ready to upscale");
}

/** How the slices lie in the patient, as far as the file contains it. */
function stacked({ affine, header, slices }) {
  if (!(header.codes.sform > 0 || header.codes.qform > 0)) return `slices along axis ${slices}, unknown position in the patient`;
  const column = affine.map((row) => Math.abs(row[slices]));
  return `${PLANES[column.indexOf(Math.max(...column))]} slices (along axis ${slices})`;
}

/** The intensities that the view shows as black and as white when a scan is opened. */
function range(data) {
  const sorted = Float32Array.from(data).sort(), at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  lowest = Math.min(0, sorted[0]);
  highest = Math.max(sorted.at(-1), lowest + 1e-6);
  const low = Math.min(0, at(DARK)), used = sorted.filter((v) => v !== 0);
  return [low, Math.max(used[Math.round(BRIGHT * (used.length - 1))], low + 1e-6)];
}

/** Sets the contrast sliders. */
function windowed(shown) {
  ["black", "white"].forEach((name, end) => {
    $(name).value = (STEPS * (shown[end] - lowest)) / (highest - lowest);
    $(`${name}-number`).textContent = Number(shown[end].toPrecision(3));
  });
}

/** Shows the contrast of the sliders; white stays above black. */
async function recontrast({ target }) {
  if (!scan) return;
  const steps = ["black", "white"].map((name) => Number($(name).value));
  if (steps[0] >= steps[1]) steps[target.id === "black" ? 1 : 0] = steps[target.id === "black" ? 0 : 1] + (target.id === "black" ? 1 : -1);
  const shown = steps.map((step) => lowest + (step / STEPS) * (highest - lowest));
  windowed(shown);
  (await views).window(shown);
  draw();
}

function advise() {
  const weights = chosen();
  $("advice").textContent = scan && weights ? spacingAdvice(scan, weights) : "";
  $("about").textContent = weights ? `${weights.summary} Licence: ${weights.licence}.` : "";
}

/** Left of the handle the input, right of it the result. */
async function draw() {
  if (!scan) return;
  const view = await views, k = Number($("slice").value), share = result ? Number($("compare").value) / 100 : 1;
  $("slice-number").textContent = `${k + 1} of ${scan.shape[scan.slices]}`;
  view.draw(k, share);
  const what = result ? `Slice ${k + 1}: input left of ${Math.round(share * 100)} %, result right of it` : `Slice ${k + 1} of the input`;
  for (const canvas of document.querySelectorAll("#view canvas")) canvas.setAttribute("aria-label", what);
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
  const given = units(input.data, weights);
  let made;
  try {
    made = { scan: finer(input, weights.scale), weights };
  } catch {
    stop();
    say("");
    fail(`the result needs ${(4 * input.data.length * weights.scale ** 2 / 2 ** 30).toPrecision(2)} GiB of memory, more than this browser gives; use the deformmamba package`);
    return;
  }
  worker = new Worker("worker.js", { type: "module" });
  worker.onerror = (event) => {
    stop();
    fail(`the network cannot run here: ${event.message}`);
  };
  const start = performance.now();
  let seconds = 0, threads = 1, bytes = 0;
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
    seconds += answer.seconds;
    [threads, bytes] = [answer.threads, answer.bytes];
    $("progress").value = k + 1;
    const left = ((performance.now() - start) / (k + 1)) * (n - k - 1) / 1000;
    say(`Slice ${k + 1} of ${n}, about ${left < 90 ? `${Math.ceil(left)} s` : `${Math.ceil(left / 60)} min`} left`);
  }
  stop();
  const all = performance.now() - start;
  const memory = bytes ? `, ${Math.round(bytes / 2 ** 20)} MiB of memory for the network` : "";
  $("numbers").textContent =
    `${(seconds / n).toFixed(2)} s a slice, ${(all / 1000).toFixed(1)} s in all, ${threads} thread${threads > 1 ? "s" : ""}${memory}`;
  result = made;
  $("save").disabled = false;
  say("Done. Compare with the slider, then save.");
  try {
    await (await views).compare(made.scan, $("input-as").value === "interpolated");
    $("compare").disabled = false;
  } catch (error) {
    say(`Done. It cannot be shown here: ${error.message}. Save it.`);
  }
  draw();
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([niftiBytes(result.scan)], { type: "application/octet-stream" }));
  link.download = `${scan.name.replace(/\.(nii|nii\.gz|gz|dcm)$/i, "").replace(/\.nii$/i, "")}_${result.weights.name}.nii`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const views = makeView($("view"), (k) => {
  $("slice").value = k;
  $("slice-number").textContent = `${k + 1} of ${scan.shape[scan.slices]}`;
}, async (shown) => {
  windowed(shown);
  (await views).window(shown);
});
$("planes").addEventListener("change", async () => {
  (await views).setPlanes($("planes").value);
  draw();
});
$("input-as").addEventListener("change", async () => {
  if (!result || $("compare").disabled) return;
  await (await views).compare(result.scan, $("input-as").value === "interpolated");
  draw();
});
$("file").addEventListener("change", () => open($("file").files));
$("weights").addEventListener("change", () => advise());
$("start").addEventListener("click", upscale);
$("cancel").addEventListener("click", () => {
  stop();
  say("Cancelled. The input is unchanged.");
});
$("save").addEventListener("click", save);
for (const id of ["slice", "compare"]) $(id).addEventListener("input", draw);
for (const id of ["black", "white"]) $(id).addEventListener("input", recontrast);
addEventListener("resize", () => draw()); // the border moves with the image
// files may be dropped anywhere: a browser leaves the page for a file that is dropped beside the box
const drop = $("drop");
addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  open(entries.some((entry) => entry.isDirectory) ? inFolders(entries) : event.dataTransfer.files);
});
document.documentElement.dataset.ready = "yes";
// for the tests: input and result as files
window.deformmamba = { input: () => niftiBytes(scan), result: () => niftiBytes(result.scan) };
