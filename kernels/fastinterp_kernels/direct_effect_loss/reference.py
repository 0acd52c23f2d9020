"""What ``direct_effect_loss`` means: its result, its input checks and the literal float64 computation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import (
    IGNORED,
    as_layers,
    check_float,
    check_same_device,
    check_softcap,
    check_targets,
    check_unembedding,
)

Layers = Tensor | Sequence[Tensor]
"""``z`` or ``W_O``: one tensor, or one per layer."""


class DirectEffect(NamedTuple):
    """Logits without one head's direct contribution, heads of all layers in order.

    The loss is ``logsumexp - target_logit[..., 0]`` nats. None for what was not asked for.

    """

    target_logit: Float[Tensor, "row head k"]
    """Softcapped logits of the targets, NaN for an ignored one."""
    logsumexp: Float[Tensor, "row head"]
    """Natural logarithm of the sum of exp of all softcapped logits."""
    rank: Int[Tensor, "row head k"] | None = None
    """Number of tokens with a strictly larger logit, 0 for the best; -1 for an ignored target."""
    kl: Float[Tensor, "row head"] | None = None
    """KL(softmax of all heads' logits || softmax without this head), nats."""


class Layer(NamedTuple):
    """A layer's heads; ``replacement`` has one row for all, or one per row of ``z``."""

    z: Float[Tensor, "row head d_head"]
    W_O: Float[Tensor, "head d_head d_model"]
    replacement: Float[Tensor, "#row head d_head"] | None


def check_inputs(
    x: Tensor,
    z: Layers,
    W_O: Layers,
    W_U: Tensor,
    targets: Tensor,
    b_U: Tensor | None,
    replacement: Layers | None,
    softcap: float | None,
) -> list[Layer]:
    """The layers; raises ``ValueError`` (shapes, ranges, devices) or ``TypeError`` (dtypes) for unusable inputs."""
    if x.ndim != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [row, d_model]. Flatten batch and pos first: x.flatten(0, 1)."
        )
    pairs = as_layers(z, W_O)
    n_rows, d_model = x.shape
    if pairs[0][0].shape[0] != n_rows or pairs[0][1].shape[2] != d_model:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, z has {pairs[0][0].shape[0]} rows and W_O has d_model "
            f"{pairs[0][1].shape[2]}; expected the same rows in x and z and the same d_model in x and W_O."
        )
    check_unembedding(d_model, W_U, b_U)
    if W_U.shape[1] == 0 or not any(mixed.shape[1] for mixed, _ in pairs):
        raise ValueError(f"W_U has {W_U.shape[1]} columns and z {[m.shape[1] for m, _ in pairs]} heads; expected some.")
    check_targets(targets, n_rows, W_U.shape[1])
    check_float(x=x, W_U=W_U, b_U=b_U)
    check_softcap(softcap)
    replaced = [None] * len(pairs) if replacement is None else _replacements(pairs, replacement)
    layers = [Layer(mixed, weight, other) for (mixed, weight), other in zip(pairs, replaced)]
    named = {f"{name}[{i}]": t for i, layer in enumerate(layers) for name, t in zip(Layer._fields, layer)}
    check_same_device(x=x, W_U=W_U, b_U=b_U, targets=targets, **named)
    return layers


def _replacements(pairs: list[tuple[Tensor, Tensor]], replacement: Layers) -> list[Tensor]:
    others = [replacement] if isinstance(replacement, Tensor) else list(replacement)
    wrong = [
        f"layer {i} has {tuple(other.shape)} for z {tuple(mixed.shape)}"
        for i, (other, (mixed, _)) in enumerate(zip(others, pairs))
        if other.ndim != 3 or other.shape[1:] != mixed.shape[1:] or other.shape[0] not in (1, mixed.shape[0])
    ]
    if wrong or len(others) != len(pairs):
        raise ValueError(
            f"replacement has {len(others)} layers and z has {len(pairs)}" + "".join(f"; {w}" for w in wrong) + "; "
            "expected the form of z, with its rows or with one row for all: for the mean over rows type "
            "[layer.mean(0, keepdim=True) for layer in z]."
        )
    check_float(**{f"replacement[{i}]": other for i, other in enumerate(others)})
    return others


def direct_effect_loss_reference(
    x: Float[Tensor, "row d_model"],
    layers: list[Layer],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    *,
    softcap: float | None = None,
    kl: bool = False,
    rank: bool = False,
) -> DirectEffect:
    """The definition in float64, holding the logits of one head ([row, d_vocab], 8 bytes each): for small inputs.

    Takes the arguments of ``direct_effect_loss``, heads as ``check_inputs`` returns them, and returns float64.
    """
    clean = x.double() @ W_U.double() + (0.0 if b_U is None else b_U.double())
    log_p = _capped(clean, softcap).log_softmax(1)
    ids, ignored = targets.long().clamp_min(0), targets == IGNORED
    heads = []
    for z, W_O, replacement in layers:
        removed = z.double() - (0.0 if replacement is None else replacement.double())
        for head in range(z.shape[1]):
            raw = clean - (removed[:, head] @ W_O[head].double()) @ W_U.double()
            edited = _capped(raw, softcap)
            logsumexp = edited.logsumexp(1)
            # Of the logits before the softcap, which keeps their order but rounds large ones to the same value.
            larger = (raw[:, :, None] > raw.gather(1, ids)[:, None, :]).sum(1) if rank else ids
            larger = larger.masked_fill(ignored | logsumexp.isnan()[:, None], -1)
            # A token of probability 0 adds nothing, also where both logits are -inf.
            surprise = (log_p - edited.log_softmax(1)).masked_fill(log_p == -math.inf, 0.0)
            target_logit = edited.gather(1, ids).masked_fill(ignored, math.nan)
            heads.append((target_logit, logsumexp, larger, (log_p.exp() * surprise).sum(1)))
    target_logit, logsumexp, larger, divergence = (torch.stack(values, 1) for values in zip(*heads))
    return DirectEffect(target_logit, logsumexp, larger if rank else None, divergence if kl else None)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
