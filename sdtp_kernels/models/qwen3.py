"""Qwen3: queries and keys are normalised head by head before they are rotated."""

from transformers import Qwen3ForCausalLM, Qwen3Model

from .family import Family

FAMILY = Family(
    Qwen3ForCausalLM,
    Qwen3Model,
    without_window="use_sliding_window=False, layer_types=['full_attention'] * {n}",
    query_norm="q_norm",
    key_norm="k_norm",
)
