"""Qwen3: queries and keys are normalised head by head before they are rotated."""

from transformers import Qwen3ForCausalLM, Qwen3Model

from .family import Family

FAMILY = Family(Qwen3ForCausalLM, Qwen3Model, "use_sliding_window=False", query_norm="q_norm", key_norm="k_norm")
