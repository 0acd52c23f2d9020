"""What ``linear_cross_entropy`` means: its result, its input checks and the literal float64 computation."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import (
    IGNORED,
    check_float,
    check_same_device,
    check_softcap,
    check_targets,
    check_unembedding,
)


class LinearCrossEntropy(NamedTuple):
    """Log-probability in nats: ``target_logit - logsumexp[:, None]``; None for what was not asked for."""

    target_logit: Float[Tensor, "row k"]
    """Softcapped logits of the targets, NaN for an ignored one."""
    logsumexp: Float[Tensor, " row"]
    """Natural logarithm of the sum of exp of all softcapped logits."""
    rank: Int[Tensor, "row k"] | None = None
    """Number of tokens with a strictly larger logit, 0 for the best; -1 for an ignored target."""
    top1: Int[Tensor, " row"] | None = None
    """Id of the token with the largest logit, the lowest id among equals."""
    kl: Float[Tensor, " row"] | None = None
    """KL(softmax of the logits of ``kl_from`` || softmax of the logits of ``x``), nats."""


def check_inputs(
    x: Tensor, W_U: Tensor, targets: Tensor, b_U: Tensor | None, softcap: float | None, kl_from: Tensor | None
) -> None:
    """Raise ``ValueError`` (shapes, ranges, devices, gradients) or ``TypeError`` (dtypes) for unusable inputs."""
    if x.ndim != 2 or W_U.ndim != 2 or targets.ndim != 2:
        raise ValueError(
            f"got x {tuple(x.shape)}, W_U {tuple(W_U.shape)} and targets {tuple(targets.shape)}; expected x "
            "[row, d_model], W_U [d_model, d_vocab] and targets [row, k]. For one target per row pass "
            "targets[:, None], and flatten batch and pos first: x.flatten(0, 1)."
        )
    if kl_from is not None and kl_from.shape != x.shape:
        raise ValueError(f"kl_from has shape {tuple(kl_from.shape)}; expected that of x, {tuple(x.shape)}.")
    check_unembedding(x.shape[1], W_U, b_U)
    check_float(x=x, W_U=W_U, b_U=b_U, kl_from=kl_from)
    check_same_device(x=x, W_U=W_U, targets=targets, b_U=b_U, kl_from=kl_from)
    check_softcap(softcap)
    check_targets(targets, x.shape[0], W_U.shape[1])
    for name, tensor in (("W_U", W_U), ("b_U", b_U)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient and linear_cross_entropy has one with respect to x only. Pass "
                f"{name}.detach(), or call it under `with torch.no_grad():`."
            )


def linear_cross_entropy_reference(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    kl_from: Float[Tensor, "row d_model"] | None = None,
    *,
    softcap: float | None = None,
    rank: bool = False,
    top1: bool = False,
) -> LinearCrossEntropy:
    """The definition in float64, holding all logits ([row, d_vocab], 8 bytes each): for small inputs.

    Takes the arguments of ``linear_cross_entropy``; float64 results, differentiable by torch itself.
    """
    raw = _raw_logits(x, W_U, b_U)
    logits = _soft_capped(raw, softcap)
    ids, ignored = targets.clamp_min(0), targets == IGNORED
    logsumexp = torch.logsumexp(logits, dim=1)
    nan = logsumexp.isnan()
    ranks = best = kl = None
    if rank:  # of the logits before the softcap, which keeps their order but rounds large ones to the same value
        ranks = (
            torch.stack([(raw > raw.gather(1, column[:, None])).sum(1) for column in ids.T], 1) if ids.numel() else ids
        )
        ranks = ranks.masked_fill(ignored | nan[:, None], -1)
    if top1:
        best = raw.argmax(1).masked_fill(nan, -1)
    if kl_from is not None:
        log_p = torch.log_softmax(_soft_capped(_raw_logits(kl_from.detach(), W_U, b_U), softcap), 1)
        log_q, p = torch.log_softmax(logits, 1), log_p.exp()
        # A token of probability 0 adds nothing, also where both logits are -inf.
        kl = (p * (log_p.masked_fill(p == 0, 0.0) - log_q.masked_fill(p == 0, 0.0))).sum(1)
    target_logit = logits.gather(1, ids).masked_fill(ignored, math.nan)
    return LinearCrossEntropy(target_logit, logsumexp, ranks, best, kl)


def _raw_logits(x: Tensor, W_U: Tensor, b_U: Tensor | None) -> Tensor:
    logits = x.double() @ W_U.double()
    return logits if b_U is None else logits + b_U.double()


def _soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
