"""The pruner and its file format."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdtp_kernels import TokenPruner, load_pruners, save_pruners, score_tokens
from sdtp_kernels.pruner_file import FORMAT_VERSION


class Config:
    model_type, num_hidden_layers, hidden_size = "qwen2", 12, 24


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pruners.safetensors"
    save_pruners(
        {4: TokenPruner(24), 7: TokenPruner(24, 5)}, path, config=Config, training={"target": "none", "rows": [1, 2]}
    )
    return path


def rewrite(path, header=None, **changes):
    """Write the file again with some tensors replaced (or, where None, left out) and some header fields changed."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["sdtp"])
    tensors = {**load_file(path), **changes}
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, path, {"sdtp": json.dumps({**metadata, **(header or {})})}
    )


@pytest.mark.parametrize("rms_norm", [True, False])
def test_module_and_op_agree(rms_norm):
    pruner = TokenPruner(24, rms_norm=rms_norm)
    hidden_states = torch.randn(2, 9, 24) * 3
    scores = score_tokens(hidden_states, *pruner.weights(), rms_eps=pruner.rms_eps if rms_norm else None)
    torch.testing.assert_close(pruner(hidden_states), scores, atol=1e-5, rtol=1e-5)
    assert pruner(hidden_states[0, 0]).shape == ()
    assert all(not tensor.requires_grad for tensor in pruner.weights(torch.bfloat16))


def test_round_trip(path):
    stack = load_pruners(path)
    assert (sorted(stack), stack.header.model_type, stack.header.num_hidden_layers) == ([4, 7], "qwen2", 12)
    assert stack.header.training == {"target": "none", "rows": [1, 2]}
    assert stack[7].intermediate_size == 5
    again = path.with_name("again.safetensors")
    save_pruners(stack, again)
    assert again.read_bytes() == path.read_bytes()


def test_score_bias():
    pruner = TokenPruner(24, distance=True, attention=True)
    pruner.distance_bias.data.copy_(torch.arange(18.0) ** 2)
    distance = torch.tensor([[9, 7, 5, 1, 0, -1]])  # the last token stands behind the prompt, the first is padding
    attention = torch.tensor([[0.3, 0.1, 0.2, 0.0, 0.4, 0.9]])
    is_valid = torch.tensor([[False, True, True, True, True, False]])
    # Between the knots at 3 and 7 the function is linear in log2(1 + distance): 4 at 3, 9 at 7.
    expected = torch.tensor([9.0, 4 + 5 * (math.log2(6) - 2), 1.0, 0.0])
    torch.testing.assert_close(pruner.score_bias(distance, attention, is_valid)[0, 1:5], expected)
    pruner.attention_weight.data.fill_(2.0)
    logs = (attention[0, 1:5] + 1e-9).log()
    standardised = (logs - logs.mean()) / logs.std(correction=0)
    torch.testing.assert_close(pruner.score_bias(distance, attention, is_valid)[0, 1:5], expected + 2 * standardised)
    with pytest.raises(ValueError, match="pass `attention`"):
        pruner.score_bias(distance)


def test_two_logits_fold(path):
    keep, drop = torch.randn(2, 5), torch.randn(2)
    rewrite(path, **{"layers.7.w2": keep, "layers.7.b2": drop})
    pruner = load_pruners(path)[7]
    hidden_states = torch.randn(3, 24)
    x = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + pruner.rms_eps)
    logits = torch.nn.functional.gelu(x @ pruner.w1.T + pruner.b1) @ keep.T + drop
    torch.testing.assert_close(pruner(hidden_states), logits[:, 0] - logits[:, 1])


@pytest.mark.parametrize(
    ("header", "changes", "message"),
    [
        ({"format": "other"}, {}, "format 'other'"),
        (
            {"format_version": FORMAT_VERSION + 1},
            {},
            f"version {FORMAT_VERSION + 1}; .* up to version {FORMAT_VERSION}",
        ),
        ({"unknown": 1}, {}, "malformed header"),
        ({"layers": [4, 7, 10]}, {}, "lists layer 10, but layers.10.b1"),
        ({"layers": [4]}, {}, "does not list: layers.7.b1"),
        ({"hidden_size": 25}, {}, r"layer 4 has w1 \[6, 24\], expected \[6, 25\]"),
        ({"attention": True}, {}, "layers.4.attention_weight is missing"),
        ({}, {"layers.4.b1": None}, "layers.4.b1 is missing"),
        ({}, {"layers.7.w2": torch.ones(6)}, r"layer 7 has w2 \[6\], expected \[5\]"),
        ({}, {"layers.7.b1": torch.full((5,), torch.inf)}, "layer 7: b1 has NaN or infinite"),
    ],
)
def test_files_that_do_not_fit(path, header, changes, message):
    rewrite(path, header, **changes)
    with pytest.raises(ValueError, match=message):
        load_pruners(path)


@pytest.mark.parametrize("keep", [0, 7, 60, 300])
def test_truncated_files(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pruners(path)


def test_files_of_another_kind(path):
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="without the 'sdtp-pruners' header"):
        load_pruners(path)
    with pytest.raises(FileNotFoundError, match="no such pruner file"):
        load_pruners(path.with_name("nothing"))
    torch.save({"w": torch.ones(2)}, path)  # a pickle is never read
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pruners(path)


def test_refused_saves_write_nothing(tmp_path):
    bad = TokenPruner(24)
    bad.b2.data.fill_(torch.nan)
    for pruners, message in (
        ({}, "no pruners"),
        ({4: bad}, "layer 4: b2"),
        ({4: TokenPruner(24), 7: TokenPruner(24, rms_norm=False)}, "share"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pruners(pruners, tmp_path / "x")
    assert not list(tmp_path.iterdir())
