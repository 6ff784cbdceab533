// The view: input and result on two canvases above one another, and the slider clips the upper one.
// NiiVue draws if the browser has WebGL 2; otherwise the page draws the slice itself.
import { inPlane, niftiBytes, onGridOf, slice } from "./volume.js";

const MOST_VOXELS = 1.2e8; // of a result in NiiVue, which needs several times their memory

/**
 * box: the element to draw in. moved(k): called when the user turns to slice k in the view itself; windowed([black,
 * white]): when the user changes the contrast there.
 *
 * Both views show the patient as radiologists do: the patient's right is on the left, and anterior is on the left of
 * sagittal slices.
 */
export async function makeView(box, moved, windowed) {
  if (document.createElement("canvas").getContext("webgl2")) {
    try {
      return await niivueView(box, moved, windowed);
    } catch (error) {
      console.warn(`NiiVue cannot start, so the page draws slices itself: ${error.message}`);
      box.replaceChildren();
    }
  }
  return new PlainView(box);
}

async function niivueView(box, moved, windowed) {
  const { Niivue, SLICE_TYPE } = await import("./niivue.js");
  const quiet = {
    logLevel: "error", dragAndDropEnabled: false, crosshairWidth: 0, backColor: [0, 0, 0, 1], loadingText: "", isAntiAlias: false,
    multiplanarShowRender: 0, viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
    isRadiologicalConvention: true, sagittalNoseLeft: true, showAllOrientationMarkers: true, fontColor: [1, 1, 1, 1], fontMinPx: 16,
  };
  const viewers = [];
  for (const name of ["after", "before"]) {
    const viewer = new Niivue(quiet);
    await viewer.attachToCanvas(canvas(box, name));
    viewers.push(viewer);
  }
  marks(box);
  return new NiivueView(box, viewers, SLICE_TYPE, moved, windowed);
}

function canvas(box, name) {
  const made = document.createElement("canvas");
  made.dataset.shows = name;
  made.setAttribute("role", "img");
  box.append(made);
  return made;
}

/** What is which, and where one ends: over the canvases. */
function marks(box) {
  for (const [name, text] of [["input", "Input"], ["result", "Result"], ["border", ""]]) {
    const made = document.createElement("span");
    [made.className, made.textContent] = [`mark ${name}`, text];
    box.append(made);
  }
}

/** The share of the width, from the left, where the upper canvas is seen. */
function clip(box, share) {
  const upper = box.querySelector("[data-shows=before]"), [input, result, border] = ["input", "result", "border"].map((name) => box.querySelector(`.${name}`));
  upper.style.clipPath = share < 1 ? `inset(0 ${100 * (1 - share)}% 0 0)` : "";
  input.hidden = share <= 0;
  result.hidden = share >= 1;
  border.hidden = input.hidden || result.hidden;
  border.style.left = `${upper.offsetLeft + share * upper.offsetWidth}px`;
}

class NiivueView {
  constructor(box, [after, before], types, moved, windowed) {
    Object.assign(this, { box, after, before, types, moved, planes: "one" });
    before.broadcastTo([after], { "2d": true, "3d": false });
    after.broadcastTo([before], { "2d": true, "3d": false });
    for (const viewer of [before, after]) {
      viewer.onLocationChange = ({ frac }) => this.#turned(frac);
      viewer.onIntensityChange = ({ cal_min, cal_max }) => windowed([cal_min, cal_max]);
    }
  }

  /** Shows a scan without a result; range: the intensities of black and white. */
  async open(scan, range) {
    Object.assign(this, { scan, range });
    await this.#load(this.before, scan);
    this.#clear(this.after);
    this.#arrange();
  }

  /** Shows the result beside the input, which is put onto the result's grid, interpolated if `smooth`. */
  async compare(result, smooth) {
    if (result.data.length > MOST_VOXELS) throw new RangeError("the result is too large for this view; save it, and look at it in a viewer");
    await this.#load(this.before, onGridOf(this.scan, result, smooth));
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

  /** range: the intensities of black and white. */
  window(range) {
    this.range = range;
    for (const viewer of [this.before, this.after]) {
      if (!viewer.volumes.length) continue;
      [viewer.volumes[0].cal_min, viewer.volumes[0].cal_max] = range;
      viewer.updateGLVolume();
    }
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
    marks(box);
    for (const side of ["left", "top"]) box.append(Object.assign(document.createElement("span"), { className: `mark ${side}` }));
  }

  async open(scan, range) {
    Object.assign(this, { scan, range, input: scan, result: undefined });
  }

  async compare(result, smooth) {
    Object.assign(this, { result, input: onGridOf(this.scan, result, smooth) });
  }

  draw(k, share) {
    this.#paint("before", slice(this.input, k));
    if (this.result) this.#paint("after", slice(this.result, k));
    clip(this.box, this.result ? share : 1);
  }

  setPlanes() {}

  window(range) {
    this.range = range;
  }

  #paint(name, { h, w, data }) {
    const view = this.box.querySelector(`[data-shows=${name}]`), [low, high] = this.range;
    const { across, down } = this.#directions(), first = across.axis === 0, [columns, rows] = first ? [h, w] : [w, h];
    [view.width, view.height] = [columns, rows];
    const context = view.getContext("2d"), pixels = context.createImageData(view.width, view.height);
    for (let x = 0; x < view.width; x++) {
      for (let y = 0; y < view.height; y++) {
        const column = across.flipped ? columns - 1 - x : x, row = down.flipped ? rows - 1 - y : y;
        const value = first ? data[column * w + row] : data[row * w + column], grey = (255 * (value - low)) / (high - low);
        pixels.data.set([grey, grey, grey, 255], 4 * (y * view.width + x));
      }
    }
    context.putImageData(pixels, 0, 0);
    const { shape, spacing } = this.scan, axes = inPlane(this.scan.slices), side = ({ axis }) => shape[axes[axis]] * spacing[axes[axis]];
    const ratio = side(across) / side(down);
    Object.assign(view.style, { width: `min(100%, calc(var(--height) * ${ratio}))`, height: "auto", aspectRatio: ratio, margin: "auto" });
    this.box.querySelector(".left").textContent = across.from;
    this.box.querySelector(".top").textContent = down.from;
  }

  /** Which of the slice's two axes runs to the right and which one down, whether against its order, and from which side of the patient. */
  #directions() {
    const { affine, slices } = this.scan, columns = inPlane(slices).map((axis) => affine.map((row) => row[axis]));
    // the axes of the patient, to the right, forward and up, that the plane shows: the first from left, the second from above
    const along = (column) => column.map(Math.abs).indexOf(Math.max(...column.map(Math.abs)));
    const normal = along(affine.map((row) => row[slices])), shown = [0, 1, 2].filter((axis) => axis !== normal);
    const first = Math.abs(columns[0][shown[0]]) * Math.abs(columns[1][shown[1]]) >= Math.abs(columns[1][shown[0]]) * Math.abs(columns[0][shown[1]]) ? 0 : 1;
    const [across, down] = [first, 1 - first].map((axis, k) => ({ axis, flipped: columns[axis][shown[k]] > 0, from: "RAS"[shown[k]] }));
    return { across, down };
  }
}
