"""Lexical overlap, and what the stages of a patched model make of it."""

import contextlib
import math
from functools import partial

import pytest
import torch
from helpers.oracle import naive_overlap
from helpers.prompts import LAYERS, LENGTHS, SCHEDULES, SHORT_LENGTHS, TOKENS, padded_batch, prompt

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp
from sdtp_kernels.lexical import PromptTokens, lexical_overlap
from sdtp_kernels.models import scoring
from sdtp_kernels.scorers import StageInput, block_local, question_score, random_score

NOTHING = contextlib.nullcontext()


def repeated(tokens, batch=1, kinds=40):
    """Prompts of few different tokens, so that n-grams of all lengths come again."""
    return torch.randint(0, kinds, (batch, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tokens", [0, 1, 40, 64, 65, 66, 300, 1200])
@pytest.mark.parametrize("kinds", [1, 7, 40, 2**21])
def test_overlap_equals_lists_and_counters(tokens, kinds):
    ids = repeated(tokens, kinds=kinds)
    expected = torch.tensor([naive_overlap(ids[0].tolist())]) if tokens else torch.empty(1, 0)
    torch.testing.assert_close(lexical_overlap(ids), expected, atol=1e-6, rtol=0)


def test_overlap_by_hand():
    """A pair of words that is asked for counts more than one of them, and a word that is in every window nothing."""
    ids = torch.arange(1000, 1400)[None]
    ids[0, 50:52] = torch.tensor([7, 8])
    ids[0, 200] = 8
    ids[0, 390:392] = torch.tensor([7, 8])
    windows = 336 / 64
    single, pair = math.log(windows), math.log(windows / 2) + math.log(windows)  # 8 stands twice, 7 and the pair once
    expected = torch.zeros(400)
    expected[34:99], expected[35:100] = single, single + pair
    expected[34] = single
    expected[99] = pair
    expected[184:249] = math.log(windows / 2)
    torch.testing.assert_close(lexical_overlap(ids)[0], expected / expected.max(), atol=1e-4, rtol=0)
    assert not lexical_overlap(torch.arange(400)[None]).any()
    assert not lexical_overlap(torch.full((1, 400), 5)).any()
    # Where a common word is all there is, not much is made of it.
    ids = torch.arange(1000, 1400)[None]
    ids[0, [40, 140, 240, 390]] = 8
    assert lexical_overlap(ids).max().item() == pytest.approx(math.log(windows / 3) / math.log(windows), abs=1e-4)


def test_a_short_text_has_four_windows():
    ids = torch.arange(1000, 1120)[None]
    ids[0, [5, 110]] = 7
    ids[0, [15, 25, 35, 111]] = 8
    overlap = lexical_overlap(ids)[0]
    once, thrice = math.log(4), math.log(4 / 3)
    expected = torch.tensor([once + 3 * thrice, 2 * thrice]) / (once + 3 * thrice)
    torch.testing.assert_close(overlap[[53, 72]], expected, atol=1e-4, rtol=0)


def test_a_text_that_repeats_itself_does_not_hide_what_stands_once():
    """The question's 64 tokens hold the last lines of the text too, which stand everywhere in it."""
    line = torch.arange(100, 120)
    ids = torch.cat([line.repeat(25), torch.tensor([7, 8, 9])])[None]
    ids[0, 205:208] = torch.tensor([7, 8, 9])
    overlap = lexical_overlap(ids)[0]
    assert overlap[207] == 1
    assert overlap[[20, 150, 300, 400]].max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_overlap_does_not_depend_on_the_default_dtype(dtype):
    ids = repeated(1200)
    expected, default = lexical_overlap(ids), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(lexical_overlap(ids), expected)
    finally:
        torch.set_default_dtype(default)


def test_a_row_does_not_depend_on_its_company():
    ids, lengths = repeated(600, 3), (600, 411, 70)
    is_valid = torch.stack([torch.arange(600) >= 600 - n for n in lengths])
    ids[~is_valid] = 3  # a pad token that is a word as well, and of which the question asks what follows it
    ids[1, 590:592] = ids[1, 188:190]
    together = lexical_overlap(ids, is_valid)
    for row, n in enumerate(lengths):
        assert torch.equal(together[row, 600 - n :], lexical_overlap(ids[row : row + 1, 600 - n :])[0])
        assert not together[row, : 600 - n].any()


def test_overlap_of_the_tokens_that_are_left():
    ids = repeated(300, 2)
    is_valid = torch.ones_like(ids, dtype=torch.bool)
    is_valid[1, :100] = False
    whole = lexical_overlap(ids, is_valid)
    index = torch.tensor([[3, 100, 299, 300, 301], [-1, 0, 199, 200, 201]])  # two stand after the prompt
    found = PromptTokens(ids, is_valid).overlap_at(index, keep_last=2)
    expected = [[*whole[0, [3, 100, 299]], 0, 0], [0, *whole[1, [100, 299]], 0, 0]]
    assert torch.equal(found, torch.tensor(expected))


@torch.no_grad()
@pytest.mark.parametrize("keep_last", [0, 9])
def test_the_scorer_sees_the_prompt_and_nothing_after_it(tiny_model, keep_last):
    schedule = PruningSchedule(LAYERS, 0.8)
    ids = torch.cat([repeated(TOKENS), prompt(keep_last)], dim=1)
    scores = torch.tensor(naive_overlap(ids[0, :TOKENS].tolist()))

    def by_hand(stage):
        return scores[stage.token_index.clamp(0, TOKENS - 1)]

    kept = []
    for scorer in ("lexical", by_hand):
        with apply_sdtp(tiny_model, scorer, schedule) as handle:
            tiny_model(ids, logits_to_keep=keep_last + 1)
            kept.append(handle.report().kept[0].tolist())
    assert kept[0] == kept[1]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [LENGTHS, SHORT_LENGTHS])
def test_padded_rows_equal_rows_alone(tiny_model, lengths):
    batch = padded_batch(lengths)
    batch["input_ids"] = batch["input_ids"] % 20 * batch["attention_mask"]
    pruners = {layer: TokenPruner(64, lexical=True) for layer in LAYERS}
    for pruner in pruners.values():
        pruner.lexical_weight.data.fill_(5.0)
    for scorer in (pruners, "lexical", "question"):
        with apply_sdtp(tiny_model, scorer, SCHEDULES["global"]):
            positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            got = tiny_model(**batch, position_ids=positions, logits_to_keep=1).logits
            for row, n in enumerate(lengths):
                alone = tiny_model(batch["input_ids"][row : row + 1, TOKENS - n :], logits_to_keep=1).logits
                torch.testing.assert_close(got[row], alone[0], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("budget", ["global", "block"])
def test_a_block_does_not_know_the_words_of_the_end(tiny_model, budget):
    schedule = SCHEDULES[budget]
    pruners = {layer: TokenPruner(64, lexical=True) for layer in LAYERS}
    kept = []
    for weight in (0.0, 50.0):
        for pruner in pruners.values():
            pruner.lexical_weight.data.fill_(weight)
        with apply_sdtp(tiny_model, pruners, schedule) as handle:
            tiny_model(repeated(TOKENS), logits_to_keep=1)
            kept.append(handle.report().kept[0].tolist())
    assert (kept[0] == kept[1]) == (budget == "block")


@torch.no_grad()
def test_a_prompt_of_embeddings_has_no_words(tiny_model):
    """A pruner goes by its other terms and says so; the lexical scorer, which has none, refuses."""
    embeddings = tiny_model.get_input_embeddings()(repeated(TOKENS))
    torch.manual_seed(1)
    plain = {layer: TokenPruner(64) for layer in LAYERS}
    lexical = {layer: TokenPruner(64, lexical=True) for layer in LAYERS}
    kept = []
    for layer in LAYERS:
        lexical[layer].load_state_dict({**plain[layer].state_dict(), "lexical_weight": torch.tensor(50.0)})
    for pruners in (plain, lexical):
        expectation = pytest.warns(UserWarning, match="without their lexical term") if pruners is lexical else NOTHING
        with expectation, apply_sdtp(tiny_model, pruners, SCHEDULES["global"]) as handle:
            tiny_model(inputs_embeds=embeddings, logits_to_keep=1)
            kept.append(handle.report().kept[0].tolist())
    assert kept[0] == kept[1]
    with (
        apply_sdtp(tiny_model, "lexical", SCHEDULES["global"]),
        pytest.raises(ValueError, match="reads token ids: pass input_ids"),
    ):
        tiny_model(inputs_embeds=embeddings, logits_to_keep=1)


def two_terms(lexical_weight):
    """Pruners whose MLP says nothing."""
    pruners = {layer: TokenPruner(64, 1, attention=True, lexical=True, pooling=7) for layer in LAYERS}
    for pruner in pruners.values():
        torch.nn.init.zeros_(pruner.w2)
        pruner.attention_weight.data.fill_(1.0)
        pruner.lexical_weight.data.fill_(lexical_weight)
    return pruners


@torch.no_grad()
@pytest.mark.parametrize("keep_last", [0, 9])
def test_the_question_scorer_is_two_terms_of_a_pruner(tiny_model, keep_last):
    ids, schedule = torch.cat([repeated(TOKENS), prompt(keep_last)], dim=1), PruningSchedule(LAYERS, 0.8)
    kept = {}
    scorers = {"question": "question", "both": two_terms(8.0), "attention": two_terms(0.0)}
    scorers["bound"] = partial(question_score)  # is what it was
    for name, scorer in scorers.items():
        with apply_sdtp(tiny_model, scorer, schedule) as handle:
            tiny_model(ids, logits_to_keep=keep_last + 1)
            kept[name] = handle.report().kept[0].tolist()
    assert kept["question"] == kept["bound"] == kept["both"] != kept["attention"]
    embeddings = tiny_model.get_input_embeddings()(ids)
    with apply_sdtp(tiny_model, "question", schedule) as handle:
        with pytest.warns(UserWarning, match="without their lexical term"):
            tiny_model(inputs_embeds=embeddings, logits_to_keep=keep_last + 1)
        assert handle.report().kept[0].tolist() == kept["attention"]


@torch.no_grad()
def test_what_an_object_calls_pooling_is_its_own_affair(tiny_model):
    class Scorer:
        pooling = "mean"

        def __call__(self, stage):
            return random_score(stage, seed=3)

    ids = prompt()
    with apply_sdtp(tiny_model, Scorer(), SCHEDULES["global"]) as handle:
        tiny_model(ids, logits_to_keep=1)
        expected = handle.report().kept
    with apply_sdtp(tiny_model, partial(random_score, seed=3), SCHEDULES["global"]) as handle:
        tiny_model(ids, logits_to_keep=1)
        assert torch.equal(handle.report().kept, expected)


@torch.no_grad()
def test_a_scorer_may_read_the_prompt(tiny_model):
    """Token ids are there where the prompt is read whole, and not where it comes in chunks."""
    seen = []

    @block_local
    def scorer(stage):
        seen.append(None if stage.prompt is None else stage.prompt.token_ids.tolist())
        return stage.token_index.float()

    ids = prompt()
    with apply_sdtp(tiny_model, scorer, SCHEDULES["block"]):
        tiny_model.generate(ids, max_new_tokens=2, do_sample=False)
        assert seen == [ids.tolist()] * len(LAYERS)
        seen.clear()
        tiny_model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=100)
    assert seen
    assert not any(seen)


def test_prompts_longer_than_the_farthest_distance(monkeypatch):
    """What is farther counts as the farthest, with words and without."""
    monkeypatch.setattr(scoring, "FARTHEST", 99)
    ids = repeated(300)
    pruner = TokenPruner(8, distance=True, lexical=True)
    torch.nn.init.normal_(pruner.distance_bias)
    pruner.lexical_weight.data.fill_(2.0)
    stage = StageInput(torch.zeros(1, 300, 8), (None, None), torch.arange(300)[None], 0, None, None)
    stage = stage._replace(prompt=PromptTokens(ids))
    bias = scoring.Fused.of(pruner, torch.float32).bias(stage)
    distance = torch.arange(299, -1, -1).clamp(max=99)
    expected = pruner.distance_term(distance) + 2 * lexical_overlap(ids)
    torch.testing.assert_close(bias, expected)
