"""``sdtp eval``: what pruning costs in quality, for any checkpoint, method, schedule and budget.

Each sample is read once by the dense model and once by every method with every schedule, so all comparisons are paired.
The answer is teacher-forced after the pruned prompt and never pruned itself. Results go to ``samples.jsonl`` as they
come, and a run that is started again takes up where it was stopped. Under ``accelerate launch`` (or ``torchrun``) the
processes share the samples and write files of their own, which the first one puts together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sdtp_eval import compare, tasks
from sdtp_eval.compare import DENSE, SAMPLES
from sdtp_eval.paired import cache_of
from sdtp_eval.provenance import describe_run
from sdtp_eval.tasks import INSIDE, PROTOCOLS, Sample

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from sdtp_eval.baselines import Oracle
    from sdtp_eval.parallel import Workers
    from sdtp_kernels import PruningSchedule
    from sdtp_kernels.scorers import StageInput

DTYPES = ("float32", "bfloat16", "float16")
RUNS = "runs.jsonl"
LAYERS = "4:3"  # the paper's pattern: from layer 4, every third
DROPPED_KV = ("none", "predicted")
SHAPES = ("even", "early")  # how a ratio becomes those of the stages: as it is, or front_loaded
DEFAULT_METHODS = ("random", "recent", "norm", "attention")
# Keeps every token of up to a million, yet is less than 1: scorers run, and nothing is dropped.
KEEP_ALL = 1 - 1e-8


def add_command(subparsers: Any) -> None:
    """Add ``eval`` to the parsers of ``sdtp``."""
    from sdtp_eval import cost, longbench, mine, ruler

    parser = subparsers.add_parser("eval", help="measure what pruning costs in quality")
    commands = parser.add_subparsers(dest="eval_command", required=True, metavar="COMMAND")
    runner = commands.add_parser("run", help="score methods and schedules on texts and retrieval tasks")
    runner.add_argument("--out", metavar="DIR", required=True, help="results; a run that is there is continued")
    runner.add_argument(
        "--tasks", nargs="+", default=["nll"], metavar="TASK", help=f"{', '.join(tasks.TASKS)} (default: nll)"
    )
    runner.add_argument(
        "--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD",
        help="pruner files, scorers, oracles, kvpress:NAME; dense always runs too (random recent norm attention)",
    )  # fmt: skip
    runner.add_argument("--tokens", nargs="+", type=int, default=[1024], help="prompt lengths (default: 1024)")
    runner.add_argument("--samples", type=int, default=48, help="samples a task and length (%(default)s)")
    runner.add_argument("--continuation", type=int, default=128, help="tokens scored after a text (%(default)s)")
    runner.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="text files or directories (default: Python's reference)"
    )
    runner.add_argument(
        "--split", choices=("held-out", "train", "all"), default="held-out", help="which files, by name (%(default)s)"
    )
    runner.add_argument(
        "--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS),
        help="question inside the pruned prompt, after the pruned context (default: both)",
    )  # fmt: skip
    runner.add_argument("--greedy", action="store_true", help="let the model answer freely as well, with generate()")
    runner.add_argument("--no-chat", action="store_true", help="ask without the chat template")
    runner.add_argument("--target", default="oracle_future_attention", help="what 'ranks' compares with (%(default)s)")
    runner.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    add_model_options(runner)
    add_schedule_options(runner)
    add_against_option(runner)
    runner.set_defaults(run=run)

    comparer = commands.add_parser("compare", help="tables and pictures of runs")
    comparer.add_argument("files", nargs="+", metavar="DIR_OR_FILE", help="what 'run' has written")
    add_against_option(comparer)
    comparer.add_argument("--by", metavar="FIELD", help="break down by a field of the samples: kind, depth, wording")
    comparer.add_argument("--solved", action="store_true", help="only questions that the dense model answers")
    comparer.add_argument("--plot", metavar="PNG", help="draw quality against B and against time")
    comparer.set_defaults(run=compare.run)
    cost.add_parser(commands)
    ruler.add_parser(commands)
    longbench.add_parser(commands)
    mine.add_parser(commands)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, where."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the model (%(default)s)")
    parser.add_argument("--backend", default="auto", help="who runs the ops; see 'sdtp doctor' (%(default)s)")


def add_schedule_options(parser: argparse.ArgumentParser) -> None:
    """Which layers prune, and how much is kept."""
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument(
        "--keep", nargs="+", default=["0.9", "0.8"], metavar="RATIO",
        help="share that each stage keeps, or one a stage with commas (default: 0.9 0.8)",
    )  # fmt: skip
    how_much.add_argument(
        "--mean-keep", nargs="+", type=float, metavar="B",
        help="instead: find the ratio that keeps this share of the tokens on average over all layers",
    )  # fmt: skip
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=["even"],
        help="even: the same ratio in each stage; early: front_loaded, to the same budget (default: even)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", nargs="+", metavar="LAYERS",
        help=f"FIRST:STEP or a list with commas (default: those of the pruner file, else {LAYERS})",
    )  # fmt: skip
    parser.add_argument("--budget", nargs="+", choices=("global", "block"), default=["global"], help="default: global")
    parser.add_argument("--block-size", nargs="+", type=int, default=[512], help="tokens of a block (default: 512)")
    parser.add_argument("--sink", type=int, default=4, help="first tokens always kept (%(default)s)")
    parser.add_argument("--recent", type=float, default=0.1, help="share of the end always kept (%(default)s)")
    parser.add_argument(
        "--dropped-kv", nargs="+", choices=DROPPED_KV,
        help="what later layers keep of a dropped token (default: predicted where the file has a KV predictor)",
    )  # fmt: skip
    parser.add_argument("--kv-predictor", metavar="FILE", help="take it from this pruner file, for any method")


def add_against_option(parser: argparse.ArgumentParser) -> None:
    """Whom to compare with."""
    parser.add_argument(
        "--against", nargs="*", default=["random", "recent", "attention"], metavar="METHOD",
        help="paired differences to these, at equal B (default: random recent attention)",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- methods and schedules


class Method(NamedTuple):
    """A way to score tokens."""

    name: str
    pruners: Any = None
    """What :func:`sdtp_kernels.apply_sdtp` takes; ``None`` where the sample decides."""
    oracle: Oracle | None = None
    layers: tuple[int, ...] | None = None
    """Those that a pruner file has pruners for."""
    press: Any = None
    """A class of kvpress, which compresses the cache of a dense prefill."""
    kv_predictor: Any = None
    """The file's, or another's; whether it is used is what `dropped_kv` says."""
    dropped_kv: Literal["none", "predicted"] = "none"


def find_method(word: str) -> Method:
    """A method by the name of a scorer, an oracle or a press of kvpress, or by the path of a pruner file.

    The name of a file's method ends in a hash of its content: results of a file that is trained again do not mix.

    Raises
    ------
    ValueError
        If there is neither such a name nor such a file, or the file is broken.
    """
    from sdtp_eval import peers
    from sdtp_eval.baselines import BASELINES, ORACLES
    from sdtp_eval.checkpoints import bundled_pruners
    from sdtp_kernels import load_pruners

    if word.startswith(peers.PREFIX):
        return Method(word, press=peers.find_press(word))
    if word in BASELINES:
        return Method(word, BASELINES[word])
    if word in ORACLES:
        return Method(word, oracle=ORACLES[word])
    path = bundled_pruners().get(word, Path(word))
    if not path.is_file():
        known = ", ".join([*BASELINES, *ORACLES, *bundled_pruners(), f"{peers.PREFIX}SnapKV"])
        raise ValueError(f"no method {word!r}: neither a pruner file nor one of {known}")
    stack = load_pruners(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:6]
    return Method(f"{path.stem}@{digest}", stack, layers=tuple(sorted(stack)), kv_predictor=stack.kv_predictor)


def find_methods(words: Sequence[str], *, oracles: bool = True) -> list[Method]:
    """The methods by these names without dense, which always runs.

    Raises
    ------
    ValueError
        As :func:`find_method`; also for an oracle where `oracles` is false.
    """
    methods = [find_method(word) for word in words if word != DENSE]
    for method in methods:
        if method.oracle is not None and not oracles:
            raise ValueError(f"{method.name}: an oracle has to know the answer's tokens; 'sdtp eval run' can use it")
        if method.press is not None and not oracles:
            raise ValueError(f"{method.name}: only 'sdtp eval run' can use the presses of kvpress")
    return methods


Entry = tuple[Method | None, str, "PruningSchedule | None"]


def plan(args: argparse.Namespace, methods: Sequence[Method], num_layers: int, tokens: int) -> list[Entry]:
    """Method, label and schedule of everything that a sample of this length goes through, the dense model first."""
    entries: list[Entry] = [(None, DENSE, None)]
    for method in methods:
        schedules = make_schedules(args, method, num_layers, tokens)
        for own in with_dropped_kv(args, method):
            note = "" if own.dropped_kv == "none" else f" {own.dropped_kv}"
            entries += [(own, label + note, schedule) for label, schedule in schedules.items()]
    return entries


def with_dropped_kv(args: argparse.Namespace, method: Method) -> list[Method]:
    """The method in each form that was asked for, or in the one that its file is meant for.

    Raises
    ------
    ValueError
        If a form needs a KV predictor, and there is none.
    """
    from sdtp_kernels import load_pruners

    if method.press is not None:  # it drops nothing from the computation
        return [method]
    predictor = method.kv_predictor
    if args.kv_predictor is not None:
        predictor = load_pruners(args.kv_predictor).kv_predictor
        if predictor is None:
            raise ValueError(f"--kv-predictor {args.kv_predictor}: this pruner file has none")
    forms = args.dropped_kv or ["none" if predictor is None else "predicted"]
    if predictor is None and "predicted" in forms:
        raise ValueError(
            f"{method.name}: --dropped-kv predicted needs a pruner file with a KV predictor, --kv-predictor"
        )
    return [method._replace(kv_predictor=predictor, dropped_kv=form) for form in forms]


def patch(model: Any, method: Method | None, schedule: PruningSchedule | None, backend: str) -> Any:
    """The model pruning by this method, which is no oracle, as a context manager; or as it is, without a method."""
    from sdtp_kernels import apply_sdtp

    if method is None or schedule is None:
        return contextlib.nullcontext()
    return apply_sdtp(
        model,
        method.pruners,
        schedule,
        backend,
        later_turns=False,  # a question stays whole
        dropped_kv=method.dropped_kv,
        kv_predictor=method.kv_predictor,
    )


def make_schedules(
    args: argparse.Namespace, method: Method, num_layers: int, tokens: int
) -> dict[str, PruningSchedule]:
    """The schedules of a method at a prompt length, by a label that says all that was asked for.

    Raises
    ------
    ValueError
        If an option is no schedule, or a budget cannot be reached.
    """
    from sdtp_kernels import PruningSchedule

    patterns = [_parse_layers(word, num_layers) for word in args.layers or []]
    patterns = patterns or [method.layers or _parse_layers(LAYERS, num_layers)]
    budgets: list[tuple[Any, int]] = []
    for budget in args.budget:
        sizes = args.block_size if budget == "block" else [PruningSchedule.block_size]
        budgets += [(budget, size) for size in sizes]
    found = {}
    for layers, (budget, block_size), shape in itertools.product(patterns, budgets, args.shape):
        base = PruningSchedule(layers=layers, budget=budget, block_size=block_size, sink=args.sink, recent=args.recent)
        notes = [f"@{_show_layers(layers, num_layers)}"]
        notes += ["early"] if shape == "early" else []
        notes += [f"block {block_size}"] if budget == "block" else []
        notes += [f"sink {args.sink}"] if args.sink != PruningSchedule.sink else []
        notes += [f"recent {args.recent:g}"] if args.recent != PruningSchedule.recent else []
        for word in args.mean_keep or args.keep:
            if args.mean_keep:
                schedule = schedule_for(base, word, num_layers, tokens, shape)
                label = f"B {word:g}"
            else:
                ratio = _parse_ratio(word)
                schedule, label = dataclasses.replace(base, keep_ratio=shaped(ratio, len(layers), shape)), str(word)
            found[" ".join([label, *notes])] = schedule
    return found


def shaped(keep_ratio: float | tuple[float, ...], num_stages: int, shape: str) -> float | tuple[float, ...]:
    """The keep ratio of a schedule of this shape, one of :data:`SHAPES`.

    Raises
    ------
    ValueError
        If there is a ratio for each stage already, and the shape is not even.
    """
    from sdtp_kernels import front_loaded

    if shape == "even":
        return keep_ratio
    if isinstance(keep_ratio, tuple):
        given = ",".join(map(str, keep_ratio))
        raise ValueError(f"--keep {given}: there is a ratio for each stage already; leave out --shape {shape}")
    return front_loaded(keep_ratio, num_stages)


def schedule_for(
    base: PruningSchedule, mean_keep: float, num_layers: int, tokens: int, shape: str = "even"
) -> PruningSchedule:
    """The schedule like `base` whose keep ratio, in this shape, gives the mean kept share `mean_keep` at `tokens`.

    Raises
    ------
    ValueError
        If no ratio does: the tokens that are always kept are too many, or pruning begins too late.
    """

    def at(hundred_thousandths: int) -> PruningSchedule:
        ratio = shaped(hundred_thousandths / 100_000, base.num_stages, shape)
        return dataclasses.replace(base, keep_ratio=ratio)

    low, high = 1, 100_000  # B grows with the ratio
    while low < high:
        middle = (low + high) // 2
        if at(middle).mean_keep(tokens, num_layers) < mean_keep:
            low = middle + 1
        else:
            high = middle
    schedule = at(low)
    found = schedule.mean_keep(tokens, num_layers)
    if abs(found - mean_keep) > compare.SAME_BUDGET:
        least = at(1).mean_keep(tokens, num_layers)
        raise ValueError(
            f"--mean-keep {mean_keep:g}: stages at {base.layers} of {num_layers} layers keep between {least:.3f} and 1 "
            f"of {tokens} tokens; ask for more, or begin to prune earlier"
        )
    return schedule


def _parse_ratio(word: str) -> float | tuple[float, ...]:
    try:
        ratios = tuple(float(part) for part in str(word).split(","))
    except ValueError:
        raise ValueError(f"--keep {word}: expected a number, or one a stage with commas") from None
    return ratios[0] if len(ratios) == 1 else ratios


def _parse_layers(word: str, num_layers: int) -> tuple[int, ...]:
    try:
        if ":" in word:
            first, step = map(int, word.split(":"))
            return tuple(range(first, num_layers, step))
        return tuple(int(part) for part in word.split(","))
    except ValueError:
        raise ValueError(f"--layers {word}: expected FIRST:STEP, such as 4:3, or a list, such as 4,7,10") from None


def _show_layers(layers: tuple[int, ...], num_layers: int) -> str:
    """As ``--layers`` takes them: FIRST:STEP only where they go on to the end."""
    steps = {b - a for a, b in itertools.pairwise(layers)}
    goes_on = len(steps) == 1 and len(layers) > 2 and layers[-1] + min(steps) >= num_layers
    return f"{layers[0]}:{steps.pop()}" if goes_on else ",".join(map(str, layers))


# --------------------------------------------------------------------------------------------------------- scoring


class Scored(NamedTuple):
    """How a model continued one sample."""

    log_probabilities: torch.Tensor
    """``[answer, vocabulary]``, float32, of the answer's positions."""
    mean_keep: float
    """B, from the lengths of the cache, or from the report where that is whole."""
    seconds: float
    """Time of the forward pass over prompt and answer."""


