"""LongBench: lm-eval's measures by hand, its prompts, and files that are not what they should be."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from helpers.commands import read

from sdtp_eval import longbench
from sdtp_eval.checkpoints import load_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")


def sample(context: str, question: str = "", answers: tuple[str, ...] = ("yes",), classes: tuple[str, ...] = ()):
    return {"input": question, "context": context, "answers": list(answers), "all_classes": list(classes)}


@pytest.mark.parametrize(
    ("name", "answer", "expected", "score"),
    [
        ("hotpotqa", "The Eiffel Tower!", ("eiffel tower",), 1.0),
        ("hotpotqa", "the old tower", ("eiffel tower", "tower"), 2 / 3),
        ("hotpotqa", "", ("eiffel tower",), 0.0),
        ("triviaqa", "\nParis\nQuestion: and", ("Paris",), 1.0),
        ("gov_report", "a b c d", ("a x c d",), 2 * 3 / 8),
        ("gov_report", "", ("a x c d",), 0.0),
        ("trec", "Human group\nmore", ("group",), 1 / 2),
        ("trec", "group", ("Human group",), 0.0),
        ("passage_count", "There are 7 or 8.", ("7",), 1 / 2),
        ("passage_retrieval_en", "Paragraph 12", ("Paragraph 12",), 1.0),
        ("lcc", "\n# a comment\nreturn x\nnoise", ("return x",), 1.0),
        ("lcc", "retur", ("return x",), 0.77),  # in whole hundredths, as in the benchmark
        # The benchmark compares a line of blanks where it comes first, lm-eval the first line that is not blank.
        ("lcc", "  \nreturn x", ("return x",), 1.0),
    ],
)
def test_measures(name: str, answer: str, expected: tuple[str, ...], score: float) -> None:
    row = sample("c", answers=expected, classes=("Human", "group"))
    assert longbench.judge(longbench.find_dataset(name), answer, row) == pytest.approx(score)


@pytest.mark.parametrize("name", longbench.DATASETS)
def test_prompts_hold_context_and_question_and_cut_the_middle(byte_checkpoint: Path, name: str) -> None:
    tokenizer = load_checkpoint(byte_checkpoint)[1]
    dataset = longbench.find_dataset(name)
    row = sample("first " + "middle " * 400 + "last", "Which {one}?")
    context, question = longbench.build_prompt(tokenizer, dataset, row, 10_000)
    text = tokenizer.decode([*context, *question])
    assert f"{dataset.before}{row['context']}{dataset.after}".replace("{{question}}", "Which {one}?") in text
    assert "{{" not in text
    assert text.startswith("[user]") == dataset.chat
    assert text.endswith("[assistant]") == dataset.chat

    context, question = longbench.build_prompt(tokenizer, dataset, row, 1500)
    assert len(context) + len(question) == 1500
    assert tokenizer.decode(context).endswith("last")
    assert f"{dataset.before}first middle" in tokenizer.decode(context)
    with pytest.raises(ValueError, match="ask for more"):
        longbench.build_prompt(tokenizer, dataset, row, 20)


def test_the_benchmark_asks_examples_and_code_without_a_chat() -> None:
    """In its own ``pred.py``, next to two Chinese datasets."""
    without = {name for name in longbench.DATASETS if not longbench.find_dataset(name).chat}
    assert without == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"}


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.longbench", None)
    longbench.find_dataset.cache_clear()
    with pytest.raises(ImportError, match="those of lm-eval"):
        longbench.find_dataset("lcc")


def test_run_and_resume(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [sample("A passage. " * 30, f"Question {i}?", ("7",)) for i in range(2)]
    (tmp_path / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", tmp_path, "--out", tmp_path / "run", "--tokens", 700, "--methods", "recent", "--keep", 0.8]
    options += ["--protocols", "inside", "after"]
    assert sdtp("longbench", *options, "--tasks", "hotpotqa") == 0
    results = read(tmp_path / "run")
    assert len(results) == 2 * 2 * 2
    assert {row["task"] for row in results} == {"longbench hotpotqa"}
    assert sdtp("longbench", *options, "--tasks", "hotpotqa") == 0
    assert read(tmp_path / "run") == results
    capsys.readouterr()

    (tmp_path / "qasper.jsonl").write_text(json.dumps({**rows[0], "context": ""}) + "\n")
    (tmp_path / "trec.jsonl").write_text("no json\n")
    for name, message in (
        ("musique", "no such file. LongBench is not part of this package"),
        ("qasper", "line 1: no context"),
        ("trec", "line 1: not JSON"),
        ("dureader", "no LongBench dataset 'dureader'"),
    ):
        assert sdtp("longbench", *options, "--tasks", name) == 2
        assert message in capsys.readouterr().err
    assert sdtp("longbench", *options, "--tasks", "hotpotqa", "--methods", "oracle_saliency") == 2
    assert "has to know the answer's tokens" in capsys.readouterr().err
