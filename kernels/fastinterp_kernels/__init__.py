"""Fused operations of mechanistic interpretability: torch and Triton only, usable without fastinterp.

Each operation is one subpackage with a reference, a blocked CPU form and a Triton kernel; import what you
use, for example ``from fastinterp_kernels.linear_logprob import linear_logprob``. Importing this package
imports nothing else.
"""
