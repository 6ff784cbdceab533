"""The loops of the causal convolution on a CPU; compiled by numba, plain Python without it.

Maps are flat arrays with the strides of their axes, so that the innermost loop reads consecutive numbers:
`forward_time` and `backward_time` for maps with adjacent time steps, `forward_channels` and `backward_channels` for
maps with adjacent channels. A job is (image, first channel, end).
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
            for t in range(length):
                y[out + t] = bias[d]
            for k in range(width):
                factor, shift = weight[d, k], width - 1 - k
                for t in range(shift, length):
                    y[out + t] += factor * x[start + t - shift]


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
            total = dy.dtype.type(0)
            for t in range(length):
                dx[out + t] = 0
                total += dy[out + t]
            dbias[image, d] = total
            for k in range(width):
                factor, shift = weight[d, k], width - 1 - k
                total = dy.dtype.type(0)
                for t in range(shift, length):
                    total += dy[out + t] * x[start + t - shift]
                    dx[out + t - shift] += factor * dy[out + t]
                dweight[image, d, k] = total


def forward_channels(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, y: np.ndarray, length: int, strides: tuple[int, int],
    jobs: np.ndarray,
) -> None:  # fmt: skip
    """The same with weight (width, channel) and y (image, time, channel); strides of (image, time) in x."""
    width, channels = weight.shape
    for job in range(len(jobs)):
        image, first, end = jobs[job, 0], jobs[job, 1], jobs[job, 2]
        for t in range(length):
            out = (image * length + t) * channels
            for d in range(first, end):
                y[out + d] = bias[d]
            for k in range(max(width - 1 - t, 0), width):
                start = image * strides[0] + (t - (width - 1) + k) * strides[1]
                for d in range(first, end):
                    y[out + d] += weight[k, d] * x[start + d]


def backward_channels(
    x: np.ndarray, weight: np.ndarray, dy: np.ndarray, dx: np.ndarray, dweight: np.ndarray, dbias: np.ndarray,
    length: int, strides: tuple[int, int], jobs: np.ndarray,
) -> None:  # fmt: skip
    """Gradients; dweight (image, width, channel) and dbias (image, channel) are to be summed over images."""
    width, channels = weight.shape
    for job in range(len(jobs)):
        image, first, end = jobs[job, 0], jobs[job, 1], jobs[job, 2]
        dweight[image, :, first:end] = 0
        dbias[image, first:end] = 0
        for t in range(length):
            out = (image * length + t) * channels
            for d in range(first, end):
                dx[out + d] = 0
                dbias[image, d] += dy[out + d]
            for k in range(max(width - 1 - t, 0), width):
                shift = width - 1 - k
                start = image * strides[0] + (t - shift) * strides[1]
                for d in range(first, end):
                    dweight[image, k, d] += dy[out + d] * x[start + d]
                    dx[out - shift * channels + d] += weight[k, d] * dy[out + d]
