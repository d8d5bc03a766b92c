"""Rivals: cutters of the prompt, and one drop at a layer, at the same B."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.commands import read
from test_eval_quality import SCHEDULE

from sdtp_eval import methods, rivals, schedules
from sdtp_eval.methods import Method, find_method
from sdtp_eval.paired import GateError
from sdtp_eval.reader import Reader, greedy
from sdtp_eval.tasks import AFTER, INSIDE, Sample
from sdtp_kernels import PruningSchedule, TokenPruner, save_pruners

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

CUTTERS = tuple(rivals.CUTTERS)


@pytest.fixture(scope="module")
def sample() -> Sample:
    """400 tokens of context, 70 of question, 8 of answer; of many words, so that few are shared by chance."""
    ids = torch.randint(1, 256, (478,), generator=torch.Generator().manual_seed(5)).tolist()
    return Sample("passkey", "some", tuple(ids[:400]), tuple(ids[400:470]), tuple(ids[470:]))


# ---------------------------------------------------------------------------------------------------------- cutters


@pytest.mark.parametrize("protocol", [INSIDE, AFTER])
@pytest.mark.parametrize("name", CUTTERS)
@torch.no_grad()
def test_a_cutter_is_the_dense_model_on_less(tiny_model, sample: Sample, name: str, protocol: str) -> None:
    length = sample.prompt_length(protocol)
    prompt, rest = torch.tensor(sample.ids[:length]), torch.tensor(sample.ids[length:], dtype=torch.int64)
    num_keep = round(SCHEDULE.mean_keep(length, 6) * length)
    kept = rivals.CUTTERS[name](prompt, num_keep, SCHEDULE)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == num_keep
    reader, method = Reader(tiny_model, sample), find_method(name)
    result = reader.result(protocol, method, SCHEDULE)
    short = torch.cat([prompt[kept], rest])
    logits = tiny_model(short[None]).logits[0, -8:].log_softmax(-1)
    expected = -logits.gather(1, torch.tensor(sample.answer)[:, None]).mean().item()
    assert result["nll"] == pytest.approx(expected, abs=1e-4)
    assert result["mean_keep"] == num_keep / length
    assert result["prompt_tokens"] == length
    assert result["seconds"] > 0
    question = [] if protocol == INSIDE else list(sample.question)
    answer = greedy(tiny_model, prompt[kept].tolist(), question, 16)
    assert reader.greedy(protocol, method, SCHEDULE) == answer


def test_what_the_cutters_keep() -> None:
    ids, schedule = torch.arange(1000) % 7, PruningSchedule((2,), 0.5, sink=4, recent=0.1)
    assert rivals.cut_middle(ids, 301, schedule).tolist() == [*range(150), *range(849, 1000)]
    assert rivals.cut_head(ids, 300, schedule).tolist() == [0, 1, 2, 3, *range(704, 1000)]
    ids = torch.arange(1000)
    ids[[600, 999]] = 5000  # shared with the question: 16 tokens before, 48 after
    kept = rivals.cut_lexical(ids, 4 + 100 + 65 + 10, schedule).tolist()
    # What is protected, what stands around that word, and of equal tokens the first.
    assert kept == [*range(14), *range(584, 649), *range(900, 1000)]


def test_a_cutter_has_the_budget_of_its_schedule(tiny_model, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rivals.CUTTERS, "cut-head", lambda ids, num_keep, schedule: torch.arange(num_keep + 5))
    with torch.no_grad(), pytest.raises(GateError, match="no figures: cut-head computed B="):
        Reader(tiny_model, sample).result(INSIDE, find_method("cut-head"), SCHEDULE)


# ------------------------------------------------------------------------------------------------------ drop at once


def arguments(*options: str):
    parser = argparse.ArgumentParser()
    schedules.add_options(parser)
    methods.add_dropped_kv_options(parser)
    return parser.parse_args(options)


def test_a_single_drop_has_the_budget_of_the_schedule() -> None:
    args = arguments("--keep", "0.9", "--layers", "4:3", "--once", "8", "10")
    entries = {label: schedule for _, label, schedule in methods.plan(args, [Method("any", "norm")], 30, 1024)[1:]}
    assert list(entries) == ["0.9 @4:3", "0.9 @4:3 once 8", "0.9 @4:3 once 10"]
    budget = entries["0.9 @4:3"].mean_keep(1024, 30)
    for layer in (8, 10):
        once = entries[f"0.9 @4:3 once {layer}"]
        assert once.layers == (layer,)
        assert once.mean_keep(1024, 30) == pytest.approx(budget, abs=0.002)
    # Whatever has no stages has but the one budget.
    assert len(methods.plan(args, [find_method("cut-head")], 30, 1024)) == 2
    with pytest.raises(ValueError, match=r"--once 25, for '0.9 @4:3': B .* begin to prune earlier"):
        methods.plan(arguments("--keep", "0.9", "--once", "25"), [Method("any", "norm")], 30, 1024)
    with pytest.raises(ValueError, match=r"--once 8: file has pruners for the layers \(4, 7\) alone"):
        methods.plan(args, [Method("file", {}, layers=(4, 7))], 30, 1024)


# ------------------------------------------------------------------------------------------------------------- runs


def test_rivals_run_side_by_side(sdtp, tmp_path: Path) -> None:
    pruner = tmp_path / "best.safetensors"
    save_pruners({layer: TokenPruner(32) for layer in (4, 7)}, pruner)
    names = ["lexical", *CUTTERS, pruner]
    options = ["--out", tmp_path / "run", "--tasks", "nll", "passkey", "--tokens", 400, "--samples", 1]
    options += ["--continuation", 16, "--greedy", "--keep", 0.8, "--once", 4, "--methods", *names]
    assert sdtp("run", *options) == 0
    rows = read(tmp_path / "run")
    assert {row["schedule"] for row in rows} == {"dense", "0.8 @4,7", "0.8 @4,7 once 4"}
    for row in rows:
        schedule = PruningSchedule((4, 7), 0.8)
        if row["method"] != "dense":
            assert row["mean_keep"] == pytest.approx(schedule.mean_keep(row["prompt_tokens"], 8), abs=0.003)
            assert row["seconds"] > 0
            assert ("greedy" in row) == (row["task"] == "passkey")


def test_an_answer_by_an_adapter_is_from_the_short_prompt(tiny_model, sample: Sample) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'ruler' is not installed")
    from lm_eval.api.instance import Instance

    from sdtp_eval.lm_eval_adapter import SdtpLM

    class Tokenizer:
        """Words are numbers."""

        def __call__(self, text: str, **_: object):
            return argparse.Namespace(input_ids=[int(word) for word in text.split()])

        def decode(self, ids: list[int], **_: object) -> str:
            return " ".join(map(str, ids))

    text = " ".join(map(str, sample.context))
    shorten = functools.partial(methods.shorten, find_method("cut-middle"), SCHEDULE, num_layers=6)
    adapter = SdtpLM(tiny_model, Tokenizer(), shorten=shorten, progress=False)
    kept = shorten(list(sample.context))
    with torch.no_grad():
        assert adapter.answer(text, 6) == " ".join(map(str, greedy(tiny_model, kept, [], 6)))
        ((total, _),) = adapter.loglikelihood([Instance("loglikelihood", {}, (text, " 9 7"), 0)])
        logits = tiny_model(torch.tensor([[*kept, 9]])).logits[0, -2:].log_softmax(-1)
    assert total == pytest.approx((logits[0, 9] + logits[1, 7]).item(), abs=1e-3)


def test_what_cannot_be_done_is_refused(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", tmp_path / "run", "--tokens", 300, "--samples", 1]
    assert sdtp("run", *options, "--tasks", "ranks", "--methods", "cut-head") == 2
    assert "cut-head: no scores of stages to compare: leave out the task ranks" in capsys.readouterr().err
    assert sdtp("cost", "--methods", "cut-head") == 2
    assert "cut-head: the prompt has to be cut" in capsys.readouterr().err
    with pytest.raises(ValueError, match="an oracle has to know the answer's tokens; this command cannot"):
        methods.find_methods(["oracle_saliency"], methods.FROM_PROMPTS)
