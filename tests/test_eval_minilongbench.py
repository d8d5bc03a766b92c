"""MiniLongBench: prompts read whole, gold answers as they are, equal budgets - or no figures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.commands import read

from sdtp_eval import compare, longbench, minilongbench, rivals
from sdtp_kernels import PruningSchedule

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

PASSAGE = "The town lies between a river and a wood, and nobody knows how old it is. "


def entry(prompt: str, gold: object) -> dict:
    return {"origin_prompt": prompt, "prediction": "", "gold": gold, "time": 1.0}


FILES = {
    "hotpotqa": [entry(PASSAGE * n + "Question: where?\nAnswer:", ["a river", "a wood"]) for n in (6, 8, 60)],
    "lcc": [entry("x = 1\n" * 80 + "Next line of code:\n", ["x = 1"])],
    "trec": [entry("Question: who?\nType: Human\n" * 20, {"answers": ["Human"], "all_classes": ["Human", "Date"]})],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of MiniLongBench's form, which are taken for its own."""
    for name, entries in FILES.items():
        write(tmp_path, name, entries)
        monkeypatch.setitem(minilongbench.DIGESTS, name, minilongbench.digest(minilongbench.load(tmp_path, name)))
    return tmp_path


def write(folder: Path, name: str, entries: list[dict]) -> None:
    path = folder / f"MiniLongBench_{name}.json"
    path.write_text(json.dumps({str(i): entry for i, entry in enumerate(entries)}))


@pytest.fixture
def options(folder: Path) -> list[object]:
    return ["--data", folder, "--out", folder / "run", "--characters", 1500, "--keep", 0.8, "--tasks", *FILES]


def test_files_and_their_digests(folder: Path) -> None:
    assert minilongbench.DIGESTS.keys() == set(longbench.DATASETS)
    found = minilongbench.read_dataset(folder, "trec")
    assert found["0"]["answers"] == ["Human"]
    assert found["0"]["all_classes"] == ["Human", "Date"]
    assert minilongbench.read_dataset(folder, "lcc")["0"]["all_classes"] is None
    assert len(minilongbench.read_dataset(folder, "hotpotqa")) == 3


