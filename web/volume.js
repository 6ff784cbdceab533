// Scans: files to voxels with a position in the patient, slices, and intensities.
// Rules and messages are those of the package (deformmamba/volume).
import { readDicom } from "./dicom.js";
import { DAMAGED, lengths, ScanError, text } from "./files.js";
import { niftiBytes, readNifti } from "./nifti.js";

export { niftiBytes, ScanError };

/** files: File objects. Returns {name, shape [i, j, k], data (Float32Array, i fastest), affine, spacing, slices, ...}. */
export async function readScan(files) {
  if (!files.length) throw new ScanError("no file was given; drop a NIfTI file or a DICOM series");
  const buffers = [];
  for (const file of files) buffers.push({ name: file.name, bytes: await unpacked(file) });
  const dicom = buffers.filter(({ bytes }) => bytes.length > 132 && text(bytes, 128, 4) === "DICM");
  const scan = dicom.length ? readDicom(buffers, dicom) : readNifti(one(buffers));
  checkAffine(scan);
  let bad = 0, any = false;
  for (const value of scan.data) {
    if (!Number.isFinite(value)) bad++;
    else if (value !== 0) any = true;
  }
  if (bad) throw new ScanError(`${scan.name}: ${bad} of ${scan.data.length} voxels are NaN or infinite`);
  if (!any) throw new ScanError(`${scan.name}: every voxel is zero; the volume is empty`);
  scan.slices ??= sliceAxis(scan);
  return scan;
}

/** The files of dropped folders, in all their subfolders; hidden files and a DICOM disc's table of contents are left out. */
export async function inFolders(entries) {
  const files = [];
  for (const entry of entries) {
    if (/^\.|^DICOMDIR$/i.test(entry.name)) continue;
    if (entry.isFile) files.push(await new Promise((done, fail) => entry.file(done, fail)));
    else {
      const reader = entry.createReader();
      // a reader gives the entries in several parts, the last one empty
      for (let part; (part = await new Promise((done, fail) => reader.readEntries(done, fail))).length; ) files.push(...(await inFolders(part)));
    }
  }
  return files;
}

/** As volume.image._checked_affine. */
function checkAffine({ name, affine, spacing }) {
  if (!affine.flat().every(Number.isFinite)) throw new ScanError(`${name}: the affine must be a finite 4x4 matrix`);
  if (Math.min(...spacing) === 0) throw new ScanError(`${name}: the voxel spacing is zero along axis ${spacing.indexOf(0)}; correct the affine`);
  // the volume of the parallelepiped of unit edges: 1 for orthogonal axes, 0 for axes in one plane
  const [a, b, c] = affine.map((row) => [0, 1, 2].map((k) => row[k] / spacing[k]));
  const volume = a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0]);
  if (Math.abs(volume) < 1e-3) throw new ScanError(`${name}: the affine is singular: its axes lie in one plane`);
}

function one(buffers) {
  if (buffers.some(({ name }) => /\.(hdr|img)$/i.test(name))) return buffers.find(({ name }) => /\.(hdr|img)$/i.test(name));
  if (buffers.length > 1) throw new ScanError(`${buffers.length} files were given; drop one NIfTI file, or the files of one DICOM series`);
  return buffers[0];
}

async function unpacked(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  try {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  } catch {
    throw new ScanError(`${file.name}: ${DAMAGED}`);
  }
}

/** As volume.slice_axis: where slices are stacked, from shape and spacing. */
export function sliceAxis({ shape, spacing }) {
  if (shape.filter((n) => n === 1).length === 1) return shape.indexOf(1);
  const equal = (a, b) => Math.abs(a - b) <= 0.01 * Math.max(a, b);
  const square = [0, 1, 2].filter((axis) => equal(...spacing.filter((_, other) => other !== axis)));
  if (square.length === 1) return square[0];
  const largest = Math.max(...spacing);
  return [2, 1, 0].find((axis) => spacing[axis] >= 0.99 * largest);
}

// ------------------------------------------------------------------------------------------------------------ slices

/** The two axes inside a slice, in order. */
export const inPlane = (axis) => [0, 1, 2].filter((other) => other !== axis);

/** Slice k as {h, w, data}, row by row, as numpy.moveaxis(array, axis, 0)[k] of the package. */
export function slice({ shape, data, slices }, k) {
  const [first, second] = inPlane(slices), strides = [1, shape[0], shape[0] * shape[1]];
  const [h, w] = [shape[first], shape[second]], out = new Float32Array(h * w);
  for (let y = 0, at = 0; y < h; y++) {
    for (let x = 0; x < w; x++) out[at++] = data[k * strides[slices] + y * strides[first] + x * strides[second]];
  }
  return { h, w, data: out };
}

