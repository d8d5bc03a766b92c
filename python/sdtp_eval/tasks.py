"""What a pruned model is asked: texts to continue, and facts to find in them.

Everything here is made by a seed, needs no network, and is the same on every machine for the same tokenizer and texts.
A :class:`Sample` is ``context + question + answer``; what of it is the prompt, and so may be pruned, is the protocol's
choice (see :data:`PROTOCOLS`). The wordings belong to evaluation: training data must use others.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

INSIDE, AFTER = "inside", "after"
# The question is part of the prompt that is pruned, or it comes once the context has been pruned without it.
PROTOCOLS = (INSIDE, AFTER)

DEPTHS = 10  # a needle stands at 5 %, 15 %, ..., 95 % of the context
NUM_KEYS = 8  # competing keys of `multikey`
NUM_VALUES = 3  # needles of `multivalue`, all of which are asked for

# Sentence and question; {x} is what the fact is about. The answer begins as the sentence does: a small model that found
# the fact can then say it, and what is measured is whether the fact was there to be found.
WORDINGS: tuple[tuple[str, str], ...] = (
    ("The pass key of the {x} room is {value}.", "What is the pass key of the {x} room?"),
    ("The special magic number for {x} is: {value}.", "What is the special magic number for {x} in the text?"),
    ("Note to the courier: the {x} gate opens with {value}.", "Which code opens the {x} gate?"),
    ("Since Monday the extension of the {x} office is {value}.", "What is the new extension of the {x} office?"),
    ("(Remember: the parcel marked {x} weighs {value} grams.)", "How many grams does the parcel marked {x} weigh?"),
    ("By the way, the {x} team has drawn ticket {value}.", "Which ticket has the {x} team drawn?"),
)
NAMES = (
    "red", "green", "blue", "yellow", "purple", "orange", "silver", "golden", "amber", "coral", "violet", "crimson",
    "ivory", "olive", "maroon", "azure",
)  # fmt: skip


class Lookup(NamedTuple):
    """A fact about {x}, what asks for it, and how the answer begins."""

    fact: str
    question: str
    opening: str
    kind: str
    """Of the value: a key of :data:`VALUES`."""


# Twenty facts that share no sentence, half of them prose, half documentation, half with numbers for values. They were
# fixed before the pruners that they judge were trained: :mod:`sdtp_train.lookup` has none of their wordings.
LOOKUPS = (
    Lookup(
        "When the inspector finally weighed the {x} crate, the scale showed {value} kilograms.",
        "What did the scale show for the {x} crate?", "For the {x} crate, the scale showed", "number",
    ),
    Lookup(
        "It was no secret in the village that the {x} mill belonged to {value}.",
        "To whom did the {x} mill belong?", "The {x} mill belonged to", "name",
    ),
    Lookup(
        "She whispered the countersign for the {x} door, which that night was {value}.",
        "What was the countersign for the {x} door?", "The countersign for the {x} door was", "word",
    ),
    Lookup(
        "Over the entrance of the {x} chapel somebody had carved these words: {value}.",
        "Which words are carved over the entrance of the {x} chapel?", "Somebody had carved these words:", "phrase",
    ),
    Lookup(
        "Few people know that the {x} bridge had to be rebuilt after the flood of {value}.",
        "After which flood was the {x} bridge rebuilt?", "It was rebuilt after the flood of", "year",
    ),
    Lookup(
        "My uncle sold the {x} boat for {value} crowns and never went to sea again.",
        "For how many crowns was the {x} boat sold?", "My uncle sold the {x} boat for", "number",
    ),
    Lookup(
        "Passengers for the {x} coast change carriages at milestone {value}.",
        "At which milestone do passengers for the {x} coast change carriages?", "They change carriages at milestone",
        "number",
    ),
    Lookup(
        "In the autumn census the {x} parish counted {value} sheep.",
        "How many sheep did the {x} parish count?", "The {x} parish counted", "number",
    ),
    Lookup(
        "The expedition along the {x} river had set out from {value} before sunrise.",
        "From where had the expedition along the {x} river set out?", "It had set out from", "place",
    ),
    Lookup(
        "All that her last letter to the {x} society said was: {value}.",
        "What did her last letter to the {x} society say?", "All that it said was:", "phrase",
    ),
    Lookup(
        "``{x}_depth`` bounds how far the walk descends; where it is unset, {value} is assumed.",
        "Which value is assumed where ``{x}_depth`` is unset?", "Where ``{x}_depth`` is unset, the walk assumes",
        "number",
    ),
    Lookup(
        "A job that the {x} scheduler has cancelled terminates with exit status {value}.",
        "With which exit status does a job end that the {x} scheduler has cancelled?",
        "Such a job terminates with exit status", "number",
    ),
    Lookup(
        "Deprecated: the {x} handler is going to be removed, migrate to {value} instead.",
        "To what should users of the {x} handler migrate?", "Users of the {x} handler should migrate to", "word",
    ),
    Lookup(
        "Unless configured otherwise, the {x} daemon listens on TCP port {value}.",
        "On which TCP port does the {x} daemon listen?", "The {x} daemon listens on TCP port", "number",
    ),
    Lookup(
        "Changes in this release: the {x} driver no longer leaks descriptors (commit {value}).",
        "Which commit mended the leak of the {x} driver?", "The leak was mended by commit", "code",
    ),
    Lookup(
        "Questions and patches concerning the {x} subsystem are handled by its maintainer, {value}.",
        "Who is the maintainer of the {x} subsystem?", "The {x} subsystem is handled by its maintainer,", "name",
    ),
    Lookup(
        "If the {x} table is full, clients see the message: {value}.",
        "Which message do clients see if the {x} table is full?", "They see the message:", "phrase",
    ),
    Lookup(
        "By default the {x} service rotates its journal below the directory {value} once a week.",
        "Below which directory does the {x} service rotate its journal?", "It rotates its journal below the directory",
        "path",
    ),
    Lookup(
        "On the reference board the {x} parser sustained {value} records per second.",
        "How many records per second did the {x} parser sustain?", "The {x} parser sustained", "number",
    ),
    Lookup(
        "Error {value} means that the {x} queue was closed by its reader.",
        "Which error means that the {x} queue was closed by its reader?", "That is what is meant by error", "number",
    ),
)  # fmt: skip
_FIRST = ("Ottoline", "Barnaby", "Cordelia", "Lucan", "Philippa", "Edmund", "Rosalind", "Thaddeus")
_LAST = ("Marsh", "Fennimore", "Pryce", "Holloway", "Quarles", "Venning", "Ashdown", "Tregear")
_WORDS = ("badger", "trumpet", "almond", "saddle", "cinder", "magnet", "turnip", "oyster", "parsley", "hammock")
_TOWNS = ("Trondheim", "Cadiz", "Port Louis", "Salerno", "Mombasa", "Galway", "Antwerp", "Valdivia", "Kotor", "Brno")
VALUES: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randrange(1000, 100_000)),
    "year": lambda rng: str(rng.randrange(1500, 1900)),
    "name": lambda rng: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
    "word": lambda rng: rng.choice(_WORDS),
    "place": lambda rng: rng.choice(_TOWNS),
    "code": lambda rng: f"{rng.getrandbits(28):07x}",
    "path": lambda rng: f"/var/{rng.choice(_WORDS)}/{rng.choice(_WORDS)}",
    "phrase": lambda rng: f"no {rng.choice(_WORDS)} without a {rng.choice(_WORDS)} and a {rng.choice(_WORDS)}",
}
CODE = "def {verb}_{x}(stream):\n    return stream.{method}({number})\n"
VERBS, METHODS = ("parse", "load", "merge", "check"), ("read", "fetch", "scan", "pull")
COLUMNS = ("width", "height", "price")


@dataclass(frozen=True)
class Sample:
    """One thing to score.

    Attributes
    ----------
    task : str
    kind : str
        What results are broken down by: the source of a text, the wording of a fact.
    context, question, answer : tuple of int
        Token ids; `question` is empty for texts. The answer is what is scored, all of it.
    facts : dict
        For the per-sample file: depth, length asked for and so on.
    """

    task: str
    kind: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Equal for equal token ids only, so that a resumed run cannot take another sample's result."""
        ids = json.dumps([self.task, self.context, self.question, self.answer])
        return hashlib.sha256(ids.encode()).hexdigest()[:16]

    @property
    def ids(self) -> list[int]:
        """What the model reads to score the answer: everything but the answer's last token."""
        return [*self.context, *self.question, *self.answer[:-1]]

    @property
    def protocols(self) -> tuple[str, ...]:
        return PROTOCOLS if self.question else (INSIDE,)

    def prompt_length(self, protocol: str) -> int:
        """Leading tokens of :attr:`ids` that are the prompt."""
        return len(self.context) + (len(self.question) if protocol == INSIDE else 0)


