"""Analyses: pure functions of one batch, and the functions that run them over prompts and label the result."""

from fastinterp.analyses.ablation import Ablation, ablate
from fastinterp.analyses.base import Analysis, Field, collect, compute_checked, place, provenance, tokenized
from fastinterp.analyses.direct_effect import DirectEffect, direct_effect
from fastinterp.analyses.direct_logit_attribution import DirectLogitAttribution, direct_logit_attribution
from fastinterp.analyses.head_logits import HeadLogits, head_logits
from fastinterp.analyses.logit_lens import LogitLens, logit_lens
from fastinterp.analyses.weight_logits import weight_logits

__all__ = [
    "Ablation",
    "Analysis",
    "DirectEffect",
    "DirectLogitAttribution",
    "Field",
    "HeadLogits",
    "LogitLens",
    "ablate",
    "collect",
    "compute_checked",
    "direct_effect",
    "direct_logit_attribution",
    "head_logits",
    "logit_lens",
    "place",
    "provenance",
    "tokenized",
    "weight_logits",
]
