"""The op contract on the Triton backend, in Triton's interpreter; test_triton.py runs this file in its own processes.

The interpreter is chosen when Triton is imported, for a whole process, which is why these tests cannot live beside
others. What they compare with is `reference`, which test_ops.py holds to the text of the contract.
"""

import contextlib
import math
import mmap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_ops import naive_window, prompt_inputs, rotary, window_inputs
from test_position_attention import assert_close, make_inputs
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton_aot import SOURCES, kernel_names
from triton_interpreter import KERNELS, before_each_access, concurrent_programs, recorded_launches

import sdtp_kernels.backends.triton as backend
from sdtp_kernels import (
    BackendUnavailableError,
    PruningSchedule,
    TokenPruner,
    backends,
    explain_backends,
    gather_tokens,
    position_attention,
    prompt_bias,
    prune_tokens,
    score_tokens,
    select_tokens,
    window_attention,
)
from sdtp_kernels.arguments import PromptTerms, Scoring, Selection
from sdtp_kernels.backends import limits
from sdtp_kernels.backends.triton import configs, fused, gather, select, window

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECIAL = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45, 1.0, 1.0 + 2**-23, -1.0, 3e38]


@pytest.fixture
def launches():
    with recorded_launches() as names:
        yield names


@pytest.fixture(autouse=True)
def _few_shares(monkeypatch):
    """Each program that shares a block ranks all of it, which takes the interpreter long; four prove the same."""
    monkeypatch.setattr(fused, "_MAX_SHARES", 4)


def pruner_inputs(tokens, hidden_size=48, intermediate_size=20, dtype=torch.float32, batch=1, scale=3.0):
    pruner = TokenPruner(hidden_size, intermediate_size)
    torch.nn.init.normal_(pruner.b1)
    pruner.b2.data.fill_(0.7)
    return (torch.randn(batch, tokens, hidden_size) * scale).to(dtype), pruner.weights(dtype)


def far_apart(tokens, width, stride, dtype):
    """``[1, tokens, width]`` whose rows stand `stride` elements apart; nothing in between is ever touched."""
    size = ((tokens - 1) * stride + width) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).as_strided((1, tokens, width), (0, stride, 1))


# ------------------------------------------------------------------------------------------------------------ score


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms_eps", [None, 1e-6])
@pytest.mark.parametrize(
    ("tokens", "hidden_size", "pruner_size"), [(1, 8, 1), (300, 64, 16), (257, 100, 300), (3, 8192, 16)]
)
def test_score(dtype, rms_eps, tokens, hidden_size, pruner_size):
    hidden_states, weights = pruner_inputs(tokens, hidden_size, pruner_size, dtype, batch=2)
    mean, bias = torch.randn(2, 2, tokens)
    got, expected = (
        score_tokens(
            hidden_states, *weights, mean_score=mean, num_scores=2, score_bias=bias, rms_eps=rms_eps, backend=name
        )
        for name in ("triton", "reference")
    )
    # The products of 16-bit operands are exact in float32: the dtype does not matter.
    torch.testing.assert_close(got, expected, atol=1e-5 * max(1.0, expected.abs().max().item()), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_does_not_depend_on_the_company(dtype):
    hidden_states, weights = pruner_inputs(300, 64, 160, dtype, batch=3)
    together = score_tokens(hidden_states, *weights, rms_eps=1e-6, backend="triton")
    for row, length in ((0, 300), (1, 129), (2, 1), (1, 200)):  # rows are right-aligned
        alone = score_tokens(hidden_states[row : row + 1, 300 - length :], *weights, rms_eps=1e-6, backend="triton")
        assert torch.equal(alone[0], together[row, 300 - length :])


def test_score_layouts_and_nan():
    hidden_states, weights = pruner_inputs(90, 70, 16, batch=2)
    expected = score_tokens(hidden_states, *weights, backend="triton")
    strided = torch.full((2, 180, 140), torch.nan)[:, ::2, :140:2].copy_(hidden_states)
    transposed = hidden_states.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (strided, transposed):
        assert torch.equal(score_tokens(layout, *weights, backend="triton"), expected)
    spread = weights._replace(w1=torch.full((32, 140), torch.nan)[::2, ::2].copy_(weights.w1))
    spread = spread._replace(b1=torch.full((32,), torch.nan)[::2].copy_(weights.b1))
    assert torch.equal(score_tokens(hidden_states, *spread, backend="triton"), expected)
    hidden_states[1, 40, 3] = torch.nan
    scores = score_tokens(hidden_states, *weights, backend="triton")
    assert scores.isnan().nonzero().tolist() == [[1, 40]]
    assert torch.equal(scores[0], expected[0])


def test_score_offsets_beyond_32_bits():
    hidden_states = far_apart(tokens=3, width=16, stride=2**30 + 16, dtype=torch.float16)
    values, weights = pruner_inputs(3, 16, 4, torch.float16)
    hidden_states.copy_(values)
    expected = score_tokens(values, *weights, rms_eps=1e-6, backend="triton")
    assert torch.equal(score_tokens(hidden_states, *weights, rms_eps=1e-6, backend="triton"), expected)
    # The same for a step along the hidden size: 64 elements, 2^25 apart.
    values, weights = pruner_inputs(2, 66, 4, torch.float16)
    hidden_states = far_apart(tokens=66, width=2, stride=2**25, dtype=torch.float16).transpose(1, 2)
    hidden_states.copy_(values)
    expected = score_tokens(values, *weights, rms_eps=1e-6, backend="triton")
    assert torch.equal(score_tokens(hidden_states, *weights, rms_eps=1e-6, backend="triton"), expected)


@pytest.mark.parametrize("pruner_size", [0, 5])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 7), (2, 0), (2, 7)])
def test_score_of_nothing(batch, tokens, pruner_size):
    x, (w1, b1, w2) = torch.randn(batch, tokens, 8), (torch.randn(pruner_size, 8), *torch.randn(2, pruner_size))
    arguments = (x, w1, b1, w2, torch.tensor(0.5))
    assert torch.allclose(score_tokens(*arguments, backend="triton"), score_tokens(*arguments, backend="reference"))


# ----------------------------------------------------------------------------------------------------------- select


