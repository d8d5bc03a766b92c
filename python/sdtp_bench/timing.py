"""How things are timed: interleaved, on a device that says when its work was done."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from sdtp_eval.paired import in_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    Key = TypeVar("Key", bound=Hashable)

Result = TypeVar("Result")

WARM_UPS = 3


class Device(Protocol):
    """What runs the kernels, as far as checks and times need it."""

    torch_device: torch.device
    compiler: str
    """Backend of ``torch.compile``."""
    name: str

    def flush(self) -> None:
        """Drive everything out of the L2 cache."""

    def mark(self) -> Any:
        """A point in time between the work given to the device before and after it."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def microseconds(self, begin: Any, end: Any) -> float:
        """Time between two marks that have passed."""

    def capture(self, run: Callable[[], Result]) -> Callable[[], Result]:
        """The work of `run` as one replayable graph."""


class CudaDevice:
    """A GPU of NVIDIA or AMD; see :class:`Device`."""

    torch_device = torch.device("cuda")
    compiler = "inductor"

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name = torch.cuda.get_device_name(self.torch_device)
        # AMD's last cache is not in the properties: at least 512 MB is twice that of every GPU there is.
        self._cold = torch.empty(max(4 * properties.L2_cache_size, 2**29), dtype=torch.int8, device=self.torch_device)

    def flush(self) -> None:
        self._cold.zero_()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def microseconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) * 1e3

    def capture(self, run: Callable[[], Result]) -> Callable[[], Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()

        def replay() -> Result:
            graph.replay()
            return output

        return replay


class CpuDevice:
    """This machine's processor; see :class:`Device`."""

    torch_device = torch.device("cpu")
    compiler = "inductor"
    name = "cpu"

    def flush(self) -> None:
        """Nothing: the call before has left its own megabytes in the caches, as a decoder layer does."""

    def mark(self) -> float:
        return time.perf_counter()

    def synchronize(self) -> None:
        """Nothing: calls return when their work is done."""

    def microseconds(self, begin: float, end: float) -> float:
        return (end - begin) * 1e6

    def capture(self, run: Callable[[], Result]) -> Callable[[], Result]:
        raise NotImplementedError("a CPU has no graphs to replay")


def interleave(
    device: Device, runs: Mapping[Key, Callable[[], object]], repeats: int, warm_ups: int | None = None
) -> dict[Key, list[float]]:
    """Microseconds of each run, interleaved and from a cold cache, so that a drift of the machine falls on all alike.

    Parameters
    ----------
    device : Device
    runs : mapping
        What to time, by any key; see :func:`~sdtp_eval.paired.in_turns`.
    repeats : int
        Rounds that count.
    warm_ups : int, optional
        Rounds before them; :data:`WARM_UPS` by default.

    Returns
    -------
    dict
        For each key its times, in the order of the rounds.
    """
    warm_ups = WARM_UPS if warm_ups is None else warm_ups
    marks: dict[Key, list[tuple[Any, Any]]] = {key: [] for key in runs}
    for key in in_turns(list(runs), warm_ups + repeats):
        device.flush()
        begin = device.mark()
        runs[key]()
        marks[key].append((begin, device.mark()))
    device.synchronize()
    return {key: [device.microseconds(*pair) for pair in pairs[warm_ups:]] for key, pairs in marks.items()}


def extra_bytes(run: Callable[[], object], kept_bytes: int) -> int | None:
    """Memory that a call takes at its peak, beyond what there was before it and what it returns.

    Parameters
    ----------
    run : callable
        Should have run before, so that what is set up once does not count.
    kept_bytes : int
        Size of what it returns.

    Returns
    -------
    int or None
        From the resident pages of this process, so right to some hundred KiB; None where the system keeps no resettable
        peak of them, as outside Linux.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back would serve the call unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = _status("VmRSS")
        output = run()
        peak = _status("VmHWM")
    except (OSError, AttributeError, KeyError):
        return None
    del output
    return max(peak - before - kept_bytes, 0)


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
