"""Logit lens: the metric as it would be if the model stopped after each sublayer."""

from dataclasses import dataclass
from typing import Literal

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from fastinterp.analyses.base import Field, Pos, check_pos, collect, final_scale, mask_padding, positions, tokenized
from fastinterp.errors import MetricError, check_choice
from fastinterp.metrics import Metric, evaluate, evaluate_loss, get_metric
from fastinterp.model.forward import forward, forward_at
from fastinterp.model.intervene import Taps
from fastinterp.model.model import Model
from fastinterp.model.norms import apply_affine, center, divide, norm_scale
from fastinterp.model.spec import ModelSpec
from fastinterp.names import accumulated_labels
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts

Scale = Literal["own", "frozen"]


def logit_lens(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    metric: str = "logit_diff",
    pos: Pos = -1,
    scale: Scale = "own",
) -> xr.DataArray:
    """Returns the metric read off the residual stream before, in the middle of and after every block.

    Equivalent to ``unembed(ln_final(resid))`` for every entry of TransformerLens's
    ``accumulated_resid(incl_mid=True)``, labelled ``0_pre, 0_mid, 1_pre, ..., final_post``; the last entry is the
    metric itself.

    Args:
        metric: any metric; ``"loss"`` gives a value at every position that has a next token, whatever ``pos`` is.
        pos: position (negatives count from the prompt's own end) or ``"all"``, which adds a dim ``pos`` after prompt.
        scale: ``"own"`` normalises every residual by its own scale, as the model would; ``"frozen"`` by the final scale
            of the clean run, as ``apply_ln_to_stack`` does, so that differences of neighbours are direct effects.

    Returns:
        Dims (prompt, site), in the metric's units.

    Raises:
        AnswerTokenError: prompts without the answers that the metric needs (``MetricError`` if tokenised already).
        SiteRangeError: ``pos`` outside of a prompt.

    Memory: the residuals at ``pos``; vocabulary tiles instead of ``[.., d_vocab]``.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Example:
        >>> fastinterp.logit_lens(model, prompts).sel(site="final_post")        # doctest: +SKIP
    """
    analysis = LogitLens(metric_name=metric, pos=pos, scale=scale)
    data = collect(analysis, model, tokenized(model, prompts, analysis.metric))
    array = data[analysis.field_name]
    array.attrs = data.attrs | array.attrs
    return array


@dataclass(frozen=True, kw_only=True)
class LogitLens:
    """The analysis behind :func:`logit_lens`, for one batch."""

    metric_name: str = "logit_diff"
    pos: Pos = -1
    scale: Scale = "own"

    def __post_init__(self) -> None:
        """Refuses metrics and scales that there are not."""
        check_choice("scale", self.scale, ("own", "frozen"))
        check_pos(self.pos)
        if self.metric.per_token and self.pos not in (-1, "all"):
            raise MetricError(f"metric {self.metric_name!r} has a value at every position: leave out pos={self.pos}")

    @property
    def metric(self) -> Metric:
        """What is read off."""
        return get_metric(self.metric_name)

    @property
    def field_name(self) -> str:
        """Name of the result, such as ``logit_diff_lens``."""
        return f"{self.metric_name}_lens"

    @property
    def _every_position(self) -> bool:
        return self.metric.per_token or self.pos == "all"

    def tokens_per_batch(self, model: Model) -> int:
        """Residuals of all layers are kept where every position is wanted."""
        return 2048 if model.device.type == "cpu" else 1 << 15

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """One forward, and the vocabulary once per site where a probability is wanted."""
        vocabulary = 0 if self.metric.linear else 2 * spec.d_model * spec.d_vocab * (2 * spec.n_layers + 1)
        return float(n_tokens * (spec.n_layers * spec.flops_per_token_block() + vocabulary))

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """One array with dims (pos,) site."""
        labels = accumulated_labels(spec.n_layers, has_mid=not spec.parallel)
        dims: tuple[str, ...] = ("pos", "site") if self._every_position else ("site",)
        shape: tuple[int, ...] = (n_pos, len(labels)) if self._every_position else (len(labels),)
        attrs = {
            "units": self.metric.units,
            "long_name": f"{self.metric.long_name}, read off the residual stream",
            "metric": self.metric.name,
            "sign": "the value itself, not an effect",
            "pos": "all" if self._every_position else str(self.pos),
            "final_norm_scale": self.scale,
        }
        return (
            Field(
                name=self.field_name,
                dims=dims,
                shape=shape,
                attrs=attrs,
                coords={"site": (("site",), labels)},
            ),
        )

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{name: [batch, (pos), site]}``."""
        spec, weights, softcap = model.spec, model.weights, model.spec.final_softcap
        at = None if self._every_position else positions(self.pos, batch)
        names = ("resid_pre",) if spec.parallel else ("resid_pre", "resid_mid")
        taps = Taps.of(spec.n_layers, capture=names)
        if at is None:
            final = forward(spec, weights, batch.tokens, taps=taps)
        else:
            final = forward_at(spec, weights, batch.tokens, batch.n_tokens, at, taps=taps)
        last_scale = final_scale(model, final, batch, every_position=at is None)
        reference = apply_affine(divide(center(spec.norm, final), last_scale), weights.ln_final)
        sites = [taps.values[name, layer] for layer in range(spec.n_layers) for name in names]
        columns = []
        for resid in [*sites, final]:
            divisor = last_scale if self.scale == "frozen" else norm_scale(spec.norm, resid)
            x = apply_affine(divide(center(spec.norm, resid), divisor), weights.ln_final)
            if self.metric.per_token:
                columns.append(
                    evaluate_loss(
                        x[None], weights.W_U, weights.b_U, batch.tokens, batch.n_tokens, softcap=softcap
                    ).squeeze(0)
                )
                continue
            answer = batch.answer if batch.answer is not None else batch.tokens[:, :0]
            columns.append(self._at_all(model, x, answer, batch.wrong, reference))
        values = torch.stack(columns, dim=-1)
        return {self.field_name: mask_padding(values, batch) if self._every_position else values}

    def _at_all(
        self, model: Model, x: Tensor, answer: Tensor, wrong: Tensor | None, reference: Tensor
    ) -> Float[Tensor, "batch *pos"]:
        """The metric of ``[batch, d_model]``, or of ``[batch, pos, d_model]`` position by position."""
        weights, softcap = model.weights, model.spec.final_softcap
        if x.ndim == 2:
            return evaluate(
                self.metric, x[None], weights.W_U, weights.b_U, answer, wrong, softcap=softcap, clean=reference
            ).squeeze(0)
        if not self.metric.relative:
            rows = x.transpose(0, 1)
            value = evaluate(self.metric, rows, weights.W_U, weights.b_U, answer, wrong, softcap=softcap)
            return value.transpose(0, 1)
        # Every position has a clean residual of its own.
        flat = evaluate(
            self.metric,
            x.flatten(0, 1)[None],
            weights.W_U,
            weights.b_U,
            answer.repeat_interleave(x.shape[1], 0),
            None,
            softcap=softcap,
            clean=reference.flatten(0, 1),
        )
        return flat.view(x.shape[:2])
