"""Random calls of the raw operators, most of them invalid: each must return or raise, and never crash the process.

Run: python tests/fuzz_operators.py [--calls 20000] [--seed 0]

A call starts from valid arguments and changes up to three of them: another size of an axis, one axis more or fewer,
another dtype, strides of zero, another memory order, memory that starts in the middle of a number, None, another
length, a negative or huge integer, an unknown backend. The same seed and call number give the same call.
"""

import argparse
import collections
import contextlib
import random
import sys
from typing import Any

import torch
from torch import Tensor

import deformmamba.deform.cpu
import deformmamba.mamba.causal_conv_cpu
import deformmamba.scan  # noqa: F401

OPS = torch.ops.deformmamba
INTEGERS = (-1, 0, 1, 2, 3, 5, 7, 300, 400, 2**31 - 1, 2**31, 2**62, -(2**62))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


def scan_arguments(r: random.Random, dtype: torch.dtype) -> list[Any]:
    k, b, g = r.choice((1, 2, 4)), r.randint(1, 2), r.randint(1, 2)
    h, w, c, n = r.choice((0, 1, 3, 9)), r.randint(1, 5), r.choice((1, 3, 16, 17, 33)), r.choice((1, 2, 5, 16))
    length, q = h * w, r.choice((None, None, 1, 3))
    rand = torch.randn
    return [
        "cpu",
        rand(b, g, length, c, dtype=dtype),
        rand(k, b, g, length, q or c, dtype=dtype),
        -rand(k, g, c, n, dtype=dtype).abs(),
        rand(k, b, g, length, n, dtype=dtype),
        rand(k, b, g, length, n, dtype=dtype),
        r.choice((None, rand(k, g, c, dtype=dtype))),
        r.choice((None, rand(k, g, c, dtype=dtype))),
        h,
        w,
        r.random() < 0.5,
        r.random() < 0.2,
        None if q is None else rand(k, g, c, q, dtype=dtype),
    ]


