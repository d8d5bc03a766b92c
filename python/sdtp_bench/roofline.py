"""``sdtp bench roofline``: the least time that each launch can take on a GPU. A model: computed, not measured.

The launches are those that the Triton backend makes: its own code runs on tensors without data under a GPU's name, and
what it would have launched is written down instead. The operations of the eager composition are written down by a
dispatch mode in the same way. Of each, bytes and matrix products are counted from the shapes.

Two times come of it. The bound knows products and bytes alone. What is expected at best also knows tiles that are not
full, what L2 serves, programs that do not fill the GPU, work that one program does alone, and launches.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sdtp_bench import eager
from sdtp_bench.shapes import GPUS, MODELS, SHORT, Attention, Case, Gpu, Stage, lookup, make_stage, make_terms
from sdtp_eval import command
from sdtp_eval.schedules import BUDGETS
from sdtp_kernels.arguments import Selection

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from sdtp_kernels.arguments import PromptTerms
    from sdtp_kernels.schedule import StagePlan

MODEL = "model: computed, not measured"
# The GPUs' figures are for 16-bit products.
DTYPES = ("bf16", "fp16")
_FLOAT32 = 4  # bytes
_COLUMN = 8  # bytes of an index
# select_block walks over its scores once for each digit of a key, then once more to place what is kept.
_RANKING_PASSES = 5

# Assumed. A launch after another one: 1.3 us (H200, in a graph) to 2.6 us (A100, in a stream) were measured by
# gpu-small-kernels of github.com/te42kyfo/gpu-benches.
LAUNCH_US = 2.0
# Assumed. From L2 to one multiprocessor in a clock, as NVIDIA has it from Volta on (Jia et al., arXiv 1804.06826).
PORT_BYTES = 64
# Assumed. Of a walk, for each key: (4 * 303 + 1112) / 8 / 5, counted in the code for sm_90 of Triton 3.9, with pooling.
WALK_INSTRUCTIONS = 58


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
    programs: int = 0
    """Those that do the work; 0 where it is spread evenly over the GPU."""
    padded_flops: int = 0
    """Of whole tiles, where these are more than `flops`."""
    instructions: int = 0
    """Of all threads, where these are many."""
    last_bytes: int = 0
    """What one program of a row moves after all others have ended."""
    near_bytes: int = 0
    """Of `bytes_again`, what a program has read itself just before: from its L1 cache."""
    held_bytes: int = 0
    """What a program reads once more later: from L2 where that holds it for all programs that run at once."""
    held_again: int = 0
    """Of `bytes_again`, by all programs, what is read from memory where L2 does not."""
    launches: int = 1
    part: str = ""
    """Of the eager composition: what the operation serves."""

    def compute_us(self, gpu: Gpu) -> float:
        """Microseconds of the products at the GPU's peak."""
        return self.flops / gpu.tensor_flops * 1e6

    def memory_us(self, gpu: Gpu) -> float:
        """Microseconds to read every byte once and to write the results."""
        return (self.bytes_read + self.bytes_written) / gpu.hbm_bytes * 1e6

    def bound_us(self, gpu: Gpu) -> float:
        """The least time in microseconds: as if products and memory overlapped fully, and a launch were free."""
        return max(self.compute_us(gpu), self.memory_us(gpu))

    def waves(self, gpu: Gpu) -> int:
        """Programs of the multiprocessor that has most. Those that it holds at once share it: no time is saved."""
        return _ceil(self.programs, gpu.multiprocessors) if self.programs else 1

    def limits(self, gpu: Gpu) -> dict[str, float]:
        """Microseconds that each resource of the GPU is busy at least, if all overlap."""
        # Of all work, the share of the multiprocessor that has most.
        share = self.waves(gpu) / (self.programs or gpu.multiprocessors)
        moved = self.bytes_read + self.bytes_again + self.bytes_written - self.near_bytes
        held = min(self.programs, gpu.multiprocessors) * self.held_bytes
        far = self.bytes_read + self.bytes_written + (self.held_again if held > gpu.l2_bytes else 0)
        seconds = {
            "products": max(self.flops, self.padded_flops) * share * gpu.multiprocessors / gpu.tensor_flops,
            "memory": far / gpu.hbm_bytes,
            "L2": moved / gpu.l2_bandwidth,
            "L2 to one": moved * share / (PORT_BYTES * gpu.clock),
            "instructions": self.instructions * share / (gpu.lanes * gpu.clock),
        }
        return {name: value * 1e6 for name, value in seconds.items()}

    def expected_us(self, gpu: Gpu) -> float:
        """The time at best, in microseconds: the busiest resource, then what one program does alone, and launches."""
        return max(self.limits(gpu).values()) + sum(self.delays(gpu).values())

    def delays(self, gpu: Gpu) -> dict[str, float]:
        """Microseconds that overlap with nothing."""
        return {"last program": self.last_bytes / (PORT_BYTES * gpu.clock) * 1e6, "launches": self.launches * LAUNCH_US}


