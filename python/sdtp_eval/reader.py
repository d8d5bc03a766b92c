"""One sample in front of one model: what every method loses against the dense pass, and what a model answers."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval.methods import Method, check_budget, mean_keep, patch, shorten
from sdtp_eval.paired import cache_of, cached_tokens, timed
from sdtp_eval.peers import compressed_forward
from sdtp_eval.schedules import KEEP_ALL
from sdtp_eval.tasks import INSIDE, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from sdtp_eval.baselines import Oracle
    from sdtp_kernels import PruningSchedule
    from sdtp_kernels.scorers import StageInput


class Scored(NamedTuple):
    """How a model continued one sample."""

    log_probabilities: torch.Tensor
    """``[answer, vocabulary]``, float32, of the answer's positions."""
    mean_keep: float
    """B, from the lengths of the cache, or from the report where that is whole."""
    seconds: float
    """Time of the forward pass over prompt and answer."""


class Reader:
    """One sample in front of one model: the dense pass, and the passes of all methods compared with it.

    Parameters
    ----------
    model : transformers model
        Not patched.
    sample : Sample
    backend : str, default "auto"
    """

    def __init__(self, model: Any, sample: Sample, backend: str = "auto") -> None:
        import torch

        self.model, self.sample, self.backend = model, sample, backend
        self.input_ids = torch.tensor([sample.ids], device=model.device)
        self.answer = torch.tensor(sample.answer, device=model.device)
        self._oracles: dict[tuple[Any, ...], Any] = {}
        self.dense = self._score(len(sample.ids), functools.partial(self._read, len(sample.ids)))

    def result(
        self, protocol: str, method: Method | None = None, schedule: PruningSchedule | None = None
    ) -> dict[str, Any]:
        """What the per-sample file says: ``nll`` (nats a token), ``nll_increase`` and ``kl`` against the dense model,
        ``exact`` (every token of the answer is the most probable one), ``mean_keep``, ``seconds``, ``prompt_tokens``.

        Without a method: of the dense model.

        Raises
        ------
        GateError
            If the cache does not hold what the schedule says.
        """
        prompt_length = self.sample.prompt_length(protocol)
        num_layers = self.model.config.num_hidden_layers
        scored = self.dense
        if method is not None and method.press is not None:
            budget = mean_keep(method, schedule, prompt_length, num_layers)
            scored = self._score(prompt_length, functools.partial(self._compress, prompt_length, method, budget))
        elif method is not None and schedule is not None:
            with self.patched(protocol, method, schedule) as handle:
                scored = self._score(prompt_length, functools.partial(self._read, prompt_length, method, schedule))
            if method.dropped_kv == "predicted":  # the cache is whole, the computation is not
                computed = sum(layer.tokens_out for layer in handle.report().layers) / len(handle.report().layers)
                after = len(self.sample.ids) - prompt_length
                scored = scored._replace(mean_keep=(computed - after) / prompt_length)
            check_budget(scored.mean_keep, method, schedule, prompt_length, num_layers)
        nll = self._nll(scored)
        dense = self.dense.log_probabilities
        kl = (dense.exp() * (dense - scored.log_probabilities)).sum(-1).mean().item()
        return {
            "nll": nll,
            "nll_increase": nll - self._nll(self.dense),
            "kl": kl,
            "exact": float((scored.log_probabilities.argmax(-1) == self.answer).all().item()),
            "mean_keep": scored.mean_keep,
            "seconds": scored.seconds,
            "prompt_tokens": prompt_length,
        }

    def patched(self, protocol: str, method: Method | None, schedule: PruningSchedule | None) -> Any:
        """The model pruning by this method; an oracle looks at the answer first."""
        if method is not None and schedule is not None and method.oracle is not None:
            method = method._replace(pruners=self.oracle_scores(method.oracle, protocol, schedule.layers))
        return patch(self.model, method, schedule, self.backend)

    def oracle_scores(self, oracle: Oracle, protocol: str, layers: tuple[int, ...]) -> Mapping[int, Any]:
        """The oracle's scores by layer, as scorers; computed once a sample."""
        import torch

        from sdtp_eval.baselines import LookUp

        prompt_length = self.sample.prompt_length(protocol)
        key = (oracle, prompt_length, layers)
        if key not in self._oracles:
            # With the last token of the answer, which is scored though the model never reads it.
            ids = torch.cat([self.input_ids, self.answer[None, -1:]], dim=1)
            scores = oracle(self.model, ids, prompt_length, len(self.answer), layers)
            self._oracles[key] = {layer: LookUp(values) for layer, values in scores.items()}
        found: Mapping[int, Any] = self._oracles[key]
        return found

    def greedy(
        self, protocol: str, method: Method | None = None, schedule: PruningSchedule | None = None, extra: int = 8
    ) -> list[int]:
        """What the model answers by itself, dense or by this method: `extra` tokens more than the answer has."""
        prompt, question = list(self.sample.context), list(self.sample.question)
        if protocol == INSIDE:
            prompt, question = [*prompt, *question], []
        prompt = shorten(method, schedule, prompt, self.model.config.num_hidden_layers)
        with self.patched(protocol, method, schedule):
            return greedy(self.model, prompt, question, len(self.answer) + extra)

    def ranks(self, method: Method, target: Oracle, layers: tuple[int, ...]) -> dict[str, Any]:
        """Spearman correlation of the method's scores with the target's, stage by stage, with nothing dropped.

        Only tokens that a stage may drop count: neither the first 4 nor the last tenth.
        """
        from scipy.stats import spearmanr

        from sdtp_eval.baselines import pruner_score
        from sdtp_kernels import PruningSchedule, TokenPruner

        schedule = PruningSchedule(layers=layers, keep_ratio=KEEP_ALL)
        recorded: dict[int, torch.Tensor] = {}
        wanted = self.oracle_scores(target, INSIDE, layers)
        if method.oracle is not None:
            scorers = self.oracle_scores(method.oracle, INSIDE, layers)
        elif callable(method.pruners):
            scorers = dict.fromkeys(layers, method.pruners)
        else:
            scorers = {
                layer: functools.partial(pruner_score, pruner) if isinstance(pruner, TokenPruner) else pruner
                for layer, pruner in method.pruners.items()
            }

        def record(layer: int, stage: StageInput) -> torch.Tensor:
            recorded[layer] = scorers[layer](stage)
            return recorded[layer]

        watching = Method(method.name, {layer: functools.partial(record, layer) for layer in layers})
        with self.patched(INSIDE, watching, schedule):
            length = len(self.sample.context)
            scored = self._score(length, functools.partial(self._read, length))
        droppable = slice(schedule.sink, length - schedule.num_recent(length))
        stages = [
            float(spearmanr(recorded[i][0, droppable].cpu(), wanted[i].scores[droppable].cpu()).statistic)
            for i in layers
        ]
        return {
            "spearman": sum(stages) / len(stages),
            "spearman_by_stage": stages,
            "mean_keep": scored.mean_keep,
            "seconds": 0.0,
            "prompt_tokens": length,
        }

    def _read(
        self, prompt_length: int, method: Method | None = None, schedule: PruningSchedule | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Logits of the last positions, the answer's among them, and the cache, by the model as it is now."""
        import torch

        input_ids = self.input_ids
        if method is not None and method.cut is not None:
            prompt = list(self.sample.ids[:prompt_length])
            kept = shorten(method, schedule, prompt, self.model.config.num_hidden_layers)
            input_ids = torch.cat([input_ids.new_tensor([kept]), input_ids[:, prompt_length:]], dim=1)
        # What stands after the prompt is never pruned; at least the answer's positions need their logits.
        wanted = max(self.input_ids.shape[1] - prompt_length + 1, len(self.answer))
        output = self.model(input_ids, use_cache=True, logits_to_keep=wanted)
        return output.logits[0], cache_of(output)

    def _compress(self, prompt_length: int, method: Method, mean_keep: float) -> tuple[torch.Tensor, Any]:
        """As :meth:`_read`, by a press of kvpress."""
        return compressed_forward(self.model, method.press, mean_keep, self.input_ids, prompt_length, len(self.answer))

    def _score(self, prompt_length: int, read: Callable[[], tuple[torch.Tensor, Any]]) -> Scored:
        (logits, cache), seconds = timed(read, self.input_ids.device)
        after = self.input_ids.shape[1] - prompt_length
        kept = sum(length - after for length in cached_tokens(cache))
        log_probabilities = logits[-len(self.answer) :].float().log_softmax(-1)
        return Scored(log_probabilities, kept / (len(cache.layers) * prompt_length), seconds)

    def _nll(self, scored: Scored) -> float:
        return float(-scored.log_probabilities.gather(1, self.answer[:, None]).mean().item())


@contextlib.contextmanager
def prefilled_tokens(model: Any) -> Iterator[list[int]]:
    """How many tokens each decoder layer computes of the first prompt that the model reads, patched or not.

    Yields
    ------
    list of int
        By layer; 0 until the layer has run.
    """
    computed = [0] * len(model.model.layers)

    def enter(layer_idx: int, layer: Any, args: tuple[Any, ...]) -> None:
        computed[layer_idx] = computed[layer_idx] or args[0].shape[1]

    with contextlib.ExitStack() as hooks:
        for layer_idx, layer in enumerate(model.model.layers):
            hooks.callback(layer.register_forward_pre_hook(functools.partial(enter, layer_idx)).remove)
        yield computed


def greedy(model: Any, prompt: list[int], question: list[int], max_new_tokens: int) -> list[int]:
    """What ``generate()`` answers to a prompt, which a patched model prunes, and a question that follows it unpruned.

    Greedy, whatever sampling the checkpoint prefers; ends at the checkpoint's end-of-text token.
    """
    import torch
    from transformers import DynamicCache, GenerationConfig

    from sdtp_kernels.models.compat import CACHE

    own, cache = model.generation_config, None
    ids = torch.tensor([[*prompt, *question]], device=model.device)
    if question:
        cache = DynamicCache(config=model.config)
        model(ids[:, : len(prompt)], **{CACHE: cache}, logits_to_keep=1)
    end = own.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else end[0] if isinstance(end, list) else end
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=pad)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, generation_config=settings)
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new
