"""Log-probabilities of given tokens under ``softmax(softcap(x @ W_U + b_U))`` without holding the logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import Backend, choose_backend
from fastinterp_kernels.linear_logprob.blocked import linear_logprob_blocked
from fastinterp_kernels.linear_logprob.reference import LinearLogprob, check_inputs, linear_logprob_reference

__all__ = ["Backend", "LinearLogprob", "linear_logprob"]


def linear_logprob(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    *,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> LinearLogprob:
    """Logits of ``targets`` and the logsumexp of all logits, row by row, without a ``[row, d_vocab]`` tensor.

    The same as, but in tiles::

        logits = x @ W_U + b_U
        logits = softcap * torch.tanh(logits / softcap)              # where a softcap is given
        LinearLogprob(logits.gather(1, targets), logits.logsumexp(1))

    so that ``target_logit - logsumexp[:, None]`` is the log-probability in nats and its negative the loss. A
    target of -1 is ignored: its ``target_logit`` is NaN. A target whose logit is -inf has log-probability
    -inf. The final norm is NOT included: ``x`` is the normalised residual. Forward only: no gradient.

    ``x`` and ``W_U`` may have any float dtype, and ``W_U`` may be a transposed ``[d_vocab, d_model]`` weight:
    neither layout is copied on the CPU. The result is float64 if either is float64 (``reference``: always),
    otherwise float32.

    ``backend``: ``"blocked"`` is plain torch over cache-sized tiles, ``"triton"`` a CUDA kernel,
    ``"reference"`` the literal float64 computation, which holds the logits. ``"auto"`` is ``"triton"`` for
    CUDA tensors where Triton is installed and nothing is float64, and ``"blocked"`` otherwise.

    Raises ``ValueError`` for shapes that do not fit, a target outside the vocabulary, inputs on different
    devices, a softcap that is not positive, inputs that ask for a gradient, or a backend that cannot run on
    this device, and ``TypeError`` for dtypes that are not float (``targets``: not integer).

    Example::

        >>> import torch
        >>> x, W_U = torch.zeros(2, 8), torch.randn(8, 100)
        >>> out = linear_logprob(x, W_U, torch.tensor([[3], [4]]))
        >>> logprob = out.target_logit - out.logsumexp[:, None]      # -log(100) everywhere, as x is zero
    """
    check_inputs(x, W_U, targets, b_U, softcap)
    operands = (x, W_U) if b_U is None else (x, W_U, b_U)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        raise ValueError(
            "linear_logprob has no backward pass and an input requires a gradient. Call it under `with "
            "torch.no_grad():`, or pass x.detach(); for a gradient use torch.log_softmax(x @ W_U, -1)."
        )
    backend = choose_backend(backend, x, W_U)
    if backend == "triton":
        # Imported here: importing Triton costs time, and there is none to import on some platforms.
        from fastinterp_kernels.linear_logprob.triton_kernel import linear_logprob_triton

        return linear_logprob_triton(x, W_U, targets, b_U, softcap=softcap)
    if backend == "blocked":
        return linear_logprob_blocked(x, W_U, targets, b_U, softcap=softcap)
    return linear_logprob_reference(x, W_U, targets, b_U, softcap=softcap)
