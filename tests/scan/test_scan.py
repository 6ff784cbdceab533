"""Every backend of the scan, compared with the reference in float64; properties of the scan itself."""

import math
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from deformmamba.errors import InvalidArgument
from deformmamba.scan import BACKENDS, ScanBackendError, operator, selective_scan, selective_scan_2d

# The largest allowed error, relative to the largest number of a result: (value, gradient); the same for all backends.
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (3e-6, 1e-5), torch.bfloat16: (8e-3, 8e-3)}

# (b, d, l, n, g): length 1, odd, longer than one chunk and than two; one group, many; one channel more than fits into a
# vector; 8, 32 and 33 states
SEQUENCES = [
    (2, 6, 1, 4, 1),
    (1, 12, 37, 3, 4),
    (2, 33, 65, 5, 1),
    pytest.param((1, 64, 270, 16, 2), marks=pytest.mark.portable),
    (3, 5, 9, 1, 5),
    pytest.param((1, 16, 140, 8, 1), marks=pytest.mark.portable),
    (1, 19, 140, 32, 1),
    (1, 17, 20, 33, 1),
]
MAPS = [  # (b, h, w, d, k, n): not square, every number of directions, more steps than one chunk
    (2, 3, 7, 6, 1, 4),
    (1, 9, 11, 20, 2, 3),
    pytest.param((2, 9, 15, 17, 4, 6), marks=pytest.mark.portable),
    (1, 1, 5, 3, 4, 1),
]


class Place(NamedTuple):
    """A backend, and the device on which it is tested."""

    backend: str
    device: str

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the backend computes in `dtype`."""
        return operator.MODULES[self.backend].unusable(torch.empty(0, dtype=dtype, device=self.device)) is None

    @property
    def finest(self) -> torch.dtype:
        """The most precise dtype of the backend: float64 or float32."""
        return torch.float64 if self.takes(torch.float64) else torch.float32


GPU = torch.cuda.is_available() or os.environ.get("DEFORMMAMBA_GPU") == "1"
HERE = [name for name in BACKENDS if operator.MODULES[name].unusable(torch.empty(0)) is None]
PLACES, KERNELS = (
    [
        *(Place(name, "cpu") for name in HERE if name in names),
        *(pytest.param(Place(name, "cuda"), marks=pytest.mark.gpu) for name in names if GPU and name != "cpu"),
    ]
    for names in (BACKENDS, ("cpu", "triton"))  # autograd computes the gradients of the others
)


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(place))
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend on every device on which it runs."""
    chosen: Place = request.param
    if chosen.device == "cuda":
        assert torch.cuda.is_available(), "DEFORMMAMBA_GPU=1, but PyTorch finds no GPU"
        reason = operator.MODULES[chosen.backend].unusable(torch.empty(0, device="cuda"))
        if chosen.backend == "mamba_ssm" and reason is not None:  # an optional dependency
            pytest.skip(reason)
        assert reason is None, reason
    return chosen


@pytest.mark.gpu
def test_a_gpu_is_here() -> None:
    if not GPU:
        pytest.skip("no GPU: every backend was tested on the CPU only")


def numbers(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random arguments in float64 whose values are exact in bfloat16; A is negative."""
    make = torch.Generator().manual_seed(0)
    given = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    given["A"] = -torch.exp(given["A"])
    return {name: x.bfloat16().double() for name, x in given.items()}


@lru_cache
def sequence(b: int, d: int, length: int, n: int, g: int) -> dict[str, torch.Tensor]:
    """All arguments of `selective_scan`."""
    bdl, bgnl = (b, d, length), (b, g, n, length)
    return numbers(
        u=bdl, delta=bdl, A=(d, n), B=bgnl, C=bgnl, D=(d,), z=bdl, delta_bias=(d,), initial_state=(b, d, n)
    )  # fmt: skip


@lru_cache
def feature_map(b: int, h: int, w: int, d: int, k: int, n: int) -> dict[str, torch.Tensor]:
    """All arguments of `selective_scan_2d`."""
    bhwkn = (b, h, w, k, n)
    return numbers(
        u=(b, h, w, d), delta=(k, b, h, w, d), A=(k * d, n), B=bhwkn, C=bhwkn, D=(k * d,), delta_bias=(k * d,)
    )


def moved(arguments: dict[str, torch.Tensor], place: Place, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The arguments as in a network that runs in `dtype`: parameters and states stay in float32."""
    parameters = {"A", "D", "delta_bias", "initial_state"}
    full = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: x.to(place.device, full if name in parameters else dtype) for name, x in arguments.items()}


