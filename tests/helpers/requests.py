"""Requests of both dtypes, drawn and compared: prompts of a batch, their models, what a cache holds after them."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from helpers.models import make_qwen2
from sdtp_kernels import PruningSchedule
from sdtp_kernels.models.cache import PrunedState

LAYERS = (1, 3, 4)
DTYPES = (torch.float32, torch.bfloat16)
of_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
PHASES = (Phase.explicit, Phase.generate)  # to shrink an example would take minutes, and it is small as it is
rows = st.lists(st.integers(1, 150), min_size=1, max_size=3)
schedules = st.builds(
    PruningSchedule,
    layers=st.just(LAYERS),
    keep_ratio=st.sampled_from([0.5, 0.7, 0.9]),
    budget=st.sampled_from(["global", "block"]),
    block_size=st.integers(6, 64),
    min_prompt=st.sampled_from([1, 20, 70]),
)


class InDouble(TorchFunctionMode):
    """Linear layers and attention in double precision, rounded once.

    A kernel rounds differently for other shapes, and one bit of bfloat16 is a hundred times the tolerance here. Rounded
    once from double, a token's result does not depend on what it is computed together with.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in (F.linear, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul):
            return function(*args, **kwargs)

        def wide(value):
            return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return function(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()}).to(args[0].dtype)


ARITHMETIC = {torch.float32: contextlib.nullcontext, torch.bfloat16: InDouble}
# Where a pruner itself is the reference: of bfloat16, the CPU's kernel rounds the products with w1 once more.
EXACT_SCORES = {torch.float32: "auto", torch.bfloat16: "reference"}


def make_models():
    """One model in each dtype."""
    model = make_qwen2(num_layers=5, hidden_size=32)
    for parameter in model.parameters():  # values of size 1, as the tolerance is absolute
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return {dtype: copy.deepcopy(model).to(dtype) for dtype in DTYPES}


def as_in(dtype, pruners):
    """Pruners with the weights that the op sees."""
    pruners = copy.deepcopy(pruners)
    for pruner in pruners.values():
        pruner.w1.data = pruner.w1.to(dtype).float()
    return pruners


def block_schedule(block_size=32, min_prompt=20, keep_ratio=0.7):
    return PruningSchedule(LAYERS, keep_ratio, budget="block", block_size=block_size, min_prompt=min_prompt)


def prompts(lengths, seed=2):
    """A left-padded batch of prompts that begin alike."""
    ids = torch.randint(1, 256, (1, max(lengths)), generator=torch.Generator().manual_seed(seed))
    rows = [torch.nn.functional.pad(ids[:, :n], (max(lengths) - n, 0)) for n in lengths]
    input_ids = torch.cat(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}


def generate(model, inputs, **settings):
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **settings}
    # transformers would take a generated token that happens to be the padding token for padding.
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    return model.generate(**inputs, **settings)


def entries(cache, attention_mask):
    """Keys and values of every layer and row, without padding and the room that a static layer has left."""
    found, cached = [], attention_mask[:, :-1].bool()  # the last token is not cached
    for layer in cache.layers:
        mask = cached
        if isinstance(layer, PrunedState):
            mask = torch.cat([layer.kept >= 0, cached[:, layer.prompt_length :]], dim=1)
        for row, own in enumerate(mask):
            states = layer.keys[row, :, : own.shape[0]], layer.values[row, :, : own.shape[0]]
            found.append(torch.stack([state[:, own] for state in states]))
    return found


def layer_entries(layer, attention_mask):
    """Of each row a dict: index of a token in it -> its keys and values."""
    index = attention_mask.cumsum(-1) * attention_mask - 1
    index = layer.kept if isinstance(layer, PrunedState) else index
    states = torch.stack([layer.keys, layer.values]).transpose(0, 1)
    return [
        {token: states[row, :, :, place] for place, token in enumerate(own) if token >= 0}
        for row, own in enumerate(index.tolist())
    ]


def assert_same(got, expected, mask, row=None):
    """Tokens equal, caches within 1e-5; of one row of `got`, where `expected` is that row alone."""
    rows = slice(None) if row is None else slice(row, row + 1)
    mask = F.pad(mask, (0, got.sequences.shape[1] - mask.shape[1]), value=1)
    own = mask[rows].bool()
    expected_mask = mask if row is None else torch.ones_like(expected.sequences)
    if row is None:
        assert torch.equal(got.sequences, expected.sequences)
    else:
        assert torch.equal(got.sequences[rows][own], expected.sequences[0])
    found = entries(got.cache, mask)
    found = found if row is None else found[row :: len(mask)]
    for a, b in zip(found, entries(expected.cache, expected_mask), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
