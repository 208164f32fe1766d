"""Launch plans as data: every element once, the device filled, nothing larger than it may be."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.cases import NETS, SETS, layers
from tribn.launch import (
    FEWEST_GROUPS,
    HELD_PER_THREAD,
    WARPS,
    Device,
    Layout,
    bits_shape,
    collapse,
    make_plan,
    single_read_plan,
)

H100 = Device(sms=132, l2=50 * 2**20, registers=4 * 65536, shared=228 * 1024, threads=2048)
SMALL = replace(H100, sms=2, l2=2**20)


def contiguous(shape, order=None):
    """Dense strides, the axes in `order` of memory, outermost first."""
    strides, step = [0] * len(shape), 1
    for d in reversed(order or range(len(shape))):
        strides[d] = step
        step *= shape[d]
    return strides


def channels_last(shape):
    return contiguous(shape, [0, *range(2, len(shape)), 1])


def layout_of(shape, strides=contiguous, tensors=2):
    return collapse(shape, [strides(shape)] * tensors, 1)


def dot(indices, strides):
    return sum(i * s for i, s in zip(indices, strides, strict=True))


def offsets(shape, strides, axis):
    """The channel and the offsets in all tensors of every element."""
    for index in itertools.product(*map(range, shape)):
        yield (index[axis], *(dot(index, s) for s in strides))


def layout_offsets(layout):
    for n, c, s in itertools.product(range(layout.N), range(layout.C), range(layout.S)):
        channel = c // layout.plane % layout.channels
        yield (channel, *(dot((n, c, s), strides) for strides in layout.strides))


@st.composite
def strided(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        strides = contiguous(shape, draw(st.permutations(range(len(shape)))))
        scale = draw(st.sampled_from([1, 1, 2]))
        zero = draw(st.sampled_from([None, None, *range(len(shape))]))
        tensors.append([0 if d == zero else s * scale for d, s in enumerate(strides)])
    return shape, tensors, draw(st.integers(0, len(shape) - 1))


@given(strided(), st.booleans())
def test_collapse_keeps_every_element_in_its_channel(case, sums):
    shape, strides, axis = case
    layout = collapse(shape, strides, axis, sums=sums)
    if layout is None:
        assert len(shape) > 3
    else:
        assert Counter(layout_offsets(layout)) == Counter(offsets(shape, strides, axis))


@given(strided(), st.data())
def test_collapse_takes_a_mask_along(case, data):
    """Every element meets its own place in the mask, whatever that says of the channel's axis."""
    shape, strides, axis = case
    mask = contiguous(shape, data.draw(st.permutations(range(len(shape)))))
    layout = collapse(shape, strides, axis, mask)
    if layout is None:
        assert len(shape) > 3
        return
    mask[axis] = 0
    expected = Counter(
        (c, at[0], dot(index, mask))
        for index, (c, *at) in zip(
            itertools.product(*map(range, shape)), offsets(shape, strides, axis), strict=True
        )
    )
    stride_n, stride_s = layout.mask
    found = Counter(
        (c, dot((n, c, s), layout.strides[0]), n * stride_n + s * stride_s)
        for n, c, s in itertools.product(range(layout.N), range(layout.C), range(layout.S))
    )
    assert found == expected


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5).flatmap(
        lambda shape: st.tuples(st.just(shape), st.permutations(range(len(shape))))
    ),
    st.integers(0, 4),
)
def test_dense_tensors_collapse_in_any_order_of_axes(case, axis):
    shape, order = case
    assert collapse(shape, [contiguous(shape, order)] * 2, axis % len(shape)) is not None


