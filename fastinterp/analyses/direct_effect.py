"""Direct effects: the metric if a head did not write to the logits itself, for every head at once."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.analyses.base import Field, Pos, check_pos, collect, tokenized
from fastinterp.analyses.heads import ChosenHeads, Heads, choose_heads, heads_dims
from fastinterp.analyses.replacements import mean_activations, reference_tokens
from fastinterp.analyses.written import Written, heads_write
from fastinterp.errors import MetricError, check_choice
from fastinterp.metrics import RANKED, Metric, from_target_logits, get_metric
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp_kernels.direct_effect_loss import direct_effect_loss
from fastinterp_kernels.head_logits import head_gather
from fastinterp_kernels.linear_cross_entropy import linear_cross_entropy

Mode = Literal["zero", "mean"]


def direct_effect(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    heads: Heads = "all",
    mode: Mode = "zero",
    metric: str = "loss",
    pos: Pos = -1,
    reference: PromptSet | TokenizedPrompts | None = None,
) -> xr.Dataset:
    """Returns the effect of taking away what each head writes to the logits directly, and the clean metric.

    ``effect = metric(logits - (z_h - r_h) W_O[h] W_U / s) - metric(clean logits)`` with the final norm's scale ``s``
    frozen at the clean run (a post-norm's likewise) and ``r`` zero or the head's mean: negative means that the head
    helps a metric that is better when larger (for ``loss``: positive means that it helps). Later layers see the head
    as it was: that is what :func:`ablate` adds. Equivalent to subtracting a head's ``apply_ln_to_stack`` result, times
    ``W_U``, from the logits, for every head; one pass over the vocabulary for all of them.

    Args:
        heads: ``"all"`` gives dims ``layer, head``; a list of ``(layer, head)`` a dim ``unit`` in that order.
        mode: ``"zero"``, or ``"mean"``: the mean of ``z`` over all tokens of ``reference`` stands in its place.
        metric: any metric; ``"loss"`` gives a value at every position that has a next token, whatever ``pos`` is.
        pos: position (negatives count from the prompt's own end) or ``"all"``, which adds a dim ``pos`` after prompt.
        reference: prompts of the mean; by default ``prompts`` themselves.

    Returns:
        ``{metric}_{mode}_direct`` (prompt, (pos), layer, head) and ``{metric}_clean`` (prompt, (pos)).

    Raises:
        AnswerTokenError: prompts without the answers that the metric needs (``MetricError`` if tokenised already).
        SiteRangeError: a head that the model does not have, or ``pos`` outside of a prompt.
        OptionError, MetricError: modes, heads and metrics that there are not.

    Memory: ``z`` at the tokens that are looked at, the result, 64 MB at most, and before that the activations of one
    layer for a batch (4,096 tokens on a CPU; 512, where every token is looked at); no logits.
    Source: McDougall et al. 2023, https://arxiv.org/abs/2310.04625.

    Example:
        >>> effect = fastinterp.direct_effect(model, prompts, heads=[(10, 7)], mode="mean")    # doctest: +SKIP
        >>> effect["loss_mean_direct"].mean(["prompt", "pos"])                                 # doctest: +SKIP
    """
    analysis = DirectEffect(heads=heads, mode=mode, metric_name=metric, pos=pos)
    tokens = tokenized(model, prompts, analysis.metric)
    choose_heads(model.spec, heads)
    if mode == "mean":
        known = tokens if reference is None else reference_tokens(model, reference, tokens)
        found = mean_activations(model, known, {"z": set(choose_heads(model.spec, heads).layers)})
        means = {layer: mean for (_, layer), mean in found.items()}
        analysis = dataclasses.replace(analysis, means=means)
    return collect(analysis, model, tokens)


@dataclass(frozen=True, kw_only=True)
class DirectEffect:
    """The analysis behind :func:`direct_effect`, for one batch; ``means`` is what ``mode="mean"`` puts in place."""

    heads: Heads = "all"
    mode: Mode = "zero"
    metric_name: str = "loss"
    pos: Pos = -1
    means: dict[int, Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses modes, metrics and positions that there are not."""
        check_choice("mode", self.mode, ("zero", "mean"))
        check_pos(self.pos)
        if self.metric.per_token and self.pos not in (-1, "all"):
            raise MetricError(f"metric {self.metric_name!r} has a value at every position: leave out pos={self.pos}")

    @property
    def metric(self) -> Metric:
        """What the effect is an effect on."""
        return get_metric(self.metric_name)

    @property
    def _every_position(self) -> bool:
        return self.metric.per_token or self.pos == "all"

    def tokens_per_batch(self, model: Model) -> int:
        """Heads' weights are multiplied with the unembedding once per batch, so batches are large."""
        return 1 << 12 if model.device.type == "cpu" else 1 << 14

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """One forward, and the vocabulary once per head where the metric needs all of it."""
        rows = 0.0 if self.metric.linear else n_tokens if self._every_position else n_tokens / 16
        heads = spec.n_layers * spec.n_heads * spec.attention.d_head
        return float(
            n_tokens * spec.n_layers * spec.flops_per_token_block() + rows * 2 * spec.d_vocab * (spec.d_model + heads)
        )

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """The effects, and the clean metric."""
        dims, shape, coords = heads_dims(spec, self.heads)
        pos_dims, pos_shape = (("pos",), (n_pos,)) if self._every_position else ((), ())
        attrs = {
            "units": self.metric.units,
            "metric": self.metric.name,
            "pos": "all" if self._every_position else str(self.pos),
        }
        clean = Field(
            name=f"{self.metric.name}_clean",
            dims=pos_dims,
            shape=pos_shape,
            attrs=attrs | {"long_name": self.metric.long_name, "sign": "the value itself, not an effect"},
        )
        effect = Field(
            name=f"{self.metric.name}_{self.mode}_direct",
            dims=(*pos_dims, *dims),
            shape=(*pos_shape, *shape),
            attrs=attrs
            | {
                "long_name": f"direct effect of {self.mode} ablation on {self.metric.name}",
                "sign": "ablated - clean",
                "final_norm_scale": "frozen at the clean run",
            },
            coords=coords,
        )
        return clean, effect

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_clean: [batch, (pos)], metric_mode_direct: [batch, (pos), layer, head]}``."""
        where: Pos = "all" if self._every_position else self.pos
        chosen = choose_heads(model.spec, self.heads)
        written = heads_write(model, batch, where, chosen.layers, scored_only=self.metric.per_token)
        means = self.means
        assert (means is not None) == (self.mode == "mean")
        replacement = None if means is None else lambda layer: means[layer][None]
        targets = metric_targets(self.metric, batch, written)
        clean = clean_values(model, batch, written, self.metric, targets)
        removed = written.removed(replacement, in_place=True)
        ablated = head_values(model, batch, written, chosen, removed, self.metric, targets)
        effect = chosen.shaped(ablated - clean[:, None])
        name, every = self.metric.name, self._every_position
        return {
            f"{name}_clean": written.spread(clean, batch, every_position=every),
            f"{name}_{self.mode}_direct": written.spread(effect, batch, every_position=every),
        }


def metric_targets(metric: Metric, batch: Batch, written: Written) -> Int[Tensor, "row k"]:
    """The tokens whose logits the metric reads: next tokens, or answers and then wrong answers; -1 pads."""
    if metric.per_token:
        return batch.tokens[written.prompt, written.pos + 1][:, None]
    columns = [batch.answer, batch.wrong][: len(metric.needs)]
    given = [column[written.prompt] for column in columns if column is not None]
    return torch.cat(given, dim=-1) if given else batch.tokens[written.prompt, :0]


def clean_values(
    model: Model, batch: Batch, written: Written, metric: Metric, targets: Int[Tensor, "row k"]
) -> Float[Tensor, " row"]:
    """Returns the metric of every row as it is."""
    weights, softcap = model.weights, model.spec.final_softcap
    if metric.linear:
        columns = [_bounded(model, _raw(model, written, column)[1], column) for column in targets.unbind(-1)]
        return from_target_logits(metric, torch.stack(columns, -1), _n_answers(batch))
    found = linear_cross_entropy(
        written.x, weights.W_U, targets, weights.b_U, softcap=softcap, rank=metric.name in RANKED
    )
    return from_target_logits(
        metric,
        found.target_logit,
        targets.shape[1],
        logsumexp=found.logsumexp,
        rank=found.rank,
        kl=torch.zeros_like(found.logsumexp),
    )


def head_values(
    model: Model,
    batch: Batch,
    written: Written,
    chosen: ChosenHeads,
    removed: Mapping[int, Float[Tensor, "row head d_head"]],
    metric: Metric,
    targets: Int[Tensor, "row k"],
) -> Float[Tensor, "row chosen"]:
    """Returns the metric of every row without each chosen head's direct contribution, in the order of ``of``.

    ``removed`` is what is taken away of each layer's ``z``, see :meth:`Written.removed`. Metrics of single logits are
    products with their columns of ``W_U``, all others one pass over the vocabulary for all heads.
    """
    z, W_O = chosen.of(removed, axis=1), chosen.of(written.W_O, axis=0)
    if metric.linear:
        columns = []
        for column in targets.unbind(-1):
            direction, raw = _raw(model, written, column)
            without = raw[:, None] - head_gather(z, W_O, direction, per_row=True)
            columns.append(_bounded(model, without, column))
        return from_target_logits(metric, torch.stack(columns, -1), _n_answers(batch))
    found = direct_effect_loss(
        written.x,
        z,
        W_O,
        model.weights.W_U,
        targets,
        model.weights.b_U,
        softcap=model.spec.final_softcap,
        kl=metric.name == "kl",
        rank=metric.name in RANKED,
    )
    return from_target_logits(
        metric, found.target_logit, targets.shape[1], logsumexp=found.logsumexp, rank=found.rank, kl=found.kl
    )


def _n_answers(batch: Batch) -> int:
    assert batch.answer is not None
    return batch.answer.shape[1]


def _raw(
    model: Model, written: Written, column: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
    """One token's column of ``W_U`` for every row, and its logit in front of a softcap; -1 stands for none."""
    W_U, b_U = model.weights.W_U, model.weights.b_U
    direction = W_U[:, column.clamp(min=0)].t().to(written.x.dtype)
    raw = (written.x * direction).sum(-1)
    return direction, raw if b_U is None else raw + b_U[column.clamp(min=0)]


def _bounded(model: Model, logit: Float[Tensor, "row ..."], column: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
    """A logit as the model gives it; NaN where there is no token."""
    softcap = model.spec.final_softcap
    capped = logit if softcap is None else softcap * torch.tanh(logit / softcap)
    return capped.masked_fill((column < 0).view(-1, *[1] * (logit.ndim - 1)), torch.nan)
