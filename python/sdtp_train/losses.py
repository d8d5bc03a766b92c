"""What training minimises, and the rank correlation that it reports.

All functions take the prunable tokens of one sample at one stage, ``[m]``: sink and recent tokens are kept whatever
their score, so asking anything of it there would only cost the others accuracy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_SMALLEST = 1e-6  # of the largest value of a sample: a logarithm that far down is noise


def standardise(target: torch.Tensor, is_log: bool) -> torch.Tensor:
    """A target with mean 0 and standard deviation 1 over the sample, of its logarithm where `is_log`.

    Targets differ between samples and stages by orders of magnitude, the choice of tokens does not.

    Parameters
    ----------
    target : Tensor [m]
        Not negative where `is_log`.
    is_log : bool

    Returns
    -------
    Tensor [m], float32
    """
    value = target.float()
    if is_log:
        largest = value.max().clamp(min=torch.finfo(torch.float32).tiny / _SMALLEST)
        value = value.clamp(min=largest * _SMALLEST).log()
    centred = value - value.mean()
    return centred / (centred.square().mean().sqrt() + 1e-6)


def regression_loss(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """SDTP equation (4), on standardised targets."""
    return F.mse_loss(scores, target)


def ranking_loss(
    scores: torch.Tensor, target: torch.Tensor, num_pairs: int | None = None, generator: torch.Generator | None = None
) -> torch.Tensor:
    """SDTP equation (6): ``log(1 + exp(-(pi_i - pi_j) sign(pi^_i - pi^_j)))``, as the mean over pairs ``i < j``.

    Parameters
    ----------
    scores, target : Tensor [m]
    num_pairs : int, optional
        Draw that many pairs with replacement; all of them by default.
    generator : torch.Generator, optional
    """
    m = len(scores)
    if num_pairs is None:
        i, j = torch.triu_indices(m, m, offset=1, device=scores.device).unbind()
    else:
        i = torch.randint(m, (num_pairs,), generator=generator, device=scores.device)
        j = (i + torch.randint(1, m, (num_pairs,), generator=generator, device=scores.device)) % m
    return F.softplus(-(scores[i] - scores[j]) * torch.sign(target[i] - target[j])).mean()


def lm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """SDTP equation (7): cross-entropy of the continuation. Logits ``[c, V]``, labels int64 ``[c]``."""
    return F.cross_entropy(logits.float(), labels)


def kl_loss(logits: torch.Tensor, dense_logits: torch.Tensor) -> torch.Tensor:
    """KL divergence of the pruned model's predictions ``[c, V]`` from the dense model's, mean over tokens."""
    log_p, log_q = dense_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rank correlation of two vectors ``[m]``, equal values in the order of their places."""
    ranks = torch.stack([x.argsort(stable=True).argsort() for x in (a, b)]).double()
    centred = ranks - ranks.mean(-1, keepdim=True)
    product, lengths = (centred[0] * centred[1]).sum(), centred.square().sum(-1).sqrt()
    return product / (lengths[0] * lengths[1]).clamp(min=1e-12)
