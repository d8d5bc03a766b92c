"""The registry: models, GPUs, and the pruning stage that every benchmark runs."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from sdtp_kernels import PruningSchedule
from sdtp_kernels.arguments import PromptTerms, Scoring
from sdtp_kernels.pruner import trained_width
from sdtp_kernels.scorers import ATTENTION_POOLING, QUESTION_WINDOW

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sdtp_kernels.schedule import StagePlan

Entry = TypeVar("Entry")


class Model(NamedTuple):
    """Sizes of a model that a pruning stage depends on."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int

    @property
    def pruner_size(self) -> int:
        """Width of the pruner's MLP, as ``sdtp train`` makes it by default."""
        return trained_width(self.hidden_size)


# config.json of the published checkpoints.
MODELS = {
    "qwen2-0.5b": Model(896, 14, 2, 64, 24),
    "qwen2-1.5b": Model(1536, 12, 2, 128, 28),
    "qwen2-7b": Model(3584, 28, 4, 128, 28),
}


class Gpu(NamedTuple):
    """What bounds a kernel on one GPU, as its vendor states it."""

    device_name: str
    """Part of the name that the driver gives the device; other variants of it have other figures."""
    target: str
    """Its row in :data:`sdtp_kernels.backends.triton.configs.SCORE`."""
    multiprocessors: int
    tensor_flops: float
    """Peak of bf16 and fp16 matrix products with float32 sums, dense, in operations a second."""
    hbm_bytes: float
    """Bytes a second."""
    l2_bytes: int
    l2_bandwidth: float
    """Bytes a second, of all multiprocessors together."""
    clock: float
    """Of the peak above, in Hz."""
    lanes: int = 128
    """Threads of a multiprocessor whose instructions are issued in a clock."""


# L2, where "measured": by gpu-l2-cache of github.com/te42kyfo/gpu-benches, whose results stand there.
GPUS = {
    # SXM5. H100 data sheet (half of the figures with sparsity); Hopper architecture white paper: 132 SMs, 50 MB,
    # 4096 operations a clock and SM. L2: measured on an H200.
    "h100": Gpu("H100 80GB HBM3", "sm_90", 132, 989.4e12, 3.35e12, 50 * 2**20, 9.7e12, 1.83e9),
    # H200 data sheet: the die of the H100 with faster memory. L2: measured.
    "h200": Gpu("NVIDIA H200", "sm_90", 132, 989.4e12, 4.8e12, 50 * 2**20, 9.7e12, 1.83e9),
    # 80 GB SXM4. A100 data sheet; Ampere architecture white paper: 108 SMs, 40 MB. L2: measured; the white paper has
    # 5120 bytes a clock, 7.2 TB/s.
    "a100": Gpu("A100-SXM4-80GB", "sm_80", 108, 312e12, 2.039e12, 40 * 2**20, 5.4e12, 1.41e9),
    # Ada architecture white paper, appendix A. L2: measured on an L40, which has the same die.
    "4090": Gpu("RTX 4090", "sm_89", 128, 165.2e12, 1.008e12, 72 * 2**20, 5.2e12, 2.52e9),
    # MI300X data sheet; CDNA 3 white paper: 4 MB of L2 for each of 8 dies, 2048 bytes a clock each; four SIMDs of 16
    # lanes. The 256 MB behind it are not counted.
    "mi300x": Gpu("MI300X", "gfx942", 304, 1307.4e12, 5.3e12, 32 * 2**20, 34.4e12, 2.1e9, 64),
}

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Rows name dtypes by these, options by torch's own names.
SHORT = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def lookup(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """The entry called `name`; a ``ValueError`` that lists the known ones where there is none."""
    if name not in table:
        raise ValueError(f"{what} {name!r} is not known; known: {', '.join(table)}")
    return table[name]


class Case(NamedTuple):
    """One pruning stage of one prompt, by a pruner of the form that ships."""

    model: str
    tokens: int
    dtype: str = "bf16"
    batch: int = 1
    keep: float = 0.9
    budget: str = "global"
    block_size: int = 512
    pooling: int = 7

    def plan(self) -> StagePlan:
        """What the stage asks of the selection, as a patched model would.

        Raises
        ------
        ValueError
            If the keep ratio, the budget or the block size cannot be.
        """
        schedule = PruningSchedule(
            (1,), self.keep, budget=self.budget, block_size=self.block_size, min_prompt=1  # type: ignore[arg-type]
        )  # fmt: skip
        return schedule.plan(self.tokens, 1)


class Stage(NamedTuple):
    """Arguments of :func:`sdtp_kernels.prune_tokens`, but for the selection."""

    hidden_states: torch.Tensor
    tensors: list[torch.Tensor]
    """cos, sin and positions: what a patched model carries."""
    scoring: Scoring


def make_stage(case: Case, device: torch.device | str) -> Stage:
    """Random arguments for a case; on the device ``"meta"``, their shapes alone.

    Everything that the pruners that ship have: an RMS norm, the mean of two earlier stages' scores, and under the
    global budget, where a stage sees the prompt's end, a bias.
    """
    model = lookup(MODELS, case.model, "model")
    stage = random_stage(
        device, lookup(DTYPES, case.dtype, "dtype"), case.batch, case.tokens,
        model.hidden_size, model.pruner_size, model.head_dim,
    )  # fmt: skip
    if case.budget == "global":
        return stage
    return stage._replace(scoring=stage.scoring._replace(score_bias=None))


def random_stage(
    device: torch.device | str,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    hidden_size: int,
    pruner_size: int,
    head_dim: int,
) -> Stage:
    """:func:`make_stage` for any sizes, with all terms; the same numbers whenever it is called."""
    device = torch.device(device)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, device=device, generator=generator)
    rotary = [normal(1, tokens, head_dim).to(dtype).expand(batch, -1, -1) for _ in range(2)]
    scoring = Scoring(
        (normal(pruner_size, hidden_size) * hidden_size**-0.5).to(dtype),
        normal(pruner_size) * 0.1,
        normal(pruner_size) * pruner_size**-0.5,
        normal(()),
        mean_score=normal(batch, tokens),
        num_scores=2,
        score_bias=normal(batch, tokens),
        rms_eps=1e-6,
    )
    tensors = [*rotary, torch.arange(tokens, device=device).expand(batch, -1)]
    return Stage(normal(batch, tokens, hidden_size, dtype=dtype), tensors, scoring)


