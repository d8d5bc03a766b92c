"""Builds the wheel: CMake compiles the native library, this file drives it and stamps the result.

``SDTP_BUILD_CPU=auto|on|off`` (default auto): ``auto`` compiles where a C++ compiler, CMake and torch are found and
says loudly what is missing otherwise, ``on`` makes that an error, ``off`` builds pure Python. A compiler that is found
and fails is always an error.
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

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "sdtp_kernels"
LIBRARY = "libsdtp_cpu.so"
BUILD_INFO = "build_info.json"

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


@functools.cache
def why_pure() -> str | None:
    """Why no native library is built; ``None`` where one is."""
    wish = os.environ.get("SDTP_BUILD_CPU", "auto")
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"SDTP_BUILD_CPU={wish!r}: expected auto, on or off")
    if wish == "off":
        return "SDTP_BUILD_CPU=off"
    found = {
        "torch (install it first)": torch_dir(),
        "CMake (pip install cmake)": find_tool("cmake"),
        "a C++ compiler (g++)": os.environ.get("CXX") or find_tool("c++", "g++", "clang++"),
    }
    missing = ", ".join(name for name, where in found.items() if not where)
    if missing and wish == "on":
        raise SystemExit(f"SDTP_BUILD_CPU=on, but the build did not find: {missing}")
    return f"not found: {missing}" if missing else None


def compile_library(torch_floor: str, destination: Path) -> dict[str, str]:
    """Compile into `destination`; returns what build_info.json says about it."""
    torch = torch_dir()
    # An isolated build's PYTHONPATH would break a cmake or ninja that pip installed as a Python script.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": TOOL_PATH}
    ninja = find_tool("ninja")
    with tempfile.TemporaryDirectory() as build:
        configure = [
            find_tool("cmake"), "-S", ROOT, "-B", build, "-DCMAKE_BUILD_TYPE=Release",
            f"-DSDTP_TORCH_DIR={torch}", f"-DSDTP_TORCH_TARGET={torch_floor}",
            *(["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        ]  # fmt: skip
        for command in (configure, [find_tool("cmake"), "--build", build, "--parallel", str(os.cpu_count() or 1)]):
            try:
                subprocess.run(list(map(str, command)), check=True, env=environment)
            except subprocess.CalledProcessError as error:
                raise SystemExit(
                    f"compiling the CPU library failed ({error}); SDTP_BUILD_CPU=off installs without it"
                ) from None
        # Replaced, not overwritten: a running process may have the old one mapped.
        (destination / LIBRARY).unlink(missing_ok=True)
        shutil.copy2(Path(build) / LIBRARY, destination)
        compiler, flags = (Path(build) / "compiler.txt").read_text().splitlines()
    return {"torch": torch_version(), "compiler": compiler, "flags": flags}


class BuildPackage(build_py):
    """Adds the native library and build_info.json to the package; an editable install gets them in the source tree."""

    def run(self) -> None:
        super().run()
        destination = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        info = {"version": self.distribution.get_version(), "torch_target": self._torch_floor()}
        if reason := why_pure():
            (destination / LIBRARY).unlink(missing_ok=True)
            info["cpu"] = None
            info["reason"] = reason
            line = "*" * 100
            message = f"sdtp-kernels: building WITHOUT the compiled CPU backend: {reason}"
            print(line, message, line, sep="\n", file=sys.stderr)
        else:
            info["cpu"] = compile_library(self._torch_floor(), destination)
        (destination / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [BUILD_INFO] if why_pure() else [BUILD_INFO, LIBRARY]
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib, PACKAGE, name)) for name in added)]

    def _torch_floor(self) -> str:
        # The requirement in pyproject.toml is the one place that names it.
        requirements = " ".join(self.distribution.install_requires)
        return re.search(r"\btorch>=(\d+\.\d+)", requirements)[1]


class BuildWheel(bdist_wheel):
    """One wheel for every Python 3: the library knows torch's stable ABI and no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if why_pure() else super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return why_pure() is None


setup(distclass=NativeDistribution, cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
