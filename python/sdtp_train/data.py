"""What pruners learn from: prompts of token ids, each with the continuation that shows which of its tokens mattered.

Documents that :func:`sdtp_eval.texts.is_held_out` keeps for evaluation are never used. Of the others one in eight is
held out from training as well, to stop it in time. Both splits go by document, so a sample of one document never helps
with another sample of it, and the synthetic samples inherit the split of the document that they are written into.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import sysconfig
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import texts
from sdtp_train import lookup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

PYTHON = "python"
"""The data source that every machine has: the language reference and the source text of the standard library."""

VALIDATION_EVERY = 8
MIN_CONTEXT = 64  # shorter prompts are not pruned, see PruningSchedule.min_prompt
_CHARACTERS = 10  # per token: more than any text takes, so that one slice of a document is enough
_ELSEWHERE = 4000  # characters of another document, of which one sentence is taken
# How a prompt asks where there is no chat template; what the model writes comes right after.
_LAYOUTS = ("Question: {question}\nAnswer: ", "{question}\n", "Q: {question}\nA: ")
# Tests are repetitive, and pydoc_data is the language reference, with the documents that are kept for evaluation.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}


class Document(NamedTuple):
    """A text, or one record of instruction data (then `answer` is not empty)."""

    name: str
    """``source/file``, the same on every machine."""
    text: str
    question: str = ""
    answer: str = ""


class Sample(NamedTuple):
    """A prompt and what follows it."""

    context: list[int]
    """Token ids of the prompt, which pruning is for."""
    continuation: list[int]
    """Token ids that follow, at least one: further text, a response or an answer."""
    source: str
    """Name of the document."""
    kind: str
    """``text``, ``instruction`` or ``lookup-...``."""
    is_validation: bool
    """Held out from training."""

    @property
    def id(self) -> str:
        """Follows from the content: the same sample has the same id wherever it is made."""
        content = json.dumps([self.context, self.continuation, self.kind])
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def build_samples(
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[str],
    num_samples: int,
    context: Sequence[int],
    continuation: int,
    lookup_share: float,
    seed: int,
) -> list[Sample]:
    """Samples of all sources, in random order; every choice follows from `seed`.

    The sources contribute in turn, and so do the documents of a source: a large one does not crowd out the others.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its chat template is used for instruction data and half of the synthetic samples, where it has one.
    data : sequence of str
        Files, directories, JSONL files, or ``python``.
    num_samples : int
    context : sequence of int
        Lengths of the prompts in tokens; each sample draws one. Instruction data may be shorter, synthetic samples
        hit it within a few per cent.
    continuation : int
        Most tokens of a continuation; that of running text has exactly as many.
    lookup_share : float
        Share of synthetic samples, see :mod:`sdtp_train.lookup`.
    seed : int

    Returns
    -------
    list of Sample
        At most `num_samples`; fewer where the documents are too few.

    Raises
    ------
    ValueError
        If an argument is out of range, a source cannot be read, or nothing is left for training or for validation.
    """
    for name, value, least in (
        ("--samples", num_samples, 2),
        ("--context", min(context), MIN_CONTEXT),
        ("--continuation", continuation, 1),
    ):
        if value < least:
            raise ValueError(f"{name} {value}: expected at least {least}")
    if not 0 <= lookup_share <= 1:
        raise ValueError(f"--lookup-share {lookup_share}: expected a share in [0, 1]")
    sources = _by_source([document for item in data for document in read_source(item)])
    validation = _validation_names(sources)
    num_validation = max(1, round(num_samples / VALIDATION_EVERY))
    samples: list[Sample] = []
    for is_validation, number in ((False, num_samples - num_validation), (True, num_validation)):
        rng = random.Random(f"{seed}/{is_validation}")
        documents = [
            [document for document in source if (document.name in validation) == is_validation] for source in sources
        ]
        num_lookup = round(number * lookup_share)
        wanted = _Wanted(tokenizer, context, continuation, is_validation)
        natural = _in_turn([_in_turn([wanted.natural(d, rng) for d in _shuffled(source, rng)]) for source in documents])
        # Texts long enough to fill a prompt, where there are any.
        prose = [[document for document in source if not document.answer] for source in documents]
        long = [[document for document in source if len(document.text) > 8 * max(context)] for source in prose]
        fillers = [source for source in long if source] or [source for source in prose if source]
        found = list(itertools.islice(natural, number - num_lookup))
        if fillers:
            for _ in range(num_lookup):
                document, other = (rng.choice(rng.choice(fillers)) for _ in range(2))
                found.append(wanted.lookup(document, other, rng))
        if not found:
            part = "validation" if is_validation else "training"
            raise ValueError(
                f"--data {' '.join(data)}: no document for {part} has {min(context) + continuation} tokens; give more "
                "or longer documents, or ask for a shorter --context"
            )
        samples += found
    # One id, one sample: short records may come twice.
    unique = list({sample.id: sample for sample in samples if len(sample.context) >= MIN_CONTEXT}.values())
    return _shuffled(unique, random.Random(f"{seed}/order"))


def read_source(item: str) -> list[Document]:
    """The documents of one item of ``--data``, without those that evaluation keeps for itself.

    Parameters
    ----------
    item : str
        ``python``; a file that ends in ``.jsonl``, whose records have ``text``, or ``instruction``, ``context`` and
        ``response`` (the format of Dolly-15k, https://huggingface.co/datasets/databricks/databricks-dolly-15k); or a
        file or directory of text.

    Raises
    ------
    ValueError
        If it cannot be read, or evaluation keeps all of it.
    """
    if item == PYTHON:
        documents = [*(Document(*pair) for pair in texts.iter_documents()), *_standard_library()]
    elif item.endswith(".jsonl"):
        documents = _read_jsonl(Path(item))
    else:
        documents = [Document(*pair) for pair in texts.iter_documents([item])]
    usable = [document for document in documents if not texts.is_held_out(document.name)]
    if not usable:
        raise ValueError(
            f"--data {item}: its {len(documents)} documents are all kept for evaluation, one in "
            f"{texts.HELD_OUT_EVERY} by the hash of the file name; give more documents"
        )
    return usable


class _Wanted:
    """How samples of one split are to be."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int], continuation: int, is_validation: bool
    ) -> None:
        self.tokenizer, self.context, self.continuation = tokenizer, context, continuation
        self.is_validation = is_validation

    def natural(self, document: Document, rng: random.Random) -> Iterator[Sample]:
        if document.answer:
            yield from self._instruction(document)
            return
        text = document.text
        stride = 4 * (max(self.context) + self.continuation)  # characters of an English token
        for start in _shuffled(range(0, len(text), stride), rng):
            length = rng.choice(self.context)
            # At the next line, or the next word where lines are long.
            begin = re.compile(r"[^\n]{0,200}\n|\S*\s|").match(text, start).end() if start else 0  # type: ignore[union-attr]
            ids = self._ids(text[begin : begin + _CHARACTERS * (length + self.continuation)])
            # The very end of a slice may be half a word.
            if len(ids) > length + self.continuation:
                sample = ids[:length], ids[length : length + self.continuation]
                yield Sample(*sample, document.name, "text", self.is_validation)

    def _instruction(self, document: Document) -> Iterator[Sample]:
        body = "\n\n".join(part for part in (document.text, document.question) if part)
        prompt = self._ids(self._as_prompt(body), special=not self.tokenizer.chat_template)
        answer = self._ids(document.answer, special=False)[: self.continuation]
        if MIN_CONTEXT <= len(prompt) <= max(self.context) and answer:
            yield Sample(prompt, answer, document.name, "instruction", self.is_validation)

    def lookup(self, document: Document, other: Document, rng: random.Random) -> Sample:
        """A document with facts written into it, one of `other` among them, and a question about one at its end."""
        length = rng.choice(self.context)
        begin = rng.randrange(max(1, len(document.text) - 4 * length))
        begin = document.text.rfind("\n", 0, begin) + 1
        filler = self._first_tokens(document.text[begin : begin + _CHARACTERS * length], length)
        num_facts = max(2, length // 40)
        apart = rng.randrange(max(1, len(other.text) - _ELSEWHERE))
        task = lookup.make_task(rng, filler[: len(filler) // 2], num_facts, other.text[apart : apart + _ELSEWHERE])
        use_template = bool(self.tokenizer.chat_template) and rng.random() < 0.5
        question = task.question if use_template else rng.choice(_LAYOUTS).format(question=task.question)
        lead, answer = f"{task.lead} ".lstrip(), task.answer
        if rng.random() < 0.5:  # the model writes the whole sentence, or only what is asked for
            lead, answer = "", lead + answer

        def prompt(body: str) -> str:
            if not use_template:
                return f"{body}\n\n{question}{lead}"
            return self._as_prompt(f"{body}\n\n{question}") + lead

        # Cutting facts into a text costs a token or two at each seam.
        room = max(16, length - len(self._ids(prompt("\n".join(task.facts)))) - 4 * len(task.facts))
        filler = self._first_tokens(filler, room)
        if not all(line in filler for line in task.quoted):  # a prompt too short for its own question
            filler = "\n".join(task.quoted)
        whole = prompt(lookup.write_into(rng, filler, task.facts))
        # Tokenizers join a blank to the word after it.
        text = whole.rstrip(" ")
        ids = self._ids(" " * (len(whole) - len(text)) + answer, special=False)[: self.continuation]
        context = self._ids(text, special=not use_template)
        return Sample(context, ids, document.name, f"lookup-{task.name}", self.is_validation)

    def _as_prompt(self, content: str) -> str:
        """`content` as a user's turn, up to where the answer begins."""
        before, after = texts.user_turn(self.tokenizer)
        return f"{before}{content}{after}" if self.tokenizer.chat_template else f"{content}\n"

    def _first_tokens(self, text: str, number: int) -> str:
        # By the share of the characters: decoding token ids does not give every text back.
        share = number / max(number, len(self._ids(text, special=False)))
        return text[: int(share * len(text))]

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        # Not verbose: a slice may well be longer than what the model was made for.
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids)


def _by_source(documents: Sequence[Document]) -> list[list[Document]]:
    sources: dict[str, list[Document]] = {}
    for document in documents:
        sources.setdefault(document.name.split("/", 1)[0], []).append(document)
    return list(sources.values())


def _validation_names(sources: Sequence[Sequence[Document]]) -> set[str]:
    digests = {d.name: hashlib.sha256(b"validation/" + d.name.encode()).digest() for source in sources for d in source}
    chosen = {name for name, digest in digests.items() if int.from_bytes(digest, "big") % VALIDATION_EVERY == 0}
    if len(digests) < 2:
        raise ValueError(
            f"one document ({next(iter(digests), 'none')}) cannot be split into training and validation: add a file, "
            f"or '{PYTHON}'"
        )
    # A handful of files may all fall on one side.
    if not chosen or len(chosen) == len(digests):
        chosen = {min(digests, key=digests.__getitem__)}
    return chosen


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED & set(name.parts):
            continue
        try:
            documents.append(Document(f"python-library/{'.'.join(name.parts)}", path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError):
            continue  # a file of another encoding is no loss
    return documents


def _read_jsonl(path: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(texts.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if "text" in record:
                fields = (record["text"], "", "")
            else:
                fields = (record.get("context", ""), record["instruction"], record["response"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{path}:{number}: expected a JSON object with 'text', or with 'instruction', 'context' and 'response'"
            ) from None
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(f"{path}:{number}: expected a string in every field")
        # Records about one passage stay on one side of every split.
        digest = hashlib.sha256((fields[0] or fields[1]).encode()).hexdigest()[:16]
        documents.append(Document(f"{path.name}/{digest}", *fields))
    return documents


def _shuffled(items: Sequence[Any], rng: random.Random) -> list[Any]:
    return rng.sample(items, len(items))


def _in_turn(iterators: Sequence[Iterator[Sample]]) -> Iterator[Sample]:
    """One of each in turn, until all are empty."""
    waiting = deque(iterators)
    while waiting:
        iterator = waiting.popleft()
        for sample in itertools.islice(iterator, 1):
            yield sample
            waiting.append(iterator)
