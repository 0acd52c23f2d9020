"""What every backend of ``direct_effect_loss`` shares: all but the sums over the vocabulary, one per row and head.

A head's contribution to given tokens is a gather, and what the clean distribution expects of it is linear too:
neither has a term in ``d_vocab`` times the number of heads. The few pairs of a row and a head for which a sum of
``exp(logit - shift)`` with the row's clean logsumexp as the shift leaves the range of floats, and all pairs where rows
are few, are evaluated by ``linear_cross_entropy`` on their edited residuals.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import (
    IGNORED,
    TILE_BYTES,
    Precision,
    add_product_,
    finite_or_zero,
    operand_parts,
)
from fastinterp_kernels.direct_effect_loss.reference import DirectEffect, Layer
from fastinterp_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy

_SMALLEST_SUM = 2.0**-60
_PAIRS = 512
_WEIGHT_BYTES = 8 * TILE_BYTES  # of W_O that is copied, where it is in a reduced dtype


@dataclass(frozen=True, kw_only=True)
class Edits:
    """The inputs of ``direct_effect_loss`` for some rows: checked, and with every choice made."""

    x: Float[Tensor, "row d_model"]
    layers: list[Layer]
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None
    targets: Int[Tensor, "row k"]
    softcap: float | None
    precision: Precision
    dtype: torch.dtype

    @property
    def n_heads(self) -> int:
        return sum(layer.z.shape[1] for layer in self.layers)

    def of_rows(self, rows: slice) -> "Edits":
        return replace(
            self, x=self.x[rows], targets=self.targets[rows], layers=[_layer_rows(layer, rows) for layer in self.layers]
        )

    def parts(self, operand: Float[Tensor, "..."]) -> tuple[Tensor, ...]:
        return operand_parts(operand, self.precision, self.dtype)


class HeadSums(NamedTuple):
    """Where a backend puts what it adds up over the vocabulary; None for what is not asked for.

    ``total``: sum of ``exp(edited - shift)``. ``larger``: how many tokens other than the target have a raw edited
    logit above the target's. For a divergence, from the same tiles, ``clean_total``: sum of ``exp(clean - shift)``, and
    with a softcap ``drop``: sum of ``exp(clean - shift) * (clean - edited)``, which is linear in the head's value
    without one. Logits are softcapped, raw ones are not.
    """

    total: Float[Tensor, "row head"]
    larger: Int[Tensor, "row head k"] | None
    drop: Float[Tensor, "row head"] | None
    clean_total: Float[Tensor, " row"] | None

    def of_heads(self, heads: slice) -> "HeadSums":
        return HeadSums(
            self.total[:, heads],
            None if self.larger is None else self.larger[:, heads],
            None if self.drop is None else self.drop[:, heads],
            self.clean_total if heads.start == 0 else None,
        )


SumHeads = Callable[[Edits, Float[Tensor, " row"], Float[Tensor, "row head k"], HeadSums], None]
"""Fills ``HeadSums`` from the edits, the finite shift of every row and the raw edited logits of the targets."""


def evaluate(
    edits: Edits, sum_heads: SumHeads, backend: Literal["blocked", "triton"], row_step: int, *, kl: bool, rank: bool
) -> DirectEffect:
    """``direct_effect_loss`` with the sums of a backend, ``row_step`` rows at a time."""
    (n_rows, k), n_heads = edits.targets.shape, edits.n_heads
    new = edits.x.new_empty
    out = DirectEffect(
        target_logit=new((n_rows, n_heads, k), dtype=edits.dtype),
        logsumexp=new((n_rows, n_heads), dtype=edits.dtype),
        rank=new((n_rows, n_heads, k), dtype=torch.int64) if rank else None,
        kl=new((n_rows, n_heads), dtype=edits.dtype) if kl else None,
    )
    for first in range(0, n_rows, row_step):
        rows = slice(first, first + row_step)
        of_rows = DirectEffect(
            out.target_logit[rows],
            out.logsumexp[rows],
            None if out.rank is None else out.rank[rows],
            None if out.kl is None else out.kl[rows],
        )
        _evaluate_rows(edits.of_rows(rows), sum_heads, backend, of_rows)
    return out


def _evaluate_rows(edits: Edits, sum_heads: SumHeads, backend: Literal["blocked", "triton"], out: DirectEffect) -> None:
    _fill_target_logits(edits, out.target_logit)
    if _explicit_is_less_work(edits):
        _fill_explicitly(edits, backend, torch.ones_like(out.logsumexp, dtype=torch.bool), out)
    else:
        _fill_from_sums(edits, sum_heads, backend, out)
    if edits.softcap is not None:
        out.target_logit.div_(edits.softcap).tanh_().mul_(edits.softcap)
    ignored = (edits.targets == IGNORED)[:, None, :]
    out.target_logit.masked_fill_(ignored, math.nan)
    if out.rank is not None:
        out.rank.masked_fill_(ignored | out.logsumexp.isnan()[:, :, None], -1)


def _fill_from_sums(
    edits: Edits, sum_heads: SumHeads, backend: Literal["blocked", "triton"], out: DirectEffect
) -> None:
    shift = finite_or_zero(_cross_entropy(edits, backend, edits.x, edits.targets[:, :0]).logsumexp)
    clean_total = None if out.kl is None else torch.empty_like(out.logsumexp[:, 0])
    drop = None if edits.softcap is None else out.kl
    sum_heads(edits, shift, out.target_logit, HeadSums(out.logsumexp, out.rank, drop, clean_total))
    outside = ~(torch.isfinite(out.logsumexp) & (out.logsumexp > _SMALLEST_SUM))
    if out.kl is not None and clean_total is not None:
        if drop is None:
            _fill_mean_contributions(edits, shift, out.kl)
        else:
            drop.div_(clean_total[:, None])
        # KL = mean of (clean - edited) + log(mean of exp(edited - clean)), both under the clean distribution.
        out.kl.add_((out.logsumexp / clean_total[:, None]).log_()).clamp_min_(0.0)
    out.logsumexp.log_().add_(shift[:, None])
    if bool(outside.any()):
        _fill_explicitly(edits, backend, outside, out._replace(rank=None))


# What is linear in a head's contribution --------------------------------------------------------------------


def removed(layer: Layer, rows: slice | Int[Tensor, " row"], head: int, dtype: torch.dtype) -> Float[Tensor, "row d"]:
    """What the edit takes away from one head's value: ``z``, or ``z - replacement``; copied only where it must be."""
    z = layer.z[rows, head].to(dtype)
    if layer.replacement is None:
        return z
    one_for_all = layer.replacement.shape[0] == 1
    return z - (layer.replacement[:, head] if one_for_all else layer.replacement[rows, head]).to(dtype)


