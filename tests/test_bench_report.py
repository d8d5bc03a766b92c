"""``sdtp bench report``: from rows alone, without a number that no row has, and stale where the rows have changed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import pytest
from helpers.files import contents

from sdtp_bench import report
from sdtp_bench.report import figures, results, tables
from sdtp_kernels import cli

pytest.importorskip("triton", reason="the roofline counts the launches of the Triton backend")

ROOT = Path(__file__).parents[1]
FACTS = {
    "machine": {"processor": "Abacus 9", "cores": 2, "threads": 2, "gpu": None},
    "versions": {"torch": "2.13.0"}, "revision": "0123456789abcdef", "date": "2026-11-25T10:00:00+00:00",
}  # fmt: skip


def prefill_row(tokens: int, keep: float, **fields: object) -> dict:
    lengths = [tokens, round(tokens * keep), round(tokens * keep**2), round(tokens * keep**3)]
    share = sum(lengths) / (4 * tokens)
    dense = 1e-3 * tokens
    parts = {"linear": 0.5 * dense, "attention": 0.4 * dense, "pruning": 0.0, "other": 0.1 * dense}
    return {
        "bench": "prefill", "checkpoint": "toy", "tokens": tokens, "keep": keep, "budget": "global", "block_size": None,
        "dtype": "float32", "method": "toy-pruners", "dense_s": dense, "pruned_s": share * dense,
        "dense_s_all": [dense, 1.1 * dense, 0.9 * dense], "pruned_s_all": [share * dense] * 3, "speedup": 1 / share,
        "ideal": 1.05 / share, "share_of_ideal": 1 / 1.05, "mean_keep": share, "tokens_per_layer": lengths,
        "kv_bytes": {"dense": 1000 * tokens, "pruned": round(1000 * tokens * share)}, "stage_share": 0.021,
        "where": {"dense": parts, "pruned": {name: share * value for name, value in parts.items()} | {"pruning": 0.02}},
        "peak_bytes": {"dense": 3000 * tokens, "pruned": 2900 * tokens},
        **FACTS, "command": "sdtp bench prefill --toy", **fields,
    }  # fmt: skip


def op_row(provider: str, tokens: int, seconds: float, threads: int = 2, **fields: object) -> dict:
    return {
        "bench": "op", "provider": provider, "model": "qwen2-0.5b", "hidden_size": 896, "tokens": tokens, "batch": 1,
        "keep": 0.9, "dtype": "fp32", "budget": "global", "block_size": 512, "pooling": 1, "threads": threads,
        "seconds": seconds, "first_matmul_s": 0.8 * seconds, **FACTS, "command": "sdtp bench op --toy", **fields,
    }  # fmt: skip


def quality_rows(method: str, schedule: str, mean_keep: float, loss: float, found: float) -> list[dict]:
    rows = []
    for i in range(8):
        common = {
            "protocol": "inside", "tokens": 512, "id": f"sample-{i}", "method": method, "schedule": schedule,
            "mean_keep": mean_keep, "seconds": 2.0 * mean_keep + 0.1 * i,
        }  # fmt: skip
        rows.append({**common, "task": "nll", "nll_increase": loss * (1 + 0.1 * (i % 3)), "kl": loss})
        # The dense model knows seven of eight answers.
        exact = float(i < 7 and i < 8 * found)
        rows.append({**common, "task": "passkey", "exact": exact, "nll": 1 - exact})
        rows.append({**common, "task": "lookup", "tokens": 256, "exact": exact, "nll": 1 - exact})
    return rows


def all_rows() -> dict[str, list[dict]]:
    """A few rows of every kind, by file."""
    peer = {"bench": "peers", "checkpoint": "toy", "tokens": 1024, "keep": 0.9, "dtype": "float32", **FACTS}
    qualities = [
        *quality_rows("dense", "dense", 1.0, 0.0, 1.0),
        *quality_rows("mine@012345", "0.9 @4:3", 0.67, 0.05, 1.0),
        *quality_rows("attention", "0.9 @4:3", 0.67, 0.06, 0.5),
        *quality_rows("mine@012345", "0.9 @4:3 block 128", 0.68, 0.07, 0.9),
        *quality_rows("kvpress:SnapKV", "0.9 @4:3", 0.67, 0.03, 0.9),
        *quality_rows("mine@012345", "0.9 @4:3 predicted", 0.67, 0.02, 0.95),
    ]
    return {
        "abacus/prefill.jsonl": [
            *(prefill_row(tokens, keep) for tokens in (1024, 2048, 4096) for keep in (0.9, 0.8)),
            prefill_row(4096, 0.9, budget="block", block_size=512),
        ],
        "abacus/decode.jsonl": [
            prefill_row(1024, 0.9, bench="decode", new_tokens=129, total_s={"dense": 3.0, "pruned": 2.0},
                        decode_s={"dense": 1.28, "pruned": 0.64}),
        ],
        "abacus/op.jsonl": [
            op_row(name, tokens, factor * tokens * 1e-6)
            for tokens in (2048, 8192) for name, factor in (("eager", 3.0), ("eager tuned", 1.5), ("cpu", 1.0))
        ] + [op_row("compiled", 2048, 0.0, error="scores differ by 0.7")],
        "abacus/scaling.jsonl": [
            op_row("cpu", tokens, tokens * 1e-6 / threads, threads, bench="scaling")
            for tokens in (2048, 8192, 32768) for threads in (1, 2)
        ],
        "abacus/memory.jsonl": [
            {"bench": "memory", "checkpoint": "toy", "dtype": "float32", "limit_bytes": 2**30, "step": 128,
             "method": method, "keep": keep, "budget": keep and "global", "block_size": None, "tokens": tokens,
             "peak_bytes": 2**30 - 1000, "kv_bytes": 2**29, "trials": [], **FACTS}
            for method, keep, tokens in (("mine", 0.9, 41000), ("dense", None, 30000), ("mine", 0.8, 60000))
        ],
        "abacus/multi.jsonl": [
            {"bench": "multi", "checkpoint": "toy", "tokens": 4096, "keep": 0.9, "dtype": "float32", "method": "dense",
             "processes": processes, "threads": 1, "seconds": seconds, "seconds_all": [seconds], "speedup": 2 / seconds,
             "efficiency": 2 / seconds / processes, **FACTS}
            for processes, seconds in ((1, 2.0), (2, 1.25))
        ],
        "abacus/peers.jsonl": [
            {**peer, "peer": "dense", "version": "5.23", "mean_keep": 1.0, "ttft_s": 2.0, "kv_bytes": 2**20,
             "nll_increase": 0.0, "nll_increase_interval": [0.0, 0.0], "passkey": 1.0, "passkey_interval": None},
            {**peer, "peer": "ours", "version": "0.1", "mean_keep": 0.67, "ttft_s": 1.25, "kv_bytes": 2**19,
             "nll_increase": 0.08, "nll_increase_interval": [0.05, 0.12], "passkey": 0.9, "passkey_interval": None,
             "passkey_after": 0.4, "passkey_after_interval": [0.2, 0.6]},
            {**peer, "peer": "other", "version": None, "error": "needs a <GPU>"},
        ],
        "quality/samples.jsonl": qualities,
        "quality/runs.jsonl": [
            {"bench": "runs", "tasks": ["nll", "passkey", "lookup"], "tokens": [512, 256],
             "checkpoint": "toy", "dtype": "float32",
             **FACTS, "command": "sdtp eval run --toy"},
        ],
        "cost.jsonl": [
            {"method": "mine@012345", "tokens": 2048, "dtype": "float32", "layer_s": 0.1, "scoring_s": 0.0025, **FACTS},
        ],
        "new.jsonl": [{"bench": "never heard of", "seconds": 1.0}],
    }  # fmt: skip


def write(folder: Path, files: dict[str, list[dict]]) -> Path:
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> results.Results:
    return results.read(write(tmp_path / "results", all_rows()))


# ------------------------------------------------------------------------------------------------------- the whole page


class Page(HTMLParser):
    """What the page refers to, and its visible text; tags must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [value for name in ("src", "href") if (value := found.get(name))]
        self.ids += [value] if (value := found.get("id")) else []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if "style" not in self.open else ""


