"""Rows of figures: JSON Lines, a file for each benchmark, and with each row what it was measured on."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval.provenance import describe_run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch


def append_rows(
    directory: str | Path, rows: Iterable[Mapping[str, Any]], device: torch.device | str = "cpu"
) -> list[Path]:
    """Append each row to the file of its benchmark, with the facts that :func:`describe_run` tells.

    Parameters
    ----------
    directory : str or Path
        Made where it is missing: one for each machine.
    rows : iterable of mapping
        Each with ``bench``, the name of its file. What a row says itself goes before the facts.
    device : torch.device or str, default "cpu"
        Where they were measured.

    Returns
    -------
    list of Path
        The files written to.

    Raises
    ------
    OSError
        If they cannot be written.
    """
    facts = describe_run(device)
    lines: dict[Path, list[str]] = {}
    for row in rows:
        lines.setdefault(Path(directory) / f"{row['bench']}.jsonl", []).append(json.dumps({**facts, **row}) + "\n")
    for path, new in lines.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(new)
    return list(lines)


def read_rows(directory: str | Path, bench: str) -> list[dict[str, Any]]:
    """All rows of a benchmark, in the order they were written; none where there is no file."""
    path = Path(directory) / f"{bench}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Of the times of one thing: ``seconds`` (median), ``quantiles`` (p10, p50, p90) and ``seconds_all``."""
    median = statistics.median(seconds)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [median]
    return {
        "seconds": median,
        "quantiles": {"p10": deciles[0], "p50": median, "p90": deciles[-1]},
        "seconds_all": list(seconds),
    }
