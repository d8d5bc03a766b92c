"""``sdtp saliency``, stage 1: a dense forward marks which tokens of a prompt mattered.

Several processes share the work: ``accelerate launch --num_processes 4 -m sdtp_kernels saliency ...``.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtp_eval import command
from sdtp_train import kv, shards
from sdtp_train.checkpoint import DTYPES
from sdtp_train.data import PYTHON, build_samples

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    import torch

    from sdtp_train.targets import DensePass

DEFAULT_TARGET = "future_attention"


def add_command(subparsers: Any) -> None:
    """Add ``saliency`` to the parsers of ``sdtp``."""
    parser = subparsers.add_parser("saliency", help="stage 1 of training: mark which tokens of many prompts mattered")
    command.add_model_option(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        default=[PYTHON],
        metavar="PATH",
        help="text files, directories, JSONL files, or 'python': what every Python has to read (%(default)s)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the shards go; a killed run goes on there")
    parser.add_argument(
        "--targets", nargs="+", default=[DEFAULT_TARGET], metavar="NAME", help="see sdtp_train.targets (%(default)s)"
    )
    parser.add_argument(
        "--layers", nargs="+", type=int, metavar="L", help="layers whose input is pruned (default: 4, 7, ...)"
    )
    parser.add_argument("--samples", type=int, default=400, help="number of prompts (%(default)s)")
    parser.add_argument(
        "--context", nargs="+", type=int, default=[512], metavar="N", help="tokens of a prompt: one of these (512)"
    )
    parser.add_argument("--continuation", type=int, default=128, help="tokens that follow, at most (%(default)s)")
    parser.add_argument(
        "--lookup-share", type=float, default=0.4, help="share of synthetic prompts that ask for a fact (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides every choice (%(default)s)")
    command.add_dtype_option(parser, choices=DTYPES)
    parser.add_argument("--hidden-dtype", choices=DTYPES, default="bfloat16", help="of what is kept (%(default)s)")
    parser.add_argument(
        "--kv-statistics", action="store_true", help="also add up what 'sdtp train --kv-rank' makes a KV predictor from"
    )
    parser.add_argument("--shard-size", type=int, default=16, help="prompts in a shard (%(default)s)")
    command.add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run stage 1 with these arguments; see :func:`add_command`."""
    with command.user_errors():
        mark(args)
    return 0


def mark(args: argparse.Namespace) -> None:
    """Compute what is missing in ``args.out``.

    Each sample is run alone, so the bytes of a shard depend neither on the other shards nor on how many processes there
    are, nor on whether the run was interrupted. KV statistics are sums over all samples: several processes add them up
    in another order than one, so the last bits may differ.

    Raises
    ------
    SaliencyError
        If ``args.out`` belongs to other settings, another model or other samples, or holds a damaged shard. Nothing is
        written then.
    ValueError, OSError, ImportError
        For settings, files and models that cannot work.
    """
    from sdtp_eval.checkpoints import identify
    from sdtp_eval.parallel import join_workers
    from sdtp_kernels import PruningSchedule
    from sdtp_train.checkpoint import load_frozen
    from sdtp_train.targets import check_names, dense_pass, need_graph

    check_names(args.targets)
    if args.shard_size < 1:
        raise ValueError(f"--shard-size {args.shard_size}: expected at least 1")
    workers = join_workers(args.device)
    model, tokenizer, name = load_frozen(args.model, args.dtype, workers.device)
    layers = sorted(set(args.layers or PruningSchedule.every(model.config.num_hidden_layers).layers))
    if layers[0] < 1 or layers[-1] >= model.config.num_hidden_layers:
        raise ValueError(f"--layers {layers}: expected layers from 1 to {model.config.num_hidden_layers - 1}")
    samples = build_samples(
        tokenizer, args.data, args.samples, args.context, args.continuation, args.lookup_share, args.seed
    )
    infos = [
        shards.SampleInfo(s.id, s.kind, s.source, s.is_validation, len(s.context), len(s.continuation)) for s in samples
    ]
    settings = {
        "model": {"name": name, **identify(model)},
        "layers": layers,
        "targets": sorted(set(args.targets)),
        "data": [Path(item).name for item in args.data],
        "context": args.context,
        "continuation": args.continuation,
        "lookup_share": args.lookup_share,
        "seed": args.seed,
        "dtype": args.dtype,
        "hidden_dtype": args.hidden_dtype,
        "shard_size": args.shard_size,
    }
    folder = Path(args.out)
    if workers.index == 0:
        shards.begin(folder, settings, infos)
    workers.wait()
    run_id = shards.run_id(settings, infos)
    starts = range(0, len(samples), args.shard_size)
    mine = list(enumerate(starts))[workers.index :: workers.number]
    # All that is there is checked before anything is added.
    slices = {i: slice(start, start + args.shard_size) for i, start in mine}
    missing = {i for i, part in slices.items() if not shards.is_done(folder, i, infos[part], run_id)}
    recorder, uncounted = None, set[int]()
    if args.kv_statistics:
        recorder = kv.Recorder(folder, run_id, workers.index, kv.Statistics(model.config, layers, workers.device))
        uncounted = set(slices) - recorder.counted
    todo = sorted(missing | uncounted)
    graph_from = layers[0] if need_graph(settings["targets"]) else None
    total = sum(len(samples[slices[i]]) for i in todo)
    with _deterministic(), command.progress_bar(total, "prompts", shown=workers.index == 0) as bar:
        for i in todo:
            found = []
            for sample in samples[slices[i]]:
                dense = dense_pass(model, sample.context, sample.continuation, graph_from)
                try:
                    if i in missing:
                        found.append(_mark_sample(model, dense, layers, settings["targets"], args.hidden_dtype))
                    if recorder and i in uncounted:
                        recorder.statistics.add(dense, sample.is_validation)
                except ValueError as error:
                    raise ValueError(f"sample {sample.id} of {sample.source}: {error}") from None
                bar.advance()
            if i in missing:
                shards.write_shard(folder, i, shards.join_samples(found), infos[slices[i]], run_id)
            if recorder and i in uncounted:
                recorder.save(i)
    workers.wait()
    if workers.index == 0:
        shards.finish(folder, len(starts))
        if recorder:
            kv.finish(folder, run_id, len(starts))
        num_validation = sum(info.is_validation for info in infos)
        print(f"{folder}: {len(infos) - num_validation} prompts for training, {num_validation} held out")


def _mark_sample(
    model: Any, dense: DensePass, layers: Sequence[int], targets: Sequence[str], hidden_dtype: str
) -> dict[str, torch.Tensor]:
    """Everything that a shard holds of one sample."""
    import torch

    from sdtp_train.targets import compute_targets, last_window_attention

    found = compute_targets(dense, model.lm_head, layers, targets)
    tensors = {"token_ids": dense.input_ids[0]}
    for stage, layer in enumerate(layers):
        hidden_states = dense.layer_inputs[layer][0, : dense.num_context]
        tensors[f"hidden_states.{layer}"] = hidden_states.to(getattr(torch, hidden_dtype))
        tensors[f"attention.{layer}"] = last_window_attention(dense, layer)
        for name in targets:
            tensors[f"target.{name}.{layer}"] = found[name][stage]
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Kernels that give the same bits every time, as far as torch has them."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
