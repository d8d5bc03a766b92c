"""Cache compression on top of pruning: kvpress itself in a process of its own, a stand-in everywhere."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_qwen2 import LAYERS, SCHEDULES, TOKENS, prompt

from sdtp_kernels import TokenPruner, apply_sdtp

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


@torch.no_grad()
def test_a_press_cuts_what_the_stages_left(tiny_model):
    peers = pytest.importorskip("sdtp_eval.peers", reason="python/ is not installed")

    @contextlib.contextmanager
    def keep_first_half(model):
        def cut(attention, args, kwargs, output):
            layer, length = kwargs["past_key_values"].layers[attention.layer_idx], kwargs["hidden_states"].shape[1]
            assert kwargs["cache_position"].tolist() == list(range(layer.keys.shape[2]))[-length:]
            if length > 1:
                layer.keys, layer.values = (t[:, :, : round(length * 0.5)] for t in (layer.keys, layer.values))

        with contextlib.ExitStack() as hooks:
            for layer in model.model.layers:
                hooks.callback(layer.self_attn.register_forward_hook(cut, with_kwargs=True).remove)
            yield

    torch.manual_seed(1)
    with apply_sdtp(tiny_model, {layer: TokenPruner(64) for layer in LAYERS}, SCHEDULES["global"]) as handle:
        with peers.pressed(tiny_model, keep_first_half):
            output = tiny_model.generate(
                prompt(), max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        kept = [round(layer.tokens_out * 0.5) for layer in handle.report().layers]
        assert [layer.keys.shape[2] - 3 for layer in output.cache.layers] == kept
        # By hand: the pruned cache, cut, and one token at its original position.
        cache = tiny_model(prompt(), use_cache=True, logits_to_keep=1).cache
        for layer, length in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        token, position = output.sequences[:, TOKENS : TOKENS + 1], torch.tensor([[TOKENS]])
        expected = tiny_model(token, position_ids=position, cache=cache).logits[:, -1]
    torch.testing.assert_close(output.logits[1], expected, atol=1e-5, rtol=1e-5)
