"""Tests of the tests: plants one bug at a time in a copy of the source and demands that the suite fails.

Run with ``make test-mutants``, or some by parts of their names with ``python tests/mutants.py NAME ...``. A bug that
survives is a missing test; a bug whose text is no longer found is a stale entry of the list. Both fail the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "sdtp_kernels", "python", "csrc", "tests", "benchmarks", "CMakeLists.txt", "pyproject.toml", "setup.py",
    "requirements-nvcc.txt", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples",
)  # fmt: skip
WORKERS = os.cpu_count() or 1
# A machine whose processor has no such registers does not run what needs them.
CPUINFO = Path("/proc/cpuinfo")
UNUSED = set() if CPUINFO.is_file() and "avx2" in CPUINFO.read_text() else {"csrc/cpu/narrow.cpp"}
# A test that fails, or one that a wild address ends: anything else is a broken run and proves nothing.
CAUGHT = (1, -signal.SIGSEGV)
# Tests are forked from a process that has imported the large packages; what importing ours takes is little.
FORKS, SPAWNS = get_context("forkserver"), get_context("spawn")
FORKS.set_forkserver_preload(["torch._dynamo", "transformers.models.qwen2.modeling_qwen2", "hypothesis", "pytest"])


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


PREDICTED = "test_predicted.py::test_"
MODELS, CPU, BENCH = "sdtp_kernels/models/", "csrc/cpu/", "python/sdtp_bench/"
TRITON, SUITE = "sdtp_kernels/backends/triton/", "triton_interpreter_suite.py"
FORGOTTEN = "\n\n@triton.jit\ndef forgotten_kernel(ptr):\n    tl.store(ptr, 0)\n"
CUDA, ON_CPU = "csrc/cuda/", "test_cuda.py::test_kernels"
MUTANTS = [
    # What people do with a patched model besides generate().
    Mutant(
        "a step without a cache taken for a prefill",
        MODELS + "patched.py",
        "keep_last = max(keep_last, inputs.shape[1] - current.prompt_columns)",
        "pass",
        "test_real_use.py::test_without_a_cache_the_answer_is_never_pruned",
    ),
    Mutant(
        "a decoder patched without its owner",
        MODELS + "patch.py",
        "    owner = _owner_of(model)\n",
        "    owner = None\n",
        "test_real_use.py::test_a_decoder_stands_for_the_model_that_owns_it",
    ),
    Mutant(
        "kept tokens of the batch's columns",
        MODELS + "decoder.py",
        "recorder.finish(cache, segment.token_index)",
        "recorder.finish(cache, segment.token_index.clamp(min=0))",
        "test_real_use.py::test_kept_tokens_are_told",
    ),
    Mutant(
        "nobody warned of an index that is no position",
        MODELS + "patched.py",
        "if info.reads_all and call is Call.PROMPT and not",
        "if False and not",
        "test_real_use.py::test_kept_tokens_are_told",
    ),
    Mutant(
        "settings of a call ignored",
        MODELS + "decoder.py",
        "settings = info.settings or handle.settings()",
        "settings = handle.settings()",
        "test_real_use.py::test_settings_of_a_call_are_obeyed",
    ),
    Mutant(
        "settings in a generation config ignored",
        MODELS + "patched.py",
        "for config in configs for",
        "for config in configs[:1] for",
        "test_real_use.py::test_settings_of_a_call_are_obeyed",
    ),
    Mutant(
        "a thread's request ignored",
        MODELS + "handle.py",
        "if self._requests and not self.current.is_own:",
        "if False:",
        "test_real_use.py::test_a_thread_does_not_miss_the_request_it_was_started_in",
    ),
    Mutant(
        "two rows' settings for four rows",
        MODELS + "settings.py",
        "if given > 1 and batch not in (given, given * repeats):",
        "if given > 1 and batch % given:",
        "test_real_use.py::test_rows_and_widths_that_do_not_fit_are_refused",
    ),
    Mutant(
        "a mask over another prompt",
        MODELS + "settings.py",
        "if self.by_column and self.table.shape[1] != columns:",
        "if False:",
        "test_real_use.py::test_rows_and_widths_that_do_not_fit_are_refused",
    ),
    Mutant(
        "a copy with the original's handle",
        MODELS + "handle.py",
        "copied.parent, copied.group = self, self.group",
        "copied.group = self.group",
        "test_real_use.py::test_a_copy_prunes_by_itself_and_ends_with_the_original",
    ),
    Mutant(
        "a pickled model without its patch",
        MODELS + "patched.py",
        "return (_rebuild, (self._sdtp_dense, kind), *state)",
        "return (_rebuild, (object, kind), *state)",
        "test_real_use.py::test_a_pickled_model_prunes",
    ),
    Mutant(
        "a closed handle that prunes",
        MODELS + "handle.py",
        "        self._is_closed = True\n        for",
        "        for",
        "test_real_use.py::test_a_copy_prunes_by_itself_and_ends_with_the_original",
    ),
    Mutant(
        "another tool's forward passed by",
        MODELS + "patch.py",
        "if is_decoder and forward is not None",
        "if False and forward is not None",
        "test_real_use.py::test_another_tool_was_there_before",
    ),
    Mutant(
        "a class of somebody else's thrown away",
        MODELS + "patched.py",
        'if "_sdtp_dense" in vars(type(module)):',
        'if hasattr(type(module), "_sdtp_dense"):',
        "test_real_use.py::test_a_class_made_of_ours_stays_and_does_not_prune",
    ),
    Mutant(
        "a caching layer computed again",
        MODELS + "decoder.py",
        "use_cache, cache = False, None",
        "use_cache = False",
        "test_real_use.py::test_training_through_a_patched_model",
    ),
    Mutant(
        "a pruner in the dtype of patching",
        MODELS + "scoring.py",
        "if fused.weights.w1.dtype == hidden_states.dtype and",
        "if",
        "test_real_use.py::test_a_model_cast_after_it_was_patched",
    ),
    Mutant(
        "a module in another dtype than its input",
        MODELS + "scoring.py",
        "self.module(stage.hidden_states.to(weight.dtype))",
        "self.module(stage.hidden_states)",
        "test_real_use.py::test_a_model_cast_after_it_was_patched",
    ),
    Mutant(
        "two dtypes for one op",
        MODELS + "scoring.py",
        "                t.to(dtype) for t in",
        "                t for t in",
        "test_real_use.py::test_autocast",
    ),
    Mutant(
        "a cache that goes on under another schedule",
        MODELS + "checks.py",
        "    if layer.schedule != handle.schedule:\n",
        "    if False:\n",
        "test_real_use.py::test_a_cache_goes_on_as_it_began",
    ),
    Mutant(
        "an unpatched reader not told",
        MODELS + "decoder.py",
        "        tell_others(cache)\n",
        "        pass\n",
        "test_real_use.py::test_a_cache_goes_on_as_it_began",
    ),
    Mutant(
        "a crop refused half-way",
        MODELS + "cache.py",
        "            layer.check_crop(tokens_to_remove)\n",
        "            pass\n",
        "test_real_use.py::test_a_cache_goes_on_as_it_began",
    ),
    Mutant(
        "padding after a completion counted",
        MODELS + "decoder.py",
        "    if is_first and padding_mask is not None and info.keep_last:\n",
        "    if False:\n",
        "test_real_use.py::test_completions_padded_on_the_right",
    ),
    Mutant(
        "padding after a completion seen later",
        MODELS + "layers.py",
        "is_token = is_token & tail",
        "pass",
        "test_real_use.py::test_completions_padded_on_the_right",
    ),
    Mutant(
        "attention checked once",
        MODELS + "checks.py",
        "    _check_attention(decoder.config, handle.kv_predictor is not None)\n    if info",
        "    if info",
        "test_real_use.py::test_attention_set_after_patching",
    ),
    Mutant(
        "a hook left by a request that died",
        MODELS + "decoder.py",
        "                queries.remove()\n",
        "                pass\n",
        "test_real_use.py::test_no_hook_outlives_a_request_that_died",
    ),
    Mutant(
        "a NumPy number read to the last bit",
        "sdtp_kernels/schedule.py",
        "return float(str(value))",
        "return float(value)",
        "test_real_use.py::test_schedules_that_are_meant",
    ),
    Mutant(
        "a pair taken for two lists",
        MODELS + "settings.py",
        "    if (one := _range(protect)) is not None:\n        return [[one]]\n",
        "",
        "test_real_use.py::test_protected_tokens_that_are_meant",
    ),
    Mutant(
        "one gradient too many for an op with defaults",
        "sdtp_kernels/ops.py",
        "return grads[: len(ctx.needs_input_grad)]",
        "return grads",
        "test_real_use.py::test_gradients_with_every_default",
    ),
    # Families and versions.
    Mutant(
        "queries without their norm",
        MODELS + "family.py",
        'getattr(attention, self.query_norm or "q_proj")',
        'getattr(attention, "q_proj")',
        "test_families.py::test_attention_is_that_of_the_model_itself",
    ),
    Mutant(
        "keys without their norm",
        MODELS + "qwen3.py",
        'key_norm="k_norm"',
        'key_norm=""',
        "test_families.py::test_attention_is_that_of_the_model_itself",
    ),
    Mutant(
        "a sliding window let through",
        MODELS + "family.py",
        'if "sliding_attention" in kinds',
        "if False",
        "test_families.py::test_a_sliding_window_is_refused_and_the_way_out_works",
    ),
    Mutant(
        "rotary tables that depend on the length let through",
        MODELS + "family.py",
        'if rope_type in ("dynamic", "longrope"):',
        "if False:",
        "test_families.py::test_rotary_tables_that_depend_on_the_length_are_refused",
    ),
    Mutant(
        "a proof that a NaN passes",
        MODELS + "proof.py",
        "if difference <= TOLERANCE:",
        "if not difference > TOLERANCE:",
        "test_proof.py::test_what_differs_is_refused",
    ),
    Mutant(
        "an untested version not proved",
        MODELS + "patch.py",
        "if not is_tested:",
        "if False:",
        "test_proof.py::test_a_patch_proves_itself_once",
    ),
    Mutant(
        "a later turn taken for tokens to append",
        MODELS + "call.py",
        "(is_named_prompt and is_enabled) or has_left_out",
        "has_left_out",
        "test_call.py",
    ),
    # Attention by position.
    Mutant(
        "a query sees the key after its own",
        "sdtp_kernels/reference.py",
        "is_visible = column < num_visible[..., None]",
        "is_visible = column <= num_visible[..., None]",
        "test_position_attention.py::test_by_hand",
    ),
    Mutant(
        "a query does not see its own key",
        "sdtp_kernels/backends/cpu.py",
        "attn_mask=torch.arange(first, end, device=query.device) <",
        "attn_mask=torch.arange(first, end, device=query.device) + 1 <",
        "test_position_attention.py::test_by_hand",
    ),
    Mutant(
        "padding seen by the reference",
        "sdtp_kernels/reference.py",
        "is_visible &= column >= first_visible[:, None, None]",
        "pass",
        "test_position_attention.py::test_by_hand",
    ),
    Mutant(
        "padding seen on a CPU",
        "sdtp_kernels/backends/cpu.py",
        "firsts = [0] * batch if first_visible is None else",
        "firsts = [0] * batch if True else",
        "test_position_attention.py::test_by_hand",
    ),
    Mutant(
        "attention's scale ignored",
        "sdtp_kernels/backends/cpu.py",
        "scale=scale,",
        "scale=None,",
        "test_position_attention.py::test_by_hand",
    ),
    Mutant(
        "attention's scale ignored by its gradient",
        "sdtp_kernels/ops.py",
        "num_visible, first_visible, ctx.scale)",
        "num_visible, first_visible)",
        "test_position_attention.py::test_gradients",
    ),
    Mutant(
        "a block's keys end with its first query",
        "sdtp_kernels/backends/cpu.py",
        "end = max(visible[queries])",
        "end = visible[queries][0]",
        "test_position_attention.py::test_long_prompts",
    ),
    Mutant(
        "a block's keys are the row's",
        "sdtp_kernels/backends/cpu.py",
        "end = max(visible[queries])",
        "end = key.shape[2]",
        "test_position_attention.py::test_a_block_reads_no_key_behind_its_queries",
    ),
    Mutant(
        "heads that take turns at a key head",
        "sdtp_kernels/reference.py",
        "t.to(wide).repeat_interleave(group, dim=1)",
        "t.to(wide).repeat(1, group, 1, 1)",
        "test_position_attention.py::test_by_hand",
    ),
    Mutant(
        "the mean of all values where no key is seen",
        "sdtp_kernels/reference.py",
        ".softmax(-1).where(is_visible, 0)",
        ".softmax(-1)",
        "test_position_attention.py::test_queries_that_see_no_key",
    ),
    Mutant(
        "an output in a layout of its own",
        "sdtp_kernels/backends/cpu.py",
        "output = torch.zeros_like(query)",
        "output = query.new_zeros(query.shape)",
        "test_position_attention.py::test_fake_layouts_are_the_real_ones",
    ),
    Mutant(
        "the bits of bfloat16 attended to",
        TRITON + "attention.py",
        "if UPCAST:  # as in score_tile",
        "if False:",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "a query sees the key after its own, on Triton",
        TRITON + "attention.py",
        "keys[None, :] < visible[:, None]",
        "keys[None, :] <= visible[:, None]",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "padding seen on Triton",
        TRITON + "attention.py",
        "if first_ptr is not None:\n        first",
        "if False:\n        first",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "attention's scale ignored on Triton",
        TRITON + "attention.py",
        "head_dim**-0.5 if scale is None else scale",
        "head_dim**-0.5",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "a Triton block's keys end with its first query",
        TRITON + "attention.py",
        "seen_by_any = tl.max(visible, axis=0)",
        "seen_by_any = tl.min(visible, axis=0)",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "a Triton block's keys are the row's",
        TRITON + "attention.py",
        "seen_by_any = tl.max(visible, axis=0)",
        "seen_by_any = num_keys",
        f"{SUITE}::test_position_attention_reads_what_its_queries_see",
    ),
    Mutant(
        "a Triton block masked too late",
        TRITON + "attention.py",
        "tl.min(visible, axis=0) - first",
        "tl.max(visible, axis=0) - first",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "heads that take turns at a key head, on Triton",
        TRITON + "attention.py",
        "num_heads, num_heads // key.shape[1],",
        "num_heads, 1,",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "a softmax not rescaled",
        TRITON + "attention.py",
        "value, output * rescale[:, None],",
        "value, output,",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "a sum of weights not rescaled",
        TRITON + "attention.py",
        "row_sum = row_sum * rescale +",
        "row_sum = row_sum +",
        f"{SUITE}::test_position_attention",
    ),
    Mutant(
        "no key to divide by",
        TRITON + "attention.py",
        "tl.where(row_sum > 0.0, row_sum, 1.0)[:, None]",
        "row_sum[:, None]",
        f"{SUITE}::test_position_attention_in_any_order",
    ),
    Mutant(
        "keys that are not there",
        TRITON + "attention.py",
        "tl.maximum(tl.minimum(visible, num_keys), 0)",
        "visible",
        f"{SUITE}::test_position_attention_in_any_order",
    ),
    Mutant(
        "32-bit offset of a key",
        TRITON + "attention.py",
        "n = keys.to(tl.int64)[:, None]",
        "n = keys[:, None]",
        f"{SUITE}::test_position_attention_offsets_beyond_32_bits",
    ),
    Mutant(
        "queries of a block before the row's",
        TRITON + "attention.py",
        "block = tl.cdiv(num_queries, BLOCK_QUERIES) - 1 - tl.program_id(0) // num_heads",
        "block = tl.cdiv(num_queries, BLOCK_QUERIES) - tl.program_id(0) // num_heads",
        f"{SUITE}::test_position_attention",
    ),
    # The selection: reference, then C++.
    Mutant(
        "tie rule flipped",
        "sdtp_kernels/reference.py",
        "value.argsort(dim=-1, descending=True, stable=True)",
        "width - 1 - value.flip(-1).argsort(dim=-1, descending=True, stable=True)",
        "test_ops.py::test_select",
    ),
    Mutant(
        "indices unsorted",
        "sdtp_kernels/reference.py",
        "kept_columns[:, width - num_keep :]",
        "kept_columns[:, width - num_keep :].flip(-1)",
        "test_ops.py::test_select",
    ),
    Mutant(
        "-0 below +0",
        "csrc/include/sdtp/order.h",
        "if (magnitude == 0) return kSign;",
        "",
        "test_ops.py::test_select",
    ),
    Mutant(
        "NaN above every number",
        "csrc/include/sdtp/order.h",
        "return kNanKey;",
        "return kForcedKey - 1;",
        "test_ops.py::test_select",
    ),
    Mutant(
        "one tie too few",
        "csrc/include/sdtp/select.h",
        "threshold.num_ties-- > 0",
        "--threshold.num_ties > 0",
        "test_ops.py::test_select",
    ),
    Mutant(
        "forced tokens dropped",
        "csrc/include/sdtp/select.h",
        "std::fill_n(keys, block.num_forced, kForcedKey);",
        "",
        "test_ops.py::test_select",
    ),
    Mutant(
        "last token of a block not kept",
        CPU + "select.cpp",
        "block_size.has_value(), pooling / 2",
        "false, pooling / 2",
        "test_ops.py::test_select",
    ),
    # Window attention.
    Mutant(
        "queries of the window see what follows them",
        "sdtp_kernels/reference.py",
        " & (index <= query_index[..., None])",
        "",
        "test_ops.py::test_window_attention",
    ),
    Mutant(
        "queries of the window see padding",
        "sdtp_kernels/reference.py",
        "(index >= 0) & (index <=",
        "(index <=",
        "test_ops.py::test_window_attention",
    ),
    Mutant(
        "a query that sees nothing sees everything",
        "sdtp_kernels/reference.py",
        "has_a_say, 0).sum(2)",
        "has_a_say | True, 0).sum(2)",
        "test_ops.py::test_window_attention_of_queries_without_a_say",
    ),
    Mutant(
        "pooled over 8 keys",
        "sdtp_kernels/reference.py",
        "step = min(reach, width - reach)",
        "step = reach",
        "test_ops.py::test_window_attention",
    ),
    Mutant(
        "pooled too far in C++",
        CPU + "window_attention.cpp",
        "std::min(call.pooling / 2, call.num_keys)",
        "std::min(call.pooling, call.num_keys)",
        "test_ops.py::test_window_attention",
    ),
    Mutant(
        "padding in a chunk is seen",
        CPU + "window_attention.cpp",
        "lowest >= 0 && latest",
        "latest",
        "test_ops.py::test_window_attention_does_not_depend_on_the_company",
    ),
    Mutant(
        "keys ahead in a chunk are seen",
        CPU + "window_attention.cpp",
        " || index[j] > last_seen[i]",
        "",
        "test_ops.py::test_window_attention",
    ),
    Mutant(
        "softmax of each chunk by itself",
        CPU + "window_attention.cpp",
        "power = exp2_or_zero(most - power);",
        "power = 1.0f;",
        "test_ops.py::test_window_attention",
    ),
    Mutant(
        "powers of steep logits wrap around",
        CPU + "window_attention.cpp",
        "return t >= 50.0f ? 0.0f : exp2_negative(t);",
        "return exp2_negative(t);",
        "test_ops.py::test_window_attention_of_steep_logits",
    ),
    Mutant(
        "a query that sees nothing has a say in C++",
        CPU + "window_attention.cpp",
        "most == kHidden ? 0.0f * sum",
        "most > -kHidden ? 0.0f * sum",
        "test_ops.py::test_window_attention_of_queries_without_a_say",
    ),
    Mutant(
        "NaN of a query lost",
        CPU + "window_attention.cpp",
        "0.0f * sum",
        "0.0f",
        "test_ops.py::test_window_attention_layouts_and_nan",
    ),
    Mutant(
        "query heads on the wrong key head",
        CPU + "window_attention.cpp",
        "(key_head * call.group() + member) * head_stride",
        "(member * call.key_heads + key_head) * head_stride",
        "test_ops.py::test_window_attention",
    ),
    Mutant(
        "strided rows read as dense",
        CPU + "window_attention.cpp",
        "tensor.stride(3) == 1 ?",
        "true ?",
        "test_ops.py::test_window_attention_layouts_and_nan",
    ),
    Mutant(
        "window attention differentiable",
        "sdtp_kernels/ops.py",
        "    with torch.no_grad():\n        return chosen.window",
        "    with torch.enable_grad():\n        return chosen.window",
        "test_ops.py::test_window_attention_has_no_gradient",
    ),
    Mutant(
        "queries rotated the other way",
        CPU + "window_attention.cpp",
        "first * to_float(cos[d]) - second",
        "first * to_float(cos[d]) + second",
        "test_ops.py::test_window_attention_rotates_queries",
    ),
    Mutant(
        "every row rotated as the first",
        CPU + "window_attention.cpp",
        "row * call.rotary_stride",
        "0 * call.rotary_stride",
        "test_ops.py::test_window_attention_rotates_queries",
    ),
    Mutant(
        "a prompt's last queries rotated as its first tokens",
        CPU + "window_attention.cpp",
        "(call.first_rotary + i)",
        "i",
        "test_ops.py::test_score_prompt",
    ),
    Mutant(
        "opinions not averaged in C++",
        CPU + "score_prompt.cpp",
        "old[i] + share * (mean[i] - old[i])",
        "mean[i]",
        "test_ops.py::test_score_prompt",
    ),
    Mutant(
        "opinions not averaged",
        "sdtp_kernels/reference.py",
        "1 / (num_scores + 1)",
        "1",
        "test_ops.py::test_score_prompt",
    ),
    Mutant(
        "attention standardised with padding",
        CPU + "score_prompt.cpp",
        "token_index[i] >= 0 && ",
        "",
        "test_ops.py::test_score_prompt_does_not_depend_on_the_company",
    ),
    Mutant(
        "attention standardised with what stands after the prompt",
        CPU + "score_prompt.cpp",
        " && token_index[i] <= last_index",
        "",
        "test_ops.py::test_score_prompt",
    ),
    Mutant(
        "logarithms not centred",
        CPU + "score_prompt.cpp",
        "mean = sum / count;",
        "",
        "test_ops.py::test_score_prompt",
    ),
    Mutant(
        "a distance of each token to the end of all",
        CPU + "score_prompt.cpp",
        "end > 0 ? index[end - 1]",
        "end > 0 ? index[num_tokens - 1]",
        "test_ops.py::test_score_prompt",
    ),
    Mutant(
        "terms of tokens that have none",
        "sdtp_kernels/reference.py",
        "bias.masked_fill(~is_valid, 0)",
        "bias",
        "test_ops.py::test_score_prompt",
    ),
    Mutant(
        "a pruner's score differentiable",
        "sdtp_kernels/ops.py",
        "    with torch.no_grad():\n        return chosen.score_prompt",
        "    with torch.enable_grad():\n        return chosen.score_prompt",
        "test_ops.py::test_score_prompt_has_no_gradient",
    ),
    Mutant(
        "queries of the layer below projected again",
        MODELS + "stage.py",
        "if not wanted or end <= 0",
        "if True or end <= 0",
        "test_qwen2.py::test_queries_come_from_the_layer_below",
    ),
    Mutant(
        "queries of the first tokens taken",
        MODELS + "stage.py",
        "slice(max(end - wanted, 0), end)",
        "slice(0, min(wanted, end))",
        "test_qwen2.py::test_scorers_score_what_their_names_say",
    ),
    Mutant(
        "queries of another thread taken",
        MODELS + "stage.py",
        "if threading.get_ident() == self._thread:",
        "if self._thread:",
        "test_qwen2.py::test_queries_of_another_thread_are_left",
    ),
    Mutant(
        "a scorer on another backend",
        "sdtp_kernels/scorers.py",
        "backend=stage.backend",
        'backend="auto"',
        "test_qwen2.py::test_a_scorer_runs_on_the_backend_named",
    ),
    Mutant(
        "scorers not told the backend",
        MODELS + "stage.py",
        "        group=group,\n        backend=backend,\n",
        "        group=group,\n",
        "test_qwen2.py::test_a_scorer_runs_on_the_backend_named",
    ),
    # The Triton kernels.
    Mutant(
        "upcast forgotten",
        TRITON + "score.py",
        "        if UPCAST:\n",
        "        if False:\n",
        f"{SUITE}::test_score[300-64-16-None-torch.bfloat16]",
    ),
    Mutant(
        "no mask at the end of the hidden size",
        TRITON + "score.py",
        "mask=is_token[:, None] & is_d[None, :]",
        "mask=is_token[:, None]",
        f"{SUITE}::test_score_layouts_and_nan",
    ),
    Mutant(
        "32-bit offset of a hidden state",
        TRITON + "score.py",
        "batch.to(tl.int64) * stride_b + tokens.to(tl.int64) * stride_n",
        "batch * stride_b + tokens * stride_n",
        f"{SUITE}::test_score_offsets_beyond_32_bits",
    ),
    Mutant(
        "one partial score read over and over",
        TRITON + "score.py",
        "ptrs += part_stride",
        "ptrs += 0",
        f"{SUITE}::test_score[257-100-300-None-torch.float32]",
    ),
    Mutant(
        "ties to the higher index in a Triton tile",
        TRITON + "select.py",
        "is_equal & (num_equal < ties)",
        "is_equal & (num_equal >= tl.sum(is_equal.to(tl.int32)) - ties)",
        f"{SUITE}::test_select",
    ),
    Mutant(
        "NaN above every number in a Triton key",
        TRITON + "select.py",
        "tl.where(magnitude > 0x7F800000, 0, keys)",
        "tl.where(magnitude > 0x7F800000, 0xFFFFFFFE, keys)",
        f"{SUITE}::test_select",
    ),
    Mutant(
        "-0 below +0 in a Triton key",
        TRITON + "select.py",
        "    keys = tl.where(magnitude == 0, sign, keys)\n",
        "",
        f"{SUITE}::test_select_long_rows[special-4908-settings4]",
    ),
    Mutant(
        "unfinished block pruned",
        TRITON + "select.py",
        "body = length - tail",
        "body = length",
        f"{SUITE}::test_select",
    ),
    Mutant(
        "last token of a Triton block not kept",
        TRITON + "select.py",
        "is_forced | (i == size - 1)",
        "is_forced",
        f"{SUITE}::test_select",
    ),
    Mutant(
        "pooling over what stands after a Triton block",
        TRITON + "select.py",
        "is_inside = is_inside & (i >= 0)",
        "is_inside = (i >= 0) & (i < size + REACH)",
        f"{SUITE}::test_select",
    ),
    Mutant(
        "pooling over the masked rest of a Triton tile",
        TRITON + "select.py",
        "tl.where(is_inside, keys, 0)",
        "tl.where(is_inside, keys, keys)",
        f"{SUITE}::test_select_long_rows[descending-4097-settings6]",
    ),
    Mutant(
        "neighbours of a Triton tile taken for its own",
        TRITON + "select.py",
        "is_own & (place >= REACH) & (place < TILE - REACH)",
        "is_own & (place >= REACH)",
        f"{SUITE}::test_select_long_rows[ties-4097-settings6]",
    ),
    Mutant(
        "pooling beyond the block in the one launch",
        TRITON + "fused.py",
        "block_keys(scores, mask, i,",
        "block_keys(scores, i >= 0, i,",
        f"{SUITE}::test_prune_equals_the_composition[128-pooled]",
    ),
    Mutant(
        "32-bit offset of a copied token",
        TRITON + "gather.py",
        "(columns * stride_n)[:, None]",
        "(columns.to(tl.int32) * stride_n)[:, None]",
        f"{SUITE}::test_gather_offsets_beyond_32_bits",
    ),
    Mutant(
        "padding copied",
        TRITON + "gather.py",
        "is_read = mask & (columns >= 0)",
        "is_read = mask",
        f"{SUITE}::test_gather[dtype0]",
    ),
    Mutant(
        "sink in every block",
        TRITON + "fused.py",
        "size, sink - start, True, REACH, TILE), mask",
        "size, sink, True, REACH, TILE), mask",
        f"{SUITE}::test_prune_equals_the_composition[128-plain]",
    ),
    Mutant(
        "bias forgotten in the one launch",
        TRITON + "fused.py",
        "add_biases(scores, b2_ptr, bias_ptr,",
        "add_biases(scores, b2_ptr, None,",
        f"{SUITE}::test_prune_equals_the_composition[128-plain]",
    ),
    Mutant(
        "remainder of a shared block lost",
        TRITON + "fused.py",
        "share_size = tl.cdiv(quota, shares)",
        "share_size = quota // shares",
        f"{SUITE}::test_prune_equals_the_composition[300-plain]",
    ),
    Mutant(
        "a program copies what another one may not have written",
        TRITON + "fused.py",
        "mask=is_kept)\n        first_skipped = num_keep\n        last_skipped = num_keep\n",
        "mask=is_kept)\n        last_slot += 1\n        first_skipped = num_keep\n        last_skipped = num_keep\n",
        f"{SUITE}::test_bytes_of_the_block_budget[128-100-1]",
    ),
    Mutant(
        "counts of rows unclamped",
        TRITON + "select.py",
        "tl.minimum(tl.maximum(tl.load(rows_ptr + batch * 3 + 1), 0), tl.minimum(length, num_keep))",
        "tl.load(rows_ptr + batch * 3 + 1)",
        f"{SUITE}::test_wrong_counts_stay_in_their_row",
    ),
    Mutant(
        "hidden states read again for the ranking",
        TRITON + "fused.py",
        "tl.range(0, pruner_size, BLOCK_WIDTH, disable_licm=True)",
        "tl.range(-BLOCK_WIDTH, pruner_size, BLOCK_WIDTH, disable_licm=True)",
        f"{SUITE}::test_bytes_of_the_block_budget[128-100-1]",
    ),
    Mutant(
        "a count of a row read on the host",
        TRITON + "select.py",
        "    first_slot = num_keep - recent if rows is None else 0\n",
        "    first_slot = num_keep - recent if rows is None else num_keep - int(rows.amax())\n",
        f"{SUITE}::test_the_host_only_launches[128-True]",
    ),
    Mutant(
        "a kernel that no test launches",
        TRITON + "gather.py",
        "        )  # fmt: skip\n    return outputs\n",
        "        )  # fmt: skip\n    return outputs\n" + FORGOTTEN,
        f"{SUITE}::test_every_kernel_is_right_here",
    ),
    Mutant(
        "a kernel that nothing compiles",
        TRITON + "gather.py",
        "        )  # fmt: skip\n    return outputs\n",
        "        )  # fmt: skip\n    return outputs\n" + FORGOTTEN,
        "test_triton.py::test_every_kernel_compiles[installed-sm_90]",
    ),
    Mutant(
        "a launch that starts early and does not wait",
        TRITON + "gather.py",
        "        tl.extra.cuda.gdc_wait()",
        "        tl.extra.cuda.gdc_launch_dependents()",
        "test_triton.py::test_launches_overlap_where_the_hardware_can[installed-sm_90]",
    ),
    Mutant(
        "a tile that spills",
        TRITON + "configs.py",
        "_WARP_GROUPS = ScoreConfig(128, 128, 64, num_warps=8",
        "_WARP_GROUPS = ScoreConfig(128, 128, 64, num_warps=4",
        "test_triton.py::test_nothing_spills[installed-sm_90]",
    ),
    Mutant(
        "an AMD GPU without matrix instructions taken",
        TRITON + "__init__.py",
        "target in _AMD_TARGETS",
        'target.startswith("gfx9")',
        "test_triton.py::test_unavailable_reasons",
    ),
    # The CUDA kernels, each bug in the build that finds it.
    Mutant(
        "barrier after the clearing of a histogram removed",
        CUDA + "select.cuh",
        "shared.histogram[thread()] = 0;\n        __syncthreads();",
        "shared.histogram[thread()] = 0;",
        f"{ON_CPU}[race-select]",
    ),
    Mutant(
        "barrier of the row weakened to one of a CTA",
        CUDA + "select.cuh",
        "group.wait(digit + 1);",
        "__syncthreads();",
        f"{ON_CPU}[race-select]",
    ),
    Mutant(
        "relaxed arrival at the barrier of a row",
        CUDA + "select.cuh",
        "add_release(arrivals, 1);",
        "atomicAdd(arrivals, 1);",
        f"{ON_CPU}[race-select]",
    ),
    Mutant(
        "second barrier of a scan removed",
        CUDA + "cta.cuh",
        "    __syncthreads();  // the next call writes them again\n",
        "",
        f"{ON_CPU}[race-select]",
    ),
    Mutant(
        "staged tile overwritten while it is read",
        CUDA + "select.cuh",
        "            __syncthreads();  // the next tile writes them again\n",
        "",
        f"{ON_CPU}[race-select]",
    ),
    Mutant(
        "barrier of the copy pipeline removed",
        CUDA + "score.cuh",
        "        __syncthreads();  // the slice is there",
        "        // the slice is there",
        f"{ON_CPU}[race-score]",
    ),
    Mutant(
        "wait for copies one group too loose",
        CUDA + "score.cuh",
        "wait_for_copies<kStages - 2>();",
        "wait_for_copies<kStages - 1>();",
        f"{ON_CPU}[plain-score]",
    ),
    Mutant(
        "tile of one block over that of the block before",
        CUDA + "prune.cuh",
        "            __syncthreads();  // the next tile, or the keys, overwrite what this one has summed\n",
        "",
        f"{ON_CPU}[race-prune]",
    ),
    Mutant(
        "columns read before they are written",
        CUDA + "prune.cuh",
        "    __syncthreads();  // the threads that read a column are not those that wrote it\n",
        "",
        f"{ON_CPU}[race-prune]",
    ),
    Mutant(
        "barrier that some threads do not reach",
        CUDA + "select.cuh",
        "for (int first = 0; first < count; first += kThreads) {\n        const int i = first + thread();\n"
        "        const bool is_above",
        "for (int first = 0; first + thread() < count; first += kThreads) {\n        const int i = first + thread();\n"
        "        const bool is_above",
        f"{ON_CPU}[plain-select]",
    ),
    Mutant(
        "mask of the last tokens dropped",
        CUDA + "score.cuh",
        "const bool is_inside = row < matrix.num_rows && column < matrix.num_columns;",
        "const bool is_inside = column < matrix.num_columns;",
        f"{ON_CPU}[memory-score]",
    ),
    Mutant(
        "misaligned vector load",
        CUDA + "gather.cuh",
        "(tensor.batch_stride | tensor.head_stride | tensor.token_stride)",
        "(tensor.batch_stride | tensor.head_stride)",
        f"{ON_CPU}[memory-gather]",
    ),
    Mutant(
        "32-bit offset of a token that CUDA copies",
        CUDA + "gather.cuh",
        "source + column * tensor.token_stride",
        "source + static_cast<int>(column * tensor.token_stride)",
        f"{ON_CPU}[plain-gather]",
    ),
    Mutant(
        "many tensors in many launches",
        CUDA + "kernels.cu",
        "if (tensors.size() <= kFewTensors) return gather",
        "return gather",
        f"{ON_CPU}[plain-gather]",
    ),
    Mutant(
        "a second table of tensors like the first",
        CUDA + "kernels.cu",
        "table_of<kRoom>(&tensors[first], count)",
        "table_of<kRoom>(&tensors[0], count)",
        f"{ON_CPU}[plain-gather]",
    ),
    Mutant(
        "padding copied by CUDA",
        CUDA + "gather.cuh",
        "if (column >= 0 && first",
        "if (first",
        f"{ON_CPU}[memory-gather]",
    ),
    Mutant(
        "ties to the higher index in CUDA",
        CUDA + "select.cuh",
        "is_equal && num_equal < threshold.ties",
        "is_equal && num_equal > 0 && num_equal <= threshold.ties",
        f"{ON_CPU}[plain-select]",
    ),
    Mutant(
        "ties of a row's earlier CTAs forgotten",
        CUDA + "select.cuh",
        "sum_over_threads(thread() == found ? earlier : 0, shared.warp_sums)",
        "sum_over_threads(0, shared.warp_sums)",
        f"{ON_CPU}[plain-select]",
    ),
    Mutant(
        "forced tokens lost in CUDA",
        CUDA + "select.cuh",
        "if (i < block.num_sink || (block.keep_last",
        "if ((block.keep_last",
        f"{ON_CPU}[plain-select]",
    ),
    Mutant(
        "pooling across CUDA blocks",
        CUDA + "select.cuh",
        "0 <= neighbour && neighbour < block.size;",
        "true;",
        f"{ON_CPU}[memory-select]",
    ),
    Mutant(
        "wrong counts of rows unclamped in CUDA",
        CUDA + "select.cuh",
        "keep = clamped(row[1], min(length, selection.num_keep));",
        "keep = static_cast<int>(row[1]);",
        f"{ON_CPU}[plain-select]",
    ),
    Mutant(
        "tail of a row not kept by CUDA",
        CUDA + "select.cuh",
        "indices[slot] = slot + selection.num_tokens - selection.num_keep;",
        "indices[slot] = slot;",
        f"{ON_CPU}[plain-select]",
    ),
    Mutant(
        "half of float32's products left out",
        CUDA + "score.cuh",
        "        multiply_add<T>(sums, x.high, y.low);\n",
        "",
        f"{ON_CPU}[plain-score]",
    ),
    Mutant(
        "RMS norm of half a row",
        CUDA + "score.cuh",
        "squares<T>(a[i][0]) + squares<T>(a[i][2]);",
        "squares<T>(a[i][0]);",
        f"{ON_CPU}[plain-score]",
    ),
    Mutant(
        "a CUDA tile that spills",
        CUDA + "score.cuh",
        "inline constexpr int kScoreCtas = sizeof(T) == 2 ? 2 : 1;",
        "inline constexpr int kScoreCtas = 3;",
        "test_cuda.py::test_nothing_spills",
    ),
    Mutant(
        "window's queries multiplied before they are loaded",
        CUDA + "window.cuh",
        "        tile.load_queries(first, shared);\n        __syncthreads();\n",
        "        tile.load_queries(first, shared);\n",
        f"{ON_CPU}[race-window]",
    ),
    Mutant(
        "warps' statistics read before they are written",
        CUDA + "window.cuh",
        "        __syncthreads();  // the warps' statistics are there, and the queries' place is free\n",
        "",
        f"{ON_CPU}[race-window]",
    ),
    Mutant(
        "one pass's queries over those of the pass before",
        CUDA + "window.cuh",
        "        __syncthreads();  // the next pass overwrites the queries\n",
        "",
        f"{ON_CPU}[race-window]",
    ),
    Mutant(
        "padding seen by CUDA's window",
        CUDA + "window.cuh",
        "return 0 <= index[k] && index[k] <= query_index;",
        "return index[k] <= query_index;",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "keys after a query seen by it",
        CUDA + "window.cuh",
        "return 0 <= index[k] && index[k] <= query_index;",
        "return 0 <= index[k];",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "a say for queries that see no key",
        CUDA + "window.cuh",
        "all.sum == 0.0f ? 0.0f : 1.0f / all.sum",
        "1.0f / all.sum",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "NaN only for keys that its query sees",
        CUDA + "window.cuh",
        "                sums[k] += power * shared.share[query];",
        "                if (tile.sees(index, k)) sums[k] += power * shared.share[query];",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "statistics of lanes not scaled to the warp's maximum",
        CUDA + "window.cuh",
        "float sum = own.sum * exp2f(own.most - most);",
        "float sum = own.sum;",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "queries rotated the other way by CUDA",
        CUDA + "window.cuh",
        "d < half ? -to_float(from[d + half])",
        "d < half ? to_float(from[d + half])",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "tiles of keys from the row's start",
        CUDA + "window.cuh",
        "columns[k] = window.num_keys - 1 - (tile * kTileKeys + k * kThreads + thread());",
        "columns[k] = tile * kTileKeys + k * kThreads + thread();\n"
        "            if (columns[k] >= window.num_keys) columns[k] = -1;",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "32-bit offset of a key in CUDA",
        CUDA + "window.cuh",
        "max(columns[k], 0) * window.key_strides[2]",
        "static_cast<int>(max(columns[k], 0) * window.key_strides[2])",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "misaligned load of a key",
        CUDA + "kernels.cu",
        "window.key_strides[2], ",
        "",
        f"{ON_CPU}[memory-window]",
    ),
    Mutant(
        "keys read beyond their end",
        CUDA + "window.cuh",
        "if (first + i < window.head_dim) elements",
        "elements",
        f"{ON_CPU}[memory-window]",
    ),
    Mutant(
        "CUDA's window pooled one key too far",
        CUDA + "prompt_bias.cuh",
        "end = min(column + reach, num_keys - 1)",
        "end = min(column + reach + 1, num_keys - 1)",
        f"{ON_CPU}[plain-window]",
    ),
    Mutant(
        "CUDA's window pooled beyond the row",
        CUDA + "prompt_bias.cuh",
        "end = min(column + reach, num_keys - 1)",
        "end = column + reach",
        f"{ON_CPU}[memory-window]",
    ),
    Mutant(
        "moments over padding",
        CUDA + "prompt_bias.cuh",
        "if (column >= 0 && Distance(arguments.bias, batch, column).is_valid()) {",
        "if (column >= 0) {",
        f"{ON_CPU}[plain-bias]",
    ),
    Mutant(
        "moments of unequal parts weighed alike",
        CUDA + "prompt_bias.cuh",
        "(a.count * a.mean + b.count * b.mean) / count",
        "(a.mean + b.mean) / 2.0f",
        f"{ON_CPU}[plain-bias]",
    ),
    Mutant(
        "distance between the parts' means left out",
        CUDA + "prompt_bias.cuh",
        "a.squares + b.squares + distance * distance * (a.count * b.count / count)",
        "a.squares + b.squares",
        f"{ON_CPU}[plain-bias]",
    ),
    Mutant(
        "warps' moments read before they are written",
        CUDA + "prompt_bias.cuh",
        "    if (lane() == 0) warps[warp()] = together;\n    __syncthreads();\n",
        "    if (lane() == 0) warps[warp()] = together;\n",
        f"{ON_CPU}[race-bias]",
    ),
    Mutant(
        "a bias after the prompt",
        CUDA + "prompt_bias.cuh",
        "return index >= 0 && distance >= 0;",
        "return index >= 0;",
        f"{ON_CPU}[memory-bias]",
    ),
    Mutant(
        "CUDA's distances beyond the table",
        CUDA + "prompt_bias.cuh",
        "distance_table[min(token.distance, bias.num_distances - 1)]",
        "distance_table[token.distance]",
        f"{ON_CPU}[memory-bias]",
    ),
    # Span pooling.
    Mutant(
        "pooling across blocks",
        "sdtp_kernels/reference.py",
        " & (block[:, neighbour] == block.unsqueeze(-1))",
        "",
        "test_ops.py::test_select",
    ),
    Mutant(
        "pooling over the left neighbours alone",
        "csrc/include/sdtp/select.h",
        "own + std::min(i + block.reach + 1, block.size)",
        "own + i + 1",
        "test_ops.py::test_select",
    ),
    Mutant(
        "pooling forgotten by the patch",
        MODELS + "scoring.py",
        "return self.pruner.pooling",
        "return 1",
        "test_qwen2.py::test_prefill_equals_masked_dense",
    ),
    Mutant(
        "the mean score of earlier stages forgotten",
        MODELS + "scoring.py",
        "return scores, RunningMean(mean_score, ",
        "return scores, RunningMean(mean_score * 0, ",
        "test_qwen2.py::test_prefill_equals_masked_dense",
    ),
    Mutant(
        "the mean score of earlier stages at the wrong tokens",
        MODELS + "stage.py",
        "running_mean = RunningMean(others.pop(), running_mean.number)",
        "running_mean = RunningMean(running_mean.score[:, : indices.shape[1]], running_mean.number)",
        "test_qwen2.py::test_prefill_equals_masked_dense",
    ),
    # Evaluation.
    Mutant(
        "oracle looked up by the place after pruning",
        "python/sdtp_eval/baselines.py",
        "self.scores[stage.token_index.clamp(0, len(self.scores) - 1)]",
        "self.scores[None, : stage.token_index.shape[1]]",
        "test_eval_quality.py::test_an_oracle_is_looked_up_by_the_original_index",
    ),
    Mutant(
        "question counted to the prompt it comes after",
        "python/sdtp_eval/tasks.py",
        "(len(self.question) if protocol == INSIDE else 0)",
        "len(self.question)",
        "test_eval_quality.py::test_a_question_after_the_pruned_context_equals_a_second_call",
    ),
    Mutant(
        "differences that are not paired",
        "python/sdtp_eval/compare.py",
        "self.samples[i][metric] - rival.samples[i][metric] for i in both",
        "a[metric] - b[metric] for a, b in zip(self.samples.values(), rival.samples.values())",
        "test_eval_quality.py::test_paired_bootstrap",
    ),
    Mutant(
        "a mask of the first layer's length for all",
        "python/sdtp_eval/peers.py",
        "        if past:  #",
        "        if False:  #",
        "test_eval_peers.py::test_layers_of_different_lengths",
    ),
    # Training.
    Mutant(
        "evaluation's documents trained on",
        "python/sdtp_train/data.py",
        "if not texts.is_held_out(document.name)",
        "if document.name",
        "test_train_data.py",
    ),
    Mutant(
        "content of a shard not looked at",
        "python/sdtp_train/shards.py",
        'if header["content"] != _content_hash(tensors):',
        "if False:",
        "test_train_saliency.py::test_damage_is_found_and_nothing_is_overwritten",
    ),
    Mutant(
        "a last query that predicts nothing",
        "python/sdtp_train/targets.py",
        "queries = slice(n - 1, total - 1)",
        "queries = slice(n, total)",
        "test_train_targets.py",
    ),
    Mutant(
        "a width that is no whole number of vectors",
        "sdtp_kernels/pruner.py",
        "max(16, width // 16 * 16)",
        "max(16, width)",
        "test_train_pruners.py::test_an_mlp_is_a_third_of_the_papers_in_whole_tiles",
    ),
    Mutant(
        "supervision that never enters the loss",
        "python/sdtp_train/train.py",
        "self.objective.weights[name] * value for name, value in terms.items()",
        "0 * value for name, value in terms.items()",
        "test_train_pruners.py::test_a_planted_score_is_learned",
    ),
    Mutant(
        "a masked token that does not see itself",
        "python/sdtp_train/simulate.py",
        "torch.where(is_self, 1.0, mask)",
        "mask",
        "test_train_pruners.py::test_half_a_mask_halves_the_weights",
    ),
    Mutant(
        "pooling forgotten by the simulation",
        "python/sdtp_train/simulate.py",
        "scores = _pool(scores, pooling, plan.recent, plan.block_size)",
        "scores = scores.clone()",
        "test_train_pruners.py::test_simulation_equals_real_pruning",
    ),
    Mutant(
        "one's own prompts, the best first",
        "python/sdtp_eval/mine.py",
        'key=lambda row: -row["kl"]',
        'key=lambda row: row["kl"]',
        "test_eval_mine.py::test_the_worst_prompt_stands_first",
    ),
    Mutant(
        "maps that come out of training in another dtype",
        "python/sdtp_train/train.py",
        "kv_predictor.to(kv_dtype)",
        "kv_predictor.bfloat16()",
        "test_train_kv.py::test_training_keeps_the_dtype_of_the_maps_and_prunes_as_it_is_told",
    ),
    Mutant(
        "a revision that a file on the disk ignores",
        "sdtp_kernels/pruner_file.py",
        "        if revision is not None:\n",
        "        if False:\n",
        "test_pruner.py::test_a_file_has_no_revisions",
    ),
    Mutant(
        "a question that gives its answer away",
        "python/sdtp_train/lookup.py",
        "if task.answer not in task.question:",
        "if True:",
        "test_train_data.py::test_lookup_samples_can_be_answered_from_the_text",
    ),
    Mutant(
        "a GPU check that passes empty",
        BENCH + "gpu_check.py",
        'return 1 if wrong or is_late or ("kernels" in parts and (unseen or not rows)) else 0',
        "return 1 if wrong else 0",
        "test_bench_gpu_check.py::test_a_run_that_checks_nothing_fails",
    ),
    Mutant(
        "a wrong kernel that a resumed GPU check takes for done",
        BENCH + "gpu_check.py",
        "(part(row) in resumed and _key(row) not in wrong)",
        "part(row) in resumed",
        "test_bench_gpu_check.py::test_a_short_visit_ends_in_time_and_goes_on",
    ),
    Mutant(
        "a list of layers with the label of a pattern",
        "python/sdtp_eval/quality.py",
        " and layers[-1] + min(steps) >= num_layers",
        "",
        "test_eval_quality.py::test_schedules_and_their_labels",
    ),
    Mutant(
        "the reference taken on a GPU without a word",
        "sdtp_kernels/backends/__init__.py",
        'if best == "reference" and device.type == "cuda":',
        "if False:",
        "test_cuda.py::test_auto_says_aloud_that_no_kernel_of_a_gpu_runs",
    ),
    Mutant(
        "the hub asked for a file with a typing error in its name",
        "sdtp_kernels/pruner_file.py",
        "(?!.*\\.safetensors$)",
        "",
        "test_pruner.py::test_what_the_hub_has_not",
    ),
    Mutant(
        "a revision that the hub is not told of",
        "sdtp_kernels/pruner_file.py",
        "hf_hub_download(repository, HUB_FILE, revision=revision)",
        "hf_hub_download(repository, HUB_FILE)",
        "test_pruner.py::test_a_repository_of_the_hub",
    ),
    Mutant(
        "every process has the maps of the first one's heads",
        MODELS + "dropped.py",
        "slice(rank * own.num_key_value_heads, (rank + 1) * own.num_key_value_heads)",
        "slice(0, own.num_key_value_heads)",
        "test_devices.py::test_tensor_parallel",
    ),
    Mutant(
        "a prediction whose cost does not reach the pruners",
        "python/sdtp_train/simulate.py",
        "* (own - other).detach()",
        "* own.detach()",
        "test_train_pruners.py::test_what_a_prediction_costs_is_the_gradient_of_the_decision",
    ),
    Mutant(
        "maps that are trained in units of their own size, and stored so",
        "python/sdtp_train/kv.py",
        'parametrize.remove_parametrizations(module, "weight")',
        'parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)',
        "test_train_kv.py::test_maps_learn_end_to_end_alone_or_with_the_pruners",
    ),
    Mutant(
        "the first stage's maps for a token that a later one dropped",
        "python/sdtp_train/simulate.py",
        "kv_predictor(stage, layer_idx, tokens)",
        "kv_predictor(dropped[0].stage, layer_idx, tokens)",
        "test_train_pruners.py::test_predicted_keys_and_values_are_simulated_for_every_family",
    ),
    Mutant(
        "keys that the regression learns before their norm",
        "python/sdtp_train/kv.py",
        "family.keys(layer, hidden_states)",
        'family._replace(key_norm="").keys(layer, hidden_states)',
        "test_train_kv.py::test_streaming_equals_least_squares_on_all_tokens",
    ),
    Mutant(
        "sinks among what the regression learns from",
        "python/sdtp_train/kv.py",
        "SINK = 4",
        "SINK = 0",
        "test_train_kv.py::test_streaming_equals_least_squares_on_all_tokens",
    ),
    Mutant(
        "held-out prompts among what the regression learns from",
        "python/sdtp_train/kv.py",
        "part, first = PARTS[is_validation], self.stages[0]",
        "part, first = PARTS[0], self.stages[0]",
        "test_train_kv.py::test_streaming_equals_least_squares_on_all_tokens",
    ),
    Mutant(
        "R^2 on the prompts that were learned from",
        "python/sdtp_train/kv.py",
        'sums = statistics.sums("validation", stage, device)',
        'sums = statistics.sums("training", stage, device)',
        "test_train_kv.py::test_held_out_prompts_are_judged_and_not_learned",
    ),
    Mutant(
        "features of the regression not normalised",
        "python/sdtp_train/kv.py",
        "x = F.rms_norm(hidden_states.float(), hidden_states.shape[-1:], eps=RMS_EPS)",
        "x = hidden_states.float()",
        "test_train_kv.py::test_streaming_equals_least_squares_on_all_tokens",
    ),
    Mutant(
        "predicted keys and values swapped",
        "python/sdtp_train/kv.py",
        "both = family.keys(layer, hidden_states), family.values(layer, hidden_states)",
        "both = family.values(layer, hidden_states), family.keys(layer, hidden_states)",
        "test_train_kv.py::test_streaming_equals_least_squares_on_all_tokens",
    ),
    Mutant(
        "a bias that is penalised",
        "python/sdtp_train/kv.py",
        "centred = xx - n * mean_x.outer(mean_x)",
        "centred = xx - n * n / (n + penalty) * mean_x.outer(mean_x)",
        "test_train_kv.py::test_streaming_equals_least_squares_on_all_tokens",
    ),
    Mutant(
        "a bottleneck of the weakest directions",
        "python/sdtp_train/kv.py",
        "eigenvectors[:, -rank:]",
        "eigenvectors[:, :rank]",
        "test_train_kv.py::test_no_bottleneck_of_this_width_is_better",
    ),
    Mutant(
        "a bottleneck for the outputs of the largest scale",
        "python/sdtp_train/kv.py",
        "scaled = a * scale",
        "scaled = a",
        "test_train_kv.py::test_no_bottleneck_of_this_width_is_better",
    ),
    Mutant(
        "an output that never changes drowns the others",
        "python/sdtp_train/kv.py",
        ".clamp(min=1e-12 * sums.yy / n + 1e-30).rsqrt()",
        ".rsqrt()",
        "test_train_kv.py::test_an_output_that_never_changes_is_predicted_and_has_no_say",
    ),
    Mutant(
        "a resumed run that begins its sums again",
        "python/sdtp_train/kv.py",
        "                tensor.copy_(tensors[name])",
        "                pass",
        "test_train_kv.py::test_stopped_at_any_write_and_resumed_gives_the_same_bytes",
    ),
    Mutant(
        "a shard that is computed again counted twice",
        "python/sdtp_train/saliency.py",
        "uncounted = set(slices) - recorder.counted",
        "uncounted = set(slices)",
        "test_train_kv.py::test_a_shard_that_is_computed_again_is_not_counted_again",
    ),
    Mutant(
        "what another process has counted counted twice",
        "python/sdtp_train/kv.py",
        'self.counted = {i for path in _files(folder) for i in _header(path, run)["shards"]}',
        "self.counted = set(self.own)",
        "test_train_kv.py::test_one_process_goes_on_where_two_were_stopped",
    ),
    Mutant(
        "the sums of one process alone",
        "python/sdtp_train/kv.py",
        "tensor + total[name] if total else tensor",
        "tensor",
        "test_train_kv.py::test_two_processes_add_up_to_one",
    ),
    Mutant(
        "statistics that do not count every shard once",
        "python/sdtp_train/kv.py",
        "if sorted(counted) != list(range(num_shards)):",
        "if False:",
        "test_train_kv.py::test_damaged_statistics_are_refused",
    ),
    Mutant(
        "not a number among what the regression learns from",
        "python/sdtp_train/kv.py",
        "if not torch.isfinite(y).all():",
        "if False:",
        "test_train_kv.py::test_not_a_number_is_not_counted",
    ),
    Mutant(
        "a KV predictor that --init loses",
        "python/sdtp_train/train.py",
        "    elif args.init:",
        "    elif False:",
        "test_train_kv.py::test_a_predictor_comes_with_the_pruners",
    ),
    # Scores and copies.
    Mutant(
        "bias of the first layer dropped",
        CPU + "score_tile.cpp",
        "* scale + head.b1[h + lane])",
        "* scale)",
        "test_ops.py::test_score",
    ),
    Mutant(
        "tail of the pruner's width unread",
        CPU + "score_tile.cpp",
        "for (int lane = 0; h + lane < head.pruner_size; ++lane)",
        "for (int lane = 0; false && h + lane < head.pruner_size; ++lane)",
        "test_ops.py::test_score",
    ),
    Mutant(
        "RMS norm forgotten",
        CPU + "score_tile.cpp",
        "inv_rms == nullptr ? 1.0f : inv_rms[token]",
        "1.0f",
        "test_ops.py::test_score",
    ),
    Mutant(
        "columns after the first that fill the registers lost",
        CPU + "narrow.cpp",
        "units += group * size;",
        "",
        "test_ops.py::test_score_of_every_width",
    ),
    Mutant(
        "a block's last tokens read from its first",
        CPU + "narrow.cpp",
        "std::min(begin + i, num_rows - 1)",
        "std::min(begin + i, num_rows - 2)",
        "test_ops.py::test_score",
    ),
    Mutant(
        "weights packed for registers that are not there",
        CPU + "narrow.cpp",
        "Avx512::kGroup : Avx2::kGroup)",
        "Avx512::kGroup : Avx512::kGroup)",
        "test_ops.py::test_score_on_lesser_processors",
    ),
    Mutant(
        "an incomplete tile multiplied where it stands",
        CPU + "score.cpp",
        "if (unused == 0 && ",
        "if (",
        "test_ops.py::test_score",
    ),
    Mutant(
        "rows with gaps multiplied where they stand",
        CPU + "score.cpp",
        "call.token_stride == hidden_size && ",
        "",
        "test_ops.py::test_score_layouts_and_nan",
    ),
    Mutant(
        "rows with gaps copied as neighbours",
        "csrc/include/sdtp/gather.h",
        "if (is_dense && indices[k] >= 0)",
        "if (indices[k] >= 0)",
        "test_ops.py::test_gather",
    ),
    Mutant(
        "wrong stride",
        "csrc/bindings/token_rows.h",
        "source.stride(dim) * element",
        "source.size(source.dim() - 1) * element",
        "test_ops.py::test_gather",
    ),
    # Counts.
    Mutant(
        "drops late what is to be dropped early",
        "sdtp_kernels/schedule.py",
        "(stage - 1) ** power - stage**power",
        "(stage - 1) ** (1 / power) - stage ** (1 / power)",
        "test_schedule.py",
    ),
    Mutant(
        "a shape forgotten where a budget is looked for",
        "python/sdtp_eval/quality.py",
        "shaped(hundred_thousandths / 100_000, base.num_stages, shape)",
        "hundred_thousandths / 100_000",
        "test_eval_quality.py::test_a_ratio_is_found_for_every_budget",
    ),
    Mutant(
        "K off by one",
        "sdtp_kernels/schedule.py",
        "(length * numerator + (denominator - 1)) // denominator",
        "length * numerator // denominator",
        "test_schedule.py",
    ),
    Mutant(
        "recent share of the current length",
        "sdtp_kernels/schedule.py",
        "self.num_recent(length, finished) + keep_last, block_size",
        "self.num_recent(self.num_keep(length, stage - 1), finished) + keep_last, block_size",
        "test_schedule.py test_qwen2.py::test_prefill_equals_masked_dense",
    ),
    Mutant(
        "a block is finished with nothing after it",
        "sdtp_kernels/schedule.py",
        "return self.block_size // 2\n",
        "return 0\n",
        "test_schedule.py",
    ),
    Mutant(
        "every stage timed as the first",
        "python/sdtp_eval/cost.py",
        "None if layer == layers[0] else mean",
        "None",
        "test_eval_cost.py::test_what_is_timed_is_the_score",
    ),
    # Op contract.
    Mutant(
        "fake kernel with another dtype",
        "sdtp_kernels/ops.py",
        "return scores.new_empty((scores.shape[0], num_keep), dtype=torch.int64)",
        "return scores.new_empty((scores.shape[0], num_keep), dtype=torch.int32)",
        "test_ops.py",
    ),
    Mutant(
        "gradient of the pruner silently none",
        "sdtp_kernels/ops.py",
        "if tensor is not None and tensor.requires_grad:",
        "if False:",
        "test_ops.py::test_gradients_of_prune",
    ),
    Mutant(
        "gather gradient of padding",
        "sdtp_kernels/ops.py",
        "grad = grad.masked_fill(rows < 0, 0)",
        "",
        "test_ops.py::test_gradients_of_gather",
    ),
    # Predicted keys and values.
    Mutant(
        "maps of another stage",
        MODELS + "dropped.py",
        "self._predictor(stage, layer_idx, tokens.to(device))",
        "self._predictor(self._dropped[0].stage, layer_idx, tokens.to(device))",
        PREDICTED + "prefill_equals_the_dense_loop",
    ),
    Mutant(
        "predicted keys are not rotated",
        MODELS + "dropped.py",
        "reference.rotate(keys, cos.to(device), sin.to(device)).to(dtype)",
        "keys.to(dtype)",
        PREDICTED + "prefill_equals_the_dense_loop",
    ),
    Mutant(
        "predicted and computed rows in the order they came in",
        MODELS + "dropped.py",
        "source.scatter(1, columns + 1, place)[:, 1:].contiguous()",
        "torch.arange(num_columns).expand(len(columns), -1).contiguous()",
        PREDICTED + "prefill_equals_the_dense_loop",
    ),
    Mutant(
        "a token sees one that follows it",
        MODELS + "dropped.py",
        "num_keys - num_columns + computed + 1)",
        "num_keys - num_columns + computed + 2)",
        PREDICTED + "prefill_equals_the_dense_loop",
    ),
    Mutant(
        "keys cut to as many as there are queries",
        MODELS + "dropped.py",
        "return Mask(Visible(num_visible, num_padding if is_ragged else None, self._backend), {})",
        "return Mask(None, {})",
        PREDICTED + "prefill_equals_the_dense_loop",
    ),
    Mutant(
        "padding seen by queries at any position",
        MODELS + "dropped.py",
        "num_padding if is_ragged else None, self._backend",
        "None, self._backend",
        PREDICTED + "padded_rows_equal_rows_alone",
    ),
    Mutant(
        "padding seen through a mask by position",
        MODELS + "masks.py",
        "(columns < num_visible.unsqueeze(-1)) & is_token.unsqueeze(1)",
        "(columns < num_visible.unsqueeze(-1))",
        PREDICTED + "one_masked_attention_equals_the_op",
    ),
    Mutant(
        "padding between chunks seen",
        MODELS + "dropped.py",
        "is_contiguous = num_keys == num_columns or not is_ragged",
        "is_contiguous = True",
        PREDICTED + "chunks_equal_one_call",
    ),
    Mutant(
        "scores by predicted keys",
        MODELS + "dropped.py",
        "        self.computed_keys = key_states\n",
        "",
        PREDICTED + "scorers_by_name",
    ),
    Mutant(
        "room of a static layer seen",
        MODELS + "dropped.py",
        "return keys[:, :, :num_columns], values[:, :, :num_columns]",
        "return keys, values",
        PREDICTED + "a_static_cache_has_room_for_more",
    ),
    Mutant(
        "maps left on the device that a model has moved from",
        "sdtp_kernels/kv_predictor.py",
        "return linear if next(linear.parameters()).device == device else linear.to(device)",
        "return linear",
        PREDICTED + "a_model_that_moves_when_it_is_patched",
    ),
    Mutant(
        "fewer dropped than a shorter row drops",
        "sdtp_kernels/schedule.py",
        "return _min(length, before - after + 1)",
        "return _min(length, before - after)",
        PREDICTED + "no_prompt_drops_more_than_the_schedule_says",
    ),
    Mutant(
        "the caller's predictor changed",
        MODELS + "dropped.py",
        "copy.deepcopy(linear).to(",
        "linear.to(",
        PREDICTED + "bfloat16_has_maps_of_its_own",
    ),
    Mutant(
        "finished blocks with predicted rows counted as kept ones",
        MODELS + "chunks.py",
        "kept_stages = 0 if prefill.completed is not None else stage",
        "kept_stages = stage",
        PREDICTED + "chunks_equal_one_call",
    ),
    Mutant(
        "a predictor for other layers let through",
        "sdtp_kernels/kv_predictor.py",
        "missing = sorted(set(schedule.layers) - set(self.stages))",
        "missing = []",
        PREDICTED + "what_does_not_fit_is_refused",
    ),
    Mutant(
        "a predictor with NaN let through",
        "sdtp_kernels/kv_predictor.py",
        "if not torch.isfinite(parameter).all():",
        "if False:",
        PREDICTED + "what_does_not_fit_is_refused",
    ),
    Mutant(
        "a file's predictor not taken",
        MODELS + "patch.py",
        'found = getattr(pruners, "kv_predictor", None) if kv_predictor is None else kv_predictor',
        "found = kv_predictor",
        PREDICTED + "pruners_that_bring_a_predictor",
    ),
    Mutant(
        "an unpickled model whose attention was not taught",
        MODELS + "patched.py",
        "                teach_sdpa()  # of this process\n",
        "                pass\n",
        PREDICTED + "copies_and_pickles_predict",
    ),
    Mutant(
        "attention taught twice",
        MODELS + "masks.py",
        'if getattr(known, "takes_visible", False):',
        "if False:",
        PREDICTED + "the_attention_of_others_is_left_alone",
    ),
    Mutant(
        "dropout of attention forgotten",
        MODELS + "masks.py",
        'if kwargs.get("dropout"):',
        "if False:",
        PREDICTED + "dropout_of_attention_is_refused",
    ),
    Mutant(
        "attention that takes no positions let through",
        MODELS + "checks.py",
        "if is_predicted and attention not in POSITION_ATTENTIONS:",
        "if False:",
        PREDICTED + "attention_without_queries_at_any_position",
    ),
    Mutant(
        "what was left out read by an unpatched model",
        MODELS + "cache.py",
        "layer.kept.shape[1] and (layer.is_ragged or layer.kept.shape[1] != layer.prompt_length)",
        "False",
        PREDICTED + "a_prompt_that_is_not_whole_yet",
    ),
    # The patch.
    Mutant(
        "padding mask not compacted",
        MODELS + "decoder.py",
        "written >= 0 if prefill",
        "written >= -1 if prefill",
        "test_qwen2.py::test_padded_rows_equal_rows_alone",
    ),
    Mutant(
        "positions renumbered",
        MODELS + "stage.py",
        "position_embeddings=(cos, sin), token_index=index",
        "position_embeddings=tuple(t[:, :cos.shape[1]] for t in segment.position_embeddings), token_index=index",
        "test_qwen2.py::test_prefill_equals_masked_dense",
    ),
    Mutant(
        "row's own length ignored",
        MODELS + "chunks.py",
        "before + is_counted.sum(-1) - keep_last",
        "before + is_counted.shape[1] - keep_last",
        "test_qwen2.py::test_padded_rows_equal_rows_alone",
    ),
    Mutant(
        "the cache under its old name ignored",
        MODELS + "compat.py",
        'return kwargs.pop("cache", old)',
        'return kwargs.pop("cache", None)',
        "test_qwen2.py::test_the_old_name_of_the_cache",
    ),
    Mutant(
        "patch not removed",
        MODELS + "patched.py",
        "        _become(module, _dense(module))\n",
        "        pass\n",
        "test_real_use.py::test_a_copy_prunes_by_itself_and_ends_with_the_original",
    ),
    Mutant(
        "scored tokens pruned",
        MODELS + "patched.py",
        "keep_last = max(int(logits_to_keep) - 1, 0)",
        "keep_last = 0",
        "test_qwen2.py::test_scored_continuation_is_never_pruned",
    ),
    Mutant(
        "host sync in the loop",
        MODELS + "stage.py",
        "    if chunk.is_ragged:\n        index = torch.where",
        "    indices.sum().item()\n    if chunk.is_ragged:\n        index = torch.where",
        "test_compile.py::test_no_host_sync_in_the_patched_loop",
    ),
    Mutant(
        "labels accepted",
        MODELS + "checks.py",
        "if info.reads_loss:",
        "if False:",
        "test_errors.py",
    ),
    Mutant(
        "state left behind when rows are selected",
        MODELS + "layers.py",
        "self._each_row(lambda t: t[indices, ...])",
        "",
        "test_qwen2.py::test_cache_operations_carry_the_state",
    ),
    # Prompts in pieces, settings of requests, eviction.
    Mutant(
        "entries of deferred tokens left in the cache",
        MODELS + "chunks.py",
        "        layer.drop_deferred(prefill.handle.backend)\n",
        "        pass\n",
        "test_serving.py::test_a_long_chat_stays_bounded_by_the_schedule",
    ),
    Mutant(
        "finished tokens of a row by its neighbours' count",
        MODELS + "layers.py",
        "(self.kept < self.finished)",
        "(self.kept < self.finished.max())",
        "test_serving.py::test_block_local_scorers_in_pieces",
    ),
    Mutant(
        "a new sink in every piece",
        "sdtp_kernels/schedule.py",
        "sink = self.sink if padded or finished == 0 else 0",
        "sink = self.sink",
        "test_serving.py::test_a_prompt_in_pieces_by_hand",
    ),
    Mutant(
        "a new sink in every chunk of a padded batch",
        MODELS + "stage.py",
        'selection["sink"] = 0',
        "",
        "test_serving.py::test_block_local_scorers_in_pieces",
    ),
    Mutant(
        "deferred tokens where they stand in the chunk",
        MODELS + "chunks.py",
        "embeddings = prefill.decoder.rotary_emb(tokens.hidden_states, tokens.position_ids)",
        "p = tokens.position_ids - tokens.position_ids[:, :1]\n"
        "    embeddings = prefill.decoder.rotary_emb(tokens.hidden_states, p)",
        "test_serving.py::test_a_prompt_in_pieces_by_hand",
    ),
    Mutant(
        "generated tokens lost to the next turn",
        MODELS + "chunks.py",
        "layer.deferred.tokens = layer.deferred.tokens.followed_by(new)",
        "pass",
        "test_serving.py::test_a_long_chat_stays_bounded_by_the_schedule",
    ),
    Mutant(
        "a block pruned with a term that sees the prompt's end",
        MODELS + "scoring.py",
        "pruner.distance and sees_prompt_end",
        "pruner.distance",
        "test_qwen2.py::test_pruner_with_distance_and_attention",
    ),
    Mutant(
        "a block trained with a term that sees the prompt's end",
        "python/sdtp_train/simulate.py",
        "if not schedule.sees_prompt_end or not (",
        "if not (",
        "test_train_pruners.py::test_training_scores_equal_those_of_the_stage",
    ),
    Mutant(
        "global budget in chunks",
        MODELS + "checks.py",
        'if is_chunk and handle.schedule.budget != "block":',
        "if False:",
        "test_serving.py::test_what_cannot_come_in_pieces",
    ),
    Mutant(
        "a scorer that sees the prompt's end in chunks",
        MODELS + "checks.py",
        "if not scorer.is_block_local:",
        "if False:",
        "test_serving.py::test_what_cannot_come_in_pieces",
    ),
    Mutant(
        "protected tokens only where they score well",
        MODELS + "stage.py",
        "both = torch.cat([indices, protected], dim=-1)",
        "both = torch.cat([indices, torch.full_like(protected, -1)], dim=-1)",
        "test_serving.py::test_protected_tokens_stay_and_the_rest_is_pruned_without_them",
    ),
    Mutant(
        "protected tokens count against the budget",
        MODELS + "chunks.py",
        "is_counted = is_valid & ~tokens.is_protected",
        "is_counted = is_valid",
        "test_serving.py::test_protected_tokens_stay_and_the_rest_is_pruned_without_them",
    ),
    Mutant(
        "settings of the first row for all",
        MODELS + "settings.py",
        "self.schedules[i // each]",
        "self.schedules[0]",
        "test_serving.py::test_settings_of_a_row_are_those_of_the_row_alone",
    ),
    Mutant(
        "settings outlive their request",
        MODELS + "handle.py",
        "            current.settings, current.is_own, current.rows_per_setting, current.prompt_columns = before\n",
        "            pass\n",
        "test_serving.py::test_settings_end_with_their_request",
    ),
    Mutant(
        "physical length from layer 0",
        MODELS + "layers.py",
        "return self.prompt_length + self.num_appended",
        "return super().get_seq_length()",
        "test_serving.py::test_an_evicted_cache_holds_what_the_last_stage_keeps",
    ),
    Mutant(
        "other tokens evicted from the values",
        MODELS + "cache.py",
        "layer.keys, layer.values = ops.gather_tokens([old.keys, old.values], own, backend=backend)",
        "layer.keys, layer.values = ops.gather_tokens([old.keys, old.values.flip(2)], own, backend=backend)",
        "test_serving.py::test_an_evicted_cache_holds_what_the_last_stage_keeps",
    ),
    Mutant(
        "bytes of the keys alone reported",
        MODELS + "report.py",
        '"keys", "values", "_quantized_keys", "_quantized_values"',
        '"keys", "_quantized_keys"',
        "test_real_use.py::test_layers_without_a_weight",
    ),
    Mutant(
        "one stage's eviction skipped",
        MODELS + "decoder.py",
        "if handle.evict_earlier_kv and indices is not None",
        "if handle.evict_earlier_kv and segment.stage > 1 and indices is not None",
        "test_serving.py::test_evicted_equals_masked_dense",
    ),
    Mutant(
        "a request's tensors kept",
        MODELS + "handle.py",
        "        self._recorder = recorder\n",
        "        self._recorder = recorder\n        import torch\n"
        '        self.__dict__.setdefault("_all", []).append(torch.zeros(9))\n',
        "test_soak.py",
    ),
    # Attention, caches, devices.
    Mutant(
        "padding not told to flash attention",
        MODELS + "masks.py",
        "{} if padding_mask is None else _varlen(padding_mask)",
        "{}",
        "test_attention_and_cache.py::test_flash_attention_gets_the_bounds_of_every_segment",
    ),
    Mutant(
        "bounds of the whole batch's width",
        MODELS + "masks.py",
        "first = begin + width - padding_mask.sum(-1)",
        "first = begin + width - padding_mask.sum(-1).max()",
        "test_attention_and_cache.py::test_flash_attention_gets_the_bounds_of_every_segment",
    ),
    Mutant(
        "a static layer with room for the whole prompt",
        MODELS + "layers.py",
        "self.max_cache_len -= self.num_dropped",
        "pass",
        "test_attention_and_cache.py::test_static_cache_has_the_bytes_of_the_schedule",
    ),
    Mutant(
        "a static layer keeps its size over a reset",
        MODELS + "layers.py",
        "self.max_cache_len += self.num_dropped",
        "pass",
        "test_attention_and_cache.py::test_a_reset_static_cache_takes_another_prompt",
    ),
    Mutant(
        "a static layer's tail taken for what must stay",
        MODELS + "layers.py",
        "num_left >= self.kept.shape[1] - self.num_tail",
        "num_left >= self.kept.shape[1]",
        "test_attention_and_cache.py::test_drafts_over_a_static_cache",
    ),
    Mutant(
        "tokens seen that a static layer has lost",
        MODELS + "layers.py",
        "torch.cat([is_token, after], dim=-1)[:, :length]",
        "torch.cat([is_token, after], dim=-1)",
        "test_attention_and_cache.py::test_drafts_over_a_static_cache",
    ),
    Mutant(
        "crops of a static layer unchecked",
        MODELS + "layers.py",
        "num_left >= self.kept.shape[1] - self.num_tail",
        "num_left >= 0",
        "test_attention_and_cache.py::test_crop_of_a_static_cache",
    ),
    Mutant(
        "a mask of another shape in every step",
        MODELS + "masks.py",
        "return torch.nn.functional.pad(attention_mask, (0, room), value=1)",
        "return attention_mask",
        "test_attention_and_cache.py::test_generate_compiles_decoding_over_a_static_cache",
    ),
    Mutant(
        "settings of a quantized layer forgotten",
        MODELS + "cache.py",
        "PRUNED_KINDS[type(layer)](*_settings(layer))",
        "PRUNED_KINDS[type(layer)](*_settings(layer)[:1])",
        "test_attention_and_cache.py::test_group_wise_quantized_layers_keep_their_settings",
    ),
    Mutant(
        "offloaded keys read",
        MODELS + "cache.py",
        "cache is None or cache.offloading or isinstance",
        "cache is None or isinstance",
        "test_attention_and_cache.py::test_offloaded_cache",
    ),
    Mutant(
        "what follows a kept prefix taken for a turn",
        MODELS + "checks.py",
        "layer is not None and layer.num_appended == 0",
        "layer is None",
        "test_serving.py::test_a_kept_prefix_under_the_global_budget",
    ),
    Mutant(
        "a turn taken for what follows a kept prefix",
        MODELS + "checks.py",
        "layer is not None and layer.num_appended == 0",
        "layer is not None",
        "test_serving.py::test_a_turn_behind_an_answer_is_added_under_the_global_budget",
    ),
    Mutant(
        "a suffix that nobody says is not pruned",
        MODELS + "decoder.py",
        "handle.note(_why_only_added(handle, settings.is_enabled, width))",
        "pass",
        "test_serving.py::test_a_kept_prefix_under_the_global_budget",
    ),
    Mutant(
        "padding seen by flash attention over a static cache",
        MODELS + "masks.py",
        "Mask(ones if padding_mask is None else padding_mask, {})",
        "Mask(ones, {})",
        "test_attention_and_cache.py::test_a_row_is_that_of_the_row_alone",
    ),
    Mutant(
        "flex attention sees what a static cache has not",
        MODELS + "masks.py",
        "return self._cache.get_query_offset(layer_idx) + 0",
        "return self._cache.get_query_offset(layer_idx)",
        "test_attention_and_cache.py::test_a_row_is_that_of_the_row_alone",
    ),
    Mutant(
        "a 4-bit cache in full precision",
        MODELS + "layers.py",
        "QuantoQuantizedLayer: PrunedQuantoLayer,",
        "QuantoQuantizedLayer: PrunedLayer,",
        "test_attention_and_cache.py::test_group_wise_quantized_layers_keep_their_settings",
    ),
    Mutant(
        "an 8-bit cache in full precision",
        MODELS + "layers.py",
        "PRUNED_KINDS[Fp8QuantizedLayer] = PrunedFp8Layer",
        "PRUNED_KINDS[Fp8QuantizedLayer] = PrunedLayer",
        "test_attention_and_cache.py::test_quantized_cache",
    ),
    Mutant(
        "an answer that begins a token late",
        "python/sdtp_eval/demo.py",
        "        tokens.append(token)\n        if len(tokens) == most:",
        "        tokens.append(token)\n        if len(tokens) == most + 1:",
        "test_demo.py::test_an_answer_is_what_generate_gives",
    ),
    Mutant(
        "a token coloured by the last layer that has it not",
        "python/sdtp_eval/demo.py",
        "in reversed(list(enumerate(cache.layers))):",
        "in enumerate(cache.layers):",
        "test_demo.py::test_json_agrees_with_the_schedule",
    ),
    Mutant(
        "markup of the text in the page",
        "python/sdtp_eval/demo.py",
        'zip(map(html.escape, result["prompt"]), result["dropped_at"], strict=True)',
        'zip(result["prompt"], result["dropped_at"], strict=True)',
        "test_demo.py::test_page",
    ),
    Mutant(
        "tokens left on the device of the layer below",
        MODELS + "stage.py",
        "index = segment.token_index.to(device)",
        "index = segment.token_index",
        "test_devices.py::test_state_and_pruners_follow_the_layers",
    ),
    Mutant(
        "hook of accelerate thrown away",
        MODELS + "patched.py",
        'for name in ("forward", "_old_forward"):',
        'for name in ("forward",):',
        "test_devices.py::test_hooks_that_come_and_go_while_patched",
    ),
    Mutant(
        "every process selects by itself",
        MODELS + "stage.py",
        "indices = from_first(_select(prefill, counts, scores, stage, scorer.pooling, segment), group)",
        "indices = _select(prefill, counts, scores, stage, scorer.pooling, segment)",
        "test_devices.py::test_tensor_parallel",
    ),
    Mutant(
        "attention of a process's own heads",
        MODELS + "devices.py",
        """collectives.all_reduce(tensor, "sum", group) / group.size()""",
        "tensor",
        "test_devices.py::test_tensor_parallel",
    ),
    Mutant(
        "rows that make the next ones dirty",
        "python/sdtp_eval/provenance.py",
        '":(top,exclude)benchmarks/results", ',
        "",
        "test_bench_rows.py::test_revision_is_dirty_where_code_changed",
    ),
    Mutant(
        "changed code taken for the commit",
        "python/sdtp_eval/provenance.py",
        ' + ("+dirty" if changed else "")',
        "",
        "test_bench_rows.py::test_revision_is_dirty_where_code_changed",
    ),
    Mutant(
        "the commit of somebody else's checkout",
        "python/sdtp_eval/provenance.py",
        '        git("ls-files", "--error-unmatch", here.name)',
        "        pass",
        "test_bench_rows.py::test_no_revision_in_somebody_elses_checkout",
    ),
    Mutant(
        "a directory of the machine in a published row",
        "python/sdtp_eval/provenance.py",
        "Path(word).name if Path(word).is_absolute() else word",
        "word",
        "test_bench_rows.py::test_commands_name_no_directory_of_the_machine",
    ),
    Mutant(
        "a provider timed unchecked",
        BENCH + "op.py",
        "errors[name, count] = check(provider)",
        'errors[name, count] = ""',
        "test_bench_op.py::test_a_wrong_kernel_gets_no_figure",
    ),
    Mutant(
        "any ranking taken for right",
        BENCH + "providers.py",
        "if not (highest_dropped <= lowest_kept + tolerance).all():",
        "if False:",
        "test_bench_op.py::test_a_wrong_kernel_gets_no_figure",
    ),
    Mutant(
        "the result counted as extra memory",
        BENCH + "timing.py",
        "peak - before - kept_bytes",
        "peak - before",
        "test_bench_op.py::test_extra_memory_is_what_goes_beyond_the_result",
    ),
    Mutant(
        "noise called faster",
        BENCH + "compare.py",
        '"faster" if low > 1',
        '"faster" if high > 1',
        "test_bench_op.py::test_verdicts",
    ),
    Mutant(
        "a wrong kernel under pytest-benchmark",
        "benchmarks/test_bench_ops.py",
        'assert not error, f"no figure: {error}"',
        "pass",
        "test_bench_op.py::test_the_pytest_benchmark_refuses_a_wrong_kernel",
    ),
    Mutant(
        "half a head for each process",
        BENCH + "multi.py",
        "if key_heads % n == 0",
        "if key_heads >= n",
        "test_bench_processes.py::test_processes_share_whole_heads",
    ),
    Mutant(
        "a search that may take the whole machine",
        BENCH + "memory.py",
        'resource.setrlimit(resource.RLIMIT_AS, (_of_this_process("VmSize") + settings["address_space"], hard))',
        "pass",
        "test_bench_processes.py::test_a_prompt_far_beyond_the_limit_ends_at_it",
    ),
    Mutant(
        "speed against a slower baseline",
        BENCH + "multi.py",
        "best = {\n        method: min(",
        "best = {\n        method: max(",
        "test_bench_processes.py::test_speed_is_over_the_best_single_process",
    ),
    Mutant(
        "any failure taken for want of memory",
        BENCH + "memory.py",
        "if result.returncode in (DOES_NOT_FIT, -signal.SIGKILL):",
        "if result.returncode != 0:",
        "test_bench_processes.py::test_another_failure_is_no_answer",
    ),
    Mutant(
        "memory that the allocator holds back",
        BENCH + "memory.py",
        "settings, env=ENVIRONMENT)",
        "settings, env={})",
        "test_bench_processes.py::test_what_is_freed_serves_nobody_unseen",
    ),
    Mutant(
        "a pruned prefill in what the dense one has left",
        BENCH + "memory.py",
        "[*sorted(setting.pairs), None]",
        "[None, *sorted(setting.pairs)]",
        "test_bench_processes.py::test_what_is_freed_serves_nobody_unseen",
    ),
    Mutant(
        "a prompt beyond the limit",
        BENCH + "memory.py",
        "if taken is not None and taken <= 1:",
        "if taken is not None and taken <= 2:",
        "test_bench_processes.py::test_the_search_finds_what_fits",
    ),
    Mutant(
        "every process evaluates every sample",
        "python/sdtp_eval/quality.py",
        "mine = work[workers.index :: workers.number]",
        "mine = work",
        "test_eval_quality.py::test_every_process_has_a_share",
    ),
    Mutant(
        "results in the order of the processes",
        "python/sdtp_eval/quality.py",
        "key=lambda result: place.get(_key(result), -1)",
        "key=lambda result: 0",
        "test_eval_quality.py::test_two_processes_evaluate_what_one_does",
    ),
    Mutant(
        "a press that is told other places",
        "python/sdtp_eval/peers.py",
        'return args, {**kwargs, "cache_position": position}',
        'return args, {**kwargs, "cache_position": position - past}',
        "test_kvpress.py::test_a_press_cuts_what_the_stages_left",
    ),
    Mutant(
        "a press that does not find the cache",
        "python/sdtp_eval/peers.py",
        'kwargs["past_key_values"] = kwargs[CACHE]',
        "pass",
        "test_kvpress.py::test_a_press_cuts_what_the_stages_left",
    ),
    # Files.
    Mutant(
        "two logits folded the wrong way",
        "sdtp_kernels/pruner_file.py",
        "state[name][0] - state[name][1]",
        "state[name][1] - state[name][0]",
        "test_pruner.py",
    ),
    Mutant(
        "a file with a KV predictor that older readers take",
        "sdtp_kernels/pruner_file.py",
        "version = 1 if kv_predictor is None else 2",
        "version = 1",
        "test_pruner.py::test_a_kv_predictor_comes_back_as_it_was",
    ),
    Mutant(
        "a file without a KV predictor that older readers refuse",
        "sdtp_kernels/pruner_file.py",
        "version = 1 if kv_predictor is None else 2",
        "version = 2",
        "test_pruner.py::test_a_file_without_a_kv_predictor_is_of_version_1",
    ),
    Mutant(
        "a loaded stack that loses its KV predictor",
        "sdtp_kernels/pruner_file.py",
        'getattr(pruners, "kv_predictor", None)',
        "None",
        "test_pruner.py::test_a_loaded_stack_keeps_its_kv_predictor",
    ),
    Mutant(
        "a KV predictor of another dtype than the header says",
        "sdtp_kernels/pruner_file.py",
        "(wanted.shape, getattr(torch, dtype))",
        "(wanted.shape, tensor.dtype)",
        "test_pruner.py::test_kv_predictors_that_do_not_fit",
    ),
    Mutant(
        "a broken KV predictor loaded",
        "sdtp_kernels/pruner_file.py",
        "        predictor.load_state_dict(state, assign=True)\n        predictor.check_finite()",
        "        predictor.load_state_dict(state, assign=True)",
        "test_pruner.py::test_kv_predictors_that_do_not_fit",
    ),
    Mutant(
        "a broken KV predictor saved",
        "sdtp_kernels/pruner_file.py",
        "    predictor.check_finite()\n    names = ",
        "    names = ",
        "test_pruner.py::test_refused_saves_write_nothing",
    ),
    Mutant(
        "a KV predictor of another model in the file",
        "sdtp_kernels/pruner_file.py",
        "if theirs is not None and ours != theirs:",
        "if False:",
        "test_pruner.py::test_refused_saves_write_nothing",
    ),
    # Figures.
    Mutant(
        "reads of programs that share a block counted once",
        BENCH + "roofline.py",
        'blocks * a["shares"] * _window',
        "blocks * _window",
        "test_bench_roofline.py",
    ),
    Mutant(
        "views counted as operations",
        BENCH + "roofline.py",
        "if not func.is_view:",
        "if True:",
        "test_bench_roofline.py::test_eager_operations_are_counted",
    ),
    Mutant(
        "figures of a model that lost a token",
        "python/sdtp_eval/paired.py",
        "if not torch.equal(logits, dense):",
        "if False:",
        "test_bench_end_to_end.py::test_no_figures_from_a_wrong_model",
    ),
    Mutant(
        "threads that load at once",
        "python/sdtp_eval/checkpoints.py",
        "with _LOADING, _quiet_transformers():",
        "with _quiet_transformers():",
        "test_checkpoints.py::test_threads_load_one_after_the_other",
    ),
    Mutant(
        "figures of a model that kept another count",
        "python/sdtp_eval/paired.py",
        "if reported != expected or cached != self.cached_per_layer:",
        "if False:",
        "test_bench_end_to_end.py::test_no_figures_from_a_wrong_model",
    ),
    Mutant(
        "the same one always first",
        "python/sdtp_eval/paired.py",
        "first = i % len(names)",
        "first = 0",
        "test_bench_end_to_end.py::test_everybody_has_every_place_once",
    ),
    Mutant(
        "timed prefills that go unchecked",
        BENCH + "end_to_end.py",
        "pair.check_output(handle.report(), output)",
        "pass",
        "test_bench_end_to_end.py::test_no_figures_from_a_wrong_model",
    ),
    Mutant(
        "a dense prefill that is not compared",
        BENCH + "end_to_end.py",
        "pair.check_equal(logits, output.logits, KEEP_ALL)",
        "pass",
        "test_bench_end_to_end.py::test_no_figures_from_a_wrong_model",
    ),
    Mutant(
        "decoding that goes unchecked",
        BENCH + "end_to_end.py",
        "if new != dense:",
        "if False:",
        "test_bench_end_to_end.py::test_the_first_new_tokens_are_compared_too",
    ),
    Mutant(
        "a stage over a layer with its stage",
        BENCH + "end_to_end.py",
        "(report.seconds - sum(stages))",
        "report.seconds",
        "test_bench_end_to_end.py::test_a_stage_over_a_layer",
    ),
    Mutant(
        "memory that nobody holds counted as taken",
        BENCH + "memory.py",
        "    gc.collect()  # what nobody holds",
        "    # what nobody holds",
        "test_bench_end_to_end.py::test_peak_memory_is_that_of_the_work_alone",
    ),
    Mutant(
        "memory of an earlier prefill",
        BENCH + "memory.py",
        '    CLEAR.write_text("5", encoding="ascii")',
        "    CLEAR.exists()",
        "test_bench_end_to_end.py::test_peak_memory_is_that_of_the_work_alone",
    ),
    Mutant(
        "pruning counted as matrix products",
        BENCH + "breakdown.py",
        "if BETWEEN in names:",
        "if False:",
        "test_bench_end_to_end.py::test_buckets",
    ),
    Mutant(
        "a scorer's attention where it has none",
        "python/sdtp_eval/flops.py",
        "if pruner.attention and schedule.sees_prompt_end:",
        "if pruner.attention:",
        "test_demo.py::test_flops_by_hand",
    ),
    Mutant(
        "a peer with a larger budget",
        BENCH + "peers.py",
        "> SAME_BUDGET:",
        "> 1:",
        "test_bench_peers.py::test_another_budget_gets_no_figures",
    ),
    Mutant(
        "a peer with another first token",
        BENCH + "peers.py",
        "if not torch.equal(logits, dense):",
        "if False:",
        "test_bench_peers.py::test_all_at_the_same_budget",
    ),
    Mutant(
        "both protocols the same",
        BENCH + "peers.py",
        '("passkey", AFTER, "exact", "passkey_after")',
        '("passkey", INSIDE, "exact", "passkey_after")',
        "test_bench_peers.py::test_what_fails_has_no_figures_and_stops_nobody",
    ),
    Mutant(
        "figures beside an error",
        BENCH + "peers.py",
        'rows[peer.name] = {**common, "peer": peer.name, "version": peer.version, "error": reason(error)}',
        'row["error"] = reason(error)',
        "test_bench_peers.py::test_what_fails_has_no_figures_and_stops_nobody",
    ),
    Mutant(
        "a prompt that llama.cpp knew already",
        BENCH + "llama_cpp.py",
        "if read != len(prompt):",
        "if False:",
        "test_bench_peers.py::test_llama_cpp_reads_the_whole_prompt_or_says_so",
    ),
    Mutant(
        "vectors rounded to 16 bits",
        BENCH + "llama_cpp.py",
        "GGMLQuantizationType.F32 if len(tensor.shape) == 1 else",
        "",
        "test_bench_peers.py::test_a_file_in_16_bits_is_the_same_model",
    ),
    Mutant(
        "stale tables go unnoticed",
        BENCH + "report/__init__.py",
        'path.read_text(encoding="utf-8") != text',
        "False",
        "test_bench_report.py::test_stale_tables_are_found",
    ),
    Mutant(
        "the first row of the same settings counts",
        BENCH + "report/results.py",
        "found[key] = row",
        "found.setdefault(key, row)",
        "test_bench_report.py::test_the_later_row_of_the_same_settings_counts",
    ),
    Mutant(
        "means of different samples side by side",
        BENCH + "report/results.py",
        'if readers[row["id"]] == everyone]',
        "]",
        "test_bench_report.py::test_runs_are_not_mixed",
    ),
    Mutant(
        "the samples of all runs thrown together",
        BENCH + "report/results.py",
        "Question(*(row[name] for name in Question._fields))",
        'Question(row["task"], row["protocol"], row["tokens"], "quality.jsonl")',
        "test_bench_report.py::test_runs_are_not_mixed",
    ),
    Mutant(
        "a picture with the date in it",
        BENCH + "report/figures.py",
        'metadata={"Date": None, "Creator": None}',
        "",
        "test_bench_report.py::test_the_page_is_complete_in_its_folder",
    ),
    Mutant(
        "a figure from a wrong result",
        BENCH + "report/tables.py",
        """for name, row in found.items() if "error" not in row}""",
        "for name, row in found.items()}",
        "test_bench_report.py::test_a_wrong_result_has_no_figure",
    ),
    Mutant(
        "attention in proportion to the tokens",
        BENCH + "report/tables.py",
        "statistics.fmean((n / tokens) ** 2 for n in lengths)",
        "statistics.fmean(n / tokens for n in lengths)",
        "test_bench_report.py::test_where_the_rest_of_the_ideal_went",
    ),
    Mutant(
        "a run of RULER leaves no record",
        "python/sdtp_eval/ruler.py",
        "        if not is_recorded:",
        "        if False:",
        "test_eval_ruler.py::test_ruler_runs_offline_and_resumes",
    ),
    Mutant(
        "a run of the evaluation leaves no record",
        "python/sdtp_eval/quality.py",
        "if work and workers.index == 0:",
        "if False:",
        "test_eval_quality.py::test_run_resume_and_compare",
    ),
    Mutant(
        "a wrong kernel timed",
        BENCH + "gpu_check.py",
        "if errors[name, False]:",
        "if False:",
        "test_bench_gpu_check.py::test_a_wrong_kernel_gets_no_figure",
    ),
    Mutant(
        "times from a warm cache",
        BENCH + "timing.py",
        "        device.flush()\n",
        "",
        "test_bench_gpu_check.py::test_runs_are_interleaved_and_cold",
    ),
    Mutant(
        "a version in a second place",
        "pyproject.toml",
        'dynamic = ["version"]',
        'version = "0.0.9"',
        "test_build.py::test_one_place_names_the_version",
    ),
    # What people read.
    Mutant(
        "a page that the navigation forgets",
        "docs/conf.py",
        '"docs/quick-start", ',
        "",
        "test_docs.py::test_the_navigation_contains_every_page",
    ),
    Mutant(
        "a public function without its documentation",
        "docs/api.md",
        ".. autofunction:: front_loaded\n",
        "",
        "test_docs.py::test_every_public_name_is_on_the_api_page",
    ),
    Mutant(
        "a link to a heading that is gone",
        "docs/api.md",
        "# API\n",
        "# API\n\n[gone](serving.md#no-such-heading)\n",
        "test_docs.py::test_links_lead_somewhere",
    ),
    Mutant(
        "an error text that the package no longer has",
        "docs/troubleshooting.md",
        "`SDTP needs left padding`",
        "`SDTP wants left padding`",
        "test_docs.py::test_troubleshooting_has_the_texts_that_the_package_prints",
    ),
    Mutant(
        "a quick start with a line that fails",
        "docs/quick-start.md",
        'with apply_sdtp(model, "attention", 0.9) as handle:',
        'with apply_sdtp(model, "saliency", 0.9) as handle:',
        "test_docs.py::test_the_lines_of_the_first_pages_run",
    ),
]


def is_compiled(mutant: Mutant) -> bool:
    """Whether it changes the library. What tests CUDA's sources compiles them itself."""
    return mutant.file.startswith("csrc/") and not mutant.file.startswith(CUDA)


