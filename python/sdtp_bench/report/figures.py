"""Pictures of the report, drawn from the same rows as its tables."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_bench.report import results, tables
from sdtp_bench.report.results import Source
from sdtp_bench.shapes import GPUS
from sdtp_eval import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from sdtp_bench.report.results import Results, Row

# Narrow, so that the letters can still be read where a phone shows the whole width.
SIZE = (4.6, 3.3)
STYLE = {
    "svg.hashsalt": "sdtp",  # ids in the file depend on what is drawn, and on nothing else
    "svg.fonttype": "path",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
}
# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PINK = (
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#d6c700", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)
KEEP_COLOURS = {0.9: BLUE, 0.8: ORANGE, 0.7: RED}
METHOD_COLOURS = {"attention": ORANGE, "recent": GREEN, "random": PINK, "norm": YELLOW}
PART_COLOURS = dict(zip(tables.PARTS, (BLUE, ORANGE, RED, "#999999"), strict=True))
MARKERS = "osD^vPX"


class Picture(NamedTuple):
    """A figure, and where its data came from."""

    name: str
    """Of its file, without ``.svg``."""
    title: str
    source: Source
    draw: Callable[[Any], None]
    """Fills an empty figure of matplotlib."""
    note: str = ""
    size: tuple[float, float] = SIZE

    def save(self, folder: Path) -> None:
        """Write the file: byte for byte the same for the same rows and the same matplotlib."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context({**mpl.rcParamsDefault, "backend": "agg", **STYLE}):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure)
            figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None, "Creator": None})


def _lengths_axis(axis: Any, lengths: Iterable[int]) -> None:
    ticks = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("tokens of the prompt")


def _plain_log_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_yscale("log")
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(formatter)
    axis.yaxis.set_minor_formatter(NullFormatter())


def _colour(keep: float) -> str:
    return KEEP_COLOURS.get(keep, GREEN)


def _spread(rows: Sequence[Row], middle: str) -> list[list[float]]:
    """Distances of the fastest and the slowest repetition from the median."""
    every = [row[f"{middle}_all"] for row in rows]
    return [[row[middle] - min(v) for row, v in zip(rows, every, strict=True)],
            [max(v) - row[middle] for row, v in zip(rows, every, strict=True)]]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- whole models


def _lines(rows: Iterable[Row]) -> dict[tuple[str, float], list[Row]]:
    """By budget and keep ratio, the global budget and the largest ratio first; each in order of length."""
    groups = results.grouped(rows, lambda row: (tables.budget(row) != "global", tables.budget(row), -row["keep"]))
    return {(budget, -keep): tables.by_length(members) for (_, budget, keep), members in groups.items()}


def _name(budget: str, keep: float) -> str:
    return f"keep {keep:g}" + ("" if budget == "global" else f", {budget}")


def speed(rows: Results) -> list[Picture]:
    """Latency, speed-up and the heat map of it."""
    pictures = []
    for i, (about, members) in enumerate(tables.prefills(rows).items(), 1):
        title, source, lines = " ".join((about[1], about[2])), Source.of(members), _lines(members)
        lengths = {row["tokens"] for row in members}

        def latency(figure: Any, lines: Any = lines, lengths: Any = lengths, members: Any = members) -> None:
            axis = figure.subplots()
            # The dense model ran once for every keep ratio; all its repetitions are one line here.
            dense = [
                {"tokens": n, "dense_s_all": list(itertools.chain.from_iterable(r["dense_s_all"] for r in there))}
                for n, there in results.grouped(members, lambda row: row["tokens"]).items()
            ]
            for row in dense:
                row["dense_s"] = statistics.median(row["dense_s_all"])
            _timed(axis, dense, "dense_s", color=BLACK, label="dense", marker="o")
            for budget, keep in lines:
                style = "-" if budget == "global" else "--"
                label = _name(budget, keep)
                _timed(axis, lines[budget, keep], "pruned_s", color=_colour(keep), label=label, linestyle=style)
            _lengths_axis(axis, lengths)
            _plain_log_axis(axis)
            axis.set_ylabel("prefill, seconds")
            axis.legend()

        def speedup(figure: Any, lines: Any = lines, lengths: Any = lengths) -> None:
            axis = figure.subplots()
            for budget, keep in lines:
                there, colour = lines[budget, keep], _colour(keep)
                x = [row["tokens"] for row in there]
                marker = "o" if budget == "global" else "s"
                axis.plot(x, [r["speedup"] for r in there], color=colour, marker=marker, label=_name(budget, keep))
                axis.plot(x, [r["ideal"] for r in there], color=colour, linestyle=":", linewidth=1.2)
            axis.plot([], [], color="#555555", linestyle=":", linewidth=1.2, label="ideal (FLOPs)")
            axis.axhline(1, color=BLACK, linewidth=0.8)
            _lengths_axis(axis, lengths)
            axis.set_ylabel("speed-up of the prefill")
            axis.set_ylim(bottom=0)
            axis.legend(loc="lower right")

        pictures.append(Picture(f"latency-{i}", f"Time of a prefill: {title}", source, latency, "Median; bars from the "
                                "fastest to the slowest repetition."))  # fmt: skip
        pictures.append(Picture(f"speedup-{i}", f"Speed-up over the length of the prompt: {title}", source, speedup))
        for budget in dict.fromkeys(budget for budget, _ in lines):
            picture = _heat_map(f"heat-{i}-{budget.replace(' ', '-')}", f"{title}, {budget}", source, budget, lines)
            pictures += [picture] if picture else []
    return pictures


