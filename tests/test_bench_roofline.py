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
from sdtp_bench.shapes import GPUS, Case, Gpu, make_stage, random_attention, random_stage, random_terms
from sdtp_kernels import PruningSchedule, cli, prune_tokens, reference

pytest.importorskip("triton", reason="the launches are those of the Triton backend")

# Runs both ops of a stage in Triton's interpreter and counts, launch by launch, the bytes of every load and store.
COUNTED = """
import functools
import json
import sys
import torch
sys.path.insert(0, "tests")
from triton_interpreter import before_each_access, recorded_launches
from sdtp_bench import roofline
from sdtp_bench.shapes import Gpu, random_stage, random_terms
from sdtp_kernels import prompt_bias, prune_tokens
from sdtp_kernels.schedule import StagePlan

def count(costs, run):
    moved = {}  # by number of the launch and kind of access

    def note(kind, addresses, itemsize):
        key = len(launches) - 1, kind
        moved[key] = moved.get(key, 0) + addresses.size * itemsize

    with recorded_launches() as launches, before_each_access(note):
        run(backend="triton")
    counted = [{"name": n, "read": moved[i, "load"], "written": moved[i, "store"]} for i, n in enumerate(launches)]
    print(json.dumps({"counted": counted, "computed": [cost._asdict() for cost in costs]}))

# One block a multiprocessor is enough there, and the tiles are the interpreter's.
gpu = Gpu("", "interpreter", 1, 1.0, 1.0, 1, 1.0, 1.0)
cases = ((128, 2, 2, 1), (200, 2, 1, 7), (300, 2, 1, 7), (1100, 1, 1, 255), (None, 1, 1, 7))
for block_size, blocks, batch, pooling in cases:
    body = blocks * (block_size or 300)
    stage = random_stage("cpu", torch.bfloat16, batch, body + 37, hidden_size=64, pruner_size=304, head_dim=16)
    plan = StagePlan(body * 3 // 4 + 37, 4, 37, block_size)
    count(roofline.triton_costs(stage, plan, gpu, pooling), functools.partial(
        prune_tokens, stage.hidden_states, stage.tensors, **stage.scoring._asdict(), **plan._asdict(), pooling=pooling,
    ))
for batch, heads, key_heads in ((1, 4, 2), (2, 3, 3)):
    terms = random_terms("cpu", torch.bfloat16, batch, 300, heads, key_heads, head_dim=32)
    given = {name: value for name, value in terms._asdict().items() if name != "attention"}
    count(roofline.bias_costs(terms, gpu), functools.partial(prompt_bias, given.pop("token_index"), **given))
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
    two = ["sdtp_score_kernel", "sdtp_select_and_gather_kernel"]
    three = ["sdtp_score_kernel", "sdtp_select_kernel", "sdtp_gather_kernel"]
    bias = ["sdtp_window_sums_kernel", "sdtp_window_kernel"]
    assert kernels == [["sdtp_prune_kernel"]] * 2 + [two] * 2 + [three] + [bias] * 2
    for case in cases:
        for counted, computed in zip(case["counted"], case["computed"], strict=True):
            assert computed["name"] == counted["name"]
            off = computed["bytes_read"] + computed["bytes_again"] - counted["read"]
            assert abs(off) <= (0 if computed["name"] in bias else 0.01 * counted["read"])
            assert computed["bytes_written"] == counted["written"]


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch):
    """Chooses the tile of the score: tokens, width of the pruner, hidden size."""
    from sdtp_kernels.backends.triton import configs

    def choose(*sizes: int) -> None:
        monkeypatch.setattr(configs, "score_config", lambda *_: configs.ScoreConfig(*sizes, num_warps=8, num_stages=3))

    choose(128, 128, 64)
    return choose


def test_counts_by_hand(tile) -> None:
    """Qwen2-7B on an H100, 4096 tokens: 410 of them are recent, so 3686 are scored, in 29 tiles of 128."""
    case = Case("qwen2-7b", 4096)
    stage, plan = make_stage(case, "meta"), case.plan()
    score, select, gather = roofline.triton_costs(stage, plan, GPUS["h100"])
    hidden, weights = 3686 * 3584 * 2, 256 * 3584 * 2 + 2 * 256 * 4
    assert score.name == "sdtp_score_kernel"
    assert score[1:5] == (2 * 3686 * 256 * 3585, hidden + weights, hidden + 28 * weights, 2 * 3686 * 4)
    assert (score.programs, score.padded_flops) == (2 * 29, 2 * (29 * 128) * 256 * 3584)
    kept = 3687  # ceil(0.9 * 4096)
    assert select.bytes_read == 4 * 3686 * 4 + 410 * 4  # two parts, a mean and a bias; the means of the tail
    assert select.bytes_written == kept * (8 + 4) + 3686 * 4
    # One program: four walks for the digits of its keys, and one to place them.
    assert (select.programs, select.instructions) == (1, 5 * 3686 * roofline.WALK_INSTRUCTIONS)
    row = 3584 * 2 + 2 * 128 * 2 + 8
    assert gather.name == "sdtp_gather_kernel"
    assert gather[1:6] == (0, kept * (row + 8), kept * 8 * 3, kept * row, 231)  # 16 tokens a program


def test_tiles_that_are_not_full(tile) -> None:
    """64 units in a tile of 128, 896 elements of the hidden size in steps of 256: half of the width, 128 too many."""
    case = Case("qwen2-0.5b", 1024)
    tile(128, 128, 256)
    score, *_ = roofline.triton_costs(make_stage(case, "meta"), case.plan(), GPUS["h100"])
    assert score.flops == 2 * 921 * 64 * 897
    assert (score.programs, score.padded_flops) == (8, 2 * (8 * 128) * 128 * 1024)


def test_what_l2_does_not_hold_is_read_again_from_memory(tile) -> None:
    """Blocks of 256 tokens of 7168 bytes on 132 multiprocessors take 242 MB of an H100's 50."""
    case = Case("qwen2-7b", 133 * 256, keep=0.75, budget="block", block_size=256)  # the last block is kept
    (prune,) = roofline.triton_costs(make_stage(case, "meta"), case.plan(), GPUS["h100"])
    hidden, chosen = 132 * 256 * 7168, 132 * 192 * 7168
    assert (prune.programs, prune.held_bytes, prune.held_again) == (132, 256 * 7168, hidden + chosen)
    far = prune.bytes_read + prune.bytes_written + prune.held_again
    assert prune.limits(GPUS["h100"])["memory"] == pytest.approx(far / 3.35e12 * 1e6)
    larger = GPUS["h100"]._replace(l2_bytes=132 * 256 * 7168)
    assert prune.limits(larger)["memory"] == pytest.approx(prune.memory_us(larger))
    tile(128, 256, 64)  # the width in one go: hidden states are read again by the copy alone
    (prune,) = roofline.triton_costs(make_stage(case, "meta"), case.plan(), GPUS["h100"])
    assert prune.held_again == chosen


