"""``select_tokens``: threshold and ordered compaction, one program a block (or a row, where it is one block).

The threshold of a block is found digit by digit of an orderable 32-bit key, in four histograms. One packed scan then
gives every kept token its slot, ``above_before + min(equal_before, ties)``: ascending, ties to the lower index, the
same bits on every run. No program ever waits for another one, and the host never reads a value.

A row under the global budget is one program's work at any length: five walks over its scores, which stay in L2, in
tiles of 4096, and a sixth over what is kept. More programs would have to wait for one another, or take more launches;
docs/kernels.md has an estimate of what that costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from . import configs
from .score import Scores, load_scores

if TYPE_CHECKING:
    from sdtp_kernels.arguments import Selection

# Sizes that change from prompt to prompt: Triton would compile a kernel again for those that are 1 or a multiple of 16.
COUNTS = (
    "part_stride",
    "num_tokens",
    "num_keep",
    "num_dropped",
    "sink",
    "recent",
    "block_size",
    "num_blocks",
    "first_fill_slot",
)

_FILL = 256  # slots that a program fills which lie in no block: padding, and the tokens always kept


@triton.jit
def order_keys(scores):
    """Orderable uint32 of float32 scores, see csrc/include/sdtp/order.h: NaN lowest, -0 equals +0."""
    bits = scores.to(tl.uint32, bitcast=True)
    sign: tl.constexpr = 0x80000000
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits >= sign, bits ^ 0xFFFFFFFF, bits | sign)  # ~bits overflows in the interpreter of triton 3.8
    keys = tl.where(magnitude == 0, sign, keys)
    return tl.where(magnitude > 0x7F800000, 0, keys).to(tl.uint32)


@triton.jit
def row_plan(rows_ptr, batch, num_tokens, num_keep, recent):
    """(valid tokens, tokens to keep, trailing tokens always kept) of a row: its own where `rows` gives them.

    The host does not see the values on the device. Clamped like this, wrong ones give a wrong selection, but no slot
    and no column outside the row.
    """
    if rows_ptr is None:
        length, keep, tail = num_tokens, num_keep, recent
    else:
        length = tl.minimum(tl.maximum(tl.load(rows_ptr + batch * 3), 0), num_tokens).to(tl.int32)
        keep = tl.minimum(tl.maximum(tl.load(rows_ptr + batch * 3 + 1), 0), tl.minimum(length, num_keep)).to(tl.int32)
        tail = tl.minimum(tl.maximum(tl.load(rows_ptr + batch * 3 + 2), 0), keep).to(tl.int32)
    return length, keep, tail


@triton.jit
def block_plan(block, block_size, length, keep, tail):
    """(tokens of the block, tokens it keeps): both 0 where the row has no such block.

    Without a block size, all that stands before the tail is block 0.
    """
    body = length - tail
    if block_size is None:
        size = body
        quota = keep - tail
        exists = block == 0
    else:
        size = block_size
        num_blocks = body // block_size
        quota = (keep - tail) // tl.maximum(num_blocks, 1)
        exists = block < num_blocks
    size = tl.where(exists, size, 0)
    return size, tl.minimum(quota, size)


@triton.jit
def pool_keys(keys, REACH: tl.constexpr, TILE: tl.constexpr):
    """Highest key at most `REACH` places away in the tile; places beyond its ends count as the ends.

    Maxima of 1, 2, 4, ... keys from a place on, then two of those: a logarithm of the window's width in exchanges.
    """
    place = tl.arange(0, TILE)
    for power in tl.static_range(7):  # enough for MAX_POOLING
        if (1 << power) <= REACH:
            shift = 1 << power if 2 << power <= REACH else REACH + 1 - (1 << power)
            keys = tl.maximum(keys, tl.gather(keys, tl.minimum(place + shift, TILE - 1), 0))
    return tl.maximum(keys, tl.gather(keys, tl.maximum(place - REACH, 0), 0))


@triton.jit
def block_keys(scores, is_inside, i, size, num_sink, BLOCKED: tl.constexpr, REACH: tl.constexpr, TILE: tl.constexpr):
    """Keys of tokens `i`, a tile, by the best score within `REACH` inside their block; the forced ones rank highest."""
    keys = order_keys(scores)
    if REACH > 0:
        keys = pool_keys(tl.where(is_inside, keys, 0).to(tl.uint32), REACH, TILE)
    is_forced = i < num_sink
    if BLOCKED:
        is_forced = is_forced | (i == size - 1)
    return tl.where(is_forced, 0xFFFFFFFF, keys).to(tl.uint32)


@triton.jit
def load_keys(
    scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr,
    first_offset, first, size, num_sink,
    BLOCKED: tl.constexpr, REACH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """(keys of a tile, their tokens, whether they are the tile's own).

    A tile holds its own ``TILE - 2 * REACH`` tokens of the block, from `first` on, and their neighbours on both sides.
    """
    place = tl.arange(0, TILE)
    i = first + place - REACH
    is_inside = i < size
    is_own = is_inside
    if REACH > 0:
        is_inside = is_inside & (i >= 0)
        is_own = is_own & (place >= REACH) & (place < TILE - REACH)
    _, scores = load_scores(
        scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr, first_offset + i, is_inside
    )
    return block_keys(scores, is_inside, i, size, num_sink, BLOCKED, REACH, TILE), i, is_own


@triton.jit
def count_digits(keys, mask, threshold, SHIFT: tl.constexpr):
    """How often each digit at `SHIFT` stands in the keys that share the threshold's digits above it."""
    if SHIFT < 24:
        mask = mask & ((keys ^ threshold) >> (SHIFT + 8) == 0)
    return tl.histogram((keys >> SHIFT & 0xFF).to(tl.int32), 256, mask=mask)


@triton.jit
def add_digit(counts, threshold, ties, SHIFT: tl.constexpr):
    """(threshold with one more digit, how many keys are still to be taken among those that share its digits)."""
    at_least = tl.sum(counts) - tl.cumsum(counts) + counts
    digit = tl.sum((at_least >= ties).to(tl.int32)) - 1
    ties -= tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0))
    return threshold | (digit.to(tl.uint32) << SHIFT), ties


