"""The numba kernels of the CPU backend, and the vector type that they use.

Numba does not vectorise loops reliably, so here the lanes are part of the program. `Vector` is LANES consecutive
channels in registers; LLVM maps it to the registers of the machine (one AVX-512 register, two AVX2, four SSE or NEON).
A kernel then reads like the scalar algorithm: no sum crosses lanes except in dB and dC, and rows of a channels-last map
are loaded as they lie in memory.

All functions that a kernel calls are in this file, because numba's disk cache checks this file alone for changes.
Fast-math is `contract` only, because NaN and infinity may occur.
"""

import itertools
import math
import operator
from typing import Any

import numba.extending
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import models, overload, register_model

Array = Any  # what numba compiles has numpy arrays and `Vector`s, which the annotations cannot tell apart

LANES = 16
LOG2E = math.log2(math.e)
LN2 = math.log(2)
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
REGISTER = 512 if "+avx512dq" in _FEATURES else 256 if "+avx2" in _FEATURES else 128  # bits
# AVX-512 multiplies by 2^x for any x. Elsewhere x is added to the exponent bits of a number, so it must be limited. If
# |x| is below these bounds in a whole chunk, the limits are left out.
SCALES = REGISTER == 512
EXPONENTS, DOUBLE_EXPONENTS = 126.0, 1022.0

# Any for mypy: a compiled function is not called with the arguments of its definition
intrinsic: Any = numba.extending.intrinsic
# Only compiled functions call these, so they are compiled without the wrappers for calls from Python and C
_INNER: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inline: Any = njit(forceinline=True, **_INNER)
kernel: Any = njit(**_INNER)
# becomes part of the caller's source; as a function of its own it would be optimised once more, which takes seconds
pasted: Any = njit(inline="always", **_INNER)


# ---------------------------------------------------------------------------------------------------- the vector type


class Vector(types.Type):
    """LANES numbers of one floating type, one for each of LANES channels."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        super().__init__(name=f"vector({element} x {LANES})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.element).get_value_type(), LANES))


def _mask(indices: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), indices)


def _splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    vector = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(vector, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, vector, _mask([0] * lanes))


def _address(context: Any, builder: Any, array_type: Any, array: Any, indices: Any) -> Any:
    proxy = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, proxy, cgutils.unpack_tuple(builder, indices))


def _size(array_type: Any) -> int:
    return int(array_type.dtype.bitwidth) // 8


@intrinsic
def claim(typing: Any, counter: Any) -> Any:
    """Increments counter[0] and returns its old value, so that each number goes to one thread only."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", address, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), code


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """LANES consecutive numbers of `array` from `index` on, for any other axes of the array."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, array, *args)
        kind = context.get_value_type(signature.return_type)
        return builder.load(builder.bitcast(address, kind.as_pointer()), align=_size(array))

    return Vector(array.dtype)(array, index), code


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index], which may lie outside the array. It comes to the L2 cache only, because
    lines a power of two apart compete for a few places of an L1 cache."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.bitcast(_address(context, builder, array, *args), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, *(ir.Constant(i32, n) for n in (0, 2, 1))])  # to read, to keep in L2, data
        return context.get_dummy_value()

    return types.void(array, index), code


@intrinsic
def store(typing: Any, array: Any, index: Any, vector: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, array, *args[:2])
        builder.store(args[2], builder.bitcast(address, args[2].type.as_pointer()), align=_size(array))
        return context.get_dummy_value()

    return types.void(array, index, vector), code


@intrinsic
def like(typing: Any, vector: Any, scalar: Any) -> Any:
    """`scalar` in every lane, in the floating type of `vector`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[1], scalar, vector.element))

    return vector(vector, scalar), code


@intrinsic
def number(typing: Any, array: Any, index: Any) -> Any:
    """array[index] for indices that are not negative: numba's own indexing spends instructions on those that are."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, array, *args), align=_size(array))

    return array.dtype(array, index), code


@intrinsic
def get(typing: Any, tile: Any, row: Any) -> Any:
    """Row `row` of a contiguous array of vectors (.., LANES): one register plus constants address all of them."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(signature.return_type)
        rows = builder.bitcast(context.make_array(tile)(context, builder, args[0]).data, kind.as_pointer())
        return builder.load(builder.gep(rows, [args[1]]), align=_size(tile))

    return Vector(tile.dtype)(tile, types.intp), code


@intrinsic
def put(typing: Any, tile: Any, row: Any, vector: Any) -> Any:
    """The inverse of `get`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(tile)(context, builder, args[0])
        rows = builder.bitcast(array.data, args[2].type.as_pointer())
        builder.store(args[2], builder.gep(rows, [args[1]]), align=_size(tile))
        return context.get_dummy_value()

    return types.void(tile, types.intp, vector), code


def _arithmetic(python: Any, instruction: str) -> None:
    @intrinsic
    def vectors(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, instruction)(*args, flags=("contract",))

        return a(a, b), code

    @overload(python)  # numba compares annotations too, and a lambda has none
    def overloaded(a, b):  # type: ignore[no-untyped-def]
        if isinstance(a, Vector) and isinstance(b, Vector):
            return lambda a, b: vectors(a, b)
        if isinstance(a, Vector) and isinstance(b, types.Number):
            return lambda a, b: vectors(a, like(a, b))
        if isinstance(b, Vector) and isinstance(a, types.Number):
            return lambda a, b: vectors(like(b, a), b)
        return None


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, in one rounding where the machine can: `h = fma(decay, h, new)` keeps `new` off the chain of h."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = f"llvm.fmuladd.v{LANES}f{a.element.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, args)

    return a(a, b, c), code


@intrinsic(prefer_literal=True)
def choose(typing: Any, x: Any, relation: Any, bound: Any, yes: Any, no: Any) -> Any:
    """Lane by lane: yes if x <relation> bound else no; NaN compares false. `relation` is "<", ">" or "=="."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(relation.literal_value, args[0], args[2]), args[3], args[4])

    return yes(x, relation, bound, yes, no), code


