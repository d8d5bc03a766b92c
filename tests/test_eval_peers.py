"""kvpress as a method: a stand-in press with its interface, because the real one pins another transformers."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import pytest
import torch

from sdtp_eval import methods, peers
from sdtp_eval.reader import Reader
from sdtp_eval.tasks import AFTER, INSIDE, Sample
from sdtp_kernels import PruningSchedule


def make_sample() -> Sample:
    ids = torch.randint(1, 256, (138,), generator=torch.Generator().manual_seed(3)).tolist()
    return Sample("passkey", "some", tuple(ids[:120]), tuple(ids[120:130]), tuple(ids[130:]))


class KeepFirstPress:
    """As presses do: hooks after the attention of the prefill, which read ``cache_position`` and cut the cache."""

    compression_ratio = 0.0

    def __init__(self, compression_ratio: float) -> None:
        self.compression_ratio = compression_ratio

    def score(self) -> None: ...

    def share(self, layer_idx: int) -> float:
        return 1 - self.compression_ratio

    def __call__(self, model: Any) -> contextlib.AbstractContextManager[None]:
        def cut(attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            length = kwargs["hidden_states"].shape[1]
            assert kwargs["cache_position"].tolist() == list(range(length))
            layer = kwargs["past_key_values"].layers[attention.layer_idx]
            kept = round(length * self.share(attention.layer_idx))
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]

        @contextlib.contextmanager
        def hooked() -> Any:
            hooks = [layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in model.model.layers]
            yield
            for hook in hooks:
                hook.remove()

        return hooked()


class PyramidPress(KeepFirstPress):
    def share(self, layer_idx: int) -> float:
        return 0.9 - 0.1 * layer_idx


@pytest.fixture(autouse=True)
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("kvpress")
    module.KeepFirstPress, module.PyramidPress = KeepFirstPress, PyramidPress  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvpress", module)


@pytest.mark.parametrize("protocol", [INSIDE, AFTER])
def test_keeping_all_is_dense(tiny_model: Any, protocol: str) -> None:
    reader = Reader(tiny_model, make_sample())
    logits, cache = peers.compressed_forward(
        tiny_model, KeepFirstPress, 1.0, reader.input_ids, reader.sample.prompt_length(protocol), 3
    )
    torch.testing.assert_close(logits.log_softmax(-1), reader.dense.log_probabilities[-3:])
    assert cache.get_seq_length() == reader.input_ids.shape[1]


def test_layers_of_different_lengths(tiny_model: Any) -> None:
    """What stands after the prompt sees the cache that each layer has left: against masks in one dense pass."""
    sample = make_sample()
    ids = torch.tensor([sample.ids])
    length = sample.prompt_length(INSIDE)
    logits, cache = peers.compressed_forward(tiny_model, PyramidPress, 0.5, ids, length, len(sample.answer))
    kept = [round(length * PyramidPress(0.5).share(i)) for i in range(len(cache.layers))]
    assert [layer.keys.shape[-2] - len(sample.answer) + 1 for layer in cache.layers] == kept

    def hide(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        place = torch.arange(ids.shape[1])
        is_visible = place <= place[:, None]
        is_visible[length:, kept[attention.layer_idx] : length] = False
        return args, {**kwargs, "attention_mask": torch.where(is_visible, 0.0, -torch.inf)[None, None]}

    hooks = [layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True) for layer in tiny_model.model.layers]
    expected = tiny_model(ids, use_cache=False).logits[0, -len(sample.answer) :]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # sums in another order


def test_a_press_gets_the_budget_of_the_schedule(tiny_model: Any) -> None:
    method = methods.find_method("kvpress:KeepFirst")
    schedule = PruningSchedule(layers=(1, 3), keep_ratio=0.7, min_prompt=1)
    sample = make_sample()
    result = Reader(tiny_model, sample).result(INSIDE, method, schedule)
    length = sample.prompt_length(INSIDE)
    wanted = schedule.mean_keep(length, tiny_model.config.num_hidden_layers)
    assert result["mean_keep"] == pytest.approx(wanted, abs=1 / length)
    assert result["nll_increase"] != 0


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no method 'kvpress:Snap'; kvpress .* has KeepFirst, Pyramid"):
        methods.find_method("kvpress:Snap")
    with pytest.raises(ValueError, match="the cache has to be compressed by kvpress"):
        methods.find_methods(["kvpress:KeepFirst"], methods.FROM_PROMPTS)
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ValueError, match="pip install --no-deps kvpress"):
        methods.find_method("kvpress:KeepFirst")
