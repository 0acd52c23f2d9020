"""Gradients along many lines in one run: the copies of each activation join at the layer where it is.

    copies for an activation of layer 3 -- its block --+-- block 4 --+-- ... -- last block -- metric, one value per row
    copies for an activation of layer 4 --------------- its block ---+

In front of the activation copies do not differ, and what the base run has there is taken from it. From there on they go
through the rest of their block by themselves, and behind that together with all others. Rows never mix, so the gradient
of the metrics' sum at each activation is that of its own copies. Of the last block only the position that the metric
reads goes on behind the attention, unless it reads them all.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastinterp.gradients.memory import copies_in_runs, joined_bytes
from fastinterp.gradients.objective import Objective
from fastinterp.gradients.paths import Point, interpolated
from fastinterp.gradients.runs import Key, Put
from fastinterp.model.attention import Frame, attend, continuing_frame, make_frame, project_qkv
from fastinterp.model.forward import block, mix_heads
from fastinterp.model.intervene import NO_TAPS, Taps
from fastinterp.model.mlp import mlp_residual
from fastinterp.model.model import Model
from fastinterp.model.norms import write_norm
from fastinterp.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Line:
    """The straight line between an activation's values in a base run and in a source run.

    ``beside`` is the sum of what the base run goes on with beside it (see :func:`kept_beside`), None where that is
    nothing.
    """

    key: Key
    base: Float[Tensor, "batch ..."]
    source: Float[Tensor, "batch ..."]
    beside: Float[Tensor, "batch pos d_model"] | None = None

    def at(self, points: Sequence[Point]) -> Float[Tensor, "copy_and_batch ..."]:
        """Returns the values at some points, one behind the other; nothing was recorded of them."""
        alphas = [alpha for alpha, _ in points]
        return self.source.detach() if alphas == [1.0] else interpolated(self.base, self.source, alphas)


@dataclass(frozen=True, kw_only=True)
class Average:
    """The average of the gradients on a line, and the metric at its end, with the source's value of the activation."""

    line: Line
    gradient: Float[Tensor, "batch ..."]
    patched: Float[Tensor, " batch"]


Leg = tuple[Line, Sequence[Point]]
"""A line, and those of its points that go through the model together with others."""


def kept_beside(spec: ModelSpec, key: Key) -> tuple[Key, ...]:
    """Returns the activations whose sum a run goes on with beside ``key``.

    That is the residual that the MLP's output is added to, for what the MLP makes; nothing beside a residual; the
    block's own input for everything else.
    """
    name, layer = key
    if name.startswith("resid_"):
        return ()
    if name in ("post", "mlp_out"):
        return (("resid_pre", layer), ("attn_out", layer)) if spec.parallel else (("resid_mid", layer),)
    return (("resid_pre", layer),)


def joined_averages(
    model: Model, lines: Iterable[Line], points: Sequence[Point], objective: Objective
) -> Iterator[Average]:
    """Yields, line by line, the weighted average of the gradients at its points, and the metric at its end.

    The same numbers as of one run for each line and point. As many of them as are within :func:`run_bytes` are one
    run, those of neighbouring layers together. Ends that are none of the points need no gradient, and are runs of
    their own.

    Args:
        lines: their rows are those of the batch of ``objective``, or the ends that it has.
        points: the same for all lines.
        objective: the metric of one copy of these rows.

    Memory: :func:`run_bytes`, but at least what one copy needs, and the averages of lines that are not done.
    """
    ordered = sorted(lines, key=lambda line: line.key[1])
    patched: dict[Key, Tensor] = {}
    if all(alpha != 1.0 for alpha, _ in points):
        for group in _groups(model, ordered, [(1.0, 1.0)], objective, recorded=False):
            with torch.no_grad():
                metrics = _metrics(model, group, [line.at(some) for line, some in group], objective)
            patched |= {line.key: metric for (line, _), metric in zip(group, metrics, strict=True)}
    sums: dict[Key, Tensor] = {}
    left = {line.key: len(points) for line in ordered}
    for group in _groups(model, ordered, points, objective, recorded=True):
        patched |= _add_gradients(sums, model, group, objective)
        for line, some in group:
            left[line.key] -= len(some)
            if not left[line.key]:
                yield Average(line=line, gradient=sums.pop(line.key), patched=patched.pop(line.key))


def _groups(
    model: Model, lines: Sequence[Line], points: Sequence[Point], objective: Objective, *, recorded: bool
) -> Iterator[list[Leg]]:
    """Cuts all points of all lines into runs, in their order.

    Without gradients a run holds little more than one layer. Of a function's logits there are no more at a time than
    for the points of one line.
    """
    rows, n_layers = objective.batch.tokens, model.spec.n_layers
    shape = len(rows), rows.shape[1] if objective.ends is None else objective.ends.width
    keys = [line.key if recorded else ("resid_post", n_layers - 1) for line in lines]
    sizes = [joined_bytes(model, shape, rows.shape[1], key) for key in keys]
    most = len(points) if objective.function is not None else None
    for group in copies_in_runs(model.device, sizes, len(points), most):
        yield [(lines[i], points[some]) for i, some in group]


def _add_gradients(
    sums: dict[Key, Tensor], model: Model, group: Sequence[Leg], objective: Objective
) -> dict[Key, Float[Tensor, " batch"]]:
    """Adds weighted gradients to those of their lines; returns the metric of lines whose end is among the points."""
    with torch.enable_grad():
        leaves = [line.at(some).requires_grad_() for line, some in group]
        metric = _metrics(model, group, leaves, objective)
        found = torch.autograd.grad(metric.sum(), leaves)
    patched: dict[Key, Tensor] = {}
    metrics = metric.detach().split([len(some) for _, some in group])
    for (line, some), values, gradient in zip(group, metrics, found, strict=True):
        apart = gradient.unflatten(0, (len(some), -1))
        if line.key not in sums:
            sums[line.key] = torch.zeros_like(apart[0], dtype=torch.promote_types(gradient.dtype, torch.float32))
        # One after the other: no copy of all of them.
        for (alpha, weight), one, value in zip(some, apart, values, strict=True):
            sums[line.key].add_(one, alpha=weight)
            if alpha == 1.0:
                patched[line.key] = value
    return patched


