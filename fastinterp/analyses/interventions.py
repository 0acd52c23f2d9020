"""Any edits: what a metric becomes if activations are set, scaled or added to, for many such changes at once."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from fastinterp.analyses.base import Field, collect, tokenized
from fastinterp.analyses.edited_positions import EditPos, check_edited, checked_edit_pos, edited_positions
from fastinterp.analyses.measuring import sweep_values
from fastinterp.errors import OptionError, PromptPairError, check_choice
from fastinterp.metrics import Metric, get_metric
from fastinterp.model.forward import missing_because
from fastinterp.model.intervene import SOURCE, Edit
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.names import activation, check_index
from fastinterp.prompts import Batch, PromptSet, TokenizedPrompts
from fastinterp.sweep import PRECISIONS, Precision, Variant, check_precision

Changes = Edit | Sequence[Edit]

_GIVE = "give a list of Edit(site='z', layer=0, head=0), of lists of them (made together), or a dict of these by label"


def intervene(
    model: Model,
    prompts: PromptSet | TokenizedPrompts,
    variants: Sequence[Changes] | Mapping[str, Changes],
    metric: str | Sequence[str] = "logit_diff",
    pos: EditPos | np.ndarray = "all",
    precision: Precision = "exact",
) -> xr.Dataset:
    """Returns the effect of every variant, a set of edits that are made together, each by itself.

    ``effect = metric(run with the edits) - metric(clean run)``. What :func:`ablate`, :func:`activation_patch` and
    :func:`circuit` have no name for: values of your own, scaling, steering, several sites at once. Equivalent to one
    ``run_with_hooks`` for each variant, with a hook for each edit; all of them go through the model together, share the
    clean run below their first layer and, where only later positions are edited, in front of these.

    Args:
        variants: edits, lists of edits, or a dict of them by label. An :class:`~fastinterp.Edit` names a site, a layer
            and perhaps a head or neuron; ``replacement`` is put in place (``how="set"``), multiplied by (``"scale"``)
            or added (``"add"``). A tensor broadcasts against the changed part, ``[prompt, pos, ...]`` without the axis
            of a chosen head or neuron: those with an axis of all prompts are in the order of the prompts.
            ``"source"`` is the value in the corrupt prompt. ``positions`` of an edit: ``[prompt, pos]``.
        metric: any metric, or several, which share the sweep.
        pos: where edits without ``positions`` of their own are made, as in :func:`ablate` (not ``"each"``).
        precision: how matrix products are done, as in :func:`ablate`.

    Returns:
        ``{metric}_effect`` (prompt, (pos), variant) and ``{metric}_clean`` (prompt, (pos)); ``variant`` holds the
        labels, such as ``"z L9H6 scale"``.

    Raises:
        OptionError: no variants, something that is no edit, two with one label, sites outside of the blocks or that the
            model does not have, tensors whose shape does not fit.
        SiteRangeError: a layer, head, neuron or position that there is not.
        PromptPairError: ``"source"`` without corrupt prompts of the same length.
        AnswerTokenError: prompts without the answers that the metric needs (``MetricError`` if tokenised already).

    Memory: as :func:`ablate` without a limit, and the tensors given.
    Source: Turner et al. 2023, https://arxiv.org/abs/2308.10248 (adding vectors).

    Example:
        >>> steer = {f"{a}": fastinterp.Edit(site="resid_pre", layer=6, replacement=a * v, how="add") for a in (1, 4)}
        ...                                                                                        # doctest: +SKIP
        >>> fastinterp.intervene(model, prompts, steer, metric="kl", pos=-1)["kl_effect"]          # doctest: +SKIP
    """
    labels, edits = _labelled(variants)
    analysis = Intervention(
        variants=edits,
        labels=labels,
        metric_names=(metric,) if isinstance(metric, str) else tuple(metric),
        pos=checked_edit_pos(pos),
        precision=precision,
    )
    analysis.check_fits(model.spec)
    prepared, tokens = analysis.prepared(model, tokenized(model, prompts, analysis.metric))
    return collect(prepared, model, tokens)


def _labelled(variants: Any) -> tuple[tuple[str, ...], tuple[tuple[Edit, ...], ...]]:
    """Returns the variants as tuples, and a label for each."""
    given = list(variants.values()) if isinstance(variants, Mapping) else variants
    if not isinstance(given, list | tuple) or not given:
        raise OptionError(f"variants is {type(variants).__name__}: {_GIVE}")
    found = []
    for variant in given:
        edits = (variant,) if isinstance(variant, Edit) else variant
        if not isinstance(edits, list | tuple) or not edits or not all(isinstance(edit, Edit) for edit in edits):
            raise OptionError(f"variants has {variant!r}: {_GIVE}")
        found.append(tuple(edits))
    if isinstance(variants, Mapping):
        return tuple(map(str, variants)), tuple(found)
    labels = [" + ".join(map(_label, edits)) for edits in found]
    return tuple(f"{label} #{i}" if labels.count(label) > 1 else label for i, label in enumerate(labels)), tuple(found)


def _label(edit: Edit) -> str:
    part = "" if edit.head is None else f"H{edit.head}"
    part += "" if edit.neuron is None else f"N{edit.neuron}"
    return f"{edit.site} L{edit.layer}{part} {edit.how}"


@dataclass(frozen=True, kw_only=True)
class Intervention:
    """The analysis behind :func:`intervene`, for one batch."""

    variants: tuple[tuple[Edit, ...], ...]
    labels: tuple[str, ...]
    metric_names: tuple[str, ...] = ("logit_diff",)
    pos: EditPos = "all"
    precision: Precision = "exact"
    n_prompts: int = field(default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses metrics, positions and labels that there are not or do not go together; lists positions once."""
        if len(set(self.labels)) < len(self.labels):
            twice = next(label for label in self.labels if self.labels.count(label) > 1)
            raise OptionError(f"two variants are called {twice!r}: give each a label of its own")
        if not self.metric_names or len(set(self.metric_names)) < len(self.metric_names):
            raise OptionError(f"metric={self.metric_names!r}: give one metric, or several different ones")
        for name in self.metric_names:
            get_metric(name)
        check_choice("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "pos", checked_edit_pos(self.pos))
        if self.pos == "each":
            raise OptionError("pos='each' is for ablate: give a variant with positions of its own for each")

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What the effects are effects on."""
        return tuple(get_metric(name) for name in self.metric_names)

    @property
    def metric(self) -> Metric:
        """The metric that needs most of the prompts."""
        return max(self.metrics, key=lambda metric: len(metric.needs))

    @property
    def _edits(self) -> list[Edit]:
        return [edit for edits in self.variants for edit in edits]

    def check_fits(self, spec: ModelSpec) -> None:
        """Raises for sites, layers, heads and neurons that this architecture does not have."""
        for edit in self._edits:
            if not activation(edit.site).per_layer:
                raise OptionError(f"{edit.site} is outside of the blocks: edit resid_pre of layer 0, or resid_post")
            reason = missing_because(spec, edit.site)
            if reason:
                raise OptionError(f"there is no {edit.site} in a {spec.family} model: {reason}")
            check_index("layer", edit.layer, spec.n_layers)
        for edits in self.variants:
            Variant(edits=edits).resolved(spec)

    def prepared(self, model: Model, prompts: TokenizedPrompts) -> tuple["Intervention", TokenizedPrompts]:
        """Checks everything that needs the prompts."""
        check_precision(self.precision, model.dtype)
        check_edited(self.pos, prompts)
        needs_source = any(isinstance(edit.replacement, str) for edit in self._edits)
        if needs_source and prompts.corrupt is None:
            raise PromptPairError(
                f"replacement={SOURCE!r} takes values of the corrupt prompt: PromptSet.of(prompts=..., corrupt=...), "
                "of the same number of tokens"
            )
        for edit in self._edits:
            _check_shapes(edit, model.spec, len(prompts), prompts.max_len)
        return dataclasses.replace(self, n_prompts=len(prompts)), prompts

    def tokens_per_batch(self, model: Model) -> int:
        """As many tokens as keep all variants' residuals within 256 MiB, but enough for a matrix product."""
        each = len(self.variants) * model.spec.d_model * model.weights.W_E.element_size()
        return max(256, ((1 << 28) if model.device.type == "cpu" else (1 << 33)) // each)

    def cost(self, spec: ModelSpec, n_tokens: int) -> float:
        """The clean run, and for each variant the block of its first layer and those above."""
        first = [min(check_index("layer", edit.layer, spec.n_layers) for edit in edits) for edits in self.variants]
        blocks = spec.n_layers + sum(spec.n_layers - layer for layer in first)
        return float(n_tokens * blocks * spec.flops_per_token_block())

    def fields(self, spec: ModelSpec, n_pos: int) -> tuple[Field, ...]:
        """The effects, and the clean metrics."""
        described: list[Field] = []
        for metric in self.metrics:
            attrs = {"units": metric.units, "metric": metric.name, "pos": "all" if metric.per_token else "-1"}
            dims, shape = (("pos",), (n_pos,)) if metric.per_token else ((), ())
            described += [
                Field(
                    name=f"{metric.name}_clean",
                    dims=dims,
                    shape=shape,
                    attrs=attrs | {"long_name": metric.long_name, "sign": "the value itself, not an effect"},
                ),
                Field(
                    name=f"{metric.name}_effect",
                    dims=(*dims, "variant"),
                    shape=(*shape, len(self.variants)),
                    attrs=attrs
                    | {
                        "long_name": f"effect of the edits on {metric.name}",
                        "sign": "edited - clean",
                        "precision": self.precision,
                    },
                    coords={"variant": (("variant",), list(self.labels))},
                ),
            ]
        return tuple(described)

    @torch.no_grad()
    def compute(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Returns ``{metric_clean: [batch, (pos)], metric_effect: [batch, (pos), variant]}``."""
        where = edited_positions(self.pos, batch, self.n_prompts)
        variants = [
            Variant(edits=tuple(_of_batch(edit, batch, where, self.n_prompts) for edit in edits))
            for edits in self.variants
        ]
        source = batch.corrupt if any(isinstance(edit.replacement, str) for edit in self._edits) else None
        clean, values = sweep_values(model, batch, self.metrics, variants, source, precision=self.precision)
        dtype = torch.promote_types(model.dtype, torch.float32)
        found = {f"{name}_clean": value.to(dtype) for name, value in clean.values.items()}
        for name, each in values.items():
            found[f"{name}_effect"] = (each - clean.values[name]).movedim(0, -1).to(dtype)
        return found


def _axes(edit: Edit, spec: ModelSpec, n_prompts: int, n_pos: int) -> dict[str, int]:
    """The axes of the changed part with their sizes."""
    sizes = {
        "batch": n_prompts, "pos": n_pos, "query_pos": n_pos, "key_pos": n_pos, "d_model": spec.d_model,
        "d_head": spec.d_head, "d_mlp": spec.mlp.d_mlp, "head": spec.n_heads, "kv_head": spec.attention.n_kv_heads,
        "one": 1,
    }  # fmt: skip
    chosen = {"head", "kv_head"} if edit.head is not None else set()
    chosen |= {"d_mlp"} if edit.neuron is not None else set()
    return {dim: sizes[dim] for dim in activation(edit.site).dims if dim not in chosen}


def _check_shapes(edit: Edit, spec: ModelSpec, n_prompts: int, n_pos: int) -> None:
    """Raises :class:`OptionError` for tensors that do not fit the prompts and the site."""
    for name, mask in (("positions", edit.positions), ("keys", edit.keys)):
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != n_prompts or mask.shape[1] < n_pos):
            raise OptionError(
                f"{name} of the edit {_label(edit)!r} has shape {tuple(mask.shape)}: give [prompt, pos], here "
                f"({n_prompts}, {n_pos})"
            )
    if not isinstance(edit.replacement, Tensor):
        return
    axes = _axes(edit, spec, n_prompts, n_pos)
    shape = tuple(edit.replacement.shape)
    wanted = list(axes.items())[len(axes) - len(shape) :] if len(shape) <= len(axes) else []
    along = ("pos", "query_pos", "key_pos")
    fits = len(shape) <= len(axes) and all(
        size in (1, full) or (axis in along and size > full) for size, (axis, full) in zip(shape, wanted, strict=True)
    )
    if not fits:
        raise OptionError(
            f"the replacement of the edit {_label(edit)!r} has shape {shape}: give one that broadcasts against "
            f"({', '.join('prompt' if axis == 'batch' else axis for axis in axes)}), here {tuple(axes.values())}"
        )


def _of_batch(edit: Edit, batch: Batch, where: Bool[Tensor, "batch pos"] | None, n_prompts: int) -> Edit:
    """Returns an edit of all prompts as that of a batch."""
    n_pos, device = batch.tokens.shape[1], batch.tokens.device
    rows = torch.from_numpy(batch.indices).to(device)

    def masked(mask: Bool[Tensor, "prompt longest"] | None) -> Bool[Tensor, "batch pos"] | None:
        return None if mask is None else mask.to(device)[rows, :n_pos]

    replacement = edit.replacement
    if isinstance(replacement, Tensor):
        dims = [d for d in activation(edit.site).dims if not (edit.head is not None and d in ("head", "kv_head"))]
        dims = [d for d in dims if not (edit.neuron is not None and d == "d_mlp")]
        dims = dims[len(dims) - replacement.ndim :]
        replacement = replacement.to(device)
        for axis, dim in enumerate(dims):
            if replacement.shape[axis] == 1:
                continue
            if dim == "batch":
                replacement = replacement.index_select(axis, rows)
            elif dim in ("pos", "query_pos", "key_pos"):
                replacement = replacement.narrow(axis, 0, n_pos)
    positions = masked(edit.positions) if edit.positions is not None else where
    return dataclasses.replace(edit, positions=positions, keys=masked(edit.keys), replacement=replacement)