class Reader:
    """One sample in front of one model: the dense pass, and the passes of all methods compared with it.

    Parameters
    ----------
    model : transformers model
        Not patched.
    sample : Sample
    backend : str, default "auto"
    """

    def __init__(self, model: Any, sample: Sample, backend: str = "auto") -> None:
        import torch

        self.model, self.sample, self.backend = model, sample, backend
        self.input_ids = torch.tensor([sample.ids], device=model.device)
        self.answer = torch.tensor(sample.answer, device=model.device)
        self._oracles: dict[tuple[Any, ...], Any] = {}
        self.dense = self._forward(len(sample.ids))

    def result(
        self, protocol: str, method: Method | None = None, schedule: PruningSchedule | None = None
    ) -> dict[str, Any]:
        """What the per-sample file says: ``nll`` (nats a token), ``nll_increase`` and ``kl`` against the dense model,
        ``exact`` (every token of the answer is the most probable one), ``mean_keep``, ``seconds``, ``prompt_tokens``.

        Without a method: of the dense model.

        Raises
        ------
        RuntimeError
            If the cache does not hold what the schedule says.
        """
        prompt_length = self.sample.prompt_length(protocol)
        scored = self.dense
        if method is not None and schedule is not None and method.press is not None:
            scored = self._forward(prompt_length, method.press, self._mean_keep(schedule, prompt_length))
        elif method is not None and schedule is not None:
            with self.patched(protocol, method, schedule) as handle:
                scored = self._forward(prompt_length)
            if method.dropped_kv == "predicted":  # the cache is whole, the computation is not
                computed = sum(layer.tokens_out for layer in handle.report().layers) / len(handle.report().layers)
                after = len(self.sample.ids) - prompt_length
                scored = scored._replace(mean_keep=(computed - after) / prompt_length)
            expected = self._mean_keep(schedule, prompt_length)
            if abs(scored.mean_keep - expected) > 1e-9:
                raise RuntimeError(
                    f"{method.name}: the prefill kept B={scored.mean_keep}, the schedule says {expected}; this is a "
                    "bug of sdtp-kernels, please report it"
                )
        nll = self._nll(scored)
        dense = self.dense.log_probabilities
        kl = (dense.exp() * (dense - scored.log_probabilities)).sum(-1).mean().item()
        return {
            "nll": nll,
            "nll_increase": nll - self._nll(self.dense),
            "kl": kl,
            "exact": float((scored.log_probabilities.argmax(-1) == self.answer).all().item()),
            "mean_keep": scored.mean_keep,
            "seconds": scored.seconds,
            "prompt_tokens": prompt_length,
        }

    def patched(self, protocol: str, method: Method, schedule: PruningSchedule) -> Any:
        """The model pruning by this method; an oracle looks at the answer first."""
        if method.oracle is not None:
            method = method._replace(pruners=self.oracle_scores(method.oracle, protocol, schedule.layers))
        return patch(self.model, method, schedule, self.backend)

    def oracle_scores(self, oracle: Oracle, protocol: str, layers: tuple[int, ...]) -> Mapping[int, Any]:
        """The oracle's scores by layer, as scorers; computed once a sample."""
        import torch

        from sdtp_eval.baselines import LookUp

        prompt_length = self.sample.prompt_length(protocol)
        key = (oracle, prompt_length, layers)
        if key not in self._oracles:
            # With the last token of the answer, which is scored though the model never reads it.
            ids = torch.cat([self.input_ids, self.answer[None, -1:]], dim=1)
            scores = oracle(self.model, ids, prompt_length, len(self.answer), layers)
            self._oracles[key] = {layer: LookUp(values) for layer, values in scores.items()}
        found: Mapping[int, Any] = self._oracles[key]
        return found

    def greedy(self, protocol: str, extra: int = 8) -> list[int]:
        """What the model, patched or not, answers by itself: `extra` tokens more than the answer has."""
        context, question = list(self.sample.context), list(self.sample.question)
        if protocol == INSIDE:
            context, question = [*context, *question], []
        return greedy(self.model, context, question, len(self.answer) + extra)

    def ranks(self, method: Method, target: Oracle, layers: tuple[int, ...]) -> dict[str, Any]:
        """Spearman correlation of the method's scores with the target's, stage by stage, with nothing dropped.

        Only tokens that a stage may drop count: neither the first 4 nor the last tenth.
        """
        from scipy.stats import spearmanr

        from sdtp_eval.baselines import pruner_score
        from sdtp_kernels import PruningSchedule, TokenPruner

        schedule = PruningSchedule(layers=layers, keep_ratio=KEEP_ALL)
        recorded: dict[int, torch.Tensor] = {}
        wanted = self.oracle_scores(target, INSIDE, layers)
        if method.oracle is not None:
            scorers = self.oracle_scores(method.oracle, INSIDE, layers)
        elif callable(method.pruners):
            scorers = dict.fromkeys(layers, method.pruners)
        else:
            scorers = {
                layer: functools.partial(pruner_score, pruner) if isinstance(pruner, TokenPruner) else pruner
                for layer, pruner in method.pruners.items()
            }

        def record(layer: int, stage: StageInput) -> torch.Tensor:
            recorded[layer] = scorers[layer](stage)
            return recorded[layer]

        watching = Method(method.name, {layer: functools.partial(record, layer) for layer in layers})
        with self.patched(INSIDE, watching, schedule):
            scored = self._forward(len(self.sample.context))
        length = len(self.sample.context)
        droppable = slice(schedule.sink, length - schedule.num_recent(length))
        stages = [
            float(spearmanr(recorded[i][0, droppable].cpu(), wanted[i].scores[droppable].cpu()).statistic)
            for i in layers
        ]
        return {
            "spearman": sum(stages) / len(stages),
            "spearman_by_stage": stages,
            "mean_keep": scored.mean_keep,
            "seconds": 0.0,
            "prompt_tokens": length,
        }

    def _forward(self, prompt_length: int, press: Any = None, mean_keep: float = 1.0) -> Scored:
        import torch

        from sdtp_eval.peers import compressed_forward

        after = self.input_ids.shape[1] - prompt_length
        on_gpu = self.input_ids.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        # What stands after the prompt is never pruned; at least the answer's positions need their logits.
        wanted = max(after + 1, len(self.answer))
        if press is None:
            output = self.model(self.input_ids, use_cache=True, logits_to_keep=wanted)
            logits, cache = output.logits[0], cache_of(output)
        else:
            logits, cache = compressed_forward(
                self.model, press, mean_keep, self.input_ids, prompt_length, len(self.answer)
            )
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        layers = cache.layers
        kept = sum(layer.keys.shape[-2] - after for layer in layers)
        log_probabilities = logits[-len(self.answer) :].float().log_softmax(-1)
        return Scored(log_probabilities, kept / (len(layers) * prompt_length), seconds)

    def _mean_keep(self, schedule: PruningSchedule, prompt_length: int) -> float:
        return schedule.mean_keep(prompt_length, self.model.config.num_hidden_layers)

    def _nll(self, scored: Scored) -> float:
        return float(-scored.log_probabilities.gather(1, self.answer[:, None]).mean().item())


