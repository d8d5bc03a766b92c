"""``sdtp bench prefill`` and ``decode``: whole prompts, dense and pruned, interleaved in one run.

No figure comes from a patched model that is not the dense one bit for bit where it keeps every token, or does not keep
the tokens that the schedule says. All ways to prune a prompt are interleaved with the dense model.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_bench import memory, processes, prompts
from sdtp_bench.breakdown import BUCKETS, where_time_goes
from sdtp_eval import command
from sdtp_eval.paired import GateError, Pair, cache_bytes, cache_of, cached_tokens, in_turns, timed
from sdtp_eval.schedules import KEEP_ALL

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    import torch

    from sdtp_bench.prompts import Setting, Way

DENSE, PRUNED = "dense", "pruned"
FEW = 4  # tokens that must be the dense model's where all of the prompt is kept


def add_parsers(commands: Any) -> None:
    """Add ``prefill`` and ``decode`` to the parsers of ``sdtp bench``."""
    prefill = commands.add_parser("prefill", help="time of a prefill, dense and pruned, and where it goes")
    _add_options(prefill, tokens=[1024, 2048, 4096], repeats=3)
    prefill.add_argument(
        "--times-only",
        action="store_true",
        help="no profile and no peak memory, which take prefills of their own",
    )
    prefill.set_defaults(run=lambda args: run(args, prefill_rows))
    decode = commands.add_parser("decode", help="time of a prefill and the tokens that follow, dense and pruned")
    _add_options(decode, tokens=[2048], repeats=2)
    decode.add_argument("--new-tokens", type=int, default=128, help="tokens after the prompt (%(default)s)")
    decode.set_defaults(run=lambda args: run(args, decode_rows))


def _add_options(parser: argparse.ArgumentParser, tokens: list[int], repeats: int) -> None:
    prompts.add_options(parser)
    lengths = " ".join(map(str, tokens))
    parser.add_argument("--tokens", nargs="+", type=int, default=tokens, help=f"prompt lengths (default: {lengths})")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed rounds (%(default)s)")


# ------------------------------------------------------------------------------------------------------------ running


def run(args: argparse.Namespace, rows_of: Callable[[argparse.Namespace, Setting], list[dict[str, Any]]]) -> int:
    """Measure every dtype and length, and print and write the rows of each as they come."""
    from sdtp_bench.rows import append_rows

    with command.user_errors(processes.TrialError):
        for name in ("repeats", "new_tokens"):
            if getattr(args, name, 1) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
        prompts.complete(args)
        for setting in prompts.settings_of(args):
            rows = rows_of(args, setting)
            print_rows(rows)
            if args.out:
                append_rows(args.out, rows, args.device)
    return 0


# ------------------------------------------------------------------------------------------------------------ prefill


def prefill_rows(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Prefill a prompt dense and in every way, and say where the time went. The prefills that are timed are checked.

    Returns
    -------
    list of dict
        A row for each way: settings, ``dense_s`` and ``pruned_s`` (medians), ``dense_s_all`` and ``pruned_s_all``,
        ``speedup``, ``ideal`` (dense over pruned FLOPs), ``share_of_ideal``, ``mean_keep``, ``tokens_per_layer``,
        ``kv_bytes``, ``stage_share`` and, unless left out, ``where`` (seconds by bucket of one prefill under the
        profiler) and ``peak_bytes`` above the weights. ``stage_share`` is the mean time of a stage over the mean time
        of a decoder layer of the same pruned prefill; its median over the repetitions.

    Raises
    ------
    GateError
        If a check fails; no figures then.
    TrialError
        If a process that measures memory fails.
    """
    import torch

    device = setting.dense.input_ids.device
    seconds: dict[Way | None, list[float]] = defaultdict(list)
    stage_shares: dict[Way, list[float]] = defaultdict(list)
    kv_bytes: dict[Way | None, int] = {}
    where: dict[Way | None, dict[str, float]] = {}
    with torch.inference_mode():
        whole = whole_prompts(setting)
        gc.collect()  # a collection costs more than many a prefill: not while the clock runs
        for way in in_turns([None, *setting.pairs], args.repeats):
            with setting.pruning(way) as (pair, handle):
                output, spent = timed(pair.prefill, device)
                if way is None or handle is None:
                    for logits in whole:
                        pair.check_equal(logits, output.logits, KEEP_ALL)
                else:
                    pair.check_output(handle.report(), output)
                    stage_shares[way].append(stage_share(handle.report()))
            seconds[way].append(spent)
            kv_bytes[way] = cache_bytes(cache_of(output))
            del output
        for way in (None, *setting.pairs) if not args.times_only else ():
            with setting.pruning(way) as (pair, _):
                where[way] = where_time_goes(pair.prefill, pair.model)
    peak = memory.peaks(args, setting) if not args.times_only and memory.can_measure(args.device) else {}
    rows = []
    for way in setting.pairs:
        row = common(args, "prefill", setting, way, seconds[None], seconds[way])
        row["kv_bytes"] = {DENSE: kv_bytes[None], PRUNED: kv_bytes[way]}
        row["stage_share"] = statistics.median(stage_shares[way])
        for name, found in (("where", where), ("peak_bytes", peak)):
            if found:
                row[name] = {DENSE: found[None], PRUNED: found[way]}
        rows.append(row)
    return rows


