"""``sdtp bench gpu-check``: what only a GPU can show. The kernels compute the right thing there, and how fast.

Every backend against the reference, over many shapes; the same, small, under compute-sanitizer; a patched model; times.
Nothing is timed whose output has not been found right. All contact with the GPU goes through a :class:`Device`, so that
tests run everything else on a CPU.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sdtp_bench.model_check import check_models
from sdtp_bench.providers import (
    allowed_error,
    backends_on,
    copy_error,
    error_of,
    find_attention,
    find_providers,
    make_attention_check,
    make_check,
)
from sdtp_bench.rows import summary
from sdtp_bench.shapes import DTYPES, GPUS, Case, Gpu, Stage, make_attention, make_stage, random_attention, random_stage
from sdtp_bench.timing import CudaDevice, interleave
from sdtp_eval.provenance import describe_run
from sdtp_kernels import (
    PruningSchedule,
    explain_backends,
    gather_tokens,
    position_attention,
    prompt_bias,
    prune_tokens,
    score_tokens,
    select_tokens,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from sdtp_bench.roofline import Cost
    from sdtp_bench.timing import Device

ROWS, PICTURE = "gpu_check.jsonl", "gpu_check.png"
REPEATS = 30


class Shape(NamedTuple):
    """Sizes of one correctness check."""

    batch: int
    tokens: int
    hidden_size: int
    pruner_size: int


# What models have, the smallest and the largest, and multiples of nothing.
CHECK_SHAPES = (
    Shape(1, 1, 64, 16),
    Shape(3, 17, 100, 25),
    Shape(2, 300, 896, 224),
    Shape(1, 1023, 1001, 251),
    Shape(2, 4097, 1536, 384),
    Shape(1, 8192, 3584, 896),
    Shape(1, 1500, 8192, 2048),
    Shape(1, 131072, 896, 224),
)
# The last is one row that several CTAs of the CUDA backend share.
SMALL_SHAPES = (Shape(2, 300, 100, 130), Shape(1, 1100, 64, 16), Shape(1, 9000, 16, 8))
# Block 256 takes one launch where there are enough blocks, 512 two.
BLOCK_SIZES = (None, 128, 256, 512)
# Of the attention: a configuration each, and one that is copied. The reference holds the weights of all its keys.
HEAD_SIZES = (64, 80, 128, 256)
MAX_KEYS = 4096

BENCH_CASES = tuple(
    Case(model, 2**power, keep=0.8, budget=budget, block_size=block_size)
    for model in ("qwen2-0.5b", "qwen2-7b")
    for budget, block_size in (("global", 512), ("block", 256), ("block", 512))
    for power in range(10, 18)
)
# Half of the tokens kept, the dropped ones keys still: what `dropped_kv="predicted"` asks of a layer.
ATTENTION_CASES = tuple(Case("qwen2-7b", tokens, keep=0.5) for tokens in (4096, 32768))


# ---------------------------------------------------------------------------------------------------- 1: right or wrong


def check_kernels(
    device: Device, shapes: Sequence[Shape] = CHECK_SHAPES, known: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Every op of every backend that can run on `device`, against the reference.

    Selections and copies bit for bit, scores and attention by tolerance, a row's scores bit for bit without its
    neighbours, and ``prune_tokens`` bit for bit as the composition of the backend's own scores with the reference.

    Parameters
    ----------
    device : Device
    shapes : sequence of Shape
    known : collection of str
        Keys of rows that there are already; their checks are left out.

    Yields
    ------
    dict
        One row a check: ``kind="check"``, ``backend``, ``op``, sizes and settings, ``error`` (empty where right).
    """
    for dtype_name, dtype in DTYPES.items():
        backends = backends_on(device.torch_device, dtype)
        for shape in shapes:
            stage = random_stage(device.torch_device, dtype, *shape, head_dim=64)
            sizes = {**shape._asdict(), "dtype": dtype_name}
            checks: list[tuple[str, dict[str, Any], Callable[[str], str]]] = [
                ("score_tokens", {"rms_eps": rms_eps}, functools.partial(_check_score, stage, rms_eps))
                for rms_eps in (None, 1e-6)
            ]
            for settings in _settings(shape):
                selection = _selection(shape, **settings, device=device.torch_device)
                checks.append(("prune_tokens", settings, functools.partial(_check_prune, stage, selection)))
                if dtype is torch.float32:  # what is selected by, in every dtype
                    checks.append(
                        (
                            "select_tokens",
                            settings,
                            functools.partial(_check_select, shape, selection, device.torch_device),
                        )
                    )
            checks.append(("gather_tokens", {}, functools.partial(_check_gather, stage)))
            checks.append(("prompt_bias", {}, functools.partial(_check_bias, shape, dtype, device.torch_device)))
            checks += [
                (
                    "position_attention",
                    {"head_dim": head_dim},
                    functools.partial(_check_attention, shape, head_dim, dtype, device.torch_device),
                )
                for head_dim in HEAD_SIZES
            ]
            for op, settings, check in checks:
                for backend in backends:
                    row = {"kind": "check", "backend": backend, "op": op, **sizes, **settings}
                    if _key(row) not in known:
                        yield {**row, "error": error_of(check, backend)}


