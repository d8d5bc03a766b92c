"""The KV predictor by ridge regression: statistics of dense passes, and the maps that follow from them.

Stage 1 adds up, for each stage, X'X and X'Y over the tokens of all prompts. X are RMS-normalised hidden states at the
stage's input and a constant 1, Y the keys (before rotation) and values of every layer from the stage on. The size of
these sums follows from the model, not from the number of prompts. Held-out prompts have sums of their own, from which
R^2 is computed without their tokens.

``kv-statistics-<process>.safetensors`` holds the sums of one process and the shards that it has counted; it is written
after every shard. ``kv-statistics.safetensors`` takes their place once all shards are counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from sdtp_kernels import KVPredictor
from sdtp_kernels.models.family import family_of
from sdtp_train import shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sdtp_train.targets import DensePass

FORMAT, FORMAT_VERSION = "sdtp-kv-statistics", 1
FILE = "kv-statistics.safetensors"
PARTS = ("training", "validation")
SINK = 4  # a prompt's first tokens: their keys and values are outliers, and no stage drops them
RMS_EPS = 1e-6
RIDGE = 1e-3  # of the mean diagonal of X'X
ENOUGH_TOKENS = 100  # per feature; with 7 to 20 the maps of a wide model were much worse, see docs/training.md


class Sums(NamedTuple):
    """Sums over the tokens of one part of the prompts, seen from one stage; all float64.

    The outputs are the keys, then the values of the stage's own layer, then those of the next one, and so on:
    ``[kv_heads * head_dim]`` each, one head after another.
    """

    xx: torch.Tensor
    """X'X ``[D + 1, D + 1]``; its last row is the constant feature's: the sums of X and the number of tokens."""
    xy: torch.Tensor
    """X'Y ``[D + 1, outputs]``"""
    yy: torch.Tensor
    """Diagonal of Y'Y ``[outputs]``"""

    @property
    def num_tokens(self) -> float:
        return self.xx[-1, -1].item()

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the features ``[D]`` and of the outputs ``[outputs]``."""
        n = self.xx[-1, -1]
        return self.xx[-1, :-1] / n, self.xy[-1] / n


class Statistics:
    """The sums of all stages, float64: X'X and X'Y of each stage, the diagonal of Y'Y of all layers from the first on.

    Parameters
    ----------
    config : transformers config
    stages : sequence of int
        Ascending.
    device : torch.device
    """

    def __init__(self, config: Any, stages: Sequence[int], device: torch.device) -> None:
        self.stages, self.config = list(stages), config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.width = 2 * config.num_key_value_heads * self.head_dim
        """Outputs of a layer: its keys and values."""
        num_features, outputs = config.hidden_size + 1, self._num_outputs(self.stages[0])
        shapes: dict[str, tuple[int, ...]] = {"yy": (outputs,)}
        for stage in self.stages:
            shapes[f"xx.{stage}"] = (num_features, num_features)
            shapes[f"xy.{stage}"] = (num_features, self._num_outputs(stage))
        self.tensors = {
            f"{part}.{name}": torch.zeros(shape, dtype=torch.float64, device=device)
            for part in PARTS
            for name, shape in shapes.items()
        }

    def _num_outputs(self, stage: int) -> int:
        return int((self.config.num_hidden_layers - stage) * self.width)

    @torch.no_grad()
    def add(self, dense: DensePass, is_validation: bool) -> None:
        """Count the tokens of one sample, all but the first four.

        Raises
        ------
        ValueError
            If a key or value is NaN or infinite.
        """
        part, first = PARTS[is_validation], self.stages[0]
        layers = zip(dense.decoder.layers[first:], dense.layer_inputs[first:], strict=True)
        y = torch.cat([keys_and_values(layer, inputs)[SINK:].double() for layer, inputs in layers], -1)
        if not torch.isfinite(y).all():
            raise ValueError("a key or value is NaN or infinite")
        self.tensors[f"{part}.yy"] += y.square().sum(0)
        for stage in self.stages:
            x = features(dense.layer_inputs[stage][0, SINK:])
            self.tensors[f"{part}.xx.{stage}"].addmm_(x.T, x)
            self.tensors[f"{part}.xy.{stage}"].addmm_(x.T, y[:, -self._num_outputs(stage) :])

    def sums(self, part: str, stage: int, device: torch.device) -> Sums:
        """What the regression of one stage needs."""
        yy = self.tensors[f"{part}.yy"][-self._num_outputs(stage) :]
        xx, xy = (self.tensors[f"{part}.{name}.{stage}"] for name in ("xx", "xy"))
        return Sums(xx.to(device), xy.to(device), yy.to(device))


def features(hidden_states: torch.Tensor) -> torch.Tensor:
    """RMS-normalised hidden states ``[n, D]`` and a constant 1: ``[n, D + 1]``, float64."""
    x = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=RMS_EPS)
    return F.pad(x.double(), (0, 1), value=1.0)


def keys_and_values(layer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Keys before rotation, then values ``[n, 2 * kv_heads * head_dim]`` of a layer with the input ``[1, n, D]``."""
    family = family_of(layer)
    both = family.keys(layer, hidden_states), family.values(layer, hidden_states)
    return torch.cat([x[0].transpose(0, 1).flatten(1) for x in both], -1)


