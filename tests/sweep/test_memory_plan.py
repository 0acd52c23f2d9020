"""The plan of a sweep's memory by itself: what a budget gives, that more is never less, and what is refused."""

import dataclasses
import re

import pytest

from fastinterp.errors import OptionError
from fastinterp.sweep.costs import BatchShape, Cost, Demand, Measured
from fastinterp.sweep.memory import SLICE_VARIANTS, check_budget, group_bytes, least_plan, plan_memory, step_tokens
from fastinterp.sweep.widths import Widths

MIB = 1 << 20
DEMANDS = {
    "last": Demand(n_units=144, sites=frozenset({"z"}), measured=Measured(), width=1, partial=True),
    "all": Demand(n_units=144, sites=frozenset({"z"}), measured=Measured()),
    "loss": Demand(n_units=144, sites=frozenset({"z"}), measured=Measured(linear=0, per_token=1)),
    "each": Demand(n_units=12, sites=frozenset({"resid_pre"}), measured=Measured(), pos_axes=1, source=True),
    "pattern": Demand(n_units=36, sites=frozenset({"pattern"}), measured=Measured(full=1), source=True),
    "delta": Demand(n_units=144, sites=frozenset({"z"}), measured=Measured(), precision="delta"),
}


@pytest.fixture(scope="module", params=["gpt2", "llama-gqa", "gemma2-softcaps", "gpt-neox"])
def widths(request, zoo):
    return Widths(spec=zoo.model(request.param).spec, itemsize=4)


@pytest.fixture(params=sorted(DEMANDS))
def demand(request):
    return DEMANDS[request.param]


def test_without_a_budget_the_parts_are_constants(widths, demand):
    plan = plan_memory(widths, demand, BatchShape(n_prompts=4, n_pos=20), budget=None)
    assert (plan.residual_bytes, plan.step_tokens, plan.slice_variants) == (
        group_bytes("cpu"), step_tokens("cpu"), SLICE_VARIANTS,
    )  # fmt: skip
    assert plan.group_variants == demand.n_variants(20)
    assert plan.held_bytes is None
    assert plan.peak_bytes == plan_memory(widths, demand, BatchShape(n_prompts=4, n_pos=20), budget=1 << 40).peak_bytes


def test_a_plan_keeps_to_its_budget_and_takes_more_where_it_may(widths, demand):
    shape = BatchShape(n_prompts=4, n_pos=40)
    least = least_plan(widths, demand, shape).peak_bytes
    variants = []
    for budget in [least, least + 1, *(least * factor // 4 for factor in range(5, 40))]:
        plan = plan_memory(widths, demand, shape, budget=budget)
        assert plan.peak_bytes <= budget
        # What is freed may fill what the plan leaves, or an eighth of the plan.
        assert plan.held_bytes == max(budget - plan.peak_bytes, plan.peak_bytes // 8)
        variants.append(plan.group_variants)
    assert variants[-1] > variants[0]
    with pytest.raises(
        OptionError, match=f"memory_bytes={least - 1} is not enough for a batch of 4 prompts"
    ) as refused:
        plan_memory(widths, demand, shape, budget=least - 1)
    assert int(re.search(r"needs about (\d+)", str(refused.value))[1]) == least


def test_more_of_anything_is_never_less(widths, demand):
    def peak(shape):
        cost = Cost(widths=widths, demand=demand, shape=shape)
        return cost.peak(least_plan(widths, demand, shape))

    by_length = [peak(BatchShape(n_prompts=1, n_pos=n)) for n in range(1, 70)]
    assert by_length == sorted(by_length)
    by_prompts = [peak(BatchShape(n_prompts=n, n_pos=17)) for n in range(1, 30)]
    assert by_prompts == sorted(by_prompts)


def test_a_gpu_takes_larger_steps_and_its_libraries_count(widths, demand):
    shape = BatchShape(n_prompts=4, n_pos=20)
    on_gpu = plan_memory(dataclasses.replace(widths, device_type="cuda"), demand, shape, budget=None)
    assert on_gpu.step_tokens > step_tokens("cpu")
    assert on_gpu.peak_bytes > plan_memory(widths, demand, shape, budget=None).peak_bytes


@pytest.mark.parametrize("budget", [0, -5, 2.0, True, "1GB"])
def test_what_is_no_budget(budget):
    with pytest.raises(OptionError, match="give a positive number of bytes"):
        check_budget(budget)
    check_budget(None)
    check_budget(MIB)