def total(costs: Sequence[Cost], gpu: Gpu) -> dict[str, Any]:
    """Sums over launches that run one after the other.

    Returns
    -------
    dict
        ``launches``, ``flops``, ``bytes_read``, ``bytes_again``, ``bytes_written``, ``bound_us`` and ``expected_us``.
    """
    fields = ("flops", "bytes_read", "bytes_again", "bytes_written")
    sums = {field: sum(getattr(cost, field) for cost in costs) for field in fields}
    times = {name: sum(getattr(cost, name)(gpu) for cost in costs) for name in ("bound_us", "expected_us")}
    return {"launches": len(costs), **sums, **times}


# ------------------------------------------------------------------------------------------- launches of the backend


class Launch(NamedTuple):
    """A launch that the backend would have made."""

    name: str
    arguments: dict[str, Any]
    grid: tuple[int, ...]


class _Recorder:
    """Stands in for a kernel: notes its launches and runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names[: len(args)]
            self.launches.append(Launch(self.kernel.__name__, dict(zip(names, args, strict=True)) | kwargs, grid))

        return note


@contextlib.contextmanager
def _recorded_launches(gpu: Gpu) -> Iterator[list[Launch]]:
    """The Triton backend under the name of `gpu`, with every kernel replaced by a :class:`_Recorder`."""
    from triton.runtime.jit import KernelInterface

    from sdtp_kernels.backends.triton import configs, fused, gather, score, select, window

    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        device = configs.Device(gpu.target, gpu.multiprocessors)
        stack.enter_context(mock.patch.object(configs, "device_of", return_value=device))
        for module in (fused, gather, score, select, window):
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


def bias_costs(terms: PromptTerms, gpu: Gpu) -> list[Cost]:
    """What each launch of ``prompt_bias`` costs, which a stage under the global budget asks before ``prune_tokens``."""
    from sdtp_kernels.backends import triton as backend

    with _recorded_launches(gpu) as launches:
        backend.prompt_bias(terms)
    return [_KERNELS[launch.name](launch.arguments) for launch in launches]


def _score_cost(a: dict[str, Any]) -> Cost:
    width_tiles = _width_tiles(a)
    token_tiles = _ceil(a["num_scored"], a["BLOCK_TOKENS"]) * a["batch_size"]
    scored = a["num_scored"] * a["batch_size"]
    flops, read, again = _scoring(a, scored, token_tiles)
    return Cost(
        "sdtp_score_kernel", flops, read, again, width_tiles * scored * _FLOAT32,
        programs=width_tiles * token_tiles, padded_flops=_padded_flops(a, token_tiles),
    )  # fmt: skip


def _select_cost(a: dict[str, Any]) -> Cost:
    batch, num_keep = a["indices_ptr"].shape
    size = a["num_tokens"] - a["recent"] if a["block_size"] is None else a["block_size"]
    blocks = a["num_blocks"] * batch
    passes = _RANKING_PASSES * blocks * _window_tokens(size, a)
    first = blocks * size * _score_bytes(a)
    read, written = first + _tail_bytes(a), batch * num_keep * (_COLUMN + _FLOAT32)
    work = {"programs": blocks, "instructions": WALK_INSTRUCTIONS * passes}
    if a["finished_ptr"] is None:
        return Cost("sdtp_select_kernel", 0, read, passes * _score_bytes(a) - first, written, **work)
    # Summed once; the bias is added in every pass. Then the columns that were chosen, and their means.
    bias = _FLOAT32 if a["bias_ptr"] is not None else 0
    again = passes * (_FLOAT32 + bias) - blocks * size * bias + _chosen(a) * (_COLUMN + _FLOAT32)
    return Cost("sdtp_select_kernel", 0, read, again, written + blocks * size * _FLOAT32, **work)


def _gather_cost(a: dict[str, Any]) -> Cost:
    columns = a["indices_ptr"].nbytes
    rows = sum(_row_bytes(a)) * a["indices_ptr"].numel()
    programs = a["indices_ptr"].shape[0] * _ceil(a["num_keep"], a["TOKENS"])
    return Cost("sdtp_gather_kernel", 0, columns + rows, columns * (len(a["sources"]) - 1), rows, programs=programs)


def _select_and_gather_cost(a: dict[str, Any]) -> Cost:
    columns = a["indices_ptr"].nbytes
    rows = sum(_row_bytes(a)) * a["indices_ptr"].numel()
    blocks = a["num_blocks"] * a["indices_ptr"].shape[0]
    walked = _RANKING_PASSES * blocks * a["shares"] * _window_tokens(a["block_size"], a)
    passes = walked * _score_bytes(a)
    first = blocks * a["block_size"] * _score_bytes(a)
    means = _chosen(a) * (_COLUMN + _score_bytes(a) - _FLOAT32 * (a["bias_ptr"] is not None))
    again = passes - first + columns * len(a["sources"]) + means
    written = rows + columns + a["kept_mean_ptr"].nbytes
    return Cost(
        "sdtp_select_and_gather_kernel", 0, first + rows + _tail_bytes(a), again, written,
        programs=blocks * a["shares"], instructions=WALK_INSTRUCTIONS * walked,
    )  # fmt: skip


def _prune_cost(a: dict[str, Any]) -> Cost:
    batch, num_keep = a["indices_ptr"].shape
    columns = a["indices_ptr"].nbytes
    blocks = a["num_blocks"] * batch
    scored = blocks * a["block_size"]
    token_tiles = blocks * _ceil(a["block_size"], a["BLOCK_TOKENS"])
    flops, read, again = _scoring(a, scored, token_tiles)
    read += scored * _FLOAT32 * ((a["mean_ptr"] is not None) + (a["bias_ptr"] is not None)) + _tail_bytes(a)
    hidden_row, *other_rows = _row_bytes(a)  # the hidden states stand first
    held_again = (_width_tiles(a) - 1) * scored * hidden_row + _chosen(a) * hidden_row
    again += columns * len(a["sources"]) + _chosen(a) * hidden_row
    read += a["recent"] * batch * hidden_row + num_keep * batch * sum(other_rows)
    written = num_keep * batch * (hidden_row + sum(other_rows)) + columns + a["kept_mean_ptr"].nbytes
    return Cost(
        "sdtp_prune_kernel", flops, read, again, written,
        programs=blocks, padded_flops=_padded_flops(a, token_tiles),
        held_bytes=a["block_size"] * hidden_row, held_again=held_again,
    )  # fmt: skip


def _window_sums_cost(a: dict[str, Any]) -> Cost:
    flops, read = _window_ideal(a)
    batch, programs = a["partial_ptr"].shape[0], math.prod(a["partial_ptr"].shape[:3])
    queries, near = _query_bytes(a)
    loaded = programs * queries + batch * a["key_heads"] * a["num_keys"] * _key_bytes(a)
    written = a["partial_ptr"].nbytes + (0 if a["finished_ptr"] is None else a["finished_ptr"].nbytes)
    return Cost(
        "sdtp_window_sums_kernel", flops, read, loaded - read, written,
        programs=programs, padded_flops=_padded_logits(a, _ceil(a["num_keys"], a["BLOCK_KEYS"])),
        near_bytes=programs * near,
    )  # fmt: skip


def _window_cost(a: dict[str, Any]) -> Cost:
    flops, read = _window_ideal(a)
    keys, key_heads = a["num_keys"], a["key_heads"]
    batch, num_tiles, _ = a["moments_ptr"].shape
    programs, sums = batch * num_tiles, a["partial_ptr"].nbytes
    seen = batch * _window_tokens(keys, {"REACH": a["REACH"], "TILE": a["BLOCK_KEYS"]})
    queries, near = _query_bytes(a)
    # Of the parts each program reads the highest logits, then them again and the sums; of the tokens, which is the last
    # one and which ones are valid.
    loaded = programs * key_heads * queries + num_tiles * (sums + sums // 2) + seen * key_heads * _key_bytes(a)
    loaded += (programs + batch * keys) * _COLUMN
    # The last program of a row: moments twice, of each token its index, its share of the table and its logarithm.
    last = num_tiles * 5 * _FLOAT32 + keys * (_COLUMN + 2 * _FLOAT32)
    # Other key heads have the same rotation, and tokens the same index.
    near = programs * key_heads * near + num_tiles * (sums // 2)
    near += (key_heads - 1) * (programs * a["window"] * _rotary_bytes(a) + seen * _COLUMN)
    read += sums + a["table_ptr"].nbytes
    return Cost(
        "sdtp_window_kernel", flops, read, loaded + batch * last - read,
        batch * (2 * keys + 3 * num_tiles) * _FLOAT32,  # logarithms, moments, the bias
        programs=programs, padded_flops=_padded_logits(a, num_tiles),
        last_bytes=last + keys * _FLOAT32, near_bytes=near,
    )  # fmt: skip


def _window_ideal(a: dict[str, Any]) -> tuple[int, int]:
    """(operations, bytes): of queries and keys."""
    names = ("query_ptr", "key_ptr", "cos_ptr", "sin_ptr", "key_index_ptr")
    return 2 * a["query_ptr"].numel() * a["num_keys"], sum(a[name].nbytes for name in names)


def _padded_logits(a: dict[str, Any], tiles: int) -> int:
    batch = a["partial_ptr"].shape[0]
    return int(2 * batch * a["key_heads"] * a["ROWS"] * a["HEAD_DIM"] * tiles * a["BLOCK_KEYS"])


def _query_bytes(a: dict[str, Any]) -> tuple[int, int]:
    """(what a program loads of the queries that share a key head, what of it once more).

    Each query's partner of the rotation is another of its elements, and all heads have the same angles and indices.
    """
    queries = a["group"] * a["window"] * a["head_dim"] * a["query_ptr"].itemsize
    angles = a["window"] * _rotary_bytes(a)
    return int(2 * queries + a["group"] * angles), int(queries + (a["group"] - 1) * angles)


def _rotary_bytes(a: dict[str, Any]) -> int:
    """Cosines, sines and the index of a query."""
    return int(a["head_dim"] * (a["cos_ptr"].itemsize + a["sin_ptr"].itemsize) + _COLUMN)


def _key_bytes(a: dict[str, Any]) -> int:
    return int(a["head_dim"] * a["key_ptr"].itemsize + _COLUMN)


def attention_cost(inputs: Attention) -> Cost:
    """What ``position_attention`` has to compute and to move: the keys that a query sees, and no others."""
    query, *_ = inputs
    seen = int((inputs.num_visible - inputs.first_visible[:, None]).clamp(min=0).sum())
    read = sum(tensor.nbytes for tensor in inputs)
    return Cost("sdtp_attention_kernel", 4 * seen * query.shape[1] * query.shape[3], read, 0, query.nbytes)


_KERNELS = {
    "sdtp_score_kernel": _score_cost,
    "sdtp_select_kernel": _select_cost,
    "sdtp_gather_kernel": _gather_cost,
    "sdtp_select_and_gather_kernel": _select_and_gather_cost,
    "sdtp_prune_kernel": _prune_cost,
    "sdtp_window_sums_kernel": _window_sums_cost,
    "sdtp_window_kernel": _window_cost,
}


def _scoring(a: dict[str, Any], scored: int, token_tiles: int) -> tuple[int, int, int]:
    """(operations, bytes read, bytes read again): each tile of the width takes all hidden states, each of tokens W1."""
    hidden = scored * a["hidden_size"] * a["hidden_ptr"].itemsize
    weights = a["w1_ptr"].nbytes + a["b1_ptr"].nbytes + a["w2_ptr"].nbytes
    flops = 2 * scored * a["pruner_size"] * (a["hidden_size"] + 1)
    return flops, hidden + weights, (_width_tiles(a) - 1) * hidden + (token_tiles - 1) * weights


def _width_tiles(a: dict[str, Any]) -> int:
    return _ceil(a["pruner_size"], a["BLOCK_WIDTH"])


def _padded_flops(a: dict[str, Any], token_tiles: int) -> int:
    """Of the first layer, tiles that are not full included."""
    hidden = _ceil(a["hidden_size"], a["BLOCK_HIDDEN"]) * a["BLOCK_HIDDEN"]
    return int(2 * token_tiles * a["BLOCK_TOKENS"] * _width_tiles(a) * a["BLOCK_WIDTH"] * hidden)


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
    layouts = zip(a["NUM_HEADS"], a["WIDTHS"], a["sources"], strict=True)
    return [heads * width * source.itemsize for heads, width, source in layouts]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# ---------------------------------------------------------------------------------- operations of the eager composition


class _OpCounter(TorchDispatchMode):
    """Notes every operation that computes or moves something; views do neither."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.costs: list[Cost] = []
        self.part = "scoring"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.costs.append(_op_cost(func, args, kwargs or {}, out)._replace(part=self.part))
        return out


