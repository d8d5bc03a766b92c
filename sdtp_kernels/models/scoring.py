"""Scorers as a stage uses them: a pruner ready for the fused op, or any function of the stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..pruner import FARTHEST, PrunerWeights, TokenPruner, check_finite
from ..pruner_file import PrunerStack
from ..scorers import (
    ATTENTION_WINDOW,
    QUESTION_WINDOW,
    SCORERS,
    StageInput,
    declared,
    prompt_end_bias,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..schedule import PruningSchedule


class RunningMean(NamedTuple):
    """Mean score of the stages so far, where pruners average them."""

    score: torch.Tensor
    """``[B, n]``, of the MLP alone."""
    number: int
    """Stages that it is the mean of."""


class Plain(NamedTuple):
    """A scorer that is a function of its stage."""

    function: Callable[[StageInput], torch.Tensor]
    name: str
    is_block_local: bool = False
    pooling: int = 1
    num_queries: int = ATTENTION_WINDOW
    is_lexical: bool = False

    def ready(self, hidden_states: torch.Tensor) -> Plain:
        return self

    def score(self, stage: StageInput, mean: RunningMean | None, backend: str) -> tuple[torch.Tensor, None]:
        """Scores ``[B, n]``; nothing that a later stage would want to know."""
        return self.function(stage).float(), None


class Fused(NamedTuple):
    """A TokenPruner, ready for the fused op on one device and in one dtype."""

    pruner: TokenPruner
    weights: PrunerWeights
    rms_eps: float | None
    distance_table: torch.Tensor | None
    """The distance term of every distance."""
    num_queries: int
    """How many of the last queries it looks at; 0 without an attention term."""
    attention_weight: float
    lexical_weight: float

    @classmethod
    def of(
        cls, pruner: TokenPruner, dtype: torch.dtype, sees_prompt_end: bool = True, device: torch.device | None = None
    ) -> Fused:
        """For hidden states in `dtype`, where the pruner is, or on `device`."""
        has_distance, has_attention = pruner.distance and sees_prompt_end, pruner.attention and sees_prompt_end
        weight = pruner.attention_weight.item() if has_attention else 0.0
        lexical_weight = pruner.lexical_weight.item() if pruner.lexical and sees_prompt_end else 0.0
        if device is not None and pruner.w1.device != device:
            pruner = copy.deepcopy(pruner).to(device)
        table = None
        if has_distance:
            with torch.no_grad():
                table = pruner.distance_term(torch.arange(FARTHEST + 1, device=pruner.w1.device))
        rms_eps = pruner.rms_eps if pruner.rms_norm else None
        num_queries = QUESTION_WINDOW if has_attention else 0
        return cls(pruner, pruner.weights(dtype), rms_eps, table, num_queries, weight, lexical_weight)

    @property
    def pooling(self) -> int:
        return self.pruner.pooling

    def bias(self, stage: StageInput) -> torch.Tensor | None:
        """What the scores ``[B, n]`` owe to the prompt's end; ``None`` where that is nothing."""
        table = self.table_of(stage)
        if table is None and not self.num_queries:
            return None
        if table is None:
            table = self.weights.b1.new_zeros(1)
        if not self.num_queries:
            return ops.prompt_bias(stage.token_index, table, keep_last=stage.keep_last, backend=stage.backend)
        return prompt_end_bias(stage, table, self.attention_weight)

    def table_of(self, stage: StageInput) -> torch.Tensor | None:
        """What a score owes to the token's distance to the prompt's end, ``[M]``, or ``[B, M]`` with its words."""
        table = self.distance_table
        if not self.lexical_weight or stage.prompt is None:
            return table
        overlap = stage.prompt.overlap_by_distance(stage.hidden_states.device)
        if table is None:
            return self.lexical_weight * overlap
        beyond = overlap.shape[1] - len(table)
        if beyond > 0:
            table = torch.cat([table, table[-1:].expand(beyond)])
        return torch.add(table[: overlap.shape[1]], overlap, alpha=self.lexical_weight)

    def score(
        self, stage: StageInput, mean: RunningMean | None, backend: str
    ) -> tuple[torch.Tensor, RunningMean | None]:
        """Scores ``[B, n]``, and where the pruner averages, the mean that the next stage goes on with."""
        bias = self.bias(stage)
        mean_score = ops.score_tokens(
            stage.hidden_states, *self.weights, rms_eps=self.rms_eps, backend=backend, **self.averaged(mean)
        )
        return mean_score if bias is None else mean_score + bias, self.next_mean(mean_score, mean)

    def averaged(self, mean: RunningMean | None) -> dict[str, Any]:
        """The mean of earlier stages as arguments of an op."""
        if mean is None:
            return {}
        return {"mean_score": mean.score.to(self.weights.b1.device), "num_scores": mean.number}

    def next_mean(self, mean_score: torch.Tensor, mean: RunningMean | None) -> RunningMean | None:
        if not self.pruner.averaging:
            return None
        return RunningMean(mean_score, 1 if mean is None else mean.number + 1)


