"""``direct_effect_loss`` in plain torch: one cache-sized tile of logits at a time, clean once and then per head.

A head is taken from the clean tile as ``z_h @ (W_O[h] @ W_U)`` and not as ``(z_h @ W_O[h]) @ W_U``, which would be
``d_model / d_head`` times as much work. Whatever stands under an exponential is kept in units of log 2, because torch's
``exp2`` is vectorised everywhere; its ``exp`` is left to a library that takes three times as long on some processors.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import TILE_BYTES
from fastinterp_kernels.direct_effect_loss.edits import Edits, HeadSums, evaluate, removed
from fastinterp_kernels.direct_effect_loss.reference import DirectEffect, Layer

_LOG2_E = math.log2(math.e)
_MAX_ROWS = 512
_MAX_COLUMNS = 2048
_CLEAN_BYTES = 16 * TILE_BYTES
_W_OV_BYTES = 4 * TILE_BYTES
_LARGEST_SIGMOID_SOFTCAP = 64.0


def direct_effect_loss_blocked(edits: Edits, *, kl: bool = False, rank: bool = False) -> DirectEffect:
    """``direct_effect_loss`` over tiles of at most ``TILE_BYTES``; float64 if an operand is, otherwise float32.

    Memory beyond the inputs and outputs: the clean logits of one tile's columns for as many rows as fit
    ``_CLEAN_BYTES`` (twice that, for ``kl`` with a softcap), ``W_O @ W_U`` for these columns and as many heads as fit
    ``_W_OV_BYTES`` (always for one), and a few tiles.
    """
    row_step = _CLEAN_BYTES // (_n_columns(edits) * edits.dtype.itemsize)
    return evaluate(edits, sum_heads_blocked, "blocked", row_step, kl=kl, rank=rank)


def sum_heads_blocked(
    edits: Edits, shift: Float[Tensor, " row"], raw_targets: Float[Tensor, "row head k"], out: HeadSums
) -> None:
    """What ``evaluate`` asks of a backend."""
    for tensor in out:
        if tensor is not None:
            tensor.zero_()
    sums = _Sums(edits, shift, raw_targets, out)
    for first in range(0, edits.W_U.shape[1], sums.n_columns):
        sums.add_columns(first)


def _n_columns(edits: Edits) -> int:
    n_rows = max(1, min(edits.x.shape[0], _MAX_ROWS))
    # Matrix products of a width that is no multiple of 64 run a tenth slower.
    fitting = TILE_BYTES // (n_rows * edits.dtype.itemsize) // 64 * 64
    return max(1, min(edits.W_U.shape[1], _MAX_COLUMNS, fitting))


class _Columns(NamedTuple):
    """One vocabulary tile of all rows. ``p`` and ``mean`` where ``drop`` is asked for."""

    W_U: tuple[Float[Tensor, "d_model column"], ...]
    raw: Float[Tensor, "row column"]
    """Clean logits in the units of ``_Sums``."""
    p: Float[Tensor, "row column"] | None
    """Clean probabilities."""
    mean: Float[Tensor, " row"] | None
    """Sum of clean probability times clean exponent."""
    first: int
    """The first column."""


class _Head(NamedTuple):
    """One head and its ``W_O @ W_U`` for the columns at hand."""

    layer: Layer
    local: int
    """Its place in the layer."""
    place: int
    """Its place among the heads of all layers."""
    W_OV: tuple[Float[Tensor, "d_head column"], ...]


class _Sums:
    """The buffers of one call and what is done to them, a vocabulary tile at a time.

    Raw logits are shifted and in units of log 2; with a softcap, in the units of the function that caps them. That is
    ``tanh(x) = 1 - 2 sigmoid(-2 x)``, in a fifth of the time of torch's ``tanh`` and exact for large logits, which
    count most. Its rounding error is relative to the softcap and not to the logit, so that a large softcap takes
    ``tanh``. An exponent is a softcapped and shifted logit in units of log 2.
    """

    def __init__(self, edits: Edits, shift: Tensor, raw_targets: Tensor, out: HeadSums) -> None:
        self.edits, self.shift, self.raw_targets, self.out = edits, shift[:, None].to(edits.dtype), raw_targets, out
        self.sigmoid = edits.softcap is not None and edits.softcap <= _LARGEST_SIGMOID_SOFTCAP
        self.scale = _LOG2_E if edits.softcap is None else (-2.0 if self.sigmoid else 1.0) / edits.softcap
        self.n_rows, self.n_columns = edits.x.shape[0], _n_columns(edits)
        self.row_step = max(1, min(self.n_rows, _MAX_ROWS))
        n_tile, n_clean = self.row_step * self.n_columns, self.n_rows * self.n_columns
        widest = max(layer.z.shape[2] for layer in edits.layers)
        self.raw, self.p = self._buffer(n_clean), self._buffer(n_clean if out.drop is not None else 0)
        self.tile, self.flags = self._buffer(n_tile), self._buffer(n_tile if out.larger is not None else 0)
        self.W_OV = self._buffer(max(_W_OV_BYTES // edits.dtype.itemsize, self.n_columns * widest))

    def _buffer(self, n_elements: int) -> Tensor:
        return torch.empty(n_elements, dtype=self.edits.dtype, device=self.edits.x.device)

    def add_columns(self, first: int) -> None:
        """Add one vocabulary tile of every row and head."""
        columns = self._clean_columns(first)
        for heads in self._head_groups(columns):
            for row in range(0, self.n_rows, self.row_step):
                self._add_heads(heads, slice(row, min(row + self.row_step, self.n_rows)), columns)

    def _clean_columns(self, first: int) -> _Columns:
        edits, span = self.edits, slice(first, first + self.n_columns)
        W_U = edits.parts(edits.W_U[:, span])
        raw = _view(self.raw, self.n_rows, W_U[0].shape[1])
        raw.copy_(self._raw(torch.zeros_like(self.shift) if edits.b_U is None else edits.b_U[span].to(edits.dtype)))
        p = mean = None
        if self.out.drop is not None:
            p, mean = _view(self.p, *raw.shape), torch.empty_like(self.shift[:, 0])
        for row in range(0, self.n_rows, self.row_step):
            rows = slice(row, row + self.row_step)
            _product(raw[rows], edits.parts(edits.x[rows]), W_U, raw[rows], self.scale)
            if self.out.clean_total is None:
                continue
            exponents = self._exponents_(_view(self.tile, *raw[rows].shape).copy_(raw[rows]), rows)
            if p is not None and mean is not None:
                mean[rows] = torch.linalg.vecdot(torch.exp2(exponents, out=p[rows]), exponents)
            self.out.clean_total[rows] += exponents.exp2_().sum(1)
        return _Columns(W_U, raw, p, mean, first)

    def _head_groups(self, columns: _Columns) -> Iterator[list[_Head]]:
        """Heads whose ``W_OV`` fits the buffer, which the next group overwrites."""
        width, place = columns.raw.shape[1], 0
        for layer in self.edits.layers:
            n_heads, d_head = layer.z.shape[1:]
            # The heads' W_O is copied for a reduced dtype or precision, and fits the same size.
            step = max(1, self.W_OV.numel() // (d_head * max(width, layer.W_O.shape[2])))
            for first in range(0, n_heads, step):
                W_O = self.edits.parts(layer.W_O[first : first + step].flatten(0, 1))
                W_OV = _view(self.W_OV, W_O[0].shape[0], width)
                _product(W_OV, W_O, columns.W_U)
                parts = [part.unflatten(0, (-1, d_head)) for part in self.edits.parts(W_OV)]
                yield [_Head(layer, first + i, place + first + i, of_head) for i, of_head in enumerate(zip(*parts))]
            place += n_heads

    def _add_heads(self, heads: list[_Head], rows: slice, columns: _Columns) -> None:
        raw, first, last = columns.raw[rows], heads[0].place, heads[-1].place + 1
        tile = _view(self.tile, *raw.shape)
        totals = torch.empty((len(heads), raw.shape[0]), dtype=raw.dtype, device=raw.device)
        for head, total in zip(heads, totals):
            away = self.edits.parts(removed(head.layer, rows, head.local, self.edits.dtype))
            _product(tile, away, head.W_OV, raw, -self.scale)
            if self.out.larger is not None:
                self._count_larger(tile, rows, head.place, columns)
            exponents = self._exponents_(tile, rows)
            if self.out.drop is not None and columns.p is not None and columns.mean is not None:
                mean = torch.linalg.vecdot(columns.p[rows], exponents)
                self.out.drop[rows, head.place] += (columns.mean[rows] - mean) / _LOG2_E
            torch.sum(exponents.exp2_(), 1, out=total)
        self.out.total[rows, first:last] += totals.T

    def _count_larger(self, raw: Tensor, rows: slice, place: int, columns: _Columns) -> None:
        """Count tokens above each target, which is itself left out: its two logits are rounded differently."""
        if self.out.larger is None:
            return
        larger = _view(self.flags, *raw.shape)
        ids = self.edits.targets[rows] - columns.first
        above = torch.lt if self.sigmoid else torch.gt  # the sigmoid's argument falls with the logit
        for j in range(ids.shape[1]):
            above(raw, self._raw(self.raw_targets[rows, place, j, None], rows), out=larger)
            own = ((ids[:, j] >= 0) & (ids[:, j] < raw.shape[1])).nonzero()[:, 0]
            larger[own, ids[own, j]] = 0.0
            self.out.larger[rows, place, j] += larger.sum(1).long()

    def _raw(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        """Raw logits in the units of tiles."""
        return (logits - self.shift[rows] if self.edits.softcap is None else logits) * self.scale

    def _exponents_(self, raw: Tensor, rows: slice) -> Tensor:
        """A tile of raw logits, softcapped and shifted, in place."""
        softcap, shift = self.edits.softcap, self.shift[rows]
        if softcap is None:
            return raw
        if self.sigmoid:
            return torch.sub((softcap - shift) * _LOG2_E, raw.sigmoid_(), alpha=2.0 * softcap * _LOG2_E, out=raw)
        return raw.tanh_().mul_(softcap * _LOG2_E).sub_(shift * _LOG2_E)


def _view(buffer: Tensor, n_rows: int, n_columns: int) -> Tensor:
    return buffer[: n_rows * n_columns].view(n_rows, n_columns)


def _product(
    out: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], base: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """``out = base + alpha * a @ b`` of split operands, small terms first; see ``common.add_product_``."""
    if len(a) == 2 and len(b) == 2:
        low = _product(out, a[1:], b[:1], base, alpha)
        base = _product(out, a[:1], b[1:], low, alpha)
    if base is None and alpha == 1.0:
        return torch.mm(a[0], b[0], out=out)
    return torch.addmm(out.zero_() if base is None else base, a[0], b[0], alpha=alpha, out=out)
