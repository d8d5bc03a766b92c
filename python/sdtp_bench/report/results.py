"""The rows that the report is made of: what kind each is, where it came from, and who measured it when."""

from __future__ import annotations

import functools
import json
import statistics
from collections import defaultdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence
    from pathlib import Path

Row = dict[str, Any]
# What every method of the quality tables is compared with; in a run without any of them, with the learned pruners.
RIVALS = ("attention", "recent", "random")

SOLVED = ("passkey", "lookup")
"""Tasks of which only the questions count that the dense model answers."""

UNKNOWN = "unknown"
# What makes rows of a kind: named where there are none yet, and for rows that do not name their own.
COMMANDS = {
    "op": "sdtp bench op --out benchmarks/results/MACHINE",
    "scaling": "sdtp bench scaling --out benchmarks/results/MACHINE",
    "prefill": "sdtp bench prefill --out benchmarks/results/MACHINE",
    "decode": "sdtp bench decode --out benchmarks/results/MACHINE",
    "memory": "sdtp bench memory --out benchmarks/results/MACHINE",
    "multi": "sdtp bench multi --out benchmarks/results/MACHINE",
    "peers": "make peers",
    "quality": "sdtp eval run --out DIR",
    "cost": "sdtp eval cost --json benchmarks/results/quality/cost.jsonl",
    "evict": "python benchmarks/evict_earlier_kv.py --documents 10 --out benchmarks/results/evict.jsonl",
    "triton": "python tests/triton_aot.py",
    "nvcc": "python tests/cuda_aot.py",
}
# Rows that are older than the field `bench`, or come from commands that do not write it, are known by their fields.
_FIELDS = {
    "quality": set(compare.KEY),
    "cost": {"scoring_s", "layer_s"},
    "evict": {"evict_earlier_kv", "nll_dense"},
    "triton": {"triton", "kernel", "registers"},
    "nvcc": {"nvcc", "kernel", "registers"},
}
# The same settings measured twice on a machine: the later row counts.
_SETTINGS = {
    "op": (
        "provider",
        "model",
        "hidden_size",
        "pruner_size",
        "tokens",
        "batch",
        "keep",
        "dtype",
        "budget",
        "block_size",
        "pooling",
        "threads",
    ),
    "prefill": ("checkpoint", "tokens", "keep", "budget", "block_size", "dtype", "method", "dropped_kv"),
    "peers": ("peer", "checkpoint", "tokens", "keep", "dtype"),
    "memory": ("checkpoint", "keep", "budget", "block_size", "dtype", "method", "limit_bytes", "dropped_kv"),
    "multi": ("checkpoint", "tokens", "keep", "dtype", "method", "processes", "threads"),
}
_SETTINGS["scaling"] = _SETTINGS["op"]
_SETTINGS["decode"] = (*_SETTINGS["prefill"], "new_tokens")


class Question(NamedTuple):
    """What samples answer that can be compared: those of one run, for one task, protocol and length."""

    task: str
    protocol: str
    tokens: int
    file: str
    """Of the run, relative to the directory of all rows."""

    @property
    def name(self) -> str:
        """For anchors and files; ends in the name of the run's directory, or of a file that is not named by the run."""
        parts = self.file.removesuffix(".jsonl").removesuffix("/samples").split("/")
        return f"{self.task}-{self.protocol}-{self.tokens}-{parts[-1]}"


class Judged(NamedTuple):
    """The per-sample rows to one question, and what they amount to."""

    samples: list[Row]
    summaries: list[Row]
    """Of :func:`sdtp_eval.compare.summarize`, one a method and schedule, with two fields more: ``metric``, what the
    task is judged by first; ``time``, the median of prefill times over the dense model's on the same samples, which ran
    in turn, or ``None`` where none was timed."""

    @property
    def learned(self) -> list[Row]:
        """Of the summaries those of learned pruners."""
        return [row for row in self.summaries if kind_of(row["method"]) == "learned"]


