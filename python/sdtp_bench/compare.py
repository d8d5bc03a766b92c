"""``sdtp bench compare``: the pruning step of this checkout against that of another revision, on a CPU.

The other revision is built from a throw-away copy. A process for each side loads its own library;
then the calls of the two are interleaved, so that a drift of the machine falls on both alike. Outputs are compared
first.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_bench.rows import append_rows, summary
from sdtp_eval import command
from sdtp_eval.paired import in_turns

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from sdtp_bench.shapes import Case

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("base", "here")
MIN_ROUNDS, MAX_ROUNDS = 10, 200
RESAMPLES = 2000


class SideError(RuntimeError):
    """A side does not build, does not run or computes the wrong thing."""


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the parsers of ``sdtp bench``."""
    from sdtp_bench.op import add_case_arguments

    parser = commands.add_parser("compare", help="the pruning step on a CPU: this checkout against another revision")
    parser.add_argument("--base", required=True, metavar="REV", help="the revision to compare with, as git knows it")
    add_case_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="append the rows to compare.jsonl there")
    parser.set_defaults(run=run, tokens=[2048, 8192], model=["qwen2-0.5b"])


def run(args: argparse.Namespace) -> int:
    """``sdtp bench compare``."""
    from sdtp_bench.op import cases_of

    with command.user_errors(SideError), built_tree(args.base) as base:
        rows = list(measure({"base": base, "here": ROOT}, cases_of(args), args.seconds))
    for row in rows:
        row["base"] = args.base
        low, high = row["interval"]
        print(
            f"{row['model']} {row['tokens']:>6} tokens {row['dtype']}: {row['base_s'] * 1e3:8.2f} ms at {args.base}, "
            f"{row['seconds'] * 1e3:8.2f} ms here; ratio {row['ratio']:.3f}, 95 % within {low:.3f} to {high:.3f}: "
            f"{row['verdict']}"
        )
    if args.out:
        append_rows(args.out, rows)
    return 0


@contextlib.contextmanager
def built_tree(revision: str) -> Iterator[Path]:
    """The packages of `revision` with its CPU library, built in a directory that is gone afterwards.

    Raises
    ------
    SideError
        If there is no such revision, or it does not build.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, built, archive = (Path(folder) / name for name in ("source", "built", "source.tar"))
        # Not a worktree of git: a run that is killed would leave the repository knowing of it.
        _run(["git", "-C", ROOT, "archive", "--output", archive, revision], f"--base {revision}")
        shutil.unpack_archive(archive, source)
        environment = {**os.environ, "SDTP_BUILD_CUDA": "off", "SDTP_BUILD_CPU": "on"}
        build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", built]
        _run(build, f"building {revision}", cwd=source, env=environment)
        yield built


def _run(command: list[Any], what: str, **options: Any) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if result.returncode != 0:
        raise SideError(f"{what}: {(result.stderr or result.stdout).strip()[-2000:]}")


def measure(sides: dict[str, Path], cases: Sequence[Case], seconds: float) -> Iterator[dict[str, Any]]:
    """Both sides on each case, interleaved.

    Parameters
    ----------
    sides : dict
        ``base`` and ``here``: the directory of each one's ``sdtp_kernels``.
    cases : sequence of Case
    seconds : float
        Rounds are run for about so long, at least ten of them.

    Yields
    ------
    dict
        ``bench="compare"``, the case, ``base_s`` (median), ``base_s_all``, and of this side ``seconds``, ``quantiles``,
        ``seconds_all``; ``ratio`` (base over here: above 1 is faster), ``interval`` (95 %, bootstrap of the medians),
        ``verdict``.

    Raises
    ------
    SideError
        If a side fails or computes the wrong thing: there are no figures then.
    """
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(_Worker(side, sides[side])) for side in SIDES}
        for case in cases:
            for worker in workers.values():
                worker.ask(case._asdict())
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            begin = time.perf_counter()
            for i, side in enumerate(in_turns(SIDES, MAX_ROUNDS)):
                is_enough = i >= MIN_ROUNDS * len(SIDES) and time.perf_counter() - begin > seconds
                if is_enough and i % len(SIDES) == 0:
                    break
                times[side].append(workers[side].ask({}))
            ratio, interval = compare_medians(times["base"], times["here"])
            yield {
                "bench": "compare",
                **case._asdict(),
                "base_s": statistics.median(times["base"]),
                "base_s_all": times["base"],
                **summary(times["here"]),
                "ratio": ratio,
                "interval": interval,
                "verdict": verdict(interval),
            }


def compare_medians(base: Sequence[float], here: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Ratio of the medians, base over here, with its 95 % percentile bootstrap interval; rounds stay together."""
    import numpy as np

    pairs = np.array([base, here])
    picks = np.random.default_rng(0).integers(pairs.shape[1], size=(RESAMPLES, pairs.shape[1]))
    medians = np.median(pairs[:, picks], axis=-1)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    own = np.median(pairs, axis=-1)
    return float(own[0] / own[1]), (float(low), float(high))


def verdict(interval: tuple[float, float]) -> str:
    """Of an interval of the ratio: ``faster``, ``slower`` or ``no difference seen``."""
    low, high = interval
    return "faster" if low > 1 else "slower" if high < 1 else "no difference seen"


class _Worker:
    """One side, in a process of its own; answers one line of JSON to each."""

    def __init__(self, side: str, root: Path) -> None:
        self.side = side
        # The package of its side, and the benchmark of this one. Not started in `root`: that would go before both.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(root)])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=root.parent,
        )  # fmt: skip

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, question: dict[str, Any]) -> Any:
        """Of a case: make it, check it. Of nothing: seconds of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SideError(f"{self.side}: the process ended; its own message is above")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise SideError(f"{self.side}: {answer}; no figures")
        return answer


def work(root: str) -> None:
    """What a side's process does."""
    import torch

    import sdtp_kernels
    from sdtp_bench.providers import find_providers, make_check
    from sdtp_bench.shapes import Case, make_stage
    from sdtp_bench.timing import CpuDevice

    if not Path(sdtp_kernels.__file__).is_relative_to(root):
        raise SystemExit("sdtp_kernels is not that of this side")
    device = CpuDevice()
    provider: Any = None
    with torch.no_grad():
        for line in sys.stdin:
            question = json.loads(line)
            if question:
                case = Case(**question)
                stage, plan = make_stage(case, "cpu"), case.plan()
                provider = find_providers(device, case, stage, plan, ["cpu"])["cpu"]
                print(json.dumps(make_check(case, stage, plan)(provider) or 0), flush=True)
                continue
            begin = device.mark()
            provider()
            print(json.dumps(device.microseconds(begin, device.mark()) / 1e6), flush=True)


if __name__ == "__main__":
    work(sys.argv[1])
