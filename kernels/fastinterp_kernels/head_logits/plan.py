"""The two orders in which head logits are computed, for any way to reduce a block of them.

By weights: build ``W_O[h] @ W_U`` for some heads and a slab of the vocabulary, then multiply every row by it:
2 d_head d_vocab (d_model + rows) operations a head. By results: write the heads to the residual stream, then unembed
these vectors: 2 d_model d_vocab rows. The second is cheaper for few rows.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import IGNORED
from fastinterp_kernels.head_logits.gather import target_contributions
from fastinterp_kernels.head_logits.reference import HeadLogits, Wanted

COLUMN_MULTIPLE = 1024
"""A slab of the vocabulary starts at a multiple of this, which keeps the alignment of W_U."""

_THRESHOLD_ROWS = 512

Layers = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is worked on at once: at most so many heads, rows of each, and columns of the vocabulary.

    ``columns`` is a multiple of ``COLUMN_MULTIPLE`` and at least 2 k, so that the first slab has k columns.
    """

    heads: int
    rows: int
    columns: int


class Engine(ABC):
    """How a backend multiplies and reduces one block; ``weights`` are in the form that it wants."""

    wanted: Wanted
    dtype: torch.dtype  # of results and of what is added up

    @abstractmethod
    def head_block(self, n_rows: int, d_head: int, d_vocab: int) -> Block:
        """The block of :meth:`reduce` for :meth:`head_weights` that keeps within the memory."""

    @abstractmethod
    def vector_block(self, n_vectors: int, d_model: int, d_vocab: int) -> Block:
        """The block of :meth:`reduce` for :meth:`vector_weights`; ``heads`` is 1."""

    @abstractmethod
    def head_weights(self, W_O: Float[Tensor, "head d_head d_model"], W_U: Float[Tensor, "d_model column"]) -> Any:
        """``W_O[h] @ W_U``; valid until the next call."""

    @abstractmethod
    def vector_weights(self, W_U: Float[Tensor, "d_model column"]) -> Any:
        """``W_U``; valid until the next call."""

    @abstractmethod
    def reduce(
        self,
        x: Float[Tensor, "head row d"],
        weights: Any,
        targets: Int[Tensor, "head row m"] | None,
        thresholds: Float[Tensor, "head row m"] | None,
    ) -> HeadLogits:
        """What is wanted of ``x[h] @ weights[h]``, with fields ``[head, row, ..]``; ``target_logit`` is not returned.

        Ids count from the first column, k is at most the number of columns. ``rank`` counts what is above
        ``thresholds``, the target's own column aside: that is column ``targets``, -1 for none of these.
        """

    @abstractmethod
    def diagonal(self, x: Float[Tensor, "head row d"], weights: Any) -> Float[Tensor, "head row"]:
        """Row i's product with column i, with the sums that :meth:`reduce` forms, so that equal logits stay equal."""


def tiled_head_logits(
    layers: Layers, W_U: Float[Tensor, "d_model d_vocab"], wanted: Wanted, engine: Engine
) -> HeadLogits:
    """``head_logits`` block by block."""
    z = layers[0][0]
    target_logit = None if wanted.targets is None else target_contributions(layers, W_U, wanted.targets, engine.dtype)
    job = _Job(z, W_U, sum(z.shape[1] for z, _ in layers), wanted, engine, target_logit)
    if job.empty:
        return job.out
    first = 0
    # Heads of neighbouring layers share a pass over W_U where they go by their results.
    for few_rows, some in itertools.groupby((layer for layer in layers if layer[0].shape[1]), _by_result):
        some_layers = list(some)
        if few_rows:
            job.by_results(first, some_layers)
        else:
            job.by_weights(first, some_layers)
        first += sum(z.shape[1] for z, _ in some_layers)
    return job.finish()


def tiled_vector_logits(
    vectors: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    wanted: Wanted,
    engine: Engine,
    target_logit: Float[Tensor, "row head m"] | None,
) -> HeadLogits:
    """``vector_logits`` block by block, as one head."""
    job = _Job(vectors, W_U, 1, wanted, engine, target_logit)
    if job.empty:
        return job.out
    block = engine.vector_block(vectors.shape[0], vectors.shape[1], W_U.shape[1])
    for rows in _slices(vectors.shape[0], block.rows):
        job.vectors(vectors[None, rows].to(job.dtype), rows, slice(0, 1), block.columns)
    return job.finish()


