"""Scorers as a stage uses them: a pruner ready for the fused op, or any function of the stage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..pruner import FARTHEST, PrunerStack, PrunerWeights, TokenPruner, check_finite
from ..scorers import (
    ATTENTION_POOLING,
    ATTENTION_WINDOW,
    QUESTION_WINDOW,
    SCORERS,
    StageInput,
    question_attention,
    window_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..schedule import PruningSchedule


class Opinion(NamedTuple):
    """What the stages so far thought of the tokens, where pruners average it."""

    mean_score: torch.Tensor
    """``[B, n]``, of the MLP alone."""
    number: int
    """Stages that it is the mean of."""


class Plain(NamedTuple):
    """A scorer that is a function of its stage."""

    function: Callable[[StageInput], torch.Tensor]
    name: str
    is_block_local: bool
    pooling: int = 1
    num_queries: int = ATTENTION_WINDOW

    def score(self, stage: StageInput, opinion: Opinion | None, backend: str) -> tuple[torch.Tensor, None]:
        """Scores ``[B, n]``; nothing that a later stage would want to know."""
        return self.function(stage).float(), None


class Fused(NamedTuple):
    """A TokenPruner, ready for the fused op."""

    pruner: TokenPruner
    weights: PrunerWeights
    rms_eps: float | None
    distance_table: torch.Tensor
    """The distance term of every distance: a single 0 without one."""
    num_queries: int
    """How many of the last queries it looks at; 0 without an attention term."""
    attention_weight: float
    is_alone: bool
    """Whether the MLP is all there is."""
    name: str = "TokenPruner"
    is_block_local: bool = True  # by itself, and with what the schedule's sees_prompt_end says

    @classmethod
    def of(
        cls, pruner: TokenPruner, dtype: torch.dtype, sees_prompt_end: bool = True, device: torch.device | None = None
    ) -> Fused:
        """For hidden states in `dtype`, where the pruner is, or on `device`, where it is moved to."""
        has_distance, has_attention = pruner.distance and sees_prompt_end, pruner.attention and sees_prompt_end
        weight = pruner.attention_weight.item() if has_attention else 0.0
        pruner = pruner.to(device)
        table = pruner.w1.new_zeros(1, dtype=torch.float32)
        if has_distance:
            with torch.no_grad():
                table = pruner.distance_term(torch.arange(FARTHEST + 1, device=pruner.w1.device))
        rms_eps = pruner.rms_eps if pruner.rms_norm else None
        num_queries = QUESTION_WINDOW if has_attention else 0
        is_alone = not (has_distance or has_attention or pruner.averaging)
        return cls(pruner, pruner.weights(dtype), rms_eps, table, num_queries, weight, is_alone)

    @property
    def pooling(self) -> int:
        return self.pruner.pooling

    def score(self, stage: StageInput, opinion: Opinion | None, backend: str) -> tuple[torch.Tensor, Opinion | None]:
        """Scores ``[B, n]``, and where the pruner averages, the opinion that the next stage goes on with."""
        terms: dict[str, Any] = {}
        if opinion is not None:
            terms = {"mean_score": opinion.mean_score.to(stage.hidden_states.device), "num_scores": opinion.number}
        if self.num_queries and stage.group is None:
            query, key = window_of(stage, self.num_queries)
            cos, sin = stage.position_embeddings
            terms |= {"query": query, "key": key, "cos": cos, "sin": sin, "pooling": ATTENTION_POOLING}
            terms |= {"scaling": stage.layer_below.self_attn.scaling, "attention_weight": self.attention_weight}
        elif self.num_queries:  # a process has some of the heads only
            terms |= {"attention": question_attention(stage), "attention_weight": self.attention_weight}
        scores, mean_score = ops.score_prompt(
            stage.hidden_states, *self.weights, stage.token_index, self.distance_table,
            keep_last=stage.keep_last, rms_eps=self.rms_eps, backend=backend, **terms,
        )  # fmt: skip
        if not self.pruner.averaging:
            return scores, None
        return scores, Opinion(mean_score, 1 if opinion is None else opinion.number + 1)


Scorer = Plain | Fused


def resolve_pruners(
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule,
    config: Any,
    devices: Mapping[int, torch.device],
    dtype: torch.dtype,
) -> dict[int, Scorer]:
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
        # A copy: the model keeps the weights it was given, whatever becomes of the module.
        pruner = copy.deepcopy(pruner).requires_grad_(False)
        return Fused.of(pruner, dtype, schedule.sees_prompt_end, device)
    if isinstance(pruner, nn.Module):
        return Plain(lambda stage: pruner(stage.hidden_states), type(pruner).__name__, is_block_local=True)
    if callable(pruner):
        return _plain(pruner)
    raise ValueError(f"pruner of layer {layer}: expected a module or a scorer function, got {type(pruner).__name__}")


def _plain(function: Callable[[StageInput], torch.Tensor]) -> Plain:
    return Plain(function, getattr(function, "__name__", repr(function)), getattr(function, "is_block_local", False))


def _check_header(pruners: PrunerStack, config: Any) -> None:
    names = ("model_type", "hidden_size", "num_hidden_layers")
    pairs = {name: (getattr(pruners.header, name), getattr(config, name)) for name in names}
    differences = [f"{name}: file {a}, model {b}" for name, (a, b) in pairs.items() if a is not None and a != b]
    if differences:
        raise ValueError(
            f"these pruners were made for another model ({'; '.join(differences)}); load the file of this model"
        )
