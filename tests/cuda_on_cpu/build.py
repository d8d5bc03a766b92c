"""Compiles programs of this folder together with the CUDA kernels, by g++, for the CPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
FLAGS = ("-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-DSDTP_CUDA_ON_CPU", *WARNINGS)

# What the kernels and the tests are compiled with, and the runtime, which is not instrumented.
MODES = {
    "plain": ((), ()),
    "race": (("-fsanitize=thread",), ("-DSDTP_TSAN",)),
    "memory": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), ("-DSDTP_ASAN",)),
}


def compile_program(name: str, mode: str, folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """Compile `name`.cpp, with the kernels of `csrc`; returns the program."""
    sanitizers, runtime_flags = MODES[mode]
    includes = [f"-I{csrc / 'include'}", f"-I{csrc}", f"-I{HERE}"]
    # Not turned into calls of memcpy, which the sanitizers would watch.
    runtime = [*runtime_flags, "-fno-tree-loop-distribute-patterns"]
    sources = {
        "runtime": (HERE / "runtime.cpp", runtime),
        name: (HERE / f"{name}.cpp", sanitizers),
        "kernels": (csrc / "cuda" / "kernels.cu", ("-x", "c++", *sanitizers)),
    }
    objects = []
    for stem, (source, flags) in sources.items():
        objects.append(folder / f"{stem}-{mode}.o")
        _compile([*FLAGS, *includes, *flags], source, objects[-1])
    program = folder / f"{name}-{mode}"
    subprocess.run(["g++", *sanitizers, *objects, "-o", program], check=True)
    return program


def _compile(flags: list[str], source: Path, target: Path) -> None:
    """An object file; where there is a store of them, what was compiled there from the same text is taken from it."""
    compiler, store = ["g++", *flags, source], os.environ.get("SDTP_TEST_OBJECTS")
    if not store:
        subprocess.run([*compiler, "-c", "-o", target], check=True)
        return
    text = subprocess.run([*compiler, "-E", "-P"], check=True, capture_output=True).stdout
    options = [flag for flag in flags if not flag.startswith("-I")]
    kept = Path(store) / f"{hashlib.sha256(repr(options).encode() + text).hexdigest()}.o"
    if not kept.exists():
        subprocess.run([*compiler, "-c", "-o", target], check=True)
        part = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, part)
        part.replace(kept)
    shutil.copyfile(kept, target)


def run_program(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it; ThreadSanitizer knows only address spaces that are laid out with few random bits."""

    def run(*prefix: str) -> subprocess.CompletedProcess[str]:
        command = [*prefix, str(program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    result = run()
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        result = run("setarch", "-R")
    return result
