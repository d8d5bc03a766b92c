"""KV predictors: the regression against least squares on all tokens, what is counted and when, and the two commands."""

from __future__ import annotations

import json
import os
import shutil
from importlib import metadata

import pytest
import torch
from helpers.files import contents
from helpers.models import make_model
from helpers.training import Killed, damage, in_two, make_checkpoint, make_texts, mark, options
from safetensors.torch import load_file, save_file

from sdtp_kernels import KVPredictor, cli, load_pruners, save_pruners
from sdtp_kernels.models.family import FAMILIES
from sdtp_train import kv, loop, shards, simulate, targets

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES, N = (2, 4), 50
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = make_model(request.param, hidden_size=32).requires_grad_(False)
    for layer in model.model.layers:  # gains of 1 would hide whether a norm was applied
        for norm in ("k_norm", "q_norm"):
            if hasattr(layer.self_attn, norm):
                torch.nn.init.uniform_(getattr(layer.self_attn, norm).weight, 0.5, 2)
    return model


PROMPTS = torch.randint(1, 256, (6, N), generator=torch.Generator().manual_seed(5))
HELD_OUT = (1, 4)


def count(model, prompts=PROMPTS, held_out=HELD_OUT):
    statistics = kv.Statistics(model.config, STAGES, CPU)
    for i, ids in enumerate(prompts.tolist()):
        statistics.add(targets.dense_pass(model, ids[:-10], ids[-10:]), i in held_out)
    return statistics


def observe(model, stage, prompts):
    """Features and outputs of all tokens but the first four, from hooks on transformers' own forward; float64."""
    taps = {}
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for name, module in (("k", getattr(attention, "k_norm", attention.k_proj)), ("v", attention.v_proj)):
            taps[name, i] = module.register_forward_hook(
                lambda module, args, output, key=(name, i): seen.update({key: output[0].flatten(1).double()})
            )
    xs, ys = [], []
    for ids in prompts:
        seen = {}
        x = model(ids[None], output_hidden_states=True).hidden_states[stage][0].double()
        xs.append((x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())[4:])
        ys.append(torch.cat([seen[name, i] for i in range(stage, len(model.model.layers)) for name in "kv"], 1)[4:])
    for tap in taps.values():
        tap.remove()
    return torch.cat(xs), torch.cat(ys)


def least_squares(x, y):
    """Ridge regression by rows of its own: the bias is not penalised."""
    penalty = 1e-3 * x.square().sum(0).mean()
    rows = torch.cat([torch.nn.functional.pad(x, (0, 1), value=1.0), penalty.sqrt() * torch.eye(x.shape[1] + 1)[:-1]])
    w = torch.linalg.lstsq(rows, torch.cat([y, torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)])).solution
    return w[:-1].T, w[-1], penalty


def training(prompts=PROMPTS):
    return prompts[[i for i in range(len(prompts)) if i not in HELD_OUT]]


# ------------------------------------------------------------------------------------------------------- regression


