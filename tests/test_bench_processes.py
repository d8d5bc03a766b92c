"""``sdtp bench memory`` and ``multi``: the search, the comparison, and both whole, on a tiny checkpoint."""

import json
import os

import pytest
import torch
from conftest import make_qwen2

from sdtp_bench import memory, multi, processes
from sdtp_bench.multi import Launch
from sdtp_kernels import cli

LIMIT_GIB = 1 / 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_qwen2(num_layers=24, hidden_size=128).save_pretrained(path)
    return str(path)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 3, 4, 5, 63, 64, 77, 1000])
def test_the_search_finds_what_fits(room):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= room

    found = memory.longest_that_fits(fits, start=4, longest=100, halvings=20)
    assert found == (0 if room < 4 else min(room, 100))
    assert len(tried) == len(set(tried)) <= 12


def test_each_halving_halves_the_gap():
    assert [memory.longest_that_fits(lambda n: n <= 99, 8, 512, halvings) for halvings in range(4)] == [64, 96, 96, 96]


def test_pruned_prompts_fit_where_dense_ones_do_not(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "memory.jsonl"
    before = {name for name in os.listdir() if name.startswith("core")}
    arguments = ["--model", checkpoint, "--out", str(tmp_path), "--limit-gib", str(LIMIT_GIB), "--start", "2048"]
    arguments += ["--first", "1", "--step", "1", "--keep", "0.5", "--halvings", "0", "--longest", "8192"]
    assert cli.main(["bench", "memory", *arguments, "--device", "cpu"]) == 0
    dense, pruned = rows(out)
    assert 0 < dense["tokens"] < pruned["tokens"]
    *fitting, last = (fits for _, fits in dense["trials"])
    assert (fitting, last) == ([True] * len(fitting), False), "the search went on until it did not fit"
    for row in (dense, pruned):
        assert 0 < row["kv_bytes"] < LIMIT_GIB * 2**30
    assert pruned["kv_bytes"] / pruned["tokens"] < dense["kv_bytes"] / dense["tokens"] / 2
    assert {name for name in os.listdir() if name.startswith("core")} == before


def test_another_failure_is_no_answer(checkpoint, capsys):
    assert cli.main(["bench", "memory", "--model", checkpoint + "/missing", "--device", "cpu"]) == 2
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
        (["memory", "--start", "0"], "1 <= start <= longest"),
        (["memory", "--limit-gib", "-1"], "more than 0"),
    ],
)
def test_settings_that_cannot_work(checkpoint, capsys, arguments, message):
    assert cli.main(["bench", *arguments, "--model", checkpoint, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
