"""What one request asks for: its keep ratio, whether and from what length on it is pruned, and tokens it protects.

Settings are host values, because counts set shapes. They are read when a prompt, or a chunk of one, is prefilled.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from ..schedule import PruningSchedule

SETTINGS = ("protect", "keep_ratio", "enabled", "min_prompt")
"""Names of what a request can set."""


class Protected(NamedTuple):
    """Tokens that are never pruned."""

    table: torch.Tensor
    """``[1 or B, C]`` bool, on the CPU."""
    counts: list[list[int]]
    """For every row, how many of its first ``c`` entries are set."""
    by_column: bool
    """Whether the table is over columns of ``input_ids``, or over a row's own tokens."""

    def check(self, columns: int) -> None:
        """Refuse a mask over other columns than the prompt's."""
        if self.by_column and self.table.shape[1] != columns:
            raise ValueError(
                f"protect: the mask has {self.table.shape[1]} columns, the prompt {columns}; pass a mask of the "
                "prompt's own width, or ranges"
            )

    def look_up(self, token_index: torch.Tensor, past: int) -> torch.Tensor:
        """``[B, n]`` bool: which of these new tokens are protected."""
        batch, width = token_index.shape
        place = torch.arange(past, past + width, device=token_index.device).expand(batch, -1)
        place = place if self.by_column else token_index
        table = self.table.to(token_index.device)
        if len(table) > 1:
            table = table.repeat_interleave(batch // len(table), dim=0)
        found = table.expand(batch, -1).gather(1, place.clamp(0, table.shape[1] - 1))
        return found & (token_index >= 0) & (place < table.shape[1])

    def bounds(self, past: int, width: int, is_padded: bool) -> tuple[int, int]:
        """Least and most protected tokens that any row has among these columns."""
        if is_padded and not self.by_column:  # which of a row's tokens stand here is not known
            return 0, min(width, max(counts[-1] for counts in self.counts))
        last = self.table.shape[1]
        found = [counts[min(past + width, last)] - counts[min(past, last)] for counts in self.counts]
        return (0 if is_padded else min(found)), max(found)


class Settings(NamedTuple):
    """A request's settings, ready for the loop."""

    schedules: tuple[PruningSchedule, ...]
    """One for all rows, or one for each."""
    is_enabled: bool
    """False where no row is to be pruned."""
    protected: Protected | None

    @property
    def is_ragged(self) -> bool:
        """Whether rows of one length may keep different counts."""
        return self.protected is not None or len(set(self.schedules)) > 1

    def groups(self, batch: int, repeats: int = 1) -> list[tuple[list[int] | None, PruningSchedule]]:
        """Rows with the schedule that they share; ``None`` for all rows.

        Parameters
        ----------
        batch : int
        repeats : int, default 1
            Rows of the batch that stand for one row of the request: beams, returned sequences.
        """
        given = max(len(self.schedules), 0 if self.protected is None else len(self.protected.table))
        if given > 1 and batch not in (given, given * repeats):
            raise ValueError(
                f"settings for {given} rows, but the batch has {batch // repeats if batch % repeats == 0 else batch}: "
                "give one for all rows, or one for each"
            )
        if len(set(self.schedules)) == 1:
            return [(None, self.schedules[0])]
        each = batch // len(self.schedules)  # beams of a row stand together
        rows: dict[PruningSchedule, list[int]] = {}
        for i in range(batch):
            rows.setdefault(self.schedules[i // each], []).append(i)
        return [(found, schedule) for schedule, found in rows.items()]


def make_settings(
    schedule: PruningSchedule,
    protect: Any = None,
    keep_ratio: float | tuple[float, ...] | list[Any] | None = None,
    enabled: bool | list[bool] | None = True,
    min_prompt: int | list[int] | None = None,
) -> Settings:
    """See :meth:`~sdtp_kernels.SdtpHandle.request`."""
    given = {"keep_ratio": keep_ratio, "enabled": enabled, "min_prompt": min_prompt}
    lengths = {len(value) for value in given.values() if isinstance(value, list)}
    protected = _protected(protect)
    if protected is not None and len(protected.table) > 1:
        lengths.add(len(protected.table))
    if len(lengths) > 1:
        raise ValueError(f"settings for {sorted(lengths)} rows: a list has one entry for every row of the batch")
    schedules = []
    for row in range(max(lengths, default=1)):
        own = {name: value[row] if isinstance(value, list) else value for name, value in given.items()}
        changes: dict[str, Any] = {name: own[name] for name in ("keep_ratio", "min_prompt") if own[name] is not None}
        if own["enabled"] is not None and not own["enabled"]:
            changes["keep_ratio"] = 1.0
        schedules.append(dataclasses.replace(schedule, **changes))
    is_enabled = any(s.drops(stage) for s in schedules for stage in range(1, s.num_stages + 1))
    return Settings(tuple(schedules), is_enabled, protected)


def _protected(protect: Any) -> Protected | None:
    if protect is None:
        return None
    if hasattr(protect, "dtype"):  # a tensor or an array
        table, by_column = _mask(protect), True
    else:
        rows = _ranges(protect)
        width = max((end for row in rows for _, end in row), default=0)
        table, by_column = torch.zeros(len(rows), width, dtype=torch.bool, device="cpu"), False
        for i, row in enumerate(rows):
            for begin, end in row:
                table[i, begin:end] = True
    if table.shape[1] == 0:
        return None
    counts = [list(itertools.accumulate(row, initial=0)) for row in table.int().tolist()]
    return Protected(table, counts, by_column)


def _mask(protect: Any) -> torch.Tensor:
    mask = torch.as_tensor(protect, device="cpu")
    is_mask = mask.dtype == torch.bool or (not mask.is_floating_point() and bool(((mask == 0) | (mask == 1)).all()))
    if mask.dim() not in (1, 2) or not is_mask:
        raise ValueError(
            f"protect: expected a mask [batch, tokens] of bools over the columns of input_ids, got {list(mask.shape)} "
            f"{mask.dtype}; ranges go in a list: protect=[(0, 60)]"
        )
    return mask.bool().reshape(-1, mask.shape[-1])


def _ranges(protect: Any) -> list[list[tuple[int, int]]]:
    """The ranges of every row, or one list for all."""
    if (one := _range(protect)) is not None:
        return [[one]]
    try:
        items = list(protect)
        found = [_range(item) for item in items]
        if all(one is not None for one in found):
            return [[one for one in found if one is not None]]
        rows = [[_range(item) for item in row] for row in items]
        if all(one is not None for row in rows for one in row):
            return [[one for one in row if one is not None] for row in rows]
    except TypeError:
        pass
    raise ValueError(
        f"protect={protect!r}: expected ranges (first, last + 1) of token indices, counted in each row from its first "
        "token without padding: one, a list of them, or one such list for every row"
    )


def _range(value: Any) -> tuple[int, int] | None:
    """``(first, last + 1)`` where `value` is one: a pair of integers of any kind, a range or a slice of step 1."""
    if isinstance(value, (range, slice)):
        if value.step not in (None, 1) or value.stop is None:
            return None
        value = (value.start or 0, value.stop)
    try:
        begin, end = map(operator.index, value)
    except (TypeError, ValueError):
        return None
    return (begin, end) if 0 <= begin <= end else None
