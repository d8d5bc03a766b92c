"""Llama (2, 3, SmolLM2): no biases, tied or untied heads; rotary scaling by ``llama3`` or ``yarn`` works."""

from transformers import LlamaForCausalLM, LlamaModel

from .family import Family

FAMILY = Family(LlamaForCausalLM, LlamaModel, "")
