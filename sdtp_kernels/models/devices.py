"""Where a model's layers compute: devices of an accelerate ``device_map``, processes of tensor parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def device_of(module: Any) -> torch.device:
    """Where a module computes, and leaves its output: its weights may rest elsewhere, on the meta device even."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):  # accelerate's SequentialHook has several
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device  # type: ignore[no-any-return]


def from_first(tensor: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """What the first process of the group has, in all of them.

    Sums over processes may differ in the last bit, and a tie that flips in one of them would leave it other tokens.
    """
    if group is None:
        return tensor
    from torch.distributed import _functional_collectives as collectives

    return collectives.broadcast(tensor, 0, group)  # type: ignore[no-any-return]


def mean_over(tensor: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Mean over the processes of the group."""
    if group is None:
        return tensor
    from torch.distributed import _functional_collectives as collectives

    return collectives.all_reduce(tensor, "sum", group) / group.size()  # type: ignore[no-any-return]
