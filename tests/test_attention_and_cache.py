"""Every attention implementation and every kind of cache: the tokens of the oracle, and the memory of the schedule."""

import copy
import functools
import itertools
import types

import pytest
import torch
from helpers import flash_stand_in
from helpers.models import make_qwen2
from helpers.oracle import MaskedDense, cache_bytes, naive_keep
from helpers.prompts import LAYERS, LENGTHS, SCHEDULES, TOKENS, generate, padded_batch, prompt
from helpers.requests import ARITHMETIC, PHASES, assert_same, make_models, of_both_dtypes, prompts, rows, schedules
from helpers.requests import generate as generate_with_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import NoHostSync
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    HQQQuantizedLayer,
    QuantizedLayer,
    QuantoQuantizedLayer,
)

from sdtp_kernels import TokenPruner, apply_sdtp
from sdtp_kernels.models.cache import PrunedState, install
from sdtp_kernels.models.devices import device_of
from sdtp_kernels.models.masks import ATTENTIONS, FLASH

BOTH = ("global", "block")
GROUP = 16  # of values that share a scale: those of a token in all heads


def make_pruners(hidden_size=64):
    torch.manual_seed(1)
    return {layer: TokenPruner(hidden_size, pooling=pooling) for layer, pooling in zip(LAYERS, (1, 3, 5), strict=True)}


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture(scope="module")
def pruners():
    return make_pruners()


@pytest.fixture(params=BOTH)
def budget(request):
    return request.param


@pytest.fixture
def schedule(budget):
    return SCHEDULES[budget]


def model_with(attention):
    model = make_qwen2()
    model.config._attn_implementation = attention
    return model


def leave_flex_uncompiled(monkeypatch):
    """The op itself: Inductor 2.13 writes C++ that does not compile where lengths of keys vary.

    In double, as ARITHMETIC has the others; and traced for no shape, which takes seconds each, its masks neither.
    """
    from torch.nn.attention import flex_attention as flex

    def attend(*states, training, **kwargs):
        return flex.flex_attention(*(t.double() for t in states), **kwargs).to(states[0].dtype)

    def make_mask(*args, _compile, **kwargs):
        return flex.create_block_mask(*args, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", attend)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", make_mask)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def inputs_of(padded):
    return padded_batch() if padded else {"input_ids": prompt()}


@functools.cache
def oracle_tokens(budget, padded):
    oracle = MaskedDense.of(make_qwen2(), make_pruners(), SCHEDULES[budget], TOKENS)
    return generate(oracle, inputs_of(padded), use_cache=False)


# ------------------------------------------------------------------------------------------------------------ attention


@of_both_dtypes
@settings(max_examples=20, phases=PHASES)
@given(lengths=rows, schedule=schedules, attention=st.sampled_from(ATTENTIONS), static=st.booleans())
@torch.no_grad()
def test_a_row_is_that_of_the_row_alone(models, dtype, lengths, schedule, attention, static):
    """In a padded batch, under every attention, in a growing and in a static cache, whose bytes are the schedule's.

    The reference is the row by itself, in a growing cache, under sdpa; where the batch's attention is eager under that,
    which rounds the weights of bfloat16 as well. Shapes differ, so bfloat16 is computed in double and rounded once.
    """
    model, inputs, mask = models[dtype], prompts(lengths), prompts(lengths)["attention_mask"]
    if attention == "flex_attention" and max(lengths) < schedule.min_prompt:
        static = False  # not ours: where nothing is pruned, transformers lets a token see one more than there are
    cache = StaticCache(config=model.config, max_cache_len=max(lengths) + 4) if static else None
    with pytest.MonkeyPatch.context() as patch, ARITHMETIC[dtype]():
        flash_stand_in.install(patch)
        leave_flex_uncompiled(patch)
        patch.setattr(model.config, "_attn_implementation", attention)
        with apply_sdtp(model, make_pruners(32), schedule):
            got = generate_with_cache(model, inputs, cache=cache)
        patch.setattr(model.config, "_attn_implementation", "eager" if attention == "eager" else "sdpa")
        with apply_sdtp(model, make_pruners(32), schedule):
            for row, own in enumerate(mask.bool()):
                alone = generate_with_cache(model, {"input_ids": inputs["input_ids"][row : row + 1, own]})
                assert_same(got, alone, mask, row)
    if static:  # whose mask is never left out under flash attention, be it all ones
        padded = len(set(lengths)) > 1 or attention in FLASH
        expected = cache_bytes(model, schedule, lengths, room=4, padded=padded)
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == expected


