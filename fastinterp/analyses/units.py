"""What is ablated or patched: heads, MLPs, attention layers, blocks, neurons, or sets of these."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from jaxtyping import Shaped
from torch import Tensor

from fastinterp.analyses.base import head_coords
from fastinterp.errors import OptionError, check_choice
from fastinterp.model.spec import ModelSpec
from fastinterp.names import check_index, head_label

UnitKind = Literal["heads", "mlps", "attns", "layers", "neurons"]
Units = UnitKind | Iterable[Any]

KINDS = ("heads", "mlps", "attns", "layers", "neurons")

_LABEL = re.compile(r"^(?:L(?P<layer>\d+)(?:H(?P<head>\d+)|N(?P<neuron>\d+))|(?P<kind>MLP|ATTN)(?P<at>\d+))$")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One activation, or one head or neuron of it."""

    site: str
    layer: int
    head: int | None = None
    neuron: int | None = None

    @property
    def label(self) -> str:
        """``L9H6``, ``MLP9``, ``ATTN9`` or ``L9N123``."""
        if self.head is not None:
            return head_label(self.layer, self.head)
        if self.neuron is not None:
            return f"L{self.layer}N{self.neuron}"
        return f"{'MLP' if self.site == 'mlp_out' else 'ATTN'}{self.layer}"

    def of(self, values: Shaped[Tensor, "*rest"]) -> Tensor:
        """Returns this part of a whole activation, whose last axes are those of a head or of neurons."""
        if self.head is not None:
            return values[..., self.head, :]
        return values if self.neuron is None else values[..., self.neuron]


Unit = tuple[Part, ...]
"""What is ablated together."""


@dataclass(frozen=True, kw_only=True)
class ChosenUnits:
    """Units in order, and how results are labelled: ``values.unflatten(-1, shape)`` has the dims ``dims``."""

    units: tuple[Unit, ...]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    coords: dict[str, Any]

    @property
    def sites(self) -> dict[str, set[int]]:
        """Which activations are concerned, and in which layers."""
        found: dict[str, set[int]] = {}
        for unit in self.units:
            for part in unit:
                found.setdefault(part.site, set()).add(part.layer)
        return found

    @property
    def single_heads(self) -> list[tuple[int, int]] | None:
        """The heads, in order, if every unit is one, and none is given twice."""
        pairs = [(u[0].layer, u[0].head) for u in self.units if len(u) == 1 and u[0].head is not None]
        if len(pairs) < len(self.units) or len(set(pairs)) < len(pairs):
            return None
        return pairs


def listed_units(units: Any, name: str = "units") -> Any:
    """Returns a choice of units that can be gone through more than once: text, or a tuple.

    Labels in one text (``"L10H7, L9H6+MLP3"``), arrays, their rows and NumPy integers become tuples and integers,
    other iterables but sets tuples. Raises :class:`OptionError` for what is neither text nor iterable, and for text
    that is neither a kind nor labels.
    """
    if isinstance(units, str):
        return _labels_in(units, name)
    found = _plain(units)
    if not isinstance(found, tuple | set | frozenset):
        raise OptionError(f"{name}={units!r}: {_EXPECTED}")
    return tuple(found)


def _labels_in(text: str, name: str) -> Any:
    if not any(character.isdigit() for character in text):
        check_choice(name, text, KINDS)
        return text
    chosen: list[Any] = []
    for item in text.split(","):
        labels = _together(item)
        for label in labels:
            if not _LABEL.fullmatch(label):
                raise OptionError(
                    f"{name} has {label!r}: give {', '.join(KINDS)}, or labels such as L10H7, MLP3, ATTN3 and L3N17, "
                    "separated by commas (or by + where they are ablated together)"
                )
        chosen.append(labels[0] if len(labels) == 1 else labels)
    return tuple(chosen)


def _together(label: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in label.split("+"))


def _plain(item: Any) -> Any:
    item = item.tolist() if hasattr(item, "tolist") else item
    if isinstance(item, str | set | frozenset) or not isinstance(item, Iterable):
        return item
    return tuple(map(_plain, item))


