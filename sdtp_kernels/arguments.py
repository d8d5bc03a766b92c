"""What the ops take: the arguments that belong together, and whether they fit.

The order of the fields is the order of the arguments in the ops' schemas. Messages are put together where a check
fails, and nowhere else: they take longer than many a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Scoring(NamedTuple):
    """What a score is made of beside the hidden states; see :func:`sdtp_kernels.score_tokens`."""

    w1: torch.Tensor
    """``[H, D]``"""
    b1: torch.Tensor
    """``[H]``"""
    w2: torch.Tensor
    """``[H]``"""
    b2: torch.Tensor
    """``[]``"""
    mean_score: torch.Tensor | None = None
    """``[B, N]``"""
    num_scores: int = 0
    score_bias: torch.Tensor | None = None
    """``[B, N]``"""
    rms_eps: float | None = None


class Selection(NamedTuple):
    """What to keep of each row; see :func:`sdtp_kernels.select_tokens`."""

    num_keep: int
    sink: int = 0
    recent: int = 0
    block_size: int | None = None
    rows: torch.Tensor | None = None
    """``[B, 3]``"""
    pooling: int = 1


class Window(NamedTuple):
    """The last queries of a layer and its keys; see :func:`sdtp_kernels.window_attention`."""

    query: torch.Tensor
    """``[B, heads, w, head_dim]``"""
    key: torch.Tensor
    """``[B, kv_heads, n, head_dim]``"""
    query_index: torch.Tensor
    """``[B, w]``"""
    key_index: torch.Tensor
    """``[B, n]``"""
    cos: torch.Tensor | None = None
    """``[B or 1, w, head_dim]``"""
    sin: torch.Tensor | None = None
    scaling: float = 1.0
    pooling: int = 1


class PromptTerms(NamedTuple):
    """What a score owes to a token's place in the prompt; see :func:`sdtp_kernels.prompt_bias`."""

    token_index: torch.Tensor
    """``[B, N]``"""
    distance_table: torch.Tensor
    """``[M]`` or ``[B, M]``"""
    keep_last: int = 0
    attention: torch.Tensor | None = None
    """``[B, N]``"""
    attention_weight: float = 0.0
    query: torch.Tensor | None = None
    """``[B, heads, w, head_dim]``"""
    key: torch.Tensor | None = None
    """``[B, kv_heads, N, head_dim]``"""
    cos: torch.Tensor | None = None
    """``[B or 1, N, head_dim]``"""
    sin: torch.Tensor | None = None
    scaling: float = 1.0
    pooling: int = 1

    @property
    def end(self) -> int:
        """Column after the prompt's last token."""
        return self.token_index.shape[1] - self.keep_last

    @property
    def window(self) -> Window | None:
        """The prompt's last tokens as queries, where they are given."""
        if self.query is None or self.key is None:
            return None
        last = slice(self.end - self.query.shape[2], self.end)
        cos, sin = (None if t is None else t[:, last] for t in (self.cos, self.sin))
        index = self.token_index
        return Window(self.query, self.key, index[:, last], index, cos, sin, self.scaling, self.pooling)


def token_dim(tensor: torch.Tensor) -> int:
    """Dimension of the tokens: 1 in ``[B, N]`` and ``[B, N, D]``, 2 in ``[B, heads, N, D]``."""
    return max(1, tensor.dim() - 2)


def describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_device(device: torch.device, anchor: str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, {anchor} on {device}: move one of them")


def _check_row_values(shape: Sequence[int], **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not (tensor.shape == shape and tensor.dtype == torch.float32):
            raise ValueError(f"{name}: expected {list(shape)} torch.float32, got {describe(tensor)}")


def check_scoring(hidden_states: torch.Tensor, scoring: Scoring) -> None:
    if not (hidden_states.dim() == 3 and hidden_states.dtype in _FLOATS):
        raise ValueError(f"hidden_states: expected [B, N, D] of a floating dtype, got {describe(hidden_states)}")
    w1, b1, w2, b2, mean_score, num_scores, score_bias, _ = scoring
    hidden_size = hidden_states.shape[2]
    if not (w1.dim() == 2 and w1.shape[1] == hidden_size and w1.dtype == hidden_states.dtype):
        raise ValueError(
            f"w1: expected [H, {hidden_size}] in the dtype of hidden_states, {hidden_states.dtype}, got "
            f"{describe(w1)}; TokenPruner.weights(dtype) casts it"
        )
    wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    for name, tensor, shape in (("b1", b1, [w1.shape[0]]), ("w2", w2, [w1.shape[0]]), ("b2", b2, [])):
        if not (list(tensor.shape) == shape and tensor.dtype == wide):
            raise ValueError(f"{name}: expected {shape} {wide}, got {describe(tensor)}")
    _check_row_values(hidden_states.shape[:2], mean_score=mean_score, score_bias=score_bias)
    if num_scores < 0 or (mean_score is None) != (num_scores == 0):
        raise ValueError(f"num_scores={num_scores}: expected how many scores mean_score is the mean of, 0 without one")
    check_device(
        hidden_states.device, "hidden_states", w1=w1, b1=b1, w2=w2, b2=b2, mean_score=mean_score, score_bias=score_bias
    )


def check_pooling(pooling: int) -> None:
    if pooling < 1 or pooling % 2 == 0:
        raise ValueError(
            f"pooling={pooling}: expected an odd number of tokens, or 1 for none: a token and as many on either side"
        )


def check_scores(scores: torch.Tensor) -> None:
    if not (scores.dim() == 2 and scores.dtype == torch.float32):
        raise ValueError(f"scores: expected [B, N] torch.float32, got {describe(scores)}")


def check_selection(shape: Sequence[int], device: torch.device, selection: Selection) -> None:
    """For scores of this `shape` on this `device`."""
    batch, length = shape
    num_keep, sink, recent, block_size, rows, pooling = selection
    check_pooling(pooling)
    if not (min(sink, recent) >= 0 and (block_size is None or block_size >= 1)):
        raise ValueError(
            f"sink={sink}, recent={recent}, block_size={block_size}: expected counts >= 0, blocks of at least one token"
        )
    if not 0 <= num_keep <= length:
        raise ValueError(f"num_keep={num_keep}: expected 0 to {length}, the number of tokens")
    if rows is not None:
        if not (list(rows.shape) == [batch, 3] and rows.dtype == torch.int64 and rows.device == device):
            raise ValueError(f"rows: expected [{batch}, 3] torch.int64 on {device}, got {describe(rows)}")
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


def check_dropped(length: int, selection: Selection, num_dropped: int) -> None:
    """Whether all that is dropped of `length` tokens fits, as far as the host knows."""
    least = 0 if selection.rows is not None else length - selection.num_keep
    if num_dropped != 0 and not least <= num_dropped <= length:
        raise ValueError(
            f"num_dropped={num_dropped}: expected 0 for none of them, or room for the {least} to {length} tokens that "
            "a row may drop"
        )


def check_gather(tensors: Sequence[torch.Tensor], indices: torch.Tensor) -> None:
    if not (indices.dim() == 2 and indices.dtype == torch.int64):
        raise ValueError(f"indices: expected [B, K] torch.int64, got {describe(indices)}")
    for i, tensor in enumerate(tensors):
        if not (2 <= tensor.dim() <= 4 and tensor.shape[0] == indices.shape[0] and tensor.device == indices.device):
            raise ValueError(
                f"tensors[{i}]: expected [B, N], [B, N, D] or [B, heads, N, D] with B={indices.shape[0]} on "
                f"{indices.device}, got {describe(tensor)}; expand a shared batch dimension first"
            )


def check_carried(tensors: Sequence[torch.Tensor], hidden_states: torch.Tensor) -> None:
    """Whether `tensors` have the tokens of `hidden_states`."""
    for i, tensor in enumerate(tensors):
        if not (
            2 <= tensor.dim() <= 4
            and tensor.device == hidden_states.device
            and (tensor.shape[0], tensor.shape[token_dim(tensor)]) == tuple(hidden_states.shape[:2])
        ):
            raise ValueError(
                f"tensors[{i}]: expected the batch and tokens of hidden_states {describe(hidden_states)}, got "
                f"{describe(tensor)}; expand a shared batch dimension first"
            )


def _check_heads(query: torch.Tensor, key: torch.Tensor, num_queries: str, num_keys: str) -> None:
    """`num_queries` and `num_keys` are the letters that the op's docstring has for them."""
    if query.dim() != 4 or query.dtype not in _FLOATS:
        raise ValueError(f"query: expected [B, H, {num_queries}, d] of a floating dtype, got {describe(query)}")
    batch, heads, _, head_dim = query.shape
    if key.dim() != 4 or (key.shape[0], key.shape[3], key.dtype) != (batch, head_dim, query.dtype):
        raise ValueError(
            f"key: expected [{batch}, KV, {num_keys}, {head_dim}] in the dtype of query, {query.dtype}, got "
            f"{describe(key)}"
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
    """What :func:`window_attention` and :func:`prompt_bias` have in common; `num_rotary` tokens in cos and sin."""
    _check_heads(query, key, "w", "n")
    batch, _, _, head_dim = query.shape
    if (cos is None) != (sin is None) or (cos is not None and head_dim % 2 != 0):
        raise ValueError(f"cos and sin: expected both, and queries of even size, got {describe(query)}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is not None and (
            tensor.shape not in ((batch, num_rotary, head_dim), (1, num_rotary, head_dim))
            or tensor.dtype != query.dtype
        ):
            raise ValueError(
                f"{name}: expected {[batch, num_rotary, head_dim]}, or a first dimension of 1, in the dtype of query, "
                f"{query.dtype}, got {describe(tensor)}"
            )
    check_device(query.device, "query", key=key, cos=cos, sin=sin)
    check_pooling(pooling)


def check_window(window: Window) -> None:
    query, key, query_index, key_index, cos, sin, _, pooling = window
    _check_attention(query, key, cos, sin, query.shape[2] if query.dim() == 4 else 0, pooling)
    batch, _, num_queries, _ = query.shape
    for name, tensor, length in (("query_index", query_index, num_queries), ("key_index", key_index, key.shape[2])):
        if tensor.shape != (batch, length) or tensor.dtype != torch.int64:
            raise ValueError(f"{name}: expected {[batch, length]} torch.int64, got {describe(tensor)}")
    check_device(query.device, "query", query_index=query_index, key_index=key_index)


def check_terms(terms: PromptTerms) -> None:
    token_index, distance_table, keep_last, attention, _, query, key, cos, sin, _, pooling = terms
    if token_index.dim() != 2 or token_index.dtype != torch.int64:
        raise ValueError(f"token_index: expected [B, N] torch.int64, got {describe(token_index)}")
    batch, length = token_index.shape
    if not 0 <= keep_last <= length:
        raise ValueError(f"keep_last={keep_last}: expected 0 to {length}, the number of tokens")
    *rows, num_distances = distance_table.shape or (0,)
    if not (rows in ([], [batch]) and num_distances and distance_table.dtype == torch.float32):
        raise ValueError(
            f"distance_table: expected [M] or [{batch}, M] torch.float32 with at least one entry, got "
            f"{describe(distance_table)}"
        )
    _check_row_values(token_index.shape, attention=attention)
    if query is not None:
        if key is None or attention is not None:
            raise ValueError("query: expected a key with it, and no attention, which it is there to compute")
        _check_attention(query, key, cos, sin, length, pooling)
        if query.shape[0] != batch or query.shape[2] > length - keep_last or key.shape[2] != length:
            raise ValueError(
                f"query, key: expected at most the prompt's {length - keep_last} tokens and all {length}, in {batch} "
                f"rows, got {describe(query)} and {describe(key)}"
            )
    check_device(token_index.device, "token_index", distance_table=distance_table, attention=attention, query=query)


def check_position(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None,
) -> None:
    _check_heads(query, key, "n", "N")
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(f"value: expected the shape and dtype of key, {describe(key)}, got {describe(value)}")
    batch, _, num_queries, _ = query.shape
    for name, tensor, shape in (
        ("num_visible", num_visible, [batch, num_queries]),
        ("first_visible", first_visible, [batch]),
    ):
        if tensor is not None and (list(tensor.shape) != shape or tensor.dtype != torch.int64):
            raise ValueError(f"{name}: expected {shape} torch.int64, got {describe(tensor)}")
    check_device(query.device, "query", key=key, value=value, num_visible=num_visible, first_visible=first_visible)
