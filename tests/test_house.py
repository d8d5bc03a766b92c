"""The house: which way the arrows run, and what an import costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

RUNTIME = Path(__file__).resolve().parent.parent / "sdtp_kernels"


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_the_runtime_knows_nothing_of_what_stands_on_it():
    for path in RUNTIME.rglob("*.py"):
        assert not [
            name
            for name in imported_modules(path)
            if name.split(".")[0] in ("sdtp_bench", "sdtp_eval", "sdtp_train", "tests")
        ]


def test_importing_the_package_imports_torch_alone():
    probe = (
        "import sys, sdtp_kernels, torch;"
        "heavy = {'transformers', 'triton', 'safetensors', 'accelerate', 'rich', 'gguf', 'sdtp_eval', 'sdtp_train'};"
        "print(sorted(heavy & set(sys.modules)), hasattr(torch.ops.sdtp, 'prune_tokens'))"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] True"


def test_mutants_name_text_that_exists():
    """A stale entry of the list of planted bugs should not wait for the long run."""
    from mutants import MUTANTS, ROOT

    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.name


def test_the_tables_of_features_name_tests_that_exist():
    tests = Path(__file__).resolve().parent
    tables = "".join((tests.parent / "docs" / name).read_text() for name in ("features.md", "serving.md"))
    functions = {
        node.name
        for path in tests.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = re.findall(r"`(test_\w+|\w+_suite)(\.py|\*)?`", tables)
    assert len(named) > 40
    for name, kind in named:
        if kind == ".py":
            assert (tests / f"{name}.py").exists(), name
        else:
            assert name in functions or (kind == "*" and any(f.startswith(name) for f in functions)), name