def test_the_bias_by_hand() -> None:
    """Two rows of 300 keys on one multiprocessor: 16 queries of 6 heads of 32, three a key head, in tiles of 64 keys.

    Four heads of 16 queries are a product's rows. Of the second launch's 64 keys, 58 are a tile's own.
    """
    gpu = Gpu("", "sm_90", 1, 1.0, 1.0, 1, 1.0, 1.0)
    sums, window = roofline.bias_costs(random_terms("meta", torch.bfloat16, 2, 300, 6, 2, 32), gpu)
    assert (sums.programs, sums.padded_flops) == (2 * 2 * 1, 2 * 2 * 2 * 64 * 32 * 320)
    assert (window.programs, window.padded_flops) == (2 * 6, 2 * 2 * 2 * 64 * 32 * 6 * 64)
    assert sums.flops == window.flops == 2 * (2 * 16 * 6 * 32) * 300
    # Once more: each query as another one's partner; angles and indices for the second and the third head.
    near = 3 * 16 * 32 * 2 + 2 * 16 * (2 * 32 * 2 + 8)
    assert sums.near_bytes == 4 * near
    # And 64 highest logits of one part; for the second key head the angles of 16 queries, and the indices of all keys.
    seen = 300 + 5 * 6
    assert window.near_bytes == 12 * 2 * (near + 64 * 4) + 12 * 16 * (2 * 32 * 2 + 8) + 2 * seen * 8
    # The last program of a row: six times three moments in two walks, 300 indices, table entries, logarithms, results.
    assert window.last_bytes == 6 * (8 + 12) + 300 * (8 + 4 + 4 + 4)


