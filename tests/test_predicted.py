"""Dropped tokens that keep predicted keys and values, in every family, against the dense loop that substitutes them."""

import copy
import functools
import pickle
from types import SimpleNamespace

import accelerate
import pytest
import torch
from helpers.oracle import MaskedDense
from test_attention_and_cache import round_fp8
from test_families import (
    BLOCK,
    GLOBAL,
    LAYERS,
    LENGTHS,
    TOKENS,
    entries_of_row,
    generate,
    model_of,
    next_tokens,
    of_every_family,
    padded_batch,
    positions_of,
    prompt,
    pruners_of,
    random_model,
)
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from sdtp_kernels import KVPredictor, PruningSchedule, apply_sdtp, backends, reference
from sdtp_kernels.models.compat import CACHE, Fp8QuantizedLayer

UNEVEN = PruningSchedule(LAYERS, (0.9, 0.35, 0.61), sink=0, recent=0, min_prompt=20)
of_both_budgets = pytest.mark.parametrize("schedule", [GLOBAL, BLOCK], ids=["global", "block"])
of_both_forms = pytest.mark.parametrize("rank", [None, 6], ids=["full", "rank 6"])


@functools.cache
def predictor_of(family, rank=None):
    config = model_of(family).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    torch.manual_seed(3)
    predictor = KVPredictor(
        config.hidden_size, config.num_key_value_heads, head_dim, num_hidden_layers=5, stages=LAYERS, rank=rank
    )
    for name, parameter in predictor.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "bias" in name else parameter.shape[-1] ** -0.5)
    return predictor.requires_grad_(False)


def patched(model, schedule=GLOBAL, scorer=None, rank=None, **options):
    predictor = predictor_of(model.config.model_type, rank)
    return apply_sdtp(model, scorer or pruners_of(), schedule, "reference", kv_predictor=predictor, **options)


