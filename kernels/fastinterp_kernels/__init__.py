"""Fused operations of mechanistic interpretability: torch and Triton only, usable without fastinterp.

Each operation is one subpackage with a reference, a blocked CPU form and a Triton kernel; import what you
use, for example ``from fastinterp_kernels.head_logits import head_logits``. Importing this package
imports nothing else.
"""