def _timed(axis: Any, rows: Sequence[Row], name: str, marker: str = "o", **style: Any) -> None:
    axis.errorbar(
        [row["tokens"] for row in rows], [row[name] for row in rows], _spread(rows, name), capsize=2, elinewidth=0.8,
        marker=marker, **style,
    )  # fmt: skip


def _heat_map(
    name: str, title: str, source: Source, budget: str, lines: dict[tuple[str, float], list[Row]]
) -> Picture | None:
    keeps = sorted(keep for kind, keep in lines if kind == budget)
    lengths = sorted({row["tokens"] for keep in keeps for row in lines[budget, keep]})
    if min(len(keeps), len(lengths)) < 2:
        return None
    found = {(row["keep"], row["tokens"]): row["speedup"] for keep in keeps for row in lines[budget, keep]}

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        values = [[found.get((keep, n), math.nan) for n in lengths] for keep in keeps]
        image = axis.imshow(values, cmap="cividis", aspect="auto", vmin=1.0)
        middle = (image.norm.vmin + image.norm.vmax) / 2
        for y, x in itertools.product(range(len(keeps)), range(len(lengths))):
            value = values[y][x]
            text = tables.number(value)
            axis.text(x, y, text, ha="center", va="center", color=BLACK if value > middle else "white")
        axis.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
        axis.set_yticks(range(len(keeps)), [f"{keep:g}" for keep in keeps])
        axis.set(xlabel="tokens of the prompt", ylabel="keep per stage")
        axis.grid(visible=False)
        figure.colorbar(image, label="speed-up of the prefill")

    return Picture(name, f"Speed-up over length and keep ratio: {title}", source, draw, size=(SIZE[0], 2.6))


def kept(rows: Results) -> list[Picture]:
    """Tokens that each layer computes, for the longest prompt measured."""
    members = [row for row in rows["prefill"] if row.get("tokens_per_layer")]
    if not members:
        return []
    longest = max(row["tokens"] for row in members)
    shown = {(tables.budget(row), row["keep"]): row for row in members if row["tokens"] == longest}
    ordered = sorted(shown.items(), key=lambda item: (item[0][0] != "global", item[0][0], -item[0][1]))

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for (budget, keep), row in ordered:
            shares = [100 * n / longest for n in row["tokens_per_layer"]]
            style = "-" if budget == "global" else "--"
            axis.step(range(len(shares)), shares, where="mid", color=_colour(keep), linestyle=style,
                      label=f"{_name(budget, keep)}: B {row['mean_keep']:.2f}")  # fmt: skip
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(xlabel="decoder layer", ylabel="tokens that it computes, %", ylim=(0, 103))
        axis.legend(fontsize=8)

    title = f"Kept tokens layer by layer, {longest} tokens"
    note = "B: mean over the layers. A stage cuts the input of its layer; the cache of a layer is as long."
    return [Picture("kept", title, Source.of(row for _, row in ordered), draw, note)]


