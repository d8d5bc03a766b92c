import json
import os
import re
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never ask a network
# Workers share the cores; torch reads this when it is imported. A pytest that a test starts is none of them.
if os.environ.pop("PYTEST_XDIST_WORKER", None):
    workers = int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT"))
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // workers))
# transformers looks for packages that quantize when it is imported; see the Makefile.
sys.path.append(str(Path(sys.prefix) / "quantizers"))

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")

# `make test` leaves these to CI, which runs them by `make test-slow`: a second version of Triton, the compilers' other
# targets (one of each maker stays), edits that a race checker must not mind.
SLOW = (
    r"test_triton\.py::.*\[3\.6",
    r"test_triton\.py::.*\[installed-(?!sm_90|gfx942)",
    r"test_cuda\.py::test_redundant_barriers_are_no_races\[",
)
# The longest files; xdist deals out files in this order, and one that began last would keep every worker waiting.
FIRST = ("test_triton.py", "test_cuda.py", "test_compile.py", "test_bench_processes.py", "test_serving.py")


def pytest_collection_modifyitems(items):
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in SLOW):
            item.add_marker("slow")
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty_memory():
    """Memory that a kernel forgets to write shows up as NaN instead of as old, plausible values."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make_model(family, num_layers=6, hidden_size=64, attention="sdpa", **settings):
    """A random model of a family, by its model type, whose attention is far from uniform."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    defaults = {
        "vocab_size": 256,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "attn_implementation": attention,
        "pad_token_id": 0,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    if family == "mistral":
        defaults["sliding_window"] = None
    if family == "qwen3":
        defaults["head_dim"] = hidden_size // 4 + 8  # as in its small models, heads are wider than the hidden states
    config = AutoConfig.for_model(family, **{**defaults, **settings})
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    for parameter in model.parameters():  # the default 0.02 leaves attention uniform: masks would hardly matter
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return model


def make_qwen2(num_layers=6, hidden_size=64, attention="sdpa", **settings):
    return make_model("qwen2", num_layers, hidden_size, attention, **settings)


BYTE_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_byte_model(path, **changes):
    """A random Qwen2 whose tokens are bytes, with its tokenizer: :data:`BYTE_MODEL` with these changes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    settings = {"max_position_embeddings": 2048, "eos_token_id": None, "bos_token_id": None, **BYTE_MODEL, **changes}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(alphabet), **settings)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    # Real checkpoints of other tokenizers do the same; see sdtp_eval.checkpoints.
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "unused.Unused"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def byte_checkpoint(tmp_path_factory):
    """The folder of a random Qwen2 whose tokens are bytes."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_byte_model(path)
    return path


@pytest.fixture(scope="session")
def tiny_model():
    return make_qwen2()


@pytest.fixture(scope="session")
def smollm2():
    """The real checkpoint: SmolLM2-135M-Instruct, a Llama, with its tokenizer."""
    checkpoints = pytest.importorskip("sdtp_eval.checkpoints", reason="python/ is not installed")
    return checkpoints.load_checkpoint(checkpoints.default_checkpoint())
