"""What a public reproduction of SDTP on Qwen2-7B claims, beside what can be true.

Every row is of one kind: *claimed* (by the reproduction or the paper, with the place where it stands), *computed* (from
shapes and FLOPs), *model* (the roofline of a GPU) or *measured* (from the rows of this repository).
"""

from __future__ import annotations

import functools
import itertools
import statistics
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import torch

from sdtp_bench import roofline
from sdtp_bench.report import tables
from sdtp_bench.report.results import Source, grouped, quality_source
from sdtp_bench.report.tables import MODEL_LENGTHS, SHOWN_GPUS, Table, number, percent
from sdtp_bench.shapes import GPUS, MODELS, Gpu, random_stage
from sdtp_eval.flops import prefill_flops, scoring_flops, tokens_per_layer
from sdtp_kernels import PruningSchedule, TokenPruner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sdtp_bench.report.results import Results, Row
    from sdtp_bench.shapes import Stage

KEEPS = (0.9, 0.8, 0.7)
CLAIMED, COMPUTED, MODEL, MEASURED = "claimed", "computed", "model", "measured"
SINGLE_GPU, MULTI_GPU = (2.6, 3.0), (8.0, 10.0)  # claimed speed-ups of a prefill

_PUBLISHED = MODELS["qwen2-7b"]
# config.json of Qwen2-7B, under the names that prefill_flops reads.
QWEN2_7B = SimpleNamespace(
    hidden_size=_PUBLISHED.hidden_size, intermediate_size=18944, num_hidden_layers=_PUBLISHED.num_layers,
    num_attention_heads=_PUBLISHED.num_heads, num_key_value_heads=_PUBLISHED.num_kv_heads,
    head_dim=_PUBLISHED.head_dim, vocab_size=152064,
)  # fmt: skip
_BYTES = 2  # of a number in bfloat16
_KV_BYTES = 2 * _PUBLISHED.num_kv_heads * _PUBLISHED.head_dim * _BYTES  # of a token in one layer
_LAYER_WEIGHTS = prefill_flops(SimpleNamespace(**{**vars(QWEN2_7B), "vocab_size": 0}), [1]) // 2
_WEIGHT_BYTES = _BYTES * (
    _PUBLISHED.num_layers * _LAYER_WEIGHTS + 2 * int(QWEN2_7B.vocab_size) * _PUBLISHED.hidden_size
)  # the embedding and the head are two matrices
PRUNER = TokenPruner(QWEN2_7B.hidden_size, _PUBLISHED.pruner_size)


def schedule(keep: float) -> PruningSchedule:
    """The reproduction's: it prunes behind layers 4, 7, ..., 25, which is before layers 5, 8, ..., 26.

    Its protected tail is a tenth of what is left at a stage, too little to change a count; so none is counted here.
    """
    return PruningSchedule(tuple(range(5, QWEN2_7B.num_hidden_layers, 3)), keep, recent=0.0)


def lengths(keep: float, tokens: int) -> list[int]:
    """Tokens of each layer."""
    return tokens_per_layer(schedule(keep), tokens, QWEN2_7B.num_hidden_layers)


def mean_keep(keep: float, tokens: int) -> float:
    """B: mean kept tokens per layer, over the prompt's."""
    return statistics.fmean(lengths(keep, tokens)) / tokens


def ideal(keep: float, tokens: int, *, all_logits: bool = False) -> float:
    """Dense over pruned FLOPs of a prefill of Qwen2-7B, scoring included.

    Parameters
    ----------
    keep : float
    tokens : int
    all_logits : bool, default False
        Whether each model computes the logits of all tokens that its last layer has, as the reproduction's do.
    """
    counts, pruners = lengths(keep, tokens), dict.fromkeys(schedule(keep).layers, PRUNER)
    dense = prefill_flops(QWEN2_7B, [tokens] * len(counts))
    pruned = prefill_flops(QWEN2_7B, counts) + scoring_flops(QWEN2_7B, schedule(keep), tokens, pruners)
    if all_logits:
        row = 2 * QWEN2_7B.hidden_size * QWEN2_7B.vocab_size
        dense, pruned = dense + (tokens - 1) * row, pruned + (counts[-1] - 1) * row
    return dense / pruned


