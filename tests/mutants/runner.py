"""Tests of the tests: plants one bug at a time in a copy of the source and demands that the suite fails.

Run with ``make test-mutants``, or some by parts of their names with ``python tests/mutants NAME ...``. A bug that
survives is a missing test; a bug whose text is no longer found is a stale entry of the list. Both fail the run. With
``--minutes`` a slow machine plants as many as it can in that time, and the last lines say how many that were.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple
from unittest import mock

from mutants import AREAS
from mutants.entry import CUDA, SUITE, Mutant, StaleError, plant

ROOT = Path(__file__).resolve().parent.parent.parent
COPIED = (
    "sdtp_kernels", "python", "csrc", "tests", "benchmarks", "CMakeLists.txt", "pyproject.toml", "setup.py",
    "requirements-nvcc.txt", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples",
)  # fmt: skip
WORKERS = os.cpu_count() or 1
# A machine whose processor has no such registers does not run what needs them.
CPUINFO = Path("/proc/cpuinfo")
UNUSED = set() if CPUINFO.is_file() and "avx2" in CPUINFO.read_text() else {"csrc/cpu/narrow.cpp"}
# A test that fails, or one that a wild address ends: anything else is a broken run and proves nothing.
CAUGHT = (1, -signal.SIGSEGV)
LEFT = "not tried"
# Seconds: a test that hangs is ended by an alarm, a minute after it has said where it stands.
HANGS = 1200
# What the tests import besides our package, which comes from the copy.
LARGE = (
    "torch._dynamo", "pytest", "_hypothesis_pytestplugin", "hypothesis", "safetensors.torch", "tokenizers",
    "rich.progress", "transformers.models.llama.modeling_llama", "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip


class Outcome(NamedTuple):
    """What pytest did: its exit status, what it printed, the processor's seconds with those of its children."""

    status: int
    output: str
    seconds: float


class Nursery:
    """A process that has imported the large packages and forks one that runs tests, again and again."""

    def __init__(self, interprets: bool) -> None:
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_fork_for_ever, args=(other, interprets), daemon=True)
        self._process.start()
        other.close()

    def run(self, source: Path, tests: str) -> tuple[int, float]:
        self._connection.send((source, tests))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.close()
        self._process.join()


class Copy:
    """A copy of the source, which one bug at a time is in."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._nurseries: dict[bool, Nursery] = {}
        self._seconds = itertools.count(10**9)
        source.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(ROOT / name, source / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, source)

    def configure(self) -> None:
        """From here on the copy has a library of its own."""
        source = self.source
        torch = importlib.util.find_spec("torch").origin
        target = json.loads((source / "sdtp_kernels/build_info.json").read_text())["torch_target"]
        settings = {
            "SDTP_TORCH_DIR": Path(torch).parent,
            "SDTP_TORCH_TARGET": target,
            "SDTP_OUTPUT_DIR": source / "sdtp_kernels",
        }
        options = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run(["cmake", "-S", source, "-B", source / "build", *options], check=True, stdout=subprocess.DEVNULL)

    def write(self, file: str, text: str) -> None:
        """Change a file. Compiled Python is known by the second of its source, and here many changes share one."""
        path = self.source / file
        path.write_text(text)
        if not file.startswith("csrc/"):  # there, a build wants what is newer
            second = next(self._seconds)
            os.utime(path, (second, second))

    def run_tests(self, tests: str) -> Outcome:
        """pytest on the copy, in a process of its own."""
        output, status = self.source / "output.txt", self.source / "status.txt"
        status.unlink(missing_ok=True)
        if (self.source / "build").is_dir():  # takes a bug in, and the one before it out
            subprocess.run(["cmake", "--build", self.source / "build"], check=True, stdout=subprocess.DEVNULL)
        # Triton's interpreter is chosen when Triton is imported, which the process that is forked has done.
        interprets = SUITE in tests
        if interprets not in self._nurseries:
            self._nurseries[interprets] = Nursery(interprets)
        code, seconds = self._nurseries[interprets].run(self.source, tests)
        # What pytest found counts, whatever becomes of the process afterwards; one that crashed before found nothing.
        found = int(status.read_text()) if status.is_file() else code
        return Outcome(found, output.read_text(errors="replace"), seconds)

    def close(self) -> None:
        for nursery in self._nurseries.values():
            nursery.close()


def _fork_for_ever(connection, interprets: bool) -> None:
    os.environ["TRITON_INTERPRET"] = str(int(interprets))
    for name in (*LARGE, "triton.language") if interprets else LARGE:
        with suppress(ImportError):  # tests that need it are skipped, or say so themselves
            importlib.import_module(name)
    with suppress(ImportError), mock.patch("nltk.download"):  # makes millions of words, and asks for more
        importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    gc.freeze()  # a child neither searches nor copies what all of them share
    with suppress(EOFError):
        while True:
            source, tests = connection.recv()
            child = os.fork()
            if not child:
                _pytest(source, tests)
            _, status, used = os.wait4(child, 0)
            connection.send((os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
    gc.unfreeze()


def _pytest(source: Path, tests: str) -> None:
    with (source / "output.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.alarm(HANGS)
    os.chdir(source)
    packages = [str(source), str(source / "python")]
    # Neither this package nor any other test is ever taken from where it was run.
    sys.path[:] = packages + [path for path in sys.path if path != str(ROOT / "tests")]
    for name in [name for name in sys.modules if name.partition(".")[0] == "mutants"]:
        del sys.modules[name]
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.pop("CI", None)  # pytest would compare what differs to the last byte, for as long as that takes
    os.environ["PYTHONPATH"] = os.pathsep.join(packages)
    assert "sdtp_kernels" not in sys.modules

    import pytest

    found = 70
    with suppress(BaseException):
        # Of the plugins Hypothesis's alone, without which it would draw other examples.
        options = ["-x", "-q", "-p", "no:cacheprovider", "--disable-plugin-autoload", "-p", "_hypothesis_pytestplugin"]
        options += ["-o", f"faulthandler_timeout={HANGS - 60}"]
        found = int(pytest.main([*options, *(f"tests/{test}" for test in tests.split())]))
        (source / "status.txt").write_text(str(found))
    sys.stdout.flush()
    os._exit(found)


def is_compiled(mutant: Mutant) -> bool:
    """Whether it changes the library. What tests CUDA's sources compiles them itself."""
    return mutant.file.startswith("csrc/") and not mutant.file.startswith(CUDA)


