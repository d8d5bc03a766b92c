"""``sdtp eval longbench``: LongBench v1 (arXiv 2308.14508), where its files are.

The files are the ``<dataset>.jsonl`` of the benchmark, with ``input``, ``context``, ``answers`` and ``all_classes``;
they are not part of this package. Prompts, answer lengths and measures are those of lm-evaluation-harness, which took
them from the benchmark. What it changed on the way: a prompt ends without white space (the benchmark has a line break
after "Next line of code:" and a space after "The final answer is:"), and the similarity of code is that of the first
line that is not blank. A context that is too long is cut in its middle, as in the benchmark.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import command, compare, records, schedules, tasks
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
from sdtp_eval.reader import greedy, prefilled_tokens
from sdtp_eval.tasks import INSIDE, PROTOCOLS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from sdtp_eval.methods import Method

FIELDS = ("input", "context", "answers", "all_classes")
DATASETS = (
    "narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "gov_report", "qmsum", "multi_news",
    "trec", "triviaqa", "samsum", "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
# Examples or code to be continued: the benchmark asks these without a chat template. lm-eval leaves that to its caller.
NO_CHAT = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")


class Dataset(NamedTuple):
    """How one dataset is asked and judged."""

    before: str
    """The prompt before the context."""
    after: str
    """And after it; ``{{question}}`` is the question."""
    new_tokens: int
    until: Sequence[str]
    """What ends an answer."""
    measure: Callable[[dict[str, Any], list[str]], dict[str, float]]
    """Of lm-eval: a sample and its answer to the measure, 0 to 1."""
    chat: bool
    """Whether the chat template is used."""


@functools.cache
def find_dataset(name: str) -> Dataset:
    """The dataset as lm-eval describes it.

    Raises
    ------
    ValueError
        If it is not one of :data:`DATASETS`.
    ImportError
        If lm-eval, or what its measures need, is not installed.
    """
    if name not in DATASETS:
        raise ValueError(f"no LongBench dataset {name!r}; known: {', '.join(DATASETS)}")
    try:
        import yaml
        from lm_eval.tasks.longbench import metrics
    except ImportError as error:
        raise ImportError(
            f"LongBench's prompts and measures are those of lm-eval ({error}): pip install 'sdtp-kernels[ruler]'"
        ) from None

    class Loader(yaml.SafeLoader):
        """Names of functions as what they name."""

    Loader.add_constructor("!function", lambda _, node: getattr(metrics, node.value.removeprefix("metrics.")))
    described = yaml.load(Path(metrics.__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"), Loader)
    before, _, after = described["doc_to_text"].partition("{{context}}")
    settings = described["generation_kwargs"]
    return Dataset(
        before, after, settings["max_gen_toks"], settings["until"], described["process_results"], name not in NO_CHAT
    )


def read_dataset(folder: Path, name: str) -> list[dict[str, Any]]:
    """The samples of ``folder/name.jsonl``.

    Raises
    ------
    ValueError
        If its file is missing or not of LongBench's form, or its contexts are empty.
    """
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


def judge(dataset: Dataset, answer: str, sample: dict[str, Any]) -> float:
    """The benchmark's measure of one answer, 0 to 1: the best over the accepted answers.

    Examples
    --------
    >>> judge(find_dataset("hotpotqa"), "The Eiffel Tower!", {"answers": ["eiffel tower"]})
    1.0
    """
    for stop in dataset.until:  # the benchmark, unlike lm-eval, forgives a break at the beginning
        answer = answer.lstrip(stop).split(stop)[0]
    score, *_ = dataset.measure(sample, [answer]).values()
    return float(score)


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
    # Not a template any more: a question may hold braces.
    question = tasks.encode(tokenizer, dataset.after.replace("{{question}}", sample["input"]) + tail)
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
    add_methods_option(
        parser, ["random", "recent", "attention"], "pruner files, scorers and cutters; dense always runs too"
    )
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
    samples = {name: (find_dataset(name), read_dataset(Path(args.data), name)[: args.samples]) for name in args.tasks}
    methods = find_methods(args.methods, FROM_PROMPTS)
    model, tokenizer = command.load_model(args)
    questions = [
        Question(
            "longbench", name, str(number), dataset, *build_prompt(tokenizer, dataset, sample, args.tokens), sample
        )
        for name, (dataset, found) in samples.items()
        for number, sample in enumerate(found)
    ]
    return ask(args, model, tokenizer, methods, questions)


# ---------------------------------------------------------------------------------------------------------- asking


class Question(NamedTuple):
    """One sample of a benchmark, as it is asked."""

    benchmark: str
    name: str
    """Of the dataset."""
    number: str
    """In its file."""
    dataset: Dataset
    context: list[int]
    """Token ids; what the protocol ``after`` prunes."""
    question: list[int]
    """And those that follow."""
    sample: dict[str, Any]
    """With ``answers``, and ``all_classes`` where the dataset has classes."""

    @property
    def id(self) -> str:
        """By everything that decides the score of an answer."""
        about = [self.name, self.context, self.question, self.sample["answers"]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def ask(
    args: argparse.Namespace, model: Any, tokenizer: Any, methods: Sequence[Method], questions: Sequence[Question]
) -> list[dict[str, Any]]:
    """Let every method answer what the directory ``args.out`` does not hold yet.

    Parameters
    ----------
    args : Namespace
        ``out``, ``tokens``, ``protocols``, and the options of models and schedules. Where ``tokens`` is
        :data:`sdtp_eval.compare.ANY_LENGTH`, a budget is sought for the length of each prompt.
    model, tokenizer
    methods : sequence of Method
        Of the kinds :data:`sdtp_eval.methods.FROM_PROMPTS`; dense is added.
    questions : sequence of Question

    Returns
    -------
    list of dict
        All per-sample results of the directory.

    Raises
    ------
    GateError
        If the layers have not computed as many tokens of a prompt as the schedule says, or the dense model not all of
        them; the answer is not written then.
    """
    import torch

    num_layers = model.config.num_hidden_layers
    path = records.open_results(Path(args.out), args, model)
    done = {records.key_of(result) for result in compare.read_samples([path])}
    is_recorded = False
    with (
        command.progress_bar(len(questions)) as bar,
        path.open("a", encoding="utf-8") as file,
        torch.no_grad(),
    ):
        for asked in questions:
            bar.show(f"{asked.benchmark} {asked.name}")
            entries = plan(args, methods, num_layers, args.tokens or len(asked.context) + len(asked.question))
            for (method, label, schedule), protocol in itertools.product(entries, args.protocols):
                key = (f"{asked.benchmark} {asked.name}", protocol, args.tokens, asked.id, name_of(method), label)
                if key in done:
                    continue
                if not is_recorded:
                    records.record_run(args, model)
                    is_recorded = True
                prompt, after = asked.context, asked.question
                if protocol == INSIDE:
                    prompt, after = [*prompt, *after], []
                begin = time.perf_counter()
                short = shorten(method, schedule, prompt, num_layers)
                with patch(model, method, schedule, args.backend), prefilled_tokens(model) as computed:
                    new = greedy(model, short, after, asked.dataset.new_tokens)
                seconds = time.perf_counter() - begin
                kept = sum(computed) / (num_layers * len(prompt))
                check_budget(kept, method, schedule, len(prompt), num_layers)
                answer = str(tokenizer.decode(new, skip_special_tokens=True))
                result = {
                    **dict(zip(compare.KEY, key, strict=True)),
                    "kind": asked.name,
                    "number": asked.number,
                    "exact": judge(asked.dataset, answer, asked.sample),
                    "answer": answer,
                    "expected": asked.sample["answers"],
                    "mean_keep": kept,
                    "prompt_tokens": len(prompt),
                    "seconds_with_answer": seconds,
                }
                file.write(json.dumps(result) + "\n")
                file.flush()
            bar.advance()
    return compare.read_samples([path])