def test_the_page_is_complete_in_its_folder(tmp_path: Path) -> None:
    folder, out = write(tmp_path / "results", all_rows()), tmp_path / "out"
    report.build(folder, out, [])
    page = Page((out / "index.html").read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    pictures = {link for link in page.links if not link.startswith("#")}
    assert pictures == {file.name for file in out.glob("*.svg")}  # nothing from a network, nothing left over
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    drawn = {"latency-1", "speedup-1", "heat-1-global", "kept", "where-1", "memory-1", "pareto-nll-inside-512-quality",
             "pareto-passkey-inside-512-quality", "pareto-lookup-inside-256-quality", "modes",
             "peers-1", "op-1", "scaling", "roofline"}  # fmt: skip
    assert pictures == {f"{name}.svg" for name in drawn}
    text = " ".join(page.words.split())
    assert "needs a <GPU>" in text  # escaped: the parser gave it back
    assert "Rows that no part of the page shows: new.jsonl" in text
    assert "No evict rows for this yet: python benchmarks/evict_earlier_kv.py" in text
    assert "No prefill rows" not in text

    before = contents(out)
    (out / "of-an-older-page.svg").write_text("")
    report.build(folder, out, [])
    assert contents(out) == before
    assert not re.search(rb"\d{4}-\d\d-\d\dT|matplotlib v", b"".join((out / name).read_bytes() for name in pictures))


def test_without_rows_the_page_says_what_makes_them(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    report.build(tmp_path / "results", tmp_path / "out", [])
    page = Page((tmp_path / "out/index.html").read_text())
    for kind in (
        "op",
        "scaling",
        "prefill",
        "decode",
        "memory",
        "multi",
        "peers",
        "quality",
        "cost",
        "evict",
        "triton",
        "nvcc",
    ):
        assert results.COMMANDS[kind] in page.words, kind
    assert {link for link in page.links if link.endswith(".svg")} == {"roofline.svg"}


def test_everything_names_its_command_machine_and_date(rows: results.Results) -> None:
    for part in report.sections(rows):
        for shown in (*part.tables, *part.pictures):
            assert shown.source.commands, shown.name
            assert "not recorded" not in shown.source.facts(), shown.name
    assert tables.prefill(rows)[0].source.facts() == (
        "Abacus 9, 2 threads; torch 2.13.0; 2026-11-25; revision 0123456789"
    )
    assert results.Source.of([{}]).facts() == "machine not recorded; date not recorded"


# ------------------------------------------------------------------------------------------------------------ staleness

README = "# Title\n\n<!-- table: modes -->\nold\n<!-- end -->\nlast\n"


@pytest.fixture
def sdtp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs ``sdtp bench report`` on the rows in a folder and returns its status."""
    point = metadata.EntryPoint("bench", "sdtp_bench.cli:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"bench": point})
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> int:
        places = ["--results", "results", "--out", "out", "--documents", "README.md"]
        return cli.main(["bench", "report", *places, *options])

    return run


def test_stale_tables_are_found(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = ("abacus/prefill.jsonl", "quality/samples.jsonl", "quality/runs.jsonl")
    write(tmp_path / "results", {name: rows for name, rows in all_rows().items() if name in kept})
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert sdtp("--check") == 1
    out = capsys.readouterr().out
    assert "README.md is not what its rows say" in out
    assert "out/index.html is not" in out
    assert "out/kept.svg is not" in out
    assert readme.read_text() == README
    assert not (tmp_path / "out").exists()

    assert sdtp() == 0
    made = readme.read_text()
    assert made.startswith("# Title\n\n<!-- table: modes -->\n\n| model | K and V of dropped tokens |")
    assert made.endswith("<!-- end -->\nlast\n")
    assert "old" not in made
    words = " ".join(made.split())  # lines are as long as the README's
    assert "2026-11-25; revision 0123456789. [How it was measured](docs/report/index.html#quality)." in words
    assert max(len(line) for line in made.splitlines() if not line.startswith("|")) <= 120
    # The block budget is none of the README's, nor is dropping at 0.9; of seven facts that the dense model finds.
    assert made.count("| toy |") == 1
    assert "| toy | predicted | 0.9 | 72 % | 100 % | 0.02 [0.02, 0.02] | 7 of 7 |" in made
    assert sdtp("--check") == 0

    readme.write_text(made.replace("7 of 7", "8 of 7"))
    assert sdtp("--check") == 1
    assert "README.md" in capsys.readouterr().out
    readme.write_text(made.replace("# Title", "# Another"))
    assert sdtp("--check") == 0
    # Whatever is drawn from a row changes with it.
    with (tmp_path / "results/quality/samples.jsonl").open("a") as file:
        (row, *_) = (row for row in quality_rows("mine@012345", "0.9 @4:3 predicted", 0.67, 9.0, 1.0))
        file.write(json.dumps(row) + "\n")
    (tmp_path / "out/kept.svg").unlink()
    capsys.readouterr()
    assert sdtp("--check") == 1
    told = capsys.readouterr().out
    assert all(f"{name} is not" in told for name in ("README.md", "out/index.html", "out/kept.svg"))
    assert sdtp() == 0
    assert "| 100 % | 1.14 [" in readme.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: mode -->\n<!-- end -->\n", "no table 'mode'; known: modes"),
        ("<!-- table: modes -->\n| a |\n", "has no '<!-- end -->'"),
        ("<!-- table: modes -->\n<!-- table: modes -->\n<!-- end -->\n", "has no '<!-- end -->'"),
    ],
)
def test_documents_that_cannot_be_renewed(
    sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    write(tmp_path / "results", all_rows())
    (tmp_path / "README.md").write_text(text)
    assert sdtp() == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == text
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_read(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(README)
    assert sdtp() == 2
    assert "--results results: no such directory" in capsys.readouterr().err
    write(tmp_path / "results", {"a.jsonl": []})
    assert sdtp() == 2
    assert "no rows for the table 'modes'" in capsys.readouterr().err
    (tmp_path / "results/a.jsonl").write_text('{"bench": "op"}\n{"bench": \n')
    assert sdtp() == 2
    assert "a.jsonl, line 2: expected a JSON object" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="a copy of the source without its documents")
def test_the_repository_s_own_tables_are_fresh() -> None:
    stale = report.check(ROOT / "benchmarks/results", ROOT / "docs/report", [ROOT / "README.md"])
    assert stale == [], "'make report' renews them"


# ----------------------------------------------------------------------------------------------------------- the tables


def column(table: tables.Table, name: str) -> list[str]:
    return [row[table.columns.index(name)].replace(tables.SPACE, " ") for row in table.rows]


def test_a_wrong_result_has_no_figure(rows: results.Results) -> None:
    (table,) = tables.op(rows)
    assert column(table, "compiled") == [tables.NONE, tables.NONE]
    assert "compiled, 2048 tokens: scores differ by 0.7" in table.note
    assert column(table, "eager over cpu") == ["3.00", "3.00"]
    assert column(table, "eager tuned over cpu") == ["1.50", "1.50"]
    assert column(table, "cpu beyond the first product") == ["20.0 %", "20.0 %"]
    (peers,) = tables.peers(rows)
    assert column(peers, "peer") == ["ours", "dense", "other"]
    assert column(peers, "question after") == ["0.40 [0.20, 0.60]", tables.NONE, tables.NONE]
    assert column(peers, "speed-up") == ["1.60", "1.00", tables.NONE]
    assert column(peers, "loss, nats a token") == ["0.080 [0.050, 0.120]", "0.000 [0.000, 0.000]", tables.NONE]


def test_where_the_rest_of_the_ideal_went() -> None:
    row = prefill_row(100, 0.5, tokens_per_layer=[100, 50])
    parts = {"linear": 4.0, "attention": 8.0, "pruning": 0.1, "other": 2.0}
    row["where"] = {"dense": parts, "pruned": parts}
    # Half of the layers have half of the tokens: a mean of 3/4, a mean square of 5/8; pruning should be free.
    assert tables.in_proportion(row) == {"linear": 3.0, "attention": 5.0, "pruning": 0.0, "other": 1.5}
    (table,) = tables.where(results.Results(prefill=[row]))
    beyond = [column(table, f"{part}, beyond")[0] for part in tables.PARTS]
    assert beyond == ["7.1 %", "21.3 %", "0.7 %", "3.5 %"]


def test_decoding_is_all_tokens_but_the_first(rows: results.Results) -> None:
    (table,) = tables.decode(rows)
    assert column(table, "dense, ms a new token") == ["10.0"]
    assert column(table, "speed-up") == ["1.50"]


def test_quality_is_paired_and_named_by_kind(rows: results.Results) -> None:
    loss, keys, lookups = tables.quality(rows)
    assert column(loss, "kind") == ["learned", "cache cut after a dense prefill", "learned", "learned", "training-free"]
    # (2 x 0.67 + t) / (2 + t) over the eight samples' t, in the middle.
    assert column(loss, "prefill, of dense")[4] == "72 %"
    assert column(loss, "minus attention")[2].startswith(f"{tables.MINUS}0.011 [")
    assert column(keys, "mean [95 %]")[2] == "1.000 [1.000, 1.000]"
    assert ", 7 samples," in keys.title
    assert ", 7 samples," in lookups.title


def test_the_later_row_of_the_same_settings_counts(tmp_path: Path) -> None:
    again = prefill_row(4096, 0.9) | {"speedup": 9.0}
    later = {"abacus/prefill.jsonl": [*all_rows()["abacus/prefill.jsonl"], again]}
    read = results.read(write(tmp_path / "results", later))
    assert len(read["prefill"]) == 7
    assert [row["speedup"] for row in read["prefill"] if row["speedup"] == 9.0] == [9.0]


def test_runs_are_not_mixed(tmp_path: Path) -> None:
    files = all_rows()
    runs = files.pop("quality/runs.jsonl")
    samples = files.pop("quality/samples.jsonl")
    theirs = [
        row | {"id": f"their {row['id']}", "nll_increase": 9.0} for row in samples
        if row["task"] == "nll" and row["method"] not in ("attention", "dense")
    ]  # fmt: skip
    last = theirs.pop()
    files |= {"quality/ours/samples.jsonl": samples, "quality/ours/runs.jsonl": runs}
    files |= {"quality/theirs/samples.jsonl": theirs}
    files |= {"quality/theirs/runs.jsonl": [{**runs[0], "command": "sdtp eval run --theirs"}]}
    read = results.read(write(tmp_path / "results", files))
    ours, other, keys, lookups = tables.quality(read)
    assert [table.name for table in (ours, other, keys, lookups)] == [
        "quality-nll-inside-512-ours", "quality-nll-inside-512-theirs", "quality-passkey-inside-512-ours",
        "quality-lookup-inside-256-ours",
    ]  # fmt: skip
    assert ours.title.endswith("512 tokens, 8 samples")
    assert column(ours, "mean [95 %]")[2:] == [
        "0.054 [0.052, 0.057]", "0.022 [0.021, 0.023]", "0.065 [0.062, 0.068]",
    ]  # fmt: skip
    # One method has not read the last sample: nobody's mean has it.
    assert last["id"] in {row["id"] for row in theirs}
    assert other.title.endswith("512 tokens, 7 samples")
    assert set(column(other, "mean [95 %]")) == {"9.000 [9.000, 9.000]"}
    # Without attention, recent and random the learned pruners are what the others are compared with.
    assert "minus attention" in ours.columns
    assert column(other, "minus mine")[1] == "0.000 [0.000, 0.000]"
    assert (ours.source.commands, other.source.commands) == (("sdtp eval run --toy",), ("sdtp eval run --theirs",))


def test_the_longest_prompt_is_a_multiple_of_the_dense_one(rows: results.Results) -> None:
    (table,) = tables.longest(rows)
    assert column(table, "longest prompt") == ["30000", "41000", "60000"]
    assert column(table, "of dense") == ["1.00", "1.37", "2.00"]
    assert "below 1,024.0 MiB" in table.title.replace(tables.SPACE, " ")
    (several,) = tables.multi(rows)
    assert column(several, "over the best single") == ["1.00", "1.60"]
    assert column(several, "a process") == ["100 %", "80 %"]


def test_numbers() -> None:
    assert [tables.seconds(value) for value in (12.345, 0.5, 2.5e-3, 9.87e-6, None)] == [
        f"{text[0]}{tables.SPACE}{text[1]}" for text in (("12.3", "s"), ("500", "ms"), ("2.50", "ms"), ("9.87", "µs"))
    ] + [tables.NONE]  # fmt: skip
    assert tables.interval({"mean": -0.5, "low": float("nan"), "high": float("nan")}) == f"{tables.MINUS}0.500"
    assert tables.number(float("nan")) == tables.NONE


def test_a_heat_map_needs_two_of_each(rows: results.Results) -> None:
    names = [picture.name for picture in figures.speed(results.Results(prefill=[prefill_row(1024, 0.9)]))]
    assert names == ["latency-1", "speedup-1"]
