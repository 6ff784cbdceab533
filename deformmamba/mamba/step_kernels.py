"""The loops of one step of a scan and of the causal convolution on a CPU, compiled by numba as C functions.

In a single step, checks and copies take longer than the arithmetic. So these functions get addresses of float32 numbers
and do everything in one call. `state_update` and `causal_conv` check the tensors first.

Everything that a kernel calls is in this file, because numba's disk cache looks for changes in this file alone.
"""

import math
from typing import Any

import numpy as np
from numba import carray, njit

_F = np.float32
_LOG2E = _F(math.log2(math.e))
# (2^f - 1) / f on [-1/2, 1/2], as in scan.cpu_kernels
_C = tuple(
    map(_F, (0.6931469775994729, 0.24022242085671935, 0.05550733742449169, 0.009671512629518219, 0.0013264727506103748))
)
_MAGIC = _F(1.5 * 2.0**23)  # adding it rounds a number to an integer, which the lowest bits hold
_LOWEST, _HIGHEST = _F(-127), _F(128)


# as mypy sees it: a compiled function is not called with the arguments of its definition
_INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # nothing else calls them
inline: Any = njit(forceinline=True, fastmath={"contract"}, **_INNER)


@inline
def _exp2(x: Any) -> Any:
    """2^x to 2 ulp; 0 and infinity beyond the range of float32, NaN for NaN."""
    limited = _LOWEST if x < _LOWEST else x
    limited = _HIGHEST if limited > _HIGHEST else limited
    shifted = _F(limited + _MAGIC)
    f = _F(limited - _F(shifted - _MAGIC))
    power = _F(_F(1) + f * (_C[0] + f * (_C[1] + f * (_C[2] + f * (_C[3] + f * _C[4])))))
    bits = np.int32(power.view(np.int32) + np.int32(shifted.view(np.int32) << np.int32(23)))
    return x if x != x else bits.view(np.float32)


def scan_step(
    state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, y: Any, images: int, heads: int, d: int, n: int,
    per_group: int, x_image: int, x_head: int, B_image: int, B_group: int, C_image: int, C_group: int,
) -> None:  # fmt: skip
    """state = exp(dt A) state + dt B x and y = C . state, with a rate for each state.

    state (images, heads, d, n), dt and y (images, heads, d) and A (heads, d, n) are contiguous; x has strides of
    images and heads, B and C of images and groups."""
    for image in range(images):
        for head in range(heads):
            first = (image * heads + head) * d
            hs, rates = carray(state, (first + d, n))[first:], carray(A, ((head + 1) * d, n))[head * d :]
            dts, ys = carray(dt, first + d)[first:], carray(y, first + d)[first:]
            at = image * x_image + head * x_head
            xs = carray(x, at + d)[at:]
            at = image * B_image + head // per_group * B_group
            Bs = carray(B, at + n)[at:]
            at = image * C_image + head // per_group * C_group
            Cs = carray(C, at + n)[at:]
            for c in range(d):
                step, u, total = dts[c] * _LOG2E, dts[c] * xs[c], _F(0)
                h, rate = hs[c], rates[c]
                for s in range(n):
                    new = _exp2(step * rate[s]) * h[s] + u * Bs[s]
                    h[s] = new
                    total += new * Cs[s]
                ys[c] = total


def head_step(
    state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, y: Any, images: int, heads: int, d: int, n: int,
    per_group: int, x_image: int, x_head: int, B_image: int, B_group: int, C_image: int, C_group: int,
) -> None:  # fmt: skip
    """`scan_step` with one rate and one step size for each head: A (heads,) and dt (images, heads)."""
    for image in range(images):
        for head in range(heads):
            first = (image * heads + head) * d
            hs, ys = carray(state, (first + d, n))[first:], carray(y, first + d)[first:]
            at = image * x_image + head * x_head
            xs = carray(x, at + d)[at:]
            at = image * B_image + head // per_group * B_group
            Bs = carray(B, at + n)[at:]
            at = image * C_image + head // per_group * C_group
            Cs = carray(C, at + n)[at:]
            step = carray(dt, images * heads)[image * heads + head]
            decay = _exp2(_F(step * carray(A, heads)[head]) * _LOG2E)
            for c in range(d):
                u, total, h = step * xs[c], _F(0), hs[c]
                for s in range(n):
                    new = decay * h[s] + u * Bs[s]
                    h[s] = new
                    total += new * Cs[s]
                ys[c] = total


def conv_step(
    x: Any, state: Any, weight: Any, bias: Any, y: Any, images: int, d: int, size: int, width: int, silu: int
) -> None:
    """One step of the causal convolution: x, y (images, d), state (images, d, size), weight (d, width), bias (d,)."""
    weights, offsets = carray(weight, (d, width)), carray(bias, d)
    for image in range(images):
        first = image * d
        xs, ys, states = (
            carray(x, first + d)[first:],
            carray(y, first + d)[first:],
            carray(state, (first + d, size))[first:],
        )
        for c in range(d):
            seen, w, total = states[c], weights[c], offsets[c] + weights[c, width - 1] * xs[c]
            for k in range(width - 1):
                total += w[k] * seen[size - width + 1 + k]
            for s in range(size - 1):
                seen[s] = seen[s + 1]
            seen[size - 1] = xs[c]
            ys[c] = total / (_F(1) + _exp2(-total * _LOG2E)) if silu else total
