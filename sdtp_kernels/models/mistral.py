"""Mistral: a Llama whose first versions attend to a sliding window, which is refused."""

from transformers import MistralForCausalLM, MistralModel

from .family import Family

FAMILY = Family(MistralForCausalLM, MistralModel, "sliding_window=None")
