"""Floating-point operations of a prefill: the ideal that a measured speed-up is held against.

Counted are the matrix products, a multiply-add as two operations. Norms, activations, rotary embeddings, biases,
softmax and the copies of pruning are not: they are what an implementation has to make negligible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from sdtp_kernels import KVPredictor, PruningSchedule, TokenPruner


def prefill_flops(config: Any, tokens_per_layer: Sequence[int], keys_per_layer: Sequence[int] | None = None) -> int:
    """Operations of one prefill at batch size 1 with logits for the last token only.

    Parameters
    ----------
    config : transformers config
        Of a supported family: grouped-query attention and a gated MLP.
    tokens_per_layer : sequence of int
        Tokens that each decoder layer computes, ``n_l``.
    keys_per_layer : sequence of int, optional
        Tokens that it has keys for, ``N_l``; by default those that it computes. Where they are more, kept tokens are
        counted as if they were spread evenly; pruners keep late ones more often, which see more keys.

    Returns
    -------
    int
        ``sum_l (2 P n_l + 2 n_l N_l heads head_dim) + 2 D V`` with P the weights of a layer's matrices. The attention
        term is the two products QK^T and PV, ``2 n N heads head_dim`` each, of which causality needs half. A kernel
        that computes the full square does more than this, and pruning then saves more than the ideal says.
    """
    hidden, heads, kv_heads, head_dim = _sizes(config)
    attention_weights = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim  # q and o, k and v
    layer_weights = attention_weights + 3 * hidden * config.intermediate_size
    pairs = zip(tokens_per_layer, keys_per_layer or tokens_per_layer, strict=True)
    layers = sum(2 * layer_weights * n + 2 * n * keys * heads * head_dim for n, keys in pairs)
    return int(layers + 2 * hidden * config.vocab_size)


def tokens_per_layer(schedule: PruningSchedule, length: int, num_layers: int) -> list[int]:
    """Tokens that each layer computes for a prompt of `length` tokens, ``n_l``."""
    return [schedule.num_keep(length, sum(start <= i for start in schedule.layers)) for i in range(num_layers)]


def scoring_flops(
    config: Any,
    schedule: PruningSchedule,
    length: int,
    pruners: Mapping[int, TokenPruner] | str | Callable[..., torch.Tensor],
) -> int:
    """Operations of all scorers in one prefill.

    Parameters
    ----------
    config : transformers config
    schedule : PruningSchedule
    length : int
        Tokens of the prompt.
    pruners : mapping of int to TokenPruner, str or callable
        As :func:`sdtp_kernels.apply_sdtp` takes them. A pruner costs ``2 n H (D + 1)``; last-window attention, as a
        scorer or - under the global budget - as a term of a pruner, costs the window's query projection and logits,
        since the keys are in the cache; the other scorers are counted as free.

    Returns
    -------
    int
    """
    from sdtp_kernels.scorers import ATTENTION_WINDOW, QUESTION_WINDOW, attention_score

    if length < schedule.min_prompt:
        return 0
    hidden, heads, _, head_dim = _sizes(config)
    total = 0
    for stage, layer in enumerate(schedule.layers, 1):
        if not schedule.drops(stage):
            continue
        n = schedule.num_keep(length, stage - 1)
        window = 0
        if isinstance(pruners, Mapping):
            pruner = pruners[layer]
            total += 2 * n * pruner.intermediate_size * (hidden + 1)
            if pruner.attention and schedule.sees_prompt_end:
                window = QUESTION_WINDOW
        elif pruners in ("attention", attention_score):
            window = ATTENTION_WINDOW
        total += 2 * min(window, n) * heads * head_dim * (hidden + n)
    return total


def predicting_flops(predictor: KVPredictor, schedule: PruningSchedule, tokens_per_layer: Sequence[int]) -> int:
    """Operations of all maps of a :class:`~sdtp_kernels.KVPredictor` in one prefill."""
    total = 0
    for layer in schedule.layers:
        dropped = tokens_per_layer[layer - 1] - tokens_per_layer[layer]
        names = [f"up.{layer}:{later}" for later in range(layer, len(tokens_per_layer))]
        names += [f"down.{layer}"] if predictor.rank is not None else []
        total += sum(2 * dropped * predictor.get_parameter(f"{name}.weight").numel() for name in names)
    return total


def _sizes(config: Any) -> tuple[int, int, int, int]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.hidden_size, heads, config.num_key_value_heads, head_dim
