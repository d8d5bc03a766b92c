"""``sdtp eval longbench``: LongBench v1 (arXiv 2308.14508), where its files are.

The files are the ``<dataset>.jsonl`` of the benchmark, with ``input``, ``context``, ``answers`` and ``all_classes``;
they are not part of this package. Prompts, answer lengths and measures are those of the benchmark. A context that is
too long is cut in its middle, as there.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import string
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import command, compare, records, schedules, tasks
from sdtp_eval.methods import add_dropped_kv_options, add_methods_option, find_methods, patch, plan
from sdtp_eval.reader import greedy
from sdtp_eval.tasks import AFTER, INSIDE, PROTOCOLS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

FIELDS = ("input", "context", "answers", "all_classes")


# --------------------------------------------------------------------------------------------------------- measures


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(answer: str, expected: str, classes: list[str]) -> float:
    """F1 over the words of both."""
    found, wanted = normalize(answer).split(), normalize(expected).split()
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def rouge_l(answer: str, expected: str, classes: list[str]) -> float:
    """F1 of the longest common subsequence of words."""
    found, wanted = answer.split(), expected.split()
    row = [0] * (len(wanted) + 1)
    for word in found:
        diagonal = 0
        for j, other in enumerate(wanted, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(found) + len(wanted)) if row[-1] else 0.0


def class_share(answer: str, expected: str, classes: list[str]) -> float:
    """1 over the number of class names in the answer, if the right one is among them."""
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == expected or name not in expected]
    return 1 / len(named) if expected in named else 0.0


def number_share(answer: str, expected: str, classes: list[str]) -> float:
    """Share of the numbers in the answer that are the right one."""
    right = re.findall(r"\d+", expected)[-1:]
    numbers = re.findall(r"\d+", answer)
    return sum(number in right for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(answer: str, expected: str, classes: list[str]) -> float:
    """Edit similarity of the first line of code, 0 to 1."""
    lines = (line for line in answer.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return difflib.SequenceMatcher(None, next(lines, answer), expected).ratio()


# --------------------------------------------------------------------------------------------------------- datasets


class Dataset(NamedTuple):
    """How one dataset is asked and judged."""

    before: str
    """The prompt before the context."""
    after: str
    """And after it; ``{input}`` is the question."""
    new_tokens: int
    measure: Callable[[str, str, list[str]], float]
    chat: bool = True
    """Whether the chat template is used: not where the prompt is examples or code to be continued."""
    first_line: bool = False
    """Whether only the first line of the answer counts."""


_ONLY = "Only give me the answer and do not output any other words."
_SINGLE = "Answer the question as concisely as you can, using a single phrase or sentence if possible. "
_BASED = _SINGLE.replace("question as", "question based on the above article as")
_UNKNOWN = (
    'If the question cannot be answered based on the information in the article, write "unanswerable". If the question '
    'is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
)
_STORY = "using a single phrase if possible. Do not provide any explanation.\n\n"
_PASSAGES = Dataset(
    f"Answer the question based on the given passages. {_ONLY}\n\nThe following are given passages.\n",
    f"\n\nAnswer the question based on the given passages. {_ONLY}\n\nQuestion: {{input}}\nAnswer:",
    32,
    word_f1,
)

DATASETS: dict[str, Dataset] = {
    # "asconcisely" is how the benchmark writes it.
    "narrativeqa": Dataset(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        f"asconcisely as you can, {_STORY}Story: ",
        f"\n\nNow, answer the question based on the story asconcisely as you can, {_STORY}Question: {{input}}\n\n"
        "Answer:",
        128,
        word_f1,
    ),
    "qasper": Dataset(
        f"You are given a scientific article and a question. {_SINGLE}{_UNKNOWN}Article: ",
        f"\n\n {_BASED}{_UNKNOWN}Question: {{input}}\n\nAnswer:",
        128,
        word_f1,
    ),
    "multifieldqa_en": Dataset(
        "Read the following text and answer briefly.\n\n",
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        64,
        word_f1,
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": Dataset(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n",
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        rouge_l,
    ),
    "qmsum": Dataset(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n",
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n"
        "Answer:",
        512,
        rouge_l,
    ),
    "multi_news": Dataset(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        rouge_l,
    ),
    "trec": Dataset(
        "Please determine the type of the question below. Here are some examples of questions.\n\n",
        "\n{input}",
        64,
        class_share,
        chat=False,
        first_line=True,
    ),
    "triviaqa": Dataset(
        f"Answer the question based on the given passage. {_ONLY} The following are some examples.\n\n",
        "\n\n{input}",
        32,
        word_f1,
        chat=False,
        first_line=True,
    ),
    "samsum": Dataset(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
        "\n\n{input}",
        128,
        rouge_l,
        chat=False,
        first_line=True,
    ),
    "passage_count": Dataset(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n",
        "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should "
        "only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        number_share,
    ),
    "passage_retrieval_en": Dataset(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n",
        "\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is "
        'from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        number_share,
    ),
    "lcc": Dataset("Please complete the code given below. \n", "Next line of code:\n", 64, code_similarity, chat=False),
    "repobench-p": Dataset(
        "Please complete the code given below. \n", "{input}Next line of code:\n", 64, code_similarity, chat=False
    ),
}


def read_dataset(folder: Path, name: str) -> list[dict[str, Any]]:
    """The samples of ``folder/name.jsonl``.

    Raises
    ------
    ValueError
        If the dataset is unknown, its file is missing or not of LongBench's form, or its contexts are empty.
    """
    if name not in DATASETS:
        raise ValueError(f"no LongBench dataset {name!r}; known: {', '.join(DATASETS)}")
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. LongBench is not part of this package: unpack data.zip of THUDM/LongBench and give "
            "its folder with --data"
        )
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            missing = [field for field in FIELDS if field not in sample]
        except (json.JSONDecodeError, TypeError):
            raise ValueError(f"{path}, line {number}: not JSON; expected one object a line") from None
        # Copies without contexts are about: on those a model answers from memory, and there is nothing to prune.
        if missing or not sample["context"]:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing) or 'context'}; not a file of LongBench v1")
        samples.append(sample)
    return samples


def judge(name: str, answer: str, sample: dict[str, Any]) -> float:
    """The benchmark's measure of one answer, 0 to 1: the best over the accepted answers.

    ROUGE-L is computed over the words of the whole text, the benchmark's own by sentences: for summaries compare
    figures of this program with each other only.
    """
    dataset = DATASETS[name]
    if dataset.first_line:
        answer = answer.lstrip("\n").split("\n")[0]
    classes = sample["all_classes"] or []
    return max((dataset.measure(answer, expected, classes) for expected in sample["answers"]), default=0.0)


def build_prompt(
    tokenizer: Any, dataset: Dataset, sample: dict[str, Any], num_tokens: int
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt up to the end of its context, and of what follows; the middle of a long context is cut.

    Raises
    ------
    ValueError
        If the question alone has more than `num_tokens` tokens.
    """
    head, tail = tasks.chat_template(tokenizer, dataset.chat)
    if not dataset.chat:
        tail = ""
    # Not str.format: a question may hold braces.
    question = tasks.encode(tokenizer, dataset.after.replace("{input}", sample["input"]) + tail)
    before = [*head, *tasks.encode(tokenizer, dataset.before)]
    context = tasks.encode(tokenizer, sample["context"])
    room = num_tokens - len(before) - len(question)
    if room < 1:
        raise ValueError(f"--tokens {num_tokens}: a question takes {num_tokens - room} tokens; ask for more")
    if len(context) > room:
        context = [*context[: room // 2], *context[len(context) - (room - room // 2) :]]
    return [*before, *context], question


# --------------------------------------------------------------------------------------------------------- command


def add_parser(commands: Any) -> None:
    """Add ``longbench`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("longbench", help="LongBench v1, from its files")
    parser.add_argument("--data", metavar="DIR", required=True, help="folder with the <dataset>.jsonl of LongBench v1")
    records.add_options(parser)
    parser.add_argument("--tasks", nargs="+", default=list(DATASETS), metavar="DATASET", help="default: all in English")
    add_methods_option(parser, ["random", "recent", "attention"], "pruner files and scorers; dense always runs too")
    parser.add_argument("--tokens", type=int, default=4096, help="longest prompt (%(default)s)")
    parser.add_argument("--samples", type=int, help="samples a dataset (default: all)")
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=[INSIDE], help="see 'run' (default: inside)"
    )
    command.add_model_options(parser)
    schedules.add_options(parser)
    add_dropped_kv_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``sdtp eval longbench``."""
    return records.report(args, evaluate)


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer what the directory ``args.out`` does not hold yet; ``exact`` is the benchmark's measure, 0 to 1."""
    import torch

    questions = [
        (name, sample) for name in args.tasks for sample in read_dataset(Path(args.data), name)[: args.samples]
    ]
    methods = find_methods(args.methods, oracles=False)
    model, tokenizer = command.load_model(args)
    num_layers = model.config.num_hidden_layers
    entries = plan(args, methods, num_layers, args.tokens)
    path = records.open_results(Path(args.out), args, model)
    done = {tuple(result[key] for key in compare.KEY) for result in compare.read_samples([path])}
    with (
        command.progress_bar(len(questions)) as bar,
        path.open("a", encoding="utf-8") as file,
        torch.no_grad(),
    ):
        for name, sample in questions:
            bar.show(f"longbench {name}")
            context, question = build_prompt(tokenizer, DATASETS[name], sample, args.tokens)
            sample_id = hashlib.sha256(json.dumps([name, context, question]).encode()).hexdigest()[:16]
            for (method, label, schedule), protocol in itertools.product(entries, args.protocols):
                method_name = method.name if method else compare.DENSE
                key = (f"longbench {name}", protocol, args.tokens, sample_id, method_name, label)
                if key in done:
                    continue
                pruned, after = (context, question) if protocol == AFTER else ([*context, *question], [])
                begin = time.perf_counter()
                with patch(model, method, schedule, args.backend):
                    new = greedy(model, pruned, after, DATASETS[name].new_tokens)
                answer = str(tokenizer.decode(new, skip_special_tokens=True))
                result = {
                    **dict(zip(compare.KEY, key, strict=True)),
                    "kind": name,
                    "exact": judge(name, answer, sample),
                    "answer": answer,
                    "expected": sample["answers"],
                    "mean_keep": schedule.mean_keep(len(pruned), num_layers) if schedule else 1.0,
                    "prompt_tokens": len(pruned),
                    "seconds_with_answer": time.perf_counter() - begin,
                }
                file.write(json.dumps(result) + "\n")
                file.flush()
            bar.advance()
    return compare.read_samples([path])