def gpu_seconds(gpu: Gpu, keep: float, tokens: int) -> float:
    """The least time of a prefill by the roofline: each layer's products or bytes, whichever takes longer; all stages.

    Weights are read once, hidden states are read and written once a layer, keys and values written once.
    """
    plan, counts = schedule(keep), lengths(keep, tokens)
    seconds = 0.0
    for n in counts:
        flops = prefill_flops(QWEN2_7B, [n]) - prefill_flops(QWEN2_7B, [0])
        moved = _BYTES * (_LAYER_WEIGHTS + 2 * n * QWEN2_7B.hidden_size) + n * _KV_BYTES
        seconds += max(flops / gpu.tensor_flops, moved / gpu.hbm_bytes)
    if keep < 1:
        for number_of, layer in enumerate(plan.layers, 1):
            costs = roofline.triton_costs(_stage(counts[layer - 1]), plan.plan(tokens, number_of), gpu)
            seconds += roofline.total(costs, gpu)["bound_us"] * 1e-6
    return seconds


@functools.cache
def _longest_stage() -> Stage:
    sizes = QWEN2_7B.hidden_size, PRUNER.intermediate_size, QWEN2_7B.head_dim
    return random_stage("meta", torch.bfloat16, 1, max(MODEL_LENGTHS), *sizes)


def _stage(tokens: int) -> Stage:
    longest = _longest_stage()
    return longest._replace(
        hidden_states=longest.hidden_states[:, :tokens], tensors=[tensor[:, :tokens] for tensor in longest.tensors]
    )


@functools.cache
def gpu_speedup(gpu: Gpu, keep: float, tokens: int) -> float:
    """What the roofline leaves of the ideal."""
    return gpu_seconds(gpu, 1.0, tokens) / gpu_seconds(gpu, keep, tokens)


# ---------------------------------------------------------------------------------------------------------- the tables

_REPRODUCED = "Qwen2-7B, the reproduction's stages"
_PAPER = "Mistral-7B, 10 stages, keep 0.9"
_README, _REPORT = "the reproduction's README", "the reproduction's report"


class _Line(NamedTuple):
    """A row of these tables."""

    figure: str
    kind: str
    of: str
    source: str
    value: str = ""
    """What holds for no length in particular."""
    values: Mapping[int, str] = {}
    """By length of the prompt."""


def _each_length(value: Callable[[int], str]) -> dict[int, str]:
    return {tokens: value(tokens) for tokens in MODEL_LENGTHS}


def _at(digits: int, *values: float) -> dict[int, str]:
    """The paper's figures, which begin at 4K."""
    return dict(zip(MODEL_LENGTHS[1:], (number(value, digits) for value in values), strict=True))


def _table(name: str, title: str, lines: Sequence[_Line], source: Source, note: str) -> Table:
    lengths = [tokens for tokens in MODEL_LENGTHS if any(tokens in line.values for line in lines)]
    cells = tuple(
        (line.figure, line.kind, line.of, line.value, *(line.values.get(n, "") for n in lengths), line.source)
        for line in lines
    )
    columns = ("figure", "kind", "of what", "value", *(f"{n // 1024}K" for n in lengths), "where it stands")
    source = source._replace(commands=("sdtp bench report", *source.commands)) if source.files else tables.MODEL_SOURCE
    return Table(f"claims-{name}", title, columns, cells, source, note)


def claims(rows: Results) -> list[Table]:
    """One table a claim; measured rows as far as there are any."""
    return [single_gpu(rows), multi_gpu(rows), memory(rows), pruned_share(rows)]


