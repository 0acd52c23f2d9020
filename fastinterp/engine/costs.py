"""How many operations an analysis needs for given prompts; plans and progress bars are made of that."""

import math
from typing import Any

import numpy as np
from jaxtyping import Int

from fastinterp.analyses import Ablation, Analysis
from fastinterp.analyses.units import Unit, choose_units
from fastinterp.model.spec import ModelSpec

_AFTER = frozenset({"mlp_out", "post"})


def flops(
    analysis: Analysis, spec: ModelSpec, n_tokens: Int[np.ndarray, " prompt"], rows: Int[np.ndarray, " chosen"]
) -> float:
    """Returns the floating-point operations for some rows of prompts, of which ``n_tokens`` are the lengths.

    Matrix products, attention scores excluded. For ablations: the clean run; for every unit, mode and ablated position
    the tokens from that position on, through all that lies above the unit; and the unembedding wherever a metric needs
    all logits.
    """
    lengths = n_tokens[rows]
    if not isinstance(analysis, Ablation):
        return analysis.cost(spec, int(lengths.sum()))
    units = choose_units(spec, analysis.units).units
    forward = float(lengths.sum()) * spec.n_layers * spec.flops_per_token_block()
    total = forward + _unembedding(analysis, spec, _rows(analysis, lengths))
    n_modes = len(analysis.modes)
    if "total" in analysis.effects:
        above = sum(_above(spec, unit) for unit in units)
        for reached in _reached(analysis.pos, lengths, rows):
            per_unit = _unembedding(analysis, spec, _rows(analysis, reached))
            total += n_modes * (float(reached.sum()) * above + len(units) * per_unit)
    if "direct" in analysis.effects:
        kinds = len({metric.per_token for metric in analysis.metrics})
        runs = kinds * (2 if "resample" in analysis.modes else 1)
        total += runs * forward + n_modes * _direct(analysis, spec, units, lengths)
    return total


def mean_flops(analysis: Ablation, spec: ModelSpec, lengths: Int[np.ndarray, " prompt"]) -> float:
    """Returns the operations for the means of ablations over a reference set: a forward up to the highest unit."""
    n_layers = 1 + max(part.layer for unit in choose_units(spec, analysis.units).units for part in unit)
    return float(lengths.sum()) * n_layers * spec.flops_per_token_block()


def _reached(
    pos: Any, lengths: Int[np.ndarray, " prompt"], rows: Int[np.ndarray, " prompt"]
) -> list[Int[np.ndarray, " prompt"]]:
    """For every run of all units, the tokens of each prompt that can change."""
    if isinstance(pos, str) and pos == "each":
        return [np.maximum(lengths - at, 0) for at in range(int(lengths.max(initial=0)))]
    if isinstance(pos, str):
        return [lengths]
    if isinstance(pos, slice):
        starts = np.array([pos.indices(int(length))[0] for length in lengths], dtype=np.int64)
    else:
        at = np.asarray(pos, dtype=np.int64) if np.ndim(pos) == 0 else np.asarray(pos, dtype=np.int64)[rows]
        starts = np.where(at < 0, lengths + at, at)
    return [np.clip(lengths - starts, 0, lengths)]


def _rows(analysis: Ablation, reached: Int[np.ndarray, " prompt"]) -> dict[str, float]:
    """For every metric that needs all logits, the tokens at which it is measured: those that have a next one."""
    found: dict[str, float] = {}
    for metric in analysis.metrics:
        if metric.per_token:
            found[metric.name] = float((reached - 1).clip(min=0).sum())
        elif not metric.linear:
            found[metric.name] = float((reached > 0).sum())
    return found


def _unembedding(analysis: Ablation, spec: ModelSpec, rows: dict[str, float]) -> float:
    """One pass over the vocabulary for each token that a metric reads; metrics of the last token share theirs."""
    last = max((rows[m.name] for m in analysis.metrics if m.name in rows and not m.per_token), default=0.0)
    every = sum(rows[m.name] for m in analysis.metrics if m.per_token)
    return 2.0 * spec.d_model * spec.d_vocab * (last + every)


def _above(spec: ModelSpec, unit: Unit) -> float:
    """Operations per token that are done again for a unit: what lies above it."""
    each = spec.flops_per_token_block()
    first = min(part.layer for part in unit)
    above = float((spec.n_layers - 1 - first) * each)
    sites = {part.site for part in unit if part.layer == first}
    if sites <= _AFTER:
        return above
    if spec.parallel:
        return above if sites <= {"z"} else above + each
    matrices = 3 if spec.mlp.kind == "gated" else 2
    return above + 2 * matrices * spec.d_model * spec.mlp.d_mlp


def _direct(analysis: Ablation, spec: ModelSpec, units: tuple[Unit, ...], lengths: Int[np.ndarray, " prompt"]) -> float:
    rows = math.fsum(_rows(analysis, lengths).values())
    heads = all(len(unit) == 1 and unit[0].head is not None for unit in units)
    inner = spec.d_model + len(units) * spec.attention.d_head if heads else len(units) * spec.d_model
    return 2.0 * spec.d_vocab * inner * rows
