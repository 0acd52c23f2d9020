"""``linear_cross_entropy`` in plain torch, one cache-sized tile of logits at a time."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastinterp_kernels.common import (
    IGNORED,
    TILE_BYTES,
    add_product_,
    compute_dtype,
    finite_or_zero,
    operand_parts,
    target_logits,
)
from fastinterp_kernels.linear_cross_entropy.gradient import Problem, Slopes, rows_of_problem, rows_of_slopes
from fastinterp_kernels.linear_cross_entropy.reference import LinearCrossEntropy

_MAX_ROWS = 512
_MAX_COLUMNS = 2048
_ROWS_OF_THRESHOLDS = 64
_COPY_BYTES = 8 * TILE_BYTES  # of a vocabulary tile of W_U, or of the gradient, where its dtype differs


def forward_blocked(problem: Problem) -> tuple[LinearCrossEntropy, Tensor | None]:
    """The results over tiles of at most ``TILE_BYTES`` together; float64 if an operand is, otherwise float32.

    Memory beyond the inputs: the tiles, and copies of 512 rows of ``x`` and of one vocabulary tile of ``W_U``
    where those are rounded or in another dtype.
    """
    x, W_U, targets, b_U, kl_from, softcap, rank, top1, _ = problem
    target_logit = target_logits(x, W_U, targets, b_U, softcap)
    if not rank and not top1 and kl_from is None:
        return LinearCrossEntropy(target_logit, _logsumexp(problem)), None
    state = _reductions(problem)
    logsumexp = state.total.log() + finite_or_zero(state.shift)
    kl = kl_logsumexp = None
    if kl_from is not None:
        kl_logsumexp = state.kl_total.log() + finite_or_zero(state.kl_shift)
        kl = (state.cross / state.kl_total - kl_logsumexp + logsumexp).clamp_min(0.0)
    nan = logsumexp.isnan()
    ranks = state.larger.masked_fill_((targets == IGNORED) | nan[:, None], -1) if rank else None
    best = state.best_id.masked_fill_(nan, -1) if top1 else None
    return LinearCrossEntropy(target_logit, logsumexp, ranks, best, kl), kl_logsumexp


def backward_blocked(problem: Problem, slopes: Slopes) -> Tensor:
    """The gradient with respect to ``x``: logits again, tile by tile, and their product with ``W_U.T``.

    Memory beyond ``forward_blocked``: a tile of slopes; for an ``x`` in a reduced dtype, float32 sums of as
    many rows as fit 8 MiB.
    """
    x = problem.x
    dtype = compute_dtype(x, problem.W_U)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
    n_rows = x.shape[0]
    if x.dtype != dtype:
        n_rows = max(1, _COPY_BYTES // max(1, x.shape[1] * dtype.itemsize))
    for row in range(0, x.shape[0], max(1, n_rows)):
        rows = slice(row, row + n_rows)
        wide = dx[rows].to(dtype)
        _add_gradient_(wide, rows_of_problem(problem, rows), rows_of_slopes(slopes, rows))
        if wide.dtype != dx.dtype:
            dx[rows] = wide
    return dx


# Tiles ------------------------------------------------------------------------------------------------------


class _Tiles:
    """The walk over tiles: vocabulary outside, rows inside, so that W_U, the large operand, is read once.

    ``buffers``: how many tiles are held at a time; they share ``TILE_BYTES``.
    """

    def __init__(self, problem: Problem, n_buffers: int) -> None:
        self.problem = problem
        self.dtype = compute_dtype(problem.x, problem.W_U)
        (n_rows, d_model), d_vocab = problem.x.shape, problem.W_U.shape[1]
        n_elements = TILE_BYTES // (n_buffers * self.dtype.itemsize)
        self.row_step = max(1, min(n_rows, _MAX_ROWS))
        self.column_step = max(1, min(d_vocab, _MAX_COLUMNS, n_elements // self.row_step))
        if problem.precision != "exact" or problem.W_U.dtype != self.dtype:
            self.column_step = min(self.column_step, max(64, _COPY_BYTES // (d_model * self.dtype.itemsize)))
        size = self.row_step * self.column_step
        self._buffers = torch.empty((n_buffers, size), dtype=self.dtype, device=problem.x.device)
        self.bias = problem.x.new_zeros(1, dtype=self.dtype).expand(d_vocab)
        if problem.b_U is not None:
            self.bias = problem.b_U.to(self.dtype)

    def columns(self) -> range:
        return range(0, self.problem.W_U.shape[1], self.column_step)

    def rows(self) -> list[slice]:
        n_rows = self.problem.x.shape[0]
        return [slice(row, min(row + self.row_step, n_rows)) for row in range(0, n_rows, self.row_step)]

    def weight(self, column: int) -> tuple[Tensor, ...]:
        return self.parts(self.problem.W_U[:, column : column + self.column_step])

    def parts(self, operand: Tensor) -> tuple[Tensor, ...]:
        return operand_parts(operand, self.problem.precision, self.dtype)

    def buffer(self, index: int, n_rows: int, n_columns: int) -> Tensor:
        return self._buffers[index, : n_rows * n_columns].view(n_rows, n_columns)

    def logits(
        self, index: int, x: tuple[Tensor, ...], W: tuple[Tensor, ...], column: int, shift: Tensor | None = None
    ) -> Tensor:
        """Logits before the softcap, minus ``shift``, in the buffer ``index``; the subtraction rides on the product."""
        tile = self.buffer(index, x[0].shape[0], W[0].shape[1])
        b = self.bias[column : column + W[0].shape[1]]
        if shift is None:
            tile.copy_(b.expand_as(tile))
        else:
            torch.sub(b, shift[:, None], out=tile)
        return add_product_(tile, x, W)


def _soft_cap_(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


# Forward ----------------------------------------------------------------------------------------------------


def _logsumexp(problem: Problem) -> Tensor:
    """The logsumexp alone, with fewer passes over a tile than ``_reductions`` makes."""
    tiles, softcap = _Tiles(problem, 1), problem.softcap
    # total = sum of exp(logit - shift) so far; a shift of -inf says that no finite logit has been seen.
    shift = tiles.bias.new_full((problem.x.shape[0],), -math.inf)
    total = torch.zeros_like(shift)
    for column in tiles.columns():
        W = tiles.weight(column)
        for rows in tiles.rows():
            x, row_shift, row_total = tiles.parts(problem.x[rows]), shift[rows], total[rows]
            # The largest logit of the first tile is kept as the shift for as long as nothing overflows: the
            # sum is then at least 1 and needs no second look, and later tiles are spared the search for their
            # maximum.
            if column and bool(torch.isfinite(row_shift).all()):
                logits = tiles.logits(0, x, W, column, row_shift if softcap is None else None)
                if softcap is not None:
                    logits = _soft_cap_(logits, softcap).sub_(row_shift[:, None])
                added = row_total + logits.exp_().sum(1)
                if bool(torch.isfinite(added).all()):
                    row_total.copy_(added)
                    continue
            logits = _soft_cap_(tiles.logits(0, x, W, column), softcap)
            safe_shift, scale = _raise_shift_(row_shift, logits.amax(1))
            row_total.mul_(scale).add_(logits.sub_(safe_shift[:, None]).exp_().sum(1))
    return total.log_().add_(finite_or_zero(shift))


def _raise_shift_(shift: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Raise ``shift`` to ``maximum``; returns what to subtract from logits, and the factor for earlier sums."""
    new_shift = torch.maximum(shift, maximum)
    safe_shift = finite_or_zero(new_shift)
    scale = (shift - safe_shift).exp_()
    shift.copy_(new_shift)
    return safe_shift, scale


