"""Synthetic prompts whose answer is in the text: the data that teaches a pruner to keep facts.

Running text hardly ever asks for one exact detail of what came long before, so a pruner trained on it alone drops the
needles. The wordings are many, and their answers are numbers, words, names, places, dates, paths and phrases. Other
facts are sentences of the texts themselves, so that the pruner learns what a fact looks like and not a wording. None of
the wordings is one of :mod:`sdtp_eval.tasks` or of RULER (arXiv 2404.06654), which are for measuring.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence


class Task(NamedTuple):
    """Facts to write into a text, and a question about one of them."""

    name: str
    facts: tuple[str, ...]
    """Each goes to a random place; lines of one string stay together."""
    question: str
    lead: str
    """How a full answer begins, or empty."""
    answer: str
    quoted: tuple[str, ...] = ()
    """Lines of the text itself that must be there."""


def make_task(rng: random.Random, text: str, num_facts: int, other: str = "") -> Task:
    """A random task.

    Parameters
    ----------
    rng : random.Random
    text : str
        That the facts will be written into; its own lines may be asked for. May be empty.
    num_facts : int
        Most entries of lists and tables, at least 2: as many as a short prompt has room for.
    other : str, default ""
        A text that a sentence may be taken from, to be a fact.
    """
    lines, sentences, others = _quotable_lines(text), _sentences(text), _sentences(other)
    makers: list[Callable[[], Task]] = [
        *[lambda: _fact(rng)] * 3,
        lambda: _competing(rng, num_facts),
        lambda: _pairs(rng, num_facts),
        lambda: _people(rng, num_facts),
        lambda: _assignment(rng, num_facts),
        lambda: _table(rng, num_facts),
        lambda: _several(rng, num_facts),
    ]
    if lines:
        makers += [lambda: _next_line(rng, lines)] * 2
    if sentences:
        makers += [lambda: _gap(rng, sentences)] * 2
    if others:
        makers += [lambda: _stranger(rng, others)] * 2
    while True:
        task = rng.choice(makers)()
        if task.answer not in task.question:  # else nothing would have to be found
            return task


def write_into(rng: random.Random, text: str, facts: Sequence[str]) -> str:
    """`text` with each fact at the end of a random line or sentence."""
    places = [match.end() for match in re.finditer(r"\n+|(?<=[.!?;:])\s", text)] or [len(text)]
    chosen = sorted(zip((rng.choice(places) for _ in facts), rng.sample(list(facts), len(facts)), strict=True))
    parts, begin = [], 0
    for place, fact in chosen:
        # Now a paragraph of its own, now in the middle of one.
        is_inline = "\n" not in fact and rng.random() < 0.5
        parts += [text[begin:place], f"{fact} " if is_inline else f"\n{fact}\n"]
        begin = place
    return "".join((*parts, text[begin:]))


# ---------------------------------------------------------------------------------------------------- what is said

_THINGS = (
    "locker", "safe", "archive", "depot", "greenhouse", "workshop", "harbour office", "night train", "laboratory",
    "storage unit", "boiler room", "theatre", "observatory", "bakery", "server rack", "ferry", "cellar", "lighthouse",
)  # fmt: skip
_QUALITIES = (
    "northern", "old", "upper", "east", "second", "new", "smaller", "lower", "western", "main", "spare", "former",
    "public", "private", "inner", "outer", "left", "third",
)  # fmt: skip
_WORDS = (
    "anchor", "basil", "comet", "dune", "ember", "falcon", "glacier", "harbor", "indigo", "jasmine", "kettle",
    "lantern", "meadow", "nickel", "orchid", "pepper", "quartz", "ribbon", "saffron", "thistle", "umbra", "velvet",
    "walnut", "xenon", "yarrow", "zephyr", "maple", "pebble", "copper", "raven",
)  # fmt: skip
_PEOPLE = (
    "Amara", "Boris", "Chiara", "Dmitri", "Elena", "Farid", "Greta", "Hiroshi", "Ingrid", "Jamal", "Katya", "Liam",
    "Mei", "Nadia", "Oscar", "Priya", "Quentin", "Rosa", "Stefan", "Tomas", "Uma", "Viktor", "Wanda", "Yusuf", "Zoe",
)  # fmt: skip
_PLACES = (
    "Lisbon", "Nairobi", "Osaka", "Quito", "Tallinn", "Winnipeg", "Adelaide", "Bergen", "Cusco", "Dakar", "Edinburgh",
    "Fresno", "Ghent", "Hanoi", "Izmir", "Jaipur", "Krakow", "Lima", "Minsk", "Naples", "Oslo", "Perth", "Riga",
    "Seoul", "Tunis", "Utrecht", "Vilnius",
)  # fmt: skip
_FIELDS = ("timeout", "retries", "owner", "region", "limit", "version", "channel", "batch", "offset", "quota", "port")

_NOTIONS = (
    "patience", "granite", "thunder", "harvest", "silence", "velocity", "friendship", "gravel", "daylight", "honesty",
    "limestone", "courage", "drizzle", "mustard", "rhythm", "clay", "ambition", "fog", "linen", "chalk",
)  # fmt: skip
_VERBS = ("outlives", "needs", "forgives", "follows", "teaches", "carries", "remembers", "precedes", "hides", "feeds")
_MONTHS = ("January", "March", "April", "June", "July", "September", "October", "December")

# By the kind of the value: fact, question, how the answer begins; {x} is what it is about, {v} what is asked for.
_FACTS = {
    "id": (
        ("The access code for the {x} is {v}.", "What is the access code for the {x}?", "The access code is"),
        ("To open the {x}, type {v}.", "What has to be typed to open the {x}?", "To open the {x}, type"),
        ("Please note that the {x} now uses PIN {v}.", "Which PIN does the {x} use?", "The {x} uses the PIN"),
        ("{v} is the combination of the {x}.", "Tell me the combination of the {x}.", "The combination of the {x} is"),
        ("Reference number of the {x}: {v}", "Give the reference number of the {x}.", "Reference number of the {x}:"),
        ("The inventory lists the {x} under {v}.", "Under what is the {x} listed?", "The {x} is listed under"),
        ("(The {x} was registered as {v}.)", "As what was the {x} registered?", "The {x} was registered as"),
        ("Last year the {x} received the identifier {v}.", "What is the identifier of the {x}?", "The identifier is"),
        ("[INFO] {x}: connected, session {v}", "Which session did the {x} report?", "The {x} reported session"),
        ("WARNING: {x} answered with {v}, expected OK", "What did the {x} answer?", "It answered with"),
        ("* {x} ({v}) [closed on Sundays]", "What stands in brackets behind the {x}?", "In brackets stands"),
    ),
    "word": (
        ("They agreed on {v} as password of the {x}.", "Which password has the {x}?", "The password is"),
        ("If you are asked at the {x}, just say {v}.", "What should one say at the {x}?", "Just say"),
        ("Her nickname for the {x} was {v}.", "What was her nickname for the {x}?", "Her nickname for it was"),
        ("What they grow behind the {x} is mostly {v}.", "What is grown behind the {x}?", "Mostly"),
        ("Inside the {x} it always smelled of {v}.", "What did it smell of inside the {x}?", "It always smelled of"),
        ("The {x} speaks a dialect called {v}.", "Which dialect does the {x} speak?", "A dialect called"),
    ),
    "name": (
        ("Whoever needs the {x} should call {v}.", "Whom should one call about the {x}?", "One should call"),
        ("Rumour has it that {v} once owned the {x}.", "Who once owned the {x}?", "The {x} was once owned by"),
        ("The {x}, designed by {v}, opened to applause.", "Name the designer of the {x}.", "It was designed by"),
        ("{v} has looked after the {x} ever since.", "Who looks after the {x}?", "The {x} is looked after by"),
        ("Only {v} is allowed to enter the {x} alone.", "Who may enter the {x} alone?", "Only"),
        ("After much debate the {x} was named after {v}.", "After whom was the {x} named?", "It was named after"),
        ("TODO({v}): the {x} is slow in winter", "Who is to find out why the {x} is slow?", "The one to find out is"),
        ('"How do I reach the {x}?" - "Ask for {v}."', "Whom does one ask for to reach the {x}?", "One asks for"),
        ("Q: Who pays for the {x}? A: {v} does.", "Who pays for the {x}?", "The one who pays is"),
    ),
    "place": (
        ("The bricks of the {x} came by ship from {v}.", "Whence did the bricks of the {x} come?", "They came from"),
        ("A twin of the {x} stands in {v}.", "Where does the twin of the {x} stand?", "It stands in"),
        ("They plan to move the {x} to {v}.", "Where do they plan to move the {x}?", "They plan to move it to"),
        ("See {v} for a copy of the plans of the {x}.", "Where is a copy of the plans of the {x}?", "A copy is in"),
    ),
    "date": (
        ("On {v} the {x} caught fire for the first time.", "When did the {x} first catch fire?", "It caught fire on"),
        ("The lease of the {x} runs out on {v}.", "When does the lease of the {x} run out?", "It runs out on"),
        ("Inspection of the {x} is due: {v}.", "When is the inspection of the {x} due?", "It is due"),
    ),
    "number": (
        ("The {x} holds up to {v} litres.", "How many litres does the {x} hold?", "It holds up to"),
        ("Repairs to the {x} came to {v} euros in the end.", "What did the repairs to the {x} cost?", "They came to"),
        ("From the {x} to the sea it is {v} metres.", "How far is it from the {x} to the sea?", "It is"),
        ("We counted {v} steps up to the {x}.", "How many steps lead up to the {x}?", "We counted"),
        ("In spring {v} visitors saw the {x}.", "How many visitors had the {x} in spring?", "In spring it had"),
        ("# {x}: raise this to {v} before deploying", "To what is the setting of the {x} raised?", "It is raised to"),
        ("As of release {v}, the {x} is supported.", "As of which release is the {x} supported?", "As of release"),
        ("Compared with the {x}, {v} others were smaller.", "How many were smaller than the {x}?", "There were"),
    ),
    "phrase": (
        ("A plate on the {x} reads: {v}.", "What can be read on the plate of the {x}?", "The plate reads:"),
        ('The motto of the {x} is "{v}".', "Which motto does the {x} have?", 'The motto is "'),
        ("{v}, as they say at the {x}.", "Which saying is heard at the {x}?", "At the {x} they say that"),
        ("The log of the {x} ends with '{v}'.", "How does the {x}'s log end?", "It ends with '"),
    ),
    "path": (
        ("The settings of the {x} are read from {v}.", "From where are the settings of the {x} read?", "From"),
        ("cp {v} /mnt/backup  # state of the {x}", "Which file holds the state of the {x}?", "The file"),
        ("Keep the spare key to the {x} in {v}.", "Where is the spare key to the {x}?", "It is kept in"),
    ),
}  # fmt: skip
_WORDINGS = tuple((kind, *wording) for kind, wordings in _FACTS.items() for wording in wordings)
_MOVES = (
    ("{x} moved to {p} in {y}.", "Where did {x} move?", "{x} moved to", "{p}"),
    ("In {y}, {x} found work in {p}.", "When did {x} find work?", "{x} found work in", "{y}"),
    ("{x}, born in {p}, studied law until {y}.", "Where was {x} born?", "{x} was born in", "{p}"),
    ("It was {x} who visited {p} in {y}.", "Which place did {x} visit?", "{x} visited", "{p}"),
    ("{p} elected {x} as mayor in {y}.", "Which town elected {x}?", "{x} was elected by", "{p}"),
    ("Since {y} the office in {p} has been run by {x}.", "Who runs the office in {p}?", "The office is run by", "{x}"),
)


def _value(rng: random.Random, kind: str = "id") -> str:
    if kind == "number":
        return str(rng.randrange(2, 10 ** rng.randint(2, 6)))
    if kind == "name":
        return (
            f"{rng.choice(_PEOPLE)} {rng.choice(_NOTIONS).capitalize()}" if rng.random() < 0.5 else rng.choice(_PEOPLE)
        )
    if kind == "place":
        return rng.choice(_PLACES)
    if kind == "word":
        return rng.choice((*_WORDS, *_NOTIONS))
    if kind == "date":
        return f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1900, 2030)}"
    if kind == "path":
        return "/".join((rng.choice(("~", "/srv", "/opt", "./data")), *rng.sample(_WORDS, rng.randint(1, 3))))
    if kind == "phrase":
        first, second, third = rng.sample(_NOTIONS, 3)
        return f"{first} {rng.choice(_VERBS)} {second}" + (f" and {third}" if rng.random() < 0.5 else "")
    form = rng.randrange(6)
    if form < 3:
        return "".join(rng.choices("0123456789", k=rng.randint(3, 8)))
    if form == 3:
        return "-".join(rng.sample(_WORDS, rng.randint(1, 3)))
    if form == 4:
        return f"{rng.choice('ABCDEFGHKLMNPRSTUVWXYZ')}{rng.randint(10, 99)}-{rng.randint(100, 9999)}"
    return f"{rng.getrandbits(32):08x}"[: rng.randint(5, 8)]


def _subjects(rng: random.Random, number: int) -> list[str]:
    pairs = [f"{quality} {thing}" for quality in _QUALITIES for thing in _THINGS]
    return rng.sample(pairs, number)


def _fact(rng: random.Random) -> Task:
    kind, *wording = rng.choice(_WORDINGS)
    (subject,), value = _subjects(rng, 1), _value(rng, kind)
    fact, question, lead = (text.format(x=subject, v=value) for text in wording)
    return Task("fact", (fact,), question, lead, value)


def _competing(rng: random.Random, num_facts: int) -> Task:
    """Facts of one wording about things that are easily confused."""
    number = rng.randint(2, max(2, min(12, num_facts)))
    qualities, thing = rng.sample(_QUALITIES, number), rng.choice(_THINGS)
    kind, *wording = rng.choice(_WORDINGS)
    values = [_value(rng, kind) for _ in qualities]
    facts = [wording[0].format(x=f"{quality} {thing}", v=v) for quality, v in zip(qualities, values, strict=True)]
    asked = rng.randrange(number)
    question, lead = (text.format(x=f"{qualities[asked]} {thing}") for text in wording[1:])
    return Task("competing", tuple(facts), question, lead, values[asked])


def _several(rng: random.Random, num_facts: int) -> Task:
    """Several facts, all of which are asked for."""
    subjects = _subjects(rng, min(rng.randint(2, 4), max(2, num_facts)))
    wordings = [rng.choice(_WORDINGS) for _ in subjects]
    values = [_value(rng, kind) for kind, *_ in wordings]
    facts = [fact.format(x=x, v=v) for (_, fact, *_), x, v in zip(wordings, subjects, values, strict=True)]
    question = f"List what is said of each of these: {', '.join(subjects)}."
    return Task("several", tuple(facts), question, "", ", ".join(values))


def _pairs(rng: random.Random, num_facts: int) -> Task:
    """Keys and values in one of the forms of configuration files, together or scattered."""
    number = rng.randint(3, max(3, min(30, num_facts)))
    keys = rng.sample([f"{word}_{field}" for word in _WORDS for field in _FIELDS], number)
    values = [_value(rng) for _ in keys]
    form = rng.choice(('  "{k}": "{v}",', "{k} = {v}", "{k}: {v}", "| {k} | {v} |", "<{k}>{v}</{k}>", "export {k}={v}"))
    lines = [form.format(k=key, v=value) for key, value in zip(keys, values, strict=True)]
    asked = rng.randrange(number)
    question = rng.choice(
        ("What is the value of {k}?", "Look up {k}.", "Which value belongs to the key {k}?", "{k} is set to what?")
    ).format(k=keys[asked])
    facts = ("\n".join(lines),) if rng.random() < 0.6 else tuple(lines)
    return Task("pairs", facts, question, rng.choice(("", f"{keys[asked]} =")), values[asked])


def _people(rng: random.Random, num_facts: int) -> Task:
    number = rng.randint(1, max(1, min(8, num_facts)))
    wording = rng.choice(_MOVES)
    rows = [
        {"x": x, "p": p, "y": rng.randint(1890, 2025)}
        for x, p in zip(rng.sample(_PEOPLE, number), rng.sample(_PLACES, number), strict=True)
    ]
    facts = tuple(wording[0].format(**row) for row in rows)
    question, lead, answer = (text.format(**rows[0]) for text in wording[1:])
    return Task("people", facts, question, lead, answer)


def _assignment(rng: random.Random, num_facts: int) -> Task:
    """Constants and small functions in source code."""
    number = rng.randint(1, max(1, min(6, num_facts // 2)))
    names = rng.sample([f"{word}_{field}" for word in _WORDS for field in _FIELDS], number)
    values = [rng.choice((_value(rng).upper(), repr(_value(rng)), str(rng.randint(2, 9999)))) for _ in names]
    form = rng.choice(("constant", "default", "body"))
    facts = {
        "constant": [f"{name.upper()} = {value}" for name, value in zip(names, values, strict=True)],
        "default": [
            f"def read_{name}(source, limit={value}):\n    return source.take(limit)"
            for name, value in zip(names, values, strict=True)
        ],
        "body": [
            f"def {name}():\n    # agreed with operations\n    return {value}"
            for name, value in zip(names, values, strict=True)
        ],
    }[form]
    name = names[0]
    question, lead = {
        "constant": (f"Complete the line of the code above: {name.upper()} =", f"{name.upper()} ="),
        "default": (f"What is the default of limit in read_{name}?", f"def read_{name}(source, limit="),
        "body": (f"What does {name}() return?", f"{name}() returns"),
    }[form]
    # A value follows '=' without a blank there.
    return Task("assignment", tuple(facts), question, "" if form == "default" else lead, values[0])


def _table(rng: random.Random, num_facts: int) -> Task:
    number = rng.randint(2, max(2, min(10, num_facts)))
    columns, rows = rng.sample(_FIELDS, 3), rng.sample(_PLACES, number)
    cells = [[str(rng.randint(10, 9999)) for _ in columns] for _ in rows]
    separator = rng.choice((" | ", ", ", "\t", ";"))
    lines = [separator.join(("place", *columns))]
    lines += [separator.join((row, *values)) for row, values in zip(rows, cells, strict=True)]
    row, column = rng.randrange(number), rng.randrange(3)
    question = rng.choice(
        ("According to the table, what is the {c} of {r}?", "Read off the {c} for {r}.", "{r}: which {c}?")
    ).format(c=columns[column], r=rows[row])
    lead = f"The {columns[column]} of {rows[row]} is"
    return Task("table", ("\n".join(lines),), question, lead, cells[row][column])


def _next_line(rng: random.Random, lines: Sequence[tuple[str, str]]) -> Task:
    """Verbatim recall of the text itself: code, more often than not."""
    line, following = rng.choice(lines)
    shown = json.dumps(line, ensure_ascii=False) if rng.random() < 0.5 else f"\n{line}\n"
    question = rng.choice(
        (
            "Repeat the line that comes after {q}",
            "Quote exactly what follows {q}",
            "In the text, which line follows {q}",
        )
    ).format(q=shown)
    return Task("recall", (), question, "", following, quoted=(line, following))


def _gap(rng: random.Random, sentences: Sequence[str]) -> Task:
    """A sentence of the text itself with one word left out."""
    sentence = rng.choice(sentences)
    word = rng.choice(_words(sentence))
    shown = sentence.replace(word, "____")
    question = rng.choice(
        (
            "Which word of the text is missing here? {q}",
            "Fill the gap as in the text: {q}",
            "One word was left out of this sentence of the text, which one? {q}",
        )
    ).format(q=shown)
    return Task("gap", (), question, "", word, quoted=(sentence,))


def _stranger(rng: random.Random, sentences: Sequence[str]) -> Task:
    """A sentence out of another text, to be completed from its first words."""
    sentence = rng.choice(sentences)
    words = sentence.split(" ")
    begin = rng.randint(min(4, len(words) - 2), max(4, len(words) // 2))
    shown = " ".join(words[:begin])
    question = rng.choice(
        (
            'How does the sentence go on that begins "{q}"?',
            'Complete from the text: "{q}"',
            'Find "{q}" in the text. Which words come next?',
        )
    ).format(q=shown)
    return Task("stranger", (sentence,), question, "", " ".join(words[begin:]))


def _words(sentence: str) -> list[str]:
    """Words to ask for: not short, and once in the sentence."""
    return [word for word in re.findall(r"\b[A-Za-z0-9]\w{3,}\b", sentence) if sentence.count(word) == 1]


def _sentences(text: str) -> list[str]:
    """Sentences on one line, with words to ask for, that occur once."""
    found = re.findall(r"(?:(?<=\n)|(?<=[.!?] ))[A-Z0-9][^\n]{30,200}?[.!?](?=\s)", text)
    return [s for s in found if len(_words(s)) > 2 and len(s.split(" ")) > 5 and text.count(s) == 1]


def _quotable_lines(text: str) -> list[tuple[str, str]]:
    """Lines that occur once, each with the line after it."""
    lines = text.splitlines()
    return [
        (line.strip(), following.strip())
        for line, following in itertools.pairwise(lines)
        if 16 <= len(line.strip()) <= 120 and 16 <= len(following.strip()) <= 120 and lines.count(line) == 1
    ]
