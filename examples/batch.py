"""A batch of requests with settings of their own: keep ratios, protected tokens, one that is not pruned.

Usage: python examples/batch.py MODEL PROMPT_FILE PROMPT_FILE PROMPT_FILE
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdtp_kernels import apply_sdtp


@torch.inference_mode()
def main(checkpoint, *prompt_files):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [Path(file).read_text(encoding="utf-8") for file in prompt_files]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    rows = len(prompts)
    with apply_sdtp(model, "attention", 0.9) as handle:
        output = model.generate(
            **batch,
            max_new_tokens=40,
            keep_ratio=[0.8, *[0.9] * (rows - 1)],  # the first row is pruned harder
            protect=[[(0, 32)], *[[]] * (rows - 1)],  # and keeps its first 32 tokens, whatever they score
            enabled=[*[True] * (rows - 1), False],  # the last row is not pruned
        )
        print(handle.report())
    for row in output[:, batch.input_ids.shape[1] :]:
        print("-", tokenizer.decode(row, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main(*sys.argv[1:])