def _metrics(
    model: Model, group: Sequence[Leg], values: Sequence[Tensor], objective: Objective
) -> Float[Tensor, "copy batch"]:
    """Runs copies from activations on, line behind line, and returns their metric."""
    n_layers = model.spec.n_layers
    frames = _frames(model, values[0], objective)
    objective, last = _at_last(objective)
    resid, n_copies = None, 0
    for layer in range(group[0][0].key[1], n_layers):
        at = last if layer == n_layers - 1 else None
        parts = [] if resid is None else [_through(model, layer, resid, frames(n_copies), at)]
        for (line, some), value in zip(group, values, strict=True):
            if line.key[1] == layer:
                behind = _behind(model, line, value, frames(len(some)))
                parts.append(behind if at is None else _rows_at(behind, at))
                n_copies += len(some)
        resid = parts[0] if len(parts) == 1 else torch.cat(parts)
    assert resid is not None
    metric: Tensor = objective.repeated(n_copies)(resid).unflatten(0, (n_copies, -1))
    return metric


def _frames(model: Model, like: Tensor, objective: Objective) -> Callable[[int], Frame]:
    """Returns what gives the tables for some copies of the rows, made once for each number of them."""
    n_pos, ends = objective.batch.tokens.shape[1], objective.ends
    if ends is None:
        frame = make_frame(model.spec, n_pos, device=like.device, dtype=like.dtype)
        return lambda n: frame
    return cache(lambda n: continuing_frame(model.spec, ends.repeated(n), ends.width, dtype=like.dtype))


def _at_last(objective: Objective) -> tuple[Objective, Int[Tensor, " batch"] | None]:
    """Returns the metric of residuals ``[row, 1, d_model]`` at the last tokens, and where among the rows these are.

    None for metrics that read all positions.
    """
    if objective.function is not None or (objective.metric is not None and objective.metric.per_token):
        return objective, None
    batch, ends = objective.batch, objective.ends
    alone = dataclasses.replace(
        batch,
        tokens=batch.tokens.gather(1, batch.last[:, None]),
        n_tokens=torch.ones_like(batch.n_tokens),
        corrupt=None,
    )
    last = batch.last if ends is None else batch.last - ends.at[:, 0]
    return dataclasses.replace(objective, batch=alone, ends=None), last


def _rows_at(x: Shaped[Tensor, "row pos *rest"], at: Int[Tensor, " batch"]) -> Shaped[Tensor, "row 1 *rest"]:
    """Returns one position of every row."""
    where = at.repeat(len(x) // len(at))
    return x[torch.arange(len(x), device=x.device), where].unsqueeze(1)


# A block, whole or in part --------------------------------------------------------------------------------------


def _through(
    model: Model, layer: int, resid: Float[Tensor, "row pos d_model"], frame: Frame, at: Int[Tensor, " batch"] | None
) -> Float[Tensor, "row new d_model"]:
    """Returns the residual behind a block, at all positions or at one of every row."""
    spec, w = model.spec, model.weights.blocks[layer]
    if at is None:
        return block(spec, w, layer, resid, frame)
    q, k, v = project_qkv(spec, w, layer, resid, frame, NO_TAPS)
    z = attend(spec, layer, q, k, v, frame, NO_TAPS)
    return _behind_heads(model, layer, _rows_at(resid, at), _rows_at(z, at))


def _behind(
    model: Model, line: Line, value: Float[Tensor, "row ..."], frame: Frame
) -> Float[Tensor, "row pos d_model"]:
    """Returns the residual behind the block of an activation, given other values of it."""
    (name, layer), spec = line.key, model.spec
    w = model.weights.blocks[layer]
    if line.beside is None:
        if name == "resid_post":
            return value
        return block(spec, w, layer, value, frame) if name == "resid_pre" else mlp_residual(spec, w, layer, value)
    resid = line.beside.repeat(len(value) // len(line.beside), 1, 1)
    match name:
        case "mlp_out":
            return resid + value
        case "post":
            mlp_raw = w.products("W_out", value, w.W_out, w.b_out)
            return resid + write_norm(spec, "ln2_post", layer, mlp_raw, w.ln2_post)
        case "attn_out":
            return _behind_attention(model, layer, resid, value)
        case "z":
            return _behind_heads(model, layer, resid, value)
    return block(spec, w, layer, resid, frame, Taps(edits={line.key: [Put(value)]}))


def _behind_heads(
    model: Model, layer: int, resid: Float[Tensor, "row pos d_model"], z: Float[Tensor, "row pos head d_head"]
) -> Float[Tensor, "row pos d_model"]:
    """The rest of a block, given the mixed values of the heads."""
    w = model.weights.blocks[layer]
    attn_out = write_norm(model.spec, "ln1_post", layer, mix_heads(w, layer, z), w.ln1_post)
    return _behind_attention(model, layer, resid, attn_out)


def _behind_attention(
    model: Model, layer: int, resid: Float[Tensor, "row pos d_model"], attn_out: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row pos d_model"]:
    """The rest of a block, given what attention adds to the residual."""
    spec, w = model.spec, model.weights.blocks[layer]
    after = resid + attn_out
    return mlp_residual(spec, w, layer, resid if spec.parallel else after, after=after)
