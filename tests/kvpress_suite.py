"""The presses of kvpress on a pruned model; run by ``test_kvpress.py`` in a process of its own."""

import functools

import pytest
import torch
from helpers.requests import ARITHMETIC, PHASES, assert_same, generate, make_models, of_both_dtypes, prompts, schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress import (
    DecodingPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from test_attention_and_cache import make_pruners

from sdtp_eval.peers import pressed
from sdtp_kernels import apply_sdtp

WINDOW = 6
PRESSES = {
    "ExpectedAttention": ExpectedAttentionPress,
    "KeyDiff": KeyDiffPress,
    "Knorm": KnormPress,
    "LagKV": functools.partial(LagKVPress, lag_size=WINDOW),
    "SnapKV": functools.partial(SnapKVPress, window_size=WINDOW),
    "StreamingLLM": StreamingLLMPress,
    "TOVA": TOVAPress,
}
lengths = st.integers(70, 150)  # shorter ones leave less than a press wants to see
ratios = st.sampled_from([0.2, 0.4, 0.6])
of_every_press = pytest.mark.parametrize("press", PRESSES.values(), ids=PRESSES)


@pytest.fixture(scope="module")
def models():
    models = make_models()
    for model in models.values():
        with KnormPress(0.0)(model):  # leaves the rotary embedding where presses look for it
            pass
    return models


def compressed(press, attention, given, layer):
    """Keys and values that a press leaves, asked outside the model."""
    return press.compress(attention, given["hidden_states"], layer.keys, layer.values, None, given)


def with_small_norms(ratio, attention, given, layer):
    """What KnormPress leaves, without kvpress."""
    count = int(layer.keys.shape[2] * (1 - ratio))
    place = (-layer.keys.float().norm(dim=-1)).topk(count).indices[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
    return layer.keys.gather(2, place), layer.values.gather(2, place)


def read_by_hand(model, ids, cut, new_tokens):
    """Logits of each step, from a pruned cache that was cut after its prefill, and the lengths it was cut to."""
    calls = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda attention, _, given, __: calls.append((attention, {**given})), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    output = model(ids, use_cache=True, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    cache, logits = output.cache, [output.logits[:, -1].float()]
    for (attention, call), layer in zip(calls, cache.layers, strict=True):
        layer.keys, layer.values = cut(attention, call, layer)
    cut_to = [layer.keys.shape[2] for layer in cache.layers]
    for step in range(new_tokens - 1):
        position = torch.tensor([[ids.shape[1] + step]])
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(model(token, position_ids=position, cache=cache).logits[:, -1].float())
    return torch.stack(logits), cut_to


def assert_read_alike(model, tokens, schedule, press, cut):
    ids, asked = prompts([tokens])["input_ids"], {"max_new_tokens": 4, "output_logits": True}
    with ARITHMETIC[model.dtype](), apply_sdtp(model, make_pruners(32), schedule, later_turns=False) as handle:
        expected, cut_to = read_by_hand(model, ids, cut, 4)
        left = [layer.tokens_out for layer in handle.report().layers] or [tokens] * 5  # too short to be pruned
        assert cut_to == [int(n * (1 - press.compression_ratio)) for n in left]
        with pressed(model, press):
            got = generate(model, {"input_ids": ids}, **asked)
    assert [layer.keys.shape[2] - 3 for layer in got.cache.layers] == cut_to
    torch.testing.assert_close(torch.stack(got.logits), expected, atol=1e-5, rtol=0)


@of_every_press
@of_both_dtypes
@settings(max_examples=4, phases=PHASES)
@given(tokens=lengths, schedule=schedules, ratio=ratios)
@torch.no_grad()
def test_equals_a_cache_compressed_behind_the_prefill(models, press, dtype, tokens, schedule, ratio):
    """In every layer the press sees what the stages have left, and what follows sees what the press has left."""
    press = press(compression_ratio=ratio)
    assert_read_alike(models[dtype], tokens, schedule, press, functools.partial(compressed, press))


@of_both_dtypes
@settings(max_examples=8, phases=PHASES)
@given(tokens=lengths, schedule=schedules, ratio=ratios)
@torch.no_grad()
def test_equals_a_cache_cut_without_kvpress(models, dtype, tokens, schedule, ratio):
    assert_read_alike(models[dtype], tokens, schedule, KnormPress(ratio), functools.partial(with_small_norms, ratio))


@of_every_press
@of_both_dtypes
@settings(max_examples=3, phases=PHASES)
@given(tokens=lengths, schedule=schedules)
@torch.no_grad()
def test_keeping_all_changes_nothing(models, press, dtype, tokens, schedule):
    model, inputs = models[dtype], prompts([tokens])
    with ARITHMETIC[dtype](), apply_sdtp(model, make_pruners(32), schedule, later_turns=False):
        expected = generate(model, inputs)
        with pressed(model, press(compression_ratio=0.0)):
            assert_same(generate(model, inputs), expected, inputs["attention_mask"])


@of_both_dtypes
@settings(max_examples=4, phases=PHASES)
@given(tokens=lengths, schedule=schedules, interval=st.integers(2, 7), target=st.integers(10, 60))
@torch.no_grad()
def test_compression_while_decoding(models, dtype, tokens, schedule, interval, target):
    """Bounded while tokens are generated; until the first compression the tokens are those without a press."""
    model, inputs, new_tokens = models[dtype], prompts([tokens]), 16
    settings = {"compression_interval": interval, "target_size": target, "hidden_states_buffer_size": 0}
    with ARITHMETIC[dtype](), apply_sdtp(model, make_pruners(32), schedule, later_turns=False):
        expected = generate(model, inputs, max_new_tokens=new_tokens)
        with pressed(model, DecodingPress(KnormPress(), **settings)):
            got = generate(model, inputs, max_new_tokens=new_tokens)
    same = tokens + interval
    assert torch.equal(got.sequences[:, :same], expected.sequences[:, :same])
    lengths = [layer.keys.shape[2] - (new_tokens - 1) for layer in expected.cache.layers]
    for step in range(1, new_tokens):
        lengths = [n + 1 if step % interval else min(n + 1, target) for n in lengths]
    assert [layer.keys.shape[2] for layer in got.cache.layers] == lengths
