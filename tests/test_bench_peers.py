"""``sdtp bench peers``: everybody at the same budget, by stand-ins for what has to be installed."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from test_eval_peers import KeepFirstPress

from sdtp_bench import llama_cpp, peers
from sdtp_kernels import PruningSchedule, cli

TOKENS = 700


class GreedyPress(KeepFirstPress):
    """Keeps more than it was told to."""

    def share(self, layer_idx):
        return 0.99


class SelfishPress(KeepFirstPress):
    """Changes what the layers compute, not the cache alone."""

    def __call__(self, model):
        import contextlib

        @contextlib.contextmanager
        def hooked():
            with super(SelfishPress, self).__call__(model):
                hook = model.model.norm.register_forward_hook(lambda module, args, output: output + 1)
                yield
                hook.remove()

        return hooked()


class UntrainedPress(KeepFirstPress):
    """Needs weights of this very checkpoint."""

    def __call__(self, model):
        raise OSError("We couldn't connect to the hub")


class Server:
    """As that of xllamacpp; it answers what it is told to."""

    answer, skipped = "no", 0

    def __init__(self, params):
        assert params.n_ctx >= TOKENS

    def handle_completions(self, request):
        assert request["cache_prompt"] is False
        read = len(request["prompt"]) - self.skipped
        return {"choices": [{"text": self.answer}], "timings": {"prompt_n": read}}


@pytest.fixture
def stand_ins(monkeypatch):
    kvpress, xllamacpp = types.ModuleType("kvpress"), types.ModuleType("xllamacpp")
    for press in (KeepFirstPress, GreedyPress, SelfishPress, UntrainedPress):
        setattr(kvpress, press.__name__, press)
    xllamacpp.__version__, xllamacpp.Server = "1.2", Server
    xllamacpp.CommonParams = lambda: types.SimpleNamespace(
        model=types.SimpleNamespace(), cpuparams=types.SimpleNamespace(), cpuparams_batch=types.SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    monkeypatch.setitem(sys.modules, "xllamacpp", xllamacpp)


@pytest.fixture
def gguf_file(tmp_path):
    """A file like a model's: a matrix in 8 bits, a vector, numbers, texts and a list of them."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(int(LlamaFileType.MOSTLY_Q8_0))
    writer.add_name("a name")
    writer.add_block_count(3)
    writer.add_token_list(["a", "b", "ö"])
    matrix = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor("matrix", quants.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("vector", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def contest(byte_checkpoint, tmp_path):
    def run(*options):
        defaults = {"--model": byte_checkpoint, "--tokens": TOKENS, "--dtype": "float32", "--samples": 2}
        defaults |= {"--out": tmp_path / "rows", "--device": "cpu", "--repeats": 2}
        words = [str(word) for pair in defaults.items() if pair[0] not in options for word in pair]
        status = cli.main(["bench", "peers", *words, *map(str, options)])
        path = tmp_path / "rows/peers.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return status, {row["peer"]: row for row in rows}

    return run


def test_all_at_the_same_budget(stand_ins, contest, gguf_file, capsys):
    status, rows = contest("--gguf", gguf_file, "--presses", "KeepFirst", "Greedy", "Selfish", "Untrained", "Missing")
    assert status == 0
    ours, once = "attention", "attention, once at layer 2"
    llamas = ["llama.cpp Q8_0", "llama.cpp F16"]
    presses = [f"kvpress:{name}" for name in ("KeepFirst", "Greedy", "Selfish", "Untrained", "Missing")]
    assert list(rows) == ["dense", ours, once, *presses, *llamas]

    budget = PruningSchedule((4, 7), 0.8).mean_keep(TOKENS, 8)
    for name in ("dense", ours, once, "kvpress:KeepFirst"):
        row = rows[name]
        expected = 1.0 if name == "dense" else budget
        assert row["mean_keep"] == pytest.approx(expected, abs=0.01)
        assert row["kv_bytes"] == pytest.approx(expected * rows["dense"]["kv_bytes"], rel=0.02)
        assert row["ttft_s"] > 0
        assert len(row["ttft_s_all"]) == row["samples"] == 2
        assert row["nll_increase"] == 0 if name == "dense" else row["nll_increase"] != 0
        assert 0 <= row["passkey"] <= 1
        assert 0 <= row["passkey_after"] <= 1
        assert len(row["nll_increase_interval"]) == 2
    for name in llamas:
        assert (rows[name]["version"], rows[name]["mean_keep"]) == ("1.2", 1.0)
        assert rows[name]["passkey"] == rows[name]["passkey_after"] == 0.0
        assert rows[name]["nll_increase"] is rows[name]["kv_bytes"] is None
    for name, error in (
        ("kvpress:Greedy", "it keeps B = 0.990, not 0.8"),
        ("kvpress:Selfish", "not computed as the dense model computes it"),
        ("kvpress:Untrained", "a network that is trained for each checkpoint; there is none of this one here"),
        ("kvpress:Missing", "no method 'kvpress:Missing'"),
    ):
        assert error in rows[name]["error"]
        assert not {"ttft_s", "kv_bytes", "nll_increase", "passkey"} & set(rows[name])
    assert "kvpress:Greedy: no figures" in capsys.readouterr().out.replace("\n", " ")


def test_who_is_not_installed_is_listed_with_the_reason(contest, gguf_file, monkeypatch):
    for name in ("kvpress", "xllamacpp"):
        monkeypatch.setitem(sys.modules, name, None)
    status, rows = contest("--gguf", gguf_file, "--presses", "SnapKV", "--samples", 1, "--repeats", 1)
    assert status == 0
    assert "kvpress cannot be imported" in rows["kvpress:SnapKV"]["error"]
    assert "'make peers' installs it" in rows["llama.cpp"]["error"]
    assert rows["attention"]["ttft_s"] > 0


def stub(name, **changes):
    fields = {
        "version": "1",
        "check": lambda: peers.Figures(8, 0.5),
        "first_token": lambda: None,
        "score": lambda sample, protocol: {
            "nll_increase": sample.value,
            "exact": sample.value * (protocol == "inside"),
        },
    }
    return peers.Peer(name, **(fields | changes))


@pytest.mark.parametrize(("name", "kept"), [("another", 0.52), ("another", 0.48), ("another", 1.0), ("dense", 0.5)])
def test_another_budget_gets_no_figures(name, kept):
    contest = types.SimpleNamespace(budget=0.5)
    assert peers.checked(contest, stub("another")).mean_keep == 0.5
    with pytest.raises(peers.GateError, match=f"it keeps B = {kept:.3f}"):
        peers.checked(contest, stub(name, check=lambda: peers.Figures(8, kept)))


def fail(*_):
    raise ZeroDivisionError("division by zero\nand so on")


@pytest.mark.parametrize("step", ["check", "first_token", "score"])
def test_what_fails_has_no_figures_and_stops_nobody(step):
    sample = types.SimpleNamespace
    contest = types.SimpleNamespace(
        args=types.SimpleNamespace(model="some/model", dtype="float32", repeats=3, samples=2),
        tokens=100,
        schedule=PruningSchedule((1,), 0.8),
        input_ids=torch.zeros(1, 100, dtype=torch.int64),
        budget=0.5,
        samples=[sample(task=task, value=value) for task in peers.TASKS for value in (0.25, 0.75)],
    )
    bad, good, absent = peers.rows_of(contest, [stub("bad", **{step: fail}), stub("good"), ("absent", "not here")])
    assert bad["error"] == "ZeroDivisionError: division by zero"
    assert absent["error"] == "not here"
    for row in (bad, absent):
        assert set(row) == {"bench", "checkpoint", "tokens", "keep", "dtype", "peer", "version", "error"}
    assert good["nll_increase"] == good["passkey"] == 0.5
    assert good["passkey_interval"] == [0.25, 0.75]
    assert (good["passkey_after"], good["passkey_after_interval"]) == (0.0, [0.0, 0.0])
    assert len(good["ttft_s_all"]) == 3


def test_llama_cpp_reads_the_whole_prompt_or_says_so(stand_ins, gguf_file, monkeypatch):
    engine = llama_cpp.LlamaCpp(gguf_file, TOKENS, 1)
    assert engine.generate([1, 2, 3], 1) == "no"
    monkeypatch.setattr(Server, "skipped", 1)
    with pytest.raises(RuntimeError, match="read 2 of 3 tokens"):
        engine.generate([1, 2, 3], 1)
    monkeypatch.setattr(Server, "handle_completions", lambda self, request: {"error": "too long"})
    with pytest.raises(RuntimeError, match="too long"):
        engine.generate([1, 2, 3], 1)


def test_a_file_in_16_bits_is_the_same_model(gguf_file, tmp_path):
    from gguf import GGUFReader, quants

    wide = tmp_path / "wide.gguf"
    llama_cpp.widen(gguf_file, wide)
    assert (llama_cpp.file_type(gguf_file), llama_cpp.file_type(wide)) == ("Q8_0", "F16")
    before, after = GGUFReader(gguf_file), GGUFReader(wide)
    for name, field in before.fields.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            assert after.fields[name].contents() == field.contents()
            assert after.fields[name].types == field.types
    (matrix, vector), (wide_matrix, wide_vector) = before.tensors, after.tensors
    assert np.array_equal(vector.data, wide_vector.data)
    expected = torch.from_numpy(quants.dequantize(matrix.data, matrix.tensor_type)).half().float()
    found = torch.from_numpy(np.array(quants.dequantize(wide_matrix.data, wide_matrix.tensor_type), np.float32))
    assert torch.equal(found, expected)


def test_mistakes_get_one_message(contest, capsys):
    assert contest("--samples", 0) == (2, {})
    assert "--samples 0: expected at least 1" in capsys.readouterr().err
