"""``sdtp eval ruler``: the tasks of RULER that need no download, through lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
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
from sdtp_eval.tasks import AFTER, PROTOCOLS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from sdtp_eval.methods import Method
    from sdtp_kernels import PruningSchedule

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_fwe")  # the others fetch essays or questions


def add_parser(commands: Any) -> None:
    """Add ``ruler`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("ruler", help="RULER tasks through lm-eval (extra: ruler)")
    records.add_options(parser)
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="TASK", help=f"default: {' '.join(TASKS)}, which run offline"
    )
    add_methods_option(
        parser, ["random", "recent", "attention"], "pruner files, scorers and cutters; dense always runs too"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024], help="prompt lengths (default: 1024)")
    parser.add_argument("--samples", type=int, default=20, help="samples a task and length (%(default)s)")
    parser.add_argument("--new-tokens", type=int, help="longest answer (default: the task's own, 50 to 128)")
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS), help="see 'run' (default: both)"
    )
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
    """Run what the directory ``args.out`` does not hold yet; per-sample results as ``sdtp eval run`` writes them.

    ``exact`` is RULER's own measure: the share of the expected strings that the answer contains. In the protocol
    ``after`` the last line of the prompt, which is the question in all these tasks, follows the pruned rest.

    Raises
    ------
    ValueError
        If a method is an oracle, which needs the answer's tokens, or a task does not exist.
    """
    methods = find_methods(args.methods, FROM_PROMPTS)
    model, tokenizer = command.load_model(args)
    file = records.open_results(Path(args.out), args, model)
    # By sample ids that lm-eval knows only once it has run: whole evaluations are what is resumed.
    done = {
        (result["task"], result["protocol"], result["tokens"], result["method"], result["schedule"])
        for result in compare.read_samples([file])
    }
    asked_for = [
        (task, protocol, tokens, entry)
        for tokens in args.tokens
        for entry in plan(args, methods, model.config.num_hidden_layers, tokens)
        for protocol in args.protocols
        for task in args.tasks
    ]
    is_recorded = False
    for task, protocol, tokens, (method, label, schedule) in asked_for:
        name = name_of(method)
        if (f"ruler {task}", protocol, tokens, name, label) in done:
            continue
        with patch(model, method, schedule, args.backend):
            results = list(_evaluate(args, model, tokenizer, task, tokens, protocol, method, schedule))
        if not is_recorded:
            records.record_run(args, model)
            is_recorded = True
        # In one piece, so that what is in the file is complete.
        lines = [json.dumps({**result, "method": name, "schedule": label}) + "\n" for result in results]
        with file.open("a", encoding="utf-8") as out:
            out.write("".join(lines))
    return compare.read_samples([file])


def _evaluate(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    name: str,
    tokens: int,
    protocol: str,
    method: Method | None,
    schedule: PruningSchedule | None,
) -> Iterator[dict[str, Any]]:
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.ruler import common_utils

    from sdtp_eval.lm_eval_adapter import SdtpLM

    num_layers = model.config.num_hidden_layers
    adapter = SdtpLM(
        model,
        tokenizer,
        split=split_last_line if protocol == AFTER else None,
        shorten=lambda ids: shorten(method, schedule, ids, num_layers),
        max_new_tokens=args.new_tokens,
    )
    begin = time.perf_counter()
    # RULER makes its samples to measure, with the tokenizer of this name.
    settings = {"max_seq_lengths": [tokens], "tokenizer": str(tokenizer.name_or_path)}
    # These tasks alone: reading the descriptions of all the others takes longer than a short evaluation.
    folder = str(Path(common_utils.__file__).parent)
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=settings)
    if name not in manager.all_tasks:
        known = ", ".join(sorted(manager.all_tasks))
        raise ValueError(f"no RULER task {name!r} in lm-eval {lm_eval.__version__}; it has {known}")
    # One task at a time: each then starts from the same seed, whatever else is asked for or was done before.
    with _offline(tokenizer):
        evaluation = lm_eval.simple_evaluate(
            model=adapter,
            tasks=[name],
            task_manager=manager,
            limit=args.samples,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    seconds = time.perf_counter() - begin
    for sample in evaluation["samples"][name]:
        prompt, answer = sample["arguments"][0][0], sample["filtered_resps"][0]
        context = split_last_line(prompt)[0] if protocol == AFTER else prompt
        length = len(tokenizer(context).input_ids)
        check_budget(adapter.mean_keep[prompt], method, schedule, length, num_layers)
        expected = sample["doc"]["outputs"]
        yield {
            "task": f"ruler {name}",
            "protocol": protocol,
            "tokens": tokens,
            "id": hashlib.sha256(prompt.encode()).hexdigest()[:16],
            "kind": name,
            "exact": sum(word.lower() in answer.lower() for word in expected) / len(expected),
            "answer": answer,
            "expected": expected,
            "mean_keep": adapter.mean_keep[prompt],
            "prompt_tokens": length,
            "seconds_with_answer": seconds / len(evaluation["samples"][name]),
        }


@contextlib.contextmanager
def _offline(tokenizer: Any) -> Iterator[None]:
    """RULER with the tokenizer that is loaded already, and without a download that these tasks do not use.

    It would load the tokenizer again, running code from the model's directory, and ask a server for a sentence splitter
    that only essays need.
    """
    import nltk
    from lm_eval.tasks.ruler import common_utils

    with (
        mock.patch.object(common_utils, "AutoTokenizer", mock.Mock(from_pretrained=lambda *_, **__: tokenizer)),
        mock.patch.object(nltk, "download", return_value=False),
    ):
        yield


def split_last_line(prompt: str) -> tuple[str, str]:
    """The context of a RULER prompt, and its last line, which is the question with the beginning of the answer."""
    context, newline, question = prompt.rpartition("\n")
    return context, newline + question
