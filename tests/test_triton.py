"""The Triton backend: what its kernels compute, in the interpreter, and what the compilers make of them.

Neither needs a GPU. The interpreter accepts code that the compiler refuses and knows no registers; the compiler checks
no result: a kernel must pass both. With the Triton that is installed, and with the oldest one that the backend takes.
"""

import itertools
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
GROUPS = ("test_score", "test_select", "test_gather", "test_prune", "rest")
OLDEST = Path(sys.prefix) / "triton-3.8"
VERSIONS = {"installed": None, "3.8": OLDEST}


def run(version, *command, **settings):
    """Run Python in a process of its own, with another Triton before the installed one and more in the environment."""
    folder = VERSIONS[version]
    if folder and not folder.is_dir():
        pytest.skip(
            f"needs a second Triton: pip install --no-deps --target {folder.name} 'triton==3.8.*' in {sys.prefix}"
        )
    path = os.pathsep.join(filter(None, (str(folder or ""), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **settings}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=SUITE.parents[1], env=environment, check=False)


# ------------------------------------------------------------------------------------------------- the interpreter


def run_suite(group, version):
    """The tests of `triton_interpreter_suite.py` whose names begin with `group`."""
    chosen = f"not ({' or '.join(GROUPS[:-1])})" if group == GROUPS[-1] else group
    return run(version, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", SUITE, "-k", chosen, TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def suite_runs(request):
    """The chosen runs, two at a time."""
    chosen = [item.callspec.params for item in request.session.items if item.originalname == "test_interpreter"]
    chosen = [(parameters["group"], parameters["version"]) for parameters in chosen]
    with ThreadPoolExecutor(2) as pool:
        yield {parameters: pool.submit(run_suite, *parameters) for parameters in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("version", VERSIONS)
def test_interpreter(group, version, suite_runs):
    result = suite_runs[group, version].result()
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


# -------------------------------------------------------------------------------------------------- the compilers


@pytest.fixture(scope="module", params=VERSIONS)
def rows(request, tmp_path_factory):
    """What compiled, with one version."""
    path = tmp_path_factory.mktemp("aot") / "rows.jsonl"
    result = run(request.param, SUITE.with_name("triton_aot.py"), path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(request.param in ("installed", row["triton"][:3]) for row in rows)
    return rows


def key(row):
    return row["target"], row["kernel"], row["case"]


def test_every_kernel_compiles_for_every_target(rows):
    compiled = {(row["target"], row["kernel"]) for row in rows}
    assert compiled == {(target, kernel) for target in triton_aot.TARGETS for kernel in triton_aot.kernel_names()}


def test_every_configuration_of_the_table_compiles(rows):
    from sdtp_kernels.backends.triton import configs

    for table, unaligned in ((configs.SCORE, False), (configs.SCORE_UNALIGNED, True)):
        assert set(table) - {"interpreter"} == set(triton_aot.TARGETS)
        for target, kernel, (size, dtype) in itertools.product(
            triton_aot.TARGETS, ("score_kernel", "prune_kernel"), ((2, "bf16"), (4, "fp32"))
        ):
            used = {
                tuple(row["config"])
                for row in rows
                if key(row)[:2] == (target, kernel)
                and dtype in row["case"]
                and ("unaligned" in row["case"]) == unaligned
            }
            assert used == {table[target][size]}
    for kernel, largest in (("select_kernel", 4096), ("select_and_gather_kernel", configs.MAX_TILE_WITH_COPY)):
        tiles = {(row["target"], row["tile"]) for row in rows if row["kernel"] == kernel}
        assert tiles == {(t, tile) for t in triton_aot.TARGETS for tile in configs.SELECT_THREADS if tile <= largest}


def test_nothing_spills(rows):
    assert not [key(row) for row in rows if row["spills"]]


def test_shared_memory_fits(rows):
    assert not [key(row) for row in rows if row["shared"] > triton_aot.TARGETS[row["target"]].max_shared]
    assert all(row["occupancy"] >= 1 for row in rows)


def test_scores_use_tensor_cores(rows):
    scoring = [row for row in rows if row["kernel"] in ("score_kernel", "prune_kernel")]
    assert not [key(row) for row in scoring if not row["tensor_core"]]


def test_launches_overlap_where_the_hardware_can(rows):
    """A kernel that starts before the previous one has ended must wait for it before it touches memory."""
    expected = {
        "score_kernel": ["launch_dependents"],
        "select_kernel": ["launch_dependents", "wait"],
        "select_and_gather_kernel": ["wait"],
        "gather_kernel": ["wait"],
    }
    for row in rows:
        overlaps = row["target"] in ("sm_90", "sm_100", "sm_120") and row["case"].startswith(("prune", "score"))
        assert row["pdl"] == (expected.get(row["kernel"], []) if overlaps else []), key(row)
        assert row["early"] == 0, key(row)


def test_committed_table_is_of_these_kernels(rows):
    """Registers differ by version of Triton; what is listed does not. ``python tests/triton_aot.py`` rewrites both."""
    committed = [json.loads(line) for line in triton_aot.ROWS.read_text().splitlines()]
    assert {key(row) for row in committed} == {key(row) for row in rows}
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
