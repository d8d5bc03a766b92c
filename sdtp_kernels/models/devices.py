"""Where a model's layers compute: devices of an accelerate ``device_map``, processes of tensor parallelism."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup


def device_of(module: Any) -> torch.device:
    """Where a module computes, and leaves its output: its weights may rest elsewhere, on the meta device even."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):  # accelerate's SequentialHook has several
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device  # type: ignore[no-any-return]


def own_forward(module: Any) -> Any:
    """The ``forward`` of this instance, beneath accelerate's hook; ``None`` where it is that of the class."""
    forward = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace the ``forward`` of one instance, beneath accelerate's hook where there is one.

    Returns
    -------
    callable
        Undoes it, whether or not hooks have been added or removed in between.
    """
    bound = types.MethodType(forward, module)
    setattr(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward", bound)

    def undo() -> None:
        if module.__dict__.get("_old_forward") is bound:
            module._old_forward = types.MethodType(type(module).forward, module)
        else:
            module.__dict__.pop("forward")

    return undo


def tensor_parallel_group(model: Any) -> ProcessGroup | None:
    """The processes that hold shares of this model's weights and see the same tokens; ``None`` for one alone."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    return model._mesh_manager.get_mesh("tp").get_group()  # type: ignore[no-any-return]


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
