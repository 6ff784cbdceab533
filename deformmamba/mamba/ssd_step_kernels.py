"""The loop of Mamba-2's scan step by step on a CPU, which numba compiles. `ssd_steps` checks and calls it.

Everything that the kernel calls is in this file, because numba's disk cache looks for changes in this file alone.
"""

import numpy as np


def scan(
    x: np.ndarray, dt: np.ndarray, decay: np.ndarray, B: np.ndarray, C: np.ndarray, h: np.ndarray, y: np.ndarray,
    kept: np.ndarray, span: int, first: int, end: int,
) -> None:  # fmt: skip
    """h = decay h + dt x B' and y = h C for the heads from `first` to `end`, four steps in each pass over a state.

    x, y (l, r, p), dt, decay (l, r), B, C (l, n), h (r, n, p), replaced by the last state; kept (spans, n, r, p), the
    states before each span if there are any. l and span are multiples of 4."""
    length, _, p = x.shape
    n = B.shape[1]
    state, outputs, inputs = np.empty((n, p), x.dtype), np.empty((4, p), x.dtype), np.empty((4, p), x.dtype)
    y0, y1, y2, y3 = outputs[0], outputs[1], outputs[2], outputs[3]
    u0, u1, u2, u3 = inputs[0], inputs[1], inputs[2], inputs[3]
    for k in range(first, end):
        state[:] = h[k]
        for t in range(0, length, 4):
            if len(kept) and t % span == 0:
                kept[t // span, :, k] = state
            for c in range(p):
                u0[c], u1[c] = dt[t, k] * x[t, k, c], dt[t + 1, k] * x[t + 1, k, c]
                u2[c], u3[c] = dt[t + 2, k] * x[t + 2, k, c], dt[t + 3, k] * x[t + 3, k, c]
            outputs[:] = 0
            d0, d1, d2, d3 = decay[t, k], decay[t + 1, k], decay[t + 2, k], decay[t + 3, k]
            for s in range(n):
                b0, b1, b2, b3 = B[t, s], B[t + 1, s], B[t + 2, s], B[t + 3, s]
                c0, c1, c2, c3 = C[t, s], C[t + 1, s], C[t + 2, s], C[t + 3, s]
                row = state[s]
                for c in range(p):
                    value = d0 * row[c] + b0 * u0[c]
                    y0[c] += c0 * value
                    value = d1 * value + b1 * u1[c]
                    y1[c] += c1 * value
                    value = d2 * value + b2 * u2[c]
                    y2[c] += c2 * value
                    value = d3 * value + b3 * u3[c]
                    y3[c] += c3 * value
                    row[c] = value
            y[t, k], y[t + 1, k], y[t + 2, k], y[t + 3, k] = y0, y1, y2, y3
        h[k] = state