def eager_costs(stage: Stage, plan: StagePlan, pooling: int = 1) -> list[Cost]:
    """What each operation of :func:`sdtp_bench.eager.prune_tokens` costs; each is one launch or more.

    Parameters are those of :func:`triton_costs`.
    """
    stage = eager.in_one_dtype(stage)
    counter, ranked_blocks = _OpCounter(), eager.ranked_blocks

    def rank(*args: Any) -> torch.Tensor:
        counter.part = "selection"
        return ranked_blocks(*args)

    def copy(*args: Any) -> torch.Tensor:
        counter.part = "copying"
        return eager.gather_rows(*args)

    def normalise(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """One kernel on a GPU; without data, torch takes it apart."""
        counter.costs.append(Cost("rms_norm", 0, x.nbytes, 0, x.nbytes, part=counter.part))
        return x

    with (
        torch.no_grad(), counter,
        mock.patch.object(eager, "ranked_blocks", rank), mock.patch.object(F, "rms_norm", normalise),
    ):  # fmt: skip
        eager.prune_tokens(stage, plan, pooling, copy)
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
    # Assumed, of a radix sort or selection: one launch for 8 bits of a key, and two more.
    launches = args[0].itemsize + 2 if packet in (torch.ops.aten.topk, torch.ops.aten.sort) else 1
    return Cost(packet.__name__, int(flops), read, 0, sum(map(_touched_bytes, outputs)), launches=launches)


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
        ``kind``, ``of``, ``name``, the fields of :class:`Cost`, ``bound_us``, ``bound_by``, ``waves``, ``expected_us``
        and ``expected_by``), ``totals``, by ``of``: ``"triton"``, ``"eager"``, and under the global budget ``"bias"``;
        and ``verdicts``, see :func:`against_torch`.

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
    if case.budget == "global":
        costs = {"bias": bias_costs(make_terms(case, "meta"), gpu), **costs}
    rows = [
        {
            "kind": MODEL,
            "of": of,
            **cost._asdict(),
            "bound_us": cost.bound_us(gpu),
            "bound_by": "compute" if cost.compute_us(gpu) > cost.memory_us(gpu) else "memory",
            "waves": cost.waves(gpu),
            "expected_us": cost.expected_us(gpu),
            "expected_by": _expected_by(cost, gpu),
        }
        for of, items in costs.items()
        for cost in items
    ]
    totals = {of: {"kind": MODEL, **total(items, gpu)} for of, items in costs.items()}
    return {
        "kind": MODEL, "gpu": {"name": gpu_name, **gpu._asdict()}, "case": case._asdict(), "num_keep": plan.num_keep,
        "rows": rows, "totals": totals, "verdicts": against_torch(rows),
    }  # fmt: skip


