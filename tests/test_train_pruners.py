"""Losses by hand, the simulation against real pruning, and ``sdtp train`` from planted and from real targets."""

from __future__ import annotations

import argparse
import copy
import json
import math
from importlib import metadata

import pytest
import torch
from helpers.files import digest
from helpers.models import make_model, make_qwen2
from helpers.training import make_checkpoint, make_texts

from sdtp_kernels import KVPredictor, PruningSchedule, TokenPruner, apply_sdtp, cli, load_pruners
from sdtp_kernels.lexical import lexical_overlap
from sdtp_kernels.models.family import FAMILIES
from sdtp_kernels.pruner import trained_width
from sdtp_train import loop, losses, saliency, shards, simulate, train
from sdtp_train.objective import LOSSES, Objective
from sdtp_train.shards import Marked, SampleInfo

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = (2, 4)
N, C = 96, 24


@pytest.fixture(scope="module")
def model():
    return make_qwen2(num_layers=6).requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 256, (N + C,), generator=torch.Generator().manual_seed(5))


ALL_TERMS = {"distance": True, "attention": True, "lexical": True}


def make_pruners(layers=LAYERS, hidden_size=64, **settings):
    torch.manual_seed(1)
    pruners = {layer: TokenPruner(hidden_size, **settings) for layer in layers}
    for pruner in pruners.values():
        for name in ("distance_bias", "attention_weight", "lexical_weight"):
            if hasattr(pruner, name):
                torch.nn.init.normal_(getattr(pruner, name))
    return pruners


def make_predictor(model, rank=None):
    """Random maps as large as the keys and values of the random models here."""
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    sizes = {"num_hidden_layers": config.num_hidden_layers, "stages": LAYERS, "rank": rank}
    torch.manual_seed(2)
    return KVPredictor(config.hidden_size, config.num_key_value_heads, head_dim, **sizes)


# ----------------------------------------------------------------------------------------------------------- losses


def test_ranking_loss_is_equation_6():
    scores, target = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([5.0, 1.0, 1.0])
    by_hand = [math.log(1 + math.exp(-(0.3 + 1.0))), math.log(1 + math.exp(-(0.3 - 2.0))), math.log(2)]
    assert losses.ranking_loss(scores, target).item() == pytest.approx(sum(by_hand) / 3, rel=1e-6)


def test_drawn_pairs_estimate_all_pairs():
    generator = torch.Generator().manual_seed(0)
    scores, target = torch.randn(2, 50, generator=generator)
    drawn = losses.ranking_loss(scores, target, 200_000, generator)
    assert drawn.item() == pytest.approx(losses.ranking_loss(scores, target).item(), rel=0.01)


def test_standardise_takes_the_logarithm_where_it_should():
    target = torch.tensor([1.0, 10.0, 100.0, 0.0])
    z = losses.standardise(target, True)
    assert z.mean().abs() < 1e-6
    assert z.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert (z[1] - z[0]).item() == pytest.approx((z[2] - z[1]).item(), rel=1e-4)
    assert z.isfinite().all()
    assert losses.standardise(torch.zeros(5), True).isfinite().all()
    signed = losses.standardise(torch.tensor([-3.0, 0.0, 3.0]), False)
    torch.testing.assert_close(signed, torch.tensor([-1.2247, 0.0, 1.2247]), atol=1e-3, rtol=0)


def test_kl_and_lm_by_hand():
    dense, pruned = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = math.exp(2) / (math.exp(2) + 1)
    assert losses.kl_loss(pruned, dense).item() == pytest.approx(
        p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5), rel=1e-5
    )
    assert losses.kl_loss(dense, dense).item() == pytest.approx(0, abs=1e-7)
    assert losses.lm_loss(dense, torch.tensor([1])).item() == pytest.approx(-math.log(1 - p), rel=1e-5)


def test_spearman_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert losses.spearman(a, a.exp()).item() == pytest.approx(1)
    assert losses.spearman(a, -a).item() == pytest.approx(-1)
    assert losses.spearman(a, torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])).item() == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("hidden_size", "width"), [(32, 16), (576, 48), (896, 64), (1536, 128), (3584, 256), (4096, 384)]
)
def test_an_mlp_is_a_third_of_the_papers_in_whole_tiles(hidden_size, width):
    assert trained_width(hidden_size) == width


# ------------------------------------------------------------------------------------------------------- simulation


