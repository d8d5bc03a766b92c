"""What a patched model says of its last prefill."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .. import backends

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer in the last prefill."""

    layer: int
    tokens_in: int
    """Tokens that arrived, padding of the batch included."""
    tokens_out: int
    """Tokens that the layer computed."""
    kv_bytes: int
    """Bytes of what the layer has left in its cache after the prefill."""
    prune_seconds: float | None
    """Time of scoring, selection and gather before this layer; ``None`` where there is no stage."""


@dataclass(frozen=True)
class PrefillReport:
    """The last prefill, layer by layer; :class:`SdtpHandle` has an example."""

    tokens: int = 0
    """Columns of the prompt."""
    backend: str = ""
    """The backend that was asked for and, where that was ``auto``, the one chosen."""
    layers: list[LayerReport] = field(default_factory=list)
    seconds: float = 0.0
    """Time of all decoder layers; on a GPU between two events of the stream."""
    kept: torch.Tensor | None = None
    """``[B, K]`` int64: the tokens that are left, counted from the row's first token without padding; -1 is padding.
    ``logits[b, j]`` and ``last_hidden_state[b, j]`` belong to token ``kept[b, j]``. With ``logits_to_keep`` the output
    has the last of them."""
    dropped_kv: str = "none"
    """What later layers keep of a dropped token: ``"none"``, or ``"predicted"`` keys and values."""
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
            f"KV {self.kv_bytes / 2**20:.1f} MiB, dropped_kv {self.dropped_kv!r}",
            f"{'layer':>5} {'in':>8} {'out':>8} {'KV KiB':>10} {'prune ms':>9}",
        ]
        for r in self.layers:
            pruning = "" if r.prune_seconds is None else f"{r.prune_seconds * 1e3:.2f}"
            lines.append(f"{r.layer:>5} {r.tokens_in:>8} {r.tokens_out:>8} {r.kv_bytes / 1024:>10.1f} {pruning:>9}")
        return "\n".join(lines)


class PrefillRecorder:
    """Collects one prefill without waiting for the device: times are read when the report is asked for."""

    def __init__(self, backend: str, inputs_embeds: torch.Tensor, dropped_kv: str) -> None:
        self._device = inputs_embeds.device
        if backend == "auto":
            found = backends.explain_backends(self._device, inputs_embeds.dtype)
            backend = f"auto ({next(status.name for status in found if status.chosen)})"
        self._tokens, self._backend, self._dropped_kv = inputs_embeds.shape[1], backend, dropped_kv
        self._layers: list[tuple[int, int, Any, Any]] = []
        self._kv_bytes: list[int] = []
        self._kept: torch.Tensor | None = None
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

    def finish(self, cache: Cache | None, kept: torch.Tensor) -> None:
        """Note the end: what the cache holds now, and the tokens that are left."""
        self._end, self._kept = self.now(), kept
        self._kv_bytes = [] if cache is None else [layer_bytes(layer) for layer in cache.layers]

    def report(self) -> PrefillReport:
        layers = []
        for i, (n_in, n_out, begin, end) in enumerate(self._layers):
            seconds = None if begin is None else self._seconds(begin, end)
            layers.append(LayerReport(i, n_in, n_out, self._kv_bytes[i] if self._kv_bytes else 0, seconds))
        seconds = self._seconds(self._begin, self._end)
        return PrefillReport(self._tokens, self._backend, layers, seconds, self._kept, self._dropped_kv)

    def _seconds(self, begin: Any, end: Any) -> float:
        if isinstance(begin, float):
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def layer_bytes(layer: Any) -> int:
    """Bytes of the keys and values that a layer of a cache holds, in any dtype, quantized or not."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(_bytes(getattr(layer, name, None)) for name in names)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        parts = [getattr(value, name, None) for name in ("_data", "_scale", "_shift")]  # of optimum-quanto
        return sum(map(_bytes, parts)) if parts[0] is not None else value.nbytes
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
