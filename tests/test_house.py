"""The house: which way the arrows run, and what an import costs."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, TOOLS = ROOT / "sdtp_kernels", ROOT / "python"
# What each package of python/ may import of the others: benchmarks and training use evaluation.
BELOW = {"sdtp_eval": set(), "sdtp_train": {"sdtp_eval"}, "sdtp_bench": {"sdtp_eval"}}


def imported_modules(path):
    """What is imported anywhere in the file, also for types alone; of ``from a import b``, ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_of_the_tools():
    """Files by the names that they are imported by."""
    paths = sorted(TOOLS.rglob("*.py"))
    names = [".".join(path.relative_to(TOOLS).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


def test_the_runtime_knows_nothing_of_what_stands_on_it():
    for path in RUNTIME.rglob("*.py"):
        assert not [
            name
            for name in imported_modules(path)
            if name.split(".")[0] in ("sdtp_bench", "sdtp_eval", "sdtp_train", "tests")
        ]


def test_the_tools_import_in_no_circle():
    modules = modules_of_the_tools()
    assert "sdtp_eval.reader" in modules
    graph = {}
    for name, path in modules.items():
        # `a.b` is a module, or something in the module `a`.
        found = [other if other in modules else other.rpartition(".")[0] for other in imported_modules(path)]
        graph[name] = modules.keys() & set(found)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises where there is a circle, and names it


def test_the_tools_import_one_way():
    for name, path in modules_of_the_tools().items():
        own = name.partition(".")[0]
        others = {imported.partition(".")[0] for imported in imported_modules(path)} & BELOW.keys() - {own}
        assert others <= BELOW[own], f"{name} imports {others - BELOW[own]}"


def test_importing_the_package_imports_torch_alone():
    probe = (
        "import sys, sdtp_kernels, torch;"
        "heavy = {'transformers', 'triton', 'safetensors', 'accelerate', 'rich', 'gguf', 'sdtp_eval', 'sdtp_train'};"
        "print(sorted(heavy & set(sys.modules)), hasattr(torch.ops.sdtp, 'prune_tokens'))"
    )
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] True"


def test_mutants_name_text_and_tests_that_exist():
    """A stale entry of the lists of planted bugs should not wait for the long run."""
    from mutants import MUTANTS
    from mutants.entry import plant

    texts = {file: (ROOT / file).read_text() for file in {mutant.file for mutant in MUTANTS}}
    for mutant in MUTANTS:
        plant(mutant, texts[mutant.file])
        for name in mutant.tests.split():
            file, _, test = name.partition("::")
            assert f"def {test.partition('[')[0]}" in (ROOT / "tests" / file).read_text(), mutant.name
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names)


def test_an_entry_that_does_not_fit_is_named():
    from mutants.entry import Mutant, StaleError, plant

    text = "first = size + 1\nlast = size\n"
    assert plant(Mutant("sum", "a.py", " + 1", "", "t"), text) == "first = size\nlast = size\n"
    renamed = Mutant("any name", "a.py", re.compile(r"(\w+) \+ 1"), r"\1 + 2", "t")
    assert plant(renamed, text.replace("size", "width")) == "first = width + 2\nlast = width\n"
    for old, new, message in (
        ("size", "0", "must stand once in a.py, got 2 times: 'size'"),
        (re.compile("width"), "0", "got 0 times: 'width'"),
        ("first", "first", "changes nothing in a.py"),
        ("last =", "last", "a.py is no Python"),
    ):
        with pytest.raises(StaleError, match=f"'it'.*{message}"):
            plant(Mutant("it", "a.py", old, new, "t"), text)


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
