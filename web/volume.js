// Reads NIfTI-1 and uncompressed DICOM as voxels with a position in the patient, and writes NIfTI-1.
// Rules and messages are those of the package (deformmamba/volume).

/** A file that cannot be used; the message is one line for the reader. */
export class ScanError extends Error {}

const TYPES = {
  2: ["getUint8", 1], 256: ["getInt8", 1], 4: ["getInt16", 2], 512: ["getUint16", 2], 8: ["getInt32", 4],
  768: ["getUint32", 4], 16: ["getFloat32", 4], 64: ["getFloat64", 8],
};

/** files: File objects. Returns {name, shape [i, j, k], data (Float32Array, i fastest), affine, spacing, slices, ...}. */
export async function readScan(files) {
  if (!files.length) throw new ScanError("no file was given; drop a NIfTI file or a DICOM series");
  const buffers = [];
  for (const file of files) buffers.push({ name: file.name, bytes: await unpacked(file) });
  const dicom = buffers.filter(({ bytes }) => bytes.length > 132 && text(bytes, 128, 4) === "DICM");
  const scan = dicom.length ? readDicom(buffers, dicom) : readNifti(one(buffers));
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

function one(buffers) {
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
    throw new ScanError(`${file.name}: not a NIfTI file, or a damaged one`);
  }
}

const text = (bytes, at, n) => String.fromCharCode(...bytes.subarray(at, at + n)).replace(/\0.*$/s, "");

function readNifti({ name, bytes }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 348) throw new ScanError(`${name}: not a scan that can be read`);
  const little = view.getInt32(0, true) === 348;
  if (view.getInt32(0, true) === 540 || view.getInt32(0, false) === 540) {
    throw new ScanError(`${name}: NIfTI-2, which this page cannot read; use the deformmamba package`);
  }
  if (!little && view.getInt32(0, false) !== 348) throw new ScanError(`${name}: not a scan that can be read`);
  const magic = text(bytes, 344, 4);
  if (magic === "ni1" || magic === "") {
    const what = magic ? "the .hdr half of a pair .hdr and .img" : "an Analyze 7.5 header";
    throw new ScanError(`${name}: ${what}; convert it to one .nii file`);
  }
  const short = (at) => view.getInt16(at, little), float = (at) => view.getFloat32(at, little);
  const n = short(40), dim = Array.from({ length: 7 }, (_, k) => (k < n ? short(42 + 2 * k) : 1));
  const volumes = dim.slice(3).reduce((a, b) => a * b, 1), shape = dim.slice(0, 3);
  if (volumes > 1) throw new ScanError(`${name}: holds ${volumes} volumes; save the one to upscale as a separate file`);
  if (Math.min(...shape) < 1) throw new ScanError(`${name}: a volume is a 3-D array, not one of shape (${shape.join(", ")})`);
  const type = short(70);
  if ([32, 1792, 2048].includes(type)) throw new ScanError(`${name}: voxels are complex numbers; take the magnitude first`);
  if ([128, 2304].includes(type)) throw new ScanError(`${name}: voxels are colours; extract one channel first`);
  if (!TYPES[type]) throw new ScanError(`${name}: voxels of NIfTI type ${type}, which this page cannot read; convert them to float32`);
  const [get, size] = TYPES[type], count = shape[0] * shape[1] * shape[2], offset = Math.max(float(108), 348);
  if (offset + count * size > bytes.length) throw new ScanError(`${name}: truncated: the file is shorter than its header requires`);
  let slope = float(112), intercept = float(116);
  if (!(slope !== 0 && Number.isFinite(slope) && Number.isFinite(intercept))) [slope, intercept] = [1, 0];
  const data = new Float32Array(count);
  for (let k = 0; k < count; k++) data[k] = view[get](offset + k * size, little) * slope + intercept;
  const pixdim = Array.from({ length: 8 }, (_, k) => float(76 + 4 * k));
  const codes = { qform: short(252), sform: short(254) }, quaternion = [0, 1, 2, 3, 4, 5].map((k) => float(256 + 4 * k));
  const qform = quaternionAffine(quaternion, pixdim);
  const sform = [0, 1, 2].map((row) => [0, 1, 2, 3].map((column) => float(280 + 16 * row + 4 * column)));
  const sizes = pixdim.slice(1, 4).map(Math.abs);
  if (codes.sform <= 0 && shape.some((length, axis) => length > 1 && !(sizes[axis] > 0))) {
    throw new ScanError(`${name}: the voxel spacing in the header is zero or missing`);
  }
  const plain = [0, 1, 2].map((row) => [0, 1, 2, 3].map((c) => (c === row ? sizes[row] : c === 3 ? -sizes[row] * (shape[row] - 1) / 2 : 0)));
  const affine = codes.sform > 0 ? sform : codes.qform > 0 ? qform : plain;
  const stacked = (view.getUint8(39) >> 4) & 3;
  return {
    name, shape, data, affine, spacing: lengths(affine), slices: stacked ? stacked - 1 : undefined,
    header: { codes, quaternion, pixdim, dimInfo: view.getUint8(39), xyzt: view.getUint8(123), description: text(bytes, 148, 80) },
  };
}

