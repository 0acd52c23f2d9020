"""All activations of a run, attention patterns included, in one cache: of long prompts, and of short ones.

Long prompts are the texts of many short ones behind each other. Patterns and scores grow with the square of the length;
of short prompts the logits are a large part of the memory, and those both ways hold alike.

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
from benchmarks.models import Fixtures
from fastinterp.model.spec import ModelSpec

N_LONG = (4, 200)
N_SHORT = 16
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


def long_prompts(fixtures: Fixtures) -> Prepared:
    """A few prompts of many tokens, in one batch."""
    n_prompts, n_pos = N_LONG
    short = fixtures.workload(n_prompts)
    short = fixtures.workload(-(-n_prompts * n_pos // short.tokens.shape[1]))
    return prepare(fixtures, short.tokens.flatten()[: n_prompts * n_pos].view(n_prompts, n_pos))


def short_prompts(fixtures: Fixtures) -> Prepared:
    """Prompts of one sentence, in one batch."""
    return prepare(fixtures, fixtures.workload(N_SHORT).tokens)


def prepare(fixtures: Fixtures, tokens: torch.Tensor) -> Prepared:
    """The ways to cache a run of these tokens."""
    import fastinterp

    bridge, hooked = fixtures.bridge, fastinterp.HookedTransformer(fixtures.model)
    n_layers, n_prompts, d_vocab = fixtures.model.spec.n_layers, len(tokens), fixtures.model.spec.d_vocab
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
        return digest(*naive.full_cache(bridge, tokens), n_layers)

    return Prepared(
        workload=f"{tokens.shape[0]} prompts x {tokens.shape[1]} tokens",
        n_tokens=tokens.numel(),
        baselines=(
            baseline("notebook", "run_with_cache of everything", cached, slice(None), alternative=True),
            baseline(
                "bare bridge",
                "TransformerLens without a cache",
                lambda: naive.bare_forward(bridge, tokens)[:, -1].flatten(),
                logits_only,
                alternative=False,
            ),
            baseline(
                "bare fastinterp",
                "fastinterp without a cache",
                lambda: naive.bare_forward(hooked, tokens)[:, -1].flatten(),
                logits_only,
                alternative=False,
            ),
        ),
        fast=lambda: _fast(hooked, tokens),
        flops=needed_flops(fixtures.model.spec, tokens),
    )


def digest(logits: torch.Tensor, cache: Any, n_layers: int) -> torch.Tensor:
    """Returns the last logits, and for every layer and kind of activation ``N_ENTRIES`` of it.

    Residual streams of real models hold entries of hundreds, whose rounding is in proportion: entries are divided by
    their root mean square where that is above 1.
    """
    last = logits[:, -1].flatten()
    # One tensor from the start: small ones that stay, in between large ones that go, would leave holes in the memory.
    found = last.new_empty(last.numel() + n_layers * len(SITES) * N_ENTRIES)
    found[: last.numel()] = last
    start = last.numel()
    generator = torch.Generator().manual_seed(0)
    for layer in range(n_layers):
        for site in SITES:
            values = cache[f"blocks.{layer}.{site}"].flatten()
            drawn = torch.randint(values.numel(), (N_ENTRIES,), generator=generator)
            entries = values[drawn.to(values.device)]
            found[start : start + N_ENTRIES] = entries / entries.square().mean().sqrt().clamp(min=1.0)
            start += N_ENTRIES
    return found


def _fast(hooked: Any, tokens: torch.Tensor) -> Array:
    with torch.no_grad():
        found = digest(*hooked.run_with_cache(tokens), hooked.cfg.n_layers)
    return np.asarray(found.cpu().numpy(), dtype=np.float64)


def needed_flops(spec: ModelSpec, tokens: torch.Tensor) -> float:
    """Operations of the definition; the formula stands at the top of this file."""
    return float(tokens.numel() * (spec.n_layers * spec.flops_per_token_block() + 2 * spec.d_model * spec.d_vocab))


CASES = (
    Case(
        name="cache_full",
        what="cache of all activations, attention patterns included",
        naive_way="run_with_cache, one batch",
        setup=long_prompts,
    ),
    Case(
        name="cache_short",
        what="the same for short prompts",
        naive_way="run_with_cache, one batch",
        setup=short_prompts,
    ),
)
