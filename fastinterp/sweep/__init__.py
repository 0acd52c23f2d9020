"""Sweeps: many edited runs of the same prompts that share everything below the edit."""

from fastinterp.sweep.precision import PRECISIONS, Precision, check_precision, clean_weights
from fastinterp.sweep.runner import Swept, run_variants, sweep
from fastinterp.sweep.variants import Variant, Variants, head_variants

__all__ = [
    "PRECISIONS",
    "Precision",
    "Swept",
    "Variant",
    "Variants",
    "check_precision",
    "clean_weights",
    "head_variants",
    "run_variants",
    "sweep",
]
