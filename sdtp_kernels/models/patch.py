"""Patching a model: what was passed is found and checked, then its class is exchanged (:mod:`.patched`)."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from .. import backends
from ..schedule import PruningSchedule
from . import compat, proof
from .checks import check_layers, check_model, check_predicted
from .devices import device_of
from .dropped import has_position_attention, on_layers
from .family import FAMILIES, Family, find_family
from .handle import SdtpHandle
from .masks import teach_sdpa
from .patched import PruningCausalLM, PruningDecoder, exchange, handle_of
from .scoring import resolve_pruners

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ..kv_predictor import KVPredictor
    from ..scorers import StageInput


def apply(
    model: Any,
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule | float | None,
    backend: str,
    later_turns: bool,
    evict_earlier_kv: bool,
    dropped_kv: str | None,
    kv_predictor: KVPredictor | None,
) -> SdtpHandle:
    """See :func:`sdtp_kernels.apply_sdtp`. Everything is checked before anything is changed."""
    is_tested = compat.check_version()
    family, model, decoder = _find(model)
    if not is_tested:
        proof.prove(family)
    return patch(
        family, model, decoder, pruners, _schedule(schedule, pruners, decoder.config), backend, later_turns,
        evict_earlier_kv, _predictor(dropped_kv, kv_predictor, pruners),
    )  # fmt: skip


def patch(
    family: Family,
    model: Any,
    decoder: Any,
    pruners: Mapping[int, Any] | str | Callable[[StageInput], torch.Tensor],
    schedule: PruningSchedule,
    backend: str = "auto",
    later_turns: bool = True,
    evict_earlier_kv: bool = False,
    kv_predictor: KVPredictor | None = None,
) -> SdtpHandle:
    """Patch a model of this family, whatever the version of transformers."""
    config = decoder.config
    backends.check_name(backend)
    for module in (decoder, model):
        _check_unpatched(module, is_decoder=module is decoder)
    check_model(model, config, kv_predictor is not None)
    if refusal := family.refusal(config):
        raise NotImplementedError(refusal)
    check_layers(schedule, config)
    # A stage runs where the layer below it does.
    devices = {layer: device_of(decoder.layers[layer - 1]) for layer in schedule.layers}
    for device in devices.values():
        backends.choose(backend, device, decoder.dtype)
    scorers = resolve_pruners(pruners, schedule, config, devices, decoder.dtype)
    group = compat.tensor_parallel_group(model)
    if kv_predictor is not None:
        check_predicted(kv_predictor, config, schedule, evict_earlier_kv)
        kv_predictor = on_layers(kv_predictor, decoder, schedule, group)
    handle = SdtpHandle(schedule, scorers, backend, later_turns, evict_earlier_kv, kv_predictor, group)
    if kv_predictor is not None:
        handle.attends_by_position = has_position_attention(backend, decoder)
        teach_sdpa()
    exchange(decoder, PruningDecoder, handle)
    if model is not decoder:
        exchange(model, PruningCausalLM, handle)
    return handle


def _check_unpatched(module: Any, is_decoder: bool) -> None:
    handle = handle_of(module)
    if handle is not None and not handle.is_inherited:
        raise RuntimeError(
            "the model is patched already: call remove() on its handle, or remove_sdtp(model), before apply_sdtp"
        )
    if handle is not None:
        handle.remove()  # came with a copied or unpickled model: nobody holds it
    forward = module.__dict__.get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if is_decoder and forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        raise RuntimeError(
            f"another tool has replaced the forward of this {type(module).__name__} by "
            f"{getattr(forward, '__qualname__', type(forward).__name__)}, and pruning would skip it: undo that first"
        )


# ----------------------------------------------------------------------------------------------- finding the model


def _find(model: Any) -> tuple[Family, Any, Any]:
    """Family, outermost model to patch, decoder."""
    for name in ("_orig_mod", "module"):  # torch.compile, DataParallel and its kin
        if name in getattr(model, "_modules", ()):
            raise NotImplementedError(
                f"{type(model).__name__} wraps the model: pass model.{name} to apply_sdtp, then wrap it"
            )
    if callable(getattr(model, "get_base_model", None)):
        raise NotImplementedError(
            f"{type(model).__name__} wraps the model: pass model.get_base_model() to apply_sdtp; calls and generate() "
            "of the wrapper then prune"
        )
    family = find_family(getattr(model, "config", None))
    if family is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        raise NotImplementedError(
            f"no SDTP patch for {type(model).__name__} (model_type={model_type!r}); supported: {', '.join(FAMILIES)}"
        )
    if isinstance(model, family.causal_lm):
        decoder: Any = model.model  # type: ignore[attr-defined]
        return family, model, decoder
    if not isinstance(model, family.decoder):
        raise NotImplementedError(
            f"{type(model).__name__} has a head that reads other tokens than the last, and would see a pruned "
            f"sequence; use {family.causal_lm.__name__}, or a {family.decoder.__name__} of its own"
        )
    owner = _owner_of(model)
    if owner is None:
        return family, model, model
    if isinstance(owner, family.causal_lm):
        return family, owner, model
    raise NotImplementedError(
        f"this {type(model).__name__} belongs to a {type(owner).__name__}, whose head reads other tokens than the last "
        f"and would see a pruned sequence; use {family.causal_lm.__name__}, or a {family.decoder.__name__} of its own"
    )


def _owner_of(decoder: Any) -> Any:
    """The model of transformers whose decoder this is. Modules do not know who holds them, so all are asked."""
    from transformers import PreTrainedModel

    models = (found for found in gc.get_objects() if issubclass(type(found), PreTrainedModel))
    return next((m for m in models if any(child is decoder for child in vars(m).get("_modules", {}).values())), None)


def _schedule(schedule: Any, pruners: Any, config: Any) -> PruningSchedule:
    """The schedule that was meant: itself, by a keep ratio, or the one that the pruners were trained for."""
    if isinstance(schedule, PruningSchedule):
        return schedule
    own = getattr(pruners, "schedule", None)
    if schedule is None and own is not None:
        return own  # type: ignore[no-any-return]
    if schedule is None:
        schedule = 0.9
    if isinstance(schedule, str) or not hasattr(schedule, "__float__"):
        raise TypeError(
            f"schedule: expected a PruningSchedule, or a keep ratio in (0, 1], got {schedule!r}; "
            f"PruningSchedule.every({config.num_hidden_layers}, keep_ratio=0.9) fits this model"
        )
    if hasattr(pruners, "keys"):
        return PruningSchedule(tuple(sorted(pruners.keys())), schedule)
    return PruningSchedule.every(config.num_hidden_layers, keep_ratio=schedule)


def _predictor(dropped_kv: str | None, kv_predictor: KVPredictor | None, pruners: Any) -> KVPredictor | None:
    """The maps for dropped tokens; None where these are dropped from memory as well."""
    if dropped_kv not in (None, "none", "predicted"):
        raise ValueError(f"dropped_kv={dropped_kv!r}: expected 'none', 'predicted', or None for what the pruners have")
    if dropped_kv == "none":
        return None
    found = getattr(pruners, "kv_predictor", None) if kv_predictor is None else kv_predictor
    if found is None and dropped_kv == "predicted":
        raise ValueError(
            "dropped_kv='predicted' needs a KVPredictor: pass kv_predictor=..., or pruners of a file that holds one"
        )
    return found
