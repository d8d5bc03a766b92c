"""``sdtp bench memory``: the longest prompt that fits, dense and pruned.

Every length is tried in a process of its own, which limits itself: its address space on a CPU, its share of the card on
a GPU. What does not fit ends that process, and nothing else.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import TYPE_CHECKING, Any

from sdtp_bench import processes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

DOES_NOT_FIT = 77  # exit status of a trial; no other part of Python uses it
# The last is oneDNN's, which has one message for all that it cannot get. Its products of these weights succeed in the
# warm-up, and nothing but the length differs.
OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "Cannot allocate memory", "could not create a primitive")
# What a process dies of that may not have memory: an allocation that nobody could catch, or the kernel's own choice.
DEADLY = frozenset({-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS})
WARM_UP = 128  # tokens of a first prefill, which starts threads and loads what is loaded lazily


def add_parser(commands: Any) -> None:
    """Add ``memory`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("memory", help="the longest prompt that fits, dense and pruned")
    processes.add_arguments(parser)
    parser.add_argument(
        "--limit-gib", type=float, metavar="GIB", help="memory beside the weights (CPU: 4; GPU: what the card has)"
    )
    parser.add_argument("--start", type=int, default=1024, help="tokens of the first prompt (%(default)s)")
    parser.add_argument("--longest", type=int, default=2**20, help="no longer prompt is tried (%(default)s)")
    parser.add_argument("--halvings", type=int, default=3, help="refinements behind the last doubling (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Search with these arguments; see :func:`add_parser`."""
    from sdtp_kernels.cli import CommandError

    try:
        rows = search(processes.complete(args))
        processes.write_rows(rows, args)
    except (ValueError, OSError, ImportError, processes.TrialError) as error:
        raise CommandError(str(error)) from error
    for row in rows:
        kv = "" if row["kv_bytes"] is None else f", KV cache {row['kv_bytes'] / 2**20:.1f} MiB"
        print(f"{row['method']:<8}{row['tokens']:>9} tokens{kv}")
    dense, pruned = (row["tokens"] for row in rows)
    if dense:
        print(f"pruned over dense: {pruned / dense:.2f}")
    return 0


def search(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method.

    Returns
    -------
    list of dict
        ``bench="memory"``, ``method``, ``tokens`` (the longest prompt that fits; 0 where none does), ``kv_bytes`` of
        its cache, ``trials`` (tokens and whether they fit, in order).

    Raises
    ------
    ValueError
        For settings that cannot work.
    TrialError
        If a trial fails for another reason than memory.
    """
    if args.start < 1 or args.longest < args.start:
        raise ValueError(f"--start {args.start} --longest {args.longest}: expected 1 <= start <= longest")
    if args.limit_gib is not None and args.limit_gib <= 0:
        raise ValueError(f"--limit-gib {args.limit_gib}: expected more than 0")
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "out")}
    if args.device == "cpu" and args.limit_gib is None:
        settings["limit_gib"] = 4.0
    rows = []
    for method in processes.METHODS:
        trials: list[tuple[int, bool]] = []
        kv_bytes: dict[int, int] = {0: 0}

        def fits(tokens: int, method: str = method, trials: Any = trials, kv_bytes: Any = kv_bytes) -> bool:
            found = attempt({**settings, "method": method, "tokens": tokens})
            trials.append((tokens, found is not None))
            if found is not None:
                kv_bytes[tokens] = found
            print(f"{method}: {tokens} tokens {'fit' if found is not None else 'do not fit'}", flush=True)
            return found is not None

        tokens = longest_that_fits(fits, args.start, args.longest, args.halvings)
        rows.append(
            {"bench": "memory", "method": method, "tokens": tokens, "kv_bytes": kv_bytes.get(tokens), "trials": trials}
        )
    return rows


def longest_that_fits(fits: Callable[[int], bool], start: int, longest: int, halvings: int) -> int:
    """The longest length found to fit: by doubling from `start`, then by halving the gap to what does not.

    Returns
    -------
    int
        0 where `start` does not fit; `longest` where that does. Otherwise less than the first length that does not fit
        by at most ``length / 2**halvings``.
    """
    if not fits(start):
        return 0
    good = start
    while good < longest:
        candidate = min(2 * good, longest)
        if not fits(candidate):
            bad = candidate
            break
        good = candidate
    else:
        return good
    for _ in range(halvings):
        middle = (good + bad) // 2
        if middle in (good, bad):
            break
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def attempt(settings: dict[str, Any]) -> int | None:
    """Prefill in a process of its own.

    Returns
    -------
    int or None
        Bytes of the KV cache; ``None`` where the prompt does not fit.

    Raises
    ------
    TrialError
        If the process fails for another reason.
    """
    result = processes.run_module(__name__, settings)
    if result.returncode == DOES_NOT_FIT or result.returncode in DEADLY:
        return None
    return int(processes.answer_of(result)["kv_bytes"])


def trial(settings: dict[str, Any]) -> int:
    """What the process of one trial does; its exit status."""
    import torch

    subject = processes.Subject(settings)
    with subject.method(settings["method"]):
        subject.prefill(WARM_UP)
        _limit(settings["device"], settings["limit_gib"])
        try:
            _, cache = subject.prefill(settings["tokens"])
        except (MemoryError, torch.OutOfMemoryError):
            return DOES_NOT_FIT
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return DOES_NOT_FIT
    print(json.dumps({"kv_bytes": sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)}))
    return 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch on a CPU, which has no class for it, says that memory ran out."""
    return any(text in str(error) for text in OUT_OF_MEMORY)


def _limit(device: str, gib: float | None) -> None:
    """From here on, no more memory than this, and no core dump for want of it."""
    import torch

    if device == "cuda":
        if gib is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            limit = torch.cuda.memory_reserved() + int(gib * 2**30)
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        return
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    assert gib is not None
    limit = mapped + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(trial(json.loads(sys.argv[1])))
