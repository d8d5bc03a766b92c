"""Where the time of a forward pass goes, as the profiler of torch tells it."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BUCKETS = ("linear", "attention", "pruning", "other")
WHOLE, BETWEEN = "forward pass", "between decoder layers"
PRODUCTS = frozenset({"aten::linear", "aten::addmm", "aten::mm", "aten::bmm", "aten::matmul"})
ATTENTION = ("scaled_dot_product", "flash_attention", "flash_attn", "flex_attention")  # parts of kernels' names


def where_time_goes(work: Callable[[], Any], model: Any) -> dict[str, float]:
    """Seconds of `work` by what they were spent on.

    Parameters
    ----------
    work : callable
        Runs the model once.
    model : transformers model
        Patched or not.

    Returns
    -------
    dict of str to float
        ``linear`` (matrix products in decoder layers and of the head), ``attention`` (the attention kernel),
        ``pruning`` (all that happens between two decoder layers; of a dense model the loop's own overhead) and
        ``other``. On a CPU they add up to the whole, the profiler's own cost included; on a GPU they are the times of
        its kernels.
    """
    import torch
    from torch.profiler import ProfilerActivity, record_function

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else every profile writes lines to stderr
    on_gpu = next(model.parameters()).is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    ranges: list[Any] = []

    def leave_layer(*_: Any) -> None:
        ranges.append(record_function(BETWEEN))
        ranges[-1].__enter__()

    def enter_layer(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as hooks:
        for below, above in itertools.pairwise(model.model.layers):
            hooks.callback(below.register_forward_hook(leave_layer).remove)
            hooks.callback(above.register_forward_pre_hook(enter_layer).remove)
        with torch.profiler.profile(activities=activities) as profiler, record_function(WHOLE):
            work()
            if on_gpu:
                torch.cuda.synchronize()
    spent = dict.fromkeys(BUCKETS, 0.0)
    for event in profiler.events():
        names = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if names[-1] == WHOLE:
            spent[bucket(names)] += microseconds / 1e6
    return spent


def bucket(names: Sequence[str]) -> str:
    """What an operation counts as, by its own name and the names of all that it was called by."""
    if BETWEEN in names:
        return "pruning"
    if any(part in name for name in names for part in ATTENTION):
        return "attention"
    return "linear" if PRODUCTS.intersection(names) else "other"
