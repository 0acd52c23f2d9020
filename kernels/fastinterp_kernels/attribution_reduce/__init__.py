"""``((a - b) * grad).sum(-1)``, reading each tensor once and making no temporary of its size."""

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.attribution_reduce.blocked import attribution_reduce_blocked
from fastinterp_kernels.attribution_reduce.reference import attribution_reduce_reference, check_inputs
from fastinterp_kernels.common import Backend, choose_backend

__all__ = ["Backend", "attribution_reduce"]


def attribution_reduce(
    a: Float[Tensor, "*lead d"],
    b: Float[Tensor, "*#lead d"] | None,
    grad: Float[Tensor, "*lead d"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead"]:
    """The first-order effect of putting ``a`` in the place of ``b``: the sum of ``(a - b) * grad`` over the last axis.

    In attribution patching ``a`` is the activation that is patched in, ``b`` the one that is there (None for zero) and
    ``grad`` the gradient of the metric at ``b``; the result, one number per site and position, has the unit of the
    metric. ``b`` may leave out leading axes of ``a`` or have size 1 there. Every float dtype and memory layout is read
    as it is, without a copy. The difference is formed before the product, so that nothing cancels; products and sums
    are float32, float64 if an operand is (``reference``: always). Forward only: no gradient.

    ``backend``: ``"blocked"`` is plain torch over cache-sized pieces, ``"triton"`` a CUDA kernel, ``"reference"`` the
    literal float64 computation. ``"auto"`` is ``"triton"`` for CUDA tensors where Triton is installed and nothing is
    float64, and ``"blocked"`` otherwise.

    Raises ``ValueError`` for shapes that do not fit, inputs on different devices, inputs that ask for a gradient or a
    backend that cannot run on this device, and ``TypeError`` for dtypes that are not float.

    Example::

        >>> import torch
        >>> a, b, grad = (torch.randn(2, 7, 12, 64) for _ in range(3))      # batch, pos, head, d_head
        >>> attribution_reduce(a, b, grad).shape
        torch.Size([2, 7, 12])
    """
    check_inputs(a, b, grad)
    operands = (a, grad) if b is None else (a, b, grad)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        raise ValueError(
            "attribution_reduce has no backward pass and an input requires a gradient. Call it under `with "
            "torch.no_grad():`, or pass a.detach(), b.detach() and grad.detach()."
        )
    chosen = choose_backend(backend, *operands)
    if chosen == "triton":
        # Imported here: importing Triton costs time, and there is none to import on some platforms.
        from fastinterp_kernels.attribution_reduce.triton_kernel import attribution_reduce_triton

        return attribution_reduce_triton(a, b, grad)
    if chosen == "blocked":
        return attribution_reduce_blocked(a, b, grad)
    return attribution_reduce_reference(a, b, grad)
