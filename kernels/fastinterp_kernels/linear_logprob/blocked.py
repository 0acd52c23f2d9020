"""``linear_logprob`` in plain torch, one cache-sized tile of logits at a time."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import TILE_BYTES, compute_dtype, finite_or_zero, target_logits
from fastinterp_kernels.linear_logprob.reference import LinearLogprob

_MAX_ROWS = 512
_MAX_COLUMNS = 2048


def linear_logprob_blocked(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    *,
    softcap: float | None = None,
) -> LinearLogprob:
    """``linear_logprob`` over tiles of at most ``TILE_BYTES``; float64 if an operand is, otherwise float32.

    Takes the arguments of ``linear_logprob``. Memory beyond the inputs: one tile, and copies of ``x`` and of
    one vocabulary tile of ``W_U`` where those are in a reduced dtype.
    """
    dtype = compute_dtype(x, W_U)
    return LinearLogprob(
        target_logit=target_logits(x, W_U, targets, b_U, softcap),
        logsumexp=_logsumexp(x.to(dtype), W_U, None if b_U is None else b_U.to(dtype), softcap),
    )


def _logsumexp(x: Tensor, W_U: Tensor, b_U: Tensor | None, softcap: float | None) -> Tensor:
    n_rows, d_vocab = x.shape[0], W_U.shape[1]
    n_elements = TILE_BYTES // x.element_size()
    row_step = max(1, min(n_rows, _MAX_ROWS))
    column_step = max(1, min(d_vocab, _MAX_COLUMNS, n_elements // row_step))
    bias = x.new_zeros(1).expand(d_vocab) if b_U is None else b_U
    buffer = torch.empty(row_step * column_step, dtype=x.dtype, device=x.device)
    # total = sum of exp(logit - shift) so far; a shift of -inf says that no finite logit has been seen.
    shift = torch.full((n_rows,), -math.inf, dtype=x.dtype, device=x.device)
    total = torch.zeros(n_rows, dtype=x.dtype, device=x.device)

    # Vocabulary outside, rows inside: W_U, the large operand, is read from memory once.
    for column in range(0, d_vocab, column_step):
        W = W_U[:, column : column + column_step].to(x.dtype)
        b = bias[column : column + column_step]
        for row in range(0, n_rows, row_step):
            x_rows = x[row : row + row_step]
            tile = buffer[: x_rows.shape[0] * W.shape[1]].view(x_rows.shape[0], W.shape[1])
            row_shift, row_total = shift[row : row + row_step], total[row : row + row_step]
            # The largest logit of the first tile is kept as the shift for as long as nothing overflows: the
            # sum is then at least 1 and needs no second look, and later tiles are spared the search for their
            # maximum.
            if column and bool(torch.isfinite(row_shift).all()):
                added = row_total + _tile_logits(tile, x_rows, W, b, softcap, row_shift).exp_().sum(1)
                if bool(torch.isfinite(added).all()):
                    row_total.copy_(added)
                    continue
            logits = _tile_logits(tile, x_rows, W, b, softcap, None)
            new_shift = torch.maximum(row_shift, logits.amax(1))
            safe_shift = finite_or_zero(new_shift)
            row_total.mul_((row_shift - safe_shift).exp_()).add_(logits.sub_(safe_shift[:, None]).exp_().sum(1))
            row_shift.copy_(new_shift)
    return total.log_().add_(finite_or_zero(shift))


def _tile_logits(tile: Tensor, x: Tensor, W: Tensor, b: Tensor, softcap: float | None, shift: Tensor | None) -> Tensor:
    """Fill ``tile`` with logits minus ``shift``; without a softcap, the subtraction rides on the product."""
    if softcap is None and shift is not None:
        torch.sub(b, shift[:, None], out=tile)
    else:
        tile.copy_(b.expand_as(tile))
    tile.addmm_(x, W)
    if softcap is not None:
        tile.div_(softcap).tanh_().mul_(softcap)
        if shift is not None:
            tile.sub_(shift[:, None])
    return tile