Results = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def run(operation: Callable[..., Any], arguments: dict[str, torch.Tensor], **options: Any) -> Results:
    """Values and gradients by name, for a fixed random gradient of every value."""
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    result = operation(**leaves, **options)
    values = dict(zip(("y", "last"), result if isinstance(result, tuple) else (result,), strict=False))
    make = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(y.shape, generator=make, dtype=torch.float64).to(y) for name, y in values.items()}
    total = torch.stack([(y * weights[name]).sum().double() for name, y in values.items()]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return values, dict(zip(leaves, gradients, strict=True))


@lru_cache
def target(kind: str, shape: tuple[int, ...], discretization: str) -> Results:
    """Values and gradients of the reference in float64."""
    options: Any = {"backend": "reference", "discretization": discretization}
    if kind == "map":
        return run(selective_scan_2d, feature_map(*shape), **options)
    return run(selective_scan, sequence(*shape), delta_softplus=True, return_last_state=True, **options)


def compare(result: Results, wanted: Results, dtype: torch.dtype) -> None:
    for kind, allowed, got, exact in zip(("", "gradient of "), TOLERANCE[dtype], result, wanted, strict=True):
        assert got.keys() == exact.keys()
        for name, x in exact.items():
            assert got[name].shape == x.shape
            error = ((got[name].double().cpu() - x).abs().max() / x.abs().max()).item()
            assert error < allowed, f"{kind}{name}: {error:.1e}"


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
def test_sequences(place: Place, shape: tuple[int, ...], discretization: Any, dtype: torch.dtype) -> None:
    arguments = moved(sequence(*shape), place, dtype)
    if place.backend == "mamba_ssm" or not place.takes(dtype):  # mamba-ssm takes no initial state
        with pytest.raises(ScanBackendError):
            selective_scan(**arguments, discretization=discretization, backend=place.backend)
        return
    options = {"delta_softplus": True, "return_last_state": True, "discretization": discretization}
    result = run(selective_scan, arguments, backend=place.backend, **options)
    assert result[0]["y"].dtype == dtype
    assert result[0]["last"].dtype == arguments["A"].dtype
    compare(result, target("sequence", shape, discretization), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps(place: Place, shape: tuple[int, ...], discretization: Any, dtype: torch.dtype) -> None:
    arguments = moved(feature_map(*shape), place, dtype)
    if (place.backend == "mamba_ssm" and discretization == "zoh") or not place.takes(dtype):
        with pytest.raises(ScanBackendError):
            selective_scan_2d(**arguments, discretization=discretization, backend=place.backend)
        return
    result = run(selective_scan_2d, arguments, discretization=discretization, backend=place.backend)
    compare(result, target("map", shape, discretization), dtype)


def plain_composition(
    u: torch.Tensor, delta: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **weights: Any
) -> torch.Tensor:
    """SS2D by the definition of its directions: four permuted copies, a scan, and a merge."""
    b, h, w, d = u.shape

    def walked(x: torch.Tensor) -> torch.Tensor:  # (4, b, h, w, c) -> (b, 4, c, l)
        rows, columns = x.flatten(2, 3), x.transpose(2, 3).flatten(2, 3)
        walks = rows[0], columns[1], rows[2].flip(1), columns[3].flip(1)
        return torch.stack([walk.transpose(1, 2) for walk in walks], 1)

    y = selective_scan(
        walked(u.expand(4, b, h, w, d)).flatten(1, 2),
        walked(delta).flatten(1, 2),
        B=walked(B.permute(3, 0, 1, 2, 4)),
        C=walked(C.permute(3, 0, 1, 2, 4)),
        delta_softplus=True,
        backend="reference",
        **weights,
    )
    assert isinstance(y, torch.Tensor)
    rows, columns, rows_back, columns_back = y.unflatten(1, (4, d)).transpose(2, 3).unbind(1)
    total = (rows + rows_back.flip(1)).unflatten(1, (h, w))
    return total + (columns + columns_back.flip(1)).unflatten(1, (w, h)).transpose(1, 2)


def test_a_map_is_the_plain_composition(place: Place) -> None:
    arguments = feature_map(2, 5, 9, 4, 4, 3)
    result = run(selective_scan_2d, moved(arguments, place, place.finest), backend=place.backend)
    compare(result, run(plain_composition, arguments), place.finest)
    swapped = {**arguments, "A": arguments["A"].unflatten(0, (4, 4)).flip(0).flatten(0, 1)}
    assert not torch.allclose(result[0]["y"].cpu().double(), selective_scan_2d(**swapped), rtol=0.1, atol=0.1)


# --------------------------------------------------------------------------------------------------- the definition


@pytest.mark.slow
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_the_reference_has_the_right_gradients(discretization: Any) -> None:
    arguments = sequence(1, 4, 3, 2, 2)
    options: Any = {"discretization": discretization, "backend": "reference"}

    def scan(*values: torch.Tensor) -> Any:
        given: Any = dict(zip(arguments, values, strict=True))
        return selective_scan(**given, delta_softplus=True, return_last_state=True, **options)

    assert torch.autograd.gradcheck(scan, [x.clone().requires_grad_() for x in arguments.values()])

    arguments_2d = feature_map(1, 2, 3, 1, 4, 2)

    def scan_2d(*values: torch.Tensor) -> torch.Tensor:
        given: Any = dict(zip(arguments_2d, values, strict=True))
        return selective_scan_2d(**given, **options)

    assert torch.autograd.gradcheck(scan_2d, [x.clone().requires_grad_() for x in arguments_2d.values()])


def test_constant_input_has_a_closed_form(place: Place) -> None:
    """With the Euler step, a geometric series; with zero-order hold, the solution of h' = A h + B u."""
    if place.backend == "mamba_ssm":
        pytest.skip("Euler only")
    length, dt, rates = 70, 0.03, torch.tensor([-0.5, -2.0, -16.0, 0.4], dtype=torch.float64)
    u, delta, B, C = (torch.full(shape, value, dtype=torch.float64) for shape, value in (
        ((1, 4, length), 1.5), ((1, 4, length), dt), ((1, 1, 1, length), 0.7), ((1, 1, 1, length), 2.0)
    ))  # fmt: skip
    t = torch.arange(1, length + 1)
    decay = torch.exp(rates * dt)[:, None]
    closed = {
        "euler": 2.0 * dt * 0.7 * 1.5 * (1 - decay**t) / (1 - decay),
        "zoh": 2.0 * torch.expm1(rates[:, None] * dt * t) / rates[:, None] * 0.7 * 1.5,
    }
    arguments = (x.to(place.device, place.finest) for x in (u, delta, rates[:, None], B, C))
    u, delta, A, B, C = arguments
    for name, y in closed.items():
        kind: Any = name
        result = selective_scan(u, delta, A, B, C, discretization=kind, backend=place.backend)
        assert isinstance(result, torch.Tensor)
        rtol = 1e-12 if place.finest == torch.float64 else 1e-5
        torch.testing.assert_close(result[0].cpu().double(), y, rtol=rtol, atol=0)


def test_hold_where_the_rate_vanishes(place: Place) -> None:
    """phi and its derivative by A have the limits dt and dt^2 / 2, and no cancellation near them."""
    if place.backend == "mamba_ssm":
        pytest.skip("Euler only")
    rates = [0.0, 1e-12, -1e-6, 1e-3, -0.1, -0.7, 0.8]
    A = torch.tensor(rates, dtype=place.finest, device=place.device)[:, None].requires_grad_()
    one = torch.ones(1, 1, 1, dtype=place.finest, device=place.device)
    loss = 1 if place.finest == torch.float64 else 1e7
    u = one.expand(1, len(rates), 1)
    y = selective_scan(u, 0.5 * u, A, one, one, discretization="zoh", backend=place.backend)
    assert isinstance(y, torch.Tensor)
    (slope,) = torch.autograd.grad(y.sum(), A)
    for i, rate in enumerate(rates):
        x = 0.5 * rate
        assert y[0, i, 0].item() == pytest.approx(
            0.5 * sum(x**k / math.factorial(k + 1) for k in range(20)), rel=1e-13 * loss
        )
        limit = 0.25 * sum((k + 1) * x**k / math.factorial(k + 2) for k in range(20))
        assert slope[i, 0].item() == pytest.approx(limit, rel=1e-12 * loss)


def test_the_exponential_is_right_everywhere(place: Place) -> None:
    """One step from state 1 without input is exp(dt A), for both signs: exactly 1 at 0, down to 0, up to infinity."""
    if place.backend == "mamba_ssm":
        pytest.skip("it takes no initial state")
    for dtype, ulps, ends in ((torch.float32, 8, 120), (torch.float64, 16, 800)):
        if not place.takes(dtype):
            continue
        x = torch.cat([torch.linspace(-ends, ends, 4001), torch.linspace(-2, 2, 4001), torch.tensor([0.0, -0.0])])
        x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])]).to(place.device, dtype)
        d = len(x)
        zero, one = torch.zeros(1, d, 1).to(x), torch.ones(1, 1, 1).to(x)
        state = torch.ones(1, d, 1).to(x)
        y = selective_scan(zero, zero + 1, x[:, None], one, one, initial_state=state, backend=place.backend)
        assert isinstance(y, torch.Tensor)
        got, exact = y.flatten().double().cpu(), torch.exp(x.double()).cpu()
        tiny = torch.finfo(dtype).tiny
        inside = (exact > tiny) & (exact < torch.finfo(dtype).max)
        # rounding x changes exp(x) by |x| ulp / 2
        allowed = torch.finfo(dtype).eps * (ulps + x.double().cpu().abs())
        assert ((got / exact - 1).abs() <= allowed)[inside].all()
        assert (got[exact <= tiny] <= 2 * tiny).all()
        assert (got[x.cpu() < -ends * 0.95] == 0).all()
        assert (got[x.cpu() > ends * 0.95] == math.inf).all()
        assert (got[x.cpu() == 0] == 1).all()
        assert got.isnan().equal(exact.isnan())


