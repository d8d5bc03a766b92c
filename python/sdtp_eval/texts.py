"""Real long texts to prefill, and the one rule that decides which of them training may not see."""

from __future__ import annotations

import hashlib
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

REFERENCE = "python-reference"
HELD_OUT_EVERY = 5  # one document in so many is kept from training


def language_reference() -> str:
    """The language reference inside Python: about 465 000 characters, a little different in each version of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(text.strip() for _, text in sorted(topics.items()))


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file, UTF-8.

    Raises
    ------
    ValueError
        If there is no such file, or it is empty or not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path}: holds no text")
    return text


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer's chat template writes before a user's text, and between that and the answer.

    Returns
    -------
    before, after : str
        Both empty where the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        return "", ""
    mark = "\N{OBJECT REPLACEMENT CHARACTER}text\N{OBJECT REPLACEMENT CHARACTER}"
    messages = [{"role": "user", "content": mark}]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, after = prompt.split(mark)
    return before, after


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    question: str,
    num_tokens: int,
    facts: Sequence[tuple[float, str]] = (),
    opening: str = "",
) -> tuple[list[int], list[str]]:
    """The first part of `text` with the question after it, `num_tokens` tokens in all.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its chat template is used where it has one.
    text, question : str
    num_tokens : int
        Tokens of the whole prompt, template and question included.
    facts : sequence of (float, str)
        Sentences to write into the text, each on a line of its own at this depth, 0 to 1.
    opening : str, default ""
        How the answer begins.

    Returns
    -------
    list of int
        Token ids; fewer than `num_tokens` where the text is too short.
    list of str
        Remarks for the reader: that the text was too short.

    Raises
    ------
    ValueError
        If the question and the facts alone take all the tokens.
    """
    before, after = user_turn(tokenizer)
    # A template writes the special tokens itself; without one the tokenizer adds those of a beginning.
    head = tokenizer(before, add_special_tokens=not tokenizer.chat_template).input_ids
    after = after if after or not opening else "\n"
    tail = tokenizer(f"\n\n{question}{after}{opening}", add_special_tokens=False).input_ids
    written = [(depth, tokenizer(f"\n{fact}\n", add_special_tokens=False).input_ids) for depth, fact in facts]
    room = num_tokens - len(head) - len(tail) - sum(len(ids) for _, ids in written)
    if room < 1:
        raise ValueError(
            f"--tokens {num_tokens}: the question, its template and the facts take {num_tokens - room} tokens; ask for "
            "more"
        )
    body: list[int] = []
    for characters in (16 * room, len(text)):  # a long text need not be tokenised whole
        body = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids[:room]
        if len(body) == room:
            break
    notes = []
    if len(body) < room:
        notes.append(f"the text has only {len(body)} tokens: the prompt has {num_tokens - room + len(body)}")
    breaks = [i + 1 for i, token in enumerate(body) if written and "\n" in str(tokenizer.decode([token]))]
    for depth, ids in sorted(written, reverse=True):  # from the end, so that the places before stay where they are
        place = nearest(breaks, round(depth * len(body)))
        body[place:place] = ids
    return [*head, *body, *tail], notes


def nearest(places: Iterable[int], wanted: int) -> int:
    """The place nearest to the wanted one, which it is where there are none."""
    return min(places, key=lambda place: abs(place - wanted), default=wanted)


def is_held_out(name: str) -> bool:
    """Whether a document is kept for evaluation and never trained on: one in five, by the hash of its file name.

    Parameters
    ----------
    name : str
        As :func:`iter_documents` gives it. Only the last part counts, so that the answer does not depend on which
        directory was passed, and two copies of a file are never on both sides.
    """
    digest = hashlib.sha256(name.rsplit("/", 1)[-1].encode()).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_EVERY == 0


def iter_documents(paths: Sequence[str | os.PathLike[str]] = ()) -> Iterator[tuple[str, str]]:
    """Text documents with names that are the same on every machine.

    Parameters
    ----------
    paths : sequence of path
        Files and directories. In a directory every file of UTF-8 text counts, HTML without its tags; others are
        passed over, as are hidden ones, and a file reached twice (by a link) is given once. With no paths: the topics
        of Python's language reference.

    Yields
    ------
    name : str
        ``source/file``, the source being the last part of the path that was given.
    text : str
        Not empty.

    Raises
    ------
    ValueError
        If a path does not exist or holds no text.
    """
    if not paths:
        from pydoc_data.topics import topics

        yield from ((f"{REFERENCE}/{topic}", text.strip()) for topic, text in sorted(topics.items()))
        return
    seen: set[str] = set()
    for given in map(Path, paths):
        source = given.resolve().name
        if not given.is_dir():
            yield f"{source}/{source}", _plain(given, read_text(given))
            continue
        found = False
        # Sorted by name, so that the order does not depend on the file system.
        for path in sorted(given.rglob("*")):
            relative = path.relative_to(given)
            if not path.is_file() or any(part.startswith(".") for part in relative.parts):
                continue
            try:
                text = _plain(path, read_text(path))
            except ValueError:
                continue
            real = os.path.realpath(path)
            if real in seen or "\0" in text:
                continue
            seen.add(real)
            found = True
            yield f"{source}/{relative.as_posix()}", text
        if not found:
            raise ValueError(f"{given}: no text files in there; give a directory with UTF-8 text, or a file")


class _Text(HTMLParser):
    """Collects what a reader of the page sees."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "head"):
            self.hidden = max(0, self.hidden - 1)  # a page may close what it never opened

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _plain(path: Path, text: str) -> str:
    if path.suffix.lower() not in (".html", ".htm", ".xhtml"):
        return text
    page = _Text()
    page.feed(text)
    lines = (" ".join(line.split()) for line in "".join(page.parts).splitlines())
    return "\n".join(line for line in lines if line)