@intrinsic
def all_below(typing: Any, x: Any, bound: Any) -> Any:
    """Whether x < bound in every lane; false if one is NaN."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = builder.bitcast(builder.fcmp_ordered("<", *args), ir.IntType(LANES))
        return builder.icmp_unsigned("==", lanes, ir.Constant(ir.IntType(LANES), -1))

    return types.boolean(x, bound), code


@intrinsic
def sum4(typing: Any, a: Any, b: Any, c: Any, d: Any, out: Any, index: Any) -> Any:
    """Add the sums over lanes of a, b, c, d to four consecutive numbers of `out`, as one tree of shuffles."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def fold(x: Any, y: Any, width: int) -> Any:
            """Blocks of `width` lanes of x, then of y, each folded onto its first half."""
            half = width // 2
            lanes = x.type.count + (0 if y is x else y.type.count)
            low = [block + i for block in range(0, lanes, width) for i in range(half)]
            masks = _mask(low), _mask([i + half for i in low])
            return builder.fadd(*(builder.shuffle_vector(x, y, mask) for mask in masks))

        first, second, third, fourth, sums, where = args
        total = fold(fold(first, second, LANES), fold(third, fourth, LANES), LANES // 2)
        width = LANES // 4
        while width > 1:
            total = fold(total, total, width)
            width //= 2
        target = builder.bitcast(_address(context, builder, out, sums, where), total.type.as_pointer())
        total = builder.fadd(builder.load(target, align=_size(out)), total)
        builder.store(total, target, align=_size(out))
        return context.get_dummy_value()

    return types.void(a, b, c, d, out, index), code


@intrinsic
def lane_sum(typing: Any, x: Any) -> Any:
    """The sum over lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = args[0]
        while vector.type.count > 1:
            half = vector.type.count // 2
            low, high = (_mask(list(range(start, start + half))) for start in (0, half))
            vector = builder.fadd(*(builder.shuffle_vector(vector, vector, mask) for mask in (low, high)))
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return x.element(x), code


@intrinsic
def transpose(typing: Any, source: Any, at: Any, target: Any, to: Any) -> Any:
    """target[to + j, i] = source[at + i, j] for i, j < LANES; rows of both are consecutive in memory along j.

    It works in blocks whose rows fill one register each, because larger blocks do not fit into the registers."""
    side = min(LANES, REGISTER // source.dtype.bitwidth)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.VectorType(context.get_value_type(source.dtype), side)

        def row(array_type: Any, array: Any, index: Any, i: int, j: int) -> Any:
            for axis, more in enumerate((i, j)):
                moved = builder.add(builder.extract_value(index, axis), ir.Constant(ir.IntType(64), more))
                index = builder.insert_value(index, moved, axis)
            return builder.bitcast(_address(context, builder, array_type, array, index), kind.as_pointer())

        for top, left in itertools.product(range(0, LANES, side), repeat=2):
            vectors = [
                builder.load(row(source, args[0], args[1], top + i, left), align=_size(source)) for i in range(side)
            ]
            step = side // 2
            while step:  # swap off-diagonal blocks of half the side, a quarter, .. 1
                first = [i if not i & step else side + i - step for i in range(side)]
                second = [i + step if not i & step else side + i for i in range(side)]
                for i in range(side):
                    if not i & step:
                        a, b = vectors[i], vectors[i + step]
                        vectors[i] = builder.shuffle_vector(a, b, _mask(first))
                        vectors[i + step] = builder.shuffle_vector(a, b, _mask(second))
                step //= 2
            for j, vector in enumerate(vectors):
                builder.store(vector, row(target, args[2], args[3], left + j, top), align=_size(target))
        return context.get_dummy_value()

    return types.void(source, at, target, to), code


# --------------------------------------------------------------------------------------------------------- mathematics


def _horner(builder: Any, x: Any, coefficients: list[float]) -> Any:
    powers = [_splat(builder, ir.Constant(x.type.element, float(c))) for c in coefficients]
    total = powers.pop()
    while powers:
        total = _multiply_add(builder, total, x, powers.pop())
    return total


def _by_pairs(builder: Any, x: Any, coefficients: list[float]) -> Any:
    """As `_horner`, by Estrin's scheme: a few more products, but few that wait for each other."""
    terms = [_splat(builder, ir.Constant(x.type.element, float(c))) for c in coefficients]
    while len(terms) > 1:
        pairs = [_multiply_add(builder, b, x, a) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
        x = builder.fmul(x, x) if len(terms) > 1 else x
    return terms[0]


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _polynomial(tables: dict[types.Float, list[float]]) -> Any:
    """An inlined function x -> tables[type of x][0] + tables[..][1] * x + ... by Horner's rule."""

    @intrinsic
    def polynomial(typing: Any, x: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return _horner(builder, args[0], tables[x.element])

        return x(x), code

    return polynomial


# (2^f - 1) / f on [-1/2, 1/2]: minimax for 1 + f q(f) in float32 (9e-8, found by linear programming), Taylor in float64
_TAIL: dict[types.Float, list[float]] = {
    types.float32: [
        0.6931469775994729,
        0.24022242085671935,
        0.05550733742449169,
        0.009671512629518219,
        0.0013264727506103748,
    ],
    types.float64: [LN2 ** (k + 1) / math.factorial(k + 1) for k in range(13)],
}
_exp2_tail = _polynomial(_TAIL)
# 2^(f - 1/64) on [0, 1/32] (7e-8), which goes with 2^(j/32): in float32 exactly 1 in the middle
_SHORT = [0.9892280101776123, 0.6856562495231628, 0.24007000029087067]
# the derivative of (e^x - 1) / x, for |x| <= ln(2) / 2
_hold_slope = _polynomial(
    {
        kind: [(k + 1) / math.factorial(k + 2) for k in range(terms)]
        for kind, terms in ((types.float32, 8), (types.float64, 14))
    }
)
# log(1 + x) / x on [0, 1], minimax (3e-8) in float32
_LOG1P = [
    1.0,
    -0.4999949336051941,
    0.3331909775733948,
    -0.2484298199415207,
    0.19106008112430573,
    -0.13663247227668762,
    0.07822596281766891,
    -0.02950523979961872,
    0.005232693627476692,
]
# atanh(sqrt(s)) / sqrt(s), for s <= 1/9
_ATANH = [1 / (2 * k + 1) for k in range(17)]


def _avx512(builder: Any, name: str, element: Any, operands: list[Any], immediate: int | None = None) -> Any:
    """The AVX-512 instruction `name`, register by register."""
    bits = 32 if isinstance(element, ir.FloatType) else 64
    lanes = 512 // bits
    part = ir.VectorType(element, lanes)
    i32 = ir.IntType(32)
    constant = [] if immediate is None else [ir.Constant(i32, immediate)]
    everywhere = ir.Constant(ir.IntType(lanes), -1)
    kinds = [part] * len(operands) + [i32] * len(constant) + [part, everywhere.type, i32]
    full = f"llvm.x86.avx512.mask.{name}.{'ps' if bits == 32 else 'pd'}.512"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(part, kinds), full)
    parts = []
    for start in range(0, LANES, lanes):
        mask = _mask(list(range(start, start + lanes)))
        registers = [builder.shuffle_vector(x, x, mask) for x in operands]
        default_rounding = ir.Constant(i32, 4)
        undefined = ir.Constant(part, ir.Undefined)
        parts.append(builder.call(function, [*registers, *constant, undefined, everywhere, default_rounding]))
    return parts[0] if len(parts) == 1 else builder.shuffle_vector(parts[0], parts[1], _mask(list(range(LANES))))


def _magic(element: types.Float) -> tuple[int, int, float]:
    """Mantissa bits, exponent bias, and the number that rounds what is added to it to an integer in its lowest bits."""
    mantissa, exponent_bias = (23, 127) if element == types.float32 else (52, 1023)
    return mantissa, exponent_bias, 1.5 * 2.0**mantissa


def _fraction(builder: Any, kind: Vector, x: Any) -> tuple[Any, Any]:
    """(fraction in [-1/2, 1/2], the integer that remains, as `_scaled` needs it)."""
    element = x.type.element
    if SCALES:
        fraction = _avx512(builder, "reduce", element, [x], 0)
        return fraction, builder.fsub(x, fraction)
    _, exponent_bias, magic = _magic(kind.element)
    low, high, shift = (
        _splat(builder, ir.Constant(element, float(c))) for c in (-exponent_bias, exponent_bias + 1, magic)
    )
    value = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    value = builder.select(builder.fcmp_ordered(">", value, high), high, value)
    whole = builder.fadd(value, shift)
    return builder.fsub(value, builder.fsub(whole, shift)), whole


def _scaled(builder: Any, kind: Vector, power: Any, whole: Any) -> Any:
    """power * 2^whole, for `power` = 2^fraction and `whole` from `_fraction`: 0 and infinity where it ends."""
    if SCALES:
        return _avx512(builder, "scalef", power.type.element, [power, whole])
    mantissa, _, _ = _magic(kind.element)
    integers = ir.VectorType(ir.IntType(kind.element.bitwidth), LANES)
    exponent = builder.shl(builder.bitcast(whole, integers), ir.Constant(integers, [mantissa] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(power, integers), exponent), power.type)


def _joined(builder: Any, kind: Vector, fraction: Any, whole: Any) -> Any:
    """2^(fraction + whole), the inverse of `_fraction`."""
    one = _splat(builder, ir.Constant(fraction.type.element, 1.0))
    near = _multiply_add(builder, fraction, _horner(builder, fraction, _TAIL[kind.element]), one)
    return _scaled(builder, kind, near, whole)


@intrinsic
def _split(typing: Any, x: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, signature.return_type, _fraction(builder, x, args[0]))

    return types.UniTuple(x, 2)(x), code


@intrinsic
def _scale(typing: Any, power: Any, whole: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _scaled(builder, power, *args)

    return power(power, whole), code


@intrinsic
def power(typing: Any, x: Any, rate: Any) -> Any:
    """2^(x rate) to 2 ulp in float32 and 1e-15 in float64: 1 at 0, infinity, 0 and NaN where they belong."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type

        def constant(number: float) -> Any:
            return _splat(builder, ir.Constant(kind.element, number))

        if x.element != types.float32 or not SCALES:
            fraction, whole = _fraction(builder, x, builder.fmul(*args))
            return _joined(builder, x, fraction, whole)
        # 2^fraction 2^(j/32) 2^floor in eight instructions: Intel executes all 512-bit arithmetic on two ports, so that
        # their number counts
        shifted = _multiply_add(builder, args[0], args[1], constant(1 / 64))
        fraction = _avx512(builder, "reduce", kind.element, [shifted], 5 << 4 | 1)  # 1: round down, as scalef does
        down = ir.FunctionType(kind, [kind, kind, ir.IntType(32)])
        add = cgutils.get_or_insert_function(builder.module, down, "llvm.x86.avx512.add.ps.512")
        units = builder.call(add, [shifted, constant(1.5 * 2.0 ** (23 - 5)), ir.Constant(ir.IntType(32), 9)])
        integers = ir.VectorType(ir.IntType(32), LANES)
        roots = [2.0 ** (j / 32) for j in range(32)]
        low, high = ir.Constant(kind, roots[:16]), ir.Constant(kind, roots[16:])
        look_up = ir.FunctionType(kind, [kind, integers, kind])
        function = cgutils.get_or_insert_function(builder.module, look_up, "llvm.x86.avx512.vpermi2var.ps.512")
        root = builder.call(function, [low, builder.bitcast(units, integers), high])
        return _scaled(builder, x, builder.fmul(root, _horner(builder, fraction, _SHORT)), shifted)

    return x(x, rate), code


@intrinsic
def power_within(typing: Any, x: Any, rate: Any) -> Any:
    """`power` without its limits: |x rate| must be below EXPONENTS, or NaN. Three instructions of sixteen less."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shift = _splat(builder, ir.Constant(args[0].type.element, _magic(x.element)[2]))
        whole = _multiply_add(builder, args[0], args[1], shift)
        rounded = builder.fsub(whole, shift)
        fraction = builder.fsub(builder.fmul(*args, flags=("contract",)), rounded, flags=("contract",))
        return _joined(builder, x, fraction, whole)

    return x(x, rate), code


@intrinsic
def log1p(typing: Any, x: Any) -> Any:
    """log(1 + x) for x from 0 to 1, to 2 ulp. In float32 it needs no division, which takes longer than the rest."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if x.element == types.float32:
            series = _horner if SCALES else _by_pairs
            return builder.fmul(args[0], series(builder, args[0], _LOG1P))
        two = _splat(builder, ir.Constant(args[0].type.element, 2.0))
        s = builder.fdiv(args[0], builder.fadd(args[0], two))  # log(1 + x) = 2 atanh(s)
        return builder.fmul(builder.fmul(two, s), _horner(builder, builder.fmul(s, s), _ATANH))

    return x(x), code


@inline
def larger(x: Array, y: Array) -> Array:
    """The larger of both lane by lane; y where one is NaN."""
    return choose(x, ">", y, x, y)


@inline
def magnitude(x: Array) -> Array:
    """|x|, lane by lane."""
    return larger(x, like(x, 0.0) - x)


@inline
def softplus(x: Array) -> Array:
    """(log(1 + e^x), its derivative), accurate relative to the result on both sides."""
    zero = like(x, 0.0)
    minus = zero - x
    e = power(choose(x, "<", minus, x, minus), like(x, LOG2E))
    return larger(x, zero) + log1p(e), choose(x, "<", zero, e, like(x, 1.0)) / (e + 1.0)


@inline
def hold(delta: Array, decay: Array, inverse: Array) -> Array:
    """Zero-order hold of x = delta A, given `decay` = A log2(e) and `inverse` = 1 / A.

    (e^x, (e^x - 1) / A, the derivative of that by A), by series where |x| is small and a difference would cancel."""
    x = delta * decay
    fraction, whole = _split(x)
    tail = _exp2_tail(fraction)
    a = _scale(fma(fraction, tail, like(x, 1.0)), whole)
    half = like(x, 0.5)
    phi = (a - 1.0) * inverse
    slope = (delta * a - phi) * inverse
    small_phi = delta * LOG2E * tail
    small_slope = delta * delta * _hold_slope(fraction * LN2)
    size = magnitude(x)
    return a, choose(size, "<", half, small_phi, phi), choose(size, "<", half, small_slope, slope)


# ------------------------------------------------------------------------------------------- between maps and registers


@inline
def walk(order: Array, direction: int, start: int, height: int, width: int) -> None:
    """order[i] = the row-major pixel that step `start + i` of a direction visits, for i of the whole array.

    0: rows, 1: columns, 2: rows from the end, 3: columns from the end."""
    sign = -1 if direction >= 2 else 1
    step = height * width - 1 - start if direction >= 2 else start
    row, column = step % height, step // height
    for i in range(order.shape[0]):
        order[i] = row * width + column if direction % 2 else step + sign * i
        row += sign
        if row == height or row < 0:
            row, column = row - sign * height, column + sign


@inline
def gather(tile: Array, source: Array, order: Array, count: int, straight: bool, first: int, lanes: int) -> None:
    """tile[i, j] = source[order[i], first + j] for j < lanes, else 0; `source` (l, r) is consecutive along r or l.

    `straight`: `order` counts up by one, so that steps can be read as rows."""
    done = 0
    if source.strides[1] == source.itemsize:
        if lanes == LANES:
            for i in range(count):
                store(tile, (i, 0), load(source, (order[i], first)))
            return
    elif lanes == LANES and straight and source.strides[0] == source.itemsize:
        steps = source.T
        while done + LANES <= count:
            transpose(steps, (first, order[done]), tile, (done, 0))
            done += LANES
    for i in range(done, count):
        for j in range(LANES):
            tile[i, j] = source[order[i], first + j] if j < lanes else 0.0


@inline
def scatter(
    target: Array, tile: Array, order: Array, count: int, straight: bool, first: int, lanes: int, add: bool
) -> None:
    """target[order[i], first + j] = tile[i, j], or += where `add`: the inverse of `gather`."""
    done = 0
    if target.strides[1] == target.itemsize:
        if lanes == LANES:
            for i in range(count):
                at = (order[i], first)
                store(target, at, load(target, at) + load(tile, (i, 0)) if add else load(tile, (i, 0)))
            return
    elif lanes == LANES and straight and not add and target.strides[0] == target.itemsize:
        steps = target.T
        while done + LANES <= count:
            transpose(tile, (done, 0), steps, (first, order[done]))
            done += LANES
    for i in range(done, count):
        for j in range(lanes):
            value = tile[i, j]
            target[order[i], first + j] = target[order[i], first + j] + value if add else value


@inline
def spread(lines: Array, order: Array, along: bool) -> None:
    """A line of a tile for each of its steps to ask for: pixel lines[0, t], channel lines[1, t] from the tile's first.

    `along`: memory is consecutive along steps, so that a line holds LANES steps of one channel."""
    for t in range(order.shape[0]):
        lines[0, t] = order[t - t % LANES] if along else order[t]
        lines[1, t] = t % LANES if along else 0


@inline
def columns(tile: Array, source: Array, first: int, lanes: int, factor: Array) -> None:
    """tile[s, j] = factor * source[first + j, s], for a source (r, n)."""
    # every NaN becomes the default NaN, because without `scalef` exponents are added to its bits
    done = 0
    if lanes == LANES and source.strides[1] == source.itemsize:
        while done + LANES <= source.shape[1]:
            transpose(source, (first, done), tile, (done, 0))
            for s in range(done, done + LANES):
                value = get(tile, s) * factor
                put(tile, s, choose(value, "==", value, value, like(value, np.nan)))
            done += LANES
    for j in range(lanes):
        for s in range(done, source.shape[1]):
            value = source[first + j, s] * factor
            tile[s, j] = value if value == value else np.nan


@inline
def from_columns(target: Array, tile: Array, first: int, lanes: int) -> None:
    """target[first + j, s] = tile[s, j]: the inverse of `columns`."""
    done = 0
    if lanes == LANES and target.strides[1] == target.itemsize:
        while done + LANES <= target.shape[1]:
            transpose(tile, (done, 0), target, (first, done))
            done += LANES
    for j in range(lanes):
        for s in range(done, target.shape[1]):
            target[first + j, s] = tile[s, j]


@inline
def keep(kept: Array, h: Array, first: int, lanes: int) -> None:
    """kept[s, first + j] = h[s, j], for `kept` (n, r)."""
    for s in range(h.shape[0]):
        if lanes == LANES:
            store(kept, (s, first), get(h, s))
        else:
            for j in range(lanes):
                kept[s, first + j] = h[s, j]


@inline
def recall(h: Array, kept: Array, first: int, lanes: int) -> None:
    """The inverse of `keep`; zeros beyond the last channel."""
    for s in range(h.shape[0]):
        if lanes == LANES:
            put(h, s, load(kept, (s, first)))
        else:
            for j in range(LANES):
                h[s, j] = kept[s, first + j] if j < lanes else 0.0


@inline
def gather_all(rows: Array, source: Array, order: Array, count: int, straight: bool) -> None:
    """`gather` of all columns, into rows whose number of columns is rounded up to whole vectors."""
    for first in range(0, source.shape[1], LANES):
        lanes = min(LANES, source.shape[1] - first)
        gather(rows[:, first : first + LANES], source, order, count, straight, first, lanes)


@inline
def scatter_all(target: Array, rows: Array, order: Array, count: int, straight: bool) -> None:
    """The inverse of `gather_all`."""
    for first in range(0, target.shape[1], LANES):
        lanes = min(LANES, target.shape[1] - first)
        scatter(target, rows[:, first : first + LANES], order, count, straight, first, lanes, False)


# ------------------------------------------------------------------------------------------------- one chunk, one tile
# A tile is LANES channels. us, deltas, ys (chunk, LANES); decay = A log2(e), inverse = 1 / A, h (n, LANES);
# skip = D (1, LANES); Bs, Cs (chunk, n). `zoh` is None or True: numba compiles the one that is asked for.
# `coming`: (lines as from `spread`, first channel) of the next tile, so that memory works while registers do.


@kernel
def step_sizes(
    deltas: Array, slopes: Array, lows: Array, delta_weight: Array, delta_bias: Array, count: int, delta_softplus: bool
) -> None:
    """deltas = dt and slopes = its derivative, from raw deltas, or from `lows` (chunk, q) by `delta_weight` (q, LANES).

    Apart from `advance`, whose steps would each wait for it. `slopes` may be None."""
    for t in range(count):
        dt = get(delta_bias, 0)
        if delta_weight.shape[0]:
            for j in range(delta_weight.shape[0]):
                dt = fma(get(delta_weight, j), like(dt, lows[t, j]), dt)
        else:
            dt = dt + get(deltas, t)
        slope = like(dt, 1.0)
        if delta_softplus:
            dt, slope = softplus(dt)
        put(deltas, t, dt)
        if slopes is not None:
            put(slopes, t, slope)


@kernel
def are_within(deltas: Array, fastest: Array, count: int) -> Any:
    """Whether `power_within` may compute all decays of these steps; `fastest` (1, LANES): the largest rates."""
    if SCALES:
        return False
    longest = like(get(fastest, 0), 0.0)
    for t in range(count):
        longest = larger(magnitude(get(deltas, t)), longest)
    bound = like(longest, EXPONENTS if deltas.itemsize == 4 else DOUBLE_EXPONENTS)
    return all_below(longest * get(fastest, 0), bound)


@inline
def step(delta: Array, decay: Array, inverse: Array, s: int, zoh: Any, within: Any) -> Array:
    """(e^(delta A), the factor of B u) of state s. `within` is None or True: see `are_within`."""
    if zoh is not None:
        a, phi, _ = hold(delta, get(decay, s), get(inverse, s))
        return a, phi
    if within is None:
        return power(delta, get(decay, s)), delta
    return power_within(delta, get(decay, s)), delta


@inline
def advance_state(
    s: int, decay: Array, inverse: Array, B: Array, C: Array, u: Array, delta: Array, h: Array, y: Array,
    zoh: Any, within: Any,
) -> Array:  # fmt: skip
    """One state of one step of `advance`; returns y plus its contribution."""
    a, phi = step(delta, decay, inverse, s, zoh, within)
    state = fma(a, get(h, s), phi * u * number(B, (s,)))
    put(h, s, state)
    return fma(state, like(state, number(C, (s,))), y)


@kernel
def advance(
    us: Array, deltas: Array, decay: Array, inverse: Array, Bs: Array, Cs: Array, skip: Array, h: Array, ys: Array,
    count: int, zoh: Any, within: Any, coming: Any, next_u: Array, next_delta: Array, next_y: Array,
) -> None:  # fmt: skip
    """The scan itself: `count` steps from the state h, which they leave behind."""
    n = decay.shape[0]
    for t in range(count):
        line = coming[0][0, t], coming[0][1, t] + coming[1]
        prefetch(next_u, line)
        prefetch(next_delta, line)
        prefetch(next_y, line)
        u, delta = get(us, t), get(deltas, t)
        y = get(skip, 0) * u if skip.shape[0] else like(u, 0.0)
        rest = like(u, 0.0)  # half of the sum: two short chains of additions instead of a long one
        for s in range(0, n - 1, 2):
            y = advance_state(s, decay, inverse, Bs[t], Cs[t], u, delta, h, y, zoh, within)
            rest = advance_state(s + 1, decay, inverse, Bs[t], Cs[t], u, delta, h, rest, zoh, within)
        if n % 2:
            y = advance_state(n - 1, decay, inverse, Bs[t], Cs[t], u, delta, h, y, zoh, within)
        put(ys, t, y + rest)


@kernel
def retrace(
    us: Array, deltas: Array, decay: Array, inverse: Array, Bs: Array, hs: Array, factors: Array, count: int,
    zoh: Any, within: Any, coming: Any, next_u: Array, next_delta: Array, next_dy: Array,
) -> None:  # fmt: skip
    """The same steps from hs[0], keeping all states hs (count + 1, n, LANES) and the factors between them."""
    for t in range(count):
        line = coming[0][0, t], coming[0][1, t] + coming[1]
        prefetch(next_u, line)
        prefetch(next_delta, line)
        prefetch(next_dy, line)
        u, delta = get(us, t), get(deltas, t)
        for s in range(decay.shape[0]):
            a, phi = step(delta, decay, inverse, s, zoh, within)
            put(factors[t], s, a)
            put(hs[t + 1], s, fma(a, get(hs[t], s), phi * u * number(Bs, (t, s))))


@inline
def reverse_state(
    s: int, decay: Array, inverse: Array, B: Array, C: Array, before: Array, after: Array, factors: Array,
    u: Array, delta: Array, dy: Array, into_u: Array, into_delta: Array, into_exponent: Array,
    g: Array, dA: Array, zoh: Any,
) -> Array:  # fmt: skip
    """One state of one step of `reverse`: into_u, into_delta, into_exponent after it, and what B[s] and C[s] get."""
    a, rate = get(factors, s), get(decay, s)
    dh = fma(dy, like(dy, number(C, (s,))), get(g, s))
    carried = dh * a
    put(g, s, carried)
    change = carried * get(before, s)
    into_exponent = fma(change, rate, into_exponent)
    into_A = fma(change, delta, get(dA, s))
    if zoh is None:
        into_u = fma(dh, like(dh, number(B, (s,))), into_u)
        into_B = dh * (delta * u)
    else:
        _, phi, slope = hold(delta, rate, get(inverse, s))
        entering = dh * B[s]
        into_u = fma(entering, phi, into_u)
        into_delta = fma(entering * u, a, into_delta)
        into_A = fma(entering * u, slope, into_A)
        into_B = dh * (phi * u)
    put(dA, s, into_A)
    return into_u, into_delta, into_exponent, into_B, dy * get(after, s)


@inline
def inside(x: Array, edge: Any) -> Array:
    """x before a sum over lanes: zeros beyond the last channel, where 0 times an infinity of B or C may have come.

    edge (1, LANES): 1 for a channel, else 0; None: every lane is one."""
    if edge is None:
        return x
    return choose(get(edge, 0), ">", like(x, 0.0), x, like(x, 0.0))


@kernel
def reverse(
    us: Array, deltas: Array, decay: Array, inverse: Array, Bs: Array, Cs: Array, skip: Array,
    hs: Array, factors: Array, gs: Array, g: Array,
    dA: Array, dus: Array, ddeltas: Array, dBs: Array, dCs: Array, count: int,
    zoh: Any, edge: Any, coming: Any, next_du: Array, next_ddelta: Array,
) -> None:  # fmt: skip
    """The adjoint of `advance`, from the last step to the first.

    gs = gradients of ys. g (n, LANES): gradient of the state after the chunk, then of the one before it. dA, dBs and
    dCs are added to. edge: see `inside`."""
    n = decay.shape[0]
    for t in range(count - 1, -1, -1):
        line = coming[0][0, t], coming[0][1, t] + coming[1]
        prefetch(next_du, line)
        prefetch(next_ddelta, line)
        u, delta, dy = get(us, t), get(deltas, t), get(gs, t)
        rates, states = (decay, inverse, Bs[t], Cs[t]), (hs[t], hs[t + 1], factors[t], u, delta, dy)
        into_u = into_delta = into_exponent = like(u, 0.0)  # in the Euler step into_u lacks its factor delta
        for s in range(0, n - 3, 4):
            into_u, into_delta, into_exponent, b0, c0 = reverse_state(
                s, *rates, *states, into_u, into_delta, into_exponent, g, dA, zoh
            )
            into_u, into_delta, into_exponent, b1, c1 = reverse_state(
                s + 1, *rates, *states, into_u, into_delta, into_exponent, g, dA, zoh
            )
            into_u, into_delta, into_exponent, b2, c2 = reverse_state(
                s + 2, *rates, *states, into_u, into_delta, into_exponent, g, dA, zoh
            )
            into_u, into_delta, into_exponent, b3, c3 = reverse_state(
                s + 3, *rates, *states, into_u, into_delta, into_exponent, g, dA, zoh
            )
            sum4(inside(b0, edge), inside(b1, edge), inside(b2, edge), inside(b3, edge), dBs, (t, s))
            sum4(inside(c0, edge), inside(c1, edge), inside(c2, edge), inside(c3, edge), dCs, (t, s))
        for s in range(n // 4 * 4, n):
            into_u, into_delta, into_exponent, b0, c0 = reverse_state(
                s, *rates, *states, into_u, into_delta, into_exponent, g, dA, zoh
            )
            dBs[t, s] += lane_sum(inside(b0, edge))
            dCs[t, s] += lane_sum(inside(c0, edge))
        direct = get(skip, 0) * dy if skip.shape[0] else like(u, 0.0)
        if zoh is None:
            into_u, into_delta = into_u * delta, into_u * u
        put(dus, t, into_u + direct)
        put(ddeltas, t, into_delta + into_exponent * LN2)


@kernel
def reverse_step_sizes(
    ddeltas: Array, slopes: Array, lows: Array, delta_weight: Array, dbias: Array, dweight: Array, dlows: Array,
    count: int, edge: Any,
) -> None:  # fmt: skip
    """The adjoint of `step_sizes`: ddeltas = gradients of dt, then of raw deltas; the rest is added to."""
    q = delta_weight.shape[0]
    into_bias = get(dbias, 0)
    for t in range(count):
        into_delta = get(ddeltas, t) * get(slopes, t)
        put(ddeltas, t, into_delta)
        into_bias = into_bias + into_delta
        for j in range(q):
            put(dweight, j, fma(into_delta, like(into_delta, lows[t, j]), get(dweight, j)))
        counted = inside(into_delta, edge)
        for j in range(0, q - 3, 4):
            sum4(
                counted * get(delta_weight, j), counted * get(delta_weight, j + 1),
                counted * get(delta_weight, j + 2), counted * get(delta_weight, j + 3), dlows, (t, j),
            )  # fmt: skip
        for j in range(q // 4 * 4, q):
            dlows[t, j] += lane_sum(counted * get(delta_weight, j))
    put(dbias, 0, into_bias)


# -------------------------------------------------------------------------------------------------------- the two scans
# Both work on the channels `first` to `end` of one image and one group, one direction after the other, chunk by chunk:
#   u, y, dy (l, r); delta (k, l, r); A (k, r, n); B, C (k, l, n); D, delta_bias (k, r, 1), or (k, 0, 1) for none;
#   delta_weight (k, r, q): if q is not 0, delta is (k, l, q) and the scan's is delta_weight @ delta;
#   state, last, dlast (k, r, n); kept (k, chunks, n, r): the state before every chunk, or (k, 0, n, r) to keep none.
# Scratch memory comes from the caller, who can align it: a vector that straddles two cache lines costs two accesses.
#   rows (.., chunk, LANES), states (.., tiles, n, LANES), sides (.., tiles, 1, LANES), mixes (.., tiles, q, LANES),
#   rates (.., chunk, n rounded up to vectors), lows (.., chunk, q rounded up to vectors).
# `delta_softplus`: delta goes through softplus. `zoh`: None for the Euler step, True for zero-order hold.


@inline
def prepare(
    A: Array, D: Array, delta_bias: Array, delta_weight: Array, first: int, end: int,
    decays: Array, fastest: Array, inverses: Array, skips: Array, biases: Array, mixes: Array, zoh: Any,
) -> None:  # fmt: skip
    """The parts of A, D, delta_bias and delta_weight that every chunk needs, tile by tile."""
    for tile in range(decays.shape[0]):
        c = first + tile * LANES
        lanes = min(LANES, end - c)
        columns(decays[tile], A, c, lanes, LOG2E)
        most = like(get(fastest[tile], 0), 0.0)
        for s in range(A.shape[1]):
            most = larger(magnitude(get(decays[tile], s)), most)
        put(fastest[tile], 0, most)
        if zoh is not None:
            for j in range(lanes):
                for s in range(A.shape[1]):
                    inverses[tile, s, j] = 1.0 / A[c + j, s]
        if D.shape[0]:
            columns(skips[tile], D, c, lanes, 1.0)
        if delta_bias.shape[0]:
            columns(biases[tile], delta_bias, c, lanes, 1.0)
        columns(mixes[tile], delta_weight, c, lanes, 1.0)


@inline
def of_job(inputs: Any, image: int, group: int) -> Any:
    """The inputs of both passes, for one image and one group."""
    u, delta, A, B, C, D, delta_bias, delta_weight = inputs
    return (
        u[image, group], delta[:, image, group], A[:, group], B[:, image, group], C[:, image, group],
        D[:, group], delta_bias[:, group], delta_weight[:, group],
    )  # fmt: skip


@inline
def cleared(states: Array, sides: Array, mixes: Array, first: int, end: int) -> int:
    """How many tiles the channels fill, after zeros for the lanes beyond the last one."""
    states[:] = 0
    sides[:] = 0
    mixes[:] = 0
    return (end - first + LANES - 1) // LANES


def forward(
    inputs: Any, outputs: Any, scratch: Any, jobs: Array, taken: Array, size: Any, delta_softplus: bool, zoh: Any
) -> None:
    """y = the sum of the scans over directions, last = their last states: as many jobs as nobody else takes."""
    state = inputs[8]
    y, last, kept = outputs
    while True:
        job = claim(taken)
        if job >= jobs.shape[0]:
            return
        _, image, group, first, end = jobs[job]
        forward_job(
            (*of_job(inputs[:8], image, group), state[:, image, group]),
            (y[image, group], last[:, image, group], kept[:, image, group]),
            scratch, size, delta_softplus, (first, end), zoh,
        )  # fmt: skip


@pasted
def forward_job(
    inputs: Any, outputs: Any, scratch: Any, size: Any, delta_softplus: bool, channels: Any, zoh: Any
) -> None:
    u, delta, A, B, C, D, delta_bias, delta_weight, state = inputs
    y, last, kept = outputs
    rows, states, sides, rates, mixes, lows = scratch
    height, width = size
    first, end = channels
    tiles = cleared(states, sides, mixes, first, end)
    us, deltas, ys = rows[0], rows[1], rows[2]
    chunk = us.shape[0]
    decays, inverses, hs = states[0, :tiles], states[1, :tiles], states[2, :tiles]
    skips, biases, fastest = sides[0, :tiles], sides[1, :tiles], sides[2, :tiles]
    Bs, Cs = rates[0], rates[1]
    order, lines, next_lines = np.empty(chunk, np.int64), np.empty((2, chunk), np.int64), np.empty((2, chunk), np.int64)
    directions, length, _ = B.shape
    low_rank = delta_weight.shape[2] > 0
    for k in range(directions):
        direction = 2 * k if directions == 2 else k
        straight = direction == 0
        along = straight and u.strides[1] != u.itemsize
        prepare(
            A[k], D[k], delta_bias[k], delta_weight[k], first, end,
            decays, fastest, inverses, skips, biases, mixes[0], zoh,
        )  # fmt: skip
        for tile in range(hs.shape[0]):
            columns(hs[tile], state[k], first + tile * LANES, min(LANES, end - first - tile * LANES), 1.0)
        for start in range(0, length, chunk):
            count = min(chunk, length - start)
            walk(order, direction, start + chunk, height, width)
            spread(next_lines, order, along)
            walk(order, direction, start, height, width)
            spread(lines, order, along)
            gather_all(Bs, B[k], order, count, straight)
            gather_all(Cs, C[k], order, count, straight)
            if low_rank:
                gather_all(lows[0], delta[k], order, count, straight)
            for tile in range(hs.shape[0]):
                c = first + tile * LANES
                lanes = min(LANES, end - c)
                if kept.shape[1]:
                    keep(kept[k, start // chunk], hs[tile], c, lanes)
                gather(us, u, order, count, straight, c, lanes)
                if not low_rank:
                    gather(deltas, delta[k], order, count, straight, c, lanes)
                step_sizes(deltas, None, lows[0], mixes[0, tile], biases[tile], count, delta_softplus)
                skip = skips[tile, : min(1, D.shape[1])]
                coming = (lines, c + LANES) if tile + 1 < hs.shape[0] else (next_lines, first)
                given = us, deltas, decays[tile], inverses[tile], Bs, Cs, skip, hs[tile], ys, count, zoh
                ahead = coming, u, u if low_rank else delta[k], y
                if zoh is None and are_within(deltas, fastest[tile], count):
                    advance(*given, True, *ahead)
                else:
                    advance(*given, None, *ahead)
                scatter(y, ys, order, count, straight, c, lanes, k > 0)
        for tile in range(hs.shape[0]):
            c = first + tile * LANES
            from_columns(last[k], hs[tile], c, min(LANES, end - c))


def backward(
    inputs: Any, outputs: Any, scratch: Any, jobs: Array, taken: Array, size: Any, delta_softplus: bool, zoh: Any
) -> None:
    """The gradients of all inputs from dy and dlast; dB, dC and a low-rank ddelta are sums over a job's channels."""
    kept, dy, dlast = inputs[8:]
    du, ddelta, dA, dB, dC, dD, dbias, dweight, dstate = outputs
    while True:
        job = claim(taken)
        if job >= jobs.shape[0]:
            return
        part, image, group, first, end = jobs[job]
        backward_job(
            (*of_job(inputs[:8], image, group), kept[:, image, group], dy[image, group], dlast[:, image, group]),
            (
                du[image, group], ddelta[min(part, ddelta.shape[0] - 1), :, image, group], dA[image, :, group],
                dB[part, :, image, group], dC[part, :, image, group],
                dD[image, :, group], dbias[image, :, group], dweight[image, :, group], dstate[:, image, group],
            ),
            scratch, size, delta_softplus, (first, end), zoh,
        )  # fmt: skip


@pasted
def backward_job(
    inputs: Any, outputs: Any, scratch: Any, size: Any, delta_softplus: bool, channels: Any, zoh: Any
) -> None:
    u, delta, A, B, C, D, delta_bias, delta_weight, kept, dy, dlast = inputs
    du, ddelta, dA, dB, dC, dD, dbias, dweight, dstate = outputs
    rows, states, sides, rates, mixes, lows, trace = scratch
    height, width = size
    first, end = channels
    tiles = cleared(states, sides, mixes, first, end)
    us, deltas, slopes, gs, dus, ddeltas = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    chunk = us.shape[0]
    decays, inverses, carried, dAs = states[0, :tiles], states[1, :tiles], states[2, :tiles], states[3, :tiles]
    skips, biases, dDs, dbiases = sides[0, :tiles], sides[1, :tiles], sides[2, :tiles], sides[3, :tiles]
    fastest = sides[4, :tiles]
    Bs, Cs, dBs, dCs = rates[0], rates[1], rates[2], rates[3]
    hs, factors = trace[0], trace[1]
    edge = np.zeros((1, LANES), us.dtype)
    edge[0, : (end - first - 1) % LANES + 1] = 1
    order, lines, next_lines = np.empty(chunk, np.int64), np.empty((2, chunk), np.int64), np.empty((2, chunk), np.int64)
    directions, length, _ = B.shape
    low_rank = delta_weight.shape[2] > 0
    for k in range(directions):
        direction = 2 * k if directions == 2 else k
        straight = direction == 0
        along = straight and u.strides[1] != u.itemsize
        prepare(
            A[k], D[k], delta_bias[k], delta_weight[k], first, end,
            decays, fastest, inverses, skips, biases, mixes[0], zoh,
        )  # fmt: skip
        dAs[:] = 0
        dDs[:] = 0
        dbiases[:] = 0
        mixes[1] = 0
        for tile in range(carried.shape[0]):
            columns(carried[tile], dlast[k], first + tile * LANES, min(LANES, end - first - tile * LANES), 1.0)
        for start in range((length - 1) // chunk * chunk, -1, -chunk):
            count = min(chunk, length - start)
            walk(order, direction, start - chunk, height, width)
            spread(next_lines, order, along)
            walk(order, direction, start, height, width)
            spread(lines, order, along)
            gather_all(Bs, B[k], order, count, straight)
            gather_all(Cs, C[k], order, count, straight)
            if low_rank:
                gather_all(lows[0], delta[k], order, count, straight)
            dBs[:] = 0
            dCs[:] = 0
            lows[1] = 0
            for tile in range(carried.shape[0]):
                c = first + tile * LANES
                lanes = min(LANES, end - c)
                recall(hs[0], kept[k, start // chunk], c, lanes)
                gather(us, u, order, count, straight, c, lanes)
                gather(gs, dy, order, count, straight, c, lanes)
                if not low_rank:
                    gather(deltas, delta[k], order, count, straight, c, lanes)
                step_sizes(deltas, slopes, lows[0], mixes[0, tile], biases[tile], count, delta_softplus)
                skip = skips[tile, : min(1, D.shape[1])]
                decay, inverse = decays[tile], inverses[tile]
                coming = (lines, c + LANES) if tile + 1 < carried.shape[0] else (next_lines, first)
                given = us, deltas, decay, inverse, Bs, hs, factors, count, zoh
                inputs_ahead = coming, u, u if low_rank else delta[k], dy
                if zoh is None and are_within(deltas, fastest[tile], count):
                    retrace(*given, True, *inputs_ahead)
                else:
                    retrace(*given, None, *inputs_ahead)
                own = hs, factors, gs, carried[tile], dAs[tile], dus, ddeltas, dBs, dCs, count, zoh
                ahead = coming, du, du if low_rank else ddelta[k]
                of_steps = slopes, lows[0], mixes[0, tile], dbiases[tile], mixes[1, tile], lows[1], count
                if lanes == LANES:
                    reverse(us, deltas, decay, inverse, Bs, Cs, skip, *own, None, *ahead)
                    reverse_step_sizes(ddeltas, *of_steps, None)
                else:
                    reverse(us, deltas, decay, inverse, Bs, Cs, skip, *own, edge, *ahead)
                    reverse_step_sizes(ddeltas, *of_steps, edge)
                into_D = get(dDs[tile], 0)
                for t in range(count):
                    into_D = fma(get(gs, t), get(us, t), into_D)
                put(dDs[tile], 0, into_D)
                scatter(du, dus, order, count, straight, c, lanes, k > 0)
                if not low_rank:
                    scatter(ddelta[k], ddeltas, order, count, straight, c, lanes, False)
            if low_rank:
                scatter_all(ddelta[k], lows[1], order, count, straight)
            scatter_all(dB[k], dBs, order, count, straight)
            scatter_all(dC[k], dCs, order, count, straight)
        for tile in range(carried.shape[0]):
            c = first + tile * LANES
            lanes = min(LANES, end - c)
            from_columns(dA[k], dAs[tile], c, lanes)
            from_columns(dstate[k], carried[tile], c, lanes)
            if D.shape[1]:
                from_columns(dD[k], dDs[tile], c, lanes)
            if delta_bias.shape[1]:
                from_columns(dbias[k], dbiases[tile], c, lanes)
            from_columns(dweight[k], mixes[1, tile], c, lanes)
