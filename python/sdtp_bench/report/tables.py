"""Tables of the report, each from rows alone: numbers become text here and nowhere else."""

from __future__ import annotations

import functools
import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_bench import roofline
from sdtp_bench.report import results
from sdtp_bench.report.results import Source
from sdtp_bench.shapes import GPUS, Case, lookup
from sdtp_eval import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sdtp_bench.report.results import Results, Row

NONE = "\N{EN DASH}"  # a cell without a figure
MINUS = "\N{MINUS SIGN}"
SPACE = "\N{NO-BREAK SPACE}"  # between a figure and its unit
OURS = ("cpu", "triton", "cuda", "reference")  # providers that are backends of the op; all others are baselines
SHOWN_GPUS = ("h100", "a100", "4090", "mi300x")
PARTS = ("linear", "attention", "pruning", "other")
README_MODES = (("0.9", True), ("0.8", False), ("0.8", True))
"""Keep ratios, and whether keys and values of dropped tokens are predicted."""


class Table(NamedTuple):
    """Text in rows and columns, and where it came from."""

    name: str
    """Its marker in Markdown and its anchor on the page."""
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    source: Source
    note: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """For each column, whether it holds figures, which are right-aligned."""
        columns = zip(*self.rows, strict=True)
        return tuple(all(cell[:1] in f"+-0123456789{NONE}{MINUS}" for cell in column) for column in columns)


# ------------------------------------------------------------------------------------------------------- the numbers


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:,.{digits}f}".replace("-", MINUS)


def seconds(value: float | None) -> str:
    """Three significant digits, in the unit that fits."""
    if not value:
        return NONE if value is None else "0"
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e3)) if value * s >= 1), ("\N{MICRO SIGN}s", 1e6))
    scaled = value * scale
    return f"{scaled:,.{max(0, 2 - math.floor(math.log10(max(scaled, 0.01))))}f}{SPACE}{unit}"


