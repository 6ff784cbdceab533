"""Slice profiles of 2-D sequences: each slice is a weighted mean over its thickness.

A thick slice at z_k measures y_k = integral of p(z - z_k) x(z) dz, with a slice profile p that integrates to 1. The
fine image x is constant within each of its voxels, so the integral over a voxel is a difference of the cumulative
profile. This is exact for every profile and every ratio of thickness to voxel size. Beyond the ends of the fine image
a slice measures the value of the outermost voxel.

The slice positions z_k are arbitrary: slices have gaps if the spacing is larger than the thickness, and overlap if it
is smaller.
"""

import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deformmamba.errors import DeformMambaError, InvalidArgument, InvalidType, shown

PROFILES = ("gaussian", "boxcar")
MOST_OFF_CENTRE = 0.25  # of the width; a profile further from its slice centre counts its mm from elsewhere


def is_millimetres(value: float) -> bool:
    """Whether `value` is a positive, finite number, of Python or numpy."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and 0 < value < math.inf


class SliceProfileError(DeformMambaError, ValueError):
    """A slice profile that cannot be read or used; the message is one line."""


@dataclass(frozen=True)
class SliceProfile:
    """The weight p(z) of a point at the distance z (mm) from the slice centre.

    Args:
        kind: "gaussian", "boxcar", or the name of a table.
        thickness: mm; the full width at half maximum of a Gaussian, the width of a boxcar. Of a table it is for
            information only.
        table: (z in mm, weight) of a measured profile, z increasing; linear between, zero outside; its area is made 1.

    Raises:
        SliceProfileError: an unknown kind, a thickness that is not positive, or an invalid table.
    """

    kind: str = "gaussian"
    thickness: float = 1.0
    table: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        if not is_millimetres(self.thickness):
            raise SliceProfileError(f"slice thickness is {shown(self.thickness)}; it must be a positive number of mm")
        if self.table is None:
            if self.kind not in PROFILES:
                raise SliceProfileError(
                    f"slice profile is {shown(self.kind)}; it must be {' or '.join(PROFILES)}, or an existing file of "
                    "two columns (mm from the centre, weight)"
                )
            return
        object.__setattr__(self, "table", _rows(self.kind, self.table))
        z, weight = torch.tensor(self.table, dtype=torch.float64).reshape(-1, 2).unbind(1)
        if len(z) < 2 or not bool((z.diff() > 0).all()) or not bool(torch.isfinite(torch.stack([z, weight])).all()):
            raise SliceProfileError(
                f"slice profile {self.kind}: wanted two or more rows of finite numbers with increasing mm in the first "
                f"column; it has {len(z)} rows"
            )
        if not 0 < (area := float(torch.trapezoid(weight, z))) < math.inf:
            raise SliceProfileError(
                f"slice profile {self.kind}: its area is {area:.3g}, so it cannot be normalised; it must be positive"
            )
        # the integral of z p(z), exact for linear pieces
        moment = ((z[1:] - z[:-1]) * (weight[:-1] * (2 * z[:-1] + z[1:]) + weight[1:] * (z[:-1] + 2 * z[1:]))).sum() / 6
        if not abs(centre := float(moment) / area) <= MOST_OFF_CENTRE * self.width():
            raise SliceProfileError(
                f"slice profile {self.kind}: its centre of mass is at {centre:.3g} mm, too far from 0 for a width of "
                f"{self.width():.3g} mm; the first column must be the distance from the slice centre in mm"
            )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "SliceProfile":
        """A measured profile: a text file of two columns, mm from the slice centre and weight; # begins a comment.

        Raises:
            SliceProfileError: the file cannot be read as such.
        """
        rows = []
        try:
            for line in Path(path).read_text("utf-8").splitlines():
                if numbers := line.partition("#")[0].replace(",", " ").split():
                    z, weight = (float(number) for number in numbers)
                    rows.append((z, weight))
        except OSError as error:
            raise SliceProfileError(f"slice profile {path}: {error.strerror}; give a file of two columns") from None
        except ValueError:
            raise SliceProfileError(
                f"slice profile {path}: not a table of two numbers a row (mm from the centre, weight)"
            ) from None
        profile = cls(str(path), 1.0, tuple(rows))
        return cls(profile.kind, profile.width(), profile.table)

    def cumulative(self, z: torch.Tensor) -> torch.Tensor:
        """The integral of p up to z (mm), float64: 0 far below the slice, 1 far above it."""
        z = z.to(torch.float64)
        if self.table is not None:
            at, weight = torch.tensor(self.table, dtype=torch.float64).T.contiguous()
            area = torch.cat([at.new_zeros(1), torch.cumulative_trapezoid(weight, at)])
            k = (torch.searchsorted(at, z.contiguous(), right=True) - 1).clamp(0, len(at) - 2)
            d = (z.clamp(at[0], at[-1]) - at[k]).clamp(min=0)
            slope = (weight[k + 1] - weight[k]) / (at[k + 1] - at[k])
            return (area[k] + d * (weight[k] + slope * d / 2)) / area[-1]
        if self.kind == "boxcar":
            return (z / self.thickness + 0.5).clamp(0, 1)
        sigma = self.thickness / (2 * math.sqrt(2 * math.log(2)))
        return (1 + torch.erf(z / (sigma * math.sqrt(2)))) / 2

    def width(self) -> float:
        """The full width at half maximum in mm."""
        if self.table is None:
            return float(self.thickness)
        at, weight = torch.tensor(self.table, dtype=torch.float64).T.contiguous()
        fine = torch.linspace(float(at[0]), float(at[-1]), 4001, dtype=torch.float64)
        k = (torch.searchsorted(at, fine, right=True) - 1).clamp(0, len(at) - 2)
        values = weight[k] + (fine - at[k]) / (at[k + 1] - at[k]) * (weight[k + 1] - weight[k])
        above = fine[values >= values.max() / 2]
        return max(float(above[-1] - above[0]), float(at[-1] - at[0]) / 4000)


def _rows(kind: str, table: object) -> tuple[tuple[float, float], ...]:
    """The rows of a table as tuples of Python's numbers. Raises SliceProfileError if they are not pairs of numbers."""
    try:
        return tuple((float(z), float(weight)) for z, weight in table)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise SliceProfileError(
            f"slice profile {kind}: its table must be rows of two numbers, mm from the centre and weight, not "
            f"{shown(table)}"
        ) from None


