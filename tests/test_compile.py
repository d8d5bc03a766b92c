"""Prefill under torch.compile: one graph wherever the dense model gives one, few compilations, no host sync of ours."""

import contextlib

import pytest
import torch
from conftest import make_qwen2
from test_ops import NoHostSync
from transformers import DynamicCache, StaticCache

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp
from sdtp_kernels.models.cache import PrunedState

LENGTHS = (300, 257, 411, 512, 700)
SCHEDULES = {
    "global": PruningSchedule(layers=(1, 2), keep_ratio=0.7),
    "block": PruningSchedule(layers=(1, 2), keep_ratio=0.7, budget="block", block_size=64),
}


def call_settings(mask=None, batch=1, cache=None, embeds=False):
    return {"mask": mask, "batch": batch, "cache": cache, "embeds": embeds}


CALLS = {
    "no cache": call_settings(),
    "new cache": call_settings(cache="new"),
    "given cache": call_settings(cache="given"),
    "batch": call_settings(batch=2, cache="given"),
    "padded": call_settings(batch=2, mask=20, cache="given"),
    "mask of ones": call_settings(mask=0, cache="given"),
    "embeddings": call_settings(embeds=True, cache="given"),
    "static cache": call_settings(cache="static"),
    "static cache, padded": call_settings(batch=2, mask=20, cache="static"),
}


def arguments(model, tokens, mask, batch, cache, embeds):
    ids = torch.randint(1, 256, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids)} if embeds else {"input_ids": ids}
    if mask is not None:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][-1, :mask] = 0
    if cache == "given":
        inputs["cache"] = DynamicCache(config=model.config)
    if cache == "static":
        inputs["cache"] = StaticCache(config=model.config, max_cache_len=tokens + 16)
    return {**inputs, "use_cache": cache is not None, "logits_to_keep": 1}


def compilations(model, call, apply):
    """Graphs compiled for five lengths, each result checked against the eager one."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), apply:
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for length in LENGTHS:
            eager = model(**arguments(model, length, **call))
            got = compiled(**arguments(model, length, **call))
            torch.testing.assert_close(got.logits, eager.logits, atol=1e-4, rtol=0)
            if call["cache"]:
                for a, b in zip(got.cache.layers, eager.cache.layers, strict=True):
                    # A compiled graph cannot see that a mask is all ones: it allows for the widest row there can be.
                    tokens = b.keys.shape[2]
                    torch.testing.assert_close(a.keys[:, :, -tokens:], b.keys, atol=1e-4, rtol=0)
    return len(graphs)


@pytest.mark.parametrize(
    ("attention", "call", "budget"),
    [
        *(("sdpa", call, "global") for call in CALLS),
        ("sdpa", "static cache", "block"),
        ("sdpa", "mask of ones", "block"),
        ("sdpa", "padded", "block"),
        ("eager", "padded", "global"),
    ],
)
def test_fullgraph_wherever_the_dense_model_has_one(attention, call, budget):
    call = CALLS[call]
    model = make_qwen2(num_layers=3, attention=attention)
    dense = compilations(model, call, contextlib.nullcontext())
    assert dense <= 2, "the premise: the dense model compiles"
    pruners = {1: TokenPruner(64), 2: TokenPruner(64)}
    assert compilations(model, call, apply_sdtp(model, pruners, SCHEDULES[budget])) <= 2


@pytest.mark.parametrize("scorer", ["random", "attention", "pruners that average"])
def test_scorers_compile(scorer):
    model = make_qwen2(num_layers=3)
    if scorer == "pruners that average":
        settings = {"distance": True, "attention": True, "pooling": 7, "averaging": True}
        scorer = {layer: TokenPruner(64, **settings) for layer in SCHEDULES["global"].layers}
    assert compilations(model, CALLS["given cache"], apply_sdtp(model, scorer, SCHEDULES["global"])) <= 2


def test_inductor():
    torch._dynamo.reset()
    model = make_qwen2(num_layers=2)
    schedule = PruningSchedule(layers=(1,), keep_ratio=0.7)
    with torch.no_grad(), apply_sdtp(model, {1: TokenPruner(64)}, schedule):
        got = torch.compile(model, fullgraph=True)(**arguments(model, 300, **CALLS["padded"])).logits
        torch.testing.assert_close(got, model(**arguments(model, 300, **CALLS["padded"])).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@torch.no_grad()
def test_no_host_sync_in_the_patched_loop(backend, schedule):
    """Padded and not, prefill and decode. transformers itself looks whether a mask is all ones; that is not ours."""
    model = make_qwen2(num_layers=3)
    pruners = {1: TokenPruner(64), 2: TokenPruner(64, averaging=True)}
    with apply_sdtp(model, pruners, schedule, backend):
        for call in ("given cache", "padded"):
            inputs = arguments(model, 300, **CALLS[call])
            with NoHostSync(outside="transformers/masking_utils.py"):
                model(**inputs)
                inputs["input_ids"] = inputs["input_ids"][:, :2]
                if "attention_mask" in inputs:
                    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
                model(**inputs)


class Prefill(torch.nn.Module):
    """What an exported prefill returns: logits, and of every layer the cache and what it holds."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask=None):
        cache = DynamicCache(config=self.model.config)
        logits = self.model(input_ids, attention_mask=attention_mask, cache=cache, logits_to_keep=1).logits
        kept = [layer.kept for layer in cache.layers if isinstance(layer, PrunedState)]
        return logits, [(layer.keys, layer.values) for layer in cache.layers], kept


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@pytest.mark.parametrize("budget", SCHEDULES)
@torch.no_grad()
def test_export(budget, padded):
    """One program for all lengths of the prompt; the ops stay whole in it. A program takes no later turn."""
    model, pruners = make_qwen2(num_layers=3), {1: TokenPruner(64), 2: TokenPruner(64)}
    with apply_sdtp(model, pruners, SCHEDULES[budget], later_turns=False):
        prefill, tokens = Prefill(model), torch.export.Dim("tokens", min=64, max=4096)

        def inputs(length):
            ids = torch.randint(1, 256, (2, length), generator=torch.Generator().manual_seed(length))
            if not padded:
                return (ids,)
            mask = torch.ones_like(ids)
            mask[1, :20] = 0
            return ids, mask

        shapes = tuple({1: tokens} for _ in inputs(200))
        program = torch.export.export(
            prefill, inputs(200), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        assert str(program.graph).count("sdtp.prune_tokens") == 2
        for length in (64, 200, 333):
            torch.testing.assert_close(
                program.module()(*inputs(length)), prefill(*inputs(length)), atol=1e-5, rtol=1e-5
            )
