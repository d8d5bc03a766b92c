"""Pruning simulated by masks inside a dense forward, so that a loss on the output reaches pruners and KV predictor.

Every token goes through every layer, as in DynamicViT (arXiv 2106.02034): attention weights are multiplied by the mask
of their keys and divided by their sum. The masks are exactly 0 or 1, chosen by the ops that prune for real, so the
output is that of real pruning; their gradient is that of a sigmoid around the threshold (straight-through), which
reaches dropped tokens as well: the product with a zero mask still has a derivative.

With a KV predictor nothing is masked. A mask of 0 puts the predicted key and value in the place of the computed ones,
and its gradient is what that costs: the error of the prediction times the gradient at this key and value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from sdtp_eval.attention import probabilities
from sdtp_kernels import select_tokens
from sdtp_kernels.lexical import lexical_overlap
from sdtp_kernels.models.family import family_of
from sdtp_kernels.reference import rotate
from sdtp_kernels.scorers import StageInput, question_attention
from sdtp_train.targets import run_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdtp_kernels import KVPredictor, PruningSchedule, TokenPruner

TEMPERATURE = 0.3  # width of the sigmoid, in standard deviations of the scores of a stage


def simulate_pruning(
    model: Any,
    pruners: Mapping[int, TokenPruner],
    schedule: PruningSchedule,
    token_ids: torch.Tensor,
    num_context: int,
    generator: torch.Generator | None = None,
    kv_predictor: KVPredictor | None = None,
) -> torch.Tensor:
    """Logits that a pruned model gives its continuation.

    Parameters
    ----------
    model : transformers model
        Frozen, in evaluation mode.
    pruners : mapping of int to TokenPruner
        By layer.
    schedule : PruningSchedule
    token_ids : int64 Tensor [T]
        Context and continuation.
    num_context : int
        Tokens of the context, which are pruned; the others never are.
    generator : torch.Generator, optional
        Adds Gumbel noise to the scores, scaled like the sigmoid: the kept tokens are then a sample without replacement
        (Gumbel top-k), equation (2) of SDTP with the exact budget. Without it, the best are kept.
    kv_predictor : KVPredictor, optional
        Predicts keys and values of the tokens that stages drop; by default later layers see nothing of them.

    Returns
    -------
    Tensor [T - num_context, V]
        Of the positions that predict the continuation. Without a generator equal to those of a model under
        :func:`sdtp_kernels.apply_sdtp`.
    """
    decoder, n = model.model, num_context
    ids = token_ids.unsqueeze(0)
    first = schedule.layers[0]
    with torch.no_grad():
        hidden_states = decoder.embed_tokens(ids)
        embeddings = decoder.rotary_emb(hidden_states, torch.arange(ids.shape[1], device=ids.device).unsqueeze(0))
        *inputs, hidden_states = run_layers(decoder, hidden_states, embeddings, 0, first)
    below = inputs[-1]

    overlap = lexical_overlap(ids[:, :n])
    mask = torch.ones(ids.shape[1], device=ids.device)
    dropped: list[_Dropped] = []
    alive = torch.arange(n, device=ids.device)
    running_mean, number = (
        torch.zeros(n, device=ids.device),
        0,
    )  # mean of the MLPs' scores so far, where they are averaged
    for i in range(first, len(decoder.layers)):
        stage = schedule.layers.index(i) + 1 if i in schedule.layers else 0
        if stage and schedule.drops(stage) and n >= schedule.min_prompt:
            scores: torch.Tensor = pruners[i](hidden_states[0, alive])
            if pruners[i].averaging:
                number += 1
                scores = torch.lerp(running_mean[alive], scores, 1 / number)
                running_mean = running_mean.scatter(0, alive, scores)
            scores = scores + _bias(
                pruners[i], schedule, decoder.layers[i - 1], hidden_states, below, embeddings, alive, overlap
            )
            kept, decisions = _decide(scores, pruners[i].pooling, schedule, n, stage, generator)
            if kv_predictor is None:
                mask = mask.scatter(0, alive, mask[alive] * decisions)
            else:
                stays = torch.ones_like(mask).scatter(0, alive, decisions)
                dropped.append(_Dropped(i, stays, kv_predictor.encode(i, hidden_states)))
            alive = alive[kept]
        below = hidden_states
        if kv_predictor is None:
            hidden_states = masked_layer(decoder.layers[i], hidden_states, embeddings, mask)
        else:
            hidden_states = _predicted_layer(i, decoder.layers[i], hidden_states, embeddings, dropped, kv_predictor)
    return model.lm_head(decoder.norm(hidden_states[0, n - 1 : -1]))  # type: ignore[no-any-return]


def masked_layer(
    layer: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
) -> torch.Tensor:
    """A decoder layer whose attention weights are ``p m / sum(p m)``.

    Parameters
    ----------
    hidden_states : Tensor [1, T, D]
    mask : Tensor [T]
        Of the keys, in [0, 1]; a token always sees itself.
    """
    is_self = torch.eye(hidden_states.shape[1], dtype=torch.bool, device=mask.device)
    weights = probabilities(layer, hidden_states, position_embeddings) * torch.where(is_self, 1.0, mask)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    value = family_of(layer).values(layer, hidden_states)
    attended = (weights.unflatten(1, (value.shape[1], -1)).to(value.dtype) @ value.unsqueeze(2)).flatten(1, 2)
    return _after_attention(layer, hidden_states, attended)


class _Dropped(NamedTuple):
    """What one stage decided."""

    stage: int
    """The layer after the stage."""
    stays: torch.Tensor
    """``[T]``: 0 for the tokens that it drops, 1 for all others, with a gradient."""
    tokens: torch.Tensor
    """``[1, T, R]``: all, encoded for the maps of this stage."""


def _predicted_layer(
    layer_idx: int,
    layer: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    dropped: list[_Dropped],
    kv_predictor: KVPredictor,
) -> torch.Tensor:
    """A decoder layer, ``[1, T, D]`` to the same, in which dropped tokens have predicted keys and values."""
    family = family_of(layer)
    key, value = family.keys(layer, hidden_states), family.values(layer, hidden_states)
    for stage, stays, tokens in dropped:
        predicted = kv_predictor(stage, layer_idx, tokens)
        key, value = (_replace(stays, own, other) for own, other in zip((key, value), predicted, strict=True))
    query, key = (rotate(x, *position_embeddings) for x in (family.queries(layer, hidden_states), key))
    attended = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=layer.self_attn.scaling, enable_gqa=True
    )
    return _after_attention(layer, hidden_states, attended)


def _replace(stays: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`own` ``[1, heads, T, d]`` where a token stays, else `other`; its own value, and the gradient of a mixture."""
    stays, other = stays.unsqueeze(-1), other.to(own.dtype)
    exact = torch.where(stays > 0, own, other)
    # An exact zero that has a derivative.
    return exact + (stays - stays.detach()).to(own.dtype) * (own - other).detach()


