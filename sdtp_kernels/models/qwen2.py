"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from transformers import Qwen2ForCausalLM, Qwen2Model

from .family import Family

FAMILY = Family(
    Qwen2ForCausalLM,
    Qwen2Model,
    without_window="use_sliding_window=False, layer_types=['full_attention'] * {n}",
)
