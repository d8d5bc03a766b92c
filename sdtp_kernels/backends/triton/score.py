"""``score_tokens``: the pruner's MLP in one pass over tiles of hidden states."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from . import configs

if TYPE_CHECKING:
    import torch

    from sdtp_kernels.arguments import Scoring


@triton.jit
def score_tile(
    hidden_ptr, token_offsets, is_token, stride_d,
    w1_ptr, stride_w1_h, stride_w1_d, b1_ptr, w2_ptr,
    first_h, hidden_size, pruner_size, rms_eps,
    UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """What `BLOCK_WIDTH` units of the pruner from `first_h` on add to the scores of a tile of tokens: [BLOCK_TOKENS].

    Both the split and the one-launch path call this function with the same tile, and add its results in the same order.
    """
    h = first_h + tl.arange(0, BLOCK_WIDTH)
    d = tl.arange(0, BLOCK_HIDDEN)
    is_h = h < pruner_size
    x_ptrs = hidden_ptr + token_offsets[:, None] + d.to(tl.int64)[None, :] * stride_d
    w1_ptrs = w1_ptr + h.to(tl.int64)[None, :] * stride_w1_h + d.to(tl.int64)[:, None] * stride_w1_d
    step = tl.full([], BLOCK_HIDDEN, tl.int64)
    pre = tl.zeros([BLOCK_TOKENS, BLOCK_WIDTH], tl.float32)
    squares = tl.zeros([BLOCK_TOKENS], tl.float32)
    for first_d in range(0, hidden_size, BLOCK_HIDDEN):
        is_d = d < hidden_size - first_d
        x = tl.load(x_ptrs, mask=is_token[:, None] & is_d[None, :], other=0.0)  # [BLOCK_TOKENS, BLOCK_HIDDEN]
        w1 = tl.load(w1_ptrs, mask=is_d[:, None] & is_h[None, :], other=0.0)  # [BLOCK_HIDDEN, BLOCK_WIDTH]
        # The interpreter computes on the bit patterns of bfloat16. On hardware the operands stay as narrow as they are:
        # the products are exact in float32 anyway.
        if UPCAST:
            x = x.to(tl.float32)
            w1 = w1.to(tl.float32)
        if rms_eps is not None:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        pre = tl.dot(x, w1, pre, input_precision=INPUT_PRECISION)
        x_ptrs += step * stride_d
        w1_ptrs += step * stride_w1_d
    if rms_eps is not None:  # 1/rms commutes with the product, so normalising costs no pass of its own
        pre *= tl.rsqrt(squares / hidden_size + rms_eps)[:, None]
    b1 = tl.load(b1_ptr + h, mask=is_h, other=0.0)
    w2 = tl.load(w2_ptr + h, mask=is_h, other=0.0)
    pre += b1[None, :]
    gelu = 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    return tl.sum(gelu * w2[None, :], axis=1)


@triton.jit
def finish_scores(sums, b2_ptr, mean_ptr, share, bias_ptr, offsets, mask):
    """(running means, scores): the last steps of a score, in the one order that every path uses."""
    means = sums
    if b2_ptr is not None:
        means += tl.load(b2_ptr)
    if mean_ptr is not None:
        before = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
        means = before + share * (means - before)
    scores = means
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + offsets, mask=mask, other=0.0)
    return means, scores


@triton.jit
def load_scores(scores_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr, offsets, mask):
    """(running means, scores) at `offsets` into ``[B, N]``; out of ``[num_parts, B, N]`` where they still miss `b2`."""
    ptrs = scores_ptr + offsets
    if b2_ptr is None:
        sums = tl.load(ptrs, mask=mask, other=0.0)
    else:
        sums = tl.zeros(offsets.shape, tl.float32)
        for _ in range(num_parts):
            sums += tl.load(ptrs, mask=mask, other=0.0)
            ptrs += part_stride
    return finish_scores(sums, b2_ptr, mean_ptr, share, bias_ptr, offsets, mask)


@triton.jit(do_not_specialize=["batch_size", "num_tokens", "num_scored"])
def sdtp_score_kernel(
    hidden_ptr, stride_b, stride_n, stride_d,
    w1_ptr, stride_w1_h, stride_w1_d, b1_ptr, w2_ptr, parts_ptr,
    batch_size, num_tokens, num_scored, hidden_size, pruner_size, rms_eps,
    UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens and tile of the pruner's width, row): one partial sum of each of its tokens.

    Only the first `num_scored` tokens of a row: a selection does not look at the scores of those that it always keeps.

    The tiles of the width vary fastest: programs that share hidden states run side by side, so these come from HBM once
    and from L2 after that.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    num_parts = tl.cdiv(pruner_size, BLOCK_WIDTH)
    part = tl.program_id(0) % num_parts
    batch = tl.program_id(1)
    tokens = tl.program_id(0) // num_parts * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = tokens < num_scored
    token_offsets = batch.to(tl.int64) * stride_b + tokens.to(tl.int64) * stride_n
    sums = score_tile(
        hidden_ptr, token_offsets, is_token, stride_d, w1_ptr, stride_w1_h, stride_w1_d, b1_ptr, w2_ptr,
        part * BLOCK_WIDTH, hidden_size, pruner_size, rms_eps,
        UPCAST, INPUT_PRECISION, BLOCK_TOKENS, BLOCK_WIDTH, BLOCK_HIDDEN,
    )  # fmt: skip
    row = (part * batch_size + batch).to(tl.int64) * num_tokens
    tl.store(parts_ptr + row + tokens, sums, mask=is_token)


@triton.jit(do_not_specialize=["part_stride", "num_scores"])
def sdtp_finish_kernel(
    parts_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr, scores_ptr, num_scores, BLOCK: tl.constexpr
):  # fmt: skip
    """Sum the partial scores, for callers of `score_tokens` alone; a selection does this on its way."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_scores
    _, scores = load_scores(parts_ptr, part_stride, num_parts, b2_ptr, mean_ptr, share, bias_ptr, offsets, mask)
    tl.store(scores_ptr + offsets, scores, mask=mask)


