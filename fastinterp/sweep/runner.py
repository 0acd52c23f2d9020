"""Runs all variants of a batch in one pass over the layers.

A variant whose first edit is in layer ``l`` equals the clean run below ``l``. So the pass carries the clean residual
and stacks of edited ones: at every layer a stack takes one step, and the variants of that layer join it. Each weight
matrix is then read once per layer for all variants, and no layer is computed for a variant before its edit. Residuals
are kept per node of the batch's prefix tree, so padding and repeated beginnings are not computed; variants that change
nothing in front of a position keep only the rows from there on, and see the clean run's keys and values.

    operations = rows x sum over variants of (what the edit changes of its layer + every block above)
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import OptionError
from fastinterp.model.attention import ready
from fastinterp.model.forward import block, block_at, embed, forward, forward_at
from fastinterp.model.intervene import SOURCE, Capture, Taps
from fastinterp.model.model import Model
from fastinterp.model.prefix import PrefixTree, prefix_tree
from fastinterp.model.products import Difference, Recorded
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights
from fastinterp.sweep.groups import Order, Planned, by_start, first_layer
from fastinterp.sweep.memory import SweepMemory, group_bytes, score_bytes, step_tokens
from fastinterp.sweep.precision import Precision, check_precision, clean_products, clean_weights
from fastinterp.sweep.resident import Resident
from fastinterp.sweep.rows import Rows
from fastinterp.sweep.source import SourceRun
from fastinterp.sweep.stack import CleanLayer, Stack
from fastinterp.sweep.variants import Variant

# Freed memory that a sweep of prompts' ends may hold. It holds more than it needs, since the clean run of whole prompts
# leaves holes that rows of single positions do not fill; where all rows are of whole prompts they are filled again.
_HELD_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Swept:
    """Final residuals of some variants.

    ``resid`` is ``[variant, batch, d_model]`` where one position was asked for, otherwise ``[variant, batch, pos,
    d_model]``; with a ``start`` these are the positions from ``start[b]`` on, and in front of them it is the clean run.
    """

    indices: list[int]
    resid: Float[Tensor, "variant batch *pos d_model"]
    start: Int[Tensor, " batch"] | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """The variants and a batch of prompts, where it is read, the run that ``SOURCE`` is, and how products are done."""

    model: Model
    variants: Sequence[Variant]
    tokens: Int[Tensor, "batch pos"]
    n_tokens: Int[Tensor, " batch"]
    tree: PrefixTree
    at: Int[Tensor, " batch"] | None = None
    source: Int[Tensor, "batch pos"] | None = None
    precision: Precision = "exact"
    step_tokens: int
    score_bytes: int

    def variant(self, index: int) -> Variant:
        """Returns a variant with its layers counted from the first."""
        return self.variants[index].resolved(self.model.spec)


@torch.no_grad()
def run_variants(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    variants: Sequence[Variant],
    *,
    n_tokens: Int[Tensor, " batch"] | None = None,
    at: Int[Tensor, " batch"] | None = None,
    source: Int[Tensor, "batch pos"] | None = None,
    residual_bytes: int | None = None,
    precision: Precision = "exact",
) -> Iterator[tuple[list[int], Float[Tensor, "variant batch *pos d_model"]]]:
    """Yields ``(indices into variants, final residuals)`` group by group until every variant has come once.

    Equivalent to ``forward(spec, weights, tokens, taps=Taps.of(n_layers, edits=variant.edits))`` for each variant, at
    real tokens; what stands at padding is undefined. :func:`sweep` gives the same without the tokens that no edit
    reaches.

    Args:
        tokens: right-padded prompts.
        n_tokens: their lengths; without it every position counts as real.
        at: read the final residual at this position of each prompt only; the last block then computes little else.
        source: the prompts of the run that replacements of ``SOURCE`` are taken from, of the same shape.
        residual_bytes: the residuals of one group's variants stay below this; by default 16 MiB (1 GiB on a GPU). The
            clean run goes on from group to group.
        precision: how the matrix products are done, see :func:`check_precision`.

    Raises:
        SiteRangeError: a layer, head or neuron that the model does not have.
        UnknownActivationError: a site that this architecture does not have.
        OptionError: an edit with ``SOURCE`` where there is no source; a precision that the model does not have; a site
            behind the final residual; in one variant and layer, sites that cannot be edited together.

    Memory: ``residual_bytes`` (twice that where every position is read) plus the activations of one step.
    """
    clean: Tensor | None = None
    for swept in sweep(
        model, tokens, variants,
        n_tokens=n_tokens, at=at, source=source, residual_bytes=residual_bytes, precision=precision,
    ):  # fmt: skip
        if swept.start is None or at is not None:
            yield swept.indices, swept.resid
            continue
        if clean is None:
            clean = forward(model.spec, clean_weights(model, precision), tokens)
        yield swept.indices, _filled(swept, clean)


def _filled(swept: Swept, clean: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "variant batch pos d_model"]:
    """Every position of variants of which only the ends were computed."""
    assert swept.start is not None
    pos = torch.arange(clean.shape[1], device=clean.device)
    where = (pos - swept.start[:, None]).clamp(0, swept.resid.shape[2] - 1)
    behind = swept.resid.gather(2, where[None, :, :, None].expand(len(swept.resid), -1, -1, clean.shape[-1]))
    return torch.where((pos >= swept.start[:, None])[..., None], behind, clean)


@torch.no_grad()
def sweep(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    variants: Sequence[Variant],
    *,
    n_tokens: Int[Tensor, " batch"] | None = None,
    at: Int[Tensor, " batch"] | None = None,
    source: Int[Tensor, "batch pos"] | None = None,
    residual_bytes: int | None = None,
    clean_first: bool = False,
    precision: Precision = "exact",
    memory: SweepMemory | None = None,
) -> Iterator[Swept]:
    """Like :func:`run_variants`, but where every position is read, with those alone that a variant can change.

    ``memory`` says how large groups and steps are, see :func:`~fastinterp.sweep.memory.plan_memory`; without it they
    have their usual size, and groups ``residual_bytes`` if given.

    With ``clean_first`` the clean run comes before them, as a variant without an index. It costs next to nothing where
    the last block has variants of its own, or only the ends of prompts are computed.
    """
    spec = model.spec
    check_precision(precision, model.dtype)
    if n_tokens is None:
        n_tokens = tokens.new_full((len(tokens),), tokens.shape[1])
    passing, apart, share = _sorted_out(spec, variants, has_source=source is not None)
    tree = prefix_tree(tokens, n_tokens, share=share)
    device = model.device.type
    job = Job(
        model=model, variants=variants, tokens=tokens, n_tokens=n_tokens, tree=tree, at=at, source=source,
        precision=precision,
        step_tokens=step_tokens(device) if memory is None else memory.step_tokens,
        score_bytes=score_bytes(device) if memory is None else memory.score_bytes,
    )  # fmt: skip
    starts: dict[tuple[int, ...], tuple[int, ...]] = {}
    order = Order(Planned.of(model, tree, n_tokens, i, job.variant(i), starts) for i in passing)
    del passing
    held = _HELD_BYTES if memory is None else memory.held_bytes
    if memory is None and order.whole:
        held = None
    owed = clean_first
    if residual_bytes is None:
        residual_bytes = group_bytes(device) if memory is None else memory.residual_bytes
    progress = _Progress(resident=Resident(model.device, held))
    for group, then in order.groups(residual_bytes):
        yield from _run_group(job, group, progress, then=then, clean_first=owed)
        owed = False
    if owed:
        yield Swept(indices=[], resid=_clean_forward(job)[None])
    for index in apart:
        yield _whole_forward(job, index, job.variant(index))


def _sorted_out(
    spec: ModelSpec, variants: Sequence[Variant], *, has_source: bool
) -> tuple[Sequence[int], list[int], bool]:
    """Checks the variants; returns which go through the layers together, which apart, and if all prompts can be alike.

    Raises:
        OptionError, SiteRangeError, UnknownActivationError: see :func:`run_variants`.
    """
    passing = array("q")  # There may be many thousands.
    apart: list[int] = []
    alike = True
    for i in range(len(variants)):
        variant = variants[i].resolved(spec)
        if not has_source and any(isinstance(edit.replacement, str) for edit in variant.edits):
            raise OptionError(f"an edit takes its values from {SOURCE!r}, and there is no source: give source=tokens")
        if variant.stage(spec) == "forward":
            apart.append(i)
        else:
            passing.append(i)
            alike = alike and all(edit.same_everywhere for edit in variant.edits)
    return passing, apart, alike


@dataclass(frozen=True, kw_only=True)
class _Begin:
    """Where a pass begins: the clean residual, and that of the source run, in front of a layer."""

    layer: int
    clean: Float[Tensor, "1 node d_model"]
    source: Float[Tensor, "batch pos d_model"] | None


@dataclass(kw_only=True)
class _Progress:
    """How far up the next pass can begin: groups come in the order of their first layers. What they leave behind."""

    resident: Resident
    begin: _Begin | None = None


def _run_group(job: Job, group: list[Planned], progress: _Progress, *, then: int, clean_first: bool) -> Iterator[Swept]:
    """One pass; in two halves, one after the other, where the memory is not enough.

    ``then`` is the first layer of the next group.
    """
    found: list[Swept] | None = None
    try:
        found = _passed(job, group, progress, then=then, clean_first=clean_first)
    except torch.OutOfMemoryError:
        if len(group) == 1:
            raise
    if found is None:
        if job.tokens.is_cuda:
            torch.cuda.empty_cache()
        half = len(group) // 2
        lower, upper = group[:half], group[half:]
        yield from _run_group(job, lower, progress, then=first_layer(upper), clean_first=clean_first)
        yield from _run_group(job, upper, progress, then=then, clean_first=False)
    else:
        while found:
            yield found.pop(0)


def _passed(job: Job, group: list[Planned], progress: _Progress, *, then: int, clean_first: bool) -> list[Swept]:
    """The results of one pass, of which nothing else stays alive but where the next one begins."""
    one = _Pass(job, group, progress.resident, progress.begin)
    found = list(one.run(then))
    progress.begin = one.reached
    if clean_first:
        found.insert(0, Swept(indices=[], resid=one.final_clean()[None]))
    return found


def _clean_forward(job: Job) -> Float[Tensor, "batch *pos d_model"]:
    spec, weights = job.model.spec, clean_weights(job.model, job.precision)
    if job.at is None:
        return forward(spec, weights, job.tokens)
    return forward_at(spec, weights, job.tokens, job.n_tokens, job.at)


def _whole_forward(job: Job, index: int, variant: Variant) -> Swept:
    """For edits outside of the blocks. There all differs from the clean run: with ``delta`` such a run is exact."""
    spec, weights = job.model.spec, clean_weights(job.model, job.precision)
    edits = SourceRun.resolve_all(spec, weights, job.source, variant.edits)
    final = forward(spec, weights, job.tokens, taps=Taps.of(spec.n_layers, edits=edits))
    if job.at is not None:
        final = final[torch.arange(len(final), device=final.device), job.at]
    return Swept(indices=[index], resid=final[None])


class _Pass:
    """One pass over the layers for a group of variants."""

    def __init__(self, job: Job, group: Sequence[Planned], resident: Resident, begin: _Begin | None = None) -> None:
        self.resident = resident
        self.job, self.spec, self.weights = job, job.model.spec, clean_weights(job.model, job.precision)
        self.clean = embed(self.weights, job.tokens, tree=job.tree) if begin is None else begin.clean
        self.whole = Rows.whole(self.spec, job.tree, self.clean.dtype)
        self.source: SourceRun | None = None
        if job.source is not None:
            known = None if begin is None or begin.source is None else (begin.layer, begin.source)
            self.source = SourceRun(job.model, job.source, clean_products(job.precision), begin=known)
        self.reached: _Begin | None = begin
        self.stacks = [self._stack(start, members) for start, members in by_start(group)]
        edits = (edit for stack in self.stacks for variant in stack.variants for edit in variant.edits)
        self.source_layers = 1 + max((e.layer for e in edits if isinstance(e.replacement, str)), default=-1)
        self.ends = any(stack.rows.start is not None for stack in self.stacks)
        self.first_layer = 0 if begin is None else begin.layer
        self.clean_layers, self.clean_at_rows = self.first_layer, False

    def _stack(self, start: tuple[int, ...] | None, members: list[Planned]) -> Stack:
        job, rows = self.job, self.whole
        if start is not None:
            begins = torch.tensor(start, device=job.tokens.device)
            rows = Rows.behind(self.spec, job.tree, begins, job.n_tokens, self.clean.dtype)
        return Stack(
            job.model,
            rows,
            [(each.index, job.variant(each.index)) for each in members],
            n_pos=job.tokens.shape[1],
            step_tokens=job.step_tokens,
            score_bytes=job.score_bytes,
            like=self.clean,
        )

    def run(self, then: int = 0) -> Iterator[Swept]:
        """Goes through the layers, and yields the stacks; remembers the last ones up to ``then`` that are known."""
        job = self.job
        for layer in range(self.first_layer, self.spec.n_layers):
            w = self.weights.blocks[layer]
            if layer <= then and self.clean_layers == layer and (self.source is None or self.source.layer == layer):
                source = None if self.source is None else self.source.resid
                self.reached = _Begin(layer=layer, clean=self.clean, source=source)
            reading = job.at if layer == self.spec.n_layers - 1 else None
            if not self._clean_needed(layer):
                clean = CleanLayer(layer=layer, w=w, frame=self.whole.frame, products=w.products)
            else:
                clean = self._clean_step(layer, w, reading)
            edits = [edit for stack in self.stacks for variant in stack.variants for edit in variant.at_layer(layer)]
            taken = {}
            if self.source is not None and layer < max(then, self.source_layers):
                taken = self.source.step(layer, edits)
            for stack in self.stacks:
                stack.step(clean, taken, reading)
            # Not while the next layer is computed.
            del clean, taken
            self.resident.check()
        while self.stacks:
            stack = self.stacks.pop(0)
            yield Swept(indices=stack.indices, resid=stack.final(job.at, self.clean), start=stack.rows.start)

    def _clean_needed(self, layer: int) -> bool:
        if self.ends or self.job.precision == "delta":
            return True
        return any(stack.first_to_enter(layer) is not None for stack in self.stacks)

    def _clean_step(self, layer: int, w: BlockWeights, reading: Int[Tensor, " batch"] | None) -> CleanLayer:
        """Runs the clean block, and shows what the variants that enter here are made from."""
        spec, frame = self.spec, self.whole.frame
        names = {name for stack in self.stacks for name in stack.captured(layer)}
        if self.ends:
            names |= {"k", "v"}
        taps = Taps.of(spec.n_layers, capture=[Capture(name=name, layers=(layer,)) for name in sorted(names)])
        resid_pre = self.clean
        self.clean_layers = layer + 1
        differences = self.job.precision == "delta"
        # Differences need the clean run at every row.
        at_rows = reading is not None and not differences and not names & {"q", "k", "v"}
        self.clean_at_rows = at_rows
        recorded = Recorded()
        if reading is not None and at_rows:
            self.clean = block_at(spec, w, layer, self.clean, frame, reading, taps)
        else:
            self.clean = block(spec, w.multiplied_by(recorded) if differences else w, layer, self.clean, frame, taps)
        values = {name: value[None] if at_rows else value for (name, _), value in taps.values.items()}
        ready_k = None
        if self.ends:
            ready_k = ready(spec, layer, values["k"], w.k_norm, frame)
        return CleanLayer(
            layer=layer, w=w, frame=frame, resid_pre=resid_pre, values=values, ready_k=ready_k, at_rows=at_rows,
            products=Difference(recorded) if differences else w.products,
        )  # fmt: skip

    def final_clean(self) -> Float[Tensor, "batch *pos d_model"]:
        """Takes the clean run through the layers that no variant needed it in, and returns its final residual."""
        at, tree = self.job.at, self.job.tree
        while self.clean_layers < self.spec.n_layers:
            layer = self.clean_layers
            self._clean_step(layer, self.weights.blocks[layer], at if layer == self.spec.n_layers - 1 else None)
            self.resident.check()
        if at is None:
            everywhere: Tensor = tree.spread(self.clean)[0, :, : self.job.tokens.shape[1]]
            return everywhere
        # The last block may have been computed at these positions alone.
        return self.clean[0] if self.clean_at_rows else self.clean[0, tree.nodes_at(at)]
