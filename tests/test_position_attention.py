"""``position_attention``: some tokens are queries, the whole prompt is keys, causal by position."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from sdtp_kernels import BackendUnavailableError, position_attention
from sdtp_kernels.backends import cpu

BACKENDS = ("reference", "cpu")
# Of values around 1. The reference computes in float32 and rounds once; torch's kernel also rounds the weights.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def make_inputs(lengths, keep=0.8, heads=6, key_heads=2, head_dim=24, room=0, dtype=torch.float32):
    """Query, key, value, num_visible, first_visible of left-padded rows, of which a share of the tokens is kept."""
    width = max(lengths)
    kept = [torch.randperm(length)[: max(round(keep * length), 1)].sort().values for length in lengths]
    num_queries = max(map(len, kept))
    num_visible = torch.zeros(len(lengths), num_queries, dtype=torch.int64)
    for row, (tokens, length) in enumerate(zip(kept, lengths, strict=True)):
        num_visible[row, num_queries - len(tokens) :] = tokens + (width - length) + 1
    # As a projection leaves it: [B, n, H, d] in memory.
    query = torch.randn(len(lengths), num_queries, heads, head_dim).to(dtype).transpose(1, 2)
    key = (2 * torch.randn(len(lengths), key_heads, width + room, head_dim)).to(dtype)
    value = torch.randn(len(lengths), key_heads, width + room, head_dim).to(dtype)
    return query, key, value, num_visible, width - torch.tensor(lengths)


def naive(query, key, value, num_visible, first_visible=None, scale=None):
    """The text of the contract, a query at a time."""
    output = torch.zeros(query.shape, dtype=torch.double)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for row in range(query.shape[0]):
        first = 0 if first_visible is None else first_visible[row].item()
        for head in range(query.shape[1]):
            shared = head * key.shape[1] // query.shape[1]
            for i, end in enumerate(num_visible[row].tolist()):
                if end > first:
                    logits = key[row, shared, first:end].double() @ query[row, head, i].double()
                    output[row, head, i] = (scale * logits).softmax(0) @ value[row, shared, first:end].double()
    return output


def assert_close(got, expected, dtype=None):
    tolerance = TOLERANCE[dtype or got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------------------------- results


@backends
@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (1,)},
        {"lengths": (70, 41), "heads": 9, "key_heads": 3, "head_dim": 64},
        {"lengths": (60,), "heads": 4, "key_heads": 4, "head_dim": 7},
        {"lengths": (50, 1, 30), "heads": 4, "key_heads": 1, "room": 40},
        {"lengths": (300,), "heads": 2, "key_heads": 1, "head_dim": 8, "keep": 1.0},  # more than a block of queries
    ],
)
def test_by_hand(backend, dtype, shape):
    inputs = make_inputs(**shape, dtype=dtype)
    got = position_attention(*inputs, scale=0.3, backend=backend)
    assert got.dtype == dtype
    assert got.shape == inputs[0].shape
    assert got.stride() == inputs[0].stride()
    assert_close(got, naive(*inputs, scale=0.3))


@dtypes
@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (1500,), "heads": 8, "key_heads": 2, "head_dim": 64},
        {"lengths": (900, 513, 3, 257), "keep": 0.5, "room": 200},
        {"lengths": (1100, 1000), "keep": 0.1, "heads": 3, "key_heads": 3, "head_dim": 40},
    ],
)
def test_long_prompts(dtype, shape):
    inputs = make_inputs(**shape, dtype=dtype)
    assert_close(position_attention(*inputs), position_attention(*inputs, backend="reference"))


@backends
@dtypes
def test_whole_prompts_are_plain_causal_attention(backend, dtype):
    query, key, value, num_visible, _ = make_inputs((700,), keep=1.0, heads=4, dtype=dtype)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert_close(position_attention(query, key, value, num_visible, backend=backend), expected)


@backends
@dtypes
def test_one_query(backend, dtype):
    query, key, value, _, first_visible = make_inputs((70, 50), dtype=dtype)
    query, num_visible = query[:, :, -1:], torch.tensor([[70], [61]])
    expected = torch.cat(
        [
            F.scaled_dot_product_attention(query[:1], key[:1], value[:1], enable_gqa=True),
            F.scaled_dot_product_attention(query[1:], key[1:, :, 20:61], value[1:, :, 20:61], enable_gqa=True),
        ]
    )
    assert_close(position_attention(query, key, value, num_visible, first_visible, backend=backend), expected)


@given(st.data())
@example(None)
def test_any_shape(data):
    def integer(low, high):
        return high if data is None else data.draw(st.integers(low, high))

    batch, key_heads, group, num_queries, num_keys = (integer(0, n) for n in (3, 2, 3, 300, 400))
    key_heads = max(key_heads, 1)
    query = torch.randn(batch, key_heads * group, num_queries, 1 + integer(0, 15))
    key, value = torch.randn(2, batch, key_heads, num_keys, query.shape[3])
    num_visible = torch.randint(num_keys + 1, (batch, num_queries))
    if integer(0, 1):
        num_visible = num_visible.sort(-1).values
    first_visible = torch.randint(num_keys + 1, (batch,)) if integer(0, 1) else None
    inputs = (query, key, value, num_visible, first_visible)
    expected = position_attention(*inputs, backend="reference")
    assert expected.isfinite().all()
    assert_close(position_attention(*inputs), expected)


@backends
def test_queries_that_see_no_key(backend):
    query, key, value, num_visible, _ = make_inputs((40, 40))
    first_visible = torch.tensor([0, 25])
    num_visible[0, :3] = 0
    num_visible[0, 7] = 0  # between others
    query[:, :, 1] = torch.nan  # padding may hold anything
    got = position_attention(query, key, value, num_visible, first_visible, backend=backend)
    sees = num_visible > first_visible[:, None]
    assert sees.any(-1).all()
    assert not sees.all(-1).any()
    assert got.transpose(1, 2)[~sees].eq(0).all()
    assert_close(got, naive(query, key, value, num_visible, first_visible))
    for none in (torch.zeros_like(num_visible), num_visible.clamp(max=25)):
        got = position_attention(query, key, value, none, torch.tensor([30, 30]), backend=backend)
        assert got.eq(0).all()


@backends
def test_counts_out_of_range(backend):
    query, key, value, num_visible, first_visible = make_inputs((40, 30))
    inside = num_visible.clone()
    inside[:, 2:5], inside[:, -3:] = 0, 40
    outside = inside.clone()
    outside[:, 2:5], outside[:, -3:] = -7, 2**40
    first_outside = torch.where(first_visible == 0, -3, first_visible)
    got = position_attention(query, key, value, outside, first_outside, backend=backend)
    expected = position_attention(query, key, value, inside, first_visible, backend=backend)
    assert torch.equal(got, expected)


@backends
@dtypes
def test_a_row_is_that_of_the_row_alone(backend, dtype):
    lengths = (700, 513, 3, 1, 256, 300)
    query, key, value, num_visible, first_visible = make_inputs(lengths, room=50, dtype=dtype)
    together = position_attention(query, key, value, num_visible, first_visible, backend=backend)
    for row, (length, first) in enumerate(zip(lengths, first_visible.tolist(), strict=True)):
        own = slice(num_visible[row].eq(0).sum().item(), None)
        cached = slice(first, first + length)
        alone = position_attention(
            query[row : row + 1, :, own], key[row : row + 1, :, cached], value[row : row + 1, :, cached],
            num_visible[row : row + 1, own] - first, backend=backend,
        )  # fmt: skip
        tolerance = {"atol": 1e-5, "rtol": 0} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
        torch.testing.assert_close(alone[0], together[row, :, own], **tolerance)
        assert together[row, :, : own.start].eq(0).all()


def test_a_block_reads_no_key_behind_its_queries(monkeypatch):
    """What the op is for: half the products of a causal prompt, and none of a static cache's room or of padding."""
    calls = []

    def spy(query, key, value, **settings):
        calls.append((query.shape[2], key.shape[2]))
        return attention(query, key, value, **settings)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    query, key, value, num_visible, first_visible = make_inputs((600, 300), keep=1.0, room=5000)
    position_attention(query, key, value, num_visible, first_visible, backend="cpu")
    assert cpu._BLOCK_QUERIES == 256
    assert calls == [(256, 600), (256, 344), (88, 88), (256, 300), (44, 44)]


