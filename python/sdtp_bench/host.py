"""``sdtp bench host``: what the host does for a pruning stage on a GPU, with every launch left out.

A stage of a short prompt takes the GPU less time than it takes Python to launch it. Here the Triton backend runs as it
would on an H100, on tensors of this machine, and its kernels are replaced by nothing: what is left is checks, new
tensors, views and arguments. The driver's own launch, some 5 microseconds a kernel, is not in it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from sdtp_bench import rows
from sdtp_bench.shapes import GPUS, MODELS, Case, Gpu, lookup, make_stage
from sdtp_eval.paired import in_turns
from sdtp_kernels import prompt_bias, prune_tokens
from sdtp_kernels.scorers import ATTENTION_POOLING, QUESTION_WINDOW

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

CALLS = 200  # in a round
ROUNDS = 9
_TOKENS = 512  # no matter: nothing is computed


class _Nothing:
    """Stands in for a kernel; counts its launches."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        self.launches += 1


@contextlib.contextmanager
def without_launches(gpu: Gpu) -> Iterator[_Nothing]:
    """The Triton backend takes tensors of this machine for those of `gpu`, and launches nothing."""
    from triton.runtime.jit import KernelInterface

    from sdtp_kernels.backends import triton as backend
    from sdtp_kernels.backends.triton import configs, fused, gather, score, select, window

    nothing, device = _Nothing(), configs.Device(gpu.target, gpu.multiprocessors)

    # Functions, not mocks, whose calls would take longer than what is measured.
    def is_available(*_: Any) -> None:
        return None

    def device_of(_: Any) -> configs.Device:
        return device

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "unavailable_reason", is_available))
        stack.enter_context(mock.patch.object(configs, "device_of", device_of))
        for module in (fused, gather, score, select, window):
            for name in [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]:
                stack.enter_context(mock.patch.object(module, name, nothing))
        yield nothing


def stages(model: str) -> dict[str, Callable[[], object]]:
    """A stage of the form that ships, as a patched model calls it: under either budget."""
    sizes = lookup(MODELS, model, "model")
    heads, key_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    index, table, overlap = torch.arange(_TOKENS)[None], torch.zeros(_TOKENS), torch.zeros(1, _TOKENS)
    query = torch.zeros(1, QUESTION_WINDOW, heads, head_dim, dtype=torch.bfloat16).transpose(1, 2)
    key = torch.zeros(1, key_heads, _TOKENS, head_dim, dtype=torch.bfloat16)
    cos, sin = torch.zeros(2, 1, _TOKENS, head_dim, dtype=torch.bfloat16)

    def bias() -> torch.Tensor:
        return prompt_bias(
            index, torch.add(table, overlap, alpha=1.0), attention_weight=1.0, query=query, key=key, cos=cos, sin=sin,
            scaling=0.1, pooling=ATTENTION_POOLING, backend="triton",
        )  # fmt: skip

    def stage_of(case: Case) -> Callable[..., object]:
        stage, plan = make_stage(case, "cpu"), case.plan()
        scoring = {name: value for name, value in stage.scoring._asdict().items() if name != "score_bias"}
        return functools.partial(
            prune_tokens, stage.hidden_states, stage.tensors, **plan._asdict(), **scoring, pooling=case.pooling,
            backend="triton",
        )  # fmt: skip

    whole = stage_of(Case(model, _TOKENS))
    block = stage_of(Case(model, _TOKENS, budget="block", block_size=256))
    return {"global": lambda: whole(score_bias=bias()), "block": block}


def measure(model: str, calls: int = CALLS, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Time both stages, interleaved.

    Parameters
    ----------
    model : str
        A key of :data:`sdtp_bench.shapes.MODELS`.
    calls, rounds : int

    Returns
    -------
    list of dict
        Rows ``bench="host"`` with ``model``, ``budget``, ``launches`` of a stage, and ``seconds`` of one and their
        quantiles over the rounds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), without_launches(GPUS["h100"]) as nothing:
            found, launches = stages(model), {}
            for budget, stage in found.items():
                nothing.launches = 0
                stage()
                launches[budget] = nothing.launches
            times: dict[str, list[float]] = {budget: [] for budget in found}
            for budget in in_turns(list(found), rounds):
                times[budget].append(_seconds_of(found[budget], calls))
    finally:
        torch.set_num_threads(threads)
    return [
        {"bench": "host", "model": model, "budget": budget, "launches": launches[budget], **rows.summary(seconds)}
        for budget, seconds in times.items()
    ]


def _seconds_of(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def add_parser(commands: Any) -> None:
    """Add ``host`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("host", help="what the host does for a stage on a GPU, with every launch left out")
    parser.add_argument("--model", default="qwen2-7b", metavar="NAME", help=f"{', '.join(MODELS)} (%(default)s)")
    parser.add_argument("--out", metavar="DIR", help="append rows there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the times; see :func:`add_parser`."""
    from sdtp_kernels.cli import CommandError

    try:
        found = measure(args.model)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except ImportError as error:
        raise CommandError(f"{error}: pip install 'sdtp-kernels[triton]' (Linux)") from error
    for row in found:
        launches = f"{row['launches']} launch{'' if row['launches'] == 1 else 'es'}"
        print(f"{row['budget']:<8}{row['seconds'] * 1e6:8.0f} us on the host, {launches} left out")
    if args.out:
        rows.append_rows(args.out, found)
    return 0