def draw_selection(generator):
    """A padded batch of score rows full of ties and special values, and what to keep of each."""

    def integer(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    block_size = [None, None, 1, 7, 12, 100][integer(0, 5)]
    sink = integer(0, 3)
    per_block = integer(min(sink + 1, block_size), block_size) if block_size else None
    few = [torch.tensor(values) for values in (SPECIAL, [0.5], [0.25, 0.5])]
    pools = [torch.randn(50, generator=generator), *few]
    rows, scores = [], []
    for _ in range(integer(1, 3)):
        tail = integer(0, 12)
        blocks = integer(0, 3)
        length = tail + (blocks * block_size if block_size else integer(0, 400))
        keep = tail + (blocks * per_block if block_size else integer(min(sink, length - tail), length - tail))
        pool = pools[integer(0, 3)]
        rows.append((length, keep, tail))
        scores.append(pool[torch.randint(len(pool), (length,), generator=generator)])
    width = max(length for length, _, _ in rows) + 2
    padded = torch.full((len(rows), width), 7.0)  # padding scores high: a row that reads it goes wrong
    for padded_row, row in zip(padded, scores, strict=True):
        padded_row[width - len(row) :] = row
    selection = {"num_keep": max(keep for _, keep, _ in rows) + 1, "sink": sink, "block_size": block_size}
    return padded, selection | {"rows": torch.tensor(rows), "pooling": [1, 3, 7, 21][integer(0, 3)]}


@pytest.mark.parametrize("seed", range(16))
def test_select(seed):
    scores, selection = draw_selection(torch.Generator().manual_seed(seed))
    expected = select_tokens(scores, **selection, backend="reference")
    assert torch.equal(select_tokens(scores, **selection, backend="triton"), expected)
    spread = torch.full((len(scores), 2 * scores.shape[1]), torch.nan)[:, ::2].copy_(scores)
    assert torch.equal(select_tokens(spread, **selection, backend="triton"), expected)
    length, keep, tail = selection["rows"][0].tolist()  # the row alone, its counts given on the host
    alone, padding = scores[:1, scores.shape[1] - length :], scores.shape[1] - length
    host = {name: selection[name] for name in ("sink", "block_size", "pooling")} | {"recent": tail}
    got = select_tokens(alone, keep, **host, backend="triton")
    assert torch.equal(got[0] + padding, expected[0, selection["num_keep"] - keep :])


@pytest.mark.parametrize(
    ("tokens", "settings"),
    [
        (1, {"num_keep": 1}),
        (1, {"num_keep": 0}),
        (4097, {"num_keep": 4000, "sink": 4, "recent": 0}),  # a tile and one token
        (131072, {"num_keep": 104858, "sink": 4, "recent": 13108}),
        (4608 + 300, {"num_keep": 300 * 9 + 300, "sink": 4, "recent": 300, "block_size": 512}),
        (5000 * 2, {"num_keep": 8192, "sink": 4, "block_size": 5000}),  # blocks longer than a tile
        (4097, {"num_keep": 4000, "sink": 4, "pooling": 7}),
        (131072, {"num_keep": 104858, "sink": 4, "recent": 13108, "pooling": 7}),
        (5000 * 2, {"num_keep": 8192, "sink": 4, "block_size": 5000, "pooling": limits.MAX_POOLING}),
    ],
)
@pytest.mark.parametrize("kind", ["ties", "descending", "equal", "special"])
def test_select_long_rows(tokens, settings, kind):
    scores = {
        "ties": torch.randn(1, tokens).bfloat16().float(),
        "descending": -torch.arange(tokens).float().unsqueeze(0),
        "equal": torch.full((1, tokens), 0.5),
        "special": torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (1, tokens))],
    }[kind]
    expected = select_tokens(scores, **settings, backend="reference")
    assert torch.equal(select_tokens(scores, **settings, backend="triton"), expected)


@pytest.mark.parametrize("block_size", [None, 8, 300])
def test_select_pools_inside_a_block(block_size):
    """What stands beside a block outscores it: blocks before and after it, the tail, padding."""
    per_block, tail = block_size or 300, 5
    rows = torch.tensor([[2 * per_block + tail, per_block + tail, tail], [per_block + tail, 4 + tail, tail]])
    scores = torch.full((2, 2 * per_block + tail + 3), 9.0)
    for row, (length, _, _) in zip(scores, rows.tolist(), strict=True):
        body = row[len(row) - length : len(row) - tail].view(-1, per_block)
        body.copy_(-1 - torch.rand(body.shape))
        body[1::2, 3:5] = 9.0
    selection = {"num_keep": per_block + tail, "block_size": block_size, "rows": rows, "pooling": 7}
    expected = select_tokens(scores, **selection, backend="reference")
    assert torch.equal(select_tokens(scores, **selection, backend="triton"), expected)


