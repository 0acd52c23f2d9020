"""How many tokens a batch of a sweep has, and what its means and direct effects allocate, for a number of bytes."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from fastinterp.analyses.replacements import usual_mean_tokens
from fastinterp.analyses.written import prompts_at_once
from fastinterp.errors import OptionError
from fastinterp.metrics import RANKED, Metric
from fastinterp.model.model import Model
from fastinterp.prompts import Batch, TokenizedPrompts
from fastinterp.sweep.costs import BatchShape, Cost, Demand, Measured
from fastinterp.sweep.memory import SweepMemory, least_plan, not_enough, plan_memory, roomy_plan
from fastinterp.sweep.widths import Widths

DIRECT_BYTES = 1 << 25
"""Residuals ``[unit, row, d_model]`` of direct effects that are measured together."""

_MIB = 1 << 20


def measured_by(metrics: Sequence[Metric], n_targets: int) -> Measured:
    """Counts the metrics by what they are read from."""
    return Measured(
        linear=sum(metric.linear for metric in metrics),
        full=sum(not metric.linear and not metric.per_token for metric in metrics),
        per_token=sum(metric.per_token for metric in metrics),
        n_targets=n_targets,
    )


def n_targets(prompts: TokenizedPrompts) -> int:
    """How many answers and wrong answers a prompt has at most."""
    return sum(column.shape[1] for column in (prompts.answer, prompts.wrong) if column is not None)


def widths_of(model: Model) -> Widths:
    """The sizes of a model's activations."""
    return Widths(spec=model.spec, itemsize=model.weights.W_E.element_size(), device_type=model.device.type)


# Means ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeanCost:
    """The bytes of a pass for means over ``n_prompts`` prompts, of which the longest has ``n_pos`` tokens."""

    widths: Widths
    sites: Mapping[str, set[int]]
    n_pos: int
    n_prompts: int
    by_pos: bool

    @property
    def kept(self) -> int:
        """The means themselves, in float64 while they are added up."""
        numbers = sum(len(layers) * self.widths.site(site) for site, layers in self.sites.items())
        return 3 * 8 * numbers // self.widths.itemsize * (self.n_pos if self.by_pos else 1)

    def peak(self, n_tokens: int) -> int:
        """A pass over batches of so many tokens, at least one prompt."""
        n_tokens = max(min(n_tokens, self.n_prompts * self.n_pos), self.n_pos)
        captured = sum(len(layers) * self.widths.site(site) for site, layers in self.sites.items())
        widest = max(self.widths.site(site) for site in self.sites) // self.widths.itemsize
        block = self.widths.block(n_tokens, n_tokens, self.n_pos, formed=self.widths.formed, by_rows=False)
        adding = n_tokens * (2 * 8 + 4) * widest
        masks = 12 * self.n_pos**2 + n_tokens * (self.widths.rope + 64)
        return self.kept + n_tokens * (captured + 2 * self.widths.d) + max(block, adding) + masks + (1 << 15)

    def tokens(self, budget: int | None) -> int:
        """Tokens of a batch of the pass."""
        n_tokens = usual_mean_tokens(self.widths.device_type)
        while budget is not None and n_tokens > 1 and self.peak(n_tokens) > budget:
            n_tokens //= 2
        return n_tokens


