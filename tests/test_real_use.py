"""What people do with a patched model besides generate(): right, or refused with the way out, and never silent."""

import copy
import io
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from helpers.models import make_qwen2
from transformers import (
    DynamicCache,
    GenerationConfig,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    StaticCache,
)

from sdtp_kernels import (
    PruningSchedule,
    TokenPruner,
    apply_sdtp,
    gather_tokens,
    prune_tokens,
    remove_sdtp,
    score_tokens,
)

LAYERS = (2, 4)
GLOBAL = PruningSchedule(LAYERS, 0.5, min_prompt=16)
BLOCK = PruningSchedule(LAYERS, 0.5, min_prompt=16, budget="block", block_size=32)
SCHEDULES = pytest.mark.parametrize("schedule", [GLOBAL, BLOCK], ids=["global", "block"])
FULL = {"distance": True, "attention": True, "averaging": True, "pooling": 3}


@pytest.fixture
def model():
    model = make_qwen2()
    model.generation_config.pad_token_id = 0
    return model


def pruners(**settings):
    torch.manual_seed(1)
    return {layer: TokenPruner(64, **settings) for layer in LAYERS}


def ids(tokens=120, batch=1, seed=0):
    return torch.randint(1, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded():
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, :40] = 0
    return {"input_ids": ids(batch=2) * mask, "attention_mask": mask}


def greedy(model, inputs=None, **settings):
    inputs = {"input_ids": ids()} if inputs is None else inputs
    return model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, **settings})


# ------------------------------------------------------------------- a decode step that looks like a prefill


@SCHEDULES
@pytest.mark.parametrize("make", [lambda: {"input_ids": ids()}, padded], ids=["one row", "padded"])
def test_without_a_cache_the_answer_is_never_pruned(model, schedule, make):
    with apply_sdtp(model, pruners(**FULL), schedule) as handle:
        expected = greedy(model, make(), max_new_tokens=40)
        assert torch.equal(greedy(model, make(), max_new_tokens=40, use_cache=False), expected)
        model.config.use_cache = False  # left over from fine-tuning
        assert torch.equal(greedy(model, make(), max_new_tokens=40), expected)
        assert len(handle.report().kept_per_stage) == 2


def test_without_a_cache_a_short_prompt_stays_whole(model):
    short = {"input_ids": ids(12)}
    dense = greedy(model, short, max_new_tokens=20)
    with apply_sdtp(model, pruners(), GLOBAL):
        assert torch.equal(greedy(model, short, max_new_tokens=20, use_cache=False), dense)
        with pytest.raises(NotImplementedError, match="use_cache=False with guidance_scale"):
            greedy(model, guidance_scale=1.5, use_cache=False)


# ----------------------------------------------------------------------------- the decoder and its caller


@torch.no_grad()
def test_a_decoder_stands_for_the_model_that_owns_it(model):
    with apply_sdtp(model, pruners(), GLOBAL):
        expected = model(ids(), logits_to_keep=30).logits
    with apply_sdtp(model.model, pruners(), GLOBAL):
        assert torch.equal(model(ids(), logits_to_keep=30).logits, expected)
        with pytest.raises(NotImplementedError, match="labels"):
            model(ids(), labels=ids())
        greedy(model, keep_ratio=0.9)
    assert type(model) is Qwen2ForCausalLM
    classifier = Qwen2ForSequenceClassification(model.config)
    with pytest.raises(NotImplementedError, match="belongs to a Qwen2ForSequenceClassification"):
        apply_sdtp(classifier.model, pruners(), GLOBAL)
    alone = Qwen2Model(model.config).eval()
    with apply_sdtp(alone, pruners(), GLOBAL):
        assert alone(ids()).last_hidden_state.shape[1] == 30


# -------------------------------------------------------------------- an index that is no position any more


