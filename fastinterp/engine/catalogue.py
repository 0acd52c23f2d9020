"""The analyses that a scan can be asked for by name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fastinterp.analyses import Ablation, Analysis, DirectLogitAttribution, HeadLogits, LogitLens
from fastinterp.errors import OptionError, nearest
from fastinterp.metrics import get_metric


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One analysis: how it is made for a metric, and what it gives. ``sweep``: minutes per block, not seconds."""

    make: Callable[[str], Analysis]
    description: str
    sweep: bool = False


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
        ),
        "lens": Entry(
            make=lambda metric: LogitLens(metric_name=metric),
            description="the metric after every sublayer: <metric>_lens (prompt, site)",
        ),
        "ablation": Entry(
            make=lambda metric: Ablation(metric_names=(metric,)),
            description="zero ablation of every head: <metric>_zero_total (prompt, layer, head) and "
            "<metric>_clean (prompt)",
            sweep=True,
        ),
        "ablation_mean": Entry(
            make=lambda metric: Ablation(metric_names=(metric,), modes=("mean",)),
            description="every head replaced by its mean over the prompts scanned: <metric>_mean_total "
            "(prompt, layer, head) and <metric>_clean (prompt)",
            sweep=True,
        ),
        "ablation_resample": Entry(
            make=lambda metric: Ablation(metric_names=(metric,), modes=("resample",)),
            description="every head replaced by its value in the corrupt prompt, or in another one of the same length: "
            "<metric>_resample_total (prompt, layer, head) and <metric>_clean (prompt)",
            sweep=True,
        ),
        "direct": Entry(
            make=lambda metric: Ablation(metric_names=(metric,), modes=("zero", "mean"), effect="direct"),
            description="every head's direct effect, against zero and against its mean: <metric>_zero_direct, "
            "<metric>_mean_direct (prompt, layer, head) and <metric>_clean (prompt)",
        ),
    }
)


def choose_analyses(names: str | Sequence[str], metric: str) -> dict[str, Analysis]:
    """Returns the analyses asked for, as ``"dla,ablation"`` or a list of names, for a metric.

    Raises:
        OptionError: no name, an unknown one, or one given twice.
        MetricError: the metric is unknown or does not fit an analysis.
    """
    listed = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    get_metric(metric)
    chosen: dict[str, Analysis] = {}
    for name in listed:
        if name not in CATALOGUE:
            raise OptionError(
                f"there is no analysis {name!r}: choose from {', '.join(CATALOGUE)}{nearest(name, CATALOGUE)}"
            )
        if name in chosen:
            raise OptionError(f"analysis {name!r} is given twice")
        chosen[name] = CATALOGUE[name].make(metric)
    if not chosen:
        raise OptionError(f"no analysis was given: choose from {', '.join(CATALOGUE)}")
    return chosen
