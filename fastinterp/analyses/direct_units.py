"""Direct effects of units of any kind: what they add to the logits is taken away or replaced, nothing runs again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.analyses.direct_effect import clean_values, head_values, metric_targets
from fastinterp.analyses.heads import choose_heads
from fastinterp.analyses.replacements import Means
from fastinterp.analyses.units import ChosenUnits, Part, Unit
from fastinterp.analyses.written import Written, heads_write, towards_logits
from fastinterp.metrics import Metric, evaluate_all
from fastinterp.model.intervene import Capture
from fastinterp.model.model import Model
from fastinterp.prompts import Batch
from fastinterp_kernels.linear_cross_entropy import linear_cross_entropy

# Residuals [unit, row, d_model] that are measured together.
_RESIDUAL_BYTES = 1 << 25


def direct_effects(
    model: Model,
    batch: Batch,
    chosen: ChosenUnits,
    modes: Sequence[str],
    means: Means | None,
    metrics: Sequence[Metric],
    residual_bytes: int | None = None,
) -> dict[tuple[str, str], Float[Tensor, "unit batch *pos"]]:
    """Returns what replacing each unit's direct contribution adds to every metric: ``[unit, batch]``, ``pos`` behind.

    Both sides of a difference are measured on the same clean run, so that this one's rounding falls out. The keys are
    the names of metric and mode; modes share a run. The scales of the final norm and of post-norms are frozen at the
    clean run. Heads go through one pass over the vocabulary for all of them; memory otherwise: ``residual_bytes``
    (32 MB) of edited residuals at a time.
    """
    found: dict[tuple[str, str], Tensor] = {}
    for per_token in (False, True):
        some = [metric for metric in metrics if metric.per_token == per_token]
        if not some:
            continue
        rows = _Rows(model, batch, chosen, modes, means, every_position=per_token)
        written = rows.written
        clean = rows.clean(some)
        # The last one may replace the heads' values in place, and nothing can come in front of zeros.
        ordered = sorted(modes, key=lambda mode: mode != "zero")
        for mode in ordered:
            measured = rows.measured(some, mode, residual_bytes or _RESIDUAL_BYTES, last=mode == ordered[-1])
            for name, values in measured.items():
                # [row, unit]; padding is NaN.
                spread = written.spread(values - clean[name][:, None], batch, every_position=per_token)
                found[name, mode] = spread.movedim(-1, 0)
        del rows, written
    return found


class _Rows:
    """The tokens at which something is read, and what every unit adds there."""

    def __init__(
        self,
        model: Model,
        batch: Batch,
        chosen: ChosenUnits,
        modes: Sequence[str],
        means: Means | None,
        *,
        every_position: bool,
    ) -> None:
        self.model, self.batch, self.chosen, self.means = model, batch, chosen, means
        self.post_norms = model.spec.post_norms
        captures = self._captures()
        pos: Any = "all" if every_position else -1
        layers = sorted(chosen.sites.get("z", ()))
        self.written = heads_write(model, batch, pos, layers, scored_only=every_position, others=captures)
        self.other: Written | None = None
        if "resample" in modes:
            assert batch.corrupt is not None
            corrupt = dataclasses.replace(batch, tokens=batch.corrupt)
            self.other = heads_write(model, corrupt, pos, layers, scored_only=every_position, others=captures)

    def _captures(self) -> list[Capture]:
        sites = self.chosen.sites
        captures = [Capture(name=site, layers=tuple(sorted(layers))) for site, layers in sites.items() if site != "z"]
        if self.post_norms and "post" in sites:
            captures.append(Capture(name="ln2_post_scale", layers=tuple(sorted(sites["post"]))))
        return captures

    def clean(self, metrics: Sequence[Metric]) -> dict[str, Float[Tensor, " row"]]:
        """Returns the metrics as they are, of the rows that the others are compared with."""
        if self.chosen.single_heads is None:
            return {name: values[0] for name, values in self._evaluated(metrics, self.written.x[None]).items()}
        found: dict[str, Tensor] = {}
        for metric in metrics:
            targets = metric_targets(metric, self.batch, self.written)
            found[metric.name] = clean_values(self.model, self.batch, self.written, metric, targets)
        return found

    def measured(
        self, metrics: Sequence[Metric], mode: str, residual_bytes: int, *, last: bool
    ) -> dict[str, Float[Tensor, "row unit"]]:
        """Returns the metrics of every unit; with ``last`` no other mode may follow."""
        heads = self.chosen.single_heads
        if heads is not None:
            return self._heads(metrics, mode, heads, last=last)
        n_rows, d_model = self.written.x.shape
        step = max(1, residual_bytes // max(1, n_rows * d_model * self.written.x.element_size()))
        units = self.chosen.units
        found: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
        for first in range(0, len(units), step):
            x = torch.stack([self.written.x + self._change(unit, mode) for unit in units[first : first + step]])
            for name, values in self._evaluated(metrics, x).items():
                found[name].append(values)
        return {name: torch.cat(values).T for name, values in found.items()}

    def _heads(
        self, metrics: Sequence[Metric], mode: str, heads: list[tuple[int, int]], *, last: bool
    ) -> dict[str, Float[Tensor, "row unit"]]:
        chosen = choose_heads(self.model.spec, heads)
        replacement = None if mode == "zero" else lambda layer: self._replacement("z", layer, mode)
        removed = self.written.removed(replacement, in_place=last)
        found: dict[str, Tensor] = {}
        for metric in metrics:
            targets = metric_targets(metric, self.batch, self.written)
            values = head_values(self.model, self.batch, self.written, chosen, removed, metric, targets)
            found[metric.name] = chosen.shaped(values)
        return found

    def _replacement(self, site: str, layer: int, mode: str) -> Tensor:
        """What stands in place of an activation, ``[row or 1, ...]``."""
        if mode == "resample":
            assert self.other is not None
            if site == "z":
                return self.other.z[layer] * self.other.divisor[layer][..., None]
            return self.other.others[site, layer]
        assert self.means is not None
        mean = self.means[site, layer]
        by_pos = mean.ndim > {"z": 2}.get(site, 1)
        return mean[self.written.pos] if by_pos else mean[None]

    def _change(self, unit: Unit, mode: str) -> Float[Tensor, "row d_model"]:
        """What is added to the normalised residual in place of the unit.

        Heads and neurons of a whole sublayer that is replaced itself count with it, not a second time.
        """
        replaced = {(part.site, part.layer) for part in unit}
        sums = {"z": "attn_out", "post": "mlp_out"}
        parts = [part for part in unit if (sums.get(part.site), part.layer) not in replaced]
        return torch.stack([self._change_of_part(part, mode) for part in parts]).sum(0)

    def _change_of_part(self, part: Part, mode: str) -> Float[Tensor, "row d_model"]:
        written, layer = self.written, part.layer
        replacement = None if mode == "zero" else part.of(self._replacement(part.site, layer, mode))
        if part.site == "z":
            z = written.z[layer][:, part.head]
            change = -z if replacement is None else replacement / written.divisor[layer] - z
            return change @ written.W_O[layer][part.head]
        value = part.of(written.others[part.site, layer])
        change = -value if replacement is None else replacement - value
        if part.site == "post":
            w = self.model.weights.blocks[layer]
            direction = towards_logits(self.model, w.W_out[part.neuron].to(change.dtype), w.ln2_post)
            divisor = written.scale
            if self.post_norms:
                divisor = divisor * written.others["ln2_post_scale", layer]
            return change[:, None] / divisor * direction
        return towards_logits(self.model, change) / written.scale

    def _evaluated(
        self, metrics: Sequence[Metric], x: Float[Tensor, "unit row d_model"]
    ) -> dict[str, Float[Tensor, "unit row"]]:
        weights, softcap, batch = self.model.weights, self.model.spec.final_softcap, self.batch
        if metrics[0].per_token:
            return {metrics[0].name: self._losses(x, metric_targets(metrics[0], batch, self.written))}
        answer = batch.answer if batch.answer is not None else batch.tokens[:, :0]
        return evaluate_all(
            metrics, x, weights.W_U, weights.b_U, answer, batch.wrong, softcap=softcap, clean=self.written.x
        )

    def _losses(self, x: Float[Tensor, "unit row d_model"], targets: Int[Tensor, "row 1"]) -> Tensor:
        weights = self.model.weights
        scored = linear_cross_entropy(
            x.flatten(0, 1),
            weights.W_U,
            targets.repeat(len(x), 1),
            weights.b_U,
            softcap=self.model.spec.final_softcap,
        )
        return (scored.logsumexp - scored.target_logit[:, 0]).view(x.shape[:2])
