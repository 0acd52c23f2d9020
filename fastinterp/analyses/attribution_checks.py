"""Attributions against the truth: the units with the largest estimates are patched, and both are compared."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Shaped
from torch import Tensor

from fastinterp.analyses.base import raise_non_finite
from fastinterp.analyses.measuring import Clean, clean_run, measure, measure_swept, measured_clean
from fastinterp.errors import OptionError, PromptPairError, check_choice
from fastinterp.gradients import MetricFunction, Objective
from fastinterp.metrics import Metric, get_metric
from fastinterp.model.forward import forward
from fastinterp.model.intervene import SOURCE, Edit
from fastinterp.model.model import Model
from fastinterp.names import head_label
from fastinterp.prompts import Batch, TokenizedPrompts
from fastinterp.sweep import Variant, clean_weights, run_variants, sweep

Unit = Mapping[str, int]
"""An entry of a site's attributions: its index along each of their dims but ``prompt``."""

# What is patched in place of a site: result is linear in z, the embedding is all that enters block 0.
_PATCHED = {"result": "z", "embed": "resid_pre"}

_POSITIONS = ("pos", "query_pos", "key_pos")

# Estimates of the size of an effect, which say nothing of its sign.
_UNSIGNED = ("atp_star",)


def check_verify(k: object) -> None:
    """Raises :class:`OptionError` unless ``k`` is a positive number of units."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise OptionError(f"verify={k!r}: give how many units of each site to patch, such as 20, or None for none")


def verified(
    model: Model,
    prompts: TokenizedPrompts,
    found: xr.Dataset,
    *,
    sites: Sequence[str],
    k: int,
    direction: str = "denoise",
    metric: str | MetricFunction = "logit_diff",
    method: str = "atp",
) -> xr.Dataset:
    """Returns the exact effects of the units with the largest attributions, and how well the estimates rank them.

    ``effect = metric(base run with the unit's value of the source run) - metric(base run)``, as
    :func:`activation_patch` has it. A unit is an entry of a site's attributions: what they are summed over is patched
    together (all positions of a head, all heads of a layer, ..). The ``k`` units of each site with the largest
    ``|mean over prompts of the attribution|`` are patched, or all if there are fewer; a position's mean is over the
    prompts that have it. All of them go through the model together, and share the base run below their layer.

    Args:
        prompts: the pairs that the attributions are of.
        found: what :func:`attribution_patch` gives for them, with ``sites``, ``direction``, ``metric`` and ``method``.

    Returns:
        For each site, by ``rank`` (0 has the largest estimate; NaN where a site has fewer units than another):
        ``{metric}_verified_{site}`` (prompt, rank), the exact effect, and
        ``{metric}_estimate_of_verified_{site}`` (prompt, rank), the attribution; NaN for a position that a prompt
        does not have. Coordinates along ``rank`` name the unit: ``{metric}_unit_{site}`` is a label (``L9H6``,
        ``L9KV2``, ``L9N17``, ``ATTN9``, ``MLP9``, ``L9`` for all of another site, ``embed``; with a position
        ``L9H6@3``, of a pattern ``L9H6@3<-1`` for query 3 and key 1), ``{metric}_unit_{site}_layer`` and so on for
        ``head``, ``kv_head``, ``neuron`` and positions its indices, -1 where there is no unit.
        ``{metric}_rank_correlation_{site}``: Spearman's correlation of estimates and effects over these units, of
        means over prompts; ``{metric}_rank_correlation_per_prompt_{site}`` (prompt). Equal values share the mean of
        their ranks; NaN where there are fewer than two different estimates or effects. The estimates of ``"atp_star"``
        have no sign: they are compared with sizes of effects. Units with small estimates are not among them, so that
        effects which the estimates overlook do not show.

    Raises:
        OptionError: a ``k`` below 1; attributions that ``found`` does not have.
        PromptPairError: prompts without corrupt ones.
        NonFiniteError: an effect is NaN or infinite; names the prompt.

    Memory: as :func:`activation_patch`, one variant for each unit; of a function of the logits, the logits of one
    variant at a time.
    """
    check_verify(k)
    check_choice("direction", direction, ("denoise", "noise"))
    if prompts.corrupt is None:
        raise PromptPairError(
            "patching needs a corrupt prompt for every prompt: PromptSet.of(prompts=..., corrupt=...), of the same "
            "number of tokens"
        )
    estimates = {site: _estimates(found, site, metric) for site in sites}
    units = {site: _largest(estimates[site], k) for site in sites}
    exact = _exact(model, prompts, [(site, unit) for site in sites for unit in units[site]], direction, metric)
    # As many ranks for every site.
    n_ranks = max(map(len, units.values()), default=0)
    data: dict[Hashable, Any] = {}
    coords: dict[Hashable, Any] = {"prompt": found["prompt"], "rank": np.arange(n_ranks)}
    first = 0
    for site in sites:
        n = len(units[site])
        effects, first = _filled(exact[:, first : first + n], n_ranks), first + n
        guesses = _filled(_chosen(estimates[site], units[site]), n_ranks)
        data |= _compared(estimates[site], site, effects, guesses, sizes=method in _UNSIGNED)
        coords |= _coords(_prefix(estimates[site], site), site, units[site], n_ranks)
    return xr.Dataset(data, coords=coords, attrs=dict(found.attrs))


# Units ------------------------------------------------------------------------------------------------------


def _estimates(found: xr.Dataset, site: str, metric: str | MetricFunction) -> xr.DataArray:
    """The attributions of a site; those of a function are called by its name."""
    ending = f"_attribution_{site}"
    known = [str(name) for name in found.data_vars if str(name).endswith(ending)]
    names = [name for name in known if not isinstance(metric, str) or name == metric + ending]
    if len(names) != 1:
        wanted = f"{metric}{ending}" if isinstance(metric, str) else f"one array *{ending}"
        raise OptionError(
            f"found has {', '.join(known) or 'no attributions of ' + site}, not {wanted}: give what attribution_patch("
            f"model, prompts, {site!r}, metric=...) returns, and the same sites and metric"
        )
    return found[names[0]]


def _prefix(estimates: xr.DataArray, site: str) -> str:
    return str(estimates.name).removesuffix(f"_attribution_{site}")


def _dims(estimates: xr.DataArray) -> tuple[str, ...]:
    return tuple(str(dim) for dim in estimates.dims if dim != "prompt")


def _largest(estimates: xr.DataArray, k: int) -> list[Unit]:
    """The units with the largest means, the first of equal ones first."""
    dims = _dims(estimates)
    if not dims:
        return [{}]
    size = abs(estimates.transpose("prompt", *dims).mean("prompt", dtype=np.float64))
    if "key_pos" in dims:
        # No query reads what is behind it.
        size = size.where(size["query_pos"] >= size["key_pos"])
    flat = size.values.ravel()
    order = np.argsort(-flat, kind="stable")[: min(k, int(np.isfinite(flat).sum()))]
    indices = np.stack(np.unravel_index(order, size.shape), axis=-1).tolist()
    return [dict(zip(dims, index, strict=True)) for index in indices]


def _chosen(estimates: xr.DataArray, units: Sequence[Unit]) -> Float[np.ndarray, "prompt unit"]:
    """The attributions of some units."""
    dims = _dims(estimates)
    values = estimates.transpose("prompt", *dims).values
    index: tuple[Any, ...] = tuple(np.array([unit[dim] for unit in units], dtype=int) for dim in dims)
    found: np.ndarray = values[(slice(None), *index)]
    return found.reshape(len(values), len(units))


def _label(site: str, unit: Unit) -> str:
    layer = unit.get("layer")
    if layer is None:
        label = site
    elif "head" in unit:
        label = head_label(layer, unit["head"])
    elif "kv_head" in unit:
        label = f"L{layer}KV{unit['kv_head']}"
    elif "neuron" in unit:
        label = f"L{layer}N{unit['neuron']}"
    else:
        label = {"attn_out": "ATTN", "mlp_out": "MLP"}.get(site, "L") + str(layer)
    if "key_pos" in unit:
        return f"{label}@{unit['query_pos']}<-{unit['key_pos']}"
    return f"{label}@{unit['pos']}" if "pos" in unit else label


def _coords(prefix: str, site: str, units: Sequence[Unit], n_ranks: int) -> dict[Hashable, Any]:
    missing = n_ranks - len(units)
    name = f"{prefix}_unit_{site}"
    labels = [_label(site, unit) for unit in units] + [""] * missing
    coords: dict[Hashable, Any] = {name: ("rank", np.array(labels, dtype=object))}
    for dim in units[0] if units else ():
        coords[f"{name}_{dim}"] = ("rank", np.array([unit[dim] for unit in units] + [-1] * missing))
    return coords


def _edit(site: str, unit: Unit, batch: Batch) -> Edit:
    """The patch of a unit: its value in the source run."""
    pos = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    at = {dim: (pos == unit[dim]).expand_as(batch.tokens) for dim in _POSITIONS if dim in unit}
    return Edit(
        site=_PATCHED.get(site, site),
        layer=unit.get("layer", 0),
        head=unit.get("head", unit.get("kv_head")),
        neuron=unit.get("neuron"),
        positions=at.get("query_pos", at.get("pos")),
        keys=at.get("key_pos"),
        replacement=SOURCE,
    )


# Effects ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _exact(
    model: Model,
    prompts: TokenizedPrompts,
    units: Sequence[tuple[str, Unit]],
    direction: str,
    metric: str | MetricFunction,
) -> Float[np.ndarray, "prompt unit"]:
    """The effects of patching units, each by itself; NaN for positions that a prompt does not have."""
    dtype = np.float64 if model.dtype == torch.float64 else np.float32
    found = np.full((len(prompts), len(units)), np.nan, dtype=dtype)
    needed = np.array([max((unit[dim] for dim in _POSITIONS if dim in unit), default=0) for _, unit in units])
    for each in prompts.batches(_tokens_per_batch(model, len(units), metric)):
        batch = each.to(model.device)
        assert batch.corrupt is not None
        corrupt = dataclasses.replace(batch, tokens=batch.corrupt)
        base, source = (corrupt, batch) if direction == "denoise" else (batch, corrupt)
        fitting = np.flatnonzero(needed < batch.tokens.shape[1]).tolist()
        if not fitting:
            continue
        variants = [Variant(edits=(_edit(site, unit, base),)) for site, unit in (units[i] for i in fitting)]
        with torch.autocast(model.device.type, enabled=False):
            if isinstance(metric, str):
                effects = _of_metric(model, base, source, variants, get_metric(metric), denoise=direction == "denoise")
            else:
                effects = _of_function(model, base, source, variants, metric)
        has = needed[fitting] < each.n_tokens.numpy()[:, None]
        values = effects.T.cpu()
        bad = ~torch.isfinite(values) & torch.from_numpy(has)
        raise_non_finite("the effect of a patch", bad.any(-1), each)
        found[each.indices[:, None], fitting] = np.where(has, values.numpy(), np.nan)
    return found


def _tokens_per_batch(model: Model, n_variants: int, metric: str | MetricFunction) -> int:
    """As many tokens as keep all variants' residuals, and a function's logits of one, within 256 MiB (8 GiB)."""
    itemsize = model.weights.W_E.element_size()
    each = n_variants * model.spec.d_model * itemsize
    if not isinstance(metric, str):
        each = max(each, 4 * model.spec.d_vocab * itemsize)
    budget = (1 << 28) if model.device.type == "cpu" else (1 << 33)
    return max(256, min(2048, budget // max(1, each)))


def _of_metric(
    model: Model, base: Batch, source: Batch, variants: Sequence[Variant], metric: Metric, *, denoise: bool
) -> Float[Tensor, "variant batch"]:
    """Effects on a metric; ``kl`` compares with the clean prompt's own run, be it base or source."""
    clean: Clean | None = None
    before = out = torch.empty(0)
    for swept in sweep(
        model, base.tokens, variants,
        n_tokens=base.n_tokens, at=None if metric.per_token else base.last, source=source.tokens, clean_first=True,
    ):  # fmt: skip
        if clean is None:
            clean = measured_clean(model, base, [metric], swept.resid[0])
            if metric.relative and denoise:
                reference = clean_run(model, source, [metric]).resid
                value = measure(model, base, [metric], swept.resid, reference)[metric.name][0]
                clean = Clean(resid=reference, values={metric.name: value})
            before = _per_prompt(metric, clean.values[metric.name], base)
            out = before.new_empty(len(variants), len(base))
            continue
        values = measure_swept(model, base, [metric], swept, clean)[metric.name]
        out[swept.indices] = _per_prompt(metric, values, base) - before
        # Not while the next group goes through the model.
        del swept
    return out


def _per_prompt(metric: Metric, values: Float[Tensor, "..."], batch: Batch) -> Tensor:
    """One value for each prompt: of a loss, the mean over the prompt's own next tokens."""
    if not metric.per_token:
        return values
    scored = torch.arange(values.shape[-1], device=values.device) < batch.last[:, None]
    return torch.where(scored, values, 0.0).sum(-1) / batch.last


def _of_function(
    model: Model, base: Batch, source: Batch, variants: Sequence[Variant], function: MetricFunction
) -> Float[Tensor, "variant batch"]:
    """Effects on a function of all logits, which are formed for one variant at a time."""
    objective = Objective(model=model, batch=base, metric=None, function=function)
    dtype = torch.promote_types(model.dtype, torch.float32)

    def value(resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        # What a sweep leaves at padding is undefined.
        return objective(resid.masked_fill(~base.mask[..., None], 0.0)).to(dtype)

    before = value(forward(model.spec, clean_weights(model, "exact"), base.tokens))
    out = before.new_empty(len(variants), len(base))
    for indices, resids in run_variants(model, base.tokens, variants, n_tokens=base.n_tokens, source=source.tokens):
        for index, resid in zip(indices, resids, strict=True):
            out[index] = value(resid) - before
    return out


# Results ----------------------------------------------------------------------------------------------------


def _filled(values: Shaped[np.ndarray, "prompt unit"], n_ranks: int) -> Shaped[np.ndarray, "prompt rank"]:
    """NaN behind the last unit."""
    filled = np.full((len(values), n_ranks), np.nan, dtype=values.dtype)
    filled[:, : values.shape[1]] = values
    return filled


def _compared(
    estimates: xr.DataArray,
    site: str,
    effects: Float[np.ndarray, "prompt rank"],
    guesses: Float[np.ndarray, "prompt rank"],
    *,
    sizes: bool,
) -> dict[Hashable, Any]:
    """The arrays of a site."""
    prefix = _prefix(estimates, site)
    attrs = dict(estimates.attrs)
    exact = {key: value for key, value in attrs.items() if key not in ("method", "steps", "rule")}
    exact |= {"long_name": f"exact effect of patching units of {site}", "sign": "patched - base"}
    against = "|exact effects|" if sizes else "exact effects"
    correlation = {
        "units": "1",
        "metric": attrs.get("metric", prefix),
        "method": attrs.get("method", ""),
        "long_name": f"Spearman's correlation of attributions and {against} of the units of {site} that were patched",
        "sign": "1: the same order",
        "missing": "fewer than two different estimates or effects",
    }
    compared = np.abs(effects) if sizes else effects
    of_means = rank_correlation(_mean(guesses), _mean(compared))
    per_prompt = np.array([rank_correlation(*pair) for pair in zip(guesses, compared, strict=True)])
    own = {"long_name": f"attribution of the units of {site} that were patched"}
    return {
        f"{prefix}_verified_{site}": (("prompt", "rank"), effects, exact),
        f"{prefix}_estimate_of_verified_{site}": (("prompt", "rank"), guesses, attrs | own),
        f"{prefix}_rank_correlation_{site}": ((), of_means, correlation | {"of": "means over prompts"}),
        f"{prefix}_rank_correlation_per_prompt_{site}": (("prompt",), per_prompt, correlation | {"of": "each prompt"}),
    }


def _mean(values: Float[np.ndarray, "prompt rank"]) -> Float[np.ndarray, " rank"]:
    """The mean over the prompts that have a value, NaN where none has."""
    has = np.isfinite(values)
    n = has.sum(0)
    total = np.where(has, values, 0.0).sum(0, dtype=np.float64)
    found: Float[np.ndarray, " rank"] = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    return found


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Returns Spearman's correlation of the pairs without NaN: Pearson's, of ranks; equal values share their mean rank.

    NaN where ``a`` or ``b`` has fewer than two different values.

    >>> round(rank_correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 5.0, 9.0])), 4)
    0.9487
    """
    known = np.isfinite(a) & np.isfinite(b)
    ranks = [_average_ranks(values[known]) for values in (a, b)]
    first, second = (each - each.mean() if len(each) else each for each in ranks)
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size > 0 else float("nan")


def _average_ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Float[np.ndarray, " n"] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks
