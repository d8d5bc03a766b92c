"""``sdtp eval ruler``: RULER (arXiv 2404.06654) through lm-evaluation-harness, without a download.

11 of its 13 tasks. Six need no files. Five hide needles in essays, which the caller has as files. A needle stands
between two sentences: here punctuation ends a sentence; in lm-eval a model of nltk does, which is a download. All else
is lm-eval's. The two other tasks need SQuAD and HotpotQA.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from sdtp_eval import command, compare, records, schedules
from sdtp_eval.methods import (
    FROM_PROMPTS,
    add_dropped_kv_options,
    add_methods_option,
    check_budget,
    find_methods,
    name_of,
    patch,
    plan,
    shorten,
)
from sdtp_eval.paired import GateError
from sdtp_eval.tasks import AFTER, PROTOCOLS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from sdtp_eval.methods import Method
    from sdtp_kernels import PruningSchedule

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
COMMON = {"ruler_cwe": 10, "ruler_fwe": 3}  # how many of the most frequent words are asked for


class Question(NamedTuple):
    """One sample of a task, as it is asked."""

    name: str
    """Of the task."""
    instance: Any
    """lm-eval's request: the prompt and how long an answer may be."""
    expected: list[str]
    essays: str | None
    """Their digest, where the prompt is made of them."""

    @property
    def prompt(self) -> str:
        return str(self.instance.args[0])

    @property
    def id(self) -> str:
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


class Essays(NamedTuple):
    """What five tasks hide their needles in."""

    texts: list[str]
    digest: str
    """Of all words in their order."""


def read_essays(folder: Path) -> Essays:
    """The ``*.txt`` of a folder, in the order of their names.

    Raises
    ------
    ValueError
        If there are none.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    if not texts:
        raise ValueError(f"--essays {folder}: no *.txt there; benchmarks/ruler_essays.sh fetches RULER's essays")
    words = " ".join(texts).split()
    return Essays(texts, hashlib.sha256(" ".join(words).encode()).hexdigest()[:16])


def add_parser(commands: Any) -> None:
    """Add ``ruler`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("ruler", help="RULER tasks through lm-eval (extra: ruler)")
    records.add_options(parser, against=[compare.DENSE, *compare.AGAINST])
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK",
        help=f"default: {' '.join(TASKS)}; with --essays also {' '.join(ESSAY_TASKS)}",
    )  # fmt: skip
    parser.add_argument("--essays", metavar="DIR", help="text files to hide needles in; see benchmarks/ruler_essays.sh")
    add_methods_option(
        parser, ["random", "recent", "attention"], "pruner files, scorers and cutters; dense always runs too"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024], help="prompt lengths (default: 1024)")
    parser.add_argument("--samples", type=int, default=20, help="samples a task and length (%(default)s)")
    parser.add_argument(
        "--skip", type=int, default=0, metavar="K",
        help="leave out the first K of these, by which something was chosen (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--new-tokens", type=int, help="longest answer (default: the task's own, 30 to 128)")
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS),
        help="see 'run'; published scores of RULER are 'inside' (default: both)",
    )  # fmt: skip
    command.add_model_options(parser)
    schedules.add_options(parser)
    add_dropped_kv_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``sdtp eval ruler``."""
    from sdtp_kernels.cli import CommandError

    try:
        import lm_eval  # noqa: F401 - said here, before a model is loaded
    except ImportError as error:
        raise CommandError(f"RULER runs through lm-eval ({error}): pip install 'sdtp-kernels[ruler]'") from error
    return records.report(args, evaluate)


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer what the directory ``args.out`` does not hold yet.

    Returns
    -------
    list of dict
        Per-sample results as they stand in ``samples.jsonl``. ``exact`` is RULER's own measure: the share of the
        expected strings that the answer contains. In the protocol ``after`` the question follows the pruned rest. Those
        of this call stand here a second time under the task ``ruler, mean of N tasks``: each task has as many samples.

    Raises
    ------
    ValueError
        If a method is an oracle, which needs the answer's tokens; if a task does not exist or needs essays; if no
        sample is left; if the directory holds answers from other essays.
    GateError
        If a prompt was not read whole or is too long for the model, an expected answer is not the prompt's, or a method
        had another budget than its schedule; no figures then.
    """
    if not 0 <= args.skip < args.samples:
        raise ValueError(f"--skip {args.skip}: expected fewer than the {args.samples} of --samples, and not below 0")
    essays = read_essays(Path(args.essays)) if args.essays else None
    args.tasks = list(dict.fromkeys(args.tasks or [*TASKS, *(ESSAY_TASKS if essays else ())]))
    check_tasks(args.tasks, essays)
    methods = find_methods(args.methods, FROM_PROMPTS)
    model, tokenizer = command.load_model(args)
    asked = {}
    for tokens in args.tokens:
        entries = plan(args, methods, model.config.num_hidden_layers, tokens)
        questions = [
            question
            for name in args.tasks
            for question in make_questions(model, tokenizer, name, tokens, args.samples, essays)[args.skip :]
        ]
        for question, protocol, entry in itertools.product(questions, args.protocols, entries):
            key = (f"ruler {question.name}", protocol, tokens, question.id, name_of(entry[0]), entry[1])
            asked[key] = question, protocol, entry
    file = records.open_results(Path(args.out), args, model)
    results = compare.read_samples([file])
    others = {result["essays"] for result in results if result.get("essays")} - {essays.digest if essays else ""}
    if essays and others:
        raise ValueError(
            f"--essays {args.essays}: digest {essays.digest}, and --out {args.out} holds answers to essays of digest "
            f"{', '.join(sorted(others))}; give another directory"
        )
    done = {records.key_of(result) for result in results}
    missing = {key: about for key, about in asked.items() if key not in done}
    if missing:
        records.record_run(args, model)
    with (
        command.progress_bar(len(asked), done=len(asked) - len(missing)) as bar,
        file.open("a", encoding="utf-8") as out,
    ):
        for key, (question, protocol, (method, _, schedule)) in missing.items():
            bar.show(f"{question.name} {key[2]}")
            with patch(model, method, schedule, args.backend):
                result = answer(args, model, tokenizer, question, protocol, method, schedule)
            out.write(json.dumps({**dict(zip(compare.KEY, key, strict=True)), **result}) + "\n")
            out.flush()
            bar.advance()
    results = compare.read_samples([file])
    if len(args.tasks) == 1:
        return results
    mean = f"ruler, mean of {len(args.tasks)} tasks"
    return [*results, *({**result, "task": mean} for result in results if records.key_of(result) in asked)]


def answer(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    question: Question,
    protocol: str,
    method: Method | None,
    schedule: PruningSchedule | None,
) -> dict[str, Any]:
    """The answer of the model, patched already, and how good it is.

    Raises
    ------
    GateError
        See :func:`sdtp_eval.methods.check_budget`.
    """
    from sdtp_eval.lm_eval_adapter import SdtpLM

    num_layers, prompt, expected = model.config.num_hidden_layers, question.prompt, question.expected
    adapter = SdtpLM(
        model,
        tokenizer,
        split=split_question if protocol == AFTER else None,
        shorten=lambda ids: shorten(method, schedule, ids, num_layers),
        max_new_tokens=args.new_tokens,
    )
    begin = time.perf_counter()
    (text,) = adapter.generate_until([question.instance], disable_tqdm=True)
    seconds = time.perf_counter() - begin
    length = len(tokenizer(split_question(prompt)[0] if protocol == AFTER else prompt).input_ids)
    kept = adapter.computed[prompt] / length
    check_budget(kept, method, schedule, length, num_layers)
    return {
        "kind": question.name,
        "exact": sum(word.lower() in text.lower() for word in expected) / len(expected),
        "answer": text,
        "expected": expected,
        "mean_keep": kept,
        "prompt_tokens": length,
        "seconds_with_answer": seconds,
        **({"essays": question.essays} if question.essays else {}),
    }


# ------------------------------------------------------------------------------------------------------- questions


def check_tasks(names: Sequence[str], essays: Essays | None) -> None:
    """Refuse tasks that cannot be made here.

    Raises
    ------
    ValueError
        If a task is not one of :data:`TASKS` and :data:`ESSAY_TASKS`, or is one of the latter without essays.
    """
    unknown = [name for name in names if name not in (*TASKS, *ESSAY_TASKS)]
    if unknown:
        raise ValueError(f"no RULER task {unknown[0]!r} here; there are {', '.join((*TASKS, *ESSAY_TASKS))}")
    without = [name for name in names if name in ESSAY_TASKS]
    if without and essays is None:
        raise ValueError(
            f"{', '.join(without)}: needles are hidden in essays, which are not part of this package; fetch them with "
            "benchmarks/ruler_essays.sh DIR and give --essays DIR"
        )


def make_questions(
    model: Any, tokenizer: Any, name: str, tokens: int, samples: int, essays: Essays | None
) -> list[Question]:
    """The first samples of a task, as lm-eval makes them for this tokenizer.

    Raises
    ------
    ValueError
        If there are not as many.
    GateError
        If a prompt is longer than the model was made for or less than half as long as was asked for, or does not say
        what is expected as its answer.
    """
    import numpy as np
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import setup_logging

    longest = getattr(model.config, "max_position_embeddings", None)
    # RULER makes its samples to measure, with the tokenizer of this name.
    settings = {"max_seq_lengths": [tokens], "tokenizer": str(tokenizer.name_or_path)}
    with _offline(tokenizer, essays) as folder:
        setup_logging("ERROR")
        # These tasks alone: reading the descriptions of all the others takes longer than a short evaluation.
        manager = TaskManager(include_path=str(folder), include_defaults=False, metadata=settings)
        if name == "ruler_vt":
            _check_tracking(tokenizer, tokens)
        # As simple_evaluate() of lm-eval begins: a task's samples are the same whatever else is asked for.
        random.seed(0)
        np.random.seed(1234)
        task = manager.load([name])["tasks"][name]
        task.build_all_requests(limit=samples)
    if len(task.instances) < samples:
        raise ValueError(f"--samples {samples}: lm-eval makes {len(task.instances)} of {name} at {tokens} tokens")
    questions = []
    for instance in task.instances:
        digest = essays.digest if essays and name in ESSAY_TASKS else None
        question = Question(name, instance, list(instance.doc["outputs"]), digest)
        length = len(tokenizer(question.prompt).input_ids)
        if longest is not None and length > longest:
            raise GateError(
                f"no figures: {name} at {tokens} tokens has a prompt of {length}, and the model was made for "
                f"{longest}; ask for fewer with --tokens"
            )
        if instance.doc["length"] < tokens / 2:  # with room for the answer
            raise GateError(
                f"no figures: {name} at {tokens} tokens has a prompt of {length}: lm-eval finds nothing between that "
                "and too long, or the essays are too short; ask for another length with --tokens, or give more essays"
            )
        found = answers_in(name, question.prompt)
        if not question.expected or not found.issuperset(question.expected):
            raise GateError(
                f"no figures: {name} at {tokens} tokens expects {question.expected}, and its prompt says "
                f"{sorted(found)}; the prompt was cut, the answer is wrong, or there was no room for a question"
            )
        questions.append(question)
    return questions


def answers_in(name: str, prompt: str) -> set[str]:
    """What a prompt gives as the answer to its question, read from its text alone.

    Examples
    --------
    >>> needles = [f"One of the special magic numbers for {key} is: {value}." for key, value in [("a", 17), ("b", 4)]]
    >>> answers_in("niah_single_1", " ".join(needles) + "\\nWhat is the special magic number for a mentioned above?")
    {'17'}
    """
    context, question = split_question(prompt)
    if name in COMMON:
        words = re.findall(r"\d+\. (.+?)(?=\s\d+\. |\s*$)", context) if name == "ruler_cwe" else context.split()
        counts = Counter(word for word in words if word != "...")
        least = min((count for _, count in counts.most_common(COMMON[name])), default=0)
        return {word for word, count in counts.items() if count >= least}
    if name == "ruler_vt":
        reached = set(re.findall(r"assigned the value (\d+)", question))
        for variable, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):
            reached |= {variable} if source in reached else set()
        return reached
    asked = re.search(r" for (.+?) mentioned", question)
    keys = re.split(r", and |, ", asked[1]) if asked else []
    needles = re.findall(r"One of the special magic \w+ for (.+?) is: (.+?)\.", context)
    return {value for key, value in needles if key in keys}


def split_question(prompt: str) -> tuple[str, str]:
    """The context of a RULER prompt, and its question with the beginning of the answer, from its last line or two."""
    start = max(prompt.rfind("\nQuestion: "), prompt.rfind("\nWhat "))
    return (prompt[:start], prompt[start:]) if start >= 0 else (prompt, "")


def _check_tracking(tokenizer: Any, tokens: int) -> None:
    """Refuse lengths for which lm-eval would look for a short enough prompt without end."""
    from lm_eval.tasks.ruler import vt_utils

    def smallest(lines: int, is_example: bool) -> int:
        prompt, names = vt_utils.generate_input_output(lines, 1, 4, is_icl=is_example)
        return len(tokenizer(f"{prompt} {names}").input_ids) + 50  # the answer, and what one prompt has over another

    example, shortest = smallest(5, True), 500 + smallest(10, False)
    if example > 500 or shortest > tokens:
        raise ValueError(
            f"ruler_vt at {tokens} tokens: its example takes {example} of at most 500, and its shortest prompt up to "
            f"{shortest}; ask for more with --tokens, or for other tasks with --tasks"
        )


def split_sentences(text: str) -> list[str]:
    """Cut after every full stop, question mark or exclamation mark that a space follows.

    Examples
    --------
    >>> split_sentences("It is. Is it? 1.5 it is.")
    ['It is.', 'Is it?', '1.5 it is.']
    """
    return re.split(r"(?<=[.!?])\s+", text)


@contextlib.contextmanager
def _offline(tokenizer: Any, essays: Essays | None) -> Iterator[Path]:
    """RULER with the tokenizer and essays that are loaded already, and without a download; yields its folder.

    It would load the tokenizer again, running code from the model's directory, and ask servers for essays and for a
    model of where sentences end.
    """
    import nltk
    from transformers import AutoTokenizer

    with (
        mock.patch.object(nltk, "download", return_value=False),
        contextlib.redirect_stdout(io.StringIO()),  # it says how far its search is
    ):
        from lm_eval.tasks.ruler import prepare_niah

        # Its shuffling goes on from one call to the next; loaded again it begins again.
        sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
        prepare_niah.get_haystack.cache_clear()
        texts = essays.texts if essays else []
        try:
            with (
                mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer),
                mock.patch.object(prepare_niah.datasets, "load_dataset", return_value={"text": texts}),
                mock.patch.object(prepare_niah, "cached_sent_tokenize", split_sentences),
            ):
                yield Path(prepare_niah.__file__).parent
        finally:
            prepare_niah.get_haystack.cache_clear()
