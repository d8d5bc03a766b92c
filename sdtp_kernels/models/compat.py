"""What the supported versions of transformers differ in; nothing else in the package asks for a version.

Each fact is read from the installed package where that can be asked, so that a version between two tested ones needs no
entry. :func:`check_version` refuses what is too old and lets :mod:`.proof` decide on what no test has run.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version
from transformers import cache_utils
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from transformers.cache_utils import Cache

OLDEST = Version("5.16.1")
TESTED = ("5.16", "5.19", "5.20", "5.24")
"""Minor versions that ``make test-compat`` or ``make test`` runs on."""

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the KV cache in arguments and outputs: ``cache`` from 5.24 on."""

# FP8 caches, and the base class that they share with the others, came with 5.21.
BaseQuantizedLayer: Any = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
Fp8QuantizedLayer: Any = getattr(cache_utils, "Fp8QuantizedLayer", None)

RESET_EMPTIES = "reset" in vars(cache_utils.DynamicLayer)
"""Whether ``reset()`` empties a DynamicCache: up to 5.17 it leaves zeros there, as many as there were tokens."""


def check_version() -> bool:
    """Whether tests have run on the installed transformers.

    Raises
    ------
    NotImplementedError
        If it is older than the oldest supported one.
    """
    found = Version(transformers.__version__)
    if found < OLDEST:
        raise NotImplementedError(
            f"transformers {found} is too old: SDTP needs {OLDEST} or later; pip install 'transformers>={OLDEST}'"
        )
    return f"{found.major}.{found.minor}" in TESTED


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Remove the cache from keyword arguments, by either of its names."""
    old = kwargs.pop("past_key_values", None)
    if old is not None and CACHE == "cache":
        warnings.warn("`past_key_values` is deprecated. Use `cache` instead", FutureWarning, stacklevel=3)
    return kwargs.pop("cache", old)


def output(hidden_states: torch.Tensor, cache: Cache | None) -> BaseModelOutputWithPast:
    """What a decoder returns."""
    return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})


def tensor_parallel_group(model: Any) -> ProcessGroup | None:
    """The processes that hold shares of this model's weights and see the same tokens; ``None`` for one alone."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    manager = getattr(model, "_mesh_manager", None)  # later than 5.17
    if manager is not None:
        return manager.get_mesh("tp").get_group()  # type: ignore[no-any-return]
    return model._device_mesh.get_group()  # type: ignore[no-any-return]
