"""What a token was worth: the quantities that pruners learn to predict, by name.

All of them are computed on one sample at a time, without padding, so no token of another sample and no padding can
enter a loss, and a sample's target does not depend on what it is batched with. The model's weights are frozen; where
gradients are needed, the graph begins at the input of the first stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from sdtp_eval.attention import probabilities
from sdtp_kernels.scorers import StageInput, question_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class DensePass(NamedTuple):
    """A dense forward of one sample, kept for looking at."""

    decoder: Any
    input_ids: torch.Tensor
    """``[1, T]``: context and continuation."""
    num_context: int
    """Tokens of the context, n."""
    layer_inputs: list[torch.Tensor]
    """``[1, T, D]`` before each decoder layer."""
    output: torch.Tensor
    """``[1, T, D]`` after the last layer, before the final norm."""
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    """cos and sin, ``[1, T, head_dim]``."""


def dense_pass(
    model: Any, context: Sequence[int], continuation: Sequence[int], graph_from: int | None = None
) -> DensePass:
    """Run the decoder over context and continuation, without a cache.

    Parameters
    ----------
    model : transformers model
        Frozen, in evaluation mode.
    context, continuation : sequence of int
        Token ids.
    graph_from : int, optional
        The layer at whose input the graph of gradients begins; there is none by default.
    """
    decoder = model.model
    input_ids = torch.tensor([[*context, *continuation]], device=decoder.embed_tokens.weight.device)
    position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    first = len(decoder.layers) if graph_from is None else graph_from
    with torch.no_grad():
        hidden_states = decoder.embed_tokens(input_ids)
        embeddings = decoder.rotary_emb(hidden_states, position_ids)
        *inputs, last = run_layers(decoder, hidden_states, embeddings, 0, first)
    if graph_from is not None:
        with torch.enable_grad():
            *later, last = run_layers(decoder, last.requires_grad_(), embeddings, first, len(decoder.layers))
        inputs += later
    return DensePass(decoder, input_ids, len(context), inputs, last, embeddings)


def run_layers(
    decoder: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    first: int,
    end: int,
) -> Iterator[torch.Tensor]:
    """Inputs of the layers from `first` to before `end`, then the output of the last of them.

    Parameters
    ----------
    hidden_states : Tensor [1, T, D]
        Input of layer `first`.
    """
    from transformers.masking_utils import create_causal_mask

    # Without padding: None for kernels that know causality themselves.
    mask = create_causal_mask(decoder.config, hidden_states, None, None)
    yield hidden_states
    for layer in decoder.layers[first:end]:
        hidden_states = layer(
            hidden_states, attention_mask=mask, position_embeddings=position_embeddings, use_cache=False
        )
        yield hidden_states


def last_window_attention(dense: DensePass, layer: int) -> torch.Tensor:
    """What the pruner of a stage at `layer` is given at run time: see :func:`sdtp_kernels.scorers.question_attention`.

    Returns
    -------
    Tensor [n], float32
    """
    n = dense.num_context
    cos, sin = dense.position_embeddings
    stage = StageInput(
        hidden_states=dense.layer_inputs[layer][:, :n],
        position_embeddings=(cos[:, :n], sin[:, :n]),
        token_index=torch.arange(n, device=cos.device).unsqueeze(0),
        keep_last=0,
        layer_below=dense.decoder.layers[layer - 1],
        hidden_states_below=dense.layer_inputs[layer - 1][:, :n],
    )
    with torch.no_grad():
        return question_attention(stage)[0].float()


def future_attention(dense: DensePass, layers: Sequence[int]) -> torch.Tensor:
    """Attention that a context token receives from the positions that predict the continuation.

    Per layer and head the mean over these queries (from the prompt's last token to the last but one), the maximum over
    heads, the mean over the layers from the stage on. Forward only. Compare SnapKV's observation (arXiv 2404.14469)
    with the queries of the future instead of the prompt's last ones. One layer's logits ``[heads, T - n, T]`` are all
    that is held at a time.

    Parameters
    ----------
    dense : DensePass
    layers : sequence of int
        The stages.

    Returns
    -------
    Tensor [stages, n], float32
    """
    n, total = dense.num_context, dense.input_ids.shape[1]
    queries = slice(n - 1, total - 1)  # the last token predicts nothing that is known
    received = []
    with torch.no_grad():
        for layer, hidden_states in list(zip(dense.decoder.layers, dense.layer_inputs, strict=True))[layers[0] :]:
            attention = probabilities(layer, hidden_states, dense.position_embeddings, queries)
            received.append(attention.mean(-2)[0].amax(0)[:n])
    stacked = torch.stack(received)
    # Mean over layers >= stage, for all stages.
    return torch.stack([stacked[layer - layers[0] :].mean(0) for layer in layers])


def gradients(dense: DensePass, lm_head: Any, layers: Sequence[int], objective: str) -> list[torch.Tensor]:
    """Gradients of a scalar with respect to the stage inputs; the graph is kept for the next one.

    Parameters
    ----------
    dense : DensePass
        With a graph from the first stage on.
    lm_head : Module
    layers : sequence of int
        The stages.
    objective : {"all", "continuation", "logit"}
        Cross-entropy, mean over all tokens or the continuation's, or the mean logit of the continuation's tokens.

    Returns
    -------
    list of Tensor [n, D], float32
    """
    begin = 0 if objective == "all" else dense.num_context - 1
    with torch.enable_grad():
        logits = lm_head(dense.decoder.norm(dense.output[0, begin:-1])).float()
        labels = dense.input_ids[0, begin + 1 :]
        if objective == "logit":
            value = logits.gather(-1, labels.unsqueeze(-1)).mean()
        else:
            value = F.cross_entropy(logits, labels)
        stage_inputs = [dense.layer_inputs[layer] for layer in layers]
        found = torch.autograd.grad(value, stage_inputs, retain_graph=True)
    return [gradient[0, : dense.num_context].float() for gradient in found]


def _signed(gradient: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    return (gradient * hidden_states).sum(-1)


def _absolute(gradient: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    return (gradient * hidden_states).abs().sum(-1)


def _l2(gradient: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    return (gradient * hidden_states).square().sum(-1).sqrt()


class Target(NamedTuple):
    """A target function."""

    about: str
    is_log: bool
    """Positive and over many orders of magnitude: training takes the logarithm."""
    objective: str = ""
    """Of the gradient, see :func:`gradients`; empty where none is needed."""
    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """``(gradient, hidden_states) [n, D] -> [n]``."""


TARGETS: dict[str, Target] = {
    "future_attention": Target("attention received from the positions that predict the continuation", is_log=True),
    "paper": Target("SDTP equation (3): signed gradient x input, loss on all tokens", False, "all", _signed),
    "abs/all": Target("sum of |gradient x input|, loss on all tokens", True, "all", _absolute),
    "l2/all": Target("L2 norm of gradient x input, loss on all tokens", True, "all", _l2),
    "signed/continuation": Target("signed gradient x input, loss on the continuation", False, "continuation", _signed),
    "abs/continuation": Target("sum of |gradient x input|, loss on the continuation", True, "continuation", _absolute),
    "l2/continuation": Target("L2 norm of gradient x input, loss on the continuation", True, "continuation", _l2),
    "logit/continuation": Target("L2 norm of gradient x input of the continuation's logits", True, "logit", _l2),
}


def compute_targets(
    dense: DensePass, lm_head: Any, layers: Sequence[int], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The named targets of one sample.

    Gradients of one objective are computed once for all targets that use it.

    Parameters
    ----------
    dense : DensePass
        With a graph from the first stage on where :func:`need_graph` says so.
    lm_head : Module
    layers : sequence of int
        The stages, ascending.
    names : sequence of str
        Of :data:`TARGETS`.

    Returns
    -------
    dict of str to Tensor [stages, n], float32
        As they are: the logarithm is left to training.

    Raises
    ------
    ValueError
        If a name is unknown, or a target is not finite.
    """
    check_names(names)
    by_objective: dict[str, list[torch.Tensor]] = {}
    found = {}
    for name in names:
        _, _, objective, reduce = TARGETS[name]
        if reduce is None:
            found[name] = future_attention(dense, layers)
            continue
        if objective not in by_objective:
            by_objective[objective] = gradients(dense, lm_head, layers, objective)
        inputs = [dense.layer_inputs[layer][0, : dense.num_context].detach().float() for layer in layers]
        found[name] = torch.stack([reduce(g, x) for g, x in zip(by_objective[objective], inputs, strict=True)])
    for name, value in found.items():
        for layer, row in zip(layers, value, strict=True):
            if not torch.isfinite(row).all():
                raise ValueError(
                    f"target {name!r} of layer {layer} is NaN or infinite ({int((~row.isfinite()).sum())} of "
                    f"{row.numel()} tokens): run the model in float32 or bfloat16, and check its weights"
                )
    return found


def need_graph(names: Sequence[str]) -> bool:
    """Whether one of these targets is made of gradients."""
    return any(TARGETS[name].objective for name in names)


def check_names(names: Sequence[str]) -> None:
    """Refuse unknown targets."""
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        raise ValueError(f"no target {', '.join(map(repr, unknown)) or 'named'}; known: {', '.join(TARGETS)}")