# ----------------------------------------------------------------------------------------------------------- gather


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64, torch.complex128],
)
def test_gather(dtype, launches):
    def make(*shape):
        return (torch.randn(shape) * 50).to(dtype)

    indices = torch.tensor([[0, 3, 4, 11], [-1, -1, 5, 6]])
    tensors = [
        make(2, 12, 7),
        make(2, 12),
        make(2, 12, 3, 5).transpose(1, 2),  # [B, heads, N, D] as attention leaves it
        make(1, 12, 4).expand(2, -1, -1),  # position embeddings shared by the batch
        make(2, 24, 6)[:, ::2, 1::2],
        make(2, 7, 12).transpose(1, 2),
        make(2, 12, 0),
        make(2, 12, 1500),  # wider than a tile
    ]
    got = gather_tokens(tensors, indices, backend="triton")
    assert launches == ["sdtp_gather_kernel"]
    for a, b in zip(got, gather_tokens(tensors, indices, backend="reference"), strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous()
        assert torch.equal(a, b)


def test_gather_copies_the_bits_of_nan():
    bits = torch.tensor([[0x7FC00001, 0x7F800123, -1]], dtype=torch.int32)
    (got,) = gather_tokens([bits.view(torch.float32)], torch.tensor([[0, 1, 2]]), backend="triton")
    assert torch.equal(got.view(torch.int32), bits)


def test_gather_nothing_and_much(launches):
    indices = torch.tensor([[0, 2, -1]])
    assert gather_tokens([], indices, backend="triton") == []
    empty = gather_tokens([torch.ones(1, 3, 2)], torch.empty(1, 0, dtype=torch.int64), backend="triton")
    assert empty[0].shape == (1, 0, 2)
    assert launches == []
    tensors = [torch.randn(1, 3) for _ in range(gather.MAX_TENSORS + 1)]
    got = gather_tokens(tensors, indices, backend="triton")
    assert all(map(torch.equal, got, gather_tokens(tensors, indices, backend="reference")))
    assert launches == ["sdtp_gather_kernel"] * 2


def test_gather_offsets_beyond_32_bits():
    tensor = far_apart(tokens=3, width=5, stride=2**30 + 8, dtype=torch.int8)
    tensor.copy_(torch.arange(15).view(1, 3, 5))
    (got,) = gather_tokens([tensor], torch.tensor([[1, 2]]), backend="triton")
    assert got.flatten().tolist() == list(range(5, 15))


# ------------------------------------------------------------------------------------------------------------ prune

PRUNE_LAUNCHES = {
    None: ["sdtp_score_kernel", "sdtp_select_kernel", "sdtp_gather_kernel"],
    128: ["sdtp_prune_kernel"],
    230: ["sdtp_prune_kernel"],  # what a block of 256 may hold after a stage
    256: ["sdtp_prune_kernel"],
    300: ["sdtp_score_kernel", "sdtp_select_and_gather_kernel"],
    1100: ["sdtp_score_kernel", "sdtp_select_and_gather_kernel"],  # longer than a tile
}


def prune_case(block_size, padded, dtype, tokens=620, batch=2, pooling=1):
    """Arguments of `prune_tokens`: the tensors, and the selection."""
    hidden_states, weights = pruner_inputs(tokens, 64, 160, dtype, batch)
    carried = [
        torch.randn(1, tokens, 8).expand(batch, -1, -1),
        torch.arange(tokens).expand(batch, -1),
        torch.randn(batch, tokens, 2, 6).to(dtype).transpose(1, 2),
    ]
    bias = torch.randn(batch, tokens) - 9  # what is masked scores higher
    scoring = {"mean_score": torch.randn(batch, tokens), "num_scores": 3, "score_bias": bias, "rms_eps": 1e-6}
    if block_size is None:
        rows = torch.tensor([[tokens, tokens - 150, 60], [tokens - 90, tokens - 200, 45]])
        selection = {"num_keep": tokens - 150, "recent": 60}
    else:
        tail, per_block = tokens % block_size, block_size * 3 // 4 if pooling == 1 else block_size // 4
        num_keep = tokens // block_size * per_block + tail
        rows = torch.tensor([[tokens, num_keep, tail], [block_size + 9, per_block + 9, 9]])
        selection = {"num_keep": num_keep, "recent": tail, "block_size": block_size}
    if padded:
        selection |= {"rows": rows, "recent": 0, "num_keep": selection["num_keep"] + 3}
    return (hidden_states, carried, *weights), selection | {"sink": 4, "pooling": pooling}, scoring


def assert_equals_composition(got, arguments, selection, scoring, num_dropped=0):
    hidden_states, carried, *weights = arguments
    batch, tokens, _ = hidden_states.shape
    scores = score_tokens(hidden_states, *weights, **scoring, backend="triton")
    indices = select_tokens(scores, **selection, backend="reference")
    assert torch.equal(got.indices, indices)
    means = score_tokens(hidden_states, *weights, **scoring | {"score_bias": None}, backend="triton")
    rows = selection.get("rows")
    if rows is None:
        rows = torch.tensor([[tokens, selection["num_keep"], selection.get("recent", 0)]] * batch)
    before = scoring.get("mean_score", torch.zeros(batch, tokens))
    for row, (length, _, tail) in enumerate(rows.tolist()):
        means[row, tokens - tail :] = before[row, tokens - tail :]
        dropped = sorted(set(range(tokens - length, tokens)) - set(indices[row].tolist()))
        assert num_dropped == 0 or got.dropped[row].tolist() == [-1] * (num_dropped - len(dropped)) + dropped
    assert got.dropped.shape == (batch, num_dropped)
    expected = gather_tokens([hidden_states, *carried, means], indices, backend="reference")
    for a, b in zip([got.hidden_states, *got.tensors, got.mean_score], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "padded", "pooling"),
    [
        pytest.param(torch.float32, False, 1, id="plain"),
        pytest.param(torch.float32, False, 7, id="pooled"),
        pytest.param(torch.bfloat16, True, 7, id="padded and pooled"),
    ],
)
@pytest.mark.parametrize("block_size", PRUNE_LAUNCHES)
def test_prune_equals_the_composition(block_size, padded, pooling, dtype, launches):
    tokens = 400 if block_size is None else block_size * (2 if block_size <= 300 else 1) + 60
    arguments, selection, scoring = prune_case(block_size, padded, dtype, tokens, pooling=pooling)
    num_dropped = tokens if padded else tokens - selection["num_keep"] + (pooling == 7)
    got = prune_tokens(*arguments, **selection, **scoring, num_dropped=num_dropped, backend="triton")
    assert launches == PRUNE_LAUNCHES[block_size]
    assert_equals_composition(got, arguments, selection, scoring, num_dropped)
    del scoring["mean_score"], scoring["num_scores"]
    got = prune_tokens(*arguments, **selection, **scoring, backend="triton")
    assert_equals_composition(got, arguments, selection, scoring)


def test_the_longest_prompt():
    """What test_select_long_rows leaves: scores of 131072 tokens, and copies of the first and the last of them."""
    hidden_states, weights = pruner_inputs(131072, 64, 16, torch.bfloat16)
    got, scores = (score_tokens(hidden_states, *weights, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, scores, atol=1e-5 * scores.abs().max().item(), rtol=0)
    columns = torch.tensor([[0, 1, 65535, 65536, 131070, 131071]])
    (kept,) = gather_tokens([hidden_states], columns, backend="triton")
    assert torch.equal(kept, hidden_states[:, columns[0]])


MAKES_TENSORS = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.empty_like)


