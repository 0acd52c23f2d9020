"""``direct_effect_loss`` in Triton: a program holds one tile of clean logits in registers and takes every head from it.

This is the host's side: which rows, heads and columns are held at a time, their operands, and the reduction over
vocabulary tiles, always in the same order. The kernels are in ``triton_sums.py``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.direct_effect_loss.edits import Edits, HeadSums, evaluate
from fastinterp_kernels.direct_effect_loss.reference import DirectEffect, Layer
from fastinterp_kernels.direct_effect_loss.triton_operands import (
    Parts,
    Stored,
    fill_parts,
    parts_of,
    stored_as,
    whole_multiple,
)
from fastinterp_kernels.direct_effect_loss.triton_sums import build_kernel, sum_heads_kernel
from fastinterp_kernels.triton_common import INTERPRETED, check_triton, dot_precision, launch_device

MEMORY_BYTES = 44 * 2**20
"""For the operands and sums that are held at a time. More would save work where ``d_model`` is large."""

_LOG2_E = math.log2(math.e)
_TARGETS = 4
_PROGRAMS = 1 if INTERPRETED else 264  # two for each of 132 multiprocessors
_SHARED_BYTES = {(8, 0): 160 * 2**10, (9, 0): 224 * 2**10, (10, 0): 224 * 2**10}


@dataclass(frozen=True, kw_only=True)
class SumTiling:
    """Sizes of one program's tile and how it is scheduled; ``unroll``: pipelined over heads, not over ``d_head``."""

    row: int
    column: int
    d_model: int
    d_head: int
    unroll: bool
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """How many rows (in whole tiles), heads and vocabulary columns (in whole tiles) are held at a time."""

    n_rows: int
    n_heads: int
    n_columns: int


def direct_effect_loss_triton(
    edits: Edits, *, kl: bool = False, rank: bool = False, tiling: SumTiling | None = None, plan: Plan | None = None
) -> DirectEffect:
    """``direct_effect_loss`` on a CUDA device, with float32 accumulation and float32 results.

    ``W_O @ W_U`` is rounded to the dtype of the operands where all are bfloat16 or float16. Memory beyond the inputs
    and outputs: ``MEMORY_BYTES`` and temporaries of a few MB.

    Raises ``ValueError`` for tensors that are not on a CUDA device (unless Python started with
    ``TRITON_INTERPRET=1``) and for float64.
    """
    check_triton(*_operands(edits))
    launch = _Launch(edits, tiling, plan, drop=kl and edits.softcap is not None, n_ranks=edits.targets.shape[1] * rank)
    return evaluate(edits, launch.sum_heads, "triton", launch.plan.n_rows, kl=kl, rank=rank)


def _operands(edits: Edits) -> list[Tensor]:
    return [edits.x, edits.W_U, *(tensor for layer in edits.layers for tensor in layer if tensor is not None)]


def default_tiling(
    stored: Stored, d_model: int, d_head: int, *,
    drop: bool = False, rank: bool = False, capability: tuple[int, int] = (9, 0),
) -> SumTiling:  # fmt: skip
    """Tile sizes for padded dims, by registers and shared memory: ``drop`` and ``rank`` need more of the former."""
    if INTERPRETED:  # every operation of a program costs the same there: few, large tiles
        return SumTiling(
            row=256, column=2048, d_model=min(256, d_model & -d_model), d_head=min(256, d_head & -d_head),
            unroll=True, num_warps=1, num_stages=1,
        )  # fmt: skip
    if stored.dtype == torch.float32 and stored.precision == "exact":
        row, column, step, stages = 64, 64, 16, 2
    else:
        row, column = 64 if drop else 128, 128 if capability[0] >= 9 and not (drop or rank) else 64
        step, stages = (32, 2) if stored.n_bytes == 4 else (64 if d_head % 64 == 0 else 32, 3)
    # Both stages of a head's whole operands, if shared memory has room for them.
    shared = _SHARED_BYTES.get(capability, 96 * 2**10)
    unroll = stages * d_head * (row + column) * stored.n_bytes <= shared
    return SumTiling(
        row=row, column=column, d_model=step, d_head=step, unroll=unroll, num_warps=8,
        num_stages=stages if unroll else 3,
    )  # fmt: skip


