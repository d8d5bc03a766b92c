"""``sdtp train``, stage 2: pruners of all stages learn what stage 1 marked, or end to end from the pruned output.

Several processes share each batch: ``accelerate launch --num_processes 4 -m sdtp_kernels train ...``.
"""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import command
from sdtp_eval.methods import DROPPED_KV
from sdtp_kernels.scorers import LEXICAL_WEIGHT
from sdtp_train import kv, shards
from sdtp_train.checkpoint import DTYPES
from sdtp_train.shards import Marked, Saliency

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    import torch

    from sdtp_eval.parallel import Workers
    from sdtp_kernels import KVPredictor, PruningSchedule, TokenPruner

LOSSES = ("mse", "rank", "lm", "kl")
TRAINED = ("pruners", "kv")
NUM_PAIRS = 4096  # of the ranking loss, per sample and stage
WARM_UP = 0.05  # share of the steps
# Of a term with standard deviation 1, as the regression's goal has. Regression itself gave it about 0.35 on
# SmolLM2-135M, and pass keys were lost with 2: see docs/notes/pruners.md.
ATTENTION_WEIGHT = 1.0
# A few numbers that multiply inputs of size one have far to go; the MLP's many weights have not.
BIAS_RATE = 10.0
# Of the KV predictor's weights, see sdtp_train.kv.open_maps.
KV_LR = 2e-3
WEIGHT_DECAY = 0.01
END_TO_END_VALIDATION = 16  # prompts: a forward of the whole model each


def add_command(subparsers: Any) -> None:
    """Add ``train`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("train", help="stage 2 of training: make pruners from the output of 'sdtp saliency'")
    command.add_model_option(parser, "the checkpoint of stage 1")
    parser.add_argument("--saliency", required=True, metavar="DIR", help="what 'sdtp saliency' wrote")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the pruner file; next to it its curves, FILE.jsonl and FILE.png, and its model card, FILE.README.md",
    )
    parser.add_argument("--target", nargs="+", metavar="NAME", help="one, or several to average (default: the first)")
    parser.add_argument(
        "--loss",
        nargs="+",
        default=["mse"],
        metavar="NAME[=WEIGHT]",
        help=f"terms of the loss: {', '.join(LOSSES)} (mse); lm and kl run the whole model",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, default=10, help="passes over the prompts, at most (%(default)s)")
    length.add_argument("--steps", type=int, help="steps instead")
    parser.add_argument("--batch", type=int, default=6, help="prompts in a step (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate (%(default)s)")
    parser.add_argument("--dropout", type=float, default=0.2, help="of the hidden states (%(default)s)")
    parser.add_argument(
        "--patience", type=int, default=4, help="evaluations without progress before the end (%(default)s)"
    )
    parser.add_argument("--eval-every", type=int, metavar="STEPS", help="default: once an epoch")
    parser.add_argument(
        "--no-distance", action="store_false", dest="distance", help="no term for the distance to the prompt's end"
    )
    parser.add_argument(
        "--attention-weight",
        type=float,
        default=ATTENTION_WEIGHT,
        metavar="W",
        help="of the attention of the prompt's last tokens, which see the question; 0 for none (%(default)s). Only lm "
        "and kl train it",
    )
    parser.add_argument(
        "--lexical-weight", type=float, default=LEXICAL_WEIGHT, metavar="W",
        help="of the words that the prompt's last tokens share with the text around a token; 0 for none "
        "(%(default)s). Only lm and kl train it",
    )  # fmt: skip
    parser.add_argument(
        "--intermediate",
        type=int,
        metavar="H",
        help="width of the MLP (default: a twelfth of the hidden size, in multiples of 16, from 128 on of 128)",
    )
    parser.add_argument(
        "--pooling", type=int, default=7, metavar="TOKENS",
        help="rank a token by the best score among this many around it; 1 for none (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-averaging", action="store_false", dest="averaging",
        help="rank by the MLP of a stage alone, not by the mean over the stages so far",
    )  # fmt: skip
    parser.add_argument("--init", metavar="FILE", help="begin with these pruners; their KV predictor is kept")
    parser.add_argument(
        "--kv-rank", metavar="N|full",
        help="also make a KV predictor, with a bottleneck of this width or full matrices; needs 'sdtp saliency "
        "--kv-statistics'",
    )  # fmt: skip
    parser.add_argument(
        "--train", nargs="+", choices=TRAINED, default=["pruners"],
        help="what learns: kv is the KV predictor of --init, by lm or kl (default: pruners)",
    )  # fmt: skip
    parser.add_argument(
        "--dropped-kv", choices=DROPPED_KV,
        help="how lm and kl prune: what later layers keep of dropped tokens (default: predicted where --init can)",
    )  # fmt: skip
    parser.add_argument("--kv-lr", type=float, default=KV_LR, help="largest rate of kv, relative (%(default)s)")
    parser.add_argument(
        "--keep", nargs="+", type=float, default=[0.9, 0.8], help="keep ratios of lm and kl, drawn at random (0.9 0.8)"
    )
    parser.add_argument("--gumbel", action="store_true", help="lm and kl: sample the kept tokens (Gumbel noise)")
    command.add_dtype_option(parser, choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped, if there was one")
    command.add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run stage 2 with these arguments; see :func:`add_command`."""
    with command.user_errors():
        train(args)
    return 0


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