def _after_attention(layer: Any, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    hidden_states = hidden_states + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))  # type: ignore[no-any-return]


def _bias(
    pruner: TokenPruner,
    schedule: PruningSchedule,
    layer_below: Any,
    hidden_states: torch.Tensor,
    hidden_states_below: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    alive: torch.Tensor,
    overlap: torch.Tensor,
) -> torch.Tensor:
    """What a stage adds to the MLP's scores, ``[alive]``, from the tokens that are left."""
    if not schedule.sees_prompt_end or not (pruner.distance or pruner.attention or pruner.lexical):
        return torch.zeros_like(alive, dtype=torch.float32)
    attention = None
    if pruner.attention:
        cos, sin = position_embeddings
        with torch.no_grad():
            attention = question_attention(
                StageInput(
                    hidden_states=hidden_states[:, alive],
                    position_embeddings=(cos[:, alive], sin[:, alive]),
                    token_index=alive.unsqueeze(0),
                    keep_last=0,
                    layer_below=layer_below,
                    hidden_states_below=hidden_states_below[:, alive],
                )
            )
    return pruner.score_bias((alive[-1] - alive).unsqueeze(0), attention, overlap=overlap[:, alive])[0]


def _pool(scores: torch.Tensor, pooling: int, recent: int, block_size: int | None) -> torch.Tensor:
    """Max-pooling inside blocks, as :func:`sdtp_kernels.select_tokens` does it, with a gradient."""
    end = len(scores) - recent
    blocks = scores[:end].reshape(-1, block_size or end)
    pooled = torch.nn.functional.max_pool1d(blocks, pooling, stride=1, padding=pooling // 2)
    return torch.cat([pooled.flatten(), scores[end:]])


def _decide(
    scores: torch.Tensor,
    pooling: int,
    schedule: PruningSchedule,
    length: int,
    stage: int,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices that stay, and a mask ``[alive]`` of zeros and ones with a gradient."""
    plan = schedule.plan(length, stage)
    spread = scores.detach().std() + 1e-6
    if generator is not None:
        uniform = torch.rand(scores.shape, generator=generator, device=scores.device).clamp(1e-9, 1 - 1e-7)
        scores = scores - TEMPERATURE * spread * torch.log(-torch.log(uniform))
    scores = _pool(scores, pooling, plan.recent, plan.block_size)
    kept = select_tokens(
        scores.detach().float().unsqueeze(0),
        plan.num_keep,
        sink=plan.sink,
        recent=plan.recent,
        block_size=plan.block_size,
    )[0]
    hard = torch.zeros_like(scores).scatter(0, kept, 1.0)
    place = torch.arange(len(scores), device=scores.device)
    is_free = (place >= plan.sink) & (place < len(scores) - plan.recent)
    # Halfway between the worst that stays and the best that goes. An infinity where there is none: no gradient then.
    worst_kept = scores.masked_fill(~is_free | (hard == 0), torch.inf).min()
    best_dropped = scores.masked_fill(~is_free | (hard == 1), -torch.inf).max()
    threshold = ((worst_kept + best_dropped) / 2).detach()
    if not torch.isfinite(threshold):
        return kept, hard
    soft = torch.sigmoid((scores - threshold) / (TEMPERATURE * spread))
    # soft - soft.detach() is an exact zero: the value stays hard.
    return kept, hard + torch.where(is_free, soft - soft.detach(), 0.0)
