"""Direct logit attribution of every head to a logit difference at the last token.

Operations that the definition needs, multiply-adds counted twice::

    nodes = distinct beginnings of the prompts (BOS, or a common "When", is one token for all of them)
    nodes * (n_layers - 1) * block                       a forward up to the last block
    + nodes * kv + n_prompts * (block - kv)              the last block: keys, values everywhere, the rest once
    + n_prompts * 2 * A * d_head * d_model               W_O[h] u for the direction u of every prompt
    + n_prompts * 2 * A * d_head                         z . (W_O[h] u)

with ``A = n_layers * n_heads``, ``block = spec.flops_per_token_block()`` and ``kv`` its key and value projections.
There is no term in the vocabulary: two columns of ``W_U`` are enough. Attention scores are left out. These products
bind on a GPU as well: nothing here takes an exponential per logit or reads more than the weights.
"""

import numpy as np
import torch

from benchmarks import naive
from benchmarks.harness import Array, Baseline, Case, Prepared
from benchmarks.models import Fixtures, Workload
from fastinterp.model.prefix import prefix_tree
from fastinterp.model.spec import ModelSpec

N_PROMPTS = 64


def setup_loop(fixtures: Fixtures) -> Prepared:
    """Prompt by prompt."""
    return _prepare(fixtures, prompts_per_run=1)


def setup_batch(fixtures: Fixtures) -> Prepared:
    """All prompts in one batch."""
    return _prepare(fixtures, prompts_per_run=None)


def _prepare(fixtures: Fixtures, prompts_per_run: int | None) -> Prepared:
    work = fixtures.workload(N_PROMPTS)
    bridge, n_prompts = fixtures.bridge, len(work.tokens)
    directions = naive.logit_diff_directions(bridge, work.answer, work.wrong)
    size = prompts_per_run or n_prompts

    def rows(item: int) -> slice:
        return slice(item * size, (item + 1) * size)

    ways = {
        "filtered cache": (
            "run_with_cache of the last hook_z and final scale, stack_head_results, direction product",
            lambda chosen: naive.head_attribution_filtered_cache(bridge, work.tokens[chosen], directions[chosen]),
        ),
        "notebook": (
            "run_with_cache of everything, stack_head_results, apply_ln_to_stack, direction product",
            lambda chosen: naive.head_attribution_full_cache(bridge, work.tokens[chosen], directions[chosen]),
        ),
        "TransformerLens tool": (
            "transformer_lens.tools.analysis.direct_logit_attribution(unit='head')",
            lambda chosen: naive.head_attribution_tool(
                bridge, work.tokens[chosen], work.answer[chosen], work.wrong[chosen]
            ),
        ),
    }
    return Prepared(
        workload=f"{work}, {np.prod(fixtures.shape)} heads",
        n_tokens=work.n_tokens,
        baselines=tuple(
            Baseline(
                name=name,
                how=how,
                shape=(n_prompts, *fixtures.shape),
                n_iterations=n_prompts // size,
                step=lambda item, run=run: run(rows(item)),
                where=lambda item: (rows(item),),
            )
            for name, (how, run) in ways.items()
        ),
        fast=lambda: _fast(fixtures, work),
        flops=needed_flops(fixtures.model.spec, work.tokens),
    )


def _fast(fixtures: Fixtures, work: Workload) -> Array:
    import fastinterp

    found = fastinterp.direct_logit_attribution(fixtures.model, work.prompts, unit="head", pos=-1, metric="logit_diff")
    return np.asarray(found.transpose("prompt", "layer", "head").values)


def needed_flops(spec: ModelSpec, tokens: torch.Tensor) -> float:
    """Operations of the definition for prompts of one length; the formula stands at the top of this file."""
    prompts, nodes = len(tokens), prefix_tree(tokens).n_nodes
    block = spec.flops_per_token_block()
    kv = 2 * spec.d_model * 2 * spec.attention.n_kv_heads * spec.d_head
    per_prompt = 2 * spec.n_layers * spec.n_heads * spec.d_head * (spec.d_model + 1)
    forward = nodes * (spec.n_layers - 1) * block + nodes * kv + prompts * (block - kv)
    return float(forward + prompts * per_prompt)


CASES = (
    Case(
        name="dla_loop",
        what="direct logit attribution of every head, logit difference at the last token",
        naive_way="prompt by prompt: run_with_cache + stack_head_results + direction product",
        setup=setup_loop,
    ),
    Case(
        name="dla_batch",
        what="direct logit attribution of every head, logit difference at the last token",
        naive_way="one batch: run_with_cache + stack_head_results + direction product",
        setup=setup_batch,
    ),
)
