"""Rows: what stands with every figure, and the files they go to."""

import json
import subprocess
import sys

import pytest
import torch

from sdtp_bench import rows
from sdtp_eval import provenance
from sdtp_kernels import __version__


def test_rows_go_to_the_file_of_their_benchmark(tmp_path):
    out = tmp_path / "some-machine"
    written = rows.append_rows(out, [{"bench": "op", "n": 1}, {"bench": "scaling", "n": 2}, {"bench": "op", "n": 3}])
    assert written == [out / "op.jsonl", out / "scaling.jsonl"]
    rows.append_rows(out, [{"bench": "op", "n": 4, "command": "its own"}])
    found = rows.read_rows(out, "op")
    assert [row["n"] for row in found] == [1, 3, 4]
    assert found[-1]["command"] == "its own"
    assert rows.read_rows(out, "absent") == []
    for row in found:
        assert {"machine", "versions", "revision", "date", "command"} <= set(row)


def test_what_stands_with_a_row():
    facts = json.loads(json.dumps(provenance.describe_run()))
    machine, versions = facts["machine"], facts["versions"]
    assert set(machine) == {"processor", "cores", "threads", "flags", "memory", "gpu", "system"}
    assert machine["threads"] == torch.get_num_threads()
    assert machine["gpu"] is None
    assert machine["memory"] > 2**28
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert "avx512f" in machine["flags"]
    assert (versions["torch"], versions["sdtp-kernels"]) == (torch.__version__, __version__)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of its own with the module in it, as committed."""
    module = tmp_path / "python" / "provenance.py"
    for name in ("python/provenance.py", "benchmarks/results/op.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as committed\n")
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(module))
    return tmp_path


def test_revision_is_dirty_where_code_changed(checkout):
    clean = provenance.describe_revision()
    assert len(clean) == 40
    (checkout / "benchmarks/results/op.jsonl").write_text("rows of this very run\n")
    (checkout / "README.md").write_text("prose\n")
    (checkout / "notes.txt").write_text("nobody's\n")
    assert provenance.describe_revision() == clean
    (checkout / "python/provenance.py").write_text("changed\n")
    assert provenance.describe_revision() == clean + "+dirty"


def test_no_revision_in_somebody_elses_checkout(checkout, monkeypatch):
    installed = checkout / "venv" / "provenance.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.describe_revision() is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/home/x/.venv/bin/sdtp", "bench", "op", "--model", "/home/x/a model"], "sdtp bench op --model 'a model'"),
        (["/x/sdtp_kernels/__main__.py", "bench", "op", "--out", "results/a"], "sdtp bench op --out results/a"),
        (["benchmarks/evict.py", "--out", "x"], "evict.py --out x"),
    ],
)
def test_commands_name_no_directory_of_the_machine(monkeypatch, argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.describe_command() == expected


def test_summary():
    found = rows.summary([3.0, 1.0, 2.0, 10.0])
    assert (found["seconds"], found["seconds_all"]) == (2.5, [3.0, 1.0, 2.0, 10.0])
    assert found["quantiles"] == pytest.approx({"p10": 1.3, "p50": 2.5, "p90": 7.9})
    assert rows.summary([2.0])["quantiles"] == {"p10": 2.0, "p50": 2.0, "p90": 2.0}