def test_attention_counts_what_is_seen() -> None:
    inputs = random_attention(torch.tensor([[2, 5], [1, 4]]), 9, 4, 2, 16, torch.bfloat16, torch.tensor([1, 2]))
    cost = roofline.attention_cost(inputs)
    assert cost.flops == 4 * (1 + 4 + 0 + 2) * 4 * 16
    assert cost.bytes_written == 2 * 4 * 2 * 16 * 2


def test_launches_are_the_backends_own(monkeypatch: pytest.MonkeyPatch, tile) -> None:
    """No rule of the backend is copied: where it decides otherwise, so does the model."""
    from sdtp_kernels.backends.triton import configs, fused

    case = Case("qwen2-7b", 132 * 256, budget="block", block_size=256)
    stage, plan, before = make_stage(case, "meta"), case.plan(), configs.device_of

    def names(gpu: Gpu) -> list[str]:
        return [cost.name for cost in roofline.triton_costs(stage, plan, gpu)]

    monkeypatch.setattr(fused, "fits_one_launch", lambda *_: True)
    assert names(GPUS["mi300x"]) == ["sdtp_prune_kernel"]
    monkeypatch.setattr(fused, "fits_one_launch", lambda *_: False)
    assert names(GPUS["mi300x"]) == ["sdtp_score_kernel", "sdtp_select_and_gather_kernel"]
    narrow = roofline.triton_costs(stage, plan, GPUS["h100"])[0]
    tile(64, 32, 64)
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
    assert costs[0][:5] == ("rms_norm", 0, 2 * 8192 * 3584, 0, 2 * 8192 * 3584)  # one kernel, as on a GPU
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
    gpu = Gpu("", "sm_90", 1, tensor_flops=1e12, hbm_bytes=1e9, l2_bytes=1, l2_bandwidth=1e10, clock=1e9)
    compute = roofline.Cost("a", 8 * 10**6, 2000, 10**9, 1000)
    memory = roofline.Cost("b", 10**6, 2000, 10**9, 1000)
    assert (compute.bound_us(gpu), memory.bound_us(gpu)) == (8.0, 3.0)
    sums = roofline.total([compute, memory], gpu)
    assert (sums["launches"], sums["bound_us"], sums["bytes_again"]) == (2, 11.0, 2 * 10**9)
    assert sums["expected_us"] == compute.expected_us(gpu) + memory.expected_us(gpu)