class _State(NamedTuple):
    """Running reductions per row: views of some rows may be updated in place."""

    shift: Tensor  # largest softcapped logit so far
    total: Tensor  # sum of exp(logit - shift)
    kl_shift: Tensor
    kl_total: Tensor
    cross: Tensor  # sum of exp(kl_logit - kl_shift) (kl_logit - logit)
    best: Tensor  # largest logit so far, before the softcap
    best_id: Tensor
    larger: Tensor  # [row, k] tokens whose logit is larger than the target's

    def rows(self, rows: slice) -> "_State":
        return _State(*(value[rows] for value in self))


def _reductions(problem: Problem) -> _State:
    n_buffers = 1 + (problem.rank or problem.kl_from is not None) + (problem.kl_from is not None)
    tiles = _Tiles(problem, n_buffers)
    lowest = tiles.bias.new_full((3, problem.x.shape[0]), -math.inf)
    sums = torch.zeros_like(lowest)
    count = torch.zeros(problem.targets.shape, dtype=torch.long, device=lowest.device)
    best_id = torch.zeros(problem.x.shape[0], dtype=torch.long, device=lowest.device)
    state = _State(lowest[0], sums[0], lowest[1], sums[1], sums[2], lowest[2], best_id, count)
    thresholds = _thresholds(tiles) if problem.rank else None
    for column in tiles.columns():
        W = tiles.weight(column)
        for rows in tiles.rows():
            part = state.rows(rows)
            logits = tiles.logits(0, tiles.parts(problem.x[rows]), W, column)
            maximum = logits.amax(1)
            if thresholds is not None:
                _count_larger_(part.larger, logits, thresholds[rows], problem.targets[rows] - column, tiles)
            if problem.top1:
                _update_best_(part, logits, maximum, column)
            logits, maximum = _soft_cap_(logits, problem.softcap), _soft_cap_(maximum, problem.softcap)
            difference = None
            if problem.kl_from is not None:
                kl_logits = tiles.logits(1, tiles.parts(problem.kl_from[rows]), W, column)
                kl_logits = _soft_cap_(kl_logits, problem.softcap)
                difference = torch.sub(kl_logits, logits, out=tiles.buffer(2, *logits.shape))
            safe_shift, scale = _raise_shift_(part.shift, maximum)
            part.total.mul_(scale).add_(logits.sub_(safe_shift[:, None]).exp_().sum(1))
            if difference is not None:
                _add_divergence_(part, kl_logits, difference)
    return state


