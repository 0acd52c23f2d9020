"""Activation patching: what changes if an activation has its value of the other run of a pair."""

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fastinterp.analyses.base import Field, collect, head_coords, tokenized
from fastinterp.analyses.budget import (
    BatchPlan,
    Costs,
    batch_targets,
    measured_by,
    n_targets,
    plan_batches,
    shape_of,
    with_plan,
)
from fastinterp.analyses.measuring import clean_run, measure, sweep_values
from fastinterp.errors import MetricError, OptionError, PromptPairError, check_choice
from fastinterp.metrics import Metric, get_metric
from fastinterp.model.forward import missing_because
from fastinterp.model.intervene import SOURCE, Edit
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.names import activation
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp.sweep import PRECISIONS, Precision, Variant, Variants, check_precision
from fastinterp.sweep.costs import Demand
from fastinterp.sweep.memory import check_budget
from fastinterp.sweep.resident import give_back

By = Literal["layer", "position", "head", "head_position", "neuron", "head_query_key"]
Direction = Literal["denoise", "noise"]

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "post")
HEAD_SITES = frozenset({"z", "q", "k", "v", "pattern"})


def activation_patch(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    sites: str | Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    by: By = "position",
    direction: Direction = "denoise",
    metric: str | Sequence[str] = "logit_diff",
    precision: Precision = "exact",
    memory_bytes: int | None = None,
) -> xr.Dataset:
    """Returns the effect of giving one activation of a run the value that it has in the other run of the pair.

    ``effect = metric(patched run) - metric(base run)``. ``"denoise"`` patches values of the clean prompt into the run
    of the corrupt one (the base): a large effect says that the activation is enough to bring the answer back.
    ``"noise"`` patches values of the corrupt prompt into the clean run: that it is needed. Equivalent to
    ``transformer_lens.patching.get_act_patch_*`` with the metric at the last token, minus the metric of the base; every
    pair by itself::

        get_act_patch_resid_pre, _mid, attn_out, mlp_out    sites="resid_pre", ...           by="position"
        get_act_patch_attn_head_out_all_pos, q, k, v, ...   sites="z", "q", "k", ...         by="head"
        get_act_patch_attn_head_out_by_pos, ...             sites="z", ...                   by="head_position"
        get_act_patch_attn_head_pattern_by_pos              sites="pattern"                  by="head_position"
        get_act_patch_attn_head_pattern_dest_src_pos        sites="pattern"                  by="head_query_key"
        get_act_patch_block_every                           ["resid_pre", "attn_out", "mlp_out"], by="position"
        get_act_patch_attn_head_all_pos_every               ["z", "q", "k", "v", "pattern"], by="head"

    All patches of all sites go through the model together, share the base run below their layer and, where a position
    is patched, in front of it.

    Args:
        sites: one or several of ``resid_pre resid_mid resid_post attn_out mlp_out z q k v pattern post``.
        by: what a patch is: a whole ``"layer"``, one ``"position"`` of it, one ``"head"``, a head at one position
            (``"head_position"``; of ``pattern`` that is the query's), one ``"neuron"`` (``post``), or one entry of a
            head's pattern (``"head_query_key"``).
        metric: any metric that is read at the last token, or several, which share the sweep.
        precision, memory_bytes: how matrix products are done, and what may be allocated, as in :func:`ablate`.

    Returns:
        ``{metric}_patch_{site}`` (prompt, dims), where dims are ``layer``; ``edit_pos, layer``; ``layer, head`` (for
        ``k`` and ``v``: ``layer, kv_head``); ``edit_pos, layer, head``; ``layer, neuron``; or
        ``query_pos, key_pos, layer, head``. ``{metric}_base`` and ``{metric}_source``: both runs as they are;
        ``effect / (source - base)`` is the share that the patch recovers. The attribute ``sweep_plan``: as in
        :func:`ablate`.

    Raises:
        PromptPairError: prompts without corrupt ones of the same length.
        MetricError: a metric with a value per token (``loss``): say ``logprob`` of an answer.
        OptionError: sites, ways and directions that there are not, or that do not go together.

    Memory: as :func:`ablate`; the values of the other run are held for one layer at a time.
    Source: Meng et al. 2022, https://arxiv.org/abs/2202.05262; Heimersheim & Nanda 2024,
    https://arxiv.org/abs/2404.15255.

    Example:
        >>> found = fastinterp.activation_patch(model, prompts, "z", by="head")                    # doctest: +SKIP
        >>> found["logit_diff_patch_z"].mean("prompt")                                             # doctest: +SKIP
    """
    analysis = ActivationPatch(
        sites=(sites,) if isinstance(sites, str) else tuple(sites),
        by=by,
        direction=direction,
        metric_names=(metric,) if isinstance(metric, str) else tuple(metric),
        precision=precision,
        memory_bytes=memory_bytes,
    )
    analysis.check_fits(model.spec)
    prepared, tokens = analysis.prepared(model, tokenized(model, prompts, analysis.metric))
    return with_plan(collect(prepared, model, tokens), prepared.batches)