@of_every_family
@of_both_budgets
@of_both_forms
@torch.no_grad()
def test_prefill_equals_the_dense_loop(family, schedule, rank):
    model, ids = model_of(family), prompt()
    oracle = MaskedDense.of(model, pruners_of(), schedule, TOKENS, predictor_of(family, rank))
    expected, history = oracle.row(ids[0], TOKENS)
    cache = DynamicCache(config=model.config)
    with patched(model, schedule, rank=rank) as handle:
        got = model(ids, **{CACHE: cache}).logits[0]
        report = handle.report()
        without_cache = model(ids, use_cache=False).logits[0]
    assert report.kept[0].tolist() == history[-1]
    assert report.kept_per_stage == [len(kept) for kept in history]
    assert report.dropped_kv == "predicted"
    torch.testing.assert_close(got, expected[history[-1]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without_cache, got, atol=1e-5, rtol=1e-5)
    if schedule.budget == "global":  # nothing can continue it
        assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 5
    assert [layer.get_seq_length() for layer in cache.layers] == [TOKENS] * 5
    with torch.no_grad(), apply_sdtp(model, pruners_of(), schedule, kv_predictor=predictor_of(family, rank)) as handle:
        fused = model(ids).logits[0]
    torch.testing.assert_close(fused, got, atol=1e-4, rtol=1e-4)


@of_every_family
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@of_both_budgets
@torch.no_grad()
def test_32_greedy_tokens_of_a_padded_batch(family, schedule, cache):
    model, batch = model_of(family), padded_batch()
    settings = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    oracle = MaskedDense.of(model, pruners_of(), schedule, TOKENS, predictor_of(family))
    with patched(model, schedule):
        got = generate(model, batch, max_new_tokens=32, **settings)
    assert torch.equal(got[:, TOKENS:], next_tokens(oracle, batch, got))


@of_every_family
@of_both_budgets
@torch.no_grad()
def test_padded_rows_equal_rows_alone(family, schedule):
    model, batch = model_of(family), padded_batch()
    cache = DynamicCache(config=model.config)
    with patched(model, schedule) as handle:
        positions = positions_of(batch["attention_mask"])
        got = model(**batch, position_ids=positions, logits_to_keep=3, **{CACHE: cache}).logits
        together = handle.report().kept
        for row, length in enumerate(LENGTHS):
            alone = DynamicCache(config=model.config)
            logits = model(batch["input_ids"][row : row + 1, -length:], logits_to_keep=3, **{CACHE: alone}).logits
            kept = together[row]
            assert torch.equal(kept[kept >= 0], handle.report().kept[0])
            torch.testing.assert_close(got[row], logits[0], atol=1e-4, rtol=1e-4)
            for a, b in zip(cache.layers, alone.layers, strict=True):
                torch.testing.assert_close(
                    entries_of_row(a, batch["attention_mask"], row),
                    entries_of_row(b, torch.ones(1, length), 0),
                    atol=1e-4,
                    rtol=1e-4,
                )


@torch.no_grad()
def test_rows_with_settings_of_their_own_equal_rows_alone():
    model = model_of("qwen3")
    ids = prompt(batch=4)
    settings = [
        {"keep_ratio": 1.0},
        {"keep_ratio": 0.3},
        {"protect": [(10, 60)]},
        {"enabled": False},
    ]
    with patched(model) as handle:
        with handle.request(
            keep_ratio=[1.0, 0.3, 0.7, 0.7], protect=[[], [], [(10, 60)], []], enabled=[True, True, True, False]
        ):
            got = model(ids, logits_to_keep=1).logits
        for row, own in enumerate(settings):
            with handle.request(**own):
                alone = model(ids[row : row + 1], logits_to_keep=1).logits
            torch.testing.assert_close(got[row], alone[0], atol=1e-5, rtol=1e-5)


@of_every_family
@torch.no_grad()
def test_keep_everything_is_bit_identical(family):
    model, batch = model_of(family), padded_batch()
    dense = model(**batch).logits
    for keep_ratio in (1.0, 1 - 1e-8):  # the latter goes through all stages, and drops nothing
        with patched(model, PruningSchedule(LAYERS, keep_ratio, min_prompt=20)):
            assert torch.equal(model(batch["input_ids"][:1]).logits, dense[:1])
    assert torch.equal(model(**batch).logits, dense)


@pytest.mark.parametrize("scorer", ["attention", "recent", "norm"])
@torch.no_grad()
def test_scorers_by_name(scorer):
    """The last queries attend to what arrives at the stage, not to what is predicted."""
    model = random_model("qwen3", attention="eager")
    ids = prompt()
    with patched(model, scorer=scorer) as handle:
        got, kept = model(ids).logits[0], handle.report().kept[0]
    model.set_attn_implementation("sdpa")
    with patched(model, scorer=scorer) as handle:
        torch.testing.assert_close(model(ids).logits[0], got, atol=1e-4, rtol=1e-4)
        assert torch.equal(handle.report().kept[0], kept)
    if scorer == "attention":
        model.set_attn_implementation("eager")
        oracle = MaskedDense.of(model, scorer, GLOBAL, TOKENS, predictor_of("qwen3"))
        expected, history = oracle.row(ids[0], TOKENS)
        assert kept.tolist() == history[-1]
        torch.testing.assert_close(got, expected[history[-1]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
@torch.no_grad()
def test_ways_of_decoding(settings):
    model, batch = model_of("llama"), {"input_ids": prompt()}
    oracle = MaskedDense.of(model, pruners_of(), GLOBAL, TOKENS, predictor_of("llama"))
    with patched(model):
        got = generate(model, batch, max_new_tokens=8, **settings)
    oracle_settings = {**settings, "use_cache": False}
    oracle_settings.pop("prompt_lookup_num_tokens", None)
    assert torch.equal(got, generate(oracle, batch, max_new_tokens=8, **oracle_settings))


@torch.no_grad()
def test_the_cache_is_that_of_a_dense_model():
    """Cut, copied, reordered, given to an unpatched model: what follows is what the whole cache gives."""
    model, ids = model_of("llama"), prompt()
    more = prompt(tokens=9, seed=7)
    cache = DynamicCache(config=model.config)
    with patched(model) as handle:
        model(ids, logits_to_keep=1, **{CACHE: cache})
        other = copy.deepcopy(cache)
        with_patch = model(more, **{CACHE: other}).logits
        assert "added" in handle.report().note or handle.report().layers
    without = model(more, **{CACHE: cache}).logits
    assert torch.equal(with_patch, without)
    cache.crop(-9)
    assert cache.get_seq_length() == TOKENS
    torch.testing.assert_close(model(more, **{CACHE: cache}).logits, without, atol=1e-5, rtol=1e-5)
    cache.crop(-29)  # into the prompt
    assert [layer.get_seq_length() for layer in cache.layers] == [TOKENS - 20] * 5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_static_cache_has_room_for_more(attention):
    model, ids = random_model("qwen2", attention=attention), prompt()
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=TOKENS + 40)
    with patched(model):
        logits = model(ids, logits_to_keep=1, **{CACHE: dynamic}).logits
        torch.testing.assert_close(model(ids, logits_to_keep=1, **{CACHE: static}).logits, logits, atol=1e-5, rtol=1e-5)
        for one, other in zip(dynamic.layers, static.layers, strict=True):
            torch.testing.assert_close(other.keys[:, :, :TOKENS], one.keys, atol=1e-5, rtol=1e-5)
        more = prompt(tokens=5, seed=9)
        torch.testing.assert_close(
            model(more, **{CACHE: static}).logits, model(more, **{CACHE: dynamic}).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.skipif(Fp8QuantizedLayer is None, reason="FP8 caches came with transformers 5.21")
@torch.no_grad()
def test_a_quantized_cache(monkeypatch):
    """As for a dense model: the prompt attends to exact keys and values, what follows to rounded ones."""
    model, ids, grow = model_of("llama"), prompt(), DynamicLayer.update

    def grow_rounded(layer, *states, **_):
        is_first = not layer.is_initialized
        cached = grow(layer, *round_fp8(layer, states))
        return states if is_first else cached

    rounded, by_hand = QuantizedCache("fp8", config=model.config), DynamicCache(config=model.config)
    with patched(model):
        got = generate(model, {"input_ids": ids}, max_new_tokens=4, **{CACHE: rounded})
        monkeypatch.setattr(DynamicLayer, "update", grow_rounded)
        assert torch.equal(got, generate(model, {"input_ids": ids}, max_new_tokens=4, **{CACHE: by_hand}))
    assert [layer.get_seq_length() for layer in rounded.layers] == [TOKENS + 3] * 5


@torch.no_grad()
def test_weights_on_disk(tmp_path):
    """accelerate moves what a layer is called with, and the maps are where the layers compute."""
    model, batch = random_model("llama"), padded_batch()
    with patched(model):
        expected = generate(model, batch, max_new_tokens=4)
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(5)}
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    with patched(model):
        assert torch.equal(generate(model, batch, max_new_tokens=4), expected)


@torch.no_grad()
def test_a_model_that_moves_when_it_is_patched():
    model, ids = random_model("llama"), prompt()
    with patched(model, rank=6):
        expected = model(ids, logits_to_keep=1).logits
        got = model.half()(ids, logits_to_keep=1).logits
        assert torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1) > 0.98
    predictor = copy.deepcopy(predictor_of("llama", 6))
    tokens = predictor.encode(1, torch.empty(1, 3, 32, device="meta"))  # a device without data
    keys, values = predictor(1, 4, tokens)
    assert tokens.is_meta
    assert keys.is_meta
    assert values.is_meta


def test_gradients_reach_the_prompt():
    """Of kept tokens through the layers, of dropped ones through the maps."""
    model = random_model("llama")
    embeddings = model.get_input_embeddings()(prompt()).detach().requires_grad_()
    with patched(model) as handle:
        model(inputs_embeds=embeddings, logits_to_keep=1).logits.sum().backward()
        is_kept = torch.isin(torch.arange(TOKENS), handle.report().kept)
    norms = embeddings.grad[0].norm(dim=-1)
    assert not is_kept.all()
    assert (norms > 0).all()


def test_copies_and_pickles_predict(monkeypatch):
    model, ids = random_model("qwen2"), prompt()
    with torch.no_grad(), patched(model):
        expected = model(ids).logits
        # As in another process, whose transformers knows nothing of us yet.
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)


