"""The oracle for models: a pruned forward must equal this dense one.

Every token goes through every layer. From each stage on, the tokens that were dropped are masked as keys, and what they
compute is ignored. Nothing of the package is used but ``forward`` and ``distance_term`` of the pruners: the counts are
written out with fractions, the selection is a sort of a Python list, attention is what the model's own eager attention
returns, rows of a batch are run alone and without padding, and there is no cache. ``generate(use_cache=False)`` on it
is therefore an independent reference for every way of decoding.
"""

from __future__ import annotations

import collections
import copy
import math
from fractions import Fraction

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from sdtp_kernels.models import compat


def naive_select(scores, num_keep, sink, recent, block_size=None, pooling=1):
    """Kept indices of one row, straight from the text of the contract."""
    before_tail = len(scores) - recent
    per_block = before_tail if block_size is None else block_size
    kept = set(range(before_tail, len(scores)))
    for begin in range(0, before_tail, max(per_block, 1)):
        block = range(begin, begin + per_block)
        quota = (num_keep - recent) // (before_tail // per_block)
        forced = {i for i in block if i < sink or (block_size is not None and i == block[-1])}

        def order(i, block=block, forced=forced):
            near = [scores[j] for j in block if abs(i - j) <= pooling // 2 and not math.isnan(scores[j])]
            return (i not in forced, not near, -max(near, default=0.0), i)

        kept.update(sorted(block, key=order)[:quota])
    return sorted(kept)


def naive_keep(schedule, length, stage):
    """Tokens, trailing tokens always kept, and tokens a complete block holds, after `stage` stages."""
    ratios = (
        schedule.keep_ratio if isinstance(schedule.keep_ratio, tuple) else (schedule.keep_ratio,) * len(schedule.layers)
    )
    share = math.prod((Fraction(str(r)) for r in ratios[:stage]), start=Fraction(1))
    if length < schedule.min_prompt:
        return length, length, None
    if schedule.budget == "block":
        per_block = max(math.ceil(schedule.block_size * share), min(schedule.sink + 1, schedule.block_size))
        margin = schedule.block_size // 2
        ends = range(schedule.block_size, length + 1, schedule.block_size)
        blocks = sum(length - end >= margin for end in ends)  # half a block has to stand after a finished one
        unfinished = length - blocks * schedule.block_size
        return blocks * per_block + unfinished, unfinished, per_block
    recent = max(1, math.ceil(length * Fraction(str(schedule.recent))))
    forced = min(length, schedule.sink + recent)
    return max(forced, math.ceil(length * share)), recent, None


def cache_bytes(model, schedule, lengths, room=0, padded=False, evicted=False):
    """Keys and values of every layer: the tokens it keeps of the widest row there can be, and room for more.

    With `evicted` all layers hold what the last one keeps.
    """
    total, config = 0, model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_key_value_heads * head_dim * model.dtype.itemsize
    for layer in range(config.num_hidden_layers):
        stage = len(schedule.layers) if evicted else sum(start <= layer for start in schedule.layers)
        possible = range(max(lengths) + 1) if padded else lengths
        widest = max(naive_keep(schedule, n, stage)[0] for n in possible)
        total += 2 * len(lengths) * width * (widest + room)
    return total


def naive_attention(probabilities, window):
    """Score of each token from attention ``[heads, n, n]``: last `window` rows, max-pooled over 7, mean of heads."""
    score = probabilities[:, -window:].double().sum(1)
    return torch.nn.functional.max_pool1d(score, 7, stride=1, padding=3).mean(0)


def naive_overlap(ids):
    """Words of the last 64 tokens around each token of a prompt, by lists and counters."""
    start = max(len(ids) - 64, 0)
    windows = max(start / 64, 4)
    weights = [0] * len(ids)
    for n in (1, 2, 3):
        grams = {end: tuple(ids[end - n + 1 : end + 1]) for end in range(n - 1, len(ids))}
        asked = {gram for end, gram in grams.items() if end - n + 1 >= start}
        count = collections.Counter(gram for end, gram in grams.items() if end < start)
        for end in range(n - 1, start):
            if grams[end] in asked:
                weights[end] += round(math.log(max(windows / count[grams[end]], 1)) * 2**16)
    sums = [sum(weights[max(i - 48, 0) : i + 17]) for i in range(len(ids))]
    least = round(math.log(windows) * 2**16)
    return [total / max(*sums, least, 1) for total in sums]


def naive_terms(pruner, distance, attention, overlap):
    """What a TokenPruner adds to its MLP's score: its distance and lexical terms, and attention as a standard score."""
    terms = pruner.distance_term(distance)
    if pruner.attention:
        value = torch.log(attention + 1e-9)
        value = (value - value.mean()) / (value.std(correction=0) + 1e-6)
        terms = terms + pruner.attention_weight * value
    if pruner.lexical:
        terms = terms + pruner.lexical_weight * overlap
    return terms


class Substituted:
    """A cache that keeps nothing, and replaces keys and values of frozen tokens by what is predicted for them."""

    def __init__(self, predictor, frozen, embeddings):
        self.predictor, self.frozen, self.embeddings = predictor, frozen, embeddings

    def update(self, keys, values, layer_idx, *args, **kwargs):
        keys, values = keys.clone(), values.clone()
        for token, (stage, hidden) in self.frozen.items():
            features = hidden / (hidden.square().mean() + self.predictor.rms_eps).sqrt()
            if self.predictor.rank is not None:
                features = self.predictor.down[str(stage)].weight @ features
            linear = self.predictor.up[f"{stage}:{layer_idx}"]
            key, value = (linear.weight @ features + linear.bias).view(2, *keys.shape[1::2])
            cos, sin = (t[0, token] for t in self.embeddings)
            left, right = key.chunk(2, dim=-1)
            keys[0, :, token] = key * cos + torch.cat([-right, left], dim=-1) * sin
            values[0, :, token] = value
        return keys, values


class MaskedDense:
    """A model of any family that computes what the pruned one must, from the whole sequence, every time.

    :meth:`of` makes one from a model; ``prompt_columns`` are the columns of ``input_ids`` that are the prompt. With
    ``evicts`` what follows the prompt sees the last stage's tokens alone, in all layers. Instead of pruners it takes
    ``"attention"``, the scorer; that and pruners with an attention term need eager attention. With a `kv_predictor`
    nothing is masked: from each stage on, keys and values of dropped tokens are those that it predicts.
    """

    evicts = False

    @classmethod
    def of(cls, model, pruners, schedule, prompt_columns, kv_predictor=None):
        oracle = copy.deepcopy(model)
        oracle.kv_predictor = kv_predictor
        oracle.__class__ = type(cls.__name__, (cls, type(model)), {})
        oracle.pruners, oracle.schedule, oracle.prompt_columns = pruners, schedule, prompt_columns
        return oracle

    def forward(self, input_ids, attention_mask=None, logits_to_keep=0, **_):
        last = []
        for row in range(input_ids.shape[0]):
            padding = 0 if attention_mask is None else int((attention_mask[row] == 0).sum())
            logits, _ = self.row(input_ids[row, padding:], self.prompt_columns - padding)
            last.append(logits[-1:])
        return CausalLMOutputWithPast(logits=torch.stack(last))

    def row(self, ids, prompt_length):
        """Logits ``[T, V]`` of one row without padding, and its kept prompt tokens after each stage."""
        decoder, schedule, length = self.model, self.schedule, ids.shape[0]
        hidden = decoder.embed_tokens(ids[None])
        positions = torch.arange(length)[None]
        embeddings = decoder.rotary_emb(hidden, positions)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        alive = list(range(prompt_length))
        self.overlap = torch.tensor(naive_overlap(ids[:prompt_length].tolist()))
        opinions = [[] for _ in range(prompt_length)]
        history, probabilities = [], []
        survivors, frozen = None, {}
        if self.evicts and prompt_length >= schedule.min_prompt and prompt_length < length:
            survivors = self.row(ids[:prompt_length], prompt_length)[1][-1]
        for i, layer in enumerate(decoder.layers):
            if i in schedule.layers and prompt_length >= schedule.min_prompt:
                stage = schedule.layers.index(i) + 1
                num_keep, recent, _ = naive_keep(schedule, prompt_length, stage)
                per_block = naive_keep(schedule, prompt_length, stage - 1)[2]
                is_dropping = num_keep < len(alive)  # a stage that drops nothing has no opinion
                scores = self.scores(i, hidden[0, alive], alive, probabilities, opinions if is_dropping else None)
                pooling = 1 if self.pruners == "attention" else self.pruners[i].pooling
                kept = naive_select(scores, num_keep, schedule.sink, recent, per_block, pooling)
                arrived, alive = alive, [alive[k] for k in kept]
                frozen |= {token: (i, hidden[0, token]) for token in set(arrived) - set(alive)}
                history.append(alive)
            visible = torch.zeros(length, dtype=torch.bool)
            visible[alive] = True
            visible[prompt_length:] = True
            allowed = causal & (visible[None] | torch.eye(length, dtype=torch.bool))  # a row must not be empty
            substitute = {}
            if self.kv_predictor is not None:
                allowed, substitute = causal, {compat.CACHE: Substituted(self.kv_predictor, frozen, embeddings)}
            if survivors is not None:
                left = torch.zeros(prompt_length, dtype=torch.bool)
                left[survivors] = True
                allowed[prompt_length:, :prompt_length] &= left
            mask = torch.where(allowed, 0.0, torch.finfo(hidden.dtype).min).to(hidden.dtype)[None, None]
            probabilities.clear()
            hook = layer.self_attn.register_forward_hook(lambda _, __, output: probabilities.append(output[1]))
            hidden = layer(hidden, attention_mask=mask, position_embeddings=embeddings, use_cache=False, **substitute)
            hook.remove()
        return self.lm_head(decoder.norm(hidden))[0], history

    def scores(self, stage_layer, hidden, alive, probabilities, opinions):
        """Scores of the tokens that arrive at a stage, whose attention in the layer below is in `probabilities`."""
        attention = None
        if probabilities[0] is not None:
            attention = probabilities[0][0][:, alive][:, :, alive]
            attention = attention / attention.sum(-1, keepdim=True)  # of predicted keys it takes no share
        if self.pruners == "attention":
            return naive_attention(attention, 32).tolist()
        pruner = self.pruners[stage_layer]
        scores = pruner(hidden).tolist()
        if pruner.averaging and opinions is not None:
            for k, score in zip(alive, scores, strict=True):
                opinions[k].append(score)
            scores = [math.fsum(opinions[k]) / len(opinions[k]) for k in alive]
        has_terms = pruner.distance or pruner.attention or pruner.lexical
        if not has_terms or self.schedule.budget == "block":  # a block sees no prompt's end
            return scores
        if pruner.attention:
            attention = naive_attention(attention, 16)
        terms = naive_terms(pruner, alive[-1] - torch.tensor(alive), attention, self.overlap[alive])
        return (torch.tensor(scores, dtype=torch.double) + terms).tolist()