def percent(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{number(100 * value, digits)}{SPACE}%"


def mebibytes(value: float | None) -> str:
    return NONE if value is None else f"{number(value / 2**20, 1)}{SPACE}MiB"


def interval(value: Mapping[str, float] | float | None, digits: int = 3) -> str:
    """A mean with its interval, where it has one."""
    if value is None or isinstance(value, (int, float)):
        return number(value, digits)
    limits = [number(value[name], digits) for name in ("low", "high") if not math.isnan(value[name])]
    return number(value["mean"], digits) + (f" [{f',{SPACE}'.join(limits)}]" if limits else "")


def budget(row: Row) -> str:
    return f"blocks of {row['block_size']}" if row["budget"] == "block" else str(row["budget"])


def by_length(rows: Iterable[Row]) -> list[Row]:
    """By length and budget, the largest keep ratio first."""
    return sorted(rows, key=lambda row: (row["tokens"], budget(row) != "global", budget(row), -row["keep"]))


# ------------------------------------------------------------------------------------------------ whole models: speed


def subject_of(row: Row) -> tuple[str, ...]:
    """What rows of one table have in common: machine, checkpoint, dtype, method, and what is kept of dropped tokens."""
    kept = () if row.get("dropped_kv", "none") == "none" else (f"{row['dropped_kv']} keys and values",)
    return results.machine(row), row["checkpoint"], row["dtype"], row["method"], *kept


def _title(about: tuple[str, ...]) -> str:
    return ", ".join(about[1:])  # the machine stands under the table


def prefills(rows: Results) -> dict[tuple[str, ...], list[Row]]:
    """Rows of ``sdtp bench prefill`` by machine, checkpoint, dtype and method."""
    measured = [row for row in rows["prefill"] if "error" not in row]
    return results.grouped(measured, subject_of)


def prefill(rows: Results) -> list[Table]:
    """Dense against pruned, every length, keep ratio and budget."""
    groups = prefills(rows).items()
    return [_prefill_table(f"prefill-{i}", about, members) for i, (about, members) in enumerate(groups, 1)]


def _prefill_table(name: str, about: tuple[str, ...], rows: Sequence[Row]) -> Table:
    optional: dict[str, Callable[[Row], str]] = {}
    if len({budget(row) for row in rows}) > 1:
        optional["budget"] = budget
    if any("stage_share" in row for row in rows):
        optional["a stage, of a layer"] = lambda row: percent(row.get("stage_share"), 1)
    cells = [
        (
            str(row["tokens"]), f"{row['keep']:g}", str(len(row["dense_s_all"])), number(row["dense_s"]),
            number(row["pruned_s"]), number(row["speedup"]), number(row["ideal"]), percent(row["share_of_ideal"]),
            percent(row["kv_bytes"]["pruned"] / row["kv_bytes"]["dense"]), *(cell(row) for cell in optional.values()),
        )
        for row in by_length(rows)
    ]  # fmt: skip
    columns = (
        "tokens", "keep per stage", "runs", "dense, s", "pruned, s", "speed-up", "ideal", "share of the ideal",
        "KV cache", *optional,
    )  # fmt: skip
    return Table(name, f"Prefill: {_title(about)}", columns, tuple(cells), Source.of(rows))


def decode(rows: Results) -> list[Table]:
    """Prefill and new tokens together, and decoding alone, which is all tokens but the first."""
    tables: list[Table] = []
    for i, (about, members) in enumerate(results.grouped(_measured(rows["decode"]), subject_of).items(), 1):
        cells = tuple(
            (
                str(row["tokens"]), f"{row['keep']:g}", budget(row), str(row["new_tokens"]),
                number(row["total_s"]["dense"]), number(row["total_s"]["pruned"]),
                number(row["total_s"]["dense"] / row["total_s"]["pruned"]),
                *(number(1e3 * row["decode_s"][kind] / (row["new_tokens"] - 1), 1) for kind in ("dense", "pruned")),
            )
            for row in by_length(members)
        )  # fmt: skip
        columns = (
            "tokens", "keep per stage", "budget", "new tokens", "dense, s", "pruned, s", "speed-up",
            "dense, ms a new token", "pruned, ms a new token",
        )  # fmt: skip
        title = f"Prefill and new tokens: {_title(about)}"
        tables.append(Table(f"decode-{i}", title, columns, cells, Source.of(members)))
    return tables


def profiled(rows: Results) -> list[Row]:
    """Rows that say where the time went."""
    return by_length(row for row in _measured(rows["prefill"]) if row.get("where"))


def in_proportion(row: Row) -> dict[str, float]:
    """Seconds that each part of the pruned prefill would take if it cost what its tokens cost in the dense one.

    Attention goes with the mean square of the tokens of a layer, everything else with their mean; pruning itself would
    be free.
    """
    lengths, tokens = row["tokens_per_layer"], row["tokens"]
    mean = statistics.fmean(n / tokens for n in lengths)
    square = statistics.fmean((n / tokens) ** 2 for n in lengths)
    scale = {"linear": mean, "attention": square, "other": mean}
    return {part: row["where"]["dense"].get(part, 0.0) * scale.get(part, 0.0) for part in PARTS}


def where(rows: Results) -> list[Table]:
    """What a pruned prefill spends, and how much of it is more than in proportion to the tokens that it computes."""
    tables: list[Table] = []
    for i, (about, members) in enumerate(results.grouped(profiled(rows), subject_of).items(), 1):
        cells = []
        for row in members:
            spent, ideal = row["where"]["pruned"], in_proportion(row)
            whole = sum(spent.values())
            cells.append((
                str(row["tokens"]), f"{row['keep']:g}", budget(row),
                *(percent(spent.get(part, 0.0) / whole) for part in PARTS),
                *(percent((spent.get(part, 0.0) - ideal[part]) / whole, 1) for part in PARTS),
            ))  # fmt: skip
        columns = ("tokens", "keep per stage", "budget", *PARTS, *(f"{part}, beyond" for part in PARTS))
        note = (
            "In % of the pruned prefill. Beyond: what a part takes more than in proportion, which is its dense time, "
            "times the mean kept share of a layer; for attention, times its mean square; for pruning, nothing. It "
            "keeps the speed-up below the ideal; what is below zero lifts it."
        )
        title = f"Where the time goes: {_title(about)}"
        tables.append(Table(f"where-{i}", title, columns, tuple(cells), Source.of(members), note))
    return tables


def memory(rows: Results) -> list[Table]:
    """Bytes of the cache and the peak, and the longest prompt that fits."""
    tables: list[Table] = []
    groups = results.grouped((row for row in _measured(rows["prefill"]) if row.get("peak_bytes")), subject_of)
    for i, (about, members) in enumerate(groups.items(), 1):
        cells = tuple(
            (
                str(row["tokens"]), f"{row['keep']:g}", budget(row),
                *(mebibytes(row["kv_bytes"][kind]) for kind in ("dense", "pruned")),
                *(mebibytes(row["peak_bytes"][kind]) for kind in ("dense", "pruned")),
                percent(row["peak_bytes"]["pruned"] / row["peak_bytes"]["dense"]),
            )
            for row in by_length(members)
        )  # fmt: skip
        columns = (
            "tokens", "keep per stage", "budget", "KV cache dense", "KV cache pruned", "peak dense", "peak pruned",
            "peak, pruned over dense",
        )  # fmt: skip
        note = "Peaks are above the weights. The layers before the first stage see the whole prompt either way."
        tables.append(Table(f"memory-{i}", f"Memory: {_title(about)}", columns, cells, Source.of(members), note))
    return tables + longest(rows)


def longest(rows: Results) -> list[Table]:
    """The longest prompt below a limit, one table a checkpoint, dtype and limit."""
    tables: list[Table] = []
    groups = results.grouped(
        rows["memory"], lambda row: (results.machine(row), row["checkpoint"], row["dtype"], row["limit_bytes"])
    )
    for i, ((_, checkpoint, dtype, limit), members) in enumerate(groups.items(), 1):
        dense = next((row["tokens"] for row in members if row["keep"] is None), None)
        cells = tuple(
            (
                display(row["method"]) + (", predicted" if row.get("dropped_kv") == "predicted" else ""),
                NONE if row["keep"] is None else f"{row['keep']:g}",
                NONE if row["keep"] is None else budget(row), str(row["tokens"]),
                number(row["tokens"] / dense if dense else None), mebibytes(row["peak_bytes"]),
                mebibytes(row["kv_bytes"]),
            )
            for row in sorted(members, key=lambda row: (row["budget"] or "", -(row["keep"] or 0)))
        )  # fmt: skip
        columns = ("method", "keep per stage", "budget", "longest prompt", "of dense", "its peak", "its KV cache")
        steps = ", ".join(sorted({str(row["step"]) for row in members}))
        note = f"Lengths are multiples of {steps} tokens; the next one takes more than the limit."
        title = f"The longest prompt below {mebibytes(limit)} beside the weights: {checkpoint}, {dtype}"
        tables.append(Table(f"longest-{i}", title, columns, cells, Source.of(members), note))
    return tables


def multi(rows: Results) -> list[Table]:
    """Several processes against the best single one."""
    tables: list[Table] = []
    groups = results.grouped(
        rows["multi"],
        lambda row: (row["machine"]["processor"], row["checkpoint"], row["tokens"], row["dtype"], row["keep"]),
    )
    for i, ((_, checkpoint, tokens, dtype, keep), members) in enumerate(groups.items(), 1):
        cells = tuple(
            (
                row["method"], str(row["processes"]), str(row["threads"]), str(len(row["seconds_all"])),
                seconds(row["seconds"]), number(row["speedup"]), percent(row["efficiency"]),
            )
            for row in sorted(members, key=lambda row: (row["method"], row["processes"], row["threads"]))
        )  # fmt: skip
        columns = ("method", "processes", "threads in each", "runs", "prefill", "over the best single", "a process")
        title = f"Several processes, tensor parallel: {checkpoint}, {dtype}, {tokens} tokens, keep {keep:g}"
        tables.append(Table(f"multi-{i}", title, columns, cells, Source.of(members)))
    return tables


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "error" not in row]


