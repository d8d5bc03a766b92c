"""``sdtp eval mine``: what pruning does to one's own prompts, the worst first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval import command, methods, schedules, texts
from sdtp_eval.reader import Reader, greedy
from sdtp_eval.tasks import INSIDE, Sample, encode

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

SHOWN = 60  # characters of an answer in the table


def add_parser(commands: Any) -> None:
    """Add ``mine`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("mine", help="your own prompts, dense and pruned: divergence and answers, worst first")
    parser.add_argument(
        "prompts", metavar="PROMPTS.jsonl", help='one JSON object a line: {"prompt": TEXT} or {"messages": [...]}'
    )
    methods.add_methods_option(parser, ["attention"], "pruner files and scorers")
    parser.add_argument("--new-tokens", type=int, default=48, help="longest answer (%(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write one JSON object a prompt, method and schedule there")
    command.add_model_options(parser)
    schedules.add_options(parser)
    methods.add_dropped_kv_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``sdtp eval mine``."""
    with command.user_errors():
        rows = sorted(measure(args), key=lambda row: -row["kl"])
        _print(rows)
        if args.out:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(args.out).write_text(lines, encoding="utf-8")
    return 0


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Answer each prompt dense and pruned, and read the dense answer after the pruned prompt.

    Parameters
    ----------
    args : Namespace
        Of the parser that :func:`add_parser` makes.

    Yields
    ------
    dict
        ``line`` of the file, ``tokens``, ``method``, ``schedule``, ``kl`` (divergence of the pruned model's
        predictions from the dense model's along the dense answer, nats a token), ``same_answer``, ``dense_answer``,
        ``pruned_answer``, ``mean_keep``.

    Raises
    ------
    ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError
        For options, files, models and machines that cannot work.
    """
    import torch

    if args.new_tokens < 1:
        raise ValueError(f"--new-tokens {args.new_tokens}: expected at least 1")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no such directory")
    found = methods.find_methods(args.methods, methods.FROM_PROMPTS)
    model, tokenizer = command.load_model(args)
    prompts = list(read_prompts(tokenizer, args.prompts))
    with torch.no_grad():
        for line, ids in prompts:
            dense = greedy(model, ids, [], args.new_tokens)
            if not dense:
                raise ValueError(
                    f"{args.prompts}:{line}: the dense model answers nothing, so there is nothing to compare"
                )
            reader = Reader(model, Sample("mine", "own", tuple(ids), (), tuple(dense)), args.backend)
            for method, label, schedule in methods.plan(args, found, model.config.num_hidden_layers, len(ids)):
                if method is None or schedule is None:
                    continue
                read = reader.result(INSIDE, method, schedule)
                pruned = reader.greedy(INSIDE, method, schedule, extra=args.new_tokens - len(dense))
                answers = [
                    str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in (dense, pruned)
                ]
                yield {
                    "line": line,
                    "tokens": len(ids),
                    "method": method.name,
                    "schedule": label,
                    "kl": read["kl"],
                    "same_answer": dense == pruned,
                    "dense_answer": answers[0],
                    "pruned_answer": answers[1],
                    "mean_keep": read["mean_keep"],
                }


def read_prompts(tokenizer: PreTrainedTokenizerBase, path: str) -> Iterator[tuple[int, list[int]]]:
    """Line numbers and token ids of the prompts of a JSONL file.

    Raises
    ------
    ValueError
        If the file cannot be read, holds nothing, or a line is no prompt.
    """
    found = False
    for number, line in enumerate(texts.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "messages" in record:
                text = tokenizer.apply_chat_template(record["messages"], tokenize=False, add_generation_prompt=True)
                ids = encode(tokenizer, str(text))
            else:
                ids = list(tokenizer(record["prompt"], verbose=False).input_ids)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}:{number}: expected {{"prompt": TEXT}} or {{"messages": [{{"role": ..., "content": ...}}]}} '
                f"({type(error).__name__}: {error})"
            ) from None
        if not ids:
            raise ValueError(f"{path}:{number}: an empty prompt")
        found = True
        yield number, ids
    if not found:
        raise ValueError(f"{path}: no prompts")


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(highlight=False), Table(box=box.SIMPLE_HEAD)
    for name in ("line", "tokens", "method", "schedule", "divergence", "answer, dense", "answer, pruned"):
        table.add_column(name, overflow="fold")
    for row in rows:
        pruned = "the same" if row["same_answer"] else row["pruned_answer"][:SHOWN]
        cells = (
            row["line"], row["tokens"], row["method"].partition("@")[0], row["schedule"], f"{row['kl']:.3f}",
            row["dense_answer"][:SHOWN], pruned,
        )  # fmt: skip
        table.add_row(*(Text(str(cell)) for cell in cells))  # as text: an answer may hold what looks like markup
    console.print(table)
    same = sum(row["same_answer"] for row in rows)
    console.print(f"{same} of {len(rows)} answers are the same, token by token; the worst prompts stand first")