@triton.jit
def find_slots(keys, mask, threshold, ties, above_before, equal_before):
    """(slot of each kept key, whether it is kept, flags whose sum counts the keys above and, times 2^16, equal)."""
    is_above = mask & (keys > threshold)
    is_equal = mask & (keys == threshold)
    flags = is_above.to(tl.int32) + (is_equal.to(tl.int32) << 16)  # two counts, one scan: a tile is below 2^15
    before = tl.cumsum(flags) - flags
    num_above = above_before + (before & 0xFFFF)
    num_equal = equal_before + (before >> 16)
    is_kept = is_above | (is_equal & (num_equal < ties))
    return num_above + tl.minimum(num_equal, ties), is_kept, flags


@triton.jit
def rank_tile(keys, mask, quota):
    """(slot, whether it is kept) of each key of a block that is one tile, in registers."""
    threshold = tl.zeros([], tl.uint32)
    ties = quota
    for shift in tl.static_range(24, -1, -8):
        threshold, ties = add_digit(count_digits(keys, mask, threshold, shift), threshold, ties, shift)
    slots, is_kept, _ = find_slots(keys, mask, threshold, ties, 0, 0)
    return slots, is_kept


@triton.jit
def store_dropped(dropped_ptr, slots, columns, mask, num_dropped):
    """The host does not see the counts of rows: what has no slot in ``[0, num_dropped)`` is left out."""
    tl.store(dropped_ptr + slots, columns.to(tl.int64), mask=mask & (slots >= 0) & (slots < num_dropped))


