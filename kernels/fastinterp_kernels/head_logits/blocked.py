"""``head_logits`` in plain torch, one cache-sized tile of logits at a time.

A tile is ``[column, row]``: maxima of neighbouring columns are then elementwise maxima of whole rows of memory, and
the weights ``W_O[h] @ W_U`` of neighbouring tokens lie side by side.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import IGNORED, Precision, finite_or_zero, operand_parts
from fastinterp_kernels.head_logits.plan import COLUMN_MULTIPLE, Block, Engine
from fastinterp_kernels.head_logits.reference import HeadLogits, Wanted
from fastinterp_kernels.head_logits.topk import PARENT, best_groups, members

GROUP = 8
"""Columns to a group, of which the first pass of top-k keeps the maximum; the second looks at k groups."""

TILE_BYTES = 2 * 2**20  # of logits: products with few terms to a sum are slower in smaller tiles, which stay nearer
_WEIGHT_BYTES = 26 * 2**20  # W_O[h] @ W_U of the heads that are built together: wide products are faster
_EXTREME_BYTES = 26 * 2**20  # maxima and minima of the groups, of one head
_KEPT_BYTES = 30 * 2**20
_VECTOR_BYTES = 4 * 2**20
_MAX_ROWS = 512
_MAX_TILE_COLUMNS = 8192
_BUILD_COLUMNS = 512
_DIAGONAL = 256  # rows of a product of which the diagonal is wanted
_ROW_MULTIPLE = 16  # of fewer rows, what a product rounds to can depend on where in a tile a column stands


class Weights(NamedTuple):
    """``W`` and, where its columns lie in memory one after the other, the same memory by groups of columns."""

    W: Float[Tensor, "d column"]
    groups: Float[Tensor, "group group_d"] | None


class _Tile(NamedTuple):
    """Where the logits of some columns go, and what is to be reduced of them: operation, input, axis, output."""

    columns: slice
    logits: Float[Tensor, "column row"]
    scratch: Float[Tensor, "column row"]
    extremes: list[tuple[Callable[..., Tensor], Tensor, int, Tensor]]


class BlockedEngine(Engine):
    """Products of operands that are rounded to ``precision`` beforehand, in float32 or float64."""

    def __init__(self, wanted: Wanted, dtype: torch.dtype, device: torch.device, precision: Precision) -> None:
        self.wanted, self.dtype, self.device, self.precision = wanted, dtype, device, precision
        self.sides = {"largest": True, "smallest": False} if wanted.bottom else {"largest": True}
        self._buffers: dict[str, Tensor] = {}
        self._tiles: dict[tuple[int, int, bool], list[_Tile]] = {}

    def head_block(self, n_rows: int, d_head: int, d_vocab: int) -> Block:
        rows = min(n_rows, _MAX_ROWS)
        column_bytes = d_head * self.dtype.itemsize
        by_extremes = _EXTREME_BYTES * GROUP // (2 * rows * self.dtype.itemsize)
        columns = self._columns(min(_WEIGHT_BYTES // column_bytes, by_extremes), d_vocab)
        return Block(heads=max(1, _WEIGHT_BYTES // (column_bytes * min(columns, d_vocab))), rows=rows, columns=columns)

    def vector_block(self, n_vectors: int, d_model: int, d_vocab: int) -> Block:
        rows = max(1, min(n_vectors, _MAX_ROWS, _VECTOR_BYTES // (d_model * self.dtype.itemsize)))
        row_bytes = max(rows, _ROW_MULTIPLE) * self.dtype.itemsize
        return Block(heads=1, rows=rows, columns=self._columns(_KEPT_BYTES // row_bytes, d_vocab))

    def _columns(self, at_most: int, d_vocab: int) -> int:
        columns = max(1, at_most // COLUMN_MULTIPLE, -(-2 * self.wanted.k // COLUMN_MULTIPLE)) * COLUMN_MULTIPLE
        return min(columns, -(-d_vocab // COLUMN_MULTIPLE) * COLUMN_MULTIPLE)

    def head_weights(
        self, W_O: Float[Tensor, "head d_head d_model"], W_U: Float[Tensor, "d_model column"]
    ) -> list[Weights]:
        n_heads, d_head, _ = W_O.shape
        n_columns = W_U.shape[1]
        n_groups = -(-n_columns // GROUP)
        written = self.buffer("weights", n_heads * n_groups, GROUP * d_head).view(n_heads, n_groups * GROUP, d_head)
        written[:, n_columns:] = 0.0
        directions = W_O.flatten(0, 1).to(self.dtype).T
        # All heads in one product, then each to its own place, where the second pass finds a group in one piece.
        product = self.buffer("product", _BUILD_COLUMNS, n_heads * d_head)
        for first in range(0, n_columns, _BUILD_COLUMNS):
            columns = W_U[:, first : first + _BUILD_COLUMNS].T.to(self.dtype)
            n = columns.shape[0]
            torch.mm(columns, directions, out=product[:n])
            written[:, first : first + n] = product[:n].unflatten(1, (n_heads, d_head)).transpose(0, 1)
        return [Weights(one[:n_columns].T, one.view(n_groups, GROUP * d_head)) for one in written]

    def vector_weights(self, W_U: Float[Tensor, "d_model column"]) -> list[Weights]:
        return [Weights(W_U, None)]

    def reduce(
        self,
        x: Float[Tensor, "head row d"],
        weights: list[Weights],
        targets: Int[Tensor, "head row m"] | None,
        thresholds: Float[Tensor, "head row m"] | None,
    ) -> HeadLogits:
        n_rows, found = x.shape[1], []
        if targets is not None and thresholds is not None and n_rows < _ROW_MULTIPLE:  # copies of a token have to tie
            x, thresholds = _with_rows(x, 0.0), _with_rows(thresholds, 0.0)
            targets = _with_rows(targets, IGNORED)
        for head, weight in enumerate(weights):
            rank = None
            if targets is not None and thresholds is not None:
                rank = _Rank(targets[head], thresholds[head])
            found.append(_OneHead(self, x[head], weight).run(rank))
        return HeadLogits(*(None if each[0] is None else torch.stack(each)[:, :n_rows] for each in zip(*found)))

    def diagonal(self, x: Float[Tensor, "head row d"], weights: list[Weights]) -> Float[Tensor, "head row"]:
        out = torch.empty(x.shape[:2], dtype=self.dtype, device=self.device)
        for values, vectors, weight in zip(out, _with_rows(x, 0.0), weights):
            if len(values) < _ROW_MULTIPLE:  # columns as rows: not so few that a product of another kind is chosen
                weight = Weights(weight.W.repeat(1, _ROW_MULTIPLE), None)
            one = _OneHead(self, vectors, weight)
            for first in range(0, len(vectors), _DIAGONAL):
                first = max(0, min(first, len(values) - _ROW_MULTIPLE))
                some = slice(first, min(first + _DIAGONAL, max(len(values), _ROW_MULTIPLE)))
                rows = slice(first, min(first + _DIAGONAL, len(vectors)))
                shape = (some.stop - some.start, rows.stop - rows.start)
                product = torch.empty(shape, dtype=self.dtype, device=self.device)
                values[some] = one.logits(some, product, rows).diagonal()[: len(values) - first]
        return out

    def buffer(self, name: str, n_rows: int, n_columns: int) -> Tensor:
        """Memory that the next block uses again: fresh pages would cost as much as the products."""
        size = n_rows * n_columns
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
            self._tiles.clear()
        return self._buffers[name][:size].view(n_rows, n_columns)

    def extremes(self, side: str, n_rows: int, n_columns: int) -> tuple[Tensor, Tensor]:
        """Where the extremes of the groups, ``[group, row]``, and of the whole parents, ``[parent, row]``, go."""
        n_groups = -(-n_columns // GROUP)
        return self.buffer(side, n_groups, n_rows), self.buffer(f"{side} of parents", n_groups // PARENT, n_rows)

    def tiles(self, n_rows: int, n_columns: int, keep: bool) -> list[_Tile]:
        """The tiles of a block; made once for its size, since a view takes as long as a small product."""
        if (n_rows, n_columns, keep) not in self._tiles:
            step = TILE_BYTES // (self.dtype.itemsize * n_rows) // (GROUP * PARENT) * (GROUP * PARENT)
            step = max(4 * GROUP * PARENT, min(step, _MAX_TILE_COLUMNS))
            kept = self.buffer("kept", n_columns, n_rows) if keep else None
            tile, scratch = self.buffer("tile", step, n_rows), self.buffer("scratch", step, n_rows)
            ends = {side: self.extremes(side, n_rows, n_columns) for side in (self.sides if self.wanted.k else ())}
            found = []
            for first in range(0, n_columns, step):
                columns = slice(first, min(first + step, n_columns))
                n = columns.stop - first
                logits = tile[:n] if kept is None else kept[columns]
                steps = [one for side in ends for one in _extremes(logits, columns, self.sides[side], *ends[side])]
                found.append(_Tile(columns, logits, scratch[:n], steps))
            self._tiles[n_rows, n_columns, keep] = found
        return self._tiles[n_rows, n_columns, keep]


def _with_rows(x: Float[Tensor, "head row m"], value: float) -> Float[Tensor, "head padded_row m"]:
    """More rows, up to a multiple of ``_ROW_MULTIPLE``."""
    padded: Tensor = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % _ROW_MULTIPLE), value=value)
    return padded


def _extremes(
    logits: Float[Tensor, "column row"],
    columns: slice,
    largest: bool,
    groups: Float[Tensor, "group row"],
    parents: Float[Tensor, "parent row"],
) -> list[tuple[Callable[..., Tensor], Tensor, int, Tensor]]:
    """The steps that give extremes of the groups of a tile, of which the last may be smaller, and of its parents."""
    reduce = torch.amax if largest else torch.amin
    here = groups[columns.start // GROUP : -(-columns.stop // GROUP)]
    n_whole, n_parents = len(logits) // GROUP, len(here) // PARENT
    first = columns.start // GROUP // PARENT
    steps = []
    if n_whole:
        steps.append((reduce, logits[: n_whole * GROUP].unflatten(0, (n_whole, GROUP)), 1, here[:n_whole]))
    if n_whole < len(here):
        steps.append((reduce, logits[n_whole * GROUP :], 0, here[n_whole]))
    if n_parents:
        some = here[: n_parents * PARENT].unflatten(0, (n_parents, PARENT))
        steps.append((reduce, some, 1, parents[first : first + n_parents]))
    return steps


class _Rank:
    """Counts logits above thresholds; a target's own column never does, should its logit differ by rounding."""

    def __init__(self, targets: Int[Tensor, "row m"], thresholds: Float[Tensor, "row m"]) -> None:
        self.count = torch.zeros(thresholds.shape, dtype=torch.int64, device=thresholds.device)
        self._thresholds = thresholds.T.contiguous()
        rows, places = (targets != IGNORED).nonzero(as_tuple=True)
        self._columns, order = targets[rows, places].sort()
        self._rows, self._places = rows[order], places[order]

    def add(self, first: int, logits: Float[Tensor, "column row"], scratch: Float[Tensor, "column row"]) -> None:
        for place, threshold in enumerate(self._thresholds):
            # 1 or 0 as float: a sum of booleans takes several times longer.
            self.count[:, place] += torch.gt(logits, threshold, out=scratch).sum(0).long()
        ends = torch.searchsorted(self._columns, torch.tensor([first, first + len(logits)], device=logits.device))
        own = slice(*ends.tolist())
        rows, places = self._rows[own], self._places[own]
        if len(rows):
            value = logits[self._columns[own] - first, rows]
            self.count[rows, places] -= (value > self._thresholds[places, rows]).long()


