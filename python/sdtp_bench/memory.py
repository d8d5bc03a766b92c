"""Peak memory of a prefill, and ``sdtp bench memory``: the longest prompt that stays below a limit, dense and pruned.

The figure is the most that a prefill takes beyond what was there before: on a CPU resident memory as Linux counts it,
on a GPU what torch has allocated. It is measured in a process of its own: memory that other work has left would serve
it unseen.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdtp_bench import processes, prompts
from sdtp_bench.prompts import Way
from sdtp_eval import command
from sdtp_eval.paired import cache_bytes, cache_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from sdtp_bench.prompts import Setting

Result = TypeVar("Result")

DENSE = "dense"
# Linux: pages of 4 KiB only. Those of 2 MiB are taken or not by where a block begins; four runs of 73 MiB differed by
# 1.0 MiB with them and by 0.3 without.
PR_SET_THP_DISABLE = 41
CPU_LIMIT = 0.125  # GiB; a GPU's is all of its memory
# A process that measures on a CPU may reserve so much more address space than the limit, since not all that is
# reserved is touched: what asks for more is far beyond the limit, and must not take the machine's memory to show it.
SPARE_ADDRESSES = 2**30
DOES_NOT_FIT = 77  # exit status of a process; no other part of Python uses it
# Of torch on a CPU, which has no class for it; the last is oneDNN's, which has one message for all that it cannot get.
OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory", "could not create a primitive")
CLEAR = Path("/proc/self/clear_refs")  # of Linux; elsewhere the memory of a CPU's prefill cannot be measured
WARM_UP = 512  # tokens of a first prefill, which starts threads and touches the weights
# A fixed threshold: what is freed goes back to the system at once. By default glibc raises it as it sees large blocks
# freed, and keeps those for later: a prefill of 2048 tokens took 62 to 97 MiB in six runs by that, and 69 to 72 in
# eight with the threshold.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


def add_parser(commands: Any) -> None:
    """Add ``memory`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("memory", help="the longest prompt that stays below a limit, dense and pruned")
    prompts.add_options(parser)
    parser.add_argument(
        "--limit-gib", type=float, metavar="GIB",
        help=f"memory beyond the weights (default: {CPU_LIMIT:g}; on a GPU all that it has)",
    )  # fmt: skip
    parser.add_argument("--start", type=int, default=1024, help="tokens of the first prompt (%(default)s)")
    parser.add_argument("--step", type=int, default=256, help="lengths tried are its multiples (%(default)s)")
    parser.add_argument("--longest", type=int, default=2**17, help="no longer prompt is tried (%(default)s)")
    parser.set_defaults(run=run, keep=[0.9, 0.8])


def run(args: argparse.Namespace) -> int:
    """``sdtp bench memory``: search and print, and write a row as it is found."""
    from sdtp_bench.rows import append_rows

    with command.user_errors(processes.TrialError):
        if args.step < 1 or not args.step <= args.start <= args.longest:
            raise ValueError(
                f"--step {args.step} --start {args.start} --longest {args.longest}: expected 1 <= step <= start <= "
                "longest"
            )
        prompts.complete(args)
        if args.limit_gib is None:
            args.limit_gib = CPU_LIMIT if args.device == "cpu" else _gib_of_the_gpu()
        if args.limit_gib <= 0:
            raise ValueError(f"--limit-gib {args.limit_gib}: expected more than 0")
        if not can_measure(args.device):
            raise ValueError(f"{CLEAR} is missing: resident memory can be measured on Linux only; or use --device cuda")
        for dtype in args.dtype:
            dense = 0
            for way in (None, *map(Way._make, itertools.product(args.keep, args.budget, args.dropped_kv))):
                row = longest(args, dtype, way)
                dense = dense or row["tokens"]
                name = DENSE if way is None else ", ".join(map(str, way))
                ratio = f", {row['tokens'] / dense:.2f} x dense" if dense else ""
                print(f"{dtype}, {name}: {row['tokens']} tokens{ratio}", flush=True)
                if args.out:
                    append_rows(args.out, [row], args.device)
    return 0


def longest(args: argparse.Namespace, dtype: str, way: Way | None) -> dict[str, Any]:
    """A row: the longest prompt that stays below the limit.

    Returns
    -------
    dict
        ``bench="memory"``, ``checkpoint``, ``method`` (``dense`` or ours), ``keep``, ``budget``, ``block_size``,
        ``dtype``, ``limit_bytes``, ``step``, ``tokens`` (0 where not even one step fits), ``peak_bytes`` and
        ``kv_bytes`` of that prompt, ``trials`` (tokens and peak, in order).

    Raises
    ------
    TrialError
        If a process fails for another reason than memory.
    """
    limit = int(args.limit_gib * 2**30)
    found: dict[int, dict[str, Any]] = {}
    trials: list[tuple[int, int | None]] = []

    def share(tokens: int) -> float | None:
        measured = measure(args, dtype, tokens, [way], limit + SPARE_ADDRESSES)
        trials.append((tokens, None if measured is None else measured[0]["peak_bytes"]))
        if measured is None:
            return None
        found[tokens] = measured[0]
        return float(measured[0]["peak_bytes"] / limit)

    tokens = longest_that_fits(share, args.start, args.longest, args.step)
    method = DENSE if way is None else Path(args.method).stem
    return {
        "bench": "memory",
        "checkpoint": Path(args.model).name,
        "method": method,
        "keep": way and way.keep,
        "budget": way and way.budget,
        "dropped_kv": way and way.dropped_kv,
        "block_size": args.block_size if way and way.budget == "block" else None,
        "dtype": dtype,
        "limit_bytes": limit,
        "step": args.step,
        "tokens": tokens,
        "peak_bytes": found[tokens]["peak_bytes"] if tokens else 0,
        "kv_bytes": found[tokens]["kv_bytes"] if tokens else 0,
        "trials": trials,
    }


def longest_that_fits(share: Callable[[int], float | None], start: int, longest: int, step: int) -> int:
    """The longest length found to fit, a multiple of `step`; the next multiple was found not to, or is too long.

    Parameters
    ----------
    share : callable
        Of a length: what it takes, as a share of what there is; ``None`` where it takes too much to say. It should grow
        about in proportion: each length that is tried follows from the last one by that.
    start : int
        Tried first.
    longest : int
        No longer one is tried.
    step : int

    Returns
    -------
    int
        0 where not even `step` fits.
    """
    longest = longest // step * step
    fits, fails = 0, longest + step
    tokens = start // step * step
    while fails - fits > step:
        taken = share(tokens)
        if taken is not None and taken <= 1:
            fits = tokens
        else:
            fails = tokens
        # With nothing to go by: double, and once that is too much, halve the gap.
        unknown = 2 * tokens if fails > longest else (fits + fails) // 2
        guess = int(tokens / taken) if taken else unknown
        tokens = min(max(guess // step * step, fits + step), fails - step)
    return fits


# ----------------------------------------------------------------------------------------------------------- measuring


def can_measure(device: str) -> bool:
    """Whether the system tells the peak of a prefill there."""
    return device == "cuda" or CLEAR.exists()


def peaks(args: argparse.Namespace, setting: Setting) -> dict[Way | None, int]:
    """Most bytes that a prefill takes beyond the weights, in every way and, under ``None``, dense.

    Raises
    ------
    TrialError
        If the process that measures fails.
    """
    # Dense last: what stays for good, such as oneDNN's scratch, then counts against the pruned ones, if at all.
    ways = [*sorted(setting.pairs), None]
    found = measure(args, setting.dtype, setting.dense.tokens, ways)
    if found is None:
        raise processes.TrialError(f"a prefill of {setting.dense.tokens} tokens ran out of memory")
    return {way: entry["peak_bytes"] for way, entry in zip(ways, found, strict=True)}


def measure(
    args: argparse.Namespace, dtype: str, tokens: int, ways: Sequence[Way | None], address_space: int | None = None
) -> list[dict[str, Any]] | None:
    """A first prefill of this many tokens in each way, in a process of its own.

    Parameters
    ----------
    address_space : int, optional
        Bytes that the process may reserve for it, on a CPU.

    Returns
    -------
    list of dict, or None
        ``peak_bytes`` and ``kv_bytes`` of each; ``None`` where memory ran out.

    Raises
    ------
    TrialError
        If the process fails for another reason.
    """
    names = ("model", "method", "block_size", "device", "backend", "text", "kv_predictor")
    settings = {name: getattr(args, name) for name in names} | {
        "dtype": [dtype],
        "tokens": [tokens],
        "keep": list(dict.fromkeys(way.keep for way in ways if way)) or [1.0],
        "budget": list(dict.fromkeys(way.budget for way in ways if way)) or ["global"],
        "dropped_kv": list(dict.fromkeys(way.dropped_kv for way in ways if way)) or ["none"],
        "ways": list(ways),
        "address_space": address_space,
    }
    result = processes.run_module(__name__, settings, env=ENVIRONMENT)
    if result.returncode in (DOES_NOT_FIT, -signal.SIGKILL):  # the latter is how Linux takes memory back
        return None
    answer: list[dict[str, Any]] = processes.answer_of(result)
    return answer


def work(settings: dict[str, Any]) -> int:
    """What that process does; its exit status."""
    import torch

    if settings["device"] == "cpu":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    (setting,) = prompts.settings_of(argparse.Namespace(**settings))
    ways = [None if way is None else Way(*way) for way in settings["ways"]]
    answer: list[dict[str, Any]] = []
    try:
        with torch.inference_mode():
            for way in ways:
                with setting.pruning(way) as (pair, _):
                    pair._replace(input_ids=pair.input_ids[:, :WARM_UP]).prefill()
            if settings["device"] == "cpu" and settings["address_space"] is not None:
                _, hard = resource.getrlimit(resource.RLIMIT_AS)
                resource.setrlimit(resource.RLIMIT_AS, (_of_this_process("VmSize") + settings["address_space"], hard))
            for way in ways:
                with setting.pruning(way) as (pair, _):
                    output, peak = peak_bytes(pair.prefill, pair.input_ids.device)
                answer.append({"peak_bytes": peak, "kv_bytes": cache_bytes(cache_of(output))})
                del output
    except (MemoryError, torch.OutOfMemoryError):
        return DOES_NOT_FIT
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return DOES_NOT_FIT
    print(json.dumps(answer))
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch on a CPU, which has no class for it, says that memory ran out."""
    return any(text in str(error) for text in OUT_OF_MEMORY)


def peak_bytes(work: Callable[[], Result], device: torch.device) -> tuple[Result, int]:
    """What `work` returns, and the most bytes that it takes beyond those that were taken before.

    On a CPU that is resident memory as Linux counts it, on a GPU what torch has allocated.
    """
    import torch

    gc.collect()  # what nobody holds is not to be freed while it counts as taken before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, int(torch.cuda.max_memory_allocated(device) - before)
    CLEAR.write_text("5", encoding="ascii")  # the peak is what is resident now
    before = _of_this_process("VmRSS")
    result = work()
    return result, max(0, _of_this_process("VmHWM") - before)  # Linux counts in batches: a little can seem less


def _gib_of_the_gpu() -> float:
    import torch

    return float(torch.cuda.get_device_properties("cuda").total_memory / 2**30)


def _of_this_process(name: str) -> int:
    """Bytes, by the name that Linux gives them."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[1])))
