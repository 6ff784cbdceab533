// The files of one DICOM series, uncompressed and one image a file, as a scan.
import { lengths, ScanError, text } from "./files.js";

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

export function readDicom(all, dicom) {
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
    const grey = (string(e["00280004"]) || "MONOCHROME2").startsWith("MONOCHROME"); // a palette has one sample too
    if (!grey || short(e["00280002"], 1) !== 1) throw new ScanError(`${name}: voxels are colours; extract one channel first`);
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
  const { rows, columns } = first, plane = rows * columns, data = new Float32Array(plane * images.length);
  images.forEach((image, k) => {
    const view = new DataView(image.pixels.buffer, image.pixels.byteOffset, image.pixels.byteLength);
    const { bits, signed } = image;
    const get = bits === 8 ? (signed ? "getInt8" : "getUint8") : signed ? "getInt16" : "getUint16";
    for (let p = 0; p < plane; p++) data[k * plane + p] = view[get]((p * bits) / 8, true) * image.slope + image.intercept;
  });
  // patient coordinates of DICOM point left and back, those of NIfTI right and front
  const step = images.length > 1 ? [0, 1, 2].map((k) => (images.at(-1).position[k] - images[0].position[k]) / (images.length - 1)) : normal;
  const affine = [0, 1, 2].map((k) => [across[k] * first.pixel[1], down[k] * first.pixel[0], step[k], images[0].position[k]].map((v) => (k < 2 ? -v : v)));
  const spacing = lengths(affine), qform = { quaternion: [0, 0, 0], origin: [0, 0, 0], zooms: spacing, flip: 1 };
  return {
    name, shape: [columns, rows, images.length], data, affine, spacing, slices: 2,
    header: { codes: { qform: 0, sform: 1 }, qform, dimInfo: 3 << 4, units: 2, description: first.description },
  };
}
