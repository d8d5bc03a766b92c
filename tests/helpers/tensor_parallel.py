"""One of the processes of ``test_devices.py::test_tensor_parallel``: pruned models whose heads two of them share.

Answers all requests of the test. Run by torchrun, with the folder of the requests and checkpoints as its argument.
"""

import pickle
import sys
from pathlib import Path

import torch
from test_devices import make_predictor, make_pruners, nudged
from transformers import AutoModelForCausalLM

from helpers.requests import ARITHMETIC, DTYPES, generate, prompts
from sdtp_kernels import apply_sdtp


def load(folder, **settings):
    """The model in each dtype."""
    return {
        dtype: AutoModelForCausalLM.from_pretrained(folder / str(dtype), dtype=dtype, **settings).eval()
        for dtype in DTYPES
    }


def answer(model, lengths, schedule, scorer, chunk, predicted, rank=0):
    """Tokens and cache, and the bytes that the report says it has."""
    kv_predictor = make_predictor(model, schedule.layers) if predicted else None
    # A scorer that has its own mind in every process, as a last bit may.
    scorer = nudged(rank) if scorer == "nudged" else make_pruners(32).get(scorer, scorer)
    with ARITHMETIC[model.dtype](), apply_sdtp(model, scorer, schedule, kv_predictor=kv_predictor) as handle:
        return generate(model, prompts(lengths), prefill_chunk_size=chunk), handle.report().kv_bytes


@torch.no_grad()
def main():
    folder = Path(sys.argv[1])
    models = load(folder, tp_plan="auto")
    rank = torch.distributed.get_rank()
    requests = pickle.loads((folder / "requests").read_bytes())
    answers = [answer(models[dtype], **request, rank=rank) for dtype, request in requests]
    (folder / f"answers-{rank}").write_bytes(pickle.dumps(answers))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
