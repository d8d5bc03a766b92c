"""``sdtp eval cost``: what scoring costs where it happens, right after a decoder layer.

The model reads one text with every stage scored and nothing dropped, so that all stages and all layers have the same
tokens before them. Layers and stages of one forward pass are timed in turn, which makes the ratio of their medians safe
from the drift of a shared machine, and finds the caches as cold as a layer leaves them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval import command, tasks
from sdtp_eval.methods import Method, add_methods_option, find_methods
from sdtp_eval.paired import now
from sdtp_eval.provenance import describe_run
from sdtp_eval.schedules import KEEP_ALL

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from sdtp_kernels.scorers import StageInput


def add_parser(commands: Any) -> None:
    """Add ``cost`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("cost", help="time of scoring, in per cent of a decoder layer")
    add_methods_option(parser, ["smollm2-135m", "attention"], "pruner files and scorers")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048], help="prompt lengths (default: 2048)")
    parser.add_argument("--runs", type=int, default=5, help="forward passes that are timed, after one that is not (5)")
    parser.add_argument("--json", metavar="FILE", help="append the rows to it")
    command.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``sdtp eval cost``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    with command.user_errors():
        rows = measure(args)
        if args.json:
            with Path(args.json).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("method", "tokens", "layer, ms", "scoring, ms", "scoring / layer"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        layer, scoring = row["layer_s"], row["scoring_s"]
        table.add_row(
            row["method"], str(row["tokens"]), f"{layer * 1e3:.1f}", f"{scoring * 1e3:.2f}", f"{scoring / layer:.1%}"
        )
    Console(highlight=False).print(table)
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every method at every length.

    Returns
    -------
    list of dict
        ``method``, ``tokens``, ``layer_s`` and ``scoring_s`` (medians over layers, stages and runs, seconds), all times
        as ``layer_s_all`` and ``scoring_s_all``, the model, and what :func:`describe_run` tells.

    Raises
    ------
    ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError
        For options, files, models and machines that cannot work.
    """
    import torch

    from sdtp_kernels import PruningSchedule, apply_sdtp

    if args.runs < 1:
        raise ValueError(f"--runs {args.runs}: expected at least 1")
    model, tokenizer = command.load_model(args)
    num_layers = model.config.num_hidden_layers
    methods = find_methods(args.methods, ("pruners",))
    pool = tasks.TextPool(tokenizer, [], "all")
    rows = []
    for tokens in args.tokens:
        (sample,) = tasks.make_samples("nll", pool, tokens, 1, continuation=1)
        input_ids = torch.tensor([sample.context], device=model.device)
        for method in methods:
            layers = method.layers or PruningSchedule.every(num_layers).layers
            schedule = PruningSchedule(layers=layers, keep_ratio=KEEP_ALL)
            watch = _Watch(model.device)
            pruners = {
                layer: watch.timed(score) for layer, score in _scorers(method, layers, model, args.backend).items()
            }
            with torch.inference_mode(), apply_sdtp(model, pruners, schedule, args.backend), watch.layers(model.model):
                for i in range(args.runs + 1):
                    model(input_ids, logits_to_keep=1)
                    if i == 0:
                        watch.clear()
            rows.append(
                {
                    "method": method.name,
                    "tokens": tokens,
                    "layer_s": statistics.median(watch.of_layers),
                    "scoring_s": statistics.median(watch.of_scoring),
                    "layer_s_all": watch.of_layers,
                    "scoring_s_all": watch.of_scoring,
                    "model": Path(args.model).name if args.model else "default",
                    "dtype": args.dtype,
                    **describe_run(model.device),
                }
            )
    return rows


def _scorers(
    method: Method, layers: Sequence[int], model: Any, backend: str
) -> dict[int, Callable[[StageInput], torch.Tensor]]:
    """The scoring of each stage alone: what the fused op does before it selects, or the scorer itself."""
    from sdtp_kernels import TokenPruner
    from sdtp_kernels.models.scoring import Fused, RunningMean

    mean: RunningMean | None = None

    def make(layer: int) -> Callable[[StageInput], torch.Tensor]:
        pruner = method.pruners if callable(method.pruners) else method.pruners[layer]
        if not isinstance(pruner, TokenPruner):
            return pruner  # type: ignore[no-any-return]
        pruner = pruner.to(model.device)
        fused = Fused.of(pruner, model.dtype)

        def score(stage: StageInput) -> torch.Tensor:
            nonlocal mean
            scores, mean = fused.score(stage, None if layer == layers[0] else mean, backend)
            return scores

        return score

    return {layer: make(layer) for layer in layers}


class _Watch:
    """Seconds that layers and scorers took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of_layers: list[float] = []
        self.of_scoring: list[float] = []

    def clear(self) -> None:
        self.of_layers, self.of_scoring = [], []

    def timed(self, scorer: Callable[[StageInput], torch.Tensor]) -> Callable[[StageInput], torch.Tensor]:
        def score(stage: StageInput) -> torch.Tensor:
            begin = now(self.device)
            scores = scorer(stage)
            self.of_scoring.append(now(self.device) - begin)
            return scores

        return score

    @contextlib.contextmanager
    def layers(self, decoder: Any) -> Iterator[None]:
        """Note the time of every call of a decoder layer."""
        begin = 0.0

        def enter(*_: Any) -> None:
            nonlocal begin
            begin = now(self.device)

        def leave(*_: Any) -> None:
            self.of_layers.append(now(self.device) - begin)

        with contextlib.ExitStack() as stack:
            for layer in decoder.layers:
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
            yield
