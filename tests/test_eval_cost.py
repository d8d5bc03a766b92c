"""``sdtp eval cost``: the scoring that is timed is that of a stage, and nothing else is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from sdtp_eval import baselines, cost
from sdtp_eval.methods import Method
from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp, save_pruners

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_layer_and_stage_is_timed(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruner, out = tmp_path / "best.safetensors", tmp_path / "rows.jsonl"
    save_pruners({layer: TokenPruner(32, distance=True, attention=True, pooling=7) for layer in (4, 7)}, pruner)
    options = ["--methods", pruner, "recent", "--tokens", 300, "--runs", 2, "--json", out]
    assert sdtp("cost", *options) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"].split("@")[0] for row in rows] == ["best", "recent"]
    for row in rows:
        assert len(row["scoring_s_all"]) % 2 == 0  # two runs
        assert len(row["layer_s_all"]) % 2 == 0
        assert len(row["layer_s_all"]) > len(row["scoring_s_all"]) > 0
        assert min(row["layer_s"], row["scoring_s"]) > 0
    assert len(rows[0]["scoring_s_all"]) == 4  # of two stages
    assert "scoring / layer" in capsys.readouterr().out


@torch.no_grad()
def test_what_is_timed_is_the_score(tiny_model) -> None:
    pruners = {layer: TokenPruner(64, distance=True, attention=True, rms_eps=0.5, averaging=True) for layer in (2, 4)}
    for pruner in pruners.values():
        pruner.distance_bias.uniform_()
        pruner.attention_weight.fill_(0.7)
    timed = cost._scorers(Method("pruner", pruners), tuple(pruners), tiny_model, "auto")
    seen, mlp = [], []

    def compare(layer: int):
        def score(stage):
            scores, pruner = timed[layer](stage), pruners[layer]
            mlp.append(pruner(stage.hidden_states))
            alone = baselines.pruner_score(pruner, stage)
            seen.append((scores, alone - mlp[-1] + torch.stack(mlp).mean(0)))
            return scores

        return score

    patched = apply_sdtp(tiny_model, {layer: compare(layer) for layer in pruners}, PruningSchedule((2, 4), 1 - 1e-8))
    with patched:
        for _ in range(2):  # the second prompt is another one
            tiny_model(torch.randint(1, 256, (1, 100)), logits_to_keep=1)
            mlp.clear()
    assert len(seen) == 4
    for got, expected in seen:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_refusals(sdtp, capsys: pytest.CaptureFixture[str]) -> None:
    assert sdtp("cost", "--runs", 0) == 2
    assert "--runs 0: expected at least 1" in capsys.readouterr().err
    assert sdtp("cost", "--methods", "oracle_saliency") == 2
    assert "an oracle has to know" in capsys.readouterr().err
