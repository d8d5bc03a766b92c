"""A prompt in pieces: chunks of a prefill, turns of a chat, a kept prefix. The reference is the prompt in one call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.oracle import MaskedDense, cache_bytes, naive_keep, naive_select
from helpers.requests import (
    ARITHMETIC,
    EXACT_SCORES,
    LAYERS,
    PHASES,
    as_in,
    assert_same,
    block_schedule,
    generate,
    layer_entries,
    make_models,
    of_both_dtypes,
    prompts,
    rows,
    schedules,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import NoHostSync
from transformers import DynamicCache

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp
from sdtp_kernels.models.cache import PrunedState, stage_of


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture(scope="module")
def pruners():
    torch.manual_seed(1)
    return {layer: TokenPruner(32, pooling=pooling) for layer, pooling in zip(LAYERS, (1, 3, 5), strict=True)}


@of_both_dtypes
@settings(max_examples=40, phases=PHASES)
@given(
    lengths=rows,
    chunk=st.integers(1, 160),
    block_size=st.integers(6, 64),
    min_prompt=st.sampled_from([1, 20, 70]),
)
@torch.no_grad()
def test_chunks_equal_one_call(models, pruners, dtype, lengths, chunk, block_size, min_prompt):
    model, inputs = models[dtype], prompts(lengths)
    with ARITHMETIC[dtype](), apply_sdtp(model, pruners, block_schedule(block_size, min_prompt)):
        expected = generate(model, inputs)
        got = generate(model, inputs, prefill_chunk_size=chunk)
    assert_same(got, expected, inputs["attention_mask"])


@of_both_dtypes
@settings(max_examples=20, phases=PHASES)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    turns=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), min_size=1, max_size=3),
    new_tokens=st.integers(1, 20),
    chunk=st.none() | st.integers(1, 60),
    block_size=st.integers(6, 40),
    min_prompt=st.sampled_from([1, 20, 70]),
)
@torch.no_grad()
def test_a_chat_equals_its_last_prompt_alone(
    models, pruners, dtype, lengths, turns, new_tokens, chunk, block_size, min_prompt
):
    """Turns of uneven length in the rows; each row must be what the whole conversation is as one prompt."""
    model, inputs = models[dtype], prompts(lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    answer = {"max_new_tokens": new_tokens, "prefill_chunk_size": chunk}
    with ARITHMETIC[dtype](), apply_sdtp(model, pruners, block_schedule(block_size, min_prompt)):
        got = generate(model, inputs, **answer)
        for tokens, padding in turns:
            turn = prompts([tokens], seed=tokens)["input_ids"].expand(len(lengths), -1)
            ids = torch.cat([got.sequences, turn], dim=1)
            mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            mask[0, -tokens:][: min(padding, tokens - 1)] = 0
            turn = {"input_ids": ids, "attention_mask": mask}
            got = generate(model, turn, cache=got.cache, **answer)
        for row, own in enumerate(mask.bool()):
            alone = generate(model, {"input_ids": ids[row : row + 1, own]}, max_new_tokens=new_tokens)
            assert_same(got, alone, mask, row)


@of_both_dtypes
@settings(max_examples=20, phases=PHASES)
@given(
    prefix=st.integers(1, 120),
    suffixes=st.lists(st.integers(1, 90), min_size=2, max_size=2),
    chunk=st.none() | st.integers(1, 60),
    block_size=st.integers(6, 40),
)
@torch.no_grad()
def test_a_kept_prefix_equals_each_prompt_alone(models, pruners, dtype, prefix, suffixes, chunk, block_size):
    model, ids = models[dtype], prompts([prefix])["input_ids"]
    schedule = block_schedule(block_size, min_prompt=1)
    kept = DynamicCache(config=model.config)
    with ARITHMETIC[dtype](), apply_sdtp(model, pruners, schedule):
        model(ids, cache=kept, logits_to_keep=1)
        finished = [
            (layer.keys, schedule.num_keep(prefix, stage_of(kept, i)) - schedule.num_recent(prefix))
            for i, layer in enumerate(kept.layers)
        ]
        for tokens in suffixes:
            whole = {"input_ids": torch.cat([ids, prompts([tokens], seed=3)["input_ids"]], dim=1)}
            cache = copy.deepcopy(kept)
            got = generate(model, whole, cache=cache, prefill_chunk_size=chunk)
            assert_same(got, generate(model, whole), torch.ones_like(whole["input_ids"]))
            for layer, (keys, tokens) in zip(cache.layers, finished, strict=True):
                assert torch.equal(layer.keys[:, :, :tokens], keys[:, :, :tokens]), "finished blocks never change"


@of_both_dtypes
@settings(max_examples=5, phases=PHASES)
@given(prefix=st.integers(20, 120), suffixes=st.lists(st.integers(1, 40), min_size=2, max_size=2))
@torch.no_grad()
def test_a_kept_prefix_under_the_global_budget(models, pruners, dtype, prefix, suffixes):
    """Refused; with later_turns=False pruned by itself, once, and each suffix whole after it, as the report says."""
    model, ids = models[dtype], prompts([prefix])["input_ids"]
    schedule, rounded = PruningSchedule(LAYERS, 0.7, min_prompt=20), as_in(dtype, pruners)
    kept = DynamicCache(config=model.config)
    whole = {"input_ids": torch.cat([ids, prompts([suffixes[0]], seed=3)["input_ids"]], dim=1)}
    with apply_sdtp(model, rounded, schedule, EXACT_SCORES[dtype]):
        model(ids, cache=kept, logits_to_keep=1)
        before = [layer.keys for layer in kept.layers]
        with pytest.raises(NotImplementedError, match=r'PruningSchedule\(budget="block"\)'):
            generate(model, whole, cache=kept)
        assert all(layer.keys is keys for layer, keys in zip(kept.layers, before, strict=True)), "nothing half-written"
    kept = DynamicCache(config=model.config)
    options = {"backend": EXACT_SCORES[dtype], "later_turns": False}
    with ARITHMETIC[dtype](), apply_sdtp(model, rounded, schedule, **options) as handle:
        model(ids, cache=kept, logits_to_keep=1)
        held = [layer.keys.shape[2] for layer in kept.layers]
        assert handle.report().layers
        for tokens in suffixes:
            whole = {"input_ids": torch.cat([ids, prompts([tokens], seed=3)["input_ids"]], dim=1)}
            got = generate(model, whole, cache=copy.deepcopy(kept))
            assert [layer.keys.shape[2] for layer in got.cache.layers] == [n + tokens + 3 for n in held]
            assert f"{tokens} tokens added to a cache, none of them pruned" in str(handle.report())
            assert 'PruningSchedule(budget="block")' in handle.report().note
            oracle = MaskedDense.of(type(model)(model.config).to(dtype), rounded, schedule, prefix)
            oracle.load_state_dict(model.state_dict())
            assert torch.equal(got.sequences, generate(oracle, whole, use_cache=False).sequences)


@torch.no_grad()
def test_a_turn_behind_an_answer_is_added_under_the_global_budget(models, pruners):
    model, turn = models[torch.float32], prompts([30], seed=3)["input_ids"]
    with apply_sdtp(model, pruners, PruningSchedule(LAYERS, 0.7, min_prompt=20)) as handle:
        first = generate(model, prompts([100]))
        held = [layer.keys.shape[2] for layer in first.cache.layers]
        second = generate(model, {"input_ids": torch.cat([first.sequences, turn], dim=1)}, cache=first.cache)
        assert "31 tokens added to a cache, none of them pruned" in handle.report().note
        ids = prompts([100])["input_ids"]
        prefix = model(ids, use_cache=True, logits_to_keep=1).cache
        generate(model, {"input_ids": torch.cat([ids, turn], dim=1)}, cache=prefix, enabled=False)  # as asked
    assert [layer.keys.shape[2] for layer in second.cache.layers] == [n + 31 + 3 for n in held]


@torch.no_grad()
def test_a_prompt_in_pieces_by_hand(models, pruners):
    """Without generate(), a call says how long the prompt is of which it reads a piece; any other prunes nothing."""
    model, ids = models[torch.float32], prompts([100])["input_ids"]
    whole, pieces = (DynamicCache(config=model.config) for _ in range(2))
    with apply_sdtp(model, pruners, block_schedule()):
        expected = model(ids, cache=whole).logits[:, -1]
        for piece in ids.split(23, dim=1):
            got = model(piece, cache=pieces, sdtp_prompt_length=100).logits
        torch.testing.assert_close(got[:, -1], expected, atol=1e-5, rtol=0)
        lengths = [layer.keys.shape[2] for layer in whole.layers]
        assert [layer.keys.shape[2] for layer in pieces.layers] == lengths
        assert model(ids[:, :50], cache=pieces).logits.shape[1] == 50
        assert [layer.keys.shape[2] for layer in pieces.layers] == [n + 50 for n in lengths]


@torch.no_grad()
def test_a_prompt_left_in_the_middle_is_taken_up(models, pruners):
    """An exception between two chunks leaves tokens that upper layers have not seen; the next call brings them."""
    model, ids = models[torch.float32], prompts([100])["input_ids"]
    with apply_sdtp(model, pruners, block_schedule()):
        expected = model(ids).logits[:, -1]
        cache = DynamicCache(config=model.config)
        model(ids[:, :55], cache=cache, sdtp_prompt_length=100)
        assert cache.layers[4].keys.shape[2] == 11, "one block, and nothing of the unfinished one"
        torch.testing.assert_close(model(ids[:, 55:], cache=cache).logits[:, -1], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_later_turns_can_be_left_alone(models, pruners):
    model, ids = models[torch.float32], prompts([200])["input_ids"]
    with apply_sdtp(model, pruners, block_schedule(), later_turns=False):
        first = generate(model, {"input_ids": ids[:, :100]}, prefill_chunk_size=30)
        held = [layer.keys.shape[2] for layer in first.cache.layers]
        again = generate(model, {"input_ids": ids[:, :100]})
        assert_same(first, again, torch.ones(1, 100, dtype=torch.long))
        second = generate(model, {"input_ids": ids}, cache=first.cache)
        grown = [layer.keys.shape[2] for layer in second.cache.layers]
        assert [b - a for a, b in zip(held, grown, strict=True)] == [100] * 5
        assert all(getattr(layer, "waiting", None) is None for layer in second.cache.layers)


@torch.no_grad()
def test_a_long_chat_stays_bounded_by_the_schedule(models, pruners):
    model, schedule = models[torch.float32], block_schedule()
    ids, cache = prompts([40])["input_ids"], DynamicCache(config=model.config)
    with apply_sdtp(model, pruners, schedule):
        for _ in range(6):
            ids = generate(model, {"input_ids": ids}, cache=cache, max_new_tokens=30).sequences
            ids = torch.cat([ids, prompts([40], seed=3)["input_ids"]], dim=1)
        prompt = ids.shape[1] - 40 - 30
        counts = [schedule.num_keep(prompt, stage_of(cache, i)) + 29 for i in range(5)]
        assert [layer.keys.shape[2] for layer in cache.layers] == counts


@torch.no_grad()
def test_what_cannot_come_in_pieces(models, pruners):
    model, inputs = models[torch.float32], prompts([100])
    refused = pytest.raises(NotImplementedError, match=r'budget="block"')
    with apply_sdtp(model, pruners, PruningSchedule(LAYERS)):
        with refused:
            generate(model, inputs, prefill_chunk_size=30)
        with refused:
            model(inputs["input_ids"][:, :30], sdtp_prompt_length=100)
    with apply_sdtp(model, "attention", block_schedule()):
        first = generate(model, inputs)
        with pytest.raises(NotImplementedError, match=r"attention_score \(layer 1\) looks past its block.*block_local"):
            generate(model, inputs, prefill_chunk_size=30)
        with pytest.raises(NotImplementedError, match="later_turns=False"):
            generate(model, {"input_ids": first.sequences}, cache=first.cache)


@pytest.mark.parametrize("scorer", ["random", "recent", "norm"])
@torch.no_grad()
def test_block_local_scorers_in_pieces(models, scorer):
    model, inputs = models[torch.float32], prompts([150, 90])
    with apply_sdtp(model, scorer, block_schedule()):
        expected = generate(model, inputs)
        assert_same(generate(model, inputs, prefill_chunk_size=37), expected, inputs["attention_mask"])


# ------------------------------------------------------------------------------------------------ settings of requests


def alone(model, inputs, row, **settings):
    own = inputs["attention_mask"][row].bool()
    return generate(model, {"input_ids": inputs["input_ids"][row : row + 1, own]}, **settings)


def is_in(ranges, index):
    return any(begin <= index < end for begin, end in ranges)


ranges = st.lists(st.tuples(st.integers(0, 130), st.integers(0, 30)).map(lambda r: (r[0], r[0] + r[1])), max_size=3)


@of_both_dtypes
@pytest.mark.parametrize("budget", ["global", "block"])
@settings(max_examples=25, phases=PHASES)
@given(
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=3),
    protect=st.lists(ranges, min_size=3, max_size=3),
    as_mask=st.booleans(),
    pooling=st.sampled_from([1, 3]),
    block_size=st.integers(6, 40),
)
@torch.no_grad()
def test_protected_tokens_stay_and_the_rest_is_pruned_without_them(
    models, dtype, budget, lengths, protect, as_mask, pooling, block_size
):
    """Against the selection as the contract has it, of the scores that are left when protected tokens are taken out."""
    model, inputs = models[dtype], prompts(lengths)
    schedule = PruningSchedule((1,), 0.6, budget=budget, block_size=block_size, min_prompt=20)
    pruner = as_in(dtype, {1: TokenPruner(32, pooling=pooling)})[1]
    padding = [max(lengths) - n for n in lengths]
    given_ranges = protect[: len(lengths)]
    if as_mask:
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, own in enumerate(given_ranges):
            for begin, end in own:
                mask[row, padding[row] + begin : padding[row] + end] = True
        given_ranges = mask
    scores = {}
    with torch.no_grad():
        recorded = copy.deepcopy(model)  # output_hidden_states leaves hooks that no compiler likes
        hidden = recorded(**inputs, output_hidden_states=True, position_ids=positions(inputs)).hidden_states[1]
        for row in range(len(lengths)):
            scores[row] = pruner(hidden[row, padding[row] :]).tolist()
    cache = DynamicCache(config=model.config)
    backend = EXACT_SCORES[dtype]
    with apply_sdtp(model, {1: pruner}, schedule, backend) as handle, handle.request(protect=given_ranges):
        model(**inputs, position_ids=positions(inputs), cache=cache, logits_to_keep=1)
    for row, n in enumerate(lengths):
        free = [i for i in range(n) if not is_in(protect[row], i)]
        expected = list(range(n))
        if free:
            keep, recent, _ = naive_keep(schedule, len(free), 1)
            per_block = naive_keep(schedule, len(free), 0)[2]
            chosen = naive_select([scores[row][i] for i in free], keep, 4, recent, per_block, pooling)
            expected = sorted({free[i] for i in chosen} | set(range(n)) - set(free))
        kept = (
            cache.layers[1].kept[row].tolist()
            if isinstance(cache.layers[1], PrunedState)
            else list(range(-padding[row], n))
        )
        assert [i for i in kept if i >= 0] == expected


@torch.no_grad()
def test_settings_end_with_their_request(models, pruners):
    model, inputs = models[torch.float32], prompts([100])
    with apply_sdtp(model, pruners, block_schedule()) as handle:
        expected = generate(model, inputs).cache.layers[4].keys
        with handle.request(enabled=False):
            assert generate(model, inputs).cache.layers[4].keys.shape[2] == 103
            assert "not enabled" in str(handle.report())
        with pytest.raises(ZeroDivisionError), handle.request(enabled=False):
            raise ZeroDivisionError
        assert torch.equal(generate(model, inputs).cache.layers[4].keys, expected)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"keep_ratio": 1.5}, r"keep_ratio=1.5: expected a share in \(0, 1\]"),
        ({"keep_ratio": [0.5, 0.5], "enabled": [True] * 3}, r"settings for \[2, 3\] rows"),
        ({"keep_ratio": [0.5] * 3}, "settings for 3 rows, but the batch has 2"),
        ({"protect": [[(0, 5)], [], []]}, "settings for 3 rows, but the batch has 2"),
        ({"protect": [(5, 2)]}, r"protect=\[\(5, 2\)\]: expected ranges"),
        ({"protect": torch.ones(2, 100)}, r"expected a mask .* got \[2, 100\] torch.float32"),
    ],
)
@torch.no_grad()
def test_settings_that_cannot_be(models, pruners, given_settings, message):
    model, inputs = models[torch.float32], prompts([100, 70])
    with apply_sdtp(model, pruners, block_schedule()), pytest.raises(ValueError, match=message):
        generate(model, inputs, **given_settings)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@torch.no_grad()
def test_no_host_sync_in_pieces_settings_and_eviction(models, pruners, backend):
    model, inputs = models[torch.float32], prompts([100, 70])
    mask = inputs["attention_mask"]
    ours = NoHostSync(outside="transformers/masking_utils.py")
    given = {"keep_ratio": [0.5, 0.9], "protect": [[(3, 9)], []]}
    with apply_sdtp(model, pruners, block_schedule(), backend) as handle, handle.request(**given), ours:
        cache = DynamicCache(config=model.config)
        for begin, end in ((0, 40), (40, 77), (77, 100)):
            piece = inputs["input_ids"][:, begin:end]
            model(piece, attention_mask=mask[:, :end], cache=cache, sdtp_prompt_length=100)
    with apply_sdtp(model, pruners, PruningSchedule(LAYERS), backend, evict_earlier_kv=True), ours:
        model(**inputs, cache=DynamicCache(config=model.config), logits_to_keep=1)


@pytest.mark.parametrize("evicts", [False, True], ids=["pieces", "evicted"])
@torch.no_grad()
def test_one_graph(models, pruners, evicts):
    """Prefill, a later piece of the prompt (or a later turn) and a step of decoding, each in one graph."""
    model, ids = models[torch.float32], prompts([120])["input_ids"]
    torch._dynamo.reset()
    with apply_sdtp(model, pruners, block_schedule(), evict_earlier_kv=evicts):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for piece in ids.split((75, 44, 1), dim=1):
            asked = {} if evicts or piece.shape[1] == 1 else {"sdtp_prompt_length": 119}
            logits = [
                run(piece, cache=cache, logits_to_keep=1, **asked).logits
                for run, cache in zip((model, compiled), caches, strict=True)
            ]
            if logits[0].shape[1]:  # a piece that is not the last may have none
                torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
        for a, b in zip(*(cache.layers for cache in caches), strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=0)


def positions(inputs):
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


@of_both_dtypes
@pytest.mark.parametrize("budget", ["global", "block"])
@settings(max_examples=20, phases=PHASES)
@given(
    lengths=st.lists(st.integers(1, 130), min_size=2, max_size=3),
    keep_ratio=st.lists(st.sampled_from([1.0, 0.9, 0.5]), min_size=3, max_size=3),
    enabled=st.lists(st.booleans(), min_size=3, max_size=3),
    min_prompt=st.lists(st.sampled_from([1, 40, 100]), min_size=3, max_size=3),
    protect=st.lists(ranges, min_size=3, max_size=3),
    chunk=st.none() | st.integers(1, 60),
)
@torch.no_grad()
def test_settings_of_a_row_are_those_of_the_row_alone(
    models, pruners, dtype, budget, lengths, keep_ratio, enabled, min_prompt, protect, chunk
):
    model, inputs = models[dtype], prompts(lengths)
    given_settings = {"keep_ratio": keep_ratio, "enabled": enabled, "min_prompt": min_prompt, "protect": protect}
    given_settings = {name: value[: len(lengths)] for name, value in given_settings.items()}
    schedule = PruningSchedule(LAYERS, 0.7, budget=budget, block_size=16, min_prompt=20)
    chunk = chunk if budget == "block" else None
    with ARITHMETIC[dtype](), apply_sdtp(model, pruners, schedule):
        got = generate(model, inputs, prefill_chunk_size=chunk, **given_settings)
        for row in range(len(lengths)):
            own = {name: value[row] for name, value in given_settings.items()}
            assert_same(got, alone(model, inputs, row, **own), inputs["attention_mask"], row)


# --------------------------------------------------------------------------------------------- KV of earlier layers


@of_both_dtypes
@settings(max_examples=8, phases=PHASES)
@given(lengths=rows, schedule=schedules, beams=st.sampled_from([1, 3]))
@torch.no_grad()
def test_evicted_equals_masked_dense(models, pruners, dtype, lengths, schedule, beams):
    model, inputs, pruners = models[dtype], prompts(lengths), as_in(dtype, pruners)
    asked = {"num_beams": beams, "output_logits": True}
    oracle = MaskedDense.of(model, pruners, schedule, max(lengths))
    oracle.evicts = True
    with ARITHMETIC[dtype]():
        expected = generate(oracle, inputs, use_cache=False, **asked)
        with apply_sdtp(model, pruners, schedule, EXACT_SCORES[dtype], evict_earlier_kv=True):
            got = generate(model, inputs, **asked)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)


@of_both_dtypes
@settings(max_examples=20, phases=PHASES)
@given(lengths=rows, schedule=schedules)
@torch.no_grad()
def test_an_evicted_cache_holds_what_the_last_stage_keeps(models, pruners, dtype, lengths, schedule):
    """Bit for bit the entries that are there without eviction, and exactly the bytes that the schedule says."""
    model, inputs = models[dtype], prompts(lengths)
    mask = inputs["attention_mask"]
    caches = []
    for evicts in (False, True):
        cache = DynamicCache(config=model.config)
        with apply_sdtp(model, pruners, schedule, evict_earlier_kv=evicts) as handle:
            model(**inputs, position_ids=positions(inputs), cache=cache, logits_to_keep=1)
        caches.append([layer_entries(layer, mask) for layer in cache.layers])
    assert cache.get_seq_length() == max(lengths), "the logical length"
    num_bytes = cache_bytes(model, schedule, lengths, padded=len(set(lengths)) > 1, evicted=True)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == num_bytes
    assert not handle.report().layers or handle.report().kv_bytes == num_bytes
    whole, evicted = caches
    for rows_before, rows_after in zip(whole, evicted, strict=True):
        for last, before, after in zip(whole[-1], rows_before, rows_after, strict=True):
            left = sorted(last)
            assert sorted(after) == left
            assert all(torch.equal(after[token], before[token]) for token in left)


@torch.no_grad()
def test_chat_and_crop_of_an_evicted_cache(models, pruners):
    model, ids = models[torch.float32], prompts([200])["input_ids"]
    schedule = PruningSchedule(LAYERS, 0.7, min_prompt=20)
    oracle = MaskedDense.of(model, pruners, schedule, 150)
    oracle.evicts = True
    with apply_sdtp(model, pruners, schedule, evict_earlier_kv=True):
        first = generate(model, {"input_ids": ids[:, :150]})
        turn = torch.cat([first.sequences, ids[:, 150:]], dim=1)
        expected = generate(oracle, {"input_ids": turn}, use_cache=False).sequences
        second = generate(model, {"input_ids": turn}, cache=first.cache)
        assert torch.equal(second.sequences, expected)
        cache = second.cache
        cache.crop(-3)
        again = generate(model, {"input_ids": expected[:, :-3]}, cache=cache, max_new_tokens=3)
        assert torch.equal(again.sequences, expected)
        cache.reset()
        model(ids[:, :15], cache=cache)
        assert cache.get_seq_length() == 15
    refused = pytest.raises(NotImplementedError, match="leave evict_earlier_kv out")
    with apply_sdtp(model, pruners, block_schedule(), evict_earlier_kv=True), refused:
        generate(model, {"input_ids": ids}, prefill_chunk_size=50)
