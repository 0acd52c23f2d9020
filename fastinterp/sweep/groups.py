"""Which variants go through the layers in one pass, and at which rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from fastinterp.model.model import Model
from fastinterp.model.prefix import PrefixTree
from fastinterp.sweep.variants import Variant

# Ends of prompts are computed by themselves below this share of the tokens: their attention is slower for each.
_ENDS_SHARE = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The first layer of a variant, from where on it can differ (None: everywhere), and the bytes of its residual.

    Not the variant itself: while some go through the model, thousands may wait.
    """

    index: int
    first_layer: int
    start: tuple[int, ...] | None
    n_bytes: int

    @classmethod
    def of(
        cls,
        model: Model,
        tree: PrefixTree,
        n_tokens: Int[Tensor, " batch"],
        index: int,
        variant: Variant,
        starts: dict[tuple[int, ...], tuple[int, ...]],
    ) -> "Planned":
        """Decides whether only the ends of the prompts are computed for a variant; equal ``starts`` are one object."""
        each = model.spec.d_model * model.weights.W_E.element_size()
        start: tuple[int, ...] | None = None
        rows = max(tree.n_nodes, tree.node.numel())
        if not variant.needs_whole_sequences(model.spec):
            begins = variant.start(n_tokens)
            width = int((n_tokens - begins).max())
            if len(begins) * width < _ENDS_SHARE * tree.n_nodes:
                start, rows = tuple(begins.tolist()), len(begins) * width
                start = starts.setdefault(start, start)
        return cls(index=index, first_layer=variant.first_layer, start=start, n_bytes=rows * each)


def groups(planned: Sequence[Planned], residual_bytes: int) -> Iterator[list[Planned]]:
    """Cuts the variants into groups whose residuals stay below the bytes given; one variant always fits."""
    group: list[Planned] = []
    total = 0
    for each in planned:
        if group and total + each.n_bytes > residual_bytes:
            yield group
            group, total = [], 0
        group.append(each)
        total += each.n_bytes
    if group:
        yield group


def first_layer(group: Sequence[Planned]) -> int:
    """The layer below which all variants of a group, which are in the order of their first layers, are clean."""
    return group[0].first_layer


def by_start(group: Sequence[Planned]) -> list[tuple[tuple[int, ...] | None, list[Planned]]]:
    """Returns the variants that are computed at the same rows together."""
    apart: dict[tuple[int, ...] | None, list[Planned]] = {}
    for each in group:
        apart.setdefault(each.start, []).append(each)
    return list(apart.items())
