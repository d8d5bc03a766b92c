"""The Triton backend: what its kernels compute, in the interpreter, and what the compilers make of them.

Neither needs a GPU. The interpreter accepts code that the compiler refuses and knows no registers; the compiler checks
no result: a kernel must pass both. With the Triton that is installed, and with the oldest one that the backend takes.
"""

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_aot

from sdtp_kernels.backends import triton as backend

pytest.importorskip("triton", reason="the backend's compiler runs on Linux only")

SUITE = Path(__file__).with_name("triton_interpreter_suite.py")
OLDEST = Path(sys.prefix) / "triton-3.6"
VERSIONS = {"installed": None, "3.6": OLDEST}


def run(version, *command, **settings):
    """Run Python in a process of its own, with another Triton before the installed one and more in the environment."""
    folder = VERSIONS[version]
    if folder and not folder.is_dir():
        pytest.skip(
            "needs a second Triton: pip install --no-deps --target "
            f"{folder.name} 'triton==3.6.*' 'numpy==2.3.*' in {sys.prefix}"
        )
    path = os.pathsep.join(filter(None, (str(folder or ""), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **settings}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=SUITE.parents[1], env=environment, check=False)


# ------------------------------------------------------------------------------------------------- the interpreter


def run_suite(version):
    """All of `triton_interpreter_suite.py`."""
    return run(version, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", SUITE, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def suite_runs(request):
    """The chosen runs, side by side."""
    chosen = [item for item in request.session.items if item.originalname == "test_interpreter"]
    versions = [item.callspec.params["version"] for item in chosen]
    with ThreadPoolExecutor(2) as pool:
        yield {version: pool.submit(run_suite, version) for version in versions}


@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter(version, suite_runs):
    result = suite_runs[version].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


# -------------------------------------------------------------------------------------------------- the compilers


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """``compiled(version)``: what compiled for the chosen targets, with one version of Triton.

    The oldest one compiles every kernel and every configuration once, the installed one all cases.
    """
    parameters = [getattr(item, "callspec", SimpleNamespace(params={})).params for item in request.session.items]
    targets = sorted({chosen["target"] for chosen in parameters if "target" in chosen})

    @functools.cache
    def compile_with(version):
        path = tmp_path_factory.mktemp("aot") / "rows.jsonl"
        few = () if version == "installed" else ("--first-cases",)
        result = run(version, SUITE.with_name("triton_aot.py"), "--out", path, *few, "--targets", *targets)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert all(version in ("installed", row["triton"][:3]) for row in rows)
        return rows

    return compile_with


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module", params=triton_aot.TARGETS)
def target(request):
    return request.param


@pytest.fixture
def rows(version, target, compiled):
    """What compiled for one target, with one version of Triton."""
    return [row for row in compiled(version) if row["target"] == target]


def key(row):
    return row["target"], row["kernel"], row["case"]


def test_every_kernel_compiles(rows):
    assert {row["kernel"] for row in rows} == triton_aot.kernel_names()


VARIANTS = """
import json, sys
sys.path.insert(0, "tests")
import triton_aot
print(json.dumps(triton_aot.count_variants("sm_90", [1001, 1507, 1600, 2048])))
"""


def test_no_length_is_compiled_for():
    """Once for prompts of every length: a compilation takes most of a second, in the middle of a prefill."""
    result = run("installed", "-c", VARIANTS)
    assert result.returncode == 0, result.stderr[-2000:]
    variants = json.loads(result.stdout)
    assert variants.pop("sdtp_select_kernel") == 2  # for rows of up to 1024 tokens and for longer ones
    assert set(variants) == triton_aot.kernel_names() - {
        "sdtp_finish_kernel",
        "sdtp_prune_kernel",
        "sdtp_select_kernel",
    }
    assert set(variants.values()) == {1}, variants


def test_every_configuration_compiles(rows, version, target):
    from sdtp_kernels.backends.triton import configs

    both = {"sdtp_score_kernel", "sdtp_prune_kernel"}
    for table, unaligned in ((configs.SCORE, False), (configs.SCORE_UNALIGNED, True)):
        assert set(table) - {"interpreter"} == set(triton_aot.TARGETS)
        for size, dtype in ((2, "bf16"), (4, "fp32")):
            found = {
                (row["kernel"], tuple(row["config"]))
                for row in rows
                if row["kernel"] in both and dtype in row["case"] and ("unaligned" in row["case"]) == unaligned
            }
            assert {config for _, config in found} == {table[target][size]}
            assert version != "installed" or {kernel for kernel, _ in found} == both
    found = {tuple(row["config"]) for row in rows if row["kernel"] == "sdtp_attention_kernel"}
    assert set(configs.ATTENTION) == set(configs.SCORE)
    assert found == {config for table in configs.ATTENTION[target].values() for config in table.values()}
    largest_tiles = {"sdtp_select_kernel": 4096, "sdtp_select_and_gather_kernel": configs.MAX_TILE_WITH_COPY}
    for kernel, largest in largest_tiles.items():
        tiles = {row["tile"] for row in rows if row["kernel"] == kernel}
        assert tiles == {tile for tile in configs.SELECT_THREADS if tile <= largest}


def test_nothing_spills(rows):
    assert not [key(row) for row in rows if row["spills"]]


def test_shared_memory_fits(rows):
    assert not [key(row) for row in rows if row["shared"] > triton_aot.TARGETS[row["target"]].max_shared]
    assert all(row["occupancy"] >= 1 for row in rows)


def test_products_use_tensor_cores(rows):
    scoring = [row for row in rows if row["kernel"] in ("sdtp_score_kernel", "sdtp_prune_kernel")]
    # Tiles of float32 queries are too small for wgmma and tcgen05: those products are mma.sync.
    attention = [row for row in rows if row["kernel"] == "sdtp_attention_kernel" and "fp32" not in row["case"]]
    assert not [key(row) for row in scoring + attention if not row["tensor_core"]]


def test_launches_overlap_where_the_hardware_can(rows):
    """A kernel that starts before the previous one has ended must wait for it before it touches memory."""
    expected = {
        "sdtp_score_kernel": ["launch_dependents"],
        "sdtp_select_kernel": ["launch_dependents", "wait"],
        "sdtp_select_and_gather_kernel": ["wait"],
        "sdtp_gather_kernel": ["wait"],
    }
    for row in rows:
        overlaps = row["target"] in ("sm_90", "sm_100", "sm_120") and row["case"].startswith(("prune", "score"))
        assert row["pdl"] == (expected.get(row["kernel"], []) if overlaps else []), key(row)
        assert row["early"] == 0, key(row)


def test_committed_table_is_of_these_kernels(rows, version, target):
    """Registers differ by version of Triton; what is listed does not. ``python tests/triton_aot.py`` rewrites both."""
    committed = [json.loads(line) for line in triton_aot.ROWS.read_text().splitlines()]
    listed = {key(row) for row in committed if row["target"] == target}
    found = {key(row) for row in rows}
    assert found == listed if version == "installed" else found < listed
    assert triton_aot.table(committed) in triton_aot.TABLE.read_text()


# ------------------------------------------------------------------------------------------------------- who runs


def test_unavailable_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda = torch.device("cuda")
    assert "only in Triton's interpreter" in backend.unavailable_reason(torch.device("cpu"))
    assert "not in torch.float64" in backend.unavailable_reason(cuda, torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable_reason(cuda) == f"no GPU that torch {torch.__version__} can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert backend.unavailable_reason(cuda) == "needs compute capability 8.0 or newer; Tesla T4 has 7.5"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Radeon RX 7900")
    properties = SimpleNamespace(gcnArchName="gfx1100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert backend.unavailable_reason(cuda) == "needs AMD CDNA (gfx90a, gfx942); Radeon RX 7900 is gfx1100"
    properties.gcnArchName = "gfx906:sramecc+:xnack-"  # Vega 20: no matrix instructions
    assert backend.unavailable_reason(cuda).endswith("is gfx906")
    properties.gcnArchName = "gfx942:sramecc+:xnack-"
    assert backend.unavailable_reason(cuda) is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'sdtp-kernels[triton]'" in backend.unavailable_reason(cuda)


def test_auto_takes_triton_on_a_gpu(monkeypatch):
    from sdtp_kernels import explain_backends

    assert not {s.name: s for s in explain_backends("cpu")}["triton"].available
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert {s.name: s for s in explain_backends("cuda", torch.bfloat16)}["triton"].chosen
