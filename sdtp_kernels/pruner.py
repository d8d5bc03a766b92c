"""The pruner MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .reference import standardized_log

if TYPE_CHECKING:
    from collections.abc import Mapping

DISTANCE_KNOTS = 18
FARTHEST = 2 ** (DISTANCE_KNOTS - 1) - 1  # what is farther counts as this


def trained_width(hidden_size: int) -> int:
    """Width of the MLP that ``sdtp train`` makes: a third of the paper's, which fits as well (docs/notes/pruners.md).

    Whole tiles of a GPU's matrix product, which are paid for whole: a multiple of 128. Where D/12 is less, one of 16,
    the size of a processor's vectors.
    """
    width = hidden_size // 12
    if width < 128:
        return max(16, width // 16 * 16)
    return round(width / 128) * 128


class PrunerWeights(NamedTuple):
    """The weights in the form that the ops take; see :func:`sdtp_kernels.score_tokens`."""

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


class TokenPruner(nn.Module):
    """Scores tokens from their hidden states: ``w2 . GELU(w1 x + b1) + b2``, SDTP equation (1).

    Parameters
    ----------
    hidden_size : int
        Width of the model, D.
    intermediate_size : int, optional
        Width of the MLP, H; a quarter of `hidden_size` by default, as in the paper.
    rms_norm : bool, default True
        Divide `x` by its root mean square first. A gain would be redundant with ``w1``.
    rms_eps : float, default 1e-6
    distance : bool, default False
        Add a learned piecewise-linear function of the distance to the prompt's end.
    attention : bool, default False
        Add the attention of the prompt's last queries (:func:`~sdtp_kernels.scorers.question_attention`) with a learned
        weight. The hidden state of a token cannot know the question after it; this term does.
    lexical : bool, default False
        Add, with a learned weight, how many of the question's words stand around the token
        (:func:`~sdtp_kernels.lexical.lexical_overlap`).
    pooling : int, default 1
        An odd number of tokens. A stage ranks a token by the highest score among that many around it, so neighbours are
        kept together (:func:`~sdtp_kernels.select_tokens`). 1 is the form of the paper.
    averaging : bool, default False
        A stage ranks by the mean of the MLP's scores of all stages so far, which are noisy estimates of the same
        quantity. The other terms stay those of the stage.

    Notes
    -----
    The distance, attention and lexical terms look at the prompt's end. Under the block budget a stage leaves them out,
    because what a block keeps must not depend on what follows it (:attr:`PruningSchedule.sees_prompt_end`).

    Raises
    ------
    ValueError
        If `pooling` is even or less than 1.

    Examples
    --------
    >>> TokenPruner(64)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        *,
        rms_norm: bool = True,
        rms_eps: float = 1e-6,
        distance: bool = False,
        attention: bool = False,
        lexical: bool = False,
        pooling: int = 1,
        averaging: bool = False,
    ) -> None:
        super().__init__()
        if pooling < 1 or pooling % 2 == 0:
            raise ValueError(f"pooling={pooling}: expected an odd number of tokens, or 1 for none")
        self.distance, self.attention, self.lexical = distance, attention, lexical
        self.pooling, self.averaging = pooling, averaging
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size or max(1, hidden_size // 4)
        self.rms_norm = rms_norm
        self.rms_eps = rms_eps
        self.w1 = nn.Parameter(torch.empty(self.intermediate_size, hidden_size))
        self.b1 = nn.Parameter(torch.zeros(self.intermediate_size))
        self.w2 = nn.Parameter(torch.empty(self.intermediate_size))
        self.b2 = nn.Parameter(torch.zeros(()))
        if distance:
            self.distance_bias = nn.Parameter(torch.zeros(DISTANCE_KNOTS))
        if attention:
            self.attention_weight = nn.Parameter(torch.zeros(()))
        if lexical:
            self.lexical_weight = nn.Parameter(torch.zeros(()))
        nn.init.normal_(self.w1, std=hidden_size**-0.5)
        nn.init.normal_(self.w2, std=self.intermediate_size**-0.5)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Scores of any batch of tokens, differentiable: the form that training uses.

        Parameters
        ----------
        hidden_states : Tensor [..., D]

        Returns
        -------
        Tensor [...], float32 (or wider, where the weights are)
        """
        x = hidden_states.to(self.w1.dtype)
        if self.rms_norm:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.rms_eps)
        return F.gelu(F.linear(x, self.w1, self.b1)) @ self.w2 + self.b2

    def score_bias(
        self,
        distance: torch.Tensor,
        attention: torch.Tensor | None = None,
        is_valid: torch.Tensor | None = None,
        overlap: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the hidden state does not hold, to be added to :meth:`forward`.

        Parameters
        ----------
        distance : Tensor [B, n]
            Tokens from here to the last token of the prompt.
        attention : Tensor [B, n], optional
            Last-window attention; needed where the pruner was made with ``attention=True``.
        is_valid : bool Tensor [B, n], optional
            False for padding.
        overlap : Tensor [B, n], optional
            Lexical overlap; without it the lexical term is left out, as for a prompt of embeddings.

        Returns
        -------
        Tensor [B, n], float32
        """
        bias = self.distance_term(distance)
        if self.attention:
            if attention is None:
                raise ValueError("this pruner weighs the last-window attention: pass `attention` as well")
            bias = bias + self.attention_weight.float() * standardized_log(attention, is_valid)
        if self.lexical and overlap is not None:
            bias = bias + self.lexical_weight.float() * overlap
        return bias

    def distance_term(self, distance: torch.Tensor) -> torch.Tensor:
        """The part of :meth:`score_bias` that follows from the distance to the prompt's end alone."""
        if not self.distance:
            return torch.zeros_like(distance, dtype=torch.float32)
        # Knots at distances 0, 1, 3, 7, ...: linear between them in the logarithm.
        place = torch.log2(1 + distance.clamp(min=0).float()).clamp(max=DISTANCE_KNOTS - 1)
        left = place.long().clamp(max=DISTANCE_KNOTS - 2)
        knots = self.distance_bias.float()
        return torch.lerp(knots.take(left), knots[1:].take(left), place - left)

    def weights(self, dtype: torch.dtype = torch.float32) -> PrunerWeights:
        """Detached weights for the ops: ``w1`` in `dtype`, that of the hidden states, the others in float32."""
        wide = torch.promote_types(dtype, torch.float32)
        w1, b1, w2, b2 = (p.detach() for p in (self.w1, self.b1, self.w2, self.b2))
        return PrunerWeights(w1.to(dtype).contiguous(), b1.to(wide), w2.to(wide), b2.to(wide))

    def extra_repr(self) -> str:
        form = f"rms_norm={self.rms_norm}, pooling={self.pooling}, averaging={self.averaging}"
        return f"{self.hidden_size} -> {self.intermediate_size} -> 1, {form}"


def check_finite(pruners: Mapping[int, nn.Module]) -> None:
    """Refuse NaN and infinite weights, by layer and name. Done here because inside the op it would be a host sync."""
    for layer, pruner in pruners.items():
        for name, parameter in pruner.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ValueError(f"pruner of layer {layer}: {name} has NaN or infinite weights; train or load it again")
