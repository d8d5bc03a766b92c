"""``sdtp bench memory`` and ``multi``: the search, the comparison, and both whole, on a tiny checkpoint."""

import argparse
import json
import subprocess

import pytest
import torch
from helpers.models import make_qwen2, save_byte_model
from transformers import Qwen2Config

from sdtp_bench import memory, multi, processes, prompts
from sdtp_bench.multi import Launch
from sdtp_eval.paired import Pair
from sdtp_kernels import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_qwen2(num_layers=24, hidden_size=128).save_pretrained(path)
    return str(path)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 63, 64, 100, 127, 128, 1000, 1100, 2047, 2048, 9000])
@pytest.mark.parametrize(("fixed", "power"), [(0, 1), (200, 1), (0, 1.2)])
def test_the_search_finds_what_fits(room, fixed, power):
    tried = []

    def share(tokens):
        tried.append(tokens)
        return ((fixed + tokens) / (fixed + room + 0.5)) ** power

    found = memory.longest_that_fits(share, start=512, longest=2100, step=64)
    assert found == min(room, 2100) // 64 * 64
    assert len(tried) == len(set(tried)) <= 9
    assert all(tokens % 64 == 0 and 0 < tokens <= 2100 for tokens in tried)


@pytest.mark.parametrize("room", [0, 64, 1000, 9000])
def test_the_search_without_a_measure_of_what_does_not_fit(room):
    tried = []

    def share(tokens):
        tried.append(tokens)
        return 1e-9 if tokens <= room else None

    assert memory.longest_that_fits(share, start=512, longest=2100, step=64) == min(room, 2100) // 64 * 64
    assert len(tried) <= 9


def test_pruned_prompts_fit_where_dense_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_byte_model(tmp_path / "model", num_hidden_layers=24, hidden_size=256, intermediate_size=256)
    arguments = ["--model", tmp_path / "model", "--out", tmp_path, "--limit-gib", 1 / 32, "--start", 1024]
    arguments += ["--step", 512, "--keep", 0.5, "--longest", 4096, "--device", "cpu"]
    assert cli.main(["bench", "memory", *map(str, arguments)]) == 0
    dense, pruned = rows(tmp_path / "memory.jsonl")
    assert [(row["method"], row["keep"]) for row in (dense, pruned)] == [("dense", None), ("attention", 0.5)]
    assert 0 < dense["tokens"] < pruned["tokens"]
    for row in (dense, pruned):
        assert row["limit_bytes"] == 2**25
        assert row["tokens"] == max(tokens for tokens, peak in row["trials"] if peak <= 2**25)
        assert row["kv_bytes"] < row["peak_bytes"] == dict(row["trials"])[row["tokens"]]
    assert min(tokens for tokens, peak in dense["trials"] if peak > 2**25) == dense["tokens"] + 512
    assert pruned["kv_bytes"] / pruned["tokens"] < dense["kv_bytes"] / dense["tokens"] / 2


def test_what_is_freed_serves_nobody_unseen(monkeypatch):
    """The process gives back at once what is freed, and dense, which takes most, comes last."""
    asked = []

    def run_module(module, settings, env):
        asked.append((settings, env))
        return subprocess.CompletedProcess([], 0, json.dumps([{"peak_bytes": n} for n in (1, 2, 3)]), "")

    monkeypatch.setattr(processes, "run_module", run_module)
    options = ("model", "method", "block_size", "device", "backend", "text", "kv_predictor")
    args = argparse.Namespace(**dict.fromkeys(options))
    ways = [prompts.Way(keep, "global") for keep in (0.9, 0.8)]
    pair = Pair(None, torch.zeros(1, 600), None, None)
    setting = prompts.Setting("recent", "float32", dict.fromkeys(ways, pair))
    assert memory.peaks(args, setting) == {ways[1]: 1, ways[0]: 2, None: 3}
    ((settings, env),) = asked
    assert settings["ways"] == [ways[1], ways[0], None]
    assert int(env["MALLOC_MMAP_THRESHOLD_"]) <= 2**17


@pytest.mark.parametrize(("address_space", "fits"), [(2**31, True), (2**20, False)])
def test_a_prompt_far_beyond_the_limit_ends_at_it(tmp_path, address_space, fits):
    # Tensors of 128 MiB: more than any of glibc's arenas, of 64, has reserved unused.
    save_byte_model(tmp_path, num_hidden_layers=5, hidden_size=32, intermediate_size=8192)
    args = argparse.Namespace(
        model=str(tmp_path), method="recent", block_size=512, device="cpu", backend="auto", text=None, kv_predictor=None
    )
    measured = memory.measure(args, "float32", 4096, [None], address_space)
    assert (measured is not None) == fits


