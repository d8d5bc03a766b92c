"""One prompt, dense and pruned side by side: the checks that come before the clock, and turns that are fair."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sdtp_eval.flops import predicting_flops, prefill_flops, scoring_flops, tokens_per_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from sdtp_kernels import PrefillReport, PruningSchedule, SdtpHandle

Result = TypeVar("Result")


class GateError(ValueError):
    """The patched model does not compute what it must, so its speed is of no interest."""


class Pair(NamedTuple):
    """One prompt, one model, one way to prune it."""

    model: Any
    input_ids: torch.Tensor
    """``[1, N]``"""
    pruners: Any
    """As :func:`sdtp_kernels.apply_sdtp` takes them."""
    schedule: PruningSchedule
    backend: str = "auto"
    kv_predictor: Any = None
    """Dropped tokens keep the keys and values that it predicts; with ``None`` they keep none."""

    @property
    def tokens(self) -> int:
        """Length of the prompt."""
        return int(self.input_ids.shape[1])

    @property
    def tokens_per_layer(self) -> list[int]:
        """What each layer computes of the prompt where it is pruned."""
        return tokens_per_layer(self.schedule, self.tokens, self.model.config.num_hidden_layers)

    @property
    def cached_per_layer(self) -> list[int]:
        """What each layer of the cache holds then."""
        computed = self.tokens_per_layer
        return computed if self.kv_predictor is None else [self.tokens] * len(computed)

    def flops(self) -> dict[str, int]:
        """Operations of a prefill, ``dense`` and ``pruned``; scorers and predicted keys and values are part of the
        latter."""
        config, lengths = self.model.config, self.tokens_per_layer
        pruned = prefill_flops(config, lengths, self.cached_per_layer)
        pruned += scoring_flops(config, self.schedule, self.tokens, self.pruners)
        if self.kv_predictor is not None:
            pruned += predicting_flops(self.kv_predictor, self.schedule, lengths)
        return {"dense": prefill_flops(config, [self.tokens] * len(lengths)), "pruned": pruned}

    def patched(self, **changes: Any) -> SdtpHandle:
        """The model, pruning by the schedule with these changes."""
        from sdtp_kernels import apply_sdtp

        return apply_sdtp(
            self.model,
            self.pruners,
            dataclasses.replace(self.schedule, **changes),
            self.backend,
            dropped_kv="none" if self.kv_predictor is None else "predicted",
            kv_predictor=self.kv_predictor,
        )

    def prefill(self) -> Any:
        """The model's output for the prompt: its cache, and logits of the last token only."""
        return self.model(self.input_ids, use_cache=True, logits_to_keep=1)

    def check_keeping_all(self, dense: torch.Tensor, keep_ratio: float) -> None:
        """Refuse a patched model that is not the dense one where it keeps every token.

        Parameters
        ----------
        dense : Tensor [1, 1, V]
            The dense model's logits.
        keep_ratio : float
            At exactly 1 the patch hands the prompt to the original forward, which proves little. A little less, such as
            :data:`sdtp_eval.schedules.KEEP_ALL`, goes through scoring, selection, gather and the pruned loop, and keeps
            every token all the same.

        Raises
        ------
        GateError
            If the logits differ in a single bit.
        """
        with self.patched(keep_ratio=keep_ratio):
            self.check_equal(self.prefill().logits, dense, keep_ratio)

    @staticmethod
    def check_equal(logits: torch.Tensor, dense: torch.Tensor, keep_ratio: float) -> None:
        """As :meth:`check_keeping_all`, of logits that are there already."""
        import torch

        if not torch.equal(logits, dense):
            raise GateError(
                f"no figures: with keep ratio {keep_ratio} the patched model must equal the unpatched one bit for bit, "
                f"but its logits differ by {(logits - dense).abs().max().item():.3g}. Please report it with the output "
                "of 'sdtp doctor --json'"
            )

    def check_kept(self) -> tuple[PrefillReport, Any]:
        """Prefill pruned, and refuse a result that is not what the schedule says.

        Returns
        -------
        report : PrefillReport
        output
            As of :meth:`prefill`.

        Raises
        ------
        GateError
            If a layer holds another number of tokens, or the logits are not finite.
        """
        with self.patched() as handle:
            output = self.prefill()
            report = handle.report()
        self.check_output(report, output)
        return report, output

    def check_output(self, report: PrefillReport, output: Any) -> None:
        """As :meth:`check_kept`, of a prefill that has run already."""
        import torch

        expected, cached = self.tokens_per_layer, cached_tokens(cache_of(output))
        reported = [layer.tokens_out for layer in report.layers] or expected  # empty where nothing was pruned
        if reported != expected or cached != self.cached_per_layer:
            raise GateError(f"no figures: the schedule keeps {expected} tokens per layer, the cache holds {cached}")
        if not torch.isfinite(output.logits).all():
            raise GateError("no figures: the pruned model's logits are not finite; try --dtype float32")


def cache_of(output: Any) -> Any:
    """The KV cache in what a model returned."""
    from sdtp_kernels.models.compat import CACHE

    return output[CACHE]


def cached_tokens(cache: Any) -> list[int]:
    """Tokens that each layer of a cache of transformers holds."""
    return [layer.keys.shape[-2] for layer in cache.layers]


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a cache of transformers holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def in_turns(names: Sequence[Result], rounds: int) -> Iterator[Result]:
    """All names once a round, each round beginning one further on: a drift of the machine's speed falls on all alike.

    In as many rounds as there are names each has every place once, and of three or more nobody follows itself, which
    would find the caches as it left them.
    """
    for i in range(rounds):
        first = i % len(names)
        yield from names[first:]
        yield from names[:first]


def now(device: torch.device) -> float:
    """Seconds on a clock of the host, once all work given to the device is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What `work` returns, and the seconds that it took, on a GPU until that is done."""
    begin = now(device)
    result = work()
    return result, now(device) - begin
