"""The providers that can run the pruning step, and the check of each: a wrong one is not timed."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sdtp_bench import eager
from sdtp_kernels import explain_backends, position_attention, prune_tokens, reference
from sdtp_kernels.backends import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sdtp_bench.shapes import Attention, Case, Stage
    from sdtp_bench.timing import Device
    from sdtp_kernels.schedule import StagePlan

    # hidden_states, tensors, indices, ...
    Output = tuple[Any, ...]

# Tokens that the oracle scores at once: its float64 copies of a long prompt would take gigabytes.
ORACLE_TOKENS = 4096
# Queries that it attends by at once: it holds the weights of all their keys, 4 GB of 28 heads and 32768 keys.
ORACLE_QUERIES = 1024


def backends_on(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends that can run there, but for the oracle."""
    statuses = explain_backends(device, dtype)
    return [status.name for status in statuses if status.available and status.name != "reference"]


def find_providers(
    device: Device, case: Case, stage: Stage, plan: StagePlan, names: Sequence[str] | None = None
) -> dict[str, Callable[[], Output]]:
    """The pruning step of one case, by the name of the provider.

    Parameters
    ----------
    device : Device
    case : Case
    stage : Stage
    plan : StagePlan
    names : sequence of str, optional
        Those wanted. By default everyone but ``reference``, which computes in float64, to be right.

    Returns
    -------
    dict
        ``eager``: PyTorch as people write it. ``eager tuned``: rows copied by ``index_select``. ``torch.compile``:
        eager, compiled for just these shapes. Then every backend that can run there.

    Raises
    ------
    ValueError
        If a name is not known there.
    """
    # A program compiled for each length is what is to be timed, and Dynamo stops compiling after a few.
    torch._dynamo.reset()
    compiled = torch.compile(eager.prune_tokens, backend=device.compiler, fullgraph=True, dynamic=False)
    narrow = eager.in_one_dtype(stage)
    selection = {**plan._asdict(), "pooling": case.pooling}
    found: dict[str, Callable[[], Any]] = {
        "eager": functools.partial(eager.prune_tokens, narrow, plan, case.pooling),
        "eager tuned": functools.partial(eager.prune_tokens, narrow, plan, case.pooling, eager.copy_rows),
        "torch.compile": functools.partial(compiled, narrow, plan, case.pooling),
    }
    for name in (*backends_on(device.torch_device, stage.hidden_states.dtype), "reference"):
        found[name] = functools.partial(
            prune_tokens, stage.hidden_states, stage.tensors, **stage.scoring._asdict(), **selection, backend=name
        )
    if names is None:
        names = [name for name in found if name != "reference"]
    unknown = [name for name in names if name not in found]
    if unknown:
        raise ValueError(f"no provider called {unknown[0]!r} can run here; there are: {', '.join(found)}")
    return {name: found[name] for name in names}


def find_attention(device: Device, inputs: Attention) -> dict[str, Callable[[], torch.Tensor]]:
    """The attention of kept tokens over a whole prompt, by the name of the provider.

    Parameters
    ----------
    device : Device
    inputs : Attention

    Returns
    -------
    dict
        Every backend that has a kernel of its own. ``flex_attention``: compiled for just these shapes, with a block
        mask. ``sdpa``: one attention with a mask ``[B, 1, n, N]`` and keys repeated for every head, as transformers
        calls it. Both masks are made by the first call.
    """
    query, key, value, num_visible, first_visible = inputs

    @functools.cache
    def flex() -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def is_seen(batch: torch.Tensor, head: torch.Tensor, i: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
            return (column < num_visible[batch, i]) & (column >= first_visible[batch])

        sizes = query.shape[0], None, query.shape[2], key.shape[2]
        mask = create_block_mask(is_seen, *sizes, device=device.torch_device)
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, backend=device.compiler, fullgraph=True, dynamic=False)
        return functools.partial(compiled, query, key, value, block_mask=mask, enable_gqa=True)

    @functools.cache
    def mask() -> torch.Tensor:
        column = torch.arange(key.shape[2], device=key.device)
        return ((column < num_visible[..., None]) & (column >= first_visible[:, None, None]))[:, None]

    def sdpa() -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(group, dim=1) for t in (key, value))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask())

    found: dict[str, Callable[[], torch.Tensor]] = {
        name: functools.partial(position_attention, *inputs, backend=name)
        for name in backends_on(device.torch_device, query.dtype)
        if choose(name, query.device, query.dtype).position_attention is not reference.position_attention
    }
    return {**found, "flex_attention": lambda: flex()(), "sdpa": sdpa}