def copy_source(destination: Path) -> Path:
    destination.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, destination / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, destination)
    return destination


def configure(source: Path) -> None:
    """From here on the copy has a library of its own."""
    torch = importlib.util.find_spec("torch").origin
    target = json.loads((source / "sdtp_kernels/build_info.json").read_text())["torch_target"]
    settings = {
        "SDTP_TORCH_DIR": Path(torch).parent,
        "SDTP_TORCH_TARGET": target,
        "SDTP_OUTPUT_DIR": source / "sdtp_kernels",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-S", source, "-B", source / "build", *options], check=True, stdout=subprocess.DEVNULL)


def run_tests(source: Path, tests: str) -> tuple[int, str]:
    """(exit status, output) of pytest on the copy, in a process of its own."""
    output, status = source / "output.txt", source / "status.txt"
    status.unlink(missing_ok=True)
    if (source / "build").is_dir():  # takes a bug in, and the one before it out
        subprocess.run(["cmake", "--build", source / "build"], check=True, stdout=subprocess.DEVNULL)
    # Triton's interpreter is chosen when Triton is imported, which the process that is forked has done.
    process = (SPAWNS if SUITE in tests else FORKS).Process(target=_pytest, args=(source, tests, output))
    process.start()
    process.join()
    # What pytest found counts, whatever becomes of the process afterwards; one that crashed before has found nothing.
    found = int(status.read_text()) if status.is_file() else process.exitcode
    return found, output.read_text(errors="replace")


def _pytest(source: Path, tests: str, output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(source)
    packages = [str(source), str(source / "python")]
    sys.path[:0] = packages
    # A copy's files change faster than the times by which Python tells that what it has compiled is old.
    sys.dont_write_bytecode = True
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_INTERPRET": str(int(SUITE in tests)),
    }
    assert "sdtp_kernels" not in sys.modules
    assert "triton" not in sys.modules or SUITE not in tests

    import pytest

    found = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests.split())])
    (source / "status.txt").write_text(str(int(found)))
    sys.exit(found)


