"""Keys and values of dropped tokens, predicted from the hidden states that they were dropped with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .schedule import PruningSchedule


class KVPredictor(nn.Module):
    """Linear maps from a dropped token's hidden state to its keys and values in all layers that it never reaches.

    A token that stage `s` drops, before layer `s` runs, is computed no further. Layer ``l >= s`` still gets a key and a
    value for it: ``W[s, l] x + b[s, l]``, where `x` is the hidden state divided by its root mean square. Keys are those
    before rotation, after the family's ``k_norm`` where it has one.

    Parameters
    ----------
    hidden_size, num_key_value_heads, head_dim, num_hidden_layers : int
        Those of the model.
    stages : sequence of int
        The layers that have a stage before them, ascending.
    rank : int, optional
        All maps of one stage go through a bottleneck of this width that they share: ``W[s, l] = up[s, l] down[s]``. By
        default each is a full matrix, 2 x kv_heads x head_dim by hidden_size.
    rms_eps : float, default 1e-6

    Raises
    ------
    ValueError
        If the stages are not ascending layers of the model, or `rank` is less than 1.

    Examples
    --------
    >>> predictor = KVPredictor(64, 2, 16, num_hidden_layers=6, stages=(2, 4), rank=8)
    >>> tokens = predictor.encode(2, torch.randn(1, 10, 64))
    >>> keys, values = predictor(2, 5, tokens)
    >>> keys.shape, values.shape
    (torch.Size([1, 2, 10, 16]), torch.Size([1, 2, 10, 16]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        num_hidden_layers: int,
        stages: Sequence[int],
        rank: int | None = None,
        rms_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        stages = tuple(stages)
        if not stages or list(stages) != sorted(set(stages)) or not 1 <= stages[0] <= stages[-1] < num_hidden_layers:
            raise ValueError(f"stages={stages}: expected ascending layers from 1 to {num_hidden_layers - 1}")
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank}: expected a width of at least 1, or None for full matrices")
        self.hidden_size, self.num_key_value_heads, self.head_dim = hidden_size, num_key_value_heads, head_dim
        self.num_hidden_layers, self.stages, self.rank, self.rms_eps = num_hidden_layers, stages, rank, rms_eps
        width = 2 * num_key_value_heads * head_dim
        self.down = nn.ModuleDict()
        if rank is not None:
            self.down.update({str(s): nn.Linear(hidden_size, rank, bias=False) for s in stages})
        self.up = nn.ModuleDict(
            {
                f"{stage}:{layer}": nn.Linear(rank or hidden_size, width)
                for stage in stages
                for layer in range(stage, num_hidden_layers)
            }
        )

    def encode(self, stage: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the maps of one stage take, computed once where tokens are dropped.

        Parameters
        ----------
        stage : int
            The layer after the stage.
        hidden_states : Tensor [B, n, D]
            Of the dropped tokens, as they arrived at the stage.

        Returns
        -------
        Tensor [B, n, rank] or [B, n, D], in the dtype of the maps
        """
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.rms_eps)
        x = x.to(self.up[f"{stage}:{stage}"].weight.dtype)  # type: ignore[arg-type]
        return _on(self.down[str(stage)], x.device)(x) if self.rank is not None else x

    def forward(self, stage: int, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys before rotation and values, each ``[B, kv_heads, n, head_dim]``, from the result of :meth:`encode`."""
        linear = _on(self.up[f"{stage}:{layer}"], tokens.device)
        both = F.linear(tokens, linear.weight, linear.bias)  # type: ignore[arg-type]
        both = both.view(*tokens.shape[:2], 2, self.num_key_value_heads, self.head_dim)
        keys, values = both.permute(2, 0, 3, 1, 4)
        return keys, values

    @property
    def num_bytes(self) -> int:
        """Bytes of all maps in the dtype that they have."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def check(self, config: Any, schedule: PruningSchedule) -> None:
        """Refuse a model or a schedule that the maps do not fit.

        Raises
        ------
        ValueError
            If a size differs, the schedule prunes at a layer without maps, or a weight is NaN or infinite.
        """
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        model = {
            "hidden_size": config.hidden_size,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": head_dim,
            "num_hidden_layers": config.num_hidden_layers,
        }
        for name, size in model.items():
            if getattr(self, name) != size:
                raise ValueError(
                    f"the KV predictor was made for {name}={getattr(self, name)}, the model has {size}: "
                    "pass the predictor of this model, or dropped_kv='none'"
                )
        missing = sorted(set(schedule.layers) - set(self.stages))
        if missing:
            raise ValueError(
                f"the schedule prunes at layers {missing}, for which the KV predictor has no maps; it has them for "
                f"{list(self.stages)}: prune there, or pass dropped_kv='none'"
            )
        self.check_finite()

    def check_finite(self) -> None:
        """Refuse NaN and infinite weights, by name."""
        for name, parameter in self.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"KV predictor: {name} has NaN or infinite weights; train or load it again")

    def extra_repr(self) -> str:
        return f"stages={self.stages}, rank={self.rank}"


def _on(linear: nn.Module, device: torch.device) -> nn.Module:
    """The map on this device, to stay there: a model may move when it is patched already."""
    return linear if next(linear.parameters()).device == device else linear.to(device)
