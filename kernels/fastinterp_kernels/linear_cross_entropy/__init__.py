"""Log-probabilities, ranks, best tokens and divergences of ``softmax(softcap(x @ W_U + b_U))`` without the logits."""

from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import Backend, Precision, choose_backend, choose_precision
from fastinterp_kernels.linear_cross_entropy.blocked import backward_blocked, forward_blocked
from fastinterp_kernels.linear_cross_entropy.gradient import Problem, with_gradient
from fastinterp_kernels.linear_cross_entropy.reference import (
    LinearCrossEntropy,
    check_inputs,
    linear_cross_entropy_reference,
)

__all__ = ["Backend", "LinearCrossEntropy", "Precision", "linear_cross_entropy"]


def linear_cross_entropy(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    *,
    softcap: float | None = None,
    rank: bool = False,
    top1: bool = False,
    kl_from: Float[Tensor, "row d_model"] | None = None,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> LinearCrossEntropy:
    """What is wanted of the logits of residuals, row by row, without a ``[row, d_vocab]`` tensor.

    The same as, but in tiles, in one pass over the vocabulary::

        raw = x @ W_U + b_U
        logits = softcap * torch.tanh(raw / softcap)                 # where a softcap is given
        p = torch.log_softmax(logits of kl_from, 1)
        LinearCrossEntropy(
            target_logit=logits.gather(1, targets),
            logsumexp=logits.logsumexp(1),
            rank=(raw[:, None] > raw.gather(1, targets)[:, :, None]).sum(2),     # rank=True
            top1=raw.argmax(1),                                                  # top1=True
            kl=(p.exp() * (p - torch.log_softmax(logits, 1))).sum(1),            # kl_from=...
        )

    so that ``logsumexp - target_logit[:, 0]`` is the cross-entropy in nats. A target of -1 is ignored: its
    ``target_logit`` is NaN and its rank -1. A target whose logit is -inf has log-probability -inf. Of equal
    logits, ``top1`` is the lowest id and ``rank`` counts none; logits that differ by less than rounding may
    count either way. A row with a NaN logit has rank and top1 -1. The final norm is NOT included: ``x`` and
    ``kl_from`` are normalised residuals.

    Differentiable once with respect to ``x``, through ``target_logit``, ``logsumexp`` and ``kl``; ``kl_from``
    counts as a constant. The backward pass computes the logits again, tile by tile (``target_logit`` alone
    needs none). A second derivative is a ``RuntimeError``, but with ``"reference"``.

    ``x``, ``kl_from`` and ``W_U`` may have any float dtype, and ``W_U`` may be a transposed ``[d_vocab,
    d_model]`` weight or a slice: no layout is copied on the CPU. The result is float64 if ``x`` or ``W_U`` is
    (``reference``: always), otherwise float32. Memory beyond inputs and results: below 64 MB, in the backward
    pass too.

    ``backend``: ``"blocked"`` is plain torch over cache-sized tiles, ``"triton"`` CUDA kernels,
    ``"reference"`` the literal float64 computation, which holds the logits. ``"auto"`` is ``"triton"`` for
    CUDA tensors where Triton is installed and nothing is float64, and ``"blocked"`` otherwise.

    ``precision``: how float32 operands are multiplied, ``"exact"``, ``"bf16x3"``, ``"tf32"`` or ``"bf16"``;
    None is ``"exact"`` on the CPU and ``"bf16x3"`` on CUDA. bfloat16 and float16 operands are multiplied as
    they are, float64 ones exactly. ``target_logit`` is exact in every mode; ``reference`` has float64 alone.

    Raises ``ValueError`` for shapes that do not fit, a target outside the vocabulary, inputs on different
    devices, a softcap that is not positive, a ``W_U`` or ``b_U`` that asks for a gradient, or a backend or
    precision that does not exist or cannot run here, and ``TypeError`` for dtypes that are not float
    (``targets``: not integer).

    Example::

        >>> import torch
        >>> x, W_U = torch.zeros(2, 8, requires_grad=True), torch.randn(8, 100)
        >>> out = linear_cross_entropy(x, W_U, torch.tensor([[3], [4]]), rank=True)
        >>> loss = out.logsumexp - out.target_logit[:, 0]            # log(100) everywhere, as x is zero
        >>> loss.sum().backward()                                    # x.grad: mean column minus the target's
    """
    check_inputs(x, W_U, targets, b_U, softcap, kl_from)
    operands = (x, W_U) if kl_from is None else (x, W_U, kl_from)
    backend = choose_backend(backend, *operands)
    precision = choose_precision(precision, *operands)
    if backend == "reference":
        return linear_cross_entropy_reference(
            x, W_U, targets.long(), b_U, kl_from, softcap=softcap, rank=rank, top1=top1
        )  # fmt: skip
    if kl_from is not None:
        kl_from = kl_from.detach()
    problem = Problem(x, W_U, targets.long(), b_U, kl_from, softcap, rank, top1, precision)
    if backend == "triton":
        # Imported here: importing Triton costs time, and there is none to import on some platforms.
        from fastinterp_kernels.linear_cross_entropy.triton_backward import backward_triton
        from fastinterp_kernels.linear_cross_entropy.triton_kernel import forward_triton

        return with_gradient(problem, forward_triton, backward_triton)
    return with_gradient(problem, forward_blocked, backward_blocked)