# ------------------------------------------------------------------------------------------------------------- quality


def display(method: str) -> str:
    """A method's name without the hash of its file."""
    return method.partition("@")[0]


# In the order that they are shown in.
TASKS = {
    "nll": "Loss of the text after the prompt, nats a token over the dense model: less is better",
    "passkey": "Pass keys found, of those that the dense model finds",
    "lookup": "Facts of twenty wordings found, of those that the dense model finds",
    "multikey": "Of eight competing keys the right one: share of all questions",
    "recall": "Verbatim recall: answers right in every token, share of all questions",
}


def quality(rows: Results) -> list[Table]:
    """One table a run, task, protocol and length: every method at every budget."""
    tables: list[Table] = []
    for question, judged in rows.quality.items():
        task, protocol, tokens, _ = question
        shown = [row for row in judged.summaries if row["method"] != compare.DENSE]
        if not shown:
            continue
        shown.sort(key=lambda row: (-round(row["mean_keep"], 2), results.kind_of(row["method"]), row["method"]))
        rivals = list(dict.fromkeys(rival for row in shown for rival in row["minus"]))
        cells = tuple(
            (
                display(row["method"]), results.kind_of(row["method"]), row["schedule"], number(row["mean_keep"], 3),
                percent(row["time"]), interval(row[row["metric"]]),
                *(interval(row["minus"].get(rival, {}).get(row["metric"])) for rival in rivals),
            )
            for row in shown
        )  # fmt: skip
        columns = (
            "method", "kind", "schedule", "B", "prefill, of dense", "mean [95 %]",
            *(f"minus {display(rival)}" for rival in rivals),
        )  # fmt: skip
        place = "" if task in compare.METRICS else f", question {protocol} the prompt"
        title = f"{TASKS.get(task, task)}. {_on(rows, judged.samples)}{tokens} tokens, {shown[0]['n']} samples{place}"
        note = (
            "B: mean kept tokens per layer, over the prompt's. A schedule: keep per stage @ first layer : layers to "
            "the next stage. Samples: those that every method of the run has read. Intervals by bootstrap over them, "
            "differences paired at equal B."
        )
        source = results.quality_source(rows, judged.samples)
        tables.append(Table(f"quality-{question.name}", title, columns, cells, source, note))
    return tables


