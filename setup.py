"""Builds the wheel: CMake compiles the native libraries, this file plans it, drives it and stamps the result.

``SDTP_BUILD_CPU=auto|on|off`` and ``SDTP_BUILD_CUDA=auto|on|off`` (default auto): ``auto`` compiles where the
compilers are found and says what is missing otherwise, ``on`` makes that an error, ``off`` leaves the library out. A
compiler that is found and fails is always an error. Whether there is a GPU never matters.

``SDTP_CUDA_ARCHS`` lists compute capabilities, such as ``80,90``; ``MAX_JOBS`` bounds the compilers that run at once.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "sdtp_kernels"
LIBRARIES = {"cpu": "libsdtp_cpu.so", "cuda": "libsdtp_cuda.so"}
BUILD_INFO = "build_info.json"

# What the CUDA kernels are compiled for, as far as nvcc knows them; the newest as PTX too, for GPUs to come.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
CUDA_TOOLKIT = " ".join(re.findall(r"^[^#\s].*$", (ROOT / "requirements-nvcc.txt").read_text(), re.MULTILINE))

# An isolated build hides the environment that it builds for; its torch is found all the same. Only files are read:
# torch is never imported.
SEARCH_PATH = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
TOOL_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def torch_dir() -> Path | None:
    spec = importlib.machinery.PathFinder.find_spec("torch", SEARCH_PATH)
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_version() -> str:
    return next(importlib.metadata.distributions(name="torch", path=SEARCH_PATH)).version


def find_tool(*names: str) -> str | None:
    return next(filter(None, (shutil.which(name, path=TOOL_PATH) for name in names)), None)


def wish(variable: str) -> str:
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{variable}={value!r}: expected auto, on or off")
    return value


def num_jobs() -> int:
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    if not jobs.isdigit() or int(jobs) < 1:
        raise SystemExit(f"MAX_JOBS={jobs!r}: expected a number of compilers to run at once, 1 or more")
    return int(jobs)


class Toolkit(NamedTuple):
    """nvcc and what belongs to it."""

    nvcc: str
    home: str
    version: str
    archs: tuple[int, ...]

    @property
    def targets(self) -> list[str]:
        return [*(f"sm_{arch}" for arch in self.archs), f"compute_{self.archs[-1]}"]


@functools.cache
def find_toolkit() -> Toolkit | None:
    """The toolkit of the system (``CUDA_HOME``, ``PATH``, /usr/local/cuda), or else of pip."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    pip = sorted((str(path) for base in SEARCH_PATH for path in Path(base).glob("nvidia/cu[0-9]*")), reverse=True)
    candidates = [
        *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home),
        find_tool("nvcc"),
        *(shutil.which("nvcc", path=f"{home}/bin") for home in ("/usr/local/cuda", *pip)),
    ]
    nvcc = next(filter(None, candidates), None)
    if nvcc is None:
        return None

    def ask(*options: str) -> str:
        result = subprocess.run([nvcc, *options], capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    version = re.search(r"\bV(\d+\.\d+\.\d+)", ask("--version"))
    home = re.search(r"^#\$ TOP=(.*)$", ask("--dryrun", "-c", "none.cu"), re.MULTILINE)
    known = sorted(int(arch) for arch in re.findall(r"compute_(\d+)$", ask("--list-gpu-arch"), re.MULTILINE))
    if not (version and home and known):
        raise SystemExit(f"{nvcc} does not answer as nvcc does; SDTP_BUILD_CUDA=off installs without the CUDA library")
    asked = os.environ.get("SDTP_CUDA_ARCHS")
    archs = sorted(map(int, re.findall(r"\d+", asked))) if asked else [a for a in CUDA_ARCHS if a in known]
    if not archs or not set(archs) <= {arch for arch in known if arch >= CUDA_ARCHS[0]}:
        raise SystemExit(
            f"SDTP_CUDA_ARCHS={asked!r}: expected some of {', '.join(str(a) for a in known if a >= CUDA_ARCHS[0])}, "
            f"which nvcc {version[1]} compiles for"
        )
    return Toolkit(nvcc, str(Path(home[1]).resolve()), version[1], tuple(archs))


@functools.cache
def why_not(library: str) -> str | None:
    """Why a library is not built; ``None`` where it is."""
    variable = f"SDTP_BUILD_{library.upper()}"
    if wish(variable) == "off":
        return f"{variable}=off"
    found: dict[str, object] = {
        "torch (install it first)": torch_dir(),
        "CMake (pip install cmake)": find_tool("cmake"),
        "a C++ compiler (g++)": os.environ.get("CXX") or find_tool("c++", "g++", "clang++"),
    }
    if library == "cuda":
        if not sys.platform.startswith("linux"):
            return "the CUDA library is built on Linux only"
        found[f"nvcc (a CUDA toolkit of the system, or pip install {CUDA_TOOLKIT})"] = find_toolkit()
    missing = ", ".join(name for name, where in found.items() if not where)
    if missing and wish(variable) == "on":
        raise SystemExit(f"{variable}=on, but the build did not find: {missing}")
    return f"not found: {missing}" if missing else None


def is_pure() -> bool:
    return all(map(why_not, LIBRARIES))


def print_plan(torch_floor: str) -> None:
    """What will be compiled and what not, before it is."""
    lines = []
    if not is_pure():
        lines.append(f"against torch {torch_version()}, for torch {torch_floor} and later, {num_jobs()} at once")
    for library, file in LIBRARIES.items():
        reason = why_not(library)
        text = f"WITHOUT {file}: {reason}" if reason else file
        if library == "cuda" and not reason:
            toolkit = find_toolkit()
            text += f": nvcc {toolkit.version} for {', '.join(toolkit.targets)}"
        lines.append(text)
    rule = "*" * 100
    print(rule, *(f"sdtp-kernels: {line}" for line in lines), rule, sep="\n", file=sys.stderr)


def compile_libraries(torch_floor: str, destination: Path) -> dict[str, dict[str, object] | None]:
    """Compile into `destination`; returns what build_info.json says about each library."""
    # An isolated build's PYTHONPATH would break a cmake or ninja that pip installed as a Python script.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": TOOL_PATH}
    ninja = find_tool("ninja")
    toolkit = None if why_not("cuda") else find_toolkit()
    jobs = num_jobs()
    with tempfile.TemporaryDirectory() as build:
        configure = [
            find_tool("cmake"), "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
            f"-DSDTP_TORCH_DIR={torch_dir()}", f"-DSDTP_TORCH_TARGET={torch_floor}",
            f"-DSDTP_BUILD_CPU={'OFF' if why_not('cpu') else 'ON'}",
            *(["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        ]  # fmt: skip
        if toolkit:
            configure += [
                f"-DSDTP_NVCC={toolkit.nvcc}",
                f"-DSDTP_CUDA_HOME={toolkit.home}",
                f"-DSDTP_CUDA_ARCHS={';'.join(map(str, toolkit.archs))}",
                f"-DSDTP_CUDA_THREADS={jobs}",
            ]
        for command in (configure, [find_tool("cmake"), "--build", build, "--parallel", str(jobs)]):
            try:
                subprocess.run(list(map(str, command)), check=True, env=environment)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"compiling the native libraries failed ({error}); SDTP_BUILD_CUDA=off installs without the one "
                    "for CUDA, SDTP_BUILD_CPU=off without the one for CPUs"
                ) from None
        compiler, flags, nvcc_flags = (Path(build) / "compiler.txt").read_text().splitlines()
        about: dict[str, dict[str, object] | None] = {
            "cpu": {"torch": torch_version(), "compiler": compiler, "flags": flags},
            "cuda": toolkit and {
                "torch": torch_version(), "compiler": compiler, "nvcc": toolkit.version, "flags": nvcc_flags,
                "targets": toolkit.targets,
            },
        }  # fmt: skip
        for library, file in LIBRARIES.items():
            # Replaced, not overwritten: a running process may have the old one mapped.
            (destination / file).unlink(missing_ok=True)
            if not why_not(library):
                shutil.copy2(Path(build) / file, destination)
    return {library: None if why_not(library) else about[library] for library in LIBRARIES}


class BuildPackage(build_py):
    """Adds native libraries and build_info.json to the package; an editable install gets them in the source tree."""

    def run(self) -> None:
        super().run()
        destination = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        floor = self._torch_floor()
        print_plan(floor)
        if is_pure():
            for file in LIBRARIES.values():
                (destination / file).unlink(missing_ok=True)
        info = {
            "version": self.distribution.get_version(),
            "torch_target": floor,
            **(dict.fromkeys(LIBRARIES) if is_pure() else compile_libraries(floor, destination)),
            "left_out": {library: why_not(library) for library in LIBRARIES if why_not(library)},
        }
        (destination / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [BUILD_INFO, *(file for library, file in LIBRARIES.items() if not why_not(library))]
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib, PACKAGE, name)) for name in added)]

    def _torch_floor(self) -> str:
        # The requirement in pyproject.toml is the one place that names it.
        requirements = " ".join(self.distribution.install_requires)
        return re.search(r"\btorch>=(\d+\.\d+)", requirements)[1]


class BuildWheel(bdist_wheel):
    """One wheel for every Python 3: the libraries know torch's stable ABI and no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if is_pure() else super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return not is_pure()


setup(distclass=NativeDistribution, cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
