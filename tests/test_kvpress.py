"""Cache compression on top of pruning: kvpress itself in a process of its own, a stand-in everywhere."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.requests import ARITHMETIC, PHASES, make_models, of_both_dtypes, prompts, schedules
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_and_cache import make_pruners

from sdtp_kernels import apply_sdtp

TESTS = Path(__file__).parent
KVPRESS = Path(sys.prefix) / "kvpress"  # see the Makefile


@pytest.mark.slow
def test_presses():
    if not KVPRESS.is_dir():
        pytest.skip(f"kvpress is not in {KVPRESS}: 'make test' puts it there where it can be had")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(KVPRESS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", TESTS / "kvpress_suite.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.fixture(scope="module")
def models():
    return make_models()


@of_both_dtypes
@settings(max_examples=12, phases=PHASES)
@given(tokens=st.integers(2, 150), batch=st.integers(1, 2), schedule=schedules, share=st.sampled_from([0.3, 0.5, 1]))
@torch.no_grad()
def test_a_press_cuts_what_the_stages_left(models, dtype, tokens, batch, schedule, share):
    """What cutting by hand gives. With a press sdpa gets a mask, and rounds otherwise: bfloat16 once, from double."""
    model, ids = models[dtype], prompts([tokens] * batch)["input_ids"]
    peers = pytest.importorskip("sdtp_eval.peers", reason="python/ is not installed")

    def shortened(length):
        return max(1, round(length * share))

    @contextlib.contextmanager
    def keep_first(model):
        def cut(attention, args, kwargs, output):
            layer, length = kwargs["past_key_values"].layers[attention.layer_idx], kwargs["hidden_states"].shape[1]
            assert kwargs["cache_position"].tolist() == list(range(layer.keys.shape[2]))[-length:]
            if length > 1:
                layer.keys, layer.values = (t[:, :, : shortened(length)] for t in (layer.keys, layer.values))

        with contextlib.ExitStack() as hooks:
            for layer in model.model.layers:
                hooks.callback(layer.self_attn.register_forward_hook(cut, with_kwargs=True).remove)
            yield

    with ARITHMETIC[dtype](), apply_sdtp(model, make_pruners(32), schedule, later_turns=False):
        with peers.pressed(model, keep_first):
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        # By hand: the pruned cache, cut, and one token at its original position.
        cache = model(ids, use_cache=True, logits_to_keep=1).cache
        kept = [shortened(layer.keys.shape[2]) for layer in cache.layers]
        assert [layer.keys.shape[2] - 3 for layer in output.cache.layers] == kept
        for layer, length in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        token, position = output.sequences[:, tokens : tokens + 1], torch.tensor([[tokens]])
        expected = model(token, position_ids=position, cache=cache).logits[:, -1]
    torch.testing.assert_close(output.logits[1], expected.float(), atol=1e-5, rtol=0)