def modes(rows: Results) -> list[Table]:
    """The README's table: the models that were judged with both kinds of dropped keys and values, three rows each."""
    cells, samples = [], []
    lookups = {
        (row["method"], row["schedule"]): row
        for question, found in rows.quality.items() if question.task == "lookup"
        for row in found.summaries
    }  # fmt: skip
    for judged in with_both(rows):
        model = results.quality_model(rows, judged.samples).partition(",")[0]
        samples += judged.samples
        for row in judged.learned:
            keep, is_predicted = row["schedule"].split()[0], "predicted" in row["schedule"]
            if (keep, is_predicted) not in README_MODES:
                continue
            found = lookups.get((row["method"], row["schedule"]))
            cells.append((
                model, "predicted" if is_predicted else "dropped", keep, percent(row["time"]),
                percent(1.0 if is_predicted else row["mean_keep"]), interval(row["nll_increase"], 2),
                NONE if found is None else f"{round(found['exact']['mean'] * found['n'])} of {found['n']}",
            ))  # fmt: skip
    if not cells:
        return []
    columns = (
        "model", "K and V of dropped tokens", "keep ratio", "time", "KV cache", "loss, nats a token",
        "facts found",
    )  # fmt: skip
    tokens, count = samples[0]["tokens"], len({row["id"] for row in samples})
    title = f"{tokens} tokens, {count} texts that nobody trained on"
    return [Table("modes", title, columns, tuple(cells), results.quality_source(rows, samples))]


def with_both(rows: Results) -> list[results.Judged]:
    """The runs on running text that judged learned pruners with dropped and with predicted keys and values."""
    return [
        judged for question, judged in rows.quality.items()
        if question.task == "nll" and len({"predicted" in row["schedule"] for row in judged.learned}) == 2
    ]  # fmt: skip


def _on(rows: Results, samples: Sequence[Row]) -> str:
    model = results.quality_model(rows, samples)
    return model and f"{model}, "


def scoring(rows: Results) -> list[Table]:
    """Time of a stage's scoring next to that of a decoder layer."""
    if not rows["cost"]:
        return []
    cells = tuple(
        (
            display(row["method"]), str(row["tokens"]), row["dtype"], seconds(row["scoring_s"]),
            seconds(row["layer_s"]), percent(row["scoring_s"] / row["layer_s"], 1),
        )
        for row in rows["cost"]
    )  # fmt: skip
    columns = ("method", "tokens", "dtype", "scoring", "a decoder layer", "share")
    return [Table("scoring", "Scoring right after a layer", columns, cells, Source.of(rows["cost"]))]


