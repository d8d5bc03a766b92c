"""Rivals that look at token ids alone: a lexical scorer for the stages, and cutters that shorten the prompt itself.

They cost next to nothing, so that what a learned pruner wins over them is what its scores are worth. A cutter keeps as
many tokens as a layer of the pruned model computes on average, B of the schedule: the linear layers, and so most of the
time to the first token, then cost the same. Its attention costs a little less, as the mean of squares is more than the
square of the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sdtp_kernels import PruningSchedule
    from sdtp_kernels.scorers import StageInput

    Cutter = Callable[[torch.Tensor, int, PruningSchedule], torch.Tensor]

BLOCK = 64  # tokens that are kept or dropped together
QUESTION = 64  # last tokens of a prompt, which are taken for its question


def lexical_scores(input_ids: torch.Tensor) -> torch.Tensor:
    """What each block of a prompt shares with the prompt's end, where its question stands.

    A score is the sum, over the distinct tokens of the last 64 that the block contains, of the logarithm of one over
    the share of blocks that contain the token: rare words tell more than common ones (inverse document frequency).

    Parameters
    ----------
    input_ids : int64 Tensor [N]
        The prompt.

    Returns
    -------
    Tensor [N], float32
        The same for all tokens of a block of 64; blocks are counted from the prompt's beginning.

    Examples
    --------
    >>> ids = torch.zeros(256, dtype=torch.int64)
    >>> ids[70] = ids[255] = 7  # the second block of four has a word of the question
    >>> lexical_scores(ids)[[0, 64, 127, 128]]
    tensor([0.0000, 0.6931, 0.6931, 0.0000])
    """
    block = torch.arange(len(input_ids), device=input_ids.device) // BLOCK
    words = input_ids[-QUESTION:].unique()
    place = torch.searchsorted(words, input_ids).clamp(max=len(words) - 1)
    is_word = words[place] == input_ids
    contains = torch.zeros(int(block[-1]) + 1, len(words), device=input_ids.device)
    contains[block[is_word], place[is_word]] = 1
    weight = (len(contains) / contains.sum(0)).log()
    return (contains @ weight)[block]


class IdScorer:
    """A scorer of stages from token ids, which a stage is not given: it takes them where the model embeds them.

    Parameters
    ----------
    score : function of int64 Tensor [N] to Tensor [N]
        Of the prompt's ids; such as :func:`lexical_scores`.

    Examples
    --------
    >>> scorer = IdScorer(lexical_scores)
    >>> hook = model.get_input_embeddings().register_forward_pre_hook(scorer.read)
    >>> with apply_sdtp(model, scorer, 0.9):
    ...     model.generate(**inputs)
    >>> hook.remove()
    """

    def __init__(self, score: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.score = score
        self.input_ids: torch.Tensor | None = None

    def read(self, embedding: Any, args: tuple[torch.Tensor]) -> None:
        """A forward pre-hook of the model's input embeddings.

        Raises
        ------
        NotImplementedError
            For a batch: rows of different lengths would need their padding taken out.
        """
        (self.input_ids,) = args
        if self.input_ids.shape[0] != 1:
            raise NotImplementedError(
                f"a batch of {self.input_ids.shape[0]} prompts; the lexical scorer takes one prompt at a time"
            )

    def __call__(self, stage: StageInput) -> torch.Tensor:
        assert self.input_ids is not None, "read() is no hook of this model"
        end = self.input_ids.shape[1] - stage.keep_last  # what stands after the prompt is not seen by it
        return self.score(self.input_ids[0, :end])[stage.token_index.clamp(0, end - 1)]


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
    """Indices of the tokens that the schedule protects, and of the best blocks by :func:`lexical_scores`; ascending."""
    scores = lexical_scores(input_ids)
    scores[: schedule.sink] = torch.inf
    scores[len(scores) - schedule.num_recent(len(scores)) :] = torch.inf
    return scores.sort(descending=True, stable=True).indices[:num_keep].sort().values


ID_SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"lexical": lexical_scores}
CUTTERS: dict[str, Cutter] = {"cut-middle": cut_middle, "cut-head": cut_head, "cut-lexical": cut_lexical}