def try_mutant(mutant: Mutant, source: Path) -> str | None:
    """Why the mutant counts against us; ``None`` where the suite caught it. The copy is left as it was."""
    path = source / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"stale: its text stands {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))
    if is_compiled(mutant) and not (source / "build").is_dir():
        configure(source)
    status, output = run_tests(source, mutant.tests)
    path.write_text(text)
    if status == 0:
        return f"SURVIVED {mutant.tests}"
    if status not in CAUGHT:
        return f"the run broke (exit {status}):\n{output[-4000:]}"
    return None


def control(tests: list[str], source: Path) -> str | None:
    """A copy without a bug must pass, or failures would prove nothing."""
    status, output = run_tests(source, " ".join(tests))
    return None if status == 0 else f"the copy fails without a bug (exit {status}):\n{output[-4000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant bugs; the suite must catch each.")
    parser.add_argument("names", nargs="*", default=[""], metavar="NAME", help="part of a bug's name; default: all")
    names = parser.parse_args().names
    mutants = [m for m in MUTANTS if m.file not in UNUSED and any(name in m.name for name in names)]
    if not mutants:
        parser.error(f"no bug has a name with {' or '.join(map(repr, names))} in it")
    files = {}
    for test in sorted({test for mutant in mutants for test in mutant.tests.split()}):
        files.setdefault(test.partition("::")[0], []).append(test)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # the process that is forked reads them
    copies: SimpleQueue[Path] = SimpleQueue()

    def on_a_copy(attempt, subject):
        source = copies.get()
        begin = time.monotonic()
        try:
            return attempt(subject, source), time.monotonic() - begin
        finally:
            copies.put(source)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        for number in range(WORKERS):
            copies.put(copy_source(Path(folder) / str(number)))
        # Those that are compiled first, file by file: what a bug does not touch stays compiled.
        mutants.sort(key=lambda mutant: (not is_compiled(mutant), mutant.file))
        attempts = [("caught", mutant.name, pool.submit(on_a_copy, try_mutant, mutant)) for mutant in mutants]
        # Last, on the copies that all bugs have been in.
        attempts += [("passed", file, pool.submit(on_a_copy, control, files[file])) for file in files]
        failures = 0
        for verdict, name, attempt in attempts:
            reason, seconds = attempt.result()
            failures += reason is not None
            print(
                f"{'FAILED' if reason else verdict:<8}{seconds:6.1f} s  {name}{': ' + reason if reason else ''}",
                flush=True,
            )
    print(f"{len(attempts) - failures} of {len(attempts)} as they should be")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