class OnlyMakesTensors(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.is_view or func.overloadpacket in MAKES_TENSORS, func
        return func(*args, **(kwargs or {}))


def prune_on_meta(hidden_states, carried, w1, b1, w2, b2, selection, scoring):
    """The backend's own function: "meta" is no device that it could be chosen for."""
    scoring, selection = Scoring(w1, b1, w2, b2, **scoring), Selection(**selection)
    return backend.prune_tokens(hidden_states, carried, scoring, selection, 200)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block_size", [None, 128, 300])
def test_the_host_only_launches(block_size, padded, monkeypatch):
    """A CUDA graph captures what waits for no value: on tensors without any, the host makes others and launches."""
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device("sm_90", 1))
    case = prune_case(block_size, padded, torch.bfloat16)
    arguments, selection, scoring = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), case)
    with OnlyMakesTensors():
        pruned = prune_on_meta(*arguments, selection, scoring)
    assert pruned[0].is_meta
    assert pruned[2].is_meta


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block_size", [None, 128, 300])
def test_programs_run_at_once(block_size, seed):
    """No program reads what another one of its launch wrote: however they interleave, the result is the same."""
    arguments, selection, scoring = prune_case(block_size, True, torch.bfloat16, tokens=400, pooling=7)
    scoring["num_dropped"] = 400
    expected = prune_tokens(*arguments, **selection, **scoring, backend="triton")
    with concurrent_programs(seed):
        got = prune_tokens(*arguments, **selection, **scoring, backend="triton")
    for a, b in zip(*map(pytree.tree_leaves, (got, expected)), strict=True):
        assert torch.equal(a, b)


@triton.jit
def planted_read_of_a_neighbour(values_ptr):
    """Right in the order of the serial interpreter alone: the program before this one must have written."""
    program = tl.program_id(0)
    tl.store(values_ptr + program + 1, tl.load(values_ptr + program) + 1)


@triton.jit
def planted_lost_update(values_ptr):
    """Right in any order of whole programs; an update is lost where two of them interleave."""
    tl.store(values_ptr + 8, tl.load(values_ptr + 8) + 1)


@pytest.mark.parametrize("kernel", [planted_read_of_a_neighbour, planted_lost_update])
def test_the_scheduler_bites(kernel):
    def run():
        values = torch.zeros(9)
        kernel[(8,)](values)
        return values[8].item()

    assert run() == 8  # the stock interpreter finds nothing
    found = []
    for seed in range(5):
        with concurrent_programs(seed):
            found.append(run())
        with concurrent_programs(seed):
            assert run() == found[-1]  # a seed is one schedule
    assert all(count < 8 for count in found)
    assert run() == 8


def test_the_only_atomic_counts_programs():
    """Which one is the last depends on the schedule; what the last one computes does not."""
    lines = [line.strip() for path in SOURCES.glob("*.py") for line in path.read_text().splitlines()]
    found = [line for line in lines if "atomic" in line]
    assert found == ['if tl.atomic_add(finished_ptr + batch, 1, sem="acq_rel") == num_tiles - 1:']


@contextlib.contextmanager
def traffic():
    """Yields ``count(kind, tensor)``: how often each element of a contiguous tensor is loaded or stored meanwhile."""
    accesses = {"load": [], "store": []}

    def count(kind, tensor):
        addresses = np.concatenate([np.empty(0, np.uint64), *accesses[kind]]).astype(np.int64) - tensor.data_ptr()
        elements = addresses[(addresses >= 0) & (addresses < tensor.nbytes)] // tensor.itemsize
        return torch.from_numpy(np.bincount(elements, minlength=tensor.numel())).view(tensor.shape)

    with before_each_access(lambda kind, addresses, _: accesses[kind].append(addresses)):
        yield count


