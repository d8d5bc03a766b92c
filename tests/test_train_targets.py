"""Targets against independent computations: finite differences, the model's own graph, its own attention weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.models import make_model, make_qwen2

from sdtp_kernels import PruningSchedule, apply_sdtp
from sdtp_kernels.models.family import FAMILIES
from sdtp_kernels.scorers import question_attention
from sdtp_train import targets

LAYERS = [2, 4]
N, C = 40, 12


@pytest.fixture(scope="module")
def model():
    return make_qwen2(num_layers=6).requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 256, (N + C,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def dense(model, ids):
    return targets.dense_pass(model, ids[:N].tolist(), ids[N:].tolist(), LAYERS[0])


def own_graph(model, ids, objective):
    """Gradient x input per stage, from hooks on transformers' forward."""
    seen = {}

    def keep(layer):
        def hook(module, args):
            seen[layer] = args[0].detach().requires_grad_() if layer == LAYERS[0] else args[0]
            return (seen[layer],)

        return hook

    hooks = [model.model.layers[layer].register_forward_pre_hook(keep(layer)) for layer in LAYERS]
    try:
        logits = model(ids[None]).logits[0, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    begin = 0 if objective == "all" else N - 1
    logits, labels = logits[begin:], ids[1 + begin :]
    value = logits.gather(1, labels[:, None]).mean() if objective == "logit" else F.cross_entropy(logits, labels)
    inputs = [seen[layer] for layer in LAYERS]
    return [(g * x.detach())[0, :N] for g, x in zip(torch.autograd.grad(value, inputs), inputs, strict=True)]


@pytest.mark.parametrize(
    ("name", "objective", "reduce"),
    [
        ("paper", "all", lambda x: x.sum(-1)),
        ("abs/all", "all", lambda x: x.abs().sum(-1)),
        ("l2/all", "all", lambda x: x.norm(dim=-1)),
        ("signed/continuation", "continuation", lambda x: x.sum(-1)),
        ("abs/continuation", "continuation", lambda x: x.abs().sum(-1)),
        ("l2/continuation", "continuation", lambda x: x.norm(dim=-1)),
        ("logit/continuation", "logit", lambda x: x.norm(dim=-1)),
    ],
)
def test_gradient_targets_equal_those_of_the_model_itself(model, ids, dense, name, objective, reduce):
    found = targets.compute_targets(dense, model.lm_head, LAYERS, [name])[name]
    expected = torch.stack([reduce(product) for product in own_graph(model, ids, objective)])
    assert found.shape == (2, N)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "begin"), [("paper", 0), ("signed/continuation", N - 1)])
def test_signed_target_is_what_scaling_a_token_does_to_the_loss(ids, name, begin):
    """Equation (3) by finite differences; the norms of Qwen2 compute in float32 whatever the weights are."""
    model = make_qwen2(num_layers=6).double().requires_grad_(False)
    dense = targets.dense_pass(model, ids[:N].tolist(), ids[N:].tolist(), LAYERS[0])
    found = targets.compute_targets(dense, model.lm_head, LAYERS, [name])[name]
    token, step = 17, 3e-3

    def loss(layer, factor):
        def scale(module, args):
            x = args[0].clone()
            x[0, token] *= factor
            return (x,)

        hook = model.model.layers[layer].register_forward_pre_hook(scale)
        try:
            logits = model(ids[None]).logits[0, begin:-1]
        finally:
            hook.remove()
        return F.cross_entropy(logits, ids[begin + 1 :])

    for stage, layer in enumerate(LAYERS):
        slope = (loss(layer, 1 + step) - loss(layer, 1 - step)) / (2 * step)
        assert found[stage, token].item() == pytest.approx(slope.item(), rel=0.01, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_future_attention_equals_the_models_attention_weights(ids, family):
    eager = make_model(family, attention="eager").requires_grad_(False)
    dense = targets.dense_pass(eager, ids[:N].tolist(), ids[N:].tolist())
    weights = eager(ids[None], output_attentions=True).attentions
    per_layer = torch.stack([w[0, :, N - 1 : -1, :N].mean(1).amax(0) for w in weights])
    expected = torch.stack([per_layer[layer:].mean(0) for layer in LAYERS])
    torch.testing.assert_close(targets.future_attention(dense, LAYERS), expected, rtol=1e-4, atol=1e-7)


def test_last_window_attention_is_what_the_stage_sees(model, ids, dense):
    seen = {}

    def spy(stage):
        seen[len(seen)] = question_attention(stage)[0]
        return seen[0][None]

    with apply_sdtp(model, spy, PruningSchedule(layers=(LAYERS[0],), min_prompt=1)):
        model(ids[None, :N], logits_to_keep=1)
    torch.testing.assert_close(targets.last_window_attention(dense, LAYERS[0]), seen[0])


def test_weights_are_frozen_and_the_graph_begins_at_the_first_stage(model, dense):
    targets.compute_targets(dense, model.lm_head, LAYERS, ["paper", "future_attention"])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert [x.requires_grad for x in dense.layer_inputs] == [False, False, True, True, True, True]
    assert not targets.need_graph(["future_attention"])


def test_the_context_is_all_that_counts_for_a_forward_target(model, ids):
    """Causality: what a token is worth to the continuation does not change with tokens after the continuation."""
    short = targets.dense_pass(model, ids[:N].tolist(), ids[N:].tolist())
    torch.testing.assert_close(
        targets.future_attention(short, LAYERS), targets.future_attention(short, [2, 3, 4])[[0, 2]]
    )


def test_bfloat16_is_finite_and_not_far_off(ids, model, dense):
    half = make_qwen2(num_layers=6).to(torch.bfloat16).requires_grad_(False)
    rough = targets.dense_pass(half, ids[:N].tolist(), ids[N:].tolist(), LAYERS[0])
    names = list(targets.TARGETS)
    found = targets.compute_targets(rough, half.lm_head, LAYERS, names)
    exact = targets.compute_targets(dense, model.lm_head, LAYERS, names)
    for name in names:
        assert found[name].dtype == torch.float32
        if targets.TARGETS[name].is_log:
            correlation = torch.corrcoef(torch.stack([found[name][0].log(), exact[name][0].log()]))[0, 1]
            assert correlation > 0.9, name


def test_what_is_not_finite_is_refused(ids):
    broken = make_qwen2(num_layers=6).requires_grad_(False)
    broken.model.layers[3].mlp.down_proj.weight[0, 0] = torch.nan
    dense = targets.dense_pass(broken, ids[:N].tolist(), ids[N:].tolist(), LAYERS[0])
    with pytest.raises(ValueError, match=r"target 'paper' of layer 2 is NaN or infinite"):
        targets.compute_targets(dense, broken.lm_head, LAYERS, ["paper"])
    with pytest.raises(ValueError, match="no target 'saliency'; known: future_attention, paper"):
        targets.check_names(["saliency"])
