// What the readers of all formats share.

/** A file that cannot be used; the message is one line for the reader. */
export class ScanError extends Error {}

export const DAMAGED = "not a NIfTI file, or a damaged one";

/** n bytes as ASCII, up to the first zero. */
export const text = (bytes, at, n) => String.fromCharCode(...bytes.subarray(at, at + n)).replace(/\0.*$/s, "");

/** The voxel sizes of an affine. */
export const lengths = (affine) => [0, 1, 2].map((c) => Math.hypot(affine[0][c], affine[1][c], affine[2][c]));
