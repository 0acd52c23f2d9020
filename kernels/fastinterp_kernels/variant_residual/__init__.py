"""The residual stream of many variants, each with some heads of one layer edited, without ``[row, head, d_model]``."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import Backend, Precision, choose_backend, choose_precision
from fastinterp_kernels.variant_residual.blocked import variant_residual_blocked
from fastinterp_kernels.variant_residual.reference import Edits, check_inputs, variant_residual_reference

__all__ = ["Backend", "Edits", "Precision", "variant_residual"]


def variant_residual(
    resid: Float[Tensor, "row d_model"],
    z: Float[Tensor, "row head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    edits: Edits,
    replacement: Float[Tensor, "#row head d_head"] | None = None,
    *,
    out: Float[Tensor, "variant row d_model"] | None = None,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> Float[Tensor, "variant row d_model"]:
    """``resid`` with the outputs of each variant's heads replaced, for all variants at once.

    The same as, but without the output of every head::

        result = torch.einsum("rhd,hdm->rhm", replacement - z, W_O)
        torch.stack([resid + result[:, heads].sum(1) for heads in edits])

    ``resid`` is the stream after the layer, ``z`` and ``W_O`` are the layer's. ``edits``: one head per variant as int
    ids, or any number as a bool mask ``[variant, head]``. ``replacement``: what stands in place of ``z``, with all its
    rows or with one for all; None is zero. Costs ``2 * d_head * row * d_model`` operations per edited head.

    The result has the dtype of ``resid`` (``reference``: float64); sums are float32, float64 if an operand is, rounded
    once. ``out``: where to write it, such as a slice of a batch; it must not overlap an input. ``precision`` says how
    float32 operands are multiplied: see ``Precision``; None is ``"exact"`` on the CPU and ``"bf16x3"`` on CUDA, whose
    error is relative to the edit and not to the residual. Forward only: no gradient.

    ``backend``: ``"blocked"`` is plain torch over blocks of rows, ``"triton"`` a CUDA kernel, ``"reference"`` the
    literal float64 computation. ``"auto"`` is ``"triton"`` for CUDA tensors where Triton is installed and nothing is
    float64, and ``"blocked"`` otherwise. Memory beyond inputs and output: less than 64 MB.

    Raises ``ValueError`` for shapes that do not fit, a head that is not there, inputs on different devices, inputs
    that ask for a gradient, an unknown precision or a backend that cannot run on this device, and ``TypeError`` for
    dtypes that are not float (``edits``: neither integer nor bool).

    Example::

        >>> import torch
        >>> resid, z, W_O = torch.randn(5, 8), torch.randn(5, 2, 4), torch.randn(2, 4, 8)
        >>> variant_residual(resid, z, W_O, torch.arange(2)).shape          # every head on its own, to zero
        torch.Size([2, 5, 8])
    """
    check_inputs(resid, z, W_O, edits, replacement, out)
    operands = [tensor for tensor in (resid, z, W_O, replacement) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        raise ValueError(
            "variant_residual has no backward pass and an input requires a gradient. Call it under `with "
            "torch.no_grad():`, or pass z.detach() and so on."
        )
    chosen = choose_backend(backend, *operands)
    if chosen == "reference":
        found = variant_residual_reference(resid, z, W_O, edits, replacement)
        return found if out is None else out.copy_(found)
    chosen_precision = choose_precision(precision, *operands[1:])
    if out is None:
        out = resid.new_empty((edits.shape[0], *resid.shape))
    if chosen == "triton":
        # Imported here: importing Triton costs time, and there is none to import on some platforms.
        from fastinterp_kernels.variant_residual.triton_kernel import variant_residual_triton

        variant_residual_triton(resid, z, W_O, edits, replacement, out, chosen_precision)
    else:
        variant_residual_blocked(resid, z, W_O, edits, replacement, out, chosen_precision)
    return out
