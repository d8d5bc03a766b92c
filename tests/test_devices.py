"""Several devices on existing engines: accelerate's hooks, tensor parallelism over two processes."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import make_qwen2
from helpers.prompts import LAYERS, SCHEDULES, TOKENS, generate, padded_batch, prompt
from helpers.requests import DTYPES, PHASES, assert_same, make_models, of_both_dtypes, prompts, rows, schedules
from helpers.requests import generate as generate_with_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from sdtp_kernels import KVPredictor, TokenPruner, apply_sdtp, ops
from sdtp_kernels.models.cache import PrunedState
from sdtp_kernels.models.devices import device_of
from sdtp_kernels.scorers import block_local, random_score

accelerate = pytest.importorskip("accelerate")
SCHEDULE = SCHEDULES["global"]


def make_pruners(hidden_size=64):
    """Trained forms: of the paper, and with everything that a pruner may add."""
    torch.manual_seed(1)
    plain = {layer: TokenPruner(hidden_size, pooling=3) for layer in LAYERS}
    terms = dict.fromkeys(("distance", "attention", "lexical", "averaging"), True)
    full = {layer: TokenPruner(hidden_size, **terms) for layer in LAYERS}
    for pruner in full.values():
        torch.nn.init.normal_(pruner.distance_bias)
        pruner.attention_weight.data.fill_(1.0)
        pruner.lexical_weight.data.fill_(3.0)
    return {"plain": plain, "full": full}


def nudged(rank):
    """A scorer that disagrees with itself on other processes."""
    return block_local(lambda stage: random_score(stage, seed=rank))


# ----------------------------------------------------------------------------------------------------------- accelerate


DEVICE_MAPS = {
    "layers on the CPU and on disk": {
        "model.embed_tokens": "cpu",
        **{f"model.layers.{i}": "disk" if i in (0, 2, 3) else "cpu" for i in range(6)},
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
    "the whole decoder on disk": {"model": "disk", "lm_head": "cpu"},
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS)
@pytest.mark.parametrize("name", ["plain", "full"])
@torch.no_grad()
def test_offloaded_weights(tmp_path, device_map, name):
    """Weights that are there only while their layer runs: on the meta device when the patch is applied."""
    pruners, model = make_pruners()[name], make_qwen2()
    batches = [{"input_ids": prompt()}, padded_batch()]
    with apply_sdtp(model, pruners, SCHEDULE):
        expected = [generate(model, inputs) for inputs in batches]
    dense = generate(model, batches[0])
    model = accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(p.device.type == "meta" for p in model.model.parameters())
    with apply_sdtp(model, pruners, SCHEDULE):
        assert all(torch.equal(generate(model, i), e) for i, e in zip(batches, expected, strict=True))
        with pytest.raises(RuntimeError, match="patched already"):
            apply_sdtp(model, pruners, SCHEDULE)
    assert torch.equal(generate(model, batches[0]), dense), "the patch is gone, the hooks are not"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """In each dtype a model, and the same with layers on disk."""
    found = {}
    for dtype in DTYPES:
        folder = tmp_path_factory.mktemp("weights")
        plain, offloaded = (make_qwen2().to(dtype) for _ in range(2))
        device_map = DEVICE_MAPS["layers on the CPU and on disk"]
        offloaded = accelerate.dispatch_model(
            offloaded, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
        )
        found[dtype] = plain, offloaded
    return found


@of_both_dtypes
@settings(max_examples=6, phases=PHASES)
@given(lengths=rows, schedule=schedules, name=st.sampled_from(["plain", "full"]), chunk=st.none() | st.integers(1, 60))
@torch.no_grad()
def test_offloaded_weights_of_any_batch(twins, dtype, lengths, schedule, name, chunk):
    """Tokens, logits and caches bit for bit, also in bfloat16: the same is computed, from weights that moved."""
    if schedule.budget == "global" or len(lengths) > 1:
        chunk = None
    asked = {"prefill_chunk_size": chunk, "output_logits": True}
    results = []
    for model in twins[dtype]:
        with apply_sdtp(model, make_pruners()[name], schedule):
            results.append(generate_with_cache(model, prompts(lengths), **asked))
    expected, got = results
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))
    for a, b in zip(got.cache.layers, expected.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


@torch.no_grad()
def test_hooks_that_come_and_go_while_patched():
    model, pruners = make_qwen2(), make_pruners()["plain"]
    dense = generate(model, {"input_ids": prompt()})
    handle = apply_sdtp(model, pruners, SCHEDULE)
    expected = generate(model, {"input_ids": prompt()})
    accelerate.hooks.add_hook_to_module(model.model, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(generate(model, {"input_ids": prompt()}), expected)
    handle.remove()
    assert torch.equal(generate(model, {"input_ids": prompt()}), dense)
    handle = apply_sdtp(model, pruners, SCHEDULE)
    accelerate.hooks.remove_hook_from_module(model.model)
    assert torch.equal(generate(model, {"input_ids": prompt()}), expected)
    handle.remove()
    assert torch.equal(generate(model, {"input_ids": prompt()}), dense)
    assert "forward" not in model.model.__dict__ or model.model.forward.__func__ is type(model.model).forward


@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
@torch.no_grad()
def test_state_and_pruners_follow_the_layers(padded, monkeypatch):
    """With a second device, here that of tensors without data: no op of torch mixes it with another, ours are watched.

    A stage runs where the layer below it does, and what it keeps lies there.
    """
    model, pruners = make_qwen2(), make_pruners()["full"]
    first_there = 3
    for i, layer in enumerate(model.model.layers):
        device = "cpu" if i < first_there else "meta"
        accelerate.hooks.attach_execution_device_hook(layer.to(device), device)
    for module in (model.model.norm, model.lm_head):
        accelerate.hooks.attach_execution_device_hook(module.to("meta"), "meta")
    assert [device_of(layer).type for layer in model.model.layers] == ["cpu"] * 3 + ["meta"] * 3
    prune_tokens, met = ops.prune_tokens, []

    def watched(*args, **terms):
        tensors = [value for value in pytree.tree_leaves((args, terms)) if isinstance(value, torch.Tensor)]
        met.append({tensor.device.type for tensor in tensors})
        return prune_tokens(*args, **terms)

    monkeypatch.setattr(ops, "prune_tokens", watched)
    inputs = padded_batch() if padded else {"input_ids": prompt()}
    with apply_sdtp(model, pruners, SCHEDULE):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).cache
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1) if padded else None
        model(inputs["input_ids"][:, :2], attention_mask=mask, cache=cache)
    assert met == [{"cpu"}, {"cpu"}, {"meta"}]
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu"] * 3 + ["meta"] * 3
    kept_there = [layer.kept.device.type for layer in cache.layers[LAYERS[0] :]]
    # Layers 1 to 3 hold what stages 1 and 2 kept, after layers 0 and 2; layers 4 and 5 what stage 3 kept.
    assert kept_there == ["cpu"] * 3 + ["meta"] * 2
    assert [layer.keys.shape[2] for layer in cache.layers] == [
        (SCHEDULE.max_keep if padded else SCHEDULE.num_keep)(TOKENS, sum(start <= i for start in LAYERS)) + 2
        for i in range(6)
    ]


# ------------------------------------------------------------------------------------------------------ tensor parallel


class SumOfHalves(torch.nn.Linear):
    """What two processes compute that hold half of the columns each: a sum of two results that were rounded."""

    def forward(self, x):
        left, right = (
            torch.nn.functional.linear(*half) for half in zip(x.chunk(2, -1), self.weight.chunk(2, 1), strict=True)
        )
        return left + right


def one_process(model):
    """The model by itself, in bfloat16 with the roundings of two processes; in float32 they are within tolerance."""
    if model.dtype != torch.float32:
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                assert projection.bias is None
                projection.__class__ = SumOfHalves
    return model


def drawn(strategy, number):
    """Values of a strategy, for what has to be asked all at once."""
    values = []

    @settings(max_examples=number, phases=PHASES)
    @given(value=strategy)
    def draw(value):
        values.append(value)

    draw()
    return values


def make_predictor(model, layers):
    """Random maps, the same in every process; any heads, whatever shares of them there are."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return KVPredictor(
            config.hidden_size,
            config.num_key_value_heads,
            head_dim,
            num_hidden_layers=config.num_hidden_layers,
            stages=layers,
        )