@torch.no_grad()
def test_the_attention_of_others_is_left_alone(monkeypatch):
    """sdpa learns a kind of mask, once, on top of what another tool has put there."""
    seen = []

    def of_another_tool(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", of_another_tool)
    model, ids = random_model("llama"), prompt()
    dense = model(ids).logits
    for _ in range(2):
        with patched(model) as handle:
            model(ids, logits_to_keep=1)
            assert handle.report().dropped_kv == "predicted"
        assert len(seen) == 5 + 1  # the dense pass, and the layer below the first stage
        seen[5:] = []
    assert torch.equal(model(ids).logits, dense)
    assert AttentionInterface._global_mapping["sdpa"].__wrapped__ is of_another_tool


@torch.no_grad()
def test_one_masked_attention_equals_the_op(monkeypatch):
    """A GPU without Triton takes the mask."""
    model, batch = model_of("qwen3"), padded_batch()
    with patched(model) as handle:
        expected = model(**batch, logits_to_keep=1).logits
        handle.attends_by_position = False
        torch.testing.assert_close(model(**batch, logits_to_keep=1).logits, expected, atol=1e-4, rtol=1e-4)
    with apply_sdtp(model, "recent", GLOBAL, kv_predictor=predictor_of("qwen3")) as handle:
        assert handle.attends_by_position
    monkeypatch.setattr(backends.choose("cpu", torch.device("cpu")), "position_attention", reference.position_attention)
    with apply_sdtp(model, "recent", GLOBAL, kv_predictor=predictor_of("qwen3")) as handle:
        assert not handle.attends_by_position


def test_dropout_of_attention_is_refused():
    model = random_model("llama", attention_dropout=0.1).train()
    with patched(model), pytest.raises(NotImplementedError, match=r"model\.eval"):
        model(prompt(), logits_to_keep=1)


def test_bfloat16_has_maps_of_its_own():
    """The predictor that was passed stays as it was."""
    model, ids = model_of("qwen3", torch.bfloat16), prompt()
    predictor = predictor_of("qwen3", None)  # the very one that `patched` passes
    with torch.no_grad():
        with patched(model_of("qwen3")) as handle:
            expected, kept = model_of("qwen3")(ids, logits_to_keep=1).logits, handle.report().kept
        with patched(model) as handle:
            got = model(ids, logits_to_keep=1).logits
            overlap = torch.isin(handle.report().kept, kept).float().mean()
    assert next(predictor.parameters()).dtype == torch.float32
    assert overlap > 0.9
    assert torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1) > 0.98


