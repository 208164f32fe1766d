"""Device helpers shared by all kernels: which elements a tile holds, and merging partial results.

A tile is [BLOCK_C, BLOCK_N * BLOCK_S]: channels down, reduced elements across. One source serves
every layout: strides of all axes but the innermost arrive divided by VEC, so that the compiler
sees them as multiples of it and makes 16-byte accesses.

Short planes, or pixels of few channels, lie side by side as one run (`launch.Layout`). What is down
a tile then are columns, COLUMNS of them for each channel, and a block has the first SLAB of its
BLOCK_C, those of whole channels. A channel's columns are neighbours if RUN is 1, those of a plane,
and else alternate with those of all others. Elsewhere COLUMNS is 1 and a column a channel.
"""

import triton
import triton.language as tl

# Arguments that no kernel is compiled anew for: what alignment there is, VEC tells.
UNSPECIALIZED = [
    *("N", "C", "S", "G", "tiles_per_split"),
    *("stride_xn", "stride_xo", "stride_yn", "stride_yo", "stride_rn", "stride_ro"),
    *("stride_dyn", "stride_dyo", "stride_dxn", "stride_dxo"),
]

# Tensors with a number for each channel or group, and bits: no alignment is assumed of them.
PER_CHANNEL = [
    *("bits_ptr", "counters_ptr", "row_ptr", "sums_ptr"),
    *("mean_ptr", "var_ptr", "running_mean_ptr", "running_var_ptr", "num_batches_tracked_ptr"),
    *("weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr", "count_ptr"),
]


@triton.jit
def columns(
    block,
    C,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SLAB: tl.constexpr,
):
    """The columns of a block, int64 [BLOCK_C], and which of them exist."""
    lane = tl.arange(0, BLOCK_C)
    c = tl.cast(block, tl.int64) * SLAB + lane
    if CHANNELS_LAST:
        C = C // VEC * VEC
    exists = c < C
    if SLAB < BLOCK_C:
        exists = exists & (lane < SLAB)
    return c, exists


