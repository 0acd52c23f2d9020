"""What ``head_logits`` means: its result, its input checks and the literal float64 computation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import IGNORED, check_float, check_same_device, check_targets, check_unembedding


class HeadLogits(NamedTuple):
    """What was asked for of every head's contribution to the logits; None what was not.

    ``top_*``: the k largest, in descending order; ``bottom_*``: the k smallest, in ascending order. ``rank``: the
    number of tokens that a head raises strictly more than the target (0: none), -1 where the target is ignored.
    """

    top_values: Float[Tensor, "row head k"] | None = None
    top_ids: Int[Tensor, "row head k"] | None = None
    bottom_values: Float[Tensor, "row head k"] | None = None
    bottom_ids: Int[Tensor, "row head k"] | None = None
    logsumexp: Float[Tensor, "row head"] | None = None
    target_logit: Float[Tensor, "row head m"] | None = None
    rank: Int[Tensor, "row head m"] | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to compute: ``k`` largest tokens, as many smallest with ``bottom``, and so on."""

    k: int
    bottom: bool
    targets: Int[Tensor, "row m"] | None
    rank: bool
    logsumexp: bool

    @property
    def needs_vocabulary(self) -> bool:
        """Whether every logit has to be looked at, and not those of the targets alone."""
        return self.k > 0 or self.rank or self.logsumexp


def check_inputs(layers: Sequence[tuple[Tensor, Tensor]], W_U: Tensor, wanted: Wanted) -> None:
    """Raise ``ValueError`` (shapes, ranges, devices) or ``TypeError`` (dtypes) for unusable inputs.

    ``layers`` as from ``as_layers``, which checks them by themselves.
    """
    z, W_O = layers[0]
    if not all(weight.shape[1] for _, weight in layers):
        raise ValueError(f"d_head is {[weight.shape[1] for _, weight in layers]} by layer; expected at least 1.")
    check_unembedding(W_O.shape[2], W_U, None)
    check_float(W_U=W_U)
    named = {f"{name}[{i}]": tensor for i, pair in enumerate(layers) for name, tensor in zip(("z", "W_O"), pair)}
    check_same_device(**named, W_U=W_U, targets=wanted.targets)
    check_wanted(wanted, z.shape[0], W_U.shape[1])


def check_wanted(wanted: Wanted, n_rows: int, d_vocab: int) -> None:
    """Raise ``ValueError`` for something that cannot be computed, or for nothing."""
    if not 0 <= wanted.k <= d_vocab:
        raise ValueError(f"k is {wanted.k}; expected 0 to d_vocab = {d_vocab}.")
    if wanted.targets is not None:
        check_targets(wanted.targets, n_rows, d_vocab)
    elif wanted.rank:
        raise ValueError("rank=True without targets: type targets=ids, [row, m], the tokens to rank.")
    if wanted.targets is None and not wanted.needs_vocabulary:
        raise ValueError("nothing was asked for. Type k=10, logsumexp=True or targets=ids ([row, m]).")


def check_no_grad(operation: str, *operands: Tensor) -> None:
    """Raise ``ValueError`` where an operand asks for a gradient, which is not computed."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        raise ValueError(
            f"{operation} has no backward pass and an input requires a gradient. Call it under `with "
            "torch.no_grad():`, or pass z.detach() and W_O.detach()."
        )


def head_logits_reference(layers: Sequence[tuple[Tensor, Tensor]], W_U: Tensor, wanted: Wanted) -> HeadLogits:
    """The definition in float64, holding all logits ([row, head, d_vocab], 8 bytes each): for small inputs."""
    result = torch.cat([torch.einsum("rhi,hid->rhd", z.double(), W_O.double()) for z, W_O in layers], dim=1)
    return reduce_logits(result @ W_U.double(), wanted)


def reduce_logits(logits: Float[Tensor, "row head d_vocab"], wanted: Wanted) -> HeadLogits:
    """The reductions of logits at hand, literally."""
    out = HeadLogits()
    if wanted.k:
        top = logits.topk(wanted.k)
        out = out._replace(top_values=top.values, top_ids=top.indices)
        if wanted.bottom:
            bottom = logits.topk(wanted.k, largest=False)
            out = out._replace(bottom_values=bottom.values, bottom_ids=bottom.indices)
    if wanted.logsumexp:
        out = out._replace(logsumexp=logits.logsumexp(-1))
    if wanted.targets is not None:
        ids = wanted.targets.long().clamp_min(0)[:, None].expand(-1, logits.shape[1], -1)
        ignored = (wanted.targets == IGNORED)[:, None]
        found = logits.gather(2, ids)
        out = out._replace(target_logit=found.masked_fill(ignored, math.nan))
        if wanted.rank:
            rank = torch.full(found.shape, -1, device=found.device)
            for place, threshold in enumerate(found.unbind(-1)):
                rank[..., place] = (logits > threshold[..., None]).sum(-1)
            out = out._replace(rank=rank.masked_fill(ignored, -1))
    return out
