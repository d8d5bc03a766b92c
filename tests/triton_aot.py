"""Compiles every Triton kernel for every target of the table, without a GPU, and reads what the compiler made of it.

``python tests/triton_aot.py`` rewrites ``benchmarks/results/aot.jsonl`` and the table in ``docs/kernels.md``. The
kernels are not compiled from hand-written signatures: the ops themselves are called on CPU tensors under a driver that
claims to be the target, so exactly what a GPU would be asked to run goes through the compiler, specialised on the same
arguments.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sdtp_kernels.arguments import PromptTerms, Scoring, Selection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "results" / "aot.jsonl"
TABLE = ROOT / "docs" / "kernels.md"
MARKS = ("<!-- aot -->", "<!-- /aot -->")
SOURCES = ROOT / "sdtp_kernels" / "backends" / "triton"


class Target(NamedTuple):
    """What bounds a kernel on one architecture."""

    backend: str
    arch: int | str
    warp_size: int
    max_shared: int
    """Bytes of shared memory that one program may use."""
    shared_per_processor: int
    max_warps: int
    """Warps a processor holds at once."""
    tensor_core: str
    """Text of the matrix instruction in the assembly."""


# Limits: CUDA C++ programming guide, table of technical specifications; CDNA 2 and 3 ISA guides.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, 167936, 64, "mma.sync"),
    "sm_86": Target("cuda", 86, 32, 101376, 102400, 48, "mma.sync"),
    "sm_89": Target("cuda", 89, 32, 101376, 102400, 48, "mma.sync"),
    "sm_90": Target("cuda", 90, 32, 232448, 233472, 64, "wgmma"),
    "sm_100": Target("cuda", 100, 32, 232448, 233472, 64, "tcgen05.mma"),
    "sm_120": Target("cuda", 120, 32, 101376, 102400, 48, "mma.sync"),
    "gfx90a": Target("hip", "gfx90a", 64, 65536, 65536, 32, "v_mfma"),
    "gfx942": Target("hip", "gfx942", 64, 65536, 65536, 32, "v_mfma"),
}


def _pruner(dtype: torch.dtype, tokens: int) -> tuple[torch.Tensor, ...]:
    hidden_size, pruner_size = 3584, 896  # Qwen2-7B
    wide = [torch.empty(pruner_size), torch.empty(pruner_size), torch.empty(())]
    return torch.empty(1, tokens, hidden_size, dtype=dtype), torch.empty(pruner_size, hidden_size, dtype=dtype), *wide


def _carried(dtype: torch.dtype, tokens: int) -> list[torch.Tensor]:
    """Position embeddings, columns, keys and values, as a patched model hands them over."""
    rotary = [torch.empty(1, tokens, 128, dtype=dtype) for _ in range(2)]
    keys_values = [torch.empty(1, tokens, 4, 128, dtype=dtype).transpose(1, 2) for _ in range(2)]
    return [*rotary, torch.empty(1, tokens, dtype=torch.int64), *keys_values]


def _score(ops: Any, dtype: torch.dtype) -> None:
    hidden_states, *pruner = _pruner(dtype, 1024)
    ops.score_tokens(hidden_states, Scoring(*pruner, *torch.empty(1, 1, 1024), 2, torch.empty(1, 1024), 1e-6))


def _select(ops: Any, pooling: int, tokens: int, *selection: Any) -> None:
    ops.select_tokens(torch.empty(1, tokens), Selection(*selection, pooling=pooling))


def _gather(ops: Any) -> None:
    ops.gather_tokens(_carried(torch.bfloat16, 1024), torch.empty(1, 800, dtype=torch.int64))


def _prune(ops: Any, dtype: torch.dtype, padded: bool, pooling: int, *selection: Any) -> None:
    tokens = 2048
    hidden_states, *pruner = _pruner(dtype, tokens)
    rows = torch.empty(1, 3, dtype=torch.int64) if padded else None
    scoring = Scoring(*pruner, *torch.empty(1, 1, tokens), 2, torch.empty(1, tokens), 1e-6)
    num_dropped = tokens if padded else tokens - selection[0]
    ops.prune_tokens(hidden_states, _carried(dtype, tokens), scoring, Selection(*selection, rows, pooling), num_dropped)


def _prune_unaligned(ops: Any, dtype: torch.dtype, pooling: int, block_size: int, transposed: bool) -> None:
    """Sizes that are multiples of nothing, so that no access is known to be aligned."""
    tokens, hidden_size, pruner_size, recent = 2001, 1001, 251, 601
    hidden_states = torch.empty(1, tokens, hidden_size, dtype=dtype)
    if transposed:
        hidden_states = hidden_states.mT.contiguous().mT
    w1 = torch.empty(pruner_size, hidden_size, dtype=dtype)
    pruner = [w1, torch.empty(pruner_size), torch.empty(pruner_size), torch.empty(())]
    carried = [torch.empty(1, 3, 61, tokens, dtype=dtype).transpose(2, 3)]
    num_keep = 1400 // block_size * 101 + recent
    selection = Selection(num_keep, 4, recent, block_size, None, pooling)
    ops.prune_tokens(hidden_states, carried, Scoring(*pruner), selection, 0)


def _attend(ops: Any, dtype: torch.dtype, head_dim: int, padded: bool, tokens: int = 2048) -> None:
    """Queries as a projection leaves them, over a cache."""
    query = torch.empty(1, max(tokens * 4 // 5, 1), 28, head_dim, dtype=dtype).transpose(1, 2)
    key, value = torch.empty(2, 1, 4, tokens, head_dim, dtype=dtype)
    first_visible = torch.empty(1, dtype=torch.int64) if padded else None
    ops.position_attention(query, key, value, torch.empty(1, query.shape[2], dtype=torch.int64), first_visible)


def _bias(ops: Any, dtype: torch.dtype, heads: int, head_dim: int, window: int, pooling: int, given: bool) -> None:
    """Keys of a cache, queries as a projection leaves them; or attention that is given."""
    tokens = 2048
    index = torch.empty(1, tokens, dtype=torch.int64)
    if given:
        ops.prompt_bias(PromptTerms(index, torch.empty(1, 1000), 3, torch.empty(1, tokens), 0.5))
        return
    query = torch.empty(1, window, heads, head_dim, dtype=dtype).transpose(1, 2)
    key = torch.empty(1, 4, tokens + 100, head_dim, dtype=dtype)[:, :, :tokens]
    cos, sin = torch.empty(2, 1, tokens, head_dim, dtype=dtype)
    ops.prompt_bias(PromptTerms(index, torch.empty(1000), 3, None, 0.5, query, key, cos, sin, 0.1, pooling))


class Case(NamedTuple):
    """A call of an op, whose launches are compiled."""

    call: Callable[..., None]
    arguments: tuple[Any, ...]
    is_first: bool = False
    """One of the few that together launch every kernel and use every configuration of the table."""


# Selections: num_keep, sink, recent, block_size. "pooled": over 7 tokens.
CASES = {
    "score bf16": Case(_score, (torch.bfloat16,), True),
    "score fp16": Case(_score, (torch.float16,)),
    "score fp32": Case(_score, (torch.float32,), True),
    "select 131072": Case(_select, (1, 131072, 104858, 4, 13108)),
    "select 131072, pooled": Case(_select, (7, 131072, 104858, 4, 13108)),
    "select blocks of 512": Case(_select, (1, 8192, 6560, 4, 0, 512)),
    "select blocks of 512, pooled": Case(_select, (7, 8192, 6560, 4, 0, 512), True),
    "select blocks of 128, pooled": Case(_select, (7, 8192, 6400, 4, 0, 128), True),
    "gather bf16": Case(_gather, ()),
    "prune bf16, padded, pooled": Case(_prune, (torch.bfloat16, True, 7, 1600, 4, 100, None), True),
    "prune blocks of 256 bf16": Case(_prune, (torch.bfloat16, False, 1, 1600, 4, 0, 256)),
    "prune blocks of 256 bf16, pooled": Case(_prune, (torch.bfloat16, False, 7, 1600, 4, 0, 256), True),
    "prune blocks of 256 fp32, padded, pooled": Case(_prune, (torch.float32, True, 7, 1600, 4, 0, 256)),
    "prune one block of 208 bf16, pooled": Case(_prune, (torch.bfloat16, False, 7, 1998, 4, 1840, 208), True),
    "prune blocks of 512 bf16": Case(_prune, (torch.bfloat16, False, 1, 1600, 4, 0, 512)),
    "prune blocks of 2048 fp32, padded, pooled": Case(_prune, (torch.float32, True, 7, 1600, 4, 0, 2048), True),
    "heads of 64 bf16": Case(_attend, (torch.bfloat16, 64, False), True),
    "heads of 64 fp32, padded": Case(_attend, (torch.float32, 64, True), True),
    "heads of 96 fp16, padded": Case(_attend, (torch.float16, 96, True)),
    "heads of 128 bf16, padded": Case(_attend, (torch.bfloat16, 128, True), True),
    "heads of 128 fp32": Case(_attend, (torch.float32, 128, False), True),
    "heads of 128 bf16, one query and one key": Case(_attend, (torch.bfloat16, 128, False, 1)),
    "heads of 256 bf16": Case(_attend, (torch.bfloat16, 256, False), True),
    "last queries, 28 heads of 128 bf16": Case(_bias, (torch.bfloat16, 28, 128, 16, 7, False), True),
    "last queries, 16 heads of 64 fp16": Case(_bias, (torch.float16, 16, 64, 32, 1, False)),
    "last queries, 12 heads of 64 fp32": Case(_bias, (torch.float32, 12, 64, 16, 7, False), True),
    "last queries, 4 heads of 256 bf16": Case(_bias, (torch.bfloat16, 4, 256, 32, 7, False)),
    "attention that is given": Case(_bias, (torch.float32, 0, 0, 0, 1, True), True),
    "prune unaligned bf16": Case(_prune_unaligned, (torch.bfloat16, 1, 200, False)),
    "prune unaligned bf16, transposed, pooled": Case(_prune_unaligned, (torch.bfloat16, 7, 200, True), True),
    "prune unaligned fp32, transposed, pooled": Case(_prune_unaligned, (torch.float32, 7, 200, True), True),
    "prune unaligned blocks of 700 fp32": Case(_prune_unaligned, (torch.float32, 1, 700, False)),
    "prune unaligned blocks of 700 bf16, transposed, pooled": Case(_prune_unaligned, (torch.bfloat16, 7, 700, True)),
}


def kernel_names() -> set[str]:
    """Every function under @triton.jit that no other one calls: those must be launched from the host."""
    functions = [node for path in SOURCES.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    jitted = [
        node
        for node in functions
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    called = {
        node.func.id
        for function in jitted
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return {function.name for function in jitted} - called


class _Driver:
    """Stands in for the driver of `target` as far as compiling asks for one."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_target(name: str, first_cases: bool) -> list[dict[str, Any]]:
    """One row for every kernel that the cases launch on target `name`; runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from sdtp_kernels.backends import triton as ops
    from sdtp_kernels.backends.triton import configs

    target = TARGETS[name]
    triton.runtime.driver.set_active(_Driver(GPUTarget(target.backend, target.arch, target.warp_size)))
    launch = JITFunction.run
    compiled: list[tuple[dict[str, Any], Any]] = []
    blocks = ("BLOCK_TOKENS", "BLOCK_WIDTH", "BLOCK_HIDDEN", "BLOCK_QUERIES", "BLOCK_KEYS")
    constants = (*blocks, "num_warps", "num_stages", "INPUT_PRECISION")

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        config = [kwargs[c] for c in constants if c in kwargs] if "INPUT_PRECISION" in kwargs else None
        compiled.append(({"kernel": self.__name__, "tile": kwargs.get("TILE"), "config": config}, kernel))

    JITFunction.run = compile_only
    # Two processors: one block is too few for the one-launch form, two are enough.
    configs.device_of = lambda device: configs.Device(name, 2)

    rows, seen = [], set()
    for name_of_case, case in CASES.items():
        compiled.clear()
        if case.is_first or not first_cases:
            case.call(ops, *case.arguments)
        for chosen, kernel in compiled:
            if (key := (chosen["kernel"], kernel.hash)) not in seen:
                seen.add(key)
                rows.append({"target": name, "case": name_of_case, **chosen, **measure(kernel, target)})
    return rows


def count_variants(name: str, lengths: Sequence[int]) -> dict[str, int]:
    """How often each kernel is compiled for prompts of these lengths, which differ in what the compiler looks at."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from sdtp_kernels.backends import triton as ops
    from sdtp_kernels.backends.triton import configs

    target = TARGETS[name]
    triton.runtime.driver.set_active(_Driver(GPUTarget(target.backend, target.arch, target.warp_size)))
    launch, variants = JITFunction.run, {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        variants.setdefault(self.__name__, set()).add(launch(self, *args, grid=grid, warmup=True, **kwargs).hash)

    JITFunction.run = compile_only
    configs.device_of = lambda device: configs.Device(name, 132)
    dtype = torch.bfloat16
    for tokens in lengths:
        hidden_states, *pruner = _pruner(dtype, tokens)
        query, key = torch.empty(1, 28, 16, 128, dtype=dtype), torch.empty(1, 4, tokens, 128, dtype=dtype)
        cos, sin = torch.empty(2, 1, tokens, 128, dtype=dtype)
        index = torch.empty(1, tokens, dtype=torch.int64)
        bias = ops.prompt_bias(PromptTerms(index, torch.empty(1000), 3, None, 0.5, query, key, cos, sin, 0.1, 7))
        ops.prompt_bias(PromptTerms(index, torch.empty(1, 1000), 3, torch.empty(1, tokens), 0.5))
        scoring = Scoring(*pruner, torch.empty(1, tokens), 2, bias, 1e-6)
        for block_size in (None, 500):
            recent = tokens // 9 if block_size is None else tokens % 500
            selection = Selection(tokens // 500 * 400 + recent, 4, recent, block_size, None, 7)
            carried = _carried(dtype, tokens)
            *_, indices, _, _ = ops.prune_tokens(
                hidden_states, carried, scoring, selection, tokens - selection.num_keep
            )
            ops.position_attention(query[:, :, :1].expand(-1, -1, len(indices[0]), -1), key, key, indices)
    return {kernel: len(hashes) for kernel, hashes in variants.items()}


def measure(kernel: Any, target: Target) -> dict[str, Any]:
    """Registers, spills, shared memory, programs a processor holds, and instructions that must or must not be there.

    `early` counts accesses to memory that stand before the wait for the previous launch.
    """
    if target.backend == "cuda":
        (registers, spills), scalar_spills = _cuda_usage(kernel.asm["cubin"]), 0
        text = kernel.asm["ptx"]
        # 64 Ki registers, given out to warps in units of 256.
        by_registers = 65536 // (-(-registers * 32 // 256) * 256) // kernel.metadata.num_warps
    else:
        text = kernel.asm["amdgcn"]
        registers, spills, scalar_spills = _hip_usage(text)
        # 512 registers a lane, vector and accumulation together, given out in units of 8; four SIMDs.
        by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8)) // kernel.metadata.num_warps
    shared = kernel.metadata.shared
    by_shared = target.shared_per_processor // (shared + (1024 if target.backend == "cuda" else 0)) if shared else 32
    return {
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "registers": registers,
        "spills": spills,
        "scalar_spills": scalar_spills,
        "shared": shared,
        "occupancy": min(by_registers, by_shared, target.max_warps // kernel.metadata.num_warps),
        "tensor_core": len(re.findall(re.escape(target.tensor_core), text)),
        "pdl": sorted(set(re.findall(r"griddepcontrol\.(\w+)", text))),
        "early": len(re.findall(r"\b(?:ld|st|cp)\.\S*global", "".join(text.split("griddepcontrol.wait")[:-1]))),
    }


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack): a spill needs stack, so none means none."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _hip_usage(assembly: str) -> tuple[int, int, int]:
    """(vector and accumulation registers, vector registers and bytes that spill, scalars that spill).

    Scalars spill into lanes of vector registers and cost a move, not an access to memory: those are counted apart.
    """

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    # On these targets .vgpr_count is the unified file: accumulation registers are part of it.
    spills = field("private_segment_fixed_size") + field("vgpr_spill_count")
    return field("vgpr_count"), spills, field("sgpr_spill_count")


