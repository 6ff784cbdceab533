"""Figures of one upscaled scan: a slice of the input, of its bicubic interpolation and of the output."""

from dataclasses import replace
from typing import TYPE_CHECKING

from deformmamba.inference.files import Upscaled
from deformmamba.inference.upscaling import upscale
from deformmamba.models import Bicubic
from deformmamba.pictures.figures import before_after, oriented, oriented_like
from deformmamba.volume import PathLike

if TYPE_CHECKING:
    from deformmamba.models.base import SRModel


def draw_slice(path: PathLike, done: Upscaled, model: "SRModel", *, title: str, name: str) -> None:
    """Draws the slice that `upscale_file` kept, before and after, with provenance and warnings below.

    Args:
        path: .png, .pdf or .svg.
        done: the result of `upscale_file(..., keep=...)` for one slice.
        model: the model of the result.
        title: title of the figure; the slice number is appended.
        name: name of the model, the title of its panel.
    """
    ((k, (image, _)),) = done.kept.items()
    n = done.source.array.shape[done.axis]
    lr = oriented(done.source, done.axis, k)
    one = replace(done.source, array=done.source.array.take([k], done.axis))
    plain = upscale(Bicubic(scale=model.scale, grid=model.grid), one, axis=done.axis)
    sharp = oriented_like(image, done.place, done.axis)
    before_after(
        lr.image,
        {"bicubic": oriented(plain, done.axis, 0).image, name: sharp.image},
        path,
        spacing=lr.spacing,
        labels=lr.labels,
        grid=model.grid,
        title=f"{title} {k + 1} of {n}, {model.scale}×",
        note=". ".join((done.made_by.split(", sha256")[0], *(f"Warning: {text}" for text in done.cautions))),
    )
