"""Ablation of heads, layers, MLPs, neurons or sets of them, each by itself, in one pass over the layers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from fastinterp.analyses import budget
from fastinterp.analyses.ablation_costs import ablation_costs, usual_tokens
from fastinterp.analyses.base import Field, collect, tokenized
from fastinterp.analyses.direct_units import direct_effects
from fastinterp.analyses.edited_positions import EditPos, check_edited, checked_edit_pos, edited_positions
from fastinterp.analyses.measuring import Clean, clean_run, sweep_values
from fastinterp.analyses.replacements import (
    MODES,
    MeanOver,
    Means,
    Mode,
    check_reference,
    check_seed,
    edit_of,
    mean_activations,
    reference_tokens,
    with_source,
)
from fastinterp.analyses.units import ChosenUnits, Units, choose_units, listed_units
from fastinterp.errors import OptionError, check_choice
from fastinterp.metrics import Metric, get_metric
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp.sweep import PRECISIONS, Precision, Variant, Variants, check_precision
from fastinterp.sweep.memory import SweepMemory, check_budget
from fastinterp.sweep.resident import give_back

Effect = Literal["total", "direct", "both"]


def ablate(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    units: Units = "heads",
    mode: Mode | Sequence[Mode] = "zero",
    metric: str | Sequence[str] = "logit_diff",
    pos: EditPos | np.ndarray = "all",
    effect: Effect = "total",
    reference: PromptSet | TokenizedPrompts | None = None,
    mean_over: MeanOver = "tokens",
    seed: int = 0,
    precision: Precision = "exact",
    memory_bytes: int | None = None,
) -> xr.Dataset:
    """Returns the effect of ablating every unit, each independently of all others, and the clean metric.

    ``effect = metric(run with the unit ablated) - metric(clean run)``: negative means that the unit helps a metric that
    is better when larger (for ``loss``: positive means that it helps). Equivalent to this loop in TransformerLens::

        for layer, head in heads:
            def hook(z, hook): z[:, :, head] = 0.0; return z
            logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)])

    All variants of a batch go through the model together and share the clean run below their layer, and in front of
    the first ablated position.

    Args:
        units: ``"heads"`` (``z`` of every query head, ``b_O`` stays), ``"mlps"`` (``mlp_out``), ``"attns"``
            (``attn_out``), ``"layers"`` (both), ``"neurons"`` (``post``), or a list of heads ``(10, 7)``, labels
            (``"L10H7"``, ``"MLP3"``, ``"ATTN3"``, ``"L3N17"``) and lists of these, which are ablated together; or
            an array with a row for each head.
        mode: what stands in place: ``"zero"``; ``"mean"`` over all tokens of ``reference``; ``"resample"``, what the
            unit gives in the corrupt prompt (without a corrupt column: in a different prompt of the same length, drawn
            by ``seed``). Several at once share the clean run.
        metric: any metric, or several, which share the sweep. All are read at the prompt's last token, but ``loss``
            at every token.
        pos: where units are ablated: ``"all"``, an integer (-1 is the prompt's last token), a slice, one integer for
            each prompt, or ``"each"``: every position by itself, along a dim ``edit_pos``.
        effect: ``"total"`` runs the rest of the model again; ``"direct"`` changes what the unit adds to the logits
            alone, with the final norm's (and post-norms') scale frozen; ``"both"``.
        reference: prompts of the mean; by default ``prompts`` themselves. Text begins with BOS where ``prompts`` do;
            answers do not matter. Only ``"mean"`` reads this and ``mean_over``, only ``"resample"`` reads ``seed``.
        mean_over: ``"tokens"``, one mean of all real tokens, or ``"pos"``, one for each position.
        precision: how the sweep's matrix products are done: ``"exact"``; ``"delta"``, the difference from the clean
            run in bfloat16 products, close to exact effects at the speed of tensor cores; or ``"tf32"`` and ``"bf16"``,
            all products rounded. Direct effects are exact always.
        memory_bytes: what the run may allocate beyond the model's weights and the returned arrays. Tokens of a batch,
            variants of a group, and how many of them take a step or are measured together, follow from it. Resident
            memory can be more: the C library keeps freed blocks, and oneDNN the code of its products, 50 MB at most for
            a model (docs/performance.md).

    Returns:
        ``{metric}_{mode}_{effect}`` (prompt, (pos), (edit_pos), units' dims) and ``{metric}_clean`` (prompt, (pos)).
        The units' dims are ``layer, head``; ``layer``; ``layer, neuron``; or ``unit`` for a list. The attribute
        ``sweep_plan`` says, as JSON, how many tokens a batch and how many variants a group has, and the estimate of
        the bytes that are allocated at most.

    Raises:
        AnswerTokenError: prompts without the answers that the metric needs (``MetricError`` if tokenised already).
        SiteRangeError: a head, layer, neuron or position that there is not.
        OptionError: units, modes, metrics and options that do not exist or do not go together; ``memory_bytes`` that
            are not enough for the longest prompt (before the model runs).
        PromptError: ``resample`` without a corrupt prompt, or a different one, of the same length.

    Memory: at most ``memory_bytes``. Without it the residual streams of a group of variants (16 MiB, on a GPU 1 GiB, or
    one variant of a batch; twice that where the metric is read at every token) and one step of them; no logits. Batches
    on a CPU have about 2,048 tokens, beginnings that prompts share counted once (8,192 at most; 1,024 where ``pos`` is
    negative; 4,096 of direct effects, which keep ``z`` of the layers chosen). What has been freed goes back to the
    system between the parts of a batch, and with ``memory_bytes`` after any layer when it fills what the sweep of that
    batch is estimated to leave of them (an eighth of the estimate where that is more).
    Source: Wang et al. 2022, https://arxiv.org/abs/2211.00593; McDougall et al. 2023, https://arxiv.org/abs/2310.04625.

    Example:
        >>> effect = fastinterp.ablate(model, prompts)["logit_diff_zero_total"].mean("prompt")     # doctest: +SKIP
        >>> effect.isel(layer=10, head=7)                                                          # doctest: +SKIP
    """
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    names = (metric,) if isinstance(metric, str) else tuple(metric)
    analysis = Ablation(
        units=units, modes=modes, metric_names=names, pos=checked_edit_pos(pos), effect=effect,
        mean_over=mean_over, seed=seed, precision=precision, memory_bytes=memory_bytes,
    )  # fmt: skip
    choose_units(model.spec, analysis.units)
    tokens = tokenized(model, prompts, analysis.metric)
    known = None if reference is None else reference_tokens(model, reference, tokens)
    prepared, tokens = analysis.prepared(model, tokens, known)
    return budget.with_plan(collect(prepared, model, tokens), prepared.batches)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The analysis behind :func:`ablate`, for one batch; ``means`` is what ``mean`` puts in place."""

    units: Units = "heads"
    modes: tuple[Mode, ...] = ("zero",)
    metric_names: tuple[str, ...] = ("logit_diff",)
    pos: EditPos = "all"
    effect: Effect = "total"
    mean_over: MeanOver = "tokens"
    seed: int = 0
    precision: Precision = "exact"
    memory_bytes: int | None = None
    batches: budget.BatchPlan | None = field(default=None, repr=False, compare=False)
    means: Means | None = field(default=None, repr=False, compare=False)
    n_prompts: int = field(default=0, repr=False, compare=False)
    distinct: float = field(default=1.0, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses modes, metrics, positions, effects and seeds that there are not."""
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise OptionError(f"mode={self.modes!r}: give one of {', '.join(MODES)}, or several different ones")
        if not self.metric_names or len(set(self.metric_names)) < len(self.metric_names):
            raise OptionError(f"metric={self.metric_names!r}: give one metric, or several different ones")
        for mode in self.modes:
            check_choice("mode", mode, MODES)
        for name in self.metric_names:
            get_metric(name)
        check_choice("effect", self.effect, ("total", "direct", "both"))
        check_choice("mean_over", self.mean_over, ("tokens", "pos"))
        check_choice("precision", self.precision, PRECISIONS)
        # What was given as arrays or can be gone through only once, as tuples of integers.
        object.__setattr__(self, "units", listed_units(self.units))
        object.__setattr__(self, "pos", checked_edit_pos(self.pos))
        object.__setattr__(self, "seed", check_seed(self.seed))
        check_budget(self.memory_bytes)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What the effects are effects on."""
        return tuple(get_metric(name) for name in self.metric_names)

    @property
    def metric(self) -> Metric:
        """The metric that needs most of the prompts."""
        return max(self.metrics, key=lambda metric: len(metric.needs))

    def prepared(
        self, model: Model, prompts: TokenizedPrompts, reference: TokenizedPrompts | None = None
    ) -> tuple["Ablation", TokenizedPrompts]:
        """Returns the analysis with its means, and the prompts with what to resample from."""
        # All that can be refused is, before the model runs.
        check_precision(self.precision, model.dtype)
        check_edited(self.pos, prompts)
        known = prompts if reference is None else reference
        if "mean" in self.modes and self.mean_over == "pos":
            check_reference(reference, prompts)
        sourced = with_source(prompts, self.seed) if "resample" in self.modes else prompts
        found = dataclasses.replace(self.planned(model, prompts, known), n_prompts=len(prompts))
        if "mean" in self.modes:
            n_tokens = self._costs(model, budget.n_targets(prompts), known.max_len, len(known)).mean_tokens(
                self.memory_bytes
            )
            sites = choose_units(model.spec, self.units).sites
            found = dataclasses.replace(found, means=mean_activations(model, known, sites, self.mean_over, n_tokens))
        return found, sourced

    def planned(self, model: Model, prompts: TokenizedPrompts, reference: TokenizedPrompts | None = None) -> "Ablation":
        """Returns the analysis with its batches chosen; raises :class:`OptionError` where memory is not enough."""
        known = prompts if reference is None else reference
        costs = self._costs(model, budget.n_targets(prompts), known.max_len, len(known))
        usual = dataclasses.replace(self, batches=None).for_prompts(prompts).tokens_per_batch(model)
        return dataclasses.replace(self, batches=budget.plan_batches(costs, prompts, self.memory_bytes, usual))

    def for_prompts(self, prompts: TokenizedPrompts) -> "Ablation":
        """Returns the analysis with what its batches depend on: how much of the prompts has to be computed.

        Beginnings are shared by edits that are the same in every prompt and at every position.
        """
        by_pos = "mean" in self.modes and self.mean_over == "pos"
        shared = self.pos == "all" and "resample" not in self.modes and not by_pos
        return dataclasses.replace(self, distinct=prompts.distinct_share() if shared else 1.0)

    def _costs(self, model: Model, n_targets: int, mean_pos: int, mean_prompts: int = 1) -> budget.Costs:
        return ablation_costs(
            model,
            choose_units(model.spec, self.units),
            modes=self.modes,
            metrics=self.metrics,
            effects=self.effects,
            pos=self.pos,
            mean_over=self.mean_over,
            precision=self.precision,
            n_targets=n_targets,
            mean_pos=mean_pos,
            mean_prompts=mean_prompts,
        )

    @property
    def effects(self) -> tuple[Literal["total", "direct"], ...]:
        """Which effects are wanted."""
        return ("total", "direct") if self.effect == "both" else (self.effect,)

    @property
    def _clean_precision(self) -> Precision:
        """How the clean run is multiplied: its products are those of the sweep, if there is one; ``delta``'s exact."""
        return self.precision if "total" in self.effects and self.precision != "delta" else "exact"

    def tokens_per_batch(self, model: Model) -> int:
        """Tokens of a batch: those planned, or as many as :func:`usual_tokens` says."""
        if self.batches is not None:
            return self.batches.batch_tokens
        n_variants = len(choose_units(model.spec, self.units).units) * len(self.modes)
        return usual_tokens(model, n_variants, self.pos, swept="total" in self.effects, distinct=self.distinct)

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """The clean run, and for each variant the MLP of its layer (none if parallel) and every block above."""
        units = choose_units(spec, self.units).units
        matrices = 0 if spec.parallel else 3 if spec.mlp.kind == "gated" else 2
        mlp = 2 * matrices * spec.d_model * spec.mlp.d_mlp
        each = spec.flops_per_token_block()
        first = [min(part.layer for part in unit) for unit in units]
        total = sum((spec.n_layers - 1 - layer) * each + mlp for layer in first) if "total" in self.effects else 0
        return float(n_tokens * (len(self.modes) * total + spec.n_layers * each))

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """The effects, and the clean metrics."""
        chosen = choose_units(spec, self.units)
        described: list[Field] = []
        clean_attrs = {"sign": "the value itself, not an effect", "precision": self._clean_precision}
        for metric in self.metrics:
            attrs = {"units": metric.units, "metric": metric.name, "pos": "all" if metric.per_token else "-1"}
            pos_dims, pos_shape = (("pos",), (n_pos,)) if metric.per_token else ((), ())
            described.append(
                Field(
                    name=f"{metric.name}_clean",
                    dims=pos_dims,
                    shape=pos_shape,
                    attrs=attrs | clean_attrs | {"long_name": metric.long_name},
                )
            )
            dims, shape, coords = (*pos_dims, *chosen.dims), (*pos_shape, *chosen.shape), dict(chosen.coords)
            if self.pos == "each":
                at = len(pos_dims)
                dims, shape = (*dims[:at], "edit_pos", *dims[at:]), (*shape[:at], n_pos, *shape[at:])
                coords["edit_pos"] = (("edit_pos",), list(range(n_pos)))
            for mode in self.modes:
                for effect in self.effects:
                    extra = {"long_name": f"{effect} effect of {mode} ablation on {metric.name}"}
                    extra |= {"sign": "ablated - clean", "ablated_pos": _described(self.pos)}
                    if effect == "direct":
                        extra["final_norm_scale"] = "frozen at the clean run"
                    else:
                        extra["precision"] = self.precision
                    if mode == "mean":
                        extra["mean_over"] = self.mean_over
                    described.append(
                        Field(
                            name=f"{metric.name}_{mode}_{effect}",
                            dims=dims,
                            shape=shape,
                            attrs=attrs | extra,
                            coords=coords,
                        )
                    )
        return tuple(described)

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_clean: [batch, (pos)], metric_mode_effect: [batch, (pos), (edit_pos), *units]}``."""
        chosen = choose_units(model.spec, self.units)
        wheres = self._wheres(batch)
        dtype = torch.promote_types(model.dtype, torch.float32)
        found: dict[str, Tensor] = {}
        mean_pos = max((len(mean) for mean in (self.means or {}).values()), default=0)
        costs, shape = self._costs(model, budget.batch_targets(batch), mean_pos), budget.shape_of(batch)
        if "total" in self.effects:
            memory = None if self.memory_bytes is None else costs.memory(shape, self.memory_bytes)
            clean, total = self._total(model, batch, chosen, wheres, memory)
            for (name, mode), effects in total.items():
                found[f"{name}_{mode}_total"] = self._laid_out(effects, chosen, batch).to(dtype)
        else:
            clean = clean_run(model, batch, self.metrics)
        found |= {f"{name}_clean": value.to(dtype) for name, value in clean.values.items()}
        give_back(model.device)
        if "direct" in self.effects:
            residual_bytes = None if self.memory_bytes is None else costs.residual_bytes(shape, self.memory_bytes)
            direct = direct_effects(model, batch, chosen, self.modes, self.means, self.metrics, residual_bytes)
            for (name, replaced_by), effects in direct.items():
                spread = torch.stack([self._where_edited(effects, where, name, batch) for where in wheres])
                found[f"{name}_{replaced_by}_direct"] = self._laid_out(spread, chosen, batch).to(dtype)
        return found

    def _wheres(self, batch: Batch) -> list[Bool[Tensor, "batch pos"] | None]:
        """Where each run of all units is edited."""
        if self.pos != "each":
            return [edited_positions(self.pos, batch, self.n_prompts)]
        everywhere = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        return [(everywhere == p).expand_as(batch.tokens) for p in everywhere]

    def _total(
        self,
        model: Model,
        batch: Batch,
        chosen: ChosenUnits,
        wheres: Sequence[Bool[Tensor, "batch pos"] | None],
        memory: SweepMemory | None,
    ) -> tuple[Clean, dict[tuple[str, Mode], Tensor]]:
        """The clean run, and effects ``[where, unit, batch, (pos)]`` of running the rest of the model again."""
        n_pos = batch.tokens.shape[1]
        shape = (len(self.modes), len(wheres), len(chosen.units))

        def make(index: int) -> Variant:
            mode, where, unit = (int(i) for i in np.unravel_index(index, shape))
            edits = [
                edit_of(part, self.modes[mode], self.means, self.mean_over, n_pos, wheres[where])
                for part in chosen.units[unit]
            ]
            return Variant(edits=tuple(edits))

        variants = Variants(torch.Size(shape).numel(), make)
        source = batch.corrupt if "resample" in self.modes else None
        clean, values = sweep_values(
            model, batch, self.metrics, variants, source, precision=self.precision, memory=memory
        )
        effects = {name: (each - clean.values[name]).unflatten(0, shape) for name, each in values.items()}
        return clean, {
            (name, mode): each[index] for name, each in effects.items() for index, mode in enumerate(self.modes)
        }

    def _where_edited(
        self, effects: Tensor, where: Bool[Tensor, "batch pos"] | None, name: str, batch: Batch
    ) -> Tensor:
        """Direct effects ``[unit, batch, (pos)]``: zero where a metric is read and nothing was edited."""
        if where is None:
            return effects
        if not get_metric(name).per_token:
            where = where[torch.arange(len(batch), device=where.device), batch.last]
        return torch.where(where | effects.isnan(), effects, 0.0)

    def _laid_out(self, effects: Tensor, chosen: ChosenUnits, batch: Batch) -> Tensor:
        """``[where, unit, batch, (pos)]`` as ``[batch, (pos), (edit_pos), *units]``; NaN where there is no token."""
        if self.pos == "each":
            absent = ~batch.mask.T
            effects = effects.masked_fill(absent.view(len(effects), 1, -1, *[1] * (effects.ndim - 3)), torch.nan)
        moved: Tensor = effects.movedim((0, 1), (-2, -1)).unflatten(-1, chosen.shape)
        return moved if self.pos == "each" else moved.squeeze(-1 - len(chosen.shape))


def _described(pos: EditPos) -> str:
    if isinstance(pos, slice):
        return f"{'' if pos.start is None else pos.start}:{'' if pos.stop is None else pos.stop}"
    return str(pos) if isinstance(pos, int | str) else "one for each prompt"