class _OneHead:
    """What is wanted of ``x @ W``, in one or two passes over tiles of it."""

    def __init__(self, engine: BlockedEngine, x: Float[Tensor, "row d"], weights: Weights) -> None:
        self.engine, self.wanted, self.weights = engine, engine.wanted, weights
        self.n_rows, self.n_columns = x.shape[0], weights.W.shape[1]
        self.x_parts = operand_parts(x, engine.precision, engine.dtype)
        self.columns_of_x = tuple(part.T.contiguous() for part in self.x_parts)
        self.rows_of_W = weights.W.T
        # Logits of W_U itself are dear: they are kept for the second pass of top-k, others are computed again.
        self.keep = self.wanted.k > 0 and weights.groups is None

    def run(self, rank: _Rank | None) -> HeadLogits:
        total = torch.zeros(self.n_rows, dtype=self.engine.dtype, device=self.engine.device)
        for columns, logits, scratch, extremes in self.engine.tiles(self.n_rows, self.n_columns, self.keep):
            self.logits(columns, logits)
            for reduce, values, axis, out in extremes:
                reduce(values, axis, out=out)
            if rank is not None:
                rank.add(columns.start, logits, scratch)
            if self.wanted.logsumexp:
                total += torch.exp(logits, out=scratch if self.keep else logits).sum(0)
        found = HeadLogits(
            logsumexp=self._logsumexp(total) if self.wanted.logsumexp else None,
            rank=None if rank is None else rank.count,
        )
        if self.wanted.k:
            found = found._replace(**dict(zip(("top_values", "top_ids"), self._topk("largest"))))
            if self.wanted.bottom:
                found = found._replace(**dict(zip(("bottom_values", "bottom_ids"), self._topk("smallest"))))
        return found

    def logits(
        self, columns: slice, out: Float[Tensor, "column row"], rows: Int[Tensor, " some"] | slice | None = None
    ) -> Float[Tensor, "column row"]:
        """Fill ``out`` with the logits of these columns, of all rows or some."""
        x = self.columns_of_x if rows is None else tuple(part[:, rows] for part in self.columns_of_x)
        W = operand_parts(self.rows_of_W[columns], self.engine.precision, self.engine.dtype)
        if len(W) == 1:
            return torch.mm(W[0], x[0], out=out)
        # Without the product of the two small parts, 2^-16 of the whole. Small terms first.
        return torch.mm(W[1], x[0], out=out).addmm_(W[0], x[1]).addmm_(W[0], x[0])

    def _logsumexp(self, total: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """A head's contributions are small: exp had no shift. Rows where that fails are computed again with one."""
        out = total.log()
        rows = (~((total > 1e-25) & torch.isfinite(total))).nonzero()[:, 0]
        if not len(rows):
            return out
        tiles = [t.columns for t in self.engine.tiles(self.n_rows, self.n_columns, self.keep)]
        buffer = self.engine.buffer("tile", tiles[0].stop, len(rows))
        twice = (self.logits(columns, buffer[: columns.stop - columns.start], rows) for columns in tiles * 2)
        shift = finite_or_zero(torch.stack([logits.amax(0) for logits in itertools.islice(twice, len(tiles))]).amax(0))
        sums = torch.stack([logits.sub_(shift).exp_().sum(0) for logits in twice])
        out[rows] = sums.sum(0).log_().add_(shift)
        return out

    def _topk(self, side: str) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
        """The best of the members of the best groups, best first."""
        largest = self.engine.sides[side]
        k = min(self.wanted.k, self.n_columns)
        groups = best_groups(*self.engine.extremes(side, self.n_rows, self.n_columns), k, largest)
        ids = members(groups, GROUP)
        if self.weights.groups is None:
            logits = self.engine.buffer("kept", self.n_columns, self.n_rows).T.gather(
                1, ids.clamp_max(self.n_columns - 1)
            )
        else:
            logits = self._recompute(groups, self.weights.groups)
        if self.n_columns % GROUP:
            logits.masked_fill_(ids >= self.n_columns, -math.inf if largest else math.inf)
        values, index = logits.topk(k, largest=largest)
        ids = ids.gather(1, index)
        beyond = ids >= self.n_columns
        if bool(beyond.any()):  # NaN comes after what is missing, where the smallest are wanted
            values.masked_fill_(beyond & logits.isnan().any(1, keepdim=True), math.nan)
        return values, ids.clamp_max_(self.n_columns - 1)

    def _recompute(
        self, groups: Int[Tensor, "row some"], W: Float[Tensor, "group group_d"]
    ) -> Float[Tensor, "row some_group"]:
        """The logits of some groups of columns, different ones for each row."""
        out = torch.empty((self.n_rows, groups.shape[1] * GROUP), dtype=self.engine.dtype, device=W.device)
        step = max(1, TILE_BYTES // (groups.shape[1] * W.shape[1] * W.itemsize))
        for first in range(0, self.n_rows, step):
            rows = slice(first, first + step)
            columns = W.index_select(0, groups[rows].flatten()).view(-1, out.shape[1], W.shape[1] // GROUP)
            W_parts = operand_parts(columns, self.engine.precision, self.engine.dtype)
            x_parts = [part[rows, None] for part in self.x_parts]
            # Rows from the left: a product with a vector on the right is several times slower.
            logits = torch.bmm(x_parts[0], W_parts[0].mT)
            if len(W_parts) == 2:
                logits += torch.bmm(x_parts[1], W_parts[0].mT) + torch.bmm(x_parts[0], W_parts[1].mT)
            out[rows] = logits[:, 0]
        return out