def whole_prompts(setting: Setting) -> list[torch.Tensor]:
    """Logits of the patched model where it keeps every token, by budget; they have to be those of the dense one."""
    found = []
    for pair in {(way.budget, way.dropped_kv): pair for way, pair in setting.pairs.items()}.values():
        with pair.patched(keep_ratio=KEEP_ALL):
            found.append(pair.prefill().logits)
    return found


def gate(setting: Setting) -> dict[Way | None, int]:
    """Check every way against the dense model; this warms both up as well.

    Returns
    -------
    dict
        Bytes of the cache of each way, and of the dense model's under ``None``.

    Raises
    ------
    GateError
        If a check fails.
    """
    output = setting.dense.prefill()
    kv_bytes: dict[Way | None, int] = {None: cache_bytes(cache_of(output))}
    for pair in {(way.budget, way.dropped_kv): pair for way, pair in setting.pairs.items()}.values():
        pair.check_keeping_all(output.logits, KEEP_ALL)
    for way, pair in setting.pairs.items():
        kv_bytes[way] = cache_bytes(cache_of(pair.check_kept()[1]))
    return kv_bytes


def common(
    args: argparse.Namespace, bench: str, setting: Setting, way: Way, dense_s: list[float], pruned_s: list[float]
) -> dict[str, Any]:
    """What rows of both commands say: what was measured, the time of the prefill, and its ideal."""
    pair = setting.pairs[way]
    lengths, flops = pair.tokens_per_layer, pair.flops()
    medians = statistics.median(dense_s), statistics.median(pruned_s)
    speedup, ideal = medians[0] / medians[1], flops[DENSE] / flops[PRUNED]
    return {
        "bench": bench,
        "checkpoint": Path(args.model).name,
        "tokens": pair.tokens,
        "keep": way.keep,
        "budget": way.budget,
        "dropped_kv": way.dropped_kv,
        "block_size": pair.schedule.block_size if way.budget == "block" else None,
        "dtype": setting.dtype,
        "method": setting.method,
        "dense_s": medians[0],
        "pruned_s": medians[1],
        "dense_s_all": dense_s,
        "pruned_s_all": pruned_s,
        "speedup": speedup,
        "ideal": ideal,
        "share_of_ideal": speedup / ideal,
        "mean_keep": sum(lengths) / (len(lengths) * pair.tokens),
        "tokens_per_layer": lengths,
    }


def stage_share(report: Any) -> float:
    """Mean time of a stage over mean time of a decoder layer, both of this prefill; 0 where no stage ran."""
    stages = [layer.prune_seconds for layer in report.layers if layer.prune_seconds is not None]
    if not stages:
        return 0.0
    layers = (report.seconds - sum(stages)) / len(report.layers)
    return float(statistics.fmean(stages) / layers)


# ------------------------------------------------------------------------------------------------------------- decode