@backends
def test_layouts(backend):
    query, key, value, num_visible, first_visible = inputs = make_inputs((300, 200))
    expected = position_attention(*inputs, backend=backend)
    spread = torch.full((*key.shape[:3], 2 * key.shape[3]), torch.nan)[..., ::2].copy_(key)
    by_token = value.transpose(1, 2).contiguous().transpose(1, 2)
    counts = num_visible.t().contiguous().t()
    got = position_attention(query.contiguous(), spread, by_token, counts, first_visible, backend=backend)
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    shared = (key[:1].expand(2, -1, -1, -1), value[:1].expand(2, -1, -1, -1))
    whole = tuple(t.contiguous() for t in shared)
    got, expected = (position_attention(query, *kv, *inputs[3:], backend=backend) for kv in (shared, whole))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


# --------------------------------------------------------------------------------------------- tracing and gradients


def op_inputs(requires_grad=False):
    query, key, value, *counts = make_inputs((40, 30), room=3)
    return *(t.requires_grad_(requires_grad) for t in (query, key, value)), *counts


@backends
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(backend, requires_grad):
    op = torch.ops.sdtp.position_attention.default
    torch.library.opcheck(op, (*op_inputs(requires_grad), 0.3, backend))
    torch.library.opcheck(op, (*op_inputs(requires_grad)[:4], None, None, backend))


