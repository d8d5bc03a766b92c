"""The pruner and its file format."""

import json
import math
import sys

import pytest
import torch
from helpers.files import digest
from safetensors.torch import load_file, save_file

from sdtp_kernels import (
    KVPredictor,
    PruningSchedule,
    TokenPruner,
    load_pruners,
    pruner_file,
    save_pruners,
    score_tokens,
)
from sdtp_kernels.pruner_file import FORMAT_VERSION


class Config:
    model_type, num_hidden_layers, hidden_size = "qwen2", 12, 24


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pruners.safetensors"
    save_pruners(
        {4: TokenPruner(24), 7: TokenPruner(24, 5)}, path, config=Config, training={"target": "none", "rows": [1, 2]}
    )
    return path


def make_predictor(rank=None, dtype=torch.bfloat16, hidden_size=24):
    return KVPredictor(hidden_size, 2, 6, num_hidden_layers=12, stages=(4, 7), rank=rank).to(dtype)


@pytest.fixture
def path_with_kv(path):
    save_pruners(load_pruners(path), path, kv_predictor=make_predictor(rank=5))
    return path


def read_header(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["sdtp"])


def rewrite(path, header=None, **changes):
    """Write the file again with some tensors replaced (or, where None, left out) and some header fields changed."""
    metadata = read_header(path)
    tensors = {**load_file(path), **changes}
    save_file(
        {k: v for k, v in tensors.items() if v is not None}, path, {"sdtp": json.dumps({**metadata, **(header or {})})}
    )


@pytest.mark.parametrize("rms_norm", [True, False])
def test_module_and_op_agree(rms_norm):
    pruner = TokenPruner(24, rms_norm=rms_norm)
    hidden_states = torch.randn(2, 9, 24) * 3
    scores = score_tokens(hidden_states, *pruner.weights(), rms_eps=pruner.rms_eps if rms_norm else None)
    torch.testing.assert_close(pruner(hidden_states), scores, atol=1e-5, rtol=1e-5)
    assert pruner(hidden_states[0, 0]).shape == ()
    assert all(not tensor.requires_grad for tensor in pruner.weights(torch.bfloat16))