def _expected_by(cost: Cost, gpu: Gpu) -> str:
    """What takes most of :meth:`Cost.expected_us`."""
    limits = cost.limits(gpu) | cost.delays(gpu)
    return max(limits, key=lambda name: limits[name])


# What each launch does of what the eager composition does.
_PARTS = {
    "sdtp_score_kernel": ("scoring",),
    "sdtp_select_kernel": ("selection",),
    "sdtp_gather_kernel": ("copying",),
    "sdtp_select_and_gather_kernel": ("selection", "copying"),
    "sdtp_prune_kernel": ("scoring", "selection", "copying"),
}
_PLANS = {"sdtp_select_kernel": "One program walks over a row; the plan is to share a row, as the cuda backend does."}


def against_torch(rows: Sequence[dict[str, Any]]) -> list[str]:
    """In words, of each launch of ``prune_tokens`` and of all: whether plain torch would win, and by how much."""
    ours = [(row["name"], row["expected_us"], _PARTS[row["name"]]) for row in rows if row["of"] == "triton"]
    if len(ours) > 1:
        ours.append(("in all", sum(us for _, us, _ in ours), _PARTS["sdtp_prune_kernel"]))
    verdicts = []
    for name, us, parts in ours:
        theirs = sum(row["expected_us"] for row in rows if row["of"] == "eager" and row["part"] in parts)
        verdict = f"{name}: {us:.0f} us at best, {theirs:.0f} in plain torch ({', '.join(parts)}): "
        if theirs < us:
            verdict += f"plain torch would win by {us - theirs:.0f} us. {_PLANS.get(name, '')}".rstrip()
        else:
            verdict += f"{theirs / us:.1f} times as fast"
        verdicts.append(verdict)
    return verdicts


