"""``gather_tokens``: one launch copies the chosen tokens of all tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sdtp_kernels.arguments import token_dim

from . import configs

# Pointers and strides travel as kernel arguments, of which a launch holds 4 KiB.
MAX_TENSORS = 32

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def copy_tensor(
    source, output, stride_b, stride_h, stride_n, stride_d,
    columns_ptr, batch, num_keep, first_slot, last_slot, first_skipped, last_skipped,
    NUM_HEADS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """:func:`copy_tokens` of one tensor.

    A token is `NUM_HEADS` runs of `WIDTH` elements, of which `TILE` move at a time; the output is contiguous. All
    offsets are 64-bit: five prompts of 131072 hidden states of Qwen2-7B have more than 2^31 elements.
    """
    source += batch * stride_b
    output += batch * (NUM_HEADS * WIDTH) * num_keep
    for first in range(first_slot, last_slot, TOKENS):
        slots = first + tl.arange(0, TOKENS)
        mask = (slots < last_slot) & ((slots < first_skipped) | (slots >= last_skipped))
        columns = tl.load(columns_ptr + slots, mask=mask, other=-1)  # int64
        is_read = mask & (columns >= 0)
        for first_c in range(0, NUM_HEADS * WIDTH, TILE):
            c = first_c + tl.arange(0, TILE)
            in_row = c < NUM_HEADS * WIDTH
            h = (c // WIDTH).to(tl.int64)
            d = (c % WIDTH).to(tl.int64)
            source_offsets = (columns * stride_n)[:, None] + (h * stride_h + d * stride_d)[None, :]
            output_offsets = (slots.to(tl.int64) * WIDTH)[:, None] + (h * num_keep * WIDTH + d)[None, :]
            values = tl.load(source + source_offsets, mask=is_read[:, None] & in_row[None, :], other=0)
            tl.store(output + output_offsets, values, mask=mask[:, None] & in_row[None, :])


@triton.jit
def copy_tokens(
    sources, outputs, strides_b, strides_h, strides_n, strides_d,
    columns_ptr, batch, num_keep, first_slot, last_slot, first_skipped, last_skipped,
    NUM_HEADS: tl.constexpr, WIDTHS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Fill slots ``[first_slot, last_slot)`` of every output of row `batch`, but for a skipped range of them.

    The token of slot i stands in column ``columns_ptr[i]``; -1 gives zeros. Tensors are the outer loop: as the inner
    one they would all keep their addresses in registers at once.
    """
    batch = batch.to(tl.int64)
    for t in tl.static_range(len(sources)):
        copy_tensor(
            sources[t], outputs[t], strides_b[t], strides_h[t], strides_n[t], strides_d[t],
            columns_ptr, batch, num_keep, first_slot, last_slot, first_skipped, last_skipped,
            NUM_HEADS[t], WIDTHS[t], TILES[t], TOKENS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_keep"])
def sdtp_gather_kernel(
    sources, outputs, strides_b, strides_h, strides_n, strides_d,
    indices_ptr, num_keep,
    NUM_HEADS: tl.constexpr, WIDTHS: tl.constexpr, TILES: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (run of kept tokens, row): those tokens of every tensor."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    batch = tl.program_id(1)
    first_slot = tl.program_id(0) * TOKENS
    copy_tokens(
        sources, outputs, strides_b, strides_h, strides_n, strides_d,
        indices_ptr + batch.to(tl.int64) * num_keep, batch, num_keep,
        first_slot, tl.minimum(first_slot + TOKENS, num_keep), 0, 0,
        NUM_HEADS, WIDTHS, TILES, TOKENS,
    )  # fmt: skip


def empty_outputs(tensors: list[torch.Tensor], num_keep: int) -> list[torch.Tensor]:
    outputs = []
    for tensor in tensors:
        shape = list(tensor.shape)
        shape[token_dim(tensor)] = num_keep
        outputs.append(tensor.new_empty(shape))
    return outputs


class _Layout(NamedTuple):
    """A token tensor as ``[B, heads, N, width]``; computed, because views are what a stage's host time goes into."""

    num_heads: int
    width: int
    strides: tuple[int, int, int, int]


def _layout_of(tensor: torch.Tensor) -> _Layout:
    # The stride of a single row or head is never used; it may be the prompt's length, which no kernel is to depend on.
    shape = tensor.shape
    strides = [0 if size == 1 else stride for size, stride in zip(shape, tensor.stride(), strict=True)]
    if len(shape) == 2:
        return _Layout(1, 1, (strides[0], 0, strides[1], 0))
    if len(shape) == 3:
        return _Layout(1, shape[2], (strides[0], 0, strides[1], strides[2]))
    return _Layout(shape[1], shape[3], (strides[0], strides[1], strides[2], strides[3]))


def copy_arguments(tensors: list[torch.Tensor], outputs: list[torch.Tensor]) -> dict[str, object]:
    """What :func:`copy_tokens` needs of the tensors, as one table of tuples."""
    sources = [_as_integers(tensor) for tensor in tensors]
    layouts = [_layout_of(source) for source in sources]
    strides_b, strides_h, strides_n, strides_d = zip(*(layout.strides for layout in layouts), strict=True)
    return {
        "sources": tuple(sources),
        "outputs": tuple([_as_integers(output) for output in outputs]),
        "strides_b": strides_b,
        "strides_h": strides_h,
        "strides_n": strides_n,
        "strides_d": strides_d,
        "NUM_HEADS": tuple([layout.num_heads for layout in layouts]),
        "WIDTHS": tuple([layout.width for layout in layouts]),
        "TILES": tuple(
            [
                configs.gather_tile(source, layout.num_heads * layout.width, layout.strides)
                for source, layout in zip(sources, layouts, strict=True)
            ]
        ),
    }


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """View as integers of the element's size: a copy must not compute."""
    if tensor.dtype == torch.complex128:  # the one dtype wider than any integer; a copy only of odd layouts
        parts = torch.view_as_real(tensor)
        tensor = parts if tensor.dim() == 2 else parts.flatten(-2)
    integer = _INTEGERS[tensor.itemsize]
    return tensor if tensor.dtype == integer else tensor.view(integer)


def gather_tokens(tensors: list[torch.Tensor], indices: torch.Tensor, chained: bool = False) -> list[torch.Tensor]:
    """One launch for every :data:`MAX_TENSORS` tensors; `chained` where the previous launch wrote `indices`."""
    batch_size, num_keep = indices.shape
    outputs = empty_outputs(tensors, num_keep)
    pairs = [(tensor, output) for tensor, output in zip(tensors, outputs, strict=True) if output.numel()]
    for first in range(0, len(pairs), MAX_TENSORS):
        group = pairs[first : first + MAX_TENSORS]
        tokens = configs.GATHER_TOKENS
        sdtp_gather_kernel[(configs.ceil_divide(num_keep, tokens), batch_size)](
            **copy_arguments([tensor for tensor, _ in group], [output for _, output in group]),
            indices_ptr=indices.contiguous(), num_keep=num_keep, TOKENS=tokens,
            **configs.EXACT, **configs.overlap(indices.device, chained),
        )  # fmt: skip
    return outputs
