"""The adapter of lm-eval on a tiny model: what it scores is never pruned, and RULER runs on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from test_demo import one_thread  # noqa: F401 - fixture
from test_eval_quality import read, sdtp  # noqa: F401 - a fixture

from sdtp_kernels import PruningSchedule, apply_sdtp

pytest.importorskip("lm_eval", reason="the extra 'ruler' is not installed")

from lm_eval.api.instance import Instance

from sdtp_eval import rivals, ruler
from sdtp_eval.checkpoints import load_checkpoint
from sdtp_eval.lm_eval_adapter import SdtpLM

if TYPE_CHECKING:
    from pathlib import Path

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
    question = "\nWhich animal jumps?"

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
        after = answers(split=ruler.split_last_line)
        assert after == greedy(rest, model(torch.tensor([context]), logits_to_keep=1).cache)
        assert answers(until=[whole[1]]) == whole.split(whole[1])[0]
    assert answers() == greedy([*context, *rest])


def test_refuses_what_it_cannot_answer(tiny) -> None:
    adapter = SdtpLM(*tiny, progress=False)
    with pytest.raises(NotImplementedError, match="sdtp eval run"):
        adapter.loglikelihood_rolling([request("loglikelihood_rolling", "text")])
    with pytest.raises(NotImplementedError, match="greedy"):
        adapter.generate_until([request("generate_until", "text", {"do_sample": True})])


def test_split_last_line() -> None:
    assert ruler.split_last_line("a\nb\nWhat is c? It is") == ("a\nb", "\nWhat is c? It is")


@pytest.mark.slow
def test_ruler_runs_offline_and_resumes(
    sdtp,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    options = [
        "--out",
        out,
        "--tasks",
        "niah_single_1",
        "--methods",
        "recent",
        "cut-head",
        "--keep",
        0.9,
        "--samples",
        2,
    ]
    options += ["--tokens", 700, "--new-tokens", 4]
    assert sdtp("ruler", *options) == 0
    rows = read(out)
    assert len(rows) == 2 * 3 * 2  # samples, methods with dense, protocols
    for row in rows:
        assert row["task"] == "ruler niah_single_1"
        assert row["exact"] in (0.0, 1.0)
        assert 200 < row["prompt_tokens"] <= 750
        if row["method"] == "recent":
            assert row["mean_keep"] == pytest.approx(PruningSchedule((4, 7), 0.9).mean_keep(row["prompt_tokens"], 8))
        if row["method"] == "cut-head":
            schedule = PruningSchedule((4, 7), 0.9)
            assert row["mean_keep"] == pytest.approx(schedule.mean_keep(row["prompt_tokens"], 8), abs=0.002)
    ids = [{row["id"] for row in rows if row["method"] == method} for method in ("dense", "recent")]
    assert ids[0] == ids[1]  # paired
    assert len(ids[0]) == 2
    capsys.readouterr()
    assert sdtp("ruler", *options) == 0
    assert read(out) == rows
    (record,) = (out / "runs.jsonl").read_text().splitlines()  # the second run had nothing to do
    assert json.loads(record)["tasks"] == ["niah_single_1"]
    assert sdtp("ruler", *options, "--tasks", "niah_singel_1") == 2
    streams = capsys.readouterr()
    assert "no RULER task 'niah_singel_1'" in streams.err
    assert "ruler niah_single_1, 700 tokens, question after" in streams.out


@pytest.mark.slow
def test_ruler_refuses_another_budget(
    sdtp,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(rivals.CUTTERS, "cut-head", lambda ids, num_keep, schedule: torch.arange(num_keep + 9))
    options = ["--out", tmp_path / "run", "--tasks", "niah_single_1", "--methods", "cut-head", "--keep", 0.9]
    assert sdtp("ruler", *options, "--samples", 1, "--tokens", 700, "--new-tokens", 2, "--protocols", "inside") == 2
    streams = capsys.readouterr()
    assert "no figures: cut-head computed B=" in streams.err
    assert "exact" not in streams.out