def _settings(shape: Shape) -> Iterator[dict[str, Any]]:
    for block_size in BLOCK_SIZES:
        for padded in (False, True)[: shape.batch]:
            for pooling in (1, 7):
                yield {"block_size": block_size, "padded": padded, "pooling": pooling}


def _selection(
    shape: Shape, block_size: int | None, padded: bool, pooling: int, device: torch.device
) -> dict[str, Any]:
    """Arguments of a selection as a patched model passes them; padded rows have lengths of their own."""
    budget = {"budget": "block", "block_size": block_size} if block_size else {}
    schedule = PruningSchedule((1,), 0.75, min_prompt=1, **budget)  # type: ignore[arg-type]
    plan = schedule.plan(shape.tokens, 1, padded=padded)
    rows = None
    if padded:
        lengths = [max(1, shape.tokens * (shape.batch - i) // shape.batch) for i in range(shape.batch)]
        rows = schedule.plan_rows(torch.tensor(lengths, device=device), 1)
    return {**plan._asdict(), "rows": rows, "pooling": pooling}


def _check_score(stage: Stage, rms_eps: float | None, backend: str) -> str:
    scoring = stage.scoring._replace(rms_eps=rms_eps)._asdict()
    got, expected = (score_tokens(stage.hidden_states, **scoring, backend=name) for name in (backend, "reference"))
    # Backends may round the pre-activation to the dtype.
    error = (got - expected).abs().max().item()
    allowed = allowed_error(expected, max(1e-4, torch.finfo(stage.hidden_states.dtype).eps / 2))
    if not error <= allowed:  # also where it is NaN
        return f"scores differ by {error:.3g}, allowed are {allowed:.3g}"
    first = stage.hidden_states.shape[1] // 3
    tail, *terms = (t[-1:, first:] for t in (stage.hidden_states, scoring["mean_score"], scoring["score_bias"]))
    scoring |= dict(zip(("mean_score", "score_bias"), terms, strict=True))
    alone = score_tokens(tail, **scoring, backend=backend)
    return "" if torch.equal(alone[0], got[-1, -alone.shape[1] :]) else "scores depend on the rest of the batch"


def _check_select(shape: Shape, selection: dict[str, Any], device: torch.device, backend: str) -> str:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape.batch, shape.tokens, generator=generator).bfloat16().float()  # rounded: full of ties
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45])
    scores[:, ::7] = special[torch.randint(len(special), scores[:, ::7].shape, generator=generator)]
    scores = scores.to(device)
    got, expected = (select_tokens(scores, **selection, backend=name) for name in (backend, "reference"))
    return "" if torch.equal(got, expected) else f"{(got != expected).sum().item()} of {got.numel()} indices differ"


