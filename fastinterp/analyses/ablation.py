"""Ablation of every head, each by itself, in one pass over the layers."""

from dataclasses import dataclass
from typing import Literal

import torch
import xarray as xr
from torch import Tensor

from fastinterp.analyses.base import Field, collect, final_scale, head_coords, tokenized
from fastinterp.errors import check_choice
from fastinterp.metrics import Metric, evaluate, evaluate_loss, get_metric
from fastinterp.model.forward import forward, forward_at
from fastinterp.model.model import Model
from fastinterp.model.norms import apply_affine, center, divide, normalize
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp.sweep import head_variants, run_variants

# Variants that are measured together.
SLICE = 16

Units = Literal["heads"]
Mode = Literal["zero"]


def ablate(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    units: Units = "heads",
    mode: Mode = "zero",
    metric: str = "logit_diff",
) -> xr.Dataset:
    """Returns the total effect of ablating every head, each independently of all others, and the clean metric.

    ``effect = metric(run with the head ablated) - metric(clean run)``: negative means that the head helps a metric that
    is better when larger (for ``loss``: positive means that it helps). Equivalent to this loop in TransformerLens::

        for layer, head in heads:
            def hook(z, hook): z[:, :, head] = 0.0; return z
            logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)])

    All variants of a batch go through the model together and share the clean run below their layer.

    Args:
        units: ``"heads"``: every query head.
        mode: ``"zero"`` replaces ``z`` of the head by 0 at every position; ``b_O`` stays.
        metric: ``logit_diff``, ``logit``, ``logprob``, ``rank`` or ``kl`` at the prompt's last token, or ``loss`` at
            every token.

    Returns:
        ``{metric}_zero`` (prompt, layer, head), or (prompt, pos, layer, head) for ``loss``, and ``{metric}_clean``
        (prompt) or (prompt, pos).

    Raises:
        AnswerTokenError: prompts without the answers that the metric needs (``MetricError`` if tokenised already).

    Memory: one residual stream per variant of a batch (at most 1 GiB, else the heads go in groups; twice that where
    the metric is read at every token); no logits.
    Source: Wang et al. 2022, https://arxiv.org/abs/2211.00593; McDougall et al. 2023, https://arxiv.org/abs/2310.04625.

    Example:
        >>> effect = fastinterp.ablate(model, prompts)["logit_diff_zero"].mean("prompt")       # doctest: +SKIP
        >>> effect.isel(layer=10, head=7)                                                      # doctest: +SKIP
    """
    analysis = Ablation(units=units, mode=mode, metric_name=metric)
    return collect(analysis, model, tokenized(model, prompts, analysis.metric))


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The analysis behind :func:`ablate`, for one batch."""

    units: Units = "heads"
    mode: Mode = "zero"
    metric_name: str = "logit_diff"

    def __post_init__(self) -> None:
        """Refuses units, modes and metrics that there are not."""
        check_choice("units", self.units, ("heads",))
        check_choice("mode", self.mode, ("zero",))
        get_metric(self.metric_name)

    @property
    def metric(self) -> Metric:
        """What the effect is an effect on."""
        return get_metric(self.metric_name)

    def tokens_per_batch(self, model: Model) -> int:
        """As many tokens as keep all variants' residuals within 256 MiB, but enough for a matrix product."""
        spec = model.spec
        each = spec.n_layers * spec.n_heads * spec.d_model * model.weights.W_E.element_size()
        budget = (1 << 28) if model.device.type == "cpu" else (1 << 33)
        return max(256, budget // each)

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """The clean run, and for a variant of layer ``l`` the MLP of ``l`` (none if parallel) and every block above."""
        matrices = 0 if spec.parallel else 3 if spec.mlp.kind == "gated" else 2
        mlp = 2 * matrices * spec.d_model * spec.mlp.d_mlp
        above = spec.n_layers * (spec.n_layers - 1) // 2
        blocks = spec.n_heads * above + spec.n_layers
        return float(n_tokens * (blocks * spec.flops_per_token_block() + spec.n_heads * spec.n_layers * mlp))

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """The effects, and the clean metric."""
        name, per_token = self.metric.name, self.metric.per_token
        attrs = {"units": self.metric.units, "metric": name, "pos": "all" if per_token else "-1"}
        pos_dims, pos_shape = (("pos",), (n_pos,)) if per_token else ((), ())
        clean = Field(
            name=f"{name}_clean",
            dims=pos_dims,
            shape=pos_shape,
            attrs=attrs | {"long_name": self.metric.long_name, "sign": "the value itself, not an effect"},
        )
        effect = Field(
            name=f"{name}_{self.mode}",
            dims=(*pos_dims, "layer", "head"),
            shape=(*pos_shape, spec.n_layers, spec.n_heads),
            attrs=attrs | {"long_name": f"effect of {self.mode} ablation on {name}", "sign": "ablated - clean"},
            coords=head_coords(spec),
        )
        return clean, effect

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_clean: [batch, (pos)], metric_zero: [batch, (pos), layer, head]}``."""
        spec, per_token = model.spec, self.metric.per_token
        at = None if per_token else batch.last
        if at is None:
            final = forward(spec, model.weights, batch.tokens)
        else:
            final = forward_at(spec, model.weights, batch.tokens, batch.n_tokens, at)
        clean = self._measure(model, final[None], batch, final)[0]
        variants = head_variants(spec)
        effects = clean.new_empty(len(variants), *clean.shape)
        for indices, residuals in run_variants(model, batch.tokens, variants, n_tokens=batch.n_tokens, at=at):
            # In slices, so that normalised copies do not double the residuals' memory.
            for part, resid in zip(_slices(indices), residuals.split(SLICE), strict=True):
                effects[part] = self._measure(model, resid, batch, final) - clean
        effects = effects.movedim(0, -1).unflatten(-1, (spec.n_layers, spec.n_heads))
        dtype = torch.promote_types(model.dtype, torch.float32)
        return {f"{self.metric.name}_clean": clean.to(dtype), f"{self.metric.name}_{self.mode}": effects.to(dtype)}

    def _measure(self, model: Model, resid: Tensor, batch: Batch, clean: Tensor) -> Tensor:
        """Returns the metric of final residuals ``[variant, batch, (pos), d_model]``; ``clean`` is the clean run's."""
        weights, softcap = model.weights, model.spec.final_softcap
        if self.metric.linear:
            # One product per variant and prompt: in float64 it costs nothing, and adds no rounding to the effect.
            resid = resid.double()
        scale = final_scale(model, resid, batch, every_position=self.metric.per_token)
        x = apply_affine(divide(center(model.spec.norm, resid), scale), weights.ln_final)
        if self.metric.per_token:
            return evaluate_loss(x, weights.W_U, weights.b_U, batch.tokens, batch.n_tokens, softcap=softcap)
        answer = batch.answer if batch.answer is not None else batch.tokens[:, :0]
        unchanged = normalize(model.spec.norm, clean, weights.ln_final) if self.metric.relative else None
        return evaluate(self.metric, x, weights.W_U, weights.b_U, answer, batch.wrong, softcap=softcap, clean=unchanged)


def _slices(indices: list[int]) -> list[list[int]]:
    return [indices[start : start + SLICE] for start in range(0, len(indices), SLICE)]
