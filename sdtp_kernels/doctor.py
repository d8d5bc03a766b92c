"""``sdtp doctor``: what is installed, what was built, which backends and models run, and whether they compute right.

Every probe is guarded and nothing but the standard library is imported up front: the command must have an answer just
where torch, the compiled library or transformers is missing or broken.
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    import torch

# What the ops need, then what the model patch and the programs around it need.
DISTRIBUTIONS = ("torch", "triton", "transformers", "safetensors", "tokenizers", "accelerate", "gguf", "rich")


def add_command(subparsers: Any) -> None:
    """Add ``doctor`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("doctor", help="show versions, the build and the backends, and test each backend")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 where the ops work, else 1."""
    report = diagnose()
    print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0 if report["ok"] else 1


def own_version() -> str:
    """Version of this package, installed or run from a checkout."""
    import sdtp_kernels

    return sdtp_kernels.__version__


def installed_versions() -> dict[str, str | None]:
    """Of this package, Python and :data:`DISTRIBUTIONS`; None for what is not there."""
    own = {"sdtp-kernels": own_version(), "python": platform.python_version()}
    return {**own, **{name: _version(name) for name in DISTRIBUTIONS}}


def diagnose() -> dict[str, Any]:
    """Look at everything, raise nothing.

    Returns
    -------
    dict
        ``ok``: the ops can run and every backend that claims to run passed its self-test; ``problems``: list of str,
        each with its fix; ``versions``: name to version or None; ``machine``; ``build``: build_info.json, or None;
        ``libraries``: compiled library to ``"loaded"`` or why not; ``backends``: list of ``{device, name, available,
        chosen, reason, self_test}``, where ``self_test`` is ``"passed"``, ``"not run"`` or what went wrong;
        ``families``: family of models to ``"tested"`` with this transformers, ``"proved now"`` (under a version that no
        test ran on), or why it is refused; ``commands``: name to ``"ok"`` or why it does not load.
    """
    problems: list[str] = []
    versions = installed_versions()
    report: dict[str, Any] = {
        "ok": False,
        "problems": problems,
        "versions": versions,
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "build": _build_info(problems),
        "libraries": {},
        "backends": [],
        "families": {},
        "commands": _commands(),
    }
    try:
        import torch
    except Exception as error:
        problems.append(f"torch does not import ({_describe(error)}): pip install torch")
        return report
    report["machine"] |= {"threads": torch.get_num_threads(), "gpus": _gpus()}
    try:
        report["libraries"] = _libraries()
        for device in ("cpu", *(["cuda"] if report["machine"]["gpus"] else [])):
            report["backends"] += _backends(device)
    except Exception as error:
        problems.append(f"the ops do not load ({_describe(error)}): pip install --force-reinstall sdtp-kernels")
        return report

    runs = [backend for backend in report["backends"] if backend["available"]]
    wrong = [backend for backend in runs if backend["self_test"] != "passed"]
    problems += [
        f"backend {b['name']} on {b['device']} fails its self-test ({b['self_test']}): build again with 'pip install "
        "--force-reinstall sdtp-kernels', and until then pass backend='reference'"
        for b in wrong
    ]
    cpu = next((b for b in report["backends"] if (b["name"], b["device"]) == ("cpu", "cpu")), None)
    if cpu is not None and not cpu["available"]:
        problems.append(f"no compiled cpu backend, the slower reference is used: {cpu['reason']}")
    if versions["transformers"] is None:
        problems.append("transformers is missing, so no model can be patched: pip install 'sdtp-kernels[models]'")
    else:
        report["families"] = _families()
        refused = [state for state in report["families"].values() if state not in ("tested", "proved now")]
        problems += dict.fromkeys(refused)  # each once
    report["ok"] = bool(runs) and not wrong
    return report


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except Exception:  # not installed, or its metadata is damaged: either way there is no version to tell
        return None


def _build_info(problems: list[str]) -> dict[str, Any] | None:
    path = Path(__file__).with_name("build_info.json")
    try:
        info: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} is unreadable ({_describe(error)}): pip install --force-reinstall sdtp-kernels")
        return None
    return info


def _commands() -> dict[str, str]:
    from sdtp_kernels.cli import plugin_commands

    states = {}
    for name, point in plugin_commands().items():
        try:
            point.load()
            states[name] = "ok"
        except Exception as error:
            states[name] = _describe(error)
    return states


def _gpus() -> list[str]:
    import torch

    try:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception:  # a driver that is there but broken; torch then computes on the CPU
        return []


def _libraries() -> dict[str, str]:
    from sdtp_kernels.backends import _native

    return {f"libsdtp_{device}": _native.load_error(device) or "loaded" for device in ("cpu", "cuda")}


def _backends(device: str) -> list[dict[str, Any]]:
    from sdtp_kernels import explain_backends

    found = []
    for status in explain_backends(device):
        self_test = _self_test(status.name, device) if status.available else "not run"
        found.append({"device": device, **status._asdict(), "self_test": self_test})
    return found


def _families() -> dict[str, str]:
    from sdtp_kernels.models.family import FAMILIES

    return {family: _family(family) for family in FAMILIES}


def _family(model_type: str) -> str:
    """What :func:`sdtp_kernels.apply_sdtp` would do with models of this type."""
    try:
        from types import SimpleNamespace

        from sdtp_kernels.models import compat, proof
        from sdtp_kernels.models.family import find_family

        if compat.check_version():
            return "tested"
        family = find_family(SimpleNamespace(model_type=model_type))
        assert family is not None
        proof.prove(family)
    except NotImplementedError as error:
        return str(error)  # says what to do
    except Exception as error:
        return f"{_describe(error)}: pip install 'sdtp-kernels[models]'"
    return "proved now"


def _self_test(backend: str, device: str) -> str:
    try:
        _check_backend(backend, device)
    except Exception as error:
        return _describe(error)
    return "passed"


def _check_backend(backend: str, device: str) -> None:
    """Compare one backend with the reference on small inputs; AssertionError says what differs."""
    import torch

    from sdtp_kernels import (
        gather_tokens,
        position_attention,
        prompt_bias,
        prune_tokens,
        score_tokens,
        select_tokens,
        window_attention,
    )

    def expect_equal(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.equal(got.cpu(), expected.cpu()):
            raise AssertionError(f"{what} differs from the reference")

    # The contract by hand, so that the reference is tested too: ties to the lower index, NaN last, -0 == 0.
    scores = torch.tensor([[0.0, 2.0, float("nan"), 2.0, -0.0, 2.0]], device=device)
    by_hand = {2: [1, 3], 4: [0, 1, 3, 5], 5: [0, 1, 3, 4, 5]}
    for num_keep, kept in by_hand.items():
        expect_equal("select_tokens", select_tokens(scores, num_keep, backend=backend), torch.tensor([kept]))

    generator = torch.Generator().manual_seed(0)
    batch, length, width, inner = 2, 67, 24, 6
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden_states = torch.randn(batch, length, width, generator=generator).to(device, dtype)
        w1 = torch.randn(inner, width, generator=generator).to(device, dtype)
        b1, w2 = torch.randn(2, inner, generator=generator).to(device)
        b2 = torch.zeros((), device=device)
        mean, bias = torch.randn(2, batch, length, generator=generator).to(device)
        scores, expected = (
            score_tokens(
                hidden_states, w1, b1, w2, b2, mean_score=mean, num_scores=2, score_bias=bias, rms_eps=1e-6,
                backend=name,
            )
            for name in (backend, "reference")
        )  # fmt: skip
        tolerance = 1e-4 if dtype == torch.float32 else 5e-2  # 16-bit backends may round the pre-activation
        if not torch.allclose(scores, expected, rtol=tolerance, atol=tolerance):
            raise AssertionError(f"score_tokens is off by {(scores - expected).abs().max().item():.3g} in {dtype}")

        settings: dict[str, Any] = {"sink": 4, "recent": 7}
        indices, expected = (select_tokens(scores, 30, **settings, backend=b) for b in (backend, "reference"))
        expect_equal("select_tokens", indices, expected)
        heads = torch.randn(batch, 3, length, 8, generator=generator).to(device, dtype)
        positions = torch.arange(length, device=device).repeat(batch, 1)
        rows, expected_rows = (
            gather_tokens([hidden_states, heads, positions], indices, backend=b) for b in (backend, "reference")
        )
        for got, want in zip(rows, expected_rows, strict=True):
            expect_equal("gather_tokens", got, want)
        pruned = prune_tokens(
            hidden_states, [heads], w1, b1, w2, b2, 30, **settings, mean_score=mean, num_scores=2, score_bias=bias,
            rms_eps=1e-6, num_dropped=length - 30, backend=backend,
        )  # fmt: skip
        expect_equal("prune_tokens", pruned.indices, indices)
        expect_equal("prune_tokens", pruned.hidden_states, rows[0])
        expect_equal("prune_tokens", pruned.tensors[0], rows[1])
        both = torch.cat([pruned.indices, pruned.dropped], dim=-1).sort(dim=-1).values
        expect_equal("prune_tokens", both, positions)

        query = torch.randn(batch, 6, 5, 8, generator=generator).to(device, dtype)
        scores, expected = (
            window_attention(query, heads, positions[:, -5:], positions, scaling=0.3, pooling=7, backend=name)
            for name in (backend, "reference")
        )
        if not torch.allclose(scores, expected, rtol=0, atol=tolerance):
            raise AssertionError(f"window_attention is off by {(scores - expected).abs().max().item():.3g} in {dtype}")

        table = torch.linspace(1, 0, 50, device=device)
        scores, expected = (
            prompt_bias(
                positions, table, keep_last=3, attention_weight=0.5, query=query, key=heads, scaling=0.3, pooling=7,
                backend=name,
            )
            for name in (backend, "reference")
        )  # fmt: skip
        if not torch.allclose(scores, expected, rtol=tolerance, atol=tolerance):
            raise AssertionError(f"prompt_bias is off by {(scores - expected).abs().max().item():.3g} in {dtype}")

        first_visible = torch.tensor([0, 9], device=device)
        attended, expected = (
            position_attention(query, heads, heads, positions[:, 20:60:8] + 1, first_visible, backend=name)
            for name in (backend, "reference")
        )
        if not torch.allclose(attended, expected, rtol=tolerance, atol=tolerance):
            raise AssertionError(
                f"position_attention is off by {(attended - expected).abs().max().item():.3g} in {dtype}"
            )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _text(report: dict[str, Any]) -> str:
    lines = ["versions"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["machine"]
    lines += [f"  {name:<14}{_plain(value)}" for name, value in report["machine"].items()]
    lines += ["build"]
    lines += [f"  {name:<14}{_plain(value)}" for name, value in (report["build"] or {}).items()] or ["  nothing built"]
    lines += ["libraries"]
    lines += [f"  {name:<14}{state}" for name, state in report["libraries"].items()]
    lines += ["backends"]
    for backend in report["backends"]:
        state = f"self-test {backend['self_test']}" if backend["available"] else f"cannot run: {backend['reason']}"
        auto = " (auto)" if backend["chosen"] else ""
        lines.append(f"  {backend['name'] + auto:<20}on {backend['device']}: {state}")
    lines += [f"families under transformers {report['versions']['transformers']}"] if report["families"] else []
    lines += [f"  {name:<14}{state}" for name, state in report["families"].items()]
    lines += ["commands"]
    lines += [f"  {name:<14}{state}" for name, state in report["commands"].items()] or ["  none besides doctor"]
    lines += ["problems", *(f"  {problem}" for problem in report["problems"])] if report["problems"] else []
    lines += ["", "The ops work here." if report["ok"] else "The ops do not work here; see the problems above."]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
