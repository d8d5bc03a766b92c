"""Under a version of transformers that no test ran on, a patch proves itself before it is applied."""

import contextlib
import random
import time

import pytest
import torch
from helpers.models import make_model

from sdtp_kernels import PruningSchedule, apply_sdtp
from sdtp_kernels.models import chunks, compat, decoder, proof, stage
from sdtp_kernels.models.family import FAMILIES

SCHEDULE = PruningSchedule((1,), 0.9)


@pytest.fixture(autouse=True)
def untested(monkeypatch):
    """No version is tested, and nothing was proved yet."""
    monkeypatch.setattr(compat, "TESTED", ())
    proof.prove.cache_clear()
    yield
    proof.prove.cache_clear()


@pytest.fixture
def proofs(monkeypatch):
    """The families that were proved, each time."""
    found, difference = [], proof._difference
    monkeypatch.setattr(proof, "_difference", lambda family: found.append(family) or difference(family))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_proves_itself_once(proofs, family):
    model = make_model(family, num_layers=2, hidden_size=32)
    begin = time.process_time()
    apply_sdtp(model, "norm", SCHEDULE).remove()
    assert time.process_time() - begin < 1  # on a clock that others do not slow down
    for _ in range(2):
        apply_sdtp(model, "norm", SCHEDULE).remove()
    assert len(proofs) == 1
    assert isinstance(model, proofs[0].causal_lm)


def test_a_tested_version_proves_nothing(monkeypatch, proofs):
    monkeypatch.setattr(compat, "check_version", lambda: True)
    apply_sdtp(make_model("llama", num_layers=2, hidden_size=32), "norm", SCHEDULE).remove()
    assert not proofs


def settings():
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around",
    [
        contextlib.nullcontext,
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.enable_grad,
    ],
    ids=["plain", "float64", "bfloat16", "meta", "autocast", "inference mode", "gradients"],
)
def test_nothing_around_it_counts_or_changes(proofs, around):
    model = make_model("qwen3", num_layers=2, hidden_size=32)
    with around():
        before, state, python_state = settings(), torch.get_rng_state(), random.getstate()
        apply_sdtp(model, "norm", SCHEDULE).remove()
        assert settings() == before
        assert torch.equal(torch.get_rng_state(), state)
        assert random.getstate() == python_state
        assert len(proofs) == 1


def drop_the_mask(monkeypatch):
    monkeypatch.setattr(decoder, "prompt_mask", lambda *_: decoder.Mask(None, {}))


def count_positions_anew(monkeypatch):
    """Kept tokens get the positions of their places among what is left."""
    gather = stage.ops.gather_tokens

    def wrong(tensors, indices, **kwargs):
        hidden_states, *others = gather(tensors, indices, **kwargs)
        others[:2] = (t[:, : indices.shape[1]] for t in tensors[1:3])
        return [hidden_states, *others]

    monkeypatch.setattr(stage.ops, "gather_tokens", wrong)


def take_the_cache_away(monkeypatch):
    monkeypatch.setattr(compat, "take_cache", lambda kwargs: None)
    monkeypatch.setattr(compat, "CACHE", "no_such_argument")


def forget_what_is_kept(monkeypatch):
    hold = chunks.hold

    def wrong(*args):
        layer = hold(*args)
        if layer is not None:
            layer.kept = layer.kept.clamp(min=0)  # padding is a token
        return layer

    monkeypatch.setattr(decoder, "hold", wrong)


def lose_decoding(monkeypatch):
    """The prefill is right, what is decoded after it is NaN."""
    added = decoder.appended_segment

    def wrong(*args):
        segment = added(*args)
        return segment._replace(position_embeddings=tuple(t * torch.nan for t in segment.position_embeddings))

    monkeypatch.setattr(decoder, "appended_segment", wrong)


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (drop_the_mask, r"logits differ by [\d.]+, allowed are 0.0001"),
        (count_positions_anew, r"logits differ by [\d.]+, allowed are 0.0001"),
        (forget_what_is_kept, r"logits differ by [\d.]+, allowed are 0.0001"),
        (lose_decoding, "logits differ by nan"),
        (take_the_cache_away, "no_such_argument"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_differs_is_refused(monkeypatch, family, plant, what):
    model = make_model(family, num_layers=2, hidden_size=32)
    plant(monkeypatch)
    for _ in range(2):  # and again
        with pytest.raises(NotImplementedError, match=what) as refusal:
            apply_sdtp(model, "norm", SCHEDULE)
    assert f"transformers {compat.transformers.__version__}" in str(refusal.value)
    assert type(model).__name__ in str(refusal.value)
    assert "_sdtp" not in vars(model)


def test_what_is_too_old_is_refused(monkeypatch, proofs):
    monkeypatch.setattr(compat.transformers, "__version__", "5.15.1")
    with pytest.raises(NotImplementedError, match=r"transformers 5\.15\.1 is too old: SDTP needs 5\.16\.1 or later"):
        apply_sdtp(make_model("llama", num_layers=2, hidden_size=32), "norm", SCHEDULE)
    assert not proofs
