"""``sdtp doctor`` has an answer where everything else is broken, and a broken plug-in breaks nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from sdtp_kernels import __version__, cli, doctor
from sdtp_kernels.backends import cpu

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )


def blocking(*packages: str, error: str = "ModuleNotFoundError(f'No module named {name!r}', name=name)") -> str:
    """Code after which these packages cannot be imported."""
    return f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {packages!r}:
            raise {error}
sys.meta_path.insert(0, Blocker())
from sdtp_kernels.cli import main
"""


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch):
    """Replaces the plug-ins by entry points of these values."""

    def install(**values: str) -> None:
        points = {name: metadata.EntryPoint(name, value, cli.GROUP) for name, value in values.items()}
        monkeypatch.setattr(cli, "plugin_commands", lambda: points)

    install()
    return install


def test_doctor_reports_and_passes(commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["sdtp-kernels"] == __version__
    backends = {backend["name"]: backend for backend in report["backends"] if backend["device"] == "cpu"}
    assert backends["reference"]["self_test"] == "passed"
    for backend in backends.values():
        assert backend["self_test"] == ("passed" if backend["available"] else "not run")
        assert backend["available"] or backend["reason"]
    assert sum(backend["chosen"] for backend in backends.values()) == 1
    assert report["libraries"] == {"libsdtp_cpu": "loaded", "libsdtp_cuda": "loaded"}
    assert torch.cuda.is_available() or "no GPU on this machine" in backends["cuda"]["reason"]

    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "self-test passed" in text
    assert "The ops work here." in text


def test_doctor_without_torch() -> None:
    done = run_python(blocking("torch") + "sys.exit(main(['doctor', '--json']))")
    assert (done.returncode, done.stderr) == (1, "")
    report = json.loads(done.stdout)
    assert not report["ok"]
    assert report["backends"] == []
    assert any("torch does not import" in problem and "pip install torch" in problem for problem in report["problems"])
    done = run_python(blocking("torch") + "sys.exit(main(['doctor']))")
    assert done.returncode == 1
    assert "The ops do not work here" in done.stdout


def test_doctor_with_broken_torch() -> None:
    error = "OSError('libtorch_cpu.so: cannot open shared object file')"
    done = run_python(blocking("torch", error=error) + "sys.exit(main(['doctor', '--json']))")
    assert (done.returncode, done.stderr) == (1, "")
    assert any("libtorch_cpu.so" in problem for problem in json.loads(done.stdout)["problems"])


def test_doctor_without_transformers() -> None:
    done = run_python(blocking("transformers", "safetensors") + "sys.exit(main(['doctor', '--json']))")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["ok"]
    assert all("No module named 'transformers'" in state for state in report["families"].values())
    assert sum("sdtp-kernels[models]" in problem for problem in report["problems"]) == 1


def test_doctor_shows_the_families(
    commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdtp_kernels.models import compat, proof
    from sdtp_kernels.models.family import FAMILIES

    def look() -> tuple[dict[str, object], str]:
        proof.prove.cache_clear()
        assert cli.main(["doctor", "--json"]) == 0  # the ops work, whatever becomes of the models
        report = json.loads(capsys.readouterr().out)
        assert list(report["families"]) == list(FAMILIES)
        assert cli.main(["doctor"]) == 0
        return report, capsys.readouterr().out

    _, text = look()
    assert f"families under transformers {compat.transformers.__version__}\n  llama         tested" in text
    monkeypatch.setattr(compat, "TESTED", ())
    report, text = look()
    assert set(report["families"].values()) == {"proved now"}
    assert "  qwen3         proved now" in text
    monkeypatch.setattr(proof, "_difference", lambda family: float("nan") if "Qwen3" in str(family) else 0.0)
    report, text = look()
    assert report["families"]["llama"] == "proved now"
    assert "logits differ by nan" in report["families"]["qwen3"]
    assert report["families"]["qwen3"] in report["problems"]
    monkeypatch.setattr(compat.transformers, "__version__", "5.15.1")
    report, text = look()
    assert text.count("pip install 'transformers>=5.16.1'") == len(FAMILIES) + 1, "of each family, and one problem"
    proof.prove.cache_clear()


def test_doctor_without_the_compiled_library(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from sdtp_kernels.backends import _native
_native._PACKAGE = Path({str(tmp_path)!r})
from sdtp_kernels.cli import main
sys.exit(main(['doctor', '--json']))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    by_name = {backend["name"]: backend for backend in report["backends"]}
    assert not by_name["cpu"]["available"]
    assert by_name["reference"]["chosen"]
    assert any("libsdtp_cpu.so" in problem for problem in report["problems"])


def test_doctor_with_a_damaged_library(tmp_path: Path) -> None:
    (tmp_path / "libsdtp_cpu.so").write_bytes(b"no library")
    code = f"""
import sys
from pathlib import Path
from sdtp_kernels.backends import _native
_native._PACKAGE = Path({str(tmp_path)!r})
from sdtp_kernels.cli import main
sys.exit(main(['doctor']))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "does not load" in done.stdout


def test_doctor_finds_a_wrong_backend(
    commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cpu.unavailable_reason(torch.device("cpu"), None):
        pytest.skip("the compiled library is not built")
    right = cpu.select_tokens
    monkeypatch.setattr(cpu, "select_tokens", lambda scores, *args: right(-scores, *args))
    assert cli.main(["doctor"]) == 1
    assert "select_tokens differs from the reference" in capsys.readouterr().out


def test_doctor_with_damaged_build_info(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "build_info.json").write_text("{")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    problems: list[str] = []
    assert doctor._build_info(problems) is None
    assert "build_info.json is unreadable" in problems[0]


def test_broken_plugins_break_nothing_else(commands, capsys: pytest.CaptureFixture[str]) -> None:
    commands(broken="no_such_module_anywhere:add_command", odd="json:dumps")
    assert cli.main(["doctor", "--json"]) == 0
    states = json.loads(capsys.readouterr().out)["commands"]
    assert "no_such_module_anywhere" in states["broken"]
    assert cli.main(["broken", "--some", "option"]) == 2
    assert "no_such_module_anywhere" in capsys.readouterr().err
    assert cli.main(["odd"]) == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "doctor" in text
    assert "broken" in text


def test_plugin_runs_and_others_stay_unloaded(
    commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plugin_for_test.py").write_text(
        "from sdtp_kernels.cli import CommandError\n"
        "def add_command(subparsers):\n"
        "    parser = subparsers.add_parser('twice', help='doubles')\n"
        "    parser.add_argument('number', type=int)\n"
        "    parser.set_defaults(run=run)\n"
        "def run(args):\n"
        "    if args.number < 0:\n"
        "        raise CommandError('a number below 0')\n"
        "    if args.number == 99:\n"
        "        raise KeyboardInterrupt\n"
        "    print(2 * args.number)\n"
        "    return 0\n"
    )
    (tmp_path / "noisy_for_test.py").write_text("print('loaded')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    commands(twice="plugin_for_test:add_command", noisy="noisy_for_test:add_command")
    assert cli.main(["twice", "21"]) == 0
    assert capsys.readouterr().out == "42\n"
    assert cli.main(["twice", "--", "-1"]) == 2
    assert capsys.readouterr().err == "sdtp twice: a number below 0\n"
    assert cli.main(["twice", "99"]) == 130


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 2), (["nothing"], 2), (["--version"], 0), (["doctor", "--no"], 2)]
)
def test_arguments(commands, arguments: list[str], status: int) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == status


def test_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sdtp_kernels", "--version"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == f"sdtp-kernels {__version__}\n"
