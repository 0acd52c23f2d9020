"""Circuits: what a model still does with a set of heads and MLPs alone, everything else ablated."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fastinterp.analyses.base import Field, collect, tokenized
from fastinterp.analyses.budget import (
    BatchPlan,
    Costs,
    MeanCost,
    batch_targets,
    measured_by,
    n_targets,
    plan_batches,
    shape_of,
    widths_of,
    with_plan,
)
from fastinterp.analyses.measuring import sweep_values
from fastinterp.analyses.replacements import (
    MODES,
    MeanOver,
    Means,
    Mode,
    check_reference,
    check_seed,
    edit_of,
    mean_activations,
    reference_tokens,
    with_source,
)
from fastinterp.analyses.units import Part, choose_units, every_part, is_pair, listed_units
from fastinterp.errors import MetricError, OptionError, check_choice
from fastinterp.metrics import Metric, get_metric
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp.sweep import PRECISIONS, Precision, Variant, check_precision
from fastinterp.sweep.costs import Demand
from fastinterp.sweep.memory import check_budget
from fastinterp.sweep.resident import give_back

Among = Literal["heads", "mlps", "heads and mlps"]


def circuit(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    keep: Iterable[Any],
    mode: Mode = "mean",
    metric: str = "logit_diff",
    among: Among = "heads and mlps",
    reference: PromptSet | TokenizedPrompts | None = None,
    mean_over: MeanOver = "tokens",
    seed: int = 0,
    precision: Precision = "exact",
    memory_bytes: int | None = None,
) -> xr.Dataset:
    """Returns the metric of sets of heads and MLPs with everything else ablated, and how faithful they are.

    ``faithfulness = (mean metric of the set - mean metric of nothing) / (mean metric of the model - that of nothing)``,
    means over prompts: 1 for all of the model, 0 for nothing kept; it can be above 1 and below 0. It is that ratio
    whatever the sign of the metric and of the difference, so that 1 is "as the model", be the model better or worse
    than nothing. Equivalent to one run with hooks on ``hook_z`` and ``hook_mlp_out`` of every layer per set; all sets
    go through the model together.

    Args:
        keep: heads ``(10, 7)`` or ``"L10H7"`` and ``"MLP3"``, or an array of heads; or several such lists, one for each
            set (``[[]]``: nothing).
        mode: what stands in place of the rest; see :func:`ablate`.
        metric: any metric that is read at the last token.
        among: what is ablated unless it is kept.
        reference, mean_over, seed, precision, memory_bytes: as in :func:`ablate`.

    Returns:
        ``{metric}_circuit`` (prompt, circuit), ``{metric}_clean`` and ``{metric}_nothing`` (prompt), and
        ``faithfulness`` (circuit), NaN where the mean of the model equals that of nothing
        but for rounding (by at most 1e-5 of the larger).

    Raises:
        OptionError: no set, parts beside sets of them, parts that are neither heads nor MLPs, or not ``among`` those
            that are ablated; a ``reference`` that is too short for means by position (before the model runs).
        SiteRangeError: a layer or head that the model does not have.
        MetricError: a metric with a value per token.

    Memory: as :func:`ablate`, one variant for each set.
    Source: Wang et al. 2022, https://arxiv.org/abs/2211.00593; Hanna et al. 2024, https://arxiv.org/abs/2403.17806.

    Example:
        >>> found = fastinterp.circuit(model, prompts, [(9, 6), (9, 9), "MLP0"])                   # doctest: +SKIP
        >>> float(found["faithfulness"][0])                                                        # doctest: +SKIP
    """
    analysis = Circuit(
        keep=_listed(keep),
        mode=mode,
        metric_name=metric,
        among=among,
        mean_over=mean_over,
        seed=seed,
        precision=precision,
        memory_bytes=memory_bytes,
    )
    analysis.sets(model.spec)
    tokens = tokenized(model, prompts, analysis.metric)
    known = None if reference is None else reference_tokens(model, reference, tokens)
    prepared, tokens = analysis.prepared(model, tokens, known)
    found = with_plan(collect(prepared, model, tokens), prepared.batches)
    return found.assign(faithfulness=faithfulness(found, metric))


def faithfulness(found: Mapping[Any, xr.DataArray], metric: str) -> xr.DataArray:
    """Returns how much of the metric's mean each circuit keeps, NaN where there is nothing to keep."""
    nothing, whole, kept = (found[f"{metric}_{name}"].mean("prompt") for name in ("nothing", "clean", "circuit"))
    # What float32 makes of a metric whose ablations do nothing.
    rounding = 1e-5 * np.maximum(abs(whole), abs(nothing))
    share = (kept - nothing) / (whole - nothing).where(abs(whole - nothing) > rounding)
    share.attrs = {
        "units": "1",
        "long_name": "share of the metric's mean that the circuit keeps",
        "sign": "1 is all of the model, 0 is nothing kept, whichever of them is larger",
        "missing": "the mean of the model equals that of nothing kept, but for rounding",
    }
    return share


