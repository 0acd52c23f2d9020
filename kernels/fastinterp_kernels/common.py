"""What the operations share without Triton: choices of backend and precision, input checks, plain tiles.

Vocabulary: an operand is *rounded* to a precision by splitting it into ``parts`` whose products are added; see
:func:`operand_parts`. A *layer* is a pair ``z`` and ``W_O``; see :func:`as_layers`.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Backend = Literal["auto", "reference", "blocked", "triton"]
"""``auto``: ``triton`` for CUDA tensors where Triton is installed and nothing is float64, otherwise ``blocked``."""

Precision = Literal["exact", "bf16x3", "tf32", "bf16"]
"""How float32 operands are multiplied; sums are float32 always.

``exact``: as they are. ``bf16x3``: each is split into two bfloat16 parts, 16 fraction bits together, and the
product of the two small parts is left out. ``tf32``: rounded to 10 fraction bits. ``bf16``: rounded to 7.
"""

IGNORED = -1
"""The target that asks for no value: logits of it are NaN, its rank is -1."""

TILE_BYTES = 2**20
"""Size of a tile of logits in ``blocked``: it stays in a core's L2 cache between its passes."""


def compute_dtype(*operands: Tensor) -> torch.dtype:
    """float64 if an operand is float64, otherwise float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in operands) else torch.float32


def choose_backend(backend: Backend, *operands: Tensor) -> Literal["reference", "blocked", "triton"]:
    """The backend that ``backend`` stands for with these operands; raises ``ValueError`` for an unknown one."""
    if backend == "auto":
        usable = operands[0].is_cuda and compute_dtype(*operands) == torch.float32
        return "triton" if usable and importlib.util.find_spec("triton") is not None else "blocked"
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'reference', 'blocked' or 'triton'.")
    return backend


def choose_precision(precision: Precision | None, *operands: Tensor) -> Precision:
    """The precision that ``precision`` stands for with these operands.

    None is ``exact`` on the CPU and ``bf16x3`` on CUDA. Operands that are all bfloat16 or all float16 are
    multiplied as they are, which is ``exact``, whatever was asked for; so are float64 operands, but these
    refuse another explicit precision with a ``ValueError``. An unknown precision is a ``ValueError`` too.
    """
    if precision is not None and precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; expected None, 'exact', 'bf16x3', 'tf32' or 'bf16'.")
    if compute_dtype(*operands) == torch.float64:
        if precision not in (None, "exact"):
            raise ValueError(
                f"precision={precision!r} got float64 operands, which are multiplied exactly. Type "
                "precision='exact', or x.float() for every operand."
            )
        return "exact"
    dtypes = {tensor.dtype for tensor in operands}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        return "exact"
    if precision is None:
        return "bf16x3" if operands[0].is_cuda else "exact"
    return precision


# Products in plain torch ------------------------------------------------------------------------------------


def round_tf32(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """float32 rounded to tf32, 10 fraction bits; infinities and NaN stay."""
    bits = (tensor.contiguous().view(torch.int32) + 0x1000) & -0x2000
    return torch.where(torch.isfinite(tensor), bits.view(torch.float32), tensor)


def operand_parts(tensor: Float[Tensor, "..."], precision: Precision, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The parts of an operand, largest first, in ``dtype`` (that of :func:`compute_dtype`).

    One part; with ``bf16x3`` two, whose sum has 16 fraction bits. ``exact`` copies only to change the dtype.
    """
    wide = tensor.to(dtype)
    if precision == "exact":
        return (wide,)
    if precision == "tf32":
        return (round_tf32(wide),)
    high = wide.bfloat16().to(dtype)
    if precision == "bf16":
        return (high,)
    # An infinite high part has no rest: inf - inf is NaN.
    return high, (wide - high).bfloat16().to(dtype).masked_fill_(~torch.isfinite(high), 0.0)


