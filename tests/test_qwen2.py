"""The patched Qwen2 against the masked-dense oracle, in every way that generate() can call it."""

import copy
import threading

import pytest
import torch
from helpers.models import make_qwen2
from helpers.oracle import MaskedDense, naive_select
from helpers.prompts import LAYERS, LENGTHS, SCHEDULES, SHORT_LENGTHS, TOKENS, generate, padded_batch, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp
from sdtp_kernels.backends import cpu
from sdtp_kernels.models import decoder, stage
from sdtp_kernels.models.cache import PrunedState
from sdtp_kernels.models.stage import LastQueries
from sdtp_kernels.scorers import SCORERS


@pytest.fixture(scope="module")
def pruners():
    torch.manual_seed(1)
    return {layer: TokenPruner(64, pooling=pooling) for layer, pooling in zip(LAYERS, (1, 3, 5), strict=True)}


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]


class Trace(TorchDispatchMode):
    """Names of the ops that are called, ours and torch's."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("budget", "expected"), [("global", ["prompt_bias", "prune_tokens"]), ("block", ["prune_tokens"])]
)
@torch.no_grad()
def test_a_stage_of_the_shipped_form_is_one_op(budget, expected, padded, monkeypatch):
    """Two with the terms that see the prompt's end; and torch computes nothing of it."""
    stages, prune = [], decoder.prune

    def traced(*args):
        with Trace() as trace:
            result = prune(*args)
        stages.append(trace.names)
        return result

    monkeypatch.setattr(decoder, "prune", traced)
    model, inputs = make_qwen2(), padded_batch() if padded else {"input_ids": prompt()}
    terms = dict.fromkeys(("distance", "attention", "lexical", "averaging"), True)
    pruners = {n: TokenPruner(64, **terms, pooling=7) for n in LAYERS}
    for pruner in pruners.values():
        pruner.lexical_weight.data.fill_(3.0)
    with apply_sdtp(model, pruners, SCHEDULES[budget]):
        model(**inputs, logits_to_keep=1)
    assert len(stages) == len(LAYERS)
    for names in stages:
        assert [name.removeprefix("sdtp::") for name in names if name.startswith("sdtp::")] == expected
        computed = {name.removeprefix("aten::").rstrip("_") for name in names}
        heavy = {"mm", "bmm", "addmm", "_softmax", "softmax", "sort", "topk", "argsort", "searchsorted", "cumsum"}
        assert not computed & (heavy | {"lerp", "log"})


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", ["global", "block"])
@torch.no_grad()
def test_a_stage_in_steps_computes_the_same(budget, padded, monkeypatch):
    """Where rows are not all alike a stage scores, selects and gathers in turn: here all of them do."""
    pruners = {n: TokenPruner(64, distance=True, attention=True, averaging=True, pooling=7) for n in LAYERS}
    model, inputs = make_qwen2(), padded_batch() if padded else {"input_ids": prompt()}
    with apply_sdtp(model, pruners, SCHEDULES[budget]):
        expected = model(**inputs).logits
        monkeypatch.setattr(stage, "Fused", type(None))
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("averaging", [False, True], ids=["stage alone", "mean of stages"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_prefill_equals_masked_dense(pruners, schedule, attention, averaging):
    pruners = copy.deepcopy(pruners)
    for pruner in pruners.values():
        pruner.averaging = averaging
    model = make_qwen2(attention=attention)
    oracle = MaskedDense.of(model, pruners, schedule, TOKENS)
    ids = prompt()
    expected, history = oracle.row(ids[0], TOKENS)
    cache = DynamicCache(config=model.config)
    with apply_sdtp(model, pruners, schedule) as handle:
        got = model(ids, cache=cache).logits[0]
        report = handle.report()
    kept = [layer.kept[0].tolist() for layer in cache.layers if isinstance(layer, PrunedState)]
    assert [kept[layer - LAYERS[0]] for layer in LAYERS] == history
    torch.testing.assert_close(got, expected[history[-1]], atol=1e-4, rtol=0)
    assert [layer.tokens_out for layer in report.layers] == [layer.keys.shape[2] for layer in cache.layers]
    assert report.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT_LENGTHS], ids=["uneven", "one short"])
