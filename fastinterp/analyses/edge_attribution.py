"""Edge attribution patching: an estimate of every path patch between two components, from a run and its gradients."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fastinterp.analyses.base import Field, check_finite, collect, tokenized
from fastinterp.errors import MetricError, PromptPairError, check_choice
from fastinterp.gradients.edges import add_scores, difference, run_gradients, run_written
from fastinterp.gradients.edges_nodes import destinations, edges_exist, n_read, sources
from fastinterp.gradients.memory import kept_bytes, run_bytes
from fastinterp.gradients.objective import MetricFunction, Objective, check_function, differentiable
from fastinterp.gradients.paths import Point, Rule, quadrature
from fastinterp.metrics import METRICS, NO_METRIC, Metric
from fastinterp.model.forward import embed
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts

Method = Literal["eap", "eap-ig"]
Direction = Literal["denoise", "noise"]
Aggregate = Literal["none", "mean"]


def edge_attribution(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    method: Method = "eap",
    direction: Direction = "denoise",
    metric: str | MetricFunction = "logit_diff",
    steps: int = 8,
    rule: Rule = "midpoint",
    aggregate: Aggregate = "none",
) -> xr.Dataset:
    """Returns the estimated effect of every edge: of one component reading another one's value of the other run.

    ``score = sum over positions of (source_other - source_base) . d metric / d (what the destination reads)``. With
    ``"eap"`` it is the first-order estimate of ``metric(patched run) - metric(base run)`` of :func:`path_patch`, for
    all edges at once; with ``"eap-ig"`` a share of ``metric(source) - metric(base)`` rather than any single patch's
    effect.

    Sources are ``embed`` (token and position), every head (``z_h W_O[h]``) and every MLP; destinations are every head's
    query (``L9H6.q``), every KV head's key and value (``L9KV2.k``, ``L9KV2.v``), every MLP (``MLP9``) and ``logits``,
    the residual in front of the final norm. The gradient is that at the destination's own copy of the residual in front
    of its norm. Edges go through the residual stream alone: a score holds all that follows from the destination, and
    nothing of what the source writes to others. Biases are no sources; they are the same in both runs. Behind a
    post-norm a head's part is taken at that norm's scale in each run.

    The scores from one source sum to that of its whole output (``activation_patch`` to first order), those into one
    destination to that of its whole input, and with ``"eap-ig"`` those from ``embed`` tend to
    ``metric(source) - metric(base)`` as ``steps`` grow.

    Args:
        method: ``"eap"`` takes gradients in the base run; ``"eap-ig"`` averages those of runs with embeddings on the
            way from the base run's to the other's, which helps where the base run's gradient is flat.
        direction: ``"denoise"``: the base run is the corrupt prompt's, values come from the clean one; ``"noise"``: the
            other way round.
        metric: any but ``rank`` and ``top1``. ``loss`` is the mean over the base prompt's own next tokens, in both
            runs; ``kl`` compares with the clean prompt's run, where its gradient is 0: with ``"noise"`` it needs
            ``"eap-ig"``. Or a function ``f(logits [batch, pos, d_vocab], tokens [batch, pos], n_tokens [batch]) ->
            [batch]`` of the base prompts, as in :func:`attribution_patch`.
        steps, rule: of ``"eap-ig"``: how many runs, and where on the way: ``"midpoint"``, ``"trapezoid"``, ``"left"``,
            ``"right"`` (``1/steps, .., 1``, as in Hanna et al.) or ``"gauss"``.
        aggregate: ``"mean"`` keeps the mean over prompts and its standard error alone.

    Returns:
        ``{metric}_edge`` (prompt, source, destination), NaN where the source does not write before the destination
        reads; ``{metric}_base`` and ``{metric}_source`` (prompt): both runs; a function is called by its name. Of
        ``"eap-ig"`` ``{metric}_completeness`` (prompt): the sum of the scores from ``embed`` minus ``source - base``,
        the error of the integral. With ``aggregate="mean"`` ``{metric}_edge`` and ``{metric}_edge_standard_error`` are
        (source, destination). The coordinates ``source`` and ``destination`` are labels, with ``source_kind``,
        ``source_layer`` (-1 for ``embed``), ``source_head`` (-1 where there is none) and the same of destinations
        (``logits`` stand behind the last layer). :func:`top_edges` and :func:`edges_to_circuit` read it.

    Raises:
        PromptPairError: prompts without corrupt ones of the same length.
        MetricError: a metric without a gradient, ``kl`` where its gradient is 0, ``loss`` of a prompt of one token, a
            function that does not give one differentiable value per prompt.
        OptionError: methods, directions, rules and steps that there are not.

    Memory: what autograd keeps of a batch, and 64 MiB (on a GPU 1 GiB) of sources and gradients; results of
    ``n_sources * n_destinations`` numbers for each prompt, of SmolLM2-135M 0.6 MB, in RAM with ``aggregate="none"``.
    Source: Syed et al. 2023, https://arxiv.org/abs/2310.10348; Hanna et al. 2024, https://arxiv.org/abs/2403.17806.

    Example:
        >>> found = fastinterp.edge_attribution(model, prompts, "eap-ig", aggregate="mean")        # doctest: +SKIP
        >>> fastinterp.top_edges(found, k=3)                                                       # doctest: +SKIP
    """
    check_choice("aggregate", aggregate, ("none", "mean"))
    analysis = EdgeAttribution(
        method=method,
        direction=direction,
        metric_name=metric if isinstance(metric, str) else _name(metric),
        function=None if isinstance(metric, str) else metric,
        steps=steps,
        rule=rule,
    )
    # Of what is made in a surrounding inference mode nothing could be differentiated.
    with torch.inference_mode(False):
        prepared, tokens = analysis.prepared(model, tokenized(model, prompts, analysis.metric))
        if aggregate == "none":
            return collect(prepared, model, tokens)
        moments = _Moments(prepared, model.spec)
        return moments.added(collect(moments, model, tokens))


def _name(function: MetricFunction) -> str:
    name = getattr(function, "__name__", "metric")
    return name if name.isidentifier() else "metric"


@dataclass(frozen=True, kw_only=True)
class EdgeAttribution:
    """The analysis behind :func:`edge_attribution`, for one batch; ``metric_name`` of a ``function`` is its name."""

    method: Method = "eap"
    direction: Direction = "denoise"
    metric_name: str = "logit_diff"
    function: MetricFunction | None = None
    steps: int = 8
    rule: Rule = "midpoint"
    longest: int | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses methods, directions, metrics and rules that there are not or that do not go together."""
        check_choice("method", self.method, ("eap", "eap-ig"))
        check_choice("direction", self.direction, ("denoise", "noise"))
        quadrature(self.rule, self.steps)
        if self.function is not None:
            if not callable(self.function):
                raise MetricError(
                    f"metric={self.function!r}: give the name of a metric, or a function f(logits, tokens, n_tokens)"
                )
            return
        if differentiable(self.metric_name).relative and self.method == "eap" and self.direction == "noise":
            raise MetricError(
                f"metric {self.metric_name!r} has no gradient at the clean run, which it compares with: choose "
                "method='eap-ig', direction='denoise' or another metric"
            )

    @property
    def metric(self) -> Metric:
        """What the scores are effects on; of a function, nothing that the prompts would need."""
        return NO_METRIC if self.function is not None else METRICS[self.metric_name]

    @property
    def _points(self) -> list[Point]:
        """Where on the way from base to source gradients are taken, and their weights."""
        return [(0.0, 1.0)] if self.method == "eap" else quadrature(self.rule, self.steps)

    def prepared(self, model: Model, prompts: TokenizedPrompts) -> tuple["EdgeAttribution", TokenizedPrompts]:
        """Checks the pairs and the metric."""
        if prompts.corrupt is None:
            raise PromptPairError(
                "patching needs a corrupt prompt for every prompt: PromptSet.of(prompts=..., corrupt=...), of the same "
                "number of tokens"
            )
        short = [int(i) for i in prompts.accepted if prompts.n_tokens[i] < 2]
        if self.metric.per_token and short:
            raise MetricError(
                f"metric {self.metric_name!r} is the mean over next tokens, and {len(short)} prompts have none, first "
                f"prompt {short[0]} (id {prompts.ids[short[0]]!r}), of one token: leave them out, or choose 'logprob'"
            )
        if self.function is not None:
            check_function(self.function, model, prompts)
        return dataclasses.replace(self, longest=prompts.max_len), prompts

    def tokens_per_batch(self, model: Model) -> int:
        """As many tokens as keep what a run with gradients holds within 256 MiB (8 GiB on a GPU), at least 128."""
        n_pos = min(model.spec.n_ctx, _USUAL_LENGTH) if self.longest is None else self.longest
        keys = [(name, layer) for name in _KEPT for layer in range(model.spec.n_layers)]
        most = 2048 if model.device.type == "cpu" else 16384
        return int(max(128, min(most, run_bytes(model.device) // kept_bytes(model, n_pos, keys))))

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """Runs of both prompts, gradients at every point (as much as two runs), and the products of scores."""
        n_points = len(self._points)
        runs = 2 + (2 * n_points if self.method == "eap-ig" else 1)
        n_edges = sum(n_read(spec, destination) for destination in destinations(spec))
        projections = spec.n_layers * (2 * spec.n_heads + 2 * spec.attention.n_kv_heads) * spec.d_head
        scores = 2 * spec.d_model * (n_edges + projections) * n_points
        return float(n_tokens * (runs * spec.n_layers * spec.flops_per_token_block() + scores))

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """The scores, and both runs."""
        name, of = self.metric_name, self.function is not None
        attrs: dict[str, Any] = {"units": "of the metric" if of else self.metric.units, "metric": name}
        attrs |= {"pos": "all" if of or self.metric.per_token else "-1", "direction": self.direction}
        attrs |= {"method": self.method}
        attrs |= {} if self.method == "eap" else {"steps": self.steps, "rule": self.rule}
        long_name = name if of else self.metric.long_name
        described = []
        for which, run in (("base", "patched into"), ("source", "taken from")):
            own = {"long_name": f"{long_name}, in the run that is {run}", "sign": "the value itself, not an effect"}
            described.append(Field(name=f"{name}_{which}", dims=(), shape=(), attrs=attrs | own))
        if self.method == "eap-ig":
            own = {
                "long_name": "sum of the scores from embed minus (source - base)",
                "sign": "0 for an exact integral",
            }
            described.append(Field(name=f"{name}_completeness", dims=(), shape=(), attrs=attrs | own))
        exist = edges_exist(spec)
        own = {
            "long_name": f"estimated effect on {name} of patching the edge",
            "sign": "estimate of patched - base",
            "missing": "the source does not write before the destination reads",
        }
        edges = Field(
            name=f"{name}_edge",
            dims=("source", "destination"),
            shape=exist.shape,
            attrs=attrs | own,
            coords=_coords(spec),
            absent=~exist,
        )
        return (*described, edges)

    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_edge: [batch, source, destination]}``, and of every prompt both runs: ``[batch]``."""
        assert batch.corrupt is not None
        clean, corrupt = batch, dataclasses.replace(batch, tokens=batch.corrupt)
        base, source = (corrupt, clean) if self.direction == "denoise" else (clean, corrupt)
        with torch.inference_mode(False), torch.no_grad():
            return self._computed(model, base, source)

    def _computed(self, model: Model, base: Batch, source: Batch) -> dict[str, Tensor]:
        wide = torch.promote_types(model.dtype, torch.float32)
        begin, end = (embed(model.weights, which.tokens) for which in (base, source))
        other = run_written(model, end)
        # Gradients of "eap" are those of the base run itself.
        plain = run_written(model, begin) if self.method == "eap-ig" else None
        reference = other.resid if self.direction == "denoise" or plain is None else plain.resid
        objective = Objective(model=model, batch=base, metric=self.metric, function=self.function)
        objective = dataclasses.replace(objective, reference=objective.normalized(reference))
        differs = ((base.tokens != source.tokens).cumsum(-1) > 0) & base.mask
        exist = torch.as_tensor(edges_exist(model.spec), device=begin.device)
        scores = torch.zeros((len(base), *exist.shape), dtype=wide, device=begin.device)
        changes = None if plain is None else difference(other, plain)
        for alpha, weight in self._points:
            start = begin if alpha == 0.0 else torch.lerp(begin, end, alpha)
            readings, written = run_gradients(model, start, objective)
            if plain is None or changes is None:
                plain, changes = written, difference(other, written)
            add_scores(scores, model, changes, readings, differs, weight=weight)
        assert plain is not None
        name = self.metric_name
        scores.masked_fill_(~exist, torch.nan)
        patched_into, taken_from = objective(plain.resid), objective(other.resid)
        values = {f"{name}_edge": scores, f"{name}_base": patched_into, f"{name}_source": taken_from}
        if self.method == "eap-ig":
            values[f"{name}_completeness"] = scores[:, 0].sum(-1) - (taken_from - patched_into)
        return {key: value.to(wide) for key, value in values.items()}


# Of what a run with gradients holds on to.
_KEPT = ("q", "k", "v", "z", "mlp_in", "mlp_out")

# Tokens that a prompt is taken to have where it is not known.
_USUAL_LENGTH = 128


def _coords(spec: ModelSpec) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Labels of sources and destinations, and what they consist of."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for dim, nodes in (("source", sources(spec)), ("destination", destinations(spec))):
        found[dim] = ((dim,), [node.label for node in nodes])
        found[f"{dim}_kind"] = ((dim,), [node.kind for node in nodes])
        found[f"{dim}_layer"] = ((dim,), [node.layer for node in nodes])
        found[f"{dim}_head"] = ((dim,), [-1 if node.head is None else node.head for node in nodes])
    return found


class _Moments:
    """The mean over prompts of the scores, and their spread, added up batch by batch; no prompt's scores are kept."""

    def __init__(self, analysis: EdgeAttribution, spec: ModelSpec) -> None:
        self.analysis = analysis
        *self.others, self.edges = analysis.fields(spec, 0)
        self.count = 0
        self.mean = np.zeros(self.edges.shape)
        self.squares = np.zeros(self.edges.shape)

    @property
    def metric(self) -> Metric:
        """What is measured."""
        return self.analysis.metric

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """What every prompt keeps for itself."""
        return tuple(self.others)

    def tokens_per_batch(self, model: Model) -> int:
        """As the analysis itself."""
        return self.analysis.tokens_per_batch(model)

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """As the analysis itself."""
        return self.analysis.cost(spec, n_tokens)

    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns the rest, and adds the batch's scores to the mean."""
        values = self.analysis.compute(model, batch)
        scores = values.pop(self.edges.name)
        check_finite(self.edges, self.metric, scores, batch)
        block = scores.cpu().double().numpy()
        # Batches are merged by mean and squared deviations: a running sum of squares would cancel.
        n, total, mean = len(block), self.count + len(block), block.mean(0)
        delta = mean - self.mean
        self.squares += ((block - mean) ** 2).sum(0) + delta**2 * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total
        return values

    def added(self, found: xr.Dataset) -> xr.Dataset:
        """Returns the results with the mean over prompts and its standard error."""
        error = np.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else self.mean * np.nan
        dims, name, dtype = self.edges.dims, self.edges.name, found[self.others[0].name].dtype
        attrs = dict(self.edges.attrs) | {"aggregate": "mean over prompts", "n_prompts": self.count}
        long_name = f"standard error over prompts of {name}"
        spread = attrs | {"long_name": long_name, "sign": "not negative; NaN for a single prompt"}
        arrays = {
            name: (dims, self.mean.astype(dtype), attrs),
            f"{name}_standard_error": (dims, error.astype(dtype), spread),
        }
        return found.assign(arrays).assign_coords(
            {key: (list(where), np.array(values)) for key, (where, values) in self.edges.coords.items()}
        )