@pytest.mark.parametrize("budget", [{}, {"budget": "block", "block_size": 32}])
@pytest.mark.parametrize("settings", [{}, {**ALL_TERMS, "pooling": 5, "averaging": True}])
@pytest.mark.parametrize("keep_ratio", [0.8, (0.7, 0.5)])
@pytest.mark.parametrize("predicted", [False, True])
def test_simulation_equals_real_pruning(model, ids, settings, budget, keep_ratio, predicted):
    schedule = PruningSchedule(layers=LAYERS, keep_ratio=keep_ratio, **budget)
    pruners, predictor = make_pruners(**settings), make_predictor(model) if predicted else None
    with torch.no_grad():
        simulated = simulate.simulate_pruning(model, pruners, schedule, ids, N, None, predictor)
        dense = model(ids[None]).logits[0, N - 1 : -1]
        with apply_sdtp(model, pruners, schedule, kv_predictor=predictor) as handle:
            real = model(ids[None], logits_to_keep=C + 1).logits[0, :-1]
            assert handle.report().layers[LAYERS[0]].tokens_out < N + C
    torch.testing.assert_close(simulated, real, rtol=0, atol=1e-4)
    assert (dense - real).abs().max() > 0.1  # else anything would equal it


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_keys_and_values_are_simulated_for_every_family(ids, family):
    model, schedule = make_model(family, num_layers=6), PruningSchedule(layers=LAYERS, keep_ratio=0.6)
    pruners, predictor = make_pruners(), make_predictor(model, rank=8)
    with torch.no_grad():
        simulated = simulate.simulate_pruning(model, pruners, schedule, ids, N, kv_predictor=predictor)
        with apply_sdtp(model, pruners, schedule, kv_predictor=predictor):
            real = model(ids[None], logits_to_keep=C + 1).logits[0, :-1]
    torch.testing.assert_close(simulated, real, rtol=0, atol=1e-4)


