"""The handle of a patched model, and what it says of the last prefill."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import backends
from .settings import Current, make_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from ..schedule import PruningSchedule


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer in the last prefill."""

    layer: int
    tokens_in: int
    """Tokens that arrived, padding of the batch included."""
    tokens_out: int
    """Tokens that the layer computed and cached."""
    kv_bytes: int
    """Bytes of what the layer has left in its cache after the prefill."""
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

    def __init__(self, undo: Callable[[], None], schedule: PruningSchedule, current: Current) -> None:
        self._undo: Callable[[], None] | None = undo
        self._schedule, self._current = schedule, current
        self._recorder: PrefillRecorder | None = None
        self._note = "no prefill yet"

    def report(self) -> PrefillReport:
        """What happened in the last prefill, or piece of one.

        A prompt that ``generate()`` adds to a cache without pruning it is one, and the note says why; a call of the
        model itself that adds tokens is none.
        """
        return self._recorder.report() if self._recorder else PrefillReport(note=self._note)

    @contextlib.contextmanager
    def request(
        self,
        *,
        protect: Any = None,
        keep_ratio: float | tuple[float, ...] | list[Any] | None = None,
        enabled: bool | list[bool] = True,
        min_prompt: int | list[int] | None = None,
    ) -> Iterator[None]:
        """Settings for the prompts that this thread prefills inside the ``with`` block.

        ``generate()`` of the patched model takes the same keywords for one call.

        Parameters
        ----------
        protect : list of (int, int), list of such lists, or bool Tensor [B, N], optional
            Tokens that are never pruned: ranges (first, last + 1), counted in each row from its first token without
            padding, for all rows or one list for every row; or a mask over the columns of ``input_ids``, which is
            copied to the host because its counts set shapes. They come on top of the budget: the schedule counts the
            prompt without them.
        keep_ratio : float or tuple, or a list of them, optional
            As in :class:`PruningSchedule`, in its place; a list holds one for every row.
        enabled : bool or list of bool, default True
            False prunes nothing. A cache that begins so is left alone in later turns as well; in a later turn it puts
            off what that turn would finish.
        min_prompt : int or list of int, optional
            As in :class:`PruningSchedule`, in its place.

        Raises
        ------
        ValueError
            If a setting is out of range, or lists differ in length.
        """
        before = self._current.settings
        self._current.settings = make_settings(self._schedule, protect, keep_ratio, enabled, min_prompt)
        try:
            yield
        finally:
            self._current.settings = before

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
        self._evicted = 0, 0
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

    def evict(self, tokens: int) -> None:
        """Note that all layers so far were left with so many tokens in their caches."""
        self._evicted = len(self._layers), tokens

    def finish(self) -> None:
        self._end = self.now()

    def report(self) -> PrefillReport:
        layers = []
        for i, (n_in, n_out, begin, end) in enumerate(self._layers):
            num_evicted, left = self._evicted
            held = left if i < num_evicted else n_out
            seconds = None if begin is None else self._seconds(begin, end)
            layers.append(LayerReport(i, n_in, n_out, held * self._kv_bytes_per_token, seconds))
        return PrefillReport(self._tokens, self._backend, layers, self._seconds(self._begin, self._end))

    def _seconds(self, begin: Any, end: Any) -> float:
        if isinstance(begin, float):
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def new_recorder(decoder: Any, backend: str, inputs_embeds: torch.Tensor) -> PrefillRecorder:
    """Of a prefill that begins now."""
    device, dtype = inputs_embeds.device, inputs_embeds.dtype
    if backend == "auto":
        chosen = next(status.name for status in backends.explain_backends(device, dtype) if status.chosen)
        backend = f"auto ({chosen})"
    attention = decoder.layers[0].self_attn
    # Of this process: with tensor parallelism each caches its own heads.
    weights = (getattr(w, "_local_tensor", w) for w in (attention.k_proj.weight, attention.v_proj.weight))
    kv_width = sum(weight.shape[0] for weight in weights)
    kv_bytes_per_token = inputs_embeds.shape[0] * kv_width * dtype.itemsize
    return PrefillRecorder(inputs_embeds.shape[1], backend, device, kv_bytes_per_token)
