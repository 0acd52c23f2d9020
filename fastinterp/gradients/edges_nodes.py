"""The residual stream as a graph: what writes to it, what reads it, and who reads whom.

Writers are in the order in which they write, so that a reader reads all of them up to some place in that order::

    embed | L0H0 .. L0Hn | MLP0 | L1H0 .. | MLP1 | ...        (parallel blocks: MLP0 does not read L0H0 .. L0Hn)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from fastinterp.model.spec import ModelSpec
from fastinterp.names import head_label

SourceKind = Literal["embed", "head", "mlp"]
DestinationKind = Literal["q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A writer. ``embed`` (token and position) stands in front of layer 0, its ``layer`` is -1."""

    kind: SourceKind
    layer: int
    head: int | None = None

    @property
    def label(self) -> str:
        """``embed``, ``L9H6`` or ``MLP9``."""
        if self.head is not None:
            return head_label(self.layer, self.head)
        return "embed" if self.kind == "embed" else f"MLP{self.layer}"


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A reader. Of ``k`` and ``v``, ``head`` is the KV head; the ``layer`` of ``logits`` is the number of layers."""

    kind: DestinationKind
    layer: int
    head: int | None = None

    @property
    def label(self) -> str:
        """``L9H6.q``, ``L9KV2.k``, ``L9KV2.v``, ``MLP9`` or ``logits``."""
        if self.kind == "logits":
            return "logits"
        if self.head is None:
            return f"MLP{self.layer}"
        owner = head_label(self.layer, self.head) if self.kind == "q" else f"L{self.layer}KV{self.head}"
        return f"{owner}.{self.kind}"


def sources(spec: ModelSpec) -> list[Source]:
    """Returns the embedding, every head and every MLP, in the order in which they write."""
    found = [Source(kind="embed", layer=-1)]
    for layer in range(spec.n_layers):
        found += [Source(kind="head", layer=layer, head=head) for head in range(spec.n_heads)]
        found.append(Source(kind="mlp", layer=layer))
    return found


def destinations(spec: ModelSpec) -> list[Destination]:
    """Returns the inputs of queries, keys, values and the MLP, layer by layer, and the logits."""
    kinds: tuple[tuple[DestinationKind, int], ...] = (
        ("q", spec.n_heads),
        ("k", spec.attention.n_kv_heads),
        ("v", spec.attention.n_kv_heads),
    )
    found = []
    for layer in range(spec.n_layers):
        found += [Destination(kind=kind, layer=layer, head=head) for kind, n in kinds for head in range(n)]
        found.append(Destination(kind="mlp", layer=layer))
    return [*found, Destination(kind="logits", layer=spec.n_layers)]


def n_read(spec: ModelSpec, destination: Destination) -> int:
    """How many sources, from the first on, the destination reads."""
    in_front = 1 + destination.layer * (spec.n_heads + 1)
    return in_front + spec.n_heads if destination.kind == "mlp" and not spec.parallel else in_front


def edges_exist(spec: ModelSpec) -> Bool[np.ndarray, "source destination"]:
    """True where the source writes before the destination reads."""
    counts = np.array([n_read(spec, destination) for destination in destinations(spec)])
    exist: Bool[np.ndarray, "source destination"] = np.arange(len(sources(spec)))[:, None] < counts
    return exist
