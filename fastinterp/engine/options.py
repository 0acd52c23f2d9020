"""How the ablations of a scan are asked for, in Python or as text, and how that is written down."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.analyses import Ablation
from fastinterp.analyses.replacements import MODES, check_seed
from fastinterp.analyses.units import choose_units, listed_units
from fastinterp.errors import OptionError, check_choice
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import PromptSet, TokenizedPrompts
from fastinterp.sweep import PRECISIONS
from fastinterp.sweep.memory import check_budget

EFFECTS = ("total", "direct", "both")
MEANS_OVER = ("tokens", "pos")

_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(|[kmgt]i?b?|b)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a kind of analysis, as fields; ``None`` where nothing was said."""

    @property
    def given(self) -> dict[str, Any]:
        """What was said, by name."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def arguments(self, names: frozenset[str]) -> dict[str, Any]:
        """Returns those called ``names`` as the analysis takes them."""
        return {name: value for name, value in self.given.items() if name in names}


@dataclass(frozen=True, kw_only=True)
class AblationOptions(Options):
    """The arguments of :func:`fastinterp.ablate` that a scan takes; ``None`` where nothing was said.

    ``ablate_pos`` is what ``ablate`` calls ``pos``. Text stands for the same things: ``"zero,mean"``,
    ``"L10H7,MLP3,L9H6+L9H9"`` (``+``: together), ``"last"`` for -1, ``"1:"`` for ``slice(1, None)``, ``"2GB"`` for
    2,000,000,000 and ``"2GiB"`` for 2 * 2**30 bytes.
    """

    mode: str | Sequence[str] | None = None
    effect: str | None = None
    units: str | Iterable[Any] | None = None
    ablate_pos: Any = None
    mean_over: str | None = None
    reference: PromptSet | str | Path | None = None
    seed: int | None = None
    precision: str | None = None
    memory_bytes: int | str | None = None

    def arguments(self, names: frozenset[str]) -> dict[str, Any]:
        """Returns those called ``names`` as :class:`Ablation` takes them, but for ``reference``.

        Raises :class:`OptionError` for text that says none of these.
        """
        found: dict[str, Any] = {}
        for name, value in self.given.items():
            if name not in names or name == "reference":
                continue
            match name:
                case "mode":
                    found["modes"] = listed(value)
                    for mode in found["modes"]:
                        check_choice("mode", mode, MODES)
                case "effect" | "mean_over":
                    check_choice(name, value, EFFECTS if name == "effect" else MEANS_OVER)
                    found[name] = value
                case "units":
                    found["units"] = listed_units(value)
                case "ablate_pos":
                    found["pos"] = _pos(value)
                case "precision":
                    check_choice("precision", value, PRECISIONS)
                    found["precision"] = value
                case "seed":
                    found["seed"] = check_seed(value)
                case "memory_bytes":
                    found["memory_bytes"] = _bytes(value)
        return found


def listed(value: str | Sequence[str]) -> tuple[str, ...]:
    """Returns names that were given as text with commas, or as a list."""
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else tuple(value)


def _bytes(value: Any) -> int:
    written = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if isinstance(value, str):
        if written is None:
            raise OptionError(f"memory_bytes={value!r}: give a number of bytes, such as 2GB (10^9) or 2GiB (2^30)")
        number, unit = written.groups()
        power = "bkmgt".index((unit or "b")[0].lower())
        value = int(float(number) * (1024 if "i" in unit.lower() else 1000) ** power)
    check_budget(value)
    return int(value)


def _pos(value: Any) -> Any:
    if not isinstance(value, str) or value in ("all", "each"):
        return value
    if value == "last":
        return -1
    bounds = _SLICE.fullmatch(value)
    if bounds:
        return slice(*(None if bound is None else int(bound) for bound in bounds.groups()))
    try:
        return int(value)
    except ValueError:
        raise OptionError(
            f"ablate_pos={value!r}: give all, last, each (every position by itself), a position such as 3 or -2, or a "
            "slice such as 1: or -3:"
        ) from None


def described(
    analysis: Ablation, spec: ModelSpec, reference: PromptSet | None, known: TokenizedPrompts | None
) -> dict[str, Any]:
    """Returns what an ablation was asked for as JSON types: what must be equal for its scan to be resumed.

    ``known`` is the ``reference`` tokenised: whether its text begins with BOS is not said by the prompts.
    """
    units = analysis.units if isinstance(analysis.units, str) else choose_units(spec, analysis.units).coords["unit"][1]
    found: dict[str, Any] = {
        "mode": list(analysis.modes),
        "effect": analysis.effect,
        "units": units,
        "ablate_pos": _pos_text(analysis.pos),
    }
    if "mean" in analysis.modes:
        found["mean_over"] = analysis.mean_over
        found["reference"] = "the prompts" if reference is None else reference.content_hash()
        if known is not None:
            found["reference_prepend_bos"] = known.prepend_bos
    if "resample" in analysis.modes:
        found["seed"] = analysis.seed
    if analysis.precision != "exact":
        found["precision"] = analysis.precision
    return found


def _pos_text(pos: Any) -> Any:
    if isinstance(pos, slice):
        return ":".join("" if bound is None else str(bound) for bound in (pos.start, pos.stop))
    return pos if isinstance(pos, str) else np.asarray(pos).tolist()
