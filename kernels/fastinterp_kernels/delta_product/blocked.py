"""``delta_product`` and ``rounded_product`` in plain torch: blocks of rows times panels of the rounded weight."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import Precision, compute_dtype
from fastinterp_kernels.delta_product.reference import rounded_parts

BLOCK_BYTES = 4 * 2**20
"""Size of a block of differences, and of a panel of the rounded weight: several of each are held."""

FEWEST_ROWS = 256
"""Rows of a block at least, so that a product is worth the rounding and the packing of its panel."""

FEWEST_COLUMNS = 64
"""Columns of a panel at least."""


def delta_product_blocked(
    x: Float[Tensor, "variant row n_in"],
    clean_x: Float[Tensor, "row n_in"],
    W: Float[Tensor, "n_in n_out"],
    clean_y: Float[Tensor, "row n_out"],
    precision: Precision,
) -> Float[Tensor, "variant row n_out"]:
    """The products of blocks of differences are written to the output, and ``clean_y`` is added to them there.

    In this order the sums are rounded relative to the edit. Memory beyond inputs and output: a few blocks and a few
    panels; see :func:`fill_product_`.
    """
    dtype = compute_dtype(x, clean_x, W, clean_y)
    (n_variants, n_rows, n_in), n_out = x.shape, W.shape[1]
    out = torch.empty((n_variants, n_rows, n_out), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    n_held = block_rows(n_in, dtype)
    row_step, variant_step = min(n_rows, n_held), max(1, n_held // n_rows)
    for variant in range(0, n_variants, variant_step):
        for row in range(0, n_rows, row_step):
            place = slice(variant, variant + variant_step), slice(row, row + row_step)
            change = x[place].to(dtype) - clean_x[place[1]].to(dtype)
            fill_product_(out[place].view(-1, n_out), change.flatten(0, 1), W, precision)
            out[place] += clean_y[place[1]]
    return out


def rounded_product_blocked(
    x: Float[Tensor, "*rows n_in"],
    W: Float[Tensor, "n_in n_out"],
    b: Float[Tensor, " n_out"] | None,
    precision: Precision,
) -> Float[Tensor, "*rows n_out"]:
    """On CUDA in ``bf16`` one product of cuBLAS; otherwise blocks of rows as in :func:`delta_product_blocked`.

    Memory beyond inputs and output: the same; on CUDA in ``bf16`` the operands in bfloat16.
    """
    dtype = compute_dtype(x, W) if b is None else compute_dtype(x, W, b)
    flat, n_out = x.reshape(x.shape[:-1].numel(), x.shape[-1]), W.shape[1]
    if x.is_cuda and precision == "bf16" and dtype == torch.float32 and has_wide_products():
        wide = torch.mm(flat.bfloat16(), W.bfloat16(), out_dtype=torch.float32)
        return (wide if b is None else wide.add_(b)).view(*x.shape[:-1], n_out)
    out = torch.empty((flat.shape[0], n_out), dtype=dtype, device=x.device)
    step = block_rows(x.shape[-1], dtype)
    for row in range(0, flat.shape[0], step):
        rows = slice(row, row + step)
        fill_product_(out[rows], flat[rows].to(dtype), W, precision)
        if b is not None:
            out[rows] += b
    return out.view(*x.shape[:-1], n_out)


def has_wide_products() -> bool:
    """Whether this torch multiplies bfloat16 into float32 on CUDA: ``torch.mm(..., out_dtype=torch.float32)``."""
    return "dtype" in torch.ops.aten.mm.overloads()


def block_rows(n_in: int, dtype: torch.dtype) -> int:
    """Rows of a block of ``n_in`` numbers: as many as ``BLOCK_BYTES`` hold, or ``FEWEST_ROWS`` if those are more."""
    return max(FEWEST_ROWS, BLOCK_BYTES // max(1, n_in * dtype.itemsize))


def fill_product_(
    out: Float[Tensor, "row n_out"], left: Float[Tensor, "row n_in"], W: Float[Tensor, "n_in n_out"],
    precision: Precision,
) -> None:  # fmt: skip
    """Fill ``out`` with ``round(left) @ round(W)``, small terms first; ``left`` and ``out`` are in the compute dtype.

    Holds the parts of ``left`` and those of one panel of ``W``: in ``bf16x3`` about 4 times their size each.
    A ``W`` that is multiplied as it is, is no copy.
    """
    a_high, *a_low = rounded_parts(left, precision, left.dtype)
    for columns, (b_high, *b_low) in _panels(W, precision, left.dtype):
        part = out[:, columns]
        terms = [*((low, b_high) for low in a_low), *((a_high, low) for low in b_low), (a_high, b_high)]
        for i, (a, b) in enumerate(terms):
            part.addmm_(a, b, beta=min(i, 1))  # what was there before the first is not read


def _panels(W: Tensor, precision: Precision, dtype: torch.dtype) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Slices of columns with the rounded parts of that panel of ``W``; all columns at once where nothing changes."""
    n_in, n_out = W.shape
    if precision == "exact" and W.dtype == dtype:
        yield slice(None), (W,)
        return
    step = max(FEWEST_COLUMNS, BLOCK_BYTES // max(1, n_in * dtype.itemsize))
    for first in range(0, n_out, step):
        columns = slice(first, first + step)
        yield columns, rounded_parts(W[:, columns], precision, dtype)
