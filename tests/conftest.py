import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never ask a network
# Workers share the cores; torch reads this when it is imported. A pytest that a test starts is none of them.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    workers = int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT"))
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // workers))
# transformers looks for packages that quantize when it is imported; see the Makefile.
sys.path.append(str(Path(sys.prefix) / "quantizers"))

import pytest
import torch
from helpers.commands import one_thread, sdtp  # noqa: F401 - fixtures
from helpers.models import make_qwen2, save_byte_model
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")

# `make test` leaves these to CI, which runs them by `make test-slow`: a second version of Triton, the compilers' other
# targets (one of each maker stays), what nvcc makes of every kernel, edits that a race checker must not mind, the GPU's
# check in Triton's interpreter.
SLOW = (
    r"test_triton\.py::.*\[3\.6",
    r"test_triton\.py::.*\[installed-(?!sm_90|gfx942)",
    r"test_cuda\.py::test_redundant_barriers_are_no_races\[",
    r"test_cuda\.py::test_(every_kernel_compiles|nothing_spills|shared_memory_fits|committed_table)",
    r"test_bench_gpu_check\.py::test_the_kernels_pass_in_the_interpreter$",
)
# The longest files; xdist deals out files in this order, and one that began last would keep every worker waiting.
FIRST = ("test_triton.py", "test_cuda.py", "test_compile.py", "test_bench_processes.py", "test_serving.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in SLOW):
            item.add_marker("slow")
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty_memory():
    """Memory that a kernel forgets to write shows up as NaN instead of as old, plausible values."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def byte_checkpoint(tmp_path_factory):
    """The folder of a random Qwen2 whose tokens are bytes."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_byte_model(path)
    return path


@pytest.fixture(scope="session")
def tiny_model():
    return make_qwen2()


@pytest.fixture(scope="session")
def smollm2():
    """The real checkpoint: SmolLM2-135M-Instruct, a Llama, with its tokenizer."""
    checkpoints = pytest.importorskip("sdtp_eval.checkpoints", reason="python/ is not installed")
    return checkpoints.load_checkpoint(checkpoints.default_checkpoint())