@pytest.mark.parametrize(
    ("shape", "strides", "axis", "expected"),
    [
        ((4, 3, 5, 6), (90, 30, 6, 1), 1, (4, 3, 30, (90, 30, 1))),
        ((3, 3, 5, 7), (105, 1, 21, 3), 1, (1, 3, 105, (0, 1, 3))),
        ((4, 5, 3), (15, 3, 1), 2, (1, 3, 20, (0, 1, 3))),
        ((9, 3), (3, 1), 1, (1, 3, 9, (0, 1, 3))),
        ((2, 2048, 1, 1), (2048, 1, 1, 1), 1, (1, 2048, 2, (0, 1, 2048))),
        ((3000, 1, 9), (9, 9, 1), 1, (1, 1, 27000, (0, 0, 1))),
        ((4, 3, 5, 6), (0, 0, 0, 0), 1, (1, 3, 120, (0, 0, 0))),
        ((1, 7), (7, 1), 1, (1, 7, 1, (0, 1, 0))),
    ],
)
def test_collapse_of_common_layouts(shape, strides, axis, expected):
    N, C, S, triple = expected
    for sums in (True, False):
        assert collapse(shape, [strides], axis, sums=sums) == Layout(N, C, S, (triple,))


SUMMED, COPIED = True, False


@pytest.mark.parametrize(
    ("shape", "gap", "side_by_side"),
    [
        ((33, 8, 7, 7), 0, {SUMMED, COPIED}),
        ((65, 4, 6, 3), 0, {SUMMED, COPIED}),
        ((1, 16, 3, 1), 0, {SUMMED, COPIED}),
        ((32, 2048, 7, 7), 0, {SUMMED, COPIED}),
        # for sums not where 8-byte accesses fit, or a program has a channel by itself
        ((33, 8, 14, 14), 0, {COPIED}),
        ((65, 2, 6, 6), 0, {COPIED}),
        ((32, 512, 7, 7), 0, {COPIED}),
        # never where they are aligned, or remain unaligned, or are long
        ((129, 8, 4, 4), 0, set()),
        ((33, 9, 7, 7), 0, set()),
        ((33, 8, 7, 7), 4, set()),
        ((33, 8, 15, 15), 0, set()),
    ],
)
def test_short_planes_side_by_side(shape, gap, side_by_side):
    N, C, *plane = shape
    S = math.prod(plane)
    step = C * S + gap
    outer = step if N > 1 else 0
    for sums in (SUMMED, COPIED):
        layout = collapse(shape, [(step, S, plane[1], 1)], 1, sums=sums)
        if sums in side_by_side:
            assert layout == Layout(N, C * S, 1, ((outer, 1, 0),), plane=S)
        else:
            assert layout == Layout(N, C, S, ((outer, S, 1),))


@pytest.mark.parametrize("shape", [(32, 512, 7, 7), (8, 512, 7, 7), (16, 40, 11, 11), (1, 9, 2047)])
def test_a_program_takes_odd_planes_of_few_elements_by_itself(shape):
    for itemsize, inputs in itertools.product((2, 4, 8), (1, 2)):
        plan = single_read_plan(layout_of(shape, tensors=inputs + 1), itemsize, H100, inputs)
        assert (plan.tier, plan.columns, plan.splits) == ("registers", 1, 1)
        assert plan.block_c * plan.block_s * itemsize >= 32 or plan.block_c >= shape[1]
        none_held = single_read_plan(layout_of(shape), itemsize, H100, inputs, held_per_thread=0)
        assert none_held.tier == "l2"


