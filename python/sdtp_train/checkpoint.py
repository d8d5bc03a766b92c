"""The model that pruners are made for: loaded, frozen, and recognised again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_PROBES = 16  # elements of each weight that tell checkpoints apart: any training step changes nearly all of them


def load_frozen(path: str | None, dtype: str, device: torch.device) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """A model whose weights take no gradient, its tokenizer, and its name for humans.

    Parameters
    ----------
    path : str, optional
        A Qwen2 checkpoint; SmolLM2-135M-Instruct by default.
    dtype : str
        ``float32`` or ``bfloat16``. float16 would overflow: see flaw 3 of the public reproduction, whose saved
        saliency is NaN from the middle layers on.
    device : torch.device

    Raises
    ------
    ValueError
        If there is no such checkpoint, or its attention is not the full causal one.
    """
    import torch

    from sdtp_eval.checkpoints import default_checkpoint, load_checkpoint

    source = path or default_checkpoint()
    model, tokenizer = load_checkpoint(source, getattr(torch, dtype))
    if "sliding_attention" in model.config.layer_types:
        raise ValueError(f"{source}: sliding-window layers cannot be pruned; set use_sliding_window to false")
    return model.requires_grad_(False).to(device), tokenizer, Path(source).name


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
