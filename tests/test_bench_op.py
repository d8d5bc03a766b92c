"""``sdtp bench op``, ``scaling`` and ``compare``: a wrong kernel gets no figure, and what is told of a right one."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdtp_bench import compare, eager, op, rows, shapes, timing
from sdtp_bench.providers import find_providers, make_check
from sdtp_bench.shapes import Case, make_stage
from sdtp_kernels import cli
from sdtp_kernels.backends import cpu

ROOT = Path(__file__).parents[1]
CASE = Case("tiny", 150, dtype="bf16", batch=2, keep=0.7)
NAMES = ["eager", "eager tuned", "cpu", "reference"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "tiny", shapes.Model(32, num_heads=2, num_kv_heads=1, head_dim=16, num_layers=2))
    monkeypatch.setattr(op, "MAX_REPEATS", 5)


def measure(case=CASE, names=NAMES, threads=(1,)):
    return {(row["provider"], row["threads"]): row for row in op.measure(timing.CpuDevice(), case, 0, names, threads)}


# ------------------------------------------------------------------------------------------------ no figure where wrong


def wrong_score(output, arguments):
    """Tokens by a score with the sign of the first weights turned."""
    hidden_states, tensors, scoring, *rest = arguments
    return WRONG_FROM(hidden_states, tensors, scoring._replace(w1=-scoring.w1), *rest)


def wrong_row(output, arguments):
    output[0][0, 3] = arguments[0][0, 3]
    output[0][0, 3, 5] += 1
    return output


def unsorted(output, arguments):
    order = torch.arange(output[2].shape[1])
    order[:2] = order[:2].flip(0)
    return output[0][:, order], [tensor[:, order] for tensor in output[1]], output[2][:, order], *output[3:]


def not_a_number(output, arguments):
    return output[0].mul(torch.nan), *output[1:]


def fails(output, arguments):
    raise RuntimeError("illegal instruction")


WRONG_FROM = cpu.prune_tokens


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_score, "ranks above one that was kept"),
        (wrong_row, "tensor 0: not the rows"),
        (unsorted, "not ascending"),
        (not_a_number, "tensor 0: not the rows"),
        (fails, "RuntimeError: illegal instruction"),
    ],
)
def test_a_wrong_kernel_gets_no_figure(monkeypatch, spoil, message):
    monkeypatch.setattr(cpu, "prune_tokens", lambda *arguments: spoil(WRONG_FROM(*arguments), arguments))
    found = measure()
    wrong = found.pop(("cpu", 1))
    assert message in wrong["error"]
    assert not {"seconds", "seconds_all", "quantiles", "first_matmul_s", "extra_bytes"} & set(wrong)
    assert {name for name, _ in found} == {"eager", "eager tuned", "reference"}
    for row in found.values():
        assert "error" not in row
        assert len(row["seconds_all"]) == 5


def test_near_ties_that_rounding_explains_are_right():
    """Scores of PyTorch's composition are rounded to the model's dtype; the same in another order is a mistake."""
    stage, plan = make_stage(CASE, "cpu"), CASE.plan()
    check = make_check(CASE, stage, plan)
    providers = find_providers(timing.CpuDevice(), CASE, stage, plan, ["eager", "cpu"])
    picked = [call()[2] for call in providers.values()]
    assert [check(call) for call in providers.values()] == ["", ""]
    lost = stage._replace(scoring=stage.scoring._replace(w1=stage.scoring.w1 * 0.5))
    assert "ranks above" in check(lambda: eager.prune_tokens(eager.in_one_dtype(lost), plan)), len(picked)


def test_the_command_says_who_is_wrong_and_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cpu, "prune_tokens", lambda *arguments: wrong_row(WRONG_FROM(*arguments), arguments))
    arguments = ["--model", "tiny", "--tokens", "150", "--dtype", "float32", "--seconds", "0", "--out", str(tmp_path)]
    assert cli.main(["bench", "op", *arguments, "--providers", "eager", "cpu"]) == 1
    assert "WRONG, no figure" in capsys.readouterr().out
    right, wrong = rows.read_rows(tmp_path, "op")
    assert "seconds" in right
    assert "seconds" not in wrong


def test_the_pytest_benchmark_refuses_a_wrong_kernel(tmp_path):
    """The suite of benchmarks/ whole, in a process of its own: right as it is, no figure where the kernel is wrong."""
    pytest.importorskip("pytest_benchmark", reason="pip install 'sdtp-kernels[bench]'")
    (tmp_path / "spoiled.py").write_text(
        "from sdtp_kernels.backends import cpu\n"
        "right = cpu.prune_tokens\n"
        "def wrong(*arguments):\n"
        "    hidden_states, *others = right(*arguments)\n"
        "    return hidden_states.roll(1, dims=1), *others\n"
        "cpu.prune_tokens = wrong\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/", "--benchmark-only", "-p", "spoiled", "-k", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "no figure: tensor 0: not the rows" in found.stdout
    assert "passed" not in found.stdout


# --------------------------------------------------------------------------------------------------- right ones' rows


def test_rows_of_all_threads_and_who_took_part(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch, "set_num_threads", lambda count, own=torch.set_num_threads: calls.append(count) or own(count)
    )
    before = torch.get_num_threads()
    found = measure(names=["cpu"], threads=(1, 2))
    assert torch.get_num_threads() == before
    assert {1, 2} <= set(calls)
    assert set(found) == {("cpu", 1), ("cpu", 2)}
    for row in found.values():
        assert row["hidden_size"] == 32
        assert row["num_keep"] == CASE.plan().num_keep
        assert row["flops"] == 2 * 2 * 150 * (32 * 16 + 16)
        token, terms = 32 * 2 + 2 * 16 * 2 + 8, 4 + 4  # a mean and a bias
        weights, kept = 16 * 32 * 2 + (16 + 16 + 1) * 4, token + 8 + 4
        assert row["bytes"] == 2 * 150 * (token + terms) + weights + 2 * row["num_keep"] * kept
        assert row["seconds"] == row["quantiles"]["p50"] > 0
        assert row["first_matmul_s"] > 0


def test_unknown_providers_are_named(capsys):
    assert cli.main(["bench", "op", "--model", "tiny", "--tokens", "20", "--providers", "mine"]) == 2
    assert "no provider called 'mine'" in capsys.readouterr().err
    assert cli.main(["bench", "op", "--model", "tiny", "--tokens", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no resettable peak")
def test_extra_memory_is_what_goes_beyond_the_result():
    size = 64 * 2**20

    def run():
        scratch = torch.ones(2 * size, dtype=torch.uint8)
        return scratch[:size].clone()

    run()
    assert timing.extra_bytes(run, size) == pytest.approx(2 * size, abs=4 * 2**20)
    assert timing.extra_bytes(lambda: torch.ones(size, dtype=torch.uint8), size) < 4 * 2**20


def test_the_op_takes_no_more_than_the_scratch_of_a_tile():
    """Two threads with a tile of products each, 229 KiB; eager PyTorch holds all of them, 7 MiB, before and after GELU.

    Few tokens are kept: what is freed before the result is made counts only where it is larger than that.
    """
    case = Case("qwen2-0.5b", 8192, dtype="fp32", keep=0.15)
    found = measure(case, ["eager", "cpu"], threads=(2,))
    if found["cpu", 2]["extra_bytes"] is None:
        pytest.skip("the system keeps no resettable peak")
    assert found["cpu", 2]["extra_bytes"] < 4 * 2**20 < found["eager", 2]["extra_bytes"]


# ------------------------------------------------------------------------------------------------------------ compare


def test_verdicts():
    base, here = [1.0, 1.1, 0.9, 1.05] * 5, [0.5, 0.55, 0.45, 0.52] * 5
    ratio, interval = compare.compare_medians(base, here)
    assert ratio == pytest.approx(2, rel=0.05)
    assert interval[0] <= ratio <= interval[1]
    assert compare.verdict(interval) == "faster"
    assert compare.verdict(compare.compare_medians(here, base)[1]) == "slower"
    assert compare.verdict(compare.compare_medians(base, [1.02, 0.9, 1.1, 1.0] * 5)[1]) == "no difference seen"


def test_two_sides_take_turns():
    case = Case("qwen2-0.5b", 300)
    (row,) = compare.measure({"base": ROOT, "here": ROOT}, [case], seconds=0)
    assert len(row["base_s_all"]) == len(row["seconds_all"]) == compare.MIN_ROUNDS
    assert row["interval"][0] <= row["ratio"] <= row["interval"][1]


def test_a_wrong_side_gets_no_figure(tmp_path):
    (tmp_path / "sdtp_kernels").symlink_to(ROOT / "sdtp_kernels")
    with pytest.raises(compare.SideError, match="base"):
        list(compare.measure({"base": tmp_path / "missing", "here": ROOT}, [Case("qwen2-0.5b", 300)], seconds=0))


def test_no_such_revision(capsys):
    assert cli.main(["bench", "compare", "--base", "no-such-revision"]) == 2
    assert "--base no-such-revision" in capsys.readouterr().err


def test_every_combination_is_a_case():
    args = argparse.Namespace(
        model=["tiny"], tokens=[10, 20], batch=[1], keep=[0.9, 0.8], dtype=["float32"], budget=["global"], seconds=0.0
    )
    assert [(case.keep, case.tokens) for case in op.cases_of(args)] == [(0.9, 10), (0.9, 20), (0.8, 10), (0.8, 20)]
