"""Every family against the masked-dense oracle. This file runs under every supported version of transformers."""

import copy
import functools
import pickle
import re

import pytest
import torch
from helpers import flash_stand_in
from helpers.models import make_model
from helpers.oracle import MaskedDense, naive_attention, naive_select
from helpers.requests import ARITHMETIC, EXACT_SCORES, as_in, of_both_dtypes
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp
from sdtp_kernels.models.cache import PrunedState
from sdtp_kernels.models.compat import CACHE
from sdtp_kernels.models.family import FAMILIES, family_of

LAYERS = (1, 3, 4)
GLOBAL = PruningSchedule(LAYERS, 0.7, min_prompt=20)
BLOCK = PruningSchedule(LAYERS, 0.7, budget="block", block_size=32, min_prompt=20)
TOKENS = 120
LENGTHS = (TOKENS, 77, 41)
SCALINGS = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "linear": {"factor": 2.0},
}
of_every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def model_of(family, dtype=torch.float32, attention="sdpa"):
    return random_model(family, attention=attention).to(dtype)


def random_model(family, **settings):
    """Norms and biases are random as well, so that one left out shows; values of size 1, as tolerances are absolute."""
    model = make_model(family, num_layers=5, hidden_size=32, **settings)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3, generator=generator)
        if re.search("[qk]_(proj|norm).weight", name):  # sharp attention, which masks and scores depend on
            parameter.data *= 2
    return model


@functools.cache
def pruners_of(**terms):
    torch.manual_seed(1)
    pruners = {
        layer: TokenPruner(32, pooling=pooling, **terms) for layer, pooling in zip(LAYERS, (1, 3, 5), strict=True)
    }
    for pruner in pruners.values():
        if pruner.distance:
            torch.nn.init.normal_(pruner.distance_bias)
        if pruner.attention:
            pruner.attention_weight.data.fill_(2.0)
        if pruner.lexical:
            pruner.lexical_weight.data.fill_(3.0)
    return pruners