def make_request(dtype, lengths, schedule, scorer, chunk, predicted):
    takes_pieces = schedule.budget == "block" and scorer != "attention"
    return dtype, {
        "lengths": lengths,
        "schedule": schedule,
        "scorer": scorer,
        "chunk": chunk if takes_pieces else None,
        "predicted": predicted,
    }


requests = st.builds(
    make_request,
    st.sampled_from(DTYPES),
    rows,
    schedules,
    st.sampled_from(["plain", "full", "attention", "nudged"]),
    st.none() | st.integers(1, 60),
    st.booleans(),
)


@torch.no_grad()
def test_tensor_parallel(tmp_path):
    """Two processes generate what one does, whatever each of them would have selected by itself.

    Both have the tokens of one, keep what it keeps, and cache it within 1e-5, each its half of the heads. In bfloat16
    a process rounds its share of a sum before both are added, and one bit of that may decide between two tokens: there
    the reference is one process that adds in the same way, and all else is rounded once from double, as shapes differ.
    """
    from helpers.tensor_parallel import answer, load

    asked = drawn(requests, 40)
    for dtype, model in make_models().items():
        model.save_pretrained(tmp_path / str(dtype))
    models = load(tmp_path)
    for layer in models[torch.bfloat16].model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.__class__ = SumOfHalves
    (tmp_path / "requests").write_bytes(pickle.dumps(asked))
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
    result = subprocess.run(
        [*launcher, "helpers.tensor_parallel", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    answers = [pickle.loads((tmp_path / f"answers-{rank}").read_bytes()) for rank in (0, 1)]
    for (dtype, request), *found in zip(asked, *answers, strict=True):
        print(dtype, request)  # seen where it fails
        expected, kv_bytes = answer(models[dtype], **request)
        outputs = [output for output, _ in found]
        for output, own_bytes in found:
            assert own_bytes == kv_bytes / 2, "half of the heads in each"
            assert torch.equal(output.sequences, expected.sequences)
            for own, layer in zip(output.cache.layers, expected.cache.layers, strict=True):
                assert isinstance(own, PrunedState) == isinstance(layer, PrunedState)
                assert not isinstance(layer, PrunedState) or torch.equal(own.kept, layer.kept)
        both, other = outputs
        for a, b in zip(both.cache.layers, other.cache.layers, strict=True):
            a.keys, a.values = torch.cat([a.keys, b.keys], dim=1), torch.cat([a.values, b.values], dim=1)
        assert_same(both, expected, prompts(request["lengths"])["attention_mask"])