def evict(rows: Results) -> list[Table]:
    """What a stage does to the cache of the layers before it."""
    groups = results.grouped(rows["evict"], lambda r: (r["tokens"], -r["keep_ratio"], r["evict_earlier_kv"]))
    if not groups:
        return []
    cells = tuple(
        (
            str(tokens), f"{-keep:g}", "yes" if is_evicted else "no",
            percent(statistics.fmean(row["kv_bytes"] / row["kv_bytes_dense"] for row in members)),
            interval(compare.bootstrap([row["nll"] - row["nll_dense"] for row in members])._asdict()),
            str(len(members)),
        )
        for (tokens, keep, is_evicted), members in groups.items()
    )  # fmt: skip
    columns = ("tokens", "keep per stage", "earlier layers too", "KV cache", "loss, nats a token [95 %]", "documents")
    title = "A stage that also drops its tokens from the cache of the layers before it (evict_earlier_kv)"
    return [Table("evict", title, columns, cells, Source.of(rows["evict"]))]


# -------------------------------------------------------------------------------------------------------------- the op


def op_groups(rows: Results) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of ``sdtp bench op`` by machine and everything but length and provider."""

    def key(row: Row) -> tuple[Any, ...]:
        return (
            results.machine(row), row["model"], row["hidden_size"], row["dtype"], row["batch"], row["keep"],
            budget(row),
        )  # fmt: skip

    return results.grouped(rows["op"], key)


def op(rows: Results) -> list[Table]:
    """Every provider at every length, and the baselines over the backend's time."""
    tables: list[Table] = []
    for i, (key, members) in enumerate(op_groups(rows).items(), 1):
        _, model, hidden_size, dtype, batch, keep, kind = key
        providers = list(dict.fromkeys(row["provider"] for row in members))
        ours = [name for name in OURS if name in providers and name != "reference"]
        baselines = [name for name in providers if name not in ours]
        cells, errors = [], []
        for tokens, there in results.grouped(members, lambda row: row["tokens"]).items():
            found = {row["provider"]: row for row in there}
            errors += [f"{name}, {tokens} tokens: {row['error']}" for name, row in found.items() if "error" in row]
            times = {name: row["seconds"] for name, row in found.items() if "error" not in row}
            ratios = (
                number(times[name] / times[own]) if {name, own} <= times.keys() else NONE
                for own in ours for name in baselines
            )  # fmt: skip
            beyond = (
                percent(1 - found[own]["first_matmul_s"] / times[own], 1)
                if own in times and found[own].get("first_matmul_s")
                else NONE
                for own in ours
            )
            cells.append((str(tokens), *(seconds(times.get(name)) for name in providers), *ratios, *beyond))
        columns = (
            "tokens", *providers, *(f"{name} over {own}" for own in ours for name in baselines),
            *(f"{own} beyond the first product" for own in ours),
        )  # fmt: skip
        title = f"The op: {model}, width {hidden_size}, {dtype}, batch {batch}, keep {keep:g}, {kind}"
        note = " ".join(("No figure where a result was wrong or a provider cannot run:", *errors)) if errors else ""
        tables.append(Table(f"op-{i}", title, columns, tuple(cells), Source.of(members), note))
    return tables


def scaling(rows: Results) -> list[Table]:
    """Time over length and threads."""
    if not rows["scaling"]:
        return []
    keys = ("provider", "hidden_size", "dtype", "tokens")
    cells = []
    for (provider, width, dtype, tokens), members in results.grouped(
        _measured(rows["scaling"]), lambda row: tuple(row[name] for name in keys)
    ).items():
        single = min((row["seconds"] for row in members if row["threads"] == 1), default=None)
        for row in sorted(members, key=lambda row: row["threads"]):
            cells.append((
                provider, str(width), dtype, str(tokens), str(row["threads"]), seconds(row["seconds"]),
                seconds(row["seconds"] / tokens * 1024), number(None if single is None else single / row["seconds"]),
            ))  # fmt: skip
    columns = ("provider", "width", "dtype", "tokens", "threads", "time", "for 1024 tokens", "over one thread")
    return [Table("scaling", "The op over length and threads", columns, tuple(cells), Source.of(rows["scaling"]))]