def prompt(tokens=TOKENS, batch=1, seed=2):
    return torch.randint(1, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded_batch(lengths=LENGTHS):
    ids = prompt(max(lengths), len(lengths))
    mask = torch.stack([torch.arange(ids.shape[1]) >= ids.shape[1] - n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 8, "do_sample": False, **settings}
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    return model.generate(**inputs, **settings)


def kept_per_layer(cache):
    return [layer.kept[0].tolist() for layer in cache.layers if isinstance(layer, PrunedState)]


def assert_equals_oracle(model, pruners, schedule=GLOBAL, **options):
    """Prefill of one prompt: what is kept in every stage, and the logits of what is left."""
    dtype, ids = model.dtype, prompt()
    pruners = pruners if isinstance(pruners, str) else as_in(dtype, pruners)
    cache = DynamicCache(config=model.config)
    with ARITHMETIC[dtype](), torch.no_grad():
        expected, history = MaskedDense.of(model, pruners, schedule, TOKENS).row(ids[0], TOKENS)
        with apply_sdtp(model, pruners, schedule, EXACT_SCORES[dtype], **options) as handle:
            got = model(ids, **{CACHE: cache}).logits[0]
            without_cache = model(ids, use_cache=False).logits[0]
            assert handle.report().kept[0].tolist() == history[-1]
    kept = kept_per_layer(cache)
    assert [kept[layer - LAYERS[0]] for layer in LAYERS] == history
    torch.testing.assert_close(got, expected[history[-1]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(without_cache, got, atol=1e-5, rtol=1e-5)
    return got


@of_every_family
@of_both_dtypes
@pytest.mark.parametrize("schedule", [GLOBAL, BLOCK], ids=["global", "block"])
def test_prefill_equals_masked_dense(family, dtype, schedule):
    assert_equals_oracle(model_of(family, dtype), pruners_of(), schedule)


@of_every_family
@of_both_dtypes
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_32_greedy_tokens_of_a_padded_batch(family, dtype, cache):
    model, pruners, batch = model_of(family, dtype), as_in(dtype, pruners_of()), padded_batch()
    settings = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    with ARITHMETIC[dtype]():
        oracle = MaskedDense.of(model, pruners, GLOBAL, TOKENS)
        with apply_sdtp(model, pruners, GLOBAL, EXACT_SCORES[dtype]):
            got = generate(model, batch, max_new_tokens=32, **settings)
        assert torch.equal(got[:, TOKENS:], next_tokens(oracle, batch, got))


def next_tokens(oracle, batch, sequences):
    """What the dense model says after the prompt and after each token of an answer: one forward a row."""
    rows = []
    for row, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
        logits, _ = oracle.row(sequences[row, TOKENS - length :], length)
        rows.append(logits[length - 1 : -1].argmax(-1))
    return torch.stack(rows)


@of_every_family
@of_both_dtypes
@torch.no_grad()
def test_padded_rows_equal_rows_alone(family, dtype):
    model, pruners, batch = (
        model_of(family, dtype),
        pruners_of(distance=True, attention=True, lexical=True, averaging=True),
        padded_batch(),
    )
    caches = [StaticCache(config=model.config, max_cache_len=TOKENS + 2), DynamicCache(config=model.config)]
    for cache in caches:
        with ARITHMETIC[dtype](), apply_sdtp(model, pruners, GLOBAL):
            positions = positions_of(batch["attention_mask"])
            got = model(**batch, position_ids=positions, logits_to_keep=1, **{CACHE: cache}).logits
            for row, length in enumerate(LENGTHS):
                alone = model(batch["input_ids"][row : row + 1, TOKENS - length :], logits_to_keep=1).logits
                torch.testing.assert_close(got[row], alone[0], atol=1e-5, rtol=1e-5)


@of_every_family
@of_both_dtypes
@torch.no_grad()
def test_keep_everything_is_bit_identical(family, dtype):
    model, batch = model_of(family, dtype), padded_batch()
    dense, dense_batch = model(prompt()).logits, model(**batch).logits
    answer = generate(model, batch)
    for budget in ("global", "block"):
        with apply_sdtp(model, pruners_of(), PruningSchedule(LAYERS, 1.0, budget=budget)):
            assert torch.equal(model(prompt()).logits, dense)
            assert torch.equal(model(**batch).logits, dense_batch)
            assert torch.equal(generate(model, batch), answer)
    assert torch.equal(model(prompt()).logits, dense), "and so it is afterwards"


@of_every_family
@of_both_dtypes
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@torch.no_grad()
def test_chunks_equal_one_call(family, dtype, padded):
    model, inputs = model_of(family, dtype), padded_batch() if padded else {"input_ids": prompt()}
    with ARITHMETIC[dtype](), apply_sdtp(model, pruners_of(), BLOCK):
        whole = generate(model, inputs, return_dict_in_generate=True)
        chunks = generate(model, inputs, return_dict_in_generate=True, prefill_chunk_size=23)
    assert torch.equal(chunks.sequences, whole.sequences)
    mask = inputs.get("attention_mask", torch.ones(1, TOKENS, dtype=torch.long))
    for a, b in zip(chunks[CACHE].layers, whole[CACHE].layers, strict=True):
        for row in range(len(mask)):
            torch.testing.assert_close(*(entries_of_row(layer, mask, row) for layer in (a, b)), atol=1e-4, rtol=1e-4)


def entries_of_row(layer, mask, row):
    own = layer.kept[row] >= 0 if isinstance(layer, PrunedState) else mask[row].bool()
    own = torch.nn.functional.pad(own, (0, layer.keys.shape[2] - own.shape[0]), value=True)
    return torch.stack([layer.keys[row][:, own], layer.values[row][:, own]])


@of_every_family
@torch.no_grad()
def test_a_chat_equals_its_last_prompt_alone(family):
    model, turn = model_of(family), prompt(45, seed=3)
    with apply_sdtp(model, pruners_of(), BLOCK):
        first = generate(model, {"input_ids": prompt()}, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, turn], dim=1)
        got = generate(model, {"input_ids": ids}, **{CACHE: first[CACHE]})
        assert torch.equal(got, generate(model, {"input_ids": ids}))


# -------------------------------------------------------------------- what a scorer sees of the layer below


@of_every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("scorer", ["attention", "a term", "all terms"])
def test_attention_is_that_of_the_model_itself(family, attention, scorer):
    """The oracle scores by the weights that eager attention returns, with what was dropped before masked."""
    names = ("attention",) if scorer == "a term" else ("attention", "distance", "lexical", "averaging")
    terms = dict.fromkeys(names, True)
    pruners = scorer if scorer == "attention" else pruners_of(**terms)
    eager, model = model_of(family, attention="eager"), model_of(family, attention=attention)
    with torch.no_grad():
        _, history = MaskedDense.of(eager, pruners, GLOBAL, TOKENS).row(prompt()[0], TOKENS)
        _, without = MaskedDense.of(eager, pruners_of(), GLOBAL, TOKENS).row(prompt()[0], TOKENS)
        assert history != without, "the attention decides"
        for use_cache in (True, False):
            with apply_sdtp(model, pruners, GLOBAL) as handle:
                model(prompt(), use_cache=use_cache, logits_to_keep=1)
                assert handle.report().kept[0].tolist() == history[-1]
        cache = DynamicCache(config=model.config)
        with apply_sdtp(model, pruners, GLOBAL):
            model(prompt(), **{CACHE: cache})
    kept = kept_per_layer(cache)
    assert [kept[layer - LAYERS[0]] for layer in LAYERS] == history


@of_every_family
@torch.no_grad()
def test_the_first_stage_ranks_by_output_attentions(family):
    """Without the oracle: an unpatched model's ``output_attentions``, and a stage that sees every token."""
    probabilities = model_of(family, attention="eager")(prompt(), output_attentions=True).attentions[0][0]
    expected = naive_select(naive_attention(probabilities, 32).tolist(), 40, sink=0, recent=1)
    with apply_sdtp(model_of(family), "attention", PruningSchedule((1,), 40 / TOKENS, sink=0, recent=1e-3)) as handle:
        model_of(family)(prompt(), logits_to_keep=1)
        assert handle.report().kept[0].tolist() == expected


@of_every_family
@torch.no_grad()
def test_queries_keys_and_values_are_those_of_the_layer(family):
    """Attention built from the family's own three is that of the model, weights and output."""
    model = model_of(family, attention="eager")
    layer, found = model.model.layers[2], {}
    tap = family_of(layer).query_tap(layer.self_attn)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.update(hidden=args[0])),
        tap.register_forward_hook(lambda _, __, output: found.update(tapped=output)),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.update(mixed=args[0])),
    ]
    probabilities = model(prompt(), output_attentions=True).attentions[2]
    for hook in hooks:
        hook.remove()
    source = family_of(layer)
    query, key, value = (f(layer, found["hidden"]) for f in (source.queries, source.keys, source.values))
    torch.testing.assert_close(found["tapped"].reshape(query.transpose(1, 2).shape), query.transpose(1, 2))
    cos, sin = model.model.rotary_emb(query, torch.arange(TOKENS)[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * layer.self_attn.scaling
    scores = scores.masked_fill(~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), probabilities)
    mixed = (probabilities @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, found["mixed"])


# ---------------------------------------------------------------------------- rotary scaling, windows, tied heads


@of_every_family
@pytest.mark.parametrize("rope_type", SCALINGS)
def test_rotary_scaling(family, rope_type):
    settings = {"rope_theta": 1e4, "original_max_position_embeddings": 64, **SCALINGS[rope_type]}
    model = random_model(family, attention="eager", rope_parameters={"rope_type": rope_type, **settings})
    got = assert_equals_oracle(model, pruners_of(attention=True))
    with torch.no_grad():
        assert (model(prompt()).logits - model_of(family)(prompt()).logits).abs().max() > 0.1, "the scaling counts"
    assert got.shape[0] < TOKENS


@of_every_family
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_tables_that_depend_on_the_length_are_refused(family, rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if rope_type == "longrope":
        pairs = model_of(family).model.layers[0].self_attn.head_dim // 2
        rope |= {"short_factor": [1.0] * pairs, "long_factor": [2.0] * pairs}
    model = random_model(family, rope_parameters=rope)
    with pytest.raises(NotImplementedError, match=f"rope_type='{rope_type}'.*'default', 'linear', 'llama3' or 'yarn'"):
        apply_sdtp(model, pruners_of(), GLOBAL)
    assert "_sdtp" not in vars(model)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_is_refused_and_the_way_out_works(family, tmp_path):
    window = {"sliding_window": 64}
    if family != "mistral":
        window |= {"use_sliding_window": True, "max_window_layers": 2}
    random_model(family, **window).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="sliding-window layers count distance in tokens") as refusal:
        apply_sdtp(model, pruners_of(), GLOBAL)
    way_out = eval(f"dict({str(refusal.value).split('load the model with ')[1]})")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **way_out, dtype=torch.float32)
    assert_equals_oracle(model, pruners_of())


