"""What prefills are measured on: a prompt of each length, in each dtype, and the ways to prune it."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, NamedTuple

from sdtp_bench import processes
from sdtp_eval import command
from sdtp_eval.methods import add_dropped_kv_options, find_methods, with_dropped_kv
from sdtp_eval.paired import Pair
from sdtp_eval.schedules import BUDGETS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from sdtp_kernels import SdtpHandle

QUESTION = "Which programming language does this text describe?"


class Way(NamedTuple):
    """How a prompt is pruned."""

    keep: float
    budget: str
    dropped_kv: str = "none"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which model and text, and how it is pruned."""
    command.add_model_option(parser)
    parser.add_argument(
        "--method", metavar="METHOD",
        help="a pruner file or a scorer (default: the pruners that the default model comes with, else attention)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", nargs="+", type=float, default=[0.9, 0.8, 0.7], help="share that each stage keeps (0.9 0.8 0.7)"
    )
    parser.add_argument("--budget", nargs="+", choices=BUDGETS, default=["global"], help="default: global")
    parser.add_argument("--block-size", type=int, default=512, help="tokens of a block (%(default)s)")
    add_dropped_kv_options(parser, ["none"])
    command.add_dtype_option(parser, ["float32"])
    command.add_device_option(parser)
    command.add_backend_option(parser)
    parser.add_argument("--text", metavar="FILE", help="the text to read (default: Python's language reference)")
    parser.add_argument("--out", metavar="DIR", help="append the rows to a file of their own there, as JSON lines")


def complete(args: argparse.Namespace) -> None:
    """Fill in what depends on the machine and on other options; a ``ValueError`` where that cannot be."""
    from sdtp_eval.checkpoints import DEFAULT_PRUNERS

    if args.method is None:
        args.method = "attention" if args.model else DEFAULT_PRUNERS
    processes.complete(args)


class Setting(NamedTuple):
    """One prompt in one dtype, and the ways to prune it."""

    method: str
    dtype: str
    pairs: dict[Way, Pair]

    @property
    def dense(self) -> Pair:
        """One of them, whose :meth:`Pair.prefill` is that of the dense model: outside of :meth:`Pair.patched`."""
        return next(iter(self.pairs.values()))

    @contextlib.contextmanager
    def pruning(self, way: Way | None) -> Iterator[tuple[Pair, SdtpHandle | None]]:
        """The model as it prunes this way, with its handle; under ``None`` the dense one, without."""
        if way is None:
            yield self.dense, None
        else:
            with self.pairs[way].patched() as handle:
                yield self.pairs[way], handle


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Every dtype and length that the arguments ask for.

    Raises
    ------
    ValueError, OSError
        For options, files and models that cannot work.
    """
    import torch

    from sdtp_eval import texts
    from sdtp_eval.checkpoints import load_checkpoint
    from sdtp_kernels import PruningSchedule

    text = texts.read_text(args.text) if args.text else texts.language_reference()
    (method,) = find_methods([args.method], ("pruners",))
    forms = with_dropped_kv(args, method)
    for dtype in args.dtype:
        model, tokenizer = load_checkpoint(args.model, getattr(torch, dtype))
        model = model.to(args.device)
        layers = method.layers or PruningSchedule.every(model.config.num_hidden_layers).layers
        for tokens in args.tokens:
            prompt, notes = texts.build_prompt(tokenizer, text, QUESTION, tokens)
            if notes:
                raise ValueError(f"--tokens {tokens}: {notes[0]}; give a longer one with --text")
            input_ids = torch.tensor([prompt], device=args.device)
            pairs = {}
            for keep, budget, form in itertools.product(args.keep, args.budget, forms):
                schedule = PruningSchedule(layers, keep, budget=budget, block_size=args.block_size)
                predictor = form.kv_predictor if form.dropped_kv == "predicted" else None
                pairs[Way(keep, budget, form.dropped_kv)] = Pair(
                    model, input_ids, form.pruners, schedule, args.backend, predictor
                )
            yield Setting(method.name, dtype, pairs)
