"""Proof at run time, under a version of transformers that no test ran on: a small model is checked first.

A random model of the family, with two stages, is prefilled as a padded batch into a static cache and decodes two
tokens; the logits must be those of a dense loop over each row alone, in which dropped tokens are masked.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.cache_utils import StaticCache

from .. import reference
from ..arguments import Selection
from ..schedule import PruningSchedule
from . import compat

if TYPE_CHECKING:
    from .family import Family

SCHEDULE = PruningSchedule((1, 2), 0.5, sink=2, min_prompt=8)
LENGTHS, STEPS, TOLERANCE = (24, 17), 2, 1e-4


@functools.cache
def prove(family: Family) -> None:
    """Check the installed transformers, once a process.

    Raises
    ------
    NotImplementedError
        If a pruned model does not compute what it must, with what differed.
    """
    version, tested = transformers.__version__, ", ".join(compat.TESTED)
    try:
        difference = _difference(family)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    else:
        if difference <= TOLERANCE:
            return
        failure = f"logits differ by {difference:.3g}, allowed are {TOLERANCE}"
    raise NotImplementedError(
        f"SDTP was not tested on transformers {version}, and a pruned {family.causal_lm.__name__} computes something "
        f"wrong there ({failure}). Install a tested version: {tested}"
    )


def _difference(family: Family) -> float:
    """Largest difference of the logits after the prefill and after each decoded token."""
    from .patch import patch

    plain = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), plain:
        model = _random_model(family)
        ids = torch.randint(1, 64, (2, LENGTHS[0] + STEPS))
        mask = torch.ones_like(ids)
        mask[1, : LENGTHS[0] - LENGTHS[1]] = 0
        expected = [_masked_dense(model, row[keep.bool()], n) for row, keep, n in zip(ids, mask, LENGTHS, strict=True)]
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
        differences: list[torch.Tensor] = []
        with patch(family, model, model.model, "norm", SCHEDULE):
            begin = 0
            for end in range(LENGTHS[0], ids.shape[1] + 1):
                positions = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, begin:]
                logits = model(
                    ids[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions,
                    logits_to_keep=1,
                    **{compat.CACHE: cache},
                ).logits[:, -1]
                begin = end
                wanted = torch.stack([row[end - ids.shape[1] - 1] for row in expected])
                differences.append((logits - wanted).abs().max())
    return float(torch.stack(differences).max())  # a NaN stays one


def _random_model(family: Family) -> Any:
    kind: Any = family.causal_lm
    config = kind.config_class(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=None,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    model = kind(config).float().eval()
    for weight in model.parameters():
        if weight.dim() == 2:  # the usual 0.02 leaves attention uniform, and masks would hardly matter
            torch.nn.init.normal_(weight, std=2 * weight.shape[1] ** -0.5)
    return model


def _masked_dense(model: Any, ids: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """Logits ``[n, V]`` of one row: nothing is left out, what a stage drops is masked from there on."""
    decoder, length = model.model, ids.shape[0]
    hidden = decoder.embed_tokens(ids[None])
    embeddings = decoder.rotary_emb(hidden, torch.arange(length)[None])
    alive = torch.arange(prompt_length)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    for i, layer in enumerate(decoder.layers):
        if i in SCHEDULE.layers:
            plan = SCHEDULE.plan(prompt_length, SCHEDULE.layers.index(i) + 1)
            scores = hidden[:, alive].float().norm(dim=-1)
            alive = alive[reference.select_tokens(scores, Selection(*plan))[0]]
            is_dropped = torch.ones(length, dtype=torch.bool).index_fill(0, alive, False)
            is_dropped[prompt_length:] = False
            allowed = allowed & ~(is_dropped[None] & ~torch.eye(length, dtype=torch.bool))  # no row may be empty
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.zeros(1, 1, length, length, dtype=hidden.dtype).masked_fill(~allowed, lowest)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=embeddings, use_cache=False)
    return model.lm_head(decoder.norm(hidden))[0]  # type: ignore[no-any-return]
