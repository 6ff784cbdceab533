"""Image degradation models: named, seeded and composable.

    fewer_lines = KSpaceCrop(scale=4)
    photographic = GaussianBlur(sigma=1.5) >> Subsample(scale=4) >> RicianNoise(snr=30)
    lr = photographic(hr, seed=7)
    photographic == parse("blur:sigma=1.5 >> subsample:scale=4 >> rician:snr=30")

An image is (..., H, W), float32 or float64; degradations with output="magnitude" also take complex images. A stack is
degraded slice by slice. Every degradation has the factor by which it shrinks an image (`scale`) and the grid of the
result (`grid`, see `deformmamba.physics.kspace.Grid`). It has an adjoint, or `no_adjoint` gives the reason. The paper
uses `KSpaceCrop` alone. The others are also common in the field; results on one do not carry over to another.

Noise depends on the seed and the slice number only: the k-th slice of a stack gets the same noise as that slice alone
with `first=k`, on any device and for any batch size.
"""

import dataclasses
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F

from deformmamba.annotations import check_seed, check_types, is_integer, is_number, is_one_of
from deformmamba.errors import InvalidArgument, did_you_mean, shown
from deformmamba.physics.kspace import (
    Grid,
    crop_spectrum,
    degrade,
    fft2c,
    ifft2c,
    pad_spectrum,
    undivided,
    zero_fill,
)
from deformmamba.tensors import constant

Seed = int | tuple[int, ...]
Output = Literal["magnitude", "real"]