def _layer_rows(layer: Layer, rows: slice) -> Layer:
    other = layer.replacement
    return Layer(layer.z[rows], layer.W_O, other if other is None or other.shape[0] == 1 else other[rows])


def _row_chunks(edits: Edits, width: int) -> Iterator[slice]:
    """Rows of which ``width`` elements each fit a few times the tile (a GPU: 16 times that)."""
    n_bytes = TILE_BYTES * (16 if edits.x.is_cuda else 4)
    step = max(1, n_bytes // (width * edits.dtype.itemsize))
    for first in range(0, edits.x.shape[0], step):
        yield slice(first, first + step)


def _width(edits: Edits) -> int:
    return max(edits.x.shape[1], *(layer.z[0].numel() for layer in edits.layers))


def _fill_contributions(edits: Edits, directions: Float[Tensor, "row d_model"], out: Float[Tensor, "row head"]) -> None:
    """Every head's contribution along its row's direction of the residual stream, exact in every precision."""
    place = 0
    for z, W_O, other in edits.layers:
        n_heads, d_head = z.shape[1:]
        step = max(1, _WEIGHT_BYTES // (d_head * directions.shape[1] * edits.dtype.itemsize))
        for first in range(0, n_heads, step):
            heads = slice(first, min(first + step, n_heads))
            along = (directions @ W_O[heads].to(edits.dtype).flatten(0, 1).T).unflatten(1, (-1, d_head))
            away = z[:, heads].to(edits.dtype)
            if other is not None:
                away = away - other[:, heads].to(edits.dtype)
            out[:, place + first : place + heads.stop] = along.mul_(away).sum(-1)
        place += n_heads


def _fill_target_logits(edits: Edits, out: Float[Tensor, "row head k"]) -> None:
    """Raw edited logits of the targets, exact in every precision; those of token 0 where a target is ignored."""
    for rows in _row_chunks(edits, _width(edits)):
        chunk = edits.of_rows(rows)
        x = chunk.x.to(edits.dtype)
        for j, ids in enumerate(chunk.targets.long().clamp_min(0).unbind(1)):
            columns = edits.W_U.T.index_select(0, ids).to(edits.dtype)
            _fill_contributions(chunk, columns, out[rows, :, j])
            # A sum of products and not a matrix product: those may be set to tf32 for the whole process.
            clean = columns.mul_(x).sum(1)
            if edits.b_U is not None:
                clean += edits.b_U[ids].to(edits.dtype)
            torch.sub(clean[:, None], out[rows, :, j], out=out[rows, :, j])


def _fill_mean_contributions(edits: Edits, shift: Float[Tensor, " row"], out: Float[Tensor, "row head"]) -> None:
    """Mean of every head's contribution to the logits under the clean distribution, whose logsumexp is ``shift``."""
    n_columns = 1024 * (16 if edits.x.is_cuda else 1)
    for rows in _row_chunks(edits, max(_width(edits), n_columns)):
        chunk = edits.of_rows(rows)
        x = chunk.x.to(edits.dtype)
        mean, total = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for first in range(0, edits.W_U.shape[1], n_columns):
            W = edits.W_U[:, first : first + n_columns].to(edits.dtype)
            p = x @ W
            if edits.b_U is not None:
                p += edits.b_U[first : first + n_columns].to(edits.dtype)
            p.sub_(shift[rows, None]).mul_(math.log2(math.e)).exp2_()
            total += p.sum(1, keepdim=True)
            mean.addmm_(p, W.T)
        _fill_contributions(chunk, mean.div_(total), out[rows])


# Pairs of a row and a head whose edited residual is formed ---------------------------------------------------


def _explicit_is_less_work(edits: Edits) -> bool:
    """Whether ``W_OV``, ``2 d_head d_model d_vocab`` operations per head, costs more than its use saves."""
    (n_rows, d_model), d_head = edits.x.shape, edits.layers[0].z.shape[2]
    return n_rows * (d_model - d_head) < d_head * d_model


def _fill_explicitly(
    edits: Edits, backend: Literal["blocked", "triton"], pairs: Float[Tensor, "row head"], out: DirectEffect
) -> None:
    """Logsumexp (and rank and kl, where ``out`` has them) of the edited residuals of the chosen pairs."""
    heads, rows = pairs.T.nonzero().unbind(1)
    for first in range(0, len(rows), _PAIRS):
        row, head = rows[first : first + _PAIRS], heads[first : first + _PAIRS]
        residual = _edited_residuals(edits, row, head)
        targets = edits.targets[row] if out.rank is not None else edits.targets[row, :0]
        kl_from = edits.x[row] if out.kl is not None else None
        found = _cross_entropy(edits, backend, residual, targets, rank=out.rank is not None, kl_from=kl_from)
        out.logsumexp[row, head] = found.logsumexp
        if out.rank is not None and found.rank is not None:
            out.rank[row, head] = found.rank
        if out.kl is not None and found.kl is not None:
            out.kl[row, head] = found.kl


def _edited_residuals(
    edits: Edits, rows: Int[Tensor, " pair"], heads: Int[Tensor, " pair"]
) -> Float[Tensor, "pair d_model"]:
    """The residual without the head's output (plus that of the replacement), pairs in the order of heads."""
    residual = edits.x[rows].to(edits.dtype)
    first = head = 0
    counts = torch.bincount(heads, minlength=edits.n_heads).tolist()
    for layer in edits.layers:
        for local in range(layer.z.shape[1]):
            span = slice(first, first + counts[head])
            if counts[head]:
                away = edits.parts(-removed(layer, rows[span], local, edits.dtype))
                add_product_(residual[span], away, edits.parts(layer.W_O[local]))
            first, head = span.stop, head + 1
    return residual


def _cross_entropy(
    edits: Edits, backend: Literal["blocked", "triton"], x: Tensor, targets: Tensor, *,
    rank: bool = False, kl_from: Tensor | None = None,
) -> LinearCrossEntropy:  # fmt: skip
    if edits.dtype == torch.float64:
        x = x.double()
    b_U, largest = edits.b_U, None
    if b_U is not None and edits.softcap is None:
        # Where all of the bias is large, every logit and their logsumexp would be rounded for it.
        largest = b_U.to(edits.dtype).masked_fill(~torch.isfinite(b_U), -math.inf).amax()
        largest = finite_or_zero(largest)
        b_U = b_U.to(edits.dtype) - largest
    found = linear_cross_entropy(
        x, edits.W_U, targets, b_U,
        softcap=edits.softcap, rank=rank, kl_from=kl_from, backend=backend, precision=edits.precision,
    )  # fmt: skip
    return found if largest is None else found._replace(logsumexp=found.logsumexp + largest)