def test_run_and_resume(sdtp, folder: Path, options: list, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["recent", "cut-head", "lexical"]
    assert sdtp("minilongbench", *options, "--methods", *methods, "--once", 4) == 0
    rows = read(folder / "run")
    assert len(rows) == 4 * (1 + 2 + 1 + 2)  # prompts short enough; dense, two schedules, one, two
    assert {(row["kind"], row["number"]) for row in rows} == {
        ("hotpotqa", "0"), ("hotpotqa", "1"), ("lcc", "0"), ("trec", "0"),
    }  # fmt: skip
    for row in rows:
        prompt = FILES[row["kind"]][int(row["number"])]["origin_prompt"]
        chat = len("[user] \n[assistant]") if row["kind"] == "hotpotqa" else 0
        assert row["prompt_tokens"] == len(prompt) + chat  # tokens are bytes: all of it
        expected = 1.0 if row["method"] == "dense" else PruningSchedule((4, 7), 0.8).mean_keep(row["prompt_tokens"], 8)
        assert row["mean_keep"] == pytest.approx(expected, abs=0.003)
        assert row["tokens"] == compare.ANY_LENGTH
    out = capsys.readouterr().out
    assert "minilongbench text, question inside" in out
    assert "exact minus dense" in out
    (record,) = (folder / "run" / "runs.jsonl").read_text().splitlines()
    assert json.loads(record)["tasks"] == list(FILES)

    # Means over prompts, code apart, with paired intervals.
    summary = [json.loads(line) for line in (folder / "run" / "rows.jsonl").read_text().splitlines()]
    found = {(row["task"], row["method"], row["schedule"]): row for row in summary}
    text, code = (found[f"minilongbench {kind}", "recent", "0.8 @4,7"] for kind in ("text", "code"))
    assert (text["n"], code["n"]) == (3, 1)
    differences = [
        a["exact"] - b["exact"]
        for a in rows if (a["method"], a["schedule"]) == ("recent", "0.8 @4,7") and a["kind"] != "lcc"
        for b in rows if b["method"] == "dense" and b["id"] == a["id"]
    ]  # fmt: skip
    assert text["minus"]["dense"]["exact"] == compare.bootstrap(differences)._asdict()
    assert ("minilongbench hotpotqa", "dense", "dense") in found

    # A second run computes what is new alone.
    assert sdtp("minilongbench", *options, "--methods", "recent", "norm") == 0
    assert read(folder / "run")[: len(rows)] == rows
    assert len(read(folder / "run")) == len(rows) + 4


def test_worst_prompts_first(capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, method: str, exact: float) -> dict:
        return {"id": name, "kind": name, "number": "3", "method": method, "schedule": "s", "exact": exact}

    rows = [row("lcc", "dense", 0.5), row("trec", "dense", 1.0)]
    rows += [row("lcc", "a", 0.3), row("lcc", "b", 0.41), row("trec", "a", 0.2), row("trec", "b", 1.0)]
    minilongbench.print_losses(rows)
    assert capsys.readouterr().out.splitlines() == [
        "2 answers of 6 lose more than 10 points to the dense model's:",
        " -80.0  trec 3, a, s",
        " -20.0  lcc 3, a, s",
    ]


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("hotpotqa", [FILES["hotpotqa"][0], entry(FILES["hotpotqa"][1]["origin_prompt"], ["a lake"])]),
        ("hotpotqa", [*FILES["hotpotqa"][:2], entry(PASSAGE * 59, ["a river", "a wood"])]),
        ("trec", [entry(FILES["trec"][0]["origin_prompt"], {"answers": ["Human"], "all_classes": ["Date"]})]),
        ("lcc", [entry(FILES["lcc"][0]["origin_prompt"], "x = 1")]),
    ],
    ids=["a wrong answer", "a prompt cut", "a class missing", "an answer that is no list"],
)
def test_other_prompts_or_gold_answers_get_no_figures(
    sdtp, options: list, folder: Path, name: str, entries: list, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write(folder, name, entries)
    assert sdtp("minilongbench", *options, "--methods", "recent") == 2
    out, err = capsys.readouterr()
    assert f"prompts or gold answers of {name} are not MiniLongBench's" in err
    assert "exact" not in out
    assert not (folder / "run" / "samples.jsonl").exists()


def test_a_truncated_prompt_gets_no_figures(
    sdtp, options: list, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setattr(longbench, "shorten", lambda method, schedule, ids, num_layers: ids[-300:])
    assert sdtp("minilongbench", *options, "--methods", "recent") == 2
    out, err = capsys.readouterr()
    assert "no figures: dense computed B=0." in err
    assert "exact" not in out
    assert read(folder / "run") == []


def test_another_budget_gets_no_figures(
    sdtp, options: list, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setitem(rivals.CUTTERS, "cut-head", lambda ids, num_keep, schedule: torch.arange(num_keep + 9))
    assert sdtp("minilongbench", *options, "--methods", "cut-head") == 2
    out, err = capsys.readouterr()
    assert "no figures: cut-head computed B=" in err
    assert "exact" not in out
    assert {row["method"] for row in read(folder / "run")} == {"dense"}


def test_what_cannot_be_asked_is_refused(
    sdtp, options: list, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (folder / "MiniLongBench_qasper.json").write_text("[1, 2]")
    for changed, message in (
        (["--tasks", "musique"], "no such file. MiniLongBench is not part of this package"),
        (["--tasks", "qasper"], "not a file of MiniLongBench (AttributeError"),
        (["--tasks", "lsht"], "no LongBench dataset 'lsht'"),
        (["--characters", 100], "--characters 100: no prompt of hotpotqa, lcc, trec is so short"),
        (["--characters", 9000], "and the model was made for 2048; ask for shorter ones"),
        (["--methods", "oracle_saliency"], "has to know the answer's tokens"),
    ):
        assert sdtp("minilongbench", *options, *changed) == 2
        assert message in capsys.readouterr().err