def test_softplus_is_right_everywhere(place: Place) -> None:
    """One step with rate 0, and ones for all other arguments, is softplus(delta)."""
    x = torch.cat([torch.linspace(-80, 80, 3001), torch.linspace(-3, 3, 3001), torch.tensor([-1e30, 1e30, -200, 0])])
    x = x.to(place.device)
    d = len(x)
    one = torch.ones(1, 1, 1).to(x)
    delta = x[None, :, None].clone().requires_grad_()
    u = torch.ones(1, d, 1).to(x)
    y = selective_scan(u, delta, torch.zeros(d, 1).to(x), one, one, delta_softplus=True, backend=place.backend)
    assert isinstance(y, torch.Tensor)
    (slope,) = torch.autograd.grad(y.sum(), delta)
    z = x.double().cpu()
    exact = torch.where(z > 30, z, torch.log1p(torch.exp(z)))
    torch.testing.assert_close(y.flatten().double().cpu(), exact, rtol=5e-6, atol=1e-37)
    torch.testing.assert_close(slope.flatten().double().cpu(), torch.sigmoid(z), rtol=5e-6, atol=1e-37)


# --------------------------------------------------------------------------------------------------------- properties


def test_no_step_sees_later_ones(place: Place) -> None:
    given: Any = moved(sequence(1, 20, 90, 3, 1), place, torch.float32)
    given.pop("initial_state")
    y = selective_scan(**given, delta_softplus=True, backend=place.backend)
    late = {**given, "u": given["u"].clone()}
    late["u"][:, :, 70:] += 1
    y_late = selective_scan(**late, delta_softplus=True, backend=place.backend)
    assert isinstance(y, torch.Tensor)
    assert isinstance(y_late, torch.Tensor)
    assert y[..., :70].equal(y_late[..., :70])
    assert (y[..., 70:] != y_late[..., 70:]).any(1).all()


