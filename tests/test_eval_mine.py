"""``sdtp eval mine``: one's own prompts, the worst first."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch

from sdtp_eval.checkpoints import load_checkpoint
from sdtp_eval.reader import greedy
from sdtp_kernels import apply_sdtp, cli


@pytest.fixture
def sdtp(byte_checkpoint, monkeypatch):
    """Runs ``sdtp eval mine`` on the tiny checkpoint and returns its status."""
    point = metadata.EntryPoint("eval", "sdtp_eval.quality:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"eval": point})
    return lambda *options: cli.main(["eval", "mine", *map(str, options), "--model", str(byte_checkpoint)])


def prompts_file(tmp_path, *records):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_the_worst_prompt_stands_first(sdtp, byte_checkpoint, tmp_path, capsys):
    long = "The quick brown fox jumps over the lazy dog. " * 8
    records = [
        {"prompt": "short"},  # too short to be pruned
        {"prompt": long},
        {"messages": [{"role": "user", "content": long + "[bold]Why?"}]},
    ]
    out = tmp_path / "rows.jsonl"
    assert (
        sdtp(prompts_file(tmp_path, *records), "--methods", "norm", "--keep", 0.5, "--new-tokens", 6, "--out", out) == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    by_line = {row["line"]: row for row in rows}
    assert sorted(by_line) == [1, 2, 3]
    assert by_line[1]["same_answer"]
    assert by_line[1]["kl"] == 0
    assert by_line[2]["kl"] > 0
    model, tokenizer = load_checkpoint(byte_checkpoint)
    ids = tokenizer(long).input_ids
    assert by_line[2]["tokens"] == len(ids)
    with torch.no_grad(), apply_sdtp(model, "norm", 0.5):
        pruned = greedy(model, ids, [], 6)
    assert by_line[2]["pruned_answer"] == tokenizer.decode(pruned, skip_special_tokens=True).strip()
    assert by_line[3]["tokens"] == len(f"[user] {long}[bold]Why?\n[assistant]")
    printed = capsys.readouterr().out
    assert "answers are the same, token by token" in printed
    assert printed.index(f"{rows[0]['kl']:.3f}") <= printed.rindex(f"{rows[-1]['kl']:.3f}")


def test_cutters_answer_from_the_short_prompt(sdtp, byte_checkpoint, tmp_path):
    long, out = "The quick brown fox jumps over the lazy dog. " * 8, tmp_path / "rows.jsonl"
    options = ["--methods", "cut-head", "--keep", 0.5, "--new-tokens", 6, "--out", out]
    assert sdtp(prompts_file(tmp_path, {"prompt": long}), *options) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    model, tokenizer = load_checkpoint(byte_checkpoint)
    ids = tokenizer(long).input_ids
    kept = round(row["mean_keep"] * len(ids))
    assert 0.5 < row["mean_keep"] < 0.8
    with torch.no_grad():
        expected = greedy(model, [*ids[:4], *ids[len(ids) - kept + 4 :]], [], 6)
    assert row["pruned_answer"] == tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "no prompt"}], "prompts.jsonl:1: expected"),
        ([{"prompt": "fine"}, ["no object"]], "prompts.jsonl:2: expected"),
        ([{"prompt": ""}], "prompts.jsonl:1: an empty prompt"),
    ],
)
def test_mistakes_get_answers_and_nothing_is_written(sdtp, tmp_path, capsys, records, message):
    out = tmp_path / "rows.jsonl"
    assert sdtp(prompts_file(tmp_path, *records), "--out", out) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_wrong_options(sdtp, tmp_path, capsys):
    path = prompts_file(tmp_path, {"prompt": "x" * 100})
    for options, message in (
        (("--new-tokens", 0), "--new-tokens 0: expected at least 1"),
        (("--out", tmp_path / "nowhere/rows"), "there is no such directory"),
        (("--methods", "oracle_saliency"), "an oracle has to know"),
    ):
        assert sdtp(path, *options) == 2
        assert message in capsys.readouterr().err
    assert sdtp(tmp_path / "missing.jsonl") == 2
    assert "cannot be read" in capsys.readouterr().err