@pytest.mark.parametrize("attention", FLASH)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@torch.no_grad()
def test_flash_attention(monkeypatch, pruners, attention, cache, padded, budget):
    expected = oracle_tokens(budget, padded)
    varlen, model = flash_stand_in.install(monkeypatch), model_with(attention)
    with apply_sdtp(model, pruners, SCHEDULES[budget]):
        assert torch.equal(generate(model, inputs_of(padded), cache_implementation=cache), expected)
    assert bool(varlen.calls) == (padded or cache == "static")


@torch.no_grad()
def test_flash_attention_gets_the_bounds_of_every_segment(monkeypatch, pruners):
    """Padding is a sequence of its own, in terms of the tokens that are left."""
    varlen, model, schedule = flash_stand_in.install(monkeypatch), model_with(FLASH[0]), SCHEDULES["global"]
    batch = padded_batch()
    with apply_sdtp(model, pruners, schedule):
        model(**batch, cache=DynamicCache(config=model.config), logits_to_keep=1)
    expected = []
    for stage in range(len(LAYERS) + 1):
        kept = [naive_keep(schedule, length, stage)[0] for length in LENGTHS]
        width = max(kept)
        bounds = [[row * width, (row + 1) * width - n] for row, n in enumerate(kept)]
        expected.append([*itertools.chain(*bounds), len(kept) * width])
    layers_of_stage = [sum(start <= layer for start in LAYERS) for layer in range(6)]
    assert (
        [q for q, _ in varlen.calls] == [k for _, k in varlen.calls] == [expected[stage] for stage in layers_of_stage]
    )


@torch.no_grad()
def test_no_host_sync_of_ours_under_flash_attention(monkeypatch, pruners):
    varlen, model = flash_stand_in.install(monkeypatch), model_with(FLASH[0])
    monkeypatch.setattr(type(varlen), "__call__", lambda self, q, *_, **__: torch.zeros_like(q))
    with apply_sdtp(model, pruners, SCHEDULES["global"]), NoHostSync(outside="transformers/masking_utils.py"):
        model(**padded_batch(), cache=DynamicCache(config=model.config), logits_to_keep=1)


@torch.no_grad()
def test_flash_attention_in_a_later_turn(monkeypatch, pruners):
    """New tokens with holes among them go by their mask, in pruned layers too."""
    schedule, tokens = SCHEDULES["global"], {}
    flash_stand_in.install(monkeypatch)
    for attention in ("sdpa", FLASH[0]):
        model = model_with(attention)
        with apply_sdtp(model, pruners, schedule):
            first = generate(model, padded_batch(), return_dict_in_generate=True)
            ids = torch.cat([first.sequences, prompt(30, 3)], dim=1)
            mask = torch.nn.functional.pad(padded_batch()["attention_mask"], (0, ids.shape[1] - TOKENS), value=1)
            mask[1, -30:-23] = 0
            turn = {"input_ids": ids, "attention_mask": mask}
            tokens[attention] = generate(model, turn, cache=first.cache)
    assert torch.equal(tokens["sdpa"], tokens[FLASH[0]])


@torch.no_grad()
def test_flex_attention(monkeypatch, pruners):
    leave_flex_uncompiled(monkeypatch)
    model = model_with("flex_attention")
    with apply_sdtp(model, pruners, SCHEDULES["global"]):
        got = generate(model, padded_batch(), max_new_tokens=3)
    assert torch.equal(got, oracle_tokens("global", padded=True)[:, : TOKENS + 3])


