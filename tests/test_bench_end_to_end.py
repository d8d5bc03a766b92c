"""``sdtp bench prefill`` and ``decode`` on a tiny checkpoint: rows that agree with the schedule, gates that hold."""

import gc
import json
import statistics
import time

import pytest
import torch
from helpers.models import BYTE_MODEL

from sdtp_bench import breakdown, end_to_end, memory, prompts
from sdtp_eval import paired
from sdtp_eval.paired import Pair
from sdtp_kernels import PruningSchedule, cli
from sdtp_kernels.models.report import LayerReport, PrefillReport

TOKENS, LAYERS, BLOCK = 400, BYTE_MODEL["num_hidden_layers"], 64
HEAD_DIM = BYTE_MODEL["hidden_size"] // BYTE_MODEL["num_attention_heads"]
ROW_BYTES = 2 * BYTE_MODEL["num_key_value_heads"] * HEAD_DIM * 4


@pytest.fixture
def bench(byte_checkpoint, tmp_path, monkeypatch):
    """Runs a command of ``sdtp bench`` on the tiny checkpoint; its status and its rows."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(command, *options):
        arguments = ["bench", command, "--model", byte_checkpoint, "--tokens", TOKENS, "--device", "cpu"]
        status = cli.main([str(word) for word in (*arguments, "--out", tmp_path, *options)])
        path = tmp_path / f"{command}.jsonl"
        return status, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return run


@pytest.fixture(scope="module")
def pair(tiny_model):
    return Pair(tiny_model, torch.randint(1, 256, (1, 200)), "recent", PruningSchedule((2, 4), 0.5, min_prompt=1))


def schedule_of(row):
    block_size = row["block_size"] or 512
    return PruningSchedule.every(LAYERS, keep_ratio=row["keep"], budget=row["budget"], block_size=block_size)


def check_row(row, repeats):
    schedule = schedule_of(row)
    kept = [schedule.num_keep(TOKENS, sum(start <= i for start in schedule.layers)) for i in range(LAYERS)]
    assert row["tokens_per_layer"] == kept
    assert row["mean_keep"] == pytest.approx(schedule.mean_keep(TOKENS, LAYERS))
    assert row["kv_bytes"] == {"dense": LAYERS * TOKENS * ROW_BYTES, "pruned": sum(kept) * ROW_BYTES}
    for kind in ("dense", "pruned"):
        assert len(row[f"{kind}_s_all"]) == repeats
        assert row[f"{kind}_s"] == statistics.median(row[f"{kind}_s_all"]) > 0
    assert row["speedup"] == pytest.approx(row["dense_s"] / row["pruned_s"])
    assert row["ideal"] > 1
    assert row["share_of_ideal"] == pytest.approx(row["speedup"] / row["ideal"])
    assert row["method"] == "attention"
    assert {"machine", "versions", "revision", "date", "command"} <= set(row)


def test_prefill(bench, capsys):
    status, rows = bench("prefill", "--keep", 0.8, 0.9, "--budget", "global", "block", "--block-size", BLOCK)
    assert status == 0
    ways = [(row["keep"], row["budget"], row["block_size"]) for row in rows]
    assert ways == [(r, b, s) for r in (0.8, 0.9) for b, s in (("global", None), ("block", BLOCK))]
    for row in rows:
        check_row(row, repeats=3)
        assert row["dense_s_all"] == rows[0]["dense_s_all"]
        assert 0 < row["stage_share"] < 100
        assert set(row["where"]) == set(row["peak_bytes"]) == {"dense", "pruned"}
        assert all(seconds > 0 for where in row["where"].values() for seconds in where.values())
        assert all(taken >= 0 for taken in row["peak_bytes"].values())  # of so small a model too little to count
    assert "share" in capsys.readouterr().out


def test_decode(bench):
    status, (row,) = bench("decode", "--keep", 0.8, "--new-tokens", 3)
    assert status == 0
    check_row(row, repeats=2)
    assert row["new_tokens"] == 3
    for kind in ("dense", "pruned"):
        first, total, after = (row[name][kind] if name[0] != "{" else row[name.format(kind)] for name in
                                ("{}_s_all", "total_s_all", "decode_s_all"))  # fmt: skip
        assert after == pytest.approx([b - a for a, b in zip(first, total, strict=True)])
        assert row["total_s"][kind] == statistics.median(total) > row[f"{kind}_s"]
        assert row["decode_s"][kind] == statistics.median(after) > 0


@pytest.mark.parametrize("command", ["prefill", "decode"])
@pytest.mark.parametrize("fault", ["a token lost", "another count"])
def test_no_figures_from_a_wrong_model(bench, monkeypatch, capsys, command, fault):
    if fault == "a token lost":
        monkeypatch.setattr(end_to_end, "KEEP_ALL", 0.9)
    else:
        monkeypatch.setattr(paired, "cached_tokens", lambda cache: [TOKENS] * LAYERS)
    assert bench(command, "--keep", 0.8, *(["--times-only"] if command == "prefill" else [])) == (2, [])
    streams = capsys.readouterr()
    assert "no figures" in streams.err
    assert streams.out == ""


def test_the_first_new_tokens_are_compared_too(pair, monkeypatch):
    setting = prompts.Setting("recent", "float32", {prompts.Way(0.5, "global"): pair})
    end_to_end.check_first_tokens(setting)
    monkeypatch.setattr(end_to_end, "KEEP_ALL", 0.5)
    with pytest.raises(paired.GateError, match="with the whole prompt kept"):
        end_to_end.check_first_tokens(setting)


def test_everybody_has_every_place_once():
    assert list(paired.in_turns("abc", 4)) == list("abcbcacababc")


def test_a_stage_over_a_layer():
    layers = [LayerReport(i, 10, 10, 0, seconds) for i, seconds in enumerate((None, 0.25, None, 0.75))]
    report = PrefillReport(10, "cpu", layers, seconds=9.0)  # layers alone: 8 seconds, 2 each
    assert end_to_end.stage_share(report) == 0.25
    assert end_to_end.stage_share(PrefillReport()) == 0.0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["aten::addmm", "aten::linear", "forward pass"], "linear"),
        (["aten::transpose", "aten::matmul", "forward pass"], "linear"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu", "forward pass"], "attention"),
        (["aten::bmm", "aten::scaled_dot_product_attention", "forward pass"], "attention"),
        (["aten::mm", "aten::linear", breakdown.BETWEEN, "forward pass"], "pruning"),
        (["aten::mul", "forward pass"], "other"),
        (["forward pass"], "other"),
    ],
)
def test_buckets(names, expected):
    assert breakdown.bucket(names) == expected


@torch.no_grad()
def test_the_buckets_add_up(pair):
    def slow(stage):
        time.sleep(0.1)
        return stage.token_index.float()

    pair = pair._replace(pruners=slow)
    with pair.patched():
        where, seconds = paired.timed(lambda: breakdown.where_time_goes(pair.prefill, pair.model), torch.device("cpu"))
    assert list(where) == list(breakdown.BUCKETS)
    assert where["pruning"] > 0.2  # two stages
    assert all(spent > 0 for spent in where.values())
    assert sum(where.values()) < seconds
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in pair.model.model.layers)


def test_peak_memory_is_that_of_the_work_alone():
    mib = 2**20

    def tensor(size):
        gc.collect()  # it may come at any time
        return torch.ones(size * mib, dtype=torch.uint8)

    def take(size):
        return memory.peak_bytes(lambda: tensor(size), torch.device("cpu"))[1] / mib

    garbage = [tensor(512)]
    garbage.append(garbage)
    del garbage
    assert 250 < take(256) < 300  # the kernel counts pages in batches
    assert 60 < take(64) < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repeats", 0), "--repeats 0: expected at least 1"),
        (("--tokens", 20), "ask for more"),
        (("--keep", 1.5), "keep_ratio=1.5"),
        (("--method", "magic"), "no method 'magic'"),
    ],
)
def test_mistakes_get_one_message(bench, capsys, options, message):
    assert bench("prefill", *options) == (2, [])
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short(bench, tmp_path, capsys):
    (tmp_path / "text").write_text("It ends here.")
    assert bench("prefill", "--text", tmp_path / "text") == (2, [])
    assert "give a longer one with --text" in capsys.readouterr().err
