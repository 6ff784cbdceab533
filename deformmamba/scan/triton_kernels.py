"""The Triton kernels of `triton`.

One program is one warp: 32 or 64 channels of one group of one image, walking a stretch of one direction in tiles of
STEPS x LANES. The states are taken one after the other; for each, the tile's recurrence is one associative scan over
its steps. A lane is a channel and owns all of the channel's steps, so that the scan is a plain loop in registers in
which no lane waits for another, and directions are index arithmetic. The value of a state at the end of a tile passes
to the next tile through a small array in memory. So the number of registers does not depend on the number of states,
and their loop needs no padding.

Long walks are cut into stretches that run in parallel. Each stretch is first walked from a zero state (`forward` with
neither OUTPUT nor EVERY). `carry_on` combines the results, and each stretch is walked again from its true state. The
gradient of the state is computed in the same way, backwards.

There are no atomic operations, so results are the same in every run. Directions add to y one launch after the other,
and each program writes its part of the sums over channels (dB, dC), images and stretches (dA, dD, dbias).

`unit` is always 1. The compiler cannot rely on this, so it does not assign neighbouring channels to one lane.
"""

# mypy: disable-error-code="no-untyped-def"
# (values in Triton functions have no Python types to annotate)

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32

# integers on whose value no kernel is specialised: few variants to compile, and see `unit`
_PLAIN = ["images", "groups", "height", "width", "first", "turn", "splits", "tiles", "chunks", "final", "unit"]


