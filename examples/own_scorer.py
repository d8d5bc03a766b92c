"""A scorer of your own: a function of what a stage sees, in the place of trained pruners.

Usage: python examples/own_scorer.py MODEL TEXT_FILE
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdtp_kernels import apply_sdtp
from sdtp_kernels.scorers import StageInput


def novelty(stage: StageInput) -> torch.Tensor:
    """Keep the tokens that differ most from the one before them.

    `stage.hidden_states` is ``[B, n, D]``; the scores are ``[B, n]``, in any unit.
    """
    x = torch.nn.functional.normalize(stage.hidden_states.float(), dim=-1)
    similarity = (x[:, 1:] * x[:, :-1]).sum(-1)
    return torch.nn.functional.pad(-similarity, (1, 0))


@torch.inference_mode()
def main(checkpoint, text_file):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(Path(text_file).read_text(encoding="utf-8"), return_tensors="pt")
    with apply_sdtp(model, novelty, 0.8) as handle:
        output = model.generate(**inputs, max_new_tokens=40)
        report = handle.report()
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    print("\nkept in the last layer:", tokenizer.decode(inputs.input_ids[0, report.kept[0]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
