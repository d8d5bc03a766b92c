"""The operators: schema, shapes, gradients and the public functions.

``torch.ops.sdtp`` holds seven ops. They are opaque to ``torch.compile``; the backend is chosen inside them. All are
functional, none makes the host wait for an accelerator, and output shapes follow from input shapes and ``num_keep``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import backends, reference
from .reference import token_dim

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "PromptScores",
    "PrunedTokens",
    "gather_tokens",
    "position_attention",
    "prune_tokens",
    "score_prompt",
    "score_tokens",
    "select_tokens",
    "window_attention",
]

_PRUNER = "Tensor w1, Tensor b1, Tensor w2, Tensor b2"
_SELECTION = (
    "SymInt num_keep, SymInt sink=0, SymInt recent=0, SymInt? block_size=None, Tensor? rows=None, int pooling=1"
)
_SCORING = "Tensor? score_bias=None, float? rms_eps=None"
_SCHEMAS = (
    f'score_tokens(Tensor hidden_states, {_PRUNER}, {_SCORING}, str backend="auto") -> Tensor',
    f'select_tokens(Tensor scores, {_SELECTION}, str backend="auto") -> Tensor',
    'gather_tokens(Tensor[] tensors, Tensor indices, str backend="auto") -> Tensor[]',
    f"prune_tokens(Tensor hidden_states, Tensor[] tensors, {_PRUNER}, {_SELECTION}, {_SCORING}, "
    'str backend="auto") -> (Tensor, Tensor[], Tensor)',
    "window_attention(Tensor query, Tensor key, Tensor query_index, Tensor key_index, Tensor? cos, Tensor? sin, "
    'float scaling, int pooling=1, str backend="auto") -> Tensor',
    f"score_prompt(Tensor hidden_states, {_PRUNER}, float? rms_eps, Tensor token_index, SymInt keep_last, "
    "Tensor distance_table, Tensor? mean_score=None, int num_scores=0, Tensor? attention=None, "
    "float attention_weight=0., Tensor? query=None, Tensor? key=None, Tensor? cos=None, Tensor? sin=None, "
    'float scaling=1., int pooling=1, str backend="auto") -> (Tensor, Tensor)',
    "position_attention(Tensor query, Tensor key, Tensor value, Tensor num_visible, Tensor? first_visible=None, "
    'float? scale=None, str backend="auto") -> Tensor',
)

# Module-level: a Library takes its definitions with it when it is collected.
_library = torch.library.Library("sdtp", "DEF")
for _schema in _SCHEMAS:
    # needs_exact_strides: Inductor hands over the strides that eager would, so layouts are decided in one place.
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PrunedTokens(NamedTuple):
    """Result of :func:`prune_tokens`."""

    hidden_states: torch.Tensor
    """``[B, K, D]``"""
    tensors: list[torch.Tensor]
    """The further tensors, with K tokens each."""
    indices: torch.Tensor
    """``[B, K]`` int64, ascending, -1 where a row has fewer than K tokens."""


class PromptScores(NamedTuple):
    """Result of :func:`score_prompt`, which has an example."""

    scores: torch.Tensor
    """``[B, n]`` float32, what tokens are ranked by."""
    mean_score: torch.Tensor
    """``[B, n]`` float32, of the MLP alone, this stage included."""


def score_tokens(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Score every token with the pruner's MLP, SDTP equation (1) in its one-logit form.

    ``score = w2 . GELU(w1 x + b1) + b2 (+ score_bias)`` with the exact (erf) GELU, accumulated in float32. `x` is the
    hidden state, divided by its root mean square where `rms_eps` is given.

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
    score_bias : Tensor [B, N], optional
        Added to the scores, float32: what the hidden state does not hold, such as a last-window attention term.
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
        hidden_states, w1, b1, w2, b2, score_bias, rms_eps, backend
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
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
    backend: str = "auto",
) -> PrunedTokens:
    """Score, select and gather in one call; equal to :func:`score_tokens`, :func:`select_tokens`,
    :func:`gather_tokens` in turn on the same backend.

    Parameters are those of the three. `tensors` are gathered like `hidden_states` (position embeddings, keys and
    values).

    Returns
    -------
    PrunedTokens

    Raises
    ------
    ValueError, BackendUnavailableError
        As the three functions.
    RuntimeError
        If gradients of the pruner or of `score_bias` are asked for: a hard selection has none. Pass detached weights,
        or train through :meth:`TokenPruner.forward`.

    Examples
    --------
    >>> hidden_states, position_ids = torch.randn(2, 100, 64), torch.arange(100).expand(2, -1)
    >>> pruned = prune_tokens(hidden_states, [position_ids], *TokenPruner(64).weights(), 90, sink=4, recent=10)
    >>> pruned.hidden_states.shape, pruned.tensors[0].shape
    (torch.Size([2, 90, 64]), torch.Size([2, 90]))
    """
    return PrunedTokens(
        *torch.ops.sdtp.prune_tokens.default(
            hidden_states, list(tensors), w1, b1, w2, b2,
            num_keep, sink, recent, block_size, rows, pooling, score_bias, rms_eps, backend,
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


def score_prompt(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    token_index: torch.Tensor,
    distance_table: torch.Tensor,
    *,
    keep_last: int = 0,
    mean_score: torch.Tensor | None = None,
    num_scores: int = 0,
    attention: torch.Tensor | None = None,
    attention_weight: float = 0.0,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    scaling: float = 1.0,
    pooling: int = 1,
    rms_eps: float | None = None,
    backend: str = "auto",
) -> PromptScores:
    """All that a pruner makes of a prompt in one call: :func:`score_tokens`, and what the hidden states do not hold.

    ``mean of the MLP's scores + distance_table[distance] + attention_weight * z(log(attention + 1e-9))``, where the
    distance is that to the prompt's last token, and z gives each row mean 0 and standard deviation 1 over its valid
    tokens: those that are neither padding nor after the prompt. Others have their mean score alone.

    Parameters
    ----------
    hidden_states, w1, b1, w2, b2, rms_eps
        As in :func:`score_tokens`.
    token_index : Tensor [B, n], int64
        Positions in the row's own prompt; negative for padding.
    distance_table : Tensor [M], float32
        The distance term of every distance below M, not empty; what is farther counts as M - 1.
    keep_last : int, default 0
        Tokens that stand after the prompt.
    mean_score : Tensor [B, n], float32, optional
        Mean of the MLP's scores at `num_scores` stages before this one, to be averaged with its own.
    num_scores : int, default 0
    attention : Tensor [B, n], float32, optional
        Last-window attention, not negative, where :func:`window_attention` is not to be computed here.
    attention_weight : float, default 0
    query : Tensor [B, H, w, d], optional
        Of the last `w` tokens of the prompt: the attention is :func:`window_attention` of these.
    key : Tensor [B, KV, n, d]
        With `query`.
    cos, sin : Tensor [B or 1, n, d], optional
        Rotary embeddings of all tokens, where the queries are not rotated yet.
    scaling, pooling
        As in :func:`window_attention`.
    backend : str, default "auto"
        As in :func:`score_tokens`.

    Returns
    -------
    PromptScores
        Equal across backends up to rounding; on a CPU a row's scores do not depend on other rows or on padding, to the
        last bit. They have no gradient.

    Raises
    ------
    ValueError
        If shapes, dtypes or devices do not fit.
    BackendUnavailableError
        If the named backend cannot run on these inputs.

    Examples
    --------
    >>> hidden_states, token_index = torch.randn(2, 100, 64), torch.arange(100).expand(2, -1)
    >>> found = score_prompt(hidden_states, *TokenPruner(64).weights(), token_index, torch.zeros(1))
    >>> torch.equal(found.scores, found.mean_score)
    True
    """
    return PromptScores(
        *torch.ops.sdtp.score_prompt.default(
            hidden_states, w1, b1, w2, b2, rms_eps, token_index, keep_last, distance_table, mean_score, num_scores,
            attention, attention_weight, query, key, cos, sin, scaling, pooling, backend,
        )
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


# ---------------------------------------------------------------------------------------------- argument checks
# Messages are put together where a check fails, and nowhere else: they take longer than many a call.


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _check_pruner(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    score_bias: torch.Tensor | None,
) -> None:
    if not (hidden_states.dim() == 3 and hidden_states.dtype in _FLOATS):
        raise ValueError(f"hidden_states: expected [B, N, D] of a floating dtype, got {_describe(hidden_states)}")
    hidden_size = hidden_states.shape[2]
    if not (w1.dim() == 2 and w1.shape[1] == hidden_size and w1.dtype == hidden_states.dtype):
        raise ValueError(
            f"w1: expected [H, {hidden_size}] in the dtype of hidden_states, {hidden_states.dtype}, got "
            f"{_describe(w1)}; TokenPruner.weights(dtype) casts it"
        )
    wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    for name, tensor, shape in (("b1", b1, [w1.shape[0]]), ("w2", w2, [w1.shape[0]]), ("b2", b2, [])):
        if not (list(tensor.shape) == shape and tensor.dtype == wide):
            raise ValueError(f"{name}: expected {shape} {wide}, got {_describe(tensor)}")
    tensors = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    if score_bias is not None:
        shape = list(hidden_states.shape[:2])
        if not (list(score_bias.shape) == shape and score_bias.dtype == torch.float32):
            raise ValueError(f"score_bias: expected {shape} torch.float32, got {_describe(score_bias)}")
        tensors["score_bias"] = score_bias
    for name, tensor in tensors.items():
        if tensor.device != hidden_states.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_states on {hidden_states.device}: move one of them")


def _check_pooling(pooling: int) -> None:
    if pooling < 1 or pooling % 2 == 0:
        raise ValueError(
            f"pooling={pooling}: expected an odd number of tokens, or 1 for none: a token and as many on either side"
        )


def _check_selection(
    shape: torch.Size,
    device: torch.device,
    num_keep: int,
    sink: int,
    recent: int,
    block_size: int | None,
    rows: torch.Tensor | None,
    pooling: int,
) -> None:
    batch, length = shape[0], shape[1]
    _check_pooling(pooling)
    if not (min(sink, recent) >= 0 and (block_size is None or block_size >= 1)):
        raise ValueError(
            f"sink={sink}, recent={recent}, block_size={block_size}: expected counts >= 0, blocks of at least one token"
        )
    if not 0 <= num_keep <= length:
        raise ValueError(f"num_keep={num_keep}: expected 0 to {length}, the number of tokens")
    if rows is not None:
        if not (list(rows.shape) == [batch, 3] and rows.dtype == torch.int64 and rows.device == device):
            raise ValueError(f"rows: expected [{batch}, 3] torch.int64 on {device}, got {_describe(rows)}")
        return
    before_tail = length - recent
    if before_tail < 0:
        raise ValueError(f"recent={recent}: more than the {length} tokens there are")
    if block_size is None:
        forced = min(sink, before_tail) + recent
        if num_keep < forced:
            raise ValueError(f"num_keep={num_keep}: less than the {forced} forced tokens (sink and recent)")
        return
    num_blocks = before_tail // block_size
    if num_blocks * block_size != before_tail:
        raise ValueError(
            f"{before_tail} tokens before the last {recent} do not fill whole blocks of {block_size}: pass recent="
            f"{length % block_size}, or another multiple"
        )
    per_block = (num_keep - recent) // max(num_blocks, 1)
    if per_block * num_blocks != num_keep - recent:
        raise ValueError(f"num_keep={num_keep}: expected recent={recent} plus a multiple of the {num_blocks} blocks")
    forced = min(sink + 1, block_size)
    if not (num_blocks == 0 or forced <= per_block <= block_size):
        raise ValueError(f"num_keep={num_keep}: {per_block} tokens a block, expected {forced} (forced) to {block_size}")


def _check_gather(tensors: Sequence[torch.Tensor], indices: torch.Tensor) -> None:
    if not (indices.dim() == 2 and indices.dtype == torch.int64):
        raise ValueError(f"indices: expected [B, K] torch.int64, got {_describe(indices)}")
    for i, tensor in enumerate(tensors):
        if not (2 <= tensor.dim() <= 4 and tensor.shape[0] == indices.shape[0] and tensor.device == indices.device):
            raise ValueError(
                f"tensors[{i}]: expected [B, N], [B, N, D] or [B, heads, N, D] with B={indices.shape[0]} on "
                f"{indices.device}, got {_describe(tensor)}; expand a shared batch dimension first"
            )


def _check_heads(query: torch.Tensor, key: torch.Tensor, num_queries: str, num_keys: str) -> None:
    """`num_queries` and `num_keys` are the letters that the op's docstring has for them."""
    if query.dim() != 4 or query.dtype not in _FLOATS:
        raise ValueError(f"query: expected [B, H, {num_queries}, d] of a floating dtype, got {_describe(query)}")
    batch, heads, _, head_dim = query.shape
    if key.dim() != 4 or (key.shape[0], key.shape[3], key.dtype) != (batch, head_dim, query.dtype):
        raise ValueError(
            f"key: expected [{batch}, KV, {num_keys}, {head_dim}] in the dtype of query, {query.dtype}, got "
            f"{_describe(key)}"
        )
    if key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise ValueError(f"key: got {key.shape[1]} heads, expected a divisor of the {heads} heads of query")


