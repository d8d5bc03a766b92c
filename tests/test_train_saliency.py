"""``sdtp saliency``: what it writes, and that neither a kill nor a second process nor a repetition changes a byte."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch
from helpers.files import contents
from helpers.training import TARGETS, Killed, damage, in_two, make_checkpoint, make_texts, mark, options
from safetensors.torch import load_file, save_file

from sdtp_eval.checkpoints import identify
from sdtp_eval.parallel import join_workers
from sdtp_kernels import cli
from sdtp_train import checkpoint, shards

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("saliency")
    make_checkpoint(path / "model")
    make_texts(path / "texts")
    return path


@pytest.fixture
def sdtp(monkeypatch):
    point = metadata.EntryPoint("saliency", "sdtp_train.saliency:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"saliency": point})
    return lambda *words: cli.main(list(words))


@pytest.fixture(scope="module")
def whole(place):
    """An uninterrupted run."""
    out = place / "whole"
    mark(place, out)
    return out


def test_a_directory_holds_what_the_layout_says(place, whole):
    data = shards.Saliency(whole)
    assert data.layers == [4, 7]
    assert len(data.samples) == 14
    assert sum(s.is_validation for s in data.samples) == 2
    model, _, _ = checkpoint.load_frozen(str(place / "model"), "float32", torch.device("cpu"))
    for i in (0, 5, 13):
        sample = data.load(i, TARGETS)
        n = sample.info.num_context
        assert sample.targets.shape == (2, 2, n)
        assert sample.targets.dtype == sample.attention.dtype == torch.float32
        assert sample.hidden_states.dtype == torch.bfloat16
        hidden_states = model(sample.token_ids[None], output_hidden_states=True).hidden_states
        for stage, layer in enumerate(data.layers):
            torch.testing.assert_close(sample.hidden_states[stage], hidden_states[layer][0, :n].bfloat16())
        assert (sample.targets > 0).all()


def test_finished_work_is_left_alone(place, whole, sdtp):
    before = contents(whole)
    times = {path: path.stat().st_mtime_ns for path in whole.glob("shard-*")}
    assert sdtp(*options(place, whole)) == 0
    assert contents(whole) == before
    assert {path: path.stat().st_mtime_ns for path in whole.glob("shard-*")} == times


@pytest.mark.parametrize("moment", range(9))
def test_stopped_at_any_write_and_resumed_gives_the_same_bytes(place, whole, tmp_path, monkeypatch, moment):
    """Every way in which bytes reach the disk, before and after."""
    left = [moment]

    def count_down():
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    def stopping(function):
        def wrapper(*args, **kwargs):
            count_down()
            function(*args, **kwargs)
            count_down()

        return wrapper

    import safetensors.torch

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopping(os.replace))
        patch.setattr(safetensors.torch, "save_file", stopping(save_file))
        with pytest.raises(Killed):
            mark(place, out)
    mark(place, out)
    assert contents(out) == contents(whole)


def test_killed_and_resumed_gives_the_same_bytes(place, whole, tmp_path):
    """SIGKILL at a random moment of a real process, several times in a row."""
    out = tmp_path / "out"
    code = (
        "import sys, argparse, torch; torch.set_num_threads(1); from sdtp_train import saliency\n"
        "p = argparse.ArgumentParser(); saliency.add_command(p.add_subparsers())\n"
        "a = p.parse_args(sys.argv[1:]); print('go', flush=True); saliency.mark(a)"
    )
    rng = random.Random(time.time_ns())
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", code, *options(place, out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        done = len(list(out.glob("shard-*")))
        begin = time.monotonic()
        while process.poll() is None and len(list(out.glob("shard-*"))) == done and time.monotonic() - begin < 60:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    mark(place, out)
    assert contents(out) == contents(whole)


def test_two_processes_write_the_same_bytes(place, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert not in_two(monkeypatch, lambda: mark(place, out))
    assert contents(out) == contents(whole)


def test_alone_without_accelerate(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    workers = join_workers("cpu")
    assert (workers.index, workers.number) == (0, 1)
    workers.wait()


def test_other_settings_data_or_model_are_refused(place, whole, sdtp, capsys, tmp_path):
    before = contents(whole)
    other = make_checkpoint(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for changes, message in (
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
        ({"layers": [3, 6]}, "layers: [4, 7] there, [3, 6] asked for"),
        ({"targets": ["paper"]}, "targets: "),
        ({"samples": 12}, "the samples are others"),
        ({"model": other}, "model: "),
    ):
        assert sdtp(*options(place, whole, **changes)) == 2
        assert message in capsys.readouterr().err
        assert contents(whole) == before
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("mine")
    before = contents(stranger)
    assert sdtp(*options(place, stranger)) == 2
    assert "name a new or empty directory" in capsys.readouterr().err
    assert contents(stranger) == before


def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def rewrite(path, change):
    """A shard with another header, and everything else in order."""
    header = shards.read_header(path)
    change(header)
    save_file(load_file(path), path, {"sdtp": json.dumps(header)})


def test_damage_is_found_and_nothing_is_overwritten(place, whole, tmp_path, sdtp, capsys):
    damages = (
        (damage, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: rewrite(path, lambda header: header["samples"].pop(1)), "holds other samples"),
        (lambda path: rewrite(path, lambda header: header.update(run="0")), "belongs to another run"),
    )
    for i, (harm, message) in enumerate(damages):
        (tmp_path / str(i)).mkdir()
        out = copied(whole, tmp_path / str(i))
        shard = shards.shard_path(out, 2)
        harm(shard)
        before = contents(out)
        assert sdtp(*options(place, out)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert shard.name in error
        assert contents(out) == before
        with pytest.raises(shards.SaliencyError, match=r"shard-00002\.safetensors is damaged"):
            shards.Saliency(out)
        shard.unlink()
        with pytest.raises(shards.SaliencyError, match=r"shard-00002\.safetensors is missing"):
            shards.Saliency(out)
        assert sdtp(*options(place, out)) == 0
        assert contents(out) == contents(whole)


def test_a_missing_sample_is_named(whole, tmp_path):
    out = copied(whole, tmp_path)
    manifest = json.loads((out / shards.MANIFEST).read_text())
    shard = shards.shard_path(out, 1)
    missing = manifest["samples"][5][0]
    rewrite(shard, lambda header: header["samples"].pop(1))
    manifest["shards"][shard.name] = shards._sha256(shard)
    (out / shards.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(shards.SaliencyError, match=missing):
        shards.Saliency(out)


def test_an_unfinished_directory_is_not_read(whole, tmp_path):
    out = copied(whole, tmp_path)
    manifest = json.loads((out / shards.MANIFEST).read_text())
    (out / shards.MANIFEST).write_text(json.dumps({**manifest, "shards": None}))
    with pytest.raises(shards.SaliencyError, match="unfinished"):
        shards.Saliency(out)
    with pytest.raises(shards.SaliencyError, match="'sdtp saliency' makes it"):
        shards.Saliency(tmp_path / "nowhere")


def test_a_model_is_recognised_in_either_dtype(place):
    exact, half = (
        identify(checkpoint.load_frozen(str(place / "model"), dtype, torch.device("cpu"))[0])
        for dtype in ("float32", "bfloat16")
    )
    assert exact == half


def test_mistakes_get_answers(place, tmp_path, sdtp, capsys):
    for changes, message in (
        ({"targets": ["saliency"]}, "no target 'saliency'"),
        ({"layers": [0, 4]}, "expected layers from 1 to 7"),
        ({"shard-size": 0}, "expected at least 1"),
        ({"model": tmp_path / "none"}, "no checkpoint"),
    ):
        assert sdtp(*options(place, tmp_path / "out", **changes)) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_not_a_number_stops_the_run(place, tmp_path, sdtp, capsys):
    broken = make_checkpoint(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.5.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert sdtp(*options(place, tmp_path / "out", model=broken, targets=["paper"])) == 2
    assert "is NaN or infinite" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shard-*"))
