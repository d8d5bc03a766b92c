"""The file that holds the pruners of one model.

A safetensors file with ``layers.<l>.{w1,b1,w2,b2}`` and one metadata entry ``sdtp``, a JSON header. Files with two
output logits (``w2 [2, H]``, ``b2 [2]``, the form of the paper) are folded on load into the one-logit form that the ops
take.

From version 2 on a file may also hold the model's KV predictor: its parameters as ``kv.<name>``, all of one dtype, and
its sizes in the header. From version 3 on pruners may have a lexical term, ``lexical_weight``; the header names it only
where they have one.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .kv_predictor import KVPredictor
from .pruner import TokenPruner, check_finite
from .schedule import PruningSchedule

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "sdtp-pruners"
FORMAT_VERSION = 3
"""The newest that is read. What is written says the oldest that has what the file holds."""

HUB_FILE = "pruners.safetensors"
"""What a repository of the Hugging Face hub names it."""

_REPOSITORY = re.compile(r"[\w.-]+/(?!.*\.safetensors$)[\w.-]+")
KV_DTYPES = ("float32", "bfloat16", "float16")


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
    lexical: bool = False
    pooling: int = 1
    averaging: bool = False
    schedule: dict[str, Any] | None = None
    """Arguments of the :class:`PruningSchedule` that the pruners are meant for; None where the file has none."""
    kv_predictor: dict[str, Any] | None = None
    """Arguments of the :class:`KVPredictor` besides `hidden_size`, and its dtype; None where the file has none."""


class PrunerStack(dict[int, TokenPruner]):
    """The pruners of one model by decoder layer, with what else is in the file they come from.

    Attributes
    ----------
    header : PrunerHeader
    kv_predictor : KVPredictor or None

    Examples
    --------
    >>> stack = PrunerStack({4: TokenPruner(64)}, PrunerHeader(64, [4], rms_norm=True, rms_eps=1e-6))
    >>> sorted(stack), stack.header.hidden_size, stack.schedule, stack.kv_predictor
    ([4], 64, None, None)
    """

    def __init__(
        self, pruners: Mapping[int, TokenPruner], header: PrunerHeader, kv_predictor: KVPredictor | None = None
    ) -> None:
        super().__init__(pruners)
        self.header, self.kv_predictor = header, kv_predictor

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
    kv_predictor: KVPredictor | None = None,
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
    kv_predictor : KVPredictor, optional
        Of the same model, stored in the dtype that it has. Taken from ``pruners.kv_predictor`` where that exists.

    Raises
    ------
    ValueError
        If the mapping is empty, a weight is NaN or infinite, the pruners disagree on size or normalisation, or the KV
        predictor has other sizes than they or more than one dtype.

    Examples
    --------
    >>> save_pruners({4: TokenPruner(64)}, path, schedule=PruningSchedule((4,), 0.8))
    >>> load_pruners(path).schedule.keep_ratio
    0.8
    """
    from safetensors.torch import save_file

    if not pruners:
        raise ValueError("no pruners to save: expected a mapping of decoder layer to TokenPruner")
    names = ("hidden_size", "rms_norm", "rms_eps", "distance", "attention", "lexical", "pooling", "averaging")
    shared = {tuple(getattr(pruner, name) for name in names) for pruner in pruners.values()}
    if len(shared) != 1:
        raise ValueError(f"pruners of one file share ({', '.join(names)}), got {sorted(shared)}")
    check_finite(pruners)
    known = getattr(pruners, "header", None)
    kv_predictor = kv_predictor if kv_predictor is not None else getattr(pruners, "kv_predictor", None)
    header = PrunerHeader(
        **dict(zip(names, shared.pop(), strict=True)),
        layers=sorted(pruners),
        model_type=config.model_type if config is not None else getattr(known, "model_type", None),
        num_hidden_layers=config.num_hidden_layers if config is not None else getattr(known, "num_hidden_layers", None),
        training=dict(training) if training is not None else getattr(known, "training", {}),
        schedule=asdict(schedule) if schedule is not None else getattr(known, "schedule", None),
        kv_predictor=_describe(kv_predictor) if kv_predictor is not None else None,
    )
    if kv_predictor is not None:
        _check_fit(kv_predictor, header)
    modules = {f"layers.{layer}": pruner for layer, pruner in pruners.items()}
    tensors = {
        f"{prefix}.{name}": parameter.detach().cpu().contiguous()
        for prefix, module in {**modules, **({"kv": kv_predictor} if kv_predictor is not None else {})}.items()
        for name, parameter in module.named_parameters()
    }
    absent = {name for name in ("schedule", "kv_predictor") if getattr(header, name) is None}
    absent |= set() if header.lexical else {"lexical"}
    facts = {name: value for name, value in asdict(header).items() if name not in absent}
    version = 3 if header.lexical else 1 if kv_predictor is None else 2
    metadata = {"sdtp": json.dumps({"format": FORMAT, "format_version": version, **facts})}
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        save_file(tensors, draft, metadata)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load_pruners(path: str | os.PathLike[str], *, revision: str | None = None) -> PrunerStack:
    """Read a pruner file, from the disk or from the Hugging Face hub.

    Parameters
    ----------
    path : path or str
        A file. Where there is none, ``"user/repository"`` means the file ``pruners.safetensors`` of that repository,
        which is downloaded once and cached.
    revision : str, optional
        Branch, tag or commit of the repository; by default its main branch.

    Returns
    -------
    PrunerStack
        Mapping of decoder layer to :class:`TokenPruner` (float32, on the CPU), with the file's header and KV predictor
        (in the dtype of the file).

    Raises
    ------
    FileNotFoundError
        If there is no such file, and the hub has none either.
    ImportError
        If it would have to come from the hub, and huggingface_hub is not installed.
    ValueError
        If it is no pruner file, truncated, of a later format version, incomplete, or holds NaN or infinite weights; or
        if a revision is asked for of a file on the disk.

    Examples
    --------
    >>> save_pruners({4: TokenPruner(64), 7: TokenPruner(64)}, path)
    >>> sorted(load_pruners(path))
    [4, 7]
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).exists() or not (isinstance(path, str) and _REPOSITORY.fullmatch(path)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such pruner file")
        if revision is not None:
            raise ValueError(f"{path}: revision={revision!r} is of a repository on the hub, and this is a file")
    else:
        path = _from_hub(path, revision)
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
            lexical=header.lexical,
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
    kv_predictor = _take_kv_predictor(path, header, tensors)
    if tensors:
        raise ValueError(f"{path}: tensors that the header does not list: {', '.join(sorted(tensors))}")
    check_finite(pruners)
    return PrunerStack(pruners, header, kv_predictor)


def _from_hub(repository: str, revision: str | None) -> str:
    """The file of a repository, downloaded where it is not cached yet."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{repository}: there is no such file, and loading from the hub needs huggingface_hub: pip install "
            "'sdtp-kernels[models]'"
        ) from error
    try:
        return hf_hub_download(repository, HUB_FILE, revision=revision)  # type: ignore[no-any-return]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{repository}: there is no such file, and no {HUB_FILE} of a repository of this name on the hub or in its "
            f"cache ({str(error).splitlines()[0]})"
        ) from error


