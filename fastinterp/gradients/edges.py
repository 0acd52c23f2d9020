"""First-order effects of the residual stream's edges: from everything that writes to everything that reads.

    score(s -> d) = sum over positions of (source_S - source_B) . gradient of the metric at what d reads

What ``d`` reads is its own copy of the residual, in front of its norm. One run without gradients gives what sources
write, one with gradients what destinations make of it. Then, for some tokens at a time, both are laid out as rows of
``d_model`` numbers and multiplied, prompt by prompt::

    [source, pos * d_model] @ [pos * d_model, destination]

Cost per token: ``2 * d_model`` operations for each edge (SmolLM2-135M: 71 thousand edges, 81 MFLOP, where a forward
has 212) and ``2 * d_model * d_head`` for each head's ``z W_O`` and each query, key and value head's gradient. Going
through the low rank of ``z`` would cost ``2 * d_head^2`` for each pair of heads: more, as ``d_head^2 > d_model``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastinterp.gradients.edges_nodes import Destination, n_read, sources
from fastinterp.model.attention import make_frame
from fastinterp.model.forward import run_blocks
from fastinterp.model.intervene import Capture, Taps
from fastinterp.model.model import Model
from fastinterp.model.norms import center, divide, norm_scale
from fastinterp.model.spec import ModelSpec, Norm
from fastinterp.model.weights import NormWeights

_READ = ("q", "k", "v", "mlp_in")

# Destinations that go into one product, at least: with few, it reads the sources more often than it computes.
_GROUP = 64


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the sources of a run add to the residual stream, and the residual at its end.

    A head adds ``z W_O``; with a post-norm ``z`` is divided by the norm's scale in this run, and ``W_O`` is what the
    norm makes of it (see :func:`writing_matrix`). ``b_O`` and the post-norm's bias belong to nobody.
    """

    embed: Float[Tensor, "batch pos d_model"]
    z: list[Float[Tensor, "batch pos head d_head"]]
    mlp_out: list[Float[Tensor, "batch pos d_model"]]
    resid: Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The gradient of every prompt's metric at what destinations read, of ``q``, ``k`` and ``v`` behind the projection.

    ``resid_pre`` is the residual that they are projected from.
    """

    resid_pre: list[Float[Tensor, "batch pos d_model"]]
    qkv: list[Float[Tensor, "batch pos qkv_head d_head"]]
    mlp_in: list[Float[Tensor, "batch pos d_model"]]
    logits: Float[Tensor, "batch pos d_model"]


@torch.no_grad()
def run_written(model: Model, start: Float[Tensor, "batch pos d_model"]) -> Written:
    """Runs embeddings through the model and returns what its sources write.

    Memory: ``z`` and ``mlp_out`` of all layers.
    """
    taps = Taps.of(model.spec.n_layers, capture=_writing_names(model))
    return _written(model, start, _run(model, start, taps), taps)


def run_gradients(
    model: Model,
    start: Float[Tensor, "batch pos d_model"],
    measure: Callable[[Tensor], Float[Tensor, " batch"]],
) -> tuple[Readings, Written]:
    """Runs embeddings through the model and back: gradients of ``measure(final residual)``, and what sources write.

    Rows never mix, so the gradient of the metrics' sum holds every row's own. No weight gets a gradient. Memory: what
    autograd keeps of all layers, and gradients of ``q``, ``k``, ``v`` and ``mlp_in``.
    """
    n_layers = model.spec.n_layers
    names = [*_writing_names(model), *(Capture(name=name) for name in ("resid_pre", *_READ))]
    taps = Taps.of(n_layers, capture=names)
    with torch.enable_grad():
        begin = start.detach().requires_grad_()
        resid = _run(model, begin, taps)
        total = measure(resid).sum()
        inputs = [taps.values[name, layer] for layer in range(n_layers) for name in _READ]
        found = torch.autograd.grad(total, [*inputs, resid])
    with torch.no_grad():
        per_layer = [found[i : i + len(_READ)] for i in range(0, len(inputs), len(_READ))]
        readings = Readings(
            resid_pre=[taps.values["resid_pre", layer].detach() for layer in range(n_layers)],
            qkv=[torch.cat([q, k, v], dim=-2) for q, k, v, _ in per_layer],
            mlp_in=[mlp_in for *_, mlp_in in per_layer],
            logits=found[-1],
        )
        return readings, _written(model, start, resid.detach(), taps)


def _writing_names(model: Model) -> list[Capture | str]:
    return ["z", "mlp_out", "ln1_post_scale"] if model.spec.post_norms else ["z", "mlp_out"]


def _run(model: Model, start: Tensor, taps: Taps) -> Tensor:
    frame = make_frame(model.spec, start.shape[1], device=start.device, dtype=start.dtype)
    return run_blocks(model.spec, model.weights, start, frame, taps)


def _written(model: Model, start: Tensor, resid: Tensor, taps: Taps) -> Written:
    z = []
    for layer in range(model.spec.n_layers):
        value = taps.values["z", layer].detach()
        if model.spec.post_norms:
            value = value / taps.values["ln1_post_scale", layer].detach()[..., None]
        z.append(value)
    mlp_out = [taps.values["mlp_out", layer].detach() for layer in range(model.spec.n_layers)]
    return Written(embed=start.detach(), z=z, mlp_out=mlp_out, resid=resid)


@torch.no_grad()
def difference(source: Written, base: Written) -> Written:
    """Returns ``source - base``, in float32 at least. At padding it is any number, and gradients are 0."""

    def less(a: Tensor, b: Tensor) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        return torch.sub(a.to(wide), b.to(wide))

    return Written(
        embed=less(source.embed, base.embed),
        z=[less(a, b) for a, b in zip(source.z, base.z, strict=True)],
        mlp_out=[less(a, b) for a, b in zip(source.mlp_out, base.mlp_out, strict=True)],
        resid=less(source.resid, base.resid),
    )


def writing_matrix(model: Model, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """Returns ``W_O``, behind a post-norm as that norm makes it but for its scale; float32 at least."""
    w = model.weights.blocks[layer]
    W_O = w.W_O.to(torch.promote_types(w.W_O.dtype, torch.float32))
    if w.ln1_post is None:
        return W_O
    W_O = center(model.spec.norm, W_O)
    return W_O if w.ln1_post.w is None else W_O * w.ln1_post.w


# Scores -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_scores(
    scores: Float[Tensor, "batch source destination"],
    model: Model,
    written: Written,
    readings: Readings,
    differs: Bool[Tensor, "batch pos"],
    *,
    weight: float = 1.0,
    chunk_bytes: int | None = None,
) -> None:
    """Adds ``weight`` times every edge's score to ``scores``; where there is no edge, what is there counts for nothing.

    ``written`` is the difference of two runs (:func:`difference`). Where ``differs`` is False it counts for nothing:
    nothing is computed outside of the span of positions where some prompt differs. Memory: ``chunk_bytes`` (64 MiB, on
    a GPU 1 GiB), at least one token's sources.
    """
    each = (len(sources(model.spec)) + 2 * _GROUP) * model.spec.d_model * written.embed.element_size()
    if chunk_bytes is None:
        chunk_bytes = (1 << 26) if written.embed.device.type == "cpu" else (1 << 30)
    groups = _layer_groups(model)
    for rows, where in _chunks(_spans(differs), max(1, chunk_bytes // each)):
        stacked = _stacked(model, written, rows, where)
        column = 0
        for layers, n_sources in groups:
            read = _read(model, readings, layers, rows, where)
            product = torch.bmm(_by_prompt(stacked[:n_sources]), _by_prompt(read).transpose(1, 2))
            scores[rows, :n_sources, column : column + len(read)].add_(product, alpha=weight)
            column += len(read)


def _by_prompt(x: Float[Tensor, "node batch pos d_model"]) -> Float[Tensor, "batch node pos_and_d_model"]:
    """A view: the rows of a product for each prompt."""
    return x.flatten(2).transpose(0, 1)


def _spans(differs: Bool[Tensor, "batch pos"]) -> list[tuple[int, int]]:
    """Returns where each prompt's first difference is, and where its last one ends; ``(0, 0)`` where there is none."""
    where: Int[Tensor, " pos"] = torch.arange(differs.shape[1], device=differs.device)
    first = torch.where(differs, where, differs.shape[1]).amin(1)
    end = torch.where(differs, where + 1, 0).amax(1)
    pairs = zip(first.tolist(), end.tolist(), strict=True)
    return [(a, b) if a < b else (0, 0) for a, b in pairs]


