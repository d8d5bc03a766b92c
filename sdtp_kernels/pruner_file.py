"""The file that holds the pruners of one model.

A safetensors file with ``layers.<l>.{w1,b1,w2,b2}`` and one metadata entry ``sdtp``, a JSON header. Files with two
output logits (``w2 [2, H]``, ``b2 [2]``, the form of the paper) are folded on load into the one-logit form that the ops
take.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .pruner import TokenPruner, check_finite
from .schedule import PruningSchedule

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "sdtp-pruners"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class PrunerHeader:
    """What a pruner file says of itself.

    `model_type`, `hidden_size` and `num_hidden_layers` are those of the model the pruners were trained for; `training`
    holds free facts (data, target, metrics).
    """

    hidden_size: int
    layers: list[int]
    rms_norm: bool
    rms_eps: float
    model_type: str | None = None
    num_hidden_layers: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    distance: bool = False
    attention: bool = False
    pooling: int = 1
    averaging: bool = False
    schedule: dict[str, Any] | None = None
    """Arguments of the :class:`PruningSchedule` that the pruners are meant for; None where the file has none."""


class PrunerStack(dict[int, TokenPruner]):
    """The pruners of one model by decoder layer, with the header of the file they come from.

    Examples
    --------
    >>> stack = PrunerStack({4: TokenPruner(64)}, PrunerHeader(64, [4], rms_norm=True, rms_eps=1e-6))
    >>> sorted(stack), stack.header.hidden_size, stack.schedule
    ([4], 64, None)
    """

    def __init__(self, pruners: Mapping[int, TokenPruner], header: PrunerHeader) -> None:
        super().__init__(pruners)
        self.header = header

    @property
    def schedule(self) -> PruningSchedule | None:
        """What ``apply_sdtp(model, pruners)`` takes by default; None where the file has none."""
        return None if self.header.schedule is None else PruningSchedule(**self.header.schedule)


def save_pruners(
    pruners: Mapping[int, TokenPruner],
    path: str | os.PathLike[str],
    *,
    config: Any = None,
    training: Mapping[str, Any] | None = None,
    schedule: PruningSchedule | None = None,
) -> None:
    """Write the pruners of one model to one file.

    Parameters
    ----------
    pruners : mapping of int to TokenPruner
        By decoder layer.
    path : path
        Written whole or not at all.
    config : transformers config, optional
        Of the model they belong to; loading then checks that they fit. Taken from ``pruners.header`` where that exists.
    training : mapping, optional
        Facts of the training, JSON-serialisable.
    schedule : PruningSchedule, optional
        What the pruners are meant for: the default of ``apply_sdtp(model, load_pruners(path))``.

    Raises
    ------
    ValueError
        If the mapping is empty, a weight is NaN or infinite, or the pruners disagree on size or normalisation.

    Examples
    --------
    >>> save_pruners({4: TokenPruner(64)}, path, schedule=PruningSchedule((4,), 0.8))
    >>> load_pruners(path).schedule.keep_ratio
    0.8
    """
    from safetensors.torch import save_file

    if not pruners:
        raise ValueError("no pruners to save: expected a mapping of decoder layer to TokenPruner")
    names = ("hidden_size", "rms_norm", "rms_eps", "distance", "attention", "pooling", "averaging")
    shared = {tuple(getattr(pruner, name) for name in names) for pruner in pruners.values()}
    if len(shared) != 1:
        raise ValueError(f"pruners of one file share ({', '.join(names)}), got {sorted(shared)}")
    check_finite(pruners)
    known = getattr(pruners, "header", None)
    header = PrunerHeader(
        **dict(zip(names, shared.pop(), strict=True)),
        layers=sorted(pruners),
        model_type=config.model_type if config is not None else getattr(known, "model_type", None),
        num_hidden_layers=config.num_hidden_layers if config is not None else getattr(known, "num_hidden_layers", None),
        training=dict(training) if training is not None else getattr(known, "training", {}),
        schedule=asdict(schedule) if schedule is not None else getattr(known, "schedule", None),
    )
    tensors = {
        f"layers.{layer}.{name}": parameter.detach().cpu().contiguous()
        for layer, pruner in pruners.items()
        for name, parameter in pruner.named_parameters()
    }
    facts = {name: value for name, value in asdict(header).items() if (name, value) != ("schedule", None)}
    metadata = {"sdtp": json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **facts})}
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        save_file(tensors, draft, metadata)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_pruners(path: str | os.PathLike[str]) -> PrunerStack:
    """Read a pruner file.

    Returns
    -------
    PrunerStack
        Mapping of decoder layer to :class:`TokenPruner` (float32, on the CPU), with the file's header.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no pruner file, truncated, of a later format version, incomplete, or holds NaN or infinite weights.

    Examples
    --------
    >>> save_pruners({4: TokenPruner(64), 7: TokenPruner(64)}, path)
    >>> sorted(load_pruners(path))
    [4, 7]
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such pruner file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}); it may be truncated or of another kind"
        ) from None
    header = _parse_header(path, metadata)

    pruners = {}
    for layer in header.layers:
        prefix = f"layers.{layer}."
        pruner = TokenPruner(
            header.hidden_size,
            tensors.get(f"{prefix}b1", torch.empty(0)).numel(),
            rms_norm=header.rms_norm,
            rms_eps=header.rms_eps,
            distance=header.distance,
            attention=header.attention,
            pooling=header.pooling,
            averaging=header.averaging,
        )
        wanted = pruner.state_dict()
        missing = sorted(prefix + name for name in wanted if prefix + name not in tensors)
        if missing:
            raise ValueError(f"{path}: the header lists layer {layer}, but {', '.join(missing)} is missing")
        state = {name: tensors.pop(prefix + name) for name in wanted}
        if state["w2"].dim() == 2 and state["w2"].shape[0] == 2:
            # Keep logit minus drop logit: the same order, half the work.
            state["w2"], state["b2"] = (state[name][0] - state[name][1] for name in ("w2", "b2"))
        for name, tensor in state.items():
            if tensor.shape != wanted[name].shape:
                raise ValueError(
                    f"{path}: layer {layer} has {name} {list(tensor.shape)}, expected {list(wanted[name].shape)} "
                    "(or two rows in w2 and b2) by its b1 and the header"
                )
        pruner.load_state_dict(state)
        pruners[layer] = pruner
    if tensors:
        raise ValueError(f"{path}: tensors that the header does not list: {', '.join(sorted(tensors))}")
    check_finite(pruners)
    return PrunerStack(pruners, header)


def _parse_header(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> PrunerHeader:
    try:
        header = json.loads(metadata["sdtp"])
        found = header.pop("format"), header.pop("format_version")
    except (KeyError, ValueError, AttributeError):
        raise ValueError(f"{path}: a safetensors file without the '{FORMAT}' header; save_pruners writes it") from None
    if found[0] != FORMAT or found[1] > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format {found[0]!r} version {found[1]}; this version of sdtp-kernels reads {FORMAT!r} up to "
            f"version {FORMAT_VERSION}"
        )
    try:
        return PrunerHeader(**header)
    except TypeError as error:
        raise ValueError(f"{path}: malformed header ({error})") from None
