"""The real checkpoint, SmolLM2-135M-Instruct, a Llama, on real text."""

import pydoc_data.topics

import pytest
import torch
from helpers.oracle import MaskedDense
from transformers import DynamicCache

from sdtp_kernels import PruningSchedule, TokenPruner, apply_sdtp
from sdtp_kernels.models.compat import CACHE

LENGTHS = (330, 250, 140)
NEW_TOKENS = 32
SCHEDULES = {
    "global": PruningSchedule.every(30, keep_ratio=0.9),
    "block": PruningSchedule.every(30, keep_ratio=0.9, budget="block", block_size=64),
}


@pytest.fixture(scope="module")
def pruners():
    torch.manual_seed(1)
    return {layer: TokenPruner(576) for layer in SCHEDULES["global"].layers}


@pytest.fixture(scope="module")
def rows(smollm2):
    """Three prompts of uneven length, from the Python language reference."""
    _, tokenizer = smollm2
    topics = [pydoc_data.topics.topics[name] for name in ("assignment", "lambda", "try")]
    return [tokenizer(text).input_ids[:n] for text, n in zip(topics, LENGTHS, strict=True)]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@torch.no_grad()
def test_equals_masked_dense_then_32_greedy_tokens(smollm2, pruners, rows, schedule):
    model, tokenizer = smollm2
    batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    padded = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    positions = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    greedy = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    with apply_sdtp(model, pruners, schedule) as handle:
        together = model(**padded, position_ids=positions, logits_to_keep=1).logits[:, -1]
        assert handle.report().kept_per_stage[-1] < max(LENGTHS) / 2 + 64
        generated = model.generate(**padded, **greedy)[:, max(LENGTHS) :]
        for row, ids in enumerate(rows):
            prompt = torch.tensor([ids])
            cache = DynamicCache(config=model.config)
            alone = model(prompt, **{CACHE: cache}, logits_to_keep=1).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)
            assert torch.equal(model.generate(prompt, **greedy)[0, len(ids) :], generated[row])

            # One dense pass over prompt and answer: every token of the answer is the oracle's own choice.
            oracle = MaskedDense.of(model, pruners, schedule, len(ids))
            logits, history = oracle.row(torch.cat([prompt[0], generated[row, :-1]]), len(ids))
            assert cache.layers[29].kept[0].tolist() == history[-1]
            torch.testing.assert_close(alone, logits[len(ids) - 1], atol=1e-4, rtol=0)
            assert torch.equal(logits[len(ids) - 1 :].argmax(-1), generated[row])


@torch.no_grad()
def test_keep_everything_is_bit_identical(smollm2, pruners, rows):
    model, _ = smollm2
    ids = torch.tensor([rows[0]])
    dense = model(ids).logits
    with apply_sdtp(model, pruners, PruningSchedule.every(30, keep_ratio=1.0)):
        assert torch.equal(model(ids).logits, dense)
    assert torch.equal(model(ids).logits, dense)
