"""The op contract, for every backend that this machine can run."""

import math
import os
import subprocess
import sys
import traceback

import pytest
import torch
from helpers.oracle import naive_select
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from sdtp_kernels import (
    BackendUnavailableError,
    PruningSchedule,
    TokenPruner,
    explain_backends,
    gather_tokens,
    prompt_bias,
    prune_tokens,
    score_tokens,
    select_tokens,
    window_attention,
)

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the spread of the scores: float32 is a different order of summation, bfloat16 and float16 inputs are
# exact in float32, and a bfloat16 matmul may round the pre-activation once.
SCORE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 2e-2}

OPS = ("score_tokens", "select_tokens", "gather_tokens", "prune_tokens", "window_attention", "prompt_bias")

backends = pytest.mark.parametrize("backend", BACKENDS)


def pruner_inputs(tokens, hidden_size=48, intermediate_size=20, dtype=torch.float32, batch=1, scale=3.0):
    pruner = TokenPruner(hidden_size, intermediate_size)
    torch.nn.init.normal_(pruner.b1)
    pruner.b2.data.fill_(0.7)
    return (torch.randn(batch, tokens, hidden_size) * scale).to(dtype), pruner.weights(dtype)


# ---------------------------------------------------------------------------------------------------- which backend


def test_every_backend_runs_here():
    status = {s.name: s for s in explain_backends("cpu", torch.float32)}
    assert [name for name in status if status[name].available] == ["cpu", "reference"], status["cpu"].reason
    assert status["cpu"].chosen


def test_a_named_backend_never_falls_back():
    hidden_states, weights = pruner_inputs(5, dtype=torch.float64)
    assert score_tokens(hidden_states, *weights).dtype == torch.float32  # auto: the reference takes float64
    with pytest.raises(
        BackendUnavailableError, match=r"(?s)'cpu' cannot run on cpu with torch.float64.*reference: can run"
    ):
        score_tokens(hidden_states, *weights, backend="cpu")
    with pytest.raises(ValueError, match="known: auto, cpu, triton, cuda, reference"):
        score_tokens(hidden_states, *weights, backend="cuda-but-misspelt")
    assert explain_backends("meta")[0].reason.startswith("runs on cpu tensors")


# ------------------------------------------------------------------------------------------------------------ score


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms_eps", [None, 1e-6])
@pytest.mark.parametrize(("tokens", "hidden_size", "intermediate_size"), [(1, 8, 1), (300, 64, 16), (777, 100, 33)])
def test_score(backend, dtype, rms_eps, tokens, hidden_size, intermediate_size):
    hidden_states, weights = pruner_inputs(tokens, hidden_size, intermediate_size, dtype, batch=2)
    bias = torch.randn(2, tokens)
    w1, b1, w2, b2 = (w.double() for w in weights)
    x = hidden_states.double()
    if rms_eps is not None:
        x = x / (x.square().mean(-1, keepdim=True) + rms_eps).sqrt()
    pre = x @ w1.T + b1
    expected = (0.5 * pre * (1 + torch.erf(pre / math.sqrt(2)))) @ w2 + b2 + bias
    got = score_tokens(hidden_states, *weights, score_bias=bias, rms_eps=rms_eps, backend=backend)
    assert got.dtype == torch.float32
    tolerance = SCORE_TOLERANCE[dtype] * max(1.0, expected.std().item()) if tokens > 1 else 0.1
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_averages_the_stages(backend, dtype):
    """Three stages' scores by the running mean of two, the bias on top."""
    hidden_states, weights = pruner_inputs(300, dtype=dtype, batch=2)
    mean, bias = torch.randn(2, 2, 300)
    own = score_tokens(hidden_states, *weights, backend=backend)
    got = score_tokens(hidden_states, *weights, mean_score=mean, num_scores=2, score_bias=bias, backend=backend)
    torch.testing.assert_close(got, (2 * mean + own) / 3 + bias, atol=1e-5, rtol=1e-5)
    spread = torch.full((2, 600), torch.nan)[:, ::2]
    again = score_tokens(
        hidden_states, *weights, mean_score=spread.copy_(mean), num_scores=2, score_bias=bias.t().contiguous().t(),
        backend=backend,
    )  # fmt: skip
    assert torch.equal(got, again)