@pytest.mark.parametrize(
    ("cost", "us", "by"),
    [
        # 11 programs of 2 MFLOP with what pads them: one multiprocessor has two, each has 1 TFLOP/s.
        (roofline.Cost("", 10**7, 0, 0, 0, programs=11, padded_flops=22 * 10**6), 4, "products"),
        (roofline.Cost("", 4 * 10**7, 0, 0, 0), 4, "products"),  # spread evenly
        (roofline.Cost("", 0, 2 * 10**5, 0, 10**5), 3, "memory"),
        (roofline.Cost("", 0, 10**5, 69 * 10**5, 0, near_bytes=10**6), 12, "L2"),
        # 64 bytes a nanosecond, for one program, then for two of a multiprocessor's of 11.
        (roofline.Cost("", 0, 320000, 0, 0, programs=1), 5, "L2 to one"),
        (roofline.Cost("", 0, 0, 1760000, 0, programs=11), 5, "L2 to one"),
        (roofline.Cost("", 0, 64000, 0, 0, programs=1, last_bytes=192000), 4, "last program"),
        # 128 instructions a nanosecond.
        (roofline.Cost("", 0, 0, 0, 0, programs=1, instructions=384000), 3, "instructions"),
        (roofline.Cost("", 0, 10**5, 0, 0, launches=3), 1, "launches"),
        # 10 programs at once hold 1000 bytes, as many as L2, then more.
        (roofline.Cost("", 0, 3 * 10**5, 0, 0, programs=20, held_bytes=100, held_again=10**5), 3, "memory"),
        (roofline.Cost("", 0, 3 * 10**5, 0, 0, programs=20, held_bytes=101, held_again=10**5), 4, "memory"),
    ],
)
def test_expected_at_best(cost: roofline.Cost, us: float, by: str) -> None:
    gpu = Gpu("", "sm_90", 10, 1e13, hbm_bytes=1e11, l2_bytes=1000, l2_bandwidth=5e11, clock=1e9)
    assert cost.expected_us(gpu) == pytest.approx(us + roofline.LAUNCH_US * cost.launches)
    assert roofline._expected_by(cost, gpu) == by


def test_words_say_who_wins() -> None:
    """By the part of the stage, not by the name of an operation."""
    ours = [("sdtp_score_kernel", 20), ("sdtp_select_kernel", 150), ("sdtp_gather_kernel", 30)]
    theirs = [("scoring", 50), ("selection", 30), ("selection", 10), ("copying", 45)]
    rows = [{"of": "triton", "name": name, "expected_us": us} for name, us in ours]
    rows += [{"of": "eager", "name": "", "part": part, "expected_us": us} for part, us in theirs]
    assert roofline.against_torch([{"of": "bias", "name": "sdtp_window_kernel", "expected_us": 9}, *rows]) == [
        "sdtp_score_kernel: 20 us at best, 50 in plain torch (scoring): 2.5 times as fast",
        "sdtp_select_kernel: 150 us at best, 40 in plain torch (selection): plain torch would win by 110 us. "
        "One program walks over a row; the plan is to share a row, as the cuda backend does.",
        "sdtp_gather_kernel: 30 us at best, 45 in plain torch (copying): 1.5 times as fast",
        "in all: 200 us at best, 135 in plain torch (scoring, selection, copying): plain torch would win by 65 us.",
    ]
    rows[1:3] = [{"of": "triton", "name": "sdtp_select_and_gather_kernel", "expected_us": 17}]
    assert roofline.against_torch(rows)[1] == (
        "sdtp_select_and_gather_kernel: 17 us at best, 85 in plain torch (selection, copying): 5.0 times as fast"
    )


def test_one_long_row_is_where_torch_wins() -> None:
    """Its selection is one program's; a short prompt's is done before torch has launched all that it launches."""
    for tokens, wins in ((4096, False), (131072, True)):
        result = roofline.compute("h100", Case("qwen2-7b", tokens))
        (verdict,) = [verdict for verdict in result["verdicts"] if verdict.startswith("sdtp_select_kernel")]
        assert ("plain torch would win" in verdict) == wins
        assert {row["part"] for row in result["rows"] if row["of"] == "eager"} == {"scoring", "selection", "copying"}
        assert all(row["expected_us"] > row["bound_us"] for row in result["rows"])
        launches = {row["name"]: row["launches"] for row in result["rows"] if row["of"] == "eager"}
        assert (launches["topk"], launches["sort"], launches["cat"]) == (4, 10, 1)  # bfloat16, then int64


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
        for us in ("bound_us", "expected_us"):
            assert sums[us] == pytest.approx(sum(row[us] for row in rows))
    out = capsys.readouterr().out
    tables = out.count("least us")
    assert tables == out.count("at best us")
    for verdict in result["verdicts"]:
        assert " ".join(verdict.split()) in " ".join(out.split())
    assert tables == out.count("MODEL, not measured") == 2
    assert "sdtp_select_and_gather_kernel" in out
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