def where(rows: Results) -> list[Picture]:
    """Seconds by part, dense and pruned side by side."""
    pictures = []
    for i, (about, members) in enumerate(results.grouped(tables.profiled(rows), tables.subject_of).items(), 1):
        shown = [row for row in members if row["budget"] == "global"] or members

        def draw(figure: Any, shown: Any = shown) -> None:
            axis = figure.subplots()
            bars: list[tuple[str, dict[str, float], float]] = []  # label, seconds by part, the dense model's seconds
            for n, there in results.grouped(shown, lambda row: row["tokens"]).items():
                whole = sum(there[0]["where"]["dense"].values())
                label = f"{n // 1024}K" if n % 1024 == 0 else str(n)
                bars.append((f"{label} dense", there[0]["where"]["dense"], whole))
                bars += [
                    (f"{label} keep {row['keep']:g}", row["where"]["pruned"], sum(row["where"]["dense"].values()))
                    for row in there
                ]
            left = [0.0] * len(bars)
            for part in tables.PARTS:
                shares = [100 * spent.get(part, 0.0) / whole for _, spent, whole in bars]
                axis.barh(range(len(bars)), shares, left=left, color=PART_COLOURS[part], label=part)
                left = [a + b for a, b in zip(left, shares, strict=True)]
            axis.set_yticks(range(len(bars)), [label for label, _, _ in bars])
            axis.invert_yaxis()
            axis.set_xlabel("% of the dense prefill's time")
            axis.grid(axis="y", visible=False)
            figure.legend(loc="outside upper center", ncols=len(tables.PARTS))

        count = len(shown) + len({row["tokens"] for row in shown})
        title = f"Where the time of a prefill goes: {about[1]} {about[2]}"
        size = (SIZE[0], 1.2 + 0.24 * count)
        pictures.append(Picture(f"where-{i}", title, Source.of(shown), draw, "Profiled, in one run.", size))
    return pictures


def memory(rows: Results) -> list[Picture]:
    """Bytes of the cache, and of the peak where it was measured."""
    pictures = []
    for i, (about, members) in enumerate(tables.prefills(rows).items(), 1):
        lines = {key: there for key, there in _lines(members).items() if key[0] == "global"}
        if not lines or len({row["tokens"] for row in members}) < 2:
            continue

        def draw(figure: Any, lines: Any = lines) -> None:
            axis = figure.subplots()
            for name, style, label in (("kv_bytes", "-", "KV cache"), ("peak_bytes", "--", "peak above the weights")):
                for position, ((_, keep), there) in enumerate(lines.items()):
                    sized = [row for row in there if row.get(name)]
                    if not sized:
                        continue
                    x = [row["tokens"] for row in sized]
                    for kind, colour in (("dense", BLACK), ("pruned", _colour(keep))):
                        if kind == "dense" and position:
                            continue
                        text = f"{label}, {kind if kind == 'dense' else f'keep {keep:g}'}"
                        y = [row[name][kind] / 2**20 for row in sized]
                        axis.plot(x, y, color=colour, linestyle=style, marker="o", label=text)
            _lengths_axis(axis, {row["tokens"] for there in lines.values() for row in there})
            _plain_log_axis(axis)
            axis.set_ylabel("MiB")
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)

        title = f"Memory of a prefill: {about[1]} {about[2]}"
        pictures.append(Picture(f"memory-{i}", title, Source.of(members), draw, size=(SIZE[0], SIZE[1] + 0.5)))
    return pictures


# ------------------------------------------------------------------------------------------------------------- quality

_AXES = {"nll": "loss, nats a token over dense", "passkey": "pass keys found", "lookup": "facts found",
         "multikey": "competing keys found",
         "recall": "recalled word for word"}  # fmt: skip


def pareto(rows: Results) -> list[Picture]:
    """Quality against the time to the first token: a picture a run, task, protocol and length."""
    pictures = []
    for question, judged in rows.quality.items():
        task, protocol, tokens, _ = question
        shown = [row for row in judged.summaries if row["time"] is not None]
        if len(shown) < 2:
            continue

        def draw(figure: Any, shown: Any = shown, task: str = task) -> None:
            axis = figure.subplots()
            lines = results.grouped(shown, lambda r: (r["method"] != compare.DENSE, r["method"], _shape(r["schedule"])))
            for i, ((_, method, shape), there) in enumerate(lines.items()):
                there.sort(key=lambda row: row["time"])
                values = [row[row["metric"]] for row in there]
                kind = results.kind_of(method)
                learned = kind == "learned"
                label = tables.display(method) + (f", {shape}" if shape else "")
                colour = BLUE if learned else METHOD_COLOURS.get(method, COLOURS[i % len(COLOURS)])
                axis.errorbar(
                    [100 * row["time"] for row in there], [value["mean"] for value in values],
                    [[value["mean"] - value["low"] for value in values],
                     [value["high"] - value["mean"] for value in values]],
                    label=label, color=BLACK if method == compare.DENSE else colour,
                    marker="*" if method == compare.DENSE else MARKERS[i % len(MARKERS)],
                    markersize=9 if method == compare.DENSE else None, capsize=2, elinewidth=0.8,
                    linestyle="--" if kind.startswith("oracle") or shape else "-",
                    linewidth=2.2 if learned else 1.2, zorder=3 if learned else 2,
                )  # fmt: skip
            axis.set(xlabel="time to the first token, % of the dense model's", ylabel=_AXES.get(task, task))
            axis.legend()

        name = f"pareto-{question.name}"
        place = "" if task in compare.METRICS else f", question {protocol} the prompt"
        what = _AXES.get(task, task).partition(",")[0].capitalize()
        title = f"{what} against time, {tokens} tokens, {shown[0]['n']} samples{place}"
        best = "down" if task in compare.METRICS else "up"
        note = (
            "95 % intervals by bootstrap over samples; times are medians of ratios of prefills that ran in turn. Best: "
            f"{best} and to the left."
        )
        pictures.append(Picture(name, title, results.quality_source(rows, judged.samples), draw, note))
    return pictures


