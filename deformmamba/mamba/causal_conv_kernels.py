"""The loops of the causal convolution on a CPU; compiled by numba, plain Python without it.

Maps are flat arrays with the strides of their axes, so that the innermost loop reads consecutive numbers:
`forward_time` and `backward_time` for maps with adjacent time steps, `forward_channels` and `backward_channels` for
maps with adjacent channels. A job is (image, first channel, end).

The innermost loops run from 0 over slices: numba does not vectorise a loop whose index may be negative.
"""

import numpy as np


def forward_time(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, y: np.ndarray, length: int, strides: tuple[int, int],
    jobs: np.ndarray,
) -> None:  # fmt: skip
    """y[t] = bias + sum over k of weight[k] x[t - (width - 1) + k]; y is (image, channel, time), contiguous."""
    channels, width = weight.shape
    for job in range(len(jobs)):
        image = jobs[job, 0]
        for d in range(jobs[job, 1], jobs[job, 2]):
            start = image * strides[0] + d * strides[1]
            out = (image * channels + d) * length
            whole, result = x[start : start + length], y[out : out + length]
            offset = bias[d]
            if width == 4 and length > 3:
                w0, w1, w2, w3 = weight[d, 0], weight[d, 1], weight[d, 2], weight[d, 3]
                result[0] = offset + w3 * whole[0]
                result[1] = offset + w3 * whole[1] + w2 * whole[0]
                result[2] = offset + w3 * whole[2] + w2 * whole[1] + w1 * whole[0]
                late = result[3:]
                x0, x1, x2, x3 = whole[: length - 3], whole[1 : length - 2], whole[2 : length - 1], whole[3:]
                for i in range(length - 3):
                    late[i] = offset + w0 * x0[i] + w1 * x1[i] + w2 * x2[i] + w3 * x3[i]
                continue
            for i in range(length):
                result[i] = offset
            for k in range(width):
                factor, shift = weight[d, k], width - 1 - k
                if shift < length:
                    late = result[shift:]
                    for i in range(length - shift):
                        late[i] += factor * whole[i]


def backward_time(
    x: np.ndarray, weight: np.ndarray, dy: np.ndarray, dx: np.ndarray, dweight: np.ndarray, dbias: np.ndarray,
    length: int, strides: tuple[int, int], jobs: np.ndarray,
) -> None:  # fmt: skip
    """Gradients; dweight (image, channel, width) and dbias (image, channel) are to be summed over images."""
    channels, width = weight.shape
    for job in range(len(jobs)):
        image = jobs[job, 0]
        for d in range(jobs[job, 1], jobs[job, 2]):
            start = image * strides[0] + d * strides[1]
            out = (image * channels + d) * length
            whole, given, result = x[start : start + length], dy[out : out + length], dx[out : out + length]
            total = dy.dtype.type(0)
            for i in range(length):
                result[i] = 0
                total += given[i]
            dbias[image, d] = total
            for k in range(width):
                factor, shift = weight[d, k], width - 1 - k
                total = dy.dtype.type(0)
                if shift < length:
                    late = given[shift:]
                    for i in range(length - shift):
                        total += late[i] * whole[i]
                        result[i] += factor * late[i]
                dweight[image, d, k] = total


def forward_channels(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, y: np.ndarray, length: int, strides: tuple[int, int],
    jobs: np.ndarray,
) -> None:  # fmt: skip
    """The same with weight (width, channel) and y (image, time, channel); strides of (image, time) in x."""
    width, channels = weight.shape
    for job in range(len(jobs)):
        image, first, end = jobs[job, 0], jobs[job, 1], jobs[job, 2]
        size = end - first
        offset = bias[first:end]
        for t in range(length):
            out = (image * length + t) * channels + first
            result = y[out : out + size]
            start = image * strides[0] + t * strides[1] + first
            if width == 4 and t > 2:
                w0, w1, w2, w3 = weight[0, first:end], weight[1, first:end], weight[2, first:end], weight[3, first:end]
                x0 = x[start - 3 * strides[1] : start - 3 * strides[1] + size]
                x1 = x[start - 2 * strides[1] : start - 2 * strides[1] + size]
                x2, x3 = x[start - strides[1] : start - strides[1] + size], x[start : start + size]
                for i in range(size):
                    result[i] = offset[i] + w0[i] * x0[i] + w1[i] * x1[i] + w2[i] * x2[i] + w3[i] * x3[i]
                continue
            for i in range(size):
                result[i] = offset[i]
            for k in range(max(width - 1 - t, 0), width):
                step = start - (width - 1 - k) * strides[1]
                row, factor = x[step : step + size], weight[k, first:end]
                for i in range(size):
                    result[i] += factor[i] * row[i]


def backward_channels(
    x: np.ndarray, weight: np.ndarray, dy: np.ndarray, dx: np.ndarray, dweight: np.ndarray, dbias: np.ndarray,
    length: int, strides: tuple[int, int], jobs: np.ndarray,
) -> None:  # fmt: skip
    """Gradients; dweight (image, width, channel) and dbias (image, channel) are to be summed over images."""
    width, channels = weight.shape
    for job in range(len(jobs)):
        image, first, end = jobs[job, 0], jobs[job, 1], jobs[job, 2]
        size = end - first
        dweight[image, :, first:end] = 0
        into_bias = dbias[image, first:end]
        into_bias[:] = 0
        for t in range(length):
            out = (image * length + t) * channels + first
            given, result = dy[out : out + size], dx[out : out + size]
            for i in range(size):
                result[i] = 0
                into_bias[i] += given[i]
            for k in range(max(width - 1 - t, 0), width):
                shift = width - 1 - k
                step = image * strides[0] + (t - shift) * strides[1] + first
                row, factor, into = x[step : step + size], weight[k, first:end], dweight[image, k, first:end]
                earlier = dx[out - shift * channels : out - shift * channels + size]
                for i in range(size):
                    into[i] += given[i] * row[i]
                    earlier[i] += factor[i] * given[i]
