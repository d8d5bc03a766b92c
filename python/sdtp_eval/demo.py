"""``sdtp demo``: a real model reads a long text, dense and pruned, and is asked for facts that are hidden in it."""

from __future__ import annotations

import contextlib
import gc
import html
import json
import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdtp_eval import command, tasks, texts
from sdtp_eval.paired import Pair, cache_bytes, cache_of, in_turns, timed
from sdtp_eval.provenance import describe_run
from sdtp_eval.schedules import BUDGETS, KEEP_ALL, SHAPES, shaped

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from sdtp_kernels import PruningSchedule

DENSE, DROPPED, PREDICTED = "dense", "dropped", "predicted"
FACTS = (15, 8, 7)  # of sdtp_eval.tasks.LOOKUPS, which SmolLM2 answers when it is dense: a name, a place, a number
DEPTHS = (0.2, 0.5, 0.8)
CHECKED = 512  # tokens of the prompt that the check reads: enough to prune, and quickly read
BUSY = 1.5  # slowest over fastest run: beyond it somebody else was using the machine
EXTRA = 8  # tokens that an answer may go on for


class Asked(NamedTuple):
    """A prompt that ends with a question."""

    question: str
    opening: str
    """How the answer begins; given to the model."""
    expected: str
    """What the answer has to contain; empty where nobody knows."""
    prompt: list[int]


