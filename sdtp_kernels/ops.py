"""The operators: schema, shapes, gradients and the public functions.

``torch.ops.sdtp`` holds seven ops. They are opaque to ``torch.compile``; the backend is chosen inside them. All are
functional, none makes the host wait for an accelerator, and output shapes follow from input shapes, ``num_keep`` and
``num_dropped``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import arguments, backends, reference
from .arguments import PromptTerms, Scoring, Selection, Window, token_dim

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PrunedTokens",
    "gather_tokens",
    "position_attention",
    "prompt_bias",
    "prune_tokens",
    "score_tokens",
    "select_tokens",
    "window_attention",
]

# No defaults: the functions below have them, and pass everything.
_SCORING = (
    "Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? mean_score, int num_scores, Tensor? score_bias, float? rms_eps"
)
_SELECTION = "SymInt num_keep, SymInt sink, SymInt recent, SymInt? block_size, Tensor? rows, int pooling"
_SCHEMAS = (
    f"score_tokens(Tensor hidden_states, {_SCORING}, str backend) -> Tensor",
    f"select_tokens(Tensor scores, {_SELECTION}, str backend) -> Tensor",
    "gather_tokens(Tensor[] tensors, Tensor indices, str backend) -> Tensor[]",
    f"prune_tokens(Tensor hidden_states, Tensor[] tensors, {_SCORING}, {_SELECTION}, SymInt num_dropped, str backend) "
    "-> (Tensor, Tensor[], Tensor, Tensor, Tensor)",
    "window_attention(Tensor query, Tensor key, Tensor query_index, Tensor key_index, Tensor? cos, Tensor? sin, "
    "float scaling, int pooling, str backend) -> Tensor",
    "prompt_bias(Tensor token_index, Tensor distance_table, SymInt keep_last, Tensor? attention, "
    "float attention_weight, Tensor? query, Tensor? key, Tensor? cos, Tensor? sin, float scaling, int pooling, "
    "str backend) -> Tensor",
    "position_attention(Tensor query, Tensor key, Tensor value, Tensor num_visible, Tensor? first_visible, "
    "float? scale, str backend) -> Tensor",
)

# Module-level: a Library takes its definitions with it when it is collected.
_library = torch.library.Library("sdtp", "DEF")
for _schema in _SCHEMAS:
    # needs_exact_strides: Inductor hands over the strides that eager would, so layouts are decided in one place.
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


class PrunedTokens(NamedTuple):
    """Result of :func:`prune_tokens`."""

    hidden_states: torch.Tensor
    """``[B, K, D]``"""
    tensors: list[torch.Tensor]
    """The further tensors, with K tokens each."""
    indices: torch.Tensor
    """``[B, K]`` int64, ascending, -1 where a row has fewer than K tokens."""
    mean_score: torch.Tensor
    """``[B, K]`` float32: mean of the MLP's scores at this stage and those before it. The last `recent` tokens, which
    nothing ranks, have the one that they came with, or 0; so has padding."""
    dropped: torch.Tensor
    """``[B, num_dropped]`` int64: the indices of the tokens that do not go on, ascending, after as many -1 as are
    missing."""


def score_tokens(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    mean_score: torch.Tensor | None = None,
    num_scores: int = 0,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Score every token with the pruner's MLP, SDTP equation (1) in its one-logit form.

    ``score = w2 . GELU(w1 x + b1) + b2`` with the exact (erf) GELU, accumulated in float32. `x` is the hidden state,
    divided by its root mean square where `rms_eps` is given. With `mean_score` the result is the running mean
    ``mean_score + (score - mean_score) / (num_scores + 1)``; `score_bias` is added last.

    Parameters
    ----------
    hidden_states : Tensor [B, N, D]
        float32, bfloat16, float16 (or float64, reference backend only).
    w1 : Tensor [H, D]
        First layer, in the dtype of `hidden_states`; a gain of the RMS norm belongs into it.
    b1, w2 : Tensor [H]
        First bias and second layer, float32 (float64 with float64 hidden states).
    b2 : Tensor []
        Second bias, same dtype as `b1`.
    mean_score : Tensor [B, N], optional
        Mean of the scores of the same tokens at `num_scores` stages before this one, float32.
    num_scores : int, default 0
        0 without `mean_score`.
    score_bias : Tensor [B, N], optional
        Added to the result, float32: what the hidden state does not hold, such as :func:`prompt_bias`.
    rms_eps : float, optional
        Epsilon of the RMS normalisation of `x`; without it `x` is the raw hidden state.
    backend : str, default "auto"
        A name from :func:`explain_backends`; a name never falls back to another backend.

    Returns
    -------
    Tensor [B, N], float32
        Equal across backends up to rounding (bfloat16 backends may round the pre-activation to bfloat16). A token's
        score does not depend on the other tokens or rows of the batch.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit.
    BackendUnavailableError
        If the named backend cannot run on these inputs.

    Examples
    --------
    >>> hidden_states, pruner = torch.randn(2, 100, 64), TokenPruner(64)
    >>> score_tokens(hidden_states, *pruner.weights(), rms_eps=pruner.rms_eps).shape
    torch.Size([2, 100])
    """
    return torch.ops.sdtp.score_tokens.default(  # type: ignore[no-any-return]
        hidden_states, w1, b1, w2, b2, mean_score, num_scores, score_bias, rms_eps, backend
    )


