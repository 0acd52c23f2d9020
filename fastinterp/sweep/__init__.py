"""Sweeps: many edited runs of the same prompts that share everything below the edit."""

from fastinterp.sweep.runner import run_variants
from fastinterp.sweep.variants import Variant, head_variants

__all__ = ["Variant", "head_variants", "run_variants"]
