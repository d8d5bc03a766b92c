"""Cache compression by kvpress (https://github.com/NVIDIA/kvpress) as methods: ``kvpress:SnapKV`` and so on.

kvpress runs the dense prefill and shortens the cache afterwards, so its cost is that of the dense model and more; what
it shows is how good the answers can be with a cache of the same size. It pins an older transformers, so it is no
dependency: install it beside this package without its own, ``pip install --no-deps kvpress cachetools fire termcolor
peft``. kvpress 0.5 on transformers 5.24 misses two arguments, which are given to it here.

A press also works on top of a pruned model, where it shortens what the stages have left: :func:`pressed`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from sdtp_kernels.models.compat import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "kvpress:"


def find_press(word: str) -> Any:
    """The class of kvpress that ``kvpress:NAME`` means.

    Raises
    ------
    ValueError
        If kvpress is not installed, or has no press of that name with a single ratio to set.
    """
    try:
        import kvpress
    except ImportError as error:
        raise ValueError(
            f"{word}: kvpress cannot be imported ({error}); 'pip install --no-deps kvpress cachetools fire termcolor "
            "peft' adds it to this environment"
        ) from None
    found = getattr(kvpress, f"{word.removeprefix(PREFIX)}Press", None)
    if not hasattr(found, "compression_ratio"):
        names = [name.removesuffix("Press") for name in dir(kvpress) if hasattr(getattr(kvpress, name), "score")]
        raise ValueError(f"no method {word!r}; kvpress {version()} has {', '.join(names)}")
    return found


def compressed_forward(
    model: Any, press: Any, mean_keep: float, input_ids: torch.Tensor, prompt_length: int, num_logits: int
) -> tuple[torch.Tensor, Any]:
    """Prefill the prompt, compress its cache, and read what stands after it with the compressed cache.

    Parameters
    ----------
    model : transformers model
        Not patched.
    press : type
        Of kvpress.
    mean_keep : float
        Share of the cache to keep, over all layers.
    input_ids : int64 Tensor [1, T]
    prompt_length : int
        Leading tokens that are the prompt.
    num_logits : int
        How many of the last positions' logits are wanted, at most those after the prompt and its last.

    Returns
    -------
    logits : Tensor [num_logits, V]
    cache : Cache
        Of the compressed prompt and the tokens after it.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    after = input_ids[:, prompt_length:]
    with _translated(model), press(compression_ratio=1 - mean_keep)(model):
        first = model(input_ids[:, :prompt_length], **{CACHE: cache}, logits_to_keep=1).logits[0]
    if after.shape[1] == 0:
        return first[-num_logits:], cache
    position_ids = torch.arange(prompt_length, input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    with _translated(model):
        rest = model(after, position_ids=position_ids, **{CACHE: cache}).logits[0]
    return torch.cat([first, rest])[-num_logits:], cache


@contextlib.contextmanager
def pressed(model: Any, press: Any) -> Iterator[None]:
    """Run a model, pruned or not, under a press: ``with apply_sdtp(...), pressed(model, press): model.generate(...)``.

    In every layer the press sees the tokens that the stages have left, in their original order and with the keys of
    their original positions, and shortens that layer's cache: after the prompt, or while tokens are generated
    (``DecodingPress``). Presses know no padding, so batches are of equal lengths. Such a cache no longer knows how long
    the prompt was: it belongs to one call of ``generate()``, and no later turn can go on with it.

    Parameters
    ----------
    model : transformers model
    press : object
        Of kvpress.
    """
    with _translated(model), press(model):
        yield


@contextlib.contextmanager
def _translated(model: Any) -> Iterator[None]:
    """Attention layers get a mask of their own cache's length, and kvpress what it reads by names of its own time."""

    def translate(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden_states = kwargs["hidden_states"]
        new, past = hidden_states.shape[1], kwargs[CACHE].get_seq_length(attention.layer_idx)
        position = torch.arange(past, past + new, device=hidden_states.device)
        if past:  # the model made its mask for the first layer; presses such as PyramidKV keep more there
            place = torch.arange(past + new, device=hidden_states.device)
            kwargs["attention_mask"] = torch.where(place <= position[:, None], 0.0, -torch.inf)[None, None].to(
                hidden_states.dtype
            )
        return args, {**kwargs, "cache_position": position}

    def tell(attention: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Hooks share one dict of arguments: a press, whose hook comes after this one, finds its name in it, and the
        # attention itself has not seen it.
        kwargs["past_key_values"] = kwargs[CACHE]

    with contextlib.ExitStack() as hooks:
        for layer in model.model.layers:
            attention = layer.self_attn
            hooks.callback(attention.register_forward_pre_hook(translate, with_kwargs=True).remove)
            hooks.callback(attention.register_forward_hook(tell, with_kwargs=True).remove)
        yield


def version() -> str:
    """Of kvpress, as it is installed."""
    from importlib import metadata

    try:
        return metadata.version("kvpress")
    except metadata.PackageNotFoundError:
        return "(unknown version)"