@backends
@pytest.mark.parametrize("is_by_token", [False, True])
def test_fake_layouts_are_the_real_ones(backend, is_by_token):
    from torch._subclasses.fake_tensor import FakeTensorMode

    query, *others = op_inputs()
    query = query if is_by_token else query.contiguous()
    with FakeTensorMode() as mode:
        fake = torch.ops.sdtp.position_attention(*map(mode.from_tensor, (query, *others)), None, "auto")
    real = position_attention(query, *others, backend=backend)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@backends
def test_compiles_for_all_lengths(backend):
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(position_attention, fullgraph=True, dynamic=True, backend=graphs)
    for length in (300, 257, 40):
        inputs = make_inputs((length, length - 9))
        torch.testing.assert_close(compiled(*inputs, backend=backend), position_attention(*inputs, backend=backend))
    assert graphs.frame_count == 1


@backends
@pytest.mark.parametrize("scale", [None, 0.3])
def test_gradients(backend, scale):
    query, key, value, num_visible, first_visible = make_inputs((40, 30), room=3)
    num_visible[0, :2] = 0
    tensors = [t.requires_grad_() for t in (query, key, value)]
    grad = torch.randn_like(query)
    got = torch.autograd.grad(
        position_attention(*tensors, num_visible, first_visible, scale=scale, backend=backend), tensors, grad
    )
    column = torch.arange(key.shape[2])
    mask = (column < num_visible[..., None]) & (column >= first_visible[:, None, None])
    wide = [t.detach().double().requires_grad_() for t in tensors]
    dense = F.scaled_dot_product_attention(*wide, attn_mask=mask[:, None], scale=scale, enable_gqa=True)
    sees = mask.any(-1)[:, None, :, None]
    expected = torch.autograd.grad(dense.where(sees, 0), wide, grad.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)
    (only,) = torch.autograd.grad(
        position_attention(query.detach(), key, value.detach(), num_visible, backend=backend).sum(), [key]
    )
    assert only.isfinite().all()


def test_gradcheck():
    query, key, value, *counts = make_inputs((4, 3), heads=2, key_heads=1, head_dim=2)
    tensors = [t.double().requires_grad_() for t in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *t: position_attention(*t, *counts), tensors)


def test_no_host_sync():
    """Of the reference, which GPUs run; on a CPU there is nothing to wait for."""
    from test_ops import NoHostSync

    with NoHostSync():
        position_attention(*op_inputs(), backend="reference")


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 32, 24)}, r"query: expected \[B, H, n, d\] of a floating dtype, got \[2, 32, 24\]"),
        ({"query": torch.ones(2, 6, 32, 24, dtype=torch.int32)}, "of a floating dtype, got .* torch.int32"),
        ({"key": torch.ones(2, 2, 40, 23)}, r"key: expected \[2, KV, N, 24\]"),
        ({"key": torch.ones(2, 2, 40, 24).half()}, "in the dtype of query, torch.float32, got .* torch.float16"),
        ({"key": torch.ones(2, 4, 40, 24)}, "got 4 heads, expected a divisor of the 6 heads of query"),
        ({"key": torch.ones(2, 0, 40, 24)}, "got 0 heads, expected a divisor"),
        ({"value": torch.ones(2, 2, 41, 24)}, r"value: expected the shape and dtype of key, \[2, 2, 40, 24\]"),
        ({"value": torch.ones(2, 2, 40, 24).half()}, "value: expected the shape and dtype of key, .* torch.float32"),
        ({"num_visible": torch.ones(2, 31, dtype=torch.int64)}, r"num_visible: expected \[2, 32\] torch.int64"),
        ({"num_visible": torch.ones(2, 32)}, "num_visible: expected .* torch.int64, got .* torch.float32"),
        ({"first_visible": torch.ones(1, dtype=torch.int64)}, r"first_visible: expected \[2\] torch.int64"),
        ({"first_visible": torch.ones(2, dtype=torch.int32)}, "first_visible: expected .* got .* torch.int32"),
        ({"backend": "flash"}, "backend='flash' does not exist; known: auto, cpu"),
    ],
)
def test_bad_arguments(change, message):
    names = ("query", "key", "value", "num_visible", "first_visible")
    with pytest.raises(ValueError, match=message):
        position_attention(**{**dict(zip(names, make_inputs((40, 30)), strict=True)), **change})


def test_a_named_backend_never_falls_back():
    inputs = [t.double() if t.is_floating_point() else t for t in make_inputs((20,))]
    assert position_attention(*inputs).dtype == torch.double  # auto: the reference takes float64
    for name in ("cpu", "triton", "cuda"):
        with pytest.raises(BackendUnavailableError, match=rf"(?s)'{name}' cannot run .*reference: can run"):
            position_attention(*inputs, backend=name)
