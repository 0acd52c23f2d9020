"""How large the parts of a sweep may be for a given number of bytes.

The estimate (``sweep/costs.py``) adds up what is alive at the worst moment: the residuals of one group of variants, the
clean run and what is captured of it, and the largest of what a step of a stack, the clean block, the block of the
source run, the entrance of one variant and a slice that is measured need beside that.
"""

from dataclasses import dataclass, replace

from fastinterp.errors import OptionError
from fastinterp.sweep.costs import BatchShape, Cost, Demand
from fastinterp.sweep.widths import Widths

SLICE_VARIANTS = 16

# Variants that a group has at least, if the memory allows, so that products have enough rows.
_WANTED_GROUP = 16


def group_bytes(device_type: str) -> int:
    """Residuals of variants that go through the model together: many steps, or all that saturates a GPU."""
    return 1 << 24 if device_type == "cpu" else 1 << 30


def step_tokens(device_type: str) -> int:
    """Tokens that go through a block together: enough rows for the matrix product, few enough for the cache."""
    return 2048 if device_type == "cpu" else 1 << 17


def score_bytes(device_type: str) -> int:
    """Attention scores of prompts' ends that are formed together."""
    return 1 << 26 if device_type == "cpu" else 1 << 30


@dataclass(frozen=True, kw_only=True)
class SweepMemory:
    """How large the parts of a sweep are.

    ``residual_bytes``: the residuals of one group of variants; ``step_tokens``: tokens that go through a block
    together; ``score_bytes``: attention scores of prompts' ends formed at a time; ``slice_variants``: variants that are
    measured together. ``peak_bytes`` is the estimate of all that is allocated beyond the weights, an upper bound;
    ``held_bytes`` is the freed memory that may be resident beside it, None where there is no limit.
    """

    residual_bytes: int
    step_tokens: int
    score_bytes: int
    slice_variants: int
    group_variants: int
    peak_bytes: int
    held_bytes: int | None = None


def plan_memory(widths: Widths, demand: Demand, shape: BatchShape, *, budget: int | None) -> SweepMemory:
    """Chooses the parts of a sweep of one batch so that it allocates at most ``budget`` bytes beyond the weights.

    Without a budget they are constants. Steps and slices are halved until a group of some variants fits beside them;
    the group then takes what is left.

    Raises:
        OptionError: even one variant at a time needs more.
    """
    cost = Cost(widths=widths, demand=demand, shape=shape)
    largest = _largest(cost)
    if budget is None:
        return replace(largest, peak_bytes=cost.peak(largest))
    plan = _fitting(cost, largest, budget)
    # What the plan leaves of the limit; where that is little, an eighth of the plan, since looking for it takes time.
    return replace(plan, held_bytes=max(budget - plan.peak_bytes, plan.peak_bytes // 8))


def _fitting(cost: Cost, largest: SweepMemory, budget: int) -> SweepMemory:
    for wanted in sorted({min(_WANTED_GROUP, largest.group_variants), 1}, reverse=True):
        for shift in range(12):
            some = _shrunk(largest, shift, wanted)
            if cost.peak(some) <= budget:
                return _filled(cost, some, largest.group_variants, budget)
    shape = cost.shape
    least = least_plan(cost.widths, cost.demand, shape)
    if least.peak_bytes <= budget:
        return least
    raise OptionError(not_enough(budget, least.peak_bytes, shape.n_prompts, shape.n_pos))


def _largest(cost: Cost) -> SweepMemory:
    device, residual = cost.widths.device_type, cost.variant_bytes
    return SweepMemory(
        residual_bytes=group_bytes(device),
        step_tokens=step_tokens(device),
        score_bytes=score_bytes(device),
        slice_variants=SLICE_VARIANTS,
        group_variants=min(cost.demand.n_variants(cost.shape.n_pos), max(1, group_bytes(device) // residual)),
        peak_bytes=0,
    )


def _shrunk(largest: SweepMemory, shift: int, group_variants: int) -> SweepMemory:
    return replace(
        largest,
        step_tokens=max(1, largest.step_tokens >> shift),
        score_bytes=largest.score_bytes >> 2 * shift,
        slice_variants=max(1, largest.slice_variants >> shift),
        group_variants=group_variants,
    )


def _filled(cost: Cost, plan: SweepMemory, most: int, budget: int) -> SweepMemory:
    """Returns the plan with as many variants in a group as the budget holds, at most ``most``."""
    low, high = plan.group_variants, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost.peak(replace(plan, group_variants=middle)) <= budget else (low, middle - 1)
    plan = replace(plan, group_variants=low, residual_bytes=low * cost.variant_bytes)
    return replace(plan, peak_bytes=cost.peak(plan))


def least_plan(widths: Widths, demand: Demand, shape: BatchShape) -> SweepMemory:
    """One variant at a time."""
    cost = Cost(widths=widths, demand=demand, shape=shape)
    plan = SweepMemory(
        residual_bytes=cost.variant_bytes, step_tokens=1, score_bytes=0, slice_variants=1, group_variants=1,
        peak_bytes=0,
    )  # fmt: skip
    return replace(plan, peak_bytes=cost.peak(plan))


def roomy_plan(widths: Widths, demand: Demand, shape: BatchShape) -> SweepMemory:
    """Some variants at a time, in steps that are not much smaller than usual."""
    cost = Cost(widths=widths, demand=demand, shape=shape)
    largest = _largest(cost)
    plan = _shrunk(largest, 2, min(_WANTED_GROUP, largest.group_variants))
    return replace(plan, peak_bytes=cost.peak(plan))


def not_enough(budget: int, needed: int, n_prompts: int, n_pos: int) -> str:
    """What to say where the memory does not do for a batch."""
    batch = "one prompt" if n_prompts == 1 else f"a batch of {n_prompts} prompts"
    return (
        f"memory_bytes={budget} is not enough for {batch} of {n_pos} tokens: it needs about {needed}; raise it, or "
        "shorten the prompts"
    )


def check_budget(memory_bytes: object) -> None:
    """Raises :class:`OptionError` for what is no number of bytes."""
    if memory_bytes is None:
        return
    if isinstance(memory_bytes, bool) or not isinstance(memory_bytes, int) or memory_bytes < 1:
        raise OptionError(
            f"memory_bytes={memory_bytes!r}: give a positive number of bytes, such as 2 * 2**30, or None for no limit"
        )
