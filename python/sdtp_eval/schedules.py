"""Schedules on a command line: the options, and the :class:`~sdtp_kernels.PruningSchedule` that they mean."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from sdtp_eval.compare import SAME_BUDGET

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sdtp_kernels import PruningSchedule

LAYERS = "4:3"  # the paper's pattern: from layer 4, every third
SHAPES = ("even", "early")  # how a ratio becomes those of the stages: as it is, or front_loaded
BUDGETS = ("global", "block")
# Keeps every token of up to a million, yet is less than 1: scorers run, and nothing is dropped.
KEEP_ALL = 1 - 1e-8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which layers prune, and how much is kept."""
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument(
        "--keep", nargs="+", default=["0.9", "0.8"], metavar="RATIO",
        help="share that each stage keeps, or one a stage with commas (default: 0.9 0.8)",
    )  # fmt: skip
    how_much.add_argument(
        "--mean-keep", nargs="+", type=float, metavar="B",
        help="instead: find the ratio that keeps this share of the tokens on average over all layers",
    )  # fmt: skip
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=["even"],
        help="even: the same ratio in each stage; early: front_loaded, to the same budget (default: even)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", nargs="+", metavar="LAYERS",
        help=f"FIRST:STEP or a list with commas (default: those of the pruner file, else {LAYERS})",
    )  # fmt: skip
    parser.add_argument(
        "--once", nargs="+", type=int, default=[], metavar="LAYER",
        help="also, with the same B as each of these: all tokens up to this layer, and one stage there",
    )  # fmt: skip
    parser.add_argument("--budget", nargs="+", choices=BUDGETS, default=["global"], help="default: global")
    parser.add_argument("--block-size", nargs="+", type=int, default=[512], help="tokens of a block (default: 512)")
    parser.add_argument("--sink", type=int, default=4, help="first tokens always kept (%(default)s)")
    parser.add_argument("--recent", type=float, default=0.1, help="share of the end always kept (%(default)s)")


def make_schedules(
    args: argparse.Namespace, own_layers: tuple[int, ...] | None, num_layers: int, tokens: int
) -> dict[str, PruningSchedule]:
    """The schedules that the options of :func:`add_options` ask for, by a label that says all of it.

    Parameters
    ----------
    args : Namespace
    own_layers : tuple of int or None
        Layers that the method has pruners for; used where ``--layers`` names none.
    num_layers : int
        Of the model.
    tokens : int
        Length of the prompt.

    Raises
    ------
    ValueError
        If an option is no schedule, or a budget cannot be reached.
    """
    from sdtp_kernels import PruningSchedule

    patterns = [_parse_layers(word, num_layers) for word in args.layers or []]
    patterns = patterns or [own_layers or _parse_layers(LAYERS, num_layers)]
    budgets: list[tuple[Any, int]] = []
    for budget in args.budget:
        sizes = args.block_size if budget == "block" else [PruningSchedule.block_size]
        budgets += [(budget, size) for size in sizes]
    found = {}
    for layers, (budget, block_size), shape in itertools.product(patterns, budgets, args.shape):
        base = PruningSchedule(layers=layers, budget=budget, block_size=block_size, sink=args.sink, recent=args.recent)
        notes = [f"@{show_layers(layers, num_layers)}"]
        notes += ["early"] if shape == "early" else []
        notes += [f"block {block_size}"] if budget == "block" else []
        notes += [f"sink {args.sink}"] if args.sink != PruningSchedule.sink else []
        notes += [f"recent {args.recent:g}"] if args.recent != PruningSchedule.recent else []
        for word in args.mean_keep or args.keep:
            if args.mean_keep:
                schedule = schedule_for(base, word, num_layers, tokens, shape)
                label = f"B {word:g}"
            else:
                ratio = _parse_ratio(word)
                schedule, label = dataclasses.replace(base, keep_ratio=shaped(ratio, len(layers), shape)), str(word)
            found[" ".join([label, *notes])] = schedule
    return found


