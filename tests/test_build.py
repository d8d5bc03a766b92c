"""The wheel: what is in it, what its tag promises, and that the sdist builds it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import sdtp_kernels

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "sdtp_kernels", "python", "csrc", "tests", "benchmarks", "CMakeLists.txt", "pyproject.toml", "setup.py",
    "MANIFEST.in", "README.md", "LICENSE", "Makefile", ".clang-format", "requirements-nvcc.txt",
)  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, which is built from a copy of the tracked sources alone.

    Two of the CUDA targets are enough here; test_cuda.py compiles for all.
    """
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
    environment = {**os.environ, "SDTP_BUILD_CUDA": "on", "SDTP_CUDA_ARCHS": "90,80", "MAX_JOBS": "2"}
    subprocess.run(command, cwd=unpacked, check=True, env=environment)
    (built,) = work.glob("*.whl")
    return built


def test_both_packages_are_in_one_typed_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("py.typed", "libsdtp_cpu.so", "libsdtp_cuda.so"):
        assert f"sdtp_kernels/{expected}" in names
    for expected in ("py.typed", "demo.py"):
        assert f"sdtp_eval/{expected}" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "python/"))]
    assert wheel.name.startswith("sdtp_kernels-")
    assert "-py3-none-linux" in wheel.name, "the library knows no Python, so neither does the tag"


def test_build_info_names_no_path_of_the_machine(wheel):
    info = json.loads(zipfile.ZipFile(wheel).read("sdtp_kernels/build_info.json"))
    assert set(info["cpu"]) == {"torch", "compiler", "flags"}
    assert info["cuda"]["targets"] == ["sm_80", "sm_90", "compute_90"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["cuda"]["nvcc"])
    assert info["left_out"] == {}
    assert "/" not in json.dumps([info["cpu"]["flags"], info["cuda"]["flags"]]).replace("</", "")


# What the libraries may ask of others: torch's stable C interface and the C and C++ runtimes.
ALLOWED = re.compile(
    r"(aoti_torch_|torch_)\w+|\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+|_ITM_\w+|__gmon_start__|__cxa_finalize|"
    r"_Z(n|d)[wal]\w*|__gxx_personality_v0"
)
NEEDED = {"libtorch_cpu.so", "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}


@pytest.mark.parametrize("library", ["libsdtp_cpu.so", "libsdtp_cuda.so"])
def test_a_library_asks_for_the_stable_abi_alone(library, wheel, tmp_path):
    """So it loads under any torch from the floor on, for CPUs or for CUDA; CUDA's runtime is inside."""
    path = zipfile.ZipFile(wheel).extract(f"sdtp_kernels/{library}", tmp_path)
    listed = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout.splitlines()
    wanted = [line.split()[-1] for line in listed if re.search(r" [UwWv] ", line) and not re.match("[0-9a-f]", line)]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in wanted)
    assert not [name for name in wanted if not ALLOWED.fullmatch(name)]
    visible = [line.split()[-1] for line in listed if re.match("[0-9a-f]+ T ", line)]
    assert not [name for name in visible if "sdtp" not in name and not name.startswith(("_init", "_fini"))]
    dynamic = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)) <= NEEDED
    assert not re.search("RPATH|RUNPATH", dynamic)


def test_one_place_names_the_version():
    command = [sys.executable, "setup.py", "--version"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert told == sdtp_kernels.__version__
    assert not re.search(r"^version *= *\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


# ------------------------------------------------------------------------------------------------------- the plan


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, on a machine whose nvcc is what the test says."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    for name in ("SDTP_BUILD_CPU", "SDTP_BUILD_CUDA", "SDTP_CUDA_ARCHS", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def load(nvcc="present"):
        found = runpy.run_path(str(ROOT / "setup.py"))
        if nvcc == "missing":
            found["print_plan"].__globals__["find_toolkit"] = lambda: None
        return found

    return load


def test_plan_without_nvcc(setup_py, monkeypatch, capsys):
    setup_py("missing")["print_plan"]("2.10")
    plan = capsys.readouterr().err
    assert "sdtp-kernels: libsdtp_cpu.so\n" in plan
    assert "WITHOUT libsdtp_cuda.so: not found: nvcc" in plan
    monkeypatch.setenv("SDTP_BUILD_CUDA", "on")
    with pytest.raises(SystemExit, match=r"SDTP_BUILD_CUDA=on, .* nvcc .*pip install nvidia-cuda-nvcc==13.0.88 nvidia"):
        setup_py("missing")["print_plan"]("2.10")


def test_plan_with_nvcc(setup_py, monkeypatch, capsys):
    monkeypatch.setenv("MAX_JOBS", "3")
    setup_py()["print_plan"]("2.10")
    plan = capsys.readouterr().err
    assert "for torch 2.10 and later, 3 at once" in plan
    assert re.search(r"libsdtp_cuda.so: nvcc [\d.]+ for sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, compute_120", plan)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SDTP_BUILD_CUDA", "yes", "SDTP_BUILD_CUDA='yes': expected auto, on or off"),
        ("SDTP_CUDA_ARCHS", "75", r"SDTP_CUDA_ARCHS='75': expected some of 80, .*, which nvcc [\d.]+ compiles for"),
        ("SDTP_CUDA_ARCHS", "native", "SDTP_CUDA_ARCHS='native': expected some of 80"),
        ("MAX_JOBS", "many", "MAX_JOBS='many': expected a number"),
    ],
)
def test_settings_that_cannot_be(setup_py, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=message):
        setup_py()["print_plan"]("2.10")


def test_settings_that_leave_libraries_out(setup_py, monkeypatch):
    monkeypatch.setenv("SDTP_BUILD_CUDA", "off")
    found = setup_py()
    assert found["why_not"]("cuda") == "SDTP_BUILD_CUDA=off"
    assert not found["is_pure"]()
    monkeypatch.setenv("SDTP_BUILD_CPU", "off")
    assert setup_py()["is_pure"]()