# --------------------------------------------------------------------------------------------------------- static cache


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@torch.no_grad()
def test_static_cache_has_the_bytes_of_the_schedule(pruners, budget, schedule, padded):
    model = make_qwen2()
    lengths = LENGTHS if padded else (TOKENS,)
    expected = oracle_tokens(budget, padded)
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 50)
    with apply_sdtp(model, pruners, schedule):
        assert torch.equal(generate(model, inputs_of(padded), cache=cache), expected)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == cache_bytes(
        model, schedule, lengths, room=50, padded=padded
    )
    assert {layer.max_cache_len - layer.kept.shape[1] for layer in cache.layers if isinstance(layer, PrunedState)} == {
        50
    }


@torch.no_grad()
def test_static_cache_by_name_beams_and_a_later_turn(pruners, schedule):
    model = make_qwen2()
    with apply_sdtp(model, pruners, schedule, later_turns=False):  # a static cache takes none
        beams = {"num_beams": 3, "num_return_sequences": 2}
        expected = generate(model, padded_batch(), **beams)
        assert torch.equal(generate(model, padded_batch(), cache_implementation="static", **beams), expected)
        results = []
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=TOKENS + 60)):
            first = generate(model, padded_batch(), cache=cache, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, prompt(30, 3)], dim=1)
            mask = torch.nn.functional.pad(padded_batch()["attention_mask"], (0, ids.shape[1] - TOKENS), value=1)
            results.append(generate(model, {"input_ids": ids, "attention_mask": mask}, cache=cache))
    assert torch.equal(*results)


@torch.no_grad()
def test_a_reset_static_cache_takes_another_prompt(pruners, schedule):
    model = make_qwen2()
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 50)
    with apply_sdtp(model, pruners, schedule):
        for tokens in (TOKENS, 90, 230, 30, TOKENS):  # pruned, also to more room than before, and too short for it
            cache.reset()
            expected = generate(model, {"input_ids": prompt(tokens)})
            assert torch.equal(generate(model, {"input_ids": prompt(tokens)}, cache=cache), expected)


@pytest.mark.parametrize("attention", ["sdpa", FLASH[0]])
@torch.no_grad()
def test_drafts_over_a_static_cache(monkeypatch, pruners, schedule, attention):
    """Prompt lookup takes back what it guessed wrong, after the prompt and at its end."""
    flash_stand_in.install(monkeypatch)
    model, inputs = model_with(attention), {"input_ids": prompt(20).repeat(1, 10)}  # candidates from the first step on
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 50)
    with apply_sdtp(model, pruners, schedule):
        expected = generate(model, inputs)
        assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=30, cache=cache), expected)


