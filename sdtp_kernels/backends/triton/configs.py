"""What a launch depends on besides its arguments: the device and the table of tile shapes.

Nothing is timed: a configuration is looked up by architecture, element size and whether tokens are aligned. What
changes the order of a sum (the tile of the score) depends on nothing else, so a score has the same bits whatever the
batch, the prompt's length or the path that computes it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

if TYPE_CHECKING:
    from collections.abc import Sequence

# Whether the kernels run in Triton's interpreter. Read once, when Triton is imported: the decorator does the same.
INTERPRETED: bool = triton.knobs.runtime.interpret


class ScoreConfig(NamedTuple):
    """Tile of the first layer's matrix product: tokens x width of the pruner x hidden size."""

    block_tokens: int
    block_width: int
    block_hidden: int
    num_warps: int
    num_stages: int
    input_precision: str = "ieee"
    """How float32 operands reach the tensor cores; 16-bit operands are exact in every mode."""


# 128 x 128 accumulators over 8 warps leave room for the GELU: 128 x 256, or 4 warps, spill on every NVIDIA target.
_WARP_GROUPS = ScoreConfig(128, 128, 64, num_warps=8, num_stages=3)
# Where a warp multiplies alone, its operands pass through registers too: half the depth, or the one launch spills.
_WARPS = ScoreConfig(128, 128, 32, num_warps=8, num_stages=4)
# float32 as three tf32 products: float32's accuracy at tensor-core speed. Its six operands leave room for half a tile.
_SPLIT = ScoreConfig(64, 128, 32, num_warps=8, num_stages=2, input_precision="tf32x3")
# CDNA has 64 KiB of shared memory, and matrix instructions that take float32 as it is.
_CDNA = ScoreConfig(128, 128, 64, num_warps=8, num_stages=2)
_CDNA_FLOAT32 = ScoreConfig(128, 128, 32, num_warps=8, num_stages=2)

# Architecture -> configuration by bytes of an element.
SCORE: dict[str, dict[int, ScoreConfig]] = {
    "sm_80": {2: _WARPS, 4: _SPLIT},
    "sm_86": {2: _WARPS, 4: _SPLIT},
    "sm_89": {2: _WARPS, 4: _SPLIT},
    "sm_90": {2: _WARP_GROUPS, 4: _SPLIT},
    "sm_100": {2: _WARP_GROUPS, 4: _SPLIT},
    "sm_120": {2: _WARPS, 4: _SPLIT},
    "gfx90a": {2: _CDNA, 4: _CDNA_FLOAT32},
    "gfx942": {2: _CDNA, 4: _CDNA_FLOAT32},
    "interpreter": {2: _CDNA, 4: _CDNA_FLOAT32},
}

# The same for tensors that are not aligned. On NVIDIA their elements pass through registers one at a time, each with an
# address of its own, which leaves room for a quarter of the tile.
_ELEMENTS = ScoreConfig(64, 64, 32, num_warps=8, num_stages=2)
_ELEMENTS_SPLIT = ScoreConfig(64, 64, 16, num_warps=8, num_stages=2, input_precision="tf32x3")

SCORE_UNALIGNED: dict[str, dict[int, ScoreConfig]] = {
    "sm_80": {2: _ELEMENTS, 4: _ELEMENTS_SPLIT},
    "sm_86": {2: _ELEMENTS, 4: _ELEMENTS_SPLIT},
    "sm_89": {2: _ELEMENTS, 4: _ELEMENTS_SPLIT},
    "sm_90": {2: _ELEMENTS, 4: _ELEMENTS_SPLIT},
    "sm_100": {2: _ELEMENTS, 4: _ELEMENTS_SPLIT},
    "sm_120": {2: _ELEMENTS, 4: _ELEMENTS_SPLIT},
    "gfx90a": {2: _CDNA, 4: _CDNA_FLOAT32},
    "gfx942": {2: _CDNA, 4: _CDNA_FLOAT32},
    "interpreter": {2: _ELEMENTS, 4: _ELEMENTS},
}


class AttentionConfig(NamedTuple):
    """Tile of the attention: queries x keys, for heads of any size up to a limit."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int
    input_precision: str = "ieee"


# Bytes of an element -> configuration by the largest head that it holds. Larger heads, whose queries alone would fill
# the registers, take the reference.
_HEADS_SPLIT = {64: AttentionConfig(32, 16, 4, 2, "tf32x3"), 128: AttentionConfig(32, 16, 8, 2, "tf32x3")}
_HEADS_WARP_GROUPS = {
    2: {64: AttentionConfig(128, 64, 8, 3), 128: AttentionConfig(128, 64, 8, 2), 256: AttentionConfig(64, 32, 8, 2)},
    4: _HEADS_SPLIT,
}
# Where a warp multiplies alone, blocks of 64 keys spill with Triton 3.8.
_HEADS_WARPS = {
    2: {64: AttentionConfig(128, 32, 4, 3), 128: AttentionConfig(128, 32, 8, 3), 256: AttentionConfig(64, 32, 8, 2)},
    4: _HEADS_SPLIT,
}
_HEADS_CDNA = {
    2: {64: AttentionConfig(128, 64, 4, 2), 128: AttentionConfig(128, 32, 4, 2), 256: AttentionConfig(64, 32, 8, 2)},
    4: {64: AttentionConfig(64, 32, 4, 2), 128: AttentionConfig(64, 32, 4, 1)},
}

ATTENTION: dict[str, dict[int, dict[int, AttentionConfig]]] = {
    "sm_80": _HEADS_WARPS,
    "sm_86": _HEADS_WARPS,
    "sm_89": _HEADS_WARPS,
    "sm_90": _HEADS_WARP_GROUPS,
    "sm_100": _HEADS_WARP_GROUPS,
    "sm_120": _HEADS_WARPS,
    "gfx90a": _HEADS_CDNA,
    "gfx942": _HEADS_CDNA,
    "interpreter": _HEADS_CDNA,
}


def attention_config(query: torch.Tensor) -> AttentionConfig:
    table = ATTENTION[device_of(query.device).target][query.itemsize]
    return next(config for largest, config in table.items() if query.shape[3] <= largest)


def largest_head(query: torch.Tensor) -> int:
    return max(ATTENTION[device_of(query.device).target][query.itemsize])


def ceil_divide(a: int, b: int) -> int:
    """Not ``triton.cdiv``, which takes ten microseconds on the host."""
    return -(-a // b)


class Device(NamedTuple):
    """The accelerator as far as a launch cares."""

    target: str
    """A key of :data:`SCORE`."""
    multiprocessors: int


@functools.cache
def device_of(device: torch.device) -> Device:
    """The accelerator behind `device`; a property query, never a sync."""
    if device.type == "cpu":
        return Device("interpreter", multiprocessors=1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        target = properties.gcnArchName.split(":")[0]
    else:
        target = nvidia_target(properties.major, properties.minor)
    return Device(target, properties.multi_processor_count)


def nvidia_target(major: int, minor: int) -> str:
    """The newest table entry that is not newer than the device: sm_87 takes sm_86, sm_103 takes sm_100."""
    known = sorted(int(name[3:]) for name in SCORE if name.startswith("sm_"))
    return f"sm_{max(arch for arch in known if arch <= 10 * major + minor)}"


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether the compiler will see that the tensor can be read many elements at a time."""
    return _are_aligned(tensor, tensor.shape[-1], tensor.stride())


