"""``prune_tokens``: the launches that the budget needs, and no more.

Global budget, three: score | select | gather. Block budget, one where a program can score its own block, else two:
score | select within the block and gather. A block's place in the output is known from its number, so its program needs
nothing of any other one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .gather import MAX_TENSORS, copy_arguments, copy_tokens, empty_outputs, gather_tokens
from .score import add_biases, pruner_arguments, score_parts, score_tile, tile_arguments
from .select import block_keys, block_plan, fill_plan, fill_slots, rank_tile, row_plan, select_block, select_scores

# A program scores its own block up to this size. Larger blocks are too few to keep a GPU busy with one program each.
ONE_LAUNCH_BLOCK = 256
_FILL = 64  # slots outside all blocks that one program copies
_MAX_SHARES = 16  # programs that share a block: each ranks all of it


@triton.jit
def select_and_gather_kernel(
    scores_ptr, part_stride, num_parts, b2_ptr, bias_ptr, rows_ptr, indices_ptr,
    sources, outputs, strides_b, strides_h, strides_n, strides_d,
    num_tokens, num_keep, sink, recent, block_size, num_blocks, shares, first_fill_slot,
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
    if program < num_blocks * shares:
        block = program // shares
        size, quota = block_plan(block, block_size, length, keep, tail)
        start = block * size
        first_column = num_tokens - length + start
        block_slot = num_keep - keep + block * quota
        share_size = tl.cdiv(quota, shares)
        first_slot = tl.minimum(program % shares * share_size, quota)
        last_slot = tl.minimum(first_slot + share_size, quota)
        select_block(
            scores_ptr, part_stride, num_parts, b2_ptr, bias_ptr,
            batch.to(tl.int64) * num_tokens + first_column, size, quota, sink - start,
            out_ptr + block_slot, first_column, first_slot, last_slot, True, REACH, TILE,
        )  # fmt: skip
        first_slot += block_slot
        last_slot += block_slot
        first_skipped = num_keep
        last_skipped = num_keep
    else:
        first_slot = first_fill_slot + (program - num_blocks * shares) * FILL
        last_slot = tl.minimum(first_slot + FILL, num_keep)
        fill_slots(out_ptr, first_slot, num_tokens, num_keep, keep, tail, FILL)
        first_skipped = num_keep - keep  # a run may span blocks: those slots belong to other programs
        last_skipped = num_keep - tail
    tl.debug_barrier()  # the threads that read a column are not those that wrote it
    copy_tokens(
        sources, outputs, strides_b, strides_h, strides_n, strides_d,
        out_ptr, batch, num_keep, first_slot, last_slot, first_skipped, last_skipped,
        NUM_HEADS, WIDTHS, TILES, TOKENS,
    )  # fmt: skip


@triton.jit
def prune_kernel(
    hidden_ptr, stride_b, stride_n, stride_d,
    w1_ptr, stride_w1_h, stride_w1_d, b1_ptr, w2_ptr, b2_ptr, bias_ptr, rows_ptr, indices_ptr,
    sources, outputs, strides_b, strides_h, strides_n, strides_d,
    num_tokens, hidden_size, pruner_size, rms_eps,
    num_keep, sink, recent, block_size, num_blocks, first_fill_slot,
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
    if program < num_blocks:
        size, quota = block_plan(program, block_size, length, keep, tail)
        start = program * size
        first_column = num_tokens - length + start
        i = tl.arange(0, TILE)
        scores = tl.zeros([TILE], tl.float32)
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
            scores = tl.where(i // BLOCK_TOKENS * BLOCK_TOKENS == first, repeated, scores)
        mask = i < size
        scores = add_biases(scores, b2_ptr, bias_ptr, batch.to(tl.int64) * num_tokens + first_column + i, mask)
        slots, is_kept = rank_tile(block_keys(scores, mask, i, size, sink - start, True, REACH, TILE), mask, quota)
        first_slot = num_keep - keep + program * quota
        last_slot = first_slot + quota
        tl.store(out_ptr + first_slot + slots, (first_column + i).to(tl.int64), mask=is_kept)
        first_skipped = num_keep
        last_skipped = num_keep
    else:
        first_slot = first_fill_slot + (program - num_blocks) * FILL
        last_slot = tl.minimum(first_slot + FILL, num_keep)
        fill_slots(out_ptr, first_slot, num_tokens, num_keep, keep, tail, FILL)
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
    hidden_states: torch.Tensor,
    tensors: list[torch.Tensor],
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    num_keep: int,
    sink: int = 0,
    recent: int = 0,
    block_size: int | None = None,
    rows: torch.Tensor | None = None,
    pooling: int = 1,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Three launches under the global budget, one or two under the block budget (more for over 32 tensors)."""
    carried = [hidden_states, *tensors]
    skip_last = recent if rows is None else 0  # rows have tails of their own, which the host does not know
    if block_size is None or len(carried) > MAX_TENSORS:
        parts = score_parts(hidden_states, w1, b1, w2, b2, score_bias, rms_eps, skip_last)
        indices = select_scores(parts, num_keep, sink, recent, block_size, rows, pooling)
        kept = gather_tokens(carried, indices, chained=True)
        return kept[0], kept[1:], indices

    batch_size, num_tokens, hidden_size = hidden_states.shape
    indices = hidden_states.new_empty((batch_size, num_keep), dtype=torch.int64)
    outputs = empty_outputs(carried, num_keep)
    if not indices.numel():
        return outputs[0], outputs[1:], indices
    pairs = [(tensor, output) for tensor, output in zip(carried, outputs, strict=True) if output.numel()]
    num_blocks = (num_tokens if rows is not None else num_tokens - recent) // block_size
    first_fill_slot, num_fills = fill_plan(num_keep, recent, rows, _FILL)
    arguments: dict[str, object] = {
        **copy_arguments([tensor for tensor, _ in pairs], [output for _, output in pairs]),
        "rows_ptr": None if rows is None else rows.contiguous(),
        "indices_ptr": indices,
        "num_tokens": num_tokens,
        "num_keep": num_keep,
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
        bias = None if score_bias is None else score_bias.contiguous()
        prune_kernel[(num_blocks + num_fills, batch_size)](
            *pruner_arguments(hidden_states, w1, b1, w2), b2, bias,
            hidden_size=hidden_size, pruner_size=w1.shape[0], rms_eps=rms_eps, TILE=ONE_LAUNCH_BLOCK,
            **arguments, **tile_arguments(configs.score_config(hidden_states, w1), hidden_states.device),
        )  # fmt: skip
    else:
        parts = score_parts(hidden_states, w1, b1, w2, b2, score_bias, rms_eps, skip_last)
        tile = configs.select_tile(block_size + pooling - 1, configs.MAX_TILE_WITH_COPY)
        shares = min(_MAX_SHARES, triton.cdiv(block_size, configs.GATHER_TOKENS))
        select_and_gather_kernel[(num_blocks * shares + num_fills, batch_size)](
            *parts.arguments, shares=shares, TILE=tile, **arguments,
            **configs.select_options(tile, indices.device), **configs.overlap(indices.device),
        )  # fmt: skip
    return outputs[0], outputs[1:], indices
