"""Analyses: pure functions of one batch, and the functions that run them over prompts and label the result."""

from fastinterp.analyses.ablation import Ablation, ablate
from fastinterp.analyses.base import Analysis, Field, collect, compute_checked, place, provenance, tokenized
from fastinterp.analyses.direct_logit_attribution import DirectLogitAttribution, direct_logit_attribution
from fastinterp.analyses.logit_lens import LogitLens, logit_lens

__all__ = [
    "Ablation",
    "Analysis",
    "DirectLogitAttribution",
    "Field",
    "LogitLens",
    "ablate",
    "collect",
    "compute_checked",
    "direct_logit_attribution",
    "logit_lens",
    "place",
    "provenance",
    "tokenized",
]
