"""``head_logits`` on a CUDA device: torch prepares operands and chooses groups, ``triton_kernel`` does the products."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import IGNORED, Precision, finite_or_zero
from fastinterp_kernels.head_logits.plan import COLUMN_MULTIPLE, Block, Engine
from fastinterp_kernels.head_logits.reference import HeadLogits, Wanted
from fastinterp_kernels.head_logits.topk import best_groups, parent_extremes
from fastinterp_kernels.head_logits.triton_kernel import (
    GROUP,
    default_tiling,
    diagonal_kernel,
    group_logits_kernel,
    group_tiling,
    head_logits_kernel,
    padded_length,
)
from fastinterp_kernels.triton_common import INTERPRETED, PROGRAMS, check_triton, dot_precision, launch_device

LOG2_E = 1.0 / math.log(2.0)

_WEIGHT_BYTES = 24 * 2**20  # a slab of prepared weights
_BUILD_BYTES = 4 * 2**20  # float32 weights before they are rounded
_EXTREME_BYTES = 16 * 2**20  # maxima and minima of the groups
_CANDIDATE_BYTES = 4 * 2**20  # float32 logits of the best groups
_VECTOR_BYTES = 4 * 2**20
_TARGETS = 4  # ranks to a launch


class Operand(NamedTuple):
    """``[head, n, d]`` as kernels read it: rounded or split, padded with zeros; ``n`` of its rows are real.

    ``scale`` times as large as the values it stands for.
    """

    high: Float[Tensor, "head padded_n padded_d"]
    low: Float[Tensor, "head padded_n padded_d"] | None
    n: int
    scale: float


class TritonEngine(Engine):
    """Tensor-core products of operands that torch has rounded or split; sums and results are float32."""

    def __init__(self, wanted: Wanted, operands: Sequence[Tensor], precision: Precision) -> None:
        check_triton(*operands)
        self.wanted, self.precision, self.device = wanted, precision, operands[0].device
        self.dtype = torch.float32
        dtypes = {tensor.dtype for tensor in operands}
        self.stored = dtypes.pop() if precision == "exact" and len(dtypes) == 1 else torch.float32
        if precision in ("bf16", "bf16x3"):
            self.stored = torch.bfloat16
        self.n_parts = 2 if precision == "bf16x3" else 1

    # Sizes

    def head_block(self, n_rows: int, d_head: int, d_vocab: int) -> Block:
        columns = self._columns(d_head, d_vocab)
        heads = max(1, _WEIGHT_BYTES // (columns * self._entry_bytes(d_head)))
        rows = max(1, self._rows(columns, d_head) // heads)
        return Block(heads=heads, rows=min(n_rows, rows), columns=columns)

    def vector_block(self, n_vectors: int, d_model: int, d_vocab: int) -> Block:
        columns = self._columns(d_model, d_vocab)
        rows = max(1, min(n_vectors, self._rows(columns, d_model)))
        return Block(heads=1, rows=rows, columns=columns)

    def _entry_bytes(self, d: int) -> int:
        return padded_length(d) * self.n_parts * self.stored.itemsize

    def _columns(self, d: int, d_vocab: int) -> int:
        most = max(_WEIGHT_BYTES // self._entry_bytes(d), 2 * self.wanted.k, 1)
        return -(-min(most, d_vocab) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def _rows(self, columns: int, d: int) -> int:
        """Rows, of all heads together: few launches, whose fixed time would be that of a large product."""
        rows = _VECTOR_BYTES // (4 * d)
        if self.wanted.k:
            extremes, candidates = 8 * columns // GROUP, 4 * min(self.wanted.k * GROUP, columns)
            rows = min(rows, _EXTREME_BYTES // extremes, _CANDIDATE_BYTES // candidates)
        return max(128, rows // 128 * 128)

    # Operands

    def head_weights(self, W_O: Float[Tensor, "head d_head d_model"], W_U: Float[Tensor, "d_model column"]) -> Operand:
        n_heads, d_head, d_model = W_O.shape
        # log2(e) rides on the weights while they are float32: one operation less for every logit.
        weights = self._allocate(n_heads, W_U.shape[1], d_head, LOG2_E)
        step = max(1, _BUILD_BYTES // (4 * d_model))
        for first in range(0, W_U.shape[1], step):
            columns = W_U[:, first : first + step].T.float()
            for head, directions in enumerate(W_O):
                self._store(weights, head, first, columns @ (directions.float().T * LOG2_E))
        return weights

    def vector_weights(self, W_U: Float[Tensor, "d_model column"]) -> Operand:
        weights = self._allocate(1, W_U.shape[1], W_U.shape[0], 1.0)
        step = max(1, _BUILD_BYTES // (4 * W_U.shape[0]))
        for first in range(0, W_U.shape[1], step):
            self._store(weights, 0, first, W_U[:, first : first + step].T)
        return weights

    def _allocate(self, n_heads: int, n: int, d: int, scale: float) -> Operand:
        tile = default_tiling(padded_length(d), self.stored, self.n_parts, self.precision).column
        shape = (self.n_parts, n_heads, -(-n // tile) * tile, padded_length(d))
        parts = torch.empty(shape, dtype=self.stored, device=self.device)
        parts[:, :, n:] = 0.0
        parts[..., d:] = 0.0
        return Operand(parts[0], parts[1] if self.n_parts == 2 else None, n, scale)

    def _store(self, operand: Operand, head: int, first: int, values: Float[Tensor, "some d"]) -> None:
        place = (head, slice(first, first + values.shape[0]), slice(values.shape[1]))
        operand.high[place] = values
        if operand.low is not None:
            high = operand.high[place]
            # An infinite high part has no rest: inf - inf is NaN.
            operand.low[place] = (values - high).masked_fill_(~torch.isfinite(high), 0.0)

    def _prepare(self, x: Float[Tensor, "head row d"]) -> Operand:
        rows = self._allocate(x.shape[0], x.shape[1], x.shape[2], 1.0)
        for head, values in enumerate(x):
            self._store(rows, head, 0, values)
        return rows

    # Reductions

    def diagonal(self, x: Float[Tensor, "head row d"], weights: Operand) -> Float[Tensor, "head row"]:
        return _Run(self, self._prepare(x), weights).diagonal()

    def reduce(
        self,
        x: Float[Tensor, "head row d"],
        weights: Operand,
        targets: Int[Tensor, "head row m"] | None,
        thresholds: Float[Tensor, "head row m"] | None,
    ) -> HeadLogits:
        run = _Run(self, self._prepare(x), weights)
        k = min(self.wanted.k, weights.n)
        extremes = {}
        if k:
            extremes = {"maximum": run.empty(run.n_groups)}
            if self.wanted.bottom:
                extremes["minimum"] = run.empty(run.n_groups)
        total = run.empty(run.n_chunks) if self.wanted.logsumexp else None
        if targets is None or thresholds is None or not targets.shape[2]:
            run.launch(**extremes, total=total)
            rank = None if targets is None else targets
        else:
            first = run.count(targets[..., :_TARGETS], thresholds[..., :_TARGETS], **extremes, total=total)
            others = range(_TARGETS, targets.shape[2], _TARGETS)  # the rest of the work is done once
            parts = [(targets[..., i : i + _TARGETS], thresholds[..., i : i + _TARGETS]) for i in others]
            rank = torch.cat([first, *(run.count(*part) for part in parts)], dim=2)
        out = HeadLogits(rank=rank, logsumexp=None if total is None else run.logsumexp(total))
        if k:
            values, ids = run.topk(extremes["maximum"], k, largest=True)
            out = out._replace(top_values=values, top_ids=ids)
            if self.wanted.bottom:
                values, ids = run.topk(extremes["minimum"], k, largest=False)
                out = out._replace(bottom_values=values, bottom_ids=ids)
        return out


class _Run:
    """Launches for one block."""

    def __init__(self, engine: TritonEngine, rows: Operand, weights: Operand) -> None:
        self.rows, self.weights, self.precision = rows, weights, engine.precision
        self.n_heads, _, self.d = rows.high.shape
        self.tiling = default_tiling(self.d, engine.stored, engine.n_parts, engine.precision)
        n_row_tiles = triton.cdiv(rows.n, self.tiling.row)
        n_tiles = triton.cdiv(weights.n, self.tiling.column)
        n_chunks = min(n_tiles, triton.cdiv(PROGRAMS, n_row_tiles * self.n_heads))
        self.chunk_columns = triton.cdiv(n_tiles, n_chunks) * self.tiling.column
        self.n_chunks = triton.cdiv(weights.n, self.chunk_columns)
        self.n_groups = triton.cdiv(weights.n, GROUP)
        self.grid = (n_row_tiles, self.n_chunks, self.n_heads)
        # What turns a product into a power of two.
        self.unit = 1.0 if weights.scale == LOG2_E else LOG2_E

    def empty(self, n: int) -> Float[Tensor, "head n row"]:
        return torch.empty((self.n_heads, n, self.rows.n), dtype=torch.float32, device=self.rows.high.device)

    def _options(self) -> dict[str, Any]:
        """How operands are multiplied: the same in every kernel, for the same sums."""
        tiling = self.tiling
        return dict(
            HOIST=self.d == tiling.d,
            WIDEN=INTERPRETED,  # the interpreter multiplies bfloat16 as raw integers
            ROUND_TF32=INTERPRETED and self.precision == "tf32",
            DOT=dot_precision(self.precision),
            BLOCK_ROW=tiling.row,
            BLOCK_COLUMN=tiling.column,
            BLOCK_D=tiling.d,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            maxnreg=tiling.max_registers,
            enable_fp_fusion=True,  # the default of some Triton releases and not of others
        )

    def diagonal(self) -> Float[Tensor, "head row"]:
        out = torch.empty((self.n_heads, self.rows.n), dtype=torch.float32, device=self.rows.high.device)
        square = min(self.tiling.row, self.tiling.column)
        with launch_device(out):
            diagonal_kernel[(triton.cdiv(self.rows.n, square), self.n_heads)](
                self.rows.high, self.rows.low, self.weights.high, self.weights.low, out,
                self.rows.n, self.d, self.rows.high.stride(0), self.weights.high.stride(0),
                **(self._options() | {"BLOCK_COLUMN": square}),
            )  # fmt: skip
        return out

    def launch(
        self,
        *,
        maximum: Tensor | None = None,
        minimum: Tensor | None = None,
        total: Tensor | None = None,
        shift: Tensor | None = None,
        targets: Tensor | None = None,
        thresholds: Tensor | None = None,
        count: Tensor | None = None,
    ) -> None:
        """The first kernel; see there. What is None is not computed."""
        n_targets = 0 if count is None else count.shape[3]
        with launch_device(self.rows.high):
            head_logits_kernel[self.grid](
                self.rows.high, self.rows.low, self.weights.high, self.weights.low, maximum, minimum, total, shift,
                targets, thresholds, count,
                self.rows.n, self.weights.n, self.chunk_columns, self.n_chunks, self.n_groups, self.d,
                self.rows.high.stride(0), self.weights.high.stride(0),
                UNIT=self.unit, N_TARGETS=n_targets, GROUP=GROUP, **self._options(),
            )  # fmt: skip

    def count(
        self,
        targets: Int[Tensor, "head row m"],
        thresholds: Float[Tensor, "head row m"],
        **wanted: Tensor | None,
    ) -> Int[Tensor, "head row m"]:
        """Ranks of up to ``_TARGETS`` targets, and on the way what else is ``wanted``."""
        m = targets.shape[2]
        n = 1 if m == 1 else _TARGETS
        ids = torch.full((self.n_heads, self.rows.n, n), IGNORED, dtype=torch.int32, device=targets.device)
        above = torch.full(ids.shape, math.nan, dtype=torch.float32, device=targets.device)
        ids[..., :m], above[..., :m] = targets, thresholds
        shape = (self.n_heads, self.n_chunks, self.rows.n, n)
        count = torch.empty(shape, dtype=torch.int32, device=targets.device)
        self.launch(**wanted, targets=ids, thresholds=above, count=count)
        return count.sum(1)[..., :m]

    def logsumexp(self, total: Float[Tensor, "head chunk row"]) -> Float[Tensor, "head row"]:
        """A head's contributions are small: exp had no shift. Where that fails, again in the online form."""
        summed = total.sum(1)
        out = summed.log()
        bad = ~((summed > 1e-25) & torch.isfinite(summed))
        if not bool(bad.any()):
            return out
        shift = torch.empty_like(total)
        self.launch(total=total, shift=shift)
        exponent = shift * self.unit
        largest = finite_or_zero(exponent.amax(1))
        online = (total * torch.exp2(exponent - largest[:, None])).sum(1).log2_().add_(largest) / LOG2_E
        return torch.where(bad, online, out)

    def topk(
        self, extremes: Float[Tensor, "head group row"], k: int, *, largest: bool
    ) -> tuple[Float[Tensor, "head row k"], Int[Tensor, "head row k"]]:
        """The best of the members of the best groups, best first, with the second kernel."""
        groups = best_groups(extremes, parent_extremes(extremes, largest), k, largest)
        shape = (*groups.shape[:2], groups.shape[2] * GROUP)
        logits = torch.empty(shape, dtype=torch.float32, device=groups.device)
        tiling = group_tiling(self.d)
        grid = (triton.cdiv(self.rows.n, tiling.row), self.n_heads)
        with launch_device(logits):
            group_logits_kernel[grid](
                self.rows.high, self.rows.low, self.weights.high, self.weights.low, groups.contiguous(), logits,
                self.rows.n, self.weights.n, groups.shape[2], self.d,
                self.rows.high.stride(0), self.weights.high.stride(0), -math.inf if largest else math.inf,
                GROUP=GROUP, BLOCK_ROW=tiling.row, BLOCK_D=tiling.d,
                num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
        best = logits.topk(k, largest=largest)
        ids = groups.gather(2, best.indices // GROUP) * GROUP + best.indices % GROUP
        return best.values / self.weights.scale, ids.clamp_max_(self.weights.n - 1)  # beyond: in a row of NaN