def select_tokens(
    scores: torch.Tensor,
    num_keep: int,
    *,
    sink: int = 0,
    recent: int = 0,
    block_size: int | None = None,
    rows: torch.Tensor | None = None,
    pooling: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """Choose the tokens that go on.

    The last `recent` tokens of a row are kept. The tokens before them form one block, or blocks of `block_size`; every
    block keeps ``(num_keep - recent) / number of blocks`` tokens: first the forced ones (the row's first `sink` tokens
    and, where `block_size` is given, the last token of each block), then the highest scores. Equal scores: the lower
    index wins. NaN ranks below every number, -0 equals +0. With `pooling` a token ranks by the highest score among its
    neighbours in the block, so that what stands together stays together.

    Parameters
    ----------
    scores : Tensor [B, N], float32
    num_keep : int
        Tokens to keep, K. With `rows`, the width of the result: at least the largest count in it.
    sink, recent : int, default 0
        Tokens always kept at the start and at the end of the row.
    block_size : int, optional
        Tokens in a block. ``N - recent`` must be a multiple of it.
    rows : Tensor [B, 3], int64, optional
        For left-padded rows: valid tokens, tokens to keep and trailing tokens always kept, of each row, replacing `N`,
        `num_keep` and `recent`. See :meth:`PruningSchedule.plan_rows`. Values on an accelerator are not checked: the
        host would have to wait for them.
    pooling : int, default 1
        Odd width of the max-pooling, in tokens. It reaches neither into other blocks, nor the last `recent` tokens, nor
        padding; forced tokens take part with their own scores.
    backend : str, default "auto"
        As in :func:`score_tokens`.

    Returns
    -------
    Tensor [B, K], int64
        Columns of `scores`, ascending in each row; a row that keeps fewer than K tokens is left-padded with -1.
        Identical in every bit across backends, and to the row alone.

    Raises
    ------
    ValueError
        If `num_keep` exceeds N or is less than the forced tokens, or shapes, dtypes or devices do not fit.
    BackendUnavailableError
        If the named backend cannot run on these inputs.

    Examples
    --------
    >>> select_tokens(torch.tensor([[0.1, 0.9, 0.3, 0.8]]), 3, sink=1)
    tensor([[0, 1, 3]])
    """
    return torch.ops.sdtp.select_tokens.default(  # type: ignore[no-any-return]
        scores, num_keep, sink, recent, block_size, rows, pooling, backend
    )


def gather_tokens(
    tensors: Sequence[torch.Tensor], indices: torch.Tensor, *, backend: str = "auto"
) -> list[torch.Tensor]:
    """Copy the chosen tokens of any number of tensors.

    Parameters
    ----------
    tensors : sequence of Tensor
        Any dtype; tokens are dimension 1 of ``[B, N]`` and ``[B, N, D]`` and dimension 2 of ``[B, heads, N, D]``.
    indices : Tensor [B, K], int64
        Tokens to copy, each in ``[-1, N)``; -1 gives zeros. Values on an accelerator are not checked.
    backend : str, default "auto"
        As in :func:`score_tokens`.

    Returns
    -------
    list of Tensor
        Contiguous, with K instead of N; identical in every bit across backends. Differentiable: the gradient is
        scattered back to the copied rows.

    Raises
    ------
    ValueError
        If shapes or devices do not fit.
    BackendUnavailableError
        If the named backend cannot run on these inputs.

    Examples
    --------
    >>> gather_tokens([torch.arange(4)[None]], torch.tensor([[0, 1, 3]]))
    [tensor([[0, 1, 3]])]
    """
    return torch.ops.sdtp.gather_tokens.default(list(tensors), indices, backend)  # type: ignore[no-any-return]


def prune_tokens(
    hidden_states: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    num_keep: int,
    *,
    sink: int = 0,
    recent: int = 0,
    block_size: int | None = None,
    rows: torch.Tensor | None = None,
    pooling: int = 1,
    mean_score: torch.Tensor | None = None,
    num_scores: int = 0,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
    num_dropped: int = 0,
    backend: str = "auto",
) -> PrunedTokens:
    """A stage in one call: score, select and gather.

    Equal to :func:`score_tokens`, :func:`select_tokens` and :func:`gather_tokens` in turn on the same backend.
    Parameters are those of the three. `tensors` are gathered like `hidden_states` (position embeddings, keys and
    values).

    Parameters
    ----------
    num_dropped : int, default 0
        Width of the result's `dropped`: at least the tokens that any row drops, or 0 where nobody asks for them.
        Where `rows` stand on an accelerator and one drops more, its first ones are missing.

    Returns
    -------
    PrunedTokens

    Raises
    ------
    ValueError, BackendUnavailableError
        As the three functions, and where `num_dropped` is too small.
    RuntimeError
        If gradients of the pruner, of `mean_score` or of `score_bias` are asked for: a hard selection has none. Pass
        detached weights, or train through :meth:`TokenPruner.forward`.

    Examples
    --------
    >>> hidden_states, position_ids = torch.randn(2, 100, 64), torch.arange(100).expand(2, -1)
    >>> pruned = prune_tokens(
    ...     hidden_states, [position_ids], *TokenPruner(64).weights(), 90, sink=4, recent=10, num_dropped=10
    ... )
    >>> pruned.hidden_states.shape, pruned.tensors[0].shape, pruned.dropped.shape
    (torch.Size([2, 90, 64]), torch.Size([2, 90]), torch.Size([2, 10]))
    """
    return PrunedTokens(
        *torch.ops.sdtp.prune_tokens.default(
            hidden_states, list(tensors), w1, b1, w2, b2, mean_score, num_scores, score_bias, rms_eps,
            num_keep, sink, recent, block_size, rows, pooling, num_dropped, backend,
        )
    )  # fmt: skip


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    key_index: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    scaling: float,
    pooling: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """The attention that a window of queries pays each key, SnapKV's measure (arXiv 2404.14469).

    Softmax per query over the keys that it sees, sum over the queries, max-pooling per head, mean over the heads. A key
    is seen where ``0 <= key_index <= query_index``. A query that sees none has no say.

    Parameters
    ----------
    query : Tensor [B, H, w, d]
        Not scaled. float32, bfloat16, float16 (or float64, reference backend only).
    key : Tensor [B, KV, n, d]
        In the dtype of `query`; each of the KV heads serves H / KV query heads, in order.
    query_index : Tensor [B, w], int64
    key_index : Tensor [B, n], int64
        Positions in the row's own text; negative for padding.
    cos, sin : Tensor [B or 1, w, d], optional
        Rotary embeddings of the queries' positions, in their dtype: the queries are rotated first, in halves of the
        head as in Llama and Qwen2. Without them they are rotated already.
    scaling : float
        Factor of the logits.
    pooling : int, default 1
        Odd width of the max-pooling, in keys.
    backend : str, default "auto"
        As in :func:`score_tokens`.

    Returns
    -------
    Tensor [B, n], float32
        Equal across backends up to rounding (of 16-bit inputs, some round the logits to 16 bits). On a CPU a row's
        result does not depend on the other rows of the batch, nor on padding before it, to the last bit. It has
        no gradient.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit.
    BackendUnavailableError
        If the named backend cannot run on these inputs.

    Examples
    --------
    >>> query, key, index = torch.randn(1, 4, 16, 8), torch.randn(1, 2, 100, 8), torch.arange(100)[None]
    >>> cos, sin = torch.ones(1, 16, 8), torch.zeros(1, 16, 8)
    >>> window_attention(query, key, index[:, -16:], index, cos=cos, sin=sin, scaling=8**-0.5).shape
    torch.Size([1, 100])
    """
    return torch.ops.sdtp.window_attention.default(  # type: ignore[no-any-return]
        query, key, query_index, key_index, cos, sin, scaling, pooling, backend
    )


def prompt_bias(
    token_index: torch.Tensor,
    distance_table: torch.Tensor,
    *,
    keep_last: int = 0,
    attention: torch.Tensor | None = None,
    attention_weight: float = 0.0,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    scaling: float = 1.0,
    pooling: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    """What a token's score owes to its place in the prompt: the `score_bias` of the other ops.

    ``distance_table[distance] + attention_weight * z(log(attention + 1e-9))``, where the distance is that to the
    prompt's last token, and z gives each row mean 0 and standard deviation 1 over its valid tokens: those that are
    neither padding nor after the prompt. The others have 0.

    Parameters
    ----------
    token_index : Tensor [B, N], int64
        Positions in the row's own prompt; negative for padding.
    distance_table : Tensor [M] or [B, M], float32
        The term of every distance below M, not empty, for all rows or by row; what is farther counts as M - 1.
    keep_last : int, default 0
        Tokens that stand after the prompt.
    attention : Tensor [B, N], float32, optional
        Last-window attention, not negative, where :func:`window_attention` is not to be computed here.
    attention_weight : float, default 0
    query : Tensor [B, H, w, d], optional
        Of the last `w` tokens of the prompt: the attention is :func:`window_attention` of these.
    key : Tensor [B, KV, N, d]
        With `query`.
    cos, sin : Tensor [B or 1, N, d], optional
        Rotary embeddings of all tokens, where the queries are not rotated yet.
    scaling, pooling
        As in :func:`window_attention`.
    backend : str, default "auto"
        As in :func:`score_tokens`.

    Returns
    -------
    Tensor [B, N], float32
        Equal across backends up to rounding; on a CPU a row's result does not depend on other rows or on padding, to
        the last bit. It has no gradient.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit.
    BackendUnavailableError
        If the named backend cannot run on these inputs.

    Examples
    --------
    >>> prompt_bias(torch.arange(4)[None], torch.tensor([0.0, -1.0, -2.0]))
    tensor([[-2., -2., -1.,  0.]])
    """
    return torch.ops.sdtp.prompt_bias.default(  # type: ignore[no-any-return]
        token_index, distance_table, keep_last, attention, attention_weight, query, key, cos, sin, scaling, pooling,
        backend,
    )  # fmt: skip


def position_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of some tokens to the whole prompt, causal by position.

    Only the kept tokens have queries, every token has a key and a value. Query `i` of row `b` attends to the keys
    ``first_visible[b]`` to ``num_visible[b, i] - 1``; the token in column `c` has ``num_visible`` ``c + 1``. A query
    that sees no key gives zeros.

    Parameters
    ----------
    query : Tensor [B, H, n, d]
        float32, bfloat16, float16 (or float64, reference backend only).
    key, value : Tensor [B, KV, N, d]
        In the dtype of `query`; each of the KV heads serves H / KV query heads, in order. Finite throughout, also where
        no query sees them: room of a static cache must not hold NaN.
    num_visible : Tensor [B, n], int64
        End of the keys that each query sees, from 0 to N. Ascending, as kept tokens stand; other orders are right too,
        but take longer. Less than 0 counts as 0, more than N as N.
    first_visible : Tensor [B], int64, optional
        First key that the row's queries see, that is the padding of a left-padded row; 0 by default.
    scale : float, optional
        Factor of the logits, ``d ** -0.5`` by default.
    backend : str, default "auto"
        As in :func:`score_tokens`.

    Returns
    -------
    Tensor [B, H, n, d]
        In the dtype and memory layout of `query`. The softmax is in float32. Equal across backends up to rounding, and
        so is each row in a batch to the row alone. Differentiable in `query`, `key` and `value`; the backward pass
        computes the weights again and holds ``B * H * n * N`` of them.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit.
    BackendUnavailableError
        If the named backend cannot run on these inputs.

    Examples
    --------
    >>> kept = torch.tensor([[0, 3, 7]])
    >>> query, key, value = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    >>> attended = position_attention(query, key, value, kept + 1)
    >>> torch.allclose(attended[:, :, 0], value[:, :, 0].repeat_interleave(2, dim=1))
    True
    """
    return torch.ops.sdtp.position_attention.default(  # type: ignore[no-any-return]
        query, key, value, num_visible, first_visible, scale, backend
    )


# ----------------------------------------------------------------------------------------------- implementations


def _score(hidden_states: torch.Tensor, *flat: Any) -> torch.Tensor:
    *fields, backend = flat
    scoring = Scoring(*fields)
    arguments.check_scoring(hidden_states, scoring)
    return backends.choose(backend, hidden_states.device, hidden_states.dtype).score_tokens(hidden_states, scoring)


def _select(scores: torch.Tensor, *flat: Any) -> torch.Tensor:
    *fields, backend = flat
    selection = Selection(*fields)
    arguments.check_scores(scores)
    arguments.check_selection(scores.shape, scores.device, selection)
    return backends.choose(backend, scores.device).select_tokens(scores, selection)


def _gather(tensors: list[torch.Tensor], indices: torch.Tensor, backend: str) -> list[torch.Tensor]:
    arguments.check_gather(tensors, indices)
    return backends.choose(backend, indices.device).gather_tokens(tensors, indices)


def _prune(
    hidden_states: torch.Tensor, tensors: list[torch.Tensor], *flat: Any
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    *fields, num_dropped, backend = flat
    scoring, selection = Scoring(*fields[: len(Scoring._fields)]), Selection(*fields[len(Scoring._fields) :])
    arguments.check_scoring(hidden_states, scoring)
    arguments.check_selection(hidden_states.shape[:2], hidden_states.device, selection)
    arguments.check_dropped(hidden_states.shape[1], selection, num_dropped)
    arguments.check_carried(tensors, hidden_states)
    chosen = backends.choose(backend, hidden_states.device, hidden_states.dtype)
    return chosen.prune_tokens(hidden_states, tensors, scoring, selection, num_dropped)


def _window(*flat: Any) -> torch.Tensor:
    *fields, backend = flat
    window = Window(*fields)
    arguments.check_window(window)
    with torch.no_grad():
        return backends.choose(backend, window.query.device, window.query.dtype).window_attention(window)


def _bias(*flat: Any) -> torch.Tensor:
    *fields, backend = flat
    terms = PromptTerms(*fields)
    arguments.check_terms(terms)
    dtype = None if terms.query is None else terms.query.dtype
    with torch.no_grad():
        return backends.choose(backend, terms.token_index.device, dtype).prompt_bias(terms)


def _position(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None,
    scale: float | None,
    backend: str,
) -> torch.Tensor:
    arguments.check_position(query, key, value, num_visible, first_visible)
    chosen = backends.choose(backend, query.device, query.dtype)
    return chosen.position_attention(query, key, value, num_visible, first_visible, scale)


for _name, _implementation in (
    ("score_tokens", _score),
    ("select_tokens", _select),
    ("gather_tokens", _gather),
    ("prune_tokens", _prune),
    ("window_attention", _window),
    ("prompt_bias", _bias),
    ("position_attention", _position),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


# --------------------------------------------------------------------------------- shapes, for tracing and export


@torch.library.register_fake("sdtp::score_tokens", lib=_library)
def _score_fake(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape[:2], dtype=torch.float32)


@torch.library.register_fake("sdtp::select_tokens", lib=_library)
def _select_fake(scores: torch.Tensor, num_keep: int, *_: Any) -> torch.Tensor:
    return scores.new_empty((scores.shape[0], num_keep), dtype=torch.int64)


@torch.library.register_fake("sdtp::gather_tokens", lib=_library)
def _gather_fake(tensors: list[torch.Tensor], indices: torch.Tensor, *_: Any) -> list[torch.Tensor]:
    return [_empty_rows(tensor, indices.shape[1]) for tensor in tensors]


@torch.library.register_fake("sdtp::prune_tokens", lib=_library)
def _prune_fake(
    hidden_states: torch.Tensor, tensors: list[torch.Tensor], *flat: Any
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, num_keep, num_dropped = hidden_states.shape[0], flat[len(Scoring._fields)], flat[-2]
    return (
        _empty_rows(hidden_states, num_keep),
        [_empty_rows(tensor, num_keep) for tensor in tensors],
        hidden_states.new_empty((batch, num_keep), dtype=torch.int64),
        hidden_states.new_empty((batch, num_keep), dtype=torch.float32),
        hidden_states.new_empty((batch, num_dropped), dtype=torch.int64),
    )


@torch.library.register_fake("sdtp::window_attention", lib=_library)
def _window_fake(query: torch.Tensor, key: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@torch.library.register_fake("sdtp::prompt_bias", lib=_library)
def _bias_fake(token_index: torch.Tensor, *_: Any) -> torch.Tensor:
    return token_index.new_empty(token_index.shape, dtype=torch.float32)


@torch.library.register_fake("sdtp::position_attention", lib=_library)
def _position_fake(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


def _empty_rows(tensor: torch.Tensor, num_tokens: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[token_dim(tensor)] = num_tokens
    return tensor.new_empty(shape)


# ----------------------------------------------------------------------------------------------------- gradients


def _score_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    hidden_states, *fields, _ = inputs
    scoring = Scoring(*fields)
    ctx.num_scores, ctx.rms_eps = scoring.num_scores, scoring.rms_eps
    ctx.save_for_backward(hidden_states, *scoring[:5], scoring.score_bias)


def _score_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Recomputed through the oracle: nothing of the size [N, H] is kept between forward and backward.
    needed = [*ctx.needs_input_grad[:6], ctx.needs_input_grad[7]]
    with torch.enable_grad():
        inputs: list[Any] = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        hidden_states, w1, b1, w2, b2, mean_score, score_bias = inputs
        scoring = Scoring(w1, b1, w2, b2, mean_score, ctx.num_scores, score_bias, ctx.rms_eps)
        scores = reference.score_tokens(hidden_states, scoring)
        wanted = [t for t, is_needed in zip(inputs, needed, strict=True) if t is not None and is_needed]
        found = iter(torch.autograd.grad(scores, wanted, grad))
    grads = [next(found) if t is not None and is_needed else None for t, is_needed in zip(inputs, needed, strict=True)]
    return *grads[:6], None, grads[6], None, None


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, indices, _ = inputs
    ctx.shapes = [tensor.shape for tensor in tensors]
    ctx.save_for_backward(indices)


def _gather_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    scattered = [_scatter_rows(g, indices, shape) for g, shape in zip(grads, ctx.shapes, strict=True)]
    return scattered, None, None


def _scatter_rows(grad: torch.Tensor | None, indices: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    if grad is None or not grad.is_floating_point():
        return None
    dim = max(1, len(shape) - 2)
    rows = indices.view(*[indices.shape[0], 1][:dim], -1, *[1] * (len(shape) - dim - 1))
    grad = grad.masked_fill(rows < 0, 0)
    return grad.new_zeros(shape).scatter_add(dim, rows.clamp(min=0).expand(grad.shape), grad)


def _prune_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden_states, tensors, *flat = inputs
    scoring = Scoring(*flat[: len(Scoring._fields)])
    for name, value in scoring._asdict().items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            raise RuntimeError(
                f"prune_tokens has no gradient for {name}: a hard selection is not differentiable. Pass detached "
                "weights (TokenPruner.weights() are), or train through TokenPruner.forward"
            )
    ctx.shapes = [hidden_states.shape, *(tensor.shape for tensor in tensors)]
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(output[2])


def _prune_backward(
    ctx: Any,
    grad: torch.Tensor | None,
    grads: list[torch.Tensor | None],
    _indices_grad: None,
    _mean_score_grad: None,
    _dropped_grad: None,
) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    first, *others = (_scatter_rows(g, indices, shape) for g, shape in zip([grad, *grads], ctx.shapes, strict=True))
    return first, others, *[None] * (ctx.num_inputs - 2)


def _position_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _position_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    # Recomputed through the oracle, as the score is.
    *attended, num_visible, first_visible = ctx.saved_tensors
    with torch.enable_grad():
        query, key, value = inputs = [tensor.detach().requires_grad_() for tensor in attended]
        output = reference.position_attention(query, key, value, num_visible, first_visible, ctx.scale)
        grads = torch.autograd.grad(output, inputs, grad)
    return *grads, None, None, None, None


torch.library.register_autograd("sdtp::score_tokens", _score_backward, setup_context=_score_setup, lib=_library)
torch.library.register_autograd("sdtp::gather_tokens", _gather_backward, setup_context=_gather_setup, lib=_library)
torch.library.register_autograd("sdtp::prune_tokens", _prune_backward, setup_context=_prune_setup, lib=_library)
torch.library.register_autograd(
    "sdtp::position_attention", _position_backward, setup_context=_position_setup, lib=_library
)
# These have no gradient: autograd passes them by, at no cost. Int64 output says so by itself; the implementations of
# the others see to it.
_library.impl("select_tokens", torch.library.fallthrough_kernel, "Autograd")
_library.impl("window_attention", torch.library.fallthrough_kernel, "Autograd")
_library.impl("prompt_bias", torch.library.fallthrough_kernel, "Autograd")
