"""Ways to score tokens, by the words of a command line: pruner files, scorers, oracles, presses of kvpress."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sdtp_eval.compare import DENSE
from sdtp_eval.schedules import make_schedules

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sdtp_eval.baselines import Oracle
    from sdtp_kernels import PruningSchedule

DROPPED_KV = ("none", "predicted")


class Method(NamedTuple):
    """A way to score tokens."""

    name: str
    pruners: Any = None
    """What :func:`sdtp_kernels.apply_sdtp` takes; ``None`` where the sample decides."""
    oracle: Oracle | None = None
    layers: tuple[int, ...] | None = None
    """Those that a pruner file has pruners for."""
    press: Any = None
    """A class of kvpress, which compresses the cache of a dense prefill."""
    kv_predictor: Any = None
    """The file's, or another's; whether it is used is what `dropped_kv` says."""
    dropped_kv: Literal["none", "predicted"] = "none"


def find_method(word: str) -> Method:
    """A method by the name of a scorer, an oracle or a press of kvpress, or by the path of a pruner file.

    The name of a file's method ends in a hash of its content: results of a file that is trained again do not mix.

    Raises
    ------
    ValueError
        If there is neither such a name nor such a file, or the file is broken.
    """
    from sdtp_eval import peers
    from sdtp_eval.baselines import BASELINES, ORACLES
    from sdtp_eval.checkpoints import bundled_pruners
    from sdtp_kernels import load_pruners

    if word.startswith(peers.PREFIX):
        return Method(word, press=peers.find_press(word))
    if word in BASELINES:
        return Method(word, BASELINES[word])
    if word in ORACLES:
        return Method(word, oracle=ORACLES[word])
    path = bundled_pruners().get(word, Path(word))
    if not path.is_file():
        known = ", ".join([*BASELINES, *ORACLES, *bundled_pruners(), f"{peers.PREFIX}SnapKV"])
        raise ValueError(f"no method {word!r}: neither a pruner file nor one of {known}")
    stack = load_pruners(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:6]
    return Method(f"{path.stem}@{digest}", stack, layers=tuple(sorted(stack)), kv_predictor=stack.kv_predictor)


def find_methods(words: Sequence[str], *, oracles: bool = True) -> list[Method]:
    """The methods by these names without dense, which always runs.

    Raises
    ------
    ValueError
        As :func:`find_method`; also for an oracle where `oracles` is false.
    """
    methods = [find_method(word) for word in words if word != DENSE]
    for method in methods:
        if method.oracle is not None and not oracles:
            raise ValueError(f"{method.name}: an oracle has to know the answer's tokens; 'sdtp eval run' can use it")
        if method.press is not None and not oracles:
            raise ValueError(f"{method.name}: only 'sdtp eval run' can use the presses of kvpress")
    return methods


def add_dropped_kv_options(parser: argparse.ArgumentParser, default: Sequence[str] | None = None) -> None:
    """``--dropped-kv`` and ``--kv-predictor``, for :func:`with_dropped_kv`."""
    shown = " ".join(default) if default else "predicted where the file has a KV predictor"
    parser.add_argument(
        "--dropped-kv", nargs="+", choices=DROPPED_KV, default=default,
        help=f"what later layers keep of a dropped token (default: {shown})",
    )  # fmt: skip
    parser.add_argument("--kv-predictor", metavar="FILE", help="take it from this pruner file, for any method")


def add_methods_option(parser: argparse.ArgumentParser, default: Sequence[str], what: str) -> None:
    """``--methods``, for :func:`find_methods`."""
    parser.add_argument(
        "--methods", nargs="+", default=list(default), metavar="METHOD", help=f"{what} (default: {' '.join(default)})"
    )


Entry = tuple[Method | None, str, "PruningSchedule | None"]


def plan(args: argparse.Namespace, methods: Sequence[Method], num_layers: int, tokens: int) -> list[Entry]:
    """Method, label and schedule of everything that a sample of this length goes through, the dense model first."""
    entries: list[Entry] = [(None, DENSE, None)]
    for method in methods:
        schedules = make_schedules(args, method.layers, num_layers, tokens)
        for own in with_dropped_kv(args, method):
            note = "" if own.dropped_kv == "none" else f" {own.dropped_kv}"
            entries += [(own, label + note, schedule) for label, schedule in schedules.items()]
    return entries


def with_dropped_kv(args: argparse.Namespace, method: Method) -> list[Method]:
    """The method in each form that was asked for, or in the one that its file is meant for.

    Raises
    ------
    ValueError
        If a form needs a KV predictor, and there is none.
    """
    from sdtp_kernels import load_pruners

    if method.press is not None:  # it drops nothing from the computation
        return [method]
    predictor = method.kv_predictor
    if args.kv_predictor is not None:
        predictor = load_pruners(args.kv_predictor).kv_predictor
        if predictor is None:
            raise ValueError(f"--kv-predictor {args.kv_predictor}: this pruner file has none")
    forms = args.dropped_kv or ["none" if predictor is None else "predicted"]
    if predictor is None and "predicted" in forms:
        raise ValueError(
            f"{method.name}: --dropped-kv predicted needs a pruner file with a KV predictor, --kv-predictor"
        )
    return [method._replace(kv_predictor=predictor, dropped_kv=form) for form in forms]


def patch(model: Any, method: Method | None, schedule: PruningSchedule | None, backend: str) -> Any:
    """The model pruning by this method, which is no oracle, as a context manager; or as it is, without a method."""
    from sdtp_kernels import apply_sdtp

    if method is None or schedule is None:
        return contextlib.nullcontext()
    return apply_sdtp(
        model,
        method.pruners,
        schedule,
        backend,
        later_turns=False,  # a question stays whole
        dropped_kv=method.dropped_kv,
        kv_predictor=method.kv_predictor,
    )