def scan(r: random.Random, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    *given, height, width, softplus, zoh, weight = scan_arguments(r, dtype)
    k, g, c, n = given[3].shape
    state = r.choice((None, torch.randn(k, given[1].shape[0], g, c, n, dtype=dtype)))
    return OPS.scan, [*given, state, height, width, softplus, zoh, r.random() < 0.5, weight]


def scan_backward(r: random.Random, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    *given, height, width, softplus, zoh, weight = scan_arguments(r, dtype)
    u, A = given[1], given[3]
    (k, g, c, n), b = A.shape, u.shape[0]
    kept = torch.randn(k, b, g, -(-u.shape[2] // 128), n, c, dtype=dtype)
    more = [kept, torch.randn_like(u), torch.randn(k, b, g, c, n, dtype=dtype)]
    return OPS.scan_backward, [*given, *more, height, width, softplus, zoh, weight]


def deform_arguments(r: random.Random, dtype: torch.dtype) -> list[Any]:
    b, h, w = r.randint(1, 2), r.randint(1, 6), r.randint(1, 6)
    groups, c_in, kh, kw = r.choice((1, 2)), r.choice((1, 3, 16)), r.choice((1, 3)), r.choice((1, 2, 3))
    c, c_out = groups * c_in, groups * r.randint(1, 3)
    geometry = [r.randint(1, 2), r.randint(1, 2), r.randint(1, 3), r.randint(1, 3), 1, r.randint(1, 2)]
    h_out = (h + 2 * geometry[2] - geometry[4] * (kh - 1) - 1) // geometry[0] + 1
    w_out = (w + 2 * geometry[3] - geometry[5] * (kw - 1) - 1) // geometry[1] + 1
    h_out, w_out = max(h_out, 0), max(w_out, 0)
    deform = r.choice([d for d in (1, 2, c) if c % d == 0])
    offset = torch.randn(b, h_out, w_out, 2 * deform * kh * kw, dtype=dtype) * r.choice((1, 10, 1e6, 1e30))
    if offset.numel() and r.random() < 0.3:
        offset.view(-1)[r.randrange(offset.numel())] = r.choice((float("nan"), float("inf"), -float("inf")))
    return [
        torch.randn(b, h, w, c, dtype=dtype),
        offset,
        r.choice((None, torch.rand(b, h_out, w_out, deform * kh * kw, dtype=dtype))),
        torch.randn(c_out, kh, kw, c_in, dtype=dtype),
        geometry,
    ]


def deform(r: random.Random, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    *given, geometry = deform_arguments(r, dtype)
    bias = r.choice((None, torch.randn(given[3].shape[0], dtype=dtype)))
    return OPS.deform_conv2d, [*given, bias, geometry]


def deform_backward(r: random.Random, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    *given, geometry = deform_arguments(r, dtype)
    grad = torch.randn(*given[1].shape[:3], given[3].shape[0], dtype=dtype)
    return OPS.deform_conv2d_backward, [grad, *given, geometry, [r.random() < 0.7 for _ in range(4)]]


def causal_conv(r: random.Random, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    b, d, length, width = r.randint(1, 2), r.choice((1, 5, 300)), r.choice((0, 1, 3, 20)), r.randint(1, 4)
    x, bias = torch.randn(b, d, length, dtype=dtype), r.choice((None, torch.randn(d, dtype=dtype)))
    return OPS.causal_conv, [x, torch.randn(d, width, dtype=dtype), bias]


def causal_conv_backward(r: random.Random, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    _, (x, weight, _) = causal_conv(r, dtype)
    return OPS.causal_conv_backward, [x, weight, torch.randn_like(x)]


def other_tensor(r: random.Random, x: Tensor) -> Any:
    """`x` changed in one way."""
    if not x.ndim:
        return x.reshape(1)
    axis = r.randrange(x.ndim)
    size = r.choice((0, 1, max(x.shape[axis] - 1, 0), x.shape[axis] + 1, 37))
    shape = [*x.shape]
    shape[axis] = size
    kinds = ("more", "fewer", "dtype", "zero", "order", "middle", "none", "swap", "meta")
    kind = r.choice(("size",) * 3 + kinds)
    if kind == "size":
        return torch.ones(shape, dtype=x.dtype)
    if kind == "more":
        return x.unsqueeze(axis)
    if kind == "fewer":
        return x.flatten(max(axis - 1, 0), axis) if x.ndim > 1 else x[0] if len(x) else x
    if kind == "dtype":
        return x.to(r.choice(DTYPES))
    if kind == "zero":
        return x[(*[slice(None)] * axis, slice(0, 1))].expand(x.shape)
    if kind == "order":
        order = r.sample(range(x.ndim), x.ndim)
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])
    if kind == "middle" and x.numel():
        bytes_ = torch.zeros(x.numel() * x.element_size() + 1, dtype=torch.uint8).numpy()[1:]
        with contextlib.suppress(ValueError):
            return torch.frombuffer(memoryview(bytes_), dtype=x.dtype).reshape(x.shape)
    if kind == "swap":
        return x.transpose(axis, r.randrange(x.ndim))
    if kind == "meta":
        return r.choice((x.to("meta"), x.to_sparse() if x.ndim else x))
    return None


def changed(r: random.Random, value: Any) -> Any:
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        return other_tensor(r, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice(INTEGERS)
    if isinstance(value, str):
        return r.choice(("cpu", "triton", "eager", "reference", "mamba_ssm", "", "no such"))
    if isinstance(value, list) and value:
        if r.random() < 0.3:
            return value[: r.randrange(len(value))]
        i = r.randrange(len(value))
        return [changed(r, x) if j == i else x for j, x in enumerate(value)]
    return r.choice((None, torch.ones(r.randint(0, 3)), 3))


def call(seed: int, i: int) -> str:
    """The outcome of call `i`: "ok", or the name of the exception."""
    r = random.Random(f"{seed}-{i}")
    torch.manual_seed(i)
    make = r.choice((scan, scan_backward, deform, deform_backward, causal_conv, causal_conv_backward))
    operator, arguments = make(r, r.choice((torch.float32, torch.float32, torch.float64)))
    for _ in range(r.choice((0, 1, 1, 2, 3))):
        j = r.randrange(len(arguments))
        arguments[j] = changed(r, arguments[j])
    try:
        operator(*arguments)
    except Exception as error:  # any exception is allowed, a crash is not
        return type(error).__name__
    return "ok"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = collections.Counter()
    for i in range(args.calls):
        if i % 500 == 0:
            print(i, file=sys.stderr, flush=True)
        found[call(args.seed, i)] += 1
    print(*(f"{name} {count}" for name, count in found.most_common()), sep="\n")


if __name__ == "__main__":
    main()
