"""One analysis of a scan, with its prompts: what must hold before it runs, what it prepares, what it costs."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastinterp.analyses import Ablation, Analysis, AttributionPatch, prepared
from fastinterp.analyses.edited_positions import check_edited
from fastinterp.analyses.replacements import check_reference, with_source
from fastinterp.engine.attribution_options import described_attribution
from fastinterp.engine.costs import flops, mean_flops
from fastinterp.engine.options import described
from fastinterp.model.model import Model
from fastinterp.prompts import PromptSet, TokenizedPrompts


@dataclass(frozen=True, kw_only=True)
class Task:
    """One analysis of a scan: how many tokens a batch holds, and for how many prompts it runs (from the first on).

    ``reference``: what an ablation's means are over, if not those prompts themselves.
    """

    analysis: Analysis
    n_prompts: int
    prompts: TokenizedPrompts
    batch_tokens: int = 1
    reference: TokenizedPrompts | None = None

    def check(self, model: Model) -> None:
        """Raises for positions, partners, references and sites that prompts or model lack, before anything runs."""
        if isinstance(self.analysis, AttributionPatch):
            self.prepared(model)
        if not isinstance(self.analysis, Ablation):
            return
        prompts = _first(self.prompts, self.n_prompts)
        if not isinstance(self.analysis.pos, str):
            check_edited(self.analysis.pos, prompts)
        if "resample" in self.analysis.modes:
            with_source(prompts, self.analysis.seed)
        if "mean" in self.analysis.modes and self.analysis.mean_over == "pos":
            check_reference(self.reference, prompts)

    def batched(self, model: Model, batch_tokens: int | None) -> "Task":
        """Returns the task with so many tokens in a batch, or without a number with as many as the analysis wants."""
        if batch_tokens is None:
            analysis = self.analysis
            if isinstance(analysis, AttributionPatch):
                # How much a run with gradients holds depends on the longest prompt.
                analysis = dataclasses.replace(analysis, longest=self.prompts.max_len)
            elif isinstance(analysis, Ablation):
                analysis = analysis.for_prompts(self.prompts)
            batch_tokens = analysis.tokens_per_batch(model)
        return dataclasses.replace(self, batch_tokens=batch_tokens)

    def within_memory(self, model: Model) -> "Task":
        """Returns the task with the batches that its ``memory_bytes`` allow, if it has any.

        Raises:
            OptionError: they are not enough for the longest prompt.
        """
        if not isinstance(self.analysis, Ablation) or self.analysis.memory_bytes is None:
            return self
        planned = self.analysis.planned(model, _first(self.prompts, self.n_prompts), self.reference)
        return dataclasses.replace(self, analysis=planned, batch_tokens=planned.tokens_per_batch(model))

    @property
    def memory(self) -> dict[str, int]:
        """The estimate of the bytes that are allocated at most, where they are limited."""
        plan = self.analysis.batches if isinstance(self.analysis, Ablation) else None
        return {} if plan is None or plan.memory_bytes is None else {"peak_bytes": plan.peak_bytes}

    def options(self, model: Model, reference: PromptSet | None) -> dict[str, Any]:
        """What identifies the analysis in a store, as JSON types."""
        found: dict[str, Any] = {"prompts": self.n_prompts}
        if isinstance(self.analysis, Ablation):
            found |= described(self.analysis, model.spec, reference, self.reference)
        if isinstance(self.analysis, AttributionPatch):
            found |= described_attribution(self.analysis)
        return found

    def prepared(self, model: Model) -> "Task":
        """Returns the task with what its analysis has to know of all its prompts, such as means."""
        analysis, prompts = self._prepared(model, _first(self.prompts, self.n_prompts), self.reference)
        return dataclasses.replace(self, analysis=analysis, prompts=prompts)

    def rehearsed(self, model: Model) -> Analysis:
        """The analysis prepared on one prompt, the longest: what is timed does not depend on values."""
        some = _longest(self.prompts)
        known = some if self.reference is None else _longest(self.reference)
        return self._prepared(model, dataclasses.replace(some, corrupt=some.corrupt or some.tokens), known)[0]

    def _prepared(
        self, model: Model, prompts: TokenizedPrompts, reference: TokenizedPrompts | None
    ) -> tuple[Analysis, TokenizedPrompts]:
        if isinstance(self.analysis, Ablation):
            return self.analysis.prepared(model, prompts, reference)
        return prepared(self.analysis, model, prompts)

    def flops(self, model: Model, rows: np.ndarray) -> float:
        """Floating-point operations for some rows, of which only the first ``n_prompts`` count."""
        return flops(self.analysis, model.spec, self.prompts.n_tokens, rows[rows < self.n_prompts])

    def preparing_flops(self, model: Model) -> float:
        """Floating-point operations for the means, once for all prompts."""
        if not isinstance(self.analysis, Ablation) or "mean" not in self.analysis.modes:
            return 0.0
        known = _first(self.prompts, self.n_prompts) if self.reference is None else self.reference
        return mean_flops(self.analysis, model.spec, known.n_tokens)


def _longest(prompts: TokenizedPrompts) -> TokenizedPrompts:
    """Returns the prompts with all but the longest left out, under the same indices."""
    n_tokens = np.zeros_like(prompts.n_tokens)
    n_tokens[prompts.n_tokens.argmax()] = prompts.max_len
    return dataclasses.replace(prompts, n_tokens=n_tokens)


def _first(prompts: TokenizedPrompts, n: int) -> TokenizedPrompts:
    """Returns the prompts with all but the first ``n`` left out, under the same indices."""
    if n >= len(prompts):
        return prompts
    n_tokens = prompts.n_tokens.copy()
    n_tokens[n:] = 0
    return dataclasses.replace(prompts, n_tokens=n_tokens)
