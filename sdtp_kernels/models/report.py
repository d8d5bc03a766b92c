"""The handle of a patched model, and what it says of the last prefill."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer in the last prefill."""

    layer: int
    tokens_in: int
    """Tokens that arrived, padding of the batch included."""
    tokens_out: int
    """Tokens that the layer computed and cached."""
    kv_bytes: int
    prune_seconds: float | None
    """Time of scoring, selection and gather before this layer; ``None`` where no stage stands."""


@dataclass(frozen=True)
class PrefillReport:
    """The last prefill, layer by layer."""

    tokens: int = 0
    """Columns of the prompt."""
    backend: str = ""
    """The backend that was asked for and, where that was ``auto``, the one chosen."""
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    """Time of all decoder layers; on a GPU between two events of the stream."""
    note: str = ""
    """Why nothing was pruned, where that is so."""

    @property
    def kept_per_stage(self) -> list[int]:
        """Tokens after each stage."""
        return [layer.tokens_out for layer in self.layers if layer.prune_seconds is not None]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values, of the prompt and the whole batch."""
        return sum(layer.kv_bytes for layer in self.layers)

    def __str__(self) -> str:
        if self.note:
            return f"SDTP: {self.note}"
        lines = [
            f"SDTP prefill: {self.tokens} tokens, backend {self.backend}, {self.seconds:.3f} s, "
            f"KV {self.kv_bytes / 2**20:.1f} MiB",
            f"{'layer':>5} {'in':>8} {'out':>8} {'KV KiB':>10} {'prune ms':>9}",
        ]
        for r in self.layers:
            pruning = "" if r.prune_seconds is None else f"{r.prune_seconds * 1e3:.2f}"
            lines.append(f"{r.layer:>5} {r.tokens_in:>8} {r.tokens_out:>8} {r.kv_bytes / 1024:>10.1f} {pruning:>9}")
        return "\n".join(lines)


class SdtpHandle:
    """Undoes :func:`apply_sdtp` and reports; also a context manager that undoes it at the end."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo
        self._recorder: PrefillRecorder | None = None
        self._note = "no prefill yet"

    def report(self) -> PrefillReport:
        """What happened in the last prefill (calls that continue a cache are none)."""
        return self._recorder.report() if self._recorder else PrefillReport(note=self._note)

    def remove(self) -> None:
        """Restore the model as it was. A second call does nothing."""
        if self._undo:
            self._undo()
            self._undo = None

    def note(self, text: str) -> None:
        """Record that the last prefill was not pruned, and why."""
        self._recorder, self._note = None, text

    def record(self, recorder: PrefillRecorder) -> None:
        """Record a pruned prefill, once it is complete."""
        self._recorder = recorder

    def __enter__(self) -> SdtpHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class PrefillRecorder:
    """Collects one prefill without waiting for the device: times are read when the report is asked for."""

    def __init__(self, tokens: int, backend: str, device: torch.device, kv_bytes_per_token: int) -> None:
        self._tokens, self._backend = tokens, backend
        self._device = device
        self._kv_bytes_per_token = kv_bytes_per_token
        self._layers: list[tuple[int, int, Any, Any]] = []
        self._begin = self.now()
        self._end = self._begin

    def now(self) -> Any:
        """A point in time: of the clock on a CPU, of the stream on an accelerator."""
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def layer(self, tokens_in: int, tokens_out: int, begin: Any, end: Any) -> None:
        """Note the next layer; `begin` and `end` are :meth:`now` around its stage, or ``None``."""
        self._layers.append((tokens_in, tokens_out, begin, end))

    def finish(self) -> None:
        self._end = self.now()

    def report(self) -> PrefillReport:
        layers = [
            LayerReport(
                i, n_in, n_out, n_out * self._kv_bytes_per_token, None if begin is None else self._seconds(begin, end)
            )
            for i, (n_in, n_out, begin, end) in enumerate(self._layers)
        ]
        return PrefillReport(self._tokens, self._backend, layers, self._seconds(self._begin, self._end))

    def _seconds(self, begin: Any, end: Any) -> float:
        if isinstance(begin, float):
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
