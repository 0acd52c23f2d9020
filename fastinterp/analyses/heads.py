"""Which heads: all of them with dims ``layer, head``, or some with a dim ``unit``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastinterp.analyses.base import head_coords
from fastinterp.errors import OptionError
from fastinterp.model.spec import ModelSpec
from fastinterp.names import check_index, head_label

Heads = Literal["all"] | Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class ChosenHeads:
    """Heads in order: per layer those wanted (``None``: every one), and how results are laid out again."""

    spec: ModelSpec
    pairs: tuple[tuple[int, int], ...] | None

    @property
    def layers(self) -> list[int]:
        """The layers that have a wanted head, in order."""
        return list(range(self.spec.n_layers)) if self.pairs is None else sorted({layer for layer, _ in self.pairs})

    def of(self, per_layer: Mapping[int, Tensor], axis: int) -> list[Tensor]:
        """Returns the wanted heads of ``[.., head, ..]`` tensors, one tensor for each layer that has some.

        A layer of which all are wanted is not copied.
        """
        if self.pairs is None:
            return [per_layer[layer] for layer in self.layers]
        chosen = []
        for layer in self.layers:
            heads, values = [head for at, head in self._sorted if at == layer], per_layer[layer]
            some = len(heads) < self.spec.n_heads
            chosen.append(values.index_select(axis, torch.tensor(heads, device=values.device)) if some else values)
        return chosen

    def shaped(self, values: Tensor, axis: int = -1) -> Tensor:
        """Returns ``[.., heads in the order of :meth:`of`, ..]`` as ``layer, head``, or in the order that was asked."""
        axis = axis % values.ndim
        if self.pairs is None:
            apart: Tensor = values.unflatten(axis, (self.spec.n_layers, self.spec.n_heads))
            return apart
        where = {pair: index for index, pair in enumerate(self._sorted)}
        order = [where[pair] for pair in self.pairs]
        return values.index_select(axis, torch.tensor(order, device=values.device))

    @property
    def _sorted(self) -> list[tuple[int, int]]:
        assert self.pairs is not None
        return sorted(self.pairs)


def choose_heads(spec: ModelSpec, heads: Heads) -> ChosenHeads:
    """Checks a choice of heads against a model.

    Raises:
        OptionError: no pairs of layer and head, none at all, or one given twice.
        SiteRangeError: a head that the model does not have.
    """
    if isinstance(heads, str):
        if heads != "all":
            raise OptionError(f"heads={heads!r}: give 'all', or pairs of layer and head such as [(10, 7), (11, 10)]")
        return ChosenHeads(spec=spec, pairs=None)
    pairs: list[tuple[int, int]] = []
    for pair in heads:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise OptionError(f"heads has {pair!r}: give pairs of layer and head such as [(10, 7), (11, 10)]")
        layer, head = pair
        pairs.append((check_index("layer", layer, spec.n_layers), check_index("head", head, spec.n_heads)))
    if not pairs:
        raise OptionError("heads is empty: give 'all', or pairs of layer and head such as [(10, 7), (11, 10)]")
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise OptionError(f"heads has {head_label(*twice)} twice")
    return ChosenHeads(spec=spec, pairs=tuple(pairs))


def heads_dims(spec: ModelSpec, heads: Heads) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, Any]]:
    """Returns dims, sizes and coordinates of results per head: ``layer, head``, or ``unit`` for chosen ones."""
    chosen = choose_heads(spec, heads)
    if chosen.pairs is None:
        return ("layer", "head"), (spec.n_layers, spec.n_heads), dict(head_coords(spec))
    coords = {
        "unit": (("unit",), [head_label(*pair) for pair in chosen.pairs]),
        "layer": (("unit",), [layer for layer, _ in chosen.pairs]),
        "head": (("unit",), [head for _, head in chosen.pairs]),
    }
    return ("unit",), (len(chosen.pairs),), coords