@of_every_family
def test_tied_heads(family, tmp_path):
    random_model(family, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_equals_oracle(model, pruners_of())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------- what versions of transformers do in their own way


@of_every_family
@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 8}],
    ids=["beams", "beams, two returned", "prompt lookup"],
)
@torch.no_grad()
def test_ways_of_decoding(family, settings):
    model, inputs = model_of(family), {"input_ids": prompt(20).repeat(1, 6)}
    oracle = MaskedDense.of(model, pruners_of(), GLOBAL, TOKENS)
    expected = generate(oracle, inputs, use_cache=False, **({} if "prompt_lookup_num_tokens" in settings else settings))
    with apply_sdtp(model, pruners_of(), GLOBAL):
        assert torch.equal(generate(model, inputs, **settings), expected)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_that_is_reset(kind):
    model, ids = model_of("llama"), prompt()
    cache = kind(config=model.config, **({} if kind is DynamicCache else {"max_cache_len": TOKENS + 8}))
    with apply_sdtp(model, pruners_of(), GLOBAL):
        expected = model(ids, **{CACHE: cache}).logits
        if kind is DynamicCache and "reset" not in vars(DynamicLayer):  # that of 5.16 leaves zeros, and their number
            with pytest.raises(NotImplementedError, match="a new DynamicCache"):
                cache.reset()
            return
        for tokens in (TOKENS, 10, TOKENS):
            cache.reset()
            got = model(ids[:, :tokens], **{CACHE: cache}).logits
            alone = expected if tokens == TOKENS else model(ids[:, :tokens]).logits
            torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-5)
    assert cache.layers[-1].kept.shape[1] == GLOBAL.num_keep(TOKENS, 3)


