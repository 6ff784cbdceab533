// The view: input and result on two canvases above one another, and the slider clips the upper one.
// NiiVue draws if the browser has WebGL 2; otherwise the page draws the slice itself.
import { inPlane, nearest, niftiBytes, onGridOf, slice } from "./volume.js";

const MOST_VOXELS = 1.2e8; // of a result in NiiVue, which needs several times their memory

/** box: the element to draw in. moved(k): called when the user turns to slice k in the view itself. */
export async function makeView(box, moved) {
  if (document.createElement("canvas").getContext("webgl2")) {
    try {
      return await niivueView(box, moved);
    } catch (error) {
      console.warn(`NiiVue cannot start, so the page draws slices itself: ${error.message}`);
      box.replaceChildren();
    }
  }
  return new PlainView(box);
}

async function niivueView(box, moved) {
  const { Niivue, SLICE_TYPE } = await import("./niivue.js");
  const quiet = {
    logLevel: "error", dragAndDropEnabled: false, crosshairWidth: 0, backColor: [0, 0, 0, 1], loadingText: "", isAntiAlias: false,
    multiplanarShowRender: 0, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
  };
  const viewers = [];
  for (const name of ["after", "before"]) {
    const viewer = new Niivue(quiet);
    await viewer.attachToCanvas(canvas(box, name));
    viewers.push(viewer);
  }
  return new NiivueView(box, viewers, SLICE_TYPE, moved);
}

function canvas(box, name) {
  const made = document.createElement("canvas");
  made.dataset.shows = name;
  made.setAttribute("role", "img");
  box.append(made);
  return made;
}

function clip(box, share) {
  const upper = box.querySelector("[data-shows=before]");
  upper.style.clipPath = share < 1 ? `inset(0 ${100 * (1 - share)}% 0 0)` : "";
}

class NiivueView {
  constructor(box, [after, before], types, moved) {
    Object.assign(this, { box, after, before, types, moved, planes: "one" });
    before.broadcastTo([after], { "2d": true, "3d": false });
    after.broadcastTo([before], { "2d": true, "3d": false });
    for (const viewer of [before, after]) viewer.onLocationChange = ({ frac }) => this.#turned(frac);
  }

  /** Shows a scan without a result; range: the intensities of black and white. */
  async open(scan, range) {
    Object.assign(this, { scan, range });
    await this.#load(this.before, scan);
    this.#clear(this.after);
    this.#arrange();
  }

  /** Shows the result beside the input, which is put onto the result's grid. */
  async compare(result) {
    if (result.data.length > MOST_VOXELS) throw new RangeError("the result is too large for this view; save it, and look at it in a viewer");
    await this.#load(this.before, onGridOf(this.scan, result));
    await this.#load(this.after, result);
    this.#arrange();
  }

  /** Shows slice k; the share of the width, from the left, is the input. */
  draw(k, share) {
    const { row, last, flipped } = this.#stack();
    const at = ((flipped ? last - k : k) + 0.5) / (last + 1);
    for (const viewer of [this.before, this.after]) {
      if (!viewer.volumes.length) continue;
      viewer.scene.crosshairPos[row] = at;
      viewer.drawScene();
    }
    clip(this.box, this.after.volumes.length ? share : 1);
  }

  /** "one": the slice; "three": three planes through it. */
  setPlanes(planes) {
    this.planes = planes;
    this.#arrange();
  }

  /** How the slices lie in NiiVue's volume, whose axes run right, forward and up. */
  #stack() {
    const { scan } = this, column = scan.affine.map((row) => row[scan.slices]);
    const row = column.map(Math.abs).indexOf(Math.max(...column.map(Math.abs)));
    return { row, last: scan.shape[scan.slices] - 1, flipped: column[row] < 0 };
  }

  #turned(frac) {
    if (!this.scan) return;
    const { row, last, flipped } = this.#stack(), k = Math.max(0, Math.min(last, Math.floor(frac[row] * (last + 1))));
    this.moved(flipped ? last - k : k);
  }

  #arrange() {
    const { SAGITTAL, CORONAL, AXIAL, MULTIPLANAR } = this.types, one = [SAGITTAL, CORONAL, AXIAL][this.#stack().row];
    for (const viewer of [this.before, this.after]) viewer.setSliceType(this.planes === "three" ? MULTIPLANAR : one);
  }

  async #load(viewer, scan) {
    this.#clear(viewer);
    await viewer.loadFromArrayBuffer(niftiBytes(scan), "scan.nii");
    const [volume] = viewer.volumes;
    [volume.cal_min, volume.cal_max] = this.range;
    viewer.updateGLVolume();
  }

  #clear(viewer) {
    for (const volume of [...viewer.volumes]) viewer.removeVolume(volume);
  }
}

class PlainView {
  constructor(box) {
    this.box = box;
    for (const name of ["after", "before"]) canvas(box, name);
  }

  async open(scan, range) {
    Object.assign(this, { scan, range, result: undefined });
  }

  async compare(result) {
    this.result = result;
  }

  draw(k, share) {
    const before = slice(this.scan, k), after = this.result && slice(this.result, k);
    this.#paint("before", before, after ? after.h / before.h : 1);
    if (after) this.#paint("after", after, 1);
    clip(this.box, after ? share : 1);
  }

  setPlanes() {}

  /** `factor` times as large, nearest pixels. The first axis of the slice runs to the right, the second one up. */
  #paint(name, { h, w, data }, factor) {
    const view = this.box.querySelector(`[data-shows=${name}]`), [low, high] = this.range;
    [view.width, view.height] = [h * factor, w * factor];
    const context = view.getContext("2d"), pixels = context.createImageData(view.width, view.height);
    for (let x = 0; x < view.width; x++) {
      for (let y = 0; y < view.height; y++) {
        const value = data[nearest(x, factor, h) * w + nearest(y, factor, w)], grey = (255 * (value - low)) / (high - low);
        pixels.data.set([grey, grey, grey, 255], 4 * ((view.height - 1 - y) * view.width + x));
      }
    }
    context.putImageData(pixels, 0, 0);
    const [first, second] = inPlane(this.scan.slices), { shape, spacing } = this.scan;
    const ratio = (shape[first] * spacing[first]) / (shape[second] * spacing[second]);
    Object.assign(view.style, { width: `min(100%, calc(var(--height) * ${ratio}))`, height: "auto", aspectRatio: ratio, margin: "auto" });
  }
}
