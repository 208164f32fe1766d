"""Launch plans: pure functions from shapes, strides and device facts to launch numbers.

Standard library only, so that every plan can be computed, printed and tested on any machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

# perf/NOTES.md has what was measured of these on an H100.
WARPS = 8  # of a program with a full tile
BYTES_PER_THREAD = 32  # of each tensor's tile: two 16-byte accesses
LARGE_PER_THREAD = 64  # the same of large tiles: visited twice where registers allow, or in eval
HELD_PER_THREAD = 64  # elements in registers, of all tensors, of 4 bytes: two such programs fit
CTAS_PER_SM = 4  # enough loads in flight to cover memory latency with 8-warp programs
UNREDUCED_PER_SM = 8  # of those that sum up nothing, if their accesses are narrow
TILES_PER_SPLIT = 4  # a shorter reduction is not worth a partial of its own
MERGED_AT_ONCE = 1024  # partials and channels in a tile: four for each thread, one of a channel
BARRIER = 1  # what waiting costs, in tiles of a program
FEW_TILES = 12  # for each multiprocessor: one program takes them sooner than several that wait
FEWEST_GROUPS = 6  # of neighbouring channels: with fewer, waiting costs more than reading twice
EVALUATED = 512  # bytes of a row of channels, in a large tile, where nothing is summed up
NARROWEST = 4  # elements of an access, for sums; what has narrower ones is seen side by side
ALONE = 2048  # elements of a tile for one channel that a program takes by itself
FEW = 2**20  # elements of such a tensor; more are a matter of throughput, which is lower then
SECTOR = 32  # bytes that memory moves at least
UNIT = 8  # columns side by side are a multiple of it: 16 bytes of 16-bit types, a byte of bits
WIDEST = 2048  # columns of a tile: of 16 bits each, 16 bytes for each thread
MOST_COLUMNS = WIDEST // 2  # that are not to be parted; tiles of float64 are narrower


sm_margin = 0  # multiprocessors that plans leave alone
launches: list[Any] | None = None  # what is launched is appended to it, for `tribn.explain`


def set_sm_margin(sms: int) -> None:
    """Leaves multiprocessors to others, such as collectives on other streams.

    Kernels whose programs wait for each other then start without waiting for those others to end.
    At least one multiprocessor is used all the same. CUDA graphs keep what they were captured with.

    Args:
        sms: how many of them, 0 by default.

    Raises:
        TypeError: it is no int.
        ValueError: it is negative.
    """
    if not isinstance(sms, int) or isinstance(sms, bool):
        raise TypeError(f"sms is {sms!r}: it must be an int")
    if sms < 0:
        raise ValueError(f"sms is {sms}: it must not be negative")
    global sm_margin
    sm_margin = sms


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device, in bytes, and for each of its multiprocessors."""

    sms: int  # that may be used
    l2: int
    registers: int
    shared: int
    threads: int
    warp: int = 32
    cooperative: bool = True  # programs can be made to run at the same time

    def programs_per_sm(self, warps: int, registers: int, shared: int) -> int:
        """Of so many registers a thread, and bytes of shared memory, at a time."""
        # Each of four schedulers has a quarter of the registers, and gives them out by eights.
        of_scheduler = self.registers // 16 // (self.warp * _up(max(registers, 1), 8))
        held = min(4 * of_scheduler, self.threads // self.warp) // warps
        # Every program takes 1 KB for the system.
        return min(held, self.shared // (_up(shared, 128) + 1024), 32)


@dataclass(frozen=True)
class Layout:
    """Tensors of one shape, seen as (N, C, S): outer reduction axis, channel, inner reduction axis.

    `strides` holds one (stride_n, stride_c, stride_s) in elements for each tensor, and `mask` the
    (stride_n, stride_s) of a mask, or zeros. An axis of size 1 has stride 0. With a `plane` or
    `pixels` the second axis is one of columns: the elements of each channel's plane side by side,
    or so many pixels, each with an element of every channel.
    """

    N: int
    C: int
    S: int
    strides: tuple[tuple[int, int, int], ...]
    mask: tuple[int, int] = (0, 0)
    plane: int = 1
    pixels: int = 1

    @property
    def columns(self) -> int:
        """Of a channel."""
        return self.plane * self.pixels

    @property
    def channels(self) -> int:
        return self.C // self.columns

    @property
    def whole(self) -> int:
        """How many columns are not to be parted: those of whole channels, by eights."""
        if self.columns == 1:
            return 1
        return self.C if self.pixels > 1 else whole_run(self.plane)

    @property
    def channels_last(self) -> bool:
        """Whether neighbouring elements of the first tensor are of neighbouring channels."""
        _, stride_c, stride_s = self.strides[0]
        return self.S == 1 or 0 < stride_c < stride_s


def collapse(
    shape: Sequence[int],
    strides: Sequence[Sequence[int]],
    axis: int,
    mask: Sequence[int] | None = None,
    sums: bool = True,
) -> Layout | None:
    """Sees tensors of one shape, and a mask with any stride along `axis`, as (N, C, S).

    No element moves. Axes other than the channel `axis` may be visited in any order, since they
    are reduced together: they are sorted by the first tensor's strides and neighbours are merged
    where all tensors allow it. Short planes that make narrow accesses are seen side by side, as one
    run of columns, unless there is a mask, and so are pixels of neighbouring channels; where one
    `sums` that costs more than accesses of 4 elements, and than a program that takes channels by
    itself. Returns None where more than two axes remain.
    """
    if mask is not None:
        strides = [*strides, mask]
    order = [d for d in range(len(shape)) if d != axis and shape[d] != 1]
    if any(shape[d] == 0 for d in order):  # strides then mean nothing
        return Layout(0, shape[axis], 1, ((0, 1, 0),) * (len(strides) - (mask is not None)))
    order.sort(key=lambda d: strides[0][d], reverse=True)
    merged: list[tuple[int, list[int]]] = []
    for d in order:
        inner = [s[d] for s in strides]
        if merged and merged[-1][1] == [s * shape[d] for s in inner]:
            merged[-1] = (merged[-1][0] * shape[d], inner)
        else:
            merged.append((shape[d], inner))
    if len(merged) > 2:
        return None
    absent = (1, [0] * len(strides))
    (N, stride_n), (S, stride_s) = [absent] * (2 - len(merged)) + merged
    C = shape[axis]
    stride_c = [s[axis] if C != 1 else 0 for s in strides]
    triples = list(zip(stride_n, stride_c, stride_s, strict=True))
    if mask is not None:
        mask_n, _, mask_s = triples.pop()
        return Layout(N, C, S, tuple(triples), (mask_n, mask_s))
    return _side_by_side(Layout(N, C, S, tuple(triples)), sums)


def _side_by_side(layout: Layout, sums: bool) -> Layout:
    """What makes narrow accesses, as runs of columns: short planes, or pixels of few channels."""
    N, C, S, strides = layout.N, layout.C, layout.S, layout.strides
    least = NARROWEST if sums else UNIT
    aligned = all(n % UNIT == 0 for n, _, _ in strides)
    if aligned and S % least and all(c == S and s == 1 for _, c, s in strides):
        fits = C * S % UNIT == 0 and whole_run(S) <= MOST_COLUMNS
        if fits and not (sums and _alone(N, C, S)):
            return Layout(N, C * S, 1, tuple((n, 1, 0) for n, _, _ in strides), plane=S)
    elif aligned and C % least and all(c == 1 and s == C for _, c, s in strides):
        row = whole_run(C)
        rows, rest = divmod(C * S, row)
        fits = rest == 0 and row <= MOST_COLUMNS
        if fits and not (sums and _few_rows(N, S)):
            strides = tuple((n, 1, row if rows > 1 else 0) for n, _, _ in strides)
            return Layout(N, row, rows, strides, pixels=row // C)
    return layout


def whole_run(columns: int) -> int:
    """The fewest columns, a multiple of so many and of eight."""
    return math.lcm(columns, UNIT)


def runs(shape: Sequence[int], strides: Sequence[int], axis: int, masked: bool) -> Layout:
    """A dense tensor as (N, C, S); its runs of neighbouring elements do not depend on a mask's."""
    layout = collapse(shape, [strides], axis, [0] * len(shape) if masked else None)
    assert layout is not None, "a dense tensor has at most two runs of axes around the channel"
    return layout


def bits_shape(shape: Sequence[int], strides: Sequence[int], axis: int) -> tuple[int, ...]:
    """Bytes that hold a bit for every element of a dense tensor.

    Each run of neighbouring elements starts with a byte: [N, C, ceil(S / 8)], or if the channels
    are neighbours [N * S, ceil(C / 8)]. What lies side by side takes fewer, the first of these: the
    shape is the same whether sizes are multiples of 8, so that they may be symbols.
    """
    layout = runs(shape, strides, axis, masked=True)
    N, C, S = layout.N, layout.C, layout.S
    return (N * S, _cdiv(C, 8)) if layout.channels_last else (N, C, _cdiv(S, 8))


@dataclass(frozen=True)
class Plan:
    """How a reduction over (N, S) and a pass over the same elements are cut into programs.

    A tile is `block_c` channels by `block_n * block_s` reduced elements. The tiles of a block of
    channels are dealt out to `splits` programs in runs of `tiles_per_split`. Plans to read once
    have a `tier`, where the blocks, here slabs, stay meanwhile, and `groups` of programs, each of
    which takes one slab after another; others have as many programs as there are splits.
    """

    block_n: int
    block_c: int
    block_s: int
    tiles_per_split: int
    splits: int
    channel_blocks: int
    channels_last: bool  # the channel is the axis of neighbouring elements
    vec: int  # the other axes' strides, and this axis' size, are multiples of it
    num_warps: int
    tier: str | None = None  # "registers", "l2" or, if it does not fit, "memory"
    groups: int = 0
    streams: bool = False  # the tensors are too large to be found in the L2 cache afterwards
    plane: int = 1  # see `Layout`
    pixels: int = 1
    whole: int = 1

    @property
    def columns(self) -> int:
        """Of a channel."""
        return self.plane * self.pixels

    @property
    def slab(self) -> int:
        """How many of its `block_c` columns a block has."""
        return self.whole if self.pixels > 1 else self.block_c // self.whole * self.whole

    @property
    def channels(self) -> int:
        """Of a block."""
        return self.slab // self.columns

    @property
    def run(self) -> int:
        """How many elements next to each other are of as many channels; 1 where of the same."""
        return max(2, self.vec) if self.channels_last and self.plane == 1 else 1

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        return (self.groups or self.channel_blocks) * self.splits, 1, 1

    @property
    def waits(self) -> bool:
        """Whether the programs of a group wait for each other."""
        return self.groups > 0 and self.splits > 1

    @property
    def mergers(self) -> int:
        """How many programs of a group merge its partial results for all of them.

        If it is 1, each of them does so for itself, and if 0 there is nothing to merge.
        """
        if not self.waits:
            return 0
        # One of them for each channel
        channels = _pow2_above(self.channels)
        return channels if self.splits > max(self.block_g(1), channels) else 1

    @property
    def stages(self) -> int:
        """How many tiles a loop has under way; more than one pass through shared memory.

        That is faster only over neighbouring channels.
        """
        return 3 if self.channels_last and self.tiles_per_split > 1 else 1

    def block_g(self, mergers: int) -> int:
        """How many partial results one of so many mergers takes at once."""
        at_once = MERGED_AT_ONCE * mergers // _pow2_above(self.channels)
        # One for each thread of a warp, if that is enough: several warps take registers to add up.
        return max(1, min(at_once, 32 if self.splits <= 32 else 32 * WARPS))

    @property
    def policies(self) -> tuple[str, str]:
        """How the caches are to treat what is visited for the first and the last time."""
        first = "evict_last" if self.tier == "l2" and self.streams else ""
        return first, "evict_first" if self.streams else ""

    def strides(self, layout: Layout, tensors: Sequence[int]) -> list[int]:
        """The strides of some of the layout's tensors as the kernels take them.

        Those of the outer, the other and the innermost axis, all but the last divided by `vec`,
        where the innermost axis is the channel if `channels_last` and else the inner reduced one.
        """
        flat = []
        for n, c, s in (layout.strides[i] for i in tensors):
            other, inner = (s, c) if self.channels_last else (c, s)
            flat += [n // self.vec, other // self.vec, inner]
        return flat


@lru_cache(maxsize=4096)
def make_plan(
    layout: Layout, itemsize: int, device: Device, bits: bool = False, reduces: bool = True
) -> Plan:
    """The plan for tensors of `itemsize` bytes an element in `layout` on `device`.

    With `bits` the tile holds whole bytes of one bit an element. A kernel that `reduces` nothing
    has a program for each tile, unless accesses are narrow.
    """
    wide = not reduces and layout.channels_last and not bits  # these take registers
    per_thread = (LARGE_PER_THREAD if wide else BYTES_PER_THREAD) // itemsize
    widest = EVALUATED // itemsize if wide else None
    plan = _tile(layout, itemsize, bits, per_thread, widest)
    if not reduces and plan.vec * itemsize == 16:
        # The numbers of a program's channels are soon loaded: rather more programs than fewer.
        least = max(plan.vec, _pow2_above(layout.whole) // (32 * WARPS))
        while plan.channel_blocks * _tiles(plan, layout) < device.sms and per_thread > least:
            per_thread //= 2
            plan = _tile(layout, itemsize, bits, per_thread, widest)
        return _split(plan, layout, 1)
    tiles = _tiles(plan, layout)
    programs = (CTAS_PER_SM if reduces else UNREDUCED_PER_SM) * device.sms
    splits = _cdiv(programs, plan.channel_blocks)
    least = min(tiles, TILES_PER_SPLIT) if reduces else 1
    return _split(plan, layout, max(_cdiv(tiles, splits), least))


@lru_cache(maxsize=4096)
def single_read_plan(
    layout: Layout,
    itemsize: int,
    device: Device,
    inputs: int = 1,
    bits: bool = False,
    programs_per_sm: int = 2,
    held_per_thread: int = HELD_PER_THREAD,
    visited_per_thread: int = LARGE_PER_THREAD,
) -> Plan:
    """The plan that visits all tiles of a slab of channels twice, as far as possible on the chip.

    `inputs` are the tensors that are read twice. How many programs a multiprocessor holds, only
    compiling the kernel tells; tile and tier are the same for all numbers but 1.
    """
    most = held_per_thread // inputs // (4 if itemsize == 8 else 1)
    if layout.columns > 1:  # the sums of channels from those of columns take registers as well
        most //= 2

    def narrow(run: int) -> int:
        """The fewest channels in a run of so many bytes; planes start anywhere."""
        if layout.channels_last:
            return run // itemsize
        return _pow2_above(_cdiv(256, layout.S * itemsize))

    if layout.channels_last:
        few = layout.N * layout.C * layout.S <= FEW and layout.columns == 1
        narrowest = SECTOR // itemsize
    else:
        few, narrowest = _alone(layout.N, layout.C, layout.S), 1

    def held(widest: int, tiles: int, programs: int | None = None) -> Plan | None:
        """With the smallest tiles of which a slab, and all slabs, have no more."""
        per_thread = BYTES_PER_THREAD // itemsize
        while per_thread <= most:
            plan = _tile(layout, itemsize, bits, per_thread, widest)
            of_slab = _tiles(plan, layout)
            of_all = of_slab * plan.channel_blocks
            if of_slab <= tiles and (programs is None or of_all <= programs):
                return _split(plan, layout, 1)
            per_thread *= 2
        return None

    # A program that has its channels to itself needs no one.
    widest = narrow(64)  # the least that DRAM moves
    plan = held(widest, 1)
    while few and widest > narrowest and (plan is None or 2 * plan.channel_blocks <= device.sms):
        widest //= 2  # narrower runs may do, or make more programs
        plan = held(widest, 1) or plan
    # Else all at once, a few to a multiprocessor, and of a group no more than one: a second round
    # of the last few slabs would take as long as the first.
    plan = plan or held(narrow(64), device.sms, min(programs_per_sm, 2) * device.sms)
    if plan is not None:
        groups = min(plan.channel_blocks, device.sms * programs_per_sm // plan.splits)
        return replace(plan, tier="registers", groups=groups)

    total = layout.N * layout.C * layout.S * itemsize
    per_thread = visited_per_thread // itemsize
    plan = _tile(layout, itemsize, bits, per_thread, narrow(128))  # a line of the cache
    slab = inputs * min(plan.slab, layout.C) * layout.N * layout.S * itemsize
    at_once = device.l2 // 2 // slab
    tier = "l2"
    fewest = FEWEST_GROUPS if layout.channels_last else 1
    if at_once < min(fewest, plan.channel_blocks):
        plan = _tile(layout, itemsize, bits, per_thread, narrow(256))
        at_once, tier = 0, "memory"
    programs, slabs = device.sms * programs_per_sm, plan.channel_blocks
    tiles = _tiles(plan, layout)
    if layout.channels_last and slabs * tiles <= FEW_TILES * device.sms:
        programs = device.sms

    def cost(splits: int) -> int:
        """In tiles, one after the other."""
        groups = min(programs // splits, slabs, at_once or slabs)
        return _cdiv(slabs, groups) * (_cdiv(tiles, splits) + BARRIER * (splits > 1))

    splits = min(range(1, min(programs, tiles) + 1), key=cost)
    plan = _split(plan, layout, _cdiv(tiles, splits))
    groups = min(programs // plan.splits, slabs, at_once or slabs)
    return replace(plan, tier=tier, groups=groups, streams=2 * total > device.l2)


def _tile(
    layout: Layout, itemsize: int, bits: bool, per_thread: int, widest: int | None = None
) -> Plan:
    """A tile with so many elements a thread, and as many programs as there are channel blocks.

    It is not wider than `widest` channels, or 8 with bits.
    """
    N, C, S = layout.N, layout.C, layout.S
    channels_last = layout.channels_last
    least = 8 if bits else 1  # neighbouring elements of a tile
    vec = vector(layout, channels_last, 16 // itemsize)
    # Narrow accesses hold an address for every element in registers: fewer elements.
    if vec * itemsize < 8:
        per_thread //= 4
    elements = 32 * WARPS * per_thread
    if layout.columns > 1:
        block_c = min(_pow2_above(C), elements, WIDEST)
        block_s = min(_pow2_above(S), elements // block_c)
    elif channels_last:
        # Rows of whole cache lines
        block_c = max(least, min(_pow2_above(C), widest or min(64, 256 // itemsize)))
        block_s = min(_pow2_above(S), elements // block_c)
    else:
        block_s = max(least, _inner_block(S, elements))
        # Small planes of neighbouring channels lie next to each other: take them in one run.
        block_c = min(_pow2_above(C), elements // block_s) if elements > 16 * S else 1
        block_c = min(block_c, widest or block_c)
    block_n = min(_pow2_above(N), elements // (block_c * block_s))
    plan = Plan(
        block_n=block_n,
        block_c=block_c,
        block_s=block_s,
        tiles_per_split=_cdiv(N, block_n) * _cdiv(S, block_s),
        splits=1,
        channel_blocks=0,
        channels_last=channels_last,
        vec=vec,
        num_warps=max(1, block_n * block_c * block_s // (32 * per_thread)),
        plane=layout.plane,
        pixels=layout.pixels,
        whole=layout.whole,
    )
    return replace(plan, channel_blocks=_cdiv(C, plan.slab))


def _alone(N: int, C: int, S: int) -> bool:
    """Whether a program takes a channel of so few elements by itself, its planes one by one."""
    return N * C * S <= FEW and _pow2_above(N) * _pow2_above(S) <= ALONE and 2 * S >= SECTOR


def _few_rows(N: int, S: int) -> bool:
    """Whether a program takes by itself as many neighbouring channels as fill a sector."""
    return _pow2_above(N) * _pow2_above(S) * SECTOR // 2 <= ALONE


def _tiles(plan: Plan, layout: Layout) -> int:
    return _cdiv(layout.N, plan.block_n) * _cdiv(layout.S, plan.block_s)


def _split(plan: Plan, layout: Layout, tiles_per_split: int) -> Plan:
    splits = _cdiv(_tiles(plan, layout), tiles_per_split)
    return replace(plan, tiles_per_split=tiles_per_split, splits=splits)


def vector(layout: Layout, channels_last: bool, limit: int) -> int:
    """The largest power of two, up to `limit`, that divides every stride but the inner axis' own.

    And the inner axis' size, so that a run of that many elements is valid or masked as one.
    """
    inner = 1 if channels_last else 2
    numbers = [layout.C if channels_last else layout.S]
    numbers += [s for strides in layout.strides for i, s in enumerate(strides) if i != inner]
    vec = limit
    while any(number % vec for number in numbers):
        vec //= 2
    return vec


def _inner_block(S: int, elements: int) -> int:
    """The block over S that pads least, the largest such; at least an eighth of a tile."""
    largest = min(_pow2_above(S), elements)
    blocks = [b for b in (largest, largest // 2, largest // 4) if b >= elements // 8] or [largest]
    return min(blocks, key=lambda b: _cdiv(S, b) * b)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _pow2_above(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _up(number: int, unit: int) -> int:
    return _cdiv(number, unit) * unit