def test_one_group_is_shared_by_all_groups_of_the_other(place: Place) -> None:
    given: Any = moved(sequence(2, 4, 5, 3, 2), place, torch.float32)
    given.pop("initial_state")
    shared = given["B"][:, 0]
    wanted = selective_scan(**given | {"B": given["B"][:, :1].expand_as(given["B"])}, backend=place.backend)
    assert torch.equal(selective_scan(**given | {"B": shared}, backend=place.backend), wanted)
    turned = given | {"B": given["C"], "C": shared}
    wanted = selective_scan(**turned | {"C": shared[:, None].expand_as(given["C"])}, backend=place.backend)
    assert torch.equal(selective_scan(**turned, backend=place.backend), wanted)
    for wrong in ("B", "C"):  # no group, or a number of groups that does not divide the channels
        for n in (0, 3):
            other = {"B": "C", "C": "B"}[wrong]
            bad = given | {wrong: torch.zeros(2, n, 3, 5).to(given["u"]), other: shared}
            with pytest.raises(InvalidArgument, match=f"{n} groups"):
                selective_scan(**bad, backend=place.backend)


def test_linear_in_its_input(place: Place) -> None:
    given: Any = moved(feature_map(1, 9, 8, 5, 4, 3), place, torch.float32)
    u, other = given.pop("u"), torch.randn(1, 9, 8, 5).to(place.device)
    scan = lambda x: selective_scan_2d(x, **given, backend=place.backend)  # noqa: E731
    torch.testing.assert_close(scan(2 * u - 3 * other), 2 * scan(u) - 3 * scan(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_pieces_equal_the_whole(place: Place, discretization: Any) -> None:
    if place.backend == "mamba_ssm":
        pytest.skip("it takes no initial state")
    shape = (2, 9, 100, 3, 3)

    def in_pieces(initial_state: torch.Tensor, **given: torch.Tensor) -> Any:
        ys, state = [], initial_state
        for part in (slice(0, 1), slice(1, 65), slice(65, 100)):
            piece: Any = {k: x[..., part] if x.shape[-1] == 100 else x for k, x in given.items()}
            options = {"delta_softplus": True, "return_last_state": True, "discretization": discretization}
            y, state = selective_scan(**piece, initial_state=state, backend=place.backend, **options)
            ys.append(y)
        return torch.cat(ys, -1), state

    result = run(in_pieces, moved(sequence(*shape), place, place.finest))
    compare(result, target("sequence", shape, discretization), place.finest)


def test_turning_the_map_turns_the_directions(place: Place) -> None:
    """A rotation by 180 degrees swaps forward and backward scans; a transpose swaps rows and columns."""
    shape = (1, 7, 4, 6, 4, 2)
    given: Any = moved(feature_map(*shape), place, torch.float32)

    def turned(turn: Callable[[torch.Tensor, int], torch.Tensor], order: list[int]) -> Any:
        weights = {k: given[k].unflatten(0, (4, 6))[order].flatten(0, 1) for k in ("A", "D", "delta_bias")}
        maps = {k: turn(given[k], 1)[:, :, :, order] for k in ("B", "C")}
        return {"u": turn(given["u"], 1), "delta": turn(given["delta"], 2)[order], **weights, **maps}

    y = selective_scan_2d(**given, backend=place.backend)
    half_turn = selective_scan_2d(**turned(lambda x, i: x.flip(i, i + 1), [2, 3, 0, 1]), backend=place.backend)
    transpose = selective_scan_2d(**turned(lambda x, i: x.transpose(i, i + 1), [1, 0, 3, 2]), backend=place.backend)
    torch.testing.assert_close(half_turn.flip(1, 2), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(transpose.transpose(1, 2), y, rtol=1e-5, atol=1e-5)


def test_any_memory_layout(place: Place) -> None:
    """Results do not depend on strides: reversed axes in memory, slices, and expanded tensors."""
    shape = (2, 7, 6, 18, 4, 3)
    given: Any = moved(feature_map(*shape), place, torch.float32)
    y = selective_scan_2d(**given, backend=place.backend)

    def scattered(x: torch.Tensor) -> torch.Tensor:
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))

    def sliced(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]

    for layout in (scattered, sliced):
        assert_close(selective_scan_2d(**{k: layout(x) for k, x in given.items()}, backend=place.backend), y)
    given["u"] = given["u"][:, :1, :1].expand(2, 7, 6, 18)
    solid = {k: x.contiguous() for k, x in given.items()}
    expanded, usual = (selective_scan_2d(**x, backend=place.backend) for x in (given, solid))
    assert_close(expanded, usual)

    line: Any = moved(sequence(2, 33, 65, 5, 1), place, torch.float32)
    line.pop("initial_state")
    y_line = selective_scan(**line, delta_softplus=True, backend=place.backend)
    for layout in (scattered, sliced):
        laid_out: Any = {k: layout(x) for k, x in line.items()}
        y = selective_scan(**laid_out, delta_softplus=True, backend=place.backend)
        assert_close(y, y_line)


@lru_cache
def low_rank(b: int, h: int, w: int, d: int, k: int, n: int, r: int) -> dict[str, torch.Tensor]:
    """All arguments of `selective_scan_2d`, with `delta` of `r` channels and a `delta_weight`."""
    given = feature_map(b, h, w, d, k, n)
    return given | {"delta": given["delta"][..., :r], "delta_weight": numbers(A=(1, 1), x=(k * d, r))["x"]}


@lru_cache
def low_rank_target(shape: tuple[int, ...], discretization: Any) -> Results:
    """Values and gradients of the reference in float64, given the product as `delta`."""
    d, k = shape[3:5]

    def product(delta: torch.Tensor, delta_weight: torch.Tensor, **rest: Any) -> torch.Tensor:
        full = torch.einsum("kbhwr,kdr->kbhwd", delta, delta_weight.unflatten(0, (k, d)))
        return selective_scan_2d(delta=full, **rest, discretization=discretization, backend="reference")

    return run(product, low_rank(*shape))


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 7, 6, 1, 3, 1),
        (1, 5, 6, 20, 2, 3, 5),
        pytest.param((2, 13, 10, 33, 4, 6, 12), marks=pytest.mark.portable),
    ],
    ids=str,
)
def test_step_sizes_of_low_rank(place: Place, shape: tuple[int, ...], discretization: Any) -> None:
    """`delta` and `delta_weight` equal delta_weight @ delta in values, and in the gradients of both."""
    if place.backend == "mamba_ssm" and discretization == "zoh":
        pytest.skip("Euler only")
    arguments = moved(low_rank(*shape), place, place.finest)
    result = run(selective_scan_2d, arguments, discretization=discretization, backend=place.backend)
    compare(result, low_rank_target(shape, discretization), place.finest)


