"""Pruners for your own checkpoint: mark what mattered in many prompts, train, use.

Usage: python examples/own_pruners.py MODEL TEXT_DIRECTORY OUT_DIRECTORY [SAMPLES]
"""

import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sdtp_kernels import apply_sdtp, load_pruners


def sdtp(*words):
    subprocess.run([sys.executable, "-m", "sdtp_kernels", *map(str, words)], check=True)


@torch.inference_mode()
def main(checkpoint, texts, out, samples=400):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    file, saliency = out / "pruners.safetensors", out / "saliency"
    # One process of many hours for a large model; it may be killed and started again.
    sdtp("saliency", "--model", checkpoint, "--data", texts, "--samples", samples, "--kv-statistics", "--out", saliency)
    sdtp("train", "--model", checkpoint, "--saliency", saliency, "--kv-rank", "full", "--out", file)
    pruners = load_pruners(file)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    prompt = torch.randint(1, model.config.vocab_size, (1, 512))
    with apply_sdtp(model, pruners, 0.9) as handle:
        model(prompt, logits_to_keep=1)
        print(handle.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
