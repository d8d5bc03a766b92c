"""What stands with every figure: the machine, the versions, the revision, the date, the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Instruction sets that the matrix products and the kernels here choose between, as Linux names them.
FLAGS = frozenset(
    {
        "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16",
        "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "amx_int8",
        "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
    }
)  # fmt: skip
# Files whose change changes no figure: without this the first rows written would make all others dirty.
NOT_CODE = (":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)*.md")


def describe_run(device: torch.device | str = "cpu") -> dict[str, Any]:
    """All of it.

    Parameters
    ----------
    device : torch.device or str, default "cpu"
        Where the figures come from.

    Returns
    -------
    dict
        ``machine``, ``versions``, ``revision``, ``date``, ``command``.
    """
    return {
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "revision": describe_revision(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": describe_command(),
    }


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What ran: processor, cores, threads, flags, memory, GPU, system.

    Parameters
    ----------
    device : torch.device or str, default "cpu"

    Returns
    -------
    dict
        ``processor``, ``cores``, ``threads`` (of torch), ``flags`` (those of :data:`FLAGS` that it has; empty where the
        system does not tell), ``memory`` (bytes), ``gpu`` (its name, or None), ``system``.
    """
    import psutil
    import torch

    device = torch.device(device)
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []  # not Linux: the architecture has to do
    told = {name.strip(): value.strip() for name, _, value in lines}
    return {
        "processor": told.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": sorted(FLAGS & set(told.get("flags", told.get("Features", "")).split())),
        "memory": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str | None]:
    """Of everything that a figure depends on; None for what is not there."""
    import torch

    from sdtp_kernels.doctor import installed_versions

    return {**installed_versions(), "cuda": torch.version.cuda, "hip": torch.version.hip}


def describe_revision() -> str | None:
    """The commit of the checkout, with ``+dirty`` where code has changed since; None where this is no checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment inside somebody else's checkout is none of ours
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *NOT_CODE)
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_command() -> str:
    """The command line, with every absolute path cut to its last part: rows are published, directories are not."""
    program = Path(sys.argv[0])
    # `python -m sdtp_kernels` is the command `sdtp`.
    name = "sdtp" if program.parts[-2:] == ("sdtp_kernels", "__main__.py") else program.name
    return shlex.join([name, *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:])])