@torch.no_grad()
def test_kept_tokens_are_told(model):
    schedule = PruningSchedule(LAYERS, (0.7, 1.0), min_prompt=16)
    inputs = padded()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with apply_sdtp(model, "recent", schedule) as handle:
            logits = model(**inputs).logits
            model(**inputs)
            kept = handle.report().kept
            model(**inputs, logits_to_keep=5)
            assert torch.equal(handle.report().kept[0, -5:], torch.arange(115, 120))
    assert [str(w.message)[:32] for w in caught if issubclass(w.category, UserWarning)] == [
        "the output of a pruned prompt ha"
    ]
    assert kept.shape == logits.shape[:2]
    # "recent" keeps the first four and the last of each row; counts are those of 120 and 80 tokens.
    assert kept[0].tolist() == [*range(4), *range(40, 120)]
    assert kept[1].tolist() == [-1] * 28 + [*range(4), *range(28, 80)]


# ------------------------------------------------------------------------- settings where nobody reads them


@torch.no_grad()
def test_settings_of_a_call_are_obeyed(model):
    with apply_sdtp(model, pruners(), GLOBAL) as handle:
        assert model(ids()).logits.shape[1] == 30
        assert model(ids(), keep_ratio=0.9).logits.shape[1] == 98
        assert model(ids(), enabled=False).logits.shape[1] == 120
        assert model(ids(), min_prompt=500).logits.shape[1] == 120
        model(ids(), protect=(0, 60))
        assert handle.report().kept[0, :60].tolist() == list(range(60))
        assert model.model(ids(), keep_ratio=0.9).last_hidden_state.shape[1] == 98
        config = GenerationConfig(max_new_tokens=2, do_sample=False)
        config.keep_ratio = 0.9
        model.generate(ids(), generation_config=config)
        assert handle.report().kept_per_stage == [108, 98]
        assert model(ids()).logits.shape[1] == 30


@torch.no_grad()
def test_a_thread_does_not_miss_the_request_it_was_started_in(model):
    errors = []

    def work(**settings):
        try:
            greedy(model, **settings)
        except RuntimeError as error:
            errors.append(str(error))

    with apply_sdtp(model, pruners(), GLOBAL) as handle, handle.request(enabled=False):
        for settings in ({}, {"keep_ratio": 0.9}):
            thread = threading.Thread(target=work, kwargs=settings)
            thread.start()
            thread.join()
    assert len(errors) == 1
    assert "does not inherit its settings" in errors[0]


@torch.no_grad()
def test_rows_and_widths_that_do_not_fit_are_refused(model):
    with apply_sdtp(model, pruners(), GLOBAL):
        with pytest.raises(ValueError, match="settings for 2 rows, but the batch has 4"):
            greedy(model, {"input_ids": ids(batch=4)}, keep_ratio=[0.5, 0.9])
        greedy(model, {"input_ids": ids(batch=2)}, keep_ratio=[0.5, 0.9], num_beams=2)
        with pytest.raises(ValueError, match="the mask has 60 columns, the prompt 120"):
            greedy(model, protect=torch.ones(1, 60, dtype=torch.bool))
        mask = torch.ones(1, 120, dtype=torch.bool)
        with pytest.raises(ValueError, match="the mask has 120 columns, the prompt 80"):
            greedy(model, negative_prompt_ids=ids(80, seed=3), guidance_scale=1.5, protect=mask)


# ---------------------------------------------------------------------------------- one patch, whole or gone


