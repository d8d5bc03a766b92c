"""``sdtp bench gpu-check`` without a GPU: everything but the GPU, at tiny sizes, after the seam of its Device."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sdtp_bench import gpu_check, model_check, providers, shapes, timing
from sdtp_bench.shapes import Case
from sdtp_kernels import cli
from sdtp_kernels.backends import cpu, cuda

pytest.importorskip("triton", reason="the model of the times is that of the Triton backend")

TINY = shapes.Model(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, num_layers=2)
CASE = Case("tiny", 182, dtype="fp32", keep=0.7, budget="block", block_size=64, pooling=7)
SHAPE = gpu_check.Shape(2, 182, 24, 9)
EVERYONE = {"eager", "eager tuned", "torch.compile", "cpu"}
ATTENDING = {"cpu", "flex_attention", "sdpa"}


class FakeDevice:
    """A CPU that says it is an H100; its clock advances by 10 us whenever it is read."""

    torch_device = torch.device("cpu")
    compiler = "aot_eager"
    name = "NVIDIA H100 80GB HBM3"

    def __init__(self) -> None:
        self.clock, self.log = 0.0, []

    def flush(self) -> None:
        self.log.append("flush")

    def mark(self) -> float:
        self.log.append("mark")
        self.clock += 10
        return self.clock

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def microseconds(self, begin: float, end: float) -> float:
        assert self.log[-1] == "synchronize"  # a mark has a time only when it has passed
        return end - begin

    def capture(self, run):
        return run


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)
    monkeypatch.setattr(gpu_check, "BLOCK_SIZES", (None, 64))
    monkeypatch.setattr(gpu_check, "DTYPES", {"fp32": torch.float32, "bf16": torch.bfloat16})


def measure(device: FakeDevice | None = None, repeats: int = 2) -> dict[tuple[str, bool], dict]:
    rows = gpu_check.measure(device or FakeDevice(), CASE, repeats)
    return {(row["provider"], row["graph"]): row for row in rows}


# ------------------------------------------------------------------------------------------------- all of it together

INTERPRETED = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import triton_interpreter
import test_bench_gpu_check as test
from sdtp_bench import gpu_check, model_check, shapes, timing

shapes.MODELS["tiny"] = test.TINY
gpu_check.BLOCK_SIZES, timing.WARM_UPS = (64,), 1
gpu_check.DTYPES = {"bf16": test.torch.bfloat16, "fp32": test.torch.float32}
shape, case = test.SHAPE._replace(tokens=70), test.CASE._replace(dtype="bf16")
sys.exit(gpu_check.examine(test.FakeDevice(), Path(sys.argv[1]), [shape], [case], 2, [case]))
"""


