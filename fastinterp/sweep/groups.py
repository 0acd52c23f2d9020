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
    """Variants in the order of their first layers and starts, at four numbers each.

    A sweep of thousands holds them for as long as it takes, beside a few bytes of one that goes through the model.
    """

    def __init__(self, planned: Iterable[Planned]) -> None:
        starts: dict[tuple[int, ...] | None, int] = {}
        numbers = array("q")
        for each in planned:
            start = starts.setdefault(each.start, len(starts))
            numbers.extend((each.index, each.first_layer, start, each.n_bytes))
        self._starts = list(starts)
        table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 4) if numbers else np.empty((0, 4), np.int64)
        by_start = sorted(range(len(self._starts)), key=lambda i: self._starts[i] or ())
        rank = np.empty(len(by_start), np.int64)
        rank[by_start] = np.arange(len(by_start))
        self._table = table[np.lexsort((rank[table[:, 2]], table[:, 1]))]

    def __len__(self) -> int:
        """How many variants."""
        return len(self._table)

    def __getitem__(self, place: int) -> Planned:
        """The variant at a place of the order."""
        index, layer, start, n_bytes = self._table[place].tolist()
        return Planned(index=index, first_layer=layer, start=self._starts[start], n_bytes=n_bytes)

    @property
    def whole(self) -> bool:
        """Whether some are computed at every row."""
        return None in self._starts

    def groups(self, residual_bytes: int) -> Iterator[tuple[list[Planned], int]]:
        """Cuts the variants into groups whose residuals stay below the bytes given; one variant always fits.

        With each group comes the first layer of the next one, 0 if there is none.
        """
        layers, n_bytes = self._table[:, 1], self._table[:, 3]
        begin = 0
        while begin < len(self):
            end, total = begin + 1, int(n_bytes[begin])
            while end < len(self) and total + int(n_bytes[end]) <= residual_bytes:
                total += int(n_bytes[end])
                end += 1
            yield [self[place] for place in range(begin, end)], int(layers[end]) if end < len(self) else 0
            begin = end


def first_layer(group: Sequence[Planned]) -> int:
    """The layer below which all variants of a group, which are in the order of their first layers, are clean."""
    return group[0].first_layer


def by_start(group: Sequence[Planned]) -> list[tuple[tuple[int, ...] | None, list[Planned]]]:
    """Returns the variants that are computed at the same rows together."""
    apart: dict[tuple[int, ...] | None, list[Planned]] = {}
    for each in group:
        apart.setdefault(each.start, []).append(each)
    return list(apart.items())
