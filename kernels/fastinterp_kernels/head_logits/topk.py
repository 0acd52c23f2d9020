"""Exact top-k by way of groups: the k largest entries lie in the k groups whose maxima are the largest."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

PARENT = 8
"""Groups to a parent: what is sorted is ``group / 8 + 8 k`` entries a row, and not ``group``."""


def parent_extremes(extremes: Float[Tensor, "*head group row"], largest: bool) -> Float[Tensor, "*head parent row"]:
    """Maxima (minima) of ``PARENT`` neighbouring groups each; groups after the last whole parent have none."""
    n_parents = extremes.shape[-2] // PARENT
    whole: Tensor = extremes[..., : n_parents * PARENT, :].unflatten(-2, (n_parents, PARENT))
    return torch.amax(whole, -2) if largest else torch.amin(whole, -2)


def best_groups(
    extremes: Float[Tensor, "*head group row"], parents: Float[Tensor, "*head parent row"], k: int, largest: bool
) -> Int[Tensor, "*head row some"]:
    """The ``min(k, group)`` groups with the largest (smallest) maximum (minimum), in no order.

    ``parents`` as from ``parent_extremes``.
    """
    n_groups, n_parents = extremes.shape[-2], parents.shape[-2]
    if n_parents < 2 * k:
        return extremes.mT.contiguous().topk(min(k, n_groups), largest=largest, sorted=False).indices
    best_parents = parents.mT.contiguous().topk(k, largest=largest, sorted=False).indices
    rest = torch.arange(n_parents * PARENT, n_groups, device=extremes.device).expand(*best_parents.shape[:-1], -1)
    groups = torch.cat([members(best_parents, PARENT), rest], dim=-1)
    best = extremes.mT.gather(-1, groups).topk(k, largest=largest, sorted=False).indices
    return groups.gather(-1, best)


def members(groups: Int[Tensor, "*row k"], size: int) -> Int[Tensor, "*row k_size"]:
    """The entries of groups of ``size`` neighbours."""
    return (groups[..., None] * size + torch.arange(size, device=groups.device)).flatten(-2)