def compiled(rows: Results) -> list[Table]:
    """What the compilers make of the GPU kernels, target by target."""
    cells: list[tuple[str, ...]] = []
    for compiler in ("triton", "nvcc"):
        for target, members in results.grouped(rows[compiler], lambda row: row["target"]).items():
            cells.append((
                compiler, target, str(len(members)), str(max(row["registers"] for row in members)),
                str(sum(row["spills"] for row in members)),
                f"{max(row['shared'] for row in members) / 1024:.0f} KiB",
            ))  # fmt: skip
    if not cells:
        return []
    columns = ("compiler", "target", "kernels", "most registers", "spills", "most shared memory")
    source = Source.of([*rows["triton"], *rows["nvcc"]])._replace(machines=("compiled for each target, run on none",))
    return [Table("compiled", "The GPU kernels, compiled ahead of time", columns, tuple(cells), source)]


# --------------------------------------------------------------------------------------------------------------- peers


def scored(row: Row, name: str) -> dict[str, float] | float | None:
    """A mean with its interval, which such rows have in a field of its own."""
    value, limits = row.get(name), row.get(f"{name}_interval")
    return value if limits is None else {"mean": row[name], "low": limits[0], "high": limits[1]}


def peers(rows: Results) -> list[Table]:
    """Every peer at the same budget; which cannot run, and why."""
    tables: list[Table] = []
    groups = results.grouped(
        rows["peers"], lambda row: (results.machine(row), row["checkpoint"], row["tokens"], row["keep"] or 0)
    )
    for i, ((_, checkpoint, tokens, keep), members) in enumerate(groups.items(), 1):
        dense = next((r["ttft_s"] for r in members if r["peer"].startswith("dense") and r.get("ttft_s")), None)
        cells = []
        for row in sorted(members, key=lambda row: ("error" in row, row.get("ttft_s") or math.inf)):
            ttft = row.get("ttft_s")
            cells.append((
                row["peer"], str(row.get("version") or NONE), row.get("dtype") or NONE, number(row.get("mean_keep"), 3),
                seconds(ttft), number(dense / ttft if dense and ttft else None), mebibytes(row.get("kv_bytes")),
                interval(scored(row, "nll_increase")),
                *(interval(scored(row, name), 2) for name in ("passkey", "passkey_after")), row.get("error") or "",
            ))  # fmt: skip
        columns = (
            "peer", "version", "dtype", "B", "first token", "speed-up", "KV cache", "loss, nats a token", "pass keys",
            "question after", "why it cannot run",
        )  # fmt: skip
        title = f"Peers: {checkpoint}, {tokens} tokens, keep {keep:g} or the same B"
        tables.append(Table(f"peers-{i}", title, columns, tuple(cells), Source.of(members)))
    return tables


# ------------------------------------------------------------------------------------------------------ the GPU models

MODEL_LENGTHS = (1024, 4096, 16384, 32768, 131072)
MODEL_SOURCE = Source(("sdtp bench report",), ("no machine: a model",), (), ("computed from shapes",), (), ())


@functools.cache
def stage_models(tokens: tuple[int, ...] = MODEL_LENGTHS, keep: float = 0.9) -> list[dict[str, Any]]:
    """:func:`sdtp_bench.roofline.compute` of Qwen2-7B's first stage in bfloat16, for every GPU and length."""
    return [roofline.compute(gpu, Case("qwen2-7b", n, keep=keep)) for gpu in SHOWN_GPUS for n in tokens]


def gpu_model(models: Sequence[dict[str, Any]]) -> Table:
    """The least time of one stage, by the roofline."""
    cells = []
    for model in models:
        gpu = lookup(GPUS, model["gpu"]["name"], "gpu")
        totals = model["totals"]
        times = {of: totals[of]["bound_us"] * 1e-6 for of in ("triton", "eager")}
        cells.append((
            gpu.device_name, str(model["case"]["tokens"]), str(totals["triton"]["launches"]), seconds(times["triton"]),
            str(totals["eager"]["launches"]), seconds(times["eager"]), number(times["eager"] / times["triton"]),
        ))  # fmt: skip
    columns = ("GPU", "tokens", "launches", "least time", "eager operations", "eager, least time", "eager over ours")
    note = (
        "Every byte moved once and every product at the vendor's peak, as if both overlapped and a launch were free: "
        "short prompts will take longer than this, most of all in eager PyTorch."
    )
    title = "Model, not measured: the first stage of Qwen2-7B, bf16, keep 0.9"
    return Table("roofline", title, columns, tuple(cells), MODEL_SOURCE, note)