def train(args: argparse.Namespace) -> None:
    """Train pruners and write ``args.out``.

    Everything that is random follows from the seed, the step and the sample, so a run that was stopped and resumed ends
    with the same file as one that was not.

    Raises
    ------
    SaliencyError
        If the saliency is unfinished, damaged, or of another model.
    ValueError, OSError, ImportError
        For settings, files and models that cannot work. Nothing is written then.
    """
    from sdtp_eval.checkpoints import identify
    from sdtp_eval.parallel import join_workers
    from sdtp_kernels import PruningSchedule, load_pruners, save_pruners
    from sdtp_train.card import make_card
    from sdtp_train.checkpoint import load_frozen

    weights = _parse_losses(args.loss)
    _check_settings(args)
    out = Path(args.out)
    workers = join_workers(args.device)
    saliency = Saliency(args.saliency)
    targets = _choose_targets(args.target, saliency)
    model, _, _ = load_frozen(args.model, args.dtype, workers.device)
    config, found = model.config, identify(model)
    wanted = {name: value for name, value in saliency.settings["model"].items() if name != "name"}
    if found != wanted:
        different = [name for name in found if found[name] != wanted.get(name)]
        raise shards.SaliencyError(
            f"{saliency.folder} was made with another model ({saliency.settings['model']['name']}; differing: "
            f"{', '.join(different)}): pass that one as --model, or run 'sdtp saliency' with this one"
        )
    pruners = _new_pruners(args, saliency.layers, config.hidden_size)
    for pruner in pruners.values():
        pruner.to(workers.device)
    objective = Objective(
        weights,
        targets,
        saliency.layers,
        args.dropout,
        [PruningSchedule(layers=tuple(saliency.layers), keep_ratio=keep) for keep in args.keep],
        args.gumbel,
        model if {"lm", "kl"} & set(weights) else None,
    )
    del model
    statistics, kv_predictor, kv_facts = None, None, None
    if args.kv_rank:
        kv_rank = kv.parse_rank(args.kv_rank, config.hidden_size)
        if workers.index == 0:
            statistics = kv.load_statistics(saliency, config)
    elif args.init:
        known = load_pruners(args.init)
        kv_predictor, kv_facts = known.kv_predictor, known.header.training.get("kv_predictor")
        if kv_predictor is not None:
            kv_predictor.check(config, objective.schedules[0])
            if args.dropped_kv != "none" and objective.model is not None:
                kv_dtype = next(kv_predictor.parameters()).dtype
                kv_predictor = kv_predictor.float().to(workers.device)
                objective = objective._replace(kv_predictor=kv_predictor)
    if objective.kv_predictor is None and ("kv" in args.train or args.dropped_kv == "predicted"):
        asked = "--train kv" if "kv" in args.train else "--dropped-kv predicted"
        raise ValueError(f"{asked}: needs the KV predictor of --init, lm or kl in --loss, and no --dropped-kv none")
    settings = {
        **{name: value for name, value in vars(args).items() if name not in ("run", "command", "resume", "device")},
        "out": out.name,
        "saliency": shards.run_id(saliency.settings, saliency.samples),
        "loss": weights,
        "target": targets,
    }
    for name in ("model", "init"):
        settings[name] = Path(settings[name]).name if settings[name] else None
    history = _Run(args, workers, saliency, objective, pruners, settings).finish()
    if workers.index == 0:
        best = min(history, key=lambda row: float(row["validation"]["loss"]))
        counts = {part: sum(s.is_validation == flag for s in saliency.samples) for part, flag in _PARTS}
        facts = {
            "target": targets,
            "settings": settings,
            "saliency": {**saliency.settings, "prompts": counts},
            "validation": best["validation"],
            "best_step": best["step"],
            "steps": history[-1]["step"],
            "versions": _versions(),
        }
        if statistics is not None:
            kv_predictor, kv_facts = kv.make_predictor(statistics, kv_rank, workers.device)
            print(kv.summary(kv_predictor, kv_facts))
        if kv_predictor is not None:
            facts["kv_predictor"] = {"fitted": kv_facts, "trained_by": weights} if "kv" in args.train else kv_facts
            if objective.kv_predictor is not None:
                kv_predictor.to(kv_dtype)
        save_pruners(pruners, out, config=config, training=facts, kv_predictor=kv_predictor)
        _draw_curves(history, out.with_name(f"{out.name}.png"))
        shards.write_text(out.with_name(f"{out.name}.README.md"), make_card(load_pruners(out)))
        _state_path(out).unlink(missing_ok=True)
        correlation = best["validation"]["spearman"]
        mean = sum(correlation.values()) / len(correlation)
        print(f"{out}: pruners of layers {', '.join(map(str, pruners))}; held-out rank correlation {mean:.3f}")


