"""Running ``sdtp eval`` in tests. conftest.py makes the fixtures known to all of them."""

from __future__ import annotations

import json
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
import torch

from sdtp_kernels import cli

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def one_thread():
    """Threads that wait for each other make a tiny model slow wherever the cores have other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sdtp(byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs ``sdtp eval`` on the tiny checkpoint and returns its status."""
    point = metadata.EntryPoint("eval", "sdtp_eval.quality:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"eval": point})

    def run(command: str, *options: object) -> int:
        model = ["--model", str(byte_checkpoint)] if command != "compare" else []
        return cli.main(["eval", command, *map(str, options), *model])

    return run


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
