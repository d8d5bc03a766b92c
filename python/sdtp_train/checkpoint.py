"""The model that pruners are made for: loaded and frozen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16")  # the range of float16 is too small for gradients and massive activations


def load_frozen(path: str | None, dtype: str, device: torch.device) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """A model whose weights take no gradient, its tokenizer, and its name for humans.

    Parameters
    ----------
    path : str, optional
        A checkpoint of a supported family; SmolLM2-135M-Instruct by default.
    dtype : str
        One of :data:`DTYPES`.
    device : torch.device

    Raises
    ------
    ValueError
        If there is no such checkpoint, or its family cannot be pruned with these settings.
    """
    import torch

    from sdtp_eval.checkpoints import default_checkpoint, load_checkpoint
    from sdtp_kernels.models.family import find_family

    source = path or default_checkpoint()
    model, tokenizer = load_checkpoint(source, getattr(torch, dtype))
    family = find_family(model.config)
    if family is not None and (reason := family.refusal(model.config)):
        raise ValueError(f"{source}: {reason}")
    return model.requires_grad_(False).to(device), tokenizer, Path(source).name
