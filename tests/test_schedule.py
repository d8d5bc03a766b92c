"""The counts: exact, the same for ints, symbolic sizes and tensors."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from helpers.oracle import naive_keep
from hypothesis import given
from hypothesis import strategies as st

from sdtp_kernels import PruningSchedule, front_loaded
from sdtp_kernels.schedule import MAX_PROMPT

ratios = st.decimals(min_value="0.001", max_value=1, places=3).map(float)


@given(
    keep_ratio=st.lists(ratios, min_size=3, max_size=3).map(tuple) | ratios,
    sink=st.integers(0, 8),
    recent=st.decimals(min_value=0, max_value=1, places=2).map(float),
    budget=st.sampled_from(["global", "block"]),
    block_size=st.integers(9, 200),
    min_prompt=st.integers(1, 100),
    length=st.integers(0, 5000),
)
def test_counts_follow_the_contract(keep_ratio, sink, recent, budget, block_size, min_prompt, length):
    schedule = PruningSchedule((2, 5, 8), keep_ratio, sink, recent, budget, block_size, min_prompt)
    lengths = torch.arange(length + 1)[-300:]
    for stage in (1, 2, 3):
        kept, tail, _ = naive_keep(schedule, length, stage)
        assert (schedule.num_keep(length, stage), schedule.num_recent(length)) == (kept, tail)
        assert schedule.num_keep(lengths, stage).tolist() == [schedule.num_keep(n, stage) for n in lengths.tolist()]
        rows = schedule.plan_rows(lengths, stage, keep_last=3)
        plan = schedule.plan(length, stage, keep_last=3)
        assert rows[-1].tolist() == [schedule.num_keep(length, stage - 1) + 3, plan.num_keep, plan.recent]


@given(
    keep_ratio=ratios,
    budget=st.sampled_from(["global", "block"]),
    block_size=st.integers(9, 60),
    min_prompt=st.integers(1, 50),
    length=st.integers(1, 250),
)
def test_batch_width_is_the_largest_count_of_any_row(keep_ratio, budget, block_size, min_prompt, length):
    schedule = PruningSchedule((2, 5), keep_ratio, budget=budget, block_size=block_size, min_prompt=min_prompt)
    for stage in (0, 1, 2):
        widest = max(schedule.num_keep(n, stage) for n in range(length + 1))
        assert schedule.max_keep(length, stage) == widest


@pytest.mark.parametrize("ratio", [0.9, 0.873, 0.1234567, 1 / 3])
def test_shares_stay_exact_over_many_stages(ratio):
    schedule = PruningSchedule(tuple(range(1, 13)), ratio, sink=0, recent=0.0, min_prompt=1)
    for stage in range(1, 13):
        share = Fraction(repr(ratio)) ** stage
        for length in (1, 10, 1000, 131072, 999983, MAX_PROMPT):
            assert schedule.num_keep(length, stage) == max(1, math.ceil(length * share))
            assert schedule.num_keep(torch.tensor([length]), stage).item() == schedule.num_keep(length, stage)


def test_a_ratio_is_the_decimal_that_is_written():
    schedule = PruningSchedule((1,), 0.9, sink=0, recent=0.1, min_prompt=1)
    assert [schedule.num_keep(n, 1) for n in (10, 20, 1000)] == [9, 18, 900]
    assert schedule.num_recent(1000) == 100


def test_budget_unit():
    # The paper's pattern on 28 layers at keep 0.9; 0.712 is the sum over layers of 0.9^stage by hand.
    schedule = PruningSchedule.every(28)
    assert schedule.layers == (4, 7, 10, 13, 16, 19, 22, 25)
    assert schedule.mean_keep(100_000, 28) == pytest.approx((4 + 3 * sum(0.9**s for s in range(1, 9))) / 28, abs=1e-4)


@pytest.mark.parametrize("keep_ratio", [0.95, 0.9, 0.8, 0.5])
def test_front_loaded_has_the_budget_of_the_even_ratio_and_drops_it_earlier(keep_ratio):
    even = [keep_ratio**stage for stage in range(1, 10)]
    early = list(itertools.accumulate(front_loaded(keep_ratio, 9), lambda a, b: a * b))
    assert sum(early) == pytest.approx(sum(even), abs=1e-3)
    assert early[0] < even[0]
    assert early[-1] > even[-1]
    # What is left falls as a stretched exponential: its logarithm is -c s^power.
    assert [math.log(share) / math.log(early[0]) for share in early] == pytest.approx(
        [stage**0.7 for stage in range(1, 10)], rel=1e-3
    )
    assert front_loaded(keep_ratio, 9, power=1) == pytest.approx([keep_ratio] * 9, abs=1e-5)
    assert front_loaded(keep_ratio, 1) == (keep_ratio,)


def test_front_loaded_is_a_schedule_for_every_ratio():
    for keep_ratio in (1e-5, 0.001, 0.3, 1.0):
        PruningSchedule.every(30, keep_ratio=front_loaded(keep_ratio, 9))
    assert front_loaded(1.0, 3) == (1.0, 1.0, 1.0)
    for arguments, message in (((0.0, 3), "keep_ratio=0.0"), ((1.1, 3), "keep_ratio=1.1"), ((0.9, 3, 0), "power=0"),
                               ((0.9, 3, 1.5), "power=1.5"), ((0.9, 0), "num_stages=0")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            front_loaded(*arguments)


def test_block_counts_do_not_depend_on_what_follows():
    schedule = PruningSchedule((1, 2), 0.8, budget="block", block_size=64, min_prompt=1)
    for length in range(96, 400):
        unfinished = (length - 32) % 64 + 32
        assert schedule.num_recent(length) == unfinished
        assert schedule.num_keep(length, 2) == unfinished + (length - unfinished) // 64 * schedule.block_keep(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, "at least one decoder layer"),
        ({"layers": (0, 3)}, "layer 0 cannot be pruned"),
        ({"layers": (3, 3)}, "strictly increasing"),
        ({"layers": (5, 3)}, "strictly increasing"),
        ({"layers": (1.5,)}, "decoder layer index"),
        ({"keep_ratio": 0}, r"share in \(0, 1\]"),
        ({"keep_ratio": 1.5}, r"share in \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"share in \(0, 1\]"),
        ({"keep_ratio": (0.9,)}, "1 numbers for 2 layers"),
        ({"sink": -1}, "count of tokens"),
        ({"recent": 1.2}, r"\[0, 1\]"),
        ({"recent": float("nan")}, r"\[0, 1\]"),
        ({"budget": "both"}, "'global' or 'block'"),
        ({"budget": "block", "block_size": 4}, "more than the 4 sink tokens"),
        ({"min_prompt": 0}, ">= 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningSchedule(**{"layers": (2, 4), **settings})