@torch.no_grad()
def test_crop_of_a_static_cache(pruners):
    """At most to where the tail begins that every layer has; a layer's tokens are counted on the device."""
    model, caches = make_qwen2(), (DynamicCache, functools.partial(StaticCache, max_cache_len=TOKENS + 40))
    logits = []
    with apply_sdtp(model, pruners, SCHEDULES["global"]):
        for cache in (make(config=model.config) for make in caches):
            mask = padded_batch()["attention_mask"]
            model(padded_batch()["input_ids"], attention_mask=mask, cache=cache, logits_to_keep=9)
            for removed, new in ((5, prompt(7, 3)), (6, prompt(2, 3))):  # into the tail, then after the prompt
                cache.crop(-removed)
                mask = torch.nn.functional.pad(mask, (0, new.shape[1] - removed), value=1)
                positions = (mask.cumsum(-1) - 1)[:, -new.shape[1] :]
                logits.append(model(new, attention_mask=mask, position_ids=positions, cache=cache).logits)
            with pytest.raises((ValueError, RuntimeError), match="prefill the shorter prompt"):
                cache.crop(-7)
    for a, b in zip(logits[:2], logits[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@of_both_dtypes
@settings(max_examples=2, phases=PHASES)
@given(lengths=rows, schedule=schedules)
@torch.no_grad()
def test_generate_compiles_decoding_over_a_static_cache(models, dtype, lengths, schedule):
    """What generate() does by itself on a GPU: one graph for all steps, of one shape.

    Tokens and cache are those of uncompiled steps, which are those of the row alone.
    """
    torch._dynamo.reset()
    graphs, model, inputs = [], models[dtype], prompts(lengths)

    def backend(graph, inputs):
        graphs.append([tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)])
        return graph.forward

    config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
    config._compile_all_devices = True
    asked = {"cache_implementation": "static", "max_new_tokens": 6}
    with apply_sdtp(model, make_pruners(32), schedule):
        expected = generate_with_cache(model, inputs, **asked)
        assert not graphs
        got = generate_with_cache(model, inputs, compile_config=config, **asked)
    assert_same(got, expected, inputs["attention_mask"])
    assert len(graphs) == 1


# ------------------------------------------------------------------------------------------- quantized, offloaded cache


def round_fp8(layer, states):
    """8-bit floating point with the scale of the first keys and values."""
    if not hasattr(layer, "scales"):
        layer.scales = [t.abs().amax().float() / torch.finfo(torch.float8_e4m3fn).max for t in states]
    return [
        ((t.float() / s).to(torch.float8_e4m3fn).float() * s).to(t.dtype)
        for t, s in zip(states, layer.scales, strict=True)
    ]


def round_quanto(states):
    from optimum.quanto import MaxOptimizer, qint4, quantize_weight

    def rounded(tensor):
        scale, shift = MaxOptimizer()(tensor, qint4, 0, GROUP)
        return quantize_weight(tensor, qint4, 0, scale, shift, GROUP).dequantize()

    return list(map(rounded, states))


def round_hqq(states):
    from hqq.core.quantize import Quantizer

    def rounded(tensor):
        asked = {"nbits": 4, "axis": 0, "group_size": GROUP, "device": "cpu"}
        states, meta = Quantizer.quantize(tensor, **asked)
        scales = {name: meta[name].to(tensor.dtype) for name in ("scale", "zero")}
        return Quantizer.dequantize(states, {**meta, **scales, "compute_dtype": tensor.dtype})

    return list(map(rounded, states))


def assert_equals_rounding(model, cache, lengths, schedule, update):
    """A quantized cache of kept tokens is what rounding the kept keys and values by hand gives.

    Exactly, also in bfloat16: the same is computed, in tensors of the same shapes.
    """
    inputs, asked = prompts(lengths), {"max_new_tokens": 6, "output_logits": True}
    kinds = {type(layer) for layer in cache.layers}
    with apply_sdtp(model, make_pruners(32), schedule, later_turns=False):  # a quantized cache takes none
        got = generate_with_cache(model, inputs, cache=cache, **asked)
        assert all(isinstance(layer, tuple(kinds)) for layer in cache.layers)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DynamicLayer, "update", update)
            expected = generate_with_cache(model, inputs, **asked)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(cache.layers, expected.cache.layers, strict=True):
        assert a.get_seq_length() == b.keys.shape[2]


@of_both_dtypes
@settings(max_examples=12, phases=PHASES)
@given(lengths=rows, schedule=schedules)
@torch.no_grad()
def test_quantized_cache(models, dtype, lengths, schedule):
    grow = DynamicLayer.update

    def grow_rounded(layer, *states, **_):
        is_first = not layer.is_initialized
        cached = grow(layer, *round_fp8(layer, states))
        return states if is_first else cached  # attention within the prompt is exact

    cache = QuantizedCache("fp8", config=models[dtype].config)
    assert_equals_rounding(models[dtype], cache, lengths, schedule, grow_rounded)


@pytest.fixture(scope="module", params=["quanto", "hqq"])
def package(request):
    """A package that quantizes in groups, where it is installed."""
    if request.param == "hqq":
        pytest.importorskip("hqq")
        yield request.param, round_hqq
        return
    pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions.extension import get_extension

    def unpack(packed, bits):
        return torch.cat([packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)])

    with pytest.MonkeyPatch.context() as patch:  # its form in C++ would be compiled first, for a minute
        patch.setattr(get_extension("quanto_cpp"), "_lib", types.SimpleNamespace(unpack=unpack))
        yield request.param, round_quanto