def single_gpu(rows: Results) -> Table:
    """2.6 to 3.0 times on one GPU."""
    figure = "prefill, dense over pruned"
    lines = [
        _Line(figure, CLAIMED, "one GPU", _README, _range(SINGLE_GPU)),
        *(
            _Line(figure, CLAIMED, f"RTX 5880, keep {keep}, mean of 1K to 4K", _REPORT, number(value))
            for keep, value in zip(KEEPS, (1.43, 1.96, 2.48), strict=True)
        ),
        _Line(figure, CLAIMED, "RTX 5880, the best of all", _REPORT, values={32768: "2.83"}),
        _Line(figure, CLAIMED, _PAPER, "the paper, table 2", values=_at(2, 1.52, 1.67, 1.79, 2.15)),
    ]
    for keep in KEEPS:
        values = _each_length(lambda n, keep=keep: number(ideal(keep, n)))  # type: ignore[misc]
        lines.append(_Line("ideal", COMPUTED, f"{_REPRODUCED}, keep {keep}", "sdtp_eval.flops", values=values))
    for keep in KEEPS:
        values = _each_length(lambda n, keep=keep: number(ideal(keep, n, all_logits=True)))  # type: ignore[misc]
        of = f"the same with logits of all positions, keep {keep}"
        lines.append(_Line("ideal", COMPUTED, of, "sdtp_eval.flops", values=values))
    for keep in KEEPS:
        for gpu in (GPUS[name] for name in SHOWN_GPUS):
            values = _each_length(lambda n, keep=keep, gpu=gpu: number(gpu_speedup(gpu, keep, n)))  # type: ignore[misc]
            of = f"{gpu.device_name}, {_REPRODUCED}, keep {keep}"
            lines.append(_Line("roofline", MODEL, of, "sdtp_bench.roofline", values=values))
    prefills = tables.prefills(rows)
    for (machine, checkpoint, dtype, method), members in prefills.items():
        lengths = sorted(row["tokens"] for row in members)
        of = f"{checkpoint}, {dtype}, {method}, {lengths[0]} to {lengths[-1]} tokens; {machine}"
        share = _span([row["share_of_ideal"] for row in members])
        lines.append(_Line("share of the ideal", MEASURED, of, _files(members), share))
    note = (
        "The reproduction's dense model computes logits for every position, its pruned one for those that are left: "
        "the second group of ideals. What lies above its ideal is no effect of pruning. A CPU's attention kernel "
        "computes more than the causal half that the ideal counts, so that a measured share can exceed 100 %."
    )
    title = "Claim: 2.6 to 3.0 times faster prefill on one GPU"
    return _table("single-gpu", title, lines, Source.of(itertools.chain(*prefills.values())), note)


def multi_gpu(rows: Results) -> Table:
    """8 to 10 times on several GPUs."""
    figure = "prefill, dense over pruned"
    dense, pruned = 7.7, 3.20  # seconds: its best dense prefill, on one GPU, and its pruned one on eight
    lines = [
        _Line(figure, CLAIMED, "eight GPUs", _README, _range(MULTI_GPU)),
        _Line(figure, CLAIMED, "eight GPUs", _REPORT, "39.7"),
        _Line("dense prefill, s", CLAIMED, "on eight GPUs", "its results", "126.9"),
        _Line("dense prefill, s", CLAIMED, "on one GPU", "its results", "7.7\N{EN DASH}8.2"),
        _Line("pruned prefill, s", CLAIMED, "on eight GPUs", "its results", "3.20"),
        _Line("pruned prefill, s", CLAIMED, "on one GPU", "its results", "2.90"),
        _Line(figure, COMPUTED, "best dense on one GPU over pruned on eight", "the rows above", number(dense / pruned)),
        _Line(
            "ideal", COMPUTED, f"{_REPRODUCED}, keep {min(KEEPS)}: what pruning adds on any number of GPUs",
            "sdtp_eval.flops", values=_each_length(lambda n: number(ideal(min(KEEPS), n))),
        ),
    ]  # fmt: skip
    measured = [row for row in rows["multi"] if row["processes"] > 1]
    for row in measured:
        of = f"{row['method']}, {row['processes']} processes over the best single one"
        lines.append(_Line("prefill", MEASURED, of, row["file"], number(row["speedup"])))
    note = (
        "Layers spread over GPUs by a device map run one after the other: that gives room and no speed, and is no "
        "baseline for it. Tensor parallelism speeds up the dense model as it does the pruned one."
    )
    return _table("multi-gpu", "Claim: 8 to 10 times faster prefill on several GPUs", lines, Source.of(measured), note)