class Degradation(ABC):
    """One step, or several, from an HR image to an LR image.

    Attributes:
        kind: its name in `DEGRADATIONS`.
        scale: the image shrinks by this factor in height and width; 1 for an unchanged size.
        grid: the positions of the result's samples on the image; at scale 1 both grids are the same.
    """

    kind: ClassVar[str]
    scale: int
    grid: Grid = "origin"

    @property
    def no_adjoint(self) -> str | None:
        """The reason why there is no adjoint; None if there is one."""
        return None

    @property
    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.float32, torch.float64

    def __call__(self, hr: torch.Tensor, *, seed: Seed = 0, first: int = 0) -> torch.Tensor:
        """(..., H, W) to (..., H / scale, W / scale), real, same precision.

        Args:
            hr: the image to degrade; noise levels refer to values of about [0, 1].
            seed: random seed of the noise, if any; one non-negative integer or several.
            first: the number of the first slice within its volume, for a stack that is a part of one.

        Raises:
            ValueError: `scale` does not divide H and W, `hr` is not an image of floating-point numbers, or `seed` or
                `first` is not a whole number of 0 or more.
        """
        if not isinstance(hr, torch.Tensor) or hr.ndim < 2 or hr.dtype not in self._dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in self._dtypes)
            given = f"{hr.dtype} {tuple(hr.shape)}" if isinstance(hr, torch.Tensor) else f"a {type(hr).__name__}"
            raise InvalidArgument(f"{self}: wanted a tensor of {wanted} (..., H, W), not {given}")
        self.size(*hr.shape[-2:])
        return self._apply(hr, _seeds(seed), check_seed(first, "first"))

    @abstractmethod
    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor: ...

    def size(self, h: int, w: int) -> tuple[int, int]:
        """The size of the result of an image of h x w; ValueError if the scale does not divide it."""
        s = self.scale
        if h % s or w % s or not h or not w:
            raise undivided(self.kind, s, h, w)
        return h // s, w // s

    def adjoint(self, lr: torch.Tensor) -> torch.Tensor:
        """A* of y (..., h, w): the image (..., scale * h, scale * w) with <A x, y> = <x, A* y> for every x.

        Raises:
            ValueError: the degradation is not linear, so it has no adjoint; `no_adjoint` gives the reason.
        """
        if self.no_adjoint:
            raise InvalidArgument(f"{self}: has no adjoint: {self.no_adjoint}")
        return self._adjoint(lr)

    def _adjoint(self, lr: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__}: has neither an adjoint nor a reason for having none")

    def __rshift__(self, after: "Degradation") -> "Compose":
        return Compose((*_parts(self), *_parts(after)))

    def __str__(self) -> str:
        """The text from which `parse` builds this degradation."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return self.kind + (":" if values else "") + ",".join(f"{name}={value}" for name, value in values.items())


def _check(valid: bool, owner: str, name: str, value: Any, wanted: str) -> None:
    if not valid:
        raise InvalidArgument(f"{owner}: {name} must be {wanted}, not {shown(value)}")


def _seeds(seed: Any) -> tuple[int, ...]:
    """A seed, or several, as plain integers."""
    seeds = seed if isinstance(seed, (tuple, list)) and seed else (seed,)
    return tuple(check_seed(one) for one in seeds)


def _check_integer(made: Degradation, name: str, wanted: str, low: int, high: int) -> None:
    """Checks the field `name`, which becomes a plain integer."""
    value = getattr(made, name)
    _check(is_integer(value) and low <= value <= high, made.kind, name, value, wanted)
    object.__setattr__(made, name, operator.index(value))


def _check_factor(made: Degradation, name: str) -> None:
    _check_integer(made, name, "an integer from 1 to 64", 1, 64)


def _check_number(made: Degradation, name: str, wanted: str, valid: Callable[[float], bool]) -> None:
    """Checks the field `name`; a number of numpy becomes a plain one."""
    value = getattr(made, name)
    _check(is_number(value) and valid(float(value)), made.kind, name, value, wanted)
    if not isinstance(value, int):  # an integer stays one, for the text
        object.__setattr__(made, name, float(value))


def gives_magnitudes(degradation: Degradation) -> bool:
    """Whether the result is a magnitude, so that negative values lose their signs."""
    parts = degradation.parts if isinstance(degradation, Compose) else (degradation,)
    return any(isinstance(part, RicianNoise) or getattr(part, "output", None) == "magnitude" for part in parts)


class _KSpace(Degradation):
    """Degradations that are linear in k-space; the magnitude taken afterwards is not linear."""

    output: Output

    @property
    def no_adjoint(self) -> str | None:
        return "a magnitude folds negative values, so it is not linear" if self.output == "magnitude" else None

    @property
    def _dtypes(self) -> tuple[torch.dtype, ...]:
        real = (torch.float32, torch.float64)
        return (*real, torch.complex64, torch.complex128) if self.output == "magnitude" else real

    def _check_output(self) -> None:
        _check(is_one_of(self.output, get_args(Output)), self.kind, "output", self.output, '"magnitude" or "real"')

    def _shown(self, image: torch.Tensor) -> torch.Tensor:
        return image.abs() if self.output == "magnitude" else image.real


@dataclass(frozen=True)
class KSpaceCrop(_KSpace):
    """The central 1/scale x 1/scale of k-space, transformed to a smaller image: `deformmamba.physics.kspace.degrade`.

    Origin-aligned. The adjoint of the real part is zero-filling, divided by scale^2.

    Source: the paper, section 3.1, and its references there.
    """

    scale: int
    output: Output = "magnitude"
    kind: ClassVar[str] = "k-space"

    def __post_init__(self) -> None:
        _check_factor(self, "scale")
        self._check_output()

    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor:
        return degrade(hr, self.scale, output=self.output)

    def _adjoint(self, lr: torch.Tensor) -> torch.Tensor:
        return zero_fill(lr, self.scale) / self.scale**2


@dataclass(frozen=True)
class Truncation(_KSpace):
    """The central 1/factor x 1/factor of k-space, zeros around it: a blurred image of the same size.

    The real part is its own adjoint.
    """

    factor: int
    output: Output = "magnitude"
    kind: ClassVar[str] = "truncation"
    scale = 1

    def __post_init__(self) -> None:
        _check_factor(self, "factor")
        self._check_output()

    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor:
        h, w = hr.shape[-2:]
        kept = crop_spectrum(fft2c(hr), (max(1, h // self.factor), max(1, w // self.factor)))
        return self._shown(ifft2c(pad_spectrum(kept, (h, w))))

    def _adjoint(self, lr: torch.Tensor) -> torch.Tensor:
        return self._apply(lr, (), 0)


@dataclass(frozen=True)
class PartialFourier(_KSpace):
    """k-space whose last lines are not measured and are zero, as in a shortened scan; the size does not change.

    Of n lines along `axis` (-2: rows, -1: columns) the first round(fraction * n) are kept, from the most negative
    frequency on, so more than one half: 0.75 is a scanner's 6/8. The real part is its own adjoint.
    """

    fraction: float = 0.75
    axis: int = -2
    output: Output = "magnitude"
    kind: ClassVar[str] = "partial-fourier"
    scale = 1

    def __post_init__(self) -> None:
        _check_number(self, "fraction", "above 0.5 and at most 1", lambda fraction: 0.5 < fraction <= 1)
        _check_integer(self, "axis", "-2 (rows) or -1 (columns)", -2, -1)
        self._check_output()

    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor:
        n = hr.shape[self.axis]
        measured = torch.arange(n, device=hr.device) < max(round(self.fraction * n), n // 2 + 1)
        return self._shown(ifft2c(fft2c(hr) * (measured[:, None] if self.axis == -2 else measured)))

    def _adjoint(self, lr: torch.Tensor) -> torch.Tensor:
        return self._apply(lr, (), 0)


class _Separable(Degradation):
    """One matrix per side: lr = rows @ hr @ columns^T. The adjoint uses the transposed matrices."""

    @abstractmethod
    def matrix(self, n: int) -> torch.Tensor:
        """(n / scale, n), float64: the weight of each of n input samples in each output sample."""

    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor:
        rows, columns = (_matrix(self, n).to(hr) for n in hr.shape[-2:])
        return rows @ hr @ columns.T

    def _adjoint(self, lr: torch.Tensor) -> torch.Tensor:
        rows, columns = (_matrix(self, n * self.scale).to(lr) for n in lr.shape[-2:])
        return rows.T @ lr @ columns


@constant(maxsize=4)  # a matrix of 1,024 x 1,024 takes 8 MB
def _matrix(degradation: _Separable, n: int) -> torch.Tensor:
    return degradation.matrix(n)


@dataclass(frozen=True)
class AreaAverage(_Separable):
    """The mean of scale x scale pixels, as measured by a larger detector element. Half-pixel grid."""

    scale: int
    kind: ClassVar[str] = "area"
    grid = "half-pixel"

    def __post_init__(self) -> None:
        _check_factor(self, "scale")

    def matrix(self, n: int) -> torch.Tensor:
        weights = torch.full((1, self.scale), 1 / self.scale, dtype=torch.float64)
        return torch.kron(torch.eye(n // self.scale, dtype=torch.float64), weights)


@dataclass(frozen=True)
class Bicubic(_Separable):
    """Cubic resampling with an antialiasing kernel, as in Pillow and the "bicubic" data sets of photographs.

    a = -0.5, the kernel `scale` times as wide as for enlarging, cut and renormalised at the edges. Half-pixel grid.
    """

    scale: int
    kind: ClassVar[str] = "bicubic"
    grid = "half-pixel"

    def __post_init__(self) -> None:
        _check_factor(self, "scale")

    def matrix(self, n: int) -> torch.Tensor:
        unit = torch.eye(n, dtype=torch.float64)[None, None]  # column k is the k-th unit vector; widths stay
        size = (n // self.scale, n)
        return F.interpolate(unit, size=size, mode="bicubic", antialias=True, align_corners=False)[0, 0]


@dataclass(frozen=True)
class Subsample(_Separable):
    """Every scale-th pixel, from pixel 0 on, without an anti-aliasing filter: use it after a blur. Origin-aligned."""

    scale: int
    kind: ClassVar[str] = "subsample"

    def __post_init__(self) -> None:
        _check_factor(self, "scale")

    def matrix(self, n: int) -> torch.Tensor:
        return torch.eye(n, dtype=torch.float64)[:: self.scale]


@dataclass(frozen=True)
class GaussianBlur(_Separable):
    """A Gaussian of standard deviation `sigma` pixels, cut at 4 sigma, sum 1, edges replicated; the size stays."""

    sigma: float
    kind: ClassVar[str] = "blur"
    scale = 1

    def __post_init__(self) -> None:
        _check_number(self, "sigma", "above 0 and at most 64 pixels", lambda sigma: 0 < sigma <= 64)

    def matrix(self, n: int) -> torch.Tensor:
        radius = int(4 * self.sigma + 0.5)
        offsets = torch.arange(-radius, radius + 1)
        weights = torch.exp(-0.5 * (offsets.double() / self.sigma) ** 2)
        taps = (torch.arange(n)[:, None] + offsets).clamp(0, n - 1)
        matrix = torch.zeros(n, n, dtype=torch.float64)
        return matrix.scatter_add_(1, taps, (weights / weights.sum()).expand(n, -1).contiguous())


class _Noise(Degradation):
    scale = 1
    snr: float
    reference: float

    @property
    def no_adjoint(self) -> str | None:
        return "noise is added, so it is not linear"

    def _check_noise(self) -> None:
        for name in ("snr", "reference"):
            _check_number(self, name, "a positive number", lambda value: 0 < value < float("inf"))

    def _drawn(self, hr: torch.Tensor, fields: int, seed: tuple[int, ...], first: int) -> torch.Tensor:
        """(fields, ..., H, W): independent normal noise of standard deviation reference / snr."""
        n = hr.shape[:-2].numel()
        noise = np.empty((fields, n, *hr.shape[-2:]))
        for k in range(n):
            noise[:, k] = np.random.default_rng((*seed, first + k)).standard_normal((fields, *hr.shape[-2:]))
        noise *= self.reference / self.snr
        return torch.from_numpy(noise).reshape(fields, *hr.shape).to(hr)


@dataclass(frozen=True)
class GaussianNoise(_Noise):
    """Adds normal noise of standard deviation reference / snr, as in the real part of a measured image.

    `reference` is the intensity that `snr` refers to: 1, the bright tissue of an image divided by its intensity scale.
    """

    snr: float
    reference: float = 1.0
    kind: ClassVar[str] = "noise"

    def __post_init__(self) -> None:
        self._check_noise()

    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor:
        return hr + self._drawn(hr, 1, seed, first)[0]


@dataclass(frozen=True)
class RicianNoise(_Noise):
    """The magnitude of an image with normal noise in its real and its imaginary part, as from scanners.

    Standard deviation of each part: reference / snr. `reference` as in `GaussianNoise`. Without signal the result has
    the mean of a Rayleigh distribution, sqrt(pi / 2) standard deviations.

    Source: Gudbjartsson and Patz, MRM 34 (1995), equation 1.
    """

    snr: float
    reference: float = 1.0
    kind: ClassVar[str] = "rician"

    def __post_init__(self) -> None:
        self._check_noise()

    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor:
        real, imaginary = self._drawn(hr, 2, seed, first)
        return torch.hypot(hr + real, imaginary)


@dataclass(frozen=True)
class Compose(Degradation):
    """One degradation after another, first to last; `a >> b` makes one. Each draws its own noise.

    Scales multiply. Parts that shrink the image must have the same grid, which is that of the whole.

    Raises:
        ValueError: no part, or parts on different grids.
    """

    parts: tuple[Degradation, ...]
    kind: ClassVar[str] = "compose"

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise InvalidArgument(f"compose: no degradation given; wanted at least one of {', '.join(DEGRADATIONS)}")
        grids = {part.grid for part in self.parts if part.scale > 1}
        if len(grids) > 1:
            raise InvalidArgument(
                f"{self}: some parts lie on the origin grid, some on the half-pixel grid; wanted one grid"
            )
        object.__setattr__(self, "scale", int(np.prod([part.scale for part in self.parts])))
        object.__setattr__(self, "grid", grids.pop() if grids else "origin")

    @property
    def no_adjoint(self) -> str | None:
        return next((f"{part.kind}: {part.no_adjoint}" for part in self.parts if part.no_adjoint), None)

    @property
    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return self.parts[0]._dtypes

    def _apply(self, hr: torch.Tensor, seed: tuple[int, ...], first: int) -> torch.Tensor:
        for k, part in enumerate(self.parts):
            hr = part(hr, seed=(*seed, k), first=first)
        return hr

    def _adjoint(self, lr: torch.Tensor) -> torch.Tensor:
        for part in reversed(self.parts):
            lr = part.adjoint(lr)
        return lr

    def __str__(self) -> str:
        return " >> ".join(map(str, self.parts))


def _parts(degradation: Degradation) -> tuple[Degradation, ...]:
    return degradation.parts if isinstance(degradation, Compose) else (degradation,)


# by name; `Compose` has no name, because it is written with >>
DEGRADATIONS: dict[str, type[Degradation]] = {
    made.kind: made
    for made in (
        KSpaceCrop,
        Truncation,
        PartialFourier,
        AreaAverage,
        Bicubic,
        Subsample,
        GaussianBlur,
        GaussianNoise,
        RicianNoise,
    )
}


def parse(text: str, *, scale: int | None = None) -> Degradation:
    """Builds the degradation from a line of text, as in recipes, on the command line and from `str(degradation)`.

    One part or several, joined by `>>`; a part is a name of `DEGRADATIONS`, and its arguments after a colon:
    "k-space", "k-space:scale=4,output=real", "blur:sigma=1.5 >> subsample:scale=4 >> rician:snr=30".

    `scale` is used for parts that have this argument and do not set it; for truncation it is the factor.

    Raises:
        ValueError: an unknown or missing name or argument, or an invalid value; the message lists the valid ones.
    """
    check_types(parse, locals())
    parts = [_parse_part(part.strip(), scale) for part in text.split(">>")]
    return parts[0] if len(parts) == 1 else Compose(tuple(parts))


def _parse_part(text: str, scale: int | None) -> Degradation:
    name, _, rest = text.partition(":")
    if name not in DEGRADATIONS:
        raise InvalidArgument(
            f"degradation {text!r}: unknown name {name!r}{did_you_mean(name, DEGRADATIONS)}; "
            f"degradations: {', '.join(DEGRADATIONS)}"
        )
    made = DEGRADATIONS[name]
    fields = {f.name: f for f in dataclasses.fields(made)}  # type: ignore[arg-type]
    types = get_type_hints(made)
    values: dict[str, Any] = {key: scale for key in ("scale", "factor") if key in fields and scale is not None}
    for item in filter(None, rest.split(",")):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if key not in fields or not equals:
            hint = did_you_mean(key, fields)
            raise InvalidArgument(
                f"degradation {text!r}: unknown argument {item!r}{hint}; {name} takes {', '.join(fields)}"
            )
        try:
            values[key] = types[key](value) if types[key] in (int, float) else value
        except ValueError:
            kind = "an integer" if types[key] is int else "a number"
            raise InvalidArgument(f"degradation {text!r}: {key} must be {kind}, not {value!r}") from None
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in values]
    if missing:
        raise InvalidArgument(f"degradation {text!r}: give {missing[0]}, as in {name}:{missing[0]}=...")
    return made(**values)
