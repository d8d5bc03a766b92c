"""The directory between the stages: shards of hidden states and targets, and a manifest that says what they are.

``manifest.json`` holds the settings and the list of samples from the beginning, and the checksums of the shards once
all are there. ``shard-<i>.safetensors`` holds the samples of one slice of that list, their tokens after one another:

* ``token_ids`` int64: context and continuation of each sample;
* ``hidden_states.<layer>`` ``[tokens of the contexts, D]``: the input of the stage;
* ``attention.<layer>`` float32: last-window attention, what a query-aware pruner is given at run time;
* ``target.<name>.<layer>`` float32.

A shard takes its name only when it is whole, and carries a hash of its content, so a run that was killed goes on where
it stopped. Nothing of a directory is ever overwritten but the draft of an unfinished shard.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT, FORMAT_VERSION = "sdtp-saliency", 1
MANIFEST = "manifest.json"


class SaliencyError(ValueError):
    """A directory of saliency cannot be used; the message says why and what to do."""


class SampleInfo(NamedTuple):
    """What the manifest says of a sample."""

    id: str
    kind: str
    source: str
    is_validation: bool
    num_context: int
    num_continuation: int


class Marked(NamedTuple):
    """One sample with what stage 1 found."""

    info: SampleInfo
    token_ids: torch.Tensor
    """int64 ``[num_context + num_continuation]``"""
    hidden_states: torch.Tensor
    """``[stages, n, D]``"""
    attention: torch.Tensor
    """float32 ``[stages, n]``"""
    targets: torch.Tensor
    """float32 ``[targets, stages, n]``"""


# -------------------------------------------------------------------------------------------------------- writing


def begin(folder: Path, settings: Mapping[str, Any], samples: Sequence[SampleInfo]) -> None:
    """Make the directory and its manifest, or see that it was made with the same settings.

    Raises
    ------
    SaliencyError
        If the directory holds other things, or saliency of other settings, another model or other samples.
    """
    manifest = folder / MANIFEST
    new = json.loads(json.dumps({"settings": settings, "samples": samples}))
    if manifest.is_file():
        old = _read_manifest(folder)
        differences = [
            f"{name}: {_short(old['settings'].get(name))} there, {_short(new['settings'].get(name))} asked for"
            for name in sorted({*old["settings"], *new["settings"]})
            if old["settings"].get(name) != new["settings"].get(name)
        ]
        if not differences and old["samples"] != new["samples"]:
            differences = ["the samples are others: the data, the tokenizer or the Python version changed"]
        if differences:
            raise SaliencyError(
                f"{folder} holds saliency of another run ({'; '.join(differences)}): repeat its settings to go on with "
                "it, or name another directory"
            )
        return
    # A run killed this early leaves a draft of the manifest.
    if folder.exists() and not (folder.is_dir() and all(path == _draft_of(manifest) for path in folder.iterdir())):
        raise SaliencyError(f"{folder} exists and has no {MANIFEST}: name a new or empty directory")
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, {**new, "shards": None})


def finish(folder: Path, num_shards: int) -> None:
    """Write the checksums of all shards into the manifest, once they are there."""
    manifest = _read_manifest(folder)
    shards = {shard_path(folder, i).name: _sha256(shard_path(folder, i)) for i in range(num_shards)}
    if manifest["shards"] not in (None, shards):
        changed = [name for name, digest in shards.items() if manifest["shards"].get(name) != digest]
        raise SaliencyError(f"{folder}: {', '.join(changed)} changed since the run was finished; see {MANIFEST}")
    _write_manifest(folder, {**manifest, "shards": shards})


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def write_shard(
    folder: Path, index: int, tensors: Mapping[str, torch.Tensor], samples: Sequence[SampleInfo], run: str
) -> None:
    """Write a shard whole or not at all; the same content gives the same bytes.

    Parameters
    ----------
    run : str
        :func:`run_id` of the manifest, so that a shard of another run is recognised.
    """
    write_tensors(shard_path(folder, index), tensors, {"format": FORMAT, "run": run, "samples": samples})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file whole or not at all, with a hash of its content in the header."""
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    # One entry: safetensors writes several in random order.
    metadata = {"sdtp": json.dumps({**header, "content": _content_hash(content)})}
    draft = _draft_of(path)  # a killed run leaves at most this one, and the next one replaces it
    save_file(content, draft, metadata)
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


def is_done(folder: Path, index: int, samples: Sequence[SampleInfo], run: str) -> bool:
    """Whether a shard is there already; one that is there but wrong is refused.

    Raises
    ------
    SaliencyError
        If it is damaged, of another run, or holds other samples.
    """
    path = shard_path(folder, index)
    if not path.exists():
        return False
    header = read_header(path)
    if header.get("run") != run:
        raise SaliencyError(f"{path} belongs to another run: remove it to have it computed again")
    _check_samples(path, header, samples)
    read_tensors(path)
    return True