def greedy(model: Any, prompt: list[int], question: list[int], max_new_tokens: int) -> list[int]:
    """What ``generate()`` answers to a prompt, which a patched model prunes, and a question that follows it unpruned.

    Greedy, whatever sampling the checkpoint prefers; ends at the checkpoint's end-of-text token.
    """
    import torch
    from transformers import DynamicCache, GenerationConfig

    from sdtp_kernels.models.compat import CACHE

    own, cache = model.generation_config, None
    ids = torch.tensor([[*prompt, *question]], device=model.device)
    if question:
        cache = DynamicCache(config=model.config)
        model(ids[:, : len(prompt)], **{CACHE: cache}, logits_to_keep=1)
    end = own.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else end[0] if isinstance(end, list) else end
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=pad)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, generation_config=settings)
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


# ------------------------------------------------------------------------------------------------------------- runs


def run(args: argparse.Namespace) -> int:
    """``sdtp eval run``."""
    return report(args, evaluate)


def report(args: argparse.Namespace, evaluate: Callable[[argparse.Namespace], list[dict[str, Any]] | None]) -> int:
    """Evaluate, print the table and write ``rows.jsonl``; mistakes of the user become a message.

    Where `evaluate` returns ``None``, another process reports.
    """
    from sdtp_kernels import BackendUnavailableError
    from sdtp_kernels.cli import CommandError

    try:
        results = evaluate(args)
        if results is None:
            return 0
        rows = compare.summarize(compare.group(results), args.against)
        compare.print_table(rows, args.against)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (Path(args.out) / "rows.jsonl").write_text(lines, encoding="utf-8")
    except (ValueError, NotImplementedError, BackendUnavailableError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
    return 0


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Score everything that the arguments ask for and that the directory ``args.out`` does not hold yet.

    Parameters
    ----------
    args : Namespace
        Of the parser that :func:`add_command` makes.

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
    model, tokenizer = load_model(args)
    model = model.to(workers.device)
    methods = find_methods(args.methods)
    presses = [method.name for method in methods if method.press is not None]
    if presses and (args.greedy or "ranks" in args.tasks):
        raise ValueError(f"{', '.join(presses)}: kvpress compresses a cache: leave out --greedy and the task ranks")
    pool = tasks.TextPool(tokenizer, args.data, args.split)
    samples = [
        (tokens, sample)
        for task in args.tasks
        for tokens in args.tokens
        for sample in tasks.make_samples(
            task, pool, tokens, args.samples, continuation=args.continuation, seed=args.seed, chat=not args.no_chat
        )
    ]
    plans = {tokens: plan(args, methods, model.config.num_hidden_layers, tokens) for tokens in args.tokens}
    num_layers = model.config.num_hidden_layers
    work = [(tokens, sample, _jobs(args, num_layers, tokens, sample, plans[tokens])) for tokens, sample in samples]
    order = [job.key for _, _, jobs in work for job in jobs]
    file = Path(args.out) / SAMPLES
    if workers.index == 0:
        open_results(Path(args.out), args, model)
        join_parts(file, order)  # of a run that was killed
    workers.wait()
    done = {_key(result) for result in compare.read_samples([file])}
    work = [(tokens, sample, [job for job in jobs if job.key not in done]) for tokens, sample, jobs in work]
    work = [entry for entry in work if entry[2]]
    if work and workers.index == 0:
        record_run(args, model)
    mine = work[workers.index :: workers.number]
    _work(args, model, tokenizer, mine, file if workers.index == 0 else part_of(file, workers), workers)
    workers.wait()
    if workers.index > 0:
        return None
    join_parts(file, order)
    return compare.read_samples([file])


def part_of(file: Path, workers: Workers) -> Path:
    """Where a process other than the first writes its results."""
    return file.with_suffix(f".{workers.index}.part")


def join_parts(file: Path, order: Sequence[tuple[Any, ...]]) -> None:
    """Put what the processes have written into one file, in the order in which one process would have written it.

    Parameters
    ----------
    file : Path
        Per-sample results of the first process.
    order : sequence of tuple
        Keys of all results that are asked for; those of other runs stand before them.
    """
    parts = sorted(file.parent.glob(f"{file.stem}.*.part"))
    if not parts:
        return
    place = {key: i for i, key in enumerate(order)}
    results = sorted(compare.read_samples([file, *parts]), key=lambda result: place.get(_key(result), -1))
    whole = file.with_suffix(".whole")
    whole.write_text("".join(json.dumps(result) + "\n" for result in results), encoding="utf-8")
    whole.replace(file)
    for part in parts:
        part.unlink()


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result[name] for name in compare.KEY)


