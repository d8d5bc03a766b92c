"""A chat about one long text: the text is pruned once, and each question goes on from its KV cache.

Usage: python examples/chat.py MODEL TEXT_FILE [QUESTION ...]
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from sdtp_kernels import PruningSchedule, apply_sdtp
from sdtp_kernels.models.compat import CACHE  # "cache", or "past_key_values" before transformers 5.24


@torch.inference_mode()
def main(checkpoint, text_file, *questions):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # The block budget prunes a block at a time, so that a prompt may go on.
    schedule = PruningSchedule.every(
        model.config.num_hidden_layers, first=2, keep_ratio=0.9, budget="block", block_size=256
    )
    text = tokenizer(Path(text_file).read_text(encoding="utf-8"), return_tensors="pt")
    # "norm" needs no training; load_pruners(FILE) keeps more of what matters.
    with apply_sdtp(model, "norm", schedule) as handle:
        prefix = DynamicCache(config=model.config)
        model(**text, **{CACHE: prefix}, logits_to_keep=1)
        print(handle.report())
        for question in questions or ("What is this text about?",):
            asked = tokenizer(f"\n\n{question}\n", add_special_tokens=False, return_tensors="pt").input_ids
            ids = torch.cat([text.input_ids, asked], dim=1)
            # Each question has a copy: the text's own cache stays as it is.
            output = model.generate(ids, **{CACHE: copy.deepcopy(prefix)}, max_new_tokens=40)
            print(f"{question}\n  {tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
