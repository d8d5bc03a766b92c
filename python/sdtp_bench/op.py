"""``sdtp bench op`` and ``scaling``: the pruning step by every provider that can run it.

Outputs are compared first: a wrong one gets an error instead of a figure. Then all are timed interleaved. The first
matrix product of the pruner takes part alone, as the bound that no composition of PyTorch's operators can beat.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Any

import torch

from sdtp_bench.providers import find_providers, make_check
from sdtp_bench.rows import append_rows, summary
from sdtp_bench.shapes import MODELS, SHORT, Case, Stage, make_stage
from sdtp_bench.timing import CpuDevice, CudaDevice, Device, extra_bytes, interleave
from sdtp_eval import command
from sdtp_eval.schedules import BUDGETS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence


FIRST_MATMUL = "first matmul"
# A median of fewer says little, and of more says nothing new.
MIN_REPEATS, MAX_REPEATS = 5, 60


def add_parsers(commands: Any) -> None:
    """Add ``op`` and ``scaling`` to the parsers of ``sdtp bench``."""
    op = commands.add_parser("op", help="the pruning step, by every provider that can run it")
    add_case_arguments(op)
    op.set_defaults(tokens=[2048, 8192], model=["qwen2-0.5b", "qwen2-7b"], threads=None, providers=None)
    scaling = commands.add_parser("scaling", help="the pruning step on a CPU: time and memory over tokens and threads")
    add_case_arguments(scaling)
    threads = sorted({1, os.cpu_count() or 1})
    scaling.add_argument("--threads", type=int, nargs="+", metavar="N", help=f"({' '.join(map(str, threads))})")
    scaling.set_defaults(
        tokens=[2048, 8192, 32768, 131072], model=["qwen2-0.5b"], threads=threads, providers=["eager", "cpu"]
    )
    for parser, bench in ((op, "op"), (scaling, "scaling")):
        parser.add_argument("--providers", nargs="+", metavar="NAME",
                            help="providers; 'reference' only where it is named (all others that can run)"
                            if bench == "op" else "providers (eager cpu)")  # fmt: skip
        parser.add_argument("--out", metavar="DIR", help=f"append the rows to {bench}.jsonl there")
        parser.set_defaults(run=run, bench=bench)


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """The shapes to run, and for how long; every combination is a case."""
    parser.add_argument("--model", nargs="+", choices=list(MODELS), metavar="NAME",
                        help=f"whose hidden size: {', '.join(MODELS)}")  # fmt: skip
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="prompt lengths")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="B", help="prompts at once (1)")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.9], metavar="R", help="keep ratios (0.9)")
    command.add_dtype_option(parser, ["float32", "bfloat16"])
    parser.add_argument("--budget", nargs="+", choices=BUDGETS, default=["global"], help="(global)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S",
                        help=f"for the rounds of a case, at least {MIN_REPEATS} (%(default)g)")  # fmt: skip


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Every combination of what was asked for.

    Raises
    ------
    ValueError
        If one cannot be.
    """
    if min(*args.tokens, *args.batch) < 1 or args.seconds < 0:
        raise ValueError(
            f"--tokens {args.tokens} --batch {args.batch} --seconds {args.seconds}: expected tokens and prompts, at "
            "least 1 each, and no negative time"
        )
    combinations = itertools.product(args.model, args.dtype, args.budget, args.keep, args.batch, args.tokens)
    return [
        Case(model, tokens, dtype=SHORT[dtype], batch=batch, keep=keep, budget=budget)
        for model, dtype, budget, keep, batch, tokens in combinations
    ]


def run(args: argparse.Namespace) -> int:
    """``sdtp bench op`` and ``sdtp bench scaling``: 0 where all is right, 1 where a provider is not."""
    from rich.console import Console

    device = CudaDevice() if args.bench == "op" and torch.cuda.is_available() else CpuDevice()
    console = Console(highlight=False)
    threads = args.threads or [torch.get_num_threads()]
    is_right = True
    with command.user_errors():
        if min(threads) < 1:
            raise ValueError(f"--threads {args.threads}: expected at least 1")
        for case in cases_of(args):
            rows = [
                {"bench": args.bench, **row} for row in measure(device, case, args.seconds, args.providers, threads)
            ]
            is_right &= not any("error" in row for row in rows)
            print_rows(rows, console)
            if args.out:
                append_rows(args.out, rows, device.torch_device)
    return 0 if is_right else 1


