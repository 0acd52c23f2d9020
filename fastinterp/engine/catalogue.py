"""The analyses that a scan can be asked for by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from fastinterp.analyses import Ablation, Analysis, DirectLogitAttribution, HeadLogits, LogitLens
from fastinterp.engine.options import AblationOptions, listed
from fastinterp.errors import OptionError, nearest
from fastinterp.metrics import get_metric
from fastinterp.sweep import check_precision

_UNITS = frozenset({"units", "ablate_pos"})
_MEAN = frozenset({"mean_over", "reference"})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One analysis: how it is made for a metric, and what it gives. ``sweep``: minutes per block, not seconds.

    ``options`` are the :class:`AblationOptions` that it takes; ``make`` gets them as :class:`Ablation` calls them.
    ``several``: ``make`` takes several metrics (or none matters to it).
    """

    make: Callable[..., Analysis]
    description: str
    sweep: bool = False
    options: frozenset[str] = frozenset()
    several: bool = False


def _ablation(metric: str | Sequence[str], **options: Any) -> Ablation:
    return Ablation(metric_names=(metric,) if isinstance(metric, str) else tuple(metric), **options)


CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {
        "dla": Entry(
            make=lambda metric: DirectLogitAttribution(unit="head", metric_name=metric),
            description="direct logit attribution of every head: direct_effect (prompt, layer, head)",
        ),
        "dla_layer": Entry(
            make=lambda metric: DirectLogitAttribution(unit="layer", metric_name=metric),
            description="direct logit attribution of every block: direct_effect_layer (prompt, layer)",
        ),
        "dla_component": Entry(
            make=lambda metric: DirectLogitAttribution(unit="component", metric_name=metric),
            description="attention, MLP, embedding and bias terms: direct_effect_component (prompt, component)",
        ),
        "dla_neuron": Entry(
            make=lambda metric: DirectLogitAttribution(unit="neuron", metric_name=metric),
            description="direct logit attribution of every neuron: direct_effect_neuron (prompt, layer, neuron)",
        ),
        "head_logits": Entry(
            make=lambda metric: HeadLogits(),
            description="the ten tokens that every head raises and lowers most: head_top_token, head_top_logit, "
            "head_bottom_token, head_bottom_logit (prompt, layer, head, k)",
            several=True,
        ),
        "lens": Entry(
            make=lambda metric: LogitLens(metric_name=metric),
            description="the metric after every sublayer: <metric>_lens (prompt, site)",
        ),
        "ablation": Entry(
            make=_ablation,
            description="ablation of every head, with zeros unless --mode says otherwise: <metric>_zero_total "
            "(prompt, layer, head) and <metric>_clean (prompt)",
            sweep=True,
            options=_UNITS | _MEAN | {"mode", "effect", "seed", "precision", "memory_bytes"},
            several=True,
        ),
        "ablation_mean": Entry(
            make=lambda metric, **options: _ablation(metric, modes=("mean",), **options),
            description="every head replaced by its mean over the prompts scanned: <metric>_mean_total "
            "(prompt, layer, head) and <metric>_clean (prompt)",
            sweep=True,
            options=_UNITS | _MEAN | {"effect", "precision", "memory_bytes"},
            several=True,
        ),
        "ablation_resample": Entry(
            make=lambda metric, **options: _ablation(metric, modes=("resample",), **options),
            description="every head replaced by its value in the corrupt prompt, or in another one of the same length: "
            "<metric>_resample_total (prompt, layer, head) and <metric>_clean (prompt)",
            sweep=True,
            options=_UNITS | {"effect", "seed", "precision", "memory_bytes"},
            several=True,
        ),
        "direct": Entry(
            make=lambda metric, **options: _ablation(metric, modes=("zero", "mean"), effect="direct", **options),
            description="every head's direct effect, against zero and against its mean: <metric>_zero_direct, "
            "<metric>_mean_direct (prompt, layer, head) and <metric>_clean (prompt)",
            options=_UNITS | _MEAN | {"memory_bytes"},
            several=True,
        ),
    }
)


