"""Rivals of a learned pruner at the runtime's own seam, and the upper bounds that no method can have.

A baseline is a function of a :class:`~sdtp_kernels.scorers.StageInput`, like the runtime's own. An oracle looks at what
comes after the prompt: it is computed by a dense pass over prompt and continuation, and looked up by the tokens'
original index once the prompt is pruned. Its place is at the top of a plot, labelled as what it is.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from sdtp_eval.attention import probabilities, softmax
from sdtp_kernels.models.family import family_of
from sdtp_kernels.reference import rotate
from sdtp_kernels.scorers import SCORERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sdtp_kernels.scorers import StageInput

    Scorer = Callable[[StageInput], torch.Tensor]
    Oracle = Callable[[Any, torch.Tensor, int, int, Sequence[int]], dict[int, torch.Tensor]]

QUERY_BLOCK = 256  # rows of the attention matrix that are in memory at once


def attention_update(stage: StageInput) -> torch.Tensor:
    """L2 norm of what the attention block of the layer below added to each token, in the manner of DASH.

    DASH (Delta Attention Selective Halting) stops tokens whose attention update has become small. Its own place is the
    layer just computed, which is the layer below the stage; at the stage layer the update would have to be computed for
    the very tokens that pruning is to spare. The output of that block is not kept, so it is computed again here: the
    quality is that of the method, the time is not.

    Returns
    -------
    Tensor [B, n], float32
    """
    layer = stage.layer_below
    query, key = _queries_and_keys(stage)
    value = family_of(layer).values(layer, stage.hidden_states_below)  # type: ignore[arg-type]
    index = stage.token_index
    is_visible = (index[:, None, :] <= index[:, :, None]) & (index[:, None, :] >= 0)
    # A padding row sees itself: an empty softmax would be NaN.
    is_visible |= torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
    update = F.scaled_dot_product_attention(
        query, key, value, attn_mask=is_visible[:, None], scale=layer.self_attn.scaling, enable_gqa=True
    )
    return layer.self_attn.o_proj(update.transpose(1, 2).flatten(2)).float().norm(dim=-1)  # type: ignore[no-any-return]


def accumulated_attention(stage: StageInput) -> torch.Tensor:
    """Attention that each token received from all queries of the prompt in the layer below: column sums, as in H2O.

    Causality gives an early token more queries than a late one, and so a larger sum; that is H2O's own bias.

    Returns
    -------
    Tensor [B, n], float32; the mean over heads
    """
    end = stage.hidden_states.shape[1] - stage.keep_last  # what stands after the prompt is no part of it
    query, key = _queries_and_keys(stage)
    index = stage.token_index
    received = torch.zeros(index.shape, dtype=torch.float32, device=index.device)
    for begin in range(0, end, QUERY_BLOCK):
        rows = slice(begin, min(begin + QUERY_BLOCK, end))
        is_visible = (index[:, None, :] <= index[:, rows, None]) & (index[:, None, :] >= 0)
        attention = softmax(query[:, :, rows], key, is_visible[:, None], stage.layer_below.self_attn.scaling)
        received += attention.nan_to_num(0.0).sum(2).mean(1)
    return received


BASELINES: dict[str, Scorer] = {
    **SCORERS,
    "attention_update": attention_update,
    "accumulated_attention": accumulated_attention,
}


def oracle_future_attention(
    model: Any, input_ids: torch.Tensor, prompt_length: int, answer_length: int, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Attention that each prompt token will receive from the tokens that predict the continuation.

    Those are the prompt's last token and all after it. Mean over them, maximum over heads, mean over the layers from
    the stage on: what is dropped before a layer is missing in all later ones.

    Parameters
    ----------
    model : transformers model
        Not patched.
    input_ids : int64 Tensor [1, T]
        Prompt and continuation.
    prompt_length : int
        Leading tokens that are the prompt, N.
    answer_length : int
        Trailing tokens that are scored; between the two a question may stand, which is attention like any other.
    layers : sequence of int
        Stages.

    Returns
    -------
    dict of int to Tensor [N], float32
        By layer; see :func:`look_up`.
    """
    decoder = model.model
    per_layer: list[torch.Tensor] = []

    def watch(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        attention = probabilities(layer, args[0], kwargs["position_embeddings"], slice(prompt_length - 1, None))
        per_layer.append(attention[0, :, :, :prompt_length].mean(1).amax(0))

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for layer in decoder.layers:
            hooks.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
        decoder(input_ids, use_cache=False)
    attention = torch.stack(per_layer)
    return {layer: attention[layer:].mean(0) for layer in layers}


def oracle_saliency(
    model: Any, input_ids: torch.Tensor, prompt_length: int, answer_length: int, layers: Sequence[int]
) -> dict[int, torch.Tensor]:
    """L2 norm of gradient times hidden state at each stage, for the loss of the answer.

    The strongest target known here. The form of the paper - the signed sum, over the loss of all tokens - is worse than
    random when it is used directly.

    Parameters and returns as :func:`oracle_future_attention`. A question between prompt and answer has no part in the
    loss: what it needs is not what its answer needs.

    Raises
    ------
    ValueError
        If no answer stands after the prompt.
    """
    if not 0 < answer_length <= input_ids.shape[1] - prompt_length:
        raise ValueError(
            f"oracle_saliency: {input_ids.shape[1]} tokens with a prompt of {prompt_length} and an answer of "
            f"{answer_length}; the loss needs an answer of one token or more after the prompt"
        )
    decoder = model.model
    inputs: dict[int, torch.Tensor] = {}

    def watch(layer_idx: int) -> Callable[..., tuple[Any, ...]]:
        def hook(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = args[0]
            if not inputs:  # the graph begins at the first stage
                hidden = hidden.detach().requires_grad_(True)
            inputs[layer_idx] = hidden
            return (hidden, *args[1:])

        return hook

    with contextlib.ExitStack() as undo, torch.enable_grad():
        undo.enter_context(_frozen(model))
        for layer in layers:
            undo.callback(decoder.layers[layer].register_forward_pre_hook(watch(layer)).remove)
        hidden = decoder(input_ids, use_cache=False).last_hidden_state[:, -answer_length - 1 : -1]
        loss = F.cross_entropy(model.lm_head(hidden)[0].float(), input_ids[0, -answer_length:])
        gradients = torch.autograd.grad(loss, list(inputs.values()))
    return {
        layer: (gradient.float() * hidden.detach().float()).norm(dim=-1)[0, :prompt_length]
        for (layer, hidden), gradient in zip(inputs.items(), gradients, strict=True)
    }


ORACLES: dict[str, Oracle] = {
    "oracle_future_attention": oracle_future_attention,
    "oracle_saliency": oracle_saliency,
}


class LookUp(NamedTuple):
    """A scorer that knows the scores beforehand, by the index of a token in the prompt."""

    scores: torch.Tensor
    """``[N]``"""

    def __call__(self, stage: StageInput) -> torch.Tensor:
        # Tokens after the prompt have indices beyond it; they are kept whatever their score.
        return self.scores[stage.token_index.clamp(0, len(self.scores) - 1)]


def pruner_score(pruner: Any, stage: StageInput) -> torch.Tensor:
    """The score of a :class:`~sdtp_kernels.TokenPruner` as a scorer: what the fused op computes, in plain PyTorch."""
    from sdtp_kernels.models.scoring import Fused

    scores, _ = Fused.of(pruner, stage.hidden_states.dtype).score(stage, None, "reference")
    return scores


def _queries_and_keys(stage: StageInput) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the layer below, rotated, ``[B, heads, n, head_dim]`` and ``[B, kv_heads, n, head_dim]``."""
    layer, hidden_states, key = stage.layer_below, stage.hidden_states_below, stage.keys_below
    assert hidden_states is not None, "a prompt in chunks"
    family = family_of(layer)
    if key is None:
        key = rotate(family.keys(layer, hidden_states), *stage.position_embeddings)
    return rotate(family.queries(layer, hidden_states), *stage.position_embeddings), key


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Parameters without gradients for a while: only those of the hidden states are wanted."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