class Scores(NamedTuple):
    """Scores on their way: partial sums, and what is still to be made of them."""

    parts: torch.Tensor
    """``[num_parts, B, N]`` float32, one part for each tile of the pruner's width; ``[1, B, N]`` where complete."""
    b2: torch.Tensor | None
    """``None`` where the scores are complete."""
    mean_score: torch.Tensor | None = None
    share: float = 1.0
    """Of these scores in the running mean."""
    score_bias: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple[object, ...]:
        """As :func:`load_scores` takes them."""
        parts = self.parts
        return parts, parts.stride(0), parts.shape[0], self.b2, self.mean_score, self.share, self.score_bias


def to_finish(parts: torch.Tensor, scoring: Scoring) -> Scores:
    mean_score, score_bias = (None if t is None else t.contiguous() for t in (scoring.mean_score, scoring.score_bias))
    return Scores(parts, scoring.b2, mean_score, 1 / (scoring.num_scores + 1), score_bias)


def pruner_arguments(hidden_states: torch.Tensor, scoring: Scoring) -> tuple[object, ...]:
    """Pointers and strides of the pruner's input and weights, as the kernels take them."""
    w1, b1, w2 = scoring.w1, scoring.b1.contiguous(), scoring.w2.contiguous()
    return hidden_states, *hidden_states.stride(), w1, *w1.stride(), b1, w2


def tile_arguments(config: configs.ScoreConfig, device: torch.device) -> dict[str, object]:
    """The constants of :func:`score_tile`, and how to launch a kernel that calls it."""
    return {
        "UPCAST": configs.INTERPRETED,
        "INPUT_PRECISION": config.input_precision,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_WIDTH": config.block_width,
        "BLOCK_HIDDEN": config.block_hidden,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **configs.registers(255, device),
        **configs.EXACT,
    }


def score_parts(hidden_states: torch.Tensor, scoring: Scoring, skip_last: int = 0) -> Scores:
    """One launch: partial scores of every token but for the last `skip_last` of each row."""
    batch_size, num_tokens, hidden_size = hidden_states.shape
    config, pruner_size = configs.score_config(hidden_states, scoring.w1), scoring.w1.shape[0]
    num_parts = configs.ceil_divide(pruner_size, config.block_width)
    parts = scoring.b1.new_empty(num_parts, batch_size, num_tokens)
    num_scored = num_tokens - skip_last
    if batch_size * num_scored * num_parts:
        grid = (configs.ceil_divide(num_scored, config.block_tokens) * num_parts, batch_size)
        sdtp_score_kernel[grid](
            *pruner_arguments(hidden_states, scoring), parts, batch_size, num_tokens, num_scored,
            hidden_size, pruner_size, scoring.rms_eps, PDL=configs.has_pdl(hidden_states.device),
            **tile_arguments(config, hidden_states.device),
        )  # fmt: skip
    return to_finish(parts, scoring)


def score_tokens(hidden_states: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Two launches: partial scores, and their sum."""
    unfinished = score_parts(hidden_states, scoring)
    scores = unfinished.parts.new_empty(hidden_states.shape[:2])
    if scores.numel():
        block = 1024
        sdtp_finish_kernel[(configs.ceil_divide(scores.numel(), block),)](
            *unfinished.arguments, scores, scores.numel(), BLOCK=block, **configs.EXACT
        )
    return scores
