"""Random models and a tokenizer of bytes. transformers is imported by what needs it."""

import json

import torch

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"


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


def make_tokenizer(template=TEMPLATE):
    """One token a byte: positions in the text can be read off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


BYTE_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def save_byte_model(path, **changes):
    """A random Qwen2 whose tokens are bytes, with its tokenizer: :data:`BYTE_MODEL` with these changes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    settings = {"max_position_embeddings": 2048, "eos_token_id": None, "bos_token_id": None, **BYTE_MODEL, **changes}
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **settings)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    # Real checkpoints of other tokenizers do the same; see sdtp_eval.checkpoints.
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "unused.Unused"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
