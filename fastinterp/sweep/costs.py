"""What a sweep of one batch allocates beyond the weights, part by part.

Every term is a number of rows times widths of the model's activations; where code paths differ, the larger counts, so
that the sum is an upper bound. Not counted: the weights, the returned arrays, and what a library's product or fused
attention uses inside of itself on a CPU.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from fastinterp.model.mlp import HIDDEN
from fastinterp.model.prefix import POSITIONS_MULTIPLE
from fastinterp.sweep.entering import NEURONS_AT_ONCE
from fastinterp.sweep.precision import Precision
from fastinterp.sweep.variants import ATTENTION
from fastinterp.sweep.widths import Widths

_SMALL = 1 << 15  # index tensors, scales, means of rows
_DEVICE_BYTES = 1 << 27  # the kernels' buffers and the library's workspace on a GPU


@runtime_checkable
class Parts(Protocol):
    """How large the parts of a sweep are, see :class:`~fastinterp.sweep.memory.SweepMemory`."""

    @property
    def step_tokens(self) -> int:
        """Tokens that go through a block together."""
        ...

    @property
    def score_bytes(self) -> int:
        """Scores that are formed together."""
        ...

    @property
    def slice_variants(self) -> int:
        """Variants that are measured together."""
        ...

    @property
    def group_variants(self) -> int:
        """Variants of a group."""
        ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How many metrics are read: of single logits, of all logits at the last token, and at every token."""

    linear: int = 1
    full: int = 0
    per_token: int = 0
    n_targets: int = 2


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is asked of a sweep, whatever the batch.

    ``n_units`` variants for every choice of ``pos_axes`` edited positions. ``width``: they change the last so many
    positions of every prompt alone (None: any); ``partial``: some positions alone. ``sites``: what is edited;
    ``whole_sites``: all heads of it at once; ``several``: in several places. ``source``: values come from a second run.
    """

    n_units: int
    sites: frozenset[str]
    measured: Measured
    pos_axes: int = 0
    width: int | None = None
    partial: bool = False
    whole_sites: bool = False
    several: bool = False
    source: bool = False
    precision: Precision = "exact"

    def n_variants(self, n_pos: int) -> int:
        """How many runs a batch of prompts of ``n_pos`` tokens has."""
        return int(self.n_units * n_pos**self.pos_axes)

    @property
    def every_position(self) -> bool:
        """Whether final residuals are read at every token."""
        return self.measured.per_token > 0

    @property
    def patterns(self) -> bool:
        """Whether attention scores are formed for an edit."""
        return bool(self.sites & {"pattern", "attn_scores"})


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Prompts, their longest, and the shortest that there can be."""

    n_prompts: int
    n_pos: int
    shortest: int = 1

    @property
    def padded(self) -> int:
        """Positions of a prompt as attention sees it."""
        return self.n_pos + -self.n_pos % POSITIONS_MULTIPLE

    @property
    def slots(self) -> int:
        """Tokens, padding included."""
        return self.n_prompts * self.padded

    @property
    def nodes(self) -> int:
        """Tokens that are computed, if no two beginnings are equal."""
        return max(2, self.n_prompts * self.n_pos)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The bytes of a sweep of one batch, part by part."""

    widths: Widths
    demand: Demand
    shape: BatchShape

    @cached_property
    def ends(self) -> int | None:
        """Rows per prompt that a variant keeps where only the ends are computed."""
        demand, n_pos = self.demand, self.shape.n_pos
        if demand.width is not None:
            return min(n_pos, demand.width)
        # Of every position by itself, three quarters of a prompt at most, else all of it.
        return n_pos if demand.pos_axes or demand.partial else None

    @cached_property
    def whole(self) -> bool:
        """Whether there are variants of which all tokens are computed."""
        width = self.demand.width
        return width is None or width >= 0.75 * self.shape.shortest

    @cached_property
    def variant_bytes(self) -> int:
        """The residual of one variant, as groups count it."""
        rows = self.shape.slots if self.whole else self.shape.n_prompts * (self.ends or 0)
        return max(rows, 1) * self.widths.d

    @cached_property
    def score_bytes(self) -> int:
        """Scores of the ends of one variant."""
        if self.ends is None:
            return 0
        n_keys = self.shape.n_pos
        if self.demand.width is None and not self.demand.pos_axes:
            # Prompts that begin to differ at positions of their own.
            n_keys *= 2
        return self.shape.n_prompts * self.ends * n_keys * self.widths.scores

    def peak(self, plan: Parts) -> int:
        """The most that is alive at a time."""
        residuals = min(self.demand.n_variants(self.shape.n_pos), plan.group_variants) * self.variant_bytes
        lasting = self._lasting() + self._stacks(residuals) + self._values(1)
        reading = plan.group_variants * self.shape.n_prompts * self.widths.d
        passing = residuals + self._beside() + max(self._clean(), self._source(), self._step(plan), self._enter())
        read = residuals * (2 if self.demand.every_position and self.whole else 1)
        measuring = max(read, reading) + self._measured(plan.slice_variants)
        fixed = _SMALL + (_DEVICE_BYTES if self.widths.device_type != "cpu" else 0)
        at_once = max(passing + (0 if self.demand.every_position else reading), measuring)
        return fixed + max(lasting + at_once, self.results)

    @property
    def results(self) -> int:
        """What is alive while effects are made of all metrics."""
        return self._lasting() + self._values(4)

    def _lasting(self) -> int:
        """The batch, its tree and masks, both runs' residuals."""
        shape, widths = self.shape, self.widths
        n_masks = 1 + len({w for w in widths.spec.attention.window if w is not None and w < shape.padded})
        index = shape.slots * 8 * 2 + shape.nodes * 8 * 8
        masks = shape.padded**2 * (2 * n_masks + 8)
        # Both runs also where the next group begins.
        clean = shape.slots * widths.d + 4 * shape.nodes * widths.d + shape.nodes * widths.rope
        source = shape.slots * 4 * widths.d if self.demand.source else 0
        return index + masks + clean + source

    def _stacks(self, residuals: int) -> int:
        """Index tensors, tables and masks of stacks, one for each position that variants begin at."""
        if self.ends is None:
            return 0
        stacks = self.shape.n_pos if self.demand.pos_axes else 1
        rows = min(stacks * self.shape.n_prompts * self.ends, residuals // self.widths.d)
        masks = self.shape.padded**2 * (1 + len(set(self.widths.spec.attention.window)))
        return rows * (4 * 8 + self.widths.rope) + min(stacks, max(1, residuals // self.widths.d)) * masks

    def _values(self, copies: int) -> int:
        """Metrics of all variants."""
        measured, shape = self.demand.measured, self.shape
        each = measured.linear * 8 + measured.full * self.widths.wide + measured.per_token * shape.n_pos * 4
        return copies * self.demand.n_variants(shape.n_pos) * shape.n_prompts * each

    def _captured(self) -> int:
        """Bytes per token of what is kept of the clean run in a layer."""
        widths, sites = self.widths, self.demand.sites
        found = 0
        if sites & {"z", "attn_raw", "attn_out", "resid_mid", *ATTENTION}:
            found += widths.z + widths.d
            if widths.spec.post_norms or sites & {"attn_raw", "attn_out"}:
                found += 2 * widths.d
        if sites & ATTENTION:
            found += widths.qkv
        if sites & {"post", "mlp_raw", "mlp_out", "resid_post"}:
            found += widths.d
            found += widths.d if sites & {"post", "mlp_raw", "mlp_out"} else 0
            found += widths.post if "post" in sites else 0
            found += widths.d if widths.spec.post_norms and sites & {"post", "mlp_raw"} else 0
        if self.ends is not None:
            found += 3 * widths.kv
        return found

    def _beside(self) -> int:
        """What is captured of the clean and the source run in a layer, while all else goes through it."""
        shape, widths, demand = self.shape, self.widths, self.demand
        found = shape.nodes * self._captured()
        if demand.source:
            found += shape.slots * sum(widths.site(site) for site in demand.sites)
            found += shape.slots * shape.n_pos * widths.scores if demand.patterns else 0
        if demand.precision == "delta":
            found += shape.nodes * widths.recorded
        return found

    def _block(self, tokens: int, slots: int, n_keys: int, *, formed: bool) -> int:
        return self.widths.block(tokens, slots, n_keys, formed=formed, by_rows=self._by_rows)

    @property
    def _by_rows(self) -> bool:
        """Whether MLPs are computed some rows at a time."""
        demand = self.demand
        return self.widths.device_type == "cpu" and demand.precision == "exact" and not demand.sites & HIDDEN

    def _clean(self) -> int:
        widths, shape = self.widths, self.shape
        rounded = "exact" if self.demand.precision == "delta" else self.demand.precision
        block = self._block(shape.nodes, shape.slots, shape.padded, formed=widths.formed)
        return block + widths.products(shape.nodes, rounded)

    def _source(self) -> int:
        if not self.demand.source:
            return 0
        widths, shape = self.widths, self.shape
        formed = widths.formed or self.demand.patterns
        tokens = shape.n_prompts * shape.n_pos
        rounded = "exact" if self.demand.precision == "delta" else self.demand.precision
        return self._block(tokens, tokens, shape.n_pos, formed=formed) + widths.products(tokens, rounded)

    def _edited(self) -> int:
        """Bytes per token of edits in a step: the replacements, and the copy in which they are made."""
        widths, demand = self.widths, self.demand
        some = [widths.site(site) for site in demand.sites]
        return sum(some) + 2 * max(some) if demand.several else 3 * max(some)

    def _step(self, plan: Parts) -> int:
        """One step of a stack through a block."""
        shape, widths, precision = self.shape, self.widths, self.demand.precision
        n_variants = min(self.demand.n_variants(shape.n_pos), plan.group_variants)
        edited = self._edited() if self.demand.several or self.demand.sites & {"resid_pre"} else 0
        found = []
        if self.whole:
            tokens = min(max(plan.step_tokens, shape.nodes), n_variants * shape.nodes)
            slots = min(max(2 * plan.step_tokens, shape.slots), n_variants * shape.slots)
            found.append((tokens, shape.nodes, self._block(tokens, slots, shape.padded, formed=widths.formed)))
        if self.ends is not None:
            one = shape.n_prompts * self.ends
            tokens = min(max(plan.step_tokens, one), n_variants * one)
            scores = min(max(plan.score_bytes, self.score_bytes), n_variants * self.score_bytes)
            found.append((tokens, one, widths.ends(tokens, shape.slots, scores, by_rows=self._by_rows)))
        differences = precision == "delta"
        return max(
            block + tokens * edited + widths.products(tokens, precision) + (one * widths.recorded if differences else 0)
            for tokens, one, block in found
        )

    def _enter(self) -> int:
        """One variant that leaves the clean run."""
        shape, widths, sites = self.shape, self.widths, self.demand.sites
        rows = widths.filled_up(shape.nodes)
        found = rows * (self._captured() + 2 * self._edited() + 4 * widths.d)
        if "post" in sites:
            # Rows of W_out, as they are and in at least float32.
            n_neurons = NEURONS_AT_ONCE if self.demand.several else 1
            found += n_neurons * (widths.d + widths.spec.d_model * widths.wide)
        if widths.spec.post_norms:
            found += rows * 2 * widths.norm
        if sites & ATTENTION:
            share = 1.0 if self.demand.whole_sites else widths.spec.attention.group / widths.spec.n_heads
            scores = 5 * shape.slots * shape.padded * widths.scores if self.demand.patterns or widths.formed else 0
            again = rows * (3 * widths.qkv + 4 * widths.z) + shape.slots * (widths.qkv + 2 * widths.z) + scores
            found += int(again * share) + rows * 2 * widths.z
        return found

    def _measured(self, n_variants: int) -> int:
        """A slice of variants, normalised and compared with the unembedding."""
        measured, shape, widths = self.demand.measured, self.shape, self.widths
        d_model = widths.spec.d_model
        last, every = n_variants * shape.n_prompts, n_variants * shape.n_prompts * shape.n_pos
        found = [0]
        if measured.linear:
            found.append(last * d_model * 8 * 5)
        if measured.full:
            found.append(last * d_model * widths.wide * 5 + widths.tile(last, buffers=3))
        if measured.per_token:
            found.append(every * d_model * widths.wide * 5 + every * 16 + widths.tile(every))
        targets = shape.n_prompts * measured.n_targets * d_model * (widths.itemsize + 12)
        return max(found) + targets + last * d_model * widths.wide
