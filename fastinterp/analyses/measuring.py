"""Metrics of final residuals: of the clean run, and of what a sweep gives, in slices and without logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.analyses.base import final_scale, raise_non_finite
from fastinterp.metrics import Metric, evaluate_all, evaluate_loss
from fastinterp.model.forward import forward, forward_at
from fastinterp.model.model import Model
from fastinterp.model.norms import apply_affine, center, divide, norm_scale, normalize
from fastinterp.prompts import Batch
from fastinterp.sweep import Precision, Swept, Variant, clean_weights, sweep
from fastinterp.sweep.memory import SLICE_VARIANTS, SweepMemory


def per_token(metrics: Sequence[Metric]) -> bool:
    """Whether one of the metrics has a value at every token."""
    return any(metric.per_token for metric in metrics)


@dataclass(frozen=True, kw_only=True)
class Clean:
    """The clean run of a batch: its final residual, at the last tokens or everywhere, and its metrics."""

    resid: Float[Tensor, "batch *pos d_model"]
    values: dict[str, Float[Tensor, "batch ..."]]


def clean_run(model: Model, batch: Batch, metrics: Sequence[Metric], precision: Precision = "exact") -> Clean:
    """Runs the prompts as they are; in the precision of a sweep, its products are those of the sweep's clean run."""
    spec, weights = model.spec, clean_weights(model, precision)
    if per_token(metrics):
        resid = forward(spec, weights, batch.tokens)
    else:
        resid = forward_at(spec, weights, batch.tokens, batch.n_tokens, batch.last)
    return measured_clean(model, batch, metrics, resid)


def measured_clean(
    model: Model, batch: Batch, metrics: Sequence[Metric], resid: Float[Tensor, "batch *pos d_model"]
) -> Clean:
    """Measures the final residual of the clean run."""
    measured = measure(model, batch, metrics, resid[None], resid)
    return Clean(resid=resid, values={name: value[0] for name, value in measured.items()})


def measure(
    model: Model,
    batch: Batch,
    metrics: Sequence[Metric],
    resid: Float[Tensor, "variant batch *pos d_model"],
    clean: Float[Tensor, "batch *pos d_model"],
) -> dict[str, Float[Tensor, "variant batch ..."]]:
    """Returns metrics of final residuals at the last tokens, or at all positions if one has a value at each."""
    every = per_token(metrics)
    values: dict[str, Tensor] = {}
    if every:
        x = _normalized(model, resid, batch, every_position=True)
        weights, softcap = model.weights, model.spec.final_softcap
        loss = evaluate_loss(x, weights.W_U, weights.b_U, batch.tokens, batch.n_tokens, softcap=softcap)
        values |= {metric.name: loss for metric in metrics if metric.per_token}
        rows = torch.arange(len(batch), device=resid.device)
        resid, clean = resid[:, rows, batch.last], clean[rows, batch.last]
    values |= _at_last(model, batch, [metric for metric in metrics if not metric.per_token], resid, clean)
    return {metric.name: values[metric.name] for metric in metrics}


def _at_last(
    model: Model, batch: Batch, metrics: Sequence[Metric], resid: Tensor, clean: Tensor
) -> dict[str, Float[Tensor, "variant batch"]]:
    weights, softcap = model.weights, model.spec.final_softcap
    answer = batch.answer if batch.answer is not None else batch.tokens[:, :0]
    unchanged = None
    if any(metric.relative for metric in metrics):
        unchanged = normalize(model.spec.norm, clean, weights.ln_final)
    values: dict[str, Tensor] = {}
    # One product per variant and prompt: in float64 it costs nothing, and adds no rounding to the effect.
    for some, rows in (
        ([metric for metric in metrics if metric.linear], resid.double()),
        ([metric for metric in metrics if not metric.linear], resid),
    ):
        if some:
            x = _normalized(model, rows, batch, every_position=False)
            values |= evaluate_all(
                some, x, weights.W_U, weights.b_U, answer, batch.wrong, softcap=softcap, clean=unchanged
            )
    return values


def _normalized(model: Model, resid: Tensor, batch: Batch, *, every_position: bool) -> Tensor:
    scale = final_scale(model, resid, batch, every_position=every_position)
    return apply_affine(divide(center(model.spec.norm, resid), scale), model.weights.ln_final)