def choose_analyses(
    names: str | Sequence[str],
    metric: str | Sequence[str],
    options: AblationOptions | None = None,
) -> dict[str, Analysis]:
    """Returns the analyses asked for, as ``"dla,ablation"`` or a list of names, for one metric or several.

    Raises:
        OptionError: no name, an unknown one, or one given twice; options that do not fit; several metrics for an
            analysis that takes one.
        MetricError: the metric is unknown or does not fit an analysis.
    """
    options = options or AblationOptions()
    chosen_names = listed(names)
    metrics = listed(metric)
    for each in metrics:
        get_metric(each)
    for name in chosen_names:
        if name not in CATALOGUE:
            raise OptionError(
                f"there is no analysis {name!r}: choose from {', '.join(CATALOGUE)}{nearest(name, CATALOGUE)}"
            )
        if chosen_names.count(name) > 1:
            raise OptionError(f"analysis {name!r} is given twice")
    if not chosen_names:
        raise OptionError(f"no analysis was given: choose from {', '.join(CATALOGUE)}")
    if not metrics:
        raise OptionError("no metric was given: give one, such as 'logit_diff', or several for ablations")
    _check_options_fit(chosen_names, options)
    chosen = {name: _made(name, metrics, options) for name in chosen_names}
    _check_options_matter(chosen, options)
    return chosen


def _made(name: str, metrics: tuple[str, ...], options: AblationOptions) -> Analysis:
    entry = CATALOGUE[name]
    if len(metrics) > 1 and not entry.several:
        fitting = ", ".join(each for each, other in CATALOGUE.items() if other.options)
        raise OptionError(
            f"analysis {name!r} takes one metric, not {len(metrics)} ({', '.join(metrics)}): give it one, in a store "
            f"of its own; several are for {fitting}"
        )
    return entry.make(metrics[0] if len(metrics) == 1 else metrics, **options.arguments(entry.options))


def _check_options_fit(names: Sequence[str], options: AblationOptions) -> None:
    """Refuses an option that none of the analyses takes."""
    for option in options.given:
        if not any(option in CATALOGUE[name].options for name in names):
            fitting = ", ".join(name for name, entry in CATALOGUE.items() if option in entry.options)
            raise OptionError(
                f"{option} does not fit the analyses chosen ({', '.join(names)}): leave it out, or choose from "
                f"{fitting}"
            )


def _check_options_matter(chosen: Mapping[str, Analysis], options: AblationOptions) -> None:
    """Refuses an option of a mode that is not among those chosen."""
    ablations = [analysis for analysis in chosen.values() if isinstance(analysis, Ablation)]
    for option, mode in (("mean_over", "mean"), ("reference", "mean"), ("seed", "resample")):
        if option in options.given and not any(mode in analysis.modes for analysis in ablations):
            raise OptionError(
                f"{option} is for mode {mode!r}, which is not chosen: leave it out, or give mode={mode!r}"
            )
    if options.precision is not None and not any("total" in analysis.effects for analysis in ablations):
        raise OptionError("precision is for total effects, and only direct ones are chosen: leave it out")


def check_fits_dtype(chosen: Mapping[str, Analysis], dtype: torch.dtype) -> None:
    """Raises :class:`OptionError` for a precision that a model in ``dtype`` does not have."""
    for analysis in chosen.values():
        if isinstance(analysis, Ablation):
            check_precision(analysis.precision, dtype)


def check_ablation_limit(chosen: Mapping[str, Analysis], ablation_limit: int | None) -> None:
    """Raises :class:`OptionError` for a limit that none of the analyses chosen has."""
    if ablation_limit is not None and not any(CATALOGUE[name].sweep for name in chosen):
        limited = ", ".join(name for name, entry in CATALOGUE.items() if entry.sweep)
        raise OptionError(
            f"ablation_limit={ablation_limit} is for {limited}, and the analyses chosen ({', '.join(chosen)}) are of "
            "all prompts: leave it out, or give limit, which is for all analyses"
        )
