"""The wheel: what is in it, what its tag promises, and that the sdist builds it."""

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "sdtp_kernels", "python", "csrc", "tests", "benchmarks", "CMakeLists.txt", "pyproject.toml", "setup.py",
    "MANIFEST.in", "README.md", "LICENSE", "Makefile", ".clang-format",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, which is built from a copy of the tracked sources alone."""
    work = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "build_info.json", "__pycache__", "*.egg-info")
            shutil.copytree(source, work / "source" / name, ignore=ignored)
        else:
            shutil.copy2(source, work / "source")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", work], cwd=work / "source", check=True)
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(work / "unpacked", filter="data")
    (unpacked,) = (work / "unpacked").iterdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        work,
        ".",
    ]
    subprocess.run(command, cwd=unpacked, check=True)
    (built,) = work.glob("*.whl")
    return built


def test_both_packages_are_in_one_typed_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("sdtp_kernels/py.typed", "sdtp_eval/py.typed", "sdtp_kernels/libsdtp_cpu.so", "sdtp_eval/demo.py"):
        assert expected in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "python/"))]
    assert wheel.name.startswith("sdtp_kernels-")
    assert "-py3-none-linux" in wheel.name, "the library knows no Python, so neither does the tag"


def test_build_info_names_no_path_of_the_machine(wheel):
    info = json.loads(zipfile.ZipFile(wheel).read("sdtp_kernels/build_info.json"))
    assert set(info["cpu"]) == {"torch", "compiler", "flags"}
    assert "/" not in json.dumps(info["cpu"]["flags"]).replace("</", "")


def test_the_library_uses_the_stable_abi_alone(wheel, tmp_path):
    library = zipfile.ZipFile(wheel).extract("sdtp_kernels/libsdtp_cpu.so", tmp_path)
    wanted = subprocess.run(["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split(maxsplit=1)[1] for line in wanted.stdout.splitlines() if line.strip()]
    foreign = [s for s in symbols if s.startswith(("c10::", "at::", "torch::", "omp_", "GOMP_", "Py"))]
    assert not foreign
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols)