@torch.no_grad()
def test_a_cache_that_is_cut_copied_and_reordered():
    model, ids, cache = model_of("llama"), prompt(), DynamicCache(config=model_of("llama").config)
    with apply_sdtp(model, pruners_of(), GLOBAL):
        last = model(ids, **{CACHE: cache}).logits[:, -1:]
        copied = copy.deepcopy(cache)
        expected = model(ids[:, :3], **{CACHE: cache}).logits
        assert torch.equal(model(ids[:, :3], **{CACHE: copied}).logits, expected)
        cache.crop(-3)
        copied.crop(-4)
        for cut, new, wanted in ((cache, ids[:, :3], expected), (copied, ids[:, -1:], last)):
            torch.testing.assert_close(model(new, **{CACHE: cut}).logits, wanted, atol=1e-5, rtol=1e-5)
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(model(ids[:, :3], **{CACHE: cache}).logits, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="prefill the shorter prompt"):
            cache.crop(-50)


@of_every_family
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@torch.no_grad()
def test_flash_attention(monkeypatch, family, padded):
    """By a stand-in for its kernels, below the code of transformers that calls them."""
    inputs = padded_batch() if padded else {"input_ids": prompt()}
    with apply_sdtp(model_of(family), pruners_of(), GLOBAL):
        expected = generate(model_of(family), inputs)
    flash_stand_in.install(monkeypatch)
    model = copy.deepcopy(model_of(family))
    model.config._attn_implementation = "flash_attention_2"
    with apply_sdtp(model, pruners_of(), GLOBAL):
        assert torch.equal(generate(model, inputs), expected)


@of_every_family
@torch.no_grad()
def test_ways_to_call(family):
    model, ids = model_of(family), prompt()
    with apply_sdtp(model, pruners_of(), GLOBAL) as handle:
        expected = model(ids).logits
        output = model(ids, **{CACHE: DynamicCache()})
        assert torch.equal(output.logits, expected)
        assert output[CACHE].get_seq_length() == TOKENS
        assert torch.equal(model(ids, return_dict=False)[0], expected)
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected)
        assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), expected)
        for refused in ({"labels": ids}, {"output_hidden_states": True}, {"output_attentions": True}):
            with pytest.raises(NotImplementedError, match=next(iter(refused))):
                model(ids, **refused)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert handle.report().tokens == TOKENS
        for copied in copies:
            assert torch.equal(copied(ids).logits, expected)
    assert model(ids).logits.shape[1] == TOKENS
