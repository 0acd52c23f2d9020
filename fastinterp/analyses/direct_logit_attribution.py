"""Direct logit attribution: what every component writes along the answer's direction of the unembedding."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from fastinterp.analyses.base import (
    Field,
    Pos,
    check_pos,
    collect,
    final_scale,
    head_coords,
    mask_padding,
    positions,
    tokenized,
)
from fastinterp.errors import MetricError, check_choice
from fastinterp.metrics import Metric, answer_direction, get_metric
from fastinterp.model.forward import forward, forward_at
from fastinterp.model.intervene import Taps
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import NormWeights
from fastinterp.names import residual_labels
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts

Unit = Literal["head", "layer", "component", "neuron"]
UNITS: tuple[Unit, ...] = ("head", "layer", "component", "neuron")
NAMES = {
    "head": "direct_effect",
    "layer": "direct_effect_layer",
    "component": "direct_effect_component",
    "neuron": "direct_effect_neuron",
}
# What each unit reads on the way through the blocks.
SITES = {
    "head": ("z",),
    "layer": ("attn_out", "mlp_out"),
    "component": ("attn_out", "mlp_out"),
    "neuron": ("post",),
}
# Heads and neurons write through the post-norm, where there is one, whose scale is frozen as well.
POST_SCALES = {"head": "ln1_post_scale", "neuron": "ln2_post_scale"}


def direct_logit_attribution(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    unit: Unit = "head",
    pos: Pos = -1,
    metric: str = "logit_diff",
) -> xr.DataArray:
    """Returns the direct contribution of every head, layer, component or neuron to a logit or logit difference.

    With ``u`` the answer's direction (``W_U[:, answer] - W_U[:, wrong]``), ``s`` the clean run's final norm scale
    (frozen) and ``c`` what a component writes to the residual stream, the contribution is ``(c / s) . u``: positive
    raises the answer. For heads, ``c = z_h W_O[h]``, evaluated as ``(z_h / s) . (W_O[h] u)``; a post-norm, where the
    model has one, is frozen at the clean run as well. A final softcap is left out: it comes after. Equivalent to
    TransformerLens's ``stack_head_results`` + ``apply_ln_to_stack`` + product with ``u``, without ``result``.

    Args:
        unit: ``"head"`` gives dims (prompt, layer, head), without ``b_O``. ``"layer"`` (prompt, layer) is the whole
            block, ``attn_out + mlp_out`` with biases; TransformerLens's tool of this name gives the accumulated
            residual instead, which is :func:`logit_lens` here. ``"component"`` (prompt, component) has ``embed``,
            ``pos_embed``, every ``attn_out`` and ``mlp_out`` and ``bias`` (of final norm and unembedding), and sums
            to the metric exactly. ``"neuron"`` (prompt, layer, neuron) leaves out ``b_out``.
        pos: position (negatives count from the prompt's own end) or ``"all"``, which adds a dim ``pos`` after prompt.
        metric: ``"logit_diff"`` or ``"logit"``, which are linear in the residual stream.

    Returns:
        Contributions in logits. Not included: anything indirect, that is through later components.

    Raises:
        MetricError: a metric that is not linear.
        AnswerTokenError: prompts without the answers that the metric needs (``MetricError`` if tokenised already).
        SiteRangeError: ``pos`` outside of a prompt.

    Memory: the captured sites at ``pos`` (``[batch, layer, head, d_head]``); never ``[.., d_vocab]`` or ``result``.
    Source: Wang et al. 2022, https://arxiv.org/abs/2211.00593; Elhage et al. 2021,
    https://transformer-circuits.pub/2021/framework.

    Example:
        >>> prompts = fastinterp.PromptSet.of(                                              # doctest: +SKIP
        ...     prompts=["When John and Mary went to the shops, John gave the bag to"],
        ...     answer=[" Mary"], wrong=[" John"])
        >>> fastinterp.direct_logit_attribution(model, prompts).mean("prompt")              # doctest: +SKIP
    """
    analysis = DirectLogitAttribution(unit=unit, pos=pos, metric_name=metric)
    data = collect(analysis, model, tokenized(model, prompts, analysis.metric))
    array = data[NAMES[unit]]
    array.attrs = data.attrs | array.attrs
    return array


@dataclass(frozen=True, kw_only=True)
class DirectLogitAttribution:
    """The analysis behind :func:`direct_logit_attribution`, for one batch."""

    unit: Unit = "head"
    pos: Pos = -1
    metric_name: str = "logit_diff"

    def __post_init__(self) -> None:
        """Refuses units and metrics that there are not."""
        check_choice("unit", self.unit, UNITS)
        check_pos(self.pos)
        if not self.metric.linear:
            raise MetricError(
                f"direct logit attribution needs a metric that is linear in the residual stream: 'logit_diff' or "
                f"'logit', not {self.metric_name!r}"
            )

    @property
    def metric(self) -> Metric:
        """What is attributed."""
        return get_metric(self.metric_name)

    def tokens_per_batch(self, model: Model) -> int:
        """The captured values are small; the forward's own activations set the limit."""
        return 4096 if model.device.type == "cpu" else 1 << 16

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """One forward."""
        return float(n_tokens * spec.n_layers * spec.flops_per_token_block())

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """One array; see :func:`direct_logit_attribution` for its dims."""
        layers = list(range(spec.n_layers))
        dims: tuple[str, ...]
        shape: tuple[int, ...]
        coords: dict[str, Any]
        match self.unit:
            case "head":
                dims, shape, coords = ("layer", "head"), (spec.n_layers, spec.n_heads), head_coords(spec)
            case "layer":
                dims, shape, coords = ("layer",), (spec.n_layers,), {"layer": (("layer",), layers)}
            case "neuron":
                dims, shape = ("layer", "neuron"), (spec.n_layers, spec.mlp.d_mlp)
                coords = {"layer": (("layer",), layers)}
            case "component":
                labels = component_labels(spec)
                dims, shape = ("component",), (len(labels),)
                coords = {"component": (("component",), labels)}
        if self.pos == "all":
            dims, shape = ("pos", *dims), (n_pos, *shape)
        attrs = {
            "units": self.metric.units,
            "long_name": f"direct effect of each {self.unit} on {self.metric.name}",
            "metric": self.metric.name,
            "sign": "positive raises the answer",
            "pos": str(self.pos),
            "final_norm_scale": "frozen at the clean run",
        }
        return (Field(name=NAMES[self.unit], dims=dims, shape=shape, attrs=attrs, coords=coords),)

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{name: [batch, (pos), ...]}``."""
        spec, weights = model.spec, model.weights
        assert batch.answer is not None
        at = positions(self.pos, batch)
        capture = list(SITES[self.unit])
        if spec.post_norms and self.unit in POST_SCALES:
            capture.append(POST_SCALES[self.unit])
        if self.unit == "component":
            capture += ["embed", "pos_embed"] if weights.W_pos is not None else ["embed"]
        taps = Taps.of(spec.n_layers, capture=capture)
        if at is None:
            resid = forward(spec, weights, batch.tokens, taps=taps)
        else:
            resid = forward_at(spec, weights, batch.tokens, batch.n_tokens, at, taps=taps).unsqueeze(1)
            taps.values = {key: value.unsqueeze(1) for key, value in taps.values.items()}
        u, constant = answer_direction(
            weights.W_U, weights.b_U, batch.answer, batch.wrong if "wrong" in self.metric.needs else None
        )
        u, constant = through_final_norm(model, u, constant)
        scale = final_scale(model, resid if at is None else resid.squeeze(1), batch, every_position=at is None)
        values = self._project(model, taps, u, constant, scale.view(len(batch), -1))
        if at is None:
            return {NAMES[self.unit]: mask_padding(values, batch)}
        return {NAMES[self.unit]: values.squeeze(1)}

    def _project(
        self,
        model: Model,
        taps: Taps,
        u: Float[Tensor, "batch d_model"],
        constant: Float[Tensor, " batch"],
        scale: Float[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch pos ..."]:
        """Projects the captured sites onto ``u / scale``."""
        spec, blocks = model.spec, model.weights.blocks
        per_layer = []
        for layer, w in enumerate(blocks):
            match self.unit:
                case "head":
                    along = torch.einsum("hed,bd->bhe", w.W_O.to(u.dtype), through_post_norm(w.ln1_post, u))
                    written = torch.einsum("bphe,bhe->bph", taps.values["z", layer].to(u.dtype), along)
                    per_layer.append(written if w.ln1_post is None else written / taps.values["ln1_post_scale", layer])
                case "neuron":
                    along = through_post_norm(w.ln2_post, u) @ w.W_out.t().to(u.dtype)
                    written = taps.values["post", layer] * along[:, None, :]
                    per_layer.append(written if w.ln2_post is None else written / taps.values["ln2_post_scale", layer])
                case _:
                    sites = [taps.values[site, layer].to(u.dtype) for site in SITES[self.unit]]
                    written = torch.stack([torch.einsum("bpd,bd->bp", site, u) for site in sites], dim=-1)
                    per_layer.append(written.sum(-1) if self.unit == "layer" else written)
        values = torch.stack(per_layer, dim=2)
        values = values / scale.view(*scale.shape, *[1] * (values.ndim - 2))
        if self.unit != "component":
            return values
        embeds = [taps.values[name, None] for name in ("embed", "pos_embed") if (name, None) in taps.values]
        first = torch.stack([torch.einsum("bpd,bd->bp", e.to(u.dtype), u) / scale for e in embeds], dim=-1)
        bias = constant[:, None, None].expand(*scale.shape, 1)
        assert values.shape[2:] == (spec.n_layers, 2)
        return torch.cat([first, values.flatten(2), bias], dim=-1)


def component_labels(spec: ModelSpec) -> list[str]:
    """Labels of the dim ``component`` for ``unit="component"``; their values sum to the metric."""
    return [*residual_labels(spec.n_layers, has_pos_embed=spec.position.kind == "learned"), "bias"]


def through_final_norm(
    model: Model, u: Float[Tensor, "batch d_model"], constant: Float[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """Returns ``u'``, ``c'`` with ``metric = (resid / scale) . u' + c'``: the norm's centring and affine part moved."""
    norm = model.weights.ln_final
    if norm.b is not None:
        constant = constant + u @ norm.b.to(u.dtype)
    if norm.w is not None:
        u = u * norm.w
    if model.spec.norm.kind == "layer":
        u = u - u.mean(-1, keepdim=True)
    return u, constant


def through_post_norm(norm: NormWeights | None, u: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
    """Returns ``u'`` with ``post_norm(c) . u = (c / scale) . u'`` for what a head or neuron writes."""
    return u if norm is None or norm.w is None else u * norm.w