@torch.no_grad()
def test_padded_rows_equal_rows_alone(pruners, schedule, attention, lengths):
    model = make_qwen2(attention=attention)
    batch = padded_batch(lengths)
    oracle = MaskedDense.of(model, pruners, schedule, TOKENS)
    expected = oracle(**batch).logits
    cache = DynamicCache(config=model.config)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with apply_sdtp(model, pruners, schedule):
        got = model(**batch, position_ids=positions, cache=cache, logits_to_keep=1).logits
        for row, length in enumerate(lengths):
            alone_cache = DynamicCache(config=model.config)
            alone = model(batch["input_ids"][row : row + 1, TOKENS - length :], cache=alone_cache)
            torch.testing.assert_close(got[row, -1], alone.logits[0, -1], atol=1e-4, rtol=0)
            for padded_layer, alone_layer in zip(cache.layers, alone_cache.layers, strict=True):
                own = slice(None)
                if isinstance(padded_layer, PrunedState):
                    own = padded_layer.kept[row] >= 0
                elif padded_layer.keys.shape[2] == TOKENS:
                    own = batch["attention_mask"][row].bool()
                torch.testing.assert_close(padded_layer.keys[row][:, own], alone_layer.keys[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 32},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    ],
    ids=["greedy", "beams", "beams, two returned", "sampling"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
def test_generate_equals_masked_dense(tiny_model, pruners, schedule, settings, padded):
    inputs = padded_batch() if padded else {"input_ids": prompt()}
    oracle = MaskedDense.of(tiny_model, pruners, schedule, TOKENS)
    torch.manual_seed(3)
    expected = generate(oracle, inputs, use_cache=False, **settings)
    torch.manual_seed(3)
    with apply_sdtp(tiny_model, pruners, schedule):
        assert torch.equal(generate(tiny_model, inputs, **settings), expected)


@torch.no_grad()
def test_prompt_lookup_equals_greedy(tiny_model, pruners, schedule):
    pattern = prompt(20)
    inputs = {"input_ids": pattern.repeat(1, 10)}  # repeats itself, so that there are candidates from the first step on
    with apply_sdtp(tiny_model, pruners, schedule):
        expected = generate(tiny_model, inputs, max_new_tokens=24)
        got = generate(tiny_model, inputs, max_new_tokens=24, prompt_lookup_num_tokens=30)
    assert torch.equal(got, expected)


@torch.no_grad()
def test_scored_continuation_is_never_pruned(tiny_model, pruners, schedule):
    """logits_to_keep=k: the last k - 1 tokens stand after the prompt."""
    ids, scored = prompt(), 60
    oracle = MaskedDense.of(tiny_model, pruners, schedule, TOKENS - scored + 1)
    expected, _ = oracle.row(ids[0], TOKENS - scored + 1)
    with apply_sdtp(tiny_model, pruners, schedule):
        got = tiny_model(ids, logits_to_keep=scored).logits[0]
    torch.testing.assert_close(got, expected[-scored:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_inputs_embeds(tiny_model, pruners, schedule):
    ids = prompt()
    embeds = tiny_model.get_input_embeddings()(ids)
    with apply_sdtp(tiny_model, pruners, schedule):
        expected = generate(tiny_model, {"input_ids": ids})
        assert torch.equal(generate(tiny_model, {"inputs_embeds": embeds}), expected[:, TOKENS:])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
def test_multi_turn_with_the_kept_cache(tiny_model, pruners, schedule, padded):
    inputs = padded_batch() if padded else {"input_ids": prompt()}
    second = prompt(30, inputs["input_ids"].shape[0])
    oracle = MaskedDense.of(tiny_model, pruners, schedule, TOKENS)
    # Later turns as they are: those that the block budget prunes are in test_serving.py.
    with apply_sdtp(tiny_model, pruners, schedule, later_turns=False) as handle:
        first = generate(tiny_model, inputs, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, second], dim=1)
        turn = {"input_ids": ids}
        if padded:
            new = torch.ones_like(ids[:, TOKENS:])
            new[1, -second.shape[1] : -second.shape[1] + 7] = 0  # the second turns are uneven, too
            turn["attention_mask"] = torch.cat([inputs["attention_mask"], new], dim=1)
        got = generate(tiny_model, turn, cache=first.cache)
        note = f"{30 + 1} tokens added to a cache, none of them pruned"  # with the last token of the answer
        assert handle.report().note.startswith(note)
    if not padded:
        assert torch.equal(got, generate(oracle, turn, use_cache=False))
        return
    for row in (0, 2):
        own = turn["attention_mask"][row].bool()
        alone = MaskedDense.of(tiny_model, pruners, schedule, int(inputs["attention_mask"][row].sum()))
        expected = generate(alone, {"input_ids": ids[row : row + 1, own]}, use_cache=False)
        assert torch.equal(got[row, -8:], expected[0, -8:])


@torch.no_grad()
def test_padding_inside_a_later_turn_is_masked(tiny_model, pruners, schedule):
    """What stands in masked columns of a later turn must not matter, in pruned layers either."""
    logits = []
    with apply_sdtp(tiny_model, pruners, schedule):
        for filler in (5, 9):
            cache = DynamicCache(config=tiny_model.config)
            tiny_model(prompt(), cache=cache)
            turn = prompt(12)
            turn[:, :4] = filler
            mask = torch.ones(1, TOKENS + 12, dtype=torch.long)
            mask[:, TOKENS : TOKENS + 4] = 0
            logits.append(tiny_model(turn, attention_mask=mask, cache=cache, logits_to_keep=1).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=0, rtol=0)


@torch.no_grad()
def test_state_lives_on_the_cache(tiny_model, pruners, schedule):
    """Two requests of different lengths, advanced in turn, are what each is alone; copies are independent."""
    prompts = [prompt(TOKENS), prompt(150)]
    with apply_sdtp(tiny_model, pruners, schedule):
        alone = [generate(tiny_model, {"input_ids": ids}) for ids in prompts]
        caches = [DynamicCache(config=tiny_model.config) for _ in prompts]
        sequences = list(prompts)
        for _ in range(8):
            for i, cache in enumerate(caches):
                new = sequences[i][:, cache.get_seq_length() :]
                token = tiny_model(new, cache=cache, logits_to_keep=1).logits.argmax(-1)
                sequences[i] = torch.cat([sequences[i], token], dim=1)
        assert all(torch.equal(a, b) for a, b in zip(alone, sequences, strict=True))
        branch = copy.deepcopy(caches[0])
        branch.crop(-5)
        token = tiny_model(sequences[0][:, branch.get_seq_length() : -4], cache=branch).logits[:, -1].argmax(-1)
        assert token.item() == alone[0][0, -4].item()


@torch.no_grad()
def test_threads_do_not_mix(tiny_model, pruners):
    schedule, results = SCHEDULES["global"], {}
    prompts = {n: prompt(n) for n in (200, 150, 110)}
    with apply_sdtp(tiny_model, pruners, schedule):
        expected = {n: generate(tiny_model, {"input_ids": ids}) for n, ids in prompts.items()}

        def work(n):
            with torch.no_grad():
                results[n] = generate(tiny_model, {"input_ids": prompts[n]})

        threads = [threading.Thread(target=work, args=(n,)) for n in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[n], expected[n]) for n in prompts)


@torch.no_grad()
def test_cache_operations_carry_the_state(tiny_model, pruners, schedule):
    batch = padded_batch()
    cache = DynamicCache(config=tiny_model.config)
    with apply_sdtp(tiny_model, pruners, schedule):
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        tiny_model(**batch, position_ids=positions, cache=cache, logits_to_keep=1)
        order = torch.tensor([2, 0])
        cache.batch_select_indices(order)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([1, 0, 3, 2]))
        order = order.repeat_interleave(2)
        mask = torch.cat([batch["attention_mask"][order], torch.ones(4, 3, dtype=torch.long)], dim=1)
        positions = mask.cumsum(-1)[:, -3:] - 1
        new = prompt(3, 1).expand(4, -1)
        got = tiny_model(new, attention_mask=mask, position_ids=positions, cache=cache).logits
        for row in range(4):
            ids = batch["input_ids"][order[row]][batch["attention_mask"][order[row]].bool()]
            alone = DynamicCache(config=tiny_model.config)
            tiny_model(ids[None], cache=alone)
            expected = tiny_model(new[:1], cache=alone).logits
            torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_crop_into_the_prompt(tiny_model, pruners):
    cache = DynamicCache(config=tiny_model.config)
    with apply_sdtp(tiny_model, pruners, SCHEDULES["global"]):
        full = tiny_model(prompt(), cache=cache).logits[:, -1]
        cache.crop(-1)
        again = tiny_model(prompt()[:, -1:], cache=cache).logits[:, -1]
        torch.testing.assert_close(again, full, atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="prefill the shorter prompt"):
            cache.crop(-50)