def test_streaming_equals_least_squares_on_all_tokens(model):
    statistics = count(model)
    predictor = kv.solve(statistics, None, CPU)
    for stage in STAGES:
        x, y = observe(model, stage, training())
        weight, bias, _ = least_squares(x, y)
        sums = statistics.sums("training", stage, CPU)
        assert sums.num_tokens == len(x) == 4 * (N - 4)
        down, up, offset = kv.regress(sums, None)
        assert down is None
        torch.testing.assert_close(up, weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(offset, bias, rtol=1e-5, atol=1e-6)
        # And as the model will use it.
        ids = PROMPTS[0]
        hidden_states = model(ids[None], output_hidden_states=True).hidden_states[stage]
        tokens = predictor.encode(stage, hidden_states)
        x, y = observe(model, stage, PROMPTS[:1])
        for i, layer in enumerate(range(stage, 6)):
            found = torch.cat(
                [part[0, :, 4:].transpose(0, 1).flatten(1) for part in predictor(stage, layer, tokens)], 1
            )
            columns = slice(i * statistics.width, (i + 1) * statistics.width)
            expected = (x @ weight.T + bias)[:, columns]
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_full_rank_is_the_full_matrix(model):
    sums = count(model).sums("training", STAGES[0], CPU)
    _, full, bias = kv.regress(sums, None)
    down, up, offset = kv.regress(sums, 32)
    torch.testing.assert_close(up @ down, full, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(offset, bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_no_bottleneck_of_this_width_is_better(model, rank):
    x, y = observe(model, STAGES[0], training())
    weight, _, penalty = least_squares(x, y)
    scale = y.std(0, correction=0)

    def loss(w):
        """Of outputs in units of their standard deviation, with the best bias."""
        error = (y - y.mean(0)) - (x - x.mean(0)) @ w.T
        return (error / scale).square().sum() + penalty * (w.T / scale).square().sum()

    down, up, _ = kv.regress(count(model).sums("training", STAGES[0], CPU), rank)
    assert (down.shape, up.shape) == ((rank, 32), (y.shape[1], rank))
    ours = loss(up @ down)
    for truncated in (weight, weight / scale[:, None]):
        u, s, v = torch.linalg.svd(truncated, full_matrices=False)
        cut = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert ours < loss(cut if truncated is weight else cut * scale[:, None])
    # A minimum: no small change of either factor lowers it.
    for factor in (down, up):
        for seed in range(3):
            direction = torch.randn(factor.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            change = 1e-3 * factor.norm() * direction / direction.norm()
            a, b = (down + change, up) if factor is down else (down, up + change)
            assert loss(b @ a) > ours
    assert loss(weight) < ours


@pytest.mark.parametrize("rank", [None, 6])
def test_held_out_prompts_are_judged_and_not_learned(model, rank):
    statistics = count(model)
    alone = count(model, training(), held_out=())
    for name, tensor in alone.tensors.items():
        if name.startswith("training"):
            torch.testing.assert_close(statistics.tensors[name], tensor, rtol=1e-12, atol=1e-9)
    predictor, facts = kv.make_predictor(statistics, rank, CPU)
    assert predictor.up["2:2"].weight.dtype == torch.bfloat16
    assert facts["tokens"] == {"training": 4 * (N - 4), "validation": 2 * (N - 4)}
    assert facts["tokens_per_feature"] == round(4 * (N - 4) / 32, 1)
    for stage in STAGES:
        x, y = observe(model, stage, PROMPTS[list(HELD_OUT)])
        residual = (y - y.mean(0)).square().sum(0)
        for i, layer in enumerate(range(stage, 6)):
            maps = predictor.up[f"{stage}:{layer}"]
            tokens = x if rank is None else x @ predictor.down[str(stage)].weight.double().T
            columns = slice(i * statistics.width, (i + 1) * statistics.width)
            error = (y[:, columns] - tokens @ maps.weight.double().T - maps.bias.double()).square().sum(0)
            share = 1 - error.view(2, -1).sum(1) / residual[columns].view(2, -1).sum(1)
            found = [facts["r_squared"][str(stage)][name][i] for name in ("keys", "values")]
            assert found == pytest.approx(share.tolist(), abs=1e-6)
    assert f"rank {rank or 'full'}" in kv.summary(predictor, facts)


def test_an_output_that_never_changes_is_predicted_and_has_no_say():
    model = make_model("qwen2", hidden_size=32).requires_grad_(False)
    attention = model.model.layers[3].self_attn
    attention.v_proj.weight[:8] = 0
    attention.v_proj.bias[:8] = 3.0
    predictor = kv.solve(count(model), 4, CPU)
    _, values = predictor(2, 3, predictor.encode(2, torch.randn(1, 5, 32)))
    torch.testing.assert_close(values[0, 0], torch.full((5, 8), 3.0), rtol=0, atol=1e-4)


def test_not_a_number_is_not_counted():
    model = make_model("llama", hidden_size=32).requires_grad_(False)
    model.model.layers[5].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="a key or value is NaN or infinite"):
        count(model)


# ---------------------------------------------------------------------------------------- sdtp saliency --kv-statistics

SETTINGS = {"samples": 9, "context": [64], "continuation": 8, "shard-size": 2, "targets": ["future_attention"]}
WITH_KV = {**SETTINGS, "kv-statistics": []}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("kv")
    make_checkpoint(path / "model")
    make_texts(path / "texts")
    return path


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run."""
    mark(place, place / "whole", **WITH_KV)
    return place / "whole"


def assert_same_statistics(folder, whole):
    assert not list(folder.glob("kv-statistics-*"))
    found, expected = load_file(folder / kv.FILE), load_file(whole / kv.FILE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-11, atol=1e-9)


def test_every_sample_is_counted_on_its_side(place, whole):
    data = shards.Saliency(whole)
    statistics = kv.load_statistics(data, make_model("qwen2", num_layers=8, hidden_size=32).config)
    for part, is_validation in (("training", False), ("validation", True)):
        tokens = [s.num_context + s.num_continuation - 4 for s in data.samples if s.is_validation == is_validation]
        assert statistics.sums(part, 4, CPU).num_tokens == sum(tokens) > 0


@pytest.mark.parametrize("moment", range(0, 30, 3))
def test_stopped_at_any_write_and_resumed_gives_the_same_bytes(place, whole, tmp_path, monkeypatch, moment):
    import safetensors.torch

    left = [moment]

    def stopping(function):
        def wrapper(*args, **kwargs):
            function(*args, **kwargs)
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        return wrapper

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping(os.replace))
        patch.setattr(safetensors.torch, "save_file", stopping(save_file))
        try:
            mark(place, out, **WITH_KV)
        except Killed:
            assert moment < 24  # two manifests; five shards, five statistics and their sum, two writes each
        else:
            assert moment >= 24
    mark(place, out, **WITH_KV)
    assert contents(out) == contents(whole)


def mark_in_two(place, out, monkeypatch, stop=None, **changes):
    """Two processes; `stop` is raised where a process would write that many shards."""
    save = kv.Recorder.save

    def stopping(self, shard):
        save(self, shard)
        if len(self.own) == stop:
            raise Killed

    monkeypatch.setattr(kv.Recorder, "save", stopping)

    failures = in_two(monkeypatch, lambda: mark(place, out, **changes))
    monkeypatch.undo()
    return failures


def test_two_processes_add_up_to_one(place, whole, tmp_path, monkeypatch):
    assert not mark_in_two(place, tmp_path / "out", monkeypatch, **WITH_KV)
    assert_same_statistics(tmp_path / "out", whole)


def test_one_process_goes_on_where_two_were_stopped(place, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    failures = mark_in_two(place, out, monkeypatch, stop=1, **WITH_KV)
    assert [type(failure) for failure in failures] == [Killed, Killed]
    assert len(list(out.glob("kv-statistics-*"))) == 2
    mark(place, out, **WITH_KV)
    assert_same_statistics(out, whole)


def test_statistics_can_be_added_later(place, whole, tmp_path):
    out = tmp_path / "out"
    mark(place, out, **SETTINGS)
    assert not (out / kv.FILE).exists()
    mark(place, out, **WITH_KV)
    assert contents(out) == contents(whole)


def test_a_shard_that_is_computed_again_is_not_counted_again(place, whole, tmp_path, monkeypatch):
    out, save = tmp_path / "out", kv.Recorder.save

    def stopping(self, shard):
        save(self, shard)
        if shard == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(kv.Recorder, "save", stopping)
        with pytest.raises(Killed):
            mark(place, out, **WITH_KV)
    for _ in ("unfinished", "finished"):
        shards.shard_path(out, 1).unlink()
        mark(place, out, **WITH_KV)
        assert contents(out) == contents(whole)


@pytest.fixture
def sdtp(place, monkeypatch):
    points = {
        name: metadata.EntryPoint(name, f"sdtp_train.{name}:add_command", cli.GROUP) for name in ("saliency", "train")
    }
    monkeypatch.setattr(cli, "plugin_commands", lambda: points)

    def run(*words):
        return cli.main([*map(str, words)])

    return run


def copied(whole, out):
    return shutil.copytree(whole, out)


def test_damaged_statistics_are_refused(place, whole, tmp_path, sdtp, capsys):
    def train(folder):
        return sdtp("train", "--model", place / "model", "--saliency", folder, "--out", tmp_path / "p", "--kv-rank", 4)

    out = copied(whole, tmp_path / "damaged")
    damage(out / kv.FILE)
    assert train(out) == 2
    assert f"{kv.FILE} is damaged" in capsys.readouterr().err
    # Those of a process as well, before anything is added.
    (out / kv.FILE).rename(out / "kv-statistics-0.safetensors")
    assert sdtp(*options(place, out, **WITH_KV)) == 2
    assert "kv-statistics-0.safetensors is damaged" in capsys.readouterr().err
    (out / "kv-statistics-0.safetensors").unlink()
    assert train(out) == 2
    assert "has no finished KV statistics: run 'sdtp saliency --kv-statistics'" in capsys.readouterr().err

    header = shards.read_header(whole / kv.FILE)
    for changes, message in (
        ({"run": "0"}, "belongs to another run"),
        ({"format_version": 2}, "version 2; this version of sdtp-kernels reads 'sdtp-kv-statistics' version 1"),
    ):
        shards.write_tensors(out / kv.FILE, load_file(whole / kv.FILE), {**header, **changes})
        assert train(out) == 2
        assert message in capsys.readouterr().err
    (out / kv.FILE).unlink()
    for process, counted in ((0, [0, 1, 2]), (1, [2, 3, 4])):
        path = out / f"kv-statistics-{process}.safetensors"
        shards.write_tensors(path, load_file(whole / kv.FILE), {**header, "shards": counted})
    assert sdtp(*options(place, out, **WITH_KV)) == 2
    assert "are of shards [0, 1, 2, 2, 3, 4], expected each of 5 once" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


# ----------------------------------------------------------------------------------------------- sdtp train --kv-rank


@pytest.mark.parametrize("rank", ["full", "5"])
def test_a_predictor_comes_with_the_pruners(place, whole, tmp_path, sdtp, capsys, rank):
    out, again = tmp_path / "pruners", tmp_path / "again"
    command = ("train", "--model", place / "model", "--saliency", whole, "--steps", 2)
    assert sdtp(*command, "--out", out, "--kv-rank", rank) == 0
    printed = capsys.readouterr().out
    assert "held-out R^2, keys / values" in printed
    assert "100 or more are better" in printed
    stack = load_pruners(out)
    config = make_model("qwen2", num_layers=8, hidden_size=32).config
    expected, facts = kv.make_predictor(
        kv.load_statistics(shards.Saliency(whole), config), None if rank == "full" else 5, CPU
    )
    assert stack.header.training["kv_predictor"] == facts
    assert stack.kv_predictor.stages == (4, 7)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(stack.kv_predictor.state_dict()[name], tensor)
    # Training goes on with these pruners, and the maps stay.
    assert sdtp(*command, "--out", again, "--init", out) == 0
    assert load_pruners(again).header.training["kv_predictor"] == facts
    assert torch.equal(load_pruners(again).kv_predictor.up["4:6"].weight, expected.up["4:6"].weight)
    assert sdtp(*command, "--out", tmp_path / "plain") == 0
    assert load_pruners(tmp_path / "plain").kv_predictor is None


@pytest.mark.parametrize("rank", ["full", "5"])
def test_maps_learn_end_to_end_alone_or_with_the_pruners(place, whole, tmp_path, sdtp, rank):
    start = tmp_path / "start"
    # Which bytes of a random model come again would decide what is dropped, and with it the little there is to learn.
    command = ("train", "--model", place / "model", "--saliency", whole, "--lexical-weight", 0)
    assert sdtp(*command, "--steps", 2, "--out", start, "--kv-rank", rank) == 0
    before = load_pruners(start)
    command = (*command, "--init", start, "--loss", "kl", "--keep", 0.6, "--batch", 4, "--lr", 1e-4, "--eval-every", 4)
    for trained in (["kv"], ["kv", "pruners"]):
        out = tmp_path / "-".join(trained)
        assert sdtp(*command, "--steps", 8, "--kv-lr", 0.05, "--train", *trained, "--out", out) == 0
        stack = load_pruners(out)
        facts = stack.header.training
        history = [json.loads(line) for line in out.with_name(f"{out.name}.jsonl").read_text().splitlines()]
        assert history[-1]["training"]["kl"] < 0.9 * history[1]["training"]["kl"]
        assert facts["validation"]["kl"] < history[0]["validation"]["kl"]
        assert facts["kv_predictor"]["fitted"] == before.header.training["kv_predictor"]
        assert facts["kv_predictor"]["trained_by"] == {"kl": 1.0}
        assert {str(p.dtype) for p in stack.kv_predictor.parameters()} == {"torch.bfloat16"}
        for name, p in before.kv_predictor.state_dict().items():
            is_same = torch.equal(p, stack.kv_predictor.state_dict()[name])
            assert is_same == name.endswith("bias"), name
            assert (p - stack.kv_predictor.state_dict()[name]).norm() < 0.5 * p.norm()
        same = [torch.equal(p, stack[4].state_dict()[name]) for name, p in before[4].state_dict().items()]
        assert all(same) == (trained == ["kv"])


def test_training_keeps_the_dtype_of_the_maps_and_prunes_as_it_is_told(place, whole, tmp_path, sdtp, monkeypatch):
    start, seen = tmp_path / "start", []
    command = ("train", "--model", place / "model", "--saliency", whole, "--steps", 1)
    assert sdtp(*command, "--out", start, "--kv-rank", 5) == 0
    stack = load_pruners(start)
    save_pruners(stack, start, kv_predictor=stack.kv_predictor.float())
    simulated = simulate.simulate_pruning
    monkeypatch.setattr(simulate, "simulate_pruning", lambda *args: seen.append(args[-1]) or simulated(*args))
    for number, (settings, predicts) in enumerate(
        (((), None), (("--loss", "kl"), True), (("--loss", "kl", "--dropped-kv", "none"), False))
    ):
        seen.clear()
        assert sdtp(*command, "--out", tmp_path / str(number), "--init", start, *settings) == 0
        assert {predictor is not None for predictor in seen} == (set() if predicts is None else {predicts})
        for name, p in load_pruners(tmp_path / str(number)).kv_predictor.state_dict().items():
            assert p.dtype == torch.float32
            assert torch.equal(p, stack.kv_predictor.state_dict()[name])


def test_maps_that_learn_go_on_after_a_kill(place, whole, tmp_path, sdtp, monkeypatch):
    start, out, again = tmp_path / "start", tmp_path / "out", tmp_path / "again"
    command = ("train", "--model", place / "model", "--saliency", whole)
    assert sdtp(*command, "--steps", 2, "--out", start, "--kv-rank", 5) == 0
    command = (
        *command,
        "--init",
        start,
        "--loss",
        "kl",
        "--train",
        "kv",
        "--batch",
        4,
        "--eval-every",
        2,
        "--steps",
        4,
    )
    assert sdtp(*command, "--out", out) == 0
    evaluate, number = loop.Loop._evaluate, 0

    def fall(run):
        nonlocal number
        evaluate(run)
        number += 1
        if number == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_evaluate", fall)
        with pytest.raises(Killed):
            sdtp(*command, "--out", again)
    assert sdtp(*command, "--out", again, "--resume") == 0
    assert load_file(out).keys() == load_file(again).keys()
    for name, tensor in load_file(out).items():
        assert torch.equal(tensor, load_file(again)[name]), name


def test_mistakes_get_answers_and_nothing_is_written(place, whole, tmp_path, sdtp, capsys):
    out = tmp_path / "out"
    command = ("train", "--model", place / "model", "--saliency", whole, "--steps", 1)
    for rank in ("0", "33", "half", "-1"):
        assert sdtp(*command, "--out", out, f"--kv-rank={rank}") == 2
        assert f"--kv-rank {rank}: expected 'full', or a width from 1 to the hidden size, 32" in capsys.readouterr().err
    assert sdtp(*command, "--out", tmp_path / "plain") == 0
    other = KVPredictor(32, 2, 8, num_hidden_layers=8, stages=(4,))
    save_pruners(dict(load_pruners(tmp_path / "plain")), tmp_path / "other", kv_predictor=other)
    assert sdtp(*command, "--out", out, "--init", tmp_path / "other") == 2
    assert "prunes at layers [7], for which the KV predictor has no maps" in capsys.readouterr().err
    for wrong in (("--loss", "kl"), ("--init", tmp_path / "plain", "--loss", "kl"), ("--kv-rank", 4, "--loss", "kl")):
        assert sdtp(*command, "--out", out, "--train", "kv", *wrong) == 2
        assert "--train kv: needs the KV predictor of --init, lm or kl in --loss" in capsys.readouterr().err
    assert sdtp(*command, "--out", out, "--dropped-kv", "predicted", "--loss", "kl") == 2
    assert "--dropped-kv predicted: needs the KV predictor of --init" in capsys.readouterr().err
    assert sdtp(*command, "--out", out, "--kv-lr", 0) == 2
    assert "--kv-lr 0.0: expected a number above 0" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