def dropping_once(
    schedules: dict[str, PruningSchedule], layers: Sequence[int], num_layers: int, tokens: int
) -> dict[str, PruningSchedule]:
    """For each schedule and layer the one that drops there alone, with the same B: the class of GemFilter and FastKV.

    Parameters
    ----------
    schedules : dict
        By label, as of :func:`make_schedules`.
    layers : sequence of int
    num_layers : int
        Of the model.
    tokens : int
        Length of the prompt.

    Raises
    ------
    ValueError
        If a layer is too late for a budget.
    """
    found = {}
    for (label, schedule), layer in itertools.product(schedules.items(), layers):
        mean_keep = schedule.mean_keep(tokens, num_layers)
        base = dataclasses.replace(schedule, layers=(layer,), keep_ratio=KEEP_ALL)
        try:
            found[f"{label} once {layer}"] = schedule_for(base, mean_keep, num_layers, tokens)
        except ValueError as error:
            raise ValueError(f"--once {layer}, for '{label}': {error}") from None
    return found


def shaped(keep_ratio: float | tuple[float, ...], num_stages: int, shape: str) -> float | tuple[float, ...]:
    """The keep ratio of a schedule of this shape, one of :data:`SHAPES`.

    Raises
    ------
    ValueError
        If there is a ratio for each stage already, and the shape is not even.
    """
    from sdtp_kernels import front_loaded

    if shape == "even":
        return keep_ratio
    if isinstance(keep_ratio, tuple):
        given = ",".join(map(str, keep_ratio))
        raise ValueError(f"--keep {given}: there is a ratio for each stage already; leave out --shape {shape}")
    return front_loaded(keep_ratio, num_stages)


def schedule_for(
    base: PruningSchedule, mean_keep: float, num_layers: int, tokens: int, shape: str = "even"
) -> PruningSchedule:
    """The schedule like `base` whose keep ratio, in this shape, gives the mean kept share `mean_keep` at `tokens`.

    Raises
    ------
    ValueError
        If no ratio does: the tokens that are always kept are too many, or pruning begins too late.
    """

    def at(hundred_thousandths: int) -> PruningSchedule:
        ratio = shaped(hundred_thousandths / 100_000, base.num_stages, shape)
        return dataclasses.replace(base, keep_ratio=ratio)

    low, high = 1, 100_000  # B grows with the ratio
    while low < high:
        middle = (low + high) // 2
        if at(middle).mean_keep(tokens, num_layers) < mean_keep:
            low = middle + 1
        else:
            high = middle
    schedule = at(low)
    found = schedule.mean_keep(tokens, num_layers)
    if abs(found - mean_keep) > SAME_BUDGET:
        least = at(1).mean_keep(tokens, num_layers)
        raise ValueError(
            f"B {mean_keep:g} cannot be had: stages at {base.layers} of {num_layers} layers keep between {least:.3f} "
            f"and 1 of {tokens} tokens; ask for more, or begin to prune earlier"
        )
    return schedule


def _parse_ratio(word: str) -> float | tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in str(word).split(","))
    except ValueError:
        raise ValueError(f"--keep {word}: expected a number, or one a stage with commas") from None
    return ratios[0] if len(ratios) == 1 else ratios


def _parse_layers(word: str, num_layers: int) -> tuple[int, ...]:
    try:
        if ":" in word:
            first, step = map(int, word.split(":"))
            return tuple(range(first, num_layers, step))
        return tuple(int(part) for part in word.split(","))
    except ValueError:
        raise ValueError(f"--layers {word}: expected FIRST:STEP, such as 4:3, or a list, such as 4,7,10") from None


def show_layers(layers: tuple[int, ...], num_layers: int) -> str:
    """As ``--layers`` takes them: FIRST:STEP only where they go on to the end."""
    steps = {b - a for a, b in itertools.pairwise(layers)}
    goes_on = len(steps) == 1 and len(layers) > 2 and layers[-1] + min(steps) >= num_layers
    return f"{layers[0]}:{steps.pop()}" if goes_on else ",".join(map(str, layers))
