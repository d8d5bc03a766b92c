"""One of the processes of ``test_devices.py::test_tensor_parallel``: a pruned model over two of them.

Writes, as JSON beside the checkpoint, the tokens it generated and the tokens that each layer keeps. Run by torchrun,
with the checkpoint as its argument.
"""

import json
import sys
from pathlib import Path

import torch
from test_devices import SCHEDULE, make_pruners, nudged
from test_qwen2 import generate, padded_batch, prompt
from transformers import AutoModelForCausalLM

from sdtp_kernels import apply_sdtp
from sdtp_kernels.models.cache import PrunedState


def tokens_of(model, pruners):
    """Everything that the test compares."""
    found = {}
    for name, inputs in (("one row", {"input_ids": prompt()}), ("padded", padded_batch())):
        with apply_sdtp(model, pruners, SCHEDULE) as handle:
            output = generate(model, inputs, return_dict_in_generate=True)
            found[name] = output.sequences.tolist()
            found[f"{name}, kept"] = [
                layer.kept.tolist() for layer in output.cache.layers if isinstance(layer, PrunedState)
            ]
            kv_bytes = sum(layer.keys[:, :, :-7].nbytes * 2 for layer in output.cache.layers)
            found[f"{name}, bytes"] = [handle.report().kv_bytes, kv_bytes]
    return found


def main():
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto").eval()
        rank = torch.distributed.get_rank()
        found = {name: tokens_of(model, pruners) for name, pruners in make_pruners().items()}
        # A scorer that has its own mind in every process, as a last bit may.
        with apply_sdtp(model, nudged(rank), SCHEDULE):
            found["nudged"] = generate(model, {"input_ids": prompt()}).tolist()
    (Path(sys.argv[1]) / f"process-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
