"""Reads what a config says about rotary positions, in its newer and its older spelling."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from fastinterp.errors import UnsupportedConfigError
from fastinterp.families.config import Config
from fastinterp.families.windows import FULL, SLIDING
from fastinterp.model.spec import Rope, RopeScaling

# What every kind of scaling needs, and what it may have beside that.
NEEDED: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
}
OPTIONAL: Mapping[str, frozenset[str]] = {
    "yarn": frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"})
}


def read_rope(
    config: Config,
    d_head: int,
    *,
    share: Literal["whole", "partial"] = "whole",
    layout: Literal["halves", "interleaved"] = "halves",
    layer_type: str | None = None,
) -> Rope:
    """Reads ``rope_parameters`` (of one ``layer_type``, where they differ), or ``rope_theta`` and ``rope_scaling``.

    ``share="partial"`` is for families that rotate the part of every head that ``partial_rotary_factor`` says.

    Raises :class:`UnsupportedConfigError` for a scaling that is not implemented, and for parameters it does not know.
    """
    stated = dict(config.get("rope_parameters", {}))
    if layer_type is not None:
        for key in sorted(set(stated) - {FULL, SLIDING}):
            raise UnsupportedConfigError(f"config rope_parameters[{key!r}]={stated[key]!r} is not supported")
        stated = dict(stated.get(layer_type) or {})
        if not stated:
            raise UnsupportedConfigError(f"config rope_parameters lacks {layer_type!r}")
    older = config.get("rope_scaling", {}) if layer_type is None else {}
    rope: dict[str, Any] = dict(older) | stated
    base = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    factor = rope.pop("partial_rotary_factor", None)
    if factor is None:
        factor = config.get("partial_rotary_factor", 1.0)
    dims = int(d_head * factor)
    if share == "whole" and factor != 1:
        raise UnsupportedConfigError(
            f"config partial_rotary_factor={factor!r} is not supported: this family rotates whole heads"
        )
    if dims % 2:
        raise UnsupportedConfigError(
            f"config partial_rotary_factor={factor!r} is not supported: it rotates {dims} of {d_head} dimensions, "
            "which are no pairs"
        )
    if kind not in NEEDED:
        raise UnsupportedConfigError(
            f"config rope_type={kind!r} is not supported: only {' or '.join(map(repr, NEEDED))}"
        )
    for key in sorted(key for key in NEEDED[kind] if rope.get(key) is None):
        raise UnsupportedConfigError(f"config rope_parameters lacks {key!r}, which rope_type={kind!r} needs")
    for key in sorted(set(rope) - NEEDED[kind] - OPTIONAL.get(kind, frozenset())):
        if rope[key] is not None:
            raise UnsupportedConfigError(f"config rope_parameters[{key!r}]={rope[key]!r} is not supported")
    return Rope(dims=dims, base=float(base), layout=layout, scaling=_scaling(kind, rope))


def _scaling(kind: str, rope: Mapping[str, Any]) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = float(rope["factor"])
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    original_n_ctx = int(rope["original_max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=factor,
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_n_ctx=original_n_ctx,
        )
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        attention_factor = (
            _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
            if mscale and mscale_all_dim
            else _yarn_mscale(factor, 1.0)
        )
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_n_ctx=original_n_ctx,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=float(attention_factor),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    """How much yarn multiplies queries and keys by, so that attention stays as sharp over a longer context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