@backends
@pytest.mark.parametrize("width", [1, 15, 48, 49, 70, 96, 97])
def test_score_of_every_width(backend, width):
    hidden_states, weights = pruner_inputs(21, 40, width)
    got, expected = (score_tokens(hidden_states, *weights, rms_eps=1e-6, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate_size", [16, 112])  # narrow pruners have a kernel of their own on some machines
def test_a_score_does_not_depend_on_the_company(backend, dtype, intermediate_size):
    hidden_states, weights = pruner_inputs(700, 64, intermediate_size, dtype, batch=3)
    together = score_tokens(hidden_states, *weights, rms_eps=1e-6, backend=backend)
    for row, length in ((0, 700), (1, 513), (2, 1), (1, 256), (0, 300)):  # rows are right-aligned
        alone = score_tokens(hidden_states[row : row + 1, 700 - length :], *weights, rms_eps=1e-6, backend=backend)
        assert torch.equal(alone[0], together[row, 700 - length :])


@backends
@pytest.mark.parametrize("intermediate_size", [16, 112])
def test_score_layouts_and_nan(backend, intermediate_size):
    hidden_states, weights = pruner_inputs(600, 64, intermediate_size, batch=2)
    expected = score_tokens(hidden_states, *weights, backend=backend)
    strided = torch.full((2, 1200, 130), torch.nan)[:, ::2, :128:2].copy_(hidden_states)
    transposed = hidden_states.transpose(1, 2).contiguous().transpose(1, 2)
    with_gaps = torch.full((2, 600, 80), torch.nan)[:, :, :64].copy_(hidden_states)
    unaligned = torch.empty(hidden_states.numel() + 1)[1:].view_as(hidden_states).copy_(hidden_states)
    for layout in (strided, transposed, with_gaps, unaligned):
        assert torch.equal(score_tokens(layout, *weights, backend=backend), expected)
    hidden_states[1, 40, 3] = torch.nan
    scores = score_tokens(hidden_states, *weights, backend=backend)
    assert scores.isnan().nonzero().tolist() == [[1, 40]]
    assert torch.equal(scores[0], expected[0])


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_score_on_lesser_processors(capability):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "score and not lesser"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout


# ----------------------------------------------------------------------------------------------------------- select

special = st.sampled_from([0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 1e-45, -1e-45, 1.0, 1.0 + 2**-23])
values = special | st.floats(width=32)


@st.composite
def selections(draw):
    """A batch of score rows and what to keep of each: uneven lengths, blocks or none, every kind of value."""
    block_size = draw(st.none() | st.integers(1, 12))
    sink = draw(st.integers(0, 3))
    per_block = draw(st.integers(min(sink + 1, block_size), block_size)) if block_size else None
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        tail = draw(st.integers(0, 12))
        if block_size:
            blocks = draw(st.integers(0, 5))
            length, keep = blocks * block_size + tail, blocks * per_block + tail
        else:
            length = tail + draw(st.integers(0, 60))
            keep = draw(st.integers(min(sink, length - tail) + tail, length))
        pool = draw(st.sampled_from([values, special, st.just(0.5), st.sampled_from([0.25, 0.5])]))
        rows.append((draw(st.lists(pool, min_size=length, max_size=length)), keep, tail))
    return rows, sink, block_size, draw(st.sampled_from([1, 3, 7]))


@given(selections())
@example(([([1.0], 1, 0)], 0, None, 1))  # N = 1
@example(([([], 0, 0)], 0, None, 7))
@example(([([float(-i) for i in range(3000)], 2500, 100)], 4, None, 1))  # reversed, several histogram buckets
@example(([([0.5] * 3000, 2500, 100)], 4, None, 1))  # all equal
@example(([([math.nan] * 50, 30, 5)], 4, None, 1))
@example(([([math.nan, 1.0, math.nan, math.nan, math.nan, 2.0], 3, 1)], 0, None, 3))  # 2.0 stands in the tail
@example(([([0.0, -0.0] * 20, 13, 0)], 0, None, 1))
@example(([([0.0, 1.0, 2.0, 9.0, 0.0, 1.0, 2.0, 0.0], 4, 0)], 0, 4, 3))  # 9.0 lifts no token of the next block
def test_select(case):
    rows, sink, block_size, pooling = case
    settings = {"sink": sink, "block_size": block_size, "pooling": pooling}
    width = max(len(scores) for scores, _, _ in rows) + 2
    num_keep = max(keep for _, keep, _ in rows) + 1
    scores = torch.full((len(rows), width), 7.0)  # padding scores high: a row that reads it goes wrong
    expected = torch.full((len(rows), num_keep), -1)
    for i, (row, keep, tail) in enumerate(rows):
        padding = width - len(row)
        scores[i, padding:] = torch.tensor(row)
        if keep:
            kept = naive_select(row, keep, sink, tail, block_size, pooling)
            expected[i, num_keep - keep :] = torch.tensor(kept) + padding
    counts = torch.tensor([[len(row), keep, tail] for row, keep, tail in rows])
    for backend in BACKENDS:
        got = select_tokens(scores, num_keep, **settings, rows=counts, backend=backend)
        assert torch.equal(got, expected), backend
        spread = torch.full((len(rows), 2 * width), torch.nan)[:, ::2].copy_(scores)  # not contiguous
        got = select_tokens(spread, num_keep, **settings, rows=counts, backend=backend)
        assert torch.equal(got, expected), backend
    row, keep, tail = rows[0]
    alone = torch.tensor(row).reshape(1, -1)
    for backend in BACKENDS:  # the row alone, its counts given on the host
        got = select_tokens(alone, keep, **settings, recent=tail, backend=backend)
        assert torch.equal(got[0], expected[0, num_keep - keep :] - (width - len(row))), backend


@pytest.mark.parametrize("tokens", [5000, 131072])
def test_select_long_rows(tokens):
    scores = torch.randn(2, tokens).bfloat16().float()  # rounded: thousands of ties
    for settings in (
        {"num_keep": tokens * 4 // 5, "sink": 4, "recent": tokens // 10},
        {"num_keep": tokens // 8 * 5, "sink": 4, "block_size": 8},
        {"num_keep": tokens // 2, "pooling": 7},
    ):
        expected = select_tokens(scores, **settings, backend="reference")
        assert torch.equal(select_tokens(scores, **settings, backend="cpu"), expected)
        assert expected.diff(dim=-1).min() >= 1


# ----------------------------------------------------------------------------------------------------------- gather


@backends
@pytest.mark.parametrize(
    "dtype", [*DTYPES, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64]
)
def test_gather(backend, dtype):
    def make(*shape):
        return (torch.randn(shape) * 50).to(dtype)

    indices = torch.tensor([[0, 3, 4, 11], [-1, -1, 5, 6]])
    kv = make(2, 12, 3, 5).transpose(1, 2)  # [B, heads, N, D] as attention leaves it
    tensors = [
        make(2, 12, 7),
        make(2, 12),
        kv,
        make(1, 12, 4).expand(2, -1, -1),  # position embeddings shared by the batch
        make(2, 24, 6)[:, ::2, 1::2],
        make(2, 7, 12).transpose(1, 2),
        make(2, 12, 0),
    ]
    gathered = gather_tokens(tensors, indices, backend=backend)
    for tensor, got in zip(tensors, gathered, strict=True):
        tokens_first = tensor.transpose(1, 2) if tensor.dim() == 4 else tensor
        rows = [
            torch.stack([torch.zeros_like(tokens_first[b, 0]) if i < 0 else tokens_first[b, i] for i in row.tolist()])
            for b, row in enumerate(indices)
        ]
        expected = torch.stack(rows)
        expected = expected.transpose(1, 2) if tensor.dim() == 4 else expected
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert torch.equal(got, expected)


@backends
def test_gather_nothing(backend):
    assert gather_tokens([], torch.tensor([[0]]), backend=backend) == []
    assert gather_tokens([torch.ones(1, 3, 2)], torch.empty(1, 0, dtype=torch.int64), backend=backend)[0].shape == (
        1,
        0,
        2,
    )


# ------------------------------------------------------------------------------------------------------------ prune


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("budget", ["global", "block"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("averaged", [False, True])
def test_prune_equals_the_composition(backend, dtype, budget, padded, averaged):
    tokens, batch = 600, 3
    schedule = PruningSchedule((1,), 0.8, budget=budget, block_size=128)
    hidden_states, weights = pruner_inputs(tokens, 64, 16, dtype, batch)
    tensors = [torch.randn(1, tokens, 8).expand(batch, -1, -1), torch.arange(tokens).expand(batch, -1)]
    mean, bias = torch.randn(2, batch, tokens)
    lengths = torch.tensor([600, 390, 40]) if padded else torch.tensor([600] * batch)
    plan, rows = schedule.plan(tokens, 1, padded=padded), schedule.plan_rows(lengths, 1)
    selection = {
        "sink": plan.sink,
        "recent": plan.recent,
        "block_size": plan.block_size,
        "rows": rows if padded else None,
        "pooling": 5,
        "backend": backend,
    }
    scoring = {"rms_eps": 1e-6, **({"mean_score": mean, "num_scores": 2} if averaged else {})}
    got = prune_tokens(
        hidden_states, tensors, *weights, plan.num_keep, score_bias=bias, **scoring, **selection,
        num_dropped=tokens - plan.num_keep + 5,
    )  # fmt: skip
    scores = score_tokens(hidden_states, *weights, score_bias=bias, **scoring, backend=backend)
    indices = select_tokens(scores, plan.num_keep, **selection)
    means = score_tokens(hidden_states, *weights, **scoring, backend=backend)
    for row, tail in enumerate(rows[:, 2].tolist()):
        means[row, tokens - tail :] = mean[row, tokens - tail :] if averaged else 0
    expected = gather_tokens([hidden_states, *tensors, means], indices, backend=backend)
    assert torch.equal(got.indices, indices)
    for a, b in zip([got.hidden_states, *got.tensors, got.mean_score], expected, strict=True):
        assert torch.equal(a, b)
    for row, length in enumerate(lengths.tolist()):
        dropped = sorted(set(range(tokens - length, tokens)) - set(indices[row].tolist()))
        width = tokens - plan.num_keep + 5
        assert got.dropped[row].tolist() == [-1] * (width - len(dropped)) + dropped
    if padded:
        assert (got.indices >= 0).sum(-1).tolist() == [schedule.num_keep(n, 1) for n in lengths.tolist()]


@backends
def test_nobody_asks_for_the_dropped_tokens(backend):
    hidden_states, weights = pruner_inputs(30)
    assert prune_tokens(hidden_states, [], *weights, 20, backend=backend).dropped.shape == (1, 0)
    all_kept = prune_tokens(hidden_states, [], *weights, 30, num_dropped=2, backend=backend)
    assert all_kept.dropped.tolist() == [[-1, -1]]


# ------------------------------------------------------------------------------------------------- window attention

WINDOW_TOLERANCE = 1e-5  # relative to the highest result


def window_inputs(
    keys=300, window=5, heads=6, key_heads=2, head_dim=24, dtype=torch.float32, padding=(0, 7), requires_grad=False
):
    """Query, key, query_index, key_index: the last tokens of left-padded texts, of which some dropped."""
    batch = len(padding)
    query = torch.randn(batch, heads, window, head_dim).to(dtype).requires_grad_(requires_grad)
    key = (2 * torch.randn(batch, key_heads, keys, head_dim)).to(dtype).requires_grad_(requires_grad)
    key_index = torch.randint(1, 4, (batch, keys)).cumsum(-1)
    key_index = (key_index - key_index.gather(1, torch.tensor(padding).unsqueeze(-1))).clamp(min=-1)
    query_index = torch.nn.functional.pad(key_index, (max(window - keys, 0), 0), value=-1)[:, -window:]
    return query, key, query_index, key_index


def naive_window(query, key, query_index, key_index, scaling, pooling):
    (batch, heads, window, _), keys = query.shape, key.shape[2]
    result = torch.zeros(batch, keys, dtype=torch.double)
    for row in range(batch):
        for head in range(heads):
            sums = torch.zeros(keys, dtype=torch.double)
            for i in range(window):
                seen = (key_index[row] >= 0) & (key_index[row] <= query_index[row, i])
                if seen.any():
                    logits = key[row, head * key.shape[1] // heads].double() @ query[row, head, i].double()
                    sums[seen] += (scaling * logits[seen]).softmax(0)
            for j in range(keys):
                result[row, j] += sums[max(j - pooling // 2, 0) : j + pooling // 2 + 1].max() / heads
    return result


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", [1, 7])
@pytest.mark.parametrize(
    "shape",
    [
        {"keys": 1, "window": 1, "padding": (0,)},
        {"keys": 600, "window": 8, "heads": 9, "key_heads": 3, "head_dim": 64},
        {"keys": 257, "window": 32, "heads": 4, "key_heads": 4, "padding": (250, 256)},
        {"keys": 5, "window": 9, "padding": (0, 3)},
        {"keys": 300, "window": 1, "heads": 3, "key_heads": 1, "head_dim": 7},
        {"keys": 256, "window": 3, "heads": 1, "key_heads": 1, "padding": (0, 100, 200)},
    ],
)
def test_window_attention(backend, dtype, pooling, shape):
    inputs = window_inputs(**shape, dtype=dtype)
    expected = naive_window(*inputs, 0.25, pooling)
    got = window_attention(*inputs, scaling=0.25, pooling=pooling, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=WINDOW_TOLERANCE * expected.max().item(), rtol=0)


@backends
def test_window_attention_of_steep_logits(backend):
    """Keys far below the best of their neighbours, or of the row, and logits whose powers no float holds."""
    query, key, *rest = window_inputs(keys=600, head_dim=8)
    key[:, :, 100] *= 300
    key[:, :, 400:] *= 30
    expected = naive_window(query, key, *rest, 1.0, 1)
    got = window_attention(query, key, *rest, scaling=1.0, backend=backend)
    torch.testing.assert_close(got.double(), expected, atol=1e-4 * expected.max().item(), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_attention_does_not_depend_on_the_company(dtype):
    """On a CPU, bit for bit: not on rows, padding and what stands in it, nor on threads."""
    length, lengths = 700, (700, 513, 3, 1, 256, 300)
    inputs = window_inputs(length, window=8, dtype=dtype, padding=[length - n for n in lengths])
    for row, n in enumerate(lengths):
        inputs[1][row, :, : length - n] = torch.nan
        inputs[0][row, :, : max(8 - n, 0)] = torch.nan
    together = window_attention(*inputs, scaling=0.3, pooling=7)
    for row, n in enumerate(lengths):
        query, key, query_index, key_index = (t[row : row + 1] for t in inputs)
        window = min(8, n)
        own = (query[:, :, 8 - window :], key[:, :, length - n :])
        own += (query_index[:, 8 - window :], key_index[:, length - n :])
        alone = window_attention(*own, scaling=0.3, pooling=7, backend="cpu")
        assert torch.equal(alone[0], together[row, length - n :])
        # Padding takes part in nothing but the pooling of its neighbours.
        assert together[row, : max(length - n - 3, 0)].eq(0).all()
    threads = torch.get_num_threads()
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            assert torch.equal(window_attention(*inputs, scaling=0.3, pooling=7), together)
    finally:
        torch.set_num_threads(threads)


@backends
def test_window_attention_of_queries_without_a_say(backend):
    """No key to see: as if they were not there, whatever stands in them."""
    query, key, query_index, key_index = window_inputs(keys=70, window=4)
    query_index[0, 1] = -1
    query_index[:, 2] = -1
    query[:, :, 2] = torch.nan
    for index in (query_index, torch.full_like(query_index, -1)):
        inputs = (query, key, index, key_index)
        got = window_attention(*inputs, scaling=0.3, pooling=3, backend=backend)
        torch.testing.assert_close(got.double(), naive_window(*inputs, 0.3, 3), atol=1e-5, rtol=0)


def rotary(*shape, dtype=torch.float32):
    angles = torch.rand((*shape[:-1], shape[-1] // 2)).repeat(1, 1, 2) * 7
    return angles.cos().to(dtype), angles.sin().to(dtype)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_window_attention_rotates_queries(backend, dtype, batch):
    """As transformers does, with angles for each row or for all."""
    from transformers.models.qwen2.modeling_qwen2 import rotate_half

    query, *rest = window_inputs(dtype=dtype)
    cos, sin = rotary(batch, 5, 24, dtype=dtype)
    rotated = query * cos[:, None] + rotate_half(query) * sin[:, None]
    expected = window_attention(rotated, *rest, scaling=0.3, backend="reference")
    got = window_attention(query, *rest, cos=cos, sin=sin, scaling=0.3, backend=backend)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got, expected, atol=tolerance * expected.max().item(), rtol=0)


@backends
def test_window_attention_of_nothing(backend):
    query, key, query_index, key_index = window_inputs(keys=70)
    for window, keys in ((0, 70), (5, 0), (0, 0)):
        inputs = (query[:, :, :window], key[:, :, :keys], query_index[:, :window], key_index[:, :keys])
        got = window_attention(*inputs, scaling=0.3, pooling=7, backend=backend)
        assert torch.equal(got, torch.zeros(2, keys))


@backends
def test_window_attention_layouts_and_nan(backend):
    def same(*tensors):
        got = window_attention(*tensors, scaling=0.3, pooling=7, backend=backend)
        return torch.equal(got, expected) if backend == "cpu" else torch.allclose(got, expected, atol=1e-6)

    query, key, query_index, key_index = inputs = window_inputs(padding=(0, 0))
    expected = window_attention(*inputs, scaling=0.3, pooling=7, backend=backend)
    cache = torch.full((2, 2, 500, 24), torch.nan)
    cache[:, :, :300] = key
    strided = torch.full((2, 6, 5, 48), torch.nan)[..., ::2].copy_(query)
    by_token = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert same(query, cache[:, :, :300], query_index, key_index)
    assert same(strided, key.transpose(2, 3).contiguous().transpose(2, 3), query_index, key_index)
    assert same(by_token, key, *(t.t().contiguous().t() for t in inputs[2:]))
    for spoilt in (query[1, 2, 3], key[1, 0, 40]):
        right = spoilt.clone()
        spoilt.fill_(torch.nan)
        got = window_attention(*inputs, scaling=0.3, pooling=7, backend=backend)
        assert got[1].isnan().all()
        assert torch.equal(got[0], expected[0])
        spoilt.copy_(right)


def test_window_attention_compiles_for_all_lengths():
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(window_attention, fullgraph=True, dynamic=True, backend=graphs)
    for keys in (300, 257, 40):
        inputs = window_inputs(keys)
        got, expected = (function(*inputs, scaling=0.3, pooling=7) for function in (compiled, window_attention))
        torch.testing.assert_close(got, expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 5, 24)}, r"query: expected \[B, H, w, d\]"),
        ({"query": torch.ones(2, 6, 5, 24, dtype=torch.int32)}, "of a floating dtype"),
        ({"key": torch.ones(2, 2, 300, 23)}, r"key: expected \[2, KV, n, 24\]"),
        ({"key": torch.ones(2, 2, 300, 24, dtype=torch.bfloat16)}, "in the dtype of query, torch.float32"),
        ({"key": torch.ones(2, 4, 300, 24)}, "got 4 heads, expected a divisor of the 6"),
        ({"query_index": torch.ones(2, 4, dtype=torch.int64)}, r"query_index: expected \[2, 5\] torch.int64"),
        ({"key_index": torch.ones(1, 300, dtype=torch.int64)}, r"key_index: expected \[2, 300\]"),
        ({"cos": torch.ones(2, 5, 24)}, "cos and sin: expected both"),
        (
            {"cos": torch.ones(2, 4, 24), "sin": torch.ones(2, 5, 24)},
            r"cos: expected \[2, 5, 24\], or a first dimension",
        ),
        ({"cos": torch.ones(1, 5, 24), "sin": torch.ones(1, 5, 24).double()}, "sin: .* in the dtype of query"),
        ({"pooling": 2}, "an odd number of tokens"),
    ],
)
def test_bad_arguments_of_window_attention(change, message):
    names = ("query", "key", "query_index", "key_index")
    arguments = {**dict(zip(names, window_inputs(), strict=True)), "scaling": 0.3, **change}
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)


# -------------------------------------------------------------------------------- what a score owes to the prompt's end


def prompt_inputs(lengths=(300, 300), keep_last=0, dtype=torch.float32):
    """Arguments of prompt_bias for left-padded prompts, of which some tokens dropped."""
    batch, width = len(lengths), max(lengths)
    _, key, _, token_index = window_inputs(width, padding=[width - n for n in lengths], dtype=dtype)
    cos, sin = rotary(batch, width, 24, dtype=dtype)
    return {
        "token_index": token_index, "distance_table": torch.randn(250), "keep_last": keep_last,
        "attention_weight": 0.7, "query": torch.randn(batch, 6, 5, 24).to(dtype), "key": key, "cos": cos, "sin": sin,
        "scaling": 0.3, "pooling": 3,
    }  # fmt: skip


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep_last", [0, 7])
def test_prompt_bias(backend, dtype, keep_last):
    """By hand: a distance, and logarithms of the attention standardised over valid tokens."""
    inputs = prompt_inputs((300, 211), keep_last, dtype)
    index = inputs["token_index"]
    end = 300 - keep_last
    last = slice(end - 5, end)
    attention = window_attention(
        inputs["query"], inputs["key"], index[:, last], index, cos=inputs["cos"][:, last], sin=inputs["sin"][:, last],
        scaling=0.3, pooling=3, backend=backend,
    )  # fmt: skip
    expected = torch.zeros(2, 300, dtype=torch.double)
    for row in range(2):
        valid = (index[row] >= 0) & (torch.arange(300) < end)
        logs = (attention[row, valid].double() + 1e-9).log()
        distance = index[row, end - 1] - index[row, valid]
        expected[row, valid] += inputs["distance_table"][distance.clamp(max=249)]
        expected[row, valid] += 0.7 * (logs - logs.mean()) / logs.std(correction=0)
    got = prompt_bias(**inputs, backend=backend)
    torch.testing.assert_close(got.double(), expected, atol=2e-4, rtol=1e-4)
    given = {name: value for name, value in inputs.items() if name not in ("query", "key", "cos", "sin")}
    given = prompt_bias(**given, attention=attention, backend=backend)
    torch.testing.assert_close(given, got, atol=1e-5, rtol=1e-5)


@backends
@pytest.mark.parametrize("terms", ["attention", "distance"])
def test_prompt_bias_by_a_table_of_each_row(backend, terms):
    inputs = prompt_inputs((300, 211), 7)
    if terms == "distance":
        inputs = {name: inputs[name] for name in ("token_index", "keep_last")}
    tables = torch.randn(2, 250)
    got = prompt_bias(**inputs | {"distance_table": tables}, backend=backend)
    for row in range(2):
        expected = prompt_bias(**inputs | {"distance_table": tables[row]}, backend=backend)
        assert torch.equal(got[row], expected[row])


@backends
def test_prompt_bias_of_nothing(backend):
    index = torch.arange(300).repeat(2, 1)
    for keep_last in (0, 300):  # all of it may stand after the prompt
        assert not prompt_bias(index, torch.zeros(1), keep_last=keep_last, backend=backend).any()
    assert not prompt_bias(index, torch.ones(1), keep_last=300, backend=backend).any()
    assert prompt_bias(index[:, :0], torch.ones(1), backend=backend).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_bias_does_not_depend_on_the_company(dtype):
    """On a CPU, bit for bit: not on rows, nor on padding and what stands in it."""
    lengths = (300, 211, 9)
    inputs = prompt_inputs(lengths, 2, dtype)
    for row, n in enumerate(lengths):
        inputs["key"][row, :, : 300 - n] = torch.nan
    together = prompt_bias(**inputs)
    for row, n in enumerate(lengths):
        own = {}
        for name, value in inputs.items():
            is_by_row = isinstance(value, torch.Tensor) and value.dim() > 1
            own[name] = value[row : row + 1] if is_by_row else value
        for name in ("token_index", "cos", "sin"):
            own[name] = own[name][:, 300 - n :]
        own["key"] = own["key"][:, :, 300 - n :]
        assert torch.equal(prompt_bias(**own, backend="cpu")[0], together[row, 300 - n :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_index": torch.ones(2, 300)}, r"token_index: expected \[B, N\] torch.int64"),
        ({"keep_last": 301}, "keep_last=301: expected 0 to 300"),
        ({"distance_table": torch.ones(0)}, "distance_table: .* at least one entry"),
        ({"distance_table": torch.ones(3, 9)}, r"distance_table: expected \[M\] or \[2, M\]"),
        ({"distance_table": torch.ones(())}, "distance_table: .* at least one entry"),
        ({"attention": torch.ones(2, 300).double()}, r"attention: expected \[2, 300\] torch.float32"),
        ({"attention": torch.ones(2, 300)}, "no attention, which it is there to compute"),
        ({"key": None}, "query: expected a key with it"),
        ({"key": torch.ones(2, 3, 299, 24)}, "query, key: expected at most the prompt's 300 tokens and all 300"),
        ({"keep_last": 296}, "at most the prompt's 4 tokens"),
        ({"cos": torch.ones(2, 5, 24)}, r"cos: expected \[2, 300, 24\]"),
        ({"pooling": 2}, "an odd number of tokens"),
    ],
)
def test_bad_arguments_of_prompt_bias(change, message):
    with pytest.raises(ValueError, match=message):
        prompt_bias(**{**prompt_inputs(), **change})


# --------------------------------------------------------------------------------------- tracing, gradients, no sync


def test_a_profile_names_the_op():
    """And with it the NVTX ranges, which torch's profiler makes of the same names."""
    hidden_states, pruner = pruner_inputs(40)
    with torch.profiler.profile() as profile:
        prune_tokens(hidden_states, [], *pruner, 20)
    assert "sdtp::prune_tokens" in {event.key for event in profile.key_averages()}


def op_inputs(requires_grad=False):
    hidden_states, weights = pruner_inputs(40, batch=2)
    hidden_states.requires_grad_(requires_grad)
    other = torch.randn(2, 2, 40, 3, requires_grad=requires_grad)
    rows = torch.tensor([[40, 20, 4], [30, 16, 3]])
    selection = (20, 2, 4, None, rows, 3)
    indices = torch.tensor([[0, 2, 39], [-1, 4, 9]])
    trained = tuple(w.clone().requires_grad_(requires_grad) for w in weights)
    mean, bias = torch.randn(2, 2, 40)
    return {
        "score_tokens": (
            hidden_states,
            *trained,
            mean.clone().requires_grad_(requires_grad),
            2,
            bias.clone().requires_grad_(requires_grad),
            1e-6,
        ),
        "select_tokens": (torch.randn(2, 40), *selection),
        "gather_tokens": ([hidden_states, other, torch.arange(80).view(2, 40)], indices),
        "prune_tokens": (hidden_states, [other], *weights, mean, 2, bias, 1e-6, *selection, 22),
        "window_attention": (*window_inputs(requires_grad=requires_grad), *rotary(2, 5, 24), 0.3, 7),
        "prompt_bias": (
            torch.arange(40).repeat(2, 1),
            torch.randn(9),
            3,
            None,
            0.5,
            torch.randn(2, 6, 5, 8, requires_grad=requires_grad),
            torch.randn(2, 3, 40, 8),
            *rotary(1, 40, 8),
            0.3,
            7,
        ),
    }


@backends
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, requires_grad, backend):
    op = getattr(torch.ops.sdtp, name).default
    torch.library.opcheck(op, (*op_inputs(requires_grad)[name], backend))


@pytest.mark.parametrize("name", OPS)
def test_fake_layouts_are_the_real_ones(name):
    """opcheck compares sizes and dtypes; strides matter to compiled code just as much."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, inputs = getattr(torch.ops.sdtp, name), op_inputs()[name]
    with FakeTensorMode() as mode:
        fake = op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs), "auto")
    for backend in BACKENDS:
        real = op(*inputs, backend)
        for a, b in zip(torch.utils._pytree.tree_leaves(fake), torch.utils._pytree.tree_leaves(real), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_gradients_of_score():
    inputs = [
        t.double().detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in op_inputs()["score_tokens"]
    ]
    for place in (5, 7):
        inputs[place] = inputs[place].float().detach().requires_grad_()
    trained, grad = [t for t in inputs if isinstance(t, torch.Tensor)], torch.randn(2, 40)
    got = torch.autograd.grad(torch.ops.sdtp.score_tokens(*inputs, "auto"), trained, grad)
    x, w1, b1, w2, b2, mean, _, bias, eps = inputs
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    scores = torch.nn.functional.gelu(normed @ w1.T + b1) @ w2 + b2
    expected = torch.autograd.grad((2 * mean + scores) / 3 + bias, trained, grad.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, check_dtype=False)
    (only,) = torch.autograd.grad(torch.ops.sdtp.score_tokens(x.detach(), w1, *inputs[2:], "auto").sum(), [w2])
    assert only.shape == w2.shape


@backends
def test_gradients_of_gather(backend):
    tensors = [torch.randn(2, 9, 3, dtype=torch.double), torch.randn(2, 2, 9, 2, dtype=torch.double)]
    tensors = [t.requires_grad_() for t in tensors]
    indices = torch.tensor([[0, 4, 4, 8], [-1, 1, 2, 3]])
    assert torch.autograd.gradcheck(lambda *ts: gather_tokens(ts, indices, backend=backend), tensors)


@backends
def test_gradients_of_prune(backend):
    hidden_states, [other], *rest = op_inputs(requires_grad=True)["prune_tokens"]
    weights, selection = rest[:4], rest[8:14]
    keywords = dict(zip(("sink", "recent", "block_size", "rows", "pooling"), selection[1:], strict=True))
    pruned = prune_tokens(hidden_states, [other], *weights, selection[0], **keywords, backend=backend)
    weight = torch.randn_like(pruned.hidden_states)
    grads = torch.autograd.grad((pruned.hidden_states * weight).sum() + pruned.tensors[0].sum(), [hidden_states, other])
    expected = torch.zeros_like(hidden_states)
    for b, row in enumerate(pruned.indices.tolist()):
        for k, index in enumerate(row):
            if index >= 0:
                expected[b, index] += weight[b, k]
    assert torch.equal(grads[0], expected)
    kept = torch.zeros(2, 40).scatter_add(1, pruned.indices.clamp(min=0), (pruned.indices >= 0).float())
    assert torch.equal(grads[1], kept[:, None, :, None].expand_as(other))
    weights[2] = weights[2].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient for w2: .* TokenPruner.forward"):
        prune_tokens(hidden_states, [], *weights, 20, backend=backend)
    assert not pruned.mean_score.requires_grad


@backends
def test_window_attention_has_no_gradient(backend):
    inputs = window_inputs(requires_grad=True)
    assert not window_attention(*inputs, scaling=0.3, backend=backend).requires_grad


@backends
def test_prompt_bias_has_no_gradient(backend):
    inputs = prompt_inputs()
    inputs["query"].requires_grad_()
    assert not prompt_bias(**inputs, backend=backend).requires_grad


class NoHostSync(TorchDispatchMode):
    """Fails where a value travels to the host: what ``.item()``, ``.tolist()`` and boolean indexing come down to.

    Calls that `outside`, a part of a file's path, makes are not ours to judge.
    """

    SYNCS = frozenset({"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"})

    def __init__(self, outside="nothing"):
        super().__init__()
        self.outside = outside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in self.SYNCS:
            callers = [frame.filename for frame in traceback.extract_stack()]
            assert any(self.outside in name for name in callers), f"host sync: {func}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPS)
def test_no_host_sync(name):
    with NoHostSync():
        getattr(torch.ops.sdtp, name)(*op_inputs()[name], "reference")
        getattr(torch.ops.sdtp, name)(*op_inputs()[name], "cpu")
    with pytest.raises(AssertionError, match="host sync"), NoHostSync():
        torch.ones(1).item()


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.ones(3, 4)}, r"hidden_states: expected \[B, N, D\]"),
        ({"hidden_states": torch.ones(1, 30, 48, dtype=torch.int32)}, "of a floating dtype"),
        ({"w1": torch.ones(20, 47)}, r"w1: expected \[H, 48\]"),
        ({"w1": torch.ones(20, 48, dtype=torch.bfloat16)}, r"TokenPruner.weights\(dtype\)"),
        ({"b1": torch.ones(19)}, r"b1: expected \[20\]"),
        ({"w2": torch.ones(20, dtype=torch.bfloat16)}, r"w2: expected \[20\] torch.float32"),
        ({"b2": torch.ones(1)}, r"b2: expected \[\]"),
        ({"score_bias": torch.ones(1, 29)}, r"score_bias: expected \[1, 30\]"),
        ({"mean_score": torch.ones(1, 30).double(), "num_scores": 1}, r"mean_score: expected \[1, 30\] torch.float32"),
        ({"mean_score": torch.ones(1, 30)}, "num_scores=0: expected how many scores mean_score is the mean of"),
        ({"num_scores": 2}, "num_scores=2: expected how many scores"),
        ({"num_dropped": 14}, "num_dropped=14: expected 0 for none of them, or room for the 15 to 30 tokens"),
        ({"num_dropped": 31}, "num_dropped=31"),
        ({"num_keep": 31}, "expected 0 to 30"),
        ({"num_keep": 6, "recent": 4, "sink": 3}, "less than the 7 forced tokens"),
        ({"recent": 31}, "more than the 30 tokens"),
        ({"sink": -1}, "counts >= 0"),
        ({"block_size": 0}, "blocks of at least one token"),
        ({"block_size": 8}, "pass recent=6"),
        ({"block_size": 10, "num_keep": 20}, "plus a multiple of the 3 blocks"),
        ({"block_size": 10, "num_keep": 12, "sink": 4}, r"4 tokens a block, expected 5 \(forced\) to 10"),
        ({"pooling": 4}, "an odd number of tokens"),
        ({"pooling": -1}, "an odd number of tokens"),
        ({"rows": torch.ones(2, 3, dtype=torch.int64)}, r"rows: expected \[1, 3\]"),
        ({"tensors": [torch.ones(1, 29)]}, r"tensors\[0\]: expected the batch and tokens"),
        ({"tensors": [torch.ones(1, 2, 3, 30, 4)]}, r"tensors\[0\]"),
    ],
)
def test_bad_arguments_of_prune(change, message):
    hidden_states, weights = pruner_inputs(30)
    arguments = {"hidden_states": hidden_states, "tensors": [], **weights._asdict(), "num_keep": 15, **change}
    with pytest.raises(ValueError, match=message):
        prune_tokens(**arguments)


def test_bad_arguments_of_select_and_gather():
    with pytest.raises(ValueError, match=r"scores: expected \[B, N\] torch.float32"):
        select_tokens(torch.ones(1, 4, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match=r"indices: expected \[B, K\] torch.int64"):
        gather_tokens([], torch.ones(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="expand a shared batch dimension first"):
        gather_tokens([torch.ones(1, 4)], torch.zeros(2, 2, dtype=torch.int64))


def test_cpu_checks_values_that_it_can_read():
    scores = torch.randn(1, 10)
    for row in ([11, 5, 1], [10, 5, 6], [10, 8, -1], [4, 5, 1], [10, 3, 2]):
        with pytest.raises(RuntimeError, match="row"):
            select_tokens(scores, 6, sink=2, rows=torch.tensor([row]), backend="cpu")
    for index in (-2, 10):
        with pytest.raises(RuntimeError, match="indices"):
            gather_tokens([scores], torch.tensor([[index]]), backend="cpu")
    hidden_states, weights = pruner_inputs(10)
    with pytest.raises(RuntimeError, match="row 0: drops 5 tokens; num_dropped=4"):
        prune_tokens(hidden_states, [], *weights, 6, rows=torch.tensor([[10, 5, 1]]), num_dropped=4, backend="cpu")