def modes(rows: Results) -> list[Picture]:
    """The README's picture: what dropping and predicting cost in loss, against the time to the first token."""
    judged = tables.with_both(rows)
    if not judged:
        return []

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(judged), squeeze=False)[0]
        for axis, one in zip(panels, judged, strict=True):
            for is_predicted, colour, marker in ((False, COLOURS[1], "s"), (True, BLUE, "o")):
                there = [
                    row for row in one.learned if ("predicted" in row["schedule"]) == is_predicted and row["time"]
                ]  # fmt: skip
                there.sort(key=lambda row: row["time"])
                values = [row["nll_increase"] for row in there]
                axis.errorbar(
                    [100 * row["time"] for row in there], [value["mean"] for value in values],
                    [[value["mean"] - value["low"] for value in values],
                     [value["high"] - value["mean"] for value in values]],
                    label="keys and values predicted" if is_predicted else "dropped", color=colour, marker=marker,
                    capsize=2, elinewidth=0.8, linewidth=2,
                )  # fmt: skip
            axis.plot([100], [0], marker="*", markersize=11, color=BLACK, linestyle="", label="dense")
            axis.set(xlabel="time to the first token, % of dense", ylim=(0, None))
            axis.set_title(results.quality_model(rows, one.samples).partition(",")[0])
        panels[0].set_ylabel("loss, nats a token over dense")
        panels[0].legend()

    samples = [row for one in judged for row in one.samples]
    title = f"Loss against the time to the first token, {samples[0]['tokens']} tokens"
    note = "95 % intervals by bootstrap over texts; times are medians of ratios of interleaved prefills."
    return [Picture("modes", title, results.quality_source(rows, samples), draw, note, (9.0, 3.6))]


def _shape(schedule: str) -> str:
    """What a schedule's label says after its layers: the block size and protected tokens."""
    return " ".join(schedule.split()[2:]) if not schedule.startswith("B ") else " ".join(schedule.split()[3:])


def peers(rows: Results) -> list[Picture]:
    """Loss against the time to the first token, a picture a checkpoint and length."""
    pictures = []
    measured = [row for row in rows["peers"] if row.get("ttft_s") and row.get("nll_increase") is not None]
    groups = results.grouped(measured, lambda row: (results.machine(row), row["checkpoint"], row["tokens"]))
    for i, ((_, checkpoint, tokens), members) in enumerate(groups.items(), 1):

        def draw(figure: Any, members: Any = members) -> None:
            axis = figure.subplots()
            names = list(dict.fromkeys(row["peer"] for row in members))
            for row in members:
                place = names.index(row["peer"])
                mean, limits = row["nll_increase"], row.get("nll_increase_interval")
                bars = None if limits is None else [[mean - limits[0]], [limits[1] - mean]]
                is_first = row is next(other for other in members if other["peer"] == row["peer"])
                axis.errorbar(
                    [row["ttft_s"]], [mean], bars, color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % 7],
                    linestyle="", capsize=2, elinewidth=0.8, label=row["peer"] if is_first else None,
                )  # fmt: skip
            axis.set(xlabel="time to the first token, s", ylabel=_AXES["nll"], xlim=(0, None))
            figure.legend(loc="outside lower center", ncols=3, fontsize=8)

        title = f"Peers: loss against the time to the first token, {checkpoint}, {tokens} tokens"
        size = (SIZE[0], SIZE[1] + 0.6)
        pictures.append(Picture(f"peers-{i}", title, Source.of(members), draw, "Best: down and to the left.", size))
    return pictures


# -------------------------------------------------------------------------------------------------------------- the op