def decode_rows(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Prefill a prompt and generate a fixed number of tokens, dense and in every way.

    Returns
    -------
    list of dict
        As :func:`prefill_rows`, whose times are those until the first new token here, without profile and memory; also
        ``new_tokens``, ``total_s`` and ``decode_s`` (medians, ``dense`` and ``pruned``; the latter is the time after
        the first token) and all of them as ``total_s_all``, ``decode_s_all``.

    Raises
    ------
    GateError
        If a check fails; no figures then.
    """
    import torch

    with torch.inference_mode():
        kv_bytes = gate(setting)
        check_first_tokens(setting)
        first: dict[Any, list[float]] = defaultdict(list)
        total: dict[Any, list[float]] = defaultdict(list)
        gc.collect()
        for way in in_turns([None, *setting.pairs], args.repeats):
            with setting.pruning(way) as (pair, _):
                generated = generate(pair, args.new_tokens)
            expected = [pair.tokens] * len(generated.cached) if way is None else pair.cached_per_layer
            if generated.cached != [n + args.new_tokens - 1 for n in expected]:  # the last token is not cached
                raise GateError(f"no figures: {args.new_tokens} tokens after {expected} left {generated.cached}")
            first[way].append(generated.first_s)
            total[way].append(generated.total_s)
    rows = []
    for way in setting.pairs:
        row = common(args, "decode", setting, way, first[None], first[way])
        row["kv_bytes"] = {DENSE: kv_bytes[None], PRUNED: kv_bytes[way]}
        row["new_tokens"] = args.new_tokens
        both = ((DENSE, None), (PRUNED, way))
        row["total_s_all"] = {kind: total[key] for kind, key in both}
        row["decode_s_all"] = {
            kind: [whole - part for whole, part in zip(total[key], first[key], strict=True)] for kind, key in both
        }
        for name in ("total_s", "decode_s"):
            row[name] = {kind: statistics.median(values) for kind, values in row[f"{name}_all"].items()}
        rows.append(row)
    return rows


class Generated(NamedTuple):
    """What ``generate()`` did."""

    new: list[int]
    cached: list[int]
    """Tokens in the cache of each layer."""
    first_s: float
    """Until the first new token."""
    total_s: float


def generate(pair: Pair, new_tokens: int) -> Generated:
    """Greedy continuation of exactly this many tokens, whatever ends a text, by the model as it is at the moment."""
    import torch
    from transformers import DynamicCache, GenerationConfig

    from sdtp_kernels.models.compat import CACHE

    ids, device = pair.input_ids, pair.input_ids.device
    settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    cache = DynamicCache(config=pair.model.config)
    first = _FirstToken()

    def work() -> Any:
        return pair.model.generate(
            ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, generation_config=settings, streamer=first
        )

    first.start()
    output, total_s = timed(work, device)
    return Generated(output[0, ids.shape[1] :].tolist(), cached_tokens(cache), first.seconds, total_s)


class _FirstToken:
    """A streamer of transformers that looks at the clock once: when the first token after the prompt comes."""

    def __init__(self) -> None:
        self.calls, self.begin, self.seconds = 0, 0.0, 0.0

    def start(self) -> None:
        self.begin = time.perf_counter()

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call shows the prompt; a token comes to the host, so the device has finished
            self.seconds = time.perf_counter() - self.begin

    def end(self) -> None: ...


def check_first_tokens(setting: Setting) -> None:
    """Refuse a patched model that keeps the whole prompt and yet generates other tokens than the dense one.

    Raises
    ------
    GateError
    """
    dense = generate(setting.dense, FEW).new
    for pair in {(way.budget, way.dropped_kv): pair for way, pair in setting.pairs.items()}.values():
        with pair.patched(keep_ratio=KEEP_ALL):
            new = generate(pair, FEW).new
        if new != dense:
            raise GateError(f"no figures: with the whole prompt kept the patched model answers {new}, not {dense}")


# --------------------------------------------------------------------------------------------------------- reporting


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Tables of one prompt's rows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        shown = Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for column in shown.columns[1:]:
            column.justify = "right"
        for line in lines:
            shown.add_row(*line)
        Console(highlight=False).print(shown)

    first = rows[0]
    notes = {"none": "", "predicted": ", predicted"}
    ways = [f"{row['keep']:g}, {row['budget']}{notes[row['dropped_kv']]}" for row in rows]
    lines = [
        [
            way,
            *(f"{row[name]:.3f}" for name in ("mean_keep", "dense_s", "pruned_s")),
            *(f"{row[name]:.2f}" for name in ("speedup", "ideal")),
            f"{row['share_of_ideal']:.0%}",
            f"{row['kv_bytes'][PRUNED] / row['kv_bytes'][DENSE]:.0%}",
        ]
        for way, row in zip(ways, rows, strict=True)
    ]
    columns = ["keep", "B", "dense, s", "pruned, s", "speed-up", "ideal", "share", "KV"]
    table(f"prefill of {first['tokens']} tokens, {first['dtype']}, {first['method']}", columns, lines)
    if first["bench"] == "decode":
        columns = ["keep", "total dense, s", "pruned, s", "speed-up", "after the first token, dense, s", "pruned, s"]
        lines = [
            [
                way,
                *(f"{row['total_s'][kind]:.2f}" for kind in (DENSE, PRUNED)),
                f"{row['total_s'][DENSE] / row['total_s'][PRUNED]:.2f}",
                *(f"{row['decode_s'][kind]:.2f}" for kind in (DENSE, PRUNED)),
            ]
            for way, row in zip(ways, rows, strict=True)
        ]
        table(f"and {first['new_tokens']} new tokens", columns, lines)
        return
    if "where" not in first:
        return
    lines = []
    for way, kind, row in ((DENSE, DENSE, first), *((way, PRUNED, row) for way, row in zip(ways, rows, strict=True))):
        where, peak = row["where"][kind], row.get("peak_bytes")
        stage = f"{row['stage_share']:.1%}" if kind == PRUNED else ""
        memory = f"{peak[kind] / 2**20:.0f}" if peak else "-"
        lines.append([way, *(f"{where[name]:.3f}" for name in BUCKETS), stage, memory])
    table("seconds under the profiler, a stage over a layer, peak memory", ["keep", *BUCKETS, "stage", "MiB"], lines)