@torch.no_grad()
def test_the_old_name_of_the_cache(tiny_model, pruners):
    """As the original decoder: deprecated, and never ignored."""
    cache = DynamicCache(config=tiny_model.config)
    with apply_sdtp(tiny_model, pruners, SCHEDULES["global"]), pytest.warns(FutureWarning, match="Use `cache` instead"):
        output = tiny_model.model(prompt(), past_key_values=cache)
    assert output.cache is cache
    assert cache.get_seq_length() == TOKENS


@torch.no_grad()
def test_a_reset_cache_takes_another_prompt(tiny_model, pruners, schedule):
    cache = DynamicCache(config=tiny_model.config)
    with apply_sdtp(tiny_model, pruners, schedule):
        tiny_model(prompt(), cache=cache)
        for tokens in (150, 30):  # pruned, and too short for it
            cache.reset()
            tiny_model(prompt(tokens), cache=cache)
            got = tiny_model(prompt(2), cache=cache).logits
            fresh = DynamicCache(config=tiny_model.config)
            tiny_model(prompt(tokens), cache=fresh)
            torch.testing.assert_close(got, tiny_model(prompt(2), cache=fresh).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_lazy_cache_and_no_cache(tiny_model, pruners, schedule):
    ids = prompt()
    with apply_sdtp(tiny_model, pruners, schedule):
        expected = tiny_model(ids).logits
        torch.testing.assert_close(tiny_model(ids, cache=DynamicCache()).logits, expected, atol=0, rtol=0)
        torch.testing.assert_close(tiny_model(ids, use_cache=False).logits, expected, atol=0, rtol=0)
        torch.testing.assert_close(tiny_model(ids, return_dict=False)[0], expected, atol=0, rtol=0)


@torch.no_grad()
def test_keep_everything_is_bit_identical(tiny_model, pruners):
    batch = padded_batch()
    dense, dense_batch = tiny_model(prompt()).logits, tiny_model(**batch).logits
    for budget in ("global", "block"):
        with apply_sdtp(tiny_model, pruners, PruningSchedule(layers=LAYERS, keep_ratio=1.0, budget=budget)) as handle:
            assert torch.equal(tiny_model(prompt()).logits, dense)
            assert torch.equal(tiny_model(**batch).logits, dense_batch)
            assert "nothing to prune" in handle.report().note


@torch.no_grad()
def test_remove_restores_the_model(tiny_model, pruners):
    before = [dict(module.__dict__) for module in tiny_model.modules()]
    dense = tiny_model(prompt()).logits
    handle = apply_sdtp(tiny_model, pruners, SCHEDULES["global"])
    assert not torch.equal(tiny_model(prompt()).logits[:, -1], dense[:, -1])
    handle.remove()
    handle.remove()
    assert [module.__dict__ for module in tiny_model.modules()] == before
    assert torch.equal(tiny_model(prompt()).logits, dense)
    with pytest.raises(ZeroDivisionError), apply_sdtp(tiny_model, pruners, SCHEDULES["global"]):
        raise ZeroDivisionError
    assert [module.__dict__ for module in tiny_model.modules()] == before


@torch.no_grad()
def test_other_instances_are_untouched(tiny_model, pruners):
    other = copy.deepcopy(tiny_model)
    dense = other(prompt()).logits
    with apply_sdtp(tiny_model, pruners, SCHEDULES["global"]):
        assert torch.equal(other(prompt()).logits, dense)


@torch.no_grad()
def test_short_prompts_run_unpruned_and_say_so(tiny_model, pruners):
    ids = prompt(50)
    dense = tiny_model(ids).logits
    with apply_sdtp(tiny_model, pruners, SCHEDULES["global"]) as handle:
        assert torch.equal(tiny_model(ids).logits, dense)
        assert "50 tokens is shorter than min_prompt=64" in str(handle.report())


@torch.no_grad()
def test_bare_decoder(tiny_model, pruners, schedule):
    with apply_sdtp(tiny_model, pruners, schedule):
        expected = tiny_model(prompt()).logits
    decoder = copy.deepcopy(tiny_model).model
    with apply_sdtp(decoder, pruners, schedule):
        got = tiny_model.lm_head(decoder(prompt()).last_hidden_state)
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("scorer", SCORERS)
def test_scorers_keep_rows_independent(tiny_model, schedule, scorer):
    batch = padded_batch(SHORT_LENGTHS)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with apply_sdtp(tiny_model, scorer, schedule):
        got = tiny_model(**batch, position_ids=positions, logits_to_keep=1).logits
        for row, length in enumerate(SHORT_LENGTHS):
            alone = tiny_model(batch["input_ids"][row : row + 1, TOKENS - length :], logits_to_keep=1).logits
            torch.testing.assert_close(got[row], alone[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_scorers_score_what_their_names_say(tiny_model):
    schedule = PruningSchedule(layers=(1,), keep_ratio=0.5)
    kept = {}
    for name in SCORERS:
        cache = DynamicCache(config=tiny_model.config)
        with apply_sdtp(tiny_model, name, schedule):
            tiny_model(prompt(), cache=cache)
        kept[name] = cache.layers[1].kept[0].tolist()
    assert kept["recent"] == [0, 1, 2, 3, *range(104, 200)]
    # Attention of the last queries in the layer below, from the probabilities of the eager model itself.
    eager = make_qwen2(attention="eager")
    probabilities = eager(prompt(), output_attentions=True).attentions[0][0, :, -32:]
    pooled = torch.nn.functional.max_pool1d(probabilities.sum(1), 7, stride=1, padding=3).mean(0)
    assert kept["attention"] == naive_select(pooled.tolist(), 100, sink=4, recent=20)
    hidden = eager(prompt(), output_hidden_states=True).hidden_states[1][0]
    assert kept["norm"] == naive_select(hidden.norm(dim=-1).tolist(), 100, sink=4, recent=20)


@torch.no_grad()
@pytest.mark.parametrize("pruners", ["attention", {1: TokenPruner(64, attention=True)}])
def test_queries_come_from_the_layer_below(tiny_model, pruners):
    """Each layer projects its queries once, and nothing is left on the model."""
    calls = []
    projections = [layer.self_attn.q_proj for layer in tiny_model.model.layers]
    hooks = [q_proj.register_forward_hook(lambda module, *_: calls.append(module)) for q_proj in projections]
    with apply_sdtp(tiny_model, pruners, PruningSchedule(layers=(1,), keep_ratio=0.5)):
        tiny_model(prompt())
    assert calls == projections
    for hook in hooks:
        hook.remove()
    assert not any(q_proj._forward_hooks for q_proj in projections)


def test_queries_of_another_thread_are_left():
    """A model may prefill in several threads at once: each takes its own."""
    q_proj = torch.nn.Linear(4, 4)
    queries = LastQueries(q_proj, slice(1, 3))
    other = threading.Thread(target=q_proj, args=(torch.zeros(1, 5, 4),))
    other.start()
    other.join()
    assert queries.value is None
    own = q_proj(torch.ones(1, 5, 4))
    assert torch.equal(queries.value, own[:, 1:3])
    q_proj(torch.zeros(1, 5, 4))
    assert torch.equal(queries.value, own[:, 1:3])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["scorer", "term"])
def test_a_scorer_runs_on_the_backend_named(tiny_model, monkeypatch, attention):
    monkeypatch.setattr(cpu, "window_attention", lambda *_: pytest.fail("the backend named is another"))
    pruners = "attention" if attention == "scorer" else {1: TokenPruner(64, attention=True)}
    with apply_sdtp(tiny_model, pruners, PruningSchedule(layers=(1,), keep_ratio=0.5), "reference"):
        tiny_model(prompt())


@torch.no_grad()
def test_pruner_with_distance_and_attention(tiny_model, schedule):
    """Rows stay independent, with a cache and without, and the terms count where a score may see the prompt's end."""
    torch.manual_seed(1)
    settings = {"distance": True, "attention": True, "pooling": 5, "averaging": True}
    pruners = {layer: TokenPruner(64, **settings) for layer in LAYERS}
    batch = padded_batch(SHORT_LENGTHS)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    results = []
    for weight in (0.0, 3.0):
        for pruner in pruners.values():
            torch.nn.init.normal_(pruner.distance_bias, std=weight)
            pruner.attention_weight.data.fill_(weight)
        with apply_sdtp(tiny_model, pruners, schedule):
            got = tiny_model(**batch, position_ids=positions, logits_to_keep=1).logits
            no_cache = tiny_model(**batch, position_ids=positions, logits_to_keep=1, use_cache=False).logits
            torch.testing.assert_close(got, no_cache, atol=1e-4, rtol=0)
            for row, length in enumerate(SHORT_LENGTHS):
                alone = tiny_model(batch["input_ids"][row : row + 1, TOKENS - length :], logits_to_keep=1).logits
                torch.testing.assert_close(got[row], alone[0], atol=1e-4, rtol=0)
            followed = torch.cat([batch["input_ids"][:1], prompt(9)], dim=1)  # what stands after has no say
            after = tiny_model(followed, logits_to_keep=10).logits[:, :1]
            torch.testing.assert_close(after, got[:1], atol=1e-4, rtol=0)
        results.append(got)
    if schedule.budget == "block":
        assert torch.equal(results[0], results[1])
    else:
        assert (results[0] - results[1])[:2].abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_no_mask_where_the_dense_model_has_none(tiny_model, pruners, schedule):
    """sdpa takes its fast causal path: no segment of an unpadded prompt gets a mask."""
    masks = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in tiny_model.model.layers
    ]
    with apply_sdtp(tiny_model, pruners, schedule):
        generate(tiny_model, {"input_ids": prompt()}, max_new_tokens=3)
    for hook in hooks:
        hook.remove()
    assert masks == [None] * len(tiny_model.model.layers) * 3


@torch.no_grad()
def test_any_module_is_a_pruner(tiny_model, pruners):
    """The public contract: module(hidden [..., D]) -> scores [...]."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states):
            return self.inner(hidden_states)

    pruners = {layer: TokenPruner(64) for layer in pruners}  # pooling is of TokenPruner alone
    with apply_sdtp(tiny_model, pruners, SCHEDULES["global"]):
        expected = tiny_model(prompt()).logits
    with apply_sdtp(tiny_model, {layer: Wrapped(p) for layer, p in pruners.items()}, SCHEDULES["global"]):
        torch.testing.assert_close(tiny_model(prompt()).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pruners, schedule, dtype):
    model = make_qwen2().to(dtype)
    with apply_sdtp(model, pruners, schedule) as handle:
        out = generate(model, padded_batch())
        assert out.shape == (3, TOKENS + 8)
        assert handle.report().kept_per_stage
