"""``sdtp bench multi``: prefill by tensor parallelism against the best single process.

Several processes have to beat one that has the whole machine: on a CPU the best of several numbers of threads, on GPUs
one GPU. Launches of both kinds are interleaved, and nothing is reported whose results differ from the single process's.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_bench import processes
from sdtp_bench.rows import append_rows
from sdtp_eval import command

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

WARM_UPS = 1
# Of the spread of the logits: sums over processes are rounded in another order.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


class Launch(NamedTuple):
    """One way to run: how many processes, and threads in each."""

    processes: int
    threads: int


def add_parser(commands: Any) -> None:
    """Add ``multi`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("multi", help="prefill on several devices against the best single one")
    processes.add_arguments(parser)
    parser.add_argument(
        "--nproc", type=int, help="processes, on GPUs one for each (default: the fewest that share the heads evenly)"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each kind in a launch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="launches of each kind (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure with these arguments; see :func:`add_parser`."""
    with command.user_errors(processes.TrialError):
        rows = measure(processes.complete(args))
        if args.out:
            append_rows(args.out, rows, args.device)
    for row in rows:
        threads = "" if args.device == "cuda" else f" x {row['threads']} threads"
        print(
            f"{row['processes']} process{'es' if row['processes'] > 1 else ''}{threads:<12} {row['method']:<7}"
            f"{row['seconds']:9.4f} s{row['speedup']:7.2f} x the best single, {row['efficiency']:.0%} a process"
        )
    return 0


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a launch and method.

    Returns
    -------
    list of dict
        ``bench="multi"``, ``checkpoint``, ``tokens``, ``keep``, ``dtype``, ``processes``, ``threads``, ``method``,
        ``seconds`` (median), ``seconds_all``, ``speedup`` (best single process of the same method over this),
        ``efficiency`` (``speedup / processes``).

    Raises
    ------
    ValueError
        For settings that cannot work, or where several processes compute something else than one.
    TrialError
        If a process fails.
    """
    args.nproc = choose_processes(args)
    if args.repeats < 1 or args.rounds < 1:
        raise ValueError("--repeats and --rounds: expected at least 1")
    if args.device == "cuda":
        import torch

        if torch.cuda.device_count() < args.nproc:
            raise ValueError(f"--nproc {args.nproc}: torch finds {torch.cuda.device_count()} GPUs")
    launches = launches_of(args.nproc, args.device, os.cpu_count() or 1)
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "out")}
    answers: dict[Launch, list[dict[str, Any]]] = {launch: [] for launch in launches}
    for _ in range(args.rounds):
        for launch in launches:
            answers[launch].append(_answer(launch, settings))
    single = [launch for launch in launches if launch.processes == 1]
    for launch in launches:
        for method in processes.METHODS:
            check(answers[single[0]][0][method], answers[launch][0][method], TOLERANCES[args.dtype], launch, method)
    about = {
        "bench": "multi",
        "checkpoint": Path(args.model).name,
        "tokens": args.tokens,
        "keep": args.keep,
        "dtype": args.dtype,
    }
    found = rows_of(
        {
            (launch, method): [s for answer in found for s in answer[method]["seconds"]]
            for launch, found in answers.items()
            for method in processes.METHODS
        }
    )
    return [{**about, **row} for row in found]


def choose_processes(args: argparse.Namespace) -> int:
    """The number asked for, or the smallest that works.

    Raises
    ------
    ValueError
        If this many cannot share the heads: each process has whole key heads, and the query heads that go with them.
    """
    from transformers import AutoConfig

    if args.nproc is not None and args.nproc < 2:
        raise ValueError(f"--nproc {args.nproc}: expected at least 2; one process is the baseline")
    key_heads = AutoConfig.from_pretrained(args.model).num_key_value_heads
    possible = [n for n in range(2, key_heads + 1) if key_heads % n == 0]
    if args.nproc not in (None, *possible) or not possible:
        options = f"expected one of {', '.join(map(str, possible))}" if possible else "it cannot be split"
        asked = "" if args.nproc is None else f"--nproc {args.nproc}: "
        raise ValueError(f"{asked}this model has {key_heads} key head{'s' * (key_heads > 1)}: {options}")
    return args.nproc or possible[0]


def launches_of(nproc: int, device: str, cores: int) -> list[Launch]:
    """The single processes to beat, and the launch to measure."""
    if device == "cuda":
        return [Launch(1, 1), Launch(nproc, 1)]
    threads = sorted({max(1, cores >> power) for power in range(cores.bit_length())}, reverse=True)
    return [*(Launch(1, n) for n in threads[:3]), Launch(nproc, max(1, cores // nproc))]


def rows_of(seconds: dict[tuple[Launch, str], list[float]]) -> list[dict[str, Any]]:
    """Medians, and each launch against the best single process of the same method."""
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    best = {
        method: min(median for (launch, m), median in medians.items() if m == method and launch.processes == 1)
        for method in processes.METHODS
    }
    return [
        {
            **launch._asdict(),
            "method": method,
            "seconds": median,
            "seconds_all": seconds[launch, method],
            "speedup": best[method] / median,
            "efficiency": best[method] / median / launch.processes,
        }
        for (launch, method), median in medians.items()
    ]


def check(expected: dict[str, Any], got: dict[str, Any], tolerance: float, launch: Launch, method: str) -> None:
    """Refuse results that are not those of the single process.

    Raises
    ------
    ValueError
        If a layer's token count differs, or the logits do by more than `tolerance` of their spread.
    """
    if expected["tokens_per_layer"] != got["tokens_per_layer"]:
        raise ValueError(f"{launch}, {method}: other token counts than one process; no figures")
    spread = max(expected["logits"]) - min(expected["logits"])
    error = max(abs(a - b) for a, b in zip(expected["logits"], got["logits"], strict=True))
    if not error <= tolerance * spread:  # also where it is NaN
        raise ValueError(f"{launch}, {method}: logits differ by {error:.3g} from one process's; no figures")


def _answer(launch: Launch, settings: dict[str, Any]) -> dict[str, Any]:
    launcher: Sequence[str] = ()
    if launch.processes > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(launch.processes))
    environment = {"OMP_NUM_THREADS": str(launch.threads), "MKL_NUM_THREADS": str(launch.threads)}
    result = processes.run_module(__name__, {**settings, **launch._asdict()}, launcher, environment)
    answer: dict[str, Any] = processes.answer_of(result)
    return answer


def work(settings: dict[str, Any]) -> None:
    """What each process does: methods are interleaved, and all processes begin and end a prefill together."""
    import torch

    is_parallel = settings["processes"] > 1
    if settings["device"] == "cpu":
        torch.set_num_threads(settings["threads"])
    subject = processes.Subject(settings, **({"tp_plan": "auto"} if is_parallel else {}))

    def meet() -> None:
        if settings["device"] == "cuda":
            torch.cuda.synchronize()
        if is_parallel:
            torch.distributed.barrier()

    answer: dict[str, Any] = {method: {"seconds": []} for method in processes.METHODS}
    for repeat in range(WARM_UPS + settings["repeats"]):
        for method in processes.METHODS:
            with subject.method(method):
                meet()
                begin = time.perf_counter()
                logits, cache = subject.prefill(settings["tokens"])
                meet()
                seconds = time.perf_counter() - begin
            if repeat >= WARM_UPS:
                answer[method]["seconds"].append(seconds)
            answer[method]["logits"] = logits.float().tolist()
            answer[method]["tokens_per_layer"] = [layer.keys.shape[2] for layer in cache.layers]
    if not is_parallel or torch.distributed.get_rank() == 0:
        print(json.dumps(answer), flush=True)
    if is_parallel:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
