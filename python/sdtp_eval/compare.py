"""What the per-sample results of ``sdtp eval run`` amount to: means, paired intervals, a table and pictures."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval.command import user_errors

if TYPE_CHECKING:
    import argparse
    import os
    from collections.abc import Iterable, Sequence

SAMPLES = "samples.jsonl"
DENSE = "dense"
KEY = ("task", "protocol", "tokens", "id", "method", "schedule")
# What a task is judged by first: the loss where there is text to continue, whole answers where there is a fact to find.
METRICS = {"nll": ("nll_increase", "kl"), "ranks": ("spearman",)}
ANSWERS = ("exact", "nll")
RESAMPLES = 9999
AGAINST = ("random", "recent", "attention")
ANY_LENGTH = 0  # as the tokens of a task whose prompts have lengths of their own
SAME_BUDGET = 0.01  # two methods are compared where their B differs by no more


def add_against_option(parser: argparse.ArgumentParser, default: Sequence[str] = AGAINST) -> None:
    """Whom to compare with."""
    parser.add_argument(
        "--against", nargs="*", default=list(default), metavar="METHOD",
        help=f"paired differences to these, at equal B, or to dense (default: {' '.join(default)})",
    )  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("compare", help="tables and pictures of runs")
    parser.add_argument("files", nargs="+", metavar="DIR_OR_FILE", help="what 'run' has written")
    add_against_option(parser)
    parser.add_argument("--by", metavar="FIELD", help="break down by a field of the samples: kind, depth, wording")
    parser.add_argument("--solved", action="store_true", help="only questions that the dense model answers")
    parser.add_argument("--plot", metavar="PNG", help="draw quality against B and against time")
    parser.set_defaults(run=run)


class Interval(NamedTuple):
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean with a percentile bootstrap interval; of paired differences, a paired interval.

    Parameters
    ----------
    values : sequence of float
        One number a sample.
    level : float, default 0.95

    Returns
    -------
    Interval
        The same for the same values. Fewer than two values have no interval: NaN.

    Raises
    ------
    ValueError
        If there are no values.
    """
    import numpy as np
    from scipy import stats

    if not values:
        raise ValueError("bootstrap: got no values; expected one a sample")
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return Interval(float(data.mean()), float("nan"), float("nan"), len(data))
    # Percentile, not BCa: that one divides by zero where all values are equal, which whole answers often are. In
    # batches, so that a long list of samples does not become a matrix of gigabytes.
    limits = stats.bootstrap(
        (data,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method="percentile", batch=999,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(float(data.mean()), float(limits.low), float(limits.high), len(data))


def read_samples(paths: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Per-sample results of one or more runs; of a result that is there twice, the later one.

    Parameters
    ----------
    paths : iterable of path
        Directories of ``sdtp eval run``, or JSONL files of them.

    Raises
    ------
    ValueError
        If a file is missing, broken before its last line, or not of this kind.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in map(Path, paths):
        file = path / SAMPLES if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file}: no such file; expected a directory that 'sdtp eval run --out' has written")
        lines = file.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                result = json.loads(line)
                found[tuple(result[name] for name in KEY)] = result
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if number == len(lines):
                    break  # a run was killed while it wrote
                raise ValueError(f"{file}, line {number}: not a result of 'sdtp eval run' ({error!r})") from None
    return list(found.values())


class Group(NamedTuple):
    """All samples of one method with one schedule on one task."""

    task: str
    protocol: str
    tokens: int
    method: str
    schedule: str
    part: str
    """Which part of the task, where results are broken down; else empty."""
    samples: dict[str, dict[str, Any]]
    """By id."""

    @property
    def mean_keep(self) -> float:
        return statistics.fmean(sample["mean_keep"] for sample in self.samples.values())

    @property
    def seconds(self) -> float:
        """Median time of a prefill; 0 where none was timed."""
        times = [sample["seconds"] for sample in self.samples.values() if sample.get("seconds")]
        return statistics.median(times) if times else 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        """The numbers that every sample has of those that the task is judged by."""
        wanted = METRICS.get(self.task, ANSWERS)
        return tuple(name for name in wanted if all(name in sample for sample in self.samples.values()))

    def interval(self, metric: str) -> Interval:
        return bootstrap([sample[metric] for sample in self.samples.values()])

    def minus(self, rival: Group, metric: str) -> Interval | None:
        """Paired difference over the samples that both have."""
        both = [name for name in self.samples if name in rival.samples]
        return bootstrap([self.samples[i][metric] - rival.samples[i][metric] for i in both]) if both else None


def group(samples: Iterable[dict[str, Any]], by: str | None = None) -> list[Group]:
    """Samples by task, protocol, length, method and schedule - and by the field `by`, where it is given."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    for sample in samples:
        part = "" if by is None else str(sample.get(by, ""))
        key = (*(sample[name] for name in KEY if name != "id"), part)
        found[key][sample["id"]] = sample
    groups = [Group._make((*key, members)) for key, members in found.items()]
    # Dense first, then from the largest budget to the smallest.
    return sorted(
        groups,
        key=lambda g: (g.task, g.protocol, g.tokens, g.part, g.method != DENSE, -round(g.mean_keep, 2), g.method),
    )


def solved_by_dense(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the questions that the dense model does not answer: pruning can lose nothing there."""
    unsolved = {
        (sample["task"], sample["id"])
        for sample in samples
        if sample["method"] == DENSE and sample["task"] not in METRICS and not sample["exact"]
    }
    return [sample for sample in samples if (sample["task"], sample["id"]) not in unsolved]


def rival_of(one: Group, groups: Iterable[Group], method: str) -> Group | None:
    """The group of `method` on the same task with the same budget: the same schedule, or else the nearest B.

    The dense model has but one budget, and is everybody's rival.
    """
    same = [g for g in groups if g.method == method and (g[:3], g.part) == (one[:3], one.part)]
    near = [g for g in same if method == DENSE or abs(g.mean_keep - one.mean_keep) <= SAME_BUDGET]
    return min(near, key=lambda g: (g.schedule != one.schedule, abs(g.mean_keep - one.mean_keep)), default=None)


def summarize(groups: Sequence[Group], against: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row a group: the means with their intervals, and paired differences to the methods of `against`.

    Returns
    -------
    list of dict
        ``task``, ``protocol``, ``tokens``, ``method``, ``schedule``, ``part``, ``mean_keep`` (B), ``n``, ``seconds``
        (median) and for each metric ``{"mean", "low", "high"}``; under ``minus`` by rival and metric the same with the
        ``n`` of the pairs.
    """
    rows = []
    for one in groups:
        row: dict[str, Any] = {name: getattr(one, name) for name in Group._fields if name != "samples"}
        row |= {"mean_keep": one.mean_keep, "n": len(one.samples), "seconds": one.seconds}
        for metric in one.metrics:
            mean, low, high, _ = one.interval(metric)
            row[metric] = {"mean": mean, "low": low, "high": high}
        row["minus"] = {}
        for method in against:
            rival = None if one.method in (method, DENSE) else rival_of(one, groups, method)
            if rival is not None:
                differences = {metric: one.minus(rival, metric) for metric in one.metrics}
                row["minus"][method] = {name: value._asdict() for name, value in differences.items() if value}
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]], against: Sequence[str] = ()) -> None:
    """One table a task, protocol and length on the standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    # Wide enough for what stands in it: a table in a file is not cut to the width of no terminal.
    console = Console(highlight=False, width=None if Console().is_terminal else 60 + 40 * (2 + len(against)))
    tables: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        tables[row["task"], row["protocol"], row["tokens"]].append(row)
    for (task, protocol, tokens), members in tables.items():
        question = "" if task in METRICS else f", question {protocol} the pruned prompt"
        length = "" if tokens == ANY_LENGTH else f", {tokens} tokens"
        table = Table(box=box.SIMPLE_HEAD, title=f"{task}{length}{question}", title_justify="left")
        has_parts = any(row["part"] for row in members)
        metrics = [name for name in METRICS.get(task, ANSWERS) if name in members[0]]
        names = ["method", "schedule", *(["part"] if has_parts else []), "B", "n", *metrics]
        rivals = [rival for rival in against if any(rival in row["minus"] for row in members)]
        names += [f"{metrics[0]} minus {rival}" for rival in rivals] + ["seconds"]
        for i, name in enumerate(names):
            table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
        for row in members:
            cells = [row["method"], row["schedule"], *([row["part"]] if has_parts else [])]
            cells += [f"{row['mean_keep']:.3f}", str(row["n"]), *(_cell(row[metric]) for metric in metrics)]
            cells += [_cell(row["minus"].get(rival, {}).get(metrics[0])) for rival in rivals]
            table.add_row(*cells, f"{row['seconds']:.2f}" if row["seconds"] else "")
        console.print(table)


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def draw(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Quality against B (left) and against prefill seconds (right) into one PNG: a row a task, a line a method.

    A method has a line for each shape of schedule, if there are several: all of it but the amount, which is to say
    layers, kind of budget and protected tokens.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if not row["part"]]
    panels = sorted({(row["task"], row["protocol"], row["tokens"]) for row in shown})
    lines = list(dict.fromkeys((row["method"], _shape(row)) for row in shown if row["method"] != DENSE))
    has_shapes = len({shape for _, shape in lines}) > 1
    figure = Figure(figsize=(11, 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for (task, protocol, tokens), (left, right) in zip(panels, axes, strict=True):
        metric = METRICS.get(task, ANSWERS)[0]
        here = [row for row in shown if (row["task"], row["protocol"], row["tokens"]) == (task, protocol, tokens)]
        for axis, x, unit in ((left, "mean_keep", "B: mean kept tokens per layer"), (right, "seconds", "prefill, s")):
            for i, (method, shape) in enumerate(lines):
                points = [row for row in here if (row["method"], _shape(row)) == (method, shape)]
                points.sort(key=lambda row: row[x])
                if not points:
                    continue
                values = [row[metric] for row in points]
                means = [value["mean"] for value in values]
                spread = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
                # An oracle knows the future: dashed, so that nobody takes it for a method.
                style = "--" if method.startswith("oracle") else "-"
                label = f"{method} {shape}" if has_shapes else method
                axis.errorbar(
                    [row[x] for row in points], means, spread, label=label, color=f"C{i}", linestyle=style,
                    marker="o", markersize=3, capsize=2, linewidth=1,
                )  # fmt: skip
            for row in here:
                if row["method"] == DENSE:
                    axis.plot(row[x], row[metric]["mean"], "k*", label=DENSE)
            axis.set(xlabel=unit, ylabel=metric, title=f"{task}, {tokens} tokens, {protocol}")
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _shape(row: dict[str, Any]) -> str:
    return "".join(str(row["schedule"]).partition("@")[1:])


def run(args: Any) -> int:
    """``sdtp eval compare``."""
    with user_errors():
        samples = read_samples(args.files)
        if args.solved:
            samples = solved_by_dense(samples)
        rows = summarize(group(samples, args.by), args.against)
        print_table(rows, args.against)
        if args.plot:
            draw(summarize(group(samples)), args.plot)
    return 0