def test_the_kernels_pass_in_the_interpreter(tmp_path: Path) -> None:
    """The whole command but for the GPU, with the Triton backend in Triton's interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " 0 wrong" in result.stdout
    assert "at least" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / gpu_check.ROWS).read_text().splitlines()]
    assert (tmp_path / "out" / gpu_check.PICTURE).read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["error"] == ""
        assert row["machine"]["gpu"] == FakeDevice.name
        assert {"torch", "triton"} <= set(row["versions"])
        assert {"revision", "date"} <= set(row)
    checked = {(row["backend"], row["op"]) for row in rows if row["kind"] == "check"}
    ops = {"score_tokens", "select_tokens", "gather_tokens", "prune_tokens", "prompt_bias", "position_attention"}
    assert checked == {(backend, op) for backend in ("cpu", "triton") for op in ops}
    assert {row["provider"] for row in rows if row["kind"] == "attention"} == {*ATTENDING, "triton"}
    timed = {(row["provider"], row["graph"]): row for row in rows if row["kind"] == "time"}
    assert set(timed) == {(name, graph) for name in EVERYONE | {"triton"} for graph in (False, True)}
    for row in timed.values():
        assert row["us"] == {"p10": 10, "p50": 10, "p90": 10}
        assert row["us_all"] == [10, 10]
        assert row["num_keep"] == 2 * 45 + 54
        assert row["model_bound_us"] > 0
        assert row["model_bytes"] > 182 * 32 * 2


# ------------------------------------------------------------------------------------------------ no figure where wrong


def copy_of_another_row(output):
    hidden_states, *others = output
    return hidden_states.roll(1, dims=1), *others


def lost_last_bit(output):
    output[1][0].view(torch.int32)[0, 5, 3] ^= 1
    return output


def wrong_dtype(output):
    return output[0].double(), *output[1:]


def descending(output):
    return tuple([t.flip(1) for t in part] if isinstance(part, list) else part.flip(1) for part in output)


def one_too_few(output):
    return output[0][:, 1:], [t[:, 1:] for t in output[1]], output[2][:, 1:], *output[3:]


def raises(output):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (copy_of_another_row, "tensor 0: not the rows"),
        (lost_last_bit, "tensor 1: not the rows"),
        (wrong_dtype, "tensor 0: [1, 144, 32] torch.float64, expected"),
        (descending, "not ascending"),
        (one_too_few, "indices are [1, 143], expected [1, 144]"),
        (raises, "RuntimeError: out of memory"),
    ],
)
def test_a_wrong_kernel_gets_no_figure(monkeypatch: pytest.MonkeyPatch, spoil, message: str) -> None:
    right = cpu.prune_tokens
    monkeypatch.setattr(cpu, "prune_tokens", lambda *arguments: spoil(right(*arguments)))
    rows = measure()
    wrong = [row for (name, _), row in rows.items() if name == "cpu"]
    assert wrong
    for row in wrong:
        assert message in row["error"]
        assert not {"us", "us_all"} & set(row)
    for name in EVERYONE - {"cpu"}:
        assert rows[name, False]["error"] == ""
        assert rows[name, False]["us"]["p50"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": 1}, "ranks above one that was kept"),
        ({"sink": 0}, "ranks above one that was kept"),
        ({"block_size": None}, "the same count in every block"),
        ({"recent": 0, "block_size": None}, "not the last tokens"),
    ],
)
def test_a_wrong_selection_gets_no_figure(monkeypatch: pytest.MonkeyPatch, change: dict, message: str) -> None:
    right = cpu.prune_tokens

    def wrong(hidden_states, tensors, scoring, selection, num_dropped):
        if "sink" in change:  # negated scores: the kernel keeps just those that it should drop, but for what is forced
            scoring = scoring._replace(w2=-scoring.w2, b2=-scoring.b2, mean_score=-scoring.mean_score)
        return right(hidden_states, tensors, scoring, selection._replace(**change), num_dropped)

    monkeypatch.setattr(cpu, "prune_tokens", wrong)
    row = measure()["cpu", False]
    assert message in row["error"]
    assert "us" not in row


def test_a_wrong_graph_gets_no_figure() -> None:
    class Device(FakeDevice):
        def capture(self, run):
            if "backend" in run.keywords:
                return lambda: copy_of_another_row(run())
            raise RuntimeError("operation not permitted when stream is capturing")

    rows = measure(Device())
    for name in EVERYONE:
        assert rows[name, False]["us"]["p50"] == 10
        assert "us" not in rows[name, True]
    assert "not the rows" in rows["cpu", True]["error"]
    assert "not permitted" in rows["eager", True]["error"]


def test_attention_is_timed_beside_what_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention with a kernel of its own: the CUDA library has none, and would hold all weights."""
    monkeypatch.setattr(cuda, "unavailable_reason", lambda *_: None)
    rows = gpu_check.measure_attention(FakeDevice(), CASE, 2)
    assert {(row["provider"], row["graph"]) for row in rows} == {(n, g) for n in ATTENDING for g in (False, True)}
    kept = CASE.plan().num_keep
    for row in rows:
        assert (row["kind"], row["error"], row["tokens"], row["num_keep"]) == ("attention", "", 182, kept)
        assert row["us_all"] == [10, 10]
        assert row["model_bytes"] == 4 * 2 * (2 * kept * 16 + 182 * 16) + 8 * (kept + 1)  # queries and results, keys