@of_both_dtypes
@settings(max_examples=8, phases=PHASES)
@given(lengths=rows, schedule=schedules, residual_length=st.sampled_from([1, 3, 128]))
@torch.no_grad()
def test_group_wise_quantized_cache(models, package, dtype, lengths, schedule, residual_length):
    """The last tokens wait to be rounded until there are so many; then all are, again."""
    (backend, rounded), grow = package, DynamicLayer.update

    def grow_rounded(layer, *states, **_):
        is_first = not layer.is_initialized
        cached = grow(layer, *states)
        layer.exact = 0 if is_first else layer.exact + states[0].shape[2]
        if is_first or layer.exact >= residual_length:
            layer.keys, layer.values, layer.exact = *rounded(cached), 0
        return cached

    config = models[dtype].config
    cache = QuantizedCache(backend, config, nbits=4, q_group_size=GROUP, residual_length=residual_length)
    assert_equals_rounding(models[dtype], cache, lengths, schedule, grow_rounded)


def test_group_wise_quantized_layers_keep_their_settings(monkeypatch):
    """Layers of quanto and HQQ, whose packages need not be there to be made again."""
    for kind in (QuantoQuantizedLayer, HQQQuantizedLayer):
        monkeypatch.setattr(kind, "__init__", QuantizedLayer.__init__)
        cache = Cache(layers=[kind(4, 0, -1, q_group_size=16, residual_length=8)])
        install(cache, 0, torch.empty(1, 0, dtype=torch.long), SCHEDULES["global"])
        layer = cache.layers[0]
        assert isinstance(layer, PrunedState)
        assert (layer.nbits, layer.axis_key, layer.axis_value, layer.q_group_size, layer.residual_length) == (
            4,
            0,
            -1,
            16,
            8,
        )


class NoStream(torch.nn.Identity):
    def wait_stream(self, other): ...

    def __enter__(self): ...

    def __exit__(self, *error): ...


@pytest.fixture(scope="module")
def offloading():
    """On a CPU there are no streams. What is offloaded must not be read: it is NaN until it is fetched again."""

    def offload(layer):
        if layer.is_initialized and not hasattr(layer, "away"):
            layer.away = layer.keys, layer.values
            layer.keys, layer.values = (torch.full_like(t, torch.nan) for t in layer.away)

    def prefetch(layer):
        if hasattr(layer, "away"):
            layer.keys, layer.values = layer.__dict__.pop("away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Stream", NoStream)
        patch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
        patch.setattr(CacheLayerMixin, "offload", offload)
        patch.setattr(CacheLayerMixin, "prefetch", prefetch)
        yield


@of_both_dtypes
@settings(max_examples=8, phases=PHASES)
@given(lengths=rows, schedule=schedules, by_attention=st.booleans())
@torch.no_grad()
def test_offloaded_cache(models, offloading, dtype, lengths, schedule, by_attention):
    """The logits of a cache that stays where it is, bit for bit, also in bfloat16: the same is computed."""
    model, inputs = models[dtype], prompts(lengths)
    asked = {"max_new_tokens": 6, "output_logits": True}
    scorer = "attention" if by_attention else make_pruners(32)
    with apply_sdtp(model, scorer, schedule, later_turns=False):  # an offloaded cache takes none
        expected = generate_with_cache(model, inputs, **asked)
        got = generate_with_cache(model, inputs, cache_implementation="offloaded", **asked)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


# ------------------------------------------------------------------------------------------------------- many at a time


def test_where_a_layer_computes():
    """Of a hooked module its hook says it, whatever became of the weights."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layer = torch.nn.Linear(2, 2)
    assert device_of(layer) == torch.device("cpu")
    add_hook_to_module(layer, AlignDevicesHook(execution_device="meta"))
    add_hook_to_module(layer, copy.deepcopy(layer._hf_hook), append=True)
    assert device_of(layer) == torch.device("meta")