@pytest.mark.parametrize(
    ("block_size", "pruner_size", "num_launches"),
    [(128, 100, 1), (256, 128, 1), (256, 300, 1), (300, 100, 2), (600, 300, 2)],
)
def test_bytes_of_the_block_budget(block_size, pruner_size, num_launches, launches):
    """Counted, not computed: who is read and written how often."""
    batch, blocks, tail, hidden_size = 2, 2, 37, 64
    per_block, tokens = block_size * 3 // 4, blocks * block_size + tail
    hidden_states, weights = pruner_inputs(tokens, hidden_size, pruner_size, torch.bfloat16, batch)
    carried = [torch.randn(batch, tokens, 24), torch.randn(batch, 2, tokens, 8), torch.ones(batch, tokens)]
    mean, bias = torch.randn(2, batch, tokens)
    num_keep = blocks * per_block + tail
    with traffic() as count:
        got = prune_tokens(
            hidden_states, carried, *weights, num_keep, sink=4, recent=tail, block_size=block_size, pooling=7,
            mean_score=mean, num_scores=1, score_bias=bias, rms_eps=1e-6, num_dropped=tokens - num_keep,
            backend="triton",
        )  # fmt: skip
    assert len(launches) == num_launches
    is_kept = torch.zeros(batch, tokens, dtype=torch.int64).scatter_(1, got.indices, 1)
    is_scored = (torch.arange(tokens) < tokens - tail).long().expand(batch, -1)
    width_tiles, token_tiles = -(-pruner_size // 128), -(-block_size // 128) * blocks * batch
    if num_launches == 2:
        token_tiles = -(-blocks * block_size // 128) * batch
    # Hidden states: once to be scored, then the kept ones. A pruner wider than a tile takes them once more for each
    # further tile, from L2 as far as it holds them.
    expected = (is_scored * width_tiles + is_kept).unsqueeze(-1).expand_as(hidden_states)
    assert torch.equal(count("load", hidden_states), expected)
    assert torch.equal(count("load", carried[0]), is_kept.unsqueeze(-1).expand_as(carried[0]))
    assert torch.equal(count("load", carried[1]), is_kept[:, None, :, None].expand_as(carried[1]))
    assert torch.equal(count("load", carried[2]), is_kept)
    for output in pytree.tree_leaves(got):
        assert count("store", output).eq(1).all()
    for output in (got.hidden_states, *got.tensors):
        assert not count("load", output).any()
    # The column of a slot, once for each tensor; in the second of two launches once more, for the mean.
    is_chosen = got.indices < tokens - tail
    assert torch.equal(count("load", got.indices), 1 + len(carried) + (num_launches - 1) * is_chosen)
    # The pruner: every tile of tokens reads all of it, from L2.
    assert count("load", weights.w1).eq(token_tiles).all()
    if num_launches == 1:  # scores stay in registers, pooled or not
        assert torch.equal(count("load", bias), is_scored)
        assert count("load", mean).eq(1).all()  # the tail's is copied


def test_one_launch_where_blocks_fill_the_gpu(monkeypatch, launches):
    arguments, selection, scoring = prune_case(128, False, torch.bfloat16)
    one = prune_tokens(*arguments, **selection, **scoring, backend="triton")
    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device("sm_90", 132))  # an H100
    two = prune_tokens(*arguments, **selection, **scoring, backend="triton")
    assert launches == ["sdtp_prune_kernel", "sdtp_score_kernel", "sdtp_select_and_gather_kernel"]
    for a, b in zip(*map(pytree.tree_leaves, (one, two)), strict=True):
        assert torch.equal(a, b)

    def fits(block_size, blocks, batch=1):
        return fused.fits_one_launch(torch.device("cpu"), batch, block_size, blocks)

    assert fits(128, 132)
    assert fits(256, 66, batch=2)
    assert not fits(256, 131)  # too few programs
    assert not fits(257, 132)  # too large a block


def test_wrong_counts_stay_in_their_row():
    """The host does not see the counts of rows on a GPU: wrong ones must not reach beyond the row."""
    scores = torch.randn(1, 40)
    for wrong in ([99, 99, 99], [-5, 3, 2], [40, 60, 50], [40, 30, 5], [9, 30, 2**40], [40, -1, -1], [30, 20, 25]):
        rows = torch.tensor([wrong])
        for block_size in (None, 8):
            memory, means = torch.full((2, 3, 20), -7), torch.full((3, 20), -7.0)
            select.sdtp_select_kernel[(10, 1)](
                scores, 0, 1, None, None, 1.0, None, None, rows, memory[0, 1], means[1], memory[1, 1],
                40, 20, 20, 2, 0, block_size, 1 if block_size is None else 5, 0, REACH=3, TILE=256, FILL=256, PDL=False,
            )  # fmt: skip
            assert memory[:, [0, 2]].eq(-7).all()
            assert memory[:, 1].lt(40).all()
            assert means[[0, 2]].eq(-7).all()


def test_prune_nothing():
    hidden_states, weights = pruner_inputs(20)
    for selection in (
        {"num_keep": 0},
        {"num_keep": 0, "num_dropped": 20},
        {"num_keep": 0, "num_dropped": 20, "rows": torch.tensor([[17, 0, 0]])},
        {"num_keep": 20, "recent": 20, "block_size": 8, "num_dropped": 3},
        {"num_keep": 20},
    ):
        expected = prune_tokens(hidden_states, [], *weights, **selection, backend="reference")
        got = prune_tokens(hidden_states, [], *weights, **selection, backend="triton")
        for a, b in zip(*map(pytree.tree_leaves, (got, expected)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_dropped_tokens_without_room():
    """The host does not see how many tokens a row drops: what has no place is left out, the first ones."""
    hidden_states, weights = pruner_inputs(40)
    rows = torch.tensor([[40, 20, 3]])
    for block_size in (None, 37):
        whole, short = (
            prune_tokens(
                hidden_states, [], *weights, 20, block_size=block_size, rows=rows, num_dropped=width, backend="triton"
            ).dropped
            for width in (20, 15)
        )
        assert torch.equal(whole[:, 5:], short)


def test_prune_many_tensors(launches):
    hidden_states, weights = pruner_inputs(40)
    tensors = [torch.randn(1, 40) for _ in range(gather.MAX_TENSORS + 3)]
    arguments, selection = (hidden_states, tensors, *weights), {"num_keep": 24, "recent": 8, "block_size": 16}
    got = prune_tokens(*arguments, **selection, backend="triton")
    assert launches == ["sdtp_score_kernel", "sdtp_select_kernel", "sdtp_gather_kernel", "sdtp_gather_kernel"]
    assert_equals_composition(got, arguments, selection, {})


# ------------------------------------------------------------------------------------- what is owed to the prompt's end


WINDOW_SHAPES = [
    {"keys": 1, "window": 1, "padding": (0,)},
    {"keys": 300, "window": 8, "heads": 9, "key_heads": 3, "head_dim": 64},
    {"keys": 257, "window": 32, "heads": 4, "key_heads": 4, "padding": (250, 256)},
    {"keys": 5, "window": 9, "padding": (0, 3)},
    {"keys": 130, "window": 1, "heads": 3, "key_heads": 1, "head_dim": 7},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pooling", [1, 3, 7])
@pytest.mark.parametrize("shape", WINDOW_SHAPES, ids=str)
def test_window_attention(shape, pooling, dtype, launches, monkeypatch):
    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device("interpreter", 3))  # keys in several parts
    inputs = window_inputs(**shape, dtype=dtype)
    expected = naive_window(*inputs, 0.25, pooling)
    got = window_attention(*inputs, scaling=0.25, pooling=pooling, backend="triton")
    torch.testing.assert_close(got.double(), expected, atol=1e-5 * expected.max().item(), rtol=0)
    assert launches == ["sdtp_window_sums_kernel", "sdtp_window_kernel"]


@pytest.mark.parametrize("batch", [1, 2])
def test_window_attention_rotates_queries(batch):
    query, *rest = window_inputs()
    cos, sin = rotary(batch, 5, 24)
    strided = torch.full((batch, 5, 48), torch.nan)[..., ::2].copy_(sin)
    expected = window_attention(query, *rest, cos=cos, sin=sin, scaling=0.3, backend="reference")
    for angles in (sin, strided):
        got = window_attention(query, *rest, cos=cos, sin=angles, scaling=0.3, backend="triton")
        torch.testing.assert_close(got, expected, atol=1e-5 * expected.max().item(), rtol=0)


def test_window_attention_layouts_and_nan():
    query, key, query_index, key_index = inputs = window_inputs(padding=(0, 0))
    expected = window_attention(*inputs, scaling=0.3, pooling=7, backend="triton")
    cache = torch.full((2, 2, 500, 24), torch.nan)
    cache[:, :, :300] = key
    layouts = [
        (query, cache[:, :, :300], query_index, key_index),
        (torch.full((2, 6, 5, 48), torch.nan)[..., ::2].copy_(query), key.mT.contiguous().mT, query_index, key_index),
        (query.transpose(1, 2).contiguous().transpose(1, 2), key, *(t.t().contiguous().t() for t in inputs[2:])),
    ]
    for layout in layouts:
        assert torch.equal(window_attention(*layout, scaling=0.3, pooling=7, backend="triton"), expected)
    for spoilt in (query[1, 2, 3], key[1, 0, 40]):
        right = spoilt.clone()
        spoilt.fill_(torch.nan)
        got = window_attention(*inputs, scaling=0.3, pooling=7, backend="triton")
        assert got[1].isnan().all()
        assert torch.equal(got[0], expected[0])
        spoilt.copy_(right)


def test_window_attention_of_queries_without_a_say():
    query, key, query_index, key_index = window_inputs(keys=70, window=4)
    query_index[0, 1] = -1
    query_index[:, 2] = -1
    query[:, :, 2] = torch.nan
    key[1, :, :7] = torch.nan  # padding
    for index in (query_index, torch.full_like(query_index, -1)):
        got = window_attention(query, key, index, key_index, scaling=0.3, pooling=3, backend="triton")
        expected = naive_window(query, key, index, key_index, 0.3, 3)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    nothing = window_attention(query[:, :, :0], key, query_index[:, :0], key_index, scaling=0.3, backend="triton")
    assert not nothing.any()


def test_window_attention_of_steep_logits():
    query, key, *rest = window_inputs(keys=200, head_dim=8)
    key[:, :, 100] *= 300
    key[:, :, 150:] *= 30
    expected = naive_window(query, key, *rest, 1.0, 1)
    got = window_attention(query, key, *rest, scaling=1.0, backend="triton")
    torch.testing.assert_close(got.double(), expected, atol=1e-4 * expected.max().item(), rtol=0)


def test_window_offsets_beyond_32_bits():
    key = far_apart(3, 8, 2**31, torch.float16).unsqueeze(1)
    key.copy_(torch.randn(1, 1, 3, 8))
    query, index = torch.randn(1, 2, 1, 8).half(), torch.arange(3)[None]
    got, expected = (
        window_attention(query, keys, index[:, -1:], index, scaling=0.3, backend=name)
        for keys, name in ((key, "triton"), (key.contiguous(), "reference"))
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["query", "attention", "distance"])
@pytest.mark.parametrize("keep_last", [0, 7])
def test_prompt_bias(what, keep_last, launches):
    inputs = prompt_inputs((300, 211, 9), keep_last, torch.float32)
    names = ["sdtp_window_sums_kernel", "sdtp_window_kernel"]
    if what != "query":
        inputs = {name: value for name, value in inputs.items() if name not in ("query", "key", "cos", "sin")}
        names = ["sdtp_bias_kernel"]
    if what == "attention":
        inputs["attention"], names = torch.rand(3, 300) ** 9, ["sdtp_logarithm_kernel", "sdtp_bias_kernel"]
    got = prompt_bias(**inputs, backend="triton")
    assert launches == names
    torch.testing.assert_close(got, prompt_bias(**inputs, backend="reference"), atol=1e-4, rtol=1e-5)
    inputs["distance_table"] = torch.randn(3, 250)  # one for each row
    got, expected = (prompt_bias(**inputs, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_prompt_bias_of_a_long_prompt():
    """Moments of more tiles than a program reads at once."""
    index, attention = torch.arange(300_000)[None], torch.rand(1, 300_000) ** 9
    arguments = {"attention": attention, "attention_weight": 2.0, "keep_last": 5}
    got, expected = (prompt_bias(index, torch.ones(1), **arguments, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_last_program_makes_the_bias_in_steps(monkeypatch):
    """Of tokens, and of the moments of tiles."""
    monkeypatch.setattr(window, "_TOKENS_OF_LAST", 64)
    monkeypatch.setattr(window, "_TILES", 2)
    inputs = prompt_inputs((300, 211, 9), 7, torch.float32)
    got, expected = (prompt_bias(**inputs, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_prompt_bias_of_nothing(launches):
    index = torch.arange(30).repeat(2, 1)
    assert not prompt_bias(index, torch.ones(1), keep_last=30, backend="triton").any()
    assert prompt_bias(index[:, :0], torch.ones(1), backend="triton").shape == (2, 0)
    assert launches == ["sdtp_bias_kernel"]


@pytest.mark.parametrize("heads", [4, 5])
def test_heads_too_many_for_a_program(heads, launches):
    """In halves, not all alike; the bias takes their mean."""
    query, key, query_index, index = window_inputs(keys=50, heads=heads, key_heads=1, head_dim=300, padding=(0, 7))
    settings = {"scaling": 0.1, "pooling": 7}
    got, expected = (
        window_attention(query, key, query_index, index, **settings, backend=name) for name in ("triton", "reference")
    )
    assert launches == ["sdtp_window_sums_kernel", "sdtp_window_kernel"] * (2 if heads == 4 else 3)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    got, expected = (
        prompt_bias(index, torch.ones(1), query=query, key=key, attention_weight=0.5, **settings, backend=name)
        for name in ("triton", "reference")
    )
    assert launches[-2:] == ["sdtp_logarithm_kernel", "sdtp_bias_kernel"]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_pooling_too_wide_for_a_tile(launches):
    """By the reference."""
    inputs = window_inputs(keys=50, padding=(0, 7))
    got, expected = (
        window_attention(*inputs, scaling=0.1, pooling=101, backend=name) for name in ("triton", "reference")
    )
    assert launches == []
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_programs_of_the_window_run_at_once(seed):
    inputs = prompt_inputs((150, 90), 3, torch.bfloat16)
    expected = prompt_bias(**inputs, backend="triton")
    with concurrent_programs(seed):
        assert torch.equal(prompt_bias(**inputs, backend="triton"), expected)


def test_the_host_only_launches_for_the_bias(monkeypatch):
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device("sm_90", 132))
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), prompt_inputs(dtype=torch.bfloat16))
    with OnlyMakesTensors():
        assert backend.prompt_bias(PromptTerms(**inputs)).is_meta


# -------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (1,)},
        {"lengths": (70, 41), "heads": 9, "key_heads": 3, "head_dim": 64},
        {"lengths": (300, 190), "heads": 2, "key_heads": 1, "head_dim": 16, "room": 100},  # more than a block
        {"lengths": (200,), "heads": 2, "key_heads": 2, "head_dim": 75},  # copied, into heads of 128
        {"lengths": (150, 150, 9), "heads": 2, "key_heads": 1, "head_dim": 32, "keep": 0.1},
        {"lengths": (90, 60), "heads": 1, "key_heads": 1, "head_dim": 128, "keep": 1.0},
    ],
)
def test_position_attention(dtype, shape, launches):
    inputs = make_inputs(**shape, dtype=dtype)
    got = position_attention(*inputs, scale=0.3, backend="triton")
    assert launches == ["sdtp_attention_kernel"]
    assert got.stride() == inputs[0].stride()
    assert_close(got, position_attention(*inputs, scale=0.3, backend="reference"))
    no_padding = (*inputs[:4], None)
    got, expected = (position_attention(*no_padding, backend=name) for name in ("triton", "reference"))
    assert_close(got, expected)


@pytest.mark.parametrize("head_dim", [129, 256, 300])
def test_position_attention_of_large_heads(head_dim, launches):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs((40,), heads=1, key_heads=1, head_dim=head_dim, dtype=dtype)
        got, expected = (position_attention(*inputs, backend=name) for name in ("triton", "reference"))
        assert_close(got, expected)
    assert launches == ["sdtp_attention_kernel"] * (head_dim <= 256)  # of float32, and above, the reference


def test_position_attention_in_any_order():
    """Neither the order of the queries nor counts that are out of range read a key that is not there."""
    query, key, value, _, _ = make_inputs((150,), keep=1.0, heads=2, key_heads=1, head_dim=16)
    for num_visible in (torch.randint(-50, 200, (1, 150)), torch.full((1, 150), 2**40), torch.full((1, 150), -1)):
        for first in (None, torch.tensor([37]), torch.tensor([-5]), torch.tensor([2**40])):
            inputs = (query, key, value, num_visible, first)
            got, expected = (position_attention(*inputs, backend=name) for name in ("triton", "reference"))
            assert_close(got, expected)
            assert got.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_position_attention_does_not_depend_on_the_company(dtype):
    lengths = (300, 213, 3, 1)
    query, key, value, num_visible, first_visible = make_inputs(lengths, head_dim=16, room=9, dtype=dtype)
    query[1:, :, 0] = torch.nan  # padding may hold anything
    together = position_attention(query, key, value, num_visible, first_visible, backend="triton")
    for row, (length, first) in enumerate(zip(lengths, first_visible.tolist(), strict=True)):
        own = slice(num_visible[row].eq(0).sum().item(), None)
        cached = slice(first, first + length)
        alone = position_attention(
            query[row : row + 1, :, own], key[row : row + 1, :, cached], value[row : row + 1, :, cached],
            num_visible[row : row + 1, own] - first, backend="triton",
        )  # fmt: skip
        assert torch.equal(alone[0], together[row, :, own])
        assert together[row, :, : own.start].eq(0).all()


def test_position_attention_reads_what_its_queries_see():
    """Counted: neither padding nor a static cache's room, and by each block of queries no key after them."""
    query, key, value, num_visible, first_visible = make_inputs(
        (300, 160), keep=1.0, heads=2, key_heads=1, head_dim=16, room=70, dtype=torch.bfloat16
    )
    with traffic() as count:
        got = position_attention(query, key, value, num_visible, first_visible, backend="triton")
    size = configs.attention_config(query).block_queries
    expected = torch.zeros(2, 1, 370, 16, dtype=torch.int64)
    for block in range(0, 300, size):
        for row, first in enumerate(first_visible.tolist()):
            expected[row, :, first : num_visible[row, block : block + size].max()] += 2  # both heads
    assert torch.equal(count("load", key), expected)
    assert torch.equal(count("load", value), expected)
    assert count("load", query).eq(1).all()
    assert count("store", got).eq(1).all()


def test_position_attention_offsets_beyond_32_bits():
    values = torch.randn(3, 1, 3, 16).half()
    far = [far_apart(tokens=3, width=16, stride=2**30 + 16, dtype=torch.float16).copy_(v) for v in values]
    num_visible = torch.tensor([[1, 2, 3]])
    near, far = ([t.unsqueeze(1) for t in tensors] for tensors in (values, far))
    expected = position_attention(*near, num_visible, backend="triton")
    for i in range(3):
        mixed = [far[j] if i == j else near[j] for j in range(3)]
        assert torch.equal(position_attention(*mixed, num_visible, backend="triton"), expected)


def test_the_host_only_launches_attention(monkeypatch):
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    monkeypatch.setattr(configs, "device_of", lambda _: configs.Device("sm_90", 1))
    inputs = [t.to("meta") for t in make_inputs((300, 200), head_dim=64, dtype=torch.bfloat16)]
    with OnlyMakesTensors():
        assert backend.position_attention(*inputs).is_meta


@pytest.mark.parametrize("seed", range(3))
def test_attention_programs_run_at_once(seed):
    inputs = make_inputs((200, 90), heads=2, key_heads=1, head_dim=16)
    expected = position_attention(*inputs, backend="triton")
    with concurrent_programs(seed):
        assert torch.equal(position_attention(*inputs, backend="triton"), expected)


# ------------------------------------------------------------------------------- tracing, models, errors, coverage


OPS = (
    "score_tokens",
    "select_tokens",
    "gather_tokens",
    "prune_tokens",
    "window_attention",
    "prompt_bias",
    "position_attention",
)


def op_inputs(requires_grad):
    hidden_states, weights = pruner_inputs(40, batch=2)
    hidden_states.requires_grad_(requires_grad)
    other = torch.randn(2, 2, 40, 3, requires_grad=requires_grad)
    selection = (20, 2, 4, None, torch.tensor([[40, 20, 4], [30, 16, 3]]), 3)
    index = torch.arange(40).expand(2, -1)
    mean, bias = torch.randn(2, 2, 40)
    window = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 40, 8), index[:, 35:], index)
    return {
        "score_tokens": (hidden_states, *weights, mean, 2, bias, 1e-6),
        "select_tokens": (torch.randn(2, 40), *selection),
        "gather_tokens": ([hidden_states, other, torch.arange(80).view(2, 40)], torch.tensor([[0, 2, 39], [-1, 4, 9]])),
        "prune_tokens": (hidden_states, [other], *weights, mean, 2, bias, 1e-6, *selection, 22),
        "window_attention": (*window, None, None, 0.3, 7),
        "prompt_bias": (index, torch.randn(9), 3, None, 0.5, *window[:2], None, None, 0.3, 7),
        "position_attention": (
            torch.randn(2, 4, 12, 16, requires_grad=requires_grad),
            *torch.randn(2, 2, 2, 40, 16, requires_grad=requires_grad),
            torch.randint(41, (2, 12)).sort(-1).values,
            torch.tensor([0, 9]),
            0.3,
        ),
    }


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, requires_grad):
    op = getattr(torch.ops.sdtp, name).default
    torch.library.opcheck(op, (*op_inputs(requires_grad)[name], "triton"))


@pytest.mark.parametrize("name", OPS)
def test_fake_layouts_are_the_real_ones(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, inputs = getattr(torch.ops.sdtp, name), op_inputs(False)[name]
    with FakeTensorMode() as mode:
        fake = op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs), "triton")
    real = op(*inputs, "triton")
    for a, b in zip(torch.utils._pytree.tree_leaves(fake), torch.utils._pytree.tree_leaves(real), strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@pytest.mark.parametrize("budget", ["global", "block"])
def test_model(tiny_model, budget):
    """A patched model end to end: prompt lengths of its own in a batch, and decoding after it."""
    from sdtp_kernels import apply_sdtp

    schedule = PruningSchedule((2, 4), 0.7, budget=budget, block_size=32, min_prompt=8)
    pruners = {layer: TokenPruner(64, 16, pooling=7) for layer in schedule.layers}
    tokens = torch.randint(256, (2, 70))
    mask = torch.ones_like(tokens)
    mask[1, :21] = 0
    results = []
    for name in ("reference", "triton"):
        with apply_sdtp(tiny_model, pruners, schedule, backend=name), torch.no_grad():
            logits = tiny_model(tokens, attention_mask=mask, logits_to_keep=1).logits
            results.append((logits, tiny_model.generate(tokens, attention_mask=mask, max_new_tokens=5)))
    (expected, expected_tokens), (got, got_tokens) = results
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(got_tokens, expected_tokens)


def test_errors():
    hidden_states, weights = pruner_inputs(5, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match=r"(?s)'triton' cannot run .* torch.float64.*computes in"):
        score_tokens(hidden_states, *weights, backend="triton")
    with pytest.raises(ValueError, match=r"backend 'triton' takes at most 65535 rows .* got 65536 rows of 3: split"):
        select_tokens(torch.zeros(1, 1).expand(65536, 3), 2, backend="triton")
    with pytest.raises(ValueError, match=f"of at most {limits.MAX_TOKENS} tokens"):
        gather_tokens([], torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**24 + 1), backend="triton")
    with pytest.raises(ValueError, match=r"backend 'triton' pools over at most 255 tokens, got pooling=257: pool less"):
        select_tokens(torch.zeros(1, 3), 2, pooling=257, backend="triton")
    with pytest.raises(
        BackendUnavailableError, match=r"(?s)'triton' cannot run on meta .*not on meta.*reference: can run"
    ):
        backends.choose("triton", torch.device("meta"), torch.float32)
    hidden_states, weights = pruner_inputs(5)
    for keys in (torch.zeros(1, 2, 2, 5, 4), torch.zeros(2, 2, 5, 4), torch.zeros(1, 2, 6, 4)):  # any heads of any size
        with pytest.raises(ValueError, match=r"tensors\[0\]: expected the batch and tokens of hidden_states .*, got "):
            prune_tokens(hidden_states, [keys], *weights, 3, backend="triton")


