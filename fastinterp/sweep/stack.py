"""Edited runs that are carried through the layers together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.model.attention import SHARED_NORM, SPLIT_INPUTS, Frame
from fastinterp.model.forward import block, block_at
from fastinterp.model.intervene import Edit, Taps
from fastinterp.model.mlp import mlp_residual
from fastinterp.model.model import Model
from fastinterp.model.products import EXACT, Exact, Products
from fastinterp.model.weights import BlockWeights
from fastinterp.sweep.entering import Entrance, captured_for
from fastinterp.sweep.rows import Rows, at_positions
from fastinterp.sweep.source import sourced
from fastinterp.sweep.taps import stack_edits
from fastinterp.sweep.variants import Variant

_ORDER = {"block": 0, "heads": 1, "post": 2}

# Edits of these make a block do products head by head, and form its scores.
_FORMED = ("result",)
_SCORES = ("pattern", "attn_scores")
_SPLIT_PRODUCTS = (*SPLIT_INPUTS, *_FORMED, *_SCORES)


@dataclass(frozen=True, kw_only=True)
class CleanLayer:
    """The clean run in one layer: ``[1, node, ...]``; ``values`` at the rows that are read where ``at_rows``.

    Empty where nobody needs it. ``products`` are those of the edited runs, at all nodes.
    """

    layer: int
    w: BlockWeights
    frame: Frame
    resid_pre: Float[Tensor, "1 node d_model"] | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
    ready_k: Float[Tensor, "1 node kv_head d_head"] | None = None
    at_rows: bool = False
    products: Products = EXACT

    def multiplied_at(self, node: Int[Tensor, " row"] | None) -> BlockWeights:
        """Returns the weights as edited runs are multiplied with them at some of the nodes."""
        return self.w.multiplied_by(self.products.at(node))


class Stack:
    """The residuals of variants that are computed at the same rows, in the order in which they enter."""

    def __init__(
        self,
        model: Model,
        rows: Rows,
        members: Sequence[tuple[int, Variant]],
        *,
        n_pos: int,
        step_tokens: int,
        score_bytes: int,
        like: Tensor,
    ) -> None:
        spec = self.spec = model.spec
        members = sorted(members, key=lambda m: (m[1].first_layer, _ORDER[m[1].stage(spec)], _way(m[1].edits)))
        self.indices = [index for index, _ in members]
        self.variants = [variant for _, variant in members]
        self.stages = [variant.stage(spec) for variant in self.variants]
        sites = {edit.site for variant in self.variants for edit in variant.edits}
        self.may_clash = not (sites.isdisjoint(SHARED_NORM) or sites.isdisjoint(SPLIT_INPUTS))
        self.may_split = not sites.isdisjoint(_SPLIT_PRODUCTS)
        self.rows, self.n_pos = rows, n_pos
        # Tokens that go through a block together, and bytes of the scores of prompts' ends, which attention forms.
        self.step_tokens, self.score_bytes = step_tokens, score_bytes
        self._dtype, self._device = like.dtype, like.device
        self._resid: Tensor | None = None
        self.entered = 0

    @property
    def resid(self) -> Float[Tensor, "variant row_or_batch d_model"]:
        """The residuals; not made before the first variant enters, while the clean block takes its memory."""
        if self._resid is None:
            self._resid = self._new(self.rows.n_rows)
        return self._resid

    def _new(self, n_rows: int) -> Float[Tensor, "variant row_or_batch d_model"]:
        return torch.empty(len(self.variants), n_rows, self.spec.d_model, dtype=self._dtype, device=self._device)

    def first_to_enter(self, layer: int) -> int | None:
        """The first layer, from this one on, at which a variant enters."""
        return min((v.first_layer for v in self.variants if v.first_layer >= layer), default=None)

    def captured(self, layer: int) -> set[str]:
        """What the variants that enter at a layer need of the clean run."""
        entering = (variant for variant in self.variants[self.entered :] if variant.first_layer == layer)
        return {name for variant in entering for name in captured_for(self.spec, variant)}

    def step(self, clean: CleanLayer, taken: Mapping[str, Tensor], reading: Int[Tensor, " batch"] | None) -> None:
        """Takes the stack through a block, with the variants that enter there.

        With ``reading``, in the last layer, only those positions are kept: ``[variant, batch, d_model]``.
        """
        layer = clean.layer
        new = {
            stage: [i for i, v in enumerate(self.variants) if v.first_layer == layer and self.stages[i] == stage]
            for stage in _ORDER
        }
        if reading is None and not self.entered and not any(new.values()):
            return
        for i in new["block"]:
            assert clean.resid_pre is not None
            self.resid[i] = self.rows.of_clean(clean.resid_pre)[0]
        through = self.entered + len(new["block"])
        self.entered = through + len(new["heads"]) + len(new["post"])
        edits = {i: sourced(self.variants[i].at_layer(layer), taken) for i in range(self.entered)}
        out = self.resid if reading is None else self._new(len(reading))
        self._through_block(clean, out, range(through), edits, reading)
        rows = self.rows if reading is None else at_positions(self.rows.tree, self.rows.frame, reading)
        if new["heads"] or new["post"]:
            entrance = Entrance(
                spec=self.spec, w=clean.w, layer=layer, clean=clean.values, rows=rows, sequences=clean.frame,
                n_pos=self.n_pos, at_rows=clean.at_rows,
            )  # fmt: skip
            for i in new["heads"]:
                out[i] = entrance.enter(edits[i], "heads")[0]
            for i in new["post"]:
                out[i] = entrance.enter(edits[i], "post")[0]
        if not self.spec.parallel:
            self._through_mlp(clean, out, new["heads"], edits, rows)
        self._resid = out

    def _through_block(
        self,
        clean: CleanLayer,
        out: Float[Tensor, "variant row_or_batch d_model"],
        members: range,
        edits: Mapping[int, Sequence[Edit]],
        reading: Int[Tensor, " batch"] | None,
    ) -> None:
        if not members:
            return
        spec, rows, frame = self.spec, self.rows, self.rows.frame
        if rows.start is not None:
            assert clean.ready_k is not None
            frame = rows.seeing(clean.ready_k, clean.values["v"])
        w = clean.multiplied_at(rows.node)
        size = self._step_variants()
        runs: Iterable[range] = [members]
        if self.may_split and not isinstance(clean.products, Exact):
            runs = _alike(members, edits)
        elif self.may_clash:
            runs = _compatible(members, edits)
        for part in (part for run in runs for part in self._parts(run, size)):
            resid = self.resid[part.start : part.stop]
            taps = self._taps(part, edits, rows)
            if reading is None:
                out[part.start : part.stop] = block(spec, w, clean.layer, resid, frame, taps)
            elif rows.start is None and not taps.edits:
                out[part.start : part.stop] = block_at(spec, w, clean.layer, resid, frame, reading)
            else:
                whole = block(spec, w, clean.layer, resid, frame, taps)
                out[part.start : part.stop] = rows.read(whole, reading)

    def _through_mlp(
        self, clean: CleanLayer, out: Tensor, members: Sequence[int], edits: Mapping[int, Sequence[Edit]], rows: Rows
    ) -> None:
        """The second half of the block, for variants that entered in front of it."""
        if not members:
            return
        size = max(1, self.step_tokens // rows.n_rows)
        w = clean.multiplied_at(rows.node)
        for part in self._parts(range(members[0], members[-1] + 1), size):
            resid = out[part.start : part.stop]
            found = mlp_residual(self.spec, w, clean.layer, resid, self._taps(part, edits, rows), reuse=True)
            if found.data_ptr() != resid.data_ptr():
                resid.copy_(found)

    def _taps(self, part: range, edits: Mapping[int, Sequence[Edit]], rows: Rows) -> Taps:
        return Taps(edits=stack_edits([edits[i] for i in part], rows.row, rows.pos, self.n_pos))

    def _step_variants(self) -> int:
        rows, tree = self.rows, self.rows.tree
        if rows.start is None:
            # Attention spreads keys and values over all positions, whatever the tree saves elsewhere.
            return max(1, self.step_tokens // max(tree.n_nodes, tree.node.numel() // 2))
        n_keys = int(rows.start.max()) + rows.width
        scores = rows.n_rows * self.spec.n_heads * n_keys * self._dtype.itemsize
        return max(1, min(self.step_tokens // rows.n_rows, self.score_bytes // scores))

    @staticmethod
    def _parts(members: range, size: int) -> list[range]:
        return [members[i : i + size] for i in range(0, len(members), size)]

    def final(
        self, at: Int[Tensor, " batch"] | None, clean: Float[Tensor, "1 node_or_batch d_model"]
    ) -> Float[Tensor, "variant batch *pos d_model"]:
        """Returns the final residuals; ``clean`` is the clean run's, which holds in front of ``start``."""
        rows = self.rows
        if at is not None:
            if rows.start is None:
                return self.resid
            unchanged = clean[0, rows.tree.nodes_at(at)]
            return torch.where((at < rows.start)[:, None], unchanged, self.resid)
        if rows.start is not None:
            apart: Tensor = self.resid.unflatten(1, (len(rows.start), rows.width))
            return apart
        return rows.tree.spread(self.resid)[:, :, : self.n_pos]


