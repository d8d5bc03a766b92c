"""Ways to score tokens, by the words of a command line: pruner files, scorers, oracles, presses of kvpress."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sdtp_eval.compare import DENSE
from sdtp_eval.paired import GateError
from sdtp_eval.schedules import dropping_once, make_schedules

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from sdtp_eval.baselines import Oracle
    from sdtp_eval.rivals import Cutter
    from sdtp_kernels import PruningSchedule

DROPPED_KV = ("none", "predicted")
# Fields of a Method, one of which says how it works, and what using it asks for.
KINDS = {
    "pruners": "the stages have to run its scorers",
    "cut": "the prompt has to be cut before the model reads it",
    "press": "the cache has to be compressed by kvpress",
    "oracle": "an oracle has to know the answer's tokens",
}
WITHOUT_STAGES = ("press", "cut")  # nothing is dropped between two layers: of a schedule only B matters
FROM_PROMPTS = ("pruners", "cut")  # what can be done with a prompt whose answer nobody knows


class Method(NamedTuple):
    """A way to do without tokens: one of `pruners`, `oracle`, `press` and `cut`."""

    name: str
    pruners: Any = None
    """What :func:`sdtp_kernels.apply_sdtp` takes; ``None`` where the sample decides."""
    oracle: Oracle | None = None
    layers: tuple[int, ...] | None = None
    """Those that a pruner file has pruners for."""
    press: Any = None
    """A class of kvpress, which compresses the cache of a dense prefill."""
    cut: Cutter | None = None
    """Shortens the prompt, which a dense model then reads."""
    kv_predictor: Any = None
    """The file's, or another's; whether it is used is what `dropped_kv` says."""
    dropped_kv: Literal["none", "predicted"] = "none"

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        return next(name for name in KINDS if getattr(self, name) is not None)


def find_method(word: str) -> Method:
    """A method by the name of a scorer, a cutter, an oracle or a press of kvpress, or by the path of a pruner file.

    The name of a file's method ends in a hash of its content: results of a file that is trained again do not mix.

    Raises
    ------
    ValueError
        If there is neither such a name nor such a file, or the file is broken.
    """
    from sdtp_eval import peers
    from sdtp_eval.baselines import BASELINES, ORACLES
    from sdtp_eval.checkpoints import bundled_pruners
    from sdtp_eval.rivals import CUTTERS
    from sdtp_kernels import load_pruners

    if word.startswith(peers.PREFIX):
        return Method(word, press=peers.find_press(word))
    if word in BASELINES:
        return Method(word, BASELINES[word])
    if word in ORACLES:
        return Method(word, oracle=ORACLES[word])
    if word in CUTTERS:
        return Method(word, cut=CUTTERS[word])
    path = bundled_pruners().get(word, Path(word))
    if not path.is_file():
        known = ", ".join([*BASELINES, *CUTTERS, *ORACLES, *bundled_pruners(), f"{peers.PREFIX}SnapKV"])
        raise ValueError(f"no method {word!r}: neither a pruner file nor one of {known}")
    stack = load_pruners(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:6]
    return Method(f"{path.stem}@{digest}", stack, layers=tuple(sorted(stack)), kv_predictor=stack.kv_predictor)


def find_methods(words: Sequence[str], kinds: Sequence[str] = tuple(KINDS)) -> list[Method]:
    """The methods by these names without dense, which always runs.

    Parameters
    ----------
    words : sequence of str
        See :func:`find_method`.
    kinds : sequence of str, default all of :data:`KINDS`
        Those that the caller can use.

    Raises
    ------
    ValueError
        As :func:`find_method`; also for a method of another kind.
    """
    methods = [find_method(word) for word in words if word != DENSE]
    for method in methods:
        if method.kind not in kinds:
            raise ValueError(f"{method.name}: {KINDS[method.kind]}; this command cannot, 'sdtp eval run' can")
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
    """Method, label and schedule of everything that a sample of this length goes through, the dense model first.

    Raises
    ------
    ValueError
        If an option is no schedule, a budget cannot be reached, or a method cannot prune as it is asked to.
    """
    entries: list[Entry] = [(None, DENSE, None)]
    for method in methods:
        schedules = make_schedules(args, method.layers, num_layers, tokens)
        if method.kind not in WITHOUT_STAGES:
            for layer in args.once:
                if method.layers is not None and layer not in method.layers:
                    raise ValueError(f"--once {layer}: {method.name} has pruners for the layers {method.layers} alone")
            schedules |= dropping_once(schedules, args.once, num_layers, tokens)
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

    if method.kind in WITHOUT_STAGES:
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


@contextlib.contextmanager
def patch(model: Any, method: Method | None, schedule: PruningSchedule | None, backend: str) -> Iterator[Any]:
    """The model pruning by this method, which is no oracle, with its handle; as it is for a cutter and for none."""
    from sdtp_kernels import apply_sdtp

    if method is None or schedule is None or method.cut is not None:
        yield None
        return
    with apply_sdtp(
        model,
        method.pruners,
        schedule,
        backend,
        later_turns=False,  # a question stays whole
        dropped_kv=method.dropped_kv,
        kv_predictor=method.kv_predictor,
    ) as handle:
        yield handle


def name_of(method: Method | None) -> str:
    """As results name it; without a method it is the dense model."""
    return DENSE if method is None else method.name


def mean_keep(method: Method | None, schedule: PruningSchedule | None, length: int, num_layers: int) -> float:
    """B of a prompt of `length` tokens: mean kept tokens per layer, over `length`."""
    if method is None or schedule is None:
        return 1.0
    kept = schedule.mean_keep(length, num_layers)
    return kept if method.cut is None else round(kept * length) / length


def check_budget(
    kept: float, method: Method | None, schedule: PruningSchedule | None, length: int, num_layers: int
) -> None:
    """Refuse a figure of a method that had another budget than its schedule, or of a prompt that was not read whole.

    Parameters
    ----------
    kept : float
        B as it was measured: tokens that a layer computed of the prompt, in the mean, over `length`.
    method, schedule, length, num_layers
        As for :func:`mean_keep`.

    Raises
    ------
    GateError
        If `kept` is not what :func:`mean_keep` says.
    """
    expected = mean_keep(method, schedule, length, num_layers)
    if abs(kept - expected) > 1e-9:
        raise GateError(
            f"no figures: {name_of(method)} computed B={kept:.4f} of a prompt of {length} tokens; its schedule says "
            f"{expected:.4f}. The prompt was cut, or this is a bug of sdtp-kernels"
        )


def shorten(method: Method | None, schedule: PruningSchedule | None, ids: list[int], num_layers: int) -> list[int]:
    """What the model is given of a prompt: all of it, or what a cutter leaves at the schedule's B.

    Parameters
    ----------
    method : Method or None
    schedule : PruningSchedule or None
    ids : list of int
        The prompt, N tokens.
    num_layers : int
        Of the model.

    Returns
    -------
    list of int
        Without a cutter `ids`; with one, `B N` tokens in their order.
    """
    import torch

    if method is None or schedule is None or method.cut is None:
        return ids
    num_keep = round(mean_keep(method, schedule, len(ids), num_layers) * len(ids))
    return [ids[i] for i in method.cut(torch.tensor(ids), num_keep, schedule).tolist()]