def measure(
    device: Device,
    case: Case,
    seconds: float = 10.0,
    names: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Check every provider on one case, then time those that are right.

    Parameters
    ----------
    device : Device
    case : Case
    seconds : float, default 10
        Rounds are run for about so long, at least five of them.
    names : sequence of str, optional
        See :func:`sdtp_bench.providers.find_providers`.
    threads : sequence of int, optional
        Numbers of threads to run with, on a CPU; by default those that torch has. All are interleaved in one run.

    Returns
    -------
    list of dict
        A row a provider and number of threads: the case, ``hidden_size``, ``threads``, ``flops`` (of matrix products),
        ``bytes`` (inputs and outputs, each once), and either ``error``, or ``seconds``, ``quantiles``,
        ``seconds_all``, ``first_matmul_s`` (median, of the same rounds) and ``extra_bytes`` (None on a GPU).

    Raises
    ------
    ValueError
        If the case or a provider cannot be.
    """
    threads = threads or [torch.get_num_threads()]
    before = torch.get_num_threads()
    stage, plan = make_stage(case, device.torch_device), case.plan()
    check = make_check(case, stage, plan)
    runs: dict[tuple[str, int], Callable[[], object]] = {}
    errors: dict[tuple[str, int], str] = {}
    extra: dict[tuple[str, int], int | None] = {}
    kept_bytes = plan.num_keep * (bytes_of_token(stage) + 8 + 4) * case.batch  # and an index and a mean
    try:
        with torch.no_grad():
            for (name, call), count in itertools.product(
                find_providers(device, case, stage, plan, names).items(), threads
            ):
                provider = _with_threads(call, count)
                errors[name, count] = check(provider)
                if not errors[name, count]:
                    runs[name, count] = provider
                    on_cpu = device.torch_device.type == "cpu"
                    extra[name, count] = extra_bytes(provider, kept_bytes) if on_cpu else None
            for count in threads:
                runs[FIRST_MATMUL, count] = _with_threads(first_matmul(stage), count)
            times = _interleave_for(device, runs, seconds)
    finally:
        torch.set_num_threads(before)
    about = {
        **case._asdict(),
        "hidden_size": stage.hidden_states.shape[-1],
        "pruner_size": stage.scoring.w1.shape[0],
        "num_keep": plan.num_keep,
        "flops": 2 * case.batch * case.tokens * (stage.scoring.w1.numel() + stage.scoring.w2.numel()),
        "bytes": sum(t.nbytes for t in stage.scoring if isinstance(t, torch.Tensor))
        + case.batch * case.tokens * bytes_of_token(stage)
        + kept_bytes,
    }
    rows = []
    for (name, count), error in errors.items():
        row = {"provider": name, **about, "threads": count}
        if error:
            rows.append({**row, "error": error})
            continue
        matmul = summary(times[FIRST_MATMUL, count])["seconds"]
        rows.append({**row, **summary(times[name, count]), "first_matmul_s": matmul, "extra_bytes": extra[name, count]})
    return rows


def first_matmul(stage: Stage) -> Callable[[], torch.Tensor]:
    """The pruner's first matrix product alone, into memory that is there already."""
    tokens = stage.hidden_states.flatten(0, 1)
    out = tokens.new_empty(tokens.shape[0], stage.scoring.w1.shape[0])
    return lambda: torch.mm(tokens, stage.scoring.w1.t(), out=out)


def bytes_of_token(stage: Stage) -> int:
    """What a token takes in all the tensors that are gathered."""
    tensors = (stage.hidden_states, *stage.tensors)
    return sum(t.element_size() * t.shape[2:].numel() for t in tensors)


def _with_threads(run: Callable[[], Any], threads: int) -> Callable[[], Any]:
    def call() -> Any:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return run()

    return call


def _interleave_for(
    device: Device, runs: dict[tuple[str, int], Callable[[], object]], seconds: float
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each run, in as many rounds as the time allows."""
    trial = interleave(device, runs, repeats=1, warm_ups=1)
    round_seconds = sum(times[0] for times in trial.values()) / 1e6
    repeats = min(max(int(seconds / round_seconds), MIN_REPEATS), MAX_REPEATS)
    times = interleave(device, runs, repeats, warm_ups=1)
    return {key: [us / 1e6 for us in values] for key, values in times.items()}


def print_rows(rows: Sequence[dict[str, Any]], console: Any) -> None:
    """A table of one case: medians with their spread, and how often the fused op's time each takes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first = rows[0]
    title = (
        f"{first['model']}, {first['tokens']} tokens, batch {first['batch']}, keep {first['keep']}, {first['dtype']}, "
        f"{first['budget']} budget"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("provider", "threads", "ms", "p10 to p90", "/ matmul", "/ cpu", "extra MiB"):
        table.add_column(name, justify="left" if name == "provider" else "right", no_wrap=True)
    fused = {row["threads"]: row["seconds"] for row in rows if row["provider"] == "cpu" and "seconds" in row}
    for row in rows:
        if "error" in row:
            table.add_row(row["provider"], str(row["threads"]), "WRONG")
            continue
        quantiles = row["quantiles"]
        own = fused.get(row["threads"])
        table.add_row(
            row["provider"],
            str(row["threads"]),
            f"{row['seconds'] * 1e3:.2f}",
            f"{quantiles['p10'] * 1e3:.2f} to {quantiles['p90'] * 1e3:.2f}",
            f"{row['seconds'] / row['first_matmul_s']:.2f}",
            f"{row['seconds'] / own:.2f}" if own else "",
            "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}",
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(Text(f"{row['provider']}: WRONG, no figure: {row['error']}"), soft_wrap=True)
