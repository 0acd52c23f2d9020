"""``variant_residual`` in plain torch: every edit is one matrix product that adds to the residual where it is written.

Heads that stand side by side in the model are one product: their ``z`` and ``W_O`` are views.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import TILE_BYTES, Precision, add_product_, compute_dtype, operand_parts
from fastinterp_kernels.variant_residual.reference import Edits, as_mask


def variant_residual_blocked(
    resid: Float[Tensor, "row d_model"],
    z: Float[Tensor, "row head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    edits: Edits,
    replacement: Float[Tensor, "#row head d_head"] | None,
    out: Float[Tensor, "variant row d_model"],
    precision: Precision,
) -> None:
    """Fill ``out`` in blocks of rows of at most ``TILE_BYTES`` per variant.

    Where the variants edit more heads in all than there are, each head's output is formed once for a smaller block,
    and a product with the mask adds them up.

    Memory beyond inputs and output: a few blocks, and copies of some heads' ``W_O`` where that is in a reduced dtype
    or ``precision``, or laid out so that heads are no matrices.
    """
    layer = _Layer(resid, z, W_O, replacement, precision)
    n_variants, n_heads, d_head = edits.shape[0], z.shape[1], z.shape[2]
    mask = as_mask(edits, n_heads)
    together = int(mask.sum()) * d_head > n_heads * (d_head + n_variants)
    for rows in layer.row_blocks(n_heads if together else 1):
        if not together or not _fill_together(layer, rows, mask, out):
            _fill_one_by_one(layer, rows, edits, out)


class _Layer:
    """The inputs, and the blocks that are made of them."""

    def __init__(self, resid: Tensor, z: Tensor, W_O: Tensor, replacement: Tensor | None, precision: Precision) -> None:
        self.resid, self.z, self.W_O, self.replacement, self.precision = resid, z, W_O, replacement, precision
        self.dtype = compute_dtype(*(tensor for tensor in (resid, z, W_O, replacement) if tensor is not None))

    def row_blocks(self, n_held: int) -> Iterator[slice]:
        """Equal blocks of rows of which ``n_held`` fit ``TILE_BYTES``."""
        n_rows, d_model = self.resid.shape
        n_blocks = max(1, -(-n_rows * d_model * self.dtype.itemsize * n_held // TILE_BYTES))
        step = max(1, -(-n_rows // n_blocks))
        for first in range(0, n_rows, step):
            yield slice(first, min(first + step, n_rows))

    def removed(self, rows: slice, heads: slice, out: Tensor, base: Tensor | None) -> Tensor:
        """``out = base - (z - replacement) @ W_O`` for some neighbouring heads, small terms first."""
        away = self.z[rows, heads].to(self.dtype)
        if self.replacement is not None:
            one_for_all = self.replacement.shape[0] == 1
            away = away - self.replacement[slice(None) if one_for_all else rows, heads].to(self.dtype)
        a = operand_parts(away.flatten(1), self.precision, self.dtype)
        b = operand_parts(self.W_O[heads].flatten(0, 1), self.precision, self.dtype)
        if base is None:
            return add_product_(out.zero_(), a, b).neg_()
        if len(a) == 2 and len(b) == 2:
            torch.addmm(base, a[1], b[0], alpha=-1.0, out=out).addmm_(a[0], b[1], alpha=-1.0)
            base = out
        return torch.addmm(base, a[0], b[0], alpha=-1.0, out=out)


def _fill_one_by_one(layer: _Layer, rows: slice, edits: Edits, out: Tensor) -> None:
    """Every edit is a matrix product that adds to the residual where it is written."""
    base = layer.resid[rows].to(layer.dtype)
    buffer = torch.empty_like(base) if out.dtype != layer.dtype else None
    for variant, heads in zip(out, edits.tolist()):
        target = variant[rows] if buffer is None else buffer
        done = base
        for run in head_runs(heads):
            done = layer.removed(rows, run, target, done)
        if done is base:
            variant[rows] = base
        elif buffer is not None:
            variant[rows] = buffer


def _fill_together(layer: _Layer, rows: slice, mask: Tensor, out: Tensor) -> bool:
    """Form every edited head's output once; False, with nothing done, where one is infinite or NaN.

    The product with the mask would spread such a value to variants that do not edit its head.
    """
    used = mask.any(0).nonzero()[:, 0]
    n_rows, d_model = rows.stop - rows.start, layer.resid.shape[1]
    changes = torch.empty((len(used), n_rows, d_model), dtype=layer.dtype, device=out.device)
    for head, change in zip(used.tolist(), changes):
        layer.removed(rows, slice(head, head + 1), change, None)
    if not bool(torch.isfinite(changes.sum())):
        return False
    base = layer.resid[rows].to(layer.dtype).flatten()
    step = max(1, TILE_BYTES // (base.numel() * base.itemsize))
    for first in range(0, mask.shape[0], step):
        some = mask[first : first + step, used].to(layer.dtype)
        out[first : first + step, rows] = torch.addmm(base, some, changes.flatten(1)).view(-1, n_rows, d_model)
    return True


def head_runs(heads: int | list[bool]) -> list[slice]:
    """The heads of one variant as ranges of neighbours."""
    if isinstance(heads, int):
        return [slice(heads, heads + 1)]
    runs: list[slice] = []
    for head in (i for i, edited in enumerate(heads) if edited):
        if runs and runs[-1].stop == head:
            runs[-1] = slice(runs[-1].start, head + 1)
        else:
            runs.append(slice(head, head + 1))
    return runs