def make_attention_check(inputs: Attention) -> Callable[[Callable[[], torch.Tensor]], str]:
    """What says whether an attention is right: a function of its call that returns what is wrong, or nothing."""
    query, key, value, num_visible, first_visible = inputs
    parts = zip(query.split(ORACLE_QUERIES, dim=2), num_visible.split(ORACLE_QUERIES, dim=1), strict=True)
    expected = torch.cat(
        [reference.position_attention(q, key, value, visible, first_visible) for q, visible in parts], dim=2
    ).float()
    allowed = allowed_error(expected, max(1e-5, 2 * torch.finfo(query.dtype).eps))

    def check(run: Callable[[], torch.Tensor]) -> str:
        error = (run().float() - expected).abs().max().item()
        return "" if error <= allowed else f"results differ by {error:.3g}, allowed are {allowed:.3g}"  # also if NaN

    return functools.partial(error_of, check)


def make_check(case: Case, stage: Stage, plan: StagePlan) -> Callable[[Callable[[], Output]], str]:
    """What says whether a provider is right: a function of its call that returns what is wrong, or nothing.

    A token may be dropped that ranks above one that was kept by as much as rounding to the model's dtype explains, and
    everything else has to be right to the last bit. What a provider raises counts as found.
    """
    # Without the terms: those have one number a token, and are added here.
    terms = stage.scoring._replace(mean_score=None, num_scores=0, score_bias=None)
    parts = stage.hidden_states.split(ORACLE_TOKENS, dim=1)
    scores = torch.cat([reference.score_tokens(part, terms) for part in parts], dim=1)
    if stage.scoring.mean_score is not None:
        scores = torch.lerp(stage.scoring.mean_score, scores, 1 / (stage.scoring.num_scores + 1))
    if stage.scoring.score_bias is not None:
        scores += stage.scoring.score_bias
    allowed = allowed_error(scores, max(torch.finfo(stage.hidden_states.dtype).eps, 1e-5))
    ranked = eager.ranked_blocks(scores, plan, case.pooling)
    return functools.partial(error_of, lambda run: output_error(run(), stage, plan, ranked, allowed))


def output_error(output: Output, stage: Stage, plan: StagePlan, ranked: torch.Tensor, tolerance: float) -> str:
    """What is wrong with a result of ``prune_tokens``, or nothing.

    Parameters
    ----------
    output : tuple
        hidden_states, tensors and indices; more may follow.
    stage : Stage
    plan : StagePlan
    ranked : Tensor [B, blocks, tokens of a block]
        :func:`sdtp_bench.eager.ranked_blocks` of exact scores.
    tolerance : float
        A dropped token may rank above a kept one by so much.

    Returns
    -------
    str
    """
    hidden_states, tensors, indices, *_ = output
    batch, tokens, _ = stage.hidden_states.shape
    if indices.shape != (batch, plan.num_keep):
        return f"indices are {list(indices.shape)}, expected [{batch}, {plan.num_keep}]"
    if not ((indices >= 0) & (indices < tokens)).all() or not (indices.diff(dim=1) > 0).all():
        return "indices are not ascending, or outside the prompt"
    body = tokens - plan.recent
    is_kept = torch.zeros(batch, tokens, dtype=torch.bool, device=indices.device).scatter_(1, indices, True)
    in_block = is_kept[:, :body].view(ranked.shape)
    if not is_kept[:, body:].all() or in_block.sum(-1).unique().numel() > 1:
        return "not the last tokens, or not the same count in every block"
    lowest_kept = ranked.where(in_block, torch.inf).amin(-1)
    highest_dropped = ranked.where(~in_block, -torch.inf).amax(-1)
    if not (highest_dropped <= lowest_kept + tolerance).all():
        return "a token was dropped that ranks above one that was kept"
    expected = reference.gather_tokens([stage.hidden_states, *stage.tensors], indices)
    return copy_error([hidden_states, *tensors], expected)


def copy_error(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    """The first tensor that differs in shape, dtype or a bit, or nothing."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"tensor {i}: {list(a.shape)} {a.dtype}, expected {list(b.shape)} {b.dtype}"
        if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            return f"tensor {i}: not the rows that its indices name"
    return ""


def allowed_error(expected: torch.Tensor, relative: float) -> float:
    """Relative to the largest magnitude, or to 1 where that is larger."""
    return relative * max(1.0, expected.abs().max().item())


def error_of(check: Callable[..., str], *arguments: Any) -> str:
    """What a check finds; what it raises counts as found."""
    try:
        return check(*arguments)
    except Exception as error:  # the other checks go on
        return f"{type(error).__name__}: {error}"
