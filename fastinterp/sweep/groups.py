"""Which variants go through the layers in one pass, and at which rows."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
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


class Order:
    """Variants in the order of their first layers and starts, at three numbers each.

    A sweep of thousands holds them for as long as it takes, beside a few bytes of one that goes through the model.
    """

    def __init__(self, planned: Iterable[Planned]) -> None:
        """Takes them one by one; those at the same rows have the same bytes, so that few kinds are told apart."""
        kinds: dict[tuple[tuple[int, ...] | None, int], int] = {}
        index, layer, kind = array("i"), array("i"), array("i")
        for each in planned:
            index.append(each.index)
            layer.append(each.first_layer)
            kind.append(kinds.setdefault((each.start, each.n_bytes), len(kinds)))
        self._kinds = list(kinds)
        rank = {start: place for place, start in enumerate(sorted({start or () for start, _ in kinds}))}
        ranks = np.array([rank[start or ()] for start, _ in kinds], np.int32)
        order = np.lexsort((ranks[np.asarray(kind)], np.asarray(layer)))
        self._index, self._layer, self._kind = (np.asarray(each)[order] for each in (index, layer, kind))

    def __len__(self) -> int:
        """How many variants."""
        return len(self._index)

    def __getitem__(self, place: int) -> Planned:
        """The variant at a place of the order."""
        start, n_bytes = self._kinds[int(self._kind[place])]
        index, layer = int(self._index[place]), int(self._layer[place])
        return Planned(index=index, first_layer=layer, start=start, n_bytes=n_bytes)

    @property
    def whole(self) -> bool:
        """Whether some are computed at every row."""
        return any(start is None for start, _ in self._kinds)

    def groups(self, residual_bytes: int) -> Iterator[tuple[list[Planned], int]]:
        """Cuts the variants into groups whose residuals stay below the bytes given; one variant always fits.

        With each group comes the first layer of the next one, 0 if there is none.
        """
        begin = 0
        while begin < len(self):
            end, total = begin + 1, self._n_bytes(begin)
            while end < len(self) and total + self._n_bytes(end) <= residual_bytes:
                total += self._n_bytes(end)
                end += 1
            yield [self[place] for place in range(begin, end)], int(self._layer[end]) if end < len(self) else 0
            begin = end

    def _n_bytes(self, place: int) -> int:
        return self._kinds[int(self._kind[place])][1]


def first_layer(group: Sequence[Planned]) -> int:
    """The layer below which all variants of a group, which are in the order of their first layers, are clean."""
    return group[0].first_layer


def by_start(group: Sequence[Planned]) -> list[tuple[tuple[int, ...] | None, list[Planned]]]:
    """Returns the variants that are computed at the same rows together."""
    apart: dict[tuple[int, ...] | None, list[Planned]] = {}
    for each in group:
        apart.setdefault(each.start, []).append(each)
    return list(apart.items())
