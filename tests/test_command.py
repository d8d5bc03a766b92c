"""What all commands share: one form of an option, one message for a mistake, one progress bar."""

from __future__ import annotations

import argparse
from collections import defaultdict

import pytest

import sdtp_bench.cli
import sdtp_eval.demo
import sdtp_eval.quality
import sdtp_train.saliency
import sdtp_train.train
from sdtp_eval import command
from sdtp_kernels import BackendUnavailableError
from sdtp_kernels.cli import CommandError


def options(parser):
    """All options of a parser and of the parsers of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)
        yield from ((name, action) for name in action.option_strings)


def test_an_option_means_the_same_everywhere() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for module in (sdtp_bench.cli, sdtp_eval.demo, sdtp_eval.quality, sdtp_train.saliency, sdtp_train.train):
        module.add_command(commands)
    found = defaultdict(list)
    for name, action in options(parser):
        found[name].append(action)
    for name in ("--device", "--backend", "--budget", "--shape", "--dropped-kv"):
        assert len(found[name]) > 3 or name == "--shape", name
        assert len({tuple(action.choices or ()) for action in found[name]}) == 1, name
    assert len(found["--dtype"]) > 10
    for action in found["--dtype"]:
        assert set(action.choices) <= set(command.DTYPES)


@pytest.mark.parametrize("error", [ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError])
def test_mistakes_become_messages(error: type[Exception]) -> None:
    with pytest.raises(CommandError, match="what happened"), command.user_errors():
        raise error("what happened")


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(KeyError), command.user_errors():
        raise KeyError
    with pytest.raises(CommandError), command.user_errors(KeyError):
        raise KeyError


def test_the_bar_is_drawn_by_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with command.progress_bar(3, "reading", done=1, shown=shown) as bar:
            bar.advance()
            bar.show("writing")
            bar.advance()
        seen = capsys.readouterr()
        assert seen.out == ""
        assert ("writing" in seen.err) == ("3/3" in seen.err) == shown


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.choose_device(None).type == command.choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="--device cuda: torch finds no GPU here"):
        command.choose_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert command.choose_device(None).type == "cuda"
    assert command.choose_device("cpu").type == "cpu"