def kind_of(method: str) -> str:
    """What a method of ``sdtp eval run`` needs, by its name."""
    if method == compare.DENSE:
        return "no pruning"
    if method.startswith("kvpress:"):
        return "cache cut after a dense prefill"
    if method.startswith("oracle"):
        return "oracle: knows the continuation"
    return "learned" if "@" in method else "training-free"


class Results(dict[str, list[Row]]):
    """Rows by kind; no rows of a kind that is not there."""

    def __missing__(self, kind: str) -> list[Row]:
        return []

    @functools.cached_property
    def quality(self) -> dict[Question, Judged]:
        """Rows of ``sdtp eval run``, a run at a time: the samples that all of its methods have read.

        Of pass keys and lookups those that the dense model finds.
        """
        unique = {(row["file"], *(row[name] for name in compare.KEY)): row for row in self["quality"]}
        groups = grouped(unique.values(), lambda row: Question(*(row[name] for name in Question._fields)))
        found = {}
        order = (
            "nll",
            "passkey",
            "lookup",
            "multikey",
        )  # what is judged first stands first, and of one kind the largest run

        def place(key: Question) -> tuple[Any, ...]:
            return order.index(key.task) if key.task in order else len(order), key[:3], -len(groups[key]), key.file

        for key in sorted(groups, key=place):
            members = _shared(groups[key])
            samples = compare.solved_by_dense(members) if key.task in SOLVED else members
            if samples:
                found[key] = Judged(samples, _summaries(samples))
        return found


def _shared(rows: Sequence[Row]) -> list[Row]:
    """Without samples that some method has not read, as where a run was stopped: means are of the same texts then."""
    readers: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in rows:
        readers[row["id"]].add((row["method"], row["schedule"]))
    everyone = set().union(*readers.values())
    return [row for row in rows if readers[row["id"]] == everyone]


def _summaries(samples: Sequence[Row]) -> list[Row]:
    groups = compare.group(samples)
    dense = next((group for group in groups if group.method == compare.DENSE), None)
    methods = dict.fromkeys(group.method for group in groups)
    rivals = [name for name in RIVALS if name in methods]
    rows = compare.summarize(groups, rivals or [name for name in methods if kind_of(name) == "learned"])
    for row, group in zip(rows, groups, strict=True):
        row["metric"] = group.metrics[0] if group.metrics else ""
        row["time"] = None if dense is None else _relative_time(group, dense)
    return [row for row in rows if row["metric"]]


def _relative_time(group: compare.Group, dense: compare.Group) -> float | None:
    ratios = [
        sample["seconds"] / dense.samples[name]["seconds"]
        for name, sample in group.samples.items()
        if sample.get("seconds") and dense.samples.get(name, {}).get("seconds")
    ]
    return statistics.median(ratios) if ratios else None


