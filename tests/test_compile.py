"""Prefill under torch.compile: one graph wherever the dense model gives one, few compilations, no host sync of ours."""

import contextlib

import pytest
import torch
from helpers.models import make_qwen2
from helpers.requests import ARITHMETIC, DTYPES, PHASES, layer_entries
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import NoHostSync
from transformers import DynamicCache, StaticCache

from sdtp_kernels import KVPredictor, PruningSchedule, TokenPruner, apply_sdtp
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


def compile_whole(model):
    """The model as one graph, which is run as it is, in the arithmetic of the dtype; and the graphs that it took."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        def run(*args):
            with ARITHMETIC[model.dtype]():
                return graph.forward(*args)

        graphs.append(graph)
        return run

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def compilations(model, call, apply):
    """Graphs compiled for five lengths, each result checked against the eager one."""
    with torch.no_grad(), apply:
        compiled, graphs = compile_whole(model)
        for length in LENGTHS:
            with ARITHMETIC[model.dtype]():
                eager = model(**arguments(model, length, **call))
            got = compiled(**arguments(model, length, **call))
            torch.testing.assert_close(got.logits, eager.logits, atol=1e-4, rtol=0)
            if call["cache"]:
                for a, b in zip(got.cache.layers, eager.cache.layers, strict=True):
                    # A compiled graph cannot see that a mask is all ones: it allows for the widest row there can be.
                    tokens = b.keys.shape[2]
                    torch.testing.assert_close(a.keys[:, :, -tokens:], b.keys, atol=1e-4, rtol=0)
    return len(graphs)


of_every_call = pytest.mark.parametrize(
    ("attention", "call", "budget", "dtype"),
    [
        *(("sdpa", call, "global", torch.float32) for call in CALLS),
        ("sdpa", "static cache", "block", torch.bfloat16),
        ("sdpa", "mask of ones", "block", torch.bfloat16),
        ("sdpa", "static cache, padded", "global", torch.bfloat16),
        ("eager", "padded", "global", torch.bfloat16),
    ],
    ids=str,
)


@of_every_call
def test_fullgraph_wherever_the_dense_model_has_one(attention, call, budget, dtype):
    model = make_qwen2(num_layers=3, attention=attention).to(dtype)
    pruners = {1: TokenPruner(64), 2: TokenPruner(64)}
    assert compilations(model, CALLS[call], apply_sdtp(model, pruners, SCHEDULES[budget])) <= 2


@of_every_call
@pytest.mark.slow
def test_the_dense_model_has_one(attention, call, budget, dtype):
    """The premise of the test above; it says something of transformers, and nothing of ours."""
    model = make_qwen2(num_layers=3, attention=attention).to(dtype)
    assert compilations(model, CALLS[call], contextlib.nullcontext()) <= 2


def name_of(parameters):
    return ", ".join(str(p).removeprefix("torch.") for p in parameters)


def padded_inputs(tokens, padding):
    ids = torch.randint(1, 256, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


def small_model(dtype):
    """With values of size 1, as the tolerance is absolute."""
    model = make_qwen2(num_layers=3)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.to(dtype)


@pytest.fixture(scope="module", params=zip(DTYPES, SCHEDULES, strict=True), ids=name_of)
def compiled(request):
    """A patched model; the same compiled; its graphs."""
    dtype, budget = request.param
    model = small_model(dtype)
    with apply_sdtp(model, {1: TokenPruner(64), 2: TokenPruner(64)}, SCHEDULES[budget]):
        yield model, *compile_whole(model)


@settings(max_examples=8, phases=PHASES)
@given(tokens=st.integers(64, 400), padding=st.integers(1, 63))
@torch.no_grad()
def test_two_graphs_take_every_padded_prompt(compiled, tokens, padding):
    """Logits and caches within 1e-5; the second graph takes every length."""
    model, run, graphs = compiled
    ids, mask = padded_inputs(tokens, padding)
    results = []
    for forward, arithmetic in ((run, contextlib.nullcontext), (model, ARITHMETIC[model.dtype])):
        cache = DynamicCache(config=model.config)
        with arithmetic():
            logits = forward(ids, attention_mask=mask, cache=cache, logits_to_keep=1).logits
        results.append([logits, [layer_entries(layer, mask) for layer in cache.layers]])
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
    assert len(graphs) <= 2


def all_terms():
    """A pruner of the shipped form."""
    pruner = TokenPruner(64, distance=True, attention=True, lexical=True, pooling=7, averaging=True)
    pruner.lexical_weight.data.fill_(3.0)
    return pruner


@pytest.mark.parametrize("scorer", ["random", "attention", "lexical", "question", "pruners that average"])
def test_scorers_compile(scorer):
    model = make_qwen2(num_layers=3)
    if scorer == "pruners that average":
        scorer = {layer: all_terms() for layer in SCHEDULES["global"].layers}
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
    pruners = {1: TokenPruner(64), 2: all_terms()}
    with apply_sdtp(model, pruners, schedule, backend):
        for call in ("given cache", "padded"):
            inputs = arguments(model, 300, **CALLS[call])
            with NoHostSync(outside="transformers/masking_utils.py"):
                model(**inputs)
                inputs["input_ids"] = inputs["input_ids"][:, :2]
                if "attention_mask" in inputs:
                    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
                model(**inputs)


# Shorter prompts have no finished block. A stage that drops nothing is another program.
SHORTEST = 96


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


def inputs_of(tokens, padding):
    return padded_inputs(tokens, padding) if padding else padded_inputs(tokens, 0)[:1]


@pytest.fixture(
    scope="module",
    params=[
        (torch.float32, "global", "padded", "none"),
        (torch.float32, "block", "one row", "none"),
        (torch.bfloat16, "global", "one row", "none"),
        (torch.bfloat16, "block", "padded", "none"),
        (torch.float32, "global", "padded", "predicted"),
        (torch.bfloat16, "block", "one row", "predicted"),
    ],
    ids=name_of,
)
def exported(request):
    """What was exported, eager; the program; whether it takes a padding mask. A program takes no later turn."""
    dtype, budget, padded, dropped_kv = request.param
    model, is_padded = small_model(dtype), padded == "padded"
    pruners = {1: TokenPruner(64), 2: TokenPruner(64)}
    settings = {"later_turns": False, "dropped_kv": dropped_kv}
    if dropped_kv == "predicted":
        settings["kv_predictor"] = KVPredictor(64, 2, 16, num_hidden_layers=3, stages=(1, 2))
    with torch.no_grad(), apply_sdtp(model, pruners, SCHEDULES[budget], **settings):
        prefill, tokens, inputs = (
            Prefill(model),
            torch.export.Dim("tokens", min=SHORTEST, max=4096),
            inputs_of(200, 20 * is_padded),
        )
        program = torch.export.export(
            prefill,
            inputs,
            dynamic_shapes=tuple({1: tokens} for _ in inputs),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        assert str(program.graph).count("sdtp.prune_tokens") == 2, "the ops stay whole in it"
        yield prefill, program.module(), is_padded


@settings(max_examples=8, phases=PHASES)
@given(tokens=st.integers(SHORTEST, 400), padding=st.integers(1, 63))
@torch.no_grad()
def test_export(exported, tokens, padding):
    """One program for all lengths of the prompt: its logits, caches and what they hold are the eager ones."""
    prefill, program, is_padded = exported
    inputs = inputs_of(tokens, padding * is_padded)
    torch.testing.assert_close(program(*inputs), prefill(*inputs), atol=1e-5, rtol=0)