def sweep_values(
    model: Model,
    batch: Batch,
    metrics: Sequence[Metric],
    variants: Sequence[Variant],
    source: Int[Tensor, "batch pos"] | None = None,
    *,
    precision: Precision = "exact",
    memory: SweepMemory | None = None,
) -> tuple[Clean, dict[str, Float[Tensor, "variant batch *pos"]]]:
    """Runs variants of a batch, and returns the clean run and every variant's metrics."""
    clean: Clean | None = None
    out: dict[str, Tensor] = {}
    at = None if per_token(metrics) else batch.last
    for swept in sweep(
        model, batch.tokens, variants,
        n_tokens=batch.n_tokens, at=at, source=source, clean_first=True, precision=precision,
        memory=memory,
    ):  # fmt: skip
        if clean is None:
            clean = measured_clean(model, batch, metrics, swept.resid[0])
            out = {name: value.new_empty(len(variants), *value.shape) for name, value in clean.values.items()}
            del swept
            continue
        slice_variants = SLICE_VARIANTS if memory is None else memory.slice_variants
        for name, values in measure_swept(model, batch, metrics, swept, clean, slice_variants).items():
            out[name][swept.indices] = values
        # Not while the next group goes through the model.
        del swept
    assert clean is not None
    return clean, out


def measure_swept(
    model: Model,
    batch: Batch,
    metrics: Sequence[Metric],
    swept: Swept,
    clean: Clean,
    slice_variants: int = SLICE_VARIANTS,
) -> dict[str, Float[Tensor, "variant batch ..."]]:
    """Returns metrics of a group of variants, ``[variant, batch]`` or, those with a value per token, with ``pos``.

    In front of where variants begin they have the clean run's values.
    """
    found: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
    # In slices, so that normalised copies do not double the residuals' memory.
    for resid in swept.resid.split(slice_variants):
        if swept.start is None or not per_token(metrics):
            values = measure(model, batch, metrics, resid, clean.resid)
        else:
            values = _measure_ends(model, batch, metrics, resid, swept.start, clean)
        for name, value in values.items():
            found[name].append(value)
    return {name: torch.cat(values) for name, values in found.items()}


def _measure_ends(
    model: Model,
    batch: Batch,
    metrics: Sequence[Metric],
    resid: Float[Tensor, "variant batch width d_model"],
    start: Tensor,
    clean: Clean,
) -> dict[str, Tensor]:
    """Metrics of variants of which only the positions from ``start`` on were computed."""
    width = resid.shape[2]
    rows = torch.arange(len(batch), device=resid.device)
    where = swept_positions(start, width, batch)
    lengths = batch.n_tokens - start
    weights, softcap = model.weights, model.spec.final_softcap
    scale = norm_scale(model.spec.norm, resid)
    real = torch.arange(width, device=resid.device) < lengths[:, None]
    bad = (~torch.isfinite(scale.squeeze(-1)) & real).any(-1).any(0)
    raise_non_finite("the final residual", bad, batch)
    x = apply_affine(divide(center(model.spec.norm, resid), scale), weights.ln_final)
    ends = evaluate_loss(x, weights.W_U, weights.b_U, batch.tokens.gather(1, where), lengths, softcap=softcap)
    loss = clean.values["loss"].expand(len(resid), -1, -1).clone()
    prompt, step = (real & (where < batch.last[:, None])).nonzero(as_tuple=True)
    loss[:, prompt, where[prompt, step]] = ends[:, prompt, step]
    found: dict[str, Tensor] = {metric.name: loss for metric in metrics if metric.per_token}
    others = [metric for metric in metrics if not metric.per_token]
    if others:
        found |= _at_last(model, batch, others, resid[:, rows, batch.last - start], clean.resid[rows, batch.last])
    return {metric.name: found[metric.name] for metric in metrics}


def swept_positions(start: Int[Tensor, " batch"], width: int, batch: Batch) -> Int[Tensor, "batch width"]:
    """Returns the positions from ``start`` on, at most each prompt's last."""
    return torch.minimum(start[:, None] + torch.arange(width, device=start.device), batch.last[:, None])
