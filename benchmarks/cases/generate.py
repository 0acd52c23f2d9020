"""Greedy generation: a fixed number of new tokens for every prompt.

What is compared are the tokens themselves, so that the case fails where two ways choose differently at all. A loop that
reads everything again for every token is timed token by token, each behind the tokens that come before it: so some of
its rounds can be drawn, and those are not all short ones.

Operations that the definition needs, multiply-adds counted twice::

    prompts * (pos + n_new - 1) * n_layers * block        every token but the last is read once
    + prompts * n_new * 2 * d_model * d_vocab             one position is unembedded per new token

with ``block = spec.flops_per_token_block()``. Attention scores are left out. Generation of few prompts is not bound by
these products but by reading all weights for every new token, so its fraction of this floor is small by nature.
"""

from typing import Any

import numpy as np
import torch

from benchmarks import naive
from benchmarks.harness import Array, Baseline, Case, Prepared
from benchmarks.models import Fixtures, Workload
from fastinterp.model.spec import ModelSpec

N_PROMPTS = 16
N_NEW = 64


def setup(fixtures: Fixtures) -> Prepared:
    """Prompt by prompt as in notebooks, and in one batch."""
    import fastinterp

    work = fixtures.workload(N_PROMPTS)
    bridge, hooked = fixtures.bridge, fastinterp.HookedTransformer(fixtures.model)
    n_prompts, n_pos = work.tokens.shape
    whole = torch.cat([work.tokens, torch.as_tensor(_fast(hooked, work)).to(work.tokens)], dim=1)

    def rereading(name: str, how: str, size: int) -> Baseline:
        """A round reads ``size`` prompts and the tokens before the new one."""

        def place(item: int) -> tuple[slice, int]:
            first, new = divmod(item, N_NEW)
            return slice(first * size, (first + 1) * size), new

        def step(item: int) -> torch.Tensor:
            rows, new = place(item)
            return naive.greedy_rereading(bridge, whole[rows, : n_pos + new], 1)[:, 0]

        return Baseline(
            name=name,
            how=how,
            shape=(n_prompts, N_NEW),
            n_iterations=n_prompts // size * N_NEW,
            step=step,
            where=place,
        )

    return Prepared(
        workload=f"{work}, {N_NEW} new tokens each",
        n_tokens=n_prompts * N_NEW,
        baselines=(
            rereading("notebook", "prompt by prompt, all tokens read again for each", 1),
            rereading("notebook batch", "one batch, all tokens read again for each", n_prompts),
            Baseline(
                name="TransformerLens",
                how="generate with its key-value cache, one batch",
                shape=(n_prompts, N_NEW),
                n_iterations=1,
                step=lambda item: naive.greedy_cached(bridge, work.tokens, N_NEW),
                where=lambda item: (slice(None),),
            ),
        ),
        fast=lambda: _fast(hooked, work),
        flops=needed_flops(fixtures.model.spec, work.tokens),
    )


def _fast(hooked: Any, work: Workload) -> Array:
    tokens = hooked.generate(
        work.tokens, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
    )
    return np.asarray(tokens[:, work.tokens.shape[1] :].cpu().numpy(), dtype=np.float64)


def needed_flops(spec: ModelSpec, tokens: torch.Tensor) -> float:
    """Operations of the definition; the formula stands at the top of this file."""
    prompts, n_pos = tokens.shape
    read = (n_pos + N_NEW - 1) * spec.n_layers * spec.flops_per_token_block()
    return float(prompts * (read + N_NEW * 2 * spec.d_model * spec.d_vocab))


CASES = (
    Case(
        name="generate",
        what="greedy generation",
        naive_way="all tokens read again for every new one",
        setup=setup,
    ),
)
