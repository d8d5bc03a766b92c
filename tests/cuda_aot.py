"""Compiles the CUDA kernels for every target, without a GPU, and reads what nvcc made of them.

``python tests/cuda_aot.py`` rewrites ``benchmarks/results/cuda_aot.jsonl`` and the table in ``docs/kernels.md``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "cuda_aot.jsonl"
TABLE = ROOT / "docs" / "kernels.md"
MARKS = ("<!-- cuda aot -->", "<!-- /cuda aot -->")

FLOATS = ("bf16", "fp16", "fp32")
# Kernel -> what it is compiled for: element types, or the most tensors of a launch.
KERNELS: dict[str, tuple[str, ...]] = {
    "score_kernel": FLOATS,
    "finish_kernel": ("",),
    "select_kernel": ("",),
    "gather_kernel": ("64 tensors", "584 tensors"),
    "select_and_gather_kernel": ("",),
    "prune_kernel": FLOATS,
    "window_statistics_kernel": FLOATS,
    "window_sum_kernel": FLOATS,
    "pool_kernel": ("",),
    "bias_kernel": ("",),
}
_VARIANTS = {  # as their names are mangled
    "NS_8BFloat16E": "bf16",
    "NS_4HalfE": "fp16",
    "f": "fp32",
    "Li64E": "64 tensors",
    "Li584E": "584 tensors",
}
THREADS = 256


class Target(NamedTuple):
    """What bounds a kernel on one architecture."""

    max_shared: int
    """Bytes of shared memory that one CTA may use."""
    shared_per_processor: int
    max_warps: int
    """Warps a processor holds at once."""


# CUDA C++ programming guide, table of technical specifications.
TARGETS = {
    "sm_80": Target(166912, 167936, 64),
    "sm_86": Target(101376, 102400, 48),
    "sm_89": Target(101376, 102400, 48),
    "sm_90": Target(232448, 233472, 64),
    "sm_100": Target(232448, 233472, 64),
    "sm_120": Target(101376, 102400, 48),
}

_USAGE = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<target>\w+)'\n.*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def find_nvcc() -> tuple[str, str]:
    """The compiler that a build takes, and its version."""
    code = (
        "import setuptools, runpy; setuptools.setup = lambda **_: None; import sys; sys.argv = ['setup.py'];"
        "toolkit = runpy.run_path('setup.py')['find_toolkit'](); print(toolkit.nvcc, toolkit.version)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    nvcc, version = result.stdout.split()
    return nvcc, version


def shared_memory(folder: Path) -> dict[str, int]:
    """Bytes of dynamic shared memory by kernel; there is no other."""
    program = folder / "shared_memory"
    here = ROOT / "tests" / "cuda_on_cpu"
    runtime = here / "runtime.cpp"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}", f"-I{here}", "-DSDTP_CUDA_ON_CPU"]
    command = ["g++", "-std=c++17", "-w", *includes, here / "shared_memory.cpp", runtime, "-o", program]
    subprocess.run(command, check=True)
    return json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


def compile_all(jobs: int = 2) -> list[dict[str, Any]]:
    """Rows of all kernels and targets, by the flags of the build."""
    nvcc, version = find_nvcc()
    flags = re.search(r"set\(sdtp_nvcc_options (.*?)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    gencode = [f"-gencode=arch=compute_{t[3:]},code={t}" for t in TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        shared = shared_memory(Path(folder))
        command = [
            nvcc, *flags, *gencode, "--threads", str(jobs), "-Xptxas", "-v", "-Xcompiler", "-fPIC",
            "-I", ROOT / "csrc" / "include", "-c", ROOT / "csrc" / "cuda" / "kernels.cu", "-o", Path(folder) / "k.o",
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    rows = [_row(found, shared, version) for found in _USAGE.finditer(result.stdout + result.stderr)]
    return sorted(rows, key=lambda row: (row["kernel"], row["element"], int(row["target"][3:])))


def _row(found: re.Match[str], shared: dict[str, int], nvcc: str) -> dict[str, Any]:
    kernel = next(name for name in sorted(KERNELS, key=len, reverse=True) if name in found["name"])
    element = next((short for part, short in _VARIANTS.items() if f"kernelI{part}E" in found["name"]), "")
    limits, registers = TARGETS[found["target"]], int(found["registers"])
    per_warp = -(-registers * 32 // 256) * 256
    fits = [65536 // per_warp * 32 // THREADS, limits.max_warps * 32 // THREADS]
    fits.append(limits.shared_per_processor // (shared.get(kernel, 0) + 1024))  # 1 KiB is the system's
    return {
        "nvcc": nvcc,
        "target": found["target"],
        "kernel": kernel,
        "element": element,
        "registers": registers,
        "spills": int(found["stores"]) + int(found["loads"]),
        "stack": int(found["stack"]),
        "shared": shared.get(kernel, 0),
        "occupancy": min(fits),
    }


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["target"], row["kernel"], row["element"]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each kernel, a column for each target."""
    lines = ["| kernel | compiled for | " + " | ".join(TARGETS) + " |", "|---|---|" + "---|" * len(TARGETS)]
    cells = {key(row): row for row in rows}
    for kernel, element in dict.fromkeys((row["kernel"], row["element"]) for row in rows):
        found = [cells[target, kernel, element] for target in TARGETS]
        texts = [f"{r['registers']} / {r['shared'] / 1024:.0f} / {r['occupancy']}" for r in found]
        lines.append(f"| `{kernel}` | {element or 'any'} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Rewrite the table and its rows."""
    rows = compile_all()
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TABLE.read_text()
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    TABLE.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}")
    print(f"{len(rows)} kernels compiled, {sum(row['spills'] > 0 for row in rows)} spill")


if __name__ == "__main__":
    main()
