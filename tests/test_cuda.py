"""The CUDA backend: what its kernels compute, on the CPU, whether they race, and what nvcc makes of them.

No test needs a GPU. `cuda_on_cpu/` runs the kernels' own source with a fiber for each CUDA thread: plain, under
ThreadSanitizer, which then finds missing barriers, and under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import json
import re
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_aot
import pytest
import torch
from cuda_on_cpu import build

from sdtp_kernels import BackendUnavailableError, backends, explain_backends, select_tokens
from sdtp_kernels.arguments import PromptTerms, Selection, Window
from sdtp_kernels.backends import _native, limits
from sdtp_kernels.backends import cuda as backend

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("score", "select", "gather", "prune", "window", "bias")
SMALL = {"race": ("--small",)}  # ThreadSanitizer pays for every thread there is at once


# ------------------------------------------------------------------------------------------------- run on the CPU


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """The suite in the chosen builds, two at a time."""
    chosen = [item.callspec.params["mode"] for item in request.session.items if item.originalname == "test_kernels"]
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        yield {mode: pool.submit(build.compile_program, "suite", mode, folder) for mode in dict.fromkeys(chosen)}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mode", build.MODES)
def test_kernels(mode, group, programs):
    result = build.run_program(programs[mode].result(), group, *SMALL.get(mode, ()))
    assert result.returncode == 0, (result.stdout + result.stderr)[:6000]
    assert int(re.search(r"all right, (\d+) launches", result.stdout)[1]) > 0


SCAN_END = "    __syncthreads();  // the next call writes them again\n"
SCAN_BEGIN = "    uint32_t inclusive = value;\n"
STAGE_END = "            __syncthreads();  // the next tile writes them again\n"
STAGE_BEGIN = "            for (int j = thread(); j < kThreads + 2 * reach; j += kThreads) {\n"
# Edits that a race checker must not complain about: barriers twice, or where they do the same.
HARMLESS = {
    "doubled": ("cta.cuh", {SCAN_END: 2 * SCAN_END}),
    "before a scan, not after": ("cta.cuh", {SCAN_END: "", SCAN_BEGIN: f"    __syncthreads();\n{SCAN_BEGIN}"}),
    "before a tile, not after": ("select.cuh", {STAGE_END: "", STAGE_BEGIN: f"__syncthreads();\n{STAGE_BEGIN}"}),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_redundant_barriers_are_no_races(name, tmp_path):
    file, edits = HARMLESS[name]
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = csrc / "cuda" / file
    for before, after in edits.items():
        assert path.read_text().count(before) == 1
        path.write_text(path.read_text().replace(before, after))
    result = build.run_program(build.compile_program("suite", "race", tmp_path, csrc), "select", "--small")
    assert result.returncode == 0, result.stderr[:4000]


@pytest.fixture(scope="module")
def misuse(tmp_path_factory):
    return build.compile_program("misuse", "plain", tmp_path_factory.mktemp("misuse"))


MISUSES = re.findall(r'^    \{"(.*?)",', (ROOT / "tests" / "cuda_on_cpu" / "misuse.cpp").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", MISUSES)
def test_the_machine_watches_the_rules(name, misuse):
    result = build.run_program(misuse, name)
    if name == "right":
        assert result.stdout == "ran; too many blocks in cooperative launch\n"
        return
    assert result.returncode == 70
    assert re.search(rf"cuda_on_cpu: {re.escape(name)}.*misuse\.cpp:\d+", result.stderr), result.stderr


# --------------------------------------------------------------------------------------------------------- nvcc


@pytest.fixture(scope="module")
def rows():
    """What nvcc made of every kernel, for every target."""
    return cuda_aot.compile_all()


def test_every_kernel_compiles_for_every_target(rows):
    compiled = {(row["target"], row["kernel"], row["element"]) for row in rows}
    assert compiled == {
        (target, kernel, element)
        for target in cuda_aot.TARGETS
        for kernel, elements in cuda_aot.KERNELS.items()
        for element in elements
    }
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    assert set(re.findall(r"\b(\w+_kernel)\(const __grid_constant__", sources)) == set(cuda_aot.KERNELS)


def test_nothing_spills(rows):
    assert not [row for row in rows if row["spills"] or row["stack"]]


def test_shared_memory_fits(rows):
    assert not [row for row in rows if row["shared"] > cuda_aot.TARGETS[row["target"]].max_shared]
    assert all(row["occupancy"] >= 1 for row in rows)
    assert all(row["occupancy"] >= 2 for row in rows if row["kernel"] == "score_kernel" and row["element"] != "fp32")


def test_committed_table_is_of_these_kernels(rows):
    """``python tests/cuda_aot.py`` rewrites both."""
    committed = [json.loads(line) for line in cuda_aot.ROWS.read_text().splitlines()]
    assert {cuda_aot.key(row) for row in committed} == {cuda_aot.key(row) for row in rows}
    assert cuda_aot.table(committed) in cuda_aot.TABLE.read_text()


# ------------------------------------------------------------------------------------------------------- who runs


def test_without_a_gpu():
    """What was built, what is missing, what else can run."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailableError) as error:
        select_tokens(torch.zeros(1, 3), 2, backend="cuda")
    text = str(error.value)
    assert "cuda: no GPU on this machine" in text
    assert "is built by nvcc" in text
    assert "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, compute_120" in text
    assert "reference: can run" in text
    for op in ("prune_tokens", "window_attention", "prompt_bias"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sdtp_native::{op}", "CUDA")


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU; returns what sets its compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_unavailable_reasons(gpu, monkeypatch):
    device = torch.device("cuda")
    info = {"cuda": {"nvcc": "13.0.88", "targets": ["sm_86", "sm_90", "compute_90"]}}
    monkeypatch.setattr(backend, "build_info", lambda: info)
    gpu(9, 0)
    assert backend.unavailable_reason(device, torch.bfloat16) is None
    assert backend.unavailable_reason(torch.device("cpu")) == "runs on cuda tensors, not on cpu"
    assert "not in torch.float64" in backend.unavailable_reason(device, torch.float64)
    for capability in ((8, 6), (8, 9), (9, 0), (10, 0), (12, 1)):  # of the same major version, or by PTX
        gpu(*capability)
        assert backend.unavailable_reason(device) is None
    for capability in ((8, 0), (7, 5)):
        gpu(*capability)
        reason = backend.unavailable_reason(device)
        assert "is built by nvcc 13.0.88 for sm_86, sm_90, compute_90; Some GPU has" in reason
        assert f"SDTP_CUDA_ARCHS={capability[0]}{capability[1]}" in reason
    gpu(9, 0)
    for version, expected in (
        (12080, "needs a driver for CUDA 13; this one is for CUDA 12.8"),
        (13000, None),
        (13020, None),
    ):
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda version=version: version, raising=False)
        reason = backend.unavailable_reason(device)
        assert reason is None if expected is None else expected in reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "for AMD ones" in backend.unavailable_reason(device)
    monkeypatch.setattr(backend, "load_error", lambda device: "was not built")
    assert backend.unavailable_reason(device) == "was not built"