def _thresholds(tiles: _Tiles) -> Tensor:
    """Logits of the targets before the softcap, by the same arithmetic as in a tile, so that equal ones stay equal.

    The diagonal of a small matrix product, whose elements are the sums of a large one.
    """
    problem = tiles.problem
    out = torch.empty(problem.targets.shape, dtype=tiles.dtype, device=problem.x.device)
    for row in range(0, problem.x.shape[0], _ROWS_OF_THRESHOLDS):
        rows = slice(row, row + _ROWS_OF_THRESHOLDS)
        x = tiles.parts(problem.x[rows])
        for j, ids in enumerate(problem.targets[rows].clamp_min(0).T):
            W = tiles.parts(problem.W_U.index_select(1, ids))
            out[rows, j] = add_product_(tiles.bias[ids].repeat(len(ids), 1), x, W).diagonal()
    return out


def _count_larger_(count: Tensor, logits: Tensor, thresholds: Tensor, targets: Tensor, tiles: _Tiles) -> None:
    """Add the number of larger logits; ``targets`` are counted from the tile's first column."""
    larger = tiles.buffer(1, *logits.shape)  # floats: their sum is several times as fast as that of booleans
    for j in range(count.shape[1]):
        count[:, j] += torch.gt(logits, thresholds[:, j, None], out=larger).sum(1).long()
    # Never the target itself, should its two logits differ by rounding after all.
    own = logits.gather(1, targets.clamp(0, logits.shape[1] - 1))
    count -= ((own > thresholds) & (targets >= 0) & (targets < logits.shape[1])).long()


def _update_best_(state: _State, logits: Tensor, maximum: Tensor, column: int) -> None:
    """A strictly larger maximum brings its id. Few rows improve after the first tiles, so few are searched."""
    improved = (maximum > state.best).nonzero()[:, 0]
    if len(improved):
        state.best[improved] = maximum[improved]
        state.best_id[improved] = logits[improved].argmax(1) + column


def _add_divergence_(state: _State, kl_logits: Tensor, difference: Tensor) -> None:
    safe_shift, scale = _raise_shift_(state.kl_shift, kl_logits.amax(1))
    weights = kl_logits.sub_(safe_shift[:, None]).exp_()
    added = difference.mul_(weights).sum(1)
    if bool(added.isnan().any()):  # -inf - -inf: a token that both sides exclude adds nothing
        added = difference.masked_fill_(weights == 0, 0.0).sum(1)
    state.kl_total.mul_(scale).add_(weights.sum(1))
    state.cross.mul_(scale).add_(added)


# Backward ---------------------------------------------------------------------------------------------------


def _add_gradient_(dx: Tensor, problem: Problem, slopes: Slopes) -> None:
    assert slopes.q is not None
    tiles = _Tiles(problem, 2 + (slopes.p is not None))
    for column in tiles.columns():
        W = tiles.weight(column)
        transposed = tuple(part.mT for part in W)
        for rows in tiles.rows():
            logits = _soft_cap_(tiles.logits(0, tiles.parts(problem.x[rows]), W, column), problem.softcap)
            through = None
            if problem.softcap is not None:  # 1 - (logits / softcap)^2
                through = torch.mul(logits, logits, out=tiles.buffer(1, *logits.shape))
                through.mul_(-1.0 / problem.softcap**2).add_(1.0)
            slope = _softmax_(logits, slopes.logsumexp[rows]).mul_(slopes.q[rows, None])
            if slopes.p is not None:
                assert problem.kl_from is not None
                assert slopes.kl_logsumexp is not None
                kl_logits = tiles.logits(2, tiles.parts(problem.kl_from[rows]), W, column)
                p = _softmax_(_soft_cap_(kl_logits, problem.softcap), slopes.kl_logsumexp[rows])
                slope.sub_(p.mul_(slopes.p[rows, None]))
            if slopes.target is not None:
                _add_at_targets_(slope, slopes.target[rows], problem.targets[rows] - column)
            if through is not None:
                slope.mul_(through)
            add_product_(dx[rows], tiles.parts(slope), transposed)


def _softmax_(logits: Tensor, logsumexp: Tensor) -> Tensor:
    """In place; a row of -inf alone gets zeros."""
    return logits.sub_(logsumexp.masked_fill(logsumexp == -math.inf, 0.0)[:, None]).exp_()


def _add_at_targets_(tile: Tensor, values: Tensor, targets: Tensor) -> None:
    """``targets`` are counted from the tile's first column; those of another tile add nothing."""
    inside = (targets >= 0) & (targets < tile.shape[1])
    tile.scatter_add_(1, targets.clamp(0, tile.shape[1] - 1), values.masked_fill(~inside, 0.0))