function quaternionAffine([b, c, d, x, y, z], pixdim) {
  const a = Math.sqrt(Math.max(0, 1 - b * b - c * c - d * d)), flip = pixdim[0] < 0 ? -1 : 1;
  const rotation = [
    [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
  ];
  return rotation.map((row, k) => [row[0] * pixdim[1], row[1] * pixdim[2], row[2] * pixdim[3] * flip, [x, y, z][k]]);
}

const lengths = (affine) => [0, 1, 2].map((c) => Math.hypot(affine[0][c], affine[1][c], affine[2][c]));

/** As volume.slice_axis: where slices are stacked, from shape and spacing. */
export function sliceAxis({ shape, spacing }) {
  if (shape.filter((n) => n === 1).length === 1) return shape.indexOf(1);
  const equal = (a, b) => Math.abs(a - b) <= 0.01 * Math.max(a, b);
  const square = [0, 1, 2].filter((axis) => equal(...spacing.filter((_, other) => other !== axis)));
  if (square.length === 1) return square[0];
  const largest = Math.max(...spacing);
  return [2, 1, 0].find((axis) => spacing[axis] >= 0.99 * largest);
}

// ------------------------------------------------------------------------------------------------------------- DICOM

const EXPLICIT = "1.2.840.10008.1.2.1", IMPLICIT = "1.2.840.10008.1.2";
const LONG = new Set(["OB", "OW", "OF", "OD", "OL", "OV", "SQ", "UN", "UT", "UC", "UR"]);

function elements({ name, bytes }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), found = {};
  let at = 132, explicit = true, syntax = EXPLICIT;
  while (at + 8 <= bytes.length) {
    const group = view.getUint16(at, true), tag = (group * 65536 + view.getUint16(at + 2, true)).toString(16).padStart(8, "0");
    if (group > 2 && found["00020010"] && syntax === EXPLICIT) {
      syntax = string(found["00020010"]);
      if (![EXPLICIT, IMPLICIT].includes(syntax)) {
        throw new ScanError(`${name}: pixels are compressed or big endian (${syntax}), which this page cannot read; use the deformmamba package`);
      }
      explicit = syntax === EXPLICIT;
      if (!explicit) syntax = IMPLICIT;
    }
    let length, start;
    if (explicit || group === 2) {
      const kind = text(bytes, at + 4, 2);
      [length, start] = LONG.has(kind) ? [view.getUint32(at + 8, true), at + 12] : [view.getUint16(at + 6, true), at + 8];
    } else [length, start] = [view.getUint32(at + 4, true), at + 8];
    if (length === 0xffffffff) {
      if (tag === "7fe00010") throw new ScanError(`${name}: pixels are compressed, which this page cannot read; use the deformmamba package`);
      at = skipped(bytes, view, start, explicit);
      continue;
    }
    if (start + length > bytes.length) throw new ScanError(`${name}: truncated: the file is shorter than its header requires`);
    found[tag] = bytes.subarray(start, start + length);
    if (tag === "7fe00010") break;
    at = start + length;
  }
  return found;
}

