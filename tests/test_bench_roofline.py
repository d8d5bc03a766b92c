"""``sdtp bench roofline``: its counts are those of the kernels, and it never passes for a measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sdtp_bench import eager, roofline
from sdtp_bench.shapes import GPUS, Case, Gpu, make_stage, random_stage
from sdtp_kernels import PruningSchedule, cli, prune_tokens, reference

pytest.importorskip("triton", reason="the launches are those of the Triton backend")

# Runs `prune_tokens` in Triton's interpreter and counts, launch by launch, the bytes of every load and store.
COUNTED = """
import json
import sys
import torch
sys.path.insert(0, "tests")
from triton_interpreter import before_each_access, recorded_launches
from sdtp_bench import roofline
from sdtp_bench.shapes import Gpu, random_stage
from sdtp_kernels import prune_tokens
from sdtp_kernels.schedule import StagePlan

# One block a multiprocessor is enough there, and the tiles are the interpreter's.
gpu = Gpu("", "interpreter", 1, 1.0, 1.0, 1)
cases = ((128, 2, 2, 1), (200, 2, 1, 7), (300, 2, 1, 7), (1100, 1, 1, 255), (None, 1, 1, 7))
for block_size, blocks, batch, pooling in cases:
    body = blocks * (block_size or 300)
    stage = random_stage("cpu", torch.bfloat16, batch, body + 37, hidden_size=64, pruner_size=304, head_dim=16)
    plan = StagePlan(body * 3 // 4 + 37, 4, 37, block_size)
    moved = {}  # by number of the launch and kind of access

    def count(kind, addresses, itemsize):
        key = len(launches) - 1, kind
        moved[key] = moved.get(key, 0) + addresses.size * itemsize

    with recorded_launches() as launches, before_each_access(count):
        prune_tokens(
            stage.hidden_states, stage.tensors, **stage.scoring._asdict(), **plan._asdict(), pooling=pooling,
            backend="triton",
        )
    counted = [{"name": n, "read": moved[i, "load"], "written": moved[i, "store"]} for i, n in enumerate(launches)]
    costs = roofline.triton_costs(stage, plan, gpu, pooling)
    print(json.dumps({"counted": counted, "computed": [cost._asdict() for cost in costs]}))
"""


def run_interpreted(script: str, *arguments: object) -> str:
    """The script in a process of its own, because the interpreter is chosen when Triton is imported."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_bytes_are_those_that_the_interpreter_counts() -> None:
    cases = [json.loads(line) for line in run_interpreted(COUNTED).splitlines()]
    kernels = [[launch["name"] for launch in case["counted"]] for case in cases]
    two = ["score_kernel", "select_and_gather_kernel"]
    assert kernels == [["prune_kernel"]] * 2 + [two] * 2 + [["score_kernel", "select_kernel", "gather_kernel"]]
    for case in cases:
        for counted, computed in zip(case["counted"], case["computed"], strict=True):
            assert computed["name"] == counted["name"]
            assert computed["bytes_read"] + computed["bytes_again"] == pytest.approx(counted["read"], rel=0.01)
            assert computed["bytes_written"] == counted["written"]


def test_counts_by_hand() -> None:
    """Qwen2-7B on an H100, 4096 tokens: 410 of them are recent, so 3686 are scored, in 29 tiles of 128."""
    case = Case("qwen2-7b", 4096)
    stage, plan = make_stage(case, "meta"), case.plan()
    score, select, gather = roofline.triton_costs(stage, plan, GPUS["h100"])
    hidden, weights = 3686 * 3584 * 2, 256 * 3584 * 2 + 2 * 256 * 4
    assert score == ("score_kernel", 2 * 3686 * 256 * 3585, hidden + weights, hidden + 28 * weights, 2 * 3686 * 4)
    kept = 3687  # ceil(0.9 * 4096)
    assert select.bytes_read == 4 * 3686 * 4 + 410 * 4  # two parts, a mean and a bias; the means of the tail
    assert select.bytes_written == kept * (8 + 4) + 3686 * 4
    row = 3584 * 2 + 2 * 128 * 2 + 8
    assert gather == ("gather_kernel", 0, kept * (row + 8), kept * 8 * 3, kept * row)


def test_launches_are_the_backends_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule of the backend is copied: where it decides otherwise, so does the model."""
    from sdtp_kernels.backends.triton import configs, fused

    case = Case("qwen2-7b", 132 * 256, budget="block", block_size=256)
    stage, plan, before = make_stage(case, "meta"), case.plan(), configs.device_of

    def names(gpu: Gpu) -> list[str]:
        return [cost.name for cost in roofline.triton_costs(stage, plan, gpu)]

    monkeypatch.setattr(fused, "fits_one_launch", lambda *_: True)
    assert names(GPUS["mi300x"]) == ["prune_kernel"]
    monkeypatch.setattr(fused, "fits_one_launch", lambda *_: False)
    assert names(GPUS["mi300x"]) == ["score_kernel", "select_and_gather_kernel"]
    smaller = configs.ScoreConfig(64, 32, 64, 8, 3)
    narrow = roofline.triton_costs(stage, plan, GPUS["h100"])[0]
    monkeypatch.setitem(configs.SCORE, "sm_90", {2: smaller})
    assert roofline.triton_costs(stage, plan, GPUS["h100"])[0].bytes_written == narrow.bytes_written * 8 // 2
    assert configs.device_of is before
    assert callable(fused.score_parts)


def test_gpus_are_of_architectures_in_the_table() -> None:
    from sdtp_kernels.backends.triton import configs

    assert {gpu.target for gpu in GPUS.values()} <= set(configs.SCORE)


def test_eager_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("qwen2-7b", 4096, keep=0.75, batch=2, pooling=1)
    stage, plan = make_stage(case, "meta"), case.plan()
    costs = roofline.eager_costs(stage, plan)
    names = [cost.name for cost in costs]
    assert names[names.index("addmm") :] == [
        "addmm", "gelu", "addmm", "lerp", "add", "fill_", "topk", "arange", "sort", "cat", *["gather"] * 4,
    ]  # fmt: skip
    first, gelu, *_ = costs[names.index("addmm") :]
    tokens, hidden_size, width, kept = 2 * 4096, 3584, 256, 2 * 3072
    assert first.flops == 2 * tokens * hidden_size * width
    assert first.bytes_read == 2 * (tokens * hidden_size + hidden_size * width + width)
    assert first.bytes_written == gelu.bytes_read == gelu.bytes_written == 2 * tokens * width
    assert costs[names.index("fill_")].bytes_read == 0
    # The rows that it takes, and an index that is expanded over the hidden size but stands in memory once.
    assert costs[names.index("gather")].bytes_read == 2 * kept * hidden_size + 8 * kept

    usual = eager.prune_tokens
    monkeypatch.setattr(eager, "prune_tokens", lambda stage, *rest: usual(stage, *rest)[0].exp())
    assert [cost.name for cost in roofline.eager_costs(stage, plan)] == [*names, "exp"]


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("pooling", [1, 7])
@pytest.mark.parametrize("block_size", [None, 64])
def test_eager_prunes_right(block_size: int | None, pooling: int, tokens: int) -> None:
    budget = {"budget": "block", "block_size": block_size} if block_size else {}
    plan = PruningSchedule((1,), 0.7, min_prompt=1, **budget).plan(tokens, 1)
    stage = random_stage("cpu", torch.float32, 2, tokens, hidden_size=24, pruner_size=10, head_dim=6)
    scoring = stage.scoring._asdict()
    expected = prune_tokens(
        stage.hidden_states, stage.tensors, **scoring, **plan._asdict(), pooling=pooling, backend="reference"
    )
    hidden_states, tensors, indices = eager.prune_tokens(stage, plan, pooling)
    if pooling == 1:
        assert torch.equal(indices, expected.indices)
    else:  # neighbours tie, and topk may take either of them: what they rank by is the same
        size, body = block_size or tokens, tokens - plan.recent
        exact = reference.score_tokens(stage.hidden_states, stage.scoring)
        for row, got, wanted in zip(exact, indices, expected.indices, strict=True):
            near = [range(max(i - 3, i // size * size), min(i + 4, i // size * size + size, body)) for i in range(body)]
            ranks = [max(row[j].item() for j in window) for window in near] + [torch.inf] * plan.recent
            assert sorted(ranks[i] for i in got) == sorted(ranks[i] for i in wanted)
            assert got.unique().tolist() == got.tolist()
    copies = reference.gather_tokens([stage.hidden_states, *stage.tensors], indices)
    for a, b in zip([hidden_states, *tensors], copies, strict=True):
        assert torch.equal(a, b)


def test_bound_is_the_slower_of_the_two() -> None:
    gpu = Gpu("", "sm_90", 1, tensor_flops=1e12, hbm_bytes=1e9, l2_bytes=1)
    compute = roofline.Cost("a", 8 * 10**6, 2000, 10**9, 1000)
    memory = roofline.Cost("b", 10**6, 2000, 10**9, 1000)
    assert (compute.bound_us(gpu), memory.bound_us(gpu)) == (8.0, 3.0)
    sums = roofline.total([compute, memory], gpu)
    assert (sums["launches"], sums["bound_us"], sums["bytes_again"]) == (2, 11.0, 2 * 10**9)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def sdtp(monkeypatch: pytest.MonkeyPatch):
    """Runs ``sdtp bench roofline`` and returns its status."""
    point = metadata.EntryPoint("bench", "sdtp_bench.cli:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"bench": point})

    def run(*options: object) -> int:
        defaults = {"--gpu": "h100", "--model": "qwen2-0.5b", "--tokens": 2048}
        words = [str(word) for name, value in defaults.items() if name not in options for word in (name, value)]
        return cli.main(["bench", "roofline", *words, *map(str, options)])

    return run


def test_everything_says_that_it_is_a_model(sdtp, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert sdtp("--budget", "block", "--block-size", 256, "--pooling", 7, "--batch", 2, "--json", path) == 0
    result = json.loads(path.read_text())
    for row in (result, *result["rows"], *result["totals"].values()):
        assert row["kind"] == "model: computed, not measured"
    assert {row["of"] for row in result["rows"]} == {"triton", "eager"} == set(result["totals"])
    for of, sums in result["totals"].items():
        rows = [row for row in result["rows"] if row["of"] == of]
        assert sums["launches"] == len(rows)
        assert sums["bound_us"] == pytest.approx(sum(row["bound_us"] for row in rows))
    out = capsys.readouterr().out
    tables = out.count("least us")
    assert tables == out.count("MODEL, not measured") == 2
    assert "select_and_gather_kernel" in out
    assert "2 in all" in out
    assert "blocks of 256" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "v100"), "gpu 'v100' is not known; known: h100, h200, a100, 4090, mi300x"),
        (("--model", "llama"), "model 'llama' is not known; known: qwen2-0.5b, qwen2-1.5b, qwen2-7b"),
        (("--tokens", 0), "expected at least one"),
        (("--batch", 0), "expected at least one"),
        (("--pooling", 4), "pooling=4: expected an odd number"),
        (("--pooling", 257), "pools over at most 255 tokens"),
        (("--keep", 1.5), "keep_ratio=1.5"),
        (("--budget", "block", "--block-size", 2), "block_size=2"),
        (("--json", "nowhere/rows.json"), "cannot be written"),
    ],
)
def test_mistakes_get_one_message(sdtp, capsys: pytest.CaptureFixture[str], options: tuple, message: str) -> None:
    assert sdtp(*options) == 2
    assert message in capsys.readouterr().err


def test_a_dtype_without_tensor_cores_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype 'fp32' is not known; known: bf16, fp16"):
        roofline.compute("h100", Case("qwen2-0.5b", 2048, dtype="fp32"))