class TextPool:
    """Documents as token ids, by source.

    Parameters
    ----------
    tokenizer : transformers tokenizer
    paths : sequence of path
        As :func:`sdtp_eval.texts.iter_documents` takes them.
    split : {"held-out", "train", "all"}
        Which documents: see :func:`sdtp_eval.texts.is_held_out`.

    Raises
    ------
    ValueError
        If nothing is left after the split, or a path is wrong.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, paths: Sequence[str | Path], split: str) -> None:
        self.tokenizer = tokenizer
        wanted = {"held-out": (True,), "train": (False,), "all": (True, False)}[split]
        documents: dict[str, list[str]] = defaultdict(list)
        for name, text in texts.iter_documents(paths):
            if texts.is_held_out(name) in wanted:
                documents[name.split("/", 1)[0]].append(text)
        if not documents:
            raise ValueError(
                f"--split {split}: none of the documents belongs to it; the split goes by file name, so give more "
                "files, or --split all for texts that no pruner was trained on"
            )
        # Short documents are joined: a topic of the reference alone is rarely as long as a context.
        self.tokens = {source: encode(tokenizer, "\n\n".join(parts)) for source, parts in sorted(documents.items())}
        self._breaks: dict[int, bool] = {}

    def windows(self, length: int, count: int, rng: random.Random) -> list[tuple[str, int, list[int]]]:
        """Up to `count` windows of `length` tokens that do not overlap: source, offset and ids, sources in turn."""
        queues = []
        for source, tokens in self.tokens.items():
            offsets = list(range(0, len(tokens) - length + 1, length))
            rng.shuffle(offsets)
            queues.append([(source, offset, tokens[offset : offset + length]) for offset in offsets[:count]])
        found: list[tuple[str, int, list[int]]] = []
        while len(found) < count and any(queues):
            found.extend(queue.pop() for queue in queues if queue)
        return found[:count]

    def filler(self, length: int, rng: random.Random) -> list[int]:
        """`length` tokens of running text from one source; shorter sources are repeated."""
        tokens = rng.choice(list(self.tokens.values()))
        start = rng.randrange(max(1, len(tokens) - length))
        text = tokens[start : start + length]
        while len(text) < length:
            text = text + tokens[: length - len(text)]
        return text

    def place(self, text: list[int], depth: float) -> int:
        """Index of the line's end nearest to `depth` (0 to 1) of `text`, or just there where all lines are long."""
        wanted = round(depth * len(text))
        ends = (i + 1 for i, token in enumerate(text) if self._is_break(token))
        place = texts.nearest(ends, wanted)
        return place if abs(place - wanted) <= len(text) / (2 * DEPTHS) else wanted

    def _is_break(self, token: int) -> bool:
        if token not in self._breaks:
            self._breaks[token] = "\n" in str(self.tokenizer.decode([token]))
        return self._breaks[token]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids without special tokens."""
    # verbose=False: a whole book is longer than the model's window, which is what windows are cut for.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def make_samples(
    task: str, pool: TextPool, tokens: int, count: int, *, continuation: int = 128, seed: int = 0, chat: bool = True
) -> list[Sample]:
    """The samples of one task at one length.

    Parameters
    ----------
    task : str
        A name of :data:`TASKS`.
    pool : TextPool
    tokens : int
        Length of the prompt with the question in it; of the context for ``nll`` and ``ranks``.
    count : int
        Samples; texts may hold fewer windows.
    continuation : int, default 128
        Tokens scored after a text.
    seed : int, default 0
    chat : bool, default True
        Put questions into the tokenizer's chat template where it has one.

    Returns
    -------
    list of Sample

    Raises
    ------
    ValueError
        If the task is unknown, or the length leaves no room for the facts or no text is that long.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; known: {', '.join(TASKS)}")
    rng = random.Random(f"{task} {tokens} {seed}")
    samples = list(TASKS[task](task, pool, tokens, count, rng, continuation, chat))
    if not samples:
        longest = max(map(len, pool.tokens.values()))
        raise ValueError(f"{task}: no text of {tokens} + {continuation} tokens; the longest source has {longest}")
    return samples


