"""The directory of a run: per-sample results that are written as they come, continued later, and what made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval import compare
from sdtp_eval.checkpoints import DEFAULT_NAME, identify
from sdtp_eval.command import user_errors
from sdtp_eval.provenance import describe_run

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from sdtp_eval.parallel import Workers

RUNS = "runs.jsonl"


def add_options(parser: argparse.ArgumentParser, against: Sequence[str] = compare.AGAINST) -> None:
    """Where results go, and whom to compare with."""
    parser.add_argument("--out", metavar="DIR", required=True, help="results; a run that is there is continued")
    compare.add_against_option(parser, against)


def report(args: argparse.Namespace, evaluate: Callable[[argparse.Namespace], list[dict[str, Any]] | None]) -> int:
    """Evaluate, print the table and write ``rows.jsonl``; mistakes of the user become a message.

    Where `evaluate` returns ``None``, another process reports.
    """
    with user_errors():
        results = evaluate(args)
        if results is None:
            return 0
        rows = compare.summarize(compare.group(results), args.against)
        compare.print_table(rows, args.against)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(args.out) / "rows.jsonl").write_text(lines, encoding="utf-8")
    return 0


def open_results(out: Path, args: argparse.Namespace, model: Any) -> Path:
    """The per-sample file of this run, empty or to be continued; another model's is refused."""
    out.mkdir(parents=True, exist_ok=True)
    path, about = out / compare.SAMPLES, out / "settings.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "command", "eval_command")}
    settings["fingerprint"] = f"{identify(model)['weights'][:12]} {args.dtype}"
    if about.is_file():
        found = json.loads(about.read_text(encoding="utf-8")).get("fingerprint")
        if found != settings["fingerprint"]:
            raise ValueError(
                f"--out {out}: holds results of another model or dtype ({found}; now {settings['fingerprint']}); give "
                "another directory"
            )
    about.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text.endswith("\n"):  # a run was killed while it wrote: its torn line is done again
        text = text[: text.rfind("\n") + 1]
    path.write_text(text, encoding="utf-8")
    return path


def part_of(file: Path, workers: Workers) -> Path:
    """Where a process other than the first writes its results."""
    return file.with_suffix(f".{workers.index}.part")


def join_parts(file: Path, order: Sequence[tuple[Any, ...]]) -> None:
    """Put what the processes have written into one file, in the order in which one process would have written it.

    Parameters
    ----------
    file : Path
        Per-sample results of the first process.
    order : sequence of tuple
        Keys of all results that are asked for; those of other runs stand before them.
    """
    parts = sorted(file.parent.glob(f"{file.stem}.*.part"))
    if not parts:
        return
    place = {key: i for i, key in enumerate(order)}
    results = sorted(compare.read_samples([file, *parts]), key=lambda result: place.get(key_of(result), -1))
    whole = file.with_suffix(".whole")
    whole.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    whole.replace(file)
    for part in parts:
        part.unlink()


def key_of(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a result from all others."""
    return tuple(result[name] for name in compare.KEY)


def record_run(args: argparse.Namespace, model: Any) -> None:
    """A line in ``runs.jsonl``: the samples do not say what made them, and the report has to."""
    run = {
        "bench": "runs", "tasks": args.tasks, "tokens": args.tokens, "dtype": args.dtype,
        "checkpoint": Path(args.model).name if args.model else DEFAULT_NAME, **describe_run(model.device),
    }  # fmt: skip
    with (Path(args.out) / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")