@pytest.mark.parametrize(
    "spoil",
    [
        lambda query, key, value, num_visible, *rest: (query, key, value, num_visible + 1, *rest),
        lambda query, key, value, num_visible, *rest: (query, key, value, num_visible.clamp(max=100), *rest),
    ],
)
def test_a_wrong_attention_gets_no_figure(monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """And one that fails leaves the others alone."""
    right = cpu.position_attention
    monkeypatch.setattr(cpu, "position_attention", lambda *arguments: right(*spoil(*arguments)))
    monkeypatch.setattr(torch.nn.attention.flex_attention, "create_block_mask", raises)
    rows = {row["provider"]: row for row in gpu_check.measure_attention(FakeDevice(), CASE, 2) if not row["graph"]}
    assert set(rows) == ATTENDING
    assert "results differ" in rows["cpu"]["error"]
    assert "TypeError" in rows["flex_attention"]["error"]
    assert rows["sdpa"]["error"] == ""
    assert [name for name, row in rows.items() if "us" in row] == ["sdpa"]


def test_every_attention_sees_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that are padded, too. Of 65536 keys a query shows which of them it saw."""
    visible = torch.arange(3, 183, 2).expand(2, -1)
    inputs = shapes.random_attention(visible, 190, 4, 2, 16, torch.float32, torch.tensor([2, 0]))
    check = providers.make_attention_check(inputs)
    assert {name: check(run) for name, run in providers.find_attention(FakeDevice(), inputs).items()} == dict.fromkeys(
        ATTENDING, ""
    )
    whole = {providers.ORACLE_QUERIES: check(lambda: cpu.position_attention(*inputs))}
    monkeypatch.setattr(providers, "ORACLE_QUERIES", 32)
    whole[32] = providers.make_attention_check(inputs)(lambda: cpu.position_attention(*inputs))
    assert set(whole.values()) == {""}
    inputs = shapes.random_attention(torch.tensor([[1, 65536]]), 65536, 2, 1, 16, torch.bfloat16)
    right = cpu.position_attention(*inputs)
    check = providers.make_attention_check(inputs)
    assert check(lambda: right) == ""
    assert "results differ" in check(lambda: right.index_fill(2, torch.tensor([1]), 0))


def test_runs_are_interleaved_and_cold() -> None:
    device = FakeDevice()
    order = []

    def run(name):
        return lambda: device.log.append(name) or order.append(name)

    runs = {(name, False): run(name) for name in "ab"}
    times = timing.interleave(device, runs, repeats=3)
    assert order == ["a", "b", "b", "a"] * 3  # interleaved, so that neither always follows the other
    assert device.log == [x for name in order for x in ("flush", "mark", name, "mark")] + ["synchronize"]
    assert {key: len(value) for key, value in times.items()} == {("a", False): 3, ("b", False): 3}


def test_unknown_gpus_have_no_model() -> None:
    device = FakeDevice()
    device.name = "Some GPU"
    assert gpu_check._model(device, raises) == {"model_bytes": None, "model_bound_us": None}


# ------------------------------------------------------------------------------------------------ checks of the kernels


def noisy(scores):
    return scores + 0.05 * torch.randn_like(scores)


def by_the_batch(scores):
    return scores + 2e-7 * scores.shape[1]


@pytest.mark.parametrize(
    ("op", "spoil", "message"),
    [
        ("score_tokens", noisy, "scores differ"),
        ("score_tokens", by_the_batch, "depend on the rest of the batch"),
        ("score_tokens", lambda scores: scores.fill_(torch.nan), "scores differ"),
        ("select_tokens", lambda indices: indices.roll(1, dims=1), "indices differ"),
        ("gather_tokens", lambda tensors: [*tensors[:-1], ~tensors[-1]], "tensor 69: not the rows"),
        ("prune_tokens", copy_of_another_row, "tensor 0: not the rows"),
        ("prune_tokens", lambda output: (*output[:2], output[2] - 1, *output[3:]), "indices differ"),
        ("prune_tokens", lambda output: (*output[:3], output[3] + 1e-7, output[4]), "tensor 4: not the rows"),
        ("prune_tokens", lambda output: (*output[:4], output[4].roll(1, dims=1)), "tensor 5: not the rows"),
        ("prompt_bias", noisy, "results differ"),
        ("prune_tokens", raises, "RuntimeError"),
        ("position_attention", lambda output: output.roll(1, dims=1), "results differ"),
        ("position_attention", lambda output: output.fill_(torch.nan), "results differ"),
    ],
)
def test_checks_find_wrong_kernels(monkeypatch: pytest.MonkeyPatch, op: str, spoil, message: str) -> None:
    right = getattr(cpu, op)
    monkeypatch.setattr(cpu, op, lambda *arguments: spoil(right(*arguments)))
    rows = list(gpu_check.check_kernels(FakeDevice(), [SHAPE]))
    found = [row for row in rows if row["op"] == op]
    assert found
    assert all(message in row["error"] for row in found), found
    assert {row["backend"] for row in rows} == {"cpu"}


def test_the_cuda_backend_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can run: here the CPU library computes under its name."""
    monkeypatch.setattr(cuda, "unavailable_reason", lambda *_: None)
    for op in ("score_tokens", "select_tokens", "gather_tokens", "prune_tokens"):
        monkeypatch.setattr(cuda, op, getattr(cpu, op))
    rows = list(gpu_check.check_kernels(FakeDevice(), [SHAPE]))
    assert not [row for row in rows if row["error"]]
    checked = {row["op"] for row in rows if row["backend"] == "cuda"}
    assert checked == {
        "score_tokens", "select_tokens", "gather_tokens", "prune_tokens", "prompt_bias", "position_attention",
    }  # fmt: skip
    assert ("cuda", False) in measure()


def test_checks_pass_right_kernels_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BLOCK_SIZES", (None, 128))
    sizes = [gpu_check.Shape(1, 1, 64, 16), gpu_check.Shape(3, 17, 100, 25), gpu_check.Shape(2, 300, 96, 24)]
    rows = list(gpu_check.check_kernels(FakeDevice(), sizes))
    assert not [row for row in rows if row["error"]]
    assert {row["padded"] for row in rows if row["op"] == "prune_tokens"} == {False, True}
    tokens = {shape.tokens for shape in gpu_check.CHECK_SHAPES}
    sizes = {shape.hidden_size for shape in gpu_check.CHECK_SHAPES}
    assert (min(tokens), max(tokens), min(sizes), max(sizes)) == (1, 131072, 64, 8192)


@pytest.mark.parametrize("status", [0, 99])
def test_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    program = tmp_path / gpu_check.SANITIZER
    program.write_text(f'#!/bin/sh\necho "$@ $PYTORCH_NO_CUDA_MEMORY_CACHING"\nexit {status}\n')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [row["tool"] for row in gpu_check.sanitize()] == [None]  # not executable yet
    program.chmod(0o755)
    rows = list(gpu_check.sanitize())
    assert [row["tool"] for row in rows] == list(gpu_check.SANITIZER_TOOLS)
    for row in rows:
        expected = f"--tool {row['tool']} --error-exitcode 99 {sys.executable} -m sdtp_bench.gpu_check 1"
        assert row["error"] == (f"exit 99: {expected}\n" if status else "")


def test_small_run_fails_where_a_check_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu_check, "SMALL_SHAPES", (SHAPE,))
    assert gpu_check._small_run(FakeDevice()) == 0
    monkeypatch.setattr(cpu, "select_tokens", raises)
    assert gpu_check._small_run(FakeDevice()) == 1
    assert "select_tokens" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def sdtp(monkeypatch: pytest.MonkeyPatch):
    """Runs ``sdtp bench gpu-check`` and returns its status."""
    point = metadata.EntryPoint("bench", "sdtp_bench.cli:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"bench": point})
    return lambda *options: cli.main(["bench", "gpu-check", *map(str, options)])


def test_without_a_gpu(sdtp, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sdtp("--out", tmp_path / "out") == 2
    streams = capsys.readouterr()
    assert f"no GPU that torch {torch.__version__} can use" in streams.err
    assert streams.out == ""
    assert not (tmp_path / "out").exists()


def test_status_and_rows_where_a_kernel_is_wrong(sdtp, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "CudaDevice", FakeDevice)
    few = functools.partial(gpu_check.examine, shapes=[SHAPE], cases=[CASE], repeats=2, attention_cases=())
    monkeypatch.setattr(gpu_check, "examine", few)
    right = cpu.prune_tokens
    monkeypatch.setattr(cpu, "prune_tokens", lambda *arguments: copy_of_another_row(right(*arguments)))
    assert sdtp("--out", tmp_path, "--only", "kernels", "times") == 1
    assert "Nothing was checked.\n  triton: " in capsys.readouterr().out  # required, and not here
    monkeypatch.setattr(gpu_check, "GPU_BACKENDS", ("cpu",))
    assert sdtp("--out", tmp_path) == 1
    rows = [json.loads(line) for line in (tmp_path / gpu_check.ROWS).read_text().splitlines()]
    wrong = [row for row in rows if row["error"]]
    out = capsys.readouterr().out
    assert out.count("WRONG") == len(wrong) > 1
    assert f"{len(wrong)} wrong" in out
    assert "eager" in out
    assert not [row for row in rows if row["kind"] == "time" and row["provider"] == "cpu" and "us" in row]
    (tmp_path / "file").touch()
    assert sdtp("--out", tmp_path / "file") == 2
    assert "--out" in capsys.readouterr().err


def test_a_run_that_checks_nothing_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    examine = functools.partial(gpu_check.examine, FakeDevice(), tmp_path / "out", [SHAPE], [CASE], 2)
    assert examine(require=["cpu"], parts=["kernels"]) == 0
    for absent in ("triton", "cuda"):
        assert examine(require=["cpu", absent]) == 1
        assert f"Nothing was checked.\n  {absent}: " in capsys.readouterr().out
    monkeypatch.setattr(gpu_check, "backends_on", lambda device, dtype: [])
    assert examine(require=["cpu"], parts=["kernels"]) == 1
    assert "Nothing was checked of cpu: this run proves nothing" in capsys.readouterr().out
    assert examine(parts=["kernels"]) == 1
    assert "Nothing was checked of anything" in capsys.readouterr().out


def test_a_short_visit_ends_in_time_and_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    examine = functools.partial(gpu_check.examine, FakeDevice(), tmp_path, [SHAPE], [CASE], 2, [CASE], require=["cpu"])
    clock = iter(range(10**6))
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: next(clock))
    assert examine(deadline=9.5) == 1
    assert "--deadline 9.5 has passed" in capsys.readouterr().out
    first = (tmp_path / gpu_check.ROWS).read_text().splitlines()
    assert len(first) == 10
    checked = []
    error_of = gpu_check.error_of
    monkeypatch.setattr(gpu_check, "error_of", lambda check, backend: checked.append(check) or error_of(check, backend))
    assert examine(resume=True) == 0
    rows = (tmp_path / gpu_check.ROWS).read_text().splitlines()
    assert rows[:10] == first  # and what they are of was not done again
    keys = [gpu_check._key(row) + str(row.get("provider")) + str(row.get("graph")) for row in map(json.loads, rows)]
    assert len(set(keys)) == len(keys)
    kernels = [row for row in rows if json.loads(row)["kind"] == "check"]
    checked.clear()
    assert examine(resume=True) == 0
    assert checked == []
    assert (tmp_path / gpu_check.ROWS).read_text().splitlines() == rows
    # What was wrong is done again.
    spoiled = [json.dumps({**json.loads(rows[3]), "error": "wrong"}) if i == 3 else row for i, row in enumerate(rows)]
    (tmp_path / gpu_check.ROWS).write_text("\n".join(spoiled) + "\n")
    assert examine(resume=True) == 0
    assert len(checked) == 1
    assert len((tmp_path / gpu_check.ROWS).read_text().splitlines()) == len(rows)
    assert kernels
    # A case is timed again as a whole, and what an earlier part found wrong is not forgotten.
    timed = [i for i, row in enumerate(map(json.loads, rows)) if row["kind"] == "time"]
    assert [row["kind"] for row in map(json.loads, rows[timed[-1] + 1 :])] == ["attention"] * 2 * len(ATTENDING)
    spoiled = [json.dumps({**json.loads(r), "error": "wrong"}) if i in (3, timed[0]) else r for i, r in enumerate(rows)]
    (tmp_path / gpu_check.ROWS).write_text("\n".join(spoiled) + "\n")
    assert examine(resume=True, parts=["times"]) == 1
    found = [json.loads(row) for row in (tmp_path / gpu_check.ROWS).read_text().splitlines()]
    assert [row["kind"] for row in found if row["error"]] == ["check"]
    assert len(found) == len(rows)


def test_the_plan_needs_no_gpu(sdtp, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sdtp("--dry-run", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:5]] == list(gpu_check.PARTS)
    assert not (tmp_path / "out").exists()
    assert sdtp("--dry-run", "--only", "times") == 0
    assert "kernels" not in capsys.readouterr().out
    # What a short visit should see first.
    assert [case.tokens for case in sorted(gpu_check.BENCH_CASES, key=gpu_check._value)[:6]] == [4096] * 3 + [32768] * 3


def test_a_patched_model_by_every_attention(monkeypatch):
    """All of it but the GPU; flex attention compiles for minutes on a CPU and has a test of its own."""
    monkeypatch.setattr(model_check, "ATTENTIONS", ("sdpa",))
    rows = {(row["backend"], row["op"]): row["error"] for row in model_check.check_models(FakeDevice())}
    assert rows == {
        ("sdpa", "padded batch"): "",
        ("sdpa", "static cache"): "",
        ("sdpa", "captured prefill"): "",
    }
    monkeypatch.setattr(model_check, "PADDING", 0)
    expected = model_check._two_calls(model_check._model(FakeDevice(), "eager"), None)
    monkeypatch.setattr(model_check, "PADDING", 300)
    got = model_check._two_calls(model_check._model(FakeDevice(), "sdpa"), None)
    assert "logits differ" in model_check._difference(got, expected), "it can tell right from wrong"