# ------------------------------------------------------------------------------------------------------------ files


class Recorder:
    """The statistics of one process, kept on disk so that a killed run goes on with them.

    Parameters
    ----------
    folder : Path
        Of the saliency.
    run : str
        :func:`shards.run_id` of the manifest.
    process : int
    statistics : Statistics
        All zero.

    Attributes
    ----------
    counted : set of int
        Shards that are in the statistics of this process or of another one.

    Raises
    ------
    SaliencyError
        If a file of the folder is damaged or of another run.
    """

    def __init__(self, folder: Path, run: str, process: int, statistics: Statistics) -> None:
        self.path, self.run, self.statistics = _path_of(folder, process), run, statistics
        self.own: list[int] = []
        if self.path.exists():
            tensors, self.own = _read(self.path, run)
            for name, tensor in statistics.tensors.items():
                tensor.copy_(tensors[name])
        self.counted = {i for path in _files(folder) for i in _header(path, run)["shards"]}

    def save(self, shard: int) -> None:
        """Keep the statistics, which now have all samples of one more shard."""
        self.own.append(shard)
        _write(self.path, self.run, self.statistics.tensors, self.own)


def finish(folder: Path, run: str, num_shards: int) -> None:
    """Add up the statistics of all processes.

    Raises
    ------
    SaliencyError
        If a file is damaged, or the processes did not count every shard once.
    """
    if not (folder / FILE).exists():
        total: dict[str, torch.Tensor] = {}
        counted: list[int] = []
        for path in _files(folder):
            tensors, own = _read(path, run)
            total = {name: tensor + total[name] if total else tensor for name, tensor in tensors.items()}
            counted += own
        if sorted(counted) != list(range(num_shards)):
            raise shards.SaliencyError(
                f"{folder}: the KV statistics are of shards {sorted(counted)}, expected each of {num_shards} once: "
                f"remove {FILE.replace('.', '-*.')} and run 'sdtp saliency --kv-statistics' again"
            )
        _write(folder / FILE, run, total, sorted(counted))
    for path in _files(folder):
        if path.name != FILE:
            path.unlink()


def load_statistics(saliency: shards.Saliency, config: Any) -> Statistics:
    """The finished statistics, on the CPU.

    Raises
    ------
    SaliencyError
        If there are none, or they are damaged or of another run.
    """
    path = saliency.folder / FILE
    if not path.exists():
        raise shards.SaliencyError(
            f"{saliency.folder} has no finished KV statistics: run 'sdtp saliency --kv-statistics' with the same "
            "settings, it adds them"
        )
    statistics = Statistics(config, saliency.layers, torch.device("meta"))
    tensors, _ = _read(path, shards.run_id(saliency.settings, saliency.samples))
    statistics.tensors = {name: tensors[name] for name in statistics.tensors}
    return statistics


def _path_of(folder: Path, process: int) -> Path:
    return folder / FILE.replace(".", f"-{process}.")


def _files(folder: Path) -> list[Path]:
    """The finished statistics, or those of the processes."""
    return sorted(folder.glob(FILE.replace(".", "*.")))


def _write(path: Path, run: str, tensors: dict[str, torch.Tensor], counted: Sequence[int]) -> None:
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "run": run, "shards": counted}
    shards.write_tensors(path, tensors, header)