@pytest.mark.parametrize(("itemsize", "inputs"), [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)])
def test_a_program_takes_few_rows_of_neighbouring_channels_by_itself(itemsize, inputs):
    """In runs of at least a sector, so many rows as a program holds of these."""
    held = 64 // inputs // (4 if itemsize == 8 else 1)
    rows = 256 * held // (32 // itemsize)
    for N, C, alone in ((rows, 256, True), (rows - 1, 40, True), (rows + 1, 256, False)):
        layout = layout_of((N, C), tensors=inputs + 1)
        plan = single_read_plan(layout, itemsize, H100, inputs)
        assert plan.tier == "registers"
        assert (plan.splits == 1) == alone
        assert plan.block_c * itemsize >= 32
    many = layout_of((rows, 2**20 // rows + 32), tensors=inputs + 1)
    plan = single_read_plan(many, itemsize, H100, inputs)
    assert (plan.tier, plan.splits) != ("registers", 1)


@pytest.mark.parametrize(
    ("shape", "run"),
    [
        *[((64, C), run) for C, run in ((256, 16), (2048, 16), (2144, 32), (4096, 32))],
        *[((2, C, 7, 7), run) for C, run in ((8, 1), (66, 1), (256, 2), (512, 4))],
    ],
)
def test_few_programs_take_narrower_runs(shape, run):
    """As long as there is a multiprocessor for each of twice as many."""
    plan = single_read_plan(layout_of(shape), 2, H100)
    assert (plan.tier, plan.splits, plan.block_c) == ("registers", 1, run)


@pytest.mark.parametrize(
    ("shape", "gap", "pixels"),
    [
        ((130, 3, 24, 28), 0, {SUMMED: 8, COPIED: 8}),
        ((64, 65, 100, 100), 0, {SUMMED: 8, COPIED: 8}),
        ((1024, 6, 1, 1), 0, {SUMMED: 4, COPIED: 4}),
        ((65, 250, 2, 2), 0, {SUMMED: 4, COPIED: 4}),
        # for sums not where 8-byte accesses fit, or a program has some channels by itself
        ((130, 12, 8, 8), 0, {COPIED: 2}),
        ((128, 65, 1, 1), 0, {COPIED: 8}),
        ((136, 65, 1, 1), 0, {SUMMED: 8, COPIED: 8}),
        ((1, 3, 8, 1), 0, {COPIED: 8}),
        # never where they are aligned, or do not fill rows, or these are long, or lie apart
        ((130, 24, 8, 8), 0, {}),
        ((65, 65, 5, 5), 0, {}),
        ((130, 129, 8, 8), 0, {}),
        ((130, 3, 8, 8), 4, {}),
    ],
)
def test_pixels_of_few_channels_side_by_side(shape, gap, pixels):
    N, C, *axes = shape
    S = math.prod(axes)
    step = C * S + gap
    for sums in (SUMMED, COPIED):
        layout = collapse(shape, [(step, 1, axes[1] * C, C)] * 2, 1, sums=sums)
        assert layout.pixels == pixels.get(sums, 1)
        if layout.pixels > 1:
            rows = N * S // layout.pixels
            stride = C * layout.pixels if rows > 1 else 0
            columns = (1, C * layout.pixels, rows)
            assert layout == Layout(*columns, ((0, 1, stride),) * 2, pixels=layout.pixels)


def test_rows_of_pixels_may_lie_apart():
    layout = collapse((33, 3, 8, 8), [(200, 1, 24, 3)], 1)
    assert layout == Layout(33, 24, 8, ((200, 1, 24),), pixels=8)
    assert collapse((33, 3, 8, 8), [(196, 1, 24, 3)], 1).pixels == 1
    assert collapse((33, 3, 8, 8), [(192, 1, 24, 3), (200, 1, 24, 3)], 1).pixels == 8
    assert collapse((33, 3, 8, 8), [(192, 1, 24, 3), (256, 1, 32, 4)], 1).pixels == 1


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("C", [*range(1, 20), 65, 125, 250, 441])
@pytest.mark.parametrize("device", [H100, Device(1, 2**20, 2**18, 2**16, 2048)])
def test_blocks_have_whole_channels(C, itemsize, device):
    """However few elements there are, and however narrow that makes a tile."""
    for shape, strides in (((1, C, 24, 10), channels_last), ((1, 64, C, 1), contiguous)):
        for sums, bits in ((True, False), (True, True), (False, False)):
            layout = collapse(shape, [strides(shape)] * 3, 1, sums=sums)
            plans = [make_plan(layout, itemsize, device, bits, sums)]
            if sums:
                plans += [single_read_plan(layout, itemsize, device, 2, bits, n) for n in (1, 2)]
            for plan in plans:
                assert plan.channels * layout.columns == plan.slab > 0
                assert plan.channel_blocks * plan.channels >= layout.channels
                assert plan.vec * itemsize == 16 or layout.columns == 1


def test_planes_apart_or_under_a_mask_are_not_side_by_side():
    strides = (392, 49, 7, 1)
    masked = collapse((33, 8, 7, 7), [strides], 1, (49, 0, 7, 1))
    assert masked == Layout(33, 8, 49, ((392, 49, 1),), (49, 1))
    apart = collapse((33, 8, 7, 7), [(400, 50, 7, 1)], 1)
    assert apart == Layout(33, 8, 49, ((400, 50, 1),))


def test_what_no_strides_can_express():
    assert collapse((4, 3, 5, 6), [(180, 60, 12, 1)], 1) is None  # every second row
    both = [contiguous((4, 3, 5, 6)), contiguous((4, 3, 5, 6), [0, 1, 3, 2])]
    assert collapse((4, 3, 5, 6), both, 1) is None  # each by itself could


NETWORKS = [
    *[
        (128, c, s, s)
        for c, s in ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
    ],
    *[(64, c, s, s) for c, s in ((24, 56), (144, 28), (40, 28), (65, 100), (960, 7), (112, 14))],
    *[(2, 32, 128, 128, 128), (2, 320, 8, 8, 8), (16, 64, 256, 256), (32, 1024, 1024)],
    *[(1024, 256), (65536, 512), (262144, 128), (2_000_000, 64), (2**21, 24)],
    *[(20, 6, 65536), (8, 3, 1024, 1024), (3000, 1, 9), (2, 2048, 1, 1), (2**21, 1), (1, 5, 2**22)],
    *[(2**16, 64, 40, 40), (2**33, 2), (2, 2**22, 300)],  # more than 2^31 elements
]
LAYOUTS = [contiguous, channels_last]


@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("shape", NETWORKS, ids=str)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_plan_fits_the_device(shape, strides, itemsize):
    layout = layout_of(shape, strides)
    plan = make_plan(layout, itemsize, H100)
    for block in (plan.block_n, plan.block_c, plan.block_s, plan.num_warps, plan.vec):
        assert block.bit_count() == 1, plan
    tile = plan.block_n * plan.block_c * plan.block_s
    assert tile * itemsize <= 32 * plan.num_warps * 32, "more than two accesses of a thread"
    assert plan.num_warps <= 8
    tiles = tiles_of(plan, layout)
    assert (plan.splits - 1) * plan.tiles_per_split < tiles <= plan.splits * plan.tiles_per_split
    assert plan.channel_blocks == -(-layout.C // plan.slab)
    assert plan.grid[0] < 2**31
    assert tiles < 2**31


@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("shape", NETWORKS, ids=str)
def test_plan_fills_the_device_however_few_the_channels(shape, strides):
    """A large tensor gives every multiprocessor a program and is not mostly padding."""
    layout = layout_of(shape, strides)
    elements = layout.N * layout.C * layout.S
    plan = make_plan(layout, 2, H100)
    if elements * 2 > 16 * 2**20:
        assert plan.grid[0] >= H100.sms
        covered = plan.channel_blocks * plan.block_c
        covered *= -(-layout.N // plan.block_n) * plan.block_n
        covered *= -(-layout.S // plan.block_s) * plan.block_s
        assert covered <= 2 * elements


def tiles_of(plan, layout):
    return -(-layout.N // plan.block_n) * -(-layout.S // plan.block_s)


def splits_of(plan):
    """(block of channels, split) of every program, as the kernels number them."""
    for pid in range(plan.grid[0]):
        if plan.tier is None:
            yield pid % plan.channel_blocks, pid // plan.channel_blocks
        else:
            group, member = divmod(pid, plan.splits)
            for slab in range(group, plan.channel_blocks, plan.groups):
                yield slab, member


def visited(plan, layout):
    """(n, c, s) of every lane of every program, as `tribn.kernels.tile` numbers them."""
    s_blocks = -(-layout.S // plan.block_s)
    for c_block, split in splits_of(plan):
        first = split * plan.tiles_per_split
        for tile in range(first, min(first + plan.tiles_per_split, tiles_of(plan, layout))):
            for lane_c, lane_n, lane_s in itertools.product(
                range(plan.block_c), range(plan.block_n), range(plan.block_s)
            ):
                n = tile // s_blocks * plan.block_n + lane_n
                s = tile % s_blocks * plan.block_s + lane_s
                c = c_block * plan.slab + lane_c
                if n < layout.N and c < layout.C and s < layout.S and lane_c < plan.slab:
                    yield n, c, s


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 80)),
    st.sampled_from(LAYOUTS),
    st.sampled_from([2, 4, 8]),
)
def test_plan_visits_every_element_once(shape, strides, itemsize):
    layout = layout_of(shape, strides)
    counts = Counter(visited(make_plan(layout, itemsize, SMALL), layout))
    assert len(counts) == layout.N * layout.C * layout.S
    assert set(counts.values()) == {1}


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 80)),
    st.sampled_from(LAYOUTS),
    st.sampled_from([2, 4, 8]),
)
def test_plan_for_bits_holds_whole_bytes_and_visits_each_once(shape, strides, itemsize):
    layout = layout_of(shape, strides)
    plan = make_plan(layout, itemsize, SMALL, bits=True)
    block = plan.block_c if plan.channels_last else plan.block_s
    assert block % 8 == 0
    assert plan.channels_last == layout.channels_last
    counts = Counter(visited(plan, layout))
    assert len(counts) == layout.N * layout.C * layout.S
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(
    ("shape", "strides", "axis", "expected"),
    [
        ((4, 3, 5, 6), (90, 30, 6, 1), 1, (4, 3, 4)),
        ((4, 3, 5, 6), (90, 1, 18, 3), 1, (120, 1)),
        ((4, 5, 17), (85, 17, 1), 2, (20, 3)),
        ((8, 3), (3, 1), 1, (8, 1)),
        ((2, 16, 8), (128, 8, 1), 1, (2, 16, 1)),
        ((2, 0, 8), (8, 8, 1), 1, (1, 0, 2)),
    ],
)
def test_bits_of_common_layouts(shape, strides, axis, expected):
    assert bits_shape(shape, strides, axis) == expected


@pytest.mark.parametrize(
    ("shape", "strides", "itemsize", "vec"),
    [
        ((128, 256, 56, 56), contiguous, 2, 8),
        ((128, 256, 56, 56), channels_last, 4, 4),
        ((128, 512, 14, 14), contiguous, 2, 4),
        ((128, 512, 7, 7), contiguous, 2, 8),
        ((128, 9, 7, 7), contiguous, 2, 1),
        ((128, 9, 14, 14), contiguous, 2, 4),
        ((128, 512, 7, 7), channels_last, 2, 8),
        ((64, 24, 5, 5), channels_last, 2, 8),
        ((64, 65, 100, 100), channels_last, 2, 8),
        ((64, 65, 100, 100), channels_last, 4, 4),
        ((64, 129, 100, 100), channels_last, 2, 1),
        ((64, 65, 100, 100), contiguous, 8, 2),
        ((2**21, 1), contiguous, 2, 8),
    ],
)
def test_access_width(shape, strides, itemsize, vec):
    assert make_plan(layout_of(shape, strides), itemsize, H100).vec == vec


def test_access_width_is_that_of_the_worst_tensor():
    shape = (8, 4, 16)
    odd = (64 * 2 + 2, 32, 1)
    layout = collapse(shape, [contiguous(shape), odd], 1)
    assert make_plan(layout, 2, H100).vec == 2


# Plans to read once

SLICES = [replace(H100, sms=sms, l2=H100.l2 // 7) for sms in (14, 16)]  # of an H100
DEVICES = [H100, *SLICES, SMALL, replace(SMALL, sms=1), replace(SMALL, sms=3, l2=2**12)]


def single_read_plans(layout, itemsize, device, inputs=1, bits=False):
    """By how many programs a multiprocessor holds."""
    return {
        programs: single_read_plan(layout, itemsize, device, inputs, bits, programs)
        for programs in (1, 2, 3, 4)
    }


def assert_fits(layout, itemsize, device, inputs, bits):
    """What holds of every plan to read once, whatever the device."""
    plans = single_read_plans(layout, itemsize, device, inputs, bits)
    for programs, plan in plans.items():
        # the tile
        block = (plan.block_n, plan.block_c, plan.block_s)
        assert all(size.bit_count() == 1 for size in (*block, plan.num_warps))
        assert plan.num_warps <= 8
        per_thread = block[0] * block[1] * block[2] / (32 * plan.num_warps)
        assert plan.num_warps == 1 or inputs * per_thread * max(itemsize, 4) // 4 <= HELD_PER_THREAD
        assert not bits or (plan.block_c if layout.channels_last else plan.block_s) % 8 == 0
        # every tile of every slab once
        tiles, most = tiles_of(plan, layout), plan.splits * plan.tiles_per_split
        assert most - plan.tiles_per_split < tiles <= most
        assert tiles < 2**31
        assert plan.channel_blocks == -(-layout.C // plan.slab)
        assert 1 <= plan.groups <= plan.channel_blocks
        assert plan.grid == (plan.groups * plan.splits, 1, 1)
        # all at the same time
        assert plan.grid[0] <= programs * device.sms
        assert plan.waits == (plan.splits > 1)
        # where a slab stays
        held = inputs * min(plan.slab, layout.C) * layout.N * layout.S * itemsize
        if plan.tier == "registers":
            assert plan.tiles_per_split == 1
            assert not plan.waits or plan.groups == plan.channel_blocks  # one round
        elif plan.tier == "l2":
            assert plan.groups * held <= device.l2 // 2
        else:
            assert plan.tier == "memory"
            # not even in narrower slabs
            last = layout.channels_last
            narrow, fewest = (128 // itemsize, FEWEST_GROUPS) if last else (plan.block_c, 1)
            narrow = plan.slab if layout.columns > 1 else min(plan.block_c, narrow)
            held = inputs * min(narrow, layout.C) * layout.N * layout.S * itemsize
            assert device.l2 // 2 // held < min(fewest, -(-layout.C // narrow))
        large = 2 * layout.N * layout.C * layout.S * itemsize > device.l2
        assert plan.streams == (large and plan.tier != "registers")
        # who merges what
        channels = 1 << (plan.channels - 1).bit_length()
        assert plan.mergers in ((1, channels) if plan.waits else (0,))
        if plan.mergers > 1:
            assert plan.block_g(1) < plan.splits > plan.mergers
            assert plan.block_g(plan.mergers) == 32 * WARPS
        elif plan.waits:
            assert channels == 1 or plan.splits <= max(plan.block_g(1), channels)
        assert plan.block_g(plan.mergers).bit_count() == 1
    first = plans.pop(2)
    if first.tier == "registers":  # one program may have no room for all
        plans.pop(1)
    for plan in plans.values():
        assert replace(first, **{name: getattr(plan, name) for name in CUT}) == plan


CUT = ("tiles_per_split", "splits", "groups")  # what depends on how many programs there are
SHAPES = {layer.shape for name in (*NETS, *SETS) for layer in layers(name)} | set(NETWORKS)


@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_single_read_plans_of_networks(itemsize, inputs, strides):
    for shape in SHAPES:
        layout = layout_of(shape, strides, 2 + inputs)
        assert_fits(layout, itemsize, H100, inputs, bits=False)
        assert_fits(layout, itemsize, H100, inputs, bits=True)


HARD = [
    *[(20, 6, 65536), (3000, 1, 9), (2_000_000, 64), (1, 32, 128, 128, 128), (1, 1, 2**22)],
    *[(128, 64, 112, 112), (128, 2048, 7, 7), (2, 2048, 1, 1), (8, 512, 7, 7), (1, 1)],
    *[(2**10, 64, 2), (2**16, 64, 2)],  # as many channels of a slab as programs of a group
    *[(2**16, 64, 40, 40), (2**33, 2), (2, 2**22, 300)],  # more than 2^31 elements
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: f"{device.sms}-{device.l2}")
@pytest.mark.parametrize("shape", HARD, ids=str)
def test_single_read_plans_of_any_device(shape, device):
    for strides, inputs, itemsize in itertools.product(LAYOUTS, (1, 2), (2, 4, 8)):
        assert_fits(layout_of(shape, strides), itemsize, device, inputs, bits=False)


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 80)),
    st.sampled_from(LAYOUTS),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from(DEVICES[-3:]),
)
def test_single_read_plan_visits_every_element_once(shape, strides, itemsize, inputs, bits, device):
    layout = layout_of(shape, strides, 2 + inputs)
    assert_fits(layout, itemsize, device, inputs, bits)
    counts = Counter(visited(single_read_plan(layout, itemsize, device, inputs, bits), layout))
    assert len(counts) == layout.N * layout.C * layout.S
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(
    ("shape", "strides", "inputs", "device", "tier"),
    [
        ((8, 512, 7, 7), contiguous, 2, H100, "registers"),
        ((128, 64, 56, 56), contiguous, 1, H100, "l2"),
        ((128, 64, 56, 56), contiguous, 1, SLICES[0], "l2"),  # 0.8 of 3.6 MB
        ((128, 256, 14, 14), channels_last, 1, H100, "l2"),  # all slabs of 64 channels
        ((128, 256, 28, 28), channels_last, 1, H100, "memory"),  # two of four
        ((128, 64, 56, 56), channels_last, 1, H100, "memory"),
        ((2_000_000, 64), contiguous, 1, H100, "memory"),
    ],
)
def test_tiers(shape, strides, inputs, device, tier):
    assert single_read_plan(layout_of(shape, strides), 2, device, inputs).tier == tier


def test_slabs_in_registers_take_one_round():
    """Of 150 programs, one to a multiprocessor, 18 would have to wait for the others."""
    layout = layout_of((128, 192, 7, 7), channels_last, 3)
    by_programs = single_read_plans(layout, 2, H100, 2)
    assert by_programs[2].tier == "registers"
    assert by_programs[2].grid == (150, 1, 1)
    assert by_programs[1].tier == "l2"


@pytest.mark.parametrize(
    ("shape", "strides", "most"),
    [
        ((32, 64, 56, 56), channels_last, 1),
        ((128, 128, 28, 28), channels_last, 1),
        ((128, 64, 56, 56), channels_last, 2),
        ((128, 512, 7, 7), contiguous, 1),  # side by side
        ((128, 2048, 7, 7), contiguous, 2),
    ],
)
def test_few_tiles_of_neighbouring_channels_have_few_programs(shape, strides, most):
    plan = single_read_plan(layout_of(shape, strides), 2, H100)
    assert plan.tier != "registers"
    assert (most - 1) * H100.sms < plan.grid[0] <= most * H100.sms


@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("shape", [(128, 256, 56, 56), (128, 2048, 7, 7), (8192, 1024)], ids=str)
def test_evaluation_has_a_program_for_each_tile(shape, strides):
    layout = layout_of(shape, strides)
    plan = make_plan(layout, 2, H100, reduces=False)
    assert plan.tiles_per_split == plan.stages == 1
    tile = plan.block_n * plan.block_c * plan.block_s * 2
    assert tile == 32 * plan.num_warps * (64 if layout.channels_last else 32)
    if layout.channels_last and layout.columns == 1:
        assert plan.block_c == 256  # 512 bytes side by side
        with_bits = make_plan(layout, 2, H100, bits=True, reduces=False)
        assert (with_bits.block_c, with_bits.block_s) == (64, 64)


@pytest.mark.parametrize("strides", LAYOUTS)
def test_evaluation_of_few_elements_has_small_tiles(strides):
    """Of one access for each thread at least, and otherwise as many as multiprocessors."""
    tiles = {}
    for batch in (1, 4, 16, 64):
        plan = make_plan(layout_of((batch, 256, 16, 16), strides), 2, H100, reduces=False)
        tiles[plan.block_n * plan.block_c * plan.block_s // (32 * plan.num_warps)] = plan.grid[0]
    assert min(tiles) == 8
    assert all(programs >= H100.sms for size, programs in tiles.items() if size > 8)
    assert len(tiles) > 1


def test_evaluation_with_narrow_accesses_takes_what_programs_there_may_be():
    layout = layout_of((128, 9, 7, 7))
    assert make_plan(layout, 2, H100, reduces=False).tiles_per_split == 1
    assert make_plan(layout, 2, H100).tiles_per_split > 1


@pytest.mark.parametrize(("splits", "at_once"), [(2, 32), (32, 32), (33, 256), (300, 256)])
def test_partial_results_of_few_programs_fit_a_warp(splits, at_once):
    plan = single_read_plan(layout_of((128, 64, 56, 56)), 2, H100)
    assert plan.channels == 1
    assert replace(plan, splits=splits).block_g(1) == at_once


def test_a_group_is_as_large_as_the_device():
    """Few channels: all programs share what slabs there are."""
    layout = layout_of((20, 6, 65536))
    for programs, plan in single_read_plans(layout, 2, H100).items():
        assert plan.groups == 6
        most = programs * H100.sms // 6
        assert plan.tiles_per_split == -(-tiles_of(plan, layout) // most)
