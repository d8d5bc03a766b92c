"""``sdtp bench host``: the backend's own code runs, and nothing but its launches is left out."""

from importlib import metadata

import pytest
import torch

from sdtp_bench import host, rows
from sdtp_bench.shapes import GPUS
from sdtp_kernels import backends, cli

pytest.importorskip("triton", reason="the backend runs on Linux only")


def test_a_stage_of_the_shipped_form():
    """Five launches under the global budget, two of a short prompt under blocks; and nothing stays replaced."""
    before = backends.choose("auto", torch.device("cpu"))
    found = {row["budget"]: row for row in host.measure("qwen2-0.5b", calls=2, rounds=3)}
    assert {budget: row["launches"] for budget, row in found.items()} == {"global": 5, "block": 2}
    for row in found.values():
        assert row["model"] == "qwen2-0.5b"
        assert len(row["seconds_all"]) == 3
        assert 0 < row["seconds"] < 1
    assert backends.choose("auto", torch.device("cpu")) is before
    with pytest.raises(backends.BackendUnavailableError, match="'triton' cannot run on cpu"):
        backends.choose("triton", torch.device("cpu"))


def test_the_launches_are_the_backend_s(monkeypatch):
    from sdtp_kernels.backends.triton import fused

    monkeypatch.setattr(fused, "fits_one_launch", lambda *_: True)
    with host.without_launches(GPUS["h100"]) as nothing, torch.no_grad():
        host.stages("qwen2-0.5b")["block"]()
    assert nothing.launches == 1


def test_the_command(monkeypatch, tmp_path, capsys):
    point = metadata.EntryPoint("bench", "sdtp_bench.cli:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"bench": point})
    monkeypatch.setattr(host, "CALLS", 1)
    assert cli.main(["bench", "host", "--model", "qwen2-0.5b", "--out", str(tmp_path)]) == 0
    assert "5 launches left out" in capsys.readouterr().out
    assert [row["budget"] for row in rows.read_rows(tmp_path, "host")] == ["global", "block"]
    assert cli.main(["bench", "host", "--model", "gpt-2"]) == 2
    assert "model 'gpt-2' is not known" in capsys.readouterr().err
