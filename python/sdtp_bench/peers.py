"""``sdtp bench peers``: what one would use instead, on the same prompt, checkpoint and budget, in one run.

The budget is B, the mean share of tokens that a layer keeps: that of our schedule at the keep ratio asked for. Whoever
keeps another share, or fails a check, gets no figure but the reason. So does a peer that cannot run here.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_bench import llama_cpp, processes
from sdtp_eval import command
from sdtp_eval.methods import Method, find_method, find_methods
from sdtp_eval.paired import GateError, Pair, cache_bytes, cache_of, cached_tokens, in_turns, timed
from sdtp_eval.schedules import KEEP_ALL, schedule_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from sdtp_eval.tasks import Sample
    from sdtp_kernels import PruningSchedule

DENSE = "dense"
ATTENTION = "attention"
PRESSES = ("SnapKV", "ExpectedAttention", "Knorm", "StreamingLLM", "PyramidKV", "KeyDiff", "KVzap")
TASKS = ("nll", "passkey")


def add_parser(commands: Any) -> None:
    """Add ``peers`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("peers", help="kvpress, llama.cpp and others on the same prompt at the same budget")
    command.add_model_option(parser)
    parser.add_argument(
        "--method", metavar="METHOD",
        help="ours: a pruner file or a scorer (default: the pruners that the default model comes with, else attention)",
    )  # fmt: skip
    parser.add_argument("--gguf", metavar="FILE", help="this checkpoint for llama.cpp (default: that of SmolLM2)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048], help="prompt lengths (default: 2048)")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.8], help="share that each stage keeps (0.8)")
    parser.add_argument("--presses", nargs="*", default=list(PRESSES), metavar="NAME", help="of kvpress")
    parser.add_argument("--samples", type=int, default=8, help="texts and pass keys for the quality (%(default)s)")
    command.add_dtype_option(parser, "bfloat16")
    command.add_device_option(parser)
    command.add_backend_option(parser)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (%(default)s)")
    parser.add_argument("--out", metavar="DIR", help="append the rows to a file of their own there, as JSON lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``sdtp bench peers``."""
    from sdtp_bench.rows import append_rows

    with command.user_errors():
        for rows in measure(args):
            print_rows(rows)
            if args.out:
                append_rows(args.out, rows, args.device)
    return 0


class Figures(NamedTuple):
    """What a peer shows next to its time."""

    kv_bytes: int | None
    """Of the prompt's cache; ``None`` where it does not tell."""
    mean_keep: float
    """B, from what the cache holds."""


class Peer(NamedTuple):
    """One contestant, for one prompt length and budget."""

    name: str
    version: str | None
    check: Callable[[], Figures]
    """Runs once, not timed; raises where the result is not what it must be."""
    first_token: Callable[[], Any]
    """What is timed: from the prompt to the first new token."""
    score: Callable[[Sample, str], dict[str, float]]
    """By a protocol of :data:`sdtp_eval.tasks.PROTOCOLS`: ``nll_increase`` of a text, ``exact`` of a pass key; empty
    for what the peer cannot tell."""


class Contest(NamedTuple):
    """One prompt length and keep ratio: what all peers have in common."""

    args: argparse.Namespace
    model: Any
    tokenizer: Any
    input_ids: torch.Tensor
    """``[1, N]``: the prompt that is timed."""
    method: Method
    """Ours."""
    schedule: PruningSchedule
    samples: list[Sample]
    readers: dict[str, Any]
    """The dense passes over the samples, by :attr:`Sample.id`; made when they are first wanted."""

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @property
    def budget(self) -> float:
        """B."""
        return self.schedule.mean_keep(self.tokens, self.num_layers)

    def reader(self, sample: Sample) -> Any:
        """A sample in front of the dense model."""
        from sdtp_eval.reader import Reader

        if sample.id not in self.readers:
            self.readers[sample.id] = Reader(self.model, sample, self.args.backend)
        return self.readers[sample.id]


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """A row a peer, for every length and keep ratio.

    Yields
    ------
    list of dict
        ``peer``, ``version``, ``checkpoint``, ``tokens``, ``keep``, ``mean_keep`` (B of the peer's cache), ``dtype``,
        ``ttft_s`` (median), ``ttft_s_all``, ``kv_bytes``, ``nll_increase`` (nats a token, mean), ``passkey`` (share
        found, the question part of the prompt), ``passkey_after`` (the question after the pruned context), their
        bootstrap intervals, such as ``passkey_interval``, and ``samples``; or ``error`` instead of figures.

    Raises
    ------
    ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError
        For options, files, models and machines that cannot work.
    """
    import torch

    from sdtp_eval import tasks
    from sdtp_eval.checkpoints import DEFAULT_PRUNERS, default_gguf, load_checkpoint
    from sdtp_kernels import PruningSchedule

    for name in ("repeats", "samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.method is None:
        args.method = ATTENTION if args.model else DEFAULT_PRUNERS
    if args.gguf is None and args.model is None:
        args.gguf = default_gguf()
    processes.complete(args)
    model, tokenizer = load_checkpoint(args.model, getattr(torch, args.dtype))
    model = model.to(args.device)
    (method,) = find_methods([args.method], ("pruners",))
    layers = method.layers or PruningSchedule.every(model.config.num_hidden_layers).layers
    pool = tasks.TextPool(tokenizer, [], "held-out")
    for tokens in args.tokens:
        samples = [s for task in TASKS for s in tasks.make_samples(task, pool, tokens, args.samples)]
        input_ids = torch.tensor([samples[0].context], device=args.device)
        readers: dict[str, Any] = {}
        for keep in args.keep:
            contest = Contest(
                args, model, tokenizer, input_ids, method, PruningSchedule(layers, keep), samples, readers
            )
            with torch.no_grad(), contextlib.ExitStack() as resources:
                yield rows_of(contest, peers_of(contest, resources))


# ----------------------------------------------------------------------------------------------------------- the peers


def peers_of(contest: Contest, resources: contextlib.ExitStack) -> list[Peer | tuple[str, str]]:
    """The peers that can take part, and name and reason of those that cannot."""
    from sdtp_eval.baselines import BASELINES
    from sdtp_eval.peers import PREFIX

    attention = Method(ATTENTION, BASELINES[ATTENTION])
    # GemFilter and FastKV let all tokens through the first layers, and then drop once; a third is their choice too.
    once = contest.num_layers // 3
    makers: dict[str, Callable[[], Peer]] = {
        DENSE: lambda: of_dense(contest),
        contest.method.name: lambda: of_schedule(contest, contest.method.name, contest.method, contest.schedule),
        ATTENTION: lambda: of_schedule(contest, ATTENTION, attention, contest.schedule),
        f"{ATTENTION}, once at layer {once}": lambda: of_single_drop(contest, once, attention),
        **{f"{PREFIX}{name}": functools.partial(of_press, contest, f"{PREFIX}{name}") for name in contest.args.presses},
    }
    found: list[Peer | tuple[str, str]] = []
    for name, make in makers.items():
        try:
            found.append(make())
        except (ValueError, NotImplementedError) as error:
            found.append((name, str(error)))
    return found + llama_peers(contest, resources)


def of_dense(contest: Contest) -> Peer:
    """transformers as it is."""
    import transformers

    pair = Pair(contest.model, contest.input_ids, contest.method.pruners, contest.schedule)

    def check() -> Figures:
        return figures(cache_of(pair.prefill()), pair.tokens)

    def score(sample: Sample, protocol: str) -> dict[str, float]:
        found: dict[str, float] = contest.reader(sample).result(protocol)
        return found

    return Peer(DENSE, transformers.__version__, check, lambda: pair.prefill().logits.argmax(-1).item(), score)


def of_schedule(contest: Contest, name: str, method: Method, schedule: PruningSchedule) -> Peer:
    """A scorer in our loop."""
    import sdtp_kernels

    pair = Pair(contest.model, contest.input_ids, method.pruners, schedule, contest.args.backend)

    def check() -> Figures:
        pair.check_keeping_all(pair.prefill().logits, KEEP_ALL)
        return figures(cache_of(pair.check_kept()[1]), pair.tokens)

    def first_token() -> Any:
        with pair.patched():
            return pair.prefill().logits.argmax(-1).item()

    def score(sample: Sample, protocol: str) -> dict[str, float]:
        found: dict[str, float] = contest.reader(sample).result(protocol, method, schedule)
        return found

    return Peer(name, sdtp_kernels.__version__, check, first_token, score)


def of_single_drop(contest: Contest, layer: int, method: Method) -> Peer:
    """All tokens up to one layer, then so few that B is that of the contest: the class of GemFilter and FastKV."""
    from sdtp_kernels import PruningSchedule

    schedule = schedule_for(PruningSchedule((layer,)), contest.budget, contest.num_layers, contest.tokens)
    return of_schedule(contest, f"{method.name}, once at layer {layer}", method, schedule)


def of_press(contest: Contest, word: str) -> Peer:
    """A press of kvpress: a dense prefill whose cache is cut layer by layer."""
    from sdtp_eval import peers

    method, ids = find_method(word), contest.input_ids
    prefill = functools.partial(
        peers.compressed_forward, contest.model, method.press, contest.budget, ids, contest.tokens, 1
    )

    def check() -> Figures:
        import torch

        try:
            logits, cache = prefill()
        except OSError:
            raise GateError(
                "its scores come from a network that is trained for each checkpoint; there is none of this one here, "
                "and kvpress as it is installed has no training"
            ) from None
        dense = contest.model(ids, logits_to_keep=1).logits[0]
        if not torch.equal(logits, dense):  # the cut comes after each layer's attention: the first token is dense
            raise GateError("no figures: its first token is not computed as the dense model computes it")
        return figures(cache, contest.tokens)

    def score(sample: Sample, protocol: str) -> dict[str, float]:
        found: dict[str, float] = contest.reader(sample).result(protocol, method, contest.schedule)
        return found

    return Peer(word, peers.version(), check, lambda: prefill()[0].argmax(-1).item(), score)


def llama_peers(contest: Contest, resources: contextlib.ExitStack) -> list[Peer | tuple[str, str]]:
    """llama.cpp with the file as it is, and in 16 bits."""
    args = contest.args
    if args.gguf is None:
        return [("llama.cpp", "no GGUF file of this checkpoint was given (--gguf)")]
    if args.device != "cpu":
        return [("llama.cpp", "the wheel on PyPI is built for CPUs; this run is on a GPU")]
    try:
        wheel = llama_cpp.version()
    except ImportError as error:
        return [("llama.cpp", f"xllamacpp cannot be imported ({error}); 'make peers' installs it")]
    source = Path(args.gguf)
    folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
    found: list[Peer | tuple[str, str]] = []
    for form in (llama_cpp.file_type(source), llama_cpp.WIDE):
        name, file = f"llama.cpp {form}", source
        try:
            if form == llama_cpp.WIDE:
                file = folder / f"{form}.gguf"
                llama_cpp.widen(source, file)
            found.append(of_llama(contest, name, wheel, file))
        except (ImportError, RuntimeError, ValueError, KeyError, NotImplementedError) as error:
            found.append((name, f"{type(error).__name__}: {error}"))
    return found


def of_llama(contest: Contest, name: str, wheel: str, file: Path) -> Peer:
    """llama.cpp with one file; it keeps all tokens. Its server tells no probabilities of a given text."""
    import torch

    engine = llama_cpp.LlamaCpp(file, contest.tokens, torch.get_num_threads())
    prompt = contest.input_ids[0].tolist()
    found: dict[str, str] = {}

    def check() -> Figures:
        engine.generate(prompt, 1)
        return Figures(None, 1.0)

    def score(sample: Sample, protocol: str) -> dict[str, float]:
        if sample.task != "passkey":
            return {}
        if sample.id not in found:  # nothing is pruned: both protocols are the same prompt
            asked = [*sample.context, *sample.question]
            found[sample.id] = engine.generate(asked, len(sample.answer))
        return {"exact": float(found[sample.id] == str(contest.tokenizer.decode(sample.answer)))}

    return Peer(name, wheel, check, lambda: engine.generate(prompt, 1), score)


def figures(cache: Any, tokens: int) -> Figures:
    """Of a cache of transformers after a prompt of this many tokens."""
    kept = cached_tokens(cache)
    return Figures(cache_bytes(cache), sum(kept) / (len(kept) * tokens))


# ------------------------------------------------------------------------------------------------------------ measuring


def rows_of(contest: Contest, peers: Sequence[Peer | tuple[str, str]]) -> list[dict[str, Any]]:
    """Check, time interleaved, score; see :func:`measure`."""
    common = {
        "bench": "peers",
        "checkpoint": Path(contest.args.model).name,
        "tokens": contest.tokens,
        "keep": contest.schedule.keep_ratio,
        "dtype": contest.args.dtype,
    }
    seconds: dict[str, list[float]] = defaultdict(list)

    def check(peer: Peer) -> dict[str, Any]:
        return checked(contest, peer)._asdict()

    def clock(peer: Peer) -> dict[str, Any]:
        seconds[peer.name].append(timed(peer.first_token, contest.input_ids.device)[1])
        return {"ttft_s": statistics.median(seconds[peer.name]), "ttft_s_all": seconds[peer.name]}

    def score(peer: Peer) -> dict[str, Any]:
        return scores(contest, peer)

    running = [peer for peer in peers if isinstance(peer, Peer)]
    rows: dict[str, dict[str, Any]] = {}
    for entry in peers:
        is_running = isinstance(entry, Peer)
        rows[entry[0]] = {**common, "peer": entry[0], "version": entry[1] if is_running else None}
        if not is_running:
            rows[entry[0]]["error"] = entry[1]
    for work, turns in ((check, running), (clock, in_turns(running, contest.args.repeats)), (score, running)):
        gc.collect()  # a collection costs more than many a prefill: not while the clock runs
        for peer in turns:
            row = rows[peer.name]
            if "error" in row:
                continue
            try:
                row |= work(peer)
            # Whatever a peer dies of is its answer, instead of all its figures; the others go on.
            except Exception as error:
                rows[peer.name] = {**common, "peer": peer.name, "version": peer.version, "error": reason(error)}
    return list(rows.values())


def checked(contest: Contest, peer: Peer) -> Figures:
    """What the peer's own check says, if it keeps what the contest allows: B, or all tokens.

    Raises
    ------
    GateError
        If it keeps another share.
    """
    from sdtp_eval.compare import SAME_BUDGET

    found = peer.check()
    keeps_all = peer.name == DENSE or found.kv_bytes is None
    allowed = 1.0 if keeps_all else contest.budget
    if abs(found.mean_keep - allowed) > SAME_BUDGET:
        raise GateError(f"no figures: it keeps B = {found.mean_keep:.3f}, not {allowed:.3f}")
    return found


def scores(contest: Contest, peer: Peer) -> dict[str, Any]:
    """Loss on texts and pass keys found, means with their intervals; ``None`` where the peer cannot tell."""
    from sdtp_eval.compare import bootstrap
    from sdtp_eval.tasks import AFTER, INSIDE

    row: dict[str, Any] = {"samples": contest.args.samples}
    for task, protocol, metric, name in (
        ("nll", INSIDE, "nll_increase", "nll_increase"),
        ("passkey", INSIDE, "exact", "passkey"),
        ("passkey", AFTER, "exact", "passkey_after"),
    ):
        results = [peer.score(sample, protocol) for sample in contest.samples if sample.task == task]
        values = [result[metric] for result in results if metric in result]
        interval = bootstrap(values) if values else None
        row[name] = None if interval is None else interval.mean
        row[f"{name}_interval"] = None if interval is None or len(values) < 2 else [interval.low, interval.high]
    return row


def reason(error: Exception) -> str:
    """The first line of an error, with its kind where that is not ours."""
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return text if isinstance(error, GateError) else f"{type(error).__name__}: {text}"


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """A table of one contest."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{rows[0]['tokens']} tokens, {rows[0]['dtype']}", title_justify="left")
    for column in ("peer", "B", "first token, s", "KV, MiB", "loss", "pass key", "after"):
        table.add_column(column, justify="left" if column == "peer" else "right", no_wrap=column == "peer")
    for row in rows:
        if "error" in row:
            table.add_row(row["peer"], *"-" * (2 + len(COLUMNS)))
            continue
        cells = [
            f"{row['mean_keep']:.3f}",
            f"{row['ttft_s']:.3f}",
            *("-" if row[name] is None else show.format(row[name] / unit) for name, unit, show in COLUMNS),
        ]
        table.add_row(row["peer"], *cells)
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['peer']}: {row['error']}", style="dim", markup=False)


COLUMNS = (("kv_bytes", 2**20, "{:.1f}"), ("nll_increase", 1, "{:+.3f}"), ("passkey", 1, "{:.2f}"),
           ("passkey_after", 1, "{:.2f}"))  # fmt: skip