def slice_profile(profile: "str | os.PathLike[str] | SliceProfile", thickness: float) -> SliceProfile:
    """`profile` as an object: "gaussian" or "boxcar" of this thickness (mm), or the path of a table, which has its own.

    Raises:
        SliceProfileError: see `SliceProfile`.
    """
    if isinstance(profile, SliceProfile):
        return profile
    if not isinstance(profile, (str, os.PathLike)):
        raise SliceProfileError(
            f"slice profile is {shown(profile)}; it must be {' or '.join(PROFILES)}, a file of two columns, or a "
            "SliceProfile"
        )
    if str(profile) in PROFILES:
        return SliceProfile(str(profile), thickness)
    if not Path(profile).is_file():
        return SliceProfile(str(profile), thickness)  # which names the allowed ones
    return SliceProfile.from_file(profile)


def slice_positions(n: int, spacing: float, first: float = 0.0) -> torch.Tensor:
    """The centres of n slices in mm, float64: `first`, `first + spacing`, ..."""
    return first + spacing * torch.arange(n, dtype=torch.float64)


class ThickSlices:
    """The linear operator from a fine image to thick slices along one axis, and its adjoint.

    Args:
        n: voxels of the fine image along that axis; the centre of voxel j lies at j * voxel.
        voxel: mm.
        positions: the centres of the slices in mm, on the same axis as the voxels.
        profile: the slice profile.

    Attributes:
        matrix: (slices, n), float64; each row sums to 1.

    Raises:
        InvalidArgument: a voxel that is not a positive number of mm, or a position that is not finite.
    """

    def __init__(self, n: int, voxel: float, positions: Sequence[float] | torch.Tensor, profile: SliceProfile) -> None:
        at = torch.as_tensor(positions, dtype=torch.float64)
        if not is_millimetres(voxel) or not bool(at.isfinite().all()):
            raise InvalidArgument(
                f"ThickSlices: voxel is {shown(voxel)} and positions begin with {at.flatten()[:5].tolist()}; wanted a "
                "positive number of mm, and finite numbers"
            )
        edges = (torch.arange(n + 1, dtype=torch.float64) - 0.5) * voxel
        cumulative = profile.cumulative(edges - at[:, None])
        cumulative[:, 0], cumulative[:, -1] = 0, 1  # beyond the ends, the outermost voxel continues
        self.matrix = cumulative.diff(dim=1)

    def __call__(self, image: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """Thick slices of `image`, whose `axis` has n voxels; every other axis stays."""
        return along(self.matrix, image, axis)

    def adjoint(self, slices: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """The transpose: <A x, y> = <x, adjoint(y)> for all x and y."""
        return along(self.matrix.T, slices, axis)


def along(matrix: torch.Tensor, image: torch.Tensor, axis: int) -> torch.Tensor:
    """`matrix` (m, n) applied along one axis of `image`, in the precision of `image`.

    Raises:
        InvalidType: `image` is not a floating-point tensor, so that weights below 1 would become 0.
    """
    if not isinstance(image, torch.Tensor) or not image.is_floating_point():
        given = f"of {image.dtype}" if isinstance(image, torch.Tensor) else f"a {type(image).__name__}"
        raise InvalidType(f"image is {given}; wanted a floating-point tensor, such as torch.as_tensor(image).float()")
    return torch.tensordot(image, matrix.to(image), dims=([axis], [1])).movedim(-1, axis)


def spline_matrix(n: int, at: torch.Tensor) -> torch.Tensor:
    """(len(at), n), float64: cubic b-spline interpolation of n samples at the positions `at`, in samples.

    The curve through the samples is twice continuously differentiable; it is mirrored about the outermost samples. The
    coefficients come from an exact solution of the linear system, not from a recursive filter with a boundary series.

    Source: Unser, IEEE Signal Processing Magazine 16(6) (1999); equals `scipy.ndimage` of order 3 with mode="mirror".
    """
    at_samples = _spline_basis(torch.arange(n, dtype=torch.float64), n)
    return torch.linalg.solve(at_samples, _spline_basis(at.to(torch.float64), n), left=False)


def linear_matrix(n: int, at: torch.Tensor, width: float = 1.0) -> torch.Tensor:
    """(len(at), n), float64: linear interpolation of n samples at the positions `at`, in samples; beyond them to 0.

    `width`: half the width of the hat, 1 or more; as wide as the new spacing, it averages, so that no sample is lost.
    """
    beyond = math.ceil(width)
    hats = (1 - (at.to(torch.float64)[:, None] - torch.arange(-beyond, n + beyond)).abs() / width).clamp(min=0)
    return hats[:, beyond : n + beyond] / hats.sum(1, keepdim=True)


def resampled_positions(n: int, m: int) -> torch.Tensor:
    """The positions (m,) of m samples in place of n, in old samples, float64; the first keeps its position."""
    return torch.arange(m, dtype=torch.float64) * n / m


def resampled_linearly(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """`image` (..., h, w) on a grid of another `size`; pixel 0 keeps its position. A coarser grid gets averages."""
    for axis, m in zip((-2, -1), size, strict=True):
        n = image.shape[axis]
        image = along(linear_matrix(n, resampled_positions(n, m), max(1.0, n / m)), image, axis % image.ndim)
    return image.contiguous()


def _spline_basis(x: torch.Tensor, n: int) -> torch.Tensor:
    """(len(x), n): the n mirrored cubic b-splines at the positions x."""
    taps = x.floor()[:, None] + torch.arange(-1, 3, dtype=torch.float64)
    d = (x[:, None] - taps).abs()
    weights = torch.where(d < 1, (d / 2 - 1) * d**2 + 2 / 3, (2 - d).clamp(min=0) ** 3 / 6)
    period = max(2 * (n - 1), 1)
    index = taps.long().remainder(period)
    index = torch.minimum(index, period - index).clamp(max=n - 1)
    return torch.zeros(len(x), n, dtype=torch.float64).scatter_add_(1, index, weights)


def back_projected(
    image: torch.Tensor,
    slices: torch.Tensor,
    operator: ThickSlices,
    *,
    axis: int = -1,
    steps: int = 5,
    until: float = 0.0,
) -> tuple[torch.Tensor, list[float]]:
    """`image` corrected so that `operator` gives `slices`: the smallest change in the sense of least squares.

    The method is conjugate gradients on A A^T. After enough steps A x = y holds exactly, if the slices allow it. The
    steps end early once the root mean square of A x - y is `until` or less: more steps would only restore noise.

    Returns the image, and the root mean square of A x - y before the first step and after each.
    """
    residual = slices - operator(image, axis)
    errors = [float(residual.square().mean().sqrt())]
    multipliers = torch.zeros_like(residual)
    direction, power = residual.clone(), float((residual**2).sum())
    negligible = 1e-20 * float((slices**2).sum())
    for _ in range(steps):
        if power <= negligible or errors[-1] <= until:
            break
        back = operator.adjoint(direction, axis)
        step = power / float((back**2).sum())
        multipliers += step * direction
        residual = residual - step * operator(back, axis)
        after = float((residual**2).sum())
        direction, power = residual + after / power * direction, after
        errors.append(float(residual.square().mean().sqrt()))
    return image + operator.adjoint(multipliers, axis), errors
