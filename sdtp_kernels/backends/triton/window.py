"""``window_attention`` and ``prompt_bias``: no logit ever reaches memory.

The softmax of the window's queries over all keys needs its sums before a key's share is known, so keys are read twice:
one launch sums, over a part of the keys a program; the next computes the logits of a tile of keys again and adds up
what the queries pay them. Of its programs the last one to finish a row makes of the logarithms what a pruner adds to
its scores: that takes a fraction of a launch at a few thousand tokens, and nobody waits.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from sdtp_kernels import reference

from . import configs

if TYPE_CHECKING:
    from sdtp_kernels.arguments import PromptTerms, Window

_TOKENS = 1024  # of a program that only adds terms
_TOKENS_OF_LAST = 2048  # at a time, of the one that does it for a whole row: each step waits for memory once
_TILES = 256
_LN2 = math.log(2)


@triton.jit
def load_queries(
    query_ptr, stride_q_h, stride_q_n, stride_q_d, cos_ptr, sin_ptr, stride_rotary_n, index_ptr,
    first_head, group, window, head_dim,
    UPCAST: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """(queries of the heads that share a key head, rotated, [ROWS, HEAD_DIM]; the last key that each sees, or -1).

    Row ``member * WINDOW + i`` is query `i` of the group's head `member`.
    """
    row = tl.arange(0, ROWS)
    member = row // WINDOW
    i = row % WINDOW
    is_row = (member < group) & (i < window)
    d = tl.arange(0, HEAD_DIM)
    is_read = is_row[:, None] & (d < head_dim)[None, :]
    rows_ptr = query_ptr + ((first_head + member).to(tl.int64) * stride_q_h + i.to(tl.int64) * stride_q_n)[:, None]
    query = tl.load(rows_ptr + (d.to(tl.int64) * stride_q_d)[None, :], mask=is_read, other=0.0)
    if cos_ptr is not None:  # in halves of the head
        half = head_dim // 2
        other = tl.where(d < half, d + half, d - half)
        partner = tl.load(rows_ptr + (other.to(tl.int64) * stride_q_d)[None, :], mask=is_read, other=0.0)
        angles = (i * stride_rotary_n)[:, None] + d[None, :]
        cos = tl.load(cos_ptr + angles, mask=is_read, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angles, mask=is_read, other=0.0).to(tl.float32)
        signed = tl.where((d < half)[None, :], -partner.to(tl.float32), partner.to(tl.float32))
        # As narrow as the keys, for the tensor cores; so does the model itself round what it rotates.
        query = (query.to(tl.float32) * cos + signed * sin).to(query.dtype)
    if UPCAST:  # as in score_tile
        query = query.to(tl.float32)
    last_seen = tl.load(index_ptr + i, mask=is_row, other=-1)
    return query, last_seen


@triton.jit
def window_logits(
    query, last_seen, key_ptr, stride_k_n, stride_k_d, key_index_ptr, keys, num_keys, head_dim, scale,
    UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Logits in base 2, [ROWS, keys]; -inf where the query does not see the key."""
    d = tl.arange(0, HEAD_DIM)
    is_key = (keys >= 0) & (keys < num_keys)
    offsets = (keys.to(tl.int64) * stride_k_n)[:, None] + (d.to(tl.int64) * stride_k_d)[None, :]
    key = tl.load(key_ptr + offsets, mask=is_key[:, None] & (d < head_dim)[None, :], other=0.0)
    if UPCAST:
        key = key.to(tl.float32)
    index = tl.load(key_index_ptr + keys, mask=is_key, other=-1)
    logits = tl.dot(query, key.T, input_precision=INPUT_PRECISION) * scale
    is_seen = (index >= 0)[None, :] & (index[None, :] <= last_seen[:, None])
    return tl.where(is_seen, logits, float("-inf"))


