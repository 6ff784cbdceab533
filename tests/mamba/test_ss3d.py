"""The scan of volumes: definition, symmetry, refused arguments."""

import pytest
import torch
from tolerances import assert_close

from deformmamba.errors import InvalidArgument
from deformmamba.mamba import SS3D, selective_scan_ref


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_definition(block: SS3D, x: torch.Tensor) -> torch.Tensor:
    """One direction after the other, voxel by voxel."""
    c, d, h, w = x.shape[1:]
    index = torch.arange(d * h * w).reshape(d, h, w)
    walks = [index.flatten(), index.permute(1, 2, 0).flatten(), index.permute(2, 0, 1).flatten()]
    walks += [walk.flip(0) for walk in walks]
    total = torch.zeros_like(x).flatten(2)
    for k, walk in enumerate(walks[: block.directions]):
        u = x.flatten(2)[..., walk]
        sizes = [block.dt_rank, block.d_state, block.d_state]
        dt, B, C = torch.einsum("rc,bcl->brl", block.x_proj[k], u).split(sizes, 1)
        delta = torch.einsum("cr,brl->bcl", block.dt_proj[k], dt)
        rows = slice(k * c, (k + 1) * c)
        A = -block.A_log[rows].exp()
        y = selective_scan_ref(u, delta, A, B, C, block.D[rows], None, block.dt_bias[k], True)
        total = total.index_add(2, walk, y)
    return total.unflatten(2, (d, h, w))


@pytest.mark.parametrize("directions", [3, 6])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_it_is_its_definition_in_value_and_gradient(directions: int, backend: str | None) -> None:
    block = SS3D(3, d_state=2, directions=directions, backend=backend).double()
    x = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    y, expected = block(x), by_definition(block, x)
    assert_close(y, expected)
    wanted = [x, *block.parameters()]
    dy = torch.randn_like(y)
    assert_close(list(torch.autograd.grad(y, wanted, dy)), list(torch.autograd.grad(expected, wanted, dy)))


def test_a_voxel_sees_the_whole_volume() -> None:
    block = SS3D(2)
    x = torch.randn(1, 2, 3, 3, 3, requires_grad=True)
    block(x)[0, 0, 1, 1, 1].backward()
    assert x.grad is not None
    assert (x.grad != 0).any(1).all()
    assert block(x.bfloat16()).dtype == torch.bfloat16


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"SS3D: directions is 4; it must be one of \(3, 6\)"):
        SS3D(4, directions=4)
    with pytest.raises(InvalidArgument, match=r"SS3D: given torch.float32 \(1, 3, 4, 4\); wanted .* \(b, 4, d, h, w\)"):
        SS3D(4)(torch.zeros(1, 3, 4, 4))