/** The end of a sequence of undefined length that starts at `at`. */
function skipped(bytes, view, at, explicit) {
  for (let depth = 1; at + 8 <= bytes.length; ) {
    const group = view.getUint16(at, true), element = view.getUint16(at + 2, true);
    if (group === 0xfffe) {
      const length = view.getUint32(at + 4, true);
      at += 8;
      if (element === 0xe0dd && --depth === 0) return at;
      if (element === 0xe000 && length !== 0xffffffff) at += length;
      continue;
    }
    const long = explicit && LONG.has(text(bytes, at + 4, 2));
    const length = !explicit ? view.getUint32(at + 4, true) : long ? view.getUint32(at + 8, true) : view.getUint16(at + 6, true);
    at += long ? 12 : 8;
    if (length === 0xffffffff) depth++;
    else at += length;
  }
  return bytes.length;
}

const string = (bytes) => (bytes ? text(bytes, 0, bytes.length).trim() : "");
const decimals = (bytes) => string(bytes).split("\\").filter(Boolean).map(Number);
const short = (bytes, fallback) => (bytes && bytes.length >= 2 ? bytes[0] + 256 * bytes[1] : fallback);

function readDicom(all, dicom) {
  const damaged = all.filter((file) => !dicom.includes(file)).map(({ name }) => name);
  if (damaged.length) {
    throw new ScanError(`${damaged.length} of ${all.length} files are empty, damaged or not DICOM images (${damaged.slice(0, 3).join(", ")}); copy them again, or leave them out`);
  }
  const images = dicom.map((file) => {
    const e = elements(file), name = file.name;
    const position = decimals(e["00200032"]), orientation = decimals(e["00200037"]), pixel = decimals(e["00280030"]);
    if (!e["7fe00010"]) throw new ScanError(`${name}: its images contain no pixels`);
    if (string(e["00080008"]).includes("MOSAIC")) throw new ScanError(`${name}: a Siemens mosaic, which this page cannot read; use the deformmamba package`);
    if (decimals(e["00280008"])[0] > 1) throw new ScanError(`${name}: multi-frame DICOM, which this page cannot read; use the deformmamba package`);
    if (short(e["00280002"], 1) !== 1) throw new ScanError(`${name}: voxels are colours; extract one channel first`);
    for (const [what, values, n] of [["ImagePositionPatient", position, 3], ["ImageOrientationPatient", orientation, 6], ["PixelSpacing", pixel, 2]]) {
      if (values.length !== n || values.some((v) => !Number.isFinite(v))) throw new ScanError(`${name}: has no ${what}, so its position in the patient is unknown`);
    }
    const [rows, columns, bits] = [short(e["00280010"], 0), short(e["00280011"], 0), short(e["00280100"], 16)];
    if (![8, 16].includes(bits)) throw new ScanError(`${name}: its header gives ${bits} bits per pixel; this page reads 8 and 16`);
    if (e["7fe00010"].length < rows * columns * (bits / 8)) {
      throw new ScanError(`${name}: truncated: ${e["7fe00010"].length} bytes cannot hold the ${rows * columns} pixels of its header`);
    }
    return {
      name, rows, columns, bits, position, orientation, pixel, pixels: e["7fe00010"], series: string(e["0020000e"]),
      signed: short(e["00280103"], 0) === 1, slope: decimals(e["00281053"])[0] ?? 1, intercept: decimals(e["00281052"])[0] ?? 0,
      description: string(e["0008103e"]),
    };
  });
  const [first] = images, name = first.description || first.name;
  const series = new Set(images.map((image) => image.series));
  if (series.size > 1) throw new ScanError(`the files hold ${series.size} DICOM series; drop the files of one`);
  const same = (a, b) => a.every((v, k) => Math.abs(v - b[k]) < 1e-4);
  if (images.some((i) => i.rows !== first.rows || i.columns !== first.columns || !same(i.orientation, first.orientation))) {
    throw new ScanError(`${name}: its slices have several orientations or sizes (a localiser?); drop the files of one stack`);
  }
  const across = first.orientation.slice(0, 3), down = first.orientation.slice(3);
  const normal = [0, 1, 2].map((k) => across[(k + 1) % 3] * down[(k + 2) % 3] - across[(k + 2) % 3] * down[(k + 1) % 3]);
  const along = (image) => normal.reduce((sum, v, k) => sum + v * image.position[k], 0);
  images.sort((a, b) => along(a) - along(b));
  const steps = images.slice(1).map((image, k) => along(image) - along(images[k]));
  const mean = steps.length ? steps.reduce((a, b) => a + b) / steps.length : 1;
  if (steps.some((step) => Math.abs(step) < 1e-3)) throw new ScanError(`${name}: several slices have the same position (echoes, time points?); drop the files of one volume`);
  if (steps.some((step) => Math.abs(step - mean) > 0.05 * mean)) throw new ScanError(`${name}: slices are not evenly spaced; probably a file of the series is missing`);
  const { rows, columns, bits, signed } = first, plane = rows * columns, data = new Float32Array(plane * images.length);
  images.forEach((image, k) => {
    const view = new DataView(image.pixels.buffer, image.pixels.byteOffset, image.pixels.byteLength);
    const get = bits === 8 ? (signed ? "getInt8" : "getUint8") : signed ? "getInt16" : "getUint16";
    for (let p = 0; p < plane; p++) data[k * plane + p] = view[get]((p * bits) / 8, true) * image.slope + image.intercept;
  });
  // patient coordinates of DICOM point left and back, those of NIfTI right and front
  const step = images.length > 1 ? [0, 1, 2].map((k) => (images.at(-1).position[k] - images[0].position[k]) / (images.length - 1)) : normal;
  const affine = [0, 1, 2].map((k) => [across[k] * first.pixel[1], down[k] * first.pixel[0], step[k], images[0].position[k]].map((v) => (k < 2 ? -v : v)));
  return {
    name, shape: [columns, rows, images.length], data, affine, spacing: lengths(affine), slices: 2,
    header: { codes: { qform: 0, sform: 1 }, quaternion: [0, 0, 0, 0, 0, 0], pixdim: [1, 0, 0, 0, 0, 0, 0, 0], dimInfo: 3 << 4, xyzt: 2, description: first.description },
  };
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
  const pixdim = scan.header.pixdim.map((v, k) => (k >= 1 && k <= 3 ? v / factor[k - 1] : v));
  return { ...scan, shape, affine, spacing: lengths(affine), data: new Float32Array(shape[0] * shape[1] * shape[2]), header: { ...scan.header, pixdim } };
}

