"""Training, step by step: batches, rates, evaluations, and the state that a killed run goes on from."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval import command
from sdtp_train import kv, shards

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    import torch

    from sdtp_eval.parallel import Workers
    from sdtp_kernels import TokenPruner
    from sdtp_train.objective import Objective
    from sdtp_train.shards import Marked, Saliency

WARM_UP = 0.05  # share of the steps
# A few numbers that multiply inputs of size one have far to go; the MLP's many weights have not.
BIAS_RATE = 10.0
WEIGHT_DECAY = 0.01
END_TO_END_VALIDATION = 16  # prompts: a forward of the whole model each


class Loop:
    """The loop over steps, with what it has to remember."""

    def __init__(
        self,
        args: argparse.Namespace,
        workers: Workers,
        saliency: Saliency,
        objective: Objective,
        pruners: dict[int, TokenPruner],
        settings: Mapping[str, Any],
    ) -> None:
        import torch

        self.args, self.workers, self.saliency, self.objective = args, workers, saliency, objective
        self.pruners, self.settings = pruners, settings
        self.out = Path(args.out)
        self.training = [i for i, sample in enumerate(saliency.samples) if not sample.is_validation]
        self.validation = [i for i, sample in enumerate(saliency.samples) if sample.is_validation]
        self.steps_per_epoch = math.ceil(len(self.training) / args.batch)
        self.num_steps = args.steps or args.epochs * self.steps_per_epoch
        self.eval_every = args.eval_every or self.steps_per_epoch
        named: dict[str, torch.Tensor] = {}
        groups: list[dict[str, Any]] = []
        if "pruners" in args.train:
            named |= {
                f"{layer}.{name}": p for layer, pruner in pruners.items() for name, p in pruner.named_parameters()
            }
            is_bias = {name: name.endswith(("distance_bias", "attention_weight", "lexical_weight")) for name in named}
            groups += [
                {"params": [p for name, p in named.items() if not is_bias[name]], "rate": 1.0},
                {"params": [p for name, p in named.items() if is_bias[name]], "rate": BIAS_RATE, "weight_decay": 0.0},
            ]
        else:
            for pruner in pruners.values():
                pruner.requires_grad_(False)
        if objective.kv_predictor is not None:
            objective.kv_predictor.requires_grad_(False)
            if "kv" in args.train:
                own = kv.open_maps(objective.kv_predictor)
                groups.append({"params": list(own.values()), "rate": args.kv_lr / args.lr, "weight_decay": 0.0})
                named |= {f"kv.{name}": p for name, p in own.items()}
        self.parameters = named
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=WEIGHT_DECAY)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.best = {name: p.detach().clone() for name, p in named.items()}
        self.running: dict[str, float] = dict.fromkeys(objective.weights, 0.0)

    def finish(self) -> list[dict[str, Any]]:
        """Train to the end and leave the best weights in the pruners.

        Returns
        -------
        list of dict
            The evaluations.
        """
        import torch

        state = state_path(self.out)
        if self.args.resume and state.is_file():
            self._load(state)
        with command.progress_bar(self.num_steps, "steps", done=self.step, shown=self.workers.index == 0) as bar:
            if not self.history:
                self._evaluate()  # what the beginning was worth, above all that of --init
            while self.step < self.num_steps and not self._is_stale():
                self._advance()
                bar.advance()
                if self.step % self.eval_every == 0 or self.step == self.num_steps:
                    self._evaluate()
                    bar.show(f"held-out loss {self.history[-1]['validation']['loss']:.4f}")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.best[name])
        if "kv" in self.args.train and self.objective.kv_predictor is not None:
            kv.close_maps(self.objective.kv_predictor)
        nearest, farthest = self._trained_distances()
        for pruner in self.pruners.values():
            extend_distance(pruner, nearest, farthest)
        return self.history

    def _advance(self) -> None:
        """One step on one batch."""
        import torch

        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = random.Random(f"{self.settings['seed']}/{epoch}").sample(self.training, len(self.training))
        batch = order[place * self.args.batch : (place + 1) * self.args.batch]
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate() * group["rate"]
        self.optimizer.zero_grad(set_to_none=False)
        for index in batch[self.workers.index :: self.workers.number]:
            generator = torch.Generator(self.workers.device)
            generator.manual_seed(random.Random(f"{self.settings['seed']}/{self.step}/{index}").getrandbits(63))
            terms = self.objective.terms(self._load_sample(index), self.pruners, generator)
            loss = sum((self.objective.weights[name] * value for name, value in terms.items()), torch.zeros(()))
            (loss / len(batch)).backward()
            for name, value in terms.items():
                self.running[name] += value.item() / len(batch)
        for p in self.parameters.values():
            if p.grad is None:  # this process had no sample, or the loss has nothing to say about it
                p.grad = torch.zeros_like(p)
        self.workers.add_up([p.grad for p in self.parameters.values() if p.grad is not None])
        self.optimizer.step()
        self.step += 1

    def _rate(self) -> float:
        warm = max(1, round(WARM_UP * self.num_steps))
        rising = min(1.0, (self.step + 1) / warm)
        falling = 0.5 * (1 + math.cos(math.pi * self.step / self.num_steps))
        return float(self.args.lr * rising * falling)

    def _is_stale(self) -> bool:
        values = [row["validation"]["loss"] for row in self.history]
        patience: int = self.args.patience
        return len(values) - 1 - values.index(min(values)) >= patience

    def _evaluate(self) -> None:
        """Held-out losses and rank correlations; keep the weights where they are the best so far, and the state."""
        import torch

        from sdtp_train.losses import spearman

        layers, device = self.objective.layers, self.workers.device
        correlations = torch.zeros(len(self.validation), len(layers), dtype=torch.float64, device=device)
        sums = torch.zeros(len(self.objective.weights), dtype=torch.float64, device=device)
        counts = torch.zeros_like(sums)
        with torch.no_grad():
            for place in range(self.workers.index, len(self.validation), self.workers.number):
                sample = self._load_sample(self.validation[place])
                for stage, layer in enumerate(layers):
                    scores = self.objective.scores(sample, stage, self.pruners[layer])
                    correlations[place, stage] = spearman(scores, self.objective.goal(sample, stage))
                objective = self.objective if place < END_TO_END_VALIDATION else self.objective.without_model()
                terms = objective.terms(sample, self.pruners, None)
                for i, name in enumerate(self.objective.weights):
                    if name in terms:
                        sums[i] += terms[name]
                        counts[i] += 1
        self.workers.add_up([correlations, sums, counts])
        running = torch.tensor(list(self.running.values()), dtype=torch.float64, device=device)
        self.workers.add_up([running])
        terms_by_name = dict(zip(self.objective.weights, (sums / counts).tolist(), strict=True))
        since = self.step - (self.history[-1]["step"] if self.history else 0)
        kinds = [self.saliency.samples[i].kind.split("-")[0] for i in self.validation]
        row: dict[str, Any] = {
            "step": self.step,
            "training": dict(zip(self.running, (running / max(1, since)).tolist(), strict=True)) if since else None,
            "validation": {
                "loss": sum(self.objective.weights[name] * value for name, value in terms_by_name.items()),
                **terms_by_name,
                "spearman": dict(zip(map(str, layers), correlations.mean(0).tolist(), strict=True)),
                "spearman_by_kind": {
                    kind: correlations[[k == kind for k in kinds]].mean().item() for kind in sorted(set(kinds))
                },
            },
        }
        if not math.isfinite(row["validation"]["loss"]):
            raise ValueError(f"the held-out loss is not finite after {self.step} steps: try a lower --lr")
        self.running = dict.fromkeys(self.running, 0.0)
        best = min((old["validation"]["loss"] for old in self.history), default=math.inf)
        if row["validation"]["loss"] < best:
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.history.append(row)
        if self.workers.index == 0:
            self._save()
        self.workers.wait()

    def _load_sample(self, index: int) -> Marked:
        sample = self.saliency.load(index, self.objective.targets)
        return sample._replace(
            **{
                name: getattr(sample, name).to(self.workers.device)
                for name in ("token_ids", "hidden_states", "attention", "targets")
            }
        )

    def _trained_distances(self) -> tuple[int, int]:
        """Distances to the end that the prunable tokens of the training prompts had."""
        schedule = self.objective.schedules[0]
        lengths = [self.saliency.samples[i].num_context for i in self.training]
        return min(schedule.num_recent(n) for n in lengths), max(lengths) - 1 - schedule.sink

    def _save(self) -> None:
        import torch
        from safetensors.torch import save_file

        tensors = {f"now.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"best.{name}": p for name, p in self.best.items()}
        for name, p in self.parameters.items():
            tensors |= {f"adam.{key}.{name}": torch.as_tensor(v) for key, v in self.optimizer.state[p].items()}
        metadata = {"settings": self.settings, "step": self.step, "history": self.history}
        path = state_path(self.out)
        draft = path.with_name(f".{path.name}.draft")
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, draft, {"sdtp": json.dumps(metadata)})
        os.replace(draft, path)
        rows = "".join(json.dumps(row) + "\n" for row in self.history)
        shards.write_text(self.out.with_name(f"{self.out.name}.jsonl"), rows)

    def _load(self, path: Path) -> None:
        import torch
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["sdtp"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        settings = json.loads(json.dumps(self.settings))
        different = [name for name in settings if settings[name] != metadata["settings"].get(name)]
        if different:
            raise ValueError(
                f"--resume: {path} was left by a run with other settings ({', '.join(different)} differ): repeat its "
                "settings, or remove it to begin again"
            )
        self.step, self.history = metadata["step"], metadata["history"]
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(p.device)
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
                if keys:
                    # Adam counts its steps on the CPU.
                    moved = {
                        key: tensors[f"adam.{key}.{name}"].to("cpu" if key == "step" else p.device) for key in keys
                    }
                    self.optimizer.state[p] = moved


def extend_distance(pruner: TokenPruner, nearest: int, farthest: int) -> None:
    """Continue the distance term beyond the distances that training saw, at its value there.

    Knots that no sample reached are still 0: left so, they would lift or sink all far tokens of longer prompts.
    """
    import torch

    if not pruner.distance:
        return
    knots = pruner.distance_bias
    first, last = (min(round(math.log2(1 + distance)), len(knots) - 1) for distance in (nearest, farthest))
    with torch.no_grad():
        knots[:first] = knots[first].item()
        knots[last:] = knots[last].item()


def state_path(out: Path) -> Path:
    """Where a run that will write `out` keeps what it needs to go on."""
    return out.with_name(f"{out.name}.state")