def _check_gather(stage: Stage, backend: str) -> str:
    hidden_size = stage.hidden_states.shape[-1]
    positions = stage.tensors[-1]
    indices = torch.where(positions % 3 == 0, -1, positions)  # zeros where a row is padded
    keys = stage.hidden_states[..., : hidden_size // 2 * 2].unflatten(-1, (2, -1)).transpose(1, 2)
    # More than fit the arguments of most launches.
    tensors = [stage.hidden_states, *stage.tensors, keys, *[positions] * 64, positions % 2 == 0]
    got, expected = (gather_tokens(tensors, indices, backend=name) for name in (backend, "reference"))
    return copy_error(got, expected)


def _check_attention(shape: Shape, head_dim: int, dtype: torch.dtype, device: torch.device, backend: str) -> str:
    """Every row but the first left-padded, a fifth of the tokens dropped."""
    tokens = min(shape.tokens, MAX_KEYS)
    kept = torch.arange(tokens, device=device)
    kept = kept[(kept % 5 != 3) | (tokens < 5)].expand(shape.batch, -1)
    first = torch.arange(shape.batch, device=device) * tokens // (shape.batch + 1)
    room = 7  # as in a static cache
    inputs = random_attention(kept + 1, tokens + room, 4, 2, head_dim, dtype, first)
    return make_attention_check(inputs)(functools.partial(position_attention, *inputs, backend=backend))


def _check_bias(shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> str:
    """Every row but the first left-padded, a few tokens after the prompt."""
    tokens, window = min(shape.tokens, MAX_KEYS), min(16, max(shape.tokens - 3, 0))
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, device=device, generator=generator)
    query, key = normal(shape.batch, 4, window, 64).to(dtype), normal(shape.batch, 2, tokens, 64).to(dtype)
    (cos, sin), table = normal(2, 1, tokens, 64).to(dtype), normal(shape.batch, 1000)
    padding = torch.arange(shape.batch, device=device) * tokens // (shape.batch + 1)
    index = (torch.arange(tokens, device=device) - padding.unsqueeze(-1)).clamp(min=-1)
    got, expected = (
        prompt_bias(
            index, table, keep_last=min(3, tokens), attention_weight=0.5, query=query,
            key=key, cos=cos, sin=sin, scaling=0.125, pooling=7, backend=name,
        )
        for name in (backend, "reference")
    )  # fmt: skip
    error = (got - expected).abs().max().item()
    allowed = allowed_error(expected, max(1e-3, 2 * torch.finfo(dtype).eps))
    return "" if error <= allowed else f"results differ by {error:.3g}, allowed are {allowed:.3g}"


def _check_prune(stage: Stage, selection: dict[str, Any], backend: str) -> str:
    hidden_states, tensors, scoring = stage.hidden_states, stage.tensors, stage.scoring._asdict()
    tokens = hidden_states.shape[1]
    got = prune_tokens(hidden_states, tensors, **scoring, **selection, num_dropped=tokens, backend=backend)
    scores = score_tokens(hidden_states, **scoring, backend=backend)
    indices = select_tokens(scores, **selection, backend="reference")
    if not torch.equal(got.indices, indices):
        return f"{(got.indices != indices).sum().item()} of {indices.numel()} indices differ"
    means = score_tokens(hidden_states, **scoring | {"score_bias": None}, backend=backend)
    column = torch.arange(tokens, device=indices.device)
    rows = selection["rows"]
    length, tail = (tokens, selection["recent"]) if rows is None else (rows[:, :1], rows[:, 2:])
    means = torch.where(column >= tokens - tail, scoring["mean_score"], means)
    expected = gather_tokens([hidden_states, *tensors, means], indices, backend="reference")
    is_kept = torch.zeros(len(indices), tokens + 1, dtype=torch.bool, device=indices.device)
    is_kept = is_kept.scatter(1, indices + 1, True)[:, 1:]
    dropped = torch.where(~is_kept & (column >= tokens - length), column, -1).sort(dim=-1).values
    return copy_error([got.hidden_states, *got.tensors, got.mean_score, got.dropped], [*expected, dropped])


# ------------------------------------------------------------------------------------------------ 2: compute-sanitizer

SANITIZER = "compute-sanitizer"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


def sanitize() -> Iterator[dict[str, Any]]:
    """A small run of part 1 under each tool of compute-sanitizer, where that is found.

    Yields
    ------
    dict
        One row a tool: ``kind="sanitizer"``, ``tool``, ``error`` (empty where nothing was found); a single one with
        ``tool=None`` where the program is not on the path.
    """
    program = shutil.which(SANITIZER)
    if program is None:
        yield {"kind": "sanitizer", "tool": None, "error": ""}
        return
    # Without PyTorch's pool every tensor ends where its memory does, so that an access beyond it is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZER_TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", __name__]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        error = "" if result.returncode == 0 else f"exit {result.returncode}: {(result.stdout + result.stderr)[-4000:]}"
        yield {"kind": "sanitizer", "tool": tool, "error": error}


def _small_run(device: Device) -> int:
    errors = [row for row in check_kernels(device, SMALL_SHAPES) if row["error"]]
    for row in errors:
        print(row)
    return 1 if errors else 0


# ------------------------------------------------------------------------------------------------------------ 3: times


def measure(device: Device, case: Case, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Time everyone on one case, interleaved, each launched directly and as a captured graph.

    A provider's output is compared first, in both forms; where it is wrong, its row has an ``error`` and no figure.
    The host may run ahead of the device, as it does in a prefill.

    Parameters
    ----------
    device : Device
    case : Case
    repeats : int, default 30

    Returns
    -------
    list of dict
        Rows ``kind="time"`` with ``provider``, ``graph``, the case, ``num_keep``, ``error``; where that is empty
        ``us`` (quantiles p10, p50, p90) and ``us_all``; ``model_bytes`` and ``model_bound_us`` of the fused launches
        on this GPU, computed and not measured, or None where :data:`~sdtp_bench.shapes.GPUS` does not hold it.
    """
    stage, plan = make_stage(case, device.torch_device), case.plan()

    def costs(gpu: Gpu) -> list[Cost]:
        from sdtp_bench import roofline

        return roofline.triton_costs(make_stage(case, "meta"), plan, gpu, case.pooling)

    about = {"kind": "time", **case._asdict(), "num_keep": plan.num_keep, **_model(device, costs)}
    return _timed(device, find_providers(device, case, stage, plan), make_check(case, stage, plan), repeats, about)


def measure_attention(device: Device, case: Case, repeats: int = REPEATS) -> list[dict[str, Any]]:
    """Time everyone on the attention of the kept tokens over all: ``position_attention``, and what PyTorch has for it.

    Masks are made before: a stage makes one for many layers. Parameters and rows are those of :func:`measure`, but for
    ``kind="attention"``; of the case only model, length, dtype, batch and the number of kept tokens matter.
    """
    inputs = make_attention(case, device.torch_device)

    def costs(gpu: Gpu) -> list[Cost]:
        from sdtp_bench import roofline

        return [roofline.attention_cost(inputs)]

    about = {"kind": "attention", **case._asdict(), "num_keep": inputs.query.shape[2], **_model(device, costs)}
    return _timed(device, find_attention(device, inputs), make_attention_check(inputs), repeats, about)


def _timed(
    device: Device,
    found: Mapping[str, Callable[[], Any]],
    check: Callable[[Callable[[], Any]], str],
    repeats: int,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    runs: dict[tuple[str, bool], Callable[[], Any]] = {}
    errors: dict[tuple[str, bool], str] = {}
    for name, run in found.items():
        errors[name, False] = error_of(check, run)
        if errors[name, False]:
            continue
        runs[name, False] = run
        try:
            replay = device.capture(run)
        except Exception as error:  # not everything can be captured; the rest is timed all the same
            errors[name, True] = f"{type(error).__name__}: {error}"
            continue
        errors[name, True] = error_of(check, replay)
        if not errors[name, True]:
            runs[name, True] = replay
    times = interleave(device, runs, repeats)
    return [
        {
            **about,
            "provider": name,
            "graph": graph,
            "error": errors[name, graph],
            **(
                {"us": summary(times[name, graph])["quantiles"], "us_all": times[name, graph]}
                if (name, graph) in times
                else {}
            ),
        }
        for name, graph in errors
    ]


def _model(device: Device, costs: Callable[[Gpu], Sequence[Cost]]) -> dict[str, float | None]:
    from sdtp_bench import roofline

    gpu = next((gpu for gpu in GPUS.values() if gpu.device_name in device.name), None)
    if gpu is None:
        return {"model_bytes": None, "model_bound_us": None}
    sums = roofline.total(costs(gpu), gpu)
    return {"model_bytes": sums["bytes_read"] + sums["bytes_written"], "model_bound_us": sums["bound_us"]}


# ---------------------------------------------------------------------------------------------------------- the command

PARTS = ("kernels", "models", "times", "attention", "sanitizer")
"""In this order: first whether all is right, then how fast it is; the tools that slow everything down come last."""

# Of the rows of a part; those of the others are checks.
KINDS = {"times": "time", "attention": "attention", "sanitizer": "sanitizer"}
GPU_BACKENDS = ("triton", "cuda")
# Of an H100 with 16 cores, for the plan alone: estimates from shapes, not measurements.
SECONDS = {"kernels": 0.15, "models": 4.0, "times": 2.5, "attention": 15.0, "sanitizer": 60.0}


def add_parser(commands: Any) -> None:
    """Add ``gpu-check`` to the parsers of ``sdtp bench``."""
    parser = commands.add_parser("gpu-check", help="prove the kernels on this machine's GPU, then time them")
    parser.add_argument("--out", metavar="DIR", default="gpu-check", help=f"for {ROWS} and {PICTURE} (%(default)s)")
    parser.add_argument(
        "--require", nargs="+", choices=GPU_BACKENDS, default=list(GPU_BACKENDS), metavar="BACKEND",
        help="fail unless these run and were checked (default: triton cuda)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="begin nothing after so much time, and fail")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out and do what is not in them")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and estimated seconds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check and measure; 0 where all is right and done, 1 where something is not, 2 without a GPU."""
    from sdtp_kernels.cli import CommandError

    if args.dry_run:
        print_plan(args.only)
        return 0
    if not torch.cuda.is_available():
        raise CommandError(
            f"no GPU that torch {torch.__version__} can use, so there is nothing to check. What can be shown without "
            "one, 'make test' shows: every kernel in Triton's interpreter, or on the CPU where it is written in CUDA, "
            "and compiled for every target"
        )
    try:
        return examine(
            CudaDevice(), Path(args.out),
            require=args.require, parts=args.only, deadline=args.deadline, resume=args.resume,
        )  # fmt: skip
    except OSError as error:
        raise CommandError(f"--out {args.out}: {error}") from error
    except ImportError as error:
        raise CommandError(f"{error}: pip install 'sdtp-kernels[bench]'") from error


def examine(
    device: Device,
    out: Path,
    shapes: Sequence[Shape] = CHECK_SHAPES,
    cases: Sequence[Case] = BENCH_CASES,
    repeats: int = REPEATS,
    attention_cases: Sequence[Case] = ATTENTION_CASES,
    *,
    require: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
    deadline: float | None = None,
    resume: bool = False,
) -> int:
    """All parts; rows and a picture go to the directory `out`, a summary to the terminal.

    Parameters
    ----------
    device : Device
    out : Path
    shapes, cases, repeats, attention_cases
        Of the checks, and of the times.
    require : sequence of str
        Backends that have to run and to be checked, or the result is 1.
    parts : sequence of str
        Of :data:`PARTS`.
    deadline : float, optional
        Seconds after which nothing more begins.
    resume : bool, default False
        Keep the rows that `out` has. Kernels and cases without an error are not done again; of the parts that are not
        asked for all rows stay, with their errors.

    Returns
    -------
    int
        0 where everything was done and all is right, else 1.
    """
    begin = time.monotonic()
    statuses = {status.name: status for status in explain_backends(device.torch_device)}
    absent = [f"{name}: {statuses[name].reason}" for name in require if not statuses[name].available]
    if absent:
        print("Required, and cannot run here. Nothing was checked.\n  " + "\n  ".join(absent))
        return 1
    out.mkdir(parents=True, exist_ok=True)
    about = describe_run(device.torch_device)
    about["machine"]["gpu"] = device.name
    print(f"{device.name}, torch {torch.__version__}, revision {about['revision']}")
    lines = (out / ROWS).read_text(encoding="utf-8").splitlines() if resume and (out / ROWS).is_file() else []
    known = _still_true([json.loads(line) for line in lines], parts)
    rows: list[dict[str, Any]] = list(known)
    is_late = False
    measured = {"times": (measure, sorted(cases, key=_value)), "attention": (measure_attention, attention_cases)}
    with torch.no_grad(), (out / ROWS).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in known)
        for made in _rows(device, shapes, measured, repeats, parts, {_key(row) for row in known}):
            rows += made
            file.writelines(json.dumps({**row, **about}) + "\n" for row in made)
            file.flush()
            for row in made:
                _report(row)
            is_late = deadline is not None and time.monotonic() - begin > deadline
            if is_late:
                break
    wrong = [row for row in rows if row["error"]]
    unseen = [name for name in require if not any(row.get("backend") == name for row in rows)]
    if timed := [row for row in rows if row["kind"] == "time"]:
        draw(timed, out / PICTURE, device.name)
    print(f"{len(rows) - len(wrong)} right, {len(wrong)} wrong; see {out / ROWS}{f' and {PICTURE}' if timed else ''}")
    if is_late:
        print(f"Not all was done: --deadline {deadline:g} has passed. 'sdtp bench gpu-check --resume' goes on")
    elif "kernels" in parts and (unseen or not rows):
        print(f"Nothing was checked of {', '.join(unseen) or 'anything'}: this run proves nothing")
    return 1 if wrong or is_late or ("kernels" in parts and (unseen or not rows)) else 0


def _rows(
    device: Device,
    shapes: Sequence[Shape],
    measured: Mapping[str, tuple[Callable[..., list[dict[str, Any]]], Sequence[Case]]],
    repeats: int,
    parts: Sequence[str],
    known: set[str],
) -> Iterator[list[dict[str, Any]]]:
    """Rows as they are made, those of one case together: a run ends between cases, never in one."""
    on_gpu = device.torch_device.type == "cuda"
    if "kernels" in parts:
        yield from ([row] for row in check_kernels(device, shapes, known))
    if "models" in parts and on_gpu:
        yield from ([row] for row in check_models(device))
    for part, (measure_case, cases) in measured.items():
        for case in cases if part in parts else ():
            if _key({"kind": KINDS[part], **case._asdict()}) not in known:
                yield measure_case(device, case, repeats)
    if "sanitizer" in parts and on_gpu:
        yield from ([row] for row in sanitize())


def _still_true(rows: Sequence[dict[str, Any]], parts: Sequence[str]) -> list[dict[str, Any]]:
    """Of an earlier run what this one neither does again nor may forget."""
    wrong = {_key(row) for row in rows if row["error"]}  # a case is timed again where one of its rows is wrong

    def part(row: Mapping[str, Any]) -> str:
        names = {kind: name for name, kind in KINDS.items()}
        return names.get(row["kind"], "kernels" if "hidden_size" in row else "models")

    resumed = ("kernels", "times", "attention")
    return [row for row in rows if part(row) not in parts or (part(row) in resumed and _key(row) not in wrong)]


def _value(case: Case) -> tuple[bool, bool, int]:
    """The most telling lengths first: a short visit may end before all are done."""
    return case.tokens not in (4096, 32768), case.model != "qwen2-7b", case.tokens


def _key(row: Mapping[str, Any]) -> str:
    """What a row is of: a check's backend, op and sizes, or the case that was timed."""
    if row["kind"] in ("time", "attention"):
        return json.dumps([str(row[name]) for name in ("kind", *Case._fields)])
    names = ("kind", "backend", "op", "tool", "dtype", *Shape._fields, "rms_eps", "block_size", "padded", "pooling")
    return json.dumps([str(row.get(name)) for name in (*names, "head_dim")])


def print_plan(parts: Sequence[str]) -> None:
    """What would be done, in order, with the estimated seconds of each part."""
    numbers = {
        "kernels": sum(
            len(DTYPES) * (3 + len(HEAD_SIZES) + len(list(_settings(shape)))) + len(list(_settings(shape)))
            for shape in CHECK_SHAPES
        ) * len(GPU_BACKENDS),
        "models": 7,
        "times": len(BENCH_CASES),
        "attention": len(ATTENTION_CASES),
        "sanitizer": len(SANITIZER_TOOLS),
    }  # fmt: skip
    total = 0.0
    for part in (part for part in PARTS if part in parts):
        seconds = numbers[part] * SECONDS[part]
        total += seconds
        print(f"{part:<10}{numbers[part]:>6} steps, about {seconds:5.0f} s")
    first = ", ".join(f"{case.model} at {case.tokens}" for case in sorted(BENCH_CASES, key=_value)[:2])
    print(f"{'in all':<23}about {total:5.0f} s on an H100 with 16 cores, by estimate; times begin with {first}")


def _report(row: dict[str, Any]) -> None:
    """One line for what is wrong, and for each time."""
    what = {name: value for name, value in row.items() if name not in ("error", "us", "us_all")}
    if row["error"]:
        print(f"WRONG {what}: {row['error']}", flush=True)
    elif row["kind"] in ("time", "attention"):
        budget = f"blocks of {row['block_size']}" if row["budget"] == "block" else "global"
        budget = budget if row["kind"] == "time" else "attention"
        bound = "" if row["model_bound_us"] is None else f", at least {row['model_bound_us']:.1f} by the model"
        name = row["provider"] + (" (graph)" if row["graph"] else "")
        print(
            f"{row['model']} {row['tokens']:>6} {budget:<13} {name:<22} {row['us']['p50']:9.1f} us{bound}", flush=True
        )
    elif row["kind"] == "sanitizer":
        print(f"{SANITIZER}: {row['tool'] or 'not found, left out'}", flush=True)


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Medians against prompt length, one PNG: a panel a model and budget, a colour a provider, dashed as a graph."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    budgets = list(dict.fromkeys((row["budget"], row["block_size"]) for row in rows))
    names = list(dict.fromkeys(row["provider"] for row in rows))
    figure = Figure(figsize=(5 * len(budgets), 4 * len(models)), layout="constrained")
    figure.suptitle(f"{title}: one pruning stage, microseconds")
    axes = figure.subplots(len(models), len(budgets), squeeze=False)
    panels = itertools.product(models, budgets)
    for axis, (model, (budget, block_size)) in zip(axes.flat, panels, strict=True):
        here = [row for row in rows if (row["model"], row["budget"], row["block_size"]) == (model, budget, block_size)]
        for i, name in enumerate(names):
            for graph in (False, True):
                timed = [row for row in here if (row["provider"], row["graph"]) == (name, graph) and "us" in row]
                axis.plot(
                    [row["tokens"] for row in timed], [row["us"]["p50"] for row in timed],
                    f"C{i}{'--' if graph else '-'}", marker=".", label=f"{name}{' (graph)' if graph else ''}",
                )  # fmt: skip
        bounds = {row["tokens"]: row["model_bound_us"] for row in here if row["model_bound_us"] is not None}
        axis.plot(list(bounds), list(bounds.values()), "k:", label="least, by the model (not measured)")
        axis.set(
            xscale="log", yscale="log", xlabel="tokens",
            title=f"{model}, {'global' if budget == 'global' else f'blocks of {block_size}'}",
        )  # fmt: skip
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7, handlelength=4)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(_small_run(CudaDevice()))
