"""The Triton kernels of ``direct_effect_loss``, over zero-padded operands, so that no load needs a mask.

One builds ``W_OV = W_O @ W_U`` for some heads and columns, and one adds up edited tiles. The sums of a tile are stored
per row, head and vocabulary tile, for torch to reduce. Offsets are int64.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from fastinterp_kernels.direct_effect_loss.triton_operands import add_product, store_parts


@triton.jit
def _product(
    a_ptr, a_low_ptr, a_rows, b_ptr, b_low_ptr, columns, depth, stride_b_depth, stride_b_column,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the product of ``a [row, depth]``, contiguous, and ``b [depth, column]``."""
    acc = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), dtype=tl.float32)
    steps = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
    a_offsets = a_rows[:, None] * depth + steps[None, :]
    b_offsets = steps[:, None] * stride_b_depth + columns[None, :] * stride_b_column
    for start in range(0, depth, BLOCK_DEPTH):
        step = tl.cast(start, tl.int64)
        acc = add_product(
            acc, a_ptr, a_low_ptr, a_offsets + step, b_ptr, b_low_ptr, b_offsets + step * stride_b_depth,
            WIDEN, ROUND_TF32, DOT,
        )  # fmt: skip
    return acc


@triton.jit
def build_kernel(
    o_ptr, o_low_ptr, u_ptr, u_low_ptr, high_ptr, low_ptr, d_model, scale,
    stride_u_d, stride_u_column, stride_row, stride_column,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """``scale * W_O @ W_U`` for stacked heads ``[head * d_head, d_model]`` and a slab of columns."""
    rows = (tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)).to(tl.int64)
    acc = _product(
        o_ptr, o_low_ptr, rows, u_ptr, u_low_ptr, columns, d_model, stride_u_d, stride_u_column,
        WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_COLUMN, BLOCK_DEPTH,
    )  # fmt: skip
    store_parts(high_ptr, low_ptr, rows[:, None] * stride_row + columns[None, :] * stride_column, acc * scale)


@triton.jit
def _exponents(raw, offset, twice_softcap, columns, n_columns):
    """Softcapped and shifted logits in units of log 2; -inf beyond the vocabulary."""
    if twice_softcap is not None:
        raw = offset[:, None] - twice_softcap / (1.0 + tl.exp2(raw))
        raw = tl.where(columns[None, :] < n_columns, raw, float("-inf"))
    return raw


@triton.jit
def _store_head(
    raw, p, columns, rows, head, place, n_padded_rows, offset, n_columns, twice_softcap,
    total_ptr, mean_ptr, threshold_ptr, own_ptr, larger_ptr, N_TARGETS: tl.constexpr,
):  # fmt: skip
    """Reduce one edited tile and store its sums at ``place``, which numbers tiles and heads."""
    for j in tl.static_range(N_TARGETS):
        threshold = tl.load(threshold_ptr + (head * N_TARGETS + j) * n_padded_rows + rows)
        own = tl.load(own_ptr + j * n_padded_rows + rows)
        # The target itself does not count: its logit may differ from the threshold in the last digit.
        above = (raw > threshold[:, None]) & (columns[None, :] != own[:, None])
        tl.store(larger_ptr + (place * N_TARGETS + j) * n_padded_rows + rows, tl.sum(above.to(tl.int32), axis=1))
    exponents = _exponents(raw, offset, twice_softcap, columns, n_columns)
    tl.store(total_ptr + place * n_padded_rows + rows, tl.sum(tl.exp2(exponents), axis=1))
    if mean_ptr is not None:
        tl.store(mean_ptr + place * n_padded_rows + rows, tl.sum(p * tl.where(p == 0.0, 0.0, exponents), axis=1))


@triton.jit
def sum_heads_kernel(
    x_ptr, x_low_ptr, u_ptr, u_low_ptr, bias_ptr, offset_ptr, z_ptr, z_low_ptr, w_ptr, w_low_ptr,
    total_ptr, mean_ptr, threshold_ptr, own_ptr, larger_ptr,
    d_model, n_columns, n_padded_rows, n_heads, heads_per_program, scale, twice_softcap,
    stride_u_d, stride_u_column, stride_w_head, stride_w_depth, stride_w_column,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr, D_HEAD: tl.constexpr, UNROLL: tl.constexpr,
    N_TARGETS: tl.constexpr, CLEAN: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_HEAD: tl.constexpr,
):  # fmt: skip
    """Program (i, j, s): row tile i, vocabulary tile j of the slab, some of the heads."""
    # Programs side by side share a vocabulary tile, which then comes from L2 for all but the first.
    rows = (tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)).to(tl.int64)
    columns = (tl.program_id(1) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)).to(tl.int64)
    first_head = tl.program_id(2) * heads_per_program
    last_head = tl.minimum(first_head + heads_per_program, n_heads)
    offset = tl.load(offset_ptr + rows)
    clean = _product(
        x_ptr, x_low_ptr, rows, u_ptr, u_low_ptr, columns, d_model, stride_u_d, stride_u_column,
        WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_COLUMN, BLOCK_D,
    )  # fmt: skip
    clean = clean * scale + tl.load(bias_ptr + columns)[None, :]
    if twice_softcap is None:
        clean += offset[:, None]
    p = clean
    tile = tl.program_id(1).to(tl.int64)
    if CLEAN:
        # The head after the last is the clean tile.
        exponents = _exponents(clean, offset, twice_softcap, columns, n_columns)
        p = tl.exp2(exponents)
        place = (tile * (n_heads + 1) + n_heads) * n_padded_rows
        tl.store(total_ptr + place + rows, tl.sum(p, axis=1))
        if mean_ptr is not None:
            tl.store(mean_ptr + place + rows, tl.sum(p * tl.where(p == 0.0, 0.0, exponents), axis=1))
    steps = tl.arange(0, BLOCK_D_HEAD).to(tl.int64)
    z_offsets = rows[:, None] * D_HEAD + steps[None, :]
    w_offsets = steps[:, None] * stride_w_depth + columns[None, :] * stride_w_column
    for head in range(first_head, last_head):
        z_start = tl.cast(head, tl.int64) * n_padded_rows * D_HEAD
        w_start = tl.cast(head, tl.int64) * stride_w_head
        raw = clean
        # Only innermost loops are pipelined: over heads where shared memory has room for that, else over d_head.
        if UNROLL:
            for step in tl.static_range(0, D_HEAD, BLOCK_D_HEAD):
                raw = add_product(
                    raw, z_ptr, z_low_ptr, z_offsets + (z_start + step),
                    w_ptr, w_low_ptr, w_offsets + (w_start + step * stride_w_depth), WIDEN, ROUND_TF32, DOT,
                )  # fmt: skip
        else:
            for step in range(0, D_HEAD, BLOCK_D_HEAD):
                raw = add_product(
                    raw, z_ptr, z_low_ptr, z_offsets + (z_start + step),
                    w_ptr, w_low_ptr, w_offsets + (w_start + step * stride_w_depth), WIDEN, ROUND_TF32, DOT,
                )  # fmt: skip
        _store_head(
            raw, p, columns, rows, tl.cast(head, tl.int64), tile * (n_heads + 1) + head, n_padded_rows, offset,
            n_columns, twice_softcap, total_ptr, mean_ptr, threshold_ptr, own_ptr, larger_ptr, N_TARGETS,
        )  # fmt: skip