@pytest.fixture
def hub(path, tmp_path, monkeypatch):
    """The hub client's own cache, as a download leaves it; the client is offline in all tests."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # whenever it was imported
    for commit, branch in (("a" * 40, "main"), ("b" * 40, "other")):
        repository = tmp_path / "hub/models--someone--pruners.of-it"
        for part in ("refs", f"snapshots/{commit}"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        save_pruners(
            load_pruners(path), repository / f"snapshots/{commit}/pruners.safetensors", training={"of": branch}
        )


def test_a_repository_of_the_hub(hub):
    assert load_pruners("someone/pruners.of-it").header.training == {"of": "main"}
    assert load_pruners("someone/pruners.of-it", revision="other").header.training == {"of": "other"}
    assert load_pruners("someone/pruners.of-it", revision="b" * 40).header.training == {"of": "other"}


def test_what_the_hub_has_not(hub, tmp_path, monkeypatch):
    for name, revision in (("someone/else", None), ("someone/pruners.of-it", "third")):
        with pytest.raises(FileNotFoundError, match=f"{name}: there is no such file, and no pruners.safetensors of a"):
            load_pruners(name, revision=revision)
    # A file that is missing is no repository: nobody asks the hub.
    monkeypatch.setattr(pruner_file, "_from_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/folder").mkdir(parents=True)
    for name in ("missing.safetensors", "folder/missing.safetensors", "a/b/c", tmp_path / "x", "some/folder"):
        with pytest.raises(FileNotFoundError, match="no such pruner file"):
            load_pruners(name)


def test_a_file_has_no_revisions(path):
    with pytest.raises(ValueError, match="revision='main' is of a repository on the hub, and this is a file"):
        load_pruners(path, revision="main")


def test_the_hub_needs_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"needs huggingface_hub: pip install 'sdtp-kernels\[models\]'"):
        load_pruners("someone/else")


def test_round_trip(path):
    stack = load_pruners(path)
    assert (sorted(stack), stack.header.model_type, stack.header.num_hidden_layers) == ([4, 7], "qwen2", 12)
    assert stack.header.training == {"target": "none", "rows": [1, 2]}
    assert stack[7].intermediate_size == 5
    again = path.with_name("again.safetensors")
    save_pruners(stack, again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [None, 5])
def test_a_kv_predictor_comes_back_as_it_was(path, rank, dtype):
    predictor = make_predictor(rank, dtype)
    save_pruners(load_pruners(path), path, kv_predictor=predictor)
    assert read_header(path)["format_version"] == 2
    stack = load_pruners(path)
    assert sorted(stack) == [4, 7]
    assert (stack.kv_predictor.stages, stack.kv_predictor.rank, stack.kv_predictor.rms_eps) == ((4, 7), rank, 1e-6)
    assert stack.kv_predictor.state_dict().keys() == predictor.state_dict().keys()
    for name, tensor in predictor.state_dict().items():
        found = stack.kv_predictor.state_dict()[name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)
    tokens = stack.kv_predictor.encode(4, torch.randn(1, 3, 24))
    assert stack.kv_predictor(4, 11, tokens)[0].shape == (1, 2, 3, 6)


def test_a_loaded_stack_keeps_its_kv_predictor(path_with_kv):
    again = path_with_kv.with_name("again.safetensors")
    save_pruners(load_pruners(path_with_kv), again, schedule=PruningSchedule((4, 7), 0.8))
    assert torch.equal(
        load_pruners(again).kv_predictor.up["4:9"].weight, load_pruners(path_with_kv).kv_predictor.up["4:9"].weight
    )
    save_pruners(dict(load_pruners(path_with_kv)), again)
    assert load_pruners(again).kv_predictor is None


def test_a_lexical_term_comes_back_as_it_was(path):
    """In a version that older readers refuse: without the term the same scores would be others."""
    pruner = TokenPruner(24, lexical=True)
    pruner.lexical_weight.data.fill_(1.5)
    save_pruners({4: pruner}, path)
    header = read_header(path)
    assert (header["format_version"], header["lexical"]) == (3, True)
    stack = load_pruners(path)
    assert (stack[4].lexical, stack[4].lexical_weight.item()) == (True, 1.5)


def test_a_file_without_a_kv_predictor_is_of_version_1(path, tmp_path):
    """Older readers take it: the files that ship were written before there was a version 2."""
    assert load_pruners(path).kv_predictor is None
    assert read_header(path).keys() == {
        "format", "format_version", "hidden_size", "layers", "rms_norm", "rms_eps", "model_type", "num_hidden_layers",
        "training", "distance", "attention", "pooling", "averaging",
    }  # fmt: skip
    assert read_header(path)["format_version"] == 1
    checkpoints = pytest.importorskip("sdtp_eval.checkpoints", reason="python/ is not installed")
    for shipped in checkpoints.bundled_pruners().values():
        save_pruners(load_pruners(shipped), tmp_path / "again")
        assert digest(tmp_path / "again") == digest(shipped)


def test_score_bias():
    pruner = TokenPruner(24, distance=True, attention=True)
    pruner.distance_bias.data.copy_(torch.arange(18.0) ** 2)
    distance = torch.tensor([[9, 7, 5, 1, 0, -1]])  # the last token stands after the prompt, the first is padding
    attention = torch.tensor([[0.3, 0.1, 0.2, 0.0, 0.4, 0.9]])
    is_valid = torch.tensor([[False, True, True, True, True, False]])
    # Between the knots at 3 and 7 the function is linear in log2(1 + distance): 4 at 3, 9 at 7.
    expected = torch.tensor([9.0, 4 + 5 * (math.log2(6) - 2), 1.0, 0.0])
    torch.testing.assert_close(pruner.score_bias(distance, attention, is_valid)[0, 1:5], expected)
    pruner.attention_weight.data.fill_(2.0)
    logs = (attention[0, 1:5] + 1e-9).log()
    standardised = (logs - logs.mean()) / logs.std(correction=0)
    torch.testing.assert_close(pruner.score_bias(distance, attention, is_valid)[0, 1:5], expected + 2 * standardised)
    with pytest.raises(ValueError, match="pass `attention`"):
        pruner.score_bias(distance)
    lexical = TokenPruner(24, lexical=True)
    lexical.lexical_weight.data.fill_(3.0)
    overlap = torch.rand(1, 6)
    assert torch.equal(lexical.score_bias(distance, overlap=overlap), 3 * overlap)
    assert not lexical.score_bias(distance).any()


def test_two_logits_fold(path):
    keep, drop = torch.randn(2, 5), torch.randn(2)
    rewrite(path, **{"layers.7.w2": keep, "layers.7.b2": drop})
    pruner = load_pruners(path)[7]
    hidden_states = torch.randn(3, 24)
    x = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + pruner.rms_eps)
    logits = torch.nn.functional.gelu(x @ pruner.w1.T + pruner.b1) @ keep.T + drop
    torch.testing.assert_close(pruner(hidden_states), logits[:, 0] - logits[:, 1])


@pytest.mark.parametrize(
    ("header", "changes", "message"),
    [
        ({"format": "other"}, {}, "format 'other'"),
        (
            {"format_version": FORMAT_VERSION + 1},
            {},
            f"version {FORMAT_VERSION + 1}; .* up to version {FORMAT_VERSION}",
        ),
        ({"unknown": 1}, {}, "malformed header"),
        ({"layers": [4, 7, 10]}, {}, "lists layer 10, but layers.10.b1"),
        ({"layers": [4]}, {}, "does not list: layers.7.b1"),
        ({"hidden_size": 25}, {}, r"layer 4 has w1 \[6, 24\], expected \[6, 25\]"),
        ({"attention": True}, {}, "layers.4.attention_weight is missing"),
        ({}, {"layers.4.b1": None}, "layers.4.b1 is missing"),
        ({}, {"layers.7.w2": torch.ones(6)}, r"layer 7 has w2 \[6\], expected \[5\]"),
        ({}, {"layers.7.b1": torch.full((5,), torch.inf)}, "layer 7: b1 has NaN or infinite"),
    ],
)
def test_files_that_do_not_fit(path, header, changes, message):
    rewrite(path, header, **changes)
    with pytest.raises(ValueError, match=message):
        load_pruners(path)


def entry(**changes):
    sizes = {"num_key_value_heads": 2, "head_dim": 6, "num_hidden_layers": 12, "stages": [4, 7], "rank": 5}
    return {"kv_predictor": {**sizes, "rms_eps": 1e-6, "dtype": "bfloat16", **changes}}


@pytest.mark.parametrize(
    ("header", "changes", "message"),
    [
        ({"kv_predictor": None}, {}, "tensors that the header does not list: kv.down"),
        ({"kv_predictor": "yes"}, {}, r"malformed header \(kv_predictor: "),
        ({"kv_predictor": {"rank": 5}}, {}, "malformed header .kv_predictor: 'dtype'"),
        (entry(ranks=5), {}, "malformed header .kv_predictor: .*'ranks'"),
        (entry(dtype="int8"), {}, "malformed header .kv_predictor: dtype 'int8', expected one of float32, bfloat16"),
        (entry(stages=[7, 4]), {}, "malformed header .kv_predictor: stages=.* expected ascending layers"),
        (entry(head_dim=-6), {}, "malformed header .kv_predictor: "),
        (entry(num_hidden_layers=13), {}, "made for num_hidden_layers=13, the pruners for 12"),
        (entry(stages=[4, 6, 7]), {}, r"describes a KV predictor, but kv\.down\.6\.weight is missing"),
        (entry(stages=[4]), {}, r"does not list: kv\.down\.7\.weight"),
        (
            entry(rank=None),
            {},
            r"kv\.up\.4:4\.weight is torch.bfloat16 \[24, 5\], expected .* \[24, 24\] by the header",
        ),
        (entry(rank=6), {}, r"kv\.down\.4\.weight is torch.bfloat16 \[5, 24\], expected torch.bfloat16 \[6, 24\]"),
        (entry(dtype="float32"), {}, r"kv\.down\.4\.weight is torch.bfloat16 .* expected torch.float32"),
        ({}, {"kv.up.7:9.bias": None}, r"kv\.up\.7:9\.bias is missing"),
        ({}, {"kv.up.8:9.bias": torch.ones(24)}, r"does not list: kv\.up\.8:9\.bias"),
        (
            {},
            {"kv.up.7:9.bias": torch.full((24,), torch.nan, dtype=torch.bfloat16)},
            "KV predictor: up.7:9.bias has NaN or infinite weights; train or load it again",
        ),
    ],
)
def test_kv_predictors_that_do_not_fit(path_with_kv, header, changes, message):
    rewrite(path_with_kv, header, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_pruners(path_with_kv)
    assert str(path_with_kv) in str(error.value)


@pytest.mark.parametrize("keep", [0, 7, 60, 300])
def test_truncated_files(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pruners(path)


def test_files_of_another_kind(path):
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="without the 'sdtp-pruners' header"):
        load_pruners(path)
    with pytest.raises(FileNotFoundError, match="no such pruner file"):
        load_pruners(path.with_name("nothing"))
    torch.save({"w": torch.ones(2)}, path)  # a pickle is never read
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_pruners(path)


def test_refused_saves_write_nothing(tmp_path):
    bad = TokenPruner(24)
    bad.b2.data.fill_(torch.nan)
    for pruners, message in (
        ({}, "no pruners"),
        ({4: bad}, "layer 4: b2"),
        ({4: TokenPruner(24), 7: TokenPruner(24, rms_norm=False)}, "share"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pruners(pruners, tmp_path / "x")
    mixed, broken = make_predictor(), make_predictor()
    mixed.up["4:5"].float()
    broken.up["4:5"].bias.data[3] = torch.inf
    for predictor, config, message in (
        (make_predictor(hidden_size=32), None, "made for hidden_size=32, the pruners for 24: one file holds"),
        (make_predictor().double(), None, "weights in float64, expected all in one of float32"),
        (mixed, None, "weights in bfloat16, float32, expected all in one of"),
        (broken, None, "up.4:5.bias has NaN or infinite"),
        (
            make_predictor(),
            type("Other", (Config,), {"num_hidden_layers": 13}),
            "num_hidden_layers=12, the pruners for 13",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            save_pruners({4: TokenPruner(24)}, tmp_path / "x", config=config, kv_predictor=predictor)
    assert not list(tmp_path.iterdir())
