"""The examples in the docstrings of everything public run."""

import doctest

import pytest
import torch
from conftest import make_qwen2

import sdtp_kernels
from sdtp_kernels.pruner_file import PrunerHeader

WITHOUT = {"BackendStatus", "BackendUnavailableError", "PrefillReport", "PromptScores", "PrunedTokens", "StagePlan"}
"""Results and errors: the functions that give them have the examples."""


@pytest.mark.parametrize("name", sorted(set(sdtp_kernels.__all__) - WITHOUT))
def test_examples(name, tmp_path):
    names = {name: getattr(sdtp_kernels, name) for name in sdtp_kernels.__all__}
    model = make_qwen2(num_layers=8)
    prompt = torch.randint(1, 256, (1, 120))
    given = {**names, "torch": torch, "model": model, "prompt": prompt, "path": tmp_path / "pruners.safetensors"}
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    tests = finder.find(names[name], name, globs={**given, "PrunerHeader": PrunerHeader})
    assert any(test.examples for test in tests), f"{name} has no example"
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