/** A NIfTI-1 file in float32, as bytes. sform and qform are written together with their codes. */
export function niftiBytes(scan) {
  const bytes = new ArrayBuffer(352 + 4 * scan.data.length), view = new DataView(bytes), { header } = scan;
  const short = (at, v) => view.setInt16(at, v, true), float = (at, v) => view.setFloat32(at, v, true);
  view.setInt32(0, 348, true);
  view.setUint8(39, header.dimInfo);
  short(40, 3);
  for (let k = 0; k < 7; k++) short(42 + 2 * k, scan.shape[k] ?? 1);
  short(70, 16);
  short(72, 32);
  float(76, header.pixdim[0] < 0 ? -1 : 1);
  for (let k = 0; k < 3; k++) float(80 + 4 * k, header.codes.qform > 0 ? Math.abs(header.pixdim[k + 1]) : scan.spacing[k]);
  float(108, 352);
  float(112, 1);
  view.setUint8(123, header.xyzt || 2);
  [...header.description.slice(0, 79)].forEach((c, k) => view.setUint8(148 + k, c.charCodeAt(0) & 127));
  short(252, header.codes.qform);
  short(254, header.codes.sform);
  header.quaternion.forEach((v, k) => float(256 + 4 * k, v));
  scan.affine.forEach((row, r) => row.forEach((v, c) => float(280 + 16 * r + 4 * c, v)));
  if (header.codes.sform <= 0 && header.codes.qform <= 0) short(254, 0);
  new Uint8Array(bytes).set([0x6e, 0x2b, 0x31, 0], 344);
  const voxels = new Float32Array(bytes, 352);
  voxels.set(scan.data);
  return bytes;
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
