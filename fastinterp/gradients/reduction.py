"""First-order effects: what is between two runs at an activation, times the gradient, summed over its features."""

from collections.abc import Collection

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fastinterp_kernels.attribution_reduce import attribution_reduce

REDUCED = ("pos", "head", "neuron")


@torch.no_grad()
def attributions(
    site: str,
    source: Float[Tensor, "batch ..."],
    base: Float[Tensor, "batch ..."],
    gradient: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "batch pos"],
    reduce: Collection[str] = ("pos",),
    keys: Bool[Tensor, "batch key_pos"] | None = None,
) -> Float[Tensor, "batch ..."]:
    """Returns ``(source - base) * gradient`` of one activation, summed over features and what ``reduce`` names.

    Features are the last axis of the activation; of ``post`` and ``pattern`` every entry counts by itself. The result
    is ``[batch, pos, head]``, of a residual ``[batch, pos]``, of ``post`` ``[batch, pos, neuron]``, of ``pattern``
    ``[batch, head, query_pos, key_pos]``, without the axes of ``reduce`` (``"pos"`` stands for both of the pattern's,
    ``"head"`` for KV heads too). At padding, where ``mask`` is False, it is 0; ``keys`` is the mask of a pattern's keys
    where those of its queries are others. At least float32; the difference is formed first.
    """
    by_pos = "pos" not in reduce
    if site == "pattern":
        found = _each(source, base, gradient) if by_pos else attribution_reduce(source, base, gradient)
        if by_pos:
            found = found.masked_fill(~(mask if keys is None else keys)[:, None, None, :], 0.0)
        found = found.masked_fill(~mask.view(len(mask), 1, -1, *[1] * by_pos), 0.0)
        found = found if by_pos else found.sum(-1)
        return found.sum(1) if "head" in reduce else found
    if site == "post" and "neuron" not in reduce:
        if not by_pos:
            # Positions in the role of features: nothing of the size of the activation is made.
            return attribution_reduce(source.mT, base.mT, gradient.mT)
        return _each(source, base, gradient).masked_fill(~mask[..., None], 0.0)
    found = attribution_reduce(source, base, gradient)
    if "head" in reduce and found.ndim == 3:
        found = found.sum(-1)
    found = found.masked_fill(~mask.view(*mask.shape, *[1] * (found.ndim - 2)), 0.0)
    return found if by_pos else found.sum(1)


def missing_at_padding(
    found: Float[Tensor, "batch ..."], site: str, mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch ..."]:
    """Sets attributions that have their positions to NaN at padding."""
    if site == "pattern":
        real = mask[:, :, None] & mask[:, None, :]
        return found.masked_fill(~(real[:, None] if found.ndim == 4 else real), torch.nan)
    return found.masked_fill(~mask.view(*mask.shape, *[1] * (found.ndim - 2)), torch.nan)


def _each(source: Tensor, base: Tensor, gradient: Tensor) -> Tensor:
    """The product of every entry, which is as large as the result."""
    wide = torch.promote_types(source.dtype, torch.float32)
    return torch.sub(source.to(wide), base).mul_(gradient)
