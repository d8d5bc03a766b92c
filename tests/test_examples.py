"""The examples in docstrings run, everything public has one, and the scripts in ``examples`` run."""

import doctest
import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from helpers.models import make_qwen2
from transformers import AutoTokenizer

import sdtp_bench
import sdtp_eval
import sdtp_kernels
import sdtp_train
from sdtp_kernels.pruner_file import PrunerHeader

WITHOUT = {"BackendStatus", "BackendUnavailableError", "PrefillReport", "PrunedTokens", "StagePlan"}
"""Results and errors: the functions that give them have the examples."""


def names_with_examples():
    """Of the packages' modules, by their sources."""
    for package in (sdtp_kernels, sdtp_bench, sdtp_eval, sdtp_train):
        root = Path(package.__file__).parent
        for path in root.rglob("*.py"):
            if ">>> " in path.read_text():
                yield ".".join((root.name, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


@pytest.fixture
def given(tmp_path, byte_checkpoint):
    """What every example may use."""
    tokenizer = AutoTokenizer.from_pretrained(byte_checkpoint)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return {
        **{name: getattr(sdtp_kernels, name) for name in sdtp_kernels.__all__},
        "PrunerHeader": PrunerHeader,
        "torch": torch,
        "model": make_qwen2(num_layers=8),
        "prompt": torch.randint(1, 256, (1, 120)),
        "path": tmp_path / "pruners.safetensors",
        "tokenizer": tokenizer,
    }


def run_examples(thing, name, given, without=()):
    """All in `thing`, but for what those of the names `without` say."""
    tests = [test for test in doctest.DocTestFinder().find(thing, name, globs=given) if test.examples]
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        if test.name.removeprefix(f"{name}.").split(".")[0] not in without:
            runner.run(test)
    assert tests, f"{name} has no example"
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", sorted(set(sdtp_kernels.__all__) - WITHOUT))
def test_examples_of_what_is_public(name, given):
    """Each public thing has one, which uses nothing that is not public."""
    run_examples(getattr(sdtp_kernels, name), name, given)


@pytest.mark.parametrize("name", sorted(names_with_examples()))
def test_examples_of_the_rest(name, given):
    module = importlib.import_module(name)
    run_examples(module, name, {**given, **vars(module)}, without=sdtp_kernels.__all__)


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run_example(name, *words):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*map(str, words))


@pytest.fixture
def texts(tmp_path):
    """Three short text files."""
    files = [tmp_path / f"{number}.txt" for number in range(3)]
    for number, file in enumerate(files):
        file.write_text(" ".join(f"{number}.{i} is a word." for i in range(60 + 5 * number)))
    return files


def test_every_example_is_run():
    names = {name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == names


def test_example_chat(byte_checkpoint, texts, capsys):
    run_example("chat", byte_checkpoint, texts[0], "Is it?", "Is it not?")
    printed = capsys.readouterr().out
    assert "Is it?\n" in printed
    assert "Is it not?\n" in printed


def test_example_batch(byte_checkpoint, texts, tmp_path, capsys):
    checkpoint = tmp_path / "with padding"
    shutil.copytree(byte_checkpoint, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(checkpoint)
    run_example("batch", checkpoint, *texts)
    assert capsys.readouterr().out.count("\n- ") == len(texts)


def test_example_own_scorer(byte_checkpoint, texts, capsys):
    run_example("own_scorer", byte_checkpoint, texts[0])
    kept = capsys.readouterr().out.rsplit("kept in the last layer: ", 1)[1].strip()
    assert 0 < len(kept) < 0.8 * len(texts[0].read_text())


@pytest.mark.slow
def test_example_own_pruners(byte_checkpoint, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for number in range(12):
        text = "\n".join(f"File {number} says {i} in its line." for i in range(200))
        (tmp_path / f"texts/{number}.txt").write_text(text)
    run_example("own_pruners", byte_checkpoint, tmp_path / "texts", tmp_path / "out", 8)
    assert sdtp_kernels.load_pruners(tmp_path / "out/pruners.safetensors").kv_predictor is not None
    assert "predicted" in capsys.readouterr().out