def compile_all(names: Sequence[str] = tuple(TARGETS), first_cases: bool = False) -> list[dict[str, Any]]:
    """Rows of the targets; each in a fresh process, because a kernel remembers the driver that it first met."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton.compiler", "sdtp_kernels"])
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        return [row for rows in pool.map(compile_target, names, repeat(first_cases)) for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each kernel and case, a column for each target."""
    names = list(dict.fromkeys(row["target"] for row in rows))
    lines = ["| kernel | compiled for | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    cells = {(row["kernel"], row["case"], row["target"]): row for row in rows}
    for kernel, case in sorted({(row["kernel"], row["case"]) for row in rows}):
        found = [cells.get((kernel, case, name)) for name in names]
        texts = ["" if r is None else f"{r['registers']} / {r['shared'] / 1024:.0f} / {r['occupancy']}" for r in found]
        lines.append(f"| `{kernel}` | {case} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> int:
    """Rewrite the table and its rows; with the name of a file, write the rows there and touch nothing else."""
    import triton

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, help="write rows there alone")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--first-cases", action="store_true", help="every kernel and every configuration once")
    args = parser.parse_args()
    rows = compile_all(args.targets, args.first_cases)
    lines = "".join(json.dumps({"triton": triton.__version__, **row}) + "\n" for row in rows)
    if args.out:
        args.out.write_text(lines)
        return 0
    ROWS.write_text(lines)
    before, after = TABLE.read_text().split(MARKS[0])[0], TABLE.read_text().split(MARKS[1])[1]
    TABLE.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{after}")
    print(f"{len(rows)} kernels compiled, {sum(row['spills'] > 0 for row in rows)} spill")
    return 0


if __name__ == "__main__":
    sys.exit(main())
