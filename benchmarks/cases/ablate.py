"""Zero ablation of every head, one at a time: what it does to a logit difference at the last token.

Operations that the definition needs when all variants share the clean prefix (multiply-adds counted twice)::

    nodes   = distinct beginnings of the prompts (BOS, or a common "When", is one token for all of them)
    last    = nodes * kv + prompts * (block - kv)        the last block: keys and values everywhere, the rest once
    clean   = nodes * (n_layers - 1) * block + last
    variant of layer l < n_layers - 1:  nodes * (mlp + (n_layers - 2 - l) * block) + last
    variant of the last layer:          prompts * mlp

``block`` is ``spec.flops_per_token_block()``, ``mlp`` and ``kv`` its MLP part and its key and value projections. A
variant of layer l changes the output of that layer's attention (a product of one head, which is negligible), so that
layer's MLP and all blocks above it have to be computed anew; nothing below does. Attention scores and the two columns
of the unembedding are left out. These products bind on a GPU as well: nothing here takes an exponential per logit.

The clean logit difference, which every baseline subtracts, is computed in the setup: its time is not counted
against them.
"""

from typing import Any

import numpy as np
import torch

from benchmarks import naive
from benchmarks.harness import Array, Baseline, Case, Prepared
from benchmarks.models import Fixtures, Workload
from fastinterp.model.prefix import prefix_tree
from fastinterp.model.spec import ModelSpec

N_PROMPTS = 16

_HOOK_LOOP = "run_with_hooks per head, hook_z[:, :, head] = 0, full logits"
_LAST_LOGITS = "the hook loop with logits_to_keep=1, so that only the last token is unembedded"
_BY_LAYER = "run_with_hooks per layer, the batch repeated once per head, logits_to_keep=1"


def setup_last(fixtures: Fixtures) -> Prepared:
    """All prompts in one batch, head by head; and a layer's heads in one run."""
    work = fixtures.workload(N_PROMPTS)
    bridge, (n_layers, n_heads) = fixtures.bridge, fixtures.shape
    arguments = (bridge, work.tokens, work.answer, work.wrong)
    clean = naive.logit_diff(*arguments)

    def per_head(name: str, how: str, **options: Any) -> Baseline:
        return Baseline(
            name=name,
            how=how,
            shape=(len(work.tokens), n_layers, n_heads),
            n_iterations=n_layers * n_heads,
            step=lambda item: naive.ablated_logit_diff(*arguments, *divmod(item, n_heads), **options) - clean,
            where=lambda item: (slice(None), *divmod(item, n_heads)),
        )

    per_layer = Baseline(
        name="layer batch",
        how=_BY_LAYER,
        shape=(len(work.tokens), n_layers, n_heads),
        n_iterations=n_layers,
        step=lambda layer: naive.ablated_logit_diff_of_layer(*arguments, layer) - clean[:, None],
        where=lambda layer: (slice(None), layer),
    )
    return _prepared(
        fixtures,
        work,
        per_head("notebook", _HOOK_LOOP),
        per_head("last logits", _LAST_LOGITS, logits_to_keep=1),
        per_layer,
    )


def setup_loop(fixtures: Fixtures) -> Prepared:
    """Prompt by prompt and head by head."""
    work = fixtures.workload(N_PROMPTS)
    bridge, (n_layers, n_heads) = fixtures.bridge, fixtures.shape
    shape = (len(work.tokens), n_layers, n_heads)

    def arguments(prompt: int) -> tuple[Any, ...]:
        row = slice(prompt, prompt + 1)
        return bridge, work.tokens[row], work.answer[row], work.wrong[row]

    clean = [naive.logit_diff(*arguments(prompt))[0] for prompt in range(len(work.tokens))]

    def entry(item: int) -> tuple[int, int, int]:
        prompt, variant = divmod(item, n_layers * n_heads)
        return prompt, *divmod(variant, n_heads)

    def per_head(name: str, how: str, **options: Any) -> Baseline:
        def step(item: int) -> Any:
            prompt, layer, head = entry(item)
            return naive.ablated_logit_diff(*arguments(prompt), layer, head, **options)[0] - clean[prompt]

        return Baseline(name=name, how=how, shape=shape, n_iterations=int(np.prod(shape)), step=step, where=entry)

    return _prepared(
        fixtures,
        work,
        per_head("notebook", _HOOK_LOOP),
        per_head("last logits", _LAST_LOGITS, logits_to_keep=1),
    )


def _prepared(fixtures: Fixtures, work: Workload, *baselines: Baseline) -> Prepared:
    return Prepared(
        workload=f"{work}, {np.prod(fixtures.shape)} heads",
        n_tokens=work.n_tokens,
        baselines=baselines,
        fast=lambda: _fast(fixtures, work),
        flops=needed_flops(fixtures.model.spec, work.tokens),
    )


def _fast(fixtures: Fixtures, work: Workload) -> Array:
    import fastinterp

    found = fastinterp.ablate(fixtures.model, work.prompts, units="heads", mode="zero", metric="logit_diff")
    return np.asarray(found["logit_diff_zero_total"].transpose("prompt", "layer", "head").values)


def needed_flops(spec: ModelSpec, tokens: torch.Tensor) -> float:
    """Operations of the definition for prompts of one length; the formula stands at the top of this file."""
    prompts, nodes = len(tokens), prefix_tree(tokens).n_nodes
    block = spec.flops_per_token_block()
    mlp = 2 * (3 if spec.mlp.kind == "gated" else 2) * spec.d_model * spec.mlp.d_mlp
    kv = 2 * spec.d_model * 2 * spec.attention.n_kv_heads * spec.d_head
    last = nodes * kv + prompts * (block - kv)
    clean = nodes * (spec.n_layers - 1) * block + last
    variants = [nodes * (mlp + (spec.n_layers - 2 - layer) * block) + last for layer in range(spec.n_layers - 1)]
    return float(clean + spec.n_heads * (sum(variants) + prompts * mlp))


CASES = (
    Case(
        name="ablate_last",
        what="zero ablation of every head, change of the logit difference at the last token",
        naive_way="hook loop over all heads, one batch",
        setup=setup_last,
    ),
    Case(
        name="ablate_loop",
        what="zero ablation of every head, change of the logit difference at the last token",
        naive_way="hook loop over all heads, prompt by prompt",
        setup=setup_loop,
    ),
)
