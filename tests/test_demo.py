"""``sdtp demo`` on a tiny model: its numbers agree with the schedule, and every mistake gets an answer."""

from __future__ import annotations

import argparse
import contextlib
import html
import json
import re
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.models import BYTE_MODEL
from transformers import Qwen2Config

from sdtp_eval import demo, texts
from sdtp_eval.checkpoints import DEFAULT_NAME, DEFAULT_PRUNERS, bundled_pruners
from sdtp_eval.flops import prefill_flops, scoring_flops, tokens_per_layer
from sdtp_kernels import KVPredictor, PruningSchedule, TokenPruner, cli, load_pruners, save_pruners
from sdtp_kernels.scorers import attention_score

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, HEADS, KV_HEADS = (BYTE_MODEL[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))


@pytest.fixture
def sdtp(byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs ``sdtp demo`` on the tiny checkpoint and returns its status."""
    point = metadata.EntryPoint("demo", "sdtp_eval.demo:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"demo": point})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*options: object) -> int:
        defaults = {"--model": byte_checkpoint, "--tokens": 900, "--new-tokens": 4, "--rounds": 3}
        given = {str(option) for option in options}
        words = [str(word) for pair in defaults.items() if pair[0] not in given for word in pair]
        return cli.main(["demo", *words, *map(str, options)])

    return run


def test_json_agrees_with_the_schedule(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert sdtp("--keep", 0.8, "--json", path) == 0
    result = json.loads(path.read_text())
    assert result["tokens"] == 900
    assert result["kept_per_stage"] == [720, 576]
    assert result["mean_keep"] == pytest.approx((4 * 900 + 3 * 720 + 576) / (8 * 900))
    row = 2 * KV_HEADS * (HIDDEN // HEADS) * 4
    dense, dropped = result["kinds"]["dense"], result["kinds"]["dropped"]
    assert list(result["kinds"]) == ["dense", "dropped"]
    assert (dense["kv_bytes"], dropped["kv_bytes"]) == (8 * 900 * row, (4 * 900 + 3 * 720 + 576) * row)
    assert len(dense["prefill_s"]) == len(dropped["prefill_s"]) == 3
    assert dropped["speedup"] == pytest.approx(min(dense["prefill_s"]) / min(dropped["prefill_s"]))
    assert (dense["speedup"], dense["ideal"]) == (1, 1)
    assert dropped["ideal"] > 1
    # Where each token went, of the first question's prompt.
    assert len(result["prompt"]) == len(result["dropped_at"]) == 900
    assert [result["dropped_at"].count(layer) for layer in (4, 7, None)] == [180, 144, 576]
    assert result["dropped_at"][:4] == result["dropped_at"][-90:][:4] == [None] * 4
    assert result["scorer"] == "attention"
    assert {"machine", "versions", "settings", "date", "backend"} <= set(result)
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]

    streams = capsys.readouterr()
    for row_name in ("tokens computed", "kept per stage", "speed-up", "ideal", "KV cache", "facts found"):
        assert row_name in streams.out
    assert "720, 576" in streams.out
    assert streams.err.count("dense ") >= 3  # each prefill as it ends
    assert "prefill 1" not in streams.out


def test_facts_are_hidden_and_asked_for(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    assert sdtp("--json", path) == 0
    result = json.loads(path.read_text())
    prompt = "".join(result["prompt"])
    assert len(result["answers"]) == 3
    for answer in result["answers"]:
        assert answer["expected"] in prompt
        assert answer["expected"] not in answer["question"] + answer["opening"]
        assert set(answer["by_kind"]) == {"dense", "dropped"}
    first = result["answers"][0]
    assert prompt.endswith(f"{first['question']}\n[assistant]{first['opening']}")
    printed = capsys.readouterr().out
    assert "0 of 3" in printed  # a random model
    assert f"[not the fact, which is {first['expected']}]" in " ".join(printed.split())


def test_an_answer_is_what_generate_gives(byte_checkpoint: Path) -> None:
    from sdtp_eval.checkpoints import load_checkpoint
    from sdtp_eval.reader import greedy
    from sdtp_kernels import apply_sdtp

    model, _ = load_checkpoint(byte_checkpoint)
    prompt = torch.randint(1, 256, (1, 300)).tolist()[0]
    for patched in (False, True):
        with torch.no_grad(), apply_sdtp(model, "norm", 0.8) if patched else contextlib.nullcontext():
            output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            assert demo._continue(model, output, 9) == greedy(model, prompt, [], 9)


def test_predicted_stands_beside_dropped(sdtp, byte_checkpoint: Path, tmp_path: Path) -> None:
    path, config = tmp_path / "result.json", Qwen2Config.from_pretrained(byte_checkpoint)
    predictor = KVPredictor(
        HIDDEN, KV_HEADS, HIDDEN // HEADS, num_hidden_layers=config.num_hidden_layers, stages=(3, 5)
    )
    pruners = {layer: TokenPruner(HIDDEN) for layer in (3, 5)}
    save_pruners(pruners, tmp_path / "pruners", kv_predictor=predictor)
    assert sdtp("--pruner", tmp_path / "pruners", "--keep", 0.7, "--json", path) == 0
    kinds = json.loads(path.read_text())["kinds"]
    assert list(kinds) == ["dense", "dropped", "predicted"]
    assert kinds["predicted"]["kv_bytes"] == kinds["dense"]["kv_bytes"] > kinds["dropped"]["kv_bytes"]
    assert 1 < kinds["predicted"]["ideal"] < kinds["dropped"]["ideal"]


def test_page(sdtp, tmp_path: Path) -> None:
    page, path = tmp_path / "page.html", tmp_path / "result.json"
    text = tmp_path / "text.txt"
    text.write_text("<b>& so on\n" * 100)
    assert sdtp("--text", text, "--question", "why <i>?", "--html", page, "--json", path) == 0
    result, found = json.loads(path.read_text()), page.read_text()
    assert "<b>&amp;" not in found
    assert "<i>" not in found
    for layer in (4, 7):
        number = result["dropped_at"].count(layer)
        assert found.count(f'<span class="l{layer}" title="dropped before layer {layer}">') == number > 0
        assert f"layer {layer}: {number} tokens" in found
    shown = re.sub(r"<[^>]*>", "", found.split("<pre>")[1].split("</pre>")[0])
    assert html.unescape(shown) == "".join(result["prompt"])
    assert "as dense" in found or "differs from dense" in found


@pytest.mark.parametrize(("slowest", "is_busy"), [(1.6, True), (1.4, False)])
def test_a_busy_machine_is_named(sdtp, tmp_path: Path, capsys, slowest: float, is_busy: bool) -> None:
    assert sdtp("--json", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    for facts in result["kinds"].values():
        facts["prefill_s"] = [1.0, 1.0, slowest]
    capsys.readouterr()
    demo._print(result)
    assert ("This machine was busy" in capsys.readouterr().out) == is_busy


@pytest.mark.parametrize("scorer", ["random", "recent", "norm", "attention"])
def test_scorers_and_block_budget(sdtp, tmp_path: Path, scorer: str) -> None:
    path = tmp_path / "result.json"
    blocks = ("--budget", "block", "--block-size", 64)
    assert sdtp("--scorer", scorer, *blocks, "--backend", "reference", "--json", path) == 0
    result = json.loads(path.read_text())
    schedule = PruningSchedule(layers=(4, 7), keep_ratio=0.9, budget="block", block_size=64)
    assert result["kept_per_stage"] == [schedule.num_keep(900, s) for s in (1, 2)]
    assert result["backend"] == "reference"


def test_the_pruners_that_come_along_fit_the_default_model() -> None:
    stack = load_pruners(bundled_pruners()[DEFAULT_PRUNERS])
    assert (stack.header.hidden_size, stack.header.num_hidden_layers) == (576, 30)
    assert sorted(stack) == list(range(4, 30, 3))
    assert stack.header.training["saliency"]["model"]["name"] == DEFAULT_NAME
    args = argparse.Namespace(
        pruner=None, scorer=None, model=None, keep=0.9, shape="even", budget="global", block_size=512
    )
    assert demo._method(args, None)[0].header == stack.header
    args.scorer = "recent"
    assert demo._method(args, argparse.Namespace(num_hidden_layers=30))[0] == "recent"


def test_pruner_file(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fits, other = tmp_path / "fits.safetensors", tmp_path / "other.safetensors"
    save_pruners({3: TokenPruner(HIDDEN), 5: TokenPruner(HIDDEN)}, fits)
    save_pruners({3: TokenPruner(64)}, other)
    assert sdtp("--pruner", fits, "--json", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["layers"] == [3, 5]
    assert result["kept_per_stage"] == [810, 729]
    capsys.readouterr()
    assert sdtp("--pruner", other) == 2
    assert "64" in capsys.readouterr().err
    other.write_bytes(fits.read_bytes()[:100])
    assert sdtp("--pruner", other) == 2
    assert "safetensors" in capsys.readouterr().err


def test_text_file_and_its_end(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Straße and so on. " * 10, encoding="utf-8")
    assert sdtp("--text", text, "--question", "why?", "--json", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    size = len(text.read_bytes()) + len("[user] \n\nwhy?\n[assistant]")
    assert result["tokens"] == size
    assert "the text has only 190 tokens" in result["notes"][0]
    assert "the text has only 190 tokens" in " ".join(capsys.readouterr().out.split())


def test_short_prompt_runs_unpruned_and_says_so(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdtp("--tokens", 50, "--question", "why?", "--json", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kept_per_stage"] == []
    assert "shorter than min_prompt" in result["note"]
    dense, dropped = result["kinds"].values()
    assert dropped["ideal"] == 1.0
    assert dense["kv_bytes"] == dropped["kv_bytes"]
    assert result["answers"][0]["by_kind"]["dense"] == result["answers"][0]["by_kind"]["dropped"]
    assert "shorter than min_prompt" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep", 1.5), "keep_ratio=1.5"),
        (("--keep", "nan"), "keep_ratio=nan"),
        (("--keep", 0), "keep_ratio=0"),
        (("--scorer", "magic"), "known: random, recent, norm, attention"),
        (("--backend", "magic"), "backend='magic' does not exist"),
        (("--tokens", 30), "ask for more"),
        (("--tokens", -1), "--tokens -1"),
        (("--rounds", 0), "at least 1"),
        (("--new-tokens", 0), "at least 1"),
        (("--text", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("--pruner", "nowhere.safetensors"), "no such pruner file"),
        (("--model", "nowhere/at/all"), "no checkpoint"),
        (("--model", "some.gguf"), "sdtp import-gguf"),
        (("--json", "nowhere/result.json"), "no such directory"),
        (("--html", "nowhere/page.html"), "no such directory"),
    ],
)
def test_mistakes_get_one_message(
    sdtp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sdtp(*options) == 2
    streams = capsys.readouterr()
    assert message in streams.err
    assert "Traceback" not in streams.err
    assert streams.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(sdtp, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdtp("--device", "cuda") == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_no_figures_from_a_wrong_model(
    sdtp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "KEEP_ALL", 0.5)  # so that the check meets a model that lost tokens
    assert sdtp("--json", tmp_path / "result.json") == 2
    streams = capsys.readouterr()
    assert "no figures" in streams.err
    assert streams.out == ""
    assert list(tmp_path.iterdir()) == []


def test_prompt_has_the_asked_length_and_ends_with_the_question(byte_checkpoint: Path) -> None:
    from sdtp_eval.checkpoints import load_checkpoint

    _, tokenizer = load_checkpoint(byte_checkpoint)
    prompt, notes = texts.build_prompt(tokenizer, texts.language_reference(), "Why?", 321)
    assert (len(prompt), notes) == (321, [])
    assert tokenizer.decode(prompt).startswith("[user] " + texts.language_reference()[:100])
    assert tokenizer.decode(prompt).endswith("\n\nWhy?\n[assistant]")
    tokenizer.chat_template = None
    prompt, _ = texts.build_prompt(tokenizer, texts.language_reference(), "Why?", 321)
    assert len(prompt) == 321
    assert tokenizer.decode(prompt).endswith("\n\nWhy?")


def test_built_in_text_is_long_and_fixed() -> None:
    text = texts.language_reference()
    assert len(text) > 300_000
    assert text == texts.language_reference()


@pytest.mark.parametrize(("content", "message"), [(b"", "holds no text"), (b"\xff\xfe", "not UTF-8")])
def test_unreadable_texts(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts.read_text(tmp_path / "text")


def test_flops_by_hand() -> None:
    config = Qwen2Config(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    # A layer's weights: q 8*8, k 8*4, v 8*4, o 8*8, three of 8*12: 480. Attention of 10 tokens: Q K^T over the
    # lower half of 10*10, 2*4*2 operations a pair and the same for P V: 10*10/2 * 16 * 2 = 1600. Head: 2*8*100.
    assert prefill_flops(config, [10]) == 2 * 480 * 10 + 1600 + 1600
    assert prefill_flops(config, [10, 5]) == (9600 + 1600) + (4800 + 400) + 1600

    schedule = PruningSchedule(layers=(1, 2), keep_ratio=0.5, sink=0, recent=0.0, min_prompt=1)
    assert tokens_per_layer(schedule, 100, 3) == [100, 50, 25]
    pruners = {1: TokenPruner(8, 3), 2: TokenPruner(8, 3)}
    # 2*8*3 for w1 and 2*3 for w2 a token, on the 100 and then 50 tokens that the stages see.
    assert scoring_flops(config, schedule, 100, pruners) == (48 + 6) * 150
    # Queries 8*8 for the window of 32, logits 32 * n * 4 heads * 2; the keys are in the cache.
    attention = sum(2 * (32 * 64 + 32 * n * 8) for n in (100, 50))
    assert scoring_flops(config, schedule, 100, "attention") == attention
    # As a term of a pruner: the last 16 queries.
    both = {layer: TokenPruner(8, 3, attention=True) for layer in (1, 2)}
    assert scoring_flops(config, schedule, 100, both) == (48 + 6) * 150 + attention // 2
    # Blocks do not see the prompt's end: there a pruner scores by its MLP alone.
    blocks = PruningSchedule(layers=(1, 2), keep_ratio=0.5, sink=0, budget="block", block_size=40, min_prompt=1)
    assert scoring_flops(config, blocks, 100, both) == (48 + 6) * (100 + 2 * 20 + 20)
    assert scoring_flops(config, schedule, 100, attention_score) == attention
    assert scoring_flops(config, schedule, 100, "recent") == 0
    short = PruningSchedule(layers=(1, 2), keep_ratio=0.5, min_prompt=101)
    assert scoring_flops(config, short, 100, pruners) == 0
    assert tokens_per_layer(short, 100, 3) == [100, 100, 100]