def _check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    num_rotary: int,
    pooling: int,
) -> None:
    """What :func:`window_attention` and :func:`score_prompt` have in common; `num_rotary` tokens in cos and sin."""
    _check_heads(query, key, "w", "n")
    batch, _, _, head_dim = query.shape
    if (cos is None) != (sin is None) or (cos is not None and head_dim % 2 != 0):
        raise ValueError(f"cos and sin: expected both, and queries of even size, got {_describe(query)}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is not None and (
            tensor.shape not in ((batch, num_rotary, head_dim), (1, num_rotary, head_dim))
            or tensor.dtype != query.dtype
        ):
            raise ValueError(
                f"{name}: expected {[batch, num_rotary, head_dim]}, or a first dimension of 1, in the dtype of query, "
                f"{query.dtype}, got {_describe(tensor)}"
            )
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move one of them")
    _check_pooling(pooling)


def _check_window(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    key_index: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pooling: int,
) -> None:
    _check_attention(query, key, cos, sin, query.shape[2] if query.dim() == 4 else 0, pooling)
    batch, _, window, _ = query.shape
    for name, tensor, length in (("query_index", query_index, window), ("key_index", key_index, key.shape[2])):
        if tensor.shape != (batch, length) or tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected {[batch, length]} torch.int64, got {_describe(tensor)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move one of them")


def _check_terms(
    hidden_states: torch.Tensor,
    token_index: torch.Tensor,
    keep_last: int,
    distance_table: torch.Tensor,
    mean_score: torch.Tensor | None,
    num_scores: int,
    attention: torch.Tensor | None,
    query: torch.Tensor | None,
    key: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    pooling: int,
) -> None:
    batch, length = hidden_states.shape[:2]
    if token_index.shape != (batch, length) or token_index.dtype != torch.int64:
        raise ValueError(f"token_index: expected {[batch, length]} torch.int64, got {_describe(token_index)}")
    if not 0 <= keep_last <= length:
        raise ValueError(f"keep_last={keep_last}: expected 0 to {length}, the number of tokens")
    if distance_table.dim() != 1 or distance_table.shape[0] == 0 or distance_table.dtype != torch.float32:
        raise ValueError(
            f"distance_table: expected [M] torch.float32 with at least one entry, got {_describe(distance_table)}"
        )
    for name, tensor in (("mean_score", mean_score), ("attention", attention)):
        if tensor is not None and (tensor.shape != (batch, length) or tensor.dtype != torch.float32):
            raise ValueError(f"{name}: expected {[batch, length]} torch.float32, got {_describe(tensor)}")
    if num_scores < 0 or (mean_score is None) != (num_scores == 0):
        raise ValueError(f"num_scores={num_scores}: expected how many scores mean_score is the mean of, 0 without one")
    if query is not None:
        if key is None or attention is not None:
            raise ValueError("query: expected a key with it, and no attention, which it is there to compute")
        _check_attention(query, key, cos, sin, length, pooling)
        if query.shape[0] != batch or query.shape[2] > length - keep_last or key.shape[2] != length:
            raise ValueError(
                f"query, key: expected at most the prompt's {length - keep_last} tokens and all {length}, in {batch} "
                f"rows, got {_describe(query)} and {_describe(key)}"
            )
    for name, tensor in (
        ("token_index", token_index),
        ("distance_table", distance_table),
        ("mean_score", mean_score),
        ("attention", attention),
        ("query", query),
    ):
        if tensor is not None and tensor.device != hidden_states.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_states on {hidden_states.device}: move one of them")


def _check_position(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None,
) -> None:
    _check_heads(query, key, "n", "N")
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(f"value: expected the shape and dtype of key, {_describe(key)}, got {_describe(value)}")
    batch, _, num_queries, _ = query.shape
    for name, tensor, shape in (
        ("num_visible", num_visible, [batch, num_queries]),
        ("first_visible", first_visible, [batch]),
    ):
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype != torch.int64):
            raise ValueError(f"{name}: expected {shape} torch.int64, got {_describe(tensor)}")
    for name, tensor in (
        ("key", key),
        ("value", value),
        ("num_visible", num_visible),
        ("first_visible", first_visible),
    ):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}: move one of them")


