"""What may be read and what may be replaced on the way through the forward.

``forward`` asks its taps at every activation. A tap that nobody asked for costs one dictionary look-up per layer, and
activations that the fast path does not form (``pattern``, ``attn_scores``, ``result``) are formed only when wanted.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastinterp.errors import OptionError
from fastinterp.names import activation, check_index

Key = tuple[str, int | None]


@runtime_checkable
class Replaces(Protocol):
    """Anything that takes an activation and returns what shall stand in its place.

    ``changes`` says whether that can be something else; some only look at gradients.
    """

    @property
    def changes(self) -> bool:
        """Whether what is returned may differ from the activation."""
        ...

    def apply(self, value: Tensor) -> Tensor:
        """Returns the replacement; ``value`` itself must stay as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Replaces one activation: ``site`` of ``layer``, of one ``head`` or of all, at some ``positions`` or at all.

    ``replacement`` broadcasts against the replaced part: ``0.0`` for zero ablation, a mean, or another run's values.
    ``head`` indexes the axis called ``head`` or ``kv_head`` of the site.
    """

    site: str
    layer: int
    head: int | None = None
    positions: Bool[Tensor, "batch pos"] | None = None
    replacement: Tensor | float = 0.0
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses sites that do not exist and heads of sites without heads."""
        dims = activation(self.site).dims
        if self.head is not None and not {"head", "kv_head"} & set(dims):
            raise OptionError(f"site {self.site!r} has no head axis (its dims are {dims}): leave head=None")
        if self.positions is not None and "pos" not in dims:
            raise OptionError(f"site {self.site!r} has no pos axis (its dims are {dims}): leave positions=None")

    def gathered(self, rows: Int[Tensor, " n"], pos: Int[Tensor, " n"]) -> "Edit":
        """Returns the edit as it acts on ``[1, n, ...]``: the values at position ``pos[i]`` of sequence ``rows[i]``."""
        positions = None if self.positions is None else self.positions[rows, pos][None]
        replacement = self.replacement
        if isinstance(replacement, Tensor):
            aligned = self._aligned(replacement)
            n_rows, n_pos = aligned.shape[:2]
            if n_rows > 1 or n_pos > 1:
                replacement = aligned[rows if n_rows > 1 else 0 * rows, pos if n_pos > 1 else 0 * pos][None]
        return dataclasses.replace(self, positions=positions, replacement=replacement)

    @property
    def same_everywhere(self) -> bool:
        """Whether the edit is the same for every prompt and position."""
        if not isinstance(self.replacement, Tensor):
            return self.positions is None
        return self.positions is None and self._aligned(self.replacement).shape[:2] == (1, 1)

    def _aligned(self, replacement: Tensor) -> Tensor:
        """Returns the replacement with an axis for each of the replaced part, as broadcasting would add them."""
        axes = len(activation(self.site).dims) - (0 if self.head is None else 1)
        return replacement[(None,) * (axes - replacement.ndim)]

    def apply(self, value: Tensor) -> Tensor:
        """Returns ``value`` with the edit made, leaving the original alone."""
        dims = activation(self.site).dims
        value = value.clone()
        part = value
        if self.head is not None:
            axis = dims.index("head") if "head" in dims else dims.index("kv_head")
            head = check_index("head", self.head, value.shape[axis])
            part = value.select(axis, head)
        if self.positions is None:
            part.copy_(torch.as_tensor(self.replacement, dtype=value.dtype, device=value.device).expand_as(part))
        else:
            mask = self.positions.view(*self.positions.shape, *[1] * (part.ndim - 2))
            replacement = torch.as_tensor(self.replacement, dtype=value.dtype, device=value.device)
            part.copy_(torch.where(mask, replacement, part))
        return value


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Asks for activations by name, at all layers or at some (negative layers count from the end)."""

    name: str
    layers: tuple[int, ...] | None = None


@dataclass(kw_only=True)
class Taps:
    """Reads and replaces activations during one forward.

    ``values[name, layer]`` holds what was captured (``layer`` is ``None`` for activations outside of the blocks), after
    the edits of that site. Edits of one site are made in the order given. With ``at`` (sequences and their positions)
    only those positions are kept, of activations that have a ``pos`` axis: ``[n, ...]`` instead of
    ``[batch, pos, ...]``.
    """

    wanted: frozenset[Key] = frozenset()
    edits: dict[Key, list[Replaces]] = field(default_factory=dict)
    values: dict[Key, Tensor] = field(default_factory=dict)
    at: tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None = None

    @classmethod
    def of(
        cls,
        n_layers: int,
        *,
        capture: Iterable[Capture | str] = (),
        edits: Iterable[Edit] = (),
    ) -> "Taps":
        """Builds taps, checking every name and layer against the model."""
        wanted: set[Key] = set()
        for item in capture:
            request = Capture(name=item) if isinstance(item, str) else item
            if not activation(request.name).per_layer:
                wanted.add((request.name, None))
                continue
            layers = range(n_layers) if request.layers is None else request.layers
            wanted |= {(request.name, check_index("layer", layer, n_layers)) for layer in layers}
        by_site: dict[Key, list[Replaces]] = {}
        for edit in edits:
            layer = check_index("layer", edit.layer, n_layers) if activation(edit.site).per_layer else None
            by_site.setdefault((edit.site, layer), []).append(edit)
        return cls(wanted=frozenset(wanted), edits=by_site)

    def wants(self, name: str, layer: int | None) -> bool:
        """Whether this activation is read or replaced."""
        return (name, layer) in self.wanted or (name, layer) in self.edits

    def changes(self, name: str, layer: int | None) -> bool:
        """Whether this activation may be replaced."""
        return any(edit.changes for edit in self.edits.get((name, layer), ()))

    def wants_any(self, names: Iterable[str], layer: int | None) -> bool:
        """Whether one of these activations is read or replaced."""
        return any(self.wants(name, layer) for name in names)

    def __call__(self, name: str, layer: int | None, value: Tensor) -> Tensor:
        """Makes the edits of this site, keeps the value if it was asked for, and returns it."""
        for edit in self.edits.get((name, layer), ()):
            value = edit.apply(value)
        if (name, layer) in self.wanted:
            some = self.at is not None and "pos" in activation(name).dims
            siblings = TOGETHER.get(name, ())
            if not some and value._is_view() and not all((other, layer) in self.wanted for other in siblings):
                # A view would keep its whole base alive. The copy is also what goes on, so that gradients reach it.
                value = value.clone()
            self.values[name, layer] = value[self.at] if some else value
        return value

    def stacked(self, name: str, n_layers: int) -> Float[Tensor, "layer ..."]:
        """Returns a captured activation of all layers as one tensor."""
        return torch.stack([self.values[name, layer] for layer in range(n_layers)])


# Views of one tensor, which is kept without copies if all of them are wanted.
TOGETHER = {
    "q": ("k", "v"),
    "k": ("q", "v"),
    "v": ("q", "k"),
    "pre": ("pre_linear",),
    "pre_linear": ("pre",),
}
NO_TAPS = Taps()
