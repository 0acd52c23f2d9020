"""All activations of a run, attention patterns included, in one cache.

What is compared are the logits at the last position and, of every kind of activation in every layer, some entries
drawn by a seed: looking at all of them would take longer than making them. Beside the other way to fill a cache stand
the bare forwards of both sides, without a cache: how much of the time goes into keeping things.

Operations that the definition needs, multiply-adds counted twice::

    prompts * pos * (n_layers * block + 2 * d_model * d_vocab)

with ``block = spec.flops_per_token_block()``: a forward with the logits at every position, which a full cache includes.
Attention scores are left out. Writing the activations to memory is no operation, so that the fraction of this floor is
also the share of a forward at the rate of matrix products.
"""

from typing import Any

import numpy as np
import torch

from benchmarks import naive
from benchmarks.harness import Array, Baseline, Case, Prepared
from benchmarks.models import Fixtures, Workload
from fastinterp.model.spec import ModelSpec

N_PROMPTS = 16
N_ENTRIES = 8

SITES = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "ln2.hook_scale",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


def setup(fixtures: Fixtures) -> Prepared:
    """All prompts in one batch."""
    import fastinterp

    work = fixtures.workload(N_PROMPTS)
    bridge, hooked = fixtures.bridge, fastinterp.HookedTransformer(fixtures.model)
    n_layers, n_prompts, d_vocab = fixtures.model.spec.n_layers, len(work.tokens), fixtures.model.spec.d_vocab
    logits_only = slice(0, n_prompts * d_vocab)
    shape = (n_prompts * d_vocab + n_layers * len(SITES) * N_ENTRIES,)

    def baseline(name: str, how: str, run: Any, entries: slice, *, alternative: bool) -> Baseline:
        return Baseline(
            name=name,
            how=how,
            shape=shape,
            n_iterations=1,
            step=lambda item: run(),
            where=lambda item: (entries,),
            alternative=alternative,
        )

    def cached() -> torch.Tensor:
        return digest(*naive.full_cache(bridge, work.tokens), n_layers)

    return Prepared(
        workload=str(work),
        n_tokens=work.n_tokens,
        baselines=(
            baseline("notebook", "run_with_cache of everything", cached, slice(None), alternative=True),
            baseline(
                "bare bridge",
                "TransformerLens without a cache",
                lambda: naive.bare_forward(bridge, work.tokens)[:, -1].flatten(),
                logits_only,
                alternative=False,
            ),
            baseline(
                "bare fastinterp",
                "fastinterp without a cache",
                lambda: naive.bare_forward(hooked, work.tokens)[:, -1].flatten(),
                logits_only,
                alternative=False,
            ),
        ),
        fast=lambda: _fast(hooked, work),
        flops=needed_flops(fixtures.model.spec, work.tokens),
    )


def digest(logits: torch.Tensor, cache: Any, n_layers: int) -> torch.Tensor:
    """Returns the last logits, and for every layer and kind of activation ``N_ENTRIES`` of it.

    Residual streams of real models hold entries of hundreds, whose rounding is in proportion: entries are divided by
    their root mean square where that is above 1.
    """
    parts = [logits[:, -1].flatten()]
    generator = torch.Generator().manual_seed(0)
    for layer in range(n_layers):
        for site in SITES:
            values = cache[f"blocks.{layer}.{site}"].flatten()
            drawn = torch.randint(values.numel(), (N_ENTRIES,), generator=generator)
            entries = values[drawn.to(values.device)]
            parts.append(entries / entries.square().mean().sqrt().clamp(min=1.0))
    return torch.cat(parts)


def _fast(hooked: Any, work: Workload) -> Array:
    with torch.no_grad():
        found = digest(*hooked.run_with_cache(work.tokens), hooked.cfg.n_layers)
    return np.asarray(found.cpu().numpy(), dtype=np.float64)


def needed_flops(spec: ModelSpec, tokens: torch.Tensor) -> float:
    """Operations of the definition; the formula stands at the top of this file."""
    return float(tokens.numel() * (spec.n_layers * spec.flops_per_token_block() + 2 * spec.d_model * spec.d_vocab))


CASES = (
    Case(
        name="cache_full",
        what="cache of all activations, attention patterns included",
        naive_way="run_with_cache, one batch",
        setup=setup,
    ),
)