# ----------------------------------------------------------------------------------------------- implementations


def _score(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    score_bias: torch.Tensor | None = None,
    rms_eps: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    _check_pruner(hidden_states, w1, b1, w2, b2, score_bias)
    chosen = backends.choose(backend, hidden_states.device, hidden_states.dtype)
    return chosen.score_tokens(hidden_states, w1, b1, w2, b2, score_bias, rms_eps)


def _select(
    scores: torch.Tensor,
    num_keep: int,
    sink: int = 0,
    recent: int = 0,
    block_size: int | None = None,
    rows: torch.Tensor | None = None,
    pooling: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    if not (scores.dim() == 2 and scores.dtype == torch.float32):
        raise ValueError(f"scores: expected [B, N] torch.float32, got {_describe(scores)}")
    _check_selection(scores.shape, scores.device, num_keep, sink, recent, block_size, rows, pooling)
    chosen = backends.choose(backend, scores.device)
    return chosen.select_tokens(scores, num_keep, sink, recent, block_size, rows, pooling)


def _gather(tensors: list[torch.Tensor], indices: torch.Tensor, backend: str = "auto") -> list[torch.Tensor]:
    _check_gather(tensors, indices)
    return backends.choose(backend, indices.device).gather_tokens(tensors, indices)


def _prune(
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
    backend: str = "auto",
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    _check_pruner(hidden_states, w1, b1, w2, b2, score_bias)
    _check_selection(hidden_states.shape, hidden_states.device, num_keep, sink, recent, block_size, rows, pooling)
    for i, tensor in enumerate(tensors):
        if not (
            2 <= tensor.dim() <= 4
            and tensor.device == hidden_states.device
            and (tensor.shape[0], tensor.shape[token_dim(tensor)]) == tuple(hidden_states.shape[:2])
        ):
            raise ValueError(
                f"tensors[{i}]: expected the batch and tokens of hidden_states {_describe(hidden_states)}, got "
                f"{_describe(tensor)}; expand a shared batch dimension first"
            )
    chosen = backends.choose(backend, hidden_states.device, hidden_states.dtype)
    return chosen.prune_tokens(
        hidden_states, tensors, w1, b1, w2, b2, num_keep, sink, recent, block_size, rows, pooling, score_bias, rms_eps
    )


def _window(
    query: torch.Tensor,
    key: torch.Tensor,
    query_index: torch.Tensor,
    key_index: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scaling: float,
    pooling: int = 1,
    backend: str = "auto",
) -> torch.Tensor:
    _check_window(query, key, query_index, key_index, cos, sin, pooling)
    chosen = backends.choose(backend, query.device, query.dtype)
    with torch.no_grad():
        return chosen.window_attention(query, key, query_index, key_index, cos, sin, scaling, pooling)


def _prompt(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    rms_eps: float | None,
    token_index: torch.Tensor,
    keep_last: int,
    distance_table: torch.Tensor,
    mean_score: torch.Tensor | None = None,
    num_scores: int = 0,
    attention: torch.Tensor | None = None,
    attention_weight: float = 0.0,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    scaling: float = 1.0,
    pooling: int = 1,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_pruner(hidden_states, w1, b1, w2, b2, None)
    _check_terms(
        hidden_states, token_index, keep_last, distance_table, mean_score, num_scores, attention, query, key, cos, sin,
        pooling,
    )  # fmt: skip
    chosen = backends.choose(backend, hidden_states.device, hidden_states.dtype)
    with torch.no_grad():
        return chosen.score_prompt(
            hidden_states, w1, b1, w2, b2, rms_eps, token_index, keep_last, distance_table, mean_score, num_scores,
            attention, attention_weight, query, key, cos, sin, scaling, pooling,
        )  # fmt: skip


def _position(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    _check_position(query, key, value, num_visible, first_visible)
    chosen = backends.choose(backend, query.device, query.dtype)
    return chosen.position_attention(query, key, value, num_visible, first_visible, scale)


for _name, _implementation in (
    ("score_tokens", _score),
    ("select_tokens", _select),
    ("gather_tokens", _gather),
    ("prune_tokens", _prune),
    ("window_attention", _window),
    ("score_prompt", _prompt),
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
    hidden_states: torch.Tensor,
    tensors: list[torch.Tensor],
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    num_keep: int,
    *_: Any,
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    indices = hidden_states.new_empty((hidden_states.shape[0], num_keep), dtype=torch.int64)
    return _empty_rows(hidden_states, num_keep), [_empty_rows(tensor, num_keep) for tensor in tensors], indices


@torch.library.register_fake("sdtp::window_attention", lib=_library)
def _window_fake(query: torch.Tensor, key: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@torch.library.register_fake("sdtp::score_prompt", lib=_library)
def _prompt_fake(hidden_states: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _score_fake(hidden_states), _score_fake(hidden_states)


@torch.library.register_fake("sdtp::position_attention", lib=_library)
def _position_fake(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(query)


def _empty_rows(tensor: torch.Tensor, num_tokens: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[token_dim(tensor)] = num_tokens
    return tensor.new_empty(shape)


# ----------------------------------------------------------------------------------------------------- gradients


def _score_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.rms_eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _score_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Recomputed through the oracle: nothing of the size [N, H] is kept between forward and backward.
    with torch.enable_grad():
        inputs: list[Any] = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        hidden_states, w1, b1, w2, b2, score_bias = inputs
        scores = reference.score_tokens(hidden_states, w1, b1, w2, b2, score_bias, ctx.rms_eps)
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if t is not None and needed]
        found = iter(torch.autograd.grad(scores, wanted, grad))
    grads = [
        next(found) if t is not None and needed else None
        for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]
    return (*grads, None, None)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    tensors, indices, _ = inputs
    ctx.shapes = [tensor.shape for tensor in tensors]
    ctx.save_for_backward(indices)


def _gather_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    scattered = [_scatter_rows(g, indices, shape) for g, shape in zip(grads, ctx.shapes, strict=True)]
    return _as_passed(ctx, scattered, None, None)


def _scatter_rows(grad: torch.Tensor | None, indices: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    if grad is None or not grad.is_floating_point():
        return None
    dim = max(1, len(shape) - 2)
    rows = indices.view(*[indices.shape[0], 1][:dim], -1, *[1] * (len(shape) - dim - 1))
    grad = grad.masked_fill(rows < 0, 0)
    return grad.new_zeros(shape).scatter_add(dim, rows.clamp(min=0).expand(grad.shape), grad)


def _prune_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden_states, tensors, w1, b1, w2, b2, *_, score_bias, _eps, _backend = inputs
    for name, tensor in {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "score_bias": score_bias}.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"prune_tokens has no gradient for {name}: a hard selection is not differentiable. Pass detached "
                "weights (TokenPruner.weights() are), or train through TokenPruner.forward"
            )
    ctx.shapes = [hidden_states.shape, *(tensor.shape for tensor in tensors)]
    ctx.save_for_backward(output[2])


def _prune_backward(
    ctx: Any, grad: torch.Tensor, grads: list[torch.Tensor | None], _indices_grad: torch.Tensor | None
) -> tuple[Any, ...]:
    (indices,) = ctx.saved_tensors
    first, *others = (_scatter_rows(g, indices, shape) for g, shape in zip([grad, *grads], ctx.shapes, strict=True))
    return _as_passed(ctx, first, others, *[None] * 13)


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
    return _as_passed(ctx, *grads, None, None, None, None)


def _as_passed(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    """One gradient for each argument that the op was called with: trailing ones that equal their default are not."""
    return grads[: len(ctx.needs_input_grad)]


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
_library.impl("score_prompt", torch.library.fallthrough_kernel, "Autograd")
