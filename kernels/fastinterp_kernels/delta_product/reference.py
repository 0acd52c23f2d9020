"""What ``delta_product`` and ``rounded_product`` mean: input checks, rounding of operands, the literal computation."""

from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import Precision, check_float, check_same_device, operand_parts


def chosen_precision(precision: Precision | None) -> Precision:
    """None is ``"bf16"`` on every device; raises ``ValueError`` for an unknown precision."""
    if precision is None:
        return "bf16"
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; expected None, 'exact', 'bf16x3', 'tf32' or 'bf16'.")
    return precision


def check_delta(x: Tensor, clean_x: Tensor, W: Tensor, clean_y: Tensor) -> None:
    """Raise ``ValueError`` (shapes, devices, gradients) or ``TypeError`` (dtypes) for unusable inputs."""
    if x.ndim != 3 or clean_x.ndim != 2 or x.shape[1:] != clean_x.shape:
        raise ValueError(
            f"got x {tuple(x.shape)} and clean_x {tuple(clean_x.shape)}; expected x [variant, row, n_in] and clean_x "
            "[row, n_in]. Flatten batch and pos first: x.flatten(1, -2), clean_x.flatten(0, -2)."
        )
    _check_weight(x, W)
    if clean_y.shape != (x.shape[1], W.shape[1]):
        raise ValueError(
            f"clean_y has shape {tuple(clean_y.shape)}; expected [row, n_out] = {[x.shape[1], W.shape[1]]}, the clean "
            "run's output with its bias: clean_x @ W + b."
        )
    _check_tensors(x=x, clean_x=clean_x, W=W, clean_y=clean_y)


def check_product(x: Tensor, W: Tensor, b: Tensor | None) -> None:
    """Raise ``ValueError`` (shapes, devices, gradients) or ``TypeError`` (dtypes) for unusable inputs."""
    if x.ndim == 0:
        raise ValueError("x is a single number; expected [..., n_in].")
    _check_weight(x, W)
    if b is not None and b.shape != W.shape[1:]:
        raise ValueError(f"b has shape {tuple(b.shape)}; expected [n_out] = [{W.shape[1]}], or b=None.")
    _check_tensors(x=x, W=W, b=b)


def _check_weight(x: Tensor, W: Tensor) -> None:
    if W.ndim != 2 or W.shape[0] != x.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and W has shape {tuple(W.shape)}; expected W [n_in, n_out] with n_in = "
            f"{x.shape[-1]}. A weight stored as [n_out, n_in] is passed as weight.T (no copy is made)."
        )


def _check_tensors(**tensors: Tensor | None) -> None:
    check_float(**tensors)
    check_same_device(**tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors.values()):
        raise ValueError(
            "This product has no backward pass and an input requires a gradient. Call it under `with "
            "torch.no_grad():`, or pass x.detach() and so on."
        )


def rounded_parts(tensor: Float[Tensor, "..."], precision: Precision, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The parts of an operand, largest first, in ``dtype``: as ``operand_parts``, for float64 too.

    float64 is rounded by way of float32. An operand in bfloat16 is one part in every precision.
    """
    if precision == "exact" or tensor.dtype == torch.bfloat16:
        return (tensor.to(dtype),)
    return tuple(part.to(dtype) for part in operand_parts(tensor.float(), precision, torch.float32))


def rounded_matmul(
    x: Float[Tensor, "*rows n_in"], W: Float[Tensor, "n_in n_out"], precision: Precision
) -> Float[Tensor, "*rows n_out"]:
    """The product of the rounded operands in float64; that of two small parts is left out."""
    x_high, *x_low = rounded_parts(x, precision, torch.float64)
    W_high, *W_low = rounded_parts(W, precision, torch.float64)
    product = x_high @ W_high
    for low in x_low:
        product += low @ W_high
    for low in W_low:
        product += x_high @ low
    return product


def difference(x: Tensor, clean_x: Tensor) -> Tensor:
    """``x - clean_x`` in float32, or in float64 if one of the two is."""
    wide = torch.promote_types(torch.promote_types(x.dtype, clean_x.dtype), torch.float32)
    return x.to(wide) - clean_x.to(wide)


def delta_product_reference(
    x: Float[Tensor, "variant row n_in"],
    clean_x: Float[Tensor, "row n_in"],
    W: Float[Tensor, "n_in n_out"],
    clean_y: Float[Tensor, "row n_out"],
    precision: Precision,
) -> Float[Tensor, "variant row n_out"]:
    """The definition: the difference and the roundings as defined, everything after them in float64."""
    return clean_y.double() + rounded_matmul(difference(x, clean_x), W, precision)


def rounded_product_reference(
    x: Float[Tensor, "*rows n_in"],
    W: Float[Tensor, "n_in n_out"],
    b: Float[Tensor, " n_out"] | None,
    precision: Precision,
) -> Float[Tensor, "*rows n_out"]:
    """The definition: the roundings as defined, everything after them in float64."""
    product = rounded_matmul(x, W, precision)
    return product if b is None else product + b.double()