def _describe(predictor: KVPredictor) -> dict[str, Any]:
    """The header's entry."""
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in predictor.parameters()})
    if len(dtypes) > 1 or dtypes[0] not in KV_DTYPES:
        raise ValueError(f"KV predictor: weights in {', '.join(dtypes)}, expected all in one of {', '.join(KV_DTYPES)}")
    predictor.check_finite()
    names = ("num_key_value_heads", "head_dim", "num_hidden_layers", "stages", "rank", "rms_eps")
    return {**{name: getattr(predictor, name) for name in names}, "dtype": dtypes[0]}


def _check_fit(predictor: KVPredictor, header: PrunerHeader) -> None:
    for name in ("hidden_size", "num_hidden_layers"):
        ours, theirs = getattr(predictor, name), getattr(header, name)
        if theirs is not None and ours != theirs:
            raise ValueError(
                f"the KV predictor was made for {name}={ours}, the pruners for {theirs}: one file holds those of one "
                "model"
            )


def _take_kv_predictor(
    path: str | os.PathLike[str], header: PrunerHeader, tensors: dict[str, torch.Tensor]
) -> KVPredictor | None:
    """The KV predictor that the header describes, its tensors removed from `tensors`."""
    if header.kv_predictor is None:
        return None
    try:
        sizes = dict(header.kv_predictor)
        dtype = sizes.pop("dtype")
        if dtype not in KV_DTYPES:
            raise ValueError(f"dtype {dtype!r}, expected one of {', '.join(KV_DTYPES)}")
        with torch.device("meta"):
            predictor = KVPredictor(header.hidden_size, **sizes)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: malformed header (kv_predictor: {error})") from None
    try:
        _check_fit(predictor, header)
        state = {}
        for name, wanted in predictor.state_dict().items():
            if f"kv.{name}" not in tensors:
                raise ValueError(f"the header describes a KV predictor, but kv.{name} is missing")
            state[name] = tensor = tensors.pop(f"kv.{name}")
            if (tensor.shape, tensor.dtype) != (wanted.shape, getattr(torch, dtype)):
                raise ValueError(
                    f"kv.{name} is {tensor.dtype} {list(tensor.shape)}, expected torch.{dtype} {list(wanted.shape)} by "
                    "the header"
                )
        predictor.load_state_dict(state, assign=True)
        predictor.check_finite()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return predictor


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