def memory(rows: Results) -> Table:
    """34 % less memory."""
    longest = max(MODEL_LENGTHS)
    lines = [
        _Line("memory saved", CLAIMED, "Qwen2-7B", _README, "up to 34 %"),
        _Line("memory, GB", CLAIMED, "Qwen2-7B, dense", _REPORT, values={32768: "44.1"}),
        _Line("memory, GB", CLAIMED, "Qwen2-7B, pruned", _REPORT, values={32768: "18.4"}),
        _Line("memory saved, %", CLAIMED, _PAPER, "the paper, table 2", values=_at(1, 3.3, 13.1, 20.7, 34.3)),
        _Line("logits of all positions, GB", COMPUTED, "Qwen2-7B, float32", "shapes", values=_each_length(
            lambda n: number(n * QWEN2_7B.vocab_size * 4 / 1e9, 1)
        )),
        _Line("KV cache, GB", COMPUTED, "Qwen2-7B, bfloat16, dense", "shapes", values=_each_length(
            lambda n: number(_cache_bytes(n) / 1e9, 1)
        )),
    ]  # fmt: skip
    for keep in KEEPS:
        of, value = f"{_REPRODUCED}, keep {keep}", percent(1 - mean_keep(keep, longest))
        lines.append(_Line("KV cache saved", COMPUTED, of, "sdtp_kernels.schedule", value))
    for keep in KEEPS:
        values = _each_length(lambda n, keep=keep: number(100 * memory_saved(keep, n), 1))  # type: ignore[misc]
        of = f"{_REPRODUCED}, bfloat16, keep {keep}"
        lines.append(_Line("weights and KV cache saved, %", COMPUTED, of, "shapes", values=values))
    prefills = tables.prefills(rows)
    for (_, checkpoint, dtype, _), members in prefills.items():
        for name, what in (("kv_bytes", "KV cache"), ("peak_bytes", "peak above the weights")):
            sized = [row for row in members if row.get(name)]
            for keep, found in reversed(grouped(sized, lambda row: row["keep"]).items()):
                saved = _span([1 - row[name]["pruned"] / row[name]["dense"] for row in found])
                of = f"{checkpoint}, {dtype}, keep {keep:g}"
                lines.append(_Line(f"{what} saved", MEASURED, of, _files(found), saved))
    note = (
        f"Weights of Qwen2-7B in bfloat16: {_WEIGHT_BYTES / 1e9:.1f} GB. The layers before the first stage hold the "
        "whole prompt, so that the peak of their activations is the same, dense and pruned."
    )
    source = Source.of(itertools.chain(*prefills.values()))
    return _table("memory", "Claim: up to 34 % less memory", lines, source, note)


def memory_saved(keep: float, tokens: int) -> float:
    """Share of weights and KV cache together that pruning saves at batch size 1."""
    cache = _cache_bytes(tokens)
    return (1 - mean_keep(keep, tokens)) * cache / (_WEIGHT_BYTES + cache)


def _cache_bytes(tokens: int) -> int:
    return tokens * _KV_BYTES * _PUBLISHED.num_layers


def pruned_share(rows: Results) -> Table:
    """65 % pruned, quality held."""
    tokens = max(MODEL_LENGTHS)
    lines = [
        _Line("tokens pruned, quality held", CLAIMED, "Qwen2-7B", _README, "65 %"),
        _Line("pruned at the end", CLAIMED, _PAPER, "the paper", "65 %"),
        _Line("LongBench", CLAIMED, "Mistral-7B, dense", "the paper, table 1", "42.34"),
        _Line("LongBench", CLAIMED, _PAPER, "the paper, table 1", "39.82"),
    ]
    for keep in KEEPS:
        of = f"{_REPRODUCED}, keep {keep}"
        for figure, left in (
            ("pruned at the end", lengths(keep, tokens)[-1] / tokens),
            ("pruned, mean over layers", mean_keep(keep, tokens)),
        ):
            lines.append(_Line(figure, COMPUTED, of, "sdtp_kernels.schedule", percent(1 - left)))
    names = {"nll": "loss, nats a token", "passkey": "pass keys, of those that dense finds"}
    shown: list[Row] = []
    for (task, protocol, length), judged in rows.learned.items():
        if task in names:
            shown += judged.samples
            for row in judged.learned:
                of = f"{tables.display(row['method'])}, {row['schedule']}, {length} tokens, question {protocol}"
                value = tables.interval(row[row["metric"]])
                lines.append(_Line(names[task], MEASURED, of, _files(judged.samples), value))
    note = (
        "The reproduction's quality figures were taken from an unpruned model that was given shortened prompts; in its "
        "logs 121 of 200 prompts were too short to be pruned at all. Measured here is a 0.1B model, which may lose "
        "more than a large one or less."
    )
    return _table("pruned", "Claim: quality held with 65 % pruned", lines, quality_source(rows, shown), note)


def _files(rows: Sequence[Row]) -> str:
    return ", ".join(Source.of(rows).files)


def _range(limits: tuple[float, float]) -> str:
    return "\N{EN DASH}".join(f"{limit:g}" if limit >= 8 else f"{limit:.1f}" for limit in limits)


def _span(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"
