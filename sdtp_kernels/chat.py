"""A chat's prompt with what must not be pruned from it: instructions, tools, code."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_CODE = re.compile(r"^ *(`{3,}|~{3,}).*?(?:^ *\1|\Z)", re.DOTALL | re.MULTILINE)
# Stands in the place of the first question, to show what the template puts before it.
_MARK = "sdtp-first-question"


def chat_inputs(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    code: bool = True,
    **template: Any,
) -> Any:
    """Apply a chat template, and protect what a pruned prompt must keep whole.

    Protected is all that the template puts before the first user message: the system prompt and the tools, wherever
    the template writes them. With `code` also fenced blocks of code in every message, fences included.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        With a chat template. It must be a fast one, which knows where in the text each token stands.
    messages : sequence of dict
        ``role`` and ``content``; at least one is of the role ``user``.
    tools : sequence, optional
        As ``tokenizer.apply_chat_template`` takes them.
    code : bool, default True
        Whether to protect code.
    **template
        For the template, such as ``add_generation_prompt`` (True by default).

    Returns
    -------
    BatchEncoding
        ``input_ids`` and ``attention_mask`` [1, N], and ``protect``, the ranges of tokens, as
        :meth:`SdtpHandle.request` takes them.

    Raises
    ------
    ValueError
        If no message is the user's, its content is no text, the template changes with the content of messages in
        other ways than writing it, or the tokenizer is a slow one.

    Examples
    --------
    >>> system = {"role": "system", "content": "Be brief."}
    >>> inputs = chat_inputs(tokenizer, [system, {"role": "user", "content": "Why?"}])
    >>> with apply_sdtp(model, "attention", 0.9):
    ...     output = model.generate(**inputs, max_new_tokens=3)
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} does not tell where in the text a token stands: pass a fast tokenizer, or "
            "ranges of tokens as protect=[(0, 60)]"
        )
    template = {"add_generation_prompt": True, **template, "tools": tools, "tokenize": False}
    text = tokenizer.apply_chat_template(list(messages), **template)
    spans = [(0, len(_before_the_first_question(tokenizer, messages, text, template)))]
    if code:
        spans += [match.span() for match in _CODE.finditer(text, spans[0][1])]
    # The template has written the special tokens.
    inputs = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
    offsets = inputs.pop("offset_mapping")[0].tolist()
    ranges = [_tokens_of(span, offsets) for span in spans]
    inputs["protect"] = [(first, last) for first, last in ranges if first < last]
    return inputs


def _before_the_first_question(
    tokenizer: Any, messages: Sequence[dict[str, Any]], text: str, template: dict[str, Any]
) -> str:
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"expected a message of the role 'user', got {[message['role'] for message in messages]}")
    content = messages[first]["content"]
    if not isinstance(content, str):
        raise ValueError(f"messages[{first}]: expected a text as content, got {type(content).__name__}")
    marked = [*messages[:first], {**messages[first], "content": _MARK}, *messages[first + 1 :]]
    before: str = tokenizer.apply_chat_template(marked, **template).partition(_MARK)[0]
    if not (text.startswith(before) and text[len(before) :].lstrip().startswith(content.strip())):
        raise ValueError(
            "the chat template does more with a message than to write it, so what stands before the first question is "
            "not known: pass ranges of tokens as protect=[(0, 60)]"
        )
    return before


def _tokens_of(span: tuple[int, int], offsets: list[list[int]]) -> tuple[int, int]:
    """The range of tokens that touch a span of characters."""
    touched = [i for i, (begin, end) in enumerate(offsets) if begin < span[1] and end > span[0]]
    return (touched[0], touched[-1] + 1) if touched else (0, 0)