def read(root: Path) -> Results:
    """All rows below a directory, by kind.

    Parameters
    ----------
    root : Path
        Such as ``benchmarks/results``; every ``*.jsonl`` in it is read, whatever its name.

    Returns
    -------
    Results
        By the row's field ``bench``, or where it has none by its other fields: ``"prefill"``, ``"quality"`` and so on;
        :data:`UNKNOWN` for what no part of the report shows. Each row has its ``file``, relative to `root`.

    Raises
    ------
    ValueError
        For a line that is not a JSON object.
    """
    found: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(root.rglob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError(type(row).__name__)
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: expected a JSON object ({error})") from None
            kind = _kind(row)
            row["file"] = path.relative_to(root).as_posix()
            if kind in COMMANDS:
                row.setdefault("command", COMMANDS[kind])
            found[kind].append(row)
    return Results({kind: _latest(rows, _SETTINGS.get(kind)) for kind, rows in found.items()})


def _kind(row: Row) -> str:
    if "bench" in row:
        return str(row["bench"]) if row["bench"] in (*COMMANDS, "runs") else UNKNOWN
    return next((kind for kind, fields in _FIELDS.items() if fields <= row.keys()), UNKNOWN)


def _latest(rows: Iterable[Row], settings: Sequence[str] | None) -> list[Row]:
    if settings is None:
        return list(rows)
    found: dict[Hashable, Row] = {}
    for row in rows:
        # Rows that are older than predicted keys and values do not say that they have none.
        key = (machine(row), *(str(row.get(name) or "none") for name in settings))
        found[key] = row
    return list(found.values())


def machine(row: Row) -> str:
    """Processor or GPU, and threads, for people to read; ``""`` where the row does not say."""
    facts = row.get("machine")
    if not isinstance(facts, dict):
        return str(facts or "")
    if facts.get("gpu"):
        return str(facts["gpu"])
    threads = row.get("threads") or facts.get("threads")
    counted = f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    return f"{facts.get('processor', '')}{counted}"


def _short(revision: str | None) -> str:
    commit, plus, mark = (revision or "").partition("+")
    return commit[:10] + plus + mark


def _versions(row: Row) -> str:
    """Of what a figure depends on most; the rows have the rest."""
    facts = row | row.get("versions", {})
    return ", ".join(
        f"{name} {facts[name]}" for name in ("torch", "triton", "nvcc") if isinstance(facts.get(name), str)
    )


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Rows by a key, in the order of the keys."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


class Source(NamedTuple):
    """The line under every table and picture: how its rows were made."""

    commands: tuple[str, ...]
    machines: tuple[str, ...]
    versions: tuple[str, ...]
    dates: tuple[str, ...]
    revisions: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, rows: Iterable[Row], files: Iterable[str] = ()) -> Source:
        """Of the rows themselves.

        Parameters
        ----------
        rows : iterable of Row
        files : iterable of str
            Where the figures stand, if not in the rows' own files.
        """
        rows = list(rows)

        def distinct(values: Iterable[Any]) -> tuple[str, ...]:
            return tuple(dict.fromkeys(str(value) for value in values if value))

        return cls(
            distinct(row.get("command") for row in rows),
            distinct(machine(row) for row in rows),
            distinct(_versions(row) for row in rows),
            tuple(sorted(distinct(str(row.get("date", ""))[:10] for row in rows))),
            distinct(_short(row.get("revision")) for row in rows),
            tuple(sorted(set(files) or distinct(row.get("file") for row in rows))),
        )

    def facts(self) -> str:
        """Machine, versions, date and revision in one line; what the rows do not say is named as missing."""
        dates = " to ".join(dict.fromkeys((self.dates[0], self.dates[-1]))) if self.dates else "date not recorded"
        revision = [f"revision {', '.join(self.revisions)}"] if self.revisions else []
        return "; ".join((*(self.machines or ("machine not recorded",)), *self.versions, dates, *revision))


def runs_of(rows: Results, samples: Iterable[Row]) -> list[Row]:
    """The records of the runs that made these per-sample rows, which do not say so themselves: those next to them."""
    asked = {(PurePath(row["file"]).parent, row["task"], row["tokens"]) for row in samples}

    def has_made(run: Row) -> bool:
        place = PurePath(run["file"]).parent
        return any((place, task, tokens) in asked for task in run["tasks"] for tokens in run["tokens"])

    return [run for run in rows["runs"] if has_made(run)]


def quality_source(rows: Results, samples: Sequence[Row]) -> Source:
    """Of per-sample rows."""
    return Source.of(runs_of(rows, samples), {row["file"] for row in samples})


def quality_model(rows: Results, samples: Sequence[Row]) -> str:
    """Checkpoint and dtype of per-sample rows, as far as they were recorded."""
    return "; ".join(dict.fromkeys(f"{run['checkpoint']}, {run['dtype']}" for run in runs_of(rows, samples)))