def add_command(subparsers: Any) -> None:
    """Add ``demo`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("demo", help="a model reads a long text dense and pruned, and is asked about it")
    command.add_model_options(parser)
    method = parser.add_mutually_exclusive_group()
    method.add_argument(
        "--pruner", metavar="FILE_OR_ID", help="trained pruners of this model (default: those it comes with)"
    )
    method.add_argument(
        "--scorer",
        metavar="NAME",
        help="a training-free scorer instead: attention (default with --model), recent, norm, random",
    )
    parser.add_argument("--keep", type=float, default=0.9, help="share of tokens that each stage keeps (%(default)s)")
    parser.add_argument("--shape", choices=SHAPES, default="even", help="of the schedule; see 'eval run' (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompt (%(default)s)")
    parser.add_argument("--text", metavar="FILE", help="the text to read (default: Python's language reference)")
    parser.add_argument(
        "--question", nargs="+", help="ask this about the text (default: three facts that the demo hides in it)"
    )
    parser.add_argument("--budget", choices=BUDGETS, default="global", help="default: %(default)s")
    parser.add_argument("--block-size", type=int, default=512, help="tokens of a block (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=24, help="longest answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed prefills, at least one a question (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results there as well")
    parser.add_argument(
        "--html", metavar="FILE", help="write a page that colours each token by the layer before which it was dropped"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo with these arguments; see :func:`add_command`."""
    from sdtp_kernels.cli import CommandError

    with command.user_errors():
        result = measure(args)
    _print(result)
    wanted = [("--json", args.json, _json), ("--html", args.html, _page)]
    for option, path, write in wanted:
        try:
            if path:
                _write(write(result), Path(path))
        except OSError as error:
            raise CommandError(f"{option} {path}: cannot be written ({error.strerror})") from None
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Prefill dense, dropping, and predicting where there is a KV predictor; then let each answer.

    The kinds take turns, one question a round. Before anything is timed, the patched model has been shown to equal the
    unpatched one bit for bit on the prompt's last 512 tokens, where it keeps all of them. Every pruned prefill has to
    hold what the schedule says. Batch size 1, logits of the last token only.

    Parameters
    ----------
    args : Namespace
        Of the parser that :func:`add_command` makes.

    Returns
    -------
    dict
        What ``--json`` writes. ``kinds`` has, by ``dense``, ``dropped`` and ``predicted``: ``prefill_s`` (of each
        round, seconds), ``speedup`` (by the fastest round of each), ``ideal`` (dense over own FLOPs), ``kv_bytes``.
        ``answers`` has one entry a question: ``question``, ``opening``, ``expected``, and ``by_kind`` the texts. Also
        ``tokens``, ``kept_per_stage``, ``mean_keep``, ``prompt`` (the first question's, token by token), ``dropped_at``
        (for each of its tokens the layer before which it was dropped, or None), ``scorer``, ``backend``, ``note`` (why
        nothing was pruned, or empty), ``notes``, ``settings``, and what :func:`describe_run` tells.

    Raises
    ------
    ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError
        For settings, files, models and machines that cannot work.
    GateError
        If a check fails; no figures then.
    """
    _check_settings(args)
    import torch

    from sdtp_eval.checkpoints import DEFAULT_NAME, DEFAULT_PRUNERS

    text = texts.read_text(args.text) if args.text else texts.language_reference()
    model, tokenizer = command.load_model(args)
    device = model.device
    asked, notes = _ask(args, tokenizer, text)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(asked[0].prompt) > longest:
        notes.append(f"the prompt is longer than the {longest} tokens that the model was made for")
    pruners, schedule = _method(args, model.config)
    first = Pair(model, torch.tensor([asked[0].prompt], device=device), pruners, schedule, args.backend)
    pairs = {DENSE: first, DROPPED: first}
    if (predictor := getattr(pruners, "kv_predictor", None)) is not None:
        pairs[PREDICTED] = first._replace(kv_predictor=predictor)
    for kind in list(pairs)[1:]:
        pairs[kind].patched().remove()  # refuses now what it would refuse later

    with torch.inference_mode():
        measured = _run(pairs, asked, tokenizer, args.rounds, args.new_tokens)
    lengths = first.tokens_per_layer
    fastest = {kind: min(measured["kinds"][kind]["prefill_s"]) for kind in pairs}
    for kind, pair in pairs.items():
        flops = pair.flops()
        measured["kinds"][kind] |= {
            "speedup": fastest[DENSE] / fastest[kind],
            "ideal": 1.0 if kind == DENSE else flops["dense"] / flops["pruned"],
        }
    return {
        "tokens": first.tokens,
        "kept_per_stage": [] if measured["note"] else [lengths[layer] for layer in schedule.layers],
        "mean_keep": sum(lengths) / (len(lengths) * first.tokens),
        **measured,
        "prompt": [tokenizer.decode([token]) for token in asked[0].prompt],
        "scorer": pruners if isinstance(pruners, str) else f"pruners of {args.pruner or DEFAULT_PRUNERS}",
        "notes": notes,
        "settings": {
            **{name: value for name, value in vars(args).items() if name not in ("run", "command", "json", "html")},
            "model": args.model or DEFAULT_NAME,
            "device": str(device),
            "layers": schedule.layers,
        },
        **describe_run(device),
    }


# ----------------------------------------------------------------------------------------------------- the prompts


def _ask(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[Asked], list[str]]:
    """A prompt for each question, and remarks for the reader."""
    if args.question:
        found = []
        for question in args.question:
            prompt, notes = texts.build_prompt(tokenizer, text, question, args.tokens)
            found.append(Asked(question, "", "", prompt))
        return found, notes
    rng = random.Random(0)
    lookups = [tasks.LOOKUPS[i] for i in FACTS]
    names = rng.sample(tasks.NAMES, len(lookups))
    values = [tasks.VALUES[lookup.kind](rng) for lookup in lookups]
    facts = [lookup.fact.format(x=x, value=v) for lookup, x, v in zip(lookups, names, values, strict=True)]
    found = []
    for lookup, name, value in zip(lookups, names, values, strict=True):
        question, opening = lookup.question.format(x=name), lookup.opening.format(x=name)
        prompt, notes = texts.build_prompt(
            tokenizer, text, question, args.tokens, list(zip(DEPTHS, facts, strict=True)), opening
        )
        found.append(Asked(question, opening, value, prompt))
    return found, notes


def _check_settings(args: argparse.Namespace) -> None:
    for name, least in (("tokens", 1), ("new_tokens", 1), ("rounds", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    for name in ("json", "html"):
        path = getattr(args, name)
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no such directory")


def _method(args: argparse.Namespace, config: Any) -> tuple[Any, PruningSchedule]:
    """What :func:`sdtp_kernels.apply_sdtp` takes, and the schedule."""
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


def _run(
    pairs: Mapping[str, Pair],
    asked: Sequence[Asked],
    tokenizer: PreTrainedTokenizerBase,
    rounds: int,
    new_tokens: int,
) -> dict[str, Any]:
    """Check, measure and answer; each prefill is reported on stderr as it ends."""
    import torch

    first = pairs[DENSE]
    device = first.input_ids.device
    kinds: dict[str, dict[str, Any]] = {kind: {"prefill_s": []} for kind in pairs}
    answers: list[dict[str, Any]] = [{**one._asdict(), "by_kind": {}} for one in asked]
    for answer in answers:
        del answer["prompt"]
    about: dict[str, Any] = {"backend": first.backend, "note": "", "dropped_at": [None] * first.tokens}
    rounds = max(rounds, len(asked))  # every question is asked, in more rounds than were asked for if need be
    with command.progress_bar(1 + rounds * len(pairs)) as bar:
        bar.show("check: all kept is dense")
        start = {kind: pair._replace(input_ids=pair.input_ids[:, -CHECKED:]) for kind, pair in pairs.items()}
        dense = start[DENSE].prefill().logits
        for kind in list(pairs)[1:]:
            for keep_ratio in (1.0, KEEP_ALL):
                start[kind].check_keeping_all(dense, keep_ratio)
        bar.advance()
        gc.collect()  # a collection costs more than many a prefill: not while the clock runs
        for i, kind in enumerate(in_turns(list(pairs), rounds)):
            number = i // len(pairs) % len(asked)
            bar.show(f"{kind}, prefill {i // len(pairs) + 1}")
            pair = pairs[kind]._replace(input_ids=torch.tensor([asked[number].prompt], device=device))
            with pair.patched() if kind != DENSE else contextlib.nullcontext() as handle:
                output, seconds = timed(pair.prefill, device)
                kinds[kind]["prefill_s"].append(seconds)
                cache = cache_of(output)
                if handle is not None:
                    report = handle.report()
                    pair.check_output(report, output)
                    about |= {"backend": report.backend or pair.backend, "note": report.note}
                if number == 0:
                    kinds[kind]["kv_bytes"] = cache_bytes(cache)
                    if kind == DROPPED:
                        about["dropped_at"] = _dropped_at(cache, pair.tokens)
                if kind not in answers[number]["by_kind"]:
                    expected = tokenizer(asked[number].expected, add_special_tokens=False).input_ids
                    most = min(new_tokens, len(expected) + EXTRA) if expected else new_tokens
                    tokens = _continue(pair.model, output, most)
                    answers[number]["by_kind"][kind] = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            del output, cache
            bar.progress.console.print(f"{kind:<10}{seconds:8.2f} s")
            bar.advance()
    return {"kinds": kinds, "answers": answers, **about}


def _continue(model: Any, output: Any, most: int) -> list[int]:
    """Greedy tokens after a prefill, up to the end of the text."""
    import torch

    from sdtp_kernels.models.compat import CACHE

    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    tokens: list[int] = []
    cache = cache_of(output)
    while True:
        token = int(output.logits[0, -1].argmax())
        if token in ends:
            return tokens
        tokens.append(token)
        if len(tokens) == most:
            return tokens
        output = model(torch.tensor([[token]], device=model.device), **{CACHE: cache})


def _dropped_at(cache: Any, tokens: int) -> list[int | None]:
    """For each token of the prompt, the first layer whose cache lacks it; None where all have it."""
    found: list[int | None] = [None] * tokens
    for number, layer in reversed(list(enumerate(cache.layers))):
        kept = getattr(layer, "kept", None)
        if kept is not None:
            here = set(kept[0].tolist())
            found = [at if token in here else number for token, at in enumerate(found)]
    return found


# ----------------------------------------------------------------------------------------------------- reporting


def _table(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of text: what, and a cell for each kind."""
    kinds, dense = result["kinds"], result["kinds"][DENSE]
    kept = ", ".join(map(str, result["kept_per_stage"])) or f"all: {result['note']}"

    def row(name: str, cell: Callable[[Mapping[str, Any]], str], of_dense: str | None = None) -> tuple[str, ...]:
        others = (cell(facts) for kind, facts in kinds.items() if kind != DENSE)
        return name, cell(dense) if of_dense is None else of_dense, *others

    rows = [
        ("", *kinds),
        row("tokens computed, mean over layers", lambda _: _percent(result["mean_keep"]), "100 %"),
        row("prefill, fastest of the rounds, s", lambda facts: f"{min(facts['prefill_s']):.2f}"),
        row("speed-up", lambda facts: f"{facts['speedup']:.2f} x", ""),
        row("ideal: by its operations", lambda facts: f"{facts['ideal']:.2f} x", ""),
        row("KV cache, MB", lambda facts: f"{facts['kv_bytes'] / 1e6:.1f}"),
    ]
    known = [answer for answer in result["answers"] if answer["expected"]]
    if known:
        found = (sum(answer["expected"] in answer["by_kind"][kind] for answer in known) for kind in kinds)
        rows.append(("facts found", *(f"{number} of {len(known)}" for number in found)))
    return [*rows, row("kept per stage", lambda _: kept, "")]


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _remarks(result: Mapping[str, Any]) -> list[str]:
    settings, machine, versions = result["settings"], result["machine"], result["versions"]
    spread = max(max(facts["prefill_s"]) / min(facts["prefill_s"]) for facts in result["kinds"].values())
    busy = [f"This machine was busy: runs of the same prefill differ by a factor of {spread:.1f}. Times mean little."]
    return [
        *(busy if spread > BUSY else []),
        *result["notes"],
        f"{settings['model']}, {settings['dtype']}, {result['scorer']}, {result['tokens']} tokens; "
        f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"backend {result['backend']}, {result['date']}",
    ]


def _verdict(answer: Mapping[str, Any], kind: str) -> str:
    """What a reader should know about an answer besides its text."""
    text = answer["by_kind"][kind]
    if answer["expected"]:
        return "right" if answer["expected"] in text else f"not the fact, which is {answer['expected']}"
    return "" if kind == DENSE else "as dense" if text == answer["by_kind"][DENSE] else "differs from dense"


def _print(result: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    head, *rows = _table(result)
    table = Table(box=box.SIMPLE_HEAD)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for answer in result["answers"]:
        # As text: an answer may hold what looks like markup.
        console.print(Text(answer["question"], style="bold"))
        for kind in result["kinds"]:
            verdict = _verdict(answer, kind)
            said = f"{answer['opening']} {answer['by_kind'][kind]}".strip()
            console.print(Text(f"  {kind:<10}{said}{f'  [{verdict}]' if verdict else ''}"))
    console.print()
    for remark in _remarks(result):
        console.print(Text(remark), style="dim")


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What SDTP dropped</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem }}
body {{ color: #222; background: #fff }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
td, th {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace }}
.legend span {{ display: inline-block; padding: 0 .5rem; margin: .1rem }}
footer {{ color: #666; font-size: 14px }}
{style}
</style>
<h1>What SDTP dropped</h1>
<table>{table}</table>
<h2>Answers</h2>
{answers}
<h2>The prompt</h2>
<p>Each token is coloured by the layer before which it was dropped. Tokens without a colour reached the last layer.</p>
<p class="legend">{legend}</p>
<pre>{prompt}</pre>
<footer>{remarks}</footer>
</html>
"""


def _page(result: Mapping[str, Any]) -> str:
    """One page that needs nothing else."""
    layers = result["settings"]["layers"]
    # Early layers are darker: what goes there saves most. Text stays readable on all of them.
    shades = {
        layer: f"background: hsl(8 85% {55 + 35 * i / max(1, len(layers) - 1):.0f}%)" for i, layer in enumerate(layers)
    }
    head, *rows = ([html.escape(cell) for cell in row] for row in _table(result))
    table = "<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"
    table += "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    answers = "".join(
        f"<p><b>{html.escape(answer['question'])}</b><br>"
        + "<br>".join(
            html.escape(f"{kind}: {answer['opening']} {answer['by_kind'][kind]} ({_verdict(answer, kind)})")
            for kind in result["kinds"]
        )
        + "</p>"
        for answer in result["answers"]
    )
    prompt = ""
    for token, at in zip(map(html.escape, result["prompt"]), result["dropped_at"], strict=True):
        mark = f'<span class="l{at}" title="dropped before layer {at}">'
        prompt += token if at is None else f"{mark}{token}</span>"
    counts = {layer: result["dropped_at"].count(layer) for layer in layers}
    return _PAGE.format(
        style="\n".join(f".l{layer} {{ {shade} }}" for layer, shade in shades.items()),
        table=table,
        answers=answers,
        legend=" ".join(
            f'<span class="l{layer}">layer {layer}: {counts[layer]} tokens</span>' for layer in layers
        ),
        prompt=prompt,
        remarks="<br>".join(map(html.escape, _remarks(result))),
    )  # fmt: skip


def _json(result: Mapping[str, Any]) -> str:
    return json.dumps(result, indent=2, ensure_ascii=False) + "\n"


def _write(content: str, path: Path) -> None:
    handle, draft = tempfile.mkstemp(dir=path.absolute().parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
