"""Training-free scorers: the baselines that a learned pruner has to beat.

A scorer is a function of a :class:`StageInput` that returns one score per token. It plugs in where a
:class:`~sdtp_kernels.TokenPruner` does, so every method runs through the same patch, selection and cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

ATTENTION_WINDOW = 32  # SnapKV's window of last queries
QUESTION_WINDOW = 16  # that of a pruner's attention term: sharper on what is asked for
ATTENTION_POOLING = 7  # and its max-pooling width, so that a hit keeps its neighbours


class StageInput(NamedTuple):
    """What a scorer may look at: the input of the decoder layer that the stage stands before, and the layer below."""

    hidden_states: torch.Tensor
    """``[B, n, D]``"""
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    """cos and sin of the tokens' original positions, ``[1 or B, n, head_dim]``."""
    token_index: torch.Tensor
    """``[B, n]`` index in the row's own prompt, negative for padding."""
    keep_last: int
    """Tokens behind the prompt that are kept whatever their score."""
    layer_below: Any
    """The decoder layer that has just run, on the same tokens."""
    hidden_states_below: torch.Tensor | None
    """Its input, ``[B, n, D]``; ``None`` where some tokens have waited for others (see :func:`block_local`)."""
    keys_below: torch.Tensor | None = None
    """The keys it cached, ``[B, kv_heads, n, head_dim]``; ``None`` without a cache, and where some tokens waited."""
    is_padded: bool = True
    """False where no row can have padding."""
    group: ProcessGroup | None = None
    """The processes that share the model's heads; each sees all tokens. ``None`` for one process alone."""


def block_local(scorer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Declare that a scorer's order of the tokens of a block depends on nothing behind the block.

    Under the block budget a prompt may then come in pieces, whose tokens are scored together with those that waited for
    them: ``hidden_states_below`` and ``keys_below`` can be missing.
    """
    scorer.is_block_local = True  # type: ignore[attr-defined]
    return scorer


@block_local
def random_score(stage: StageInput, seed: int = 0) -> torch.Tensor:
    """A fixed pseudo-random number per token index: the same in every stage, row and run."""
    x = stage.token_index + (seed + 1) * 0x9E3779B9
    for _ in range(2):  # a multiply-xorshift hash on 31 bits, which stays exact in int64
        x = ((x ^ (x >> 16)) & 0x7FFFFFFF) * 0x45D9F3B
    return ((x >> 8) & 0xFFFFFF).float()


@block_local
def recent_score(stage: StageInput) -> torch.Tensor:
    """The later the better: what remains is the sink and the end of the prompt (StreamingLLM, progressively)."""
    return stage.token_index.float()


@block_local
def norm_score(stage: StageInput) -> torch.Tensor:
    """L2 norm of the hidden state."""
    return stage.hidden_states.float().square().sum(-1).sqrt()


def attention_score(stage: StageInput, window: int = ATTENTION_WINDOW) -> torch.Tensor:
    """Attention of the prompt's last queries in the layer below, as in SnapKV (arXiv 2404.14469).

    Softmax per query, sum over the last `window` queries, max-pooling over 7 neighbours, mean over heads. The layer
    below has its keys in the cache already, so only the window's queries are projected.
    """
    from transformers.models.qwen2.modeling_qwen2 import rotate_half

    from .models.devices import mean_over

    layer, attention, hidden_states_below = stage.layer_below, stage.layer_below.self_attn, stage.hidden_states_below
    assert hidden_states_below is not None, "the prompt's end is not known while it comes in pieces"
    end = stage.hidden_states.shape[1] - stage.keep_last
    window = min(window, end)

    def project(projection: Any, tokens: slice) -> torch.Tensor:
        normed = layer.input_layernorm(hidden_states_below[:, tokens])
        x = projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        cos, sin = (t[:, None, tokens] for t in stage.position_embeddings)
        return x * cos + rotate_half(x) * sin  # type: ignore[no-any-return]

    query = project(attention.q_proj, slice(end - window, end))
    key = project(attention.k_proj, slice(None)) if stage.keys_below is None else stage.keys_below
    # Query heads that share a key head side by side: [B, kv_heads, groups * window, n]. What has this size is touched
    # as few times as can be: the products are few, so the time is that of the memory.
    grouped = (query * attention.scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    logits = (grouped @ key.transpose(-1, -2)).float().unflatten(2, (-1, window)).flatten(1, 2)
    index, window_index = stage.token_index, stage.token_index[:, end - window : end]
    # Before the window every query sees everything but padding. Not -inf: a query that is padding sees nothing, and
    # must not become NaN; it has no say in the sum.
    lowest = torch.finfo(torch.float32).min
    hidden_ahead = index[:, None, end - window :] > window_index[:, :, None]
    logits[..., end - window :].masked_fill_(hidden_ahead[:, None], lowest)
    if stage.is_padded:
        logits.masked_fill_((index < 0)[:, None, None], lowest)
    weight = (window_index >= 0).float()
    per_head = (weight[:, None, None] @ logits.softmax(-1)).squeeze(2)
    return mean_over(_max_pool(per_head, ATTENTION_POOLING).mean(1), stage.group)


def _max_pool(values: torch.Tensor, width: int) -> torch.Tensor:
    """Maximum of each value, none negative, and its `width` - 1 neighbours along the last dimension."""
    # Not F.max_pool1d, which would tie a compiled graph to one length; nor by unfolding, which takes 4 to 7 times as
    # long: the maximum of two maxima reaches twice as far.
    pooled = F.pad(values, (width // 2,) * 2)
    reach = 1
    while reach < width:
        step = min(reach, width - reach)
        pooled = torch.maximum(pooled[..., :-step], pooled[..., step:])
        reach += step
    return pooled


def question_attention(stage: StageInput) -> torch.Tensor:
    """What :meth:`sdtp_kernels.TokenPruner.score_bias` takes: :func:`attention_score` of the last 16 queries."""
    return attention_score(stage, QUESTION_WINDOW)


SCORERS: dict[str, Callable[[StageInput], torch.Tensor]] = {
    "random": random_score,
    "recent": recent_score,
    "norm": norm_score,
    "attention": attention_score,
}
