"""``sdtp eval run`` and ``compare``: right numbers for the right tokens, once each."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from helpers.commands import read
from helpers.models import make_model, make_qwen2
from helpers.oracle import MaskedDense
from transformers import DynamicCache

from sdtp_eval import baselines, compare, parallel, schedules
from sdtp_eval.checkpoints import identify
from sdtp_eval.methods import Method, find_method
from sdtp_eval.reader import Reader
from sdtp_eval.tasks import AFTER, INSIDE, Sample
from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp, front_loaded, save_pruners

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (2, 4)
SCHEDULE = PruningSchedule(layers=LAYERS, keep_ratio=0.7)


@pytest.fixture(scope="module")
def sample() -> Sample:
    ids = torch.randint(1, 256, (138,), generator=torch.Generator().manual_seed(3)).tolist()
    return Sample("passkey", "some", tuple(ids[:120]), tuple(ids[120:130]), tuple(ids[130:]))


# ---------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("protocol", [INSIDE, AFTER])
@torch.no_grad()
def test_result_equals_the_masked_dense_model(tiny_model, sample: Sample, protocol: str) -> None:
    pruners = {layer: TokenPruner(64) for layer in LAYERS}
    reader = Reader(tiny_model, sample)
    result = reader.result(protocol, Method("pruner", pruners), SCHEDULE)
    length = 130 if protocol == INSIDE else 120
    logits, _ = MaskedDense.of(tiny_model, pruners, SCHEDULE, length).row(torch.tensor(sample.ids), length)
    answer = torch.tensor(sample.answer)
    dense = tiny_model(torch.tensor([sample.ids])).logits[0, -8:].log_softmax(-1)
    pruned = logits[-8:].log_softmax(-1)
    assert result["nll"] == pytest.approx(F.cross_entropy(logits[-8:], answer).item(), abs=1e-4)
    assert result["nll_increase"] == pytest.approx(result["nll"] - F.nll_loss(dense, answer).item(), abs=1e-4)
    assert result["kl"] == pytest.approx(F.kl_div(pruned, dense, log_target=True, reduction="sum").item() / 8, abs=1e-4)
    assert result["prompt_tokens"] == length


@pytest.mark.parametrize("budget", ["global", "block"])
@torch.no_grad()
def test_mean_keep_is_that_of_the_cache(tiny_model, sample: Sample, budget: str) -> None:
    schedule = PruningSchedule(layers=LAYERS, keep_ratio=0.7, budget=budget, block_size=32)
    for protocol in (INSIDE, AFTER):
        result = Reader(tiny_model, sample).result(protocol, find_method("norm"), schedule)
        ids = torch.tensor([[*sample.context, *sample.question][: result["prompt_tokens"]]])
        with apply_sdtp(tiny_model, "norm", schedule):
            cache = tiny_model(ids, logits_to_keep=1).cache
        kept = sum(layer.keys.shape[-2] for layer in cache.layers)
        assert result["mean_keep"] == pytest.approx(kept / (6 * ids.shape[1]))
        assert result["mean_keep"] == pytest.approx(schedule.mean_keep(ids.shape[1], 6))


@torch.no_grad()
def test_a_question_after_the_pruned_context_equals_a_second_call(tiny_model, sample: Sample) -> None:
    result = Reader(tiny_model, sample).result(AFTER, find_method("attention"), SCHEDULE)
    with apply_sdtp(tiny_model, "attention", SCHEDULE):
        cache = DynamicCache(config=tiny_model.config)
        tiny_model(torch.tensor([sample.context]), cache=cache, logits_to_keep=1)
        rest = torch.tensor([[*sample.question, *sample.answer[:-1]]])
        logits = tiny_model(rest, cache=cache).logits[0, -8:]
    assert result["nll"] == pytest.approx(F.cross_entropy(logits, torch.tensor(sample.answer)).item(), abs=1e-4)


@pytest.mark.parametrize("protocol", [INSIDE, AFTER])
@torch.no_grad()
def test_greedy_answers_are_exact_where_teacher_forcing_says_so(tiny_model, sample: Sample, protocol: str) -> None:
    method = find_method("attention")
    reader = Reader(tiny_model, sample)
    answer = reader.greedy(protocol, method, SCHEDULE, extra=0)
    own = Sample(sample.task, sample.kind, sample.context, sample.question, tuple(answer))
    assert Reader(tiny_model, own).result(protocol, method, SCHEDULE)["exact"] == 1.0
    other = Sample(sample.task, sample.kind, sample.context, sample.question, (*answer[:-1], answer[-1] ^ 1))
    assert Reader(tiny_model, other).result(protocol, method, SCHEDULE)["exact"] == 0.0


# -------------------------------------------------------------------------------------------------------- baselines


def stage_inputs(model, ids, scorer, schedule=SCHEDULE):
    """The inputs of all stages in one pruned prefill."""
    seen = []

    def record(stage):
        seen.append(stage)
        return scorer(stage)

    with apply_sdtp(model, record, schedule), torch.no_grad():
        model(ids, logits_to_keep=5, use_cache=True)
    return seen


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_attention_baselines_equal_the_model_s_own_attention(sample: Sample, family: str) -> None:
    model = make_model(family, attention="eager")
    ids = torch.tensor([sample.ids])
    first = stage_inputs(model, ids, baselines.BASELINES["norm"])[0]
    updates: list[torch.Tensor] = []
    hook = model.model.layers[1].self_attn.register_forward_hook(lambda _, __, output: updates.append(output[0]))
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[1]
    hook.remove()
    torch.testing.assert_close(baselines.attention_update(first), updates[0].norm(dim=-1), atol=1e-4, rtol=1e-4)
    end = ids.shape[1] - 4
    expected = weights[0, :, :end].sum(1).mean(0)
    torch.testing.assert_close(baselines.accumulated_attention(first)[0], expected, atol=1e-4, rtol=1e-4)


def test_attention_baselines_ignore_padding(tiny_model, sample: Sample) -> None:
    ids = torch.tensor([sample.ids])
    padded = F.pad(ids, (9, 0))
    mask = F.pad(torch.ones_like(ids), (9, 0))
    for name in ("attention_update", "accumulated_attention"):
        (alone, *_), seen = stage_inputs(tiny_model, ids, baselines.BASELINES[name]), []

        def record(stage, seen=seen, name=name):
            seen.append(baselines.BASELINES[name](stage))
            return seen[-1]

        with apply_sdtp(tiny_model, record, SCHEDULE), torch.no_grad():
            tiny_model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), logits_to_keep=5)
        assert torch.isfinite(seen[0]).all()
        torch.testing.assert_close(seen[0][:, 9:], baselines.BASELINES[name](alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_future_attention_equals_the_model_s_own_attention(sample: Sample, family: str) -> None:
    model = make_model(family, attention="eager")
    ids = torch.tensor([[*sample.ids, sample.answer[-1]]])
    scores = baselines.oracle_future_attention(model, ids, 120, 8, LAYERS)
    with torch.no_grad():
        attentions = torch.cat(model(ids, output_attentions=True).attentions)
    received = attentions[:, :, 119:, :120].mean(2).amax(1)
    for layer in LAYERS:
        torch.testing.assert_close(scores[layer], received[layer:].mean(0), atol=1e-5, rtol=1e-4)


def test_oracle_saliency_is_the_gradient_of_the_answer_s_loss(tiny_model, sample: Sample) -> None:
    ids = torch.tensor([[*sample.ids, sample.answer[-1]]])
    with torch.no_grad():  # as evaluation calls it
        scores = baselines.oracle_saliency(tiny_model, ids, 120, 8, LAYERS)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in tiny_model.parameters())
    hidden = {}

    def keep(_, args, layer):
        hidden[layer] = args[0]
        args[0].retain_grad()

    hooks = [tiny_model.model.layers[i].register_forward_pre_hook(lambda m, a, i=i: keep(m, a, i)) for i in LAYERS]
    logits = tiny_model(ids).logits[0, -9:-1]
    F.cross_entropy(logits, torch.tensor(sample.answer)).backward()
    for hook in hooks:
        hook.remove()
    tiny_model.zero_grad()
    for layer, value in hidden.items():
        expected = (value.grad * value).norm(dim=-1)[0, :120]
        torch.testing.assert_close(scores[layer], expected, atol=1e-6, rtol=1e-3)
    with pytest.raises(ValueError, match="needs an answer"):
        baselines.oracle_saliency(tiny_model, ids, ids.shape[1], 8, LAYERS)


def test_an_oracle_is_looked_up_by_the_original_index(tiny_model, sample: Sample) -> None:
    """After the first stage the tokens have moved up; their scores must not have."""
    scores = torch.rand(120, generator=torch.Generator().manual_seed(1))
    look_up = baselines.LookUp(scores)
    ids = torch.tensor([[*sample.context, *sample.question[:4]]])
    with apply_sdtp(tiny_model, dict.fromkeys(LAYERS, look_up), SCHEDULE), torch.no_grad():
        cache = tiny_model(ids, logits_to_keep=5).cache
    for stage, layer in enumerate(LAYERS, 1):
        num_keep, recent = SCHEDULE.num_keep(120, stage), SCHEDULE.num_recent(120)
        forced = {*range(SCHEDULE.sink), *range(120 - recent, 120)}
        best = sorted(set(range(120)) - forced, key=lambda i: -scores[i])[: num_keep - len(forced)]
        assert cache.layers[layer].kept[0].tolist() == [*sorted(forced | set(best)), 120, 121, 122, 123]


# ------------------------------------------------------------------------------------------------------- statistics


def test_paired_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, generator=generator)
    difference = 0.2 + 0.1 * torch.randn(60, generator=generator)
    interval = compare.bootstrap(difference.tolist())
    error = difference.std().item() / math.sqrt(60)
    assert interval.mean == pytest.approx(difference.mean().item())
    # The percentile interval of a mean is close to the normal one; the seed is fixed.
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(interval.mean + 1.96 * error, abs=0.2 * error)
    assert compare.bootstrap(difference.tolist()) == interval
    assert compare.bootstrap([1.0] * 5) == (1.0, 1.0, 1.0, 5)
    assert math.isnan(compare.bootstrap([1.0]).low)
    with pytest.raises(ValueError, match="got no values"):
        compare.bootstrap([])

    # Paired: what the samples have in common cancels, whatever order they come in.
    def rows(method, values, order):
        fields = {"task": "nll", "protocol": INSIDE, "tokens": 1, "method": method, "schedule": "s", "mean_keep": 0.5}
        return [{**fields, "id": str(i), "nll_increase": values[i].item(), "kl": 0.0} for i in order]

    one = rows("one", 10 * noise + difference, range(60))
    two = rows("two", 10 * noise, reversed(range(5, 60)))  # five samples are missing
    table = compare.summarize(compare.group([*one, *two]), ["two"])
    paired = next(row for row in table if row["method"] == "one")["minus"]["two"]["nll_increase"]
    assert paired == pytest.approx(compare.bootstrap(difference[5:].tolist())._asdict(), abs=1e-5)


def test_rivals_have_the_same_budget() -> None:
    def row(method, schedule, mean_keep):
        return {"task": "nll", "protocol": INSIDE, "tokens": 1, "id": "a", "method": method, "schedule": schedule,
                "mean_keep": mean_keep, "nll_increase": 0.0, "kl": 0.0}  # fmt: skip

    groups = compare.group(
        [row("ours", "B @10:3", 0.673), row("random", "0.9 @4:3", 0.672), row("random", "0.8 @4:3", 0.476)]
    )
    ours = next(g for g in groups if g.method == "ours")
    assert compare.rival_of(ours, groups, "random").schedule == "0.9 @4:3"
    assert compare.rival_of(groups[-1], groups, "ours") is None


def test_only_questions_that_the_dense_model_answers() -> None:
    base = {"task": "passkey", "protocol": INSIDE, "tokens": 1, "schedule": "s"}
    rows = [{**base, "id": i, "method": m, "exact": float(i == "a")} for i in "ab" for m in ("dense", "random")]
    assert {row["id"] for row in compare.solved_by_dense(rows)} == {"a"}


# -------------------------------------------------------------------------------------------------------- schedules


def arguments(*options: str):
    parser = ArgumentParser()
    schedules.add_options(parser)
    return parser.parse_args(options)


def test_schedules_and_their_labels() -> None:
    found = schedules.make_schedules(
        arguments("--keep", "0.9", "1,0.5", "--layers", "2,4", "--budget", "global", "block", "--block-size", "64"),
        None, 6, 1000,
    )  # fmt: skip
    assert list(found) == ["0.9 @2,4", "1,0.5 @2,4", "0.9 @2,4 block 64", "1,0.5 @2,4 block 64"]
    assert found["1,0.5 @2,4 block 64"] == PruningSchedule((2, 4), (1.0, 0.5), budget="block", block_size=64)
    assert list(schedules.make_schedules(arguments(), (3, 5), 6, 1000)) == [
        "0.9 @3,5",
        "0.8 @3,5",
    ]
    assert list(schedules.make_schedules(arguments(), None, 12, 1000)) == ["0.9 @4:3", "0.8 @4:3"]
    # A list that begins like a pattern is another schedule, and has another label.
    both = schedules.make_schedules(arguments("--keep", "0.9", "--layers", "4:3", "4,7,10"), None, 16, 1000)
    assert {label: schedule.layers for label, schedule in both.items()} == {
        "0.9 @4:3": (4, 7, 10, 13),
        "0.9 @4,7,10": (4, 7, 10),
    }
    shapes = schedules.make_schedules(arguments("--keep", "0.8", "--shape", "even", "early"), None, 12, 1000)
    assert {label: schedule.keep_ratio for label, schedule in shapes.items()} == {
        "0.8 @4:3": 0.8,
        "0.8 @4:3 early": front_loaded(0.8, 3),
    }
    for options, message in (
        (["--keep", "x"], "--keep x"), (["--keep", "0.9,0.8,1", "--shape", "early"], "leave out --shape early"),
        (["--layers", "a:b"], "FIRST:STEP"), (["--mean-keep", "0.1"], "keep between"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            schedules.make_schedules(arguments(*options), None, 12, 1000)


@pytest.mark.parametrize("budget", ["global", "block"])
@pytest.mark.parametrize("layers", ["4:3", "10:3", "13"])
@pytest.mark.parametrize("shape", schedules.SHAPES)
def test_a_ratio_is_found_for_every_budget(budget: str, layers: str, shape: str) -> None:
    args = arguments(
        "--mean-keep", "0.673", "--layers", layers, "--budget", budget, "--block-size", "256", "--shape", shape
    )
    ((label, schedule),) = schedules.make_schedules(args, None, 30, 1024).items()
    assert schedule.mean_keep(1024, 30) == pytest.approx(0.673, abs=0.002)
    assert isinstance(schedule.keep_ratio, tuple) == (shape == "early")
    assert label.startswith("B 0.673 @")


# -------------------------------------------------------------------------------------------------------------- runs


def test_run_resume_and_compare(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    pruner = tmp_path / "best.safetensors"
    save_pruners({layer: TokenPruner(32) for layer in (4, 7)}, pruner)
    options = ["--out", out, "--tasks", "nll", "passkey", "--tokens", 400, "--samples", 2, "--continuation", 16]
    methods = ["random", "oracle_saliency", pruner]
    assert sdtp("run", *options, "--keep", 0.8, "--methods", *methods, "--greedy") == 0
    rows = read(out)
    assert len(rows) == 2 * 4 + 2 * 2 * 4  # samples x methods with dense, two protocols for questions
    dense = [row for row in rows if row["method"] == "dense"]
    assert all(row["nll_increase"] == row["kl"] == 0 and row["mean_keep"] == 1 for row in dense)
    schedule = PruningSchedule((4, 7), 0.8)
    for row in rows:
        if row["method"] != "dense":
            assert row["mean_keep"] == pytest.approx(schedule.mean_keep(row["prompt_tokens"], 8))
    (run_record,) = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert (run_record["tasks"], run_record["tokens"], run_record["dtype"]) == (["nll", "passkey"], [400], "float32")
    assert {"machine", "versions", "date", "command"} <= run_record.keys()
    name = next(row["method"] for row in rows if row["method"].startswith("best@"))
    summary = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    ours = next(row for row in summary if row["method"] == name and row["task"] == "nll")
    values = [row["nll_increase"] for row in rows if row["method"] == name and row["task"] == "nll"]
    assert ours["nll_increase"]["mean"] == pytest.approx(sum(values) / 2)
    assert ours["n"] == 2
    assert set(ours["minus"]) == {"random"}

    # Killed: the last line is torn, a few are missing. What is there is not computed again.
    path = out / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    marked = lines[0].replace('"kl": 0.0', '"kl": 7.0')
    path.write_text("".join([marked, *lines[1:17]]) + lines[17][:40])
    assert sdtp("run", *options, "--keep", 0.8, "--methods", *methods, "--greedy") == 0
    again = read(out)
    assert len(again) == len(rows)
    assert again[0]["kl"] == 7.0

    def known(rows):
        return {tuple(row[k] for k in compare.KEY): row["nll"] for row in rows}

    assert known(again) == pytest.approx(known(rows))

    capsys.readouterr()
    assert sdtp("compare", out, "--by", "kind", "--plot", tmp_path / "plot.png") == 0
    table = capsys.readouterr().out
    for word in ("passkey, 400 tokens, question after", name, "oracle_saliency", "python-reference", "wording 1"):
        assert word in table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_two_processes_evaluate_what_one_does(sdtp, byte_checkpoint: Path, tmp_path: Path) -> None:
    """Samples, results and their order; two processes take up what one has begun, and what two have left torn."""
    options = ["--tasks", "nll", "passkey", "--tokens", 200, 300, "--samples", 2, "--continuation", 8, "--keep", 0.8,
               "--methods", "random"]  # fmt: skip
    assert sdtp("run", "--out", tmp_path / "one", *options) == 0

    def lines(out):
        assert sorted(path.name for path in out.iterdir()) == [
            "rows.jsonl",
            "runs.jsonl",
            "samples.jsonl",
            "settings.json",
        ]
        return [{**row, "seconds": 0} for row in read(out)]

    expected, out = lines(tmp_path / "one"), tmp_path / "two"
    out.mkdir()
    shutil.copy(tmp_path / "one" / "settings.json", out)
    begun = (tmp_path / "one" / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join(begun[4:6]))
    (out / "samples.1.part").write_text(begun[2].replace('"kl": 0.0', '"kl": 7.0') + begun[9][:40])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "sdtp_kernels", "eval", "run", "--out", out, *options, "--model", byte_checkpoint]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("passkey, 200 tokens, question inside") == 1, "one process reports"
    expected[2]["kl"] = 7.0  # is not computed again
    assert lines(out) == expected


def test_every_process_has_a_share(sdtp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes reads every other sample, and writes a part that it does not report."""
    second = parallel.Workers(1, 2, torch.device("cpu"), lambda: None, lambda tensors: None)
    monkeypatch.setattr(parallel, "join_workers", lambda device: second)
    (tmp_path / "samples.jsonl").touch()  # by the first
    options = ["--tokens", 200, "--samples", 3, "--continuation", 8, "--methods", "random", "--keep", 0.8]
    assert sdtp("run", "--out", tmp_path, *options) == 0
    assert len((tmp_path / "samples.1.part").read_text().splitlines()) == 2  # dense and random
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.1.part", "samples.jsonl"]


