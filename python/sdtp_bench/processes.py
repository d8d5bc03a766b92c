"""What benchmarks run in processes of their own, and one prefill there, dense or pruned."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from sdtp_eval import command
from sdtp_eval.paired import cache_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    import torch

METHODS = ("dense", "pruned")


class TrialError(RuntimeError):
    """A process failed for another reason than the one that was looked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is prefilled, and how it is pruned."""
    command.add_model_option(parser)
    parser.add_argument("--pruner", metavar="FILE", help="pruners of this model (default: the paper's form, untrained)")
    parser.add_argument("--keep", type=float, default=0.9, help="share of tokens that each stage keeps (%(default)s)")
    parser.add_argument("--first", type=int, default=4, help="first layer with a stage (%(default)s)")
    parser.add_argument("--step", type=int, default=3, help="layers from a stage to the next (%(default)s)")
    command.add_dtype_option(parser)
    command.add_device_option(parser)
    parser.add_argument("--out", metavar="DIR", help="append the rows to a file there, as JSON lines")


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the machine.

    Raises
    ------
    ValueError
        If a GPU is asked for and torch finds none.
    """
    args.device = command.choose_device(args.device).type
    if args.model is None:
        from sdtp_eval.checkpoints import default_checkpoint

        args.model = str(default_checkpoint())
    return args


class Subject:
    """A model, with pruners where wanted.

    Parameters
    ----------
    settings : mapping
        What :func:`add_arguments` adds, by name.
    **loading
        For ``from_pretrained``, such as ``tp_plan="auto"``.
    """

    def __init__(self, settings: Mapping[str, Any], **loading: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from sdtp_kernels import PruningSchedule, TokenPruner, load_pruners

        self.model = AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=getattr(torch, settings["dtype"]), **loading
        ).eval()
        if not loading:
            self.model.to(settings["device"])
        config = self.model.config
        self.schedule = PruningSchedule.every(
            config.num_hidden_layers, settings["first"], settings["step"], keep_ratio=settings["keep"]
        )
        torch.manual_seed(0)
        self.pruners: Any = (
            load_pruners(settings["pruner"])
            if settings["pruner"]
            else {layer: TokenPruner(config.hidden_size) for layer in self.schedule.layers}
        )

    def method(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """The model as it is, or patched."""
        from sdtp_kernels import apply_sdtp

        if name != "pruned":
            return contextlib.nullcontext()
        return apply_sdtp(self.model, self.pruners, self.schedule, dropped_kv="none")

    def prefill(self, tokens: int) -> tuple[torch.Tensor, Any]:
        """Logits ``[V]`` after a prompt of this many pseudo-random tokens, and its cache."""
        import torch

        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, self.model.config.vocab_size, (1, tokens), generator=generator)
        with torch.inference_mode():
            output = self.model(ids.to(self.model.device), use_cache=True, logits_to_keep=1)
        return output.logits[0, -1], cache_of(output)


def run_module(
    module: str, settings: Mapping[str, Any], launcher: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module in a process of its own, with its settings as the only argument."""
    command = [sys.executable, *launcher, "-m", module, json.dumps(dict(settings))]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def answer_of(result: subprocess.CompletedProcess[str]) -> Any:
    """What the process printed as its last line, as JSON.

    Raises
    ------
    TrialError
        If it failed or said nothing.
    """
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        raise TrialError(f"a process ended with status {result.returncode}:\n{(result.stdout + result.stderr)[-3000:]}")
    return json.loads(lines[-1])