# Direct effects ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DirectCost:
    """The bytes of direct effects of one batch. ``heads``: every unit is one head; ``copies``: so is ``W_O``."""

    widths: Widths
    sites: Mapping[str, set[int]]
    n_units: int
    heads: bool
    n_modes: int
    n_replacing: int
    resampled: bool
    copies: bool
    measured: Measured
    kl: bool
    each: bool = False

    def unit_bytes(self, shape: BatchShape) -> int:
        """The edited residual of one unit."""
        return self._rows(shape) * self.widths.spec.d_model * self.widths.wide

    def _rows(self, shape: BatchShape) -> int:
        return shape.n_prompts * (shape.n_pos if self.measured.per_token else 1)

    def peak(self, shape: BatchShape, residual_bytes: int) -> int:
        """The most that is alive at a time."""
        widths, spec = self.widths, self.widths.spec
        rows, wide, d = self._rows(shape), widths.wide, spec.d_model * widths.wide
        layers = len(self.sites.get("z", ()))
        layer = rows * spec.n_heads * spec.d_head * wide
        z = layers * layer
        others = sum(len(layers) * widths.site(site) for site, layers in self.sites.items() if site != "z")
        others = others // widths.itemsize * wide
        W_O = spec.n_heads * spec.d_head * d
        copied = layers * W_O if self.copies else 0
        kept = z + rows * (others + 2 * d) + copied
        runs = 2 if self.resampled else 1
        both = 2 if self.measured.per_token and self.measured.linear + self.measured.full else 1
        widest = max((widths.site(site) // widths.itemsize * wide for site in self.sites), default=0)
        together = prompts_at_once(
            widths.device_type, shape.n_prompts, shape.n_pos, every_position=bool(self.measured.per_token)
        )
        part = dataclasses.replace(shape, n_prompts=together)
        making = self._rows(part) * (z + rows * others) // rows + 3 * max(layer, rows * widest) + rows * 5 * d
        # Metrics of the last position have a run of their own, of all prompts.
        run = shape if self.measured.linear + self.measured.full else part
        making += widths.block(run.nodes, run.slots, run.padded, formed=widths.formed, by_rows=False) + (
            W_O if self.copies else 0
        )
        some = min(max(residual_bytes, self.unit_bytes(shape)), self.n_units * self.unit_bytes(shape))
        measuring = self._replaced(rows, z, layer) + self._kernels(rows) if self.heads else self._explicit(rows, some)
        metrics = self.measured.linear + self.measured.full + self.measured.per_token
        values = rows * self.n_units * (12 * (6 + 2 * self.measured.n_targets) + 4 * metrics * self.n_modes)
        index = shape.slots * 8 * 8 + shape.padded**2 * 12 + shape.slots * widths.rope
        if self.each:
            values += rows * self.n_units * shape.n_pos * 8 * (3 + metrics * self.n_modes)
        return values + index + both * runs * kept + max(making, measuring) + (1 << 16)

    def _replaced(self, rows: int, z: int, layer: int) -> int:
        """What is taken away of heads' values, in place for one mode; and chosen heads, where not all of a layer."""
        spec, wide = self.widths.spec, self.widths.wide
        found = 3 * layer + (z if self.n_replacing > 1 else 0)
        if self.n_units < len(self.sites["z"]) * spec.n_heads:
            found += self.n_units * spec.d_head * wide * (rows + spec.d_model)
        return found

    def _explicit(self, rows: int, residuals: int) -> int:
        """Edited residuals, and what is measured of them."""
        spec, wide = self.widths.spec, self.widths.wide
        n = residuals // max(1, spec.d_model * wide)
        return 3 * residuals + 8 * rows * spec.d_model * wide + self.widths.tile(n, buffers=3) + n * 32

    def _kernels(self, rows: int) -> int:
        """Buffers of the products with all heads."""
        spec, wide = self.widths.spec, self.widths.wide
        width = max(spec.d_model, spec.n_heads * spec.d_head)
        gathered = 4 * min(4 * _MIB, rows * width * wide)
        if not self.measured.full and not self.measured.per_token:
            return gathered
        if self.widths.device_type != "cpu":
            return 64 * _MIB
        clean = min(16 * _MIB, rows * min(2048, spec.d_vocab) * wide) * (2 if self.kl else 1)
        return (
            gathered + clean + 4 * _MIB + 3 * _MIB + 4 * 512 * spec.d_model * wide + self.widths.tile(rows, buffers=3)
        )


def direct_cost(
    model: Model,
    sites: Mapping[str, set[int]],
    n_units: int,
    modes: Sequence[str],
    metrics: Sequence[Metric],
    *,
    heads: bool,
    n_targets: int,
    each: bool,
) -> DirectCost:
    """Returns the cost of direct effects of units in some modes."""
    unfolded = model.weights.ln_final.w is not None or model.spec.norm.kind == "layer" or model.spec.post_norms
    return DirectCost(
        widths=widths_of(model),
        sites=sites,
        n_units=n_units,
        heads=heads,
        n_modes=len(modes),
        n_replacing=sum(mode != "zero" for mode in modes),
        resampled="resample" in modes,
        copies=unfolded or model.weights.W_E.element_size() < 4,
        measured=measured_by(metrics, n_targets),
        kl=any(metric.name == "kl" or metric.name in RANKED for metric in metrics),
        each=each,
    )


def shape_of(batch: Batch) -> BatchShape:
    """The shape of a batch."""
    n_prompts, n_pos = batch.tokens.shape
    return BatchShape(n_prompts=n_prompts, n_pos=n_pos, shortest=int(batch.n_tokens.min()))


def batch_targets(batch: Batch) -> int:
    """How many answers and wrong answers a prompt of the batch has at most."""
    return sum(column.shape[1] for column in (batch.answer, batch.wrong) if column is not None)


# Batches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Costs:
    """All that an analysis does with a batch, and once in front of all batches."""

    model: Model
    demand: Demand | None = None
    direct: DirectCost | None = None
    mean: MeanCost | None = None

    def memory(self, shape: BatchShape, budget: int | None) -> SweepMemory | None:
        """Returns the parts of the sweep of a batch; raises :class:`OptionError` where the budget is not enough."""
        if self.demand is None:
            return None
        return plan_memory(widths_of(self.model), self.demand, shape, budget=self._left(budget))

    def _means(self) -> int:
        return 0 if self.mean is None else self.mean.kept

    def _left(self, budget: int | None) -> int | None:
        return None if budget is None else budget - self._means()

    def _direct(self, shape: BatchShape, residual_bytes: int) -> int:
        assert self.direct is not None
        total = 0
        if self.demand is not None:
            total = Cost(widths=widths_of(self.model), demand=self.demand, shape=shape).results
        return total + self.direct.peak(shape, residual_bytes)

    def residual_bytes(self, shape: BatchShape, budget: int | None) -> int:
        """Edited residuals of direct effects that are measured together."""
        assert self.direct is not None
        found = DIRECT_BYTES
        left = self._left(budget)
        while left is not None and found > self.direct.unit_bytes(shape) and self._direct(shape, found) > left:
            found //= 2
        return found

    def mean_tokens(self, budget: int | None) -> int | None:
        """Tokens of a batch of the pass for means; None for as many as usual."""
        return None if self.mean is None or budget is None else self.mean.tokens(budget)

    def least(self, shape: BatchShape, *, roomy: bool = False) -> int:
        """The fewest bytes that do for a batch; ``roomy``: for some variants at a time."""
        found = [0]
        if self.demand is not None:
            plan = (roomy_plan if roomy else least_plan)(widths_of(self.model), self.demand, shape)
            found.append(plan.peak_bytes)
        if self.direct is not None:
            found.append(self._direct(shape, self.direct.unit_bytes(shape) * (16 if roomy else 1)))
        return max(found) + self._means()

    def most(self, shape: BatchShape, budget: int | None) -> int:
        """The estimate of what a batch takes."""
        found = [0]
        memory = self.memory(shape, budget)
        if memory is not None:
            found.append(memory.peak_bytes)
        if self.direct is not None:
            found.append(self._direct(shape, self.residual_bytes(shape, budget)))
        return max(found) + self._means()


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a set of prompts is cut into batches, and the estimate of what is allocated at most."""

    batch_tokens: int
    group_variants: int
    peak_bytes: int
    memory_bytes: int | None

    def described(self) -> str:
        """The plan as JSON text."""
        return json.dumps(dataclasses.asdict(self))


def with_plan(found: xr.Dataset, plan: BatchPlan | None) -> xr.Dataset:
    """Returns the results with the plan as their attribute ``sweep_plan``."""
    return found if plan is None else found.assign_attrs(sweep_plan=plan.described())


def plan_batches(costs: Costs, prompts: TokenizedPrompts, budget: int | None, usual: int) -> BatchPlan:
    """Chooses the tokens of a batch: ``usual`` ones, or fewer where that many do not fit the budget with some variants.

    Raises:
        OptionError: the longest prompt by itself needs more than the budget, which is said in bytes.
    """
    lengths = np.sort(prompts.n_tokens[prompts.accepted])
    if not len(lengths):
        return BatchPlan(batch_tokens=usual, group_variants=0, peak_bytes=0, memory_bytes=budget)
    distinct, counts = np.unique(lengths, return_counts=True)
    longest = BatchShape(n_prompts=1, n_pos=int(lengths[-1]), shortest=int(lengths[0]))
    if budget is not None:
        needed = costs.least(longest)
        for_mean = 0 if costs.mean is None else costs.mean.peak(1)
        if max(needed, for_mean) > budget:
            n_pos = longest.n_pos if needed >= for_mean or costs.mean is None else costs.mean.n_pos
            raise OptionError(not_enough(budget, max(needed, for_mean), 1, n_pos))

    def shapes(n_tokens: int) -> list[BatchShape]:
        return [
            BatchShape(n_prompts=int(max(1, min(n_tokens // n, at_most))), n_pos=int(n), shortest=int(lengths[0]))
            for n, at_most in zip(distinct, counts.cumsum(), strict=True)
        ]

    n_tokens = usual
    while budget is not None and n_tokens > 1 and not _fit(costs.least, shapes(n_tokens), budget):
        n_tokens //= 2
    some = shapes(n_tokens)
    groups = [memory.group_variants for shape in some if (memory := costs.memory(shape, budget)) is not None]
    peak = max(costs.most(shape, budget) for shape in some)
    if costs.mean is not None:
        peak = max(peak, costs.mean.peak(costs.mean.tokens(budget)))
    return BatchPlan(batch_tokens=n_tokens, group_variants=min(groups, default=0), peak_bytes=peak, memory_bytes=budget)


def _fit(least: Callable[..., int], shapes: Sequence[BatchShape], budget: int) -> bool:
    return all(shape.n_prompts == 1 or least(shape, roomy=True) <= budget for shape in shapes)