@pytest.mark.parametrize("wanted", ["u", "delta", "A", "B", "C", "D", "delta_bias"])
def test_gradients_of_some(place: Place, wanted: str) -> None:
    """If only one argument requires a gradient, this gradient is the same as if all arguments did."""
    given = moved(feature_map(1, 3, 7, 4, 4, 2), place, torch.float32)
    _, everything = run(selective_scan_2d, given, backend=place.backend)
    rest: Any = {k: x for k, x in given.items() if k != wanted}
    _, alone = run(lambda **x: selective_scan_2d(**x, **rest, backend=place.backend), {wanted: given[wanted]})
    assert_close(alone[wanted], everything[wanted])


def test_nothing_optional(place: Place) -> None:
    """Without D, bias and softplus, and with the group axis left out."""
    given = {k: x for k, x in sequence(2, 5, 70, 3, 1).items() if k in ("u", "delta", "A", "B", "C")}
    given |= {"delta": given["delta"].abs(), "B": given["B"][:, 0], "C": given["C"][:, 0]}
    wanted = run(selective_scan, given, backend="reference")
    compare(run(selective_scan, moved(given, place, torch.float32), backend=place.backend), wanted, torch.float32)


@pytest.mark.parametrize("sizes", [(0, 6, 5), (2, 6, 0), (2, 0, 5)], ids=["no batch", "no steps", "no channels"])
def test_empty(place: Place, sizes: tuple[int, int, int]) -> None:
    if place.backend == "mamba_ssm":
        pytest.skip("it takes no empty tensors")
    b, d, length = sizes
    u = torch.zeros(b, d, length, device=place.device, requires_grad=True)
    A = torch.full((d, 2), -1.0, device=place.device, requires_grad=True)
    B = torch.zeros(b, 1, 2, length, device=place.device)
    y, last = selective_scan(u, u, A, B, B, return_last_state=True, backend=place.backend)
    assert y.shape == u.shape
    assert last.shape == (b, d, 2)
    assert not last.any()
    y.sum().backward()
    assert u.grad is not None
    assert A.grad is None or not A.grad.any()


