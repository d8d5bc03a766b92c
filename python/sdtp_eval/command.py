"""What the commands of evaluation, training and benchmarks share: options, device and model, errors, a progress bar."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    import torch
    from rich.progress import Progress, TaskID

DTYPES = ("float32", "bfloat16", "float16")


def add_model_option(parser: argparse.ArgumentParser, what: str = "a checkpoint") -> None:
    """``--model``; what it is taken for stands in the help."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help=f"{what} (default: SmolLM2-135M-Instruct)")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """``--device``, for :func:`choose_device`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def add_dtype_option(
    parser: argparse.ArgumentParser, default: str | Sequence[str] = "float32", choices: Sequence[str] = DTYPES
) -> None:
    """``--dtype`` by torch's own names: one, or several where the default is a list."""
    several = not isinstance(default, str)
    shown = " ".join(default) if several else default
    parser.add_argument(
        "--dtype", nargs="+" if several else None, choices=choices, default=default,
        help=f"of the model (default: {shown})",
    )  # fmt: skip


def add_backend_option(parser: argparse.ArgumentParser) -> None:
    """``--backend``."""
    parser.add_argument("--backend", default="auto", help="backend of the ops; see 'sdtp doctor' (%(default)s)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where: what :func:`load_model` reads, and ``--backend``."""
    add_model_option(parser)
    add_device_option(parser)
    add_dtype_option(parser)
    add_backend_option(parser)


def choose_device(name: str | None) -> torch.device:
    """The device that ``--device`` means.

    Parameters
    ----------
    name : {"cpu", "cuda"} or None
        ``None`` is the GPU where there is one.

    Raises
    ------
    ValueError
        If a GPU is asked for and torch finds none.

    Examples
    --------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch finds no GPU here; 'sdtp doctor' tells more")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer that the options of :func:`add_model_options` name, on their device.

    Raises
    ------
    ValueError, OSError, ImportError
        For devices and checkpoints that are not there.
    """
    import torch

    from sdtp_eval.checkpoints import default_checkpoint, load_checkpoint

    device: Any = choose_device(args.device)
    model, tokenizer = load_checkpoint(args.model or default_checkpoint(), getattr(torch, args.dtype))
    return model.to(device), tokenizer


@contextlib.contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """What options, files, models and machines raise becomes a message for the user, without a traceback.

    Raises
    ------
    CommandError
        Instead of ``ValueError``, ``NotImplementedError``, ``BackendUnavailableError``, ``OSError``, ``ImportError``,
        and `others`.
    """
    from sdtp_kernels import BackendUnavailableError
    from sdtp_kernels.cli import CommandError

    expected: tuple[type[Exception], ...] = (
        ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError, *others,
    )  # fmt: skip
    try:
        yield
    except expected as error:
        raise CommandError(str(error)) from error


class Bar(NamedTuple):
    """A progress bar; see :func:`progress_bar`."""

    progress: Progress
    task: TaskID

    def show(self, description: str) -> None:
        """What is being done now."""
        self.progress.update(self.task, description=description, refresh=True)

    def advance(self, steps: int = 1) -> None:
        """So many steps are done."""
        self.progress.update(self.task, advance=steps, refresh=True)


@contextlib.contextmanager
def progress_bar(total: int, description: str = "", *, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    """A bar on the standard error, drawn when it is told something: no thread runs while something is timed.

    Parameters
    ----------
    total : int
        Steps.
    description : str, default ""
        Shown in front of the bar until :meth:`Bar.show` says something else.
    done : int, default 0
        Steps of an earlier run.
    shown : bool, default True
        Whether to draw it: where several processes share the work, one does.

    Examples
    --------
    >>> with progress_bar(2, "reading") as bar:
    ...     for _ in range(2):
    ...         bar.advance()
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    progress = Progress(
        TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(file=sys.stderr, highlight=False), auto_refresh=False, disable=not shown,
    )  # fmt: skip
    with progress:
        yield Bar(progress, progress.add_task(description, total=total, completed=done))
