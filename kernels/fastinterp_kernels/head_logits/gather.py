"""Single logits of every head by the gather formula, ``z . (W_O[h] u)``: no vocabulary, torch alone."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import IGNORED

_BLOCK_BYTES = 4 * 2**20
"""Size of one temporary."""

_WEIGHT_BYTES = 16 * 2**20
"""Size of the part of W_O that is converted at once, at least one head."""


def per_row_directions(
    layers: Sequence[tuple[Tensor, Tensor]], directions: Float[Tensor, "row d_model"], dtype: torch.dtype
) -> Float[Tensor, "row head"]:
    """``(z[t, h] @ W_O[h]) . directions[t]``, as ``z[t, h] . (W_O[h] @ directions[t])``."""
    out = _empty(layers, (), dtype)
    for heads, z, weight in _weights(layers, dtype):
        step = max(1, _BLOCK_BYTES // (weight.shape[0] * dtype.itemsize))
        for row in range(0, z.shape[0], step):
            rows = slice(row, row + step)
            written = directions[rows].to(dtype) @ weight.T
            out[rows, heads] = written.view(z[rows].shape).mul_(z[rows].to(dtype)).sum(2)
    return out


def shared_directions(
    layers: Sequence[tuple[Tensor, Tensor]], directions: Float[Tensor, "d_model m"], dtype: torch.dtype
) -> Float[Tensor, "row head m"]:
    """``(z[t, h] @ W_O[h]) @ directions``, as ``z[t, h] @ (W_O[h] @ directions)``."""
    out = _empty(layers, (directions.shape[1],), dtype)
    for heads, z, weight in _weights(layers, dtype):
        step = max(1, _BLOCK_BYTES // (max(weight.shape) * dtype.itemsize))
        for column in range(0, directions.shape[1], step):
            columns = slice(column, column + step)
            written = (weight @ directions[:, columns].to(dtype)).unflatten(0, z.shape[1:])
            row_step = max(1, _BLOCK_BYTES // (max(z.shape[2], written.shape[2]) * dtype.itemsize))
            for head in range(z.shape[1]):
                for row in range(0, z.shape[0], row_step):
                    rows = slice(row, row + row_step)
                    out[rows, heads.start + head, columns] = z[rows, head].to(dtype) @ written[head]
    return out


def target_contributions(
    layers: Sequence[tuple[Tensor, Tensor]],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row m"],
    dtype: torch.dtype,
) -> Float[Tensor, "row head m"]:
    """Every head's logit of the targets, NaN where ignored; a target that many rows share is unembedded once.

    2 d_head d_model operations for each different target and head, 2 d_head for each row, target and head.
    """
    out = _empty(layers, (targets.shape[1],), dtype).fill_(math.nan)
    rows, places = (targets != IGNORED).nonzero(as_tuple=True)
    ids, order = targets[rows, places].long().sort()
    rows, places = rows[order], places[order]
    for heads, z, weight in _weights(layers, dtype):
        step = max(1, _BLOCK_BYTES // (max(weight.shape) * dtype.itemsize))
        for pair in range(0, len(ids), step):
            pairs = slice(pair, pair + step)
            different, index = ids[pairs].unique_consecutive(return_inverse=True)
            # Rows of the transpose: index_select(1, ..) would copy a W_U that is not row-major whole.
            columns = W_U.T.index_select(0, different).to(dtype).T
            written = (weight @ columns).T.index_select(0, index)
            values = written.view(-1, *z.shape[1:]).mul_(z.index_select(0, rows[pairs]).to(dtype)).sum(2)
            out[rows[pairs], heads, places[pairs]] = values
    return out


def _empty(layers: Sequence[tuple[Tensor, Tensor]], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    n_heads = sum(z.shape[1] for z, _ in layers)
    z = layers[0][0]
    return torch.empty((z.shape[0], n_heads, *shape), dtype=dtype, device=z.device)


def _weights(
    layers: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "row head d_head"], Float[Tensor, "head_d_head d_model"]]]:
    """Which heads of the output, their z, and their W_O with one row for each entry of z, some heads at a time."""
    first = 0
    for z, W_O in layers:
        if not z.shape[1]:
            continue
        step = max(1, _WEIGHT_BYTES // (W_O.shape[1] * W_O.shape[2] * dtype.itemsize))
        for some_z, some_W_O in zip(z.split(step, dim=1), W_O.split(step)):
            heads = slice(first, first + some_z.shape[1])
            yield heads, some_z, some_W_O.flatten(0, 1).to(dtype)
            first = heads.stop