def op(rows: Results) -> list[Picture]:
    """How much longer the baselines take than the backends; the keep ratio and batch with the most lengths."""
    pictures = []
    for i, (key, members) in enumerate(tables.op_groups(rows).items(), 1):
        _, model, width, dtype, batch, keep, _ = key
        times = {(row["provider"], row["tokens"]): row["seconds"] for row in members if "error" not in row}
        providers = list(dict.fromkeys(name for name, _ in times))
        ours = [name for name in tables.OURS if name in providers and name != "reference"]
        lengths = sorted({tokens for _, tokens in times})
        if not ours or len(lengths) < 2 or batch != 1:
            continue

        def draw(figure: Any, times: Any = times, ours: Any = ours, providers: Any = providers) -> None:
            axis = figure.subplots()
            baselines = [name for name in providers if name not in ours]
            for (place, name), own in itertools.product(enumerate(baselines), ours):
                both = [tokens for who, tokens in times if who == name and (own, tokens) in times]
                label = name if len(ours) == 1 else f"{name} over {own}"
                axis.plot(both, [times[name, n] / times[own, n] for n in both], marker=MARKERS[place % 7], label=label,
                          color=COLOURS[place % len(COLOURS)], linestyle="-" if own == ours[0] else "--")  # fmt: skip
            axis.axhline(1, color=BLACK, linewidth=0.8)
            _lengths_axis(axis, (tokens for _, tokens in times))
            axis.set_ylabel(f"time over that of {', '.join(ours)}")
            axis.set_ylim(bottom=0)
            axis.legend()

        title = f"The op against its baselines: {model}, width {width}, {dtype}, keep {keep:g}"
        pictures.append(Picture(f"op-{i}", title, Source.of(members), draw, "Above 1 the op is faster."))
    return pictures


def scaling(rows: Results) -> list[Picture]:
    """Time over length for each number of threads."""
    measured = [row for row in rows["scaling"] if "error" not in row]
    keys = ("provider", "hidden_size", "dtype", "threads")
    groups = results.grouped(measured, lambda row: tuple(row[name] for name in keys))
    if not any(len(there) > 1 for there in groups.values()):
        return []

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for i, ((provider, width, dtype, threads), there) in enumerate(groups.items()):
            there.sort(key=lambda row: row["tokens"])
            x, y = [row["tokens"] for row in there], [1e3 * row["seconds"] for row in there]
            label = f"{provider}, width {width}, {dtype}, {threads} thread{'s' if threads > 1 else ''}"
            axis.plot(x, y, marker=MARKERS[i % 7], color=COLOURS[i % len(COLOURS)], label=label)
        first = min(measured, key=lambda row: (row["tokens"], row["seconds"]))
        ends = [first["tokens"], max(row["tokens"] for row in measured)]
        line = [1e3 * first["seconds"] * n / first["tokens"] for n in ends]
        axis.plot(ends, line, color="#555555", linestyle=":", linewidth=1.2, label="in proportion to the length")
        _lengths_axis(axis, (row["tokens"] for row in measured))
        _plain_log_axis(axis)
        axis.set_ylabel("milliseconds")
        axis.legend(fontsize=8)

    return [Picture("scaling", "The op over the length of the prompt", Source.of(measured), draw)]


# ---------------------------------------------------------------------------------------------------------- the models


def roofline(models: Sequence[dict[str, Any]]) -> Picture:
    """Four roofs, with the launches of one stage on each."""
    length = 32768
    shown = [model for model in models if model["case"]["tokens"] == length]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for i, model in enumerate(shown):
            gpu = GPUS[model["gpu"]["name"]]
            ridge = gpu.tensor_flops / gpu.hbm_bytes
            x = [16, ridge, 2048]
            y = [min(gpu.hbm_bytes * value, gpu.tensor_flops) / 1e12 for value in x]
            axis.plot(x, y, color=COLOURS[i], label=gpu.device_name)
            for of, marker in (("triton", "o"), ("eager", "x")):
                totals = model["totals"][of]
                intensity = totals["flops"] / (totals["bytes_read"] + totals["bytes_written"])
                reached = totals["flops"] / (totals["bound_us"] * 1e-6) / 1e12
                axis.plot(intensity, reached, color=COLOURS[i], marker=marker, markersize=7, linestyle="")
        axis.plot([], [], color="#555555", marker="o", linestyle="", label="the op's launches together")
        axis.plot([], [], color="#555555", marker="x", markersize=7, linestyle="", label="eager operations together")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel="FLOPs of products a byte moved", ylabel="TFLOP/s at most (model)")
        axis.legend(fontsize=8)

    title = f"Model, not measured: roofline of one stage, Qwen2-7B, bf16, {length} tokens"
    note = "Below its roof lies what a stage can reach at best, because its launches run one after the other."
    return Picture("roofline", title, tables.MODEL_SOURCE, draw, note)