def test_rank_agreement(sdtp, tmp_path: Path) -> None:
    pruner = tmp_path / "best.safetensors"
    save_pruners({layer: TokenPruner(32) for layer in (4, 7)}, pruner)
    methods = ["oracle_future_attention", "recent", pruner]
    options = ["--tasks", "ranks", "--tokens", 300, "--samples", 1, "--continuation", 16, "--methods", *methods]
    assert sdtp("run", "--out", tmp_path / "run", *options) == 0
    rows = {row["method"].split("@")[0]: row for row in read(tmp_path / "run")}
    assert rows["oracle_future_attention"]["spearman_by_stage"] == pytest.approx([1.0, 1.0])
    assert all(-1 <= row["spearman"] < 0.99 for name, row in rows.items() if "oracle" not in name)
    assert len(rows) == 3  # neither dense nor one row for each keep ratio


def test_refusals(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", tmp_path / "run", "--tokens", 300, "--samples", 1, "--methods"]
    for changed, message in (
        (["nonsense"], "neither a pruner file nor one of random"),
        (["random", "--tasks", "nul"], "no task 'nul'"),
        (["random", "--layers", "4,99"], "the schedule prunes at layer 99"),
        (["random", "--data", tmp_path / "missing"], "cannot be read"),
    ):
        assert sdtp("run", *options, *changed) == 2
        assert message in capsys.readouterr().err
    assert sdtp("compare", tmp_path / "missing") == 2
    assert "expected a directory that 'sdtp eval run --out' has written" in capsys.readouterr().err
    assert sdtp("run", *options, "recent") == 0
    assert sdtp("run", *options, "recent", "--dtype", "bfloat16") == 2
    assert "another model or dtype" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{}\n{}\n")
    assert sdtp("compare", tmp_path / "bad.jsonl") == 2
    assert "line 1" in capsys.readouterr().err


def test_models_are_told_apart() -> None:
    one, two = make_qwen2(num_layers=2), make_qwen2(num_layers=2)
    assert identify(one) == identify(two)
    with torch.no_grad():
        two.model.layers[-1].mlp.down_proj.weight[0, 0] += 1
    assert identify(one) != identify(two)
