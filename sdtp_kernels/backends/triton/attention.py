"""``position_attention``: one launch, a softmax as it goes (FlashAttention-2, arXiv 2307.08691)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sdtp_kernels import reference

from . import configs


@triton.jit
def attend(
    output, row_max, row_sum, query, key_ptr, value_ptr, stride_k_n, stride_v_n,
    visible, first_key, last_key, scale,
    IS_MASKED: tl.constexpr, UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Take the keys ``[first_key, last_key)`` into the softmax of a block of queries; `scale` holds log2(e).

    Unless `IS_MASKED` every query sees all of them, and they fill whole blocks.
    """
    d = tl.arange(0, query.shape[1])[None, :]
    for start in range(first_key, last_key, BLOCK_KEYS):
        keys = start + tl.arange(0, BLOCK_KEYS)
        n = keys.to(tl.int64)[:, None]
        is_read = (keys < last_key)[:, None] if IS_MASKED else None
        other = 0.0 if IS_MASKED else None
        key = tl.load(key_ptr + n * stride_k_n + d, mask=is_read, other=other)
        value = tl.load(value_ptr + n * stride_v_n + d, mask=is_read, other=other)
        if UPCAST:  # as in score_tile
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        logits = tl.dot(query, key.T, input_precision=INPUT_PRECISION) * scale
        if IS_MASKED:
            logits = tl.where(keys[None, :] < visible[:, None], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        weights = tl.exp2(logits - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        output = tl.dot(weights.to(value.dtype), value, output * rescale[:, None], input_precision=INPUT_PRECISION)
        row_max = new_max
    return output, row_max, row_sum


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def sdtp_attention_kernel(
    query_ptr, stride_q_b, stride_q_h, stride_q_n, key_ptr, stride_k_b, stride_k_h, stride_k_n,
    value_ptr, stride_v_b, stride_v_h, stride_v_n, output_ptr, stride_o_b, stride_o_h, stride_o_n,
    visible_ptr, first_ptr, num_heads, group, num_queries, num_keys, scale,
    UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Program (head and block of queries, row). The blocks that see most start first; heads vary fastest, so programs
    that share keys run side by side.

    Keys are taken in blocks from the row's first one on, whatever the queries: a row in a batch has the bits that it
    has alone.
    """
    head = tl.program_id(0) % num_heads
    block = tl.cdiv(num_queries, BLOCK_QUERIES) - 1 - tl.program_id(0) // num_heads
    batch = tl.program_id(1).to(tl.int64)
    queries = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    d = tl.arange(0, HEAD_DIM)[None, :]
    mask = (queries < num_queries)[:, None]
    n = queries.to(tl.int64)[:, None]
    query_ptr += batch * stride_q_b + head.to(tl.int64) * stride_q_h
    query = tl.load(query_ptr + n * stride_q_n + d, mask=mask, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)

    # 64-bit until they are known to be columns. Past the last query stands the last one: it moves neither bound.
    visible = tl.load(visible_ptr + batch * num_queries + tl.minimum(queries, num_queries - 1))
    visible = tl.maximum(tl.minimum(visible, num_keys), 0).to(tl.int32)
    first = 0
    if first_ptr is not None:
        first = tl.maximum(tl.minimum(tl.load(first_ptr + batch), num_keys), 0).to(tl.int32)
    seen_by_all = first + tl.maximum(tl.min(visible, axis=0) - first, 0) // BLOCK_KEYS * BLOCK_KEYS
    seen_by_any = tl.max(visible, axis=0)

    key_ptr += batch * stride_k_b + (head // group).to(tl.int64) * stride_k_h
    value_ptr += batch * stride_v_b + (head // group).to(tl.int64) * stride_v_h
    output = tl.zeros([BLOCK_QUERIES, HEAD_DIM], tl.float32)
    # Below every logit, but not -inf: what is masked weighs exp2(-inf) = 0 also where a query has seen nothing yet.
    row_max = tl.full([BLOCK_QUERIES], -3.0e38, tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    output, row_max, row_sum = attend(
        output, row_max, row_sum, query, key_ptr, value_ptr, stride_k_n, stride_v_n,
        visible, first, seen_by_all, scale, False, UPCAST, INPUT_PRECISION, BLOCK_KEYS,
    )  # fmt: skip
    output, row_max, row_sum = attend(
        output, row_max, row_sum, query, key_ptr, value_ptr, stride_k_n, stride_v_n,
        visible, seen_by_all, seen_by_any, scale, True, UPCAST, INPUT_PRECISION, BLOCK_KEYS,
    )  # fmt: skip
    output = output / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]  # zeros where no key was seen
    output_ptr += batch * stride_o_b + head.to(tl.int64) * stride_o_h
    tl.store(output_ptr + n * stride_o_n + d, output, mask=mask)


def position_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_visible: torch.Tensor,
    first_visible: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    batch_size, num_heads, num_queries, head_dim = query.shape
    if head_dim > configs.largest_head(query):
        return reference.position_attention(query, key, value, num_visible, first_visible, scale)
    output = torch.empty_like(query)
    if not output.numel():
        return output
    width = max(triton.next_power_of_2(head_dim), 16)
    q, k, v = (_aligned(tensor, width) for tensor in (query, key, value))
    o = output if q is query else torch.empty_like(q)
    config = configs.attention_config(query)
    scale = head_dim**-0.5 if scale is None else scale
    sdtp_attention_kernel[(configs.ceil_divide(num_queries, config.block_queries) * num_heads, batch_size)](
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], o, *o.stride()[:3],
        num_visible.contiguous(), None if first_visible is None else first_visible.contiguous(),
        num_heads, num_heads // key.shape[1], num_queries, key.shape[2], scale * math.log2(math.e),
        UPCAST=configs.INTERPRETED, INPUT_PRECISION=config.input_precision,
        HEAD_DIM=width, BLOCK_QUERIES=config.block_queries, BLOCK_KEYS=config.block_keys,
        num_warps=config.num_warps, num_stages=config.num_stages,
        **configs.registers(255, query.device), **configs.EXACT,
    )  # fmt: skip
    return output if o is output else output.copy_(o[..., :head_dim])


def _aligned(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """The tensor, or a copy with heads of `width` where it cannot be read many elements at a time."""
    if tensor.shape[3] == width and configs.is_aligned(tensor):
        return tensor
    return F.pad(tensor, (0, width - tensor.shape[3])).contiguous()
