"""One process or several: what evaluation and training need of ``accelerate launch``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdtp_eval.command import choose_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch


@dataclass(frozen=True)
class Workers:
    """The processes that share the work, seen from one of them."""

    index: int
    number: int
    device: torch.device
    wait: Callable[[], None]
    """Returns once every process has called it."""
    add_up: Callable[[Sequence[torch.Tensor]], None]
    """Replaces each tensor by its sum over the processes."""


def join_workers(device: str | None) -> Workers:
    """This process among those that ``accelerate launch`` (or ``torchrun``) started; alone where neither did.

    Parameters
    ----------
    device : {"cpu", "cuda"}, optional
        By default the GPU where there is one; with several processes each takes its own.

    Raises
    ------
    ValueError
        If a GPU is asked for and torch finds none.
    """
    chosen = choose_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers(0, 1, chosen, lambda: None, lambda tensors: None)
    from accelerate import PartialState
    from accelerate.utils import reduce

    state = PartialState(cpu=chosen.type == "cpu")

    def add_up(tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.copy_(reduce(tensor, "sum"))

    return Workers(state.process_index, state.num_processes, state.device, state.wait_for_everyone, add_up)