def test_a_gpu_may_be_filled(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(prompts, "complete", lambda args: setattr(args, "device", "cuda"))
    monkeypatch.setattr(memory, "_gib_of_the_gpu", lambda: 80.0)
    monkeypatch.setattr(memory, "longest", lambda args, *_: asked.append(args.limit_gib) or {"tokens": 1})
    assert cli.main(["bench", "memory", "--keep", "0.8"]) == 0
    assert set(asked) == {80.0}


def test_another_failure_is_no_answer(tmp_path, capsys):
    assert cli.main(["bench", "memory", "--model", str(tmp_path), "--device", "cpu"]) == 2
    assert "ended with status 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("std::bad_alloc", True),
        ("could not create a primitive", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert memory.is_out_of_memory(RuntimeError(error)) == expected


def test_baselines_have_the_whole_machine():
    assert multi.launches_of(2, "cpu", cores=8) == [Launch(1, 8), Launch(1, 4), Launch(1, 2), Launch(2, 4)]
    assert multi.launches_of(4, "cpu", cores=1) == [Launch(1, 1), Launch(4, 1)]
    assert multi.launches_of(2, "cuda", cores=8) == [Launch(1, 1), Launch(2, 1)]


@pytest.mark.parametrize(
    ("key_heads", "asked", "expected"),
    [(3, None, 3), (4, None, 2), (4, 4, 4), (3, 2, "expected one of 3"), (4, 3, "one of 2, 4"), (1, None, "split")],
)
def test_processes_share_whole_heads(tmp_path, key_heads, asked, expected):
    Qwen2Config(num_attention_heads=2 * key_heads, num_key_value_heads=key_heads).save_pretrained(tmp_path)
    args = argparse.Namespace(model=str(tmp_path), nproc=asked)
    if isinstance(expected, int):
        assert multi.choose_processes(args) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            multi.choose_processes(args)


def test_speed_is_over_the_best_single_process():
    best, slow, two = Launch(1, 8), Launch(1, 4), Launch(2, 4)
    seconds = {(best, "dense"): [2.0], (slow, "dense"): [4.0], (two, "dense"): [1.0, 1.6, 9.0]}
    seconds |= {(launch, "pruned"): times for (launch, _), times in seconds.items()}
    found = {(row["processes"], row["threads"]): row for row in multi.rows_of(seconds) if row["method"] == "dense"}
    assert [found[launch]["speedup"] for launch in (best, slow, two)] == [1.0, 0.5, 1.25]
    assert found[two]["efficiency"] == 0.625


def test_no_figures_for_other_results():
    right = {"tokens_per_layer": [4, 2], "logits": [0.0, 1.0]}
    multi.check(right, {**right, "logits": [0.0005, 1.0]}, 1e-3, Launch(2, 1), "pruned")
    for wrong in ({"logits": [0.01, 1.0]}, {"logits": [float("nan"), 1.0]}, {"tokens_per_layer": [4, 3]}):
        with pytest.raises(ValueError, match="no figures"):
            multi.check(right, {**right, **wrong}, 1e-3, Launch(2, 1), "pruned")


def test_two_processes_against_one(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(multi, "launches_of", lambda *_: [Launch(1, 1), Launch(2, 1)])
    out = tmp_path / "multi.jsonl"
    arguments = ["--model", checkpoint, "--out", str(tmp_path), "--tokens", "300", "--repeats", "2", "--rounds", "1"]
    assert cli.main(["bench", "multi", *arguments, "--device", "cpu"]) == 0
    found = rows(out)
    assert [(row["processes"], row["method"]) for row in found] == [(n, m) for n in (1, 2) for m in processes.METHODS]
    assert all(len(row["seconds_all"]) == 2 for row in found)
    assert all(row["versions"]["torch"] == torch.__version__ for row in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["multi", "--nproc", "1"], "at least 2"),
        (["memory", "--start", "0"], "1 <= step <= start <= longest"),
        (["memory", "--limit-gib", "-1"], "more than 0"),
    ],
)
def test_settings_that_cannot_work(checkpoint, capsys, arguments, message):
    assert cli.main(["bench", *arguments, "--model", checkpoint, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