@triton.jit
def select_block(
    scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr,
    first_offset, size, quota, num_sink,
    out_ptr, dropped_ptr, first_column, first_slot, last_slot, first_drop, num_dropped,
    BLOCKED: tl.constexpr, REACH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the columns of the best `quota` of the block's `size` tokens, as far as their slots are in a range, and the
    columns of the others.

    The block's first score stands at `first_offset`. Slots count the block's kept tokens from 0; `out_ptr` is where
    slot 0 stands. Of the slots only those in ``[first_slot, last_slot)`` are written:
    programs that share a block rank it each and write a share each. The block's first dropped token has the slot
    `first_drop` of `num_dropped` from `dropped_ptr` on.
    """
    threshold = tl.zeros([], tl.uint32)
    ties = quota
    for shift in tl.static_range(24, -1, -8):
        counts = tl.zeros([256], tl.int32)
        for first in range(0, size, TILE - 2 * REACH):
            keys, i, mask = load_keys(
                scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr,
                first_offset, first, size, num_sink, BLOCKED, REACH, TILE,
            )  # fmt: skip
            counts += count_digits(keys, mask, threshold, shift)
        threshold, ties = add_digit(counts, threshold, ties, shift)
    above = tl.zeros([], tl.int32)
    equal = tl.zeros([], tl.int32)
    for first in range(0, size, TILE - 2 * REACH):
        keys, i, mask = load_keys(
            scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr,
            first_offset, first, size, num_sink, BLOCKED, REACH, TILE,
        )  # fmt: skip
        slots, is_kept, flags = find_slots(keys, mask, threshold, ties, above, equal)
        is_mine = is_kept & (slots >= first_slot) & (slots < last_slot)
        tl.store(out_ptr + slots, (first_column + i).to(tl.int64), mask=is_mine)
        if dropped_ptr is not None:
            store_dropped(dropped_ptr, first_drop + i - slots, first_column + i, mask & ~is_kept, num_dropped)
        total = tl.sum(flags)  # after the store: before it, ptxas spills
        above += total & 0xFFFF
        equal += total >> 16


@triton.jit
def store_means(
    scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, row_offset, columns_ptr, kept_mean_ptr,
    first_slot, last_slot, TILE: tl.constexpr,
):  # fmt: skip
    """Write the running means of the kept tokens in a range of slots, whose columns were written before a barrier.

    Not where the columns are found: with means beside the keys ptxas spills.
    """
    for first in range(first_slot, last_slot, TILE):
        slots = first + tl.arange(0, TILE)
        mask = slots < last_slot
        columns = tl.load(columns_ptr + slots, mask=mask, other=0)
        means, _ = load_scores(
            scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, None, row_offset + columns, mask
        )
        tl.store(kept_mean_ptr + slots, means, mask=mask)


@triton.jit
def fill_slots(
    out_ptr, kept_mean_ptr, dropped_ptr, mean_ptr, batch, first_slot, first_drop,
    num_tokens, num_keep, num_dropped, length, keep, tail, FILL: tl.constexpr,
):  # fmt: skip
    """Write those of `FILL` slots that lie in no block: -1 as padding, the last tokens as the tail.

    These keep the mean that they came with.
    """
    slots = first_slot + tl.arange(0, FILL)
    is_padding = slots < num_keep - keep
    is_outside = (is_padding | (slots >= num_keep - tail)) & (slots < num_keep)
    columns = tl.where(is_padding, -1, slots + (num_tokens - num_keep))
    tl.store(out_ptr + slots, columns.to(tl.int64), mask=is_outside)
    if kept_mean_ptr is not None:
        means = tl.zeros([FILL], tl.float32)
        if mean_ptr is not None:
            offsets = batch.to(tl.int64) * num_tokens + columns
            means = tl.load(mean_ptr + offsets, mask=is_outside & ~is_padding, other=0.0)
        tl.store(kept_mean_ptr + slots, means, mask=is_outside)
    if dropped_ptr is not None:
        drops = first_drop + tl.arange(0, FILL)
        is_padding = drops < num_dropped - (length - keep)
        store_dropped(dropped_ptr, drops, tl.full([FILL], -1, tl.int32), is_padding, num_dropped)


@triton.jit(do_not_specialize=COUNTS)
def sdtp_select_kernel(
    scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr, finished_ptr,
    rows_ptr, indices_ptr, kept_mean_ptr, dropped_ptr,
    num_tokens, num_keep, num_dropped, sink, recent, block_size, num_blocks, first_fill_slot,
    REACH: tl.constexpr, TILE: tl.constexpr, FILL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (block, row), then (run of slots that lie in no block, row).

    Where scores are still in parts, `finished_ptr` says where their running means go: a program reads a token five
    times, and sums it once.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    batch = tl.program_id(1)
    length, keep, tail = row_plan(rows_ptr, batch, num_tokens, num_keep, recent)
    out_ptr = indices_ptr + batch.to(tl.int64) * num_keep
    means_ptr = kept_mean_ptr
    if kept_mean_ptr is not None:
        means_ptr += batch.to(tl.int64) * num_keep
    drops_ptr = dropped_ptr
    if dropped_ptr is not None:
        drops_ptr += batch.to(tl.int64) * num_dropped
    if program < num_blocks:
        size, quota = block_plan(program, block_size, length, keep, tail)
        start = program * size
        first_column = num_tokens - length + start
        first_offset = batch.to(tl.int64) * num_tokens + first_column
        first_slot = num_keep - keep + program * quota
        first_drop = num_dropped - (length - keep) + program * (size - quota)
        if finished_ptr is None:
            select_block(
                scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr,
                first_offset, size, quota, sink - start,
                out_ptr + first_slot, drops_ptr, first_column, 0, quota, first_drop, num_dropped,
                block_size is not None, REACH, TILE,
            )  # fmt: skip
        else:
            for first in range(0, size, TILE):
                i = first + tl.arange(0, TILE)
                means, _ = load_scores(
                    scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, None, first_offset + i, i < size
                )
                tl.store(finished_ptr + first_offset + i, means, mask=i < size)
            tl.debug_barrier()
            select_block(
                finished_ptr, 0, 1, None, None, 1.0, bias_ptr, first_offset, size, quota, sink - start,
                out_ptr + first_slot, drops_ptr, first_column, 0, quota, first_drop, num_dropped,
                block_size is not None, REACH, TILE,
            )  # fmt: skip
            if kept_mean_ptr is not None:
                tl.debug_barrier()
                store_means(
                    finished_ptr, 0, 1, None, None, 1.0, batch.to(tl.int64) * num_tokens, out_ptr, means_ptr,
                    first_slot, first_slot + quota, TILE,
                )  # fmt: skip
    else:
        first_fill = (program - num_blocks) * FILL
        fill_slots(
            out_ptr, means_ptr, drops_ptr, mean_ptr, batch, first_fill_slot + first_fill, first_fill,
            num_tokens, num_keep, num_dropped, length, keep, tail, FILL,
        )  # fmt: skip


class Chosen(NamedTuple):
    """What a selection writes."""

    indices: torch.Tensor
    kept_mean: torch.Tensor | None = None
    dropped: torch.Tensor | None = None
    """``None`` where nobody asks for them."""

    @property
    def num_dropped(self) -> int:
        return 0 if self.dropped is None else self.dropped.shape[1]

    @property
    def is_empty(self) -> bool:
        return self.indices.numel() == 0 and (self.dropped is None or self.dropped.numel() == 0)


def fill_plan(num_tokens: int, selection: Selection, num_dropped: int, slots_a_program: int) -> tuple[int, int]:
    """(first slot, programs) that fill what no block does: only the tail, unless rows may be padded."""
    first_slot, most_padding = selection.num_keep - selection.recent, num_dropped - (num_tokens - selection.num_keep)
    if selection.rows is not None:
        first_slot, most_padding = 0, num_dropped
    return first_slot, configs.ceil_divide(max(selection.num_keep - first_slot, most_padding), slots_a_program)


def count_blocks(num_tokens: int, selection: Selection) -> int:
    """Blocks of a row, as many as it may have."""
    if selection.block_size is None:
        return 1
    return (num_tokens if selection.rows is not None else num_tokens - selection.recent) // selection.block_size


def select_scores(scores: Scores, selection: Selection, chosen: Chosen) -> None:
    """One launch, on complete scores or on parts that the previous launch wrote."""
    if chosen.is_empty:
        return
    num_keep, sink, recent, block_size, rows, pooling = selection
    batch_size, num_tokens = scores.parts.shape[1:]
    num_blocks = count_blocks(num_tokens, selection)
    first_fill_slot, num_fills = fill_plan(num_tokens, selection, chosen.num_dropped, _FILL)
    tile = configs.select_tile((num_tokens if block_size is None else block_size) + pooling - 1)
    finished = None if scores.b2 is None else scores.parts.new_empty(batch_size, num_tokens)
    sdtp_select_kernel[(num_blocks + num_fills, batch_size)](
        *scores.arguments, finished, None if rows is None else rows.contiguous(), *chosen,
        num_tokens, num_keep, chosen.num_dropped, sink, recent, block_size, num_blocks, first_fill_slot,
        REACH=pooling // 2, TILE=tile, FILL=_FILL, **configs.select_options(tile, scores.parts.device),
        **configs.overlap(scores.parts.device, chained=finished is not None),
    )  # fmt: skip


def select_tokens(scores: torch.Tensor, selection: Selection) -> torch.Tensor:
    chosen = Chosen(scores.new_empty((scores.shape[0], selection.num_keep), dtype=torch.int64))
    select_scores(Scores(scores.contiguous().unsqueeze(0), None), selection, chosen)
    return chosen.indices