class _Run:
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

        state = _state_path(self.out)
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
        path = _state_path(self.out)
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


_PARTS = (("training", False), ("validation", True))


def _check_settings(args: argparse.Namespace) -> None:
    out = Path(args.out)
    for name in ("epochs", "steps", "batch", "patience", "eval_every", "intermediate"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout}: expected a share in [0, 1)")
    for name in ("attention_weight", "lexical_weight"):
        value = getattr(args, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number from 0")
    if args.pooling < 1 or args.pooling % 2 == 0:
        raise ValueError(f"--pooling {args.pooling}: expected an odd number of tokens, or 1 for none")
    for name in ("lr", "kv_lr"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a number above 0")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no such directory")
    if out.exists():
        raise ValueError(f"--out {out} exists: remove it or name another file")
    if _state_path(out).exists() and not args.resume:
        raise ValueError(f"{_state_path(out)} was left by a run that did not end: pass --resume, or remove it")


def _parse_losses(words: Sequence[str]) -> dict[str, float]:
    weights = {}
    for word in words:
        name, _, number = word.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = math.nan
        if name not in LOSSES or not 0 <= weight < math.inf:
            raise ValueError(f"--loss {word}: expected NAME or NAME=WEIGHT with a name of {', '.join(LOSSES)}")
        weights[name] = weight
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise ValueError("--loss: expected at least one weight above 0")
    return weights


def _choose_targets(asked: Sequence[str] | None, saliency: Saliency) -> list[str]:
    from sdtp_train.saliency import DEFAULT_TARGET

    there = saliency.settings["targets"]
    if not asked:
        return [DEFAULT_TARGET if DEFAULT_TARGET in there else there[0]]
    missing = [name for name in asked if name not in there]
    if missing:
        raise ValueError(
            f"--target {', '.join(missing)}: {saliency.folder} holds {', '.join(there)}; run 'sdtp saliency --targets "
            f"{' '.join(missing)}' into another directory"
        )
    return list(dict.fromkeys(asked))


def _new_pruners(args: argparse.Namespace, layers: Sequence[int], hidden_size: int) -> dict[int, TokenPruner]:
    import torch

    from sdtp_kernels import TokenPruner, load_pruners
    from sdtp_kernels.pruner import trained_width

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        pruners = {
            layer: TokenPruner(
                hidden_size,
                args.intermediate or trained_width(hidden_size),
                distance=args.distance,
                attention=args.attention_weight > 0,
                lexical=args.lexical_weight > 0,
                pooling=args.pooling,
                averaging=args.averaging,
            )
            for layer in layers
        }
    for pruner in pruners.values():
        if pruner.attention:
            torch.nn.init.constant_(pruner.attention_weight, args.attention_weight)
        if pruner.lexical:
            torch.nn.init.constant_(pruner.lexical_weight, args.lexical_weight)
    if args.init:
        known = load_pruners(args.init)
        try:
            for layer, pruner in pruners.items():
                pruner.load_state_dict(known[layer].state_dict())
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"--init {args.init}: its pruners are of layers {sorted(known)}, distance={known.header.distance}, "
                f"attention={known.header.attention}, lexical={known.header.lexical}; they do not fit these settings "
                f"({str(error).splitlines()[0]})"
            ) from None
    return pruners


def _draw(number: int, generator: torch.Generator) -> int:
    import torch

    return int(torch.randint(number, (), generator=generator, device=generator.device))


def _state_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.state")


def _draw_curves(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in history]
    for name in [name for name in LOSSES if name in history[0]["validation"]]:
        (line,) = left.plot(steps, [row["validation"][name] for row in history], label=f"{name}, held out")
        trained = [row for row in history if row["training"]]
        left.plot(
            [row["step"] for row in trained],
            [row["training"][name] for row in trained],
            linestyle=":",
            color=line.get_color(),
            label=f"{name}, training",
        )
    for layer in history[0]["validation"]["spearman"]:
        right.plot(steps, [row["validation"]["spearman"][layer] for row in history], label=f"layer {layer}")
    for axes, title in ((left, "loss"), (right, "held-out rank correlation")):
        axes.set(xlabel="step", title=title)
        axes.legend(fontsize="small")
    draft = path.with_name(f".{path.name}.draft")
    figure.savefig(draft, format="png")
    os.replace(draft, path)


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import sdtp_kernels

    return {
        "sdtp-kernels": sdtp_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