@pytest.mark.parametrize("low", [False, True], ids=["delta", "low rank"])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 6), (2, 0, 4, 6), (2, 3, 0, 6), (2, 3, 4, 0)])
def test_empty_maps(place: Place, sizes: tuple[int, ...], low: bool) -> None:
    if place.backend == "mamba_ssm":
        pytest.skip("it takes no empty tensors")
    b, h, w, d = sizes
    given = feature_map(2, 3, 4, 6, 4, 5)
    given = {name: given[name] for name in ("u", "delta", "A", "B", "C", "D")}
    given |= {name: given[name][:b, :h, :w] for name in ("u", "B", "C")}
    given |= {"u": given["u"][..., :d], "delta": given["delta"][:, :b, :h, :w, : 2 if low else d]}
    given |= {name: given[name][: 4 * d] for name in ("A", "D")}
    if low:
        given["delta_weight"] = torch.ones(4 * d, 2)
    leaves = {k: x.to(place.device, torch.float32).requires_grad_() for k, x in given.items()}
    y = selective_scan_2d(**leaves, backend=place.backend)
    assert y.shape == sizes
    for gradient in torch.autograd.grad(y.sum(), list(leaves.values()), allow_unused=True):
        assert gradient is None or not gradient.any()


# -------------------------------------------------------------------------------------------------- numbers at the edge


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "delta_bias", "initial_state"])
def test_special_values_come_out_where_the_reference_lets_them(
    place: Place, name: str, value: float, discretization: Any
) -> None:
    if place.backend == "mamba_ssm":
        pytest.skip("another kernel's fast mathematics")
    if place.backend == "eager" and (name, value) == ("A", math.inf):
        pytest.skip("its products of growing factors overflow before their state does, as its docstring says")
    given: Any = moved(sequence(1, 18, 20, 2, 1), place, torch.float32)
    given[name] = given[name].clone()
    given[name].view(-1)[given[name].numel() // 2 + 1] = value
    options: Any = {"delta_softplus": True, "return_last_state": True, "discretization": discretization}
    result = selective_scan(**given, **options, backend=place.backend)
    wanted = selective_scan(**{k: x.cpu() for k, x in given.items()}, **options, backend="reference")
    harmless = value == -math.inf if name in ("delta", "delta_bias", "A") else False
    harmless |= discretization == "zoh" and value == math.inf and name in ("delta", "delta_bias")
    assert harmless == all(x.isfinite().all() for x in wanted)
    for x, exact in zip(result, wanted, strict=True):
        assert x.isnan().cpu().equal(exact.isnan())
        assert x.isposinf().cpu().equal(exact.isposinf())
        assert x.isneginf().cpu().equal(exact.isneginf())


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize(
    "value", [math.nan, *(pytest.param(x, marks=pytest.mark.portable) for x in (math.inf, -math.inf))]
)
@pytest.mark.parametrize("kind", ["map", "low rank", "sequence"])
@pytest.mark.parametrize("place", KERNELS, indirect=True, ids="-".join)
def test_gradients_of_special_values(place: Place, kind: str, value: float, discretization: Any) -> None:
    """Special values stay in their direction and channel: gradients are finite where the reference's are.

    Which of the others are infinite and which NaN may differ, because kernels add terms in another order and use other
    formulas for zero-order hold.
    """
    operation: Any = selective_scan if kind == "sequence" else selective_scan_2d
    options: Any = {"discretization": discretization}
    if kind == "sequence":
        given = moved(sequence(1, 19, 9, 2, 1), place, torch.float32)
        options |= {"delta_softplus": True, "return_last_state": True}
    else:
        given = moved(feature_map(1, 2, 3, 19, 4, 2), place, torch.float32)
    if kind == "low rank":
        given |= {"delta": given["delta"][..., :3], "delta_weight": given["A"].new_ones(4 * 19, 3)}
    for name in given:
        special = given | {name: given[name].clone()}
        special[name].view(-1)[given[name].numel() // 2 + 1] = value
        _, gradients = run(operation, special, **options, backend=place.backend)
        _, wanted = run(operation, {k: x.cpu() for k, x in special.items()}, **options, backend="reference")
        for key, exact in wanted.items():
            assert gradients[key].isfinite().cpu().equal(exact.isfinite()), (name, key)
            if place.backend == "cpu" and (math.isnan(value) or discretization == "euler"):
                assert gradients[key].isnan().equal(exact.isnan()), (name, key)


@pytest.mark.parametrize("discretization", ["euler", "zoh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extremes_under_autocast_stay_finite(place: Place, dtype: torch.dtype, discretization: Any) -> None:
    if place.backend == "mamba_ssm" and discretization == "zoh":
        pytest.skip("Euler only")
    given = moved(feature_map(1, 6, 7, 16, 4, 4), place, torch.float32)
    leaves = {k: x.clone().requires_grad_() for k, x in given.items()}
    with torch.no_grad():
        leaves["delta"].view(-1)[::3] = 3e4
        leaves["delta"].view(-1)[1::3] = -3e4
        leaves["A"].view(-1)[::2] = -1e6
    weight = torch.eye(16, device=place.device)
    with torch.autocast(place.device, dtype=dtype):
        u = F.linear(leaves["u"], weight)
        assert u.dtype == dtype
        y = selective_scan_2d(**{**leaves, "u": u}, discretization=discretization, backend=place.backend)
    assert y.dtype == dtype
    assert y.isfinite().all() if dtype == torch.bfloat16 else not y.isnan().any()  # float16 ends at 65,504
    for gradient in torch.autograd.grad(y.float().mean(), list(leaves.values())):
        assert gradient.isfinite().all()
