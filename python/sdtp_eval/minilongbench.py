"""``sdtp eval minilongbench``: the English prompts of MiniLongBench (ACL 2025), where its files are.

The 237 prompts of MiniLongBench stand for the 4750 of LongBench. Their files are those of ``pred_data/example`` in the
repository MilkThink-Lab/MiniLongBench at revision 504c247, ``MiniLongBench_<dataset>.json``; they have no licence and
are not part of this package. Prompts come whole, question included, and are never cut. Answer lengths and measures are
those of LongBench.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval import command, compare, methods, records, schedules, tasks
from sdtp_eval.longbench import DATASETS, Question, ask, find_dataset
from sdtp_eval.tasks import INSIDE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

CODE = ("lcc", "repobench-p")
LOSS = 0.10  # of a prompt's score against the dense model's, beyond which it is listed
# Of the prompts and gold answers of each file: a prompt that was cut or an answer that was changed is another file.
DIGESTS = {
    "narrativeqa": "06d99aa8d584cd72",
    "qasper": "193355d8b085ee14",
    "multifieldqa_en": "582ce9ebb4d32178",
    "hotpotqa": "7365ba5d452b0ed1",
    "2wikimqa": "5c03957a3d51a6f8",
    "musique": "c93381e10c274271",
    "gov_report": "55700e75eed6d6c1",
    "qmsum": "3f37fa0a695ce179",
    "multi_news": "1b8651cd8b2fbcad",
    "trec": "f00c896c2315e4a6",
    "triviaqa": "f9980ca08ec63fe9",
    "samsum": "f38cad36a772a283",
    "passage_count": "4e1dce8ffe124d21",
    "passage_retrieval_en": "99b34bd52b2cf82b",
    "lcc": "6a5a65bb1c589a49",
    "repobench-p": "a67395c11b0acf5a",
}


def load(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Prompts and gold answers of a dataset, by their number in the file.

    Returns
    -------
    dict of str to dict
        ``prompt``, ``answers`` and ``all_classes`` (None where there are none).

    Raises
    ------
    ValueError
        If the file is missing or not of MiniLongBench's form.
    """
    path = folder / f"MiniLongBench_{name}.json"
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file. MiniLongBench is not part of this package: fetch MilkThink-Lab/MiniLongBench and "
            "give its folder pred_data/example with --data"
        )
    found = {}
    try:
        for number, entry in json.loads(path.read_text(encoding="utf-8")).items():
            gold = entry["gold"]
            judged = gold if isinstance(gold, dict) else {"answers": gold, "all_classes": None}
            found[number] = {
                "prompt": entry["origin_prompt"],
                "answers": judged["answers"],
                "all_classes": judged["all_classes"],
            }
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of MiniLongBench ({type(error).__name__}: {error})") from None
    return found


def digest(samples: dict[str, dict[str, Any]]) -> str:
    """Of everything that :func:`load` returns."""
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()[:16]


def read_dataset(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """As :func:`load`, of a file that is known.

    Raises
    ------
    ValueError
        As :func:`load`; also if a prompt or a gold answer is not MiniLongBench's.
    """
    samples = load(folder, name)
    if (found := digest(samples)) != DIGESTS[name]:
        raise ValueError(
            f"{folder}: prompts or gold answers of {name} are not MiniLongBench's (digest {found}, expected "
            f"{DIGESTS[name]}), so no figures; fetch the files again, at revision 504c247"
        )
    return samples


def read_questions(args: argparse.Namespace, model: Any, tokenizer: Any) -> list[Question]:
    """The prompts that are asked for and short enough.

    Raises
    ------
    ValueError
        As :func:`read_dataset`; also if a prompt is longer than the model was made for, or none is left.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    questions = []
    for name in args.tasks:
        dataset = find_dataset(name)
        head, tail = tasks.chat_template(tokenizer, dataset.chat)
        for number, sample in read_dataset(Path(args.data), name).items():
            if len(sample["prompt"]) >= args.characters:
                continue
            ids = [*head, *tasks.encode(tokenizer, sample["prompt"] + (tail if dataset.chat else ""))]
            if longest is not None and len(ids) > longest:
                raise ValueError(
                    f"{name} {number}: a prompt of {len(ids)} tokens, and the model was made for {longest}; ask for "
                    f"shorter ones with --characters, now {args.characters}"
                )
            questions.append(Question("minilongbench", name, number, dataset, ids, [], sample))
    if not questions:
        raise ValueError(f"--characters {args.characters}: no prompt of {', '.join(args.tasks)} is so short")
    return questions


def add_parser(commands: Any) -> None:
    """Add ``minilongbench`` to the parsers of ``sdtp eval``."""
    parser = commands.add_parser("minilongbench", help="MiniLongBench, from its files")
    parser.add_argument("--data", metavar="DIR", required=True, help="folder pred_data/example of MiniLongBench")
    records.add_options(parser, against=[compare.DENSE, *compare.AGAINST])
    parser.add_argument("--tasks", nargs="+", default=list(DATASETS), metavar="DATASET", help="default: all in English")
    methods.add_methods_option(
        parser, ["random", "recent", "attention"], "pruner files, scorers and cutters; dense always runs too"
    )
    parser.add_argument("--characters", type=int, default=32000, help="only prompts shorter than this (%(default)s)")
    command.add_model_options(parser)
    schedules.add_options(parser)
    methods.add_dropped_kv_options(parser)
    parser.set_defaults(run=run, tokens=compare.ANY_LENGTH, protocols=[INSIDE])


def run(args: argparse.Namespace) -> int:
    """``sdtp eval minilongbench``."""
    status = records.report(args, evaluate)
    print_losses(compare.read_samples([args.out]))
    return status


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer what the directory ``args.out`` does not hold yet.

    Returns
    -------
    list of dict
        Per-sample results as they stand in ``samples.jsonl``; ``exact`` is the benchmark's measure, 0 to 1. All of them
        stand here a second time under the tasks ``minilongbench text`` and ``minilongbench code``: their means are over
        prompts.

    Raises
    ------
    ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError
        For options, files, models and machines that cannot work.
    GateError
        If a prompt was not read whole, or a method had another budget than its schedule; no figures then.
    """
    found = methods.find_methods(args.methods, methods.FROM_PROMPTS)
    model, tokenizer = command.load_model(args)
    results = ask(args, model, tokenizer, found, read_questions(args, model, tokenizer))
    means = [{**row, "task": f"minilongbench {'code' if row['kind'] in CODE else 'text'}"} for row in results]
    return [*results, *means]


def print_losses(results: Sequence[dict[str, Any]]) -> None:
    """The prompts that lose more than :data:`LOSS` to the dense model, the worst first."""
    dense = {row["id"]: row["exact"] for row in results if row["method"] == compare.DENSE}
    losses = [(row["exact"] - dense[row["id"]], row) for row in results]
    worst = sorted(((loss, row) for loss, row in losses if loss < -LOSS), key=lambda entry: entry[0])
    print(f"{len(worst)} answers of {len(results)} lose more than {LOSS * 100:.0f} points to the dense model's:")
    for loss, row in worst:
        print(f"{100 * loss:6.1f}  {row['kind']} {row['number']}, {row['method']}, {row['schedule']}")