def _texts(
    task: str, pool: TextPool, tokens: int, count: int, rng: random.Random, continuation: int, chat: bool
) -> Iterator[Sample]:
    for source, offset, ids in pool.windows(tokens + continuation, count, rng):
        facts = {"length": tokens, "offset": offset}
        yield Sample(task, source, tuple(ids[:tokens]), (), tuple(ids[tokens:]), facts)


def _keys(
    task: str, pool: TextPool, tokens: int, count: int, rng: random.Random, continuation: int, chat: bool
) -> Iterator[Sample]:
    """One fact, several that compete, or several about the same thing that are all asked for."""
    for i in range(count):
        wording = i % len(WORDINGS)
        # Each wording meets each depth in turn.
        depth = ((i // len(WORDINGS) + wording) % DEPTHS + 0.5) / DEPTHS
        sentence, question = WORDINGS[wording]
        opening = sentence.split(" {value}")[0]
        number = {"passkey": 1, "multikey": NUM_KEYS, "multivalue": NUM_VALUES}[task]
        names = rng.sample(NAMES, number) if task == "multikey" else [rng.choice(NAMES)] * number
        values = [str(rng.randrange(10_000, 100_000)) for _ in names]
        depths = [depth] if number == 1 else [(j + 0.5) / number for j in range(number)]
        needles = [sentence.format(x=x, value=value) for x, value in zip(names, values, strict=True)]
        asked = int(depth * number) if task == "multikey" else 0
        if task == "multivalue":
            answer = f" {', '.join(values[:-1])} and {values[-1]}"
            question = f"There is more than one answer to this; give all {number} in the order of the text. {question}"
        else:
            answer = f" {values[asked]}"
        facts = {"length": tokens, "depth": depths[asked], "wording": wording}
        yield _ask(
            task, f"wording {wording}", pool, tokens, rng, list(zip(depths, needles, strict=True)),
            question.format(x=names[asked]), opening.format(x=names[asked]), answer, facts, chat,
        )  # fmt: skip


def _lookups(
    task: str, pool: TextPool, tokens: int, count: int, rng: random.Random, continuation: int, chat: bool
) -> Iterator[Sample]:
    """One of the facts of :data:`LOOKUPS`, each in turn and each at every depth."""
    for i in range(count):
        wording = i % len(LOOKUPS)
        lookup, name = LOOKUPS[wording], rng.choice(NAMES)
        depth = ((i // len(LOOKUPS) + wording) % DEPTHS + 0.5) / DEPTHS
        value = VALUES[lookup.kind](rng)
        yield _ask(
            task, lookup.kind, pool, tokens, rng, [(depth, lookup.fact.format(x=name, value=value))],
            lookup.question.format(x=name), lookup.opening.format(x=name), f" {value}",
            {"length": tokens, "depth": depth, "wording": wording}, chat,
        )  # fmt: skip


def _recall(
    task: str, pool: TextPool, tokens: int, count: int, rng: random.Random, continuation: int, chat: bool
) -> Iterator[Sample]:
    """Word for word: the body of one of four functions, and the next cell in a row of numbers, in turn."""
    for i in range(count):
        depth = (i // 2 % DEPTHS + 0.5) / DEPTHS
        facts = {"length": tokens, "depth": depth}
        names = rng.sample(NAMES, 4)
        asked = rng.randrange(len(names))
        if i % 2 == 0:
            functions = []
            for x in names:
                words = {"verb": rng.choice(VERBS), "method": rng.choice(METHODS), "number": rng.randrange(100, 1000)}
                functions.append(CODE.format(x=x, **words))
            head, body = functions[asked].rstrip("\n").split("    return", 1)
            function = head[len("def ") :].split("(")[0]
            yield _ask(
                task, "code line", pool, tokens, rng, [(depth, "\n".join(functions))],
                f"Quote the function {function} from the text, word for word.", f"{head}    return", body, facts, chat,
            )  # fmt: skip
        else:
            rows = [[str(rng.randrange(100, 1000)) for _ in COLUMNS] for _ in names]
            lines = [f"| box | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
            lines += [f"| {x} | {' | '.join(row)} |" for x, row in zip(names, rows, strict=True)]
            column = rng.randrange(len(COLUMNS))
            cells = [f"| {names[asked]} |", *(f" {cell} |" for cell in rows[asked][:column])]
            yield _ask(
                task, "table cell", pool, tokens, rng, [(depth, "\n".join(lines))],
                f"Repeat the row of the {names[asked]} box from the table.", "".join(cells), f" {rows[asked][column]}",
                facts, chat,
            )  # fmt: skip


def _ask(
    task: str, kind: str, pool: TextPool, tokens: int, rng: random.Random, needles: list[tuple[float, str]],
    question: str, opening: str, answer: str, facts: dict[str, Any], chat: bool,
) -> Sample:  # fmt: skip
    tokenizer = pool.tokenizer
    head, tail = chat_template(tokenizer, chat)
    asked = encode(tokenizer, f"\n\n{question}{tail}{opening}")
    facts_ids = [(depth, encode(tokenizer, f"\n{needle}\n")) for depth, needle in needles]
    room = tokens - len(head) - len(asked) - sum(len(ids) for _, ids in facts_ids)
    if room < 1:
        raise ValueError(f"{task} at {tokens} tokens: the facts and the question take {tokens - room}; ask for more")
    text = pool.filler(room, rng)
    places = [(pool.place(text, depth), ids) for depth, ids in facts_ids]
    for place, ids in reversed(places):  # from the end, so that the places before it stay where they are
        text[place:place] = ids
    return Sample(task, kind, (*head, *text), tuple(asked), tuple(encode(tokenizer, answer)), facts)


def chat_template(tokenizer: PreTrainedTokenizerBase, chat: bool) -> tuple[list[int], str]:
    """Token ids before the user's text, and what stands between it and the answer.

    Without a template, or without `chat`: the tokenizer's own beginning, if any, and a line break.
    """
    if not (chat and tokenizer.chat_template):
        return list(tokenizer("").input_ids), "\n"
    before, after = texts.user_turn(tokenizer)
    return encode(tokenizer, before), after


TASKS: dict[str, Callable[[str, TextPool, int, int, random.Random, int, bool], Iterator[Sample]]] = {
    "nll": _texts,
    "passkey": _keys,
    "multikey": _keys,
    "multivalue": _keys,
    "lookup": _lookups,
    "recall": _recall,
    "ranks": _texts,
}
