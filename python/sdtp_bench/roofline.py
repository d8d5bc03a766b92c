"""``sdtp bench roofline``: the least time that each launch can take on a GPU. A model: computed, not measured.

The launches are those that the Triton backend makes: its own code runs on tensors without data under a GPU's name, and
what it would have launched is written down instead. The operations of the eager composition are written down by a
dispatch mode in the same way. Of each, bytes and matrix products are counted from the shapes.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sdtp_bench import eager
from sdtp_bench.shapes import GPUS, MODELS, SHORT, Attention, Case, Gpu, Stage, lookup, make_stage
from sdtp_eval import command
from sdtp_eval.schedules import BUDGETS
from sdtp_kernels.arguments import Selection

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from sdtp_kernels.schedule import StagePlan

MODEL = "model: computed, not measured"
# The GPUs' figures are for 16-bit products.
DTYPES = ("bf16", "fp16")
_FLOAT32 = 4  # bytes
_COLUMN = 8  # bytes of an index
# select_block walks over its scores once for each digit of a key, then once more to place what is kept.
_RANKING_PASSES = 5


class Cost(NamedTuple):
    """What one launch, or one operation, computes and moves; single numbers (b2, a row's counts) are left out."""

    name: str
    flops: int
    """Of matrix products; a multiply-add is two."""
    bytes_read: int
    """Every byte once, however often it is used."""
    bytes_again: int
    """Read again, by other programs of the launch or by a later pass: at best from the L2 cache."""
    bytes_written: int

    def compute_us(self, gpu: Gpu) -> float:
        """Microseconds of the products at the GPU's peak."""
        return self.flops / gpu.tensor_flops * 1e6

    def memory_us(self, gpu: Gpu) -> float:
        """Microseconds to read every byte once and to write the results."""
        return (self.bytes_read + self.bytes_written) / gpu.hbm_bytes * 1e6

    def bound_us(self, gpu: Gpu) -> float:
        """The least time in microseconds: as if products and memory overlapped fully, and a launch were free."""
        return max(self.compute_us(gpu), self.memory_us(gpu))


def total(costs: Sequence[Cost], gpu: Gpu) -> dict[str, Any]:
    """Sums over launches that run one after the other.

    Returns
    -------
    dict
        ``launches``, ``flops``, ``bytes_read``, ``bytes_again``, ``bytes_written`` and ``bound_us``.
    """
    fields = ("flops", "bytes_read", "bytes_again", "bytes_written")
    sums = {field: sum(getattr(cost, field) for cost in costs) for field in fields}
    return {"launches": len(costs), **sums, "bound_us": sum(cost.bound_us(gpu) for cost in costs)}


# ------------------------------------------------------------------------------------------- launches of the backend


class Launch(NamedTuple):
    """A launch that the backend would have made."""

    name: str
    arguments: dict[str, Any]


class _Recorder:
    """Stands in for a kernel: notes its launches and runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names[: len(args)]
            self.launches.append(Launch(self.kernel.__name__, dict(zip(names, args, strict=True)) | kwargs))

        return note


@contextlib.contextmanager
def _recorded_launches(gpu: Gpu) -> Iterator[list[Launch]]:
    """The Triton backend under the name of `gpu`, with every kernel replaced by a :class:`_Recorder`."""
    from triton.runtime.jit import KernelInterface

    from sdtp_kernels.backends.triton import configs, fused, gather, score, select

    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        device = configs.Device(gpu.target, gpu.multiprocessors)
        stack.enter_context(mock.patch.object(configs, "device_of", return_value=device))
        for module in (fused, gather, score, select):
            kernels = {name: value for name, value in vars(module).items() if isinstance(value, KernelInterface)}
            for name, kernel in kernels.items():
                stack.enter_context(mock.patch.object(module, name, _Recorder(kernel, launches)))
        yield launches


def triton_costs(stage: Stage, plan: StagePlan, gpu: Gpu, pooling: int = 1) -> list[Cost]:
    """What each launch costs that ``prune_tokens`` makes on a GPU with ``backend="triton"``.

    Parameters
    ----------
    stage : Stage
        Without padded rows; may be on the device ``"meta"``.
    plan : StagePlan
    gpu : Gpu
        Its architecture and size decide on tiles and launches.
    pooling : int, default 1

    Returns
    -------
    list of Cost
        In the order of the launches.
    """
    from sdtp_kernels.backends import triton as backend

    with _recorded_launches(gpu) as launches:
        backend.prune_tokens(*stage, Selection(*plan, pooling=pooling), 0)
    return [_KERNELS[launch.name](launch.arguments) for launch in launches]


def _score_cost(a: dict[str, Any]) -> Cost:
    width_tiles = _ceil(a["pruner_size"], a["BLOCK_WIDTH"])
    token_tiles = _ceil(a["num_scored"], a["BLOCK_TOKENS"]) * a["batch_size"]
    scored = a["num_scored"] * a["batch_size"]
    flops, read, again = _scoring(a, scored, token_tiles)
    return Cost("score_kernel", flops, read, again, width_tiles * scored * _FLOAT32)


def _select_cost(a: dict[str, Any]) -> Cost:
    batch, num_keep = a["indices_ptr"].shape
    size = a["num_tokens"] - a["recent"] if a["block_size"] is None else a["block_size"]
    blocks = a["num_blocks"] * batch
    passes = _RANKING_PASSES * blocks * _window_tokens(size, a)
    first = blocks * size * _score_bytes(a)
    read, written = first + _tail_bytes(a), batch * num_keep * (_COLUMN + _FLOAT32)
    if a["finished_ptr"] is None:
        return Cost("select_kernel", 0, read, passes * _score_bytes(a) - first, written)
    # Summed once; the bias is added in every pass. Then the columns that were chosen, and their means.
    bias = _FLOAT32 if a["bias_ptr"] is not None else 0
    again = passes * (_FLOAT32 + bias) - blocks * size * bias + _chosen(a) * (_COLUMN + _FLOAT32)
    return Cost("select_kernel", 0, read, again, written + blocks * size * _FLOAT32)


def _gather_cost(a: dict[str, Any]) -> Cost:
    columns = a["indices_ptr"].nbytes
    rows = sum(_row_bytes(a)) * a["indices_ptr"].numel()
    return Cost("gather_kernel", 0, columns + rows, columns * (len(a["sources"]) - 1), rows)


def _select_and_gather_cost(a: dict[str, Any]) -> Cost:
    columns = a["indices_ptr"].nbytes
    rows = sum(_row_bytes(a)) * a["indices_ptr"].numel()
    blocks = a["num_blocks"] * a["indices_ptr"].shape[0]
    passes = _RANKING_PASSES * blocks * a["shares"] * _window_tokens(a["block_size"], a) * _score_bytes(a)
    first = blocks * a["block_size"] * _score_bytes(a)
    means = _chosen(a) * (_COLUMN + _score_bytes(a) - _FLOAT32 * (a["bias_ptr"] is not None))
    again = passes - first + columns * len(a["sources"]) + means
    written = rows + columns + a["kept_mean_ptr"].nbytes
    return Cost("select_and_gather_kernel", 0, first + rows + _tail_bytes(a), again, written)


def _prune_cost(a: dict[str, Any]) -> Cost:
    batch, num_keep = a["indices_ptr"].shape
    columns = a["indices_ptr"].nbytes
    blocks = a["num_blocks"] * batch
    scored = blocks * a["block_size"]
    flops, read, again = _scoring(a, scored, blocks * _ceil(a["block_size"], a["BLOCK_TOKENS"]))
    read += scored * _FLOAT32 * ((a["mean_ptr"] is not None) + (a["bias_ptr"] is not None)) + _tail_bytes(a)
    hidden_row, *other_rows = _row_bytes(a)  # the hidden states stand first
    again += columns * len(a["sources"]) + (num_keep - a["recent"]) * batch * hidden_row
    read += a["recent"] * batch * hidden_row + num_keep * batch * sum(other_rows)
    written = num_keep * batch * (hidden_row + sum(other_rows)) + columns + a["kept_mean_ptr"].nbytes
    return Cost("prune_kernel", flops, read, again, written)


def attention_cost(inputs: Attention) -> Cost:
    """What ``position_attention`` has to compute and to move: the keys that a query sees, and no others."""
    query, *_ = inputs
    seen = int((inputs.num_visible - inputs.first_visible[:, None]).clamp(min=0).sum())
    read = sum(tensor.nbytes for tensor in inputs)
    return Cost("attention_kernel", 4 * seen * query.shape[1] * query.shape[3], read, 0, query.nbytes)


_KERNELS = {
    "score_kernel": _score_cost,
    "select_kernel": _select_cost,
    "gather_kernel": _gather_cost,
    "select_and_gather_kernel": _select_and_gather_cost,
    "prune_kernel": _prune_cost,
}


def _scoring(a: dict[str, Any], scored: int, token_tiles: int) -> tuple[int, int, int]:
    """(operations, bytes read, bytes read again): each tile of the width takes all hidden states, each of tokens W1."""
    width_tiles = _ceil(a["pruner_size"], a["BLOCK_WIDTH"])
    hidden = scored * a["hidden_size"] * a["hidden_ptr"].itemsize
    weights = a["w1_ptr"].nbytes + a["b1_ptr"].nbytes + a["w2_ptr"].nbytes
    flops = 2 * scored * a["pruner_size"] * (a["hidden_size"] + 1)
    return flops, hidden + weights, (width_tiles - 1) * hidden + (token_tiles - 1) * weights


def _score_bytes(a: dict[str, Any]) -> int:
    """Bytes that a score is made of."""
    return _FLOAT32 * (int(a["num_parts"]) + (a["mean_ptr"] is not None) + (a["bias_ptr"] is not None))


def _chosen(a: dict[str, Any]) -> int:
    """Tokens that are kept for their rank."""
    batch, num_keep = a["indices_ptr"].shape
    return int(batch * (num_keep - a["recent"]))


def _tail_bytes(a: dict[str, Any]) -> int:
    """Means that are handed on unranked."""
    return 0 if a["mean_ptr"] is None else int(a["recent"]) * a["indices_ptr"].shape[0] * _FLOAT32


def _window_tokens(size: int, a: dict[str, Any]) -> int:
    """Scores that one pass over a block of `size` loads: a tile's own, and as many neighbours as pooling reaches."""
    reach, tile = a["REACH"], a["TILE"]
    step = tile - 2 * reach
    return sum(min(size, first + tile - reach) - max(0, first - reach) for first in range(0, size, step))


def _row_bytes(a: dict[str, Any]) -> list[int]:
    """Bytes of one token in each tensor."""
    return [source.shape[1] * source.shape[3] * source.itemsize for source in a["sources"]]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# ---------------------------------------------------------------------------------- operations of the eager composition


class _OpCounter(TorchDispatchMode):
    """Notes every operation that computes or moves something; views do neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.costs.append(_op_cost(func, args, kwargs or {}, out))
        return out


def eager_costs(stage: Stage, plan: StagePlan, pooling: int = 1) -> list[Cost]:
    """What each operation of :func:`sdtp_bench.eager.prune_tokens` costs; each is one launch or more.

    Parameters are those of :func:`triton_costs`.
    """
    stage = eager.in_one_dtype(stage)
    counter = _OpCounter()
    with torch.no_grad(), counter:
        eager.prune_tokens(stage, plan, pooling)
    return counter.costs


def _op_cost(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Cost:
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    outputs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    read = sum(map(_touched_bytes, tensors))
    if func is torch.ops.aten.gather.default:  # of its source, the rows that it takes
        read += outputs[0].nbytes - _touched_bytes(args[0])
    elif func is torch.ops.aten.fill_.Scalar:
        read = 0
    packet = func._overloadpacket
    flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
    return Cost(packet.__name__, int(flops), read, 0, sum(map(_touched_bytes, outputs)))


def _touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements that a tensor shows; an expanded dimension shows the same ones over and over."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(1 if stride == 0 else size for size, stride in sizes) * tensor.itemsize


# ------------------------------------------------------------------------------------------------------- the command


def add_parser(commands: Any) -> None:
    """Add ``roofline`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("roofline", help="the least time of one pruning stage on a GPU, computed from shapes")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--model", required=True, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--tokens", required=True, type=int, help="length of the prompt")
    parser.add_argument("--keep", type=float, default=0.9, help="share of the tokens that stays (%(default)s)")
    parser.add_argument("--budget", choices=BUDGETS, default="global", help="default: %(default)s")
    parser.add_argument("--block-size", type=int, default=512, help="tokens of a block (%(default)s)")
    parser.add_argument("--pooling", type=int, default=7, help="tokens that a score is pooled over (%(default)s)")
    command.add_dtype_option(parser, "bfloat16", [name for name, short in SHORT.items() if short in DTYPES])
    parser.add_argument("--batch", type=int, default=1, help="prompts of that length (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the tables; see :func:`add_parser`."""
    from sdtp_kernels.cli import CommandError

    try:
        case = Case(**{field: getattr(args, field) for field in Case._fields})
        result = compute(args.gpu, case._replace(dtype=SHORT[args.dtype]))
    except ValueError as error:
        raise CommandError(str(error)) from error
    except ImportError as error:
        raise CommandError(f"{error}: pip install 'sdtp-kernels[bench]'") from error
    _print_tables(result)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CommandError(f"--json {args.json}: cannot be written ({error.strerror})") from None
    return 0


def compute(gpu_name: str, case: Case) -> dict[str, Any]:
    """The model of one stage on one GPU.

    Parameters
    ----------
    gpu_name : str
        A key of :data:`sdtp_bench.shapes.GPUS`.
    case : Case

    Returns
    -------
    dict
        ``kind`` (that this is a model), ``gpu``, ``case``, ``num_keep``, ``rows`` (a launch or operation each, with
        ``kind``, ``of``, ``name``, the fields of :class:`Cost`, ``bound_us`` and ``bound_by``) and ``totals``, by
        ``of``: ``"triton"`` and ``"eager"``.

    Raises
    ------
    ValueError
        For names that are not known, and sizes that cannot be.
    ImportError
        If Triton is not installed.
    """
    gpu = lookup(GPUS, gpu_name, "gpu")
    lookup(MODELS, case.model, "model")
    if case.dtype not in DTYPES:
        raise ValueError(f"dtype {case.dtype!r} is not known; known: {', '.join(DTYPES)}")
    if min(case.tokens, case.batch) < 1:
        raise ValueError(f"tokens={case.tokens}, batch={case.batch}: expected at least one of each")
    if case.pooling < 1 or case.pooling % 2 == 0:
        raise ValueError(f"pooling={case.pooling}: expected an odd number of tokens, or 1 for none")
    stage, plan = make_stage(case, "meta"), case.plan()
    costs = {"triton": triton_costs(stage, plan, gpu, case.pooling), "eager": eager_costs(stage, plan, case.pooling)}
    rows = [
        {
            "kind": MODEL,
            "of": of,
            **cost._asdict(),
            "bound_us": cost.bound_us(gpu),
            "bound_by": "compute" if cost.compute_us(gpu) > cost.memory_us(gpu) else "memory",
        }
        for of, items in costs.items()
        for cost in items
    ]
    totals = {of: {"kind": MODEL, **total(items, gpu)} for of, items in costs.items()}
    return {
        "kind": MODEL, "gpu": {"name": gpu_name, **gpu._asdict()}, "case": case._asdict(), "num_keep": plan.num_keep,
        "rows": rows, "totals": totals,
    }  # fmt: skip


def _print_tables(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    case = result["case"]
    budget = f"blocks of {case['block_size']}" if case["budget"] == "block" else "global budget"
    about = f"{case['batch']} x {case['tokens']} tokens, {result['num_keep']} kept, {budget}, {case['dtype']}"
    titles = {"triton": "launches of the Triton backend", "eager": "operations in eager PyTorch, a launch or more each"}
    for of, title in titles.items():
        table = Table(
            box=box.SIMPLE_HEAD, title=f"MODEL, not measured: {title}", title_justify="left", padding=(0, 1, 0, 0)
        )
        table.add_column("", no_wrap=True)
        for name in ("GFLOP", "MB read", "again", "written", "least us"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("bound by", no_wrap=True)
        for row in result["rows"]:
            if row["of"] == of:
                table.add_row(row["name"], *_cells(row), row["bound_by"])
        totals = result["totals"][of]
        table.add_section()
        table.add_row(f"{totals['launches']} in all", *_cells(totals), "")
        console.print(table)
    gpu = result["gpu"]
    for remark in (
        f"{case['model']} on {gpu['name']}: {about}",
        f"peaks as the vendor has them: {gpu['tensor_flops'] / 1e12:.0f} TFLOP/s, {gpu['hbm_bytes'] / 1e12:.2f} TB/s",
        "again: MB that a launch reads once more, at best from L2 "
        f"({gpu['l2_bytes'] / 2**20:.0f} MiB); the least time leaves them out",
    ):
        console.print(Text(remark), style="dim")


def _cells(row: dict[str, Any]) -> list[str]:
    megabytes = [row[field] / 1e6 for field in ("bytes_read", "bytes_again", "bytes_written")]
    return [f"{value:,.{2 if value < 100 else 0}f}" for value in (row["flops"] / 1e9, *megabytes, row["bound_us"])]
