"""Training-free scorers: the baselines that a learned pruner has to beat.

A scorer is a function of a :class:`StageInput` that returns one score per token. It plugs in where a
:class:`~sdtp_kernels.TokenPruner` does, so every method runs through the same patch, selection and cache.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import ops
from .reference import rotate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

    from .lexical import PromptTokens

ATTENTION_WINDOW = 32  # SnapKV's window of last queries
QUESTION_WINDOW = 16  # that of a pruner's attention term: sharper on what is asked for
ATTENTION_POOLING = 7  # and its max-pooling width, so that a hit keeps its neighbours
# Of a term from 0 to 1 next to one with standard deviation 1, chosen from 1 to 16: see docs/notes/predicted-quality.md.
LEXICAL_WEIGHT = 8.0


class StageInput(NamedTuple):
    """What a scorer may look at: the input of the decoder layer after the stage, and the layer below."""

    hidden_states: torch.Tensor
    """``[B, n, D]``"""
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    """cos and sin of the tokens' original positions, ``[1 or B, n, head_dim]``."""
    token_index: torch.Tensor
    """``[B, n]`` index in the row's own prompt, negative for padding."""
    keep_last: int
    """Tokens after the prompt, which are kept at any score."""
    layer_below: Any
    """The decoder layer that has just run, on the same tokens."""
    hidden_states_below: torch.Tensor | None
    """Its input, ``[B, n, D]``; ``None`` where deferred tokens joined (see :func:`block_local`)."""
    queries_below: torch.Tensor | None = None
    """The queries of the prompt's last `w` tokens in the layer below, before rotation, ``[B, w, heads * head_dim]`` or
    ``[B, w, heads, head_dim]``. ``None`` in compiled code, and where deferred tokens joined."""
    keys_below: torch.Tensor | None = None
    """The keys that the layer below cached, ``[B, kv_heads, n, head_dim]``. ``None`` without a cache, and where
    deferred tokens joined."""
    prompt: PromptTokens | None = None
    """Token ids of the whole prompt. ``None`` where it was passed as embeddings, or comes in chunks."""
    group: ProcessGroup | None = None
    """The processes that share the model's heads; each sees all tokens. ``None`` for one process alone."""
    backend: str = "auto"
    """Who runs the ops that a scorer calls."""


