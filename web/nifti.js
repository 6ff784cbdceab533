// NIfTI-1 and NIfTI-2, little or big endian, to a scan; and a scan to NIfTI-1 in float32.
import { DAMAGED, lengths, ScanError, text } from "./files.js";

// the bytes of each field, and how to read one
const FIELDS = {
  1: {
    dimInfo: [39, "Uint8"], dim: [40, "Int16"], type: [70, "Int16"], pixdim: [76, "Float32"], offset: [108, "Float32"],
    slope: [112, "Float32"], intercept: [116, "Float32"], units: [123, "Uint8"], description: [148], aside: [228],
    qform: [252, "Int16"], sform: [254, "Int16"], quaternion: [256, "Float32"], rows: [280, "Float32"],
  },
  2: {
    dimInfo: [524, "Uint8"], dim: [16, "BigInt64"], type: [12, "Int16"], pixdim: [104, "Float64"], offset: [168, "BigInt64"],
    slope: [176, "Float64"], intercept: [184, "Float64"], units: [500, "Int32"], description: [240], aside: [320],
    qform: [344, "Int32"], sform: [348, "Int32"], quaternion: [352, "Float64"], rows: [400, "Float64"],
  },
};
const BYTES = { Uint8: 1, Int16: 2, Int32: 4, Float32: 4, Float64: 8, BigInt64: 8 };
const TYPES = {
  2: ["getUint8", 1], 256: ["getInt8", 1], 4: ["getInt16", 2], 512: ["getUint16", 2], 8: ["getInt32", 4],
  768: ["getUint32", 4], 16: ["getFloat32", 4], 64: ["getFloat64", 8], 1024: ["getBigInt64", 8], 1280: ["getBigUint64", 8],
};
const UNSTATED = "orientation unknown"; // the package writes it into files whose source has no orientation
const LONGEST = 32767; // voxels along an axis of NIfTI-1

const three = [0, 1, 2], four = [0, 1, 2, 3];

export function readNifti({ name, bytes }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const version = bytes.length < 4 ? 0 : { 348: 1, 540: 2 }[view.getInt32(0, true)] ?? { 348: 1, 540: 2 }[view.getInt32(0, false)] ?? 0;
  if (!version || bytes.length < (version === 1 ? 348 : 540)) throw new ScanError(`${name}: ${otherKind(name, bytes, view)}`);
  const little = [348, 540].includes(view.getInt32(0, true));
  const magic = text(bytes, version === 1 ? 344 : 4, 4);
  if (version === 1 && (magic === "ni1" || magic === "")) {
    const what = magic ? "the .hdr half of a pair .hdr and .img" : "an Analyze 7.5 header";
    throw new ScanError(`${name}: ${what}; convert it to one .nii file`);
  }
  const damaged = () => new ScanError(`${name}: ${DAMAGED}`);
  if (magic !== `n+${version}`) throw damaged();
  const get = (field, k = 0) => {
    const [at, kind] = FIELDS[version][field];
    return Number(view[`get${kind}`](at + k * BYTES[kind], little));
  };
  const first = version === 1 ? 352 : 544, offset = get("offset");
  if (offset === 0) throw new ScanError(`${name}: the header places the voxels at byte 0, inside the header itself; correct its vox_offset (in most files ${first})`);
  if (!(offset >= first)) throw damaged();
  const n = get("dim"), dim = Array.from({ length: Math.max(3, Math.min(n, 7)) }, (_, k) => (k < n ? get("dim", 1 + k) : 1));
  if (n < 1 || n > 7) throw damaged();
  const shape = dim.slice(0, 3), more = dim.slice(3).filter((length) => length !== 1);
  if (more.length > 1) throw new ScanError(`${name}: has ${n} dimensions (${dim.join(", ")}); at most 3 can be read here`);
  if (more.length) throw new ScanError(`${name}: holds ${more[0]} volumes; save the one to upscale as a separate file`);
  if (Math.min(...shape) < 1) throw new ScanError(`${name}: a volume is a 3-D array, not one of shape (${shape.join(", ")})`);
  const type = get("type");
  if ([32, 1792, 2048].includes(type)) throw new ScanError(`${name}: voxels are complex numbers; take the magnitude first`);
  if ([128, 2304].includes(type)) throw new ScanError(`${name}: voxels are colours; extract one channel first`);
  if (!TYPES[type]) throw new ScanError(`${name}: voxels of NIfTI type ${type}, which this page cannot read; convert them to float32`);
  const [read, size] = TYPES[type], count = shape[0] * shape[1] * shape[2];
  if (offset + count * size > bytes.length) throw new ScanError(`${name}: truncated: the file is shorter than its header requires`);
  let slope = get("slope"), intercept = get("intercept");
  if (slope === 0 || !Number.isFinite(slope)) [slope, intercept] = [1, 0];
  if (!Number.isFinite(intercept)) throw damaged();
  const data = new Float32Array(count);
  for (let k = 0; k < count; k++) data[k] = Number(view[read](offset + k * size, little)) * slope + intercept;

  const units = get("units"), mm = { 1: 1000, 3: 0.001 }[units & 7] ?? 1;
  const sizes = three.map((axis) => Math.abs(get("pixdim", 1 + axis)));
  let codes = { qform: get("qform"), sform: get("sform") };
  if (codes.sform <= 0 && shape.some((length, axis) => length > 1 && !(sizes[axis] > 0))) {
    throw new ScanError(`${name}: the voxel spacing in the header is zero or missing`);
  }
  const zooms = sizes.map((v, axis) => mm * (axis < n && Number.isFinite(v) && v > 0 ? v : 1)), flip = get("pixdim") < 0 ? -1 : 1;
  let qform = { quaternion: unit(three.map((k) => get("quaternion", k))), origin: three.map((k) => mm * get("quaternion", 3 + k)), zooms, flip };
  const sform = three.map((row) => four.map((column) => mm * get("rows", 4 * row + column)));
  let affine = codes.sform > 0 ? sform : quaternionAffine(qform);
  if (codes.sform <= 0 && codes.qform <= 0) {
    // no orientation: the middle of the volume at the origin, the first axis mirrored
    const signs = [-1, 1, 1];
    affine = three.map((row) => four.map((c) => signs[row] * zooms[row] * (c === row ? 1 : c === 3 ? (1 - shape[row]) / 2 : 0)));
    qform = { quaternion: [0, 0, 1], origin: [0, 0, 0], zooms, flip: 1 };
  }
  if (text(bytes, FIELDS[version].aside[0], 24).startsWith(UNSTATED)) codes = { qform: 0, sform: 0 };
  const stacked = (get("dimInfo") >> 4) & 3;
  return {
    name, shape, data, affine, spacing: lengths(affine), slices: stacked ? stacked - 1 : undefined,
    header: { codes, qform, dimInfo: get("dimInfo"), units, description: text(bytes, FIELDS[version].description[0], 80) },
  };
}