def make_plan(
    n_rows: int, n_heads: int, d_vocab: int, d_model: int, d_head: int, *,
    n_bytes: int, n_sums: int, tiling: SumTiling,
) -> Plan:  # fmt: skip
    """The plan of the least work that fits ``MEMORY_BYTES``; ``n_sums`` values are stored per row, head and tile.

    Beside the heads themselves that is the clean tile, once per program, and ``W_OV``, once for the rows of a plan.
    """
    best, least = Plan(tiling.row, 1, tiling.column), math.inf
    for rows in (2**i for i in range(12)):
        rows = min(rows * tiling.row, whole_multiple(max(1, n_rows), tiling.row))
        for columns in (2**i for i in range(8)):
            columns = min(columns * tiling.column, whole_multiple(d_vocab, tiling.column))
            tiles = columns // tiling.column
            per_head = (rows + columns + d_model) * d_head * n_bytes + n_sums * (tiles + 1) * rows * 4
            heads = min(n_heads, (MEMORY_BYTES - (rows + columns) * d_model * n_bytes) // per_head)
            if heads < 1:
                continue
            splits = min(heads, _split_heads(rows, columns, tiling))
            work = 1.0 + splits * d_model / (heads * d_head) + d_model / rows
            if work < least * (1.0 - 1e-9):
                best, least = Plan(rows, int(heads), columns), work
    return best


def _split_heads(n_rows: int, n_columns: int, tiling: SumTiling) -> int:
    """Programs to share the heads of one tile, so that few tiles fill a GPU."""
    return -(-_PROGRAMS // ((n_rows // tiling.row) * (n_columns // tiling.column)))


class _Rows(NamedTuple):
    """What the rows of a plan need for every group of heads, in whole tiles."""

    x: Parts
    offset: Float[Tensor, " row"]
    """What is added to a raw logit (without a softcap) or from what a softcapped one is taken, units of log 2."""
    bias: Float[Tensor, " column"]
    """In the units of raw logits, -inf beyond the vocabulary."""
    targets: Int[Tensor, "k row"]


class _Launch:
    """Sizes of a call, and its launches for the rows of one plan."""

    def __init__(self, edits: Edits, tiling: SumTiling | None, plan: Plan | None, *, drop: bool, n_ranks: int) -> None:
        self.stored, self.device = stored_as(_operands(edits), edits.precision), edits.x.device
        (n_rows, d_model), d_vocab = edits.x.shape, edits.W_U.shape[1]
        self.d_model = whole_multiple(d_model, 64)
        self.d_head = max(whole_multiple(layer.z.shape[2], 32) for layer in edits.layers)
        capability = torch.cuda.get_device_capability(edits.x.device) if edits.x.is_cuda else (9, 0)
        self.tiling = tiling or default_tiling(
            self.stored, self.d_model, self.d_head, drop=drop, rank=n_ranks > 0, capability=capability
        )
        self.plan = plan or make_plan(
            n_rows, edits.n_heads, d_vocab, self.d_model, self.d_head,
            n_bytes=self.stored.n_bytes, n_sums=1 + drop + min(n_ranks, _TARGETS), tiling=self.tiling,
        )  # fmt: skip
        self.scale = _LOG2_E if edits.softcap is None else 2.0 * _LOG2_E / edits.softcap
        self.options = {
            "WIDEN": INTERPRETED,  # the interpreter multiplies bfloat16 operands as raw integers
            "ROUND_TF32": INTERPRETED and self.stored.precision == "tf32",
            "DOT": dot_precision(self.stored.precision),
            "num_warps": self.tiling.num_warps,
            "num_stages": self.tiling.num_stages,
            "enable_fp_fusion": True,  # the default of some Triton releases and not of others
        }

    def sum_heads(self, edits: Edits, shift: Tensor, raw_targets: Tensor, out: HeadSums) -> None:
        """What ``evaluate`` asks of a backend."""
        for tensor in out:
            if tensor is not None:
                tensor.zero_()
        n_rows, d_vocab = whole_multiple(edits.x.shape[0], self.tiling.row), edits.W_U.shape[1]
        shift, softcap = shift * _LOG2_E, edits.softcap
        offset = -shift if softcap is None else softcap * _LOG2_E - shift
        bias = shift.new_zeros(d_vocab) if edits.b_U is None else edits.b_U.float() * self.scale
        with launch_device(edits.x):
            rows = _Rows(
                x=fill_parts(self._empty(1, n_rows, self.d_model), edits.x[None], None),
                offset=_padded(offset, n_rows, 0.0),
                bias=_padded(bias, whole_multiple(d_vocab, self.plan.n_columns), -math.inf),
                targets=_padded(edits.targets.T.int(), n_rows, -1),
            )
            for first in range(0, edits.n_heads, self.plan.n_heads):
                heads = slice(first, min(first + self.plan.n_heads, edits.n_heads))
                thresholds: list[Tensor] = []
                for some in _target_groups(out):
                    raw = raw_targets[:, heads, some] * self.scale - (shift[:, None, None] if softcap is None else 0.0)
                    thresholds.append(_padded(raw.permute(1, 2, 0), n_rows, math.inf))
                self._sum_group(edits, rows, heads, thresholds, out.of_heads(heads))

    def _empty(self, *shape: int) -> Tensor:
        """Empty ``[part, *shape]``."""
        return torch.empty((self.stored.n_parts, *shape), dtype=self.stored.dtype, device=self.device)

    def _weights(self, n_rows: int, n_columns: int) -> Tensor:
        """Empty ``[part, row, column]``, rows being what is summed over: neighbours for ``tf32``, else columns.

        Hopper's tensor cores read tf32 only along the axis that is summed over.
        """
        if self.stored.precision == "tf32":
            return self._empty(n_columns, n_rows).mT
        return self._empty(n_rows, n_columns)

    def _sum_group(self, edits: Edits, rows: _Rows, heads: slice, thresholds: list[Tensor], out: HeadSums) -> None:
        """Add all columns for some heads."""
        n_heads, n_rows = heads.stop - heads.start, rows.offset.shape[0]
        z = self._empty(n_heads, n_rows, self.d_head)
        W_O = self._empty(whole_multiple(n_heads * self.d_head, self.tiling.row), self.d_model)
        W_O[:, n_heads * self.d_head :] = 0.0
        by_head = W_O[:, : n_heads * self.d_head].unflatten(1, (n_heads, self.d_head))
        for layer, local, place in _pieces(edits.layers, heads):
            other = None if layer.replacement is None else layer.replacement[:, local].transpose(0, 1)
            if other is not None:
                other = other.expand(-1, edits.x.shape[0], -1)
            here = slice(place, place + local.stop - local.start)
            fill_parts(z[:, here], layer.z[:, local].transpose(0, 1), other)
            fill_parts(by_head[:, here], layer.W_O[local], None)
        for first in range(0, edits.W_U.shape[1], self.plan.n_columns):
            self._add_columns(edits, rows, first, parts_of(z), parts_of(W_O), thresholds, out)

    def _add_columns(
        self, edits: Edits, rows: _Rows, first: int, z: Parts, W_O: Parts, thresholds: list[Tensor], out: HeadSums
    ) -> None:
        """Build ``W_OV`` for some columns and add these for all heads of the group."""
        tiling, n_heads, n_rows = self.tiling, z.high.shape[0], rows.offset.shape[0]
        source = edits.W_U[:, first : first + self.plan.n_columns]
        n_columns = whole_multiple(source.shape[1], tiling.column)
        W_U, W_OV = (self._weights(n, n_columns) for n in (self.d_model, W_O.high.shape[0]))
        fill_parts(W_U[:, None], source[None], None)
        U, W = parts_of(W_U), parts_of(W_OV)
        n_tiles = n_columns // tiling.column
        u_strides, w_strides = U.high.stride(), W.high.stride()
        build_kernel[(W_O.high.shape[0] // tiling.row, n_tiles)](
            W_O.high, W_O.low, U.high, U.low, W.high, W.low, self.d_model, -self.scale, *u_strides, *w_strides,
            BLOCK_ROW=tiling.row, BLOCK_COLUMN=tiling.column, BLOCK_DEPTH=tiling.d_model, **self.options,
        )  # fmt: skip
        total = torch.empty((n_tiles, n_heads + 1, n_rows), dtype=torch.float32, device=self.device)
        mean = torch.empty_like(total) if out.drop is not None else None
        splits = min(n_heads, _split_heads(n_rows, n_columns, tiling))
        # Ranks of some targets at a time, the sums with the first of them (and again, unused, with the others).
        for i, some in enumerate(_target_groups(out) or [slice(0, 0)]):
            n_targets = some.stop - some.start
            larger = total.new_empty((n_tiles, n_heads + 1, n_targets, n_rows), dtype=torch.int32)
            sum_heads_kernel[(n_rows // tiling.row, n_tiles, splits)](
                rows.x.high, rows.x.low, U.high, U.low, rows.bias[first:], rows.offset, z.high, z.low, W.high, W.low,
                total, mean, thresholds[i] if thresholds else None, rows.targets[some] - first, larger,
                self.d_model, source.shape[1], n_rows, n_heads, -(-n_heads // splits),
                self.scale, None if edits.softcap is None else 2.0 * edits.softcap * _LOG2_E,
                *u_strides, self.d_head * w_strides[0], *w_strides,
                D_HEAD=self.d_head, UNROLL=tiling.unroll, N_TARGETS=n_targets,
                CLEAN=out.drop is not None or out.clean_total is not None,
                BLOCK_ROW=tiling.row, BLOCK_COLUMN=tiling.column, BLOCK_D=tiling.d_model, BLOCK_D_HEAD=tiling.d_head,
                **self.options,
            )  # fmt: skip
            if out.larger is not None and n_targets:
                counts = larger[:, :-1, :, : out.larger.shape[0]].sum(0)
                out.larger[:, :, some] += counts.permute(2, 0, 1)
        _add_sums(total, mean, out)


def _target_groups(out: HeadSums) -> list[slice]:
    """The targets whose ranks are counted by one launch."""
    k = 0 if out.larger is None else out.larger.shape[2]
    return [slice(first, min(first + _TARGETS, k)) for first in range(0, k, _TARGETS)]


def _add_sums(total: Tensor, mean: Tensor | None, out: HeadSums) -> None:
    """Add the sums of all vocabulary tiles; the last head's are the clean tile's."""
    n_rows = out.total.shape[0]
    out.total.add_(total[:, :-1, :n_rows].sum(0).T)
    if out.clean_total is not None:
        out.clean_total.add_(total[:, -1, :n_rows].sum(0))
    if out.drop is not None and mean is not None:
        means = mean[:, :, :n_rows].sum(0)
        out.drop.add_((means[-1] - means[:-1]).T, alpha=1.0 / _LOG2_E)


def _pieces(layers: list[Layer], heads: slice) -> Iterator[tuple[Layer, slice, int]]:
    """Layers of a range of heads: which of their heads, and the place of the first of these in the range."""
    start = 0
    for layer in layers:
        stop = start + layer.z.shape[1]
        low, high = max(start, heads.start), min(stop, heads.stop)
        if low < high:
            yield layer, slice(low - start, high - start), low - heads.start
        start = stop


def _padded(tensor: Tensor, length: int, value: float) -> Tensor:
    """A contiguous copy, as float32 or int32, with its last axis filled up to ``length``."""
    dtype = torch.float32 if tensor.is_floating_point() else torch.int32
    out = torch.full((*tensor.shape[:-1], length), value, dtype=dtype, device=tensor.device)
    out[..., : tensor.shape[-1]] = tensor
    return out