def try_mutant(mutant: Mutant, copy: Copy) -> tuple[str | None, float]:
    """Why the mutant counts against us; ``None`` where the suite caught it. The copy is left as it was."""
    text = (copy.source / mutant.file).read_text()
    try:
        copy.write(mutant.file, plant(mutant, text))
    except StaleError as error:
        return f"stale: {error}", 0.0
    if is_compiled(mutant) and not (copy.source / "build").is_dir():
        copy.configure()
    outcome = copy.run_tests(mutant.tests)
    copy.write(mutant.file, text)
    if outcome.status == 0:
        return f"SURVIVED {mutant.tests}", outcome.seconds
    if outcome.status not in CAUGHT:
        return f"the run broke (exit {outcome.status}):\n{outcome.output[-4000:]}", outcome.seconds
    return None, outcome.seconds


def control(tests: list[str], copy: Copy) -> tuple[str | None, float]:
    """A copy without a bug must pass, or failures would prove nothing."""
    outcome = copy.run_tests(" ".join(tests))
    if outcome.status == 0:
        return None, outcome.seconds
    return f"the copy fails without a bug (exit {outcome.status}):\n{outcome.output[-4000:]}", outcome.seconds


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/mutants", description="Plant bugs; the suite must catch each.")
    parser.add_argument("names", nargs="*", default=[""], metavar="NAME", help="part of a bug's name; default: all")
    parser.add_argument(
        "--area", nargs="+", choices=AREAS, default=list(AREAS), help="files of this folder; default: all"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="plant no more bugs after; default: all")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    names, chosen = args.names, [mutant for area in args.area for mutant in AREAS[area]]
    mutants = [m for m in chosen if m.file not in UNUSED and any(name in m.name for name in names)]
    if not mutants:
        parser.error(f"no bug has a name with {' or '.join(map(repr, names))} in it")
    files = {}
    for test in sorted({test for mutant in mutants for test in mutant.tests.split()}):
        files.setdefault(test.partition("::")[0], []).append(test)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # the process that is forked reads them
    copies: SimpleQueue[Copy] = SimpleQueue()

    def on_a_copy(attempt, subject):
        if attempt is try_mutant and time.monotonic() > end:
            return LEFT, 0.0
        copy = copies.get()
        try:
            return attempt(subject, copy)
        finally:
            copies.put(copy)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        objects = Path(folder) / "objects"  # of CUDA's tests: a bug in a kernel leaves the rest as compiled before
        objects.mkdir()
        os.environ["SDTP_TEST_OBJECTS"] = str(objects)
        for number in range(WORKERS):
            copies.put(Copy(Path(folder) / str(number)))
        # Those that are compiled first, file by file: what a bug does not touch stays compiled. Where time may be too
        # short, other files are the last every time.
        order = sorted({mutant.file for mutant in mutants})
        if args.minutes < float("inf"):
            random.shuffle(order)
        mutants.sort(key=lambda mutant: (not is_compiled(mutant), order.index(mutant.file)))
        attempts = [("caught", mutant.name, pool.submit(on_a_copy, try_mutant, mutant)) for mutant in mutants]
        # Last, on the copies that all bugs have been in.
        attempts += [("passed", file, pool.submit(on_a_copy, control, files[file])) for file in files]
        failures = left = 0
        for verdict, name, attempt in attempts:
            reason, seconds = attempt.result()
            if reason is LEFT:
                left += 1
                continue
            failures += reason is not None
            print(
                f"{'FAILED' if reason else verdict:<8}{seconds:6.1f} s  {name}{': ' + reason if reason else ''}",
                flush=True,
            )
        for _ in range(WORKERS):
            copies.get().close()
    tried = len(attempts) - left
    print(f"{tried - failures} of {tried} as they should be")
    if left:
        print(f"NOT TRIED: {left} of {len(mutants)} bugs; {args.minutes:g} minutes were over")
    return 1 if failures else 0