@torch.no_grad()
def test_compiled_equals_eager():
    model, ids = random_model("qwen2"), prompt()
    with patched(model):
        expected = model(ids, logits_to_keep=1, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(ids, logits_to_keep=1, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("length", [20, 50, 512, 4096])
@pytest.mark.parametrize(
    "schedule", [GLOBAL, BLOCK, PruningSchedule(LAYERS, (0.9, 0.35, 0.61), sink=0, recent=0, min_prompt=20)]
)
def test_no_prompt_drops_more_than_the_schedule_says(schedule, length):
    lengths = torch.arange(length + 1)
    for stage in range(1, 4):
        before, after = (schedule.num_keep(lengths, s) for s in (stage - 1, stage))
        most = schedule.max_dropped(length, stage)
        assert (before - after).max() <= most <= length
        assert most <= max(int((before - after).max()) + 1, 1)


def no_weights(**changes):
    predictor = copy.deepcopy(predictor_of("qwen2"))
    for name, value in changes.items():
        setattr(predictor, name, value)
    return predictor


def nan_weights():
    predictor = copy.deepcopy(predictor_of("qwen2"))
    predictor.up["3:4"].weight.data[0, 0] = float("nan")
    return predictor


@pytest.mark.parametrize(
    ("predictor", "schedule", "options", "error", "text"),
    [
        (lambda: no_weights(hidden_size=48), GLOBAL, {}, ValueError, "hidden_size=48, the model has 32"),
        (lambda: no_weights(num_key_value_heads=4), GLOBAL, {}, ValueError, "num_key_value_heads=4"),
        (lambda: no_weights(num_hidden_layers=7), GLOBAL, {}, ValueError, "num_hidden_layers=7"),
        (lambda: predictor_of("qwen2"), PruningSchedule((2, 3), 0.7), {}, ValueError, r"layers \[2\]"),
        (nan_weights, GLOBAL, {}, ValueError, "up.3:4.weight has NaN"),
        (lambda: predictor_of("qwen2"), GLOBAL, {"evict_earlier_kv": True}, NotImplementedError, "cache press"),
        (lambda: predictor_of("qwen2"), GLOBAL, {"dropped_kv": "linear"}, ValueError, "expected 'none', 'predicted'"),
        (lambda: None, GLOBAL, {"dropped_kv": "predicted"}, ValueError, "pass kv_predictor"),
    ],
)
def test_what_does_not_fit_is_refused(predictor, schedule, options, error, text):
    model = random_model("qwen2")
    with pytest.raises(error, match=text):
        apply_sdtp(model, "recent", schedule, kv_predictor=predictor(), **options)
    assert "_sdtp" not in vars(model)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_without_queries_at_any_position(attention):
    model = random_model("qwen2")
    handle = patched(model)
    model.config._attn_implementation = attention
    with pytest.raises(NotImplementedError, match="pass dropped_kv='none'"):
        model(prompt())
    handle.remove()
    with pytest.raises(NotImplementedError, match="pass dropped_kv='none'"):
        patched(model)


@of_every_family
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@torch.no_grad()
def test_chunks_equal_one_call(family, padded):
    """Counts, cache and answer; what is unfinished waits at the first stage, or is computed again."""
    model = model_of(family)
    batch = padded_batch() if padded else {"input_ids": prompt(), "attention_mask": torch.ones(1, TOKENS, dtype=int)}
    with patched(model, BLOCK):
        whole = DynamicCache(config=model.config)
        expected = generate(model, batch, max_new_tokens=6, **{CACHE: whole})
        for size in (1, 17, 64, 119):
            cache = DynamicCache(config=model.config)
            got = generate(model, batch, max_new_tokens=6, prefill_chunk_size=size, **{CACHE: cache})
            assert torch.equal(got, expected)
            for a, b in zip(cache.layers, whole.layers, strict=True):
                for row in range(len(got)):
                    one, other = (entries_of_row(layer, batch["attention_mask"], row) for layer in (a, b))
                    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prompt_that_is_not_whole_yet():
    """What waits at the first stage is missing in later layers: another model must not read such a cache."""
    model, ids = model_of("llama"), prompt()
    cache = DynamicCache(config=model.config)
    with patched(model, BLOCK):
        model(ids[:, :90], sdtp_prompt_length=TOKENS, **{CACHE: cache})
        assert [layer.get_seq_length() for layer in cache.layers] == [90] + [64] * 4
    with pytest.raises(RuntimeError, match="not patched"):
        model(ids[:, 90:], **{CACHE: cache})
    with patched(model, BLOCK):
        model(ids[:, 90:], sdtp_prompt_length=TOKENS, logits_to_keep=1, **{CACHE: cache})
    assert [layer.get_seq_length() for layer in cache.layers] == [TOKENS] * 5
    more = prompt(tokens=5, seed=4)
    with patched(model, BLOCK):
        expected = model(more, **{CACHE: copy.deepcopy(cache)}).logits
    torch.testing.assert_close(model(more, **{CACHE: cache}).logits, expected, atol=1e-5, rtol=1e-5)


@of_both_budgets
@torch.no_grad()
def test_a_chat(schedule):
    """Under the block budget a later turn is pruned as one prompt with all the tokens; under the global one, added."""
    model, first = model_of("qwen3"), prompt()
    cache = DynamicCache(config=model.config)
    with patched(model, schedule) as handle:
        answer = generate(model, {"input_ids": first}, max_new_tokens=6, **{CACHE: cache})
        turn = torch.cat([answer, prompt(tokens=90, seed=8)], dim=-1)
        got = generate(model, {"input_ids": turn}, max_new_tokens=6, **{CACHE: cache})
        if schedule.budget == "global":
            assert "none of them pruned" in handle.report().note
        else:
            assert torch.equal(got, generate(model, {"input_ids": turn}, max_new_tokens=6))


def test_pruners_that_bring_a_predictor():
    model, pruners = model_of("qwen2"), dict(pruners_of())
    stack = type("Stack", (dict,), {"kv_predictor": predictor_of("qwen2")})(pruners)
    for dropped_kv, expected in ((None, "predicted"), ("predicted", "predicted"), ("none", "none")):
        with torch.no_grad(), apply_sdtp(model, stack, GLOBAL, dropped_kv=dropped_kv) as handle:
            model(prompt(), logits_to_keep=1)
            assert handle.report().dropped_kv == expected
            assert f"dropped_kv '{expected}'" in str(handle.report())


def test_sizes():
    predictor = predictor_of("llama", rank=6)
    config = SimpleNamespace(**model_of("llama").config.to_dict())
    predictor.check(config, GLOBAL)
    maps = 4 + 2 + 1  # later layers of the stages before layers 1, 3 and 4
    assert predictor.num_bytes == 4 * (3 * 6 * 32 + maps * 2 * 16 * (6 + 1))
