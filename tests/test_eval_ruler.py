"""The adapter of lm-eval on a tiny model: what it scores is never pruned, and RULER runs on it."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.commands import read

from sdtp_kernels import PruningSchedule, apply_sdtp

pytest.importorskip("lm_eval", reason="the extra 'ruler' is not installed")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from sdtp_eval import compare, rivals, ruler
from sdtp_eval.checkpoints import load_checkpoint
from sdtp_eval.lm_eval_adapter import SdtpLM

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULE = PruningSchedule(layers=(4, 7), keep_ratio=0.7)
CONTEXT = "The quick brown fox jumps over the lazy dog. " * 4


@pytest.fixture(scope="module")
def tiny(byte_checkpoint: Path):
    return load_checkpoint(byte_checkpoint)


def request(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@torch.no_grad()
def test_loglikelihood_is_that_of_the_continuation_behind_the_pruned_context(tiny) -> None:
    model, tokenizer = tiny
    adapter = SdtpLM(model, tokenizer, progress=False)
    context, continuation = (tokenizer(text).input_ids for text in (CONTEXT.rstrip(), " Then it slept."))
    with apply_sdtp(model, "norm", SCHEDULE):
        ((total, is_greedy),) = adapter.loglikelihood([request("loglikelihood", CONTEXT, "Then it slept.")])
        cache = model(torch.tensor([context]), logits_to_keep=1)
        first = cache.logits[0, -1:]
        rest = model(torch.tensor([continuation[:-1]]), cache=cache.cache).logits[0]
    logits = torch.cat([first, rest]).log_softmax(-1)
    expected = logits.gather(1, torch.tensor(continuation)[:, None]).sum().item()
    assert total == pytest.approx(expected, abs=1e-3)
    assert is_greedy is False
    ((dense, _),) = adapter.loglikelihood([request("loglikelihood", CONTEXT, "Then it slept.")])
    assert abs(dense - total) > 1e-4
    ((alone, _),) = (
        [(0.0, 0)] if tokenizer.eos_token_id is None else adapter.loglikelihood([request("loglikelihood", "", "Then")])
    )
    assert alone <= 0


@torch.no_grad()
def test_generate_until_prunes_the_context_and_cuts_at_the_stop_string(tiny) -> None:
    model, tokenizer = tiny
    question = "\nWhat jumps?"

    def answers(split=None, **settings):
        adapter = SdtpLM(model, tokenizer, progress=False, split=split, max_new_tokens=6)
        (text,) = adapter.generate_until([request("generate_until", CONTEXT + question, settings)])
        return text

    def greedy(ids, cache=None):
        new = []
        for _ in range(6):
            output = model(torch.tensor([ids]), cache=cache, logits_to_keep=1)
            cache, ids = output.cache, [output.logits[0, -1].argmax().item()]
            new += ids
        return tokenizer.decode(new)

    context, rest = tokenizer(CONTEXT).input_ids, tokenizer(question).input_ids
    with apply_sdtp(model, "norm", SCHEDULE, later_turns=False):
        whole = answers(max_gen_toks=100)
        assert whole == greedy([*context, *rest])
        after = answers(split=ruler.split_question)
        assert after == greedy(rest, model(torch.tensor([context]), logits_to_keep=1).cache)
        assert answers(until=[whole[1]]) == whole.split(whole[1])[0]
    assert answers() == greedy([*context, *rest])


def test_refuses_what_it_cannot_answer(tiny) -> None:
    adapter = SdtpLM(*tiny, progress=False)
    with pytest.raises(NotImplementedError, match="sdtp eval run"):
        adapter.loglikelihood_rolling([request("loglikelihood_rolling", "text")])
    with pytest.raises(NotImplementedError, match="greedy"):
        adapter.generate_until([request("generate_until", "text", {"do_sample": True})])


# ------------------------------------------------------------------------------------------------------- questions

ONE = ["--samples", 1, "--new-tokens", 2, "--methods", "recent", "--keep", 0.9, "--protocols", "inside"]
WORDS = [f"{letter}{'.' if i % 7 == 6 else ''}" for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz" * 40)]


@pytest.fixture
def essays(tmp_path: Path) -> Path:
    """A folder of two essays, whose names do not stand in the order in which they were written."""
    folder = tmp_path / "essays"
    folder.mkdir()
    (folder / "b.txt").write_text("\n".join(WORDS[300:]))
    (folder / "a.txt").write_text(" ".join(WORDS[:300]) + "\n\n")
    (folder / "README.md").write_text("no essay")
    return folder


class WordTokenizer:
    """All that lm-eval asks of a tokenizer; its prompts are long, its tokens few."""

    name_or_path = "words"

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.split())


def make(name: str, samples: int, essays: Path, tokens: int = 1024, longest: int | None = None) -> list[ruler.Question]:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=longest))
    return ruler.make_questions(model, WordTokenizer(), name, tokens, samples, ruler.read_essays(essays))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ruler.TASKS, *ruler.ESSAY_TASKS])
def test_questions_are_the_same_whatever_is_asked_for(name: str, essays: Path) -> None:
    few, more = make(name, 2, essays), make(name, 4, essays)
    assert [question.id for question in more[:2]] == [question.id for question in few]
    assert len({question.id for question in more}) == 4
    for question in more:
        assert set(question.expected) <= ruler.answers_in(name, question.prompt)
        assert len(question.expected) == {"ruler_vt": 5, "ruler_cwe": 10, "ruler_fwe": 3}.get(
            name, 4 if name in ("niah_multivalue", "niah_multiquery") else 1
        )
        assert question.essays == (ruler.read_essays(essays).digest if name in ruler.ESSAY_TASKS else None)
        _, asked = ruler.split_question(question.prompt)
        assert asked.startswith(("\nQuestion: ", "\nWhat "))
        if name in ruler.ESSAY_TASKS:
            hidden = re.sub(r" ?One of the special magic \w+ for .+? is: .+?\.", "", question.prompt)
            assert " ".join(WORDS[:500]) in hidden.replace("\n", " ").replace("  ", " ")
            cut = re.findall(r"(\S+) One of the special magic", question.prompt)
            assert all(before.endswith(".") or before == WORDS[499] for before in cut)  # a needle follows a sentence


def test_answers_are_read_from_the_prompt() -> None:
    def needle(key: str, value: str) -> str:
        return f"One of the special magic numbers for {key} is: {value}."

    hay = " ".join(needle(key, value) for key, value in [("a-b", "1"), ("c", "2"), ("c", "3"), ("d", "4"), ("e", "5")])
    asked = "What are all the special magic numbers for {} mentioned in the provided text?"
    assert ruler.answers_in("niah_single_1", f"{hay}\n{asked.format('a-b')}") == {"1"}
    assert ruler.answers_in("niah_multivalue", f"{hay}\n{asked.format('c')}") == {"2", "3"}
    assert ruler.answers_in("niah_multiquery", f"{hay}\n{asked.format('a-b, d, and e')}") == {"1", "4", "5"}
    assert ruler.answers_in("niah_single_1", hay) == set()  # the question was cut
    chains = "VAR A = 10000 x VAR D = 20000 VAR B = VAR A y. VAR E = VAR D VAR C = VAR B"
    found = ruler.answers_in(
        "ruler_vt", f"{chains}\nQuestion: Find all variables that are assigned the value 10000 in it"
    )
    assert found == {"10000", "A", "B", "C"}
    words = " ".join(f"{i}. {word}" for i, word in enumerate(["ice cream"] * 3 + list("bcdefghij") * 2 + ["rare"], 1))
    assert ruler.answers_in("ruler_cwe", f"Below\n{words}\nQuestion: What?") == {"ice cream", *"bcdefghij"}
    assert ruler.answers_in("ruler_fwe", "... ... ... a a a b b c c d\nQuestion: What?") == {"a", "b", "c"}


def test_split_question() -> None:
    assert ruler.split_question("a\nb\nWhat is c? It is") == ("a\nb", "\nWhat is c? It is")
    assert ruler.split_question("a\nb\nQuestion: c?\n\nAnswer: it") == ("a\nb", "\nQuestion: c?\n\nAnswer: it")


def tamper(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict], dict]) -> None:
    """lm-eval makes other samples."""
    load = TaskManager.load

    def changed(self: TaskManager, names: list[str]) -> dict:
        loaded = load(self, names)
        for task in loaded["tasks"].values():
            task.dataset = {"test": [change(doc) for doc in task.dataset["test"]]}
        return loaded

    monkeypatch.setattr(TaskManager, "load", changed)


def other_needle(doc: dict) -> dict:
    values = re.findall(r" is: (\d+)\.", doc["input"])
    return {**doc, "outputs": [next(value for value in values if value != doc["outputs"][0])]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        other_needle,
        lambda doc: {**doc, "outputs": []},
        lambda doc: {**doc, "input": doc["input"].replace(doc["outputs"][0], "")},
        lambda doc: {**doc, "input": doc["input"].partition("\nWhat ")[0]},
    ],
    ids=["another-needle", "no-answer", "without-needle", "without-question"],
)
def test_wrong_answers_get_no_figures(
    sdtp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict], dict],
) -> None:
    tamper(monkeypatch, change)
    options = ["--out", tmp_path / "run", "--tasks", "niah_multikey_2", "--tokens", 900, *ONE]
    assert sdtp("ruler", *options) == 2
    out, err = capsys.readouterr()
    assert "no figures: niah_multikey_2 at 900 tokens expects [" in err
    assert "exact" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_prompts_that_are_no_measure_of_their_length_get_no_figures(essays: Path) -> None:
    with pytest.raises(ValueError, match=r"has a prompt of 8.., and the model was made for 800"):
        make("niah_single_1", 1, essays, longest=800)
    assert make("niah_single_1", 1, essays, longest=900)
    with pytest.raises(ValueError, match=r"niah_single_2 at 3000 tokens has a prompt of 1...: .* give more essays"):
        make("niah_single_2", 1, essays, tokens=3000)
    with pytest.raises(ValueError, match=r"ruler_vt at 600 tokens: its example takes ... of at most 500"):
        make("ruler_vt", 1, essays, tokens=600)  # lm-eval would not end
    with pytest.raises(ValueError, match=r"--samples 501: lm-eval makes 500 of niah_single_1"):
        make("niah_single_1", 501, essays)


def test_tasks_that_cannot_be_made(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", tmp_path / "run", "--tokens", 700, *ONE, "--tasks", "niah_single_1"]
    assert sdtp("ruler", *options, "niah_single_2", "niah_multiquery") == 2
    err = capsys.readouterr().err
    assert "niah_single_2, niah_multiquery: needles are hidden in essays" in err
    assert "benchmarks/ruler_essays.sh DIR and give --essays DIR" in err
    assert sdtp("ruler", *options, "--essays", tmp_path) == 2
    assert "no *.txt there" in capsys.readouterr().err
    assert sdtp("ruler", *options, "niah_singel_1") == 2
    assert "no RULER task 'niah_singel_1' here" in capsys.readouterr().err
    assert sdtp("ruler", *options, "--skip", 1) == 2
    assert "--skip 1: expected fewer than the 1 of --samples" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ruler_runs_offline_and_resumes(
    sdtp,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    options = ["--out", out, "--tasks", "niah_single_1", "niah_multikey_2"]
    options += ["--keep", 0.9, "--tokens", 700, "--new-tokens", 4, "--methods", "recent", "cut-head"]
    assert sdtp("ruler", *options, "--samples", 2) == 0
    rows = read(out)
    assert len(rows) == 2 * 3 * 2 * 2  # samples, methods with dense, protocols, tasks
    for row in rows:
        assert row["task"] in ("ruler niah_single_1", "ruler niah_multikey_2")
        assert row["exact"] in (0.0, 1.0)
        assert "essays" not in row
        assert 200 < row["prompt_tokens"] <= 750
        if row["method"] == "recent":
            assert row["mean_keep"] == pytest.approx(PruningSchedule((4, 7), 0.9).mean_keep(row["prompt_tokens"], 8))
        if row["method"] == "cut-head":
            schedule = PruningSchedule((4, 7), 0.9)
            assert row["mean_keep"] == pytest.approx(schedule.mean_keep(row["prompt_tokens"], 8), abs=0.002)
    ids = [{row["id"] for row in rows if row["method"] == method} for method in ("dense", "recent")]
    assert ids[0] == ids[1]  # paired
    assert len(ids[0]) == 4
    text = capsys.readouterr().out
    assert "ruler niah_single_1, 700 tokens, question after" in text
    assert "exact minus dense" in text

    assert sdtp("ruler", *options, "--samples", 2) == 0
    assert read(out) == rows
    (record,) = (out / "runs.jsonl").read_text().splitlines()  # the second run had nothing to do
    assert json.loads(record)["tasks"] == ["niah_single_1", "niah_multikey_2"]

    # More samples: those that are missing, and no others.
    assert sdtp("ruler", *options, "--samples", 3, "--protocols", "inside") == 0
    more = read(out)
    assert more[: len(rows)] == rows
    assert len(more) == len(rows) + 3 * 2
    assert len({tuple(row[name] for name in compare.KEY) for row in more}) == len(more)

    # The last sample alone, next to those that chose something.
    alone = tmp_path / "alone"
    changed = ["--out", alone, "--samples", 3, "--skip", 2, "--protocols", "inside"]
    assert sdtp("ruler", *options, *changed) == 0
    assert sorted(row["id"] for row in read(alone)) == sorted(row["id"] for row in more[len(rows) :])

    # The mean over tasks is of what was asked for last, where every task has as many samples.
    summary = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    (mean,) = (row for row in summary if row["task"] == "ruler, mean of 2 tasks" and row["method"] == "recent")
    assert (mean["protocol"], mean["n"]) == ("inside", 6)
    pairs = {row["id"]: row for row in more if row["protocol"] == "inside" and row["method"] == "dense"}
    assert mean["minus"]["dense"]["exact"] == pytest.approx(
        compare.bootstrap(
            [row["exact"] - pairs[row["id"]]["exact"] for row in more
             if row["protocol"] == "inside" and row["method"] == "recent"]
        )._asdict()
    )  # fmt: skip


@pytest.mark.slow
def test_essays_are_recorded_and_not_mixed(
    sdtp,
    tmp_path: Path,
    essays: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    options = ["--out", out, "--tasks", "niah_single_1", "niah_single_2", "--tokens", 1800, *ONE, "--essays", essays]
    assert sdtp("ruler", *options) == 0
    digest = ruler.read_essays(essays).digest
    assert {(row["kind"], row.get("essays")) for row in read(out)} == {
        ("niah_single_1", None), ("niah_single_2", digest),
    }  # fmt: skip
    (essays / "a.txt").write_text(" ".join(WORDS[:301]))
    capsys.readouterr()
    assert sdtp("ruler", *options) == 2
    streams = capsys.readouterr()
    assert f"holds answers to essays of digest {digest}" in streams.err
    assert "exact" not in streams.out


@pytest.mark.slow
def test_default_tasks_are_those_that_can_run(
    sdtp,
    tmp_path: Path,
    essays: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    monkeypatch.setattr(ruler, "make_questions", lambda model, tokenizer, name, *_: made.append(name) or [])
    sdtp("ruler", "--out", tmp_path / "run")
    assert made == list(ruler.TASKS)
    made.clear()
    sdtp("ruler", "--out", tmp_path / "run", "--essays", essays)
    assert made == [*ruler.TASKS, *ruler.ESSAY_TASKS]
    assert len(made) == 11


@pytest.mark.slow
def test_ruler_refuses_another_budget(
    sdtp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(rivals.CUTTERS, "cut-head", lambda ids, num_keep, schedule: torch.arange(num_keep + 9))
    options = ["--out", tmp_path / "run", "--tasks", "niah_single_1", "--tokens", 700, *ONE]
    assert sdtp("ruler", *options, "--methods", "cut-head") == 2
    streams = capsys.readouterr()
    assert "no figures: cut-head computed B=" in streams.err
    assert "exact" not in streams.out


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["inside", "after"])
def test_ruler_refuses_a_prompt_that_was_cut(
    sdtp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    protocol: str,
) -> None:
    encode = SdtpLM._encode
    monkeypatch.setattr(SdtpLM, "_encode", lambda self, text: encode(self, text)[20:])
    options = ["--out", tmp_path / "run", "--tasks", "niah_single_1", "--tokens", 700, *ONE]
    assert sdtp("ruler", *options, "--protocols", protocol) == 2
    streams = capsys.readouterr()
    assert "no figures: dense computed B=0.9" in streams.err
    assert "exact" not in streams.out
