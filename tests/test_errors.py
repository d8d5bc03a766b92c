"""Bad input: an error that names the fix, raised before anything is changed."""

from pathlib import Path

import pytest
import torch
from helpers.models import make_qwen2
from transformers import DynamicCache, Qwen2Config, Qwen2ForSequenceClassification, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from sdtp_kernels import BackendUnavailableError, PruningSchedule, TokenPruner, apply_sdtp, load_pruners, save_pruners
from sdtp_kernels.models import compat

SCHEDULE = PruningSchedule(layers=(1, 3), keep_ratio=0.8)


@pytest.fixture
def model():
    model = make_qwen2()
    before = [dict(module.__dict__) for module in model.modules()]
    yield model
    assert [module.__dict__ for module in model.modules()] == before, "the model was left patched"


def pruners(hidden_size=64):
    return {1: TokenPruner(hidden_size), 3: TokenPruner(hidden_size)}


def ids(batch=1, tokens=100):
    return torch.randint(1, 256, (batch, tokens))


def with_nan():
    stack = pruners()
    stack[3].w2.data[5] = torch.nan
    return stack


@pytest.mark.parametrize(
    ("make", "schedule", "backend", "error", "message"),
    [
        (pruners, PruningSchedule(layers=(1, 6)), "auto", ValueError, r"prunes at layer 6, .* 0 to 5"),
        (pruners, PruningSchedule(layers=(1, 4)), "auto", ValueError, r"no pruner for layers \[4\]"),
        (lambda: pruners(32), SCHEDULE, "auto", ValueError, "hidden_size=32, the model 64"),
        (with_nan, SCHEDULE, "auto", ValueError, "layer 3: w2 has NaN"),
        (pruners, SCHEDULE, "gpu", ValueError, "'gpu' does not exist; known: auto, cpu, triton, cuda, reference"),
        (lambda: "saliency", SCHEDULE, "auto", ValueError, "known: random, recent, norm, attention"),
        (lambda: {1: TokenPruner(64), 3: 4}, SCHEDULE, "auto", ValueError, "layer 3: expected a module"),
        (lambda: TokenPruner(64), SCHEDULE, "auto", ValueError, r"expected \{layer: module\}"),
    ],
)
def test_apply_refuses(model, make, schedule, backend, error, message):
    with pytest.raises(error, match=message):
        apply_sdtp(model, make(), schedule, backend)


def test_backend_that_cannot_run_lists_every_reason(model):
    model.double()
    with pytest.raises(BackendUnavailableError, match=r"(?s)cpu: computes in .*reference: can run"):
        apply_sdtp(model, pruners(), SCHEDULE, backend="cpu")


def test_twice(model):
    with apply_sdtp(model, pruners(), SCHEDULE):
        with pytest.raises(RuntimeError, match=r"call remove\(\) on its handle, or remove_sdtp\(model\)"):
            apply_sdtp(model, pruners(), SCHEDULE)
        model(ids())


def test_models_that_are_not_supported():
    classifier = Qwen2ForSequenceClassification(make_qwen2().config)
    with pytest.raises(NotImplementedError, match="use Qwen2ForCausalLM"):
        apply_sdtp(classifier, pruners(), SCHEDULE)
    with pytest.raises(NotImplementedError, match="supported: llama, mistral, qwen2, qwen3"):
        apply_sdtp(torch.nn.Linear(2, 2), pruners(), SCHEDULE)
    sliding = make_qwen2(use_sliding_window=True, sliding_window=16, max_window_layers=2)
    with pytest.raises(NotImplementedError, match="use_sliding_window=False"):
        apply_sdtp(sliding, pruners(), SCHEDULE)
    paged = make_qwen2()
    paged.config._attn_implementation = "paged|sdpa"
    with pytest.raises(NotImplementedError, match="supported are sdpa, eager, flex_attention, flash_attention_2"):
        apply_sdtp(paged, pruners(), SCHEDULE)