/** What an unreadable file is, by its name and first bytes. */
function otherKind(name, bytes, view) {
  if (/\.mg[hz]$/i.test(name)) return "MGH, which this page cannot read; use the deformmamba package";
  if (/\.(hdr|img)$/i.test(name)) return "half of a pair .hdr and .img (NIfTI or Analyze), which is not read; convert it to one .nii file";
  if (bytes.length > 8 && [2, 8].includes(view.getUint16(0, true)) && /^[A-Z]{2}$/.test(text(bytes, 4, 2))) {
    return 'DICOM without the preamble ("DICM" after 128 bytes), which is not read; convert it with dcm2niix';
  }
  if (/\.nii(\.gz)?$/i.test(name)) return DAMAGED;
  return "not a scan that can be read; give .nii, .nii.gz or DICOM";
}

/** A quaternion that rounding made longer than 1 is scaled to 1. */
function unit(vector) {
  const length = Math.hypot(...vector);
  return 1 - length ** 2 <= 1e-7 ? vector.map((v) => v / length) : vector;
}

function quaternionAffine({ quaternion: [b, c, d], origin, zooms, flip }) {
  const rest = 1 - b * b - c * c - d * d, a = rest > 1e-7 ? Math.sqrt(rest) : 0;
  const rotation = [
    [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
  ];
  return rotation.map((row, k) => [row[0] * zooms[0], row[1] * zooms[1], row[2] * zooms[2] * flip, origin[k]]);
}

/** A NIfTI-1 file in float32 and mm, as bytes. sform and qform are written together with their codes. */
export function niftiBytes(scan) {
  if (Math.max(...scan.shape) > LONGEST) throw new ScanError(`NIfTI-1 holds at most ${LONGEST} voxels along an axis, not (${scan.shape.join(", ")})`);
  const bytes = new ArrayBuffer(352 + 4 * scan.data.length), view = new DataView(bytes), { header } = scan;
  const short = (at, v) => view.setInt16(at, v, true), float = (at, v) => view.setFloat32(at, v, true);
  const ascii = (at, string, n) => [...string.slice(0, n)].forEach((c, k) => view.setUint8(at + k, c.charCodeAt(0) & 127));
  const unstated = header.codes.qform <= 0 && header.codes.sform <= 0;
  view.setInt32(0, 348, true);
  view.setUint8(39, header.dimInfo);
  short(40, 3);
  for (let k = 0; k < 7; k++) short(42 + 2 * k, scan.shape[k] ?? 1);
  short(70, 16);
  short(72, 32);
  float(76, header.qform.flip);
  header.qform.zooms.forEach((v, k) => float(80 + 4 * k, v));
  float(108, 352);
  float(112, 1);
  view.setUint8(123, (header.units & 0x38) | 2);
  ascii(148, header.description, 79);
  if (unstated) ascii(228, UNSTATED, 23);
  short(252, unstated ? 1 : header.codes.qform);
  short(254, unstated ? 2 : header.codes.sform);
  [...header.qform.quaternion, ...header.qform.origin].forEach((v, k) => float(256 + 4 * k, v));
  scan.affine.forEach((row, r) => row.forEach((v, c) => float(280 + 16 * r + 4 * c, v)));
  new Uint8Array(bytes).set([0x6e, 0x2b, 0x31, 0], 344);
  new Float32Array(bytes, 352).set(scan.data);
  return bytes;
}
