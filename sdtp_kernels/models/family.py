"""What decoder families differ in, as data: one decoder loop and one patch serve them all.

A layer of every family here is ``input_layernorm``, ``self_attn``, ``post_attention_layernorm`` and ``mlp``. Scorers,
training and evaluation that look into a layer ask :func:`family_of` where its queries and keys come from.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types; each is a module of this package that holds its ``FAMILY``."""


class Family(NamedTuple):
    """One family of decoders."""

    causal_lm: type
    """The model with a language-model head, whose ``model`` is the decoder."""
    decoder: type
    without_window: str
    """Arguments of ``from_pretrained`` that load a model without sliding-window layers, of `n` layers."""
    query_norm: str = ""
    """Attribute of the attention that normalises each query head; empty where there is none."""
    key_norm: str = ""

    def query_tap(self, attention: Any) -> nn.Module:
        """The module whose output is the queries before rotation: ``[B, n, heads * d]`` or ``[B, n, heads, d]``."""
        return getattr(attention, self.query_norm or "q_proj")  # type: ignore[no-any-return]

    def queries(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Queries of a layer before rotation, ``[B, heads, n, d]``, from its input ``[B, n, D]``."""
        return _heads(layer, "q_proj", self.query_norm, hidden_states)

    def keys(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Keys before rotation, ``[B, kv_heads, n, d]``."""
        return _heads(layer, "k_proj", self.key_norm, hidden_states)

    def values(self, layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Values, ``[B, kv_heads, n, d]``."""
        return _heads(layer, "v_proj", "", hidden_states)

    def refusal(self, config: Any) -> str | None:
        """Why a model of this family cannot be pruned, and the way out; None where it can."""
        kinds = getattr(config, "layer_types", None) or []
        if "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None) is not None):
            return (
                "sliding-window layers count distance in tokens, which pruning changes: load the model with "
                f"{self.without_window.format(n=config.num_hidden_layers)}"
            )
        rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if rope_type in ("dynamic", "longrope"):
            return (
                f"rope_type={rope_type!r}: its table depends on the length of the prompt, so kept tokens would be "
                "rotated differently from dropped ones; load the model with rope_type 'default', 'linear', 'llama3' or "
                "'yarn'"
            )
        return None


_LOADED: dict[Any, Family] = {}  # an import is nothing that torch.compile can follow


def find_family(config: Any) -> Family | None:
    """The family of a model, by its config's ``model_type``; None where it is not supported."""
    model_type = getattr(config, "model_type", None)
    if model_type not in _LOADED and model_type in FAMILIES:
        _LOADED[model_type] = importlib.import_module(f".{model_type}", __package__).FAMILY
    return _LOADED.get(model_type)


def family_of(layer: Any) -> Family:
    """The family of a decoder layer."""
    config = layer.self_attn.config
    family = find_family(config)
    if family is None:
        raise NotImplementedError(f"{config.model_type}: no such family; supported are {', '.join(FAMILIES)}")
    return family


def by_head(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """``[B, n, heads * d]`` or ``[B, n, heads, d]`` to ``[B, heads, n, d]``."""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def _heads(layer: Any, projection: str, norm: str, hidden_states: torch.Tensor) -> torch.Tensor:
    attention = layer.self_attn
    heads = by_head(getattr(attention, projection)(layer.input_layernorm(hidden_states)), attention.head_dim)
    return getattr(attention, norm)(heads) if norm else heads
