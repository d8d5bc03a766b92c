"""``sdtp train``, stage 2: pruners of all stages learn what stage 1 marked, or end to end from the pruned output.

Several processes share each batch: ``accelerate launch --num_processes 4 -m sdtp_kernels train ...``.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval import command
from sdtp_eval.methods import DROPPED_KV
from sdtp_kernels.scorers import LEXICAL_WEIGHT
from sdtp_train import kv, shards
from sdtp_train.checkpoint import DTYPES
from sdtp_train.loop import Loop, state_path
from sdtp_train.objective import LOSSES, Objective
from sdtp_train.shards import Saliency

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from sdtp_kernels import TokenPruner

TRAINED = ("pruners", "kv")
# Of a term with standard deviation 1, as the regression's goal has. Regression itself gave it about 0.35 on
# SmolLM2-135M, and pass keys were lost with 2: see docs/notes/pruners.md.
ATTENTION_WEIGHT = 1.0
# Of the KV predictor's weights, see sdtp_train.kv.open_maps.
KV_LR = 2e-3


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
    history = Loop(args, workers, saliency, objective, pruners, settings).finish()
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
        state_path(out).unlink(missing_ok=True)
        correlation = best["validation"]["spearman"]
        mean = sum(correlation.values()) / len(correlation)
        print(f"{out}: pruners of layers {', '.join(map(str, pruners))}; held-out rank correlation {mean:.3f}")


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
    if state_path(out).exists() and not args.resume:
        raise ValueError(f"{state_path(out)} was left by a run that did not end: pass --resume, or remove it")


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