def test_pipeline_stage(model):
    model._pp_stage = object()
    with pytest.raises(NotImplementedError, match="pipeline parallelism"):
        apply_sdtp(model, pruners(), SCHEDULE)
    del model._pp_stage


def test_the_package_asks_for_the_transformers_that_it_supports():
    assert f'"transformers>={compat.OLDEST}"' in (Path(__file__).parent.parent / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"labels": ids()}, NotImplementedError, "labels: .* logits_to_keep=k"),
        ({"output_hidden_states": True}, NotImplementedError, "output_hidden_states: .* remove"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"logits_to_keep": torch.tensor([3])}, NotImplementedError, "count of last tokens"),
        ({"attention_mask": torch.ones(1, 1, 100, 100).bool().tril()}, NotImplementedError, "padding mask"),
        ({"position_ids": torch.arange(100)[None], "use_cache": False}, NotImplementedError, "packed sequences"),
        ({"cu_seq_lens_q": torch.tensor([0, 60, 100])}, NotImplementedError, "packed sequences .* left-padded batch"),
    ],
)
@torch.no_grad()
def test_calls_that_cannot_be_right(model, inputs, error, message):
    with apply_sdtp(model, pruners(), SCHEDULE), pytest.raises(error, match=message):
        model(ids(), **inputs)


@torch.no_grad()
def test_labels_by_position(model):
    with apply_sdtp(model, pruners(), SCHEDULE), pytest.raises(NotImplementedError, match="labels"):
        model(ids(), None, None, None, None, ids())


@pytest.mark.parametrize("zeros", [slice(90, 100), slice(40, 50)], ids=["right", "hole"])
@torch.no_grad()
def test_padding_on_the_wrong_side(model, zeros):
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, zeros] = 0
    with apply_sdtp(model, pruners(), SCHEDULE), pytest.raises(RuntimeError, match="padding_side='left'"):
        model(ids(2), attention_mask=mask)


@torch.no_grad()
def test_caches_that_cannot_hold_a_length_per_layer():
    model = make_qwen2()  # its own: generate() leaves notes on the model before it gets to us
    with apply_sdtp(model, pruners(), SCHEDULE):
        sliding = Cache(layers=[DynamicSlidingWindowLayer(16) for _ in range(6)])
        with pytest.raises(NotImplementedError, match=r"DynamicSlidingWindowLayer.*pass a DynamicCache, StaticCache"):
            model(ids(), cache=sliding)
        with pytest.raises(NotImplementedError, match="prefill_chunk_size=None"):
            model.generate(ids(), prefill_chunk_size=32, max_new_tokens=4)
    blocks = PruningSchedule(layers=(1, 3), keep_ratio=0.8, budget="block", block_size=32)
    in_chunks = pytest.raises(NotImplementedError, match="a pruned prompt in chunks needs a DynamicCache")
    with apply_sdtp(model, pruners(), blocks), in_chunks:
        model.generate(ids(), prefill_chunk_size=32, cache_implementation="static", max_new_tokens=4)
    evicting = pytest.raises(NotImplementedError, match="evict_earlier_kv=True needs a DynamicCache")
    with apply_sdtp(model, pruners(), SCHEDULE, evict_earlier_kv=True), evicting:
        model(ids(), cache=StaticCache(config=model.config, max_cache_len=200))


@torch.no_grad()
def test_padded_cache_without_its_mask(model):
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, :20] = 0
    cache = DynamicCache(config=model.config)
    with apply_sdtp(model, pruners(), SCHEDULE):
        model(ids(2), attention_mask=mask, cache=cache, logits_to_keep=1)
        with pytest.raises(ValueError, match="pass the attention_mask"):
            model(ids(2, 3), cache=cache)


def test_file_of_another_model(model, tmp_path):
    path = tmp_path / "pruners.safetensors"
    other = Qwen2Config(hidden_size=64, num_hidden_layers=9)
    save_pruners(pruners(), path, config=other)
    with pytest.raises(ValueError, match=r"another model \(num_hidden_layers: file 9, model 6\)"):
        apply_sdtp(model, load_pruners(path), SCHEDULE)
