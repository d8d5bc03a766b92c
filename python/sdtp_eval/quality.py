"""``sdtp eval``: what pruning costs in quality, for any checkpoint, method, schedule and budget.

Each sample is read once by the dense model and once by every method with every schedule, so all comparisons are paired.
The answer is teacher-forced after the pruned prompt and never pruned itself. Results go to ``samples.jsonl`` as they
come, and a run that is started again takes up where it was stopped. Under ``accelerate launch`` (or ``torchrun``) the
processes share the samples and write files of their own, which the first one puts together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import command, compare, cost, longbench, methods, mine, minilongbench, records, ruler, schedules, tasks
from sdtp_eval.methods import Entry, Method, find_method, find_methods, plan
from sdtp_eval.reader import Reader
from sdtp_eval.tasks import PROTOCOLS, Sample

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from sdtp_eval.parallel import Workers
    from sdtp_kernels import PruningSchedule

DEFAULT_METHODS = ("random", "recent", "norm", "attention")


def add_command(subparsers: Any) -> None:
    """Add ``eval`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("eval", help="measure what pruning costs in quality")
    commands = parser.add_subparsers(dest="eval_command", required=True, metavar="COMMAND")
    add_parser(commands)
    for module in (compare, cost, ruler, longbench, minilongbench, mine):
        module.add_parser(commands)


def add_parser(commands: Any) -> None:
    """Add ``run`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("run", help="score methods and schedules on texts and retrieval tasks")
    records.add_options(parser)
    parser.add_argument(
        "--tasks", nargs="+", default=["nll"], metavar="TASK", help=f"{', '.join(tasks.TASKS)} (default: nll)"
    )
    methods.add_methods_option(
        parser, DEFAULT_METHODS, "pruner files, scorers, cutters, oracles, kvpress:NAME; dense always runs too"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024], help="prompt lengths (default: 1024)")
    parser.add_argument("--samples", type=int, default=48, help="samples a task and length (%(default)s)")
    parser.add_argument("--continuation", type=int, default=128, help="tokens scored after a text (%(default)s)")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="text files or directories (default: Python's reference)"
    )
    parser.add_argument(
        "--split", choices=("held-out", "train", "all"), default="held-out", help="which files, by name (%(default)s)"
    )
    parser.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS),
        help="question inside the pruned prompt, after the pruned context (default: both)",
    )  # fmt: skip
    parser.add_argument("--greedy", action="store_true", help="let the model answer freely as well, with generate()")
    parser.add_argument("--no-chat", action="store_true", help="ask without the chat template")
    parser.add_argument("--target", default="oracle_future_attention", help="what 'ranks' compares with (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    command.add_model_options(parser)
    schedules.add_options(parser)
    methods.add_dropped_kv_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """``sdtp eval run``."""
    return records.report(args, evaluate)


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Score everything that the arguments ask for and that the directory ``args.out`` does not hold yet.

    Parameters
    ----------
    args : Namespace
        Of the parser that :func:`add_parser` makes.

    Returns
    -------
    list of dict, or None
        ``None`` in all processes but the first, which returns what all have found:
        all per-sample results of the directory, as they stand in ``samples.jsonl``: the fields of
        :meth:`Reader.result`, those that identify them (``task``, ``protocol``, ``tokens``, ``kind``, ``id``,
        ``method``, ``schedule``) and the facts of the sample (``depth``, ``wording``).

    Raises
    ------
    ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError
        For options, files, models and machines that cannot work.
    """
    from sdtp_eval.parallel import join_workers

    workers = join_workers(args.device)
    model, tokenizer = command.load_model(args)
    model = model.to(workers.device)
    found = find_methods(args.methods)
    presses = [method.name for method in found if method.kind == "press"]
    if presses and args.greedy:
        raise ValueError(f"{', '.join(presses)}: kvpress compresses a cache: leave out --greedy")
    unscored = [method.name for method in found if method.kind not in ("pruners", "oracle")]
    if unscored and "ranks" in args.tasks:
        raise ValueError(f"{', '.join(unscored)}: no scores of stages to compare: leave out the task ranks")
    pool = tasks.TextPool(tokenizer, args.data, args.split)
    samples = [
        (tokens, sample)
        for task in args.tasks
        for tokens in args.tokens
        for sample in tasks.make_samples(
            task, pool, tokens, args.samples, continuation=args.continuation, seed=args.seed, chat=not args.no_chat
        )
    ]
    plans = {tokens: plan(args, found, model.config.num_hidden_layers, tokens) for tokens in args.tokens}
    num_layers = model.config.num_hidden_layers
    work = [(tokens, sample, _jobs(args, num_layers, tokens, sample, plans[tokens])) for tokens, sample in samples]
    order = [job.key for _, _, jobs in work for job in jobs]
    file = Path(args.out) / compare.SAMPLES
    if workers.index == 0:
        records.open_results(Path(args.out), args, model)
        records.join_parts(file, order)  # of a run that was killed
    workers.wait()
    done = {records.key_of(result) for result in compare.read_samples([file])}
    work = [(tokens, sample, [job for job in jobs if job.key not in done]) for tokens, sample, jobs in work]
    work = [entry for entry in work if entry[2]]
    if work and workers.index == 0:
        records.record_run(args, model)
    mine = work[workers.index :: workers.number]
    _work(args, model, tokenizer, mine, file if workers.index == 0 else records.part_of(file, workers), workers)
    workers.wait()
    if workers.index > 0:
        return None
    records.join_parts(file, order)
    return compare.read_samples([file])


class Job(NamedTuple):
    """One line of the per-sample file that is yet to be written."""

    key: tuple[Any, ...]
    protocol: str
    method: Method | None
    schedule: PruningSchedule | None


def _jobs(
    args: argparse.Namespace, num_layers: int, tokens: int, sample: Sample, entries: Sequence[Entry]
) -> list[Job]:
    found: dict[tuple[Any, ...], Job] = {}
    for protocol in sample.protocols:
        if sample.question and protocol not in args.protocols:
            continue
        for method, label, schedule in entries:
            if sample.task == "ranks":  # nothing is dropped: of a schedule only the layers matter
                if method is None or schedule is None:
                    continue
                label = f"@{schedules.show_layers(schedule.layers, num_layers)}"
            key = (sample.task, protocol, tokens, sample.id, methods.name_of(method), label)
            found.setdefault(key, Job(key, protocol, method, schedule))
    return list(found.values())


def _work(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    work: Sequence[tuple[int, Sample, Sequence[Job]]],
    path: Path,
    workers: Workers,
) -> None:
    """Score and write, with a progress bar of the first process."""
    import torch

    target = find_method(args.target).oracle
    if target is None:
        raise ValueError(f"--target {args.target}: expected an oracle")
    with (
        command.progress_bar(sum(len(jobs) for _, _, jobs in work), shown=workers.index == 0) as bar,
        path.open("a", encoding="utf-8") as file,
        torch.no_grad(),  # not inference_mode: an oracle takes gradients
    ):
        for tokens, sample, jobs in work:
            bar.show(f"{sample.task}, {tokens} tokens")
            reader = Reader(model, sample, args.backend)
            for job in jobs:
                if sample.task == "ranks" and job.method is not None and job.schedule is not None:
                    result = reader.ranks(job.method, target, job.schedule.layers)
                else:
                    result = reader.result(job.protocol, job.method, job.schedule)
                    if args.greedy and sample.question:
                        result |= _answer(reader, tokenizer, job)
                facts = {"kind": sample.kind, **sample.facts}
                line = json.dumps({**dict(zip(compare.KEY, job.key, strict=True)), **facts, **result})
                file.write(line + "\n")
                file.flush()
                bar.advance()


def _answer(reader: Reader, tokenizer: Any, job: Job) -> dict[str, Any]:
    text = str(tokenizer.decode(reader.greedy(job.protocol, job.method, job.schedule), skip_special_tokens=True))
    expected = str(tokenizer.decode(reader.sample.answer)).strip()
    return {"greedy_text": text, "greedy": float(expected in text)}