def _edits_norm(edits: Sequence[Edit]) -> bool:
    return any(edit.site in SHARED_NORM for edit in edits)


def _way(edits: Sequence[Edit]) -> tuple[bool, ...]:
    """Whether these edits are of the heads' norm, and what of a block is done head by head for them."""
    sites = {edit.site for edit in edits}
    return _edits_norm(edits), *(not sites.isdisjoint(each) for each in (SPLIT_INPUTS, _FORMED, _SCORES))


def _alike(members: range, edits: Mapping[int, Sequence[Edit]]) -> Iterator[range]:
    """Cuts members where a block does the products of one differently from those of the next.

    What is done head by head is not rounded: in one run, all the others would not be either.
    """
    begin = members.start
    for i in members[1:]:
        if _way(edits[i]) != _way(edits[i - 1]):
            yield range(begin, i)
            begin = i
    yield range(begin, members.stop)


def _compatible(members: range, edits: Mapping[int, Sequence[Edit]]) -> Iterator[range]:
    """Cuts members where one edits the norm that all heads share, and another inputs that heads norm by themselves.

    No block can be run with both, and no single variant has both.
    """
    begin, before = members.start, None
    for i in members:
        norm = _edits_norm(edits[i])
        if not norm and not any(edit.site in SPLIT_INPUTS for edit in edits[i]):
            continue
        if before is not None and norm != before:
            yield range(begin, i)
            begin = i
        before = norm
    yield range(begin, members.stop)
