"""What a launch of the GPU backends can hold. csrc/include/sdtp/cuda.h states the same numbers."""

from __future__ import annotations

# Rows are the second axis of every launch, and a launch has at most so many programs along it.
MAX_BATCH = 65535
# Columns are 32-bit inside the kernels; element offsets are 64-bit everywhere.
MAX_TOKENS = 2**24
# A tile holds the neighbours of its tokens too, and most of a tile should be its own.
MAX_POOLING = 255
# Queries of the last window stand in shared memory.
MAX_HEAD_DIM = 256


def check_size(backend: str, batch_size: int, num_tokens: int) -> None:
    if batch_size > MAX_BATCH or num_tokens > MAX_TOKENS:
        raise ValueError(
            f"backend {backend!r} takes at most {MAX_BATCH} rows of at most {MAX_TOKENS} tokens, got {batch_size} rows "
            f"of {num_tokens}: split the batch, or name backend='reference'"
        )


def check_pooling(backend: str, pooling: int) -> None:
    if pooling > MAX_POOLING:
        raise ValueError(
            f"backend {backend!r} pools over at most {MAX_POOLING} tokens, got pooling={pooling}: pool less, or name "
            "backend='reference'"
        )


def check_head_dim(backend: str, head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"backend {backend!r} takes at most {MAX_HEAD_DIM} elements a head, got queries of {head_dim}: name "
            "backend='reference'"
        )
