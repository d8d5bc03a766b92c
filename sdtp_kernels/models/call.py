"""What one call of a patched decoder is: decided here, in one pure function, from facts that the host knows."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .settings import Settings


class CallInfo(NamedTuple):
    """What the outer model knows of a call and the decoder does not; travels in the keyword arguments."""

    keep_last: int = 0
    """Trailing tokens that stand after the prompt and are never pruned."""
    prompt_length: int | None = None
    """Columns of the prompt that the call belongs to; None where nobody said so."""
    settings: Settings | None = None
    """Settings given with the call itself."""
    reads_loss: bool = False
    """Whether labels were given."""
    reads_all: bool = False
    """Whether logits of all positions are wanted."""
    reads_index: bool = False
    """Whether logits of positions by index are wanted."""


class Call(enum.Enum):
    """Kinds of calls."""

    DENSE = "goes to the model's own forward: nothing is pruned, nothing was"
    PROMPT = "the first call of a request, which reads its prompt whole"
    CHUNK = "reads a part of a prompt, more of which is to come"
    LATER_TURN = "reads the last chunk of a prompt, or a later turn: it joins what an earlier call deferred"
    APPEND = "adds tokens to a pruned prompt and prunes none"

    @property
    def prunes(self) -> bool:
        return self in (Call.PROMPT, Call.CHUNK, Call.LATER_TURN)


def classify_call(
    *,
    is_first: bool,
    is_enabled: bool,
    is_long: bool,
    is_last: bool,
    is_named_prompt: bool,
    may_continue: bool,
    has_deferred: bool,
    has_left_out: bool,
    is_pruned: bool,
) -> Call:
    """The kind of a call.

    Parameters
    ----------
    is_first : bool
        Whether the cache holds nothing yet.
    is_enabled : bool
        Whether the request's settings prune anything.
    is_long : bool
        Whether the prompt reaches ``min_prompt``.
    is_last : bool
        Whether the prompt ends with this call.
    is_named_prompt : bool
        Whether the caller said that this is a prompt or a chunk of one, as ``generate()`` does.
    may_continue : bool
        Whether a prompt may be continued by later calls: block budget, a cache that grows.
    has_deferred : bool
        Whether the cache holds tokens that an earlier call deferred: their block was not finished.
    has_left_out : bool
        Whether those are missing in the cache's later layers, because more of the prompt was to come.
    is_pruned : bool
        Whether the cache holds a pruned prompt.
    """
    if is_first:
        prunes = is_enabled and (is_long or not is_last or may_continue)
    else:
        prunes = has_deferred and ((is_named_prompt and is_enabled) or has_left_out)
    if prunes:
        if not is_last:
            return Call.CHUNK
        return Call.PROMPT if is_first else Call.LATER_TURN
    return Call.APPEND if is_pruned and not is_first else Call.DENSE
