"""``prune_tokens``: the launches that the budget needs, and no more.

Global budget, three: score | select | gather. Block budget, one where a program can score its own block, else two:
score | select within the block and gather. A block's place in the output is known from its number, so its program needs
nothing of any other one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from . import configs
from .gather import MAX_TENSORS, copy_arguments, copy_tokens, empty_outputs, gather_tokens
from .score import finish_scores, pruner_arguments, score_parts, score_tile, tile_arguments, to_finish
from .select import (
    COUNTS,
    Chosen,
    block_keys,
    block_plan,
    count_blocks,
    fill_plan,
    fill_slots,
    rank_tile,
    row_plan,
    select_block,
    select_scores,
    store_dropped,
    store_means,
)

if TYPE_CHECKING:
    from sdtp_kernels.arguments import Scoring, Selection

# A program scores its own block up to this size. Larger blocks are too few to keep a GPU busy with one program each.
ONE_LAUNCH_BLOCK = 256
_FILL = 64  # slots outside all blocks that one program copies
_MAX_SHARES = 16  # programs that share a block: each ranks all of it


@triton.jit(do_not_specialize=COUNTS)
def sdtp_select_and_gather_kernel(
    scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr,
    rows_ptr, indices_ptr, kept_mean_ptr, dropped_ptr,
    sources, outputs, strides_b, strides_h, strides_n, strides_d,
    num_tokens, num_keep, num_dropped, sink, recent, block_size, num_blocks, shares, first_fill_slot,
    NUM_HEADS: tl.constexpr, WIDTHS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
    REACH: tl.constexpr, TILE: tl.constexpr, FILL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Second of two launches: programs (share of a block, row), then (run of slots outside all blocks, row).

    The columns travel from the selection to the copy through `indices`, which is an output anyway.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    batch = tl.program_id(1)
    length, keep, tail = row_plan(rows_ptr, batch, num_tokens, num_keep, recent)
    out_ptr = indices_ptr + batch.to(tl.int64) * num_keep
    means_ptr = kept_mean_ptr + batch.to(tl.int64) * num_keep
    drops_ptr = dropped_ptr
    if dropped_ptr is not None:
        drops_ptr += batch.to(tl.int64) * num_dropped
    if program < num_blocks * shares:
        block = program // shares
        size, quota = block_plan(block, block_size, length, keep, tail)
        start = block * size
        first_column = num_tokens - length + start
        block_slot = num_keep - keep + block * quota
        share_size = tl.cdiv(quota, shares)
        first_slot = tl.minimum(program % shares * share_size, quota)
        last_slot = tl.minimum(first_slot + share_size, quota)
        first_drop = num_dropped - (length - keep) + block * (size - quota)
        num_drops = tl.where(program % shares == 0, num_dropped, 0)  # the first of them writes all that is dropped
        select_block(
            scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr,
            batch.to(tl.int64) * num_tokens + first_column, size, quota, sink - start,
            out_ptr + block_slot, drops_ptr, first_column, first_slot, last_slot, first_drop, num_drops,
            True, REACH, TILE,
        )  # fmt: skip
        first_slot += block_slot
        last_slot += block_slot
        first_skipped = num_keep
        last_skipped = num_keep
        tl.debug_barrier()  # the threads that read a column are not those that wrote it
        store_means(
            scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, batch.to(tl.int64) * num_tokens,
            out_ptr, means_ptr, first_slot, last_slot, FILL,
        )  # fmt: skip
    else:
        first_fill = (program - num_blocks * shares) * FILL
        first_slot = first_fill_slot + first_fill
        last_slot = tl.minimum(first_slot + FILL, num_keep)
        fill_slots(
            out_ptr, means_ptr, drops_ptr, mean_ptr, batch, first_slot, first_fill,
            num_tokens, num_keep, num_dropped, length, keep, tail, FILL,
        )  # fmt: skip
        first_skipped = num_keep - keep  # a run may span blocks: those slots belong to other programs
        last_skipped = num_keep - tail
    tl.debug_barrier()  # the threads that read a column are not those that wrote it
    copy_tokens(
        sources, outputs, strides_b, strides_h, strides_n, strides_d,
        out_ptr, batch, num_keep, first_slot, last_slot, first_skipped, last_skipped,
        NUM_HEADS, WIDTHS, TILES, TOKENS,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def sdtp_prune_kernel(
    hidden_ptr, stride_b, stride_n, stride_d,
    w1_ptr, stride_w1_h, stride_w1_d, b1_ptr, w2_ptr, b2_ptr, mean_ptr, share, bias_ptr,
    rows_ptr, indices_ptr, kept_mean_ptr, dropped_ptr,
    sources, outputs, strides_b, strides_h, strides_n, strides_d,
    num_tokens, hidden_size, pruner_size, rms_eps,
    num_keep, num_dropped, sink, recent, block_size, num_blocks, first_fill_slot,
    NUM_HEADS: tl.constexpr, WIDTHS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
    REACH: tl.constexpr, TILE: tl.constexpr, FILL: tl.constexpr,
    UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """The only launch: programs (block, row) score, select and copy; then (run of slots outside all blocks, row).

    Scores never leave the registers.
    """
    program = tl.program_id(0)
    batch = tl.program_id(1)
    length, keep, tail = row_plan(rows_ptr, batch, num_tokens, num_keep, recent)
    out_ptr = indices_ptr + batch.to(tl.int64) * num_keep
    means_ptr = kept_mean_ptr + batch.to(tl.int64) * num_keep
    drops_ptr = dropped_ptr
    if dropped_ptr is not None:
        drops_ptr += batch.to(tl.int64) * num_dropped
    if program < num_blocks:
        size, quota = block_plan(program, block_size, length, keep, tail)
        start = program * size
        first_column = num_tokens - length + start
        i = tl.arange(0, TILE)
        all_sums = tl.zeros([TILE], tl.float32)
        for first in range(0, size, BLOCK_TOKENS):
            tokens = first + tl.arange(0, BLOCK_TOKENS)
            offsets = batch.to(tl.int64) * stride_b + (first_column + tokens).to(tl.int64) * stride_n
            sums = tl.zeros([BLOCK_TOKENS], tl.float32)
            for first_h in tl.range(0, pruner_size, BLOCK_WIDTH, disable_licm=True):
                sums += score_tile(
                    hidden_ptr, offsets, tokens < size, stride_d,
                    w1_ptr, stride_w1_h, stride_w1_d, b1_ptr, w2_ptr, first_h, hidden_size, pruner_size, rms_eps,
                    UPCAST, INPUT_PRECISION, BLOCK_TOKENS, BLOCK_WIDTH, BLOCK_HIDDEN,
                )  # fmt: skip
            repeated = tl.broadcast_to(sums[None, :], [TILE // BLOCK_TOKENS, BLOCK_TOKENS]).reshape(TILE)
            all_sums = tl.where(i // BLOCK_TOKENS * BLOCK_TOKENS == first, repeated, all_sums)
        mask = i < size
        offsets = batch.to(tl.int64) * num_tokens + first_column + i
        means, scores = finish_scores(all_sums, b2_ptr, mean_ptr, share, bias_ptr, offsets, mask)
        slots, is_kept = rank_tile(block_keys(scores, mask, i, size, sink - start, True, REACH, TILE), mask, quota)
        first_slot = num_keep - keep + program * quota
        tl.store(out_ptr + first_slot + slots, (first_column + i).to(tl.int64), mask=is_kept)
        tl.store(means_ptr + first_slot + slots, means, mask=is_kept)
        if dropped_ptr is not None:
            first_drop = num_dropped - (length - keep) + program * (size - quota)
            store_dropped(drops_ptr, first_drop + i - slots, first_column + i, mask & ~is_kept, num_dropped)
        last_slot = first_slot + quota
        first_skipped = num_keep
        last_skipped = num_keep
    else:
        first_fill = (program - num_blocks) * FILL
        first_slot = first_fill_slot + first_fill
        last_slot = tl.minimum(first_slot + FILL, num_keep)
        fill_slots(
            out_ptr, means_ptr, drops_ptr, mean_ptr, batch, first_slot, first_fill,
            num_tokens, num_keep, num_dropped, length, keep, tail, FILL,
        )  # fmt: skip
        first_skipped = num_keep - keep  # a run may span blocks: those slots belong to other programs
        last_skipped = num_keep - tail
    tl.debug_barrier()  # the threads that read a column are not those that wrote it
    copy_tokens(
        sources, outputs, strides_b, strides_h, strides_n, strides_d,
        out_ptr, batch, num_keep, first_slot, last_slot, first_skipped, last_skipped,
        NUM_HEADS, WIDTHS, TILES, TOKENS,
    )  # fmt: skip


def fits_one_launch(device: torch.device, batch_size: int, block_size: int, num_blocks: int) -> bool:
    """Whether programs score, select and copy a block each, or a launch of its own scores.

    One launch wants blocks of at most :data:`ONE_LAUNCH_BLOCK` tokens, and a block for every multiprocessor: a short
    prompt would leave most of the GPU idle, where two launches spread a block over several programs.
    """
    return block_size <= ONE_LAUNCH_BLOCK and num_blocks * batch_size >= configs.device_of(device).multiprocessors


def prune_tokens(
    hidden_states: torch.Tensor, tensors: list[torch.Tensor], scoring: Scoring, selection: Selection, num_dropped: int
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three launches under the global budget, one or two under the block budget (more for over 32 tensors)."""
    num_keep, sink, recent, block_size, rows, pooling = selection
    carried, (batch_size, num_tokens, hidden_size) = [hidden_states, *tensors], hidden_states.shape
    indices, dropped = (hidden_states.new_empty((batch_size, n), dtype=torch.int64) for n in (num_keep, num_dropped))
    kept_mean = hidden_states.new_empty((batch_size, num_keep), dtype=torch.float32)
    results, chosen = (indices, kept_mean, dropped), Chosen(indices, kept_mean, dropped if num_dropped else None)
    skip_last = recent if rows is None else 0  # rows have tails of their own, which the host does not know
    if block_size is None or len(carried) > MAX_TENSORS:
        select_scores(score_parts(hidden_states, scoring, skip_last), selection, chosen)
        kept = gather_tokens(carried, indices, chained=True)
        return kept[0], kept[1:], *results

    outputs = empty_outputs(carried, num_keep)
    if chosen.is_empty:
        return outputs[0], outputs[1:], *results
    pairs = [(tensor, output) for tensor, output in zip(carried, outputs, strict=True) if output.numel()]
    num_blocks = count_blocks(num_tokens, selection)
    first_fill_slot, num_fills = fill_plan(num_tokens, selection, num_dropped, _FILL)
    arguments: dict[str, object] = {
        **copy_arguments([tensor for tensor, _ in pairs], [output for _, output in pairs]),
        "rows_ptr": None if rows is None else rows.contiguous(),
        "indices_ptr": indices,
        "kept_mean_ptr": kept_mean,
        "dropped_ptr": chosen.dropped,
        "num_tokens": num_tokens,
        "num_keep": num_keep,
        "num_dropped": num_dropped,
        "sink": sink,
        "recent": recent,
        "block_size": block_size,
        "num_blocks": num_blocks,
        "first_fill_slot": first_fill_slot,
        "TOKENS": configs.GATHER_TOKENS,
        "REACH": pooling // 2,
        "FILL": _FILL,
    }
    if fits_one_launch(hidden_states.device, batch_size, block_size, num_blocks):
        sdtp_prune_kernel[(num_blocks + num_fills, batch_size)](
            *pruner_arguments(hidden_states, scoring), *to_finish(scoring.b1, scoring)[1:],
            hidden_size=hidden_size, pruner_size=scoring.w1.shape[0], rms_eps=scoring.rms_eps, TILE=ONE_LAUNCH_BLOCK,
            **arguments, **tile_arguments(configs.score_config(hidden_states, scoring.w1), hidden_states.device),
        )  # fmt: skip
    else:
        parts = score_parts(hidden_states, scoring, skip_last)
        tile = configs.select_tile(block_size + pooling - 1, configs.MAX_TILE_WITH_COPY)
        shares = min(_MAX_SHARES, configs.ceil_divide(block_size, configs.GATHER_TOKENS))
        sdtp_select_and_gather_kernel[(num_blocks * shares + num_fills, batch_size)](
            *parts.arguments, shares=shares, TILE=tile, **arguments,
            **configs.select_options(tile, hidden_states.device), **configs.overlap(hidden_states.device),
        )  # fmt: skip
    return outputs[0], outputs[1:], *results
