"""The pruning step under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

Quick, for a look at a change; ``sdtp bench op`` is the one whose figures are published, as its rounds are interleaved.
"""

from __future__ import annotations

import functools

import pytest
import torch

from sdtp_bench.op import first_matmul
from sdtp_bench.providers import backends_on, find_providers, make_check
from sdtp_bench.shapes import DTYPES, Case, make_stage
from sdtp_bench.timing import CpuDevice, CudaDevice

DEVICE = CudaDevice() if torch.cuda.is_available() else CpuDevice()
CASES = [Case("qwen2-0.5b", 2048, dtype=dtype) for dtype in ("fp32", "bf16")]
PROVIDERS = ["first matmul", "eager", "eager tuned", *backends_on(DEVICE.torch_device, DTYPES["bf16"])]


@functools.lru_cache(maxsize=1)
def stage_of(case):
    stage, plan = make_stage(case, DEVICE.torch_device), case.plan()
    return stage, plan, make_check(case, stage, plan)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model}-{case.tokens}-{case.dtype}")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_prune_tokens(benchmark, case, provider):
    stage, plan, check = stage_of(case)
    benchmark.group = f"{case.model}, {case.tokens} tokens, {case.dtype}"
    with torch.no_grad():
        if provider == "first matmul":
            run = first_matmul(stage)
        else:
            run = find_providers(DEVICE, case, stage, plan, [provider])[provider]
            error = check(run)
            assert not error, f"no figure: {error}"

        def finished():
            run()
            DEVICE.synchronize()

        benchmark.pedantic(finished, rounds=20, warmup_rounds=2)
