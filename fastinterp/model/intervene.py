"""What may be read and what may be replaced on the way through the forward.

``forward`` asks its taps at every activation. A tap that nobody asked for costs one dictionary look-up per layer, and
activations that the fast path does not form (``pattern``, ``attn_scores``, ``result``) are formed only when wanted.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastinterp.errors import OptionError, check_choice
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


SOURCE: Final = "source"
"""In place of a replacement: the values that the same activation has in the source run of a sweep."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Changes one activation: ``site`` of ``layer``, of one ``head`` or ``neuron`` or of all, everywhere or not.

    ``replacement`` broadcasts against the changed part: ``0.0`` for zero ablation, a mean, another run's values.
    ``how`` says what becomes of it: ``"set"`` puts it in place, ``"scale"`` multiplies by it, ``"add"`` adds it
    (steering). ``head`` indexes the axis called ``head`` or ``kv_head`` of the site, ``neuron`` the axis ``d_mlp``.
    Without ``positions`` it is all of them; those of ``attn_scores`` and ``pattern`` are the queries', and ``keys`` are
    those of the keys. A replacement of ``SOURCE`` stands for the source run of a sweep; a forward by itself has none.
    """

    site: str
    layer: int
    head: int | None = None
    neuron: int | None = None
    positions: Bool[Tensor, "batch pos"] | None = None
    keys: Bool[Tensor, "batch pos"] | None = None
    replacement: Tensor | float | Literal["source"] = 0.0
    how: Literal["set", "scale", "add"] = "set"
    changes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses sites that do not exist, and heads and neurons of sites that have none."""
        dims = activation(self.site).dims
        for name, given, axes in (
            ("head", self.head, {"head", "kv_head"}),
            ("neuron", self.neuron, {"d_mlp"}),
            ("keys", self.keys, {"key_pos"}),
        ):
            if given is not None and not axes & set(dims):
                raise OptionError(f"site {self.site!r} has no {name} axis (its dims are {dims}): leave {name}=None")
        check_choice("how", self.how, ("set", "scale", "add"))
        if isinstance(self.replacement, str) and self.replacement != SOURCE:
            raise OptionError(f"replacement={self.replacement!r}: give a number, a tensor, or {SOURCE!r}")

    @property
    def by_query(self) -> bool:
        """Whether the site is ``[batch, head, query_pos, key_pos]``, with no axis of one value per token."""
        return "query_pos" in activation(self.site).dims

    def sourced(self, values: Tensor) -> "Edit":
        """Returns the edit with ``SOURCE`` resolved, given the whole activation of the source run."""
        if not isinstance(self.replacement, str):
            return self
        return dataclasses.replace(self, replacement=self._part(values))

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
        if self.by_query or isinstance(self.replacement, str):
            return False
        if not isinstance(self.replacement, Tensor):
            return self.positions is None
        return self.positions is None and self._aligned(self.replacement).shape[:2] == (1, 1)

    def _aligned(self, replacement: Tensor) -> Tensor:
        """Returns the replacement with an axis for each of the changed part, as broadcasting would add them."""
        axes = len(activation(self.site).dims) - (self.head is not None) - (self.neuron is not None)
        return replacement[(None,) * (axes - replacement.ndim)]

    def _part(self, value: Tensor) -> Tensor:
        """The head or neuron of the whole activation that is meant; a view."""
        dims = activation(self.site).dims
        if self.head is not None:
            axis = dims.index("head") if "head" in dims else dims.index("kv_head")
            value = value.select(axis, check_index("head", self.head, value.shape[axis]))
        if self.neuron is not None:
            value = value.select(-1, check_index("neuron", self.neuron, value.shape[-1]))
        return value

    def apply(self, value: Tensor) -> Tensor:
        """Returns ``value`` with the edit made, leaving the original alone."""
        if isinstance(self.replacement, str):
            raise OptionError(
                f"the edit of {self.site} takes its values from a source run, and there is none here: give the values "
                "themselves as replacement, or run a sweep with source prompts"
            )
        value = value.clone()
        part = self._part(value)
        given = torch.as_tensor(self.replacement, dtype=value.dtype, device=value.device)
        changed = given if self.how == "set" else part * given if self.how == "scale" else part + given
        where = self._where(part)
        part.copy_(changed.expand_as(part) if where is None else torch.where(where, changed, part))
        return value

    def _where(self, part: Tensor) -> Bool[Tensor, "..."] | None:
        """Which entries of the part are changed, to be broadcast against it; None for all."""
        mask = self.positions
        if mask is not None:
            mask = mask.view(*mask.shape, *[1] * (part.ndim - mask.ndim - (self.by_query and self.head is None)))
        if self.keys is not None:
            keys = self.keys[:, None]
            mask = keys if mask is None else mask & keys
        if mask is not None and self.by_query and self.head is None:
            mask = mask[:, None]
        return mask


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
