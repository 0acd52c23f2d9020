"""The loss without each head's direct contribution to the logits, all heads in one pass over the vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import Backend, Precision, choose_backend, choose_precision, compute_dtype
from fastinterp_kernels.direct_effect_loss.blocked import direct_effect_loss_blocked
from fastinterp_kernels.direct_effect_loss.edits import Edits
from fastinterp_kernels.direct_effect_loss.reference import (
    DirectEffect,
    Layers,
    check_inputs,
    direct_effect_loss_reference,
)

__all__ = ["Backend", "DirectEffect", "Precision", "direct_effect_loss"]


def direct_effect_loss(
    x: Float[Tensor, "row d_model"],
    z: Layers,
    W_O: Layers,
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    *,
    replacement: Layers | None = None,
    softcap: float | None = None,
    kl: bool = False,
    rank: bool = False,
    backend: Backend = "auto",
    precision: Precision | None = None,
) -> DirectEffect:
    """Target logits and logsumexp of the logits without each head's direct contribution, every head on its own.

    The same as, but without a ``[row, d_vocab]`` tensor per head and in far fewer operations::

        clean = x @ W_U + b_U
        for layer, h in heads:                                           # heads of all layers, in order
            logits = clean - ((z - replacement)[:, h] @ W_O[h]) @ W_U
            logits = softcap * torch.tanh(logits / softcap)              # where a softcap is given
            target_logit, logsumexp = logits.gather(1, targets), logits.logsumexp(1)

    so that the loss is ``logsumexp - target_logit[..., 0]`` in nats. ``z`` ``[row, head, d_head]`` and ``W_O``
    ``[head, d_head, d_model]`` are tensors or lists of them, one per layer. ``replacement`` is what stands in place of
    ``z``: None for zero, otherwise in the form of ``z``, with all its rows or with one for all, such as its mean
    ``[layer.mean(0, keepdim=True) for layer in z]``.

    The final norm is NOT applied: ``x`` is the normalised residual, ``z`` is divided by the same frozen scale, and the
    norm's weight is folded into ``W_U``, so that a head's contribution is linear. What the head does through later
    layers is not included either.

    A target of -1 is ignored: its ``target_logit`` is NaN and its rank -1. ``rank``: also the number of tokens with a
    strictly larger logit, 0 for the best, before the softcap, which only hides differences; -1 where the logsumexp is
    NaN. ``kl``: also KL(softmax of the clean logits || softmax without the head) in nats.

    Tensors may have any float dtype, and ``W_U`` may be a transposed ``[d_vocab, d_model]`` weight: it is not copied
    whole on the CPU. The result is float64 if ``x``, ``z``, ``W_O`` or ``W_U`` is (``reference``: always), otherwise
    float32. ``precision`` says how float32 operands are multiplied for the logsumexp and the rank: see ``Precision``;
    None is ``"exact"`` on the CPU and ``"bf16x3"`` on CUDA. Target logits are exact in all. Forward only: no gradient.

    ``backend``: ``"blocked"`` is plain torch over cache-sized tiles, ``"triton"`` a CUDA kernel, ``"reference"`` the
    literal float64 computation, which holds the logits of one head. ``"auto"`` is ``"triton"`` for CUDA tensors where
    Triton is installed and nothing is float64, and ``"blocked"`` otherwise. Memory beyond inputs and outputs: less
    than 64 MB.

    Raises ``ValueError`` for shapes that do not fit, a target outside the vocabulary, inputs on different devices, a
    softcap that is not positive, inputs that ask for a gradient, an unknown precision or a backend that cannot run on
    this device, and ``TypeError`` for dtypes that are not float (``targets``: not integer).

    Example::

        >>> import torch
        >>> x, W_U = torch.randn(5, 8), torch.randn(8, 100)
        >>> z, W_O = [torch.randn(5, 2, 4)] * 3, [torch.randn(2, 4, 8)] * 3
        >>> targets = torch.randint(0, 100, (5, 1))
        >>> out = direct_effect_loss(x, z, W_O, W_U, targets)
        >>> loss = out.logsumexp - out.target_logit[..., 0]
        >>> loss.shape
        torch.Size([5, 6])
    """
    layers = check_inputs(x, z, W_O, W_U, targets, b_U, replacement, softcap)
    operands = [x, W_U, *(tensor for layer in layers for tensor in layer if tensor is not None)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*operands, *([] if b_U is None else [b_U]))):
        raise ValueError(
            "direct_effect_loss has no backward pass and an input requires a gradient. Call it under `with "
            "torch.no_grad():`, or pass x.detach()."
        )
    chosen = choose_backend(backend, *operands)
    if chosen == "reference":
        return direct_effect_loss_reference(x, layers, W_U, targets, b_U, softcap=softcap, kl=kl, rank=rank)
    edits = Edits(
        x=x, layers=layers, W_U=W_U, b_U=b_U, targets=targets, softcap=softcap,
        precision=choose_precision(precision, *operands), dtype=compute_dtype(*operands),
    )  # fmt: skip
    if chosen == "triton":
        # Imported here: importing Triton costs time, and there is none to import on some platforms.
        from fastinterp_kernels.direct_effect_loss.triton_kernel import direct_effect_loss_triton

        return direct_effect_loss_triton(edits, kl=kl, rank=rank)
    return direct_effect_loss_blocked(edits, kl=kl, rank=rank)