def _chunks(spans: Sequence[tuple[int, int]], n_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Cuts a batch into rows and positions of at most ``n_tokens`` tokens together."""
    width = max((end - first for first, end in spans), default=0)
    n_rows = max(1, n_tokens // max(1, width))
    for row in range(0, len(spans), n_rows):
        some = [span for span in spans[row : row + n_rows] if span[0] < span[1]]
        if not some:
            continue
        first, end = min(a for a, _ in some), max(b for _, b in some)
        step = max(1, n_tokens // n_rows)
        for pos in range(first, end, step):
            yield slice(row, row + n_rows), slice(pos, min(end, pos + step))


def _stacked(
    model: Model, written: Written, rows: slice, where: slice
) -> Float[Tensor, "source some_batch some_pos d_model"]:
    """What every source writes at some tokens, in the order of :func:`sources`."""
    embed = written.embed[rows, where]
    shape, n_heads = embed.shape, model.spec.n_heads
    stacked = embed.new_empty(len(sources(model.spec)), shape[0] * shape[1], shape[2])
    stacked[0] = embed.flatten(0, 1)
    at = 1
    for layer in range(model.spec.n_layers):
        z = written.z[layer][rows, where].flatten(0, 1).transpose(0, 1)
        torch.bmm(z, writing_matrix(model, layer), out=stacked[at : at + n_heads])
        stacked[at + n_heads] = written.mlp_out[layer][rows, where].flatten(0, 1)
        at += n_heads + 1
    laid_out: Tensor = stacked.unflatten(1, shape[:2])
    return laid_out


def _layer_groups(model: Model) -> list[tuple[range, int]]:
    """Layers whose destinations go into one product (the logits go with the last), and how many sources these read."""
    spec = model.spec
    step = max(1, _GROUP // _n_destinations(spec))
    groups = [range(first, min(spec.n_layers, first + step)) for first in range(0, spec.n_layers, step)]
    reads_most = [Destination(kind="mlp", layer=layers[-1]) for layers in groups[:-1]]
    reads_most.append(Destination(kind="logits", layer=spec.n_layers))
    return [(layers, n_read(spec, last)) for layers, last in zip(groups, reads_most, strict=True)]


def _n_destinations(spec: ModelSpec) -> int:
    """Of one layer."""
    return spec.n_heads + 2 * spec.attention.n_kv_heads + 1


def _read(
    model: Model, readings: Readings, layers: range, rows: slice, where: slice
) -> Float[Tensor, "destination some_batch some_pos d_model"]:
    """Gradients at what the destinations of some layers read."""
    spec, last = model.spec, layers[-1] == model.spec.n_layers - 1
    n_destinations = len(layers) * _n_destinations(spec) + last
    wide = torch.promote_types(model.dtype, torch.float32)
    shape = readings.logits[rows, where].shape
    read = readings.logits.new_empty(n_destinations, shape[0] * shape[1], shape[2], dtype=wide)
    at = 0
    for layer in layers:
        gradient = readings.qkv[layer][rows, where].flatten(0, 1).transpose(0, 1).to(wide)
        projected = read[at : at + len(gradient)]
        w = model.weights.blocks[layer]
        W = w.W_QKV.to(wide).unflatten(-1, (-1, spec.d_head)).permute(1, 2, 0)
        torch.bmm(gradient, W, out=projected)
        norm_backward_(projected, spec.norm, readings.resid_pre[layer][rows, where].flatten(0, 1), w.ln1)
        at += len(gradient)
        read[at] = readings.mlp_in[layer][rows, where].flatten(0, 1)
        at += 1
    if last:
        read[at] = readings.logits[rows, where].flatten(0, 1)
    laid_out: Tensor = read.unflatten(1, shape[:2])
    return laid_out


def norm_backward_(
    gradient: Float[Tensor, "head row d_model"],
    norm: Norm,
    x: Float[Tensor, "row d_model"],
    weights: NormWeights,
) -> None:
    """Turns gradients at the norm of ``x`` into gradients at ``x``, in place.

        gradient = (y - mean(y) - n mean(n y)) / scale,    y = gradient * w,  n = (x - mean(x)) / scale

    ``mean(x)`` and ``mean(y)`` are those of a layer norm; an RMS norm has none.
    """
    if weights.w is not None:
        gradient.mul_(weights.w)
    x = x.to(gradient.dtype)
    scale = norm_scale(norm, x)
    normalized = divide(center(norm, x), scale)
    if norm.kind == "layer":
        gradient.sub_(gradient.mean(-1, keepdim=True))
    along = torch.einsum("hrd,rd->hr", gradient, normalized) / x.shape[-1]
    gradient.addcmul_(along[..., None], normalized, value=-1.0)
    gradient.div_(scale)