def _are_aligned(tensor: torch.Tensor, width: int, strides: Sequence[int]) -> bool:
    # Of a stride or a size the compiler knows whether it is a multiple of 16; of a pointer, of 16 bytes.
    *outer, last = strides
    bits = tensor.data_ptr() | width
    for stride in outer:
        bits |= stride
    return last == 1 and bits % 16 == 0


def score_config(hidden_states: torch.Tensor, w1: torch.Tensor) -> ScoreConfig:
    table = SCORE if is_aligned(hidden_states) and is_aligned(w1) else SCORE_UNALIGNED
    return table[device_of(hidden_states.device).target][hidden_states.itemsize]


# For every launch. Roundings are then as the source has them, so a tile gives the same bits in every kernel that
# inlines it; and Triton's default, which changes with 3.10, does not matter.
EXACT = {"enable_fp_fusion": False}


def registers(limit: int, device: torch.device) -> dict[str, object]:
    """Registers that a thread may take. Left to itself, ptxas spills a few for an occupancy of no use here."""
    return {} if device_of(device).target.startswith("gfx") else {"maxnreg": limit}


def has_pdl(device: torch.device) -> bool:
    """Whether a launch may start while the one before it still runs (programmatic dependent launch)."""
    target = device_of(device).target
    return not INTERPRETED and target.startswith("sm_") and int(target[3:]) >= 90


def overlap(device: torch.device, chained: bool = True) -> dict[str, object]:
    """How to launch a kernel that, where it can, waits for the previous one itself.

    Only where that is a kernel of ours, as `chained` says: each of them has waited for all that came before it.
    """
    return {"PDL": True, "launch_pdl": True} if chained and has_pdl(device) else {"PDL": False}


# Keys that a program holds at once -> its threads. A packed scan counts two kinds of keys in 16 bits each, so a tile
# stays below 2^15.
SELECT_THREADS = {256: 128, 1024: 256, 4096: 512}
# The same for a program that copies as well: more keys than these would spill.
MAX_TILE_WITH_COPY = 1024


def select_tile(block_size: int, largest: int = max(SELECT_THREADS)) -> int:
    """Keys of a tile for blocks of `block_size` tokens: the smallest that holds one, or the largest allowed."""
    return next((tile for tile in SELECT_THREADS if block_size <= tile or tile == largest), largest)


def select_options(tile: int, device: torch.device) -> dict[str, object]:
    """How to launch a kernel that ranks tiles of this size."""
    target = device_of(device).target
    warp_size = 64 if target.startswith("gfx") else 32
    limit = 144 if target == "sm_100" and SELECT_THREADS[tile] < 512 else 128  # 128 spill there with Triton 3.6
    return {"num_warps": SELECT_THREADS[tile] // warp_size, **registers(limit, device), **EXACT}


def input_precision(operand: torch.Tensor) -> str:
    """How operands like this one reach the tensor cores; see :class:`ScoreConfig`."""
    return SCORE[device_of(operand.device).target][operand.itemsize].input_precision


# What the queries of a window's tile may take of shared memory. With more of them, more keys, or fewer warps on NVIDIA,
# the kernels spill.
WINDOW_BYTES = 32 * 1024


def window_keys(rows: int, head_dim: int, itemsize: int) -> int:
    """Keys of a tile of the window's attention, for so many queries."""
    return 16 if itemsize == 4 else 64 if rows <= 64 and head_dim <= 128 else 32


def window_warps(rows: int, head_dim: int, device: torch.device) -> int:
    return 4 if rows <= 64 and head_dim <= 128 and device_of(device).target.startswith("gfx") else 8


GATHER_TOKENS = 16  # tokens of one program


def gather_tile(source: torch.Tensor, width: int, strides: Sequence[int]) -> int:
    """Columns of tokens of `width` elements that a program moves at a time: at most 1 KiB of each.

    Of tokens that are not aligned, half of that: every element takes registers for an address of its own.
    """
    most = 1024 if _are_aligned(source, source.shape[-1], strides) else 512
    return min(1 << (width - 1).bit_length(), most // source.itemsize)
