"""Direct path patching: what changes if one head alone reads what another one writes in the other run of a pair."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.analyses.base import Field, collect, head_coords, tokenized
from fastinterp.analyses.measuring import clean_run, measure, sweep_values
from fastinterp.analyses.units import is_pair
from fastinterp.errors import MetricError, OptionError, PromptPairError, check_choice
from fastinterp.metrics import Metric, get_metric
from fastinterp.model.attention import make_frame
from fastinterp.model.forward import embed, run_blocks
from fastinterp.model.intervene import Capture, Edit, Taps
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.names import check_index, head_label
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp.sweep import PRECISIONS, Precision, Variant, check_precision, clean_weights

Component = Literal["q", "k", "v"]
Direction = Literal["denoise", "noise"]
Head = tuple[int, int]
Sources = Literal["all"] | Head | Sequence[Head] | np.ndarray

COMPONENTS = ("q", "k", "v")

# Of what sources write differently, at every position of a batch, that is held at once.
_WRITTEN_BYTES = 1 << 26


def path_patch(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    sources: Sources,
    component: Component | Sequence[Component] = "q",
    direction: Direction = "denoise",
    metric: str | Sequence[str] = "logit_diff",
    precision: Precision = "exact",
) -> xr.Dataset:
    """Returns the effect of giving one head's query, key or value what an earlier head writes in the other run.

    ``effect = metric(patched run) - metric(base run)``, the path from source head to destination head alone: the
    difference of what the source writes, ``(z_other - z_base) W_O`` at every position, is added to the destination's
    own copy of the residual in front of its norm (``q_input``, ``k_input`` or ``v_input``). Everything else that reads
    the source sees the base run; what is behind the destination is recomputed. ``"denoise"`` takes the clean prompt's
    values into the run of the corrupt one (the base), ``"noise"`` the other way round. Equivalent to
    ``transformer_lens.patching.get_act_patch_direct_path`` (of several sources, or of ``"all"``:
    ``get_act_patch_direct_path_all_sources``) with the metric at the last token, minus the metric of the base; every
    pair by itself.

    With grouped-query attention, keys and values are those of a KV head, which all of its query heads read. In
    parallel blocks the path is the same: through the residual stream.

    Args:
        sources: a head ``(layer, head)``, a list or array of them, or ``"all"``.
        component: what the destinations read differently: ``"q"``, ``"k"`` or ``"v"``, or several, one at a time.
        metric: any metric that is read at the last token, or several, which share the sweep.
        precision: how matrix products are done, as in :func:`ablate`.

    Returns:
        ``{metric}_path_{component}`` (prompt, source, layer, head), of ``k`` and ``v`` (prompt, source, layer,
        kv_head), where ``layer`` and ``head`` are the destination's; NaN where its layer is not above the source's
        (TransformerLens has 0 there). ``source`` holds labels such as ``"L9H6"``. ``{metric}_base`` and
        ``{metric}_source`` (prompt): both runs as they are.

    Raises:
        PromptPairError: prompts without corrupt ones of the same length.
        MetricError: a metric with a value per token (``loss``): say ``logprob`` of an answer.
        OptionError: components and directions that there are not; no source, one twice, none with a layer above it; a
            model with post-norms, where a head's part of what is added depends on all heads.
        SiteRangeError: a source that the model does not have.

    Memory: as :func:`ablate`, and 64 MiB of what sources write (at least one source: ``[batch, pos, d_model]``) with
    ``z`` of their layers in both runs: for every such source at most ``2 * n_heads * d_head / d_model`` times what it
    writes, and no more than of all layers. The number of sources only adds to the result.
    Source: Wang et al. 2022, https://arxiv.org/abs/2211.00593; Goldowsky-Dill et al. 2023,
    https://arxiv.org/abs/2304.05969.

    Example:
        >>> found = fastinterp.path_patch(model, prompts, [(5, 5), (6, 9)], component="q")         # doctest: +SKIP
        >>> found["logit_diff_path_q"].sel(source="L5H5").mean("prompt")                           # doctest: +SKIP
    """
    analysis = PathPatch(
        sources=_pairs(sources),
        components=(component,) if isinstance(component, str) else tuple(component),
        direction=direction,
        metric_names=(metric,) if isinstance(metric, str) else tuple(metric),
        precision=precision,
    )
    analysis.check_fits(model.spec)
    prepared, tokens = analysis.prepared(model, tokenized(model, prompts, analysis.metric))
    return collect(prepared, model, tokens)


_GIVE = "give a pair of layer and head such as (9, 6), a list of them, or 'all'"


def _pairs(sources: Any) -> Literal["all"] | tuple[Head, ...]:
    """Returns the sources as pairs; raises :class:`OptionError` for anything else."""
    if isinstance(sources, str) and sources == "all":
        return "all"
    given = sources.tolist() if hasattr(sources, "tolist") else sources
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) == 0:
        raise OptionError(f"sources={sources!r}: {_GIVE}")
    pairs = [pair.tolist() if hasattr(pair, "tolist") else pair for pair in given]
    if not any(isinstance(pair, Sequence) for pair in pairs):
        pairs = [tuple(pairs)]
    other = [pair for pair in pairs if not is_pair(pair)]
    if other:
        raise OptionError(f"sources has {other[0]!r}: {_GIVE}")
    return tuple((int(layer), int(head)) for layer, head in pairs)


@dataclass(frozen=True, kw_only=True)
class PathPatch:
    """The analysis behind :func:`path_patch`, for one batch."""

    sources: Literal["all"] | tuple[Head, ...] = "all"
    components: tuple[Component, ...] = ("q",)
    direction: Direction = "denoise"
    metric_names: tuple[str, ...] = ("logit_diff",)
    precision: Precision = "exact"

    def __post_init__(self) -> None:
        """Refuses components, directions and metrics that there are not or that do not go together."""
        check_choice("direction", self.direction, ("denoise", "noise"))
        check_choice("precision", self.precision, PRECISIONS)
        for component in self.components:
            check_choice("component", component, COMPONENTS)
        if not self.components or len(set(self.components)) < len(self.components):
            raise OptionError(f"component={self.components!r}: give one of q, k and v, or several different ones")
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

    def chosen(self, spec: ModelSpec) -> list[Head]:
        """Returns the sources in order, counted from the first; raises for those that there are not, or given twice."""
        if self.sources == "all":
            return [(layer, head) for layer in range(spec.n_layers) for head in range(spec.n_heads)]
        found = [
            (check_index("layer", layer, spec.n_layers), check_index("head", head, spec.n_heads))
            for layer, head in self.sources
        ]
        if len(set(found)) < len(found):
            twice = next(pair for pair in found if found.count(pair) > 1)
            raise OptionError(f"sources has {head_label(*twice)} twice")
        return found

    def check_fits(self, spec: ModelSpec) -> None:
        """Raises for sources that this architecture does not have, or whose writing is not their own."""
        sources = self.chosen(spec)
        if spec.post_norms:
            raise OptionError(
                f"a {spec.family} model normalises what all heads write together before it is added, so that no head's "
                "part goes to later heads by itself: path_patch is not defined there; activation_patch(model, prompts, "
                "'z', by='head') gives each head's whole effect"
            )
        if not any(layer < spec.n_layers - 1 for layer, _ in sources):
            raise OptionError(
                f"no head reads what {head_label(*sources[0])} writes: the last layer of the model is "
                f"{spec.n_layers - 1}; choose a source below it"
            )

    def prepared(self, model: Model, prompts: TokenizedPrompts) -> tuple["PathPatch", TokenizedPrompts]:
        """Checks the pairs."""
        check_precision(self.precision, model.dtype)
        self.check_fits(model.spec)
        if prompts.corrupt is None:
            raise PromptPairError(
                "patching needs a corrupt prompt for every prompt: PromptSet.of(prompts=..., corrupt=...), of the same "
                "number of tokens"
            )
        return self, prompts

    def tokens_per_batch(self, model: Model) -> int:
        """As many tokens as keep the residuals of one source's patches within 256 MiB."""
        spec = model.spec
        n_heads = sum(_n_destinations(spec, component) for component in self.components)
        each = n_heads * spec.n_layers * spec.d_model * model.weights.W_E.element_size()
        budget = (1 << 28) if model.device.type == "cpu" else (1 << 33)
        return max(256, min(2048, budget // each))

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """Both runs, and for each path the MLP of the destination and the blocks above."""
        above = [spec.n_layers - 1 - layer for layer, _ in self.chosen(spec)]
        n_heads = sum(_n_destinations(spec, component) for component in self.components)
        blocks = n_heads * sum(n * (n + 1) / 2 for n in above) + 3 * spec.n_layers
        return float(n_tokens * blocks * spec.flops_per_token_block())

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
            described += [self._effects(spec, component, metric, attrs) for component in self.components]
        return tuple(described)

    def _effects(self, spec: ModelSpec, component: Component, metric: Metric, attrs: dict[str, Any]) -> Field:
        sources = self.chosen(spec)
        coords: dict[str, Any] = {
            "source": (("source",), [head_label(*pair) for pair in sources]),
            "source_layer": (("source",), [layer for layer, _ in sources]),
            "source_head": (("source",), [head for _, head in sources]),
            "layer": (("layer",), list(range(spec.n_layers))),
        }
        n_heads = _n_destinations(spec, component)
        if component == "q":
            coords |= head_coords(spec)
        else:
            coords["kv_head"] = (("kv_head",), list(range(n_heads)))
        shape = (len(sources), spec.n_layers, n_heads)
        below = np.arange(spec.n_layers) <= np.array([layer for layer, _ in sources])[:, None]
        return Field(
            name=f"{metric.name}_path_{component}",
            dims=("source", "layer", "head" if component == "q" else "kv_head"),
            shape=shape,
            attrs=attrs
            | {
                "long_name": f"effect on {metric.name} of the path from the source's output to a later head's "
                f"{component}",
                "sign": "patched - base",
                "missing": "the destination's layer is not above the source's",
            },
            coords=coords,
            absent=np.broadcast_to(below[..., None], shape).copy(),
        )

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_path_component: [batch, source, layer, head], metric_base, metric_source: [batch]}``."""
        assert batch.corrupt is not None
        clean, corrupt = batch, dataclasses.replace(batch, tokens=batch.corrupt)
        base, source = (corrupt, clean) if self.direction == "denoise" else (clean, corrupt)
        spec, sources = model.spec, self.chosen(model.spec)
        dtype = torch.promote_types(model.dtype, torch.float32)
        found: dict[str, Tensor] = {}
        for described in self.fields(spec, base.tokens.shape[1]):
            found[described.name] = base.tokens.new_full((len(batch), *described.shape), torch.nan, dtype=dtype)
        # In the order of their layers, so that few layers' heads are held at once.
        with_paths = (i for i, (layer, _) in enumerate(sources) if layer < spec.n_layers - 1)
        start = None
        for some in _together(model, base, sorted(with_paths, key=lambda i: sources[i])):
            written = _written_differently(model, base, source, [sources[i] for i in some], self.precision)
            paths = [path for i in some for path in self._paths(spec, i, sources[i])]
            variants = _variants(paths, sources, written, base, source)
            start, values = sweep_values(model, base, self.metrics, variants, precision=self.precision)
            for name, each in values.items():
                self._place(found, name, paths, (each - start.values[name]).to(dtype))
        assert start is not None
        resid = clean_run(model, source, self.metrics, self.precision).resid
        other = measure(model, source, self.metrics, resid[None], start.resid)
        for name, value in start.values.items():
            found[f"{name}_base"], found[f"{name}_source"] = value.to(dtype), other[name][0].to(dtype)
        return found

    def _paths(self, spec: ModelSpec, index: int, source: Head) -> list["_Path"]:
        return [
            _Path(source=index, component=component, layer=layer, head=head)
            for component in self.components
            for layer in range(source[0] + 1, spec.n_layers)
            for head in range(_n_destinations(spec, component))
        ]

    def _place(
        self,
        found: dict[str, Tensor],
        metric: str,
        paths: Sequence["_Path"],
        effects: Float[Tensor, "path batch"],
    ) -> None:
        """Writes the effects of paths where they belong."""
        for component in self.components:
            own = [row for row, path in enumerate(paths) if path.component == component]
            where = torch.tensor([(paths[row].source, paths[row].layer, paths[row].head) for row in own])
            source, layer, head = where.to(effects.device).unbind(-1)
            found[f"{metric}_path_{component}"][:, source, layer, head] = effects[own].T


@dataclass(frozen=True, kw_only=True)
class _Path:
    """From a source, by its place among those asked for, to a later head (of ``k`` and ``v`` a KV head)."""

    source: int
    component: Component
    layer: int
    head: int


def _variants(
    paths: Sequence[_Path],
    sources: Sequence[Head],
    written: dict[Head, Float[Tensor, "batch pos d_model"]],
    base: Batch,
    other: Batch,
) -> list[Variant]:
    # In front of the first token that differs, both runs are the same.
    behind = (base.tokens != other.tokens).cumsum(-1) > 0
    edits = (
        Edit(
            site=f"{path.component}_input",
            layer=path.layer,
            head=path.head,
            positions=behind,
            replacement=written[sources[path.source]],
            how="add",
        )
        for path in paths
    )
    return [Variant(edits=(edit,)) for edit in edits]


def _together(model: Model, batch: Batch, order: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cuts the sources into those whose paths go through the model together."""
    each = batch.tokens.numel() * model.spec.d_model * model.weights.W_E.element_size()
    size = max(1, _WRITTEN_BYTES // each)
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _n_destinations(spec: ModelSpec, component: Component) -> int:
    """Heads of a layer that have a copy of the residual of their own."""
    return spec.n_heads if component == "q" else spec.attention.n_kv_heads


def _written_differently(
    model: Model, base: Batch, source: Batch, heads: Sequence[Head], precision: Precision
) -> dict[Head, Float[Tensor, "batch pos d_model"]]:
    """Returns what heads add to the residual stream in the source run, less what they add in the base run."""
    layers = sorted({layer for layer, _ in heads})
    z_source, z_base = (_mixed(model, batch.tokens, layers, precision) for batch in (source, base))
    blocks = model.weights.blocks
    return {
        (layer, head): (z_source[layer][:, :, head] - z_base[layer][:, :, head]) @ blocks[layer].W_O[head]
        for layer, head in heads
    }


def _mixed(
    model: Model, tokens: Int[Tensor, "batch pos"], layers: Sequence[int], precision: Precision
) -> dict[int, Float[Tensor, "batch pos head d_head"]]:
    """Returns ``z`` of some layers; the run goes no further than the last of them."""
    spec, weights = model.spec, clean_weights(model, precision)
    taps = Taps.of(spec.n_layers, capture=[Capture(name="z", layers=tuple(layers))])
    resid = embed(weights, tokens)
    frame = make_frame(spec, tokens.shape[1], device=resid.device, dtype=resid.dtype)
    run_blocks(spec, weights, resid, frame, taps, stop=layers[-1] + 1)
    return {layer: taps.values["z", layer] for layer in layers}