def _print_tables(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.width = max(console.width, 110)
    case = result["case"]
    budget = f"blocks of {case['block_size']}" if case["budget"] == "block" else "global budget"
    about = f"{case['batch']} x {case['tokens']} tokens, {result['num_keep']} kept, {budget}, {case['dtype']}"
    titles = {
        "bias": "launches of the Triton backend before, for the bias",
        "triton": "launches of the Triton backend",
        "eager": "operations in eager PyTorch, a launch or more each",
    }
    for of in result["totals"]:
        table = Table(
            box=box.SIMPLE_HEAD, title=f"MODEL, not measured: {titles[of]}", title_justify="left", padding=(0, 1, 0, 0)
        )
        table.add_column("", no_wrap=True)
        for name in ("GFLOP", "MB read", "again", "written", "least us", "at best us", "waves"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("by", no_wrap=True)
        for row in result["rows"]:
            if row["of"] == of:
                table.add_row(row["name"], *_cells(row), str(row["waves"]), row["expected_by"])
        totals = result["totals"][of]
        table.add_section()
        table.add_row(f"{totals['launches']} in all", *_cells(totals))
        console.print(table)
    gpu = result["gpu"]
    for remark in (
        f"{case['model']} on {gpu['name']}: {about}",
        f"peaks as the vendor has them: {gpu['tensor_flops'] / 1e12:.0f} TFLOP/s, {gpu['hbm_bytes'] / 1e12:.2f} TB/s",
        "again: MB that a launch reads once more, at best from L2 "
        f"({gpu['l2_bytes'] / 2**20:.0f} MiB, {gpu['l2_bandwidth'] / 1e12:.1f} TB/s); the least time leaves them out",
        f"at best: whole tiles, L2, the multiprocessor with most programs (waves; {PORT_BYTES} bytes a clock from L2, "
        f"{WALK_INSTRUCTIONS} instructions a key and walk of a selection), and {LAUNCH_US:g} us a launch, assumed",
        *result["verdicts"],
    ):
        console.print(Text(remark), style="dim")


def _cells(row: dict[str, Any]) -> list[str]:
    megabytes = [row[field] / 1e6 for field in ("bytes_read", "bytes_again", "bytes_written")]
    values = (row["flops"] / 1e9, *megabytes, row["bound_us"], row["expected_us"])
    return [f"{value:,.{2 if value < 100 else 0}f}" for value in values]
