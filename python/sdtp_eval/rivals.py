"""Rivals that shorten the prompt itself, by its token ids.

They cost next to nothing, so that what pruning between layers wins over them is what the layers below are worth. A
cutter keeps as many tokens as a layer of the pruned model computes on average, B of the schedule: the linear layers,
and so most of the time to the first token, then cost the same. Its attention costs a little less, as the mean of
squares is more than the square of the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sdtp_kernels.lexical import lexical_overlap

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdtp_kernels import PruningSchedule

    Cutter = Callable[[torch.Tensor, int, PruningSchedule], torch.Tensor]


def cut_middle(input_ids: torch.Tensor, num_keep: int, schedule: PruningSchedule) -> torch.Tensor:
    """Indices of the first and last `num_keep` / 2 tokens: what LongBench does to prompts that are too long."""
    first = num_keep // 2
    index = torch.arange(len(input_ids))
    return torch.cat([index[:first], index[len(index) - (num_keep - first) :]])


def cut_head(input_ids: torch.Tensor, num_keep: int, schedule: PruningSchedule) -> torch.Tensor:
    """Indices of the last `num_keep` tokens, the schedule's sink among them."""
    first = min(schedule.sink, num_keep)
    index = torch.arange(len(input_ids))
    return torch.cat([index[:first], index[len(index) - (num_keep - first) :]])


def cut_lexical(input_ids: torch.Tensor, num_keep: int, schedule: PruningSchedule) -> torch.Tensor:
    """Indices of the tokens that the schedule protects, and of the best by lexical overlap; ascending."""
    scores = lexical_overlap(input_ids[None])[0]
    scores[: schedule.sink] = torch.inf
    scores[len(scores) - schedule.num_recent(len(scores)) :] = torch.inf
    return scores.sort(descending=True, stable=True).indices[:num_keep].sort().values


CUTTERS: dict[str, Cutter] = {"cut-middle": cut_middle, "cut-head": cut_head, "cut-lexical": cut_lexical}
