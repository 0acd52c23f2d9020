"""What ``linear_logprob`` means: its result, its input checks and the literal float64 computation."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -1
"""The target that asks for no value; its ``target_logit`` is NaN."""


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
    if x.shape[1] != W_U.shape[0]:
        raise ValueError(
            f"x has d_model {x.shape[1]} but W_U has shape {tuple(W_U.shape)}; expected W_U [d_model, "
            "d_vocab]. A weight stored as [d_vocab, d_model] is passed as W_E.T (no copy is made)."
        )
    if targets.shape[0] != x.shape[0]:
        raise ValueError(f"targets has {targets.shape[0]} rows and x has {x.shape[0]}; expected the same number.")
    if b_U is not None and b_U.shape != W_U.shape[1:]:
        raise ValueError(f"b_U has shape {tuple(b_U.shape)}; expected [d_vocab] = [{W_U.shape[1]}], or b_U=None.")
    for name, tensor in (("x", x), ("W_U", W_U), ("b_U", b_U)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected a float dtype. Type {name}.float().")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets has dtype {targets.dtype}; expected token ids. Type targets.long().")
    others = {str(t.device) for t in (W_U, targets, b_U) if t is not None and t.device != x.device}
    if others:
        raise ValueError(f"x is on {x.device} and other inputs are on {sorted(others)}; move all to one device.")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None for no softcap.")
    if targets.numel() and bool(((targets < IGNORED) | (targets >= W_U.shape[1])).any()):
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(
            f"targets lie between {low} and {high}; expected 0 to d_vocab - 1 = {W_U.shape[1] - 1}, or "
            f"{IGNORED} for a target to ignore. Where another value marks what to ignore (-100, say), type "
            f"targets.masked_fill(targets == -100, {IGNORED})."
        )


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