@torch.no_grad()
def test_a_copy_prunes_by_itself_and_ends_with_the_original(model):
    dense = model(ids()).logits
    handle = apply_sdtp(model, pruners(**FULL), GLOBAL)
    pruned = model(ids()).logits
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    assert torch.equal(first(ids()).logits, pruned)
    remove_sdtp(first)
    assert (type(first), type(first.model)) == (Qwen2ForCausalLM, Qwen2Model)
    assert torch.equal(first(ids()).logits, dense)
    assert torch.equal(model(ids()).logits, pruned), "the original is still patched"
    again = apply_sdtp(second, pruners(), GLOBAL)  # nobody was handed the copy's handle
    again.remove()
    third = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(third(ids()).logits, dense)
    assert torch.equal(copy.deepcopy(third)(ids()).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("scorer", [pruners(**FULL), "attention", "module"], ids=["pruner", "attention", "module"])
def test_a_pickled_model_prunes(model, scorer):
    if scorer == "module":
        scorer = dict.fromkeys(LAYERS, torch.nn.Sequential(torch.nn.Linear(64, 1), torch.nn.Flatten(-2)))
    with apply_sdtp(model, scorer, GLOBAL):
        expected = greedy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        again = pickle.loads(pickle.dumps(model))
    for one in (loaded, again):
        assert torch.equal(greedy(one), expected)
        with pytest.raises(NotImplementedError, match="labels"):
            one(ids(), labels=ids())
        apply_sdtp(one, pruners(), GLOBAL).remove()
        assert (type(one), type(one.model)) == (Qwen2ForCausalLM, Qwen2Model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids()).logits, model(ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("first_to_leave", ["ours", "theirs"])
@pytest.mark.parametrize("where", ["forward", "generate", "decoder"])
def test_another_tool_around_the_patch(model, where, first_to_leave):
    dense, calls = model(ids()).logits, []
    handle = apply_sdtp(model, pruners(), GLOBAL)
    pruned = model(ids()).logits
    module, name = (model.model, "forward") if where == "decoder" else (model, where)
    found = getattr(module, name)

    def wrapped(*args, **kwargs):
        calls.append(name)
        return found(*args, **kwargs)

    setattr(module, name, wrapped)
    assert torch.equal(model(ids()).logits, pruned)
    greedy(model, max_new_tokens=1)
    assert calls
    if first_to_leave == "ours":
        handle.remove()
        assert torch.equal(model(ids()).logits, dense)
        setattr(module, name, found)  # it puts back what it found: a method of a closed patch
        assert torch.equal(model(ids()).logits, dense)
        greedy(model, max_new_tokens=1)
    else:
        setattr(module, name, found)
        assert torch.equal(model(ids()).logits, pruned)
        handle.remove()
    assert torch.equal(model(ids()).logits, dense)
    apply_sdtp(model, pruners(), GLOBAL).remove() if where != "decoder" else None


@torch.no_grad()
def test_another_tool_was_there_before(model):
    own, calls = model.generate, []

    def generate(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.generate = generate
    with apply_sdtp(model, pruners(), GLOBAL):
        greedy(model)
    assert calls
    assert model.generate is generate
    found = model.model.forward
    model.model.forward = lambda *args, **kwargs: found(*args, **kwargs)
    with pytest.raises(RuntimeError, match="another tool has replaced the forward of this Qwen2Model"):
        apply_sdtp(model, pruners(), GLOBAL)


@torch.no_grad()
def test_a_class_made_of_ours_stays_and_does_not_prune(model):
    """As FSDP2 does: it makes a subclass of the class that it finds."""
    dense = model(ids()).logits
    handle = apply_sdtp(model, pruners(), GLOBAL)
    model.model.__class__ = type("Sharded", (type(model.model),), {})
    assert model(ids()).logits.shape[1] == 30
    handle.remove()
    assert type(model.model).__name__ == "Sharded"
    assert torch.equal(model(ids()).logits, dense)


@torch.no_grad()
def test_a_handle_that_was_lost_or_removed(model, tmp_path):
    apply_sdtp(model, pruners(), GLOBAL)
    with pytest.raises(RuntimeError, match=r"remove_sdtp\(model\)"):
        apply_sdtp(model, pruners(), GLOBAL)
    model.save_pretrained(tmp_path)
    assert type(Qwen2ForCausalLM.from_pretrained(tmp_path)) is Qwen2ForCausalLM
    remove_sdtp(model)
    remove_sdtp(model)
    handle = apply_sdtp(model, pruners(), GLOBAL)
    handle.remove()
    assert "removed" in str(handle.report())
    with apply_sdtp(model, pruners(), GLOBAL) as used:
        model(ids(), logits_to_keep=1)
    assert used.report().kept_per_stage == [60, 30], "what happened stays readable"
    for use in (handle.__enter__, handle.request(keep_ratio=0.5).__enter__):
        with pytest.raises(RuntimeError, match="was removed"):
            use()


def test_a_replica_runs_its_own_modules(model):
    with apply_sdtp(model, pruners(), GLOBAL):
        replica = model.model._replicate_for_data_parallel()
        assert replica.forward.__self__ is replica


# --------------------------------------------------------------------------- defaults, dtypes, training


def test_gradients_with_every_default():
    x = torch.randn(1, 10, 8, requires_grad=True)
    weights = TokenPruner(8).weights()
    assert torch.autograd.grad(gather_tokens([x], torch.tensor([[1, 3]]))[0].sum(), x)[0].sum() == 16
    assert torch.autograd.grad(prune_tokens(x, [x * 2], *weights, 4).hidden_states.sum(), x)[0].sum() == 32
    assert torch.autograd.grad(score_tokens(x, *weights).sum(), x)[0].abs().sum() > 0
    scorer = [t.clone().requires_grad_() for t in weights]
    assert all(g is not None for g in torch.autograd.grad(score_tokens(x.detach(), *scorer).sum(), scorer))


@pytest.mark.parametrize("scorer", [pruners(**FULL), "attention"], ids=["pruner", "attention"])
def test_training_through_a_patched_model(model, scorer):
    """With gradient checkpointing, which forbids a cache, as without."""
    losses = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with apply_sdtp(model, scorer, GLOBAL):
            cache = DynamicCache(config=model.config)
            loss = model(ids(), logits_to_keep=21, cache=cache).logits[:, :-1].float().logsumexp(-1).sum()
            loss.backward()
        losses.append((loss.item(), model.model.layers[5].mlp.up_proj.weight.grad.clone()))
        assert all(p.grad is not None for p in model.parameters())
    assert losses[0][0] == pytest.approx(losses[1][0])
    torch.testing.assert_close(losses[0][1], losses[1][1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scorer", [pruners(**FULL), "attention", "module"], ids=["pruner", "attention", "module"])
def test_a_model_cast_after_it_was_patched(scorer, dtype):
    if scorer == "module":
        scorer = dict.fromkeys(LAYERS, torch.nn.Sequential(torch.nn.Linear(64, 1), torch.nn.Flatten(-2)))
    before, after = make_qwen2().to(dtype), make_qwen2()
    with apply_sdtp(before, scorer, GLOBAL), apply_sdtp(after, scorer, GLOBAL):
        after.to(dtype)
        assert torch.equal(greedy(before), greedy(after))


@torch.no_grad()
@pytest.mark.parametrize("scorer", [pruners(**FULL), "attention"], ids=["pruner", "attention"])
def test_autocast(model, scorer):
    """A layer's queries and keys have another dtype than its input; the score is that of one dtype."""
    scored = []

    def spy(stage):
        from sdtp_kernels.models.scoring import Fused
        from sdtp_kernels.scorers import attention_score

        as_float = stage._replace(
            queries_below=None if stage.queries_below is None else stage.queries_below.float(),
            keys_below=stage.keys_below.float(),
        )
        if scorer == "attention":
            scored.append((attention_score(stage), attention_score(as_float)))
        else:
            fused = Fused.of(scorer[2], torch.float32)
            scored.append((fused.score(stage, None, "reference")[0], fused.score(as_float, None, "reference")[0]))
        return scored[-1][0]

    with torch.autocast("cpu", torch.bfloat16), apply_sdtp(model, spy, GLOBAL):
        for inputs in ({"input_ids": ids()}, padded()):
            greedy(model, inputs)
            greedy(model, inputs, cache_implementation="static", disable_compile=True)
    for got, expected in scored:
        torch.testing.assert_close(got, expected, atol=2e-2 if scorer == "attention" else 1e-5, rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16), apply_sdtp(model, scorer, GLOBAL):
        greedy(model, padded())


@torch.no_grad()
def test_layers_without_a_weight(model):
    """As GPTQ, AWQ and torchao leave them: a report asks the cache, not the weights."""

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.qweight = torch.nn.Parameter(linear.weight.half(), requires_grad=False)
            self.bias = linear.bias

        def forward(self, x):
            return torch.nn.functional.linear(x, self.qweight.float(), self.bias)

    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    cache = DynamicCache(config=model.config)
    with apply_sdtp(model, pruners(**FULL), GLOBAL) as handle:
        model(ids(), cache=cache, logits_to_keep=1)
        assert handle.report().kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    with apply_sdtp(quantized, "attention", GLOBAL):
        greedy(quantized)


# -------------------------------------------------------------------------------- caches that outlive a patch


@torch.no_grad()
@SCHEDULES
def test_a_cache_goes_on_as_it_began(model, schedule):
    cache = DynamicCache(config=model.config)
    with apply_sdtp(model, pruners(), schedule):
        model(ids(), cache=cache, logits_to_keep=1)
    other = PruningSchedule(LAYERS, 0.75, min_prompt=16, budget=schedule.budget, block_size=32)
    with apply_sdtp(model, pruners(), other), pytest.raises(ValueError, match="this cache holds a prompt pruned by"):
        model(ids(8), cache=cache)
    with pytest.raises(RuntimeError, match="the model that reads it is not patched"):
        model(ids(8), cache=cache)
    with pytest.raises(RuntimeError, match="the model that reads it is not patched"):
        model(ids(1), cache=copy.deepcopy(cache))
    loaded = pickle.loads(pickle.dumps(cache))
    with pytest.raises(RuntimeError, match="the model that reads it is not patched"):
        model(ids(1), cache=loaded)
    held = [layer.get_seq_length() for layer in cache.layers]
    with pytest.raises(ValueError, match="prefill the shorter prompt instead"):
        cache.crop(-100)
    assert [layer.get_seq_length() for layer in cache.layers] == held, "nothing half-cropped"
    with apply_sdtp(model, pruners(), schedule):
        torch.testing.assert_close(model(ids(8), cache=cache).logits, model(ids(8), cache=loaded).logits)
    cache.reset()
    fresh = DynamicCache(config=model.config)
    assert torch.equal(model(ids(), cache=cache).logits, model(ids(), cache=fresh).logits)


# ------------------------------------------------------------------------- checks where nothing is pruned


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_completions_padded_on_the_right(model, static):
    """Prompts padded on the left, their completions on the right: each row gets the same result as alone."""
    inputs = padded()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 10, dtype=torch.long)], dim=1)
    mask[0, -4:] = 0
    tokens = torch.cat([inputs["input_ids"], ids(10, batch=2, seed=5)], dim=1) * mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    more = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)

    def read(tokens, mask, more, positions, end):
        cache = StaticCache(config=model.config, max_cache_len=140) if static else DynamicCache(config=model.config)
        keep = {"logits_to_keep": 11, "cache": cache}
        logits = model(tokens, attention_mask=mask, position_ids=positions, **keep).logits[:, :end]
        after = (more.cumsum(-1) - 1)[:, -3:]
        return logits, model(ids(3, batch=len(mask), seed=6)[:1].expand(len(mask), -1), attention_mask=more,
                             position_ids=after, cache=cache).logits  # fmt: skip

    with apply_sdtp(model, pruners(), GLOBAL):
        both, then = read(tokens, mask, more, positions, 7)
        for row, (begin, end) in enumerate(((0, 126), (40, 130))):
            own = slice(row, row + 1)
            kept = end - 119
            alone_mask = mask[own, begin:end]
            alone_positions = torch.arange(end - begin)[None]
            cache = DynamicCache(config=model.config)
            alone = model(
                tokens[own, begin:end], attention_mask=alone_mask, position_ids=alone_positions,
                logits_to_keep=kept, cache=cache,
            ).logits  # fmt: skip
            torch.testing.assert_close(both[own], alone[:, :7], atol=1e-4, rtol=0)
            next_positions = torch.arange(end - begin, end - begin + 3)[None]
            following = model(ids(3, batch=2, seed=6)[:1], position_ids=next_positions, cache=cache).logits
            torch.testing.assert_close(then[own], following, atol=1e-4, rtol=0)


@torch.no_grad()
def test_labels_where_nothing_is_pruned(model):
    expected = model(ids(), labels=ids()).loss
    with apply_sdtp(model, pruners(), GLOBAL):
        assert torch.equal(model(ids(), labels=ids(), enabled=False).loss, expected)


# --------------------------------------------------------------------------------- what changes after patching


@torch.no_grad()
def test_attention_set_after_patching(model):
    with apply_sdtp(model, "attention", GLOBAL):
        expected = greedy(model)
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            assert torch.equal(greedy(model), expected)
        model.config._attn_implementation = "paged|sdpa"
        with pytest.raises(NotImplementedError, match=r"attn_implementation='paged\|sdpa'"):
            model(ids())
        with pytest.raises(NotImplementedError, match="generate_batch: continuous batching"):
            model.generate_batch(inputs=[[1, 2, 3]])


@torch.no_grad()
def test_no_hook_outlives_a_request_that_died(model):
    def boom(*_):
        raise torch.OutOfMemoryError("injected")

    def work():
        with pytest.raises(torch.OutOfMemoryError):
            greedy(model)

    with apply_sdtp(model, "attention", GLOBAL):
        hook = model.model.layers[1].input_layernorm.register_forward_pre_hook(boom)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hook.remove()
        assert not any(module._forward_hooks for module in model.modules())


# -------------------------------------------------------------------------------------------- arguments


def test_wrappers_are_named(model):
    wrapped = torch.nn.Module()
    wrapped.config, wrapped.get_base_model = model.config, lambda: model
    for wrapper, text in (
        (torch.nn.DataParallel(model), r"DataParallel wraps the model: pass model\.module"),
        (torch.compile(model), r"OptimizedModule wraps the model: pass model\._orig_mod"),
        (wrapped, r"pass model\.get_base_model\(\)"),
    ):
        with pytest.raises(NotImplementedError, match=text):
            apply_sdtp(wrapper, pruners(), GLOBAL)


@torch.no_grad()
def test_schedules_that_are_meant(model):
    for schedule, pruner, expected in (
        (0.9, "recent", PruningSchedule.every(6)),
        (np.float32(0.9), "recent", PruningSchedule.every(6)),
        (0.8, pruners(), PruningSchedule(LAYERS, 0.8)),
        (None, pruners(), PruningSchedule(LAYERS, 0.9)),
    ):
        with apply_sdtp(model, pruner, schedule) as handle:
            assert handle.schedule == expected
    with pytest.raises(
        TypeError, match=r"a keep ratio in .*, got .0\.9.; PruningSchedule\.every\(6, keep_ratio=0\.9\)"
    ):
        apply_sdtp(model, "recent", "0.9")
    with pytest.raises(ValueError, match=r"every\(4, first=1\) fits"):
        PruningSchedule.every(4)
    numbers = PruningSchedule(np.array([2, 4]), np.float32(0.7), sink=np.int64(2), min_prompt=torch.tensor(16))
    assert numbers == PruningSchedule((2, 4), 0.7, sink=2, min_prompt=16)
    assert numbers.num_keep(1000, 2) == 490


@pytest.mark.parametrize(
    "protect",
    [
        (0, 60),
        [0, 60],
        [(np.int64(0), np.int64(60))],
        range(60),
        [slice(0, 60)],
        torch.arange(120) < 60,
        (torch.arange(120) < 60).long()[None],
        np.arange(120)[None] < 60,
    ],
)
@torch.no_grad()
def test_protected_tokens_that_are_meant(model, protect):
    with apply_sdtp(model, pruners(), GLOBAL) as handle:
        model(ids(), protect=protect)
        assert handle.report().kept[0, :60].tolist() == list(range(60))
    with apply_sdtp(model, pruners(), GLOBAL), pytest.raises(ValueError, match="protect"):
        model(ids(), protect=[(5, 2)])
