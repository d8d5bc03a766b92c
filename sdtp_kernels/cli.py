"""The command ``sdtp``: ``doctor``, and what other packages add.

A package adds a command ``NAME`` with an entry point ``NAME`` in the group ``sdtp.commands``. It points to a function
``add_command(subparsers)`` that adds the parser ``NAME`` and sets ``run``, a function of the parsed arguments that
returns the exit status. This module imports nothing but the standard library, and a plug-in only when it is asked for:
``sdtp doctor`` works where everything else is broken.
"""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from typing import TYPE_CHECKING

from sdtp_kernels import doctor

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP = "sdtp.commands"


class CommandError(Exception):
    """A mistake that the user can put right: printed as one message, without a traceback, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``sdtp`` with these arguments.

    Parameters
    ----------
    argv : sequence of str, optional
        Without the program's name; those of the process by default.

    Returns
    -------
    int
        0 on success, 1 where a check failed, 2 on a mistake of the user, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # The first word is the command: the program itself has no option with a value.
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        args = _parser(command).parse_args(argv)
        status: int = args.run(args)
    except CommandError as error:
        print(f"sdtp {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sdtp {command}: stopped", file=sys.stderr)
        return 130
    return status


def plugin_commands() -> dict[str, metadata.EntryPoint]:
    """The commands that installed packages add, by name."""
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sdtp", description="SDTP: token pruning for long prompts.")
    parser.add_argument("--version", action="version", version=f"sdtp-kernels {doctor.own_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor.add_command(subparsers)
    for name, point in plugin_commands().items():
        if command not in (name, None):
            subparsers.add_parser(name)  # its name is all that an error message about another one needs
            continue
        try:
            point.load()(subparsers)
        except Exception as error:  # whatever a broken plug-in raises, the other commands stay usable
            reason = f"{type(error).__name__}: {error}"
            if command == name:
                raise CommandError(f"the command does not load ({point.value}): {reason}") from error
            subparsers.add_parser(name, help=f"does not load: {reason}".replace("%", "%%"))
    return parser