def choose_units(spec: ModelSpec, units: Units, name: str = "units") -> ChosenUnits:
    """Checks a choice of units against a model; ``name`` is what messages call it.

    ``units`` is the name of a kind, or a list whose items are heads ``(10, 7)``, labels (``"L10H7"``, ``"MLP3"``,
    ``"ATTN3"``, ``"L3N17"`` for a neuron), or lists of these, which are ablated together; or an array of heads; or
    labels as text, separated by commas, and by ``+`` where they are ablated together.

    Raises:
        OptionError: no such kind, an item that is none of these, or no item.
        SiteRangeError: a layer, head or neuron that the model does not have.
    """
    listed = listed_units(units, name)
    if isinstance(listed, str):
        return _all_of_a_kind(spec, listed)
    chosen = tuple(_unit(spec, item, name) for item in listed)
    if not chosen:
        raise OptionError(f"{name} is empty: give 'heads', or a list such as [(10, 7), 'MLP3']")
    labels = ["+".join(part.label for part in unit) for unit in chosen]
    return ChosenUnits(units=chosen, dims=("unit",), shape=(len(chosen),), coords={"unit": (("unit",), labels)})


def _all_of_a_kind(spec: ModelSpec, kind: str) -> ChosenUnits:
    layers = range(spec.n_layers)
    coords: dict[str, Any] = {"layer": (("layer",), list(layers))}
    if kind == "heads":
        heads = tuple((Part(site="z", layer=i, head=h),) for i in layers for h in range(spec.n_heads))
        return ChosenUnits(
            units=heads, dims=("layer", "head"), shape=(spec.n_layers, spec.n_heads), coords=dict(head_coords(spec))
        )
    if kind == "neurons":
        d_mlp = spec.mlp.d_mlp
        neurons = tuple((Part(site="post", layer=i, neuron=n),) for i in layers for n in range(d_mlp))
        coords["neuron"] = (("neuron",), list(range(d_mlp)))
        return ChosenUnits(units=neurons, dims=("layer", "neuron"), shape=(spec.n_layers, d_mlp), coords=coords)
    sites = {"mlps": ("mlp_out",), "attns": ("attn_out",), "layers": ("attn_out", "mlp_out")}[kind]
    units = tuple(tuple(Part(site=site, layer=i) for site in sites) for i in layers)
    return ChosenUnits(units=units, dims=("layer",), shape=(spec.n_layers,), coords=coords)


def _unit(spec: ModelSpec, item: Any, name: str) -> Unit:
    if isinstance(item, str) and "+" in item:
        item = _together(item)
    if isinstance(item, str) or is_pair(item):
        return (_part(spec, item, name),)
    if isinstance(item, Iterable):
        parts = tuple(_part(spec, one, name) for one in item)
        if parts and len(set(parts)) == len(parts):
            return parts
    raise OptionError(f"{name} has {item!r}: {_EXPECTED}")


def _part(spec: ModelSpec, item: Any, name: str) -> Part:
    if is_pair(item):
        layer, head = item
        layer = check_index("layer", int(layer), spec.n_layers)
        return Part(site="z", layer=layer, head=check_index("head", int(head), spec.n_heads))
    found = _LABEL.match(item) if isinstance(item, str) else None
    if found is None:
        raise OptionError(f"{name} has {item!r}: {_EXPECTED}")
    if found["kind"]:
        layer = check_index("layer", int(found["at"]), spec.n_layers)
        return Part(site="mlp_out" if found["kind"] == "MLP" else "attn_out", layer=layer)
    if found["head"]:
        return _part(spec, (int(found["layer"]), int(found["head"])), name)
    layer = check_index("layer", int(found["layer"]), spec.n_layers)
    return Part(site="post", layer=layer, neuron=check_index("neuron", int(found["neuron"]), spec.mlp.d_mlp))


def is_pair(item: Any) -> bool:
    """Whether this is a head, ``(layer, head)``."""
    if isinstance(item, str) or not isinstance(item, Sequence) or len(item) != 2:
        return False
    return all(isinstance(index, Integral) and not isinstance(index, bool) for index in item)


_EXPECTED = (
    "give heads as (10, 7) or 'L10H7', 'MLP3', 'ATTN3', neurons as 'L3N17', or a list of these to ablate them together"
)


def every_part(spec: ModelSpec) -> list[Part]:
    """Every head and every MLP."""
    heads = [Part(site="z", layer=i, head=h) for i in range(spec.n_layers) for h in range(spec.n_heads)]
    return heads + [Part(site="mlp_out", layer=i) for i in range(spec.n_layers)]
