"""What is changed in each run of a sweep."""

import dataclasses
from dataclasses import dataclass

from fastinterp.errors import OptionError
from fastinterp.model.intervene import Edit
from fastinterp.model.spec import ModelSpec
from fastinterp.names import check_index


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One edited run: its edits are made together, and no other variant's are."""

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        """Refuses a variant that changes nothing."""
        if not self.edits:
            raise OptionError("a variant needs at least one edit: Variant(edits=(Edit(site='z', layer=0, head=0),))")

    def resolved(self, spec: ModelSpec) -> "Variant":
        """Returns the variant with layers counted from the first; raises :class:`SiteRangeError` for absent ones."""
        return Variant(
            edits=tuple(
                dataclasses.replace(edit, layer=check_index("layer", edit.layer, spec.n_layers)) for edit in self.edits
            )
        )

    @property
    def first_layer(self) -> int:
        """The layer below which the run is the clean run."""
        return min(edit.layer for edit in self.edits)

    @property
    def enters_by_heads(self) -> bool:
        """Whether all edits are of ``z`` in one layer, so that the run differs only by what those heads write."""
        return all(edit.site == "z" and edit.layer == self.first_layer for edit in self.edits)


def head_variants(spec: ModelSpec) -> list[Variant]:
    """Returns one variant per head, layer by layer, that replaces the head's ``z`` by zero at every position."""
    return [
        Variant(edits=(Edit(site="z", layer=layer, head=head, replacement=0.0),))
        for layer in range(spec.n_layers)
        for head in range(spec.n_heads)
    ]