def _listed(keep: Any) -> tuple[Any, ...]:
    """Returns what is kept as a tuple that can be gone through more than once."""
    if isinstance(keep, str):
        labels = [label.strip() for label in keep.replace("+", ",").split(",")]
        raise OptionError(f"keep={keep!r} is text: give a list of heads and MLPs such as {labels}")
    found: tuple[Any, ...] = listed_units(keep, "keep")
    for item in found:
        if isinstance(item, str) and "+" in item:
            labels = [label.strip() for label in item.split("+")]
            raise OptionError(f"keep has {item!r}: give every set as a list of its own, such as [{labels}]")
    return found


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """The analysis behind :func:`circuit`, for one batch."""

    keep: tuple[Any, ...]
    mode: Mode = "mean"
    metric_name: str = "logit_diff"
    among: Among = "heads and mlps"
    mean_over: MeanOver = "tokens"
    seed: int = 0
    precision: Precision = "exact"
    memory_bytes: int | None = None
    batches: BatchPlan | None = field(default=None, repr=False, compare=False)
    means: Means | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses modes, metrics, choices and seeds that there are not."""
        object.__setattr__(self, "seed", check_seed(self.seed))
        check_choice("mode", self.mode, MODES)
        check_choice("among", self.among, ("heads", "mlps", "heads and mlps"))
        check_choice("mean_over", self.mean_over, ("tokens", "pos"))
        check_choice("precision", self.precision, PRECISIONS)
        check_budget(self.memory_bytes)
        if self.metric.per_token:
            raise MetricError(
                f"metric {self.metric_name!r} has a value at every token: choose one that is read at the last, such as "
                "'logprob'"
            )

    @property
    def metric(self) -> Metric:
        """What the circuit is judged by."""
        return get_metric(self.metric_name)

    def sets(self, spec: ModelSpec) -> list[frozenset[Part]]:
        """Returns what each set keeps; raises :class:`OptionError` for what is no set of heads and MLPs."""
        if not self.keep:
            raise OptionError("keep is empty: give heads and MLPs such as [(9, 6), 'MLP0'], or [[]] for nothing")
        is_set = [not isinstance(item, str) and isinstance(item, Iterable) and not is_pair(item) for item in self.keep]
        if any(is_set) and not all(is_set):
            raise OptionError(
                f"keep has {self.keep[is_set.index(False)]!r} beside {self.keep[is_set.index(True)]!r}: give heads and "
                "MLPs for one set, or a list of them for each set"
            )
        given = self.keep if all(is_set) else [self.keep]
        ablated = set(self.candidates(spec))
        found = []
        for items in given:
            parts = {part for item in items for unit in choose_units(spec, [item], "keep").units for part in unit}
            other = next((part for part in sorted(parts, key=lambda p: p.label) if part not in ablated), None)
            if other is not None:
                raise OptionError(
                    f"keep has {other.label}, and what is ablated unless it is kept are {self.among}: leave it out"
                )
            found.append(frozenset(parts))
        return found

    def candidates(self, spec: ModelSpec) -> list[Part]:
        """What is ablated unless it is kept."""
        sites = {"heads": ("z",), "mlps": ("mlp_out",)}.get(self.among, ("z", "mlp_out"))
        return [part for part in every_part(spec) if part.site in sites]

    def prepared(
        self, model: Model, prompts: TokenizedPrompts, reference: TokenizedPrompts | None = None
    ) -> tuple["Circuit", TokenizedPrompts]:
        """Returns the analysis with its means, and the prompts with what to resample from."""
        # All that can be refused is, before the model runs.
        check_precision(self.precision, model.dtype)
        self.sets(model.spec)
        known = prompts if reference is None else reference
        if self.mode == "mean" and self.mean_over == "pos":
            check_reference(reference, prompts)
        sourced = with_source(prompts, self.seed) if self.mode == "resample" else prompts
        found = self.planned(model, prompts, known)
        if self.mode != "mean":
            return found, sourced
        n_tokens = self._costs(model, n_targets(prompts), known.max_len, len(known)).mean_tokens(self.memory_bytes)
        means = mean_activations(model, known, self._sites(model.spec), self.mean_over, n_tokens)
        return dataclasses.replace(found, means=means), prompts

    def planned(self, model: Model, prompts: TokenizedPrompts, reference: TokenizedPrompts | None = None) -> "Circuit":
        """Returns the analysis with its batches chosen; raises :class:`OptionError` where memory is not enough."""
        known = prompts if reference is None else reference
        costs = self._costs(model, n_targets(prompts), known.max_len, len(known))
        usual = dataclasses.replace(self, batches=None).tokens_per_batch(model)
        return dataclasses.replace(self, batches=plan_batches(costs, prompts, self.memory_bytes, usual))

    def _sites(self, spec: ModelSpec) -> dict[str, set[int]]:
        return {part.site: set(range(spec.n_layers)) for part in self.candidates(spec)}

    def _costs(self, model: Model, n_targets: int, mean_pos: int, mean_prompts: int = 1) -> Costs:
        sites, widths = self._sites(model.spec), widths_of(model)
        demand = Demand(
            n_units=len(self.sets(model.spec)) + 1,
            sites=frozenset(sites),
            measured=measured_by([self.metric], n_targets),
            several=True,
            source=self.mode == "resample",
            precision=self.precision,
        )
        by_pos = self.mean_over == "pos"
        mean = MeanCost(widths=widths, sites=sites, n_pos=mean_pos, n_prompts=mean_prompts, by_pos=by_pos)
        return Costs(model=model, demand=demand, mean=mean if self.mode == "mean" else None)

    def tokens_per_batch(self, model: Model) -> int:
        """As many tokens as keep all sets' residuals within 256 MiB."""
        if self.batches is not None:
            return self.batches.batch_tokens
        each = (len(self.sets(model.spec)) + 1) * model.spec.d_model * model.weights.W_E.element_size()
        budget = (1 << 28) if model.device.type == "cpu" else (1 << 33)
        return max(256, min(4096, budget // each))

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """One forward for each set, one of the model, and one with nothing kept."""
        return float((len(self.sets(spec)) + 2) * n_tokens * spec.n_layers * spec.flops_per_token_block())

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """The metric of every set, of the model, and of nothing."""
        name = self.metric.name
        attrs = {"units": self.metric.units, "metric": name, "pos": "-1", "sign": "the value itself, not an effect"}
        # Differences are what delta rounds: its clean run is exact.
        clean = {"precision": "exact" if self.precision == "delta" else self.precision}
        labels = ["+".join(sorted(part.label for part in kept)) for kept in self.sets(spec)]
        kept_only = attrs | {"ablation": self.mode, "ablated": self.among, "precision": self.precision}
        kept_only |= {"mean_over": self.mean_over} if self.mode == "mean" else {}
        return (
            Field(name=f"{name}_clean", dims=(), shape=(), attrs=attrs | clean | {"long_name": self.metric.long_name}),
            Field(
                name=f"{name}_nothing",
                dims=(),
                shape=(),
                attrs=kept_only | {"long_name": f"{self.metric.long_name}, nothing kept"},
            ),
            Field(
                name=f"{name}_circuit",
                dims=("circuit",),
                shape=(len(labels),),
                attrs=kept_only | {"long_name": f"{self.metric.long_name}, the circuit alone kept"},
                coords={"circuit": (("circuit",), labels)},
            ),
        )

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_clean: [batch], metric_nothing: [batch], metric_circuit: [batch, circuit]}``."""
        candidates = self.candidates(model.spec)
        n_pos = batch.tokens.shape[1]
        sets = [frozenset[Part](), *self.sets(model.spec)]
        name, dtype = self.metric.name, torch.promote_types(model.dtype, torch.float32)
        edited = [(i, [part for part in candidates if part not in kept]) for i, kept in enumerate(sets)]
        # A set that keeps all of the model is the clean run.
        edited = [(i, parts) for i, parts in edited if parts]
        variants = [
            Variant(edits=tuple(edit_of(part, self.mode, self.means, self.mean_over, n_pos) for part in parts))
            for _, parts in edited
        ]
        source = batch.corrupt if self.mode == "resample" else None
        mean_pos = max((len(mean) for mean in (self.means or {}).values()), default=0)
        memory = None
        if self.memory_bytes is not None:
            memory = self._costs(model, batch_targets(batch), mean_pos).memory(shape_of(batch), self.memory_bytes)
        clean, values = sweep_values(
            model, batch, [self.metric], variants, source, precision=self.precision, memory=memory
        )
        give_back(model.device)
        out = clean.values[name].expand(len(sets), -1).clone()
        out[[i for i, _ in edited]] = values[name]
        return {
            f"{name}_clean": clean.values[name].to(dtype),
            f"{name}_nothing": out[0].to(dtype),
            f"{name}_circuit": out[1:].T.to(dtype),
        }
