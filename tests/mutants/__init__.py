"""Planted bugs: each is one edit of the source and the one test that is to catch it.

A file an area, each with a list ``MUTANTS``; a new file is found by itself. ``runner.py`` plants them.
"""

import importlib
from pathlib import Path

MACHINERY = ("__init__", "__main__", "entry", "runner")
AREAS = {
    path.stem: importlib.import_module(f"mutants.{path.stem}").MUTANTS
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in MACHINERY
}
MUTANTS = [mutant for mutants in AREAS.values() for mutant in mutants]
