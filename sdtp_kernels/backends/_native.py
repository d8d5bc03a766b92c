"""Loads the compiled libraries, or records why not.

The schemas stand here and the C++ only implements them (``STABLE_TORCH_LIBRARY_IMPL(sdtp_native, <device>, ...)``):
one schema, one library a device. Nothing but :mod:`sdtp_kernels.backends` calls these ops.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent.parent

_COMPILERS = {"cpu": "a C++ compiler", "cuda": "a C++ compiler and nvcc"}

_SCORING = (
    "Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? mean_score, int num_scores, Tensor? score_bias, float? rms_eps"
)
_SELECTION = "int num_keep, int sink, int recent, int? block_size, Tensor? rows, int pooling"

_library = torch.library.Library("sdtp_native", "DEF")
for _schema in (
    f"score_tokens(Tensor hidden_states, {_SCORING}) -> Tensor",
    f"select_tokens(Tensor scores, {_SELECTION}) -> Tensor",
    "gather_tokens(Tensor[] tensors, Tensor indices) -> Tensor[]",
    f"prune_tokens(Tensor[] tensors, {_SCORING}, {_SELECTION}, int num_dropped) -> (Tensor[], Tensor, Tensor, Tensor)",
    "window_attention(Tensor query, Tensor key, Tensor query_index, Tensor key_index, Tensor? cos, Tensor? sin, "
    "float scaling, int pooling) -> Tensor",
    "prompt_bias(Tensor token_index, Tensor distance_table, int keep_last, Tensor? attention, float attention_weight, "
    "Tensor? query, Tensor? key, Tensor? cos, Tensor? sin, float scaling, int pooling) -> Tensor",
):
    _library.define(_schema)


@functools.cache
def build_info() -> dict[str, Any]:
    """What was built, how and with what, as the build wrote it; empty where nothing was."""
    path = _PACKAGE / "build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


@functools.cache
def load_error(device: str) -> str | None:
    """Load the library for `device`, once; the reason where that fails, ``None`` where it works."""
    path = _PACKAGE / f"libsdtp_{device}.so"
    if not path.is_file():
        return (
            f"{path.name} was not built; 'pip install .' with {_COMPILERS[device]} builds it "
            f"(build_info: {build_info() or 'none'})"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load under torch {torch.__version__}: {error} (built with: {build_info()})"
    return None
