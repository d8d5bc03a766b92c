"""The presses of kvpress on a pruned model; run by ``test_kvpress.py`` in a process of its own."""

import pytest
import torch
from conftest import make_qwen2
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
from test_qwen2 import LAYERS, SCHEDULES, TOKENS, generate, prompt
from transformers import DynamicCache

from sdtp_eval.peers import pressed
from sdtp_kernels import TokenPruner, apply_sdtp

PRESSES = (ExpectedAttentionPress, KeyDiffPress, KnormPress, LagKVPress, SnapKVPress, StreamingLLMPress, TOVAPress)
RATIO = 0.4


@pytest.fixture(scope="module")
def model():
    return make_qwen2()


@pytest.fixture(params=["global", "block"])
def patched(request, model):
    torch.manual_seed(1)
    with apply_sdtp(model, {layer: TokenPruner(64) for layer in LAYERS}, SCHEDULES[request.param]) as handle:
        yield handle


def kept_by(handle):
    return [layer.tokens_out for layer in handle.report().layers]


@pytest.mark.parametrize("press", PRESSES)
@torch.no_grad()
def test_every_layer_is_shortened_from_what_the_stages_left(model, patched, press):
    with pressed(model, press(compression_ratio=RATIO)):
        output = generate(model, {"input_ids": prompt()}, return_dict_in_generate=True)
    lengths = [layer.keys.shape[2] - 7 for layer in output.cache.layers]  # the last token is not cached
    assert lengths == [int(n * (1 - RATIO)) for n in kept_by(patched)]
    assert output.sequences.shape[1] == TOKENS + 8


@pytest.mark.parametrize("press", PRESSES)
@torch.no_grad()
def test_keeping_all_changes_nothing(model, patched, press):
    expected = generate(model, {"input_ids": prompt()})
    with pressed(model, press(compression_ratio=0.0)):
        assert torch.equal(generate(model, {"input_ids": prompt()}), expected)


@torch.no_grad()
def test_equals_a_cache_shortened_by_hand(model, patched):
    """Keys with small norms are kept, the others cut out of a pruned cache without kvpress."""
    ids = torch.randperm(255)[None, :TOKENS] + 1  # no token twice: in layer 0 their keys have the same norm
    cache = DynamicCache(config=model.config)
    token = model(ids, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    for layer in cache.layers:
        count = int(layer.keys.shape[2] * (1 - RATIO))
        place = layer.keys.norm(dim=-1).argsort(dim=-1)[..., :count, None].expand(-1, -1, -1, 16)
        layer.keys, layer.values = layer.keys.gather(2, place), layer.values.gather(2, place)
    expected = []
    for step in range(6):
        position = torch.tensor([[TOKENS + step]])
        logits = model(token, position_ids=position, cache=cache, logits_to_keep=1).logits[:, -1]
        expected.append(logits)
        token = logits.argmax(-1, keepdim=True)
    with pressed(model, KnormPress(RATIO)):
        got = generate(model, {"input_ids": ids}, max_new_tokens=7, return_dict_in_generate=True, output_logits=True)
    # The press leaves keys in another order, and sums are rounded in that order.
    torch.testing.assert_close(torch.stack(got.logits[1:]), torch.stack(expected), atol=1e-4, rtol=0)


@torch.no_grad()
def test_compression_while_decoding(model, patched):
    """Bounded while tokens are generated; until the first compression the tokens are those without a press."""
    expected = generate(model, {"input_ids": prompt()}, max_new_tokens=20)
    press = DecodingPress(KnormPress(), compression_interval=6, target_size=40, hidden_states_buffer_size=0)
    with pressed(model, press):
        got = generate(model, {"input_ids": prompt()}, max_new_tokens=20, return_dict_in_generate=True)
    assert torch.equal(got.sequences[:, : TOKENS + 6], expected[:, : TOKENS + 6])
    lengths = [layer.keys.shape[2] for layer in got.cache.layers]
    assert max(lengths) <= 40 + 6
