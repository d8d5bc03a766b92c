"""What a planted bug is, and how it gets into a text."""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

CUDA, SUITE = "csrc/cuda/", "triton_interpreter_suite.py"


class Mutant(NamedTuple):
    """One edit of one file, and the tests that are to fail with it.

    ``old`` stands exactly once in the file. A ``re.compile(...)`` outlives a renamed variable: its groups may stand in
    ``new`` as ``\\1``. Name the cheapest test that catches the bug, and of a parametrized one a single case.
    """

    name: str
    file: str
    old: str | re.Pattern[str]
    new: str
    tests: str


class StaleError(ValueError):
    """The entry does not fit its file any more."""


def plant(mutant: Mutant, text: str) -> str:
    """The file's text with the bug in it."""
    pattern = mutant.old if isinstance(mutant.old, re.Pattern) else None
    count = len(pattern.findall(text)) if pattern else text.count(mutant.old)
    if count != 1:
        wanted = pattern.pattern if pattern else mutant.old
        raise StaleError(f"{mutant.name!r}: its text must stand once in {mutant.file}, got {count} times: {wanted!r}")
    planted = pattern.sub(mutant.new, text) if pattern else text.replace(mutant.old, mutant.new)
    if planted == text:
        raise StaleError(f"{mutant.name!r}: it changes nothing in {mutant.file}")
    if mutant.file.endswith(".py"):
        try:
            ast.parse(planted)  # what fails for its grammar proves no test
        except SyntaxError as error:
            raise StaleError(f"{mutant.name!r}: with it, {mutant.file} is no Python: {error}") from None
    return planted