def result_is_cheaper(n_rows: int, d_head: int, d_model: int) -> bool:
    """Whether rows @ W_O @ W_U takes fewer operations from the left than from the right (d_vocab is large)."""
    return n_rows * d_model < d_head * (d_model + n_rows)


def _by_result(layer: tuple[Tensor, Tensor]) -> bool:
    z, W_O = layer
    return result_is_cheaper(z.shape[0], W_O.shape[1], W_O.shape[2])


class _Job:
    """One call: the inputs, and the outputs that blocks are merged into."""

    def __init__(
        self, rows: Tensor, W_U: Tensor, n_heads: int, wanted: Wanted, engine: Engine, target_logit: Tensor | None
    ) -> None:
        self.W_U, self.wanted, self.engine = W_U, wanted, engine
        self.dtype = engine.dtype
        shape = (rows.shape[0], n_heads)
        self.empty = not wanted.needs_vocabulary or 0 in shape
        self.out = HeadLogits(target_logit=target_logit)
        if wanted.k:
            self._add_fields(rows, shape, "top", -math.inf)
            if wanted.bottom:
                self._add_fields(rows, shape, "bottom", math.inf)
        if wanted.logsumexp:
            total = torch.full(shape, -math.inf, dtype=self.dtype, device=rows.device)
            self.out = self.out._replace(logsumexp=total)
        if wanted.rank and target_logit is not None:
            count = torch.zeros(target_logit.shape, dtype=torch.int64, device=rows.device)
            self.out = self.out._replace(rank=count)

    def _add_fields(self, rows: Tensor, shape: tuple[int, int], side: str, worst: float) -> None:
        values = torch.full((*shape, self.wanted.k), worst, dtype=self.dtype, device=rows.device)
        ids = torch.zeros((*shape, self.wanted.k), dtype=torch.int64, device=rows.device)
        self.out = self.out._replace(**{f"{side}_values": values, f"{side}_ids": ids})

    def by_weights(self, first: int, layers: Layers) -> None:
        for z, W_O in layers:
            block = self.engine.head_block(z.shape[0], z.shape[2], self.W_U.shape[1])
            for some in _slices(z.shape[1], block.heads):
                heads = slice(first + some.start, first + some.stop)
                x = z[:, some].transpose(0, 1)
                thresholds = self._head_thresholds(x, W_O[some])
                for columns in _slices(self.W_U.shape[1], block.columns, COLUMN_MULTIPLE):
                    weights = self.engine.head_weights(W_O[some], self.W_U[:, columns])
                    for rows in _slices(z.shape[0], block.rows):
                        targets = self._targets(rows, columns, x.shape[0])
                        above = None if thresholds is None else thresholds[:, rows]
                        found = self.engine.reduce(x[:, rows].to(self.dtype), weights, targets, above)
                        self._merge(found, rows, heads, columns.start)
            first += z.shape[1]

    def by_results(self, first: int, layers: Layers) -> None:
        pairs = [(z[:, i], W_O[i]) for z, W_O in layers for i in range(z.shape[1])]
        n_rows = pairs[0][0].shape[0]
        block = self.engine.vector_block(n_rows * len(pairs), *self.W_U.shape)
        for some in _slices(len(pairs), max(1, block.rows // n_rows)):
            for rows in _slices(n_rows, block.rows):
                results = [z[rows].to(self.dtype) @ W_O.to(self.dtype) for z, W_O in pairs[some]]
                heads = slice(first + some.start, first + some.stop)
                self.vectors(torch.stack(results), rows, heads, block.columns)

    def vectors(self, x: Float[Tensor, "head row d_model"], rows: slice, heads: slice, n_columns: int) -> None:
        """Unembed vectors that belong to these rows and heads, all with the same weights."""
        n_heads = x.shape[0]
        flat = x.flatten(0, 1)[None]
        thresholds = self._vector_thresholds(flat, rows, n_heads)
        for columns in _slices(self.W_U.shape[1], n_columns, COLUMN_MULTIPLE):
            weights = self.engine.vector_weights(self.W_U[:, columns])
            targets = self._targets(rows, columns, n_heads)
            found = self.engine.reduce(
                flat, weights, None if targets is None else targets.flatten(0, 1)[None], thresholds
            )
            apart = (None if field is None else field[0].unflatten(0, (n_heads, -1)) for field in found)
            self._merge(HeadLogits(*apart), rows, heads, columns.start)

    def _targets(self, rows: slice, columns: slice, n_heads: int) -> Int[Tensor, "head row m"] | None:
        """The targets, counted from the first of these columns, -1 for others."""
        if self.out.rank is None or self.wanted.targets is None:
            return None
        ids = self.wanted.targets[rows].long()
        here = (ids >= columns.start) & (ids < columns.stop)
        targets: Tensor = (ids - columns.start).masked_fill(~here, IGNORED)
        return targets.expand(n_heads, ids.shape[0], ids.shape[1])

    def _head_thresholds(
        self, x: Float[Tensor, "head row d_head"], W_O: Float[Tensor, "head d_head d_model"]
    ) -> Float[Tensor, "head row m"] | None:
        """The logits of the targets as ``reduce`` finds them, for ranks."""
        if self.out.rank is None or self.wanted.targets is None:
            return None
        out = torch.empty((*x.shape[:2], self.wanted.targets.shape[1]), dtype=self.dtype, device=x.device)
        for rows in _slices(x.shape[1], _THRESHOLD_ROWS):
            for place, ids in enumerate(self.wanted.targets[rows].clamp_min(0).T):
                weights = self.engine.head_weights(W_O, self.W_U.T.index_select(0, ids).T)
                out[:, rows, place] = self.engine.diagonal(x[:, rows].to(self.dtype), weights)
        return out

    def _vector_thresholds(
        self, x: Float[Tensor, "1 head_row d_model"], rows: slice, n_heads: int
    ) -> Float[Tensor, "1 head_row m"] | None:
        if self.out.rank is None or self.wanted.targets is None:
            return None
        out = torch.empty((*x.shape[:2], self.wanted.targets.shape[1]), dtype=self.dtype, device=x.device)
        for place, ids in enumerate(self.wanted.targets[rows].clamp_min(0).T):
            columns = self.W_U.T.index_select(0, ids.repeat(n_heads)).T
            out[..., place] = self.engine.diagonal(x, self.engine.vector_weights(columns))
        return out

    def _merge(self, found: HeadLogits, rows: slice, heads: slice, first_column: int) -> None:
        """Take in the fields ``[head, row, ..]`` of one block, after those of earlier columns."""
        so_far = HeadLogits(*(None if field is None else field[rows, heads] for field in self.out))
        found = HeadLogits(*(None if field is None else field.transpose(0, 1) for field in found))
        if so_far.rank is not None and found.rank is not None:
            so_far.rank.add_(found.rank)
        if so_far.logsumexp is not None and found.logsumexp is not None:
            torch.logaddexp(so_far.logsumexp, found.logsumexp, out=so_far.logsumexp)
        for values, ids, new_values, new_ids in (
            (so_far.top_values, so_far.top_ids, found.top_values, found.top_ids),
            (so_far.bottom_values, so_far.bottom_ids, found.bottom_values, found.bottom_ids),
        ):
            if values is None or ids is None or new_values is None or new_ids is None:
                continue
            new_ids = new_ids + first_column
            if first_column:
                largest = values is so_far.top_values
                new_values, new_ids = torch.cat([values, new_values], 2), torch.cat([ids, new_ids], 2)
                new_values, index = new_values.topk(self.wanted.k, largest=largest)
                new_ids = new_ids.gather(2, index)
            values[..., : new_values.shape[2]] = new_values
            ids[..., : new_ids.shape[2]] = new_ids

    def finish(self) -> HeadLogits:
        if self.out.rank is not None and self.wanted.targets is not None:
            self.out.rank.masked_fill_((self.wanted.targets == IGNORED)[:, None], -1)
        return self.out


def _slices(n: int, step: int, multiple: int = 1) -> Iterator[slice]:
    """Consecutive slices up to ``n`` of about equal length, at most ``step``, all but the last a ``multiple``."""
    width = max(1, -(-n // max(1, -(-n // step))))
    width = -(-width // multiple) * multiple
    for start in range(0, n, width):
        yield slice(start, min(n, start + width))
