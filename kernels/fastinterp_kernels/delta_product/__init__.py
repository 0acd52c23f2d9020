"""Matrix products of an edit's effect: the clean output plus a reduced-precision product of the difference."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import Backend, Precision, choose_backend
from fastinterp_kernels.delta_product.blocked import delta_product_blocked, has_wide_products, rounded_product_blocked
from fastinterp_kernels.delta_product.reference import (
    check_delta,
    check_product,
    chosen_precision,
    delta_product_reference,
    rounded_product_reference,
)

__all__ = ["Backend", "Precision", "delta_product", "rounded_product"]


def delta_product(
    x: Float[Tensor, "variant row n_in"],
    clean_x: Float[Tensor, "row n_in"],
    W: Float[Tensor, "n_in n_out"],
    clean_y: Float[Tensor, "row n_out"],
    *,
    precision: Precision | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "variant row n_out"]:
    """``x @ W`` (plus the bias in ``clean_y``) of edited runs, exact but for a rounding relative to the edit.

    The same as ``clean_y + round(x - clean_x) @ round(W)``: the difference from the clean run is formed in float32,
    rounded to ``precision`` and multiplied by the rounded weight; products are summed, and the clean output ``clean_y
    = clean_x @ W + b`` is added, in float32. What is rounded is the effect of the edit and not the activations: a row
    that equals its clean one gives exactly ``clean_y``. Costs ``2 * variant * row * n_in * n_out`` operations (three
    times that in ``bf16x3``).

    ``precision``: see ``Precision``; None is ``"bf16"`` on every device. ``W`` may be row-major or the transposed view
    of a row-major ``[n_out, n_in]`` weight, and is never copied as a whole. It may be in bfloat16 already, which is
    how to round it once for many calls: that is faster on a GPU, and in ``bf16`` the result is the same.

    The result is float32. If an input is float64 it is float64: the difference and the sums are, and operands are
    rounded nevertheless, unless ``precision`` is ``"exact"``. Forward only: no gradient.

    ``backend``: ``"blocked"`` is plain torch over blocks of rows, ``"triton"`` CUDA kernels, ``"reference"`` the same
    roundings with everything after them in float64, its result included. ``"auto"`` is ``"triton"`` for CUDA tensors
    where Triton is installed and nothing is float64, and ``"blocked"`` otherwise. Memory beyond inputs and output: a
    few blocks of 4 MiB (of 256 rows of ``x`` where those are larger); ``triton`` at most 32 MiB.

    Raises ``ValueError`` for shapes that do not fit, inputs on different devices or that ask for a gradient, an
    unknown precision or a backend that cannot run on this device, and ``TypeError`` for dtypes that are not float.

    Example::

        >>> import torch
        >>> clean_x, W, b = torch.randn(5, 8), torch.randn(8, 4), torch.randn(4)
        >>> x = clean_x + 0.01 * torch.randn(3, 5, 8)                       # three edited runs
        >>> delta_product(x, clean_x, W, clean_x @ W + b).shape
        torch.Size([3, 5, 4])
    """
    check_delta(x, clean_x, W, clean_y)
    rounding = chosen_precision(precision)
    chosen = choose_backend(backend, x, clean_x, W, clean_y)
    if chosen == "reference":
        return delta_product_reference(x, clean_x, W, clean_y, rounding)
    if chosen == "blocked":
        return delta_product_blocked(x, clean_x, W, clean_y, rounding)
    # Imported here: importing Triton costs time, and there is none to import on some platforms.
    from fastinterp_kernels.delta_product.triton_kernel import delta_product_triton

    return delta_product_triton(x, clean_x, W, clean_y, rounding)


def rounded_product(
    x: Float[Tensor, "*rows n_in"],
    W: Float[Tensor, "n_in n_out"],
    b: Float[Tensor, " n_out"] | None = None,
    *,
    precision: Precision | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "*rows n_out"]:
    """``x @ W + b`` with rounded operands: ``round(x) @ round(W) + b``, summed in float32.

    What a model in a reduced precision computes at each of its layers, for comparison with :func:`delta_product`;
    the result is not rounded. ``precision``, ``W``, the dtype of the result and the errors: as there. No setting of
    torch is changed, and none that allows tf32 changes the result of ``triton`` (``blocked`` in ``exact`` obeys them).

    ``backend``: as in :func:`delta_product`, but ``"auto"`` is ``"blocked"`` on CUDA in ``bf16`` too, where that is
    one product of cuBLAS with float32 sums and results. Memory beyond inputs and output: as there; for that product
    the operands in bfloat16.

    Example::

        >>> import torch
        >>> rounded_product(torch.ones(2, 3), 1.001 * torch.ones(3, 1)).flatten().tolist()
        [3.0, 3.0]
    """
    check_product(x, W, b)
    rounding = chosen_precision(precision)
    operands = [x, W] if b is None else [x, W, b]
    chosen: Literal["reference", "blocked", "triton"] = choose_backend(backend, *operands)
    if backend == "auto" and rounding == "bf16" and has_wide_products():
        chosen = "blocked"
    if chosen == "reference":
        return rounded_product_reference(x, W, b, rounding)
    if chosen == "blocked":
        return rounded_product_blocked(x, W, b, rounding)
    from fastinterp_kernels.delta_product.triton_kernel import rounded_product_triton

    return rounded_product_triton(x, W, b, rounding)