def test_auto_takes_cuda_where_triton_is_missing(gpu, monkeypatch):
    gpu(9, 0)
    assert {s.name: s for s in explain_backends("cuda")}["triton"].chosen
    monkeypatch.setitem(sys.modules, "triton", None)
    assert {s.name: s for s in explain_backends("cuda", torch.float16)}["cuda"].chosen


def test_auto_says_aloud_that_no_kernel_of_a_gpu_runs(gpu, monkeypatch):
    gpu(9, 0)
    backends._best.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("auto", torch.device("cuda"), torch.float16).__name__.endswith("triton")
    backends._best.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backend, "load_error", lambda device: "was not built")
    with pytest.warns(UserWarning, match=r"'auto' is 'reference' on cuda.*triton: .*; cuda: was not built\)"):
        assert backends.choose("auto", torch.device("cuda"), torch.float16).__name__ == "sdtp_kernels.reference"
    backends._best.cache_clear()


def test_a_library_that_was_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_native, "build_info", lambda: {"left_out": {"cuda": "SDTP_BUILD_CUDA=off"}})
    error = _native.load_error.__wrapped__("cuda")
    assert re.search(r"libsdtp_cuda.so was not built; .* and nvcc builds it .*SDTP_BUILD_CUDA=off", error)


def test_limits_are_those_of_the_kernels():
    header = (ROOT / "csrc" / "include" / "sdtp" / "cuda.h").read_text()
    assert f"kMaxBatch = {limits.MAX_BATCH};" in header
    assert f"kMaxTokens = int64_t{{1}} << {limits.MAX_TOKENS.bit_length() - 1};" in header
    assert f"kMaxPooling = {limits.MAX_POOLING};" in header
    assert f"kMaxHeadDim = {limits.MAX_HEAD_DIM};" in header
    with pytest.raises(ValueError, match=r"backend 'cuda' takes at most 65535 rows .* got 65536 rows of 3: split"):
        backend.select_tokens(torch.zeros(1, 1).expand(65536, 3), Selection(2))
    with pytest.raises(ValueError, match=r"backend 'cuda' pools over at most 255 tokens, got pooling=257"):
        backend.select_tokens(torch.zeros(1, 3), Selection(2, pooling=257))
    with pytest.raises(ValueError, match="backend 'cuda' takes at most"):
        backend.gather_tokens([], torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**24 + 1))
    wide, index = torch.zeros(1, 1, 1, 257), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="backend 'cuda' takes at most 256 elements a head, got queries of 257"):
        backend.window_attention(Window(wide, wide, index, index))
    with pytest.raises(ValueError, match="at most 256 elements a head"):
        backend.prompt_bias(PromptTerms(index, torch.zeros(1), query=wide, key=wide))
    with pytest.raises(ValueError, match="backend 'cuda' takes at most"):
        backend.prompt_bias(PromptTerms(index.expand(65536, 1), torch.zeros(1)))
    with pytest.raises(ValueError, match="backend 'cuda' takes at most"):
        backend.window_attention(Window(*[wide[..., :8].expand(65536, 1, 1, 8)] * 2, index, index))
