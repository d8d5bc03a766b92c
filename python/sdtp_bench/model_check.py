"""Part of ``sdtp bench gpu-check``: a patched model on the device, by every attention implementation that runs there.

The scorer is a fixed number for every place, so that no rounding decides which tokens stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sdtp_bench.timing import Device

ATTENTIONS = ("sdpa", "flex_attention")  # and flash attention where it is installed
TOKENS, PADDING = 600, 170
TOLERANCE = 5e-2  # of the logits' spread: bfloat16 through six layers, by kernels that sum in other orders
SCHEDULE = PruningSchedule(layers=(1, 3, 4), keep_ratio=0.7)


def check_models(device: Device) -> Iterator[dict[str, Any]]:
    """Prefill of a padded batch and one later token, a static cache, and a captured prefill.

    Parameters
    ----------
    device : Device
        Of :mod:`sdtp_bench.timing`.

    Yields
    ------
    dict
        One row a check: ``kind="check"``, ``backend`` (the attention implementation), ``op``, ``error`` (empty where
        right). What is not installed has no row.
    """
    from transformers.utils import is_flash_attn_2_available

    has_flash = device.torch_device.type == "cuda" and is_flash_attn_2_available()
    attentions = (*ATTENTIONS, "flash_attention_2") if has_flash else ATTENTIONS
    expected = _two_calls(_model(device, "eager"), None)
    for attention in attentions:
        model = _model(device, attention)
        checks: dict[str, Callable[[Any], str]] = {
            "padded batch": lambda model: _difference(_two_calls(model, None), expected),
            "static cache": lambda model: _difference(_two_calls(model, TOKENS + 8), expected),
        }
        if attention == "sdpa":
            checks["captured prefill"] = lambda model: _captured(device, model)
        for op, check in checks.items():
            try:
                error = check(model)
            except Exception as failure:  # the other checks go on
                error = f"{type(failure).__name__}: {failure}"
            yield {"kind": "check", "backend": attention, "op": op, "error": error}


def _model(device: Device, attention: str) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(device.torch_device, torch.bfloat16).eval()


def _ids(model: Any, batch: int) -> torch.Tensor:
    return torch.randint(1, 512, (batch, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)


def _two_calls(model: Any, max_cache_len: int | None) -> torch.Tensor:
    """Logits after a padded batch, and after one more token."""
    from transformers import DynamicCache, StaticCache

    from sdtp_kernels.models.compat import CACHE

    ids = _ids(model, 2)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    cache: Any = DynamicCache(config=model.config)
    if max_cache_len is not None:
        cache = StaticCache(config=model.config, max_cache_len=max_cache_len)
    with torch.no_grad(), apply_sdtp(model, "random", SCHEDULE):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        settings = {CACHE: cache, "logits_to_keep": 1}
        first = model(ids, attention_mask=mask, position_ids=positions, **settings).logits
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        second = model(ids[:, :1], attention_mask=mask, position_ids=positions[:, -1:] + 1, **settings).logits
    return torch.cat([first, second], dim=1).float()


def _captured(device: Device, model: Any) -> str:
    """A prefill by pruners of the form that ships as one replayable graph: capture fails where the host has to wait."""
    width = model.config.hidden_size
    pruners = {
        layer: TokenPruner(width, distance=True, attention=True, averaging=True, pooling=7) for layer in SCHEDULE.layers
    }
    with torch.no_grad(), apply_sdtp(model, pruners, SCHEDULE):
        ids = _ids(model, 1)

        def prefill() -> torch.Tensor:
            logits: torch.Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
            return logits

        expected = prefill().float()
        replay = device.capture(prefill)
        got = replay().float()
        device.synchronize()
    return _difference(got, expected)


def _difference(got: torch.Tensor, expected: torch.Tensor) -> str:
    error, allowed = (got - expected).abs().max().item(), TOLERANCE * (expected.max() - expected.min()).item()
    if not error <= allowed:  # also where it is NaN
        return f"logits differ by {error:.3g}, allowed are {allowed:.3g}"
    return ""