def test_auto_never_takes_the_interpreter(monkeypatch):
    status = {s.name: s for s in explain_backends("cpu")}
    assert status["triton"].available
    assert not status["triton"].chosen
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "needs triton 3.6 or newer, found 3.5.1" in backend.unavailable_reason(torch.device("cpu"))


def test_tables():
    tiles = {size: configs.select_tile(size) for size in (1, 256, 257, 1024, 1025, 131072)}
    assert tiles == {1: 256, 256: 256, 257: 1024, 1024: 1024, 1025: 4096, 131072: 4096}
    assert [configs.select_tile(size, largest=1024) for size in (200, 1024, 5000)] == [256, 1024, 1024]
    x = torch.zeros(2, 3, 64)
    whole = [x, x[1:], x[:, 1:], x[..., :32], x[..., 16:]]
    odd = [x[..., 1:33], x[..., :33], x[..., ::2], x.mT, torch.zeros(2, 4, 63)]  # pointer, size, strides
    assert [configs.is_aligned(t) for t in (*whole, *odd)] == [True] * len(whole) + [False] * len(odd)
    assert {configs.score_config(t, t[0]).block_tokens for t in whole} == {128}
    assert {configs.score_config(t, t[0]).block_tokens for t in odd} == {64}
    assert [configs.nvidia_target(*c) for c in ((8, 0), (8, 7), (9, 0), (10, 3), (12, 1))] == [
        "sm_80", "sm_86", "sm_90", "sm_100", "sm_120",
    ]  # fmt: skip


def test_every_kernel_is_right_here(launches):
    """A kernel that none of these calls launches has no test in the interpreter."""
    for block_size in (None, 128, 300):
        arguments, selection, scoring = prune_case(block_size, False, torch.float32, tokens=310, batch=1)
        got = prune_tokens(*arguments, **selection, **scoring, backend="triton")
        assert_equals_composition(got, arguments, selection, scoring)
        inputs = (arguments[0], *arguments[2:])
        scores = score_tokens(*inputs, **scoring, backend="reference")
        torch.testing.assert_close(score_tokens(*inputs, **scoring, backend="triton"), scores, atol=1e-4, rtol=0)
    inputs = prompt_inputs((30,), dtype=torch.float32)
    for given in ({}, {"query": None, "key": None, "cos": None, "sin": None, "attention": torch.rand(1, 30)}):
        got, expected = (prompt_bias(**inputs | given, backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)
    inputs = make_inputs((40,), heads=1, key_heads=1, head_dim=16)
    assert_close(position_attention(*inputs, backend="triton"), position_attention(*inputs, backend="reference"))
    assert set(launches) == set(KERNELS) == kernel_names()