def make_terms(case: Case, device: torch.device | str) -> PromptTerms:
    """Random arguments of the bias that a stage adds under the global budget, where it sees the prompt's end."""
    model = lookup(MODELS, case.model, "model")
    return random_terms(
        device, lookup(DTYPES, case.dtype, "dtype"), case.batch, case.tokens,
        model.num_heads, model.num_kv_heads, model.head_dim,
    )  # fmt: skip


def random_terms(
    device: torch.device | str,
    dtype: torch.dtype,
    batch: int,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> PromptTerms:
    """:func:`make_terms` for any sizes."""
    device = torch.device(device)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, device=device, generator=generator)
    index = torch.arange(tokens, device=device).expand(batch, -1)
    window = min(QUESTION_WINDOW, tokens)
    query = normal(batch, window, num_heads, head_dim).to(dtype).transpose(1, 2)
    key = normal(batch, num_kv_heads, tokens, head_dim).to(dtype)
    cos, sin = (normal(1, tokens, head_dim).to(dtype) for _ in range(2))
    return PromptTerms(
        index, normal(1000), 0, None, 1.0, query, key, cos, sin, head_dim**-0.5, pooling=ATTENTION_POOLING
    )


class Attention(NamedTuple):
    """Arguments of :func:`sdtp_kernels.position_attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    num_visible: torch.Tensor
    first_visible: torch.Tensor


def make_attention(case: Case, device: torch.device | str) -> Attention:
    """Random arguments for the attention of a case's kept tokens over its whole prompt."""
    model = lookup(MODELS, case.model, "model")
    shuffled = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    kept = shuffled[:, : case.plan().num_keep].sort(dim=1).values.to(device)
    return random_attention(
        kept + 1, case.tokens, model.num_heads, model.num_kv_heads, model.head_dim, lookup(DTYPES, case.dtype, "dtype")
    )


def random_attention(
    num_visible: torch.Tensor,
    num_keys: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    first_visible: torch.Tensor | None = None,
) -> Attention:
    """:func:`make_attention` for any sizes; queries as a projection leaves them.

    They are three times as long as a model's. Each then pays most to a few keys, and its result shows which of them it
    saw: a mean over thousands would not.
    """
    device, (batch, num_queries) = num_visible.device, num_visible.shape
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, device=device, generator=generator, dtype=dtype)
    query = 3 * normal(batch, num_queries, num_heads, head_dim).transpose(1, 2)
    key, value = (normal(batch, num_kv_heads, num_keys, head_dim) for _ in range(2))
    first_visible = num_visible.new_zeros(batch) if first_visible is None else first_visible
    return Attention(query, key, value, num_visible, first_visible)