# The queries' indices are the end of a row: how they are aligned says the prompt's length.
@triton.jit(
    do_not_specialize=["num_keys", "num_splits", "keys_per_split", "stride_index"],
    do_not_specialize_on_alignment=["query_index_ptr"],
)
def sdtp_window_sums_kernel(
    query_ptr, stride_q_b, stride_q_h, stride_q_n, stride_q_d, key_ptr, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    cos_ptr, sin_ptr, stride_rotary_b, stride_rotary_n, query_index_ptr, stride_index, key_index_ptr, partial_ptr,
    finished_ptr, key_heads, group, window, head_dim, num_keys, num_splits, keys_per_split, scale,
    UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Program (part of the keys and key head, row): highest logit and sum of powers of each query, over that part.

    `partial_ptr` is ``[B, key heads, parts, 2, ROWS]``. `finished_ptr` ``[B]`` is for the next launch, and 0 then.
    """
    split = tl.program_id(0) % num_splits
    key_head = tl.program_id(0) // num_splits
    batch = tl.program_id(1).to(tl.int64)
    if finished_ptr is not None:
        tl.store(finished_ptr + batch, 0, mask=tl.program_id(0) == 0)
    if cos_ptr is not None:
        cos_ptr += batch * stride_rotary_b
        sin_ptr += batch * stride_rotary_b
    query, last_seen = load_queries(
        query_ptr + batch * stride_q_b, stride_q_h, stride_q_n, stride_q_d, cos_ptr, sin_ptr, stride_rotary_n,
        query_index_ptr + batch * stride_index, key_head * group, group, window, head_dim,
        UPCAST, WINDOW, ROWS, HEAD_DIM,
    )  # fmt: skip
    key_ptr += batch * stride_k_b + key_head.to(tl.int64) * stride_k_h
    # Below every logit, but not -inf, which minus itself is NaN.
    highest = tl.full([ROWS], -3.0e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    last_key = tl.minimum((split + 1) * keys_per_split, num_keys)
    for first in range(split * keys_per_split, last_key, BLOCK_KEYS):
        logits = window_logits(
            query, last_seen, key_ptr, stride_k_n, stride_k_d, key_index_ptr + batch * num_keys,
            first + tl.arange(0, BLOCK_KEYS), last_key, head_dim, scale, UPCAST, INPUT_PRECISION, HEAD_DIM,
        )  # fmt: skip
        before = highest
        highest = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp2(before - highest) + tl.sum(tl.exp2(logits - highest[:, None]), axis=1)
    row = tl.arange(0, ROWS)
    partial_ptr += ((batch * key_heads + key_head) * num_splits + split) * (2 * ROWS)
    tl.store(partial_ptr + row, highest)
    tl.store(partial_ptr + ROWS + row, total)


@triton.jit
def combine_parts(partial_ptr, num_splits, ROWS: tl.constexpr):
    """(highest logit of each query, 1 over its sum of powers)."""
    row = tl.arange(0, ROWS)
    highest = tl.full([ROWS], -3.0e38, tl.float32)
    for split in range(num_splits):
        highest = tl.maximum(highest, tl.load(partial_ptr + split * (2 * ROWS) + row))
    total = tl.zeros([ROWS], tl.float32)
    for split in range(num_splits):
        part = tl.load(partial_ptr + split * (2 * ROWS) + row)
        total += tl.load(partial_ptr + split * (2 * ROWS) + ROWS + row) * tl.exp2(part - highest)
    return highest, 1.0 / tl.where(total == 0.0, 1.0, total)  # 0 of one that sees no key, whose powers are all 0


@triton.jit
def pool_rows(values, REACH: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr):
    """As ``select.pool_keys``, of each row of ``[HEADS, KEYS]``; NaN wins."""
    place = tl.broadcast_to(tl.arange(0, KEYS)[None, :], [HEADS, KEYS])
    for power in tl.static_range(7):
        if (1 << power) <= REACH:
            shift = 1 << power if 2 << power <= REACH else REACH + 1 - (1 << power)
            shifted = tl.gather(values, tl.minimum(place + shift, KEYS - 1), 1)
            values = tl.maximum(values, shifted, propagate_nan=tl.PropagateNan.ALL)
    shifted = tl.gather(values, tl.maximum(place - REACH, 0), 1)
    return tl.maximum(values, shifted, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def last_token(token_index_ptr, end):
    """Index of the prompt's last token; -1 where there is no prompt."""
    return tl.load(token_index_ptr + end - 1, mask=end > 0, other=-1)


@triton.jit
def store_logarithms(
    attention, tokens, is_own, token_index_ptr, last_index, output_ptr, moments_ptr, FLOOR: tl.constexpr
):
    """Logarithms of the attention, and over the valid tokens of the tile their count, mean and squared deviations."""
    logs = tl.log(attention + FLOOR)
    tl.store(output_ptr + tokens, logs, mask=is_own)
    index = tl.load(token_index_ptr + tokens, mask=is_own, other=-1)
    is_valid = (index >= 0) & (index <= last_index)
    count = tl.sum(is_valid.to(tl.float32))
    mean = tl.sum(tl.where(is_valid, logs, 0.0)) / tl.maximum(count, 1.0)
    deviation = tl.where(is_valid, logs - mean, 0.0)
    tl.store(moments_ptr, count)
    tl.store(moments_ptr + 1, mean)
    tl.store(moments_ptr + 2, tl.sum(deviation * deviation))


@triton.jit(
    do_not_specialize=["num_keys", "num_splits", "stride_index", "stride_table", "end", "num_distances"],
    do_not_specialize_on_alignment=["query_index_ptr"],
)
def sdtp_window_kernel(
    query_ptr, stride_q_b, stride_q_h, stride_q_n, stride_q_d, key_ptr, stride_k_b, stride_k_h, stride_k_n, stride_k_d,
    cos_ptr, sin_ptr, stride_rotary_b, stride_rotary_n, query_index_ptr, stride_index, key_index_ptr, partial_ptr,
    finished_ptr, output_ptr, moments_ptr, table_ptr, stride_table,
    key_heads, group, window, head_dim, num_keys, num_splits, end, num_distances, weight, scale,
    FLOOR: tl.constexpr, UPCAST: tl.constexpr, INPUT_PRECISION: tl.constexpr, REACH: tl.constexpr,
    GROUP: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (tile of keys, row): what all heads' queries pay them, and so many neighbours as pooling reaches.

    With `finished_ptr` ``[B]``, a row's bias instead: logarithms, what their standardisation needs in `moments_ptr`
    ``[B, tiles, 3]``, and by the last program of the row the bias in their place.
    """
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK_KEYS)
    keys = tile * (BLOCK_KEYS - 2 * REACH) + place - REACH
    if cos_ptr is not None:
        cos_ptr += batch * stride_rotary_b
        sin_ptr += batch * stride_rotary_b
    query_ptr += batch * stride_q_b
    key_ptr += batch * stride_k_b
    partial_ptr += batch * key_heads * num_splits * (2 * ROWS)
    attention = tl.zeros([BLOCK_KEYS], tl.float32)
    for key_head in range(key_heads):
        query, last_seen = load_queries(
            query_ptr, stride_q_h, stride_q_n, stride_q_d, cos_ptr, sin_ptr, stride_rotary_n,
            query_index_ptr + batch * stride_index, key_head * group, group, window, head_dim,
            UPCAST, WINDOW, ROWS, HEAD_DIM,
        )  # fmt: skip
        highest, share = combine_parts(partial_ptr + key_head * num_splits * (2 * ROWS), num_splits, ROWS)
        logits = window_logits(
            query, last_seen, key_ptr, stride_k_n, stride_k_d,
            key_index_ptr + batch * num_keys, keys, num_keys, head_dim, scale, UPCAST, INPUT_PRECISION, HEAD_DIM,
        )  # fmt: skip
        key_ptr += stride_k_h
        paid = tl.exp2(logits - highest[:, None]) * share[:, None]  # all NaN of a query that is
        by_head = tl.sum(paid.reshape(GROUP, WINDOW, BLOCK_KEYS), axis=1)
        if REACH > 0:
            by_head = pool_rows(by_head, REACH, GROUP, BLOCK_KEYS)
        attention += tl.sum(by_head, axis=0)
    attention = attention / (key_heads * group)
    is_own = (place >= REACH) & (place < BLOCK_KEYS - REACH) & (keys < num_keys)
    output_ptr += batch * num_keys
    if finished_ptr is None:
        tl.store(output_ptr + keys, attention, mask=is_own)
    else:
        num_tiles = tl.num_programs(0)
        key_index_ptr += batch * num_keys
        moments_ptr += batch * num_tiles * 3
        last_index = last_token(key_index_ptr, end)
        store_logarithms(attention, keys, is_own, key_index_ptr, last_index, output_ptr, moments_ptr + tile * 3, FLOOR)
        tl.debug_barrier()  # one thread tells of what all of them have written
        if tl.atomic_add(finished_ptr + batch, 1, sem="acq_rel") == num_tiles - 1:
            mean, spread = mean_and_spread(moments_ptr, num_tiles, TILES)
            for first in range(0, num_keys, TOKENS):
                store_bias(
                    key_index_ptr, table_ptr + batch * stride_table, output_ptr, output_ptr,
                    first + tl.arange(0, TOKENS), num_keys, last_index, num_distances, weight, mean, spread,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "end"])
def sdtp_logarithm_kernel(
    attention_ptr, token_index_ptr, output_ptr, moments_ptr, num_tokens, end, FLOOR: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Program (run of tokens, row): for attention that is given."""
    batch = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token_index_ptr += batch * num_tokens
    attention = tl.load(attention_ptr + batch * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)
    store_logarithms(
        attention, tokens, tokens < num_tokens, token_index_ptr, last_token(token_index_ptr, end),
        output_ptr + batch * num_tokens, moments_ptr + (batch * tl.num_programs(0) + tl.program_id(0)) * 3, FLOOR,
    )  # fmt: skip


@triton.jit
def mean_and_spread(moments_ptr, num_tiles, TILES: tl.constexpr):
    """Of all tiles by Chan's formula: first the mean, then the deviations from it."""
    tile = tl.arange(0, TILES)
    count = tl.zeros([TILES], tl.float32)
    sums = tl.zeros([TILES], tl.float32)
    for first in range(0, num_tiles, TILES):
        ptrs = moments_ptr + (first + tile) * 3
        counts = tl.load(ptrs, mask=first + tile < num_tiles, other=0.0)
        count += counts
        sums += counts * tl.load(ptrs + 1, mask=first + tile < num_tiles, other=0.0)
    total = tl.maximum(tl.sum(count), 1.0)
    mean = tl.sum(sums) / total
    squares = tl.zeros([TILES], tl.float32)
    for first in range(0, num_tiles, TILES):
        ptrs = moments_ptr + (first + tile) * 3
        counts = tl.load(ptrs, mask=first + tile < num_tiles, other=0.0)
        offset = tl.load(ptrs + 1, mask=first + tile < num_tiles, other=0.0) - mean
        squares += tl.load(ptrs + 2, mask=first + tile < num_tiles, other=0.0) + counts * offset * offset
    return mean, tl.sqrt(tl.sum(squares) / total) + 1e-6


@triton.jit
def store_bias(
    token_index_ptr, table_ptr, logs_ptr, bias_ptr, tokens, num_tokens, last_index, num_distances, weight, mean, spread
):
    """The distance term of a run of tokens, and their logarithms standardised; these may stand where the bias goes."""
    is_token = tokens < num_tokens
    index = tl.load(token_index_ptr + tokens, mask=is_token, other=-1)
    is_valid = (index >= 0) & (index <= last_index)
    distance = tl.minimum(last_index - index, num_distances - 1)
    bias = tl.load(table_ptr + distance, mask=is_valid, other=0.0)
    if logs_ptr is not None:
        logs = tl.load(logs_ptr + tokens, mask=is_token, other=0.0)
        bias += weight * ((logs - mean) / spread)
    tl.store(bias_ptr + tokens, tl.where(is_valid, bias, 0.0), mask=is_token)


@triton.jit(do_not_specialize=["num_tokens", "end", "num_distances", "stride_table", "num_tiles"])
def sdtp_bias_kernel(
    token_index_ptr, table_ptr, stride_table, logs_ptr, moments_ptr, bias_ptr,
    num_tokens, end, num_distances, num_tiles, weight, TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (run of tokens, row): for attention that is given, or none."""
    batch = tl.program_id(1).to(tl.int64)
    token_index_ptr += batch * num_tokens
    mean, spread = 0.0, 1.0
    if logs_ptr is not None:
        logs_ptr += batch * num_tokens
        mean, spread = mean_and_spread(moments_ptr + batch * num_tiles * 3, num_tiles, TILES)
    store_bias(
        token_index_ptr, table_ptr + batch * stride_table, logs_ptr, bias_ptr + batch * num_tokens,
        tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), num_tokens, last_token(token_index_ptr, end),
        num_distances, weight, mean, spread,
    )  # fmt: skip


class _Tile(NamedTuple):
    """Constants of the kernels that look at queries."""

    GROUP: int
    WINDOW: int
    ROWS: int
    HEAD_DIM: int
    BLOCK_KEYS: int


def _tile(window: Window) -> _Tile | None:
    """``None`` for shapes that are too large for one program."""
    _, heads, num_queries, head_dim = window.query.shape
    group, width = (triton.next_power_of_2(max(n, 1)) for n in (heads // window.key.shape[1], num_queries))
    width = max(width, 16 // group)  # a product has at least 16 rows
    head, itemsize = max(triton.next_power_of_2(head_dim), 16), window.query.itemsize
    tile = _Tile(group, width, group * width, head, configs.window_keys(group * width, head, itemsize))
    fits = tile.ROWS * tile.HEAD_DIM * itemsize <= configs.WINDOW_BYTES and tile.ROWS <= 256
    return tile if fits and 4 * (window.pooling // 2) <= tile.BLOCK_KEYS else None


def _table(terms: PromptTerms) -> tuple[torch.Tensor, int, int]:
    """The distance table, how far a row's own is from the one before, and how many distances it has."""
    table = terms.distance_table.contiguous()
    num_distances = table.shape[-1]
    return table, num_distances if table.dim() == 2 else 0, num_distances


def _attend(window: Window, tile: _Tile, terms: PromptTerms | None = None) -> torch.Tensor:
    """The attention ``[B, n]``, or the bias that it is a part of.

    Two launches. `key_index` is contiguous; of `query_index` each row is.
    """
    query, key, query_index, key_index, cos, sin, scaling, pooling = window
    (batch_size, num_heads, num_queries, head_dim), (_, key_heads, num_keys, _) = query.shape, key.shape
    reach, floats = pooling // 2, functools.partial(query.new_empty, dtype=torch.float32)
    num_tiles = configs.ceil_divide(num_keys, tile.BLOCK_KEYS - 2 * reach)
    output = floats((batch_size, num_keys))
    if not output.numel():
        return output
    finished = moments = table = None
    stride_table, end, num_distances, weight = 0, 0, 0, 0.0
    if terms is not None:
        finished, moments = query.new_empty(batch_size, dtype=torch.int32), floats((batch_size, num_tiles, 3))
        table, stride_table, num_distances = _table(terms)
        end, weight = terms.end, terms.attention_weight
    # A few programs for every multiprocessor.
    blocks = configs.ceil_divide(num_keys, tile.BLOCK_KEYS)
    wanted = configs.ceil_divide(2 * configs.device_of(query.device).multiprocessors, batch_size * key_heads)
    keys_per_split = configs.ceil_divide(blocks, min(wanted, blocks)) * tile.BLOCK_KEYS
    num_splits = configs.ceil_divide(num_keys, keys_per_split)
    partial = floats((batch_size, key_heads, num_splits, 2, tile.ROWS))
    rotary_strides = (0, 0)
    if cos is not None and sin is not None:
        if cos.stride() != sin.stride() or cos.stride(2) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        rotary_strides = (0 if len(cos) == 1 else cos.stride(0), cos.stride(1))
    arguments = (
        query, *query.stride(), key, *key.stride(), cos, sin, *rotary_strides,
        query_index, query_index.stride(0), key_index, partial, finished,
    )  # fmt: skip
    sizes = (key_heads, num_heads // key_heads, num_queries, head_dim, num_keys, num_splits)
    scale = scaling / _LN2
    options = {
        "UPCAST": configs.INTERPRETED,
        "INPUT_PRECISION": configs.input_precision(query),
        "num_warps": configs.window_warps(tile.ROWS, tile.HEAD_DIM, query.device),
        **configs.registers(255, query.device),
        **configs.EXACT,
    }
    constants = {name: value for name, value in tile._asdict().items() if name != "GROUP"}
    sdtp_window_sums_kernel[(num_splits * key_heads, batch_size)](
        *arguments, *sizes, keys_per_split, scale, **constants, **options, num_stages=2
    )
    sdtp_window_kernel[(num_tiles, batch_size)](
        *arguments, output, moments, table, stride_table, *sizes, end, num_distances, weight, scale,
        FLOOR=reference.ATTENTION_FLOOR, REACH=reach, **tile._asdict(), TOKENS=_TOKENS_OF_LAST, TILES=_TILES,
        **options, num_stages=1,
    )  # fmt: skip
    return output


def window_attention(window: Window) -> torch.Tensor:
    """Two launches; twice as many where the heads that share a key head are too many for a program, and so on."""
    tile, group = _tile(window), window.query.shape[1] // window.key.shape[1]
    if tile is not None:
        window = window._replace(query_index=window.query_index.contiguous(), key_index=window.key_index.contiguous())
        return _attend(window, tile)
    if group < 2:
        return reference.window_attention(window)
    heads = window.query.unflatten(1, (-1, group)).tensor_split([group // 2], dim=2)
    first, second = (window_attention(window._replace(query=query.flatten(1, 2))) for query in heads)
    return torch.lerp(second, first, group // 2 / group)


def prompt_bias(terms: PromptTerms) -> torch.Tensor:
    """One launch for the distance alone, two with attention, computed or given."""
    terms = terms._replace(token_index=terms.token_index.contiguous())
    index, attention, end = terms.token_index, terms.attention, terms.end
    if (window := terms.window) is not None:
        if (tile := _tile(window)) is not None:
            return _attend(window, tile, terms)
        attention = window_attention(window)
    batch_size, num_tokens = index.shape
    bias = torch.empty(batch_size, num_tokens, dtype=torch.float32, device=index.device)
    if not bias.numel():
        return bias
    logs = moments = None
    grid = (configs.ceil_divide(num_tokens, _TOKENS), batch_size)
    if attention is not None:
        logs, moments = torch.empty_like(bias), bias.new_empty(batch_size, grid[0], 3)
        sdtp_logarithm_kernel[grid](
            attention.contiguous(), index, logs, moments, num_tokens, end,
            FLOOR=reference.ATTENTION_FLOOR, TOKENS=_TOKENS, **configs.EXACT,
        )  # fmt: skip
    table, stride_table, num_distances = _table(terms)
    sdtp_bias_kernel[grid](
        index, table, stride_table, logs, moments, bias, num_tokens, end, num_distances, grid[0],
        terms.attention_weight, TOKENS=_TOKENS, TILES=_TILES, **configs.EXACT,
    )  # fmt: skip
    return bias
