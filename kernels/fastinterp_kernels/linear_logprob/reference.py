"""What ``linear_logprob`` means: its result, its input checks and the literal float64 computation."""

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


class LinearLogprob(NamedTuple):
    """Target logits and their row's logsumexp: log-probability ``target_logit - logsumexp[:, None]``."""

    target_logit: Float[Tensor, "row k"]
    logsumexp: Float[Tensor, " row"]


def check_inputs(x: Tensor, W_U: Tensor, targets: Tensor, b_U: Tensor | None, softcap: float | None) -> None:
    """Raise ``ValueError`` (shapes, ranges, devices) or ``TypeError`` (dtypes) for unusable inputs."""
    if x.ndim != 2 or W_U.ndim != 2 or targets.ndim != 2:
        raise ValueError(
            f"got x {tuple(x.shape)}, W_U {tuple(W_U.shape)} and targets {tuple(targets.shape)}; expected x "
            "[row, d_model], W_U [d_model, d_vocab] and targets [row, k]. For one target per row pass "
            "targets[:, None], and flatten batch and pos first: x.flatten(0, 1)."
        )
    check_unembedding(x.shape[1], W_U, b_U)
    check_float(x=x, W_U=W_U, b_U=b_U)
    check_same_device(x=x, W_U=W_U, targets=targets, b_U=b_U)
    check_softcap(softcap)
    check_targets(targets, x.shape[0], W_U.shape[1])


def linear_logprob_reference(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    *,
    softcap: float | None = None,
) -> LinearLogprob:
    """The definition in float64, holding all logits ([row, d_vocab], 8 bytes each): for small inputs.

    Takes the arguments of ``linear_logprob`` and returns float64.
    """
    logits = x.double() @ W_U.double()
    if b_U is not None:
        logits = logits + b_U.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    target_logit = logits.gather(1, targets.long().clamp_min(0))
    return LinearLogprob(
        target_logit=target_logit.masked_fill(targets == IGNORED, math.nan),
        logsumexp=torch.logsumexp(logits, dim=1),
    )