@dataclass(frozen=True, kw_only=True)
class ActivationPatch:
    """The analysis behind :func:`activation_patch`, for one batch."""

    sites: tuple[str, ...] = ("resid_pre", "attn_out", "mlp_out")
    by: By = "position"
    direction: Direction = "denoise"
    metric_names: tuple[str, ...] = ("logit_diff",)
    precision: Precision = "exact"
    memory_bytes: int | None = None
    batches: BatchPlan | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses sites, ways, directions and metrics that there are not or that do not go together."""
        check_choice("by", self.by, ("layer", "position", "head", "head_position", "neuron", "head_query_key"))
        check_choice("direction", self.direction, ("denoise", "noise"))
        check_choice("precision", self.precision, PRECISIONS)
        check_budget(self.memory_bytes)
        if not self.sites or len(set(self.sites)) < len(self.sites):
            raise OptionError(f"sites={self.sites!r}: give one of {', '.join(SITES)}, or several different ones")
        fitting = {
            "head": sorted(HEAD_SITES),
            "head_position": sorted(HEAD_SITES),
            "neuron": ["post"],
            "head_query_key": ["pattern"],
        }.get(self.by, SITES)
        for site in self.sites:
            check_choice("sites", site, SITES)
            if site not in fitting:
                raise OptionError(f"by={self.by!r} does not fit the site {site!r}: choose from {', '.join(fitting)}")
        if not self.metric_names or len(set(self.metric_names)) < len(self.metric_names):
            raise OptionError(f"metric={self.metric_names!r}: give one metric, or several different ones")
        for metric in self.metrics:
            if metric.per_token:
                raise MetricError(
                    f"metric {metric.name!r} has a value at every token, of which the two prompts of a pair have "
                    "different ones: choose one that is read at the last token, such as 'logprob'"
                )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What the effects are effects on."""
        return tuple(get_metric(name) for name in self.metric_names)

    @property
    def metric(self) -> Metric:
        """The metric that needs most of the prompts."""
        return max(self.metrics, key=lambda metric: len(metric.needs))

    def check_fits(self, spec: ModelSpec) -> None:
        """Raises :class:`OptionError` for a site that this architecture does not have."""
        for site in self.sites:
            reason = missing_because(spec, site)
            if reason:
                raise OptionError(f"there is no {site} in a {spec.family} model: {reason}")

    def prepared(self, model: Model, prompts: TokenizedPrompts) -> tuple["ActivationPatch", TokenizedPrompts]:
        """Checks the pairs."""
        check_precision(self.precision, model.dtype)
        self.check_fits(model.spec)
        if prompts.corrupt is None:
            raise PromptPairError(
                "patching needs a corrupt prompt for every prompt: PromptSet.of(prompts=..., corrupt=...), of the same "
                "number of tokens"
            )
        return self.planned(model, prompts), prompts

    def planned(self, model: Model, prompts: TokenizedPrompts) -> "ActivationPatch":
        """Returns the analysis with its batches chosen; raises :class:`OptionError` where memory is not enough."""
        costs = self._costs(model, n_targets(prompts))
        usual = dataclasses.replace(self, batches=None).tokens_per_batch(model)
        return dataclasses.replace(self, batches=plan_batches(costs, prompts, self.memory_bytes, usual))

    def _costs(self, model: Model, n_targets: int) -> Costs:
        shapes = [self._dims(model.spec, site, 1)[1] for site in self.sites]
        demand = Demand(
            n_units=sum(torch.Size(shape).numel() for shape in shapes),
            sites=frozenset(self.sites),
            measured=measured_by(self.metrics, n_targets),
            pos_axes=len(self._pos_dims),
            partial=bool(self._pos_dims),
            whole_sites=self.by in ("layer", "position"),
            source=True,
            precision=self.precision,
        )
        return Costs(model=model, demand=demand)

    def tokens_per_batch(self, model: Model) -> int:
        """As many tokens as keep the residuals of one position's patches within 256 MiB."""
        if self.batches is not None:
            return self.batches.batch_tokens
        spec = model.spec
        per_layer = {"neuron": spec.mlp.d_mlp}.get(self.by, spec.n_heads if "head" in self.by else 1)
        each = len(self.sites) * spec.n_layers * per_layer * spec.d_model * model.weights.W_E.element_size()
        budget = (1 << 28) if model.device.type == "cpu" else (1 << 33)
        return max(256, min(2048, budget // each))

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """Both runs, and for each patch the blocks above; half the tokens of a prompt for a patch of one position."""
        per_layer = {"neuron": spec.mlp.d_mlp}.get(self.by, spec.n_heads if "head" in self.by else 1)
        blocks = len(self.sites) * per_layer * spec.n_layers * (spec.n_layers + 1) / 2 + 2 * spec.n_layers
        # A prompt's own number of tokens is not known here: 16 stands for it.
        times = {"position": 8.0, "head_position": 8.0, "head_query_key": 64.0}.get(self.by, 1.0)
        return float(n_tokens * blocks * times * spec.flops_per_token_block())

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """The effects, and both runs."""
        described: list[Field] = []
        for metric in self.metrics:
            attrs = {"units": metric.units, "metric": metric.name, "pos": "-1"}
            attrs |= {"direction": self.direction, "precision": self.precision}
            for name, which in (("base", "patched into"), ("source", "taken from")):
                described.append(
                    Field(
                        name=f"{metric.name}_{name}",
                        dims=(),
                        shape=(),
                        attrs=attrs
                        | {
                            "long_name": f"{metric.long_name}, in the run that is {which}",
                            "sign": "the value itself, not an effect",
                        },
                    )
                )
            for site in self.sites:
                dims, shape, coords = self._dims(spec, site, n_pos)
                described.append(
                    Field(
                        name=f"{metric.name}_patch_{site}",
                        dims=dims,
                        shape=shape,
                        attrs=attrs
                        | {"long_name": f"effect of patching {site} on {metric.name}", "sign": "patched - base"},
                        coords=coords,
                    )
                )
        return tuple(described)

    def _dims(self, spec: ModelSpec, site: str, n_pos: int) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, Any]]:
        coords: dict[str, Any] = {"layer": (("layer",), list(range(spec.n_layers)))}
        dims, shape = ["layer"], [spec.n_layers]
        if self.by in ("head", "head_position", "head_query_key"):
            if "kv_head" in activation(site).dims:
                n_heads = spec.attention.n_kv_heads
                coords["kv_head"] = (("kv_head",), list(range(n_heads)))
                dims, shape = [*dims, "kv_head"], [*shape, n_heads]
            else:
                coords |= head_coords(spec)
                dims, shape = [*dims, "head"], [*shape, spec.n_heads]
        if self.by == "neuron":
            coords["neuron"] = (("neuron",), list(range(spec.mlp.d_mlp)))
            dims, shape = [*dims, "neuron"], [*shape, spec.mlp.d_mlp]
        for name in reversed(self._pos_dims):
            coords[name] = ((name,), list(range(n_pos)))
            dims, shape = [name, *dims], [n_pos, *shape]
        return tuple(dims), tuple(shape), coords

    @property
    def _pos_dims(self) -> tuple[str, ...]:
        if self.by == "head_query_key":
            return ("query_pos", "key_pos")
        return ("edit_pos",) if self.by in ("position", "head_position") else ()

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_patch_site: [batch, *dims], metric_base: [batch], metric_source: [batch]}``."""
        assert batch.corrupt is not None
        clean, corrupt = batch, dataclasses.replace(batch, tokens=batch.corrupt)
        base, source = (corrupt, clean) if self.direction == "denoise" else (clean, corrupt)
        shapes = [self._dims(model.spec, site, base.tokens.shape[1])[1] for site in self.sites]
        variants = self._variants(shapes, base)
        memory = None
        if self.memory_bytes is not None:
            memory = self._costs(model, batch_targets(batch)).memory(shape_of(batch), self.memory_bytes)
        start, values = sweep_values(
            model, base, self.metrics, variants, source.tokens, precision=self.precision, memory=memory
        )
        give_back(model.device)
        resid = clean_run(model, source, self.metrics, self.precision).resid
        other = measure(model, source, self.metrics, resid[None], start.resid)
        dtype = torch.promote_types(model.dtype, torch.float32)
        found: dict[str, Tensor] = {}
        for name, value in start.values.items():
            found[f"{name}_base"], found[f"{name}_source"] = value.to(dtype), other[name][0].to(dtype)
        first = 0
        for site, shape in zip(self.sites, shapes, strict=True):
            n = torch.Size(shape).numel()
            for name, each in values.items():
                effects = (each[first : first + n] - start.values[name]).unflatten(0, shape)
                for axis in range(len(self._pos_dims)):
                    # Positions that a prompt does not have.
                    absent = ~batch.mask.T
                    sized = absent.view(*[1] * axis, len(absent), *[1] * (len(shape) - 1 - axis), len(batch))
                    effects = effects.masked_fill(sized, torch.nan)
                found[f"{name}_patch_{site}"] = effects.movedim(-1, 0).to(dtype)
            first += n
        return found

    def _variants(self, shapes: Sequence[tuple[int, ...]], base: Batch) -> Variants:
        """Returns the patches of all sites, each in the order of its dims, whose sizes are given."""
        everywhere = torch.arange(base.tokens.shape[1], device=base.tokens.device)
        at = [(everywhere == p).expand_as(base.tokens) for p in everywhere]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        ends = list(accumulate(sizes))
        n_places = len(self._pos_dims)

        def make(index: int) -> Variant:
            which = bisect_right(ends, index)
            where = [int(i) for i in np.unravel_index(index - ends[which] + sizes[which], shapes[which])]
            places, layer, unit = where[:n_places], where[n_places], next(iter(where[n_places + 1 :]), None)
            edit = Edit(
                site=self.sites[which],
                layer=layer,
                head=None if self.by == "neuron" else unit,
                neuron=unit if self.by == "neuron" else None,
                positions=at[places[0]] if places else None,
                keys=at[places[1]] if len(places) > 1 else None,
                replacement=SOURCE,
            )
            return Variant(edits=(edit,))

        return Variants(ends[-1], make)