/** Puts what `slice` takes. */
export function putSlice({ shape, data, slices }, k, image) {
  const [first, second] = inPlane(slices), strides = [1, shape[0], shape[0] * shape[1]];
  for (let y = 0, at = 0; y < shape[first]; y++) {
    for (let x = 0; x < shape[second]; x++) data[k * strides[slices] + y * strides[first] + x * strides[second]] = image[at++];
  }
}

/** An empty scan, `scale` times finer in the plane, on the origin-aligned grid: the translation stays. */
export function finer(scan, scale) {
  const factor = [0, 1, 2].map((axis) => (axis === scan.slices ? 1 : scale)), shape = scan.shape.map((n, axis) => n * factor[axis]);
  const affine = scan.affine.map((row) => row.map((v, c) => (c < 3 ? v / factor[c] : v)));
  const qform = { ...scan.header.qform, zooms: scan.header.qform.zooms.map((v, axis) => v / factor[axis]) };
  return { ...scan, shape, affine, spacing: lengths(affine), data: new Float32Array(shape[0] * shape[1] * shape[2]), header: { ...scan.header, qform } };
}

/** Of n pixels, the one nearest to pixel x of the origin-aligned grid that is `factor` times finer. */
export const nearest = (x, factor, n) => Math.min(n - 1, Math.round(x / factor));

/** The scan on the grid of its result: its pixels, or with linear interpolation if `smooth`. */
export function onGridOf(scan, result, smooth) {
  if (smooth) return interpolated(scan, result);
  const [x, y, z] = result.shape.map((n, axis) => Int32Array.from({ length: n }, (_, k) => nearest(k, n / scan.shape[axis], scan.shape[axis])));
  const data = new Float32Array(result.data.length), [columns, rows] = scan.shape;
  let at = 0;
  for (const k of z) for (const j of y) for (const i of x) data[at++] = scan.data[(k * rows + j) * columns + i];
  return { ...result, data };
}

function interpolated(scan, result) {
  const [x, y, z] = result.shape.map((n, axis) =>
    Array.from({ length: n }, (_, k) => {
      const at = (k * scan.shape[axis]) / n, first = Math.floor(at);
      return [first, Math.min(first + 1, scan.shape[axis] - 1), at - first];
    }));
  const data = new Float32Array(result.data.length), [columns, rows] = scan.shape;
  const between = (row, [i, j, share]) => (share ? scan.data[row + i] * (1 - share) + scan.data[row + j] * share : scan.data[row + i]);
  let at = 0;
  for (const [k0, k1, c] of z) for (const [j0, j1, b] of y) {
    const start = [[k0, j0, (1 - c) * (1 - b)], [k0, j1, (1 - c) * b], [k1, j0, c * (1 - b)], [k1, j1, c * b]].filter(([, , share]) => share);
    for (const i of x) {
      let sum = 0;
      for (const [k, j, share] of start) sum += share * between((k * rows + j) * columns, i);
      data[at++] = sum;
    }
  }
  return { ...result, data };
}

// -------------------------------------------------------------------------------------------------------- intensities

function percentile(sorted, share) {
  const at = (sorted.length - 1) * share, below = Math.floor(at);
  return sorted[below] + (sorted[Math.ceil(at)] - sorted[below]) * (at - below);
}

/** [zero, scale, floor] of a whole scan, as inference.upscaling.scan_units; `rule` is of weights.json. */
export function units(data, rule) {
  if (rule.any_intensity) return [0, 0, 0]; // each slice has its own, inside the exported model
  const sorted = Float32Array.from(data).sort(), lowest = sorted[0], highest = sorted.at(-1);
  const used = sorted.filter((v) => v !== 0), scale = used.length ? percentile(used, rule.share) : 1;
  const largest = Math.max(Math.abs(lowest), Math.abs(highest));
  return [0, scale > 0 ? scale : largest, lowest >= 0 ? 0 : rule.no_floor];
}

/** The advice of volume.inspection.spacing_remark. */
export function spacingAdvice(scan, weights) {
  const trained = (weights.spacings_mm ?? []).flat();
  if (!trained.length) return "The weights do not record the pixel sizes of their training data.";
  const [low, high] = [Math.min(...trained), Math.max(...trained)], show = (v) => String(Number(v.toPrecision(3)));
  const known = `The weights were trained on pixels of ${show(low)} to ${show(high)} mm`;
  if (!(scan.header.codes.sform > 0 || scan.header.codes.qform > 0)) return `${known}; this file does not say where its own come from.`;
  const pixel = inPlane(scan.slices).map((axis) => scan.spacing[axis]), given = `${show(pixel[0])} x ${show(pixel[1])} mm`;
  const [least, most] = [Math.min(...pixel), Math.max(...pixel)];
  if (low <= least && most <= high) return `${known}; this scan's ${given} are among them.`;
  if (least < low / weights.far_spacing || most > high * weights.far_spacing) {
    return `${known}; this scan's ${given} are far from that, and the result may be worse than reported.`;
  }
  return `${known}; this scan's ${given} are near that.`;
}
