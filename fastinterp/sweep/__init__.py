"""Sweeps: many edited runs of the same prompts that share everything below the edit."""

from fastinterp.sweep.runner import Swept, run_variants, sweep
from fastinterp.sweep.variants import Variant, head_variants

__all__ = ["Swept", "Variant", "head_variants", "run_variants", "sweep"]