@triton.jit
def decay(a, b):
    """The product of two decays. It never becomes zero, so that an infinite state propagates as in the step-by-step
    computation."""
    return tl.maximum(a * b, TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def after(a1, x1, a2, x2):
    """Stretches x -> a x + b of steps, 1 then 2, as one."""
    return decay(a1, a2), a2 * x1 + x2


@triton.jit
def after_apart(a1, e1, b1, a2, e2, b2):
    """The same for x = e + b, where b is the input of the last step and e the part that it keeps of the previous
    state."""
    return decay(a1, a2), a2 * (e1 + b1) + e2, b2


@triton.jit
def before(f1, a1, x1, f2, a2, x2):
    """Backwards, G[t] = x[t] + f[t + 1] G[t + 1], stretch 1 behind stretch 2: the first decay f of a stretch, the
    product a of its others, and x, its first G if nothing followed."""
    return f2, decay(decay(a2, f1), a1), a2 * (f1 * x1) + x2


@triton.jit
def softplus(x):
    """(log(1 + exp(x)), its slope). log(1 + e) = 2 artanh(e / (2 + e)), so that small results are accurate too."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    z = e / (2 + e)
    s = z * z
    series = 2 + s * (2 / 3 + s * (2 / 5 + s * (2 / 7 + s * (2 / 9 + s * (2 / 11 + s * (2 / 13))))))
    return tl.where(x > 0, x, 0.0) + z * series, tl.where(x > 0, 1.0, e) / (1 + e)


@triton.jit
def hold(dt, A, a):
    """(exp(dt A) - 1) / A for a = exp(dt A), by its series where that would cancel."""
    x = dt * A
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return tl.where(tl.abs(x) < 0.5, dt * (1 + x * (1 / 2 + x * (1 / 6 + x * series))), (a - 1) * (1 / A))


@triton.jit
def hold_slope(dt, A, a, phi):
    """The derivative in A of phi = hold(dt, A, a)."""
    x = dt * A
    series = 1 / 30 + x * (1 / 144 + x * (1 / 840 + x * (1 / 5760 + x * (1 / 45360 + x * (1 / 403200)))))
    series = 1 / 2 + x * (1 / 3 + x * (1 / 8 + x * series))
    return tl.where(tl.abs(x) < 0.5, dt * dt * series, (dt * a - phi) * (1 / A))


@triton.jit
def _where(images, groups, channels, splits, LANES: tl.constexpr):
    """This program's block of channels, group, stretch, image and direction."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, LANES)
    rest = pid // blocks
    image = rest // groups // splits
    return (
        pid % blocks,
        rest % groups,
        rest // groups % splits,
        (image % images).to(tl.int64),
        (image // images).to(tl.int64),
    )


@triton.jit
def _pixel(t, walk, height, width):
    """The row-major pixel at each step of walk 0 (rows), 1 (columns), 2 and 3 (the same from the end)."""
    t = tl.where(walk >= 2, height * width - 1 - t, t)
    return tl.where(walk % 2 == 1, t % height * width + t // height, t)


@triton.jit
def _step_sizes(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """(dt, its slope in delta) of a tile; dt = 0 past the end, where a step then changes nothing."""
    dt = delta.to(tl.float32) + bias
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if SOFTPLUS:
        dt, slope = softplus(dt)
    return tl.where(inside, dt, 0.0), slope


@triton.jit
def _discretize(dt, A, inside, EVEN: tl.constexpr, ZOH: tl.constexpr):
    """(exp(dt A), the factor of B u). Past the end they are 1 and 0, even where A is infinite."""
    x = dt * (A * LOG2E)
    if not EVEN:
        x = tl.where(inside, x, 0.0)
    a = tl.exp2(x)
    phi = hold(dt, A, a) if ZOH else dt
    return a, phi if EVEN else tl.where(inside, phi, 0.0)


@triton.jit(do_not_specialize=_PLAIN)
def forward(
    u, delta, A, B, C, D, bias, y, carry, kept, sums,
    images, groups, channels, length, height, width, first, turn, splits, tiles, chunks, unit,
    b_direction, b_image, b_group, b_step, b_state,
    N: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, SEQUENCE: tl.constexpr, EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, OUTPUT: tl.constexpr, ADD: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Walk a stretch from the state in carry[.., 0], and leave its last state in carry[.., tiles % 2].

    OUTPUT: writes y, or adds to it if ADD. EVERY > 0: writes the state before every EVERY-th tile to kept. With
    neither, writes the sum of dt to sums.

    u, y (image, pixel, group, channel), delta (direction, ..), with SEQUENCE (.., group, channel, step); A (direction,
    group, state, channel); B, C by their strides; D, bias (direction, group, channel); carry (direction, image, group,
    stretch, 2, state, channel), kept (.., chunk, state, channel), sums (.., stretch, channel).
    """
    block, group, split, image, direction = _where(images, groups, channels, splits, LANES)
    step = tl.arange(0, STEPS)[:, None]
    lane = block * LANES + tl.arange(0, LANES)[None, :]
    real = lane < channels
    c = lane * unit
    plane = (direction * images + image) * groups + group
    walk = (first + direction) * turn
    corner = image * length * groups * channels + group * channels * (length if SEQUENCE else 1)
    delta += direction * images * length * groups * channels + corner
    B += direction * b_direction + image * b_image + group * b_group
    C += direction * b_direction + image * b_image + group * b_group
    A += (direction * groups + group) * N * channels + c
    carry += (plane * splits + split) * 2 * N * channels + c
    side = (direction * groups + group) * channels + c
    shift = tl.zeros([1, LANES], tl.float32)
    if bias is not None:
        shift = tl.load(bias + side, mask=real, other=0.0)
    total = tl.zeros([1, LANES], tl.float32)
    for i in range(tiles):
        tile = split * tiles + i
        t = tile * STEPS + step
        p = t if SEQUENCE else _pixel(t, walk, height, width)
        at = p + lane * length if SEQUENCE else p * (groups * channels) + c
        inside = (t < length) | EVEN
        mask = inside & real
        dt, _ = _step_sizes(tl.load(delta + at, mask=mask, other=0.0), shift, inside, SOFTPLUS)
        x = tl.load(u + corner + at, mask=mask, other=0.0).to(tl.float32)
        out = tl.zeros([STEPS, LANES], tl.float32)
        for n in range(N):
            rate = tl.load(A + n * channels, mask=real, other=0.0)
            b = tl.load(B + n * b_state + p * b_step, mask=inside, other=0.0).to(tl.float32)
            state = tl.load(carry + (i % 2 * N + n) * channels, mask=real, other=0.0)
            if EVERY > 0:  # noqa: SIM102 (only this one is known to the compiler)
                if (tile % EVERY == 0) & (tile // EVERY < chunks):
                    tl.store(kept + ((plane * chunks + tile // EVERY) * N + n) * channels + c, state, mask=real)
            a, phi = _discretize(dt, rate, inside, EVEN, ZOH)
            enter = phi * x * b
            _, h = tl.associative_scan((a, tl.where(step == 0, a * state + enter, enter)), 0, after)
            leave = carry + ((i + 1) % 2 * N + n) * channels + 0 * step
            tl.store(leave, h, mask=(step == STEPS - 1) & real)
            if OUTPUT:
                out += h * tl.load(C + n * b_state + p * b_step, mask=inside, other=0.0).to(tl.float32)
        if OUTPUT:
            if D is not None:
                out += tl.load(D + side, mask=real, other=0.0) * x
            if ADD:
                out += tl.load(y + corner + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(y + corner + at, out.to(y.dtype.element_ty), mask=mask)
        elif EVERY == 0:
            total += tl.sum(dt, 0)[None, :]
        tl.debug_barrier()  # a carry is written before any thread reads it
    if not OUTPUT and EVERY == 0:
        tl.store(sums + (plane * splits + split) * channels + c, total, mask=real)


@triton.jit(do_not_specialize=_PLAIN)
def carry_on(
    carry, sums, A, edge, images, groups, channels, splits, final,
    N: tl.constexpr, LANES: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Set carry[.., 0] of every stretch: `edge` (direction, image, group, state, channel) in the first, then from
    stretch to stretch by what each leaves from zero, carry[.., final], and by its sum of dt. BACK: last to first.

    A program has one state of a block of channels; the state replaces the stretch in `_where`.
    """
    block, group, n, image, direction = _where(images, groups, channels, N, LANES)
    c = block * LANES + tl.arange(0, LANES)
    real = c < channels
    plane = (direction * images + image) * groups + group
    rate = tl.load(A + ((direction * groups + group) * N + n) * channels + c, mask=real, other=0.0) * LOG2E
    state = tl.load(edge + (plane * N + n) * channels + c, mask=real, other=0.0)
    for i in range(splits):
        split = plane * splits + (splits - 1 - i if BACK else i)
        at = carry + (split * 2 * N + n) * channels + c
        own = tl.load(at + final * N * channels, mask=real, other=0.0)
        tl.store(at, state, mask=real)
        dt = tl.load(sums + split * channels + c, mask=real, other=0.0)
        state = decay(tl.exp2(dt * rate), 1.0) * state + own


@triton.jit(do_not_specialize=_PLAIN)
def backward(
    u, delta, A, B, C, D, bias, states, dy, du, ddelta, dA, dB, dC, dD, dbias, carry, sums,
    images, groups, channels, length, height, width, first, turn, splits, tiles, unit,
    b_direction, b_image, b_group, b_step, b_state, g_part, g_direction, g_image, g_group, g_step, g_state,
    N: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, SEQUENCE: tl.constexpr, EVEN: tl.constexpr,
    SOFTPLUS: tl.constexpr, ZOH: tl.constexpr, ADD: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Walk a stretch backwards from carry[.., 0], the gradient of its last state, and leave that of the state before
    its first step in carry[.., tiles % 2].

    LOCAL: that, and the sum of dt in sums. Else the gradients, from `states` (.., tile, state, channel), the states
    before every tile: du, on top of what is there if ADD; dB, dC (block of channels, strides g_..); dA (direction,
    image, group, stretch, state, channel), which must hold zeros; dD, dbias (.., stretch, channel). The rest as in
    `forward`.
    """
    block, group, split, image, direction = _where(images, groups, channels, splits, LANES)
    step = tl.arange(0, STEPS)[:, None]
    lane = block * LANES + tl.arange(0, LANES)[None, :]
    real = lane < channels
    c = lane * unit
    plane = (direction * images + image) * groups + group
    walk = (first + direction) * turn
    corner = image * length * groups * channels + group * channels * (length if SEQUENCE else 1)
    shelf = direction * images * length * groups * channels + corner
    part = plane * splits + split
    B += direction * b_direction + image * b_image + group * b_group
    C += direction * b_direction + image * b_image + group * b_group
    A += (direction * groups + group) * N * channels + c
    carry += part * 2 * N * channels + c
    side = (direction * groups + group) * channels + c
    shift = tl.zeros([1, LANES], tl.float32)
    if bias is not None:
        shift = tl.load(bias + side, mask=real, other=0.0)
    total_dt = tl.zeros([1, LANES], tl.float32)
    total_D = tl.zeros([1, LANES], tl.float32)
    total_bias = tl.zeros([1, LANES], tl.float32)
    for i in range(tiles):
        tile = split * tiles + tiles - 1 - i
        t = tile * STEPS + step
        p = t if SEQUENCE else _pixel(t, walk, height, width)
        at = p + lane * length if SEQUENCE else p * (groups * channels) + c
        inside = (t < length) | EVEN
        mask = inside & real
        dt, slope = _step_sizes(tl.load(delta + shelf + at, mask=mask, other=0.0), shift, inside, SOFTPLUS)
        g = tl.load(dy + corner + at, mask=mask, other=0.0).to(tl.float32)
        if LOCAL:
            total_dt += tl.sum(dt, 0)[None, :]
        else:
            x = tl.load(u + corner + at, mask=mask, other=0.0).to(tl.float32)
            grad_x = tl.zeros([STEPS, LANES], tl.float32)
            grad_dt = tl.zeros([STEPS, LANES], tl.float32)
        for n in range(N):
            rate = tl.load(A + n * channels, mask=real, other=0.0)
            r = tl.load(C + n * b_state + p * b_step, mask=inside, other=0.0).to(tl.float32)
            behind = tl.load(carry + (i % 2 * N + n) * channels, mask=real, other=0.0)
            leave = carry + ((i + 1) % 2 * N + n) * channels + 0 * step
            a, phi = _discretize(dt, rate, inside, EVEN, ZOH)
            G = tl.where(step == STEPS - 1, g * r + behind, g * r)
            if LOCAL:
                _, aG = tl.associative_scan((a, a * G), 0, after, reverse=True)
                tl.store(leave, aG, mask=(step == 0) & real)
            else:
                _, _, G = tl.associative_scan((a, tl.full(a.shape, 1.0, tl.float32), G), 0, before, reverse=True)
                tl.store(leave, a * G, mask=(step == 0) & real)
                b = tl.load(B + n * b_state + p * b_step, mask=inside, other=0.0).to(tl.float32)
                begun = real & (tile * STEPS + 0 * lane < length)
                state = tl.load(states + ((part * tiles + tiles - 1 - i) * N + n) * channels + c, mask=begun, other=0.0)
                weight = phi * x
                _, e, _ = tl.associative_scan((a, tl.where(step == 0, a * state, 0.0), weight * b), 0, after_apart)
                Gb = G * b
                Ge = G * e
                grad_dt += Ge * rate
                grad_rate = Ge * dt
                if ZOH:
                    grad_x += Gb * phi
                    grad_dt += Gb * x * a
                    grad_rate += Gb * x * hold_slope(dt, rate, a, phi)
                else:
                    grad_x += Gb
                dA_at = dA + (part * N + n) * channels + c
                tl.store(dA_at, tl.load(dA_at, mask=real, other=0.0) + tl.sum(grad_rate, 0)[None, :], mask=real)
                g_at = block.to(tl.int64) * g_part + direction * g_direction + image * g_image + group * g_group
                g_at += n * g_state
                grad_b = tl.sum(tl.where(real, G * weight, 0.0), 1)[:, None]
                grad_r = tl.sum(tl.where(real, g * (e + weight * b), 0.0), 1)[:, None]
                tl.store(dB + g_at + p * g_step, grad_b.to(dB.dtype.element_ty), mask=inside)
                tl.store(dC + g_at + p * g_step, grad_r.to(dC.dtype.element_ty), mask=inside)
        if not LOCAL:
            if not ZOH:
                grad_dt += grad_x * x
                grad_x *= dt
            if D is not None:
                grad_x += tl.load(D + side, mask=real, other=0.0) * g
                total_D += tl.sum(g * x, 0)[None, :]
            grad_dt = tl.where(inside, grad_dt * slope, 0.0)
            total_bias += tl.sum(grad_dt, 0)[None, :]
            tl.store(ddelta + shelf + at, grad_dt.to(ddelta.dtype.element_ty), mask=mask)
            if ADD:
                grad_x += tl.load(du + corner + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(du + corner + at, grad_x.to(du.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # as in `forward`
    if LOCAL:
        tl.store(sums + part * channels + c, total_dt, mask=real)
    else:
        if D is not None:
            tl.store(dD + part * channels + c, total_D, mask=real)
        if bias is not None:
            tl.store(dbias + part * channels + c, total_bias, mask=real)