class Learned:
    """A TokenPruner of a patched model; made ready again where the model has moved to another dtype or device."""

    name = "TokenPruner"
    is_block_local = True  # alone, and with what the schedule's sees_prompt_end says

    def __init__(self, pruner: TokenPruner, dtype: torch.dtype, sees_prompt_end: bool, device: torch.device) -> None:
        # A copy: the model keeps the weights it was given, whatever becomes of the module.
        self._pruner, self._sees_prompt_end = copy.deepcopy(pruner).requires_grad_(False), sees_prompt_end
        self._ready = [Fused.of(self._pruner, dtype, sees_prompt_end, device)]

    @property
    def num_queries(self) -> int:
        return self._ready[0].num_queries

    @property
    def is_lexical(self) -> bool:
        return self._ready[0].lexical_weight != 0

    def ready(self, hidden_states: torch.Tensor) -> Fused:
        for fused in self._ready:
            if fused.weights.w1.dtype == hidden_states.dtype and fused.weights.w1.device == hidden_states.device:
                return fused
        fused = Fused.of(self._pruner, hidden_states.dtype, self._sees_prompt_end, hidden_states.device)
        if not torch.compiler.is_compiling():
            self._ready.append(fused)
        return fused


class _Module:
    """Somebody's own module as a scorer, which gets hidden states in the dtype of its weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, stage: StageInput) -> torch.Tensor:
        weight = next((p for p in self.module.parameters() if p.is_floating_point()), stage.hidden_states)
        return self.module(stage.hidden_states.to(weight.dtype))  # type: ignore[no-any-return]


Scorer = Plain | Learned


def resolve_pruners(
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule,
    config: Any,
    devices: Mapping[int, torch.device],
    dtype: torch.dtype,
) -> dict[int, Scorer]:
    """A scorer for each layer of the schedule, everything checked."""
    if isinstance(pruners, str):
        if pruners not in SCORERS:
            raise ValueError(f"no scorer {pruners!r}; known: {', '.join(SCORERS)}. For a file use load_pruners(path)")
        pruners = SCORERS[pruners]
    if not isinstance(pruners, Mapping):
        if not callable(pruners) or isinstance(pruners, nn.Module):
            raise ValueError(
                f"pruners: expected {{layer: module}}, a scorer's name or function, got {type(pruners).__name__}"
            )
        return dict.fromkeys(schedule.layers, _plain(pruners))
    if isinstance(pruners, PrunerStack):
        _check_header(pruners, config)
    missing = [layer for layer in schedule.layers if layer not in pruners]
    if missing:
        raise ValueError(f"no pruner for layers {missing} of the schedule; there are pruners for {sorted(pruners)}")
    used = {layer: pruners[layer] for layer in schedule.layers}
    check_finite({layer: pruner for layer, pruner in used.items() if isinstance(pruner, nn.Module)})
    return {
        layer: _resolve_pruner(layer, pruner, schedule, config, devices[layer], dtype) for layer, pruner in used.items()
    }


def _resolve_pruner(
    layer: int, pruner: Any, schedule: PruningSchedule, config: Any, device: torch.device, dtype: torch.dtype
) -> Scorer:
    if isinstance(pruner, TokenPruner):
        if pruner.hidden_size != config.hidden_size:
            raise ValueError(
                f"pruner of layer {layer} has hidden_size={pruner.hidden_size}, the model {config.hidden_size}"
            )
        return Learned(pruner, dtype, schedule.sees_prompt_end, device)
    if isinstance(pruner, nn.Module):
        return Plain(_Module(pruner), type(pruner).__name__, is_block_local=True)
    if callable(pruner):
        return _plain(pruner)
    raise ValueError(f"pruner of layer {layer}: expected a module or a scorer function, got {type(pruner).__name__}")


def _plain(function: Callable[[StageInput], torch.Tensor]) -> Plain:
    return Plain(function, getattr(function, "__name__", repr(function)), **declared(function))


def _check_header(pruners: PrunerStack, config: Any) -> None:
    names = ("model_type", "hidden_size", "num_hidden_layers")
    pairs = {name: (getattr(pruners.header, name), getattr(config, name)) for name in names}
    differences = [f"{name}: file {a}, model {b}" for name, (a, b) in pairs.items() if a is not None and a != b]
    if differences:
        raise ValueError(
            f"these pruners were made for another model ({'; '.join(differences)}); load the file of this model"
        )
