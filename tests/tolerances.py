"""How closely two floating-point computations of the same numbers must agree.

With another batch size, number of threads, instruction set or release of a library, the same numbers are added in
another order. The rounding error then differs by a few units in the last place of the LARGEST number in a sum, not of
the result. So the allowed difference grows with the largest expected value of a tensor. PyTorch's default in float32 is
1e-5, whatever the values are: about 80 units in the last place for images of about 1, but less than one for images of
about 900.

Bit equality (`torch.equal`) is only for operations that promise it: saving and loading, resuming a training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def assert_close(actual: Any, expected: Any, **options: Any) -> None:
    """`torch.testing.assert_close` with the absolute tolerance `share` * max(1, largest |expected|).

    The shares are PyTorch's: 1e-7 in float64, and 1e-5 in float32, bfloat16 and float16; the relative tolerance is
    1.6e-2 in bfloat16 and 1e-3 in float16. Arrays, numbers, and lists and dictionaries of tensors work too; each tensor
    has its own tolerance.
    """
    __tracebackhide__ = True
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_close(actual[key], expected[key], **options)
    elif isinstance(expected, Sequence) and any(isinstance(x, torch.Tensor | Sequence) or x is None for x in expected):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b, **options)
    elif expected is None:
        assert actual is None
    else:
        if not isinstance(expected, torch.Tensor):  # arrays, numbers: dtypes may differ, NaN equals NaN
            actual, expected = (torch.as_tensor(np.ascontiguousarray(x)) for x in (actual, expected))
            options = {"check_dtype": False, "equal_nan": True, **options}
        torch.testing.assert_close(actual, expected, **{**_tolerance(actual, expected), **options})


def _tolerance(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    kinds = [x.dtype for x in (actual, expected) if x.dtype.is_floating_point or x.dtype.is_complex]
    if not kinds or not expected.numel():
        return {}
    shares = {torch.float64: (1e-7, 1e-7), torch.complex128: (1e-7, 1e-7)}
    coarse = {torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (1e-3, 1e-5)}
    rtol, share = max((coarse | shares).get(kind, (1.3e-6, 1e-5)) for kind in kinds)
    sizes = expected.detach().abs().double()
    sizes = sizes[sizes.isfinite()]
    return {"rtol": rtol, "atol": share * max(1.0, float(sizes.max()) if sizes.numel() else 0.0)}
