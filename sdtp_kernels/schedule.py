"""Which layers prune, and how many tokens stay.

This is the one place where a keep ratio becomes a number: the ops, the model patches, the tests and the reports all
call it. Every count is exact integer arithmetic, and the same expressions run on Python ints, on the symbolic sizes of
``torch.compile`` and on ``int64`` tensors of row lengths, so a padded row is counted exactly like the row alone.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeVar

import torch

Length = TypeVar("Length", int, torch.Tensor)

# Shares are stored as fractions whose denominator does not exceed this (see `_exact_pair`), which makes
# the counts exact for every prompt up to this many tokens while `length * numerator` still fits in int64.
MAX_PROMPT = 2**30


# Of `front_loaded`: chosen on development text, see docs/notes/pruners.md.
EARLY_POWER = 0.7


def front_loaded(keep_ratio: float, num_stages: int, power: float = EARLY_POWER) -> tuple[float, ...]:
    """Keep ratios that drop more in the first stages and less in the last, at the budget of `keep_ratio` in each.

    With the same ratio in every stage (the paper's form) a deep layer is left with little more than the prompt's end.
    Here ``exp(-c s^power)`` of a prompt is left after stage ``s``. The mean of these shares over the stages is the mean
    of ``keep_ratio^s``; that sets `c`.

    Parameters
    ----------
    keep_ratio : float
        In ``(0, 1]``.
    num_stages : int
    power : float, default 0.7
        In ``(0, 1]``. 1 is `keep_ratio` in every stage; a smaller number drops earlier.

    Returns
    -------
    tuple of float
        One ratio a stage, for :class:`PruningSchedule`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Examples
    --------
    >>> front_loaded(0.8, 3)
    (0.75964, 0.84224, 0.86366)
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio}: expected a share in (0, 1]; 1.0 keeps every token")
    if not 0 < power <= 1:
        raise ValueError(f"power={power}: expected a number in (0, 1]; 1 is the same ratio in every stage")
    if num_stages < 1:
        raise ValueError(f"num_stages={num_stages}: expected at least 1")
    stages = range(1, num_stages + 1)
    wanted = sum(keep_ratio**stage for stage in stages)
    # With c = 0 nothing is dropped; with the last share's logarithm every share is at most the last of the even ones.
    low, high = 0.0, -math.log(keep_ratio) * num_stages
    for _ in range(60):
        middle = (low + high) / 2
        if sum(math.exp(-middle * stage**power) for stage in stages) > wanted:
            low = middle
        else:
            high = middle
    # In hundred-thousandths, one at least: short enough to be written down, and read back as the same schedule.
    return tuple(max(1, round(1e5 * math.exp(high * ((stage - 1) ** power - stage**power)))) / 1e5 for stage in stages)


class StagePlan(NamedTuple):
    """What one pruning stage asks of :func:`sdtp_kernels.select_tokens`, for one prompt length."""

    num_keep: int
    """Tokens that go on."""
    sink: int
    """Leading tokens that are always kept."""
    recent: int
    """Trailing tokens that are always kept, outside any block."""
    block_size: int | None
    """Tokens a finished block holds when the stage begins; ``None`` for the global budget."""


