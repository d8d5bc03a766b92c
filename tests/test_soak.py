"""200 mixed requests on one patched model: nothing leaks from one into another, nothing is left behind.

The reference is a fresh process that serves the requests in reverse order and patches the model again for each.
"""

import ctypes
import gc
import json
import os
import random
import subprocess
import sys

import torch
from helpers.models import make_qwen2
from transformers import LogitsProcessor, Qwen2ForCausalLM, Qwen2Model, StoppingCriteria

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp

SCHEDULE = PruningSchedule((1, 2), 0.6, budget="block", block_size=64)
NUM_REQUESTS, LONGEST = 200, 3000
KINDS = ("one", "one", "batch", "chat", "stopped", "fails in a layer", "fails in sampling", "settings", "chunks")


class InterruptedRequestError(Exception):
    pass


class StopAfter(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] % 3 == 0)


class Interrupt(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise InterruptedRequestError


def make_model():
    return make_qwen2(num_layers=4, hidden_size=16)


def make_pruners():
    torch.manual_seed(1)
    return {layer: TokenPruner(16, pooling=3) for layer in SCHEDULE.layers}


def make_requests():
    rng = random.Random(5)
    requests = []
    for seed in range(NUM_REQUESTS):
        kind = KINDS[seed % len(KINDS)]
        rows = rng.randint(2, 4) if kind in ("batch", "settings") else 1
        lengths = [round(LONGEST ** rng.random()) for _ in range(rows)]  # from 1, each order of magnitude alike
        requests.append({"seed": seed, "kind": kind, "lengths": lengths})
    requests[0]["lengths"], requests[1]["lengths"] = [LONGEST], [1]
    return requests


def serve(model, request):
    """Tokens of the answers, or what became of the request."""
    rng, kind, lengths = random.Random(request["seed"]), request["kind"], request["lengths"]
    generator = torch.Generator().manual_seed(request["seed"])
    ids = torch.randint(1, 256, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(-1)).long()
    settings = {"max_new_tokens": rng.randint(1, 6), "do_sample": False}
    if kind == "stopped":
        settings["stopping_criteria"] = [StopAfter()]
    elif kind == "chunks":
        settings["prefill_chunk_size"] = rng.randint(50, 700)
    elif kind == "settings":
        settings["keep_ratio"] = [rng.choice([0.5, 0.8, 1.0]) for _ in lengths]
        settings["protect"] = [[(0, rng.randint(0, 200))] for _ in lengths]
    elif kind == "fails in sampling":
        settings["logits_processor"] = [Interrupt()]

    def interrupt(*_):
        raise InterruptedRequestError

    hook = model.model.layers[2].register_forward_hook(interrupt) if kind == "fails in a layer" else None
    try:
        output = model.generate(ids * mask, attention_mask=mask, return_dict_in_generate=True, **settings)
        for _ in range(2 if kind == "chat" else 0):
            turn = torch.randint(1, 256, (1, rng.randint(1, 150)), generator=generator)
            ids = torch.cat([output.sequences, turn], dim=1)
            output = model.generate(ids, cache=output.cache, return_dict_in_generate=True, **settings)
        return output.sequences[:, max(lengths) :].tolist()
    except InterruptedRequestError:
        return "interrupted"
    finally:
        if hook is not None:
            hook.remove()


def _is_traced(tensor):
    return tensor.device.type == "meta" or not all(type(n) is int for n in tensor.shape)


def memory(handle):
    """Bytes of all tensors but those of the last report, and of the process."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    # Not those of traces, which other tests have left behind: they have symbols for sizes, or no data.
    tensors = sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor and not _is_traced(t))
    kept = handle.report().kept
    tensors -= 0 if kept is None else kept.nbytes
    with open("/proc/self/statm") as file:
        return tensors, int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.no_grad()
def test_soak():
    fresh = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    model, requests = make_model(), make_requests()
    before = [dict(module.__dict__) for module in model.modules()]
    results = []
    with apply_sdtp(model, make_pruners(), SCHEDULE) as handle:
        for i, request in enumerate(requests):
            if i == 3 * len(KINDS):  # warm by now
                tensors, process = memory(handle)
            results.append(serve(model, request))
        tensors_after, process_after = memory(handle)
    assert tensors_after == tensors, "no tensor outlives its request"
    assert process_after - process < 16 * 2**20
    expected = json.loads(fresh.communicate()[0])
    assert fresh.returncode == 0
    assert results == expected
    assert {len(lengths) for lengths in results if lengths != "interrupted"} == {1, 2, 3, 4}
    # generate() itself leaves its configuration on a model; what is ours is gone.
    ours = {"_sdtp", "forward", "generate", "_prefill", "_forward_hooks", "_forward_pre_hooks"}
    for module, was in zip(model.modules(), before, strict=True):
        assert {name: module.__dict__.get(name) for name in ours} == {name: was.get(name) for name in ours}
    assert (type(model), type(model.model)) == (Qwen2ForCausalLM, Qwen2Model)


if __name__ == "__main__":
    results = []
    with torch.no_grad():
        for request in reversed(make_requests()):
            model = make_model()
            with apply_sdtp(model, make_pruners(), SCHEDULE):
                results.append(serve(model, request))
    print(json.dumps(results[::-1]))