def block_local(scorer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Declare that a scorer ranks the tokens of a block by nothing after the block.

    Under the block budget a prompt may then come in chunks. A chunk is scored together with deferred tokens, so
    ``hidden_states_below`` and ``keys_below`` can be None.

    Parameters
    ----------
    scorer : callable
        A function of a :class:`StageInput`.

    Returns
    -------
    callable
        The same function.
    """
    return declare(scorer, is_block_local=True)


def declare(scorer: Callable[..., torch.Tensor], **properties: Any) -> Callable[..., torch.Tensor]:
    """Say of a scorer's function what a stage has to know, by the fields of ``models.scoring.Plain``."""
    scorer.sdtp_scorer = {**declared(scorer), **properties}  # type: ignore[attr-defined]
    return scorer


def declared(scorer: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """What was said of a scorer. Bound to other arguments it is what it was."""
    inner = declared(scorer.func) if isinstance(scorer, functools.partial) else {}
    return inner | getattr(scorer, "sdtp_scorer", {})


@block_local
def random_score(stage: StageInput, seed: int = 0) -> torch.Tensor:
    """A fixed pseudo-random number per token index: the same in every stage, row and run."""
    x = stage.token_index + (seed + 1) * 0x9E3779B9
    for _ in range(2):  # a multiply-xorshift hash on 31 bits, which stays exact in int64
        x = ((x ^ (x >> 16)) & 0x7FFFFFFF) * 0x45D9F3B
    return ((x >> 8) & 0xFFFFFF).float()


@block_local
def recent_score(stage: StageInput) -> torch.Tensor:
    """The later the token, the higher: the sink and the end of the prompt remain (StreamingLLM, stage by stage)."""
    return stage.token_index.float()


@block_local
def norm_score(stage: StageInput) -> torch.Tensor:
    """L2 norm of the hidden state."""
    return stage.hidden_states.float().square().sum(-1).sqrt()


def window_of(stage: StageInput, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of the prompt's last tokens in the layer below, and its keys.

    The layer has projected both already: its keys are in the cache, its last queries were taken on the way.

    Returns
    -------
    query : Tensor [B, heads, w, head_dim]
        Not rotated yet; of `window` tokens, or as many as the prompt has.
    key : Tensor [B, kv_heads, n, head_dim]
        Rotated.
    """
    from .models.family import by_head, family_of

    layer, hidden_states_below, taken, key = (
        stage.layer_below, stage.hidden_states_below, stage.queries_below, stage.keys_below,
    )  # fmt: skip
    assert hidden_states_below is not None, "the prompt's end is not known while it comes in chunks"
    family, end = family_of(layer), stage.hidden_states.shape[1] - stage.keep_last
    window = min(window, end)
    if taken is None or taken.shape[1] < window:
        query = family.queries(layer, hidden_states_below[:, end - window : end])
    else:
        query = by_head(taken[:, taken.shape[1] - window :], layer.self_attn.head_dim)
    if key is None:
        key = rotate(family.keys(layer, hidden_states_below), *stage.position_embeddings)
    return query, key


def attention_score(stage: StageInput, window: int = ATTENTION_WINDOW) -> torch.Tensor:
    """Attention of the prompt's last queries in the layer below, as in SnapKV (arXiv 2404.14469).

    Softmax for each query, sum over the last `window` queries, maximum over 7 neighbours, mean over heads.
    """
    from .models.devices import mean_over

    query, key = window_of(stage, window)
    query = query.to(key.dtype)  # under autocast the cache may have another dtype
    end = stage.hidden_states.shape[1] - stage.keep_last
    last = slice(end - query.shape[2], end)
    index, (cos, sin) = stage.token_index, (t[:, last].to(key.dtype) for t in stage.position_embeddings)
    scores = ops.window_attention(
        query, key, index[:, last], index,
        cos=cos, sin=sin, scaling=stage.layer_below.self_attn.scaling, pooling=ATTENTION_POOLING, backend=stage.backend,
    )  # fmt: skip
    return mean_over(scores, stage.group)


def question_attention(stage: StageInput) -> torch.Tensor:
    """What :meth:`sdtp_kernels.TokenPruner.score_bias` takes: :func:`attention_score` of the last 16 queries."""
    return attention_score(stage, QUESTION_WINDOW)


def lexical_score(stage: StageInput) -> torch.Tensor:
    """Words around a token that the prompt's last tokens repeat (:func:`~sdtp_kernels.lexical.lexical_overlap`).

    Raises
    ------
    ValueError
        If the prompt was passed as embeddings, or comes in chunks.
    """
    if stage.prompt is None:
        raise ValueError("the lexical scorer reads token ids: pass input_ids, and the prompt in one call")
    return stage.prompt.overlap_at(stage.token_index, stage.keep_last)


def prompt_end_bias(stage: StageInput, table: torch.Tensor, attention_weight: float) -> torch.Tensor:
    """What scores owe to the prompt's end, ``[B, n]`` float32: a table by distance to it, and its attention.

    Parameters
    ----------
    stage : StageInput
    table : Tensor [M] or [B, M], float32
        By distance to the prompt's last token.
    attention_weight : float
        Of :func:`question_attention`'s standardised logarithm.
    """
    attention: dict[str, Any]
    if stage.group is not None:  # a process has some of the heads only
        attention = {"attention": question_attention(stage)}
    else:
        # One dtype for the op: under autocast a layer's queries and keys have another than its input.
        query, key, cos, sin = (
            t.to(stage.hidden_states.dtype) for t in (*window_of(stage, QUESTION_WINDOW), *stage.position_embeddings)
        )
        attention = {"query": query, "key": key, "cos": cos, "sin": sin}
        attention |= {"scaling": stage.layer_below.self_attn.scaling, "pooling": ATTENTION_POOLING}
    return ops.prompt_bias(
        stage.token_index, table, keep_last=stage.keep_last, attention_weight=attention_weight, backend=stage.backend,
        **attention,
    )  # fmt: skip


def question_score(stage: StageInput) -> torch.Tensor:
    """What the prompt's last tokens attend to, and the words that they repeat.

    The attention and lexical terms of a :class:`~sdtp_kernels.TokenPruner`, with the weights that training begins with,
    and no MLP. Of a prompt of embeddings, the attention alone. A stage ranks a token by the highest score among 7.
    """
    if stage.prompt is None:
        table = stage.hidden_states.new_zeros(1, dtype=torch.float32)
    else:
        table = LEXICAL_WEIGHT * stage.prompt.overlap_by_distance(stage.hidden_states.device)
    return prompt_end_bias(stage, table, 1.0)


declare(question_score, is_lexical=True, pooling=ATTENTION_POOLING)  # unpooled, single digits of a number are lost

SCORERS: dict[str, Callable[[StageInput], torch.Tensor]] = {
    "random": random_score,
    "recent": recent_score,
    "norm": norm_score,
    "attention": attention_score,
    "lexical": lexical_score,
    "question": question_score,
}