@dataclass(frozen=True)
class PruningSchedule:
    """When to prune and how much to keep.

    Stage ``s`` (counted from 1) prunes the input of decoder layer ``layers[s - 1]``. With ``r^s`` the product of the
    first ``s`` keep ratios, a prompt of ``N`` tokens keeps ``max(forced, ceil(N * r^s))`` tokens after stage ``s``
    (SDTP section 3.3 has ``r = 0.9``, the first stage at layer 4, then every third layer).

    Parameters
    ----------
    layers : sequence of int
        Decoder layers whose input is pruned, strictly increasing, each at least 1: layer 0 is never pruned, so its
        cache keeps the logical length that ``generate()`` relies on.
    keep_ratio : float or sequence of float, default 0.9
        Share of the current tokens that each stage keeps, in ``(0, 1]``; one number, or one per stage. Read as the
        decimal that is written: 0.9 means exactly 9/10.
    sink : int, default 4
        Leading prompt tokens that are always kept.
    recent : float, default 0.1
        Share of the *original* prompt length that is always kept at its end, in ``[0, 1]``; the last token always is.
        Used by the global budget only: what a block keeps must not depend on where the prompt ends.
    budget : {"global", "block"}, default "global"
        ``"global"`` ranks the whole prompt at each stage. ``"block"`` ranks each finished block of `block_size`
        prompt tokens by itself and keeps the same count in every block, its last token included. What follows the last
        finished block is kept whole. A block is finished once half a block follows it: a prompt ends with what is
        asked, which must not be pruned. With a causal score a block's result depends on nothing after it.
    block_size : int, default 512
        Prompt tokens in a block, by original position.
    min_prompt : int, default 64
        Prompts shorter than this are not pruned.

    Raises
    ------
    ValueError
        If an argument is out of range; the message says what was got and what is allowed.

    Examples
    --------
    >>> schedule = PruningSchedule((4, 7), keep_ratio=0.5)
    >>> [schedule.num_keep(1000, stage) for stage in range(3)]
    [1000, 500, 250]
    >>> PruningSchedule.every(12).layers
    (4, 7, 10)
    """

    layers: tuple[int, ...]
    keep_ratio: float | tuple[float, ...] = 0.9
    sink: int = 4
    recent: float = 0.1
    budget: Literal["global", "block"] = "global"
    block_size: int = 512
    min_prompt: int = 64

    def __post_init__(self) -> None:
        for name in ("sink", "block_size", "min_prompt"):
            object.__setattr__(self, name, _integer(getattr(self, name), name))
        try:
            layers = tuple(map(operator.index, self.layers))  # any kind of integer
        except TypeError:
            layers = ()
        if not layers:
            raise ValueError(f"layers={self.layers!r}: expected at least one decoder layer index, e.g. layers=(4, 7)")
        if layers[0] < 1 or any(a >= b for a, b in itertools.pairwise(layers)):
            raise ValueError(
                f"layers={layers}: expected strictly increasing layer indices >= 1; layer 0 cannot be pruned because "
                "its cache holds the logical length of the prompt"
            )
        given: Any = self.keep_ratio.tolist() if isinstance(self.keep_ratio, torch.Tensor) else self.keep_ratio
        is_one = not hasattr(given, "__len__") or isinstance(given, str)
        ratios = (_number(given),) * len(layers) if is_one else tuple(map(_number, given))
        if len(ratios) != len(layers):
            raise ValueError(
                f"keep_ratio has {len(ratios)} numbers for {len(layers)} layers: give one, or one per layer"
            )
        for ratio in ratios:
            if not 0 < ratio <= 1:  # also refuses NaN
                raise ValueError(f"keep_ratio={ratio}: expected a share in (0, 1]; 1.0 keeps every token")
        if self.budget not in ("global", "block"):
            raise ValueError(f"budget={self.budget!r}: expected 'global' or 'block'")
        if self.sink < 0:
            raise ValueError(f"sink={self.sink!r}: expected a count of tokens >= 0")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent={self.recent!r}: expected a share of the prompt in [0, 1]")
        if self.budget == "block" and self.block_size <= self.sink:
            raise ValueError(f"block_size={self.block_size}: expected more than the {self.sink} sink tokens of a block")
        if self.min_prompt < 1:
            raise ValueError(f"min_prompt={self.min_prompt}: expected a length >= 1")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "keep_ratio", ratios[0] if is_one else ratios)
        shares = [Fraction(1)]
        for ratio in ratios:
            shares.append(shares[-1] * _decimal(ratio))
        # Plain pairs of ints, so that torch.compile sees arithmetic on constants.
        object.__setattr__(self, "_shares", tuple(map(_exact_pair, shares)))
        object.__setattr__(self, "_recent_share", _exact_pair(_decimal(self.recent)))

    @classmethod
    def every(cls, num_layers: int, first: int = 4, step: int = 3, **settings: object) -> PruningSchedule:
        """Stages at layers ``first, first + step, ...`` of a model with `num_layers` layers (the paper's pattern)."""
        layers = tuple(range(first, num_layers, step))
        if not layers:
            raise ValueError(
                f"every({num_layers}, first={first}, step={step}): a model of {num_layers} layers has layers 0 to "
                f"{num_layers - 1}, and none to prune at; "
                + (f"every({num_layers}, first=1) fits" if num_layers > 1 else "it cannot be pruned")
            )
        return cls(layers=layers, **settings)  # type: ignore[arg-type]

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def sees_prompt_end(self) -> bool:
        """Whether a score may depend on where the prompt ends.

        Under the block budget it may not: what a block keeps must not depend on what follows it.
        """
        return self.budget == "global"

    def drops(self, stage: int) -> bool:
        """Whether stage `stage` can drop anything; a stage whose own keep ratio is 1 never does."""
        return self._share(stage) != self._share(stage - 1)

    def num_keep(self, length: Length, stage: int, finished: Length | int = 0) -> Length:
        """Tokens left after `stage` stages of a prompt of `length` tokens.

        Parameters
        ----------
        length : int, SymInt or int64 tensor
            Length of the prompt, without padding.
        stage : int
            0 (nothing pruned yet) to ``num_stages``.
        finished : int or int64 tensor, default 0
            Tokens in blocks that an earlier call has pruned: where there are any, the prompt is not short.

        Returns
        -------
        Same type as `length`.
        """
        if stage == 0:
            return length
        if self.budget == "block":
            finished_now = self._finished(length)
            kept = length - finished_now + self._finished_keep(finished_now, stage)
        else:
            forced = _min(length, self.sink + self.num_recent(length))
            kept = _max(forced, _ceil_share(length, self._share(stage)))
        return self._unless_short(length, kept, finished)

    def num_recent(self, length: Length, finished: Length | int = 0) -> Length:
        """Trailing tokens that every stage keeps of a prompt of `length` tokens."""
        if self.budget == "block":
            recent = length - self._finished(length)
        else:
            recent = _max(_min(length, 1), _ceil_share(length, self._recent_share))  # type: ignore[attr-defined]
        return self._unless_short(length, recent, finished)

    @property
    def max_unfinished(self) -> int:
        """Most tokens of a prompt that the block budget keeps whole at its end, whatever its length."""
        return max(self.block_size + self._margin, self.min_prompt) - 1

    def block_keep(self, stage: int) -> int:
        """Tokens that a finished block still holds after `stage` stages."""
        forced = self.sink + 1  # the sink falls into the first block, and every block keeps its last token
        return max(min(self.block_size, forced), _ceil_share(self.block_size, self._share(stage)))

    def max_keep(self, length: int, stage: int) -> int:
        """Most tokens that any prompt of at most `length` tokens has left after `stage` stages.

        This is the width of a left-padded batch, known from shapes alone. It can exceed ``num_keep(length, stage)``: an
        unfinished block keeps more than a finished one, and short prompts are not pruned.
        """
        widest = _max(self.num_keep(length, stage), _min(length, self.min_prompt - 1))
        if self.budget == "block" and stage > 0:
            blocks = self._finished(length) // self.block_size
            almost_finished = (blocks - 1) * self.block_keep(stage) + self.block_size + self._margin - 1
            widest = _max(widest, _min(almost_finished, length))
        return widest

    def max_dropped(self, length: int, stage: int) -> int:
        """Most tokens that stage `stage` drops of any prompt of at most `length` tokens."""
        if self.budget == "block":
            before, after = (self._finished_keep(self._finished(length), s) for s in (stage - 1, stage))
            return before - after
        # Two roundings up: of a shorter prompt the first may be up where that of the longest is not.
        before, after = (_ceil_share(length, self._share(s)) for s in (stage - 1, stage))
        return _min(length, before - after + 1)

    def plan(
        self, length: int, stage: int, keep_last: int = 0, *, padded: bool = False, finished: int = 0
    ) -> StagePlan:
        """Arguments of the selection at `stage` for a prompt of `length` tokens.

        Parameters
        ----------
        length : int or SymInt
            Tokens of the prompt; of the longest row that fits where `padded`.
        stage : int
            1 to ``num_stages``.
        keep_last : int, default 0
            Tokens after the prompt. They are always kept, and no share counts them.
        padded : bool, default False
            Whether rows may be shorter than `length`; their own counts then come from :meth:`plan_rows`.
        finished : int, default 0
            Tokens of the prompt in blocks that an earlier call has pruned; the selection is of those after them. Where
            `padded` they are no part of `length`.
        """
        if padded:
            num_keep = self.max_keep(length, stage)
        else:
            num_keep = self.num_keep(length, stage, finished) - self._finished_keep(finished, stage)
        block_size = self.block_keep(stage - 1) if self.budget == "block" else None
        sink = self.sink if padded or finished == 0 else 0
        return StagePlan(num_keep + keep_last, sink, self.num_recent(length, finished) + keep_last, block_size)

    def plan_rows(
        self, lengths: torch.Tensor, stage: int, keep_last: int = 0, finished: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Per-row counts of a padded batch, computed on its device.

        Parameters
        ----------
        lengths : int64 tensor [B]
            Prompt length of each row, without padding and without the `keep_last` tokens.
        stage, keep_last
            As in :meth:`plan`.
        finished : int64 tensor [B], optional
            Tokens of each row in blocks that an earlier call has pruned; the counts are of those after them.

        Returns
        -------
        int64 tensor [B, 3]
            Columns: valid tokens when the stage begins, tokens to keep, trailing tokens always kept.
        """
        finished = torch.zeros_like(lengths) if finished is None else finished
        before, after = (
            self.num_keep(lengths, s, finished) - self._finished_keep(finished, s) for s in (stage - 1, stage)
        )
        return torch.stack((before, after, self.num_recent(lengths, finished)), dim=-1) + keep_last

    def mean_keep(self, length: int, num_layers: int) -> float:
        """Mean kept tokens per layer over the prompt's length, ``B = sum_l n_l / (L * n)``: the budget's unit."""
        kept = sum(self.num_keep(length, sum(start <= layer for start in self.layers)) for layer in range(num_layers))
        return kept / (num_layers * length)

    @property
    def _margin(self) -> int:
        """Tokens that have to stand after a block before it is finished."""
        return self.block_size // 2

    def _finished(self, length: Length) -> Length:
        """Tokens in finished blocks of a prompt of `length` tokens."""
        return _max(length - self._margin, 0) // self.block_size * self.block_size

    def _finished_keep(self, finished: Length, stage: int) -> Length:
        """What is left after `stage` stages of so many tokens of finished blocks."""
        return finished // self.block_size * self.block_keep(stage)

    def _share(self, stage: int) -> tuple[int, int]:
        shares: tuple[tuple[int, int], ...] = self._shares  # type: ignore[attr-defined]
        return shares[stage]

    def _unless_short(self, length: Length, pruned: Length, finished: Length | int) -> Length:
        is_short = length < self.min_prompt
        if isinstance(length, torch.Tensor):
            if isinstance(finished, torch.Tensor):
                is_short = is_short & (finished == 0)
            return torch.where(is_short, length, pruned)
        return length if is_short and finished == 0 else pruned


def _integer(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: expected a count of tokens") from None


def _number(value: Any) -> float:
    """A Python number: a NumPy float32 of 0.9 is meant as the decimal that it prints as."""
    if isinstance(value, (int, float)) and type(value).__module__ == "builtins":
        return value
    try:
        return float(str(value))
    except ValueError:
        raise ValueError(f"keep_ratio={value!r}: expected a share in (0, 1]") from None


def _decimal(value: float) -> Fraction:
    # The decimal a person wrote, not its binary neighbour: ceil(10 * 0.9) is 9 and ceil(1000 * 0.1) is 100.
    return Fraction(repr(float(value)))


def _exact_pair(value: Fraction, limit: int = MAX_PROMPT) -> tuple[int, int]:
    """Numerator and denominator of the smallest fraction >= `value` whose denominator is <= `limit`.

    ``ceil(n * value)`` is the least ``j`` with ``j / n >= value``. For ``n <= limit`` every ``j / n`` has a denominator
    <= `limit`, so none lies between `value` and the result: both give the same ceiling. r^9 of a long decimal has a
    denominator far beyond int64; this one always fits.
    """
    if value.denominator <= limit:
        return value.numerator, value.denominator
    # Stern-Brocot descent for value in (0, 1), each run of equal turns taken at once: low < value < high.
    low, high = (0, 1), (1, 1)
    while True:
        p, q = value.numerator, value.denominator
        # Steps of low towards high that stay below value, then of high towards low that stay above it.
        steps = math.ceil(Fraction(p * low[1] - q * low[0], q * high[0] - p * high[1])) - 1
        steps = min(steps, (limit - low[1]) // high[1])
        low = (low[0] + steps * high[0], low[1] + steps * high[1])
        back = math.ceil(Fraction(q * high[0] - p * high[1], p * low[1] - q * low[0])) - 1
        back = min(back, (limit - high[1]) // low[1])
        high = (high[0] + back * low[0], high[1] + back * low[1])
        if low[1] + high[1] > limit:
            return high


def _ceil_share(length: Length, share: tuple[int, int]) -> Length:
    numerator, denominator = share
    return (length * numerator + (denominator - 1)) // denominator


def _max(a: Length, b: Length | int) -> Length:
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, torch.as_tensor(b, device=a.device))
    return torch.sym_max(a, b)  # type: ignore[no-any-return]


def _min(a: Length, b: Length | int) -> Length:
    if isinstance(a, torch.Tensor):
        return torch.clamp(a, max=b)
    return torch.sym_min(a, b)  # type: ignore[no-any-return]