def record_run(args: argparse.Namespace, model: Any) -> None:
    """A line in ``runs.jsonl``: the samples do not say what made them, and the report has to."""
    from sdtp_eval.checkpoints import DEFAULT_NAME

    run = {
        "bench": "runs", "tasks": args.tasks, "tokens": args.tokens, "dtype": args.dtype,
        "checkpoint": Path(args.model).name if args.model else DEFAULT_NAME, **describe_run(model.device),
    }  # fmt: skip
    with (Path(args.out) / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(run) + "\n")


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
                label = f"@{_show_layers(schedule.layers, num_layers)}"
            key = (sample.task, protocol, tokens, sample.id, method.name if method else DENSE, label)
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
    """Score and write, with a progress bar on stderr, of the first process."""
    import sys

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    target = find_method(args.target).oracle
    if target is None:
        raise ValueError(f"--target {args.target}: expected an oracle")
    columns = (TextColumn("{task.description:<28}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(file=sys.stderr, highlight=False)
    with (
        Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            disable=workers.index > 0,
        ) as progress,
        path.open("a", encoding="utf-8") as file,
        torch.no_grad(),  # not inference_mode: an oracle takes gradients
    ):
        bar = progress.add_task("", total=sum(len(jobs) for _, _, jobs in work))
        for tokens, sample, jobs in work:
            progress.update(bar, description=f"{sample.task}, {tokens} tokens")
            progress.refresh()
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
                progress.advance(bar)


def _answer(reader: Reader, tokenizer: Any, job: Job) -> dict[str, Any]:
    patch: Callable[[], Any] = contextlib.nullcontext
    if job.method is not None and job.schedule is not None:
        patch = functools.partial(reader.patched, job.protocol, job.method, job.schedule)
    with patch():
        text = str(tokenizer.decode(reader.greedy(job.protocol), skip_special_tokens=True))
    expected = str(tokenizer.decode(reader.sample.answer)).strip()
    return {"greedy_text": text, "greedy": float(expected in text)}


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer that the options of :func:`add_model_options` name, on their device."""
    import torch

    from sdtp_eval.checkpoints import default_checkpoint, load_checkpoint

    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise ValueError("--device cuda: torch finds no GPU here; 'sdtp doctor' tells more")
    model, tokenizer = load_checkpoint(args.model or default_checkpoint(), getattr(torch, args.dtype))
    device: Any = torch.device(args.device or ("cuda" if has_gpu else "cpu"))
    return model.to(device), tokenizer


def open_results(out: Path, args: argparse.Namespace, model: Any) -> Path:
    """The per-sample file of this run, empty or to be continued; another model's is refused."""
    from sdtp_eval.checkpoints import identify

    out.mkdir(parents=True, exist_ok=True)
    path, about = out / SAMPLES, out / "settings.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "command", "eval_command")}
    settings["fingerprint"] = f"{identify(model)['weights'][:12]} {args.dtype}"
    if about.is_file():
        found = json.loads(about.read_text(encoding="utf-8")).get("fingerprint")
        if found != settings["fingerprint"]:
            raise ValueError(
                f"--out {out}: holds results of another model or dtype ({found}; now {settings['fingerprint']}); give "
                "another directory"
            )
    about.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text.endswith("\n"):  # a run was killed while it wrote: its torn line is done again
        text = text[: text.rfind("\n") + 1]
    path.write_text(text, encoding="utf-8")
    return path
