"""What training minimises: a weighted sum of losses, each of one sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from sdtp_kernels import KVPredictor, PruningSchedule, TokenPruner
    from sdtp_train.shards import Marked

LOSSES = ("mse", "rank", "lm", "kl")
NUM_PAIRS = 4096  # of the ranking loss, per sample and stage


class Objective(NamedTuple):
    """What is minimised, for one sample at a time."""

    weights: Mapping[str, float]
    """By name of the loss, none of them 0."""
    targets: Sequence[str]
    layers: Sequence[int]
    dropout: float
    schedules: Sequence[PruningSchedule]
    """For the losses that prune; one is drawn each time."""
    gumbel: bool
    model: Any = None
    """``None`` where no loss needs it."""
    kv_predictor: KVPredictor | None = None
    """Of what the model drops; ``None`` where nothing of it is kept."""

    def terms(
        self, sample: Marked, pruners: Mapping[int, TokenPruner], generator: torch.Generator | None
    ) -> dict[str, torch.Tensor]:
        """Each term, unweighted; the means over stages where it has some.

        Parameters
        ----------
        sample : Marked
        pruners : mapping of int to TokenPruner
        generator : torch.Generator, optional
            Source of all chance, for training; without one there is no dropout and no noise.
        """
        from sdtp_train import losses
        from sdtp_train.simulate import simulate_pruning

        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.weights}
        if {"mse", "rank"} & set(self.weights):
            for stage, layer in enumerate(self.layers):
                scores = self.scores(sample, stage, pruners[layer], generator, attention=False)
                goal = self.goal(sample, stage)
                if "mse" in found:
                    found["mse"].append(losses.regression_loss(scores, goal))
                if "rank" in found:
                    num_pairs = NUM_PAIRS if generator is not None else None
                    found["rank"].append(losses.ranking_loss(scores, goal, num_pairs, generator))
        if self.model is not None:
            ids, n = sample.token_ids, sample.info.num_context
            noise = generator if self.gumbel else None
            schedule = self.schedules[0]
            if generator is not None:
                schedule = self.schedules[_draw(len(self.schedules), generator)]
            logits = simulate_pruning(self.model, pruners, schedule, ids, n, noise, self.kv_predictor)
            if "lm" in found:
                found["lm"].append(losses.lm_loss(logits, ids[n:]))
            if "kl" in found:
                found["kl"].append(losses.kl_loss(logits, self.dense_logits(ids, n)))
        return {name: sum(values[1:], values[0]) / len(values) for name, values in found.items()}

    def scores(
        self,
        sample: Marked,
        stage: int,
        pruner: TokenPruner,
        generator: torch.Generator | None = None,
        *,
        attention: bool = True,
    ) -> torch.Tensor:
        """Scores of the prunable tokens ``[m]``: as the stage will compute them, or what regression trains."""
        import torch

        from sdtp_kernels.lexical import lexical_overlap

        part = self.prunable(sample)
        hidden_states = sample.hidden_states[stage, part].float()
        if generator is not None and self.dropout > 0:
            kept = torch.rand(hidden_states.shape, generator=generator, device=hidden_states.device) >= self.dropout
            hidden_states = hidden_states * kept / (1 - self.dropout)
        distance = torch.arange(sample.info.num_context - 1, -1, -1, device=hidden_states.device).unsqueeze(0)
        if attention:
            overlap = lexical_overlap(sample.token_ids[None, : sample.info.num_context])
            bias = pruner.score_bias(distance, sample.attention[stage].unsqueeze(0), overlap=overlap)
        else:
            bias = pruner.distance_term(distance)
        scores: torch.Tensor = pruner(hidden_states) + bias[0, part]
        return scores

    def goal(self, sample: Marked, stage: int) -> torch.Tensor:
        """What the scores of the prunable tokens ``[m]`` ought to be: the mean of the standardised targets."""
        import torch

        from sdtp_train.losses import standardise
        from sdtp_train.targets import TARGETS

        part = self.prunable(sample)
        rows = [
            standardise(values[stage, part], TARGETS[name].is_log)
            for name, values in zip(self.targets, sample.targets, strict=True)
        ]
        return torch.stack(rows).mean(0)

    def without_model(self) -> Objective:
        """The terms that are cheap."""
        cheap = {name: weight for name, weight in self.weights.items() if name not in ("lm", "kl")}
        return self._replace(weights=cheap, model=None)

    def prunable(self, sample: Marked) -> slice:
        schedule, n = self.schedules[0], sample.info.num_context
        return slice(schedule.sink, n - schedule.num_recent(n))

    def dense_logits(self, ids: torch.Tensor, n: int) -> torch.Tensor:
        import torch

        with torch.no_grad():
            output = self.model(ids.unsqueeze(0), use_cache=False, logits_to_keep=len(ids) - n + 1)
        return output.logits[0, :-1]  # type: ignore[no-any-return]


def _draw(number: int, generator: torch.Generator) -> int:
    import torch

    return int(torch.randint(number, (), generator=generator, device=generator.device))
