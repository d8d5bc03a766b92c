"""``sdtp demo``: a real model reads a real long text with and without pruning."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval.paired import Pair, cache_bytes, cache_of, in_turns, timed
from sdtp_eval.provenance import describe_run
from sdtp_eval.quality import KEEP_ALL, SHAPES, Method, Reader, greedy, shaped
from sdtp_eval.tasks import INSIDE, Sample

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedTokenizerBase

    from sdtp_kernels import PruningSchedule, TokenPruner

QUESTION = "Which programming language does this text describe?"
DTYPES = ("float32", "bfloat16", "float16")
MIN_REPEATS = 3


def add_command(subparsers: Any) -> None:
    """Add ``demo`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("demo", help="prefill a real long text with and without pruning, and compare")
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a checkpoint (default: SmolLM2-135M-Instruct)")
    method = parser.add_mutually_exclusive_group()
    method.add_argument("--pruner", metavar="FILE", help="trained pruners of this model (default: those it comes with)")
    method.add_argument(
        "--scorer",
        metavar="NAME",
        help="a training-free scorer instead: attention (default with --model), recent, norm, random",
    )
    parser.add_argument("--keep", type=float, default=0.9, help="share of tokens that each stage keeps (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="even", help="of the schedule; see 'eval run' (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="length of the prompt, with the question (%(default)s)"
    )
    parser.add_argument("--text", metavar="FILE", help="the text to read (default: Python's language reference)")
    parser.add_argument("--question", default=QUESTION, help="asked behind the text (%(default)s)")
    parser.add_argument("--budget", default="global", help="global or block (%(default)s)")
    parser.add_argument("--block-size", type=int, default=512, help="tokens of a block (%(default)s)")
    parser.add_argument("--backend", default="auto", help="who runs the ops; see 'sdtp doctor' (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=48, help="longest answer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed prefills of each kind, at least 3 (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo with these arguments; see :func:`add_command`."""
    from sdtp_kernels import BackendUnavailableError
    from sdtp_kernels.cli import CommandError

    try:
        result = measure(args)
    except (ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
    _print_table(result)
    if args.json:
        try:
            _write_json(result, Path(args.json))
        except OSError as error:
            raise CommandError(f"--json {args.json}: cannot be written ({error.strerror})") from None
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prefill dense and pruned, alternating, and answer the question both ways.

    Nothing is timed before the patched model has been shown to equal the unpatched one bit for bit where it keeps every
    token, and to keep the tokens the schedule says. Batch size 1, logits of the last token only. Both models also read
    the dense one's answer: an answer of its own may turn where two tokens are all but equally probable.

    Parameters
    ----------
    args : Namespace
        Of the parser that :func:`add_command` makes.

    Returns
    -------
    dict
        What ``--json`` writes: ``tokens``, ``kept_per_stage``, ``mean_keep``, ``prefill_s`` (medians, seconds),
        ``prefill_s_all`` (every repetition, in order), ``speedup``, ``ideal`` (dense over pruned FLOPs),
        ``share_of_ideal``, ``flops``, ``kv_bytes``, ``answers``, ``answer_nll`` (of the dense model's answer, nats a
        token), ``answer_kl`` (divergence of the pruned model's predictions from the dense model's there, likewise),
        ``scorer``, ``backend``, ``note`` (why nothing was pruned, or empty), ``notes``, ``settings``, and what
        :func:`describe_run` tells. Where both kinds exist the value is ``{"dense": ..., "pruned": ...}``.

    Raises
    ------
    ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError
        For settings, files, models and machines that cannot work.
    GateError
        If a check fails; no figures then.
    """
    _check_settings(args)
    import torch

    from sdtp_eval import texts
    from sdtp_eval.checkpoints import DEFAULT_NAME, DEFAULT_PRUNERS, default_checkpoint, load_checkpoint

    text = texts.read_text(args.text) if args.text else texts.language_reference()
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch finds no GPU here; 'sdtp doctor' tells more")
    device = torch.device(args.device or ("cuda" if has_gpu else "cpu"))
    model_path = args.model or default_checkpoint()
    model, tokenizer = load_checkpoint(model_path, getattr(torch, args.dtype))
    model = model.to(device)
    prompt, notes = build_prompt(tokenizer, text, args.question, args.tokens)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(prompt) > longest:
        notes.append(f"the prompt is longer than the {longest} tokens that the model was made for")
    pruners, schedule = _method(args, model.config)
    pair = Pair(model, torch.tensor([prompt], device=device), pruners, schedule, args.backend)
    pair.patched().remove()  # refuses now what it would refuse later

    with torch.inference_mode():
        measured = _run(pair, args.repeats, args.new_tokens)
    answers = tokenizer.batch_decode(list(measured["answers"].values()), skip_special_tokens=True)
    measured["answers"] = dict(zip(measured["answers"], map(str.strip, answers), strict=True))
    lengths, flops = pair.tokens_per_layer, pair.flops()
    medians = {kind: statistics.median(values) for kind, values in measured["prefill_s_all"].items()}
    speedup, ideal = medians["dense"] / medians["pruned"], flops["dense"] / flops["pruned"]
    return {
        "tokens": len(prompt),
        "kept_per_stage": [] if measured["note"] else [lengths[layer] for layer in schedule.layers],
        "mean_keep": sum(lengths) / (len(lengths) * len(prompt)),
        "prefill_s": medians,
        "speedup": speedup,
        "ideal": ideal,
        "share_of_ideal": speedup / ideal,
        "flops": flops,
        **measured,
        "scorer": pruners if isinstance(pruners, str) else f"pruners of {args.pruner or DEFAULT_PRUNERS}",
        "notes": notes,
        "settings": {
            **_settings(args),
            "model": args.model or DEFAULT_NAME,
            "device": str(device),
            "layers": schedule.layers,
        },
        **describe_run(device),
    }


def build_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, question: str, num_tokens: int
) -> tuple[list[int], list[str]]:
    """The first part of `text` with the question behind it, `num_tokens` tokens in all.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Its chat template is used where it has one.
    text, question : str
    num_tokens : int
        Tokens of the whole prompt, template and question included.

    Returns
    -------
    list of int
        Token ids; fewer than `num_tokens` where the text is too short.
    list of str
        Remarks for the reader: that the text was too short.

    Raises
    ------
    ValueError
        If the question alone takes all the tokens.
    """
    mark = "\N{OBJECT REPLACEMENT CHARACTER}text\N{OBJECT REPLACEMENT CHARACTER}"
    prompt = f"{mark}\n\n{question}"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    before, after = prompt.split(mark)
    # A template writes the special tokens itself; without one the tokenizer adds those of a beginning.
    head = tokenizer(before, add_special_tokens=not tokenizer.chat_template).input_ids
    tail = tokenizer(after, add_special_tokens=False).input_ids
    room = num_tokens - len(head) - len(tail)
    if room < 1:
        raise ValueError(
            f"--tokens {num_tokens}: the question and its template take {len(head) + len(tail)} tokens; ask for more"
        )
    body: list[int] = []
    for characters in (16 * room, len(text)):  # a long text need not be tokenised whole
        body = tokenizer(text[:characters], add_special_tokens=False).input_ids[:room]
        if len(body) == room:
            break
    notes = []
    if len(body) < room:
        notes.append(f"the text has only {len(body)} tokens: the prompt has {len(head) + len(body) + len(tail)}")
    return [*head, *body, *tail], notes


# ------------------------------------------------------------------------------------------------------ settings


def _check_settings(args: argparse.Namespace) -> None:
    for name, least in (("tokens", 1), ("new_tokens", 1), ("repeats", MIN_REPEATS)):
        if getattr(args, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {getattr(args, name)}: expected at least {least}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such directory")


def _method(args: argparse.Namespace, config: Any) -> tuple[Mapping[int, TokenPruner] | str, PruningSchedule]:
    from sdtp_eval.checkpoints import DEFAULT_PRUNERS, bundled_pruners
    from sdtp_kernels import PruningSchedule, load_pruners

    file = args.pruner
    if not (file or args.scorer or args.model):
        file = bundled_pruners()[DEFAULT_PRUNERS]
    stack = load_pruners(file) if file else None
    layers = tuple(sorted(stack)) if stack else PruningSchedule.every(config.num_hidden_layers).layers
    schedule = PruningSchedule(
        layers=layers,
        keep_ratio=shaped(args.keep, len(layers), args.shape),
        budget=args.budget,
        block_size=args.block_size,
    )
    return stack or args.scorer or "attention", schedule


# ----------------------------------------------------------------------------------------------------- measuring


def _run(pair: Pair, repeats: int, new_tokens: int) -> dict[str, Any]:
    """Check, measure, answer, with a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    # Without a refreshing thread: nothing else runs while a prefill is timed.
    with Progress(*columns, TimeElapsedColumn(), console=_console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=8 + 2 * repeats)

        def step(description: str, work: Callable[..., Any], *arguments: Any) -> Any:
            progress.update(task, description=description)
            progress.refresh()
            done = work(*arguments)
            progress.advance(task)
            return done

        dense = step("dense, warming up", pair.prefill)
        for keep_ratio in (1.0, KEEP_ALL):
            step("check: all kept is dense", pair.check_keeping_all, dense.logits, keep_ratio)
        report, pruned = step("pruned, warming up", pair.check_kept)
        kv_bytes = {"dense": cache_bytes(cache_of(dense)), "pruned": cache_bytes(cache_of(pruned))}
        del dense, pruned

        seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
        gc.collect()  # a collection costs more than many a prefill: not while the clock runs
        for i, kind in enumerate(in_turns(list(seconds), repeats)):
            with pair.patched() if kind == "pruned" else contextlib.nullcontext():
                _, spent = step(f"{kind}, prefill {i // 2 + 1}", timed, pair.prefill, pair.input_ids.device)
                seconds[kind].append(spent)

        prompt = pair.input_ids[0].tolist()
        answers = {"dense": step("dense, answering", greedy, pair.model, prompt, [], new_tokens)}
        with pair.patched():
            answers["pruned"] = step("pruned, answering", greedy, pair.model, prompt, [], new_tokens)
        sample = Sample("demo", "answer", tuple(prompt), (), tuple(answers["dense"]))
        reader = step("dense, reading", Reader, pair.model, sample, pair.backend)
        read = step("pruned, reading", reader.result, INSIDE, Method("demo", pair.pruners), pair.schedule)
    return {
        "prefill_s_all": seconds,
        "kv_bytes": kv_bytes,
        "answers": answers,
        "answer_nll": {"dense": read["nll"] - read["nll_increase"], "pruned": read["nll"]},
        "answer_kl": read["kl"],
        "backend": report.backend or pair.backend,
        "note": report.note,
    }


# ----------------------------------------------------------------------------------------------------- reporting


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("run", "command", "json")}


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(file=sys.stderr if stderr else sys.stdout, highlight=False)


def _print_table(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def spread(kind: str) -> str:
        values = result["prefill_s_all"][kind]
        return f"{result['prefill_s'][kind]:.3f}  ({min(values):.3f} to {max(values):.3f})"

    kept = ", ".join(map(str, result["kept_per_stage"])) or f"all: {result['note']}"
    kv = result["kv_bytes"]
    settings, machine, versions = result["settings"], result["machine"], result["versions"]
    table = Table(box=box.SIMPLE_HEAD, title="SDTP demo", title_justify="left")
    table.add_column("")
    table.add_column("dense", overflow="fold")
    table.add_column("pruned", overflow="fold")
    nll = result["answer_nll"]
    rows = [
        ("tokens in", str(result["tokens"]), str(result["tokens"])),
        ("kept per stage", "", kept),
        ("mean kept per layer", "100.0 %", f"{result['mean_keep']:.1%}".replace("%", " %")),
        ("prefill, seconds: median (range)", spread("dense"), spread("pruned")),
        ("speed-up", "", f"{result['speedup']:.2f}"),
        ("ideal: FLOPs dense / pruned", "", f"{result['ideal']:.2f}"),
        ("share of the ideal", "", f"{result['share_of_ideal']:.0%}".replace("%", " %")),
        ("KV cache, bytes", f"{kv['dense']:,}", f"{kv['pruned']:,}  ({kv['pruned'] / kv['dense']:.0%})"),
        ("scorer", "", result["scorer"]),
        ("backend", "", result["backend"]),
        ("answer", result["answers"]["dense"], result["answers"]["pruned"]),
        (
            "the dense model's answer, nats a token",
            f"{nll['dense']:.3f}",
            f"{nll['pruned']:.3f}  (divergence {result['answer_kl']:.3f})",
        ),
    ]
    for row in rows:
        table.add_row(*map(Text, row))  # as text: an answer may hold what looks like markup
    console = _console()
    console.print(table)
    remarks = [
        f"question: {settings['question']}",
        *result["notes"],
        "the ideal counts matrix products, half of the attention square (causal), one row of logits and the scorer; "
        "where the attention kernel computes the whole square, the share can exceed 100 %",
        f"{settings['model']}, {settings['dtype']} on {machine['gpu'] or machine['processor']}, {machine['threads']} "
        f"threads, torch {versions['torch']}, {settings['repeats']} repetitions, {result['date']}",
    ]
    for remark in remarks:
        console.print(Text(remark), style="dim")


def _write_json(result: dict[str, Any], path: Path) -> None:
    handle, draft = tempfile.mkstemp(dir=path.absolute().parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
