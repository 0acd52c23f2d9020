"""The strongest edges of an attribution, and the circuit that they make up."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from fastinterp.errors import OptionError, check_choice

By = Literal["absolute", "positive", "negative"]
Nodes = Literal["touched", "connected"]


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One edge: its score's mean over ``n_prompts`` prompts, and the standard error (NaN for a single prompt)."""

    source: str
    destination: str
    score: float
    standard_error: float
    n_prompts: int


def top_edges(found: xr.Dataset, k: int = 20, by: By = "absolute") -> list[Edge]:
    """Returns the ``k`` edges with the largest mean score over prompts, strongest first.

    ``found`` is what :func:`fastinterp.edge_attribution` returns, or a scan that has its scores. ``"absolute"`` ranks
    by size, ``"positive"`` and ``"negative"`` take those of one sign alone. Edges that do not exist, and such with a
    score of exactly zero, are left out. Ties stay in the order of sources. Raises
    :class:`~fastinterp.errors.OptionError` for ``k`` below one and for results without edges.

    Example:
        >>> [(edge.source, edge.destination, edge.score) for edge in top_edges(found, k=2)]        # doctest: +SKIP
        [('L5H5', 'L6H9.q', 0.41), ('MLP0', 'L3H0.k', -0.37)]
    """
    check_choice("by", by, ("absolute", "positive", "negative"))
    if k < 1:
        raise OptionError(f"k={k} edges cannot be listed: give 1 or more")
    mean, error, count = _over_prompts(found, _edge_name(found))
    key = {"absolute": np.abs(mean), "positive": mean, "negative": -mean}[by]
    order = np.argsort(-key, axis=None, kind="stable")
    first = [int(i) for i in order[: min(k, int((key > 0).sum()))]]
    labels = [found[dim].values.tolist() for dim in ("source", "destination")]
    rows = zip(first, *np.unravel_index(first, mean.shape), strict=True) if first else ()
    return [
        Edge(
            source=labels[0][s],
            destination=labels[1][d],
            score=float(mean.flat[i]),
            standard_error=float(error.flat[i]),
            n_prompts=int(count.flat[i]),
        )
        for i, s, d in rows
    ]


def edges_to_circuit(
    found: xr.Dataset, k: int = 20, by: By = "absolute", nodes: Nodes = "touched"
) -> list[tuple[int, int] | str]:
    """Returns the heads and MLPs of the ``k`` strongest edges, as :func:`fastinterp.circuit` takes them.

    Heads are pairs and MLPs labels: ``[(9, 6), "MLP0"]``. ``"touched"`` are all that such an edge begins or ends at,
    ``"connected"`` those alone through which the edges lead from ``embed`` to ``logits``. An edge to a KV head is one
    to every query head that reads it. ``embed`` and ``logits`` are no part of the result. Errors as :func:`top_edges`.

    Example:
        >>> kept = edges_to_circuit(found, k=200, nodes="connected")                               # doctest: +SKIP
        >>> fastinterp.circuit(model, prompts, keep=kept)["faithfulness"]                          # doctest: +SKIP
    """
    check_choice("nodes", nodes, ("touched", "connected"))
    edges = top_edges(found, k, by)
    begin, end = _node_table(found, "source"), _node_table(found, "destination")
    links = {(begin[edge.source][0], node) for edge in edges for node in end[edge.destination]}
    kept = {node for link in links for node in link}
    if nodes == "connected":
        kept = _reached(links, _EMBED) & _reached({(b, a) for a, b in links}, _LOGITS)
    heads_and_mlps = sorted(kept - {_EMBED, _LOGITS})
    return [(layer, head) if kind == 0 else f"MLP{layer}" for layer, kind, head in heads_and_mlps]


_Node = tuple[int, int, int]
"""Layer, 0 for a head and 1 for an MLP, the head: sorted as the model runs."""

_EMBED: _Node = (-1, 0, 0)
_LOGITS: _Node = (-2, 0, 0)


def _node_table(found: xr.Dataset, dim: str) -> dict[str, list[_Node]]:
    """The nodes that every label stands for."""
    kinds, layers, heads = (found[f"{dim}_{part}"].values.tolist() for part in ("kind", "layer", "head"))
    n_kv = sum(kind == "k" for kind in kinds) if dim == "destination" else 0
    group = sum(kind == "q" for kind in kinds) // n_kv if n_kv else 1
    table: dict[str, list[_Node]] = {}
    for label, kind, layer, head in zip(found[dim].values.tolist(), kinds, layers, heads, strict=True):
        if kind in ("k", "v"):
            table[label] = [(layer, 0, h) for h in range(head * group, (head + 1) * group)]
        elif kind in ("head", "q"):
            table[label] = [(layer, 0, head)]
        else:
            table[label] = [{"embed": _EMBED, "logits": _LOGITS}.get(kind, (layer, 1, 0))]
    return table


def _reached(links: set[tuple[_Node, _Node]], start: _Node) -> set[_Node]:
    """What can be reached along the links."""
    reached, new = {start}, {start}
    while new:
        new = {b for a, b in links if a in new} - reached
        reached |= new
    return reached


def _edge_name(found: xr.Dataset) -> str:
    names = [str(name) for name in found.data_vars if str(name).endswith("_edge")]
    if len(names) != 1:
        raise OptionError(
            f"the results have {' and '.join(names) or 'no edges'}: give what edge_attribution returns, or one "
            "metric's scores such as found[['logit_diff_edge']]"
        )
    return names[0]


def _over_prompts(found: xr.Dataset, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and number of prompts of every edge, one prompt in memory at a time."""
    array = found[name].transpose(..., "source", "destination")
    if "prompt" not in array.dims:
        mean = array.to_numpy().astype(np.float64)
        error = found.get(f"{name}_standard_error", array * np.nan).transpose("source", "destination").to_numpy()
        return mean, error, np.full(mean.shape, array.attrs.get("n_prompts", 1))
    count, mean, squares = (np.zeros(array.shape[1:]) for _ in range(3))
    for row in range(len(array)):
        values = array[row].to_numpy().astype(np.float64)
        known = ~np.isnan(values)
        count += known
        delta = np.where(known, values - mean, 0.0)
        mean += delta / np.maximum(count, 1)
        squares += delta * np.where(known, values - mean, 0.0)
    error = np.sqrt(squares / np.where(count > 1, count - 1, np.nan) / np.maximum(count, 1))
    return np.where(count > 0, mean, np.nan), error, count