def run_id(settings: Mapping[str, Any], samples: Sequence[SampleInfo]) -> str:
    """Hash of everything that decides the content of the shards."""
    return hashlib.sha256(json.dumps([settings, samples], sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- reading


class Saliency:
    """A finished directory of saliency, checked when it is opened and read sample by sample.

    Parameters
    ----------
    folder : path

    Attributes
    ----------
    settings : dict
    samples : list of SampleInfo

    Raises
    ------
    SaliencyError
        If the directory is unfinished, a shard is missing or damaged, or a sample is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.settings: dict[str, Any] = manifest["settings"]
        self.samples = [SampleInfo(*fields) for fields in manifest["samples"]]
        self.layers: list[int] = self.settings["layers"]
        if manifest["shards"] is None:
            raise SaliencyError(
                f"{self.folder} is unfinished: run 'sdtp saliency' again with the same settings; it goes on from there"
            )
        size = self.settings["shard_size"]
        slices = [self.samples[i : i + size] for i in range(0, len(self.samples), size)]
        if len(slices) != len(manifest["shards"]):
            raise SaliencyError(
                f"{self.folder}: {len(self.samples)} samples need {len(slices)} shards, {MANIFEST} lists "
                f"{len(manifest['shards'])}: compute it again in another directory"
            )
        self._places: list[tuple[Path, int, int]] = []
        """Shard, first context token and first token of each sample."""
        for (name, digest), expected in zip(manifest["shards"].items(), slices, strict=True):
            path = self.folder / name
            if not path.is_file():
                raise SaliencyError(f"{path} is missing: run 'sdtp saliency' with the same settings to have it again")
            if _sha256(path) != digest:
                raise SaliencyError(
                    f"{path} is damaged (its SHA-256 is not that of {MANIFEST}): remove it and run 'sdtp saliency' "
                    "with the same settings"
                )
            _check_samples(path, read_header(path), expected)
            contexts = itertools.accumulate((s.num_context for s in expected), initial=0)
            tokens = itertools.accumulate((s.num_context + s.num_continuation for s in expected), initial=0)
            self._places += [(path, a, b) for a, b, _ in zip(contexts, tokens, expected, strict=False)]

    def load(self, index: int, targets: Sequence[str]) -> Marked:
        """Read one sample, with these of its targets."""
        from safetensors import safe_open

        info = self.samples[index]
        path, context, token = self._places[index]
        rows = slice(context, context + info.num_context)
        with safe_open(path, framework="pt") as file:

            def stack(name: str) -> torch.Tensor:
                return torch.stack([file.get_slice(name.format(layer))[rows] for layer in self.layers])

            token_ids = file.get_slice("token_ids")[token : token + info.num_context + info.num_continuation]
            found = torch.stack([stack(f"target.{target}.{{}}") for target in targets])
            return Marked(info, token_ids, stack("hidden_states.{}"), stack("attention.{}"), found)


# ------------------------------------------------------------------------------------------------------- helpers


def join_samples(found: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of several samples after one another."""
    joined = defaultdict(list)
    for tensors in found:
        for name, tensor in tensors.items():
            joined[name].append(tensor)
    return {name: torch.cat(parts) for name, parts in joined.items()}


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest.pop("format"), manifest.pop("format_version")
        complete = {"settings", "samples", "shards"} <= set(manifest)
    except OSError as error:
        raise SaliencyError(f"{path}: cannot be read ({error.strerror}); 'sdtp saliency' makes it") from None
    except (ValueError, KeyError, AttributeError):
        raise SaliencyError(f"{path}: no manifest of saliency, or a damaged one") from None
    if found != (FORMAT, FORMAT_VERSION) or not complete:
        raise SaliencyError(
            f"{path}: format {found[0]!r} version {found[1]}; this version of sdtp-kernels reads {FORMAT!r} version "
            f"{FORMAT_VERSION}"
        )
    return dict(manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
    write_text(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = _draft_of(path)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What :func:`write_tensors` wrote, checked against the hash.

    Raises
    ------
    SaliencyError
        If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise SaliencyError(f"{path} is damaged ({error}): remove it to have it computed again") from None
    if header["content"] != _content_hash(tensors):
        raise SaliencyError(f"{path} is damaged (its content hash differs): remove it to have it computed again")
    return tensors


def read_header(path: Path) -> dict[str, Any]:
    """The header of such a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})["sdtp"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise SaliencyError(f"{path} is damaged, or no shard ({error}): remove it to have it computed again") from None


def _check_samples(path: Path, header: Mapping[str, Any], expected: Sequence[SampleInfo]) -> None:
    found = [SampleInfo(*fields) for fields in header.get("samples", ())]
    if found == list(expected):
        return
    missing = [sample.id for sample in expected if sample not in found]
    raise SaliencyError(
        f"{path} holds other samples than {MANIFEST} lists (missing: {', '.join(missing) or 'none, the order differs'})"
        ": remove it and run 'sdtp saliency' with the same settings"
    )


def _content_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
