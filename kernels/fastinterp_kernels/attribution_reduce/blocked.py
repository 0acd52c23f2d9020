"""``attribution_reduce`` in plain torch, one cache-sized piece at a time."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import compute_dtype

PIECE_BYTES = 2**20
"""Size of the temporary: it stays in a core's L2 cache from the subtraction to the sum."""


def attribution_reduce_blocked(
    a: Float[Tensor, "*lead d"], b: Float[Tensor, "*#lead d"] | None, grad: Float[Tensor, "*lead d"]
) -> Float[Tensor, "*lead"]:
    """``attribution_reduce``, reading each input once; float64 if an operand is, otherwise float32.

    Memory beyond inputs and output: ``PIECE_BYTES``, or one row where that is more; twice that for reduced dtypes.
    """
    operands = (a, grad) if b is None else (a, b, grad)
    dtype = compute_dtype(*operands)
    out = torch.empty(a.shape[:-1], dtype=dtype, device=a.device)
    if a.shape[-1] == 0:
        return out.zero_()
    n_elements = max(a.shape[-1], PIECE_BYTES // dtype.itemsize)
    buffer = torch.empty(min(n_elements, a.numel()), dtype=dtype, device=a.device)
    other = None if b is None else b.expand(a.shape)
    for piece in _pieces(a.shape, n_elements):
        x, y = a[piece], grad[piece]
        product = buffer[: x.numel()].view(x.shape)
        if all(tensor.dtype == dtype for tensor in operands):
            if other is None:
                torch.mul(x, y, out=product)
            else:
                torch.sub(x, other[piece], out=product).mul_(y)
        else:
            product.copy_(x)
            if other is not None:
                product.sub_(other[piece])
            product.mul_(y)
        torch.sum(product, -1, out=out[piece])
    return out


def _pieces(shape: torch.Size, n_elements: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of the leading axes that cut ``shape`` into pieces of at most ``n_elements`` (or one row)."""
    if len(shape) == 1:
        yield ()
        return
    size = math.prod(shape[1:])
    if size <= n_elements:
        step = max(1, n_elements // max(1, size))
        for first in range(0, shape[0], step):
            yield (slice(first, first + step),)
        return
    for i in range(shape[0]):
        for rest in _pieces(shape[1:], n_elements):
            yield (i, *rest)