@triton.jit
def channels(c, c_mask, block, C, COLUMNS: tl.constexpr, SLAB: tl.constexpr):
    """The channels of a block, int64, as many as the next power of two, and which exist.

    They are those of its columns, c.
    """
    if COLUMNS == 1:
        return c, c_mask
    else:
        COUNT: tl.constexpr = SLAB // COLUMNS
        lane = tl.arange(0, triton.next_power_of_2(COUNT))
        k = tl.cast(block, tl.int64) * COUNT + lane
        return k, (k < C // COLUMNS) & (lane < COUNT)


@triton.jit
def merged_by(member, block, C, COLUMNS: tl.constexpr, SLAB: tl.constexpr):
    """The channel of a block that one of its programs merges, int64 [1], and whether it exists."""
    COUNT: tl.constexpr = SLAB // COLUMNS
    lane = member + tl.arange(0, 1)
    k = tl.cast(block, tl.int64) * COUNT + lane
    return k, (k < C // COLUMNS) & (lane < COUNT)


@triton.jit
def spread(x, RUN: tl.constexpr):
    """A number of each channel, for whose arithmetic one thread is enough.

    Left to the compiler every thread loads and computes those of all channels it has elements of,
    RUN next to each other. It does not repeat a gather, though.
    """
    if RUN < 4:
        return x
    else:
        return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def by_column(
    x, COLUMNS: tl.constexpr, SLAB: tl.constexpr, BLOCK_C: tl.constexpr, RUN: tl.constexpr
):
    """A number of each channel for its columns, [BLOCK_C]; see `spread` for RUN."""
    if COLUMNS == 1:
        return spread(x, RUN)
    else:
        LAST: tl.constexpr = x.shape[0] - 1
        column = tl.arange(0, BLOCK_C)
        k = column // COLUMNS if RUN == 1 else column % (SLAB // COLUMNS)
        return tl.gather(x, tl.minimum(k, LAST), 0)


@triton.jit
def sum_lanes(x, DTYPE: tl.constexpr, COLUMNS: tl.constexpr, SLAB: tl.constexpr, RUN: tl.constexpr):
    """Sums of channels of a tile, or of what `fold` made of it, in a dtype; RUN as in `spread`."""
    if COLUMNS == 1:
        return spread(tl.sum(x, 1), RUN).to(DTYPE)
    else:
        COUNT: tl.constexpr = SLAB // COLUMNS
        CHANNELS: tl.constexpr = triton.next_power_of_2(COUNT)
        AT_ONCE: tl.constexpr = min(triton.next_power_of_2(COLUMNS), max(1, 1024 // CHANNELS))
        x = tl.sum(x, 1)
        lane = tl.arange(0, CHANNELS * AT_ONCE)
        total = tl.zeros([CHANNELS], DTYPE)
        for start in range(0, COLUMNS, AT_ONCE):
            k, column = lane // AT_ONCE, start + lane % AT_ONCE
            at = k * COLUMNS + column if RUN == 1 else column * COUNT + k
            part = tl.gather(x, tl.minimum(at, x.shape[0] - 1), 0)
            part = tl.where(column < COLUMNS, part, 0.0)
            total += tl.sum(tl.reshape(part, [CHANNELS, AT_ONCE]).to(DTYPE), 1)
        return total


@triton.jit
def tiles(g, N, S, tiles_per_split, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """The first and last (excluded) tiles of a split."""
    # 64-bit divisions are calls, and slow
    count = tl.cdiv(N, BLOCK_N).to(tl.int32) * tl.cdiv(S, BLOCK_S).to(tl.int32)
    first = g * tiles_per_split
    return first, tl.minimum(first + tiles_per_split, count)


@triton.jit
def origin(tile, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """The blocks over N and over S that a tile is of, int64 scalars."""
    tile = tl.cast(tile, tl.uint32)  # what is not negative divides in fewer instructions
    blocks = tl.cdiv(S, BLOCK_S).to(tl.uint32)
    return (tile // blocks).to(tl.int64), (tile % blocks).to(tl.int64)


@triton.jit
def reduced(
    tile,
    N,
    S,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Which of a tile's reduced positions exist, [BLOCK_N * BLOCK_S], and whether all do."""
    UNIT: tl.constexpr = 1 if CHANNELS_LAST else min(VEC, BLOCK_S)
    n_block, s_block = origin(tile, S, BLOCK_N, BLOCK_S)
    n_left = tl.minimum(N - n_block * BLOCK_N, BLOCK_N).to(tl.int32)
    s_left = tl.minimum(S // UNIT - s_block * (BLOCK_S // UNIT), BLOCK_S // UNIT).to(tl.int32)
    s_left *= UNIT
    lane = tl.arange(0, BLOCK_N * BLOCK_S)
    exists = (lane // BLOCK_S < n_left) & (lane % BLOCK_S < s_left)
    return exists, (n_left == BLOCK_N) & (s_left == BLOCK_S)


@triton.jit
def tile_count(tile, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many reduced positions of a tile exist, an int64 scalar."""
    n_block, s_block = origin(tile, S, BLOCK_N, BLOCK_S)
    return tl.minimum(N - n_block * BLOCK_N, BLOCK_N) * tl.minimum(S - s_block * BLOCK_S, BLOCK_S)


@triton.jit
def pointers(
    ptr,
    tile,
    c,
    S,
    stride_n,
    stride_o,
    stride_i,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Where a tile is, [BLOCK_C, BLOCK_N * BLOCK_S]; see `launch.Plan.strides` for the strides.

    All tiles of the same channels have the same offsets from their first element: a loop over
    tiles computes them once.
    """
    n_block, s_block = origin(tile, S, BLOCK_N, BLOCK_S)
    lane = tl.arange(0, BLOCK_N * BLOCK_S).to(tl.int64)
    n, c, s = (lane // BLOCK_S)[None, :], c[:, None], (lane % BLOCK_S)[None, :]
    if CHANNELS_LAST:
        within = (n * stride_n + s * stride_o) * VEC + c * stride_i
        first = (n_block * BLOCK_N * stride_n + s_block * BLOCK_S * stride_o) * VEC
    else:
        within = (n * stride_n + c * stride_o) * VEC + s * stride_i
        first = n_block * BLOCK_N * stride_n * VEC + s_block * BLOCK_S * stride_i
    return ptr + within + first


@triton.jit
def load(
    ptr,
    tile,
    c,
    S,
    exists,
    stride_n,
    stride_o,
    stride_i,
    EVICTION: tl.constexpr,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A tile, 0 where nothing exists, by an eviction policy, which may be empty."""
    strides = (stride_n, stride_o, stride_i)
    at = pointers(ptr, tile, c, S, *strides, VEC, CHANNELS_LAST, BLOCK_N, BLOCK_S)
    return tl.load(at, exists, other=0.0, eviction_policy=EVICTION)


@triton.jit
def fold(x, VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Sums of elements of a tile that one thread holds: sums over tiles take fewer registers."""
    C: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    if CHANNELS_LAST:
        ROWS: tl.constexpr = min(2, K)
        return tl.sum(tl.reshape(x, [C, ROWS, K // ROWS]), 1)
    else:
        RUN: tl.constexpr = min(VEC, K)
        return tl.sum(tl.reshape(x, [C, K // RUN, RUN]), 2)


@triton.jit
def positions(tile, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """Outer and inner reduced positions of a tile, int64 [BLOCK_N * BLOCK_S], and which exist."""
    n_block, s_block = origin(tile, S, BLOCK_N, BLOCK_S)
    lane = tl.arange(0, BLOCK_N * BLOCK_S).to(tl.int64)
    n, s = n_block * BLOCK_N + lane // BLOCK_S, s_block * BLOCK_S + lane % BLOCK_S
    return n, s, (n < N) & (s < S)


@triton.jit
def unmasked(
    exists, mask_ptr, tile, S, stride_n, stride_s, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Which of the positions that exist the mask counts in; all of them without a mask."""
    if mask_ptr is None:
        return exists
    else:
        n, s, _ = positions(tile, 0, S, BLOCK_N, BLOCK_S)
        return exists & (tl.load(mask_ptr + n * stride_n + s * stride_s, exists, other=0) != 0)


# One bit for every element of a tensor: a row of bytes for every run of neighbouring elements,
# [N, C, ceil(S / 8)] or, if the channels are neighbours, [N * S, ceil(C / 8)].


@triton.jit
def bit_offsets(
    tile,
    c,
    N,
    C,
    S,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SLAB: tl.constexpr,
):
    """Offsets of the bytes of a tile, a eighth of it along the neighbours, and which exist."""
    if CHANNELS_LAST:
        n, s, exists = positions(tile, N, S, BLOCK_N, BLOCK_S)
        bytes_c = tl.cdiv(C, 8)
        lane = tl.arange(0, BLOCK_C // 8)
        byte = tl.min(c, 0) // 8 + lane
        at = (n * S + s)[None, :] * bytes_c + byte[:, None]
        within = byte < bytes_c
        if SLAB < BLOCK_C:
            within = within & (lane < SLAB // 8)
        return at, within[:, None] & exists[None, :]
    else:
        bytes_s = tl.cdiv(S, 8)
        n, byte, exists = positions(tile, N, bytes_s, BLOCK_N, BLOCK_S // 8)
        at = (n[None, :] * C + c[:, None]) * bytes_s + byte[None, :]
        return at, (c < C)[:, None] & exists[None, :]


@triton.jit
def pack(on, CHANNELS_LAST: tl.constexpr):
    """A tile of truth values as one of bytes."""
    C: tl.constexpr = on.shape[0]
    K: tl.constexpr = on.shape[1]
    bit = tl.arange(0, 8)
    if CHANNELS_LAST:
        word = tl.sum(tl.reshape(on.to(tl.int32), [C // 8, 8, K]) << bit[None, :, None], 1)
    else:
        word = tl.sum(tl.reshape(on.to(tl.int32), [C, K // 8, 8]) << bit[None, None, :], 2)
    return word.to(tl.uint8)


@triton.jit
def unpack(word, CHANNELS_LAST: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of bytes as one of numbers: 1 for every bit that is set and else -1."""
    C: tl.constexpr = word.shape[0]
    K: tl.constexpr = word.shape[1]
    bit = tl.arange(0, 8)
    if CHANNELS_LAST:
        on = tl.reshape(word.to(tl.int32)[:, None, :] >> bit[None, :, None], [C * 8, K])
    else:
        on = tl.reshape(word.to(tl.int32)[:, :, None] >> bit[None, None, :], [C, K * 8])
    return (2 * (on & 1) - 1).to(DTYPE)


@triton.jit
def affine(x, mean, scale, bias):
    """(x - mean) * scale + bias: one rounding for the last two, so that backward repeats it."""
    return tl.fma(x - mean[:, None], scale[:, None], bias[:, None])


@triton.jit
def reciprocal(count):
    """1 / count in float64, for whole numbers, 0 counting as 1: float32 and two Newton steps.

    A division in float64 is a call, and costs registers and time that this does not.
    """
    count = tl.maximum(count.to(tl.float64), 1.0)
    r = (1.0 / count.to(tl.float32)).to(tl.float64)
    r = r * (2.0 - count * r)
    return r * (2.0 - count * r)


@triton.jit
def merge_stats(
    partials_ptr,  # [3, G, C] float64: means, sums of squared deviations, counts
    G,
    C,
    c,
    c_mask,
    BLOCK_G: tl.constexpr,
):
    """Count, mean and sum of squared deviations of the union of G parts, float64, of channels."""
    at = (c, G * C + c, 2 * G * C + c)
    return merge_rows(partials_ptr, G, C, *at, c_mask, BLOCK_G)


@triton.jit
def merge_rows(
    rows_ptr,  # G rows of float64
    G,
    stride,
    mean_at,
    m2_at,
    count_at,
    c_mask,
    BLOCK_G: tl.constexpr,
):
    """`merge_stats` of rows that are `stride` apart and hold a channel's numbers at these places.

    Chan's formula for all parts at once, in a fixed order, about the mean of the first of them:
    mean = sum(n_g * mean_g) / n, and with d_g = mean_g - shift
    m2 = sum(m2_g + n_g * d_g^2) - sum(n_g * d_g)^2 / n.
    """
    zeros = tl.zeros(c_mask.shape, tl.float64)
    count, total, shift, offset, m2 = zeros, zeros, zeros, zeros, zeros
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        row = g[:, None] * stride
        mask = (g < G)[:, None] & c_mask[None, :]
        mean_g = tl.load(rows_ptr + row + mean_at[None, :], mask, other=0.0, cache_modifier=".cg")
        m2_g = tl.load(rows_ptr + row + m2_at[None, :], mask, other=0.0, cache_modifier=".cg")
        count_g = tl.load(rows_ptr + row + count_at[None, :], mask, other=0.0, cache_modifier=".cg")
        count_of, total_of = tl.sum(count_g, 0), tl.sum(count_g * mean_g, 0)
        shift = tl.where(count == 0, total_of * reciprocal(count_of), shift)
        deviation = mean_g - shift[None, :]
        offset += tl.sum(count_g * deviation, 0)
        m2 += tl.sum(m2_g + count_g * deviation * deviation, 0)
        count += count_of
        total += total_of
    mean = total * reciprocal(count)
    m2 -= offset * (offset * reciprocal(count))
    return count, mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def merge_sums(
    partials_ptr,  # [2, G, C] float64
    G,
    C,
    c,
    c_mask,
    BLOCK_G: tl.constexpr,
):
    """Both sums over G parts, in a fixed order, float64, of channels."""
    first = tl.zeros(c_mask.shape, tl.float64)
    second = tl.zeros(c_mask.shape, tl.float64)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        at = g[:, None] * C + c[None, :]
        mask = (g < G)[:, None] & c_mask[None, :]
        first_g = tl.load(partials_ptr + at, mask, other=0.0, cache_modifier=".cg")
        second_g = tl.load(partials_ptr + G * C + at, mask, other=0.0, cache_modifier=".cg")
        first += tl.sum(first_g, 0)
        second += tl.sum(second_g, 0)
    return first, second


@triton.jit
def reciprocal_std(var, eps, DTYPE: tl.constexpr):
    """1 / sqrt(var + eps) of the variance as it is stored, so that backward repeats forward."""
    shifted = var.to(DTYPE).to(tl.float64) + eps
    if DTYPE == tl.float64:
        # The instruction promises no more than float32's accuracy: two steps of Newton's method.
        rough = tl.rsqrt(shifted)
        r = rough
        for _ in tl.static_range(2):
            r += r * (0.5 - 0.5 * shifted * r * r)
        return tl.where((rough > 0) & (rough < float("inf")), r, rough)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(shifted.to(tl.float32)))


@triton.jit
def load_or(ptr, c, c_mask, default, DTYPE: tl.constexpr):
    """A number of each channel, or the default where there is no tensor."""
    if ptr is None:
        return tl.full(c.shape, default, DTYPE)
    elif ptr.dtype.element_ty == tl.float64:
        return tl.load(ptr + c, c_mask, other=0.0).to(DTYPE)
    else:  # half precision converts to float64 only by way of float32
        return tl.load(ptr + c, c_mask, other=0.0).to(tl.float32).to(DTYPE)


@triton.jit
def store(at, value, mask, EVICTION: tl.constexpr):
    """Stores numbers that may be float64 and become half precision only by way of float32."""
    if at.dtype.element_ty == tl.float64:
        tl.store(at, value, mask, eviction_policy=EVICTION)
    else:
        tl.store(at, value.to(tl.float32), mask, eviction_policy=EVICTION)


# The G > 1 programs of a group meet in a counter. One of them adds 2^31 - (G - 1) and the others 1,
# which flips the top bit and leaves the rest as it was: no one has to set it back.


@triton.jit
def step(G, member):
    return tl.where(member == 0, 2147483647 - (G - 2), 1)


@triton.jit
def group_barrier(counter_ptr, G, member):
    """Waits until all programs of a group are here; what they stored before is seen after.

    They must all run at the same time.
    """
    tl.debug_barrier()  # all threads have stored
    before = tl.atomic_add(counter_ptr, step(G, member), sem="release", scope="gpu")
    now = before
    while (now ^ before) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()  # no thread loads before one has seen the others arrive


@triton.jit
def is_last(counter_ptr, G, member):
    """Whether a program is the last of its group to be here; it sees what all stored before.

    None waits, so they need not run at the same time.
    """
    tl.debug_barrier()  # all threads have stored
    mine = step(G, member)
    before = tl.atomic_add(counter_ptr, mine, sem="acq_rel", scope="gpu")
    tl.debug_barrier()  # no thread loads before one has seen the others arrive
    return (before ^ (before + mine)) < 0