def test_what_a_prediction_costs_is_the_gradient_of_the_decision(model, ids):
    """Moving a key and a value a little from predicted towards computed, or back, against the gradient at its mask."""
    schedule = PruningSchedule(layers=LAYERS[:1], keep_ratio=0.6)
    predictor = make_predictor(model)
    decided = []
    decide = simulate._decide

    def tap(*args):
        kept, decisions = decide(*args)
        decisions.retain_grad()
        decided.append((kept, decisions))
        return kept, decisions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "_decide", tap)
        loss = simulate.simulate_pruning(model, make_pruners(), schedule, ids, N, None, predictor).square().mean()
    loss.backward()
    ((kept, decisions),) = decided
    gradient = decisions.grad.double()
    assert (gradient != 0).sum() > N - 2  # kept tokens and dropped ones alike

    def moved(token, step):
        def mix(stays, own, other):
            weight = stays.detach().clone()
            weight[token] += step
            weight = weight.unsqueeze(-1)
            return weight * own + (1 - weight) * other

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(simulate, "_replace", mix)
            return simulate.simulate_pruning(model, make_pruners(), schedule, ids, N, None, predictor).square().mean()

    dropped = [i for i in range(5, N - 12) if i not in kept.tolist()]
    for token in (*kept[5:9].tolist(), *dropped[:4]):
        slope = (moved(token, 0.01) - moved(token, -0.01)) / 0.02
        assert gradient[token].item() == pytest.approx(slope.item(), rel=0.02, abs=2e-3 * gradient.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_masked_is_the_layer_itself(family):
    model = make_model(family)
    layer, hidden_states = model.model.layers[3], torch.randn(1, 30, 64)
    embeddings = model.model.rotary_emb(hidden_states, torch.arange(30)[None])
    ours = simulate.masked_layer(layer, hidden_states, embeddings, torch.ones(30))
    mask = torch.full((30, 30), -torch.inf).triu(1)[None, None]
    torch.testing.assert_close(ours, layer(hidden_states, attention_mask=mask, position_embeddings=embeddings))


def test_half_a_mask_halves_the_weights(model):
    """p m / sum(p m) is softmax(logits + log m), except that a token sees itself."""
    layer, hidden_states = model.model.layers[3], torch.randn(1, 20, 64)
    embeddings = model.model.rotary_emb(hidden_states, torch.arange(20)[None])
    soft = torch.linspace(0.1, 1, 20)
    bias = torch.full((20, 20), -torch.inf).triu(1) + soft.log().repeat(20, 1)
    bias.fill_diagonal_(0.0)
    expected = layer(hidden_states, attention_mask=bias[None, None], position_embeddings=embeddings)
    torch.testing.assert_close(simulate.masked_layer(layer, hidden_states, embeddings, soft), expected)


def test_decisions_are_hard_and_their_gradient_reaches_dropped_tokens():
    schedule = PruningSchedule(layers=LAYERS, keep_ratio=0.5)
    scores = torch.randn(N, requires_grad=True)
    kept, decisions = simulate._decide(scores, 1, schedule, N, 1, None)
    assert len(kept) == schedule.num_keep(N, 1)
    assert set(decisions.tolist()) == {0.0, 1.0}
    assert decisions.nonzero()[:, 0].tolist() == kept.tolist()
    (gradient,) = torch.autograd.grad(decisions.sum(), scores)
    free = slice(schedule.sink, N - schedule.num_recent(N))
    assert (gradient[free] > 0).all()
    assert gradient[: schedule.sink].abs().max() == 0
    assert gradient[N - schedule.num_recent(N) :].abs().max() == 0


def test_the_best_of_a_neighbourhood_gets_the_gradient_of_all_of_it():
    scores = torch.randn(N, requires_grad=True)
    pooled = simulate._pool(scores, 3, recent=12, block_size=None)
    (gradient,) = torch.autograd.grad(pooled[: N - 12].sum(), scores)
    assert gradient.sum() == N - 12
    assert gradient[scores.argmax() if scores.argmax() < N - 12 else 0] >= 1
    assert gradient[N - 12 :].abs().max() == 0  # the tail has no part in it


def test_gumbel_noise_keeps_the_budget_and_follows_the_generator():
    schedule = PruningSchedule(layers=LAYERS, keep_ratio=0.5)
    scores = torch.randn(N)

    def draw(seed):
        return simulate._decide(scores, 1, schedule, N, 1, torch.Generator().manual_seed(seed))[0].tolist()

    assert draw(1) == draw(1) != draw(2)
    assert {len(draw(seed)) for seed in range(5)} == {schedule.num_keep(N, 1)}
    best = set(simulate._decide(scores, 1, schedule, N, 1, None)[0].tolist())
    assert len(best & set(draw(3))) > 0.7 * len(best)  # noise, not chance


# ---------------------------------------------------------------------------------------------------- the objective


def make_sample(hidden_size=64, seed=0, num_context=N, targets=1):
    generator = torch.Generator().manual_seed(seed)
    return Marked(
        SampleInfo("x", "text", "a/b", False, num_context, C),
        torch.randint(1, 256, (num_context + C,), generator=generator),
        torch.randn(len(LAYERS), num_context, hidden_size, generator=generator),
        torch.rand(len(LAYERS), num_context, generator=generator),
        torch.rand(targets, len(LAYERS), num_context, generator=generator) + 0.01,
    )


def make_objective(model=None, targets=("future_attention",), dropout=0.0, gumbel=False, **weights):
    schedule = PruningSchedule(layers=LAYERS, keep_ratio=0.7)
    return Objective(weights, targets, LAYERS, dropout, [schedule], gumbel, model)


@pytest.mark.parametrize("gumbel", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_each_term_alone_reaches_every_pruner(model, name, gumbel):
    """Flaw 1 of the public reproduction: its supervision never entered the loss."""
    pruners = make_pruners(**ALL_TERMS)
    is_end_to_end = name in ("lm", "kl")
    objective = make_objective(model if is_end_to_end else None, gumbel=gumbel, **{name: 1.0})
    terms = objective.terms(make_sample(), pruners, torch.Generator().manual_seed(0))
    assert list(terms) == [name]
    terms[name].backward()
    for layer, pruner in pruners.items():
        for parameter_name, parameter in pruner.named_parameters():
            # A constant added to all scores changes neither their order nor the threshold's distance.
            if parameter_name == "b2" and name != "mse":
                continue
            if parameter_name in ("attention_weight", "lexical_weight") and not is_end_to_end:
                assert parameter.grad is None  # regression would underrate it
                continue
            assert parameter.grad is not None, (layer, parameter_name)
            assert parameter.grad.abs().max() > 0, (layer, parameter_name)
    assert all(p.grad is None for p in model.parameters())


def test_only_prunable_tokens_are_asked_about():
    objective, sample = make_objective(mse=1.0), make_sample()
    pruners = make_pruners(distance=True, attention=False)
    before = objective.terms(sample, pruners, None)["mse"]
    part = objective.prunable(sample)
    assert part == slice(4, N - 10)
    outside = torch.ones(N, dtype=torch.bool)
    outside[part] = False
    sample.hidden_states[:, outside] = 100.0
    sample.targets[..., outside] = 1e9
    assert torch.equal(objective.terms(sample, pruners, None)["mse"], before)
    sample.targets[..., 50] *= 10
    assert not torch.equal(objective.terms(sample, pruners, None)["mse"], before)


def test_training_scores_equal_those_of_the_stage(model, ids):
    """Distances, attention and words enter as they do under the patch."""
    from sdtp_train import targets

    pruners = make_pruners(**ALL_TERMS)
    dense = targets.dense_pass(model, ids[:N].tolist(), ids[N:].tolist())
    sample = make_sample()._replace(
        token_ids=ids,
        hidden_states=torch.stack([dense.layer_inputs[layer][0, :N] for layer in LAYERS]),
        attention=torch.stack([targets.last_window_attention(dense, layer) for layer in LAYERS]),
    )
    ours = make_objective(mse=1.0).scores(sample, 0, pruners[LAYERS[0]])
    stage = (
        model.model.layers[LAYERS[0] - 1],
        dense.layer_inputs[LAYERS[0]],
        dense.layer_inputs[LAYERS[0] - 1],
        dense.position_embeddings,
        torch.arange(N),
        lexical_overlap(ids[None, :N]),
    )
    bias = simulate._bias(pruners[LAYERS[0]], PruningSchedule(layers=LAYERS), *stage)
    expected = pruners[LAYERS[0]](dense.layer_inputs[LAYERS[0]][0, :N]) + bias
    torch.testing.assert_close(ours, expected[4 : N - 10])
    # Under the block budget a stage leaves them out, and so does its simulation.
    assert bias.count_nonzero() > 0
    in_blocks = PruningSchedule(layers=LAYERS, budget="block")
    assert simulate._bias(pruners[LAYERS[0]], in_blocks, *stage).count_nonzero() == 0


def test_several_targets_are_averaged():
    both = make_sample(targets=2)
    objective = make_objective(targets=("future_attention", "paper"), mse=1.0)
    first = make_objective(mse=1.0).goal(both._replace(targets=both.targets[:1]), 1)
    second = make_objective(targets=("paper",), mse=1.0).goal(both._replace(targets=both.targets[1:]), 1)
    torch.testing.assert_close(objective.goal(both, 1), (first + second) / 2)


def test_distance_term_goes_on_beyond_what_was_trained():
    pruner = make_pruners(distance=True)[2]
    knots = pruner.distance_bias.detach().clone()
    loop.extend_distance(pruner, nearest=7, farthest=500)  # knots 3 and 9
    assert torch.equal(pruner.distance_bias[3:10], knots[3:10])
    assert (pruner.distance_bias[:3] == knots[3]).all()
    assert (pruner.distance_bias[10:] == knots[9]).all()


# ------------------------------------------------------------------------------------------------------- sdtp train


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    make_checkpoint(path / "model")
    make_texts(path / "texts")
    parser = argparse.ArgumentParser()
    saliency.add_command(parser.add_subparsers())
    words = ["saliency", "--model", path / "model", "--data", path / "texts", "--out", path / "real"]
    words += ["--samples", "30", "--context", "96", "--continuation", "16", "--targets", "future_attention", "paper"]
    saliency.mark(parser.parse_args([*map(str, words)]))
    return path


@pytest.fixture(scope="module")
def planted(place):
    """The real directory with targets that a pruner can learn: a linear function of the hidden state, and distance."""
    from safetensors.torch import load_file

    source, out = shards.Saliency(place / "real"), place / "planted"
    settings = {**source.settings, "targets": ["future_attention"]}
    shards.begin(out, settings, source.samples)
    run, size = shards.run_id(settings, source.samples), settings["shard_size"]
    for i in range(0, len(source.samples), size):
        part = source.samples[i : i + size]
        tensors = load_file(shards.shard_path(place / "real", i // size))
        tensors = {name: tensor for name, tensor in tensors.items() if "paper" not in name}
        distance = torch.cat([torch.arange(s.num_context - 1, -1, -1) for s in part])
        for layer in source.layers:
            x = torch.nn.functional.normalize(tensors[f"hidden_states.{layer}"].float())
            direction = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(layer))
            value = x @ direction * 2 - 0.5 * torch.log2(1 + distance)
            tensors[f"target.future_attention.{layer}"] = value.exp()
        shards.write_shard(out, i // size, tensors, part, run)
    shards.finish(out, math.ceil(len(source.samples) / size))
    return out


@pytest.fixture
def sdtp(place, monkeypatch):
    point = metadata.EntryPoint("train", "sdtp_train.train:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"train": point})

    def run(saliency_dir, out, *options, model=place / "model"):
        words = ("train", "--model", model, "--saliency", saliency_dir, "--out", out, *options)
        return cli.main([*map(str, words)])

    return run


def rows(out):
    return [json.loads(line) for line in out.with_name(f"{out.name}.jsonl").read_text().splitlines()]


FAINT = ("--attention-weight", 0.01, "--lexical-weight", 0.01)  # the planted score has no such terms


@pytest.mark.parametrize("loss", [["mse"], ["rank=0.5"]])
def test_a_planted_score_is_learned(planted, sdtp, tmp_path, loss):
    out = tmp_path / "pruners.safetensors"
    assert (
        sdtp(planted, out, "--steps", 90, "--eval-every", 30, "--lr", 0.02, "--dropout", 0, "--loss", *loss, *FAINT)
        == 0
    )
    stack = load_pruners(out)
    assert sorted(stack) == [4, 7]
    assert stack.header.distance
    assert stack.header.attention
    assert stack.header.lexical
    facts = stack.header.training
    assert min(facts["validation"]["spearman"].values()) > 0.8
    assert facts["target"] == ["future_attention"]
    assert facts["saliency"]["prompts"] == {"training": 26, "validation": 4}
    assert set(facts["versions"]) == {"sdtp-kernels", "torch", "transformers"}
    history = rows(out)
    assert [row["step"] for row in history] == [0, 30, 60, 90]
    assert history[-1]["validation"]["loss"] < 0.7 * history[0]["validation"]["loss"]
    assert facts["validation"] in [row["validation"] for row in history]
    assert out.with_name(f"{out.name}.png").read_bytes().startswith(b"\x89PNG")
    card = out.with_name(f"{out.name}.README.md").read_text()
    assert card.startswith("---\nlibrary_name: sdtp-kernels\nbase_model: model\n")
    assert "| layers before which tokens are dropped | 4, 7 |" in card
    assert "| prompts | 26, and 4 held out |" in card
    assert f"| held-out rank correlation | {sum(facts['validation']['spearman'].values()) / 2:.3f} |" in card
    assert not list(tmp_path.glob("*.state")) + list(tmp_path.glob(".*"))


class Killed(BaseException):
    pass


def test_resumed_training_ends_with_the_same_files(place, sdtp, tmp_path, monkeypatch, capsys):
    options = ("--steps", 8, "--eval-every", 2, "--loss", "mse", "rank=0.1", "kl=0.1", "--gumbel", "--batch", 3)
    whole, out = tmp_path / "a" / "pruners", tmp_path / "b" / "pruners"
    whole.parent.mkdir()
    out.parent.mkdir()
    assert sdtp(place / "real", whole, *options) == 0
    save, advance = loop.Loop._save, loop.Loop._advance
    for step in (3, 5):  # between two evaluations, and once more after resuming

        def killed_at(self, step=step):
            if self.step == step:
                raise Killed
            advance(self)

        with monkeypatch.context() as patch:
            patch.setattr(loop.Loop, "_advance", killed_at)
            with pytest.raises(Killed):
                sdtp(place / "real", out, *options, "--resume")
    assert sdtp(place / "real", out, *options) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert sdtp(place / "real", out, *options, "--resume", "--lr", 0.1) == 2
    assert "other settings (lr differ)" in capsys.readouterr().err
    assert sdtp(place / "real", out, *options, "--resume") == 0
    assert save is loop.Loop._save
    for suffix in ("", ".jsonl"):
        assert digest(out.parent / f"pruners{suffix}") == digest(whole.parent / f"pruners{suffix}")


def test_training_stops_where_it_does_not_help(planted, sdtp, tmp_path):
    """A learning rate that destroys what was there: the best weights, not the last, are written."""
    good = tmp_path / "good"
    assert sdtp(planted, good, "--steps", 100, "--eval-every", 100, "--lr", 0.01) == 0
    out = tmp_path / "out"
    assert sdtp(planted, out, "--init", good, "--epochs", 50, "--lr", 3.0, "--patience", 2) == 0
    history = rows(out)
    assert len(history) == 3
    assert load_pruners(out).header.training["best_step"] == 0
    for layer, pruner in load_pruners(good).items():
        for name, tensor in pruner.state_dict().items():
            assert torch.equal(tensor, load_pruners(out)[layer].state_dict()[name])


def test_several_processes_take_the_steps_of_one(planted, place, tmp_path):
    """Each process sees a share of a batch and of the evaluation; the sums are those of one process."""
    import threading

    from sdtp_eval.parallel import Workers

    parser = argparse.ArgumentParser()
    train.add_command(parser.add_subparsers())
    barrier = threading.Barrier(2)
    shared = {}

    def add_up(index):
        def run(tensors):
            shared[index] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for mine, other in zip(tensors, shared[1 - index], strict=True):
                mine.add_(other)
            barrier.wait()

        return run

    def work(workers, out, pruners):
        words = ("train", "--saliency", planted, "--out", out, "--steps", 6, "--eval-every", 3, "--batch", 5)
        args = parser.parse_args([*map(str, words)])
        data = shards.Saliency(planted)
        schedule = PruningSchedule(layers=tuple(data.layers))
        objective = Objective({"mse": 1.0}, ["future_attention"], data.layers, 0.2, [schedule], False)
        return loop.Loop(args, workers, data, objective, pruners, {"seed": 0}).finish(), pruners

    cpu = torch.device("cpu")
    alone = make_pruners((4, 7), 32, distance=True, attention=True)
    copies = [copy.deepcopy(alone) for _ in range(2)]
    history, _ = work(Workers(0, 1, cpu, lambda: None, lambda tensors: None), tmp_path / "alone", alone)
    results = {}
    threads = [
        threading.Thread(
            target=lambda i=i: results.update(
                {i: work(Workers(i, 2, cpu, barrier.wait, add_up(i)), tmp_path / "together", copies[i])}
            )
        )
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert results[i][0][-1]["validation"]["loss"] == pytest.approx(history[-1]["validation"]["loss"], rel=1e-4)
        assert results[i][0][-1]["training"]["mse"] == pytest.approx(history[-1]["training"]["mse"], rel=1e-4)
        for layer, pruner in alone.items():
            torch.testing.assert_close(results[i][1][layer].state_dict(), pruner.state_dict(), rtol=1e-3, atol=1e-4)


def test_mistakes_get_answers_and_nothing_is_written(place, sdtp, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "other", rms_norm_eps=1e-5)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    real, plain = place / "real", tmp_path / "plain"
    assert sdtp(real, plain, "--steps", 1, "--attention-weight", 0) == 0
    out = tmp_path / "out" / "pruners"
    out.parent.mkdir()
    for words, message in (
        (("--target", "l2/all"), "holds future_attention, paper"),
        (("--loss", "mse=0"), "at least one weight above 0"),
        (("--loss", "mae"), "--loss mae: expected NAME or NAME=WEIGHT"),
        (("--loss", "mse=much"), "--loss mse=much"),
        (("--keep", "1.5", "--loss", "kl"), "keep_ratio=1.5"),
        (("--dropout", "1"), "--dropout 1.0"),
        (("--batch", "0"), "--batch 0: expected at least 1"),
        (("--lexical-weight", "-1"), "--lexical-weight -1.0: expected a number from 0"),
        (("--init", str(plain)), "do not fit these settings"),
        (("--init", str(tmp_path / "none")), "no such pruner file"),
    ):
        assert sdtp(real, out, *words) == 2
        assert message in capsys.readouterr().err
        assert not list(out.parent.iterdir())
    assert sdtp(real, out, model=other) == 2
    assert "was made with another model (model; differing: weights)" in capsys.readouterr().err
    assert sdtp(tmp_path, out) == 2
    assert "'sdtp saliency' makes it" in capsys.readouterr().err
    assert sdtp(real, plain) == 2
    assert f"{plain} exists" in capsys.readouterr().err
    assert sdtp(real, tmp_path / "no" / "where") == 2
    assert "there is no such directory" in capsys.readouterr().err
    assert not list(out.parent.iterdir())