def _read(path: Path, run: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    header = _header(path, run)
    return shards.read_tensors(path), header["shards"]


def _header(path: Path, run: str) -> dict[str, Any]:
    header = shards.read_header(path)
    found = header.get("format"), header.get("format_version")
    if found != (FORMAT, FORMAT_VERSION):
        raise shards.SaliencyError(
            f"{path}: format {found[0]!r} version {found[1]}; this version of sdtp-kernels reads {FORMAT!r} version "
            f"{FORMAT_VERSION}"
        )
    if header["run"] != run:
        raise shards.SaliencyError(f"{path} belongs to another run: remove it to have it computed again")
    return header


# ---------------------------------------------------------------------------------------------------------- solving


def make_predictor(
    statistics: Statistics, rank: int | None, device: torch.device
) -> tuple[KVPredictor, dict[str, Any]]:
    """The predictor as it is stored, in bfloat16, and what a pruner file says of its making."""
    predictor = solve(statistics, rank, device).bfloat16()
    tokens = {part: int(statistics.sums(part, statistics.stages[0], device).num_tokens) for part in PARTS}
    return predictor, {
        "ridge": RIDGE,
        "tokens": tokens,
        "tokens_per_feature": round(tokens["training"] / statistics.config.hidden_size, 1),
        "r_squared": r_squared(predictor, statistics, device),
    }


class _ByRow(torch.nn.Module):
    """A weight in units of the root mean square of its rows."""

    unit: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("unit", weight.detach().square().mean(1, keepdim=True).sqrt().clamp(min=1e-12))

    def forward(self, relative: torch.Tensor) -> torch.Tensor:
        return self.unit * relative

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / self.unit


def open_maps(predictor: KVPredictor) -> dict[str, torch.Tensor]:
    """What of the maps may be trained end to end, by name: their weights, and not their biases.

    Each is in units of the root mean square of its row, so that one learning rate suits keys and values of every size.
    """
    for module in list(predictor.modules()):
        if isinstance(module, torch.nn.Linear):
            parametrize.register_parametrization(module, "weight", _ByRow(module.weight))
    weights: dict[str, torch.Tensor] = {
        name: p for name, p in predictor.named_parameters() if name.endswith(".original")
    }
    for p in weights.values():
        p.requires_grad_()
    return weights


def close_maps(predictor: KVPredictor) -> None:
    """Make ordinary weights of what :func:`open_maps` opened."""
    for module in predictor.modules():
        if isinstance(module, torch.nn.Linear):
            parametrize.remove_parametrizations(module, "weight")
            module.requires_grad_(False)


def summary(predictor: KVPredictor, facts: Mapping[str, Any]) -> str:
    """A table for humans: held-out R^2 of each stage's first layer, of its last, and the mean over its layers."""
    lines = [
        f"KV predictor: rank {predictor.rank or 'full'}, {predictor.num_bytes / 1e6:.1f} MB, "
        f"{facts['tokens_per_feature']:g} tokens per feature",
        f"held-out R^2, keys / values  {'first layer':>13}{'mean':>13}{'last layer':>13}",
    ]
    if facts["tokens_per_feature"] < ENOUGH_TOKENS:
        lines[0] += f"; {ENOUGH_TOKENS} or more are better: 'sdtp saliency' with more --samples"
    for stage, found in facts["r_squared"].items():
        keys, values = ((r2[0], sum(r2) / len(r2), r2[-1]) for r2 in (found["keys"], found["values"]))
        figures = [f"{key:7.2f} /{value:5.2f}" for key, value in zip(keys, values, strict=True)]
        lines.append(f"stage {stage:<22}" + "".join(figures))
    return "\n".join(lines)


def parse_rank(word: str, hidden_size: int) -> int | None:
    """The rank that ``--kv-rank`` asks for; None for full matrices."""
    if word == "full":
        return None
    if not word.isdecimal() or not 1 <= int(word) <= hidden_size:
        raise ValueError(f"--kv-rank {word}: expected 'full', or a width from 1 to the hidden size, {hidden_size}")
    return int(word)


def solve(statistics: Statistics, rank: int | None, device: torch.device) -> KVPredictor:
    """The maps with the least squared error on the training prompts, under a ridge penalty on all but the bias.

    Parameters
    ----------
    statistics : Statistics
    rank : int, optional
        Width of the bottleneck that the maps of a stage share; full matrices by default. Reduced-rank regression: every
        output counts in units of its standard deviation.
    device : torch.device
        Where to compute, one stage at a time.

    Returns
    -------
    KVPredictor, float32, on the CPU
    """
    config, width = statistics.config, statistics.width
    with torch.device("meta"):
        predictor = KVPredictor(
            config.hidden_size,
            config.num_key_value_heads,
            statistics.head_dim,
            num_hidden_layers=config.num_hidden_layers,
            stages=statistics.stages,
            rank=rank,
            rms_eps=RMS_EPS,
        )
    state = {}
    for stage in statistics.stages:
        down, up, bias = regress(statistics.sums("training", stage, device), rank)
        if down is not None:
            state[f"down.{stage}.weight"] = down
        for layer, weight, offset in zip(
            range(stage, config.num_hidden_layers), up.split(width), bias.split(width), strict=True
        ):
            state |= {f"up.{stage}:{layer}.weight": weight, f"up.{stage}:{layer}.bias": offset}
    predictor.load_state_dict({name: tensor.float().cpu() for name, tensor in state.items()}, assign=True)
    return predictor.requires_grad_(False)


def regress(sums: Sums, rank: int | None) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Reduced-rank ridge regression of one stage, from its sums.

    With L the Cholesky factor of the centred, penalised X'X and S the outputs' 1 / standard deviation, the error that a
    map W adds to the least one is ``|L'(W - W*) S|^2``. So the best bottleneck is spanned by the first left singular
    vectors of ``A = L'W* S``, which are eigenvectors of ``AA' [D, D]``.

    Returns
    -------
    down : Tensor [rank, D] or None
        None for full matrices.
    up : Tensor [outputs, rank] or [outputs, D]
    bias : Tensor [outputs]
    """
    n = sums.num_tokens
    mean_x, mean_y = sums.means()
    xx = sums.xx[:-1, :-1]
    penalty = RIDGE * xx.diagonal().mean()
    centred = xx - n * mean_x.outer(mean_x)
    factor = torch.linalg.cholesky(centred + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device))
    a = torch.linalg.solve_triangular(factor, sums.xy[:-1] - n * mean_x.outer(mean_y), upper=False)
    if rank is None:
        up = torch.linalg.solve_triangular(factor.T, a, upper=True).T
        return None, up, mean_y - up @ mean_x
    # An output that is constant but for rounding has no say.
    scale = (sums.yy / n - mean_y.square()).clamp(min=1e-12 * sums.yy / n + 1e-30).rsqrt()
    scaled = a * scale
    basis = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
    down = torch.linalg.solve_triangular(factor.T, basis, upper=True).T
    up = a.T @ basis
    return down, up, mean_y - up @ (down @ mean_x)


def r_squared(
    predictor: KVPredictor, statistics: Statistics, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """How much of the variance of held-out keys and values the maps explain: 1 is all of it, 0 is what the mean does.

    Returns
    -------
    dict
        By stage, ``keys`` and ``values``: a figure for each layer from the stage on, over all heads.
    """
    state, num_layers = predictor.state_dict(), statistics.config.num_hidden_layers
    found = {}
    for stage in statistics.stages:
        sums = statistics.sums("validation", stage, device)
        weight, bias = (
            torch.cat([state[f"up.{stage}:{layer}.{name}"] for layer in range(stage, num_layers)]).to(sums.xx)
            for name in ("weight", "bias")
        )
        if predictor.rank is not None:
            weight = weight @ state[f"down.{stage}.weight"].to(sums.xx)
        w = torch.cat([weight, bias.unsqueeze(1)], 1).T
        error = sums.yy - 2 * (w * sums.xy).sum(0) + (w * (sums.xx @ w)).sum(0)
        variance = sums.yy - sums.num_tokens * sums.means()[1].square()
        # [layers, keys and values]
        error, variance = (x.view(num_layers - stage, 2, -1).sum(-1) for x in (error, variance))
        share = 1 - error / variance
        found[str(stage)] = {"keys": share[:, 0].tolist(), "values": share[:, 1].tolist()}
    return found
