"""Edits of some variants of a stack, as taps of a block that all of them go through together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from fastinterp.model.intervene import Edit, Key, Replaces


@dataclass(frozen=True, kw_only=True)
class StackEdit:
    """Edits of single variants in ``[variant, row, ...]``, or in ``[variant batch, head, query_pos, key_pos]``."""

    n_variants: int
    n_pos: int
    edits: tuple[tuple[int, Edit], ...]
    changes: ClassVar[bool] = True

    def apply(self, value: Tensor) -> Tensor:
        """Returns the stack with every variant's edit made in it alone."""
        value = value.clone()
        apart = value.unflatten(0, (self.n_variants, -1))
        for index, edit in self.edits:
            # A variant is one row of packed tokens, [1, row, ...], or a batch of sequences that may have been padded.
            own = apart[index][..., : self.n_pos, : self.n_pos] if edit.by_query else apart[index]
            own.copy_(edit.apply(own))
        return value


def stack_edits(
    per_variant: Sequence[Sequence[Edit]], row: Int[Tensor, " row"], pos: Int[Tensor, " row"], n_pos: int
) -> dict[Key, list[Replaces]]:
    """Returns the edits of a stack for ``Taps``, in the order that each variant gives them.

    ``row`` and ``pos`` say which token a row is; sequences have ``n_pos`` positions, whatever they are padded to.
    """
    by_site: dict[Key, list[tuple[int, Edit]]] = {}
    for index, edits in enumerate(per_variant):
        for edit in edits:
            placed = edit if edit.by_query else edit.gathered(row, pos)
            by_site.setdefault((edit.site, edit.layer), []).append((index, placed))
    return {
        key: [StackEdit(n_variants=len(per_variant), n_pos=n_pos, edits=tuple(found))] for key, found in by_site.items()
    }