def add_product_(out: Float[Tensor, "m n"], a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Float[Tensor, "m n"]:
    """Add the product of two split operands ``[m, k]`` and ``[k, n]`` to ``out``, small terms first."""
    if len(a) == 2 and len(b) == 2:  # the product of the two small parts, 2^-16 of the whole, is left out
        out.addmm_(a[1], b[0]).addmm_(a[0], b[1])
    return out.addmm_(a[0], b[0])


def finite_or_zero(shift: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``shift`` with 0 for infinities and NaN, for use under ``exp(x - shift)``, where -inf - -inf would be NaN."""
    return shift.masked_fill(~torch.isfinite(shift), 0.0)


def target_columns(
    W_U: Float[Tensor, "d_model d_vocab"], targets: Int[Tensor, "row k"], dtype: torch.dtype
) -> Iterator[tuple[slice, Float[Tensor, "d_model part_of_row k"]]]:
    """Slices of rows with a copy of their targets' columns of ``W_U`` (of column 0 where ignored).

    As many rows at a time as fit ``TILE_BYTES`` (16 times that on a GPU), at least one: d_model * k elements.
    """
    (n_rows, k), d_model = targets.shape, W_U.shape[0]
    n_bytes = TILE_BYTES if W_U.device.type == "cpu" else 16 * TILE_BYTES
    step = max(1, n_bytes // max(1, k * d_model * dtype.itemsize))
    for row in range(0, n_rows if k else 0, step):
        rows = slice(row, row + step)
        ids = targets[rows].long().clamp_min(0)
        yield rows, W_U.index_select(1, ids.flatten()).to(dtype).unflatten(1, (-1, k))


def target_logits(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "row k"]:
    """Logits of the targets alone, ``x . W_U[:, target]``: 2 d_model operations each, NaN where ignored.

    Exact products in every precision; memory as :func:`target_columns`.
    """
    dtype = compute_dtype(x, W_U)
    logits = torch.empty(targets.shape, dtype=dtype, device=x.device)
    for rows, columns in target_columns(W_U, targets, dtype):
        # A sum of products and not a matrix product: those may be set to tf32 for the whole process.
        logits[rows] = columns.mul_(x[rows].to(dtype).T[:, :, None]).sum(0)
    if b_U is not None:
        logits += b_U[targets.long().clamp_min(0)].to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(targets == IGNORED, math.nan)


# Heads ------------------------------------------------------------------------------------------------------


def as_layers(
    z: Float[Tensor, "row head d_head"] | Sequence[Float[Tensor, "row head d_head"]],
    W_O: Float[Tensor, "head d_head d_model"] | Sequence[Float[Tensor, "head d_head d_model"]],
) -> list[tuple[Tensor, Tensor]]:
    """``(z, W_O)`` layer by layer, checked; a tensor is one layer. Nothing is copied or stacked.

    Raises ``ValueError`` for shapes that do not fit each other and ``TypeError`` for dtypes that are not float.
    """
    zs, W_Os = ([x] if isinstance(x, Tensor) else list(x) for x in (z, W_O))
    if len(zs) != len(W_Os) or not zs:
        raise ValueError(
            f"z has {len(zs)} layers and W_O has {len(W_Os)}; expected as many of each, at least one: z "
            "[row, head, d_head] with W_O [head, d_head, d_model], or a list of each with one entry per layer."
        )
    for layer, (mixed, weight) in enumerate(zip(zs, W_Os)):
        fits = mixed.ndim == 3 and weight.ndim == 3 and mixed.shape[1:] == weight.shape[:2]
        if not fits or mixed.shape[0] != zs[0].shape[0] or weight.shape[2] != W_Os[0].shape[2]:
            raise ValueError(
                f"layer {layer} has z {tuple(mixed.shape)} and W_O {tuple(weight.shape)}; expected z [row, head, "
                "d_head] and W_O [head, d_head, d_model] with the same head, d_head, and with the same row and "
                "d_model in every layer. Flatten batch and pos first: z.flatten(0, 1)."
            )
        check_float(**{f"z[{layer}]": mixed, f"W_O[{layer}]": weight})
    return list(zip(zs, W_Os))


# Input checks -----------------------------------------------------------------------------------------------


def check_float(**tensors: Tensor | None) -> None:
    """Raise ``TypeError`` for a tensor, named by its keyword, that is not of a float dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a float dtype. Type {name}.float().")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all tensors are on the device of the first."""
    (name, first), *rest = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    others = {str(tensor.device) for _, tensor in rest if tensor.device != first.device}
    if others:
        raise ValueError(
            f"{name} is on {first.device} and other inputs are on {sorted(others)}; move all to one device."
        )


def check_unembedding(d_model: int, W_U: Tensor, b_U: Tensor | None) -> None:
    """Raise ``ValueError`` unless ``W_U`` is ``[d_model, d_vocab]`` and ``b_U`` None or ``[d_vocab]``."""
    if W_U.ndim != 2 or W_U.shape[0] != d_model:
        raise ValueError(
            f"d_model is {d_model} but W_U has shape {tuple(W_U.shape)}; expected W_U [d_model, "
            "d_vocab]. A weight stored as [d_vocab, d_model] is passed as W_E.T (no copy is made)."
        )
    if b_U is not None and b_U.shape != W_U.shape[1:]:
        raise ValueError(f"b_U has shape {tuple(b_U.shape)}; expected [d_vocab] = [{W_U.shape[1]}], or b_U=None.")


def check_targets(targets: Tensor, n_rows: int, d_vocab: int) -> None:
    """Raise unless ``targets`` holds ``[row, k]`` token ids or -1: ``ValueError``, ``TypeError`` for its dtype."""
    if targets.ndim != 2:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; expected [row, k]. For one target per row pass "
            "targets[:, None]."
        )
    if targets.shape[0] != n_rows:
        raise ValueError(f"targets has {targets.shape[0]} rows and x has {n_rows}; expected the same number.")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets has dtype {targets.dtype}; expected token ids. Type targets.long().")
    if not targets.numel():
        return
    low, high = torch.stack(torch.aminmax(targets)).tolist()
    if low < IGNORED or high >= d_vocab:
        raise ValueError(
            f"targets lie between {low} and {high}; expected 0 to d_vocab - 1 = {d_vocab - 1}, or "
            f"{IGNORED} for a target to ignore. Where another value marks what to ignore (-100, say), type "
            f"targets.masked_fill(targets == -100, {IGNORED})."
        )


def check_softcap(softcap: float | None) -> None:
    """Raise ``ValueError`` for a softcap that is not a positive number or None."""
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None for no softcap.")
