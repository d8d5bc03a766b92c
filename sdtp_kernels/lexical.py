"""What the prompt's end shares with the text before it, word by word: the lexical term of a score.

A question names what it wants, in words that stand near the answer. Those words are there before any layer has run, so
this is computed once a prompt, from token ids alone, in operations whose shapes do not depend on the ids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

QUESTION = 64  # last tokens of a prompt, which are taken for its question
LONGEST = 3  # tokens of an n-gram: single ones cannot tell one number from another
BEFORE, AFTER = 16, 48  # how far a match reaches: what is asked for more often follows its name
WINDOW = BEFORE + AFTER  # tokens that are one document where rarity is counted
FEWEST = 4  # documents of a text: in a short one nothing would be rare
_FRACTION = 2**16  # of a fixed-point number, whose sums do not depend on their order
_MAX_IDS = 2**21  # three of them fit into an int64


def lexical_overlap(token_ids: torch.Tensor, is_valid: torch.Tensor | None = None) -> torch.Tensor:
    """How much of a prompt's question stands around each of its tokens.

    The last 64 tokens count as the question. An n-gram (1 to 3 tokens) of the text before that the question contains
    weighs its inverse document frequency, of windows of 64 tokens as documents: the logarithm of the text's windows, 4
    at least, over the n-gram's occurrences, and nothing where these are as many. A token's overlap is the sum of these
    weights over the n-grams that end 48 tokens before it to 16 after, as a share of the largest such sum of the row, or
    of what a word weighs that stands once, if that is more.

    Parameters
    ----------
    token_ids : Tensor [B, N], int64
        Prompts, padded on the left.
    is_valid : bool Tensor [B, N], optional
        False for padding.

    Returns
    -------
    Tensor [B, N], float32
        From 0 to 1; 0 for padding, and everywhere in a row that shares nothing with its question. A row's result does
        not depend on other rows or on padding, to the last bit.

    Examples
    --------
    >>> ids = torch.arange(200)[None]
    >>> ids[0, 20] = ids[0, 199] = 7000  # the question has a word of the text, which nothing else in it has
    >>> lexical_overlap(ids)[0, [3, 4, 68, 69]]
    tensor([0., 1., 1., 0.])
    """
    width = token_ids.shape[1]
    if width == 0:
        return token_ids.float()
    start = max(width - QUESTION, 0)
    valid = torch.ones_like(token_ids, dtype=torch.bool) if is_valid is None else is_valid
    num_windows = valid[:, :start].sum(-1, keepdim=True).float().div(WINDOW).clamp(min=FEWEST)
    # All n-grams at once, [LONGEST, B, N]: each is one number, and stands where it ends.
    before = torch.arange(LONGEST, device=token_ids.device).view(-1, 1, 1)
    column = torch.arange(width, device=token_ids.device)
    gram = (_shifted(token_ids) * _MAX_IDS**before).cumsum(0)
    is_gram = _shifted(valid).cumprod(0).bool()
    is_asked = (is_gram & (column - before >= start))[..., start:]
    asked = gram[..., start:].masked_fill(~is_asked, torch.iinfo(torch.int64).max).sort(-1).values
    place = torch.searchsorted(asked, gram).clamp(max=width - start - 1)
    is_match = (asked.gather(-1, place) == gram) & is_gram & (column < start)
    count = torch.zeros_like(asked).scatter_add(-1, place, is_match.long())
    rarity = _rarity(num_windows, count.clamp(min=1))
    weights = torch.where(is_match, rarity.gather(-1, place), 0).sum(0)
    total = F.pad(weights.cumsum(-1), (1, 0))
    overlap = total[:, (column + BEFORE + 1).clamp(max=width)] - total[:, (column - AFTER).clamp(min=0)]
    overlap = overlap.masked_fill(~valid, 0)
    return overlap.float() / overlap.amax(-1, keepdim=True).maximum(_rarity(num_windows, 1)).clamp(min=1).float()


def _rarity(num_windows: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Inverse document frequency of what stands `count` times, as a fixed-point number."""
    return ((num_windows / count).clamp(min=1).log() * _FRACTION).round().long()


def _shifted(values: torch.Tensor) -> torch.Tensor:
    """`values` ``[B, N]``, those one place before, and so on, ``[LONGEST, B, N]``; 0 where there are none."""
    return F.pad(values, (LONGEST - 1, 0)).unfold(-1, LONGEST, 1).flip(-1).movedim(-1, 0).contiguous()


class PromptTokens:
    """Token ids of a prompt, and what its end shares with them: computed once for all stages.

    Parameters
    ----------
    token_ids : Tensor [B, N], int64
        Padded on the left.
    is_valid : bool Tensor [B, N], optional
        False for padding.

    Examples
    --------
    >>> prompt = PromptTokens(torch.arange(80)[None] % 40)
    >>> prompt.overlap_at(torch.tensor([[2, 79]]))
    tensor([[1., 0.]])
    """

    def __init__(self, token_ids: torch.Tensor, is_valid: torch.Tensor | None = None) -> None:
        self.token_ids, self.is_valid = token_ids, is_valid
        self._by_distance: torch.Tensor | None = None

    def overlap_by_distance(self, device: torch.device) -> torch.Tensor:
        """:func:`lexical_overlap` ``[B, N]``, first the prompt's last token."""
        if self._by_distance is None:
            self._by_distance = lexical_overlap(self.token_ids, self.is_valid).flip(-1)
        return self._by_distance.to(device)

    def overlap_at(self, token_index: torch.Tensor, keep_last: int = 0) -> torch.Tensor:
        """:func:`lexical_overlap` of some tokens.

        Parameters
        ----------
        token_index : Tensor [B, n], int64
            Ascending indices in the row's own prompt, its last token among them; negative for padding.
        keep_last : int, default 0
            Tokens at the end that stand after the prompt.

        Returns
        -------
        Tensor [B, n], float32
            0 for padding, and for what stands after the prompt.
        """
        end = token_index.shape[1] - keep_last
        distance = token_index[:, end - 1 : end] - token_index
        overlap = self.overlap_by_distance(token_index.device)
        found = overlap.gather(1, distance.clamp(0, overlap.shape[1] - 1))
        return found.masked_fill((token_index < 0) | (distance < 0), 0)
