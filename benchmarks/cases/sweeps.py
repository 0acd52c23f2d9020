"""Edits of every head: read at every token, made at one position of long prompts, and position by position.

Operations that the definition needs (multiply-adds counted twice), with ``block`` and ``mlp`` as in ``ablate.py``,
``A`` heads a layer, ``L`` layers and ``above(l) = L - 1 - l``::

    ablate_loss         tokens * (L * block + sum over heads (mlp + above(l) * block))
                        + (heads + 1) * scored * 2 * d_model * d_vocab
    ablate_here         tokens * L * block + prompts * sum over heads (mlp + above(l) * block)
    patch_heads_by_pos  2 * tokens * L * block + sum over heads and positions p
                        prompts * (n_pos - p) * (mlp + above(l) * block)

A prompt's scores with its keys are left out; of ``ablate_here`` they are the larger part of what a token costs, and in
the last block, where one position is read, the sums count every position behind the edit.
"""

import functools
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import naive, naive_sweeps
from benchmarks.harness import Array, Baseline, Case, Prepared
from benchmarks.models import Fixtures, Workload
from fastinterp.model.spec import ModelSpec
from fastinterp.prompts import PromptSet

N_LOSS = (2, 100)
N_HERE = (16, 200)
N_PAIRS = 2


def _sized(fixtures: Fixtures, shape: tuple[int, int]) -> tuple[int, int]:
    """As many tokens as asked for, or as the model takes."""
    return shape[0], min(shape[1], fixtures.model.spec.n_ctx)


def setup_loss(fixtures: Fixtures) -> Prepared:
    """Loss of every token without each head."""
    work = fixtures.text(*_sized(fixtures, N_LOSS))
    bridge, (n_layers, n_heads) = fixtures.bridge, fixtures.shape
    clean = naive_sweeps.losses(bridge, work.tokens)
    shape = (n_layers, n_heads, *clean.shape)
    wide = functools.cache(lambda: naive_sweeps.in_float64(bridge))
    wide_clean = functools.cache(lambda: naive_sweeps.losses(wide(), work.tokens))
    return Prepared(
        workload=f"{work}, {np.prod(fixtures.shape)} heads",
        n_tokens=work.n_tokens,
        baselines=(
            Baseline(
                name="notebook",
                how="run_with_hooks per head, hook_z[:, :, head] = 0, cross-entropy",
                shape=shape,
                n_iterations=n_layers * n_heads,
                step=lambda item: naive_sweeps.ablated_losses(bridge, work.tokens, *divmod(item, n_heads)) - clean,
                # The difference of two losses out of float32 runs is off by more than the tolerance at times.
                reference=lambda item: (
                    naive_sweeps.ablated_losses(wide(), work.tokens, *divmod(item, n_heads)) - wide_clean()
                ),
                where=lambda item: divmod(item, n_heads),
            ),
            Baseline(
                name="layer batch",
                how="run_with_hooks per layer, the batch repeated once per head",
                shape=shape,
                n_iterations=n_layers,
                step=lambda layer: naive_sweeps.ablated_losses_of_layer(bridge, work.tokens, layer) - clean,
                reference=lambda layer: naive_sweeps.ablated_losses_of_layer(wide(), work.tokens, layer) - wide_clean(),
                where=lambda layer: (layer,),
            ),
        ),
        fast=lambda: _fast(fixtures, work, "loss"),
        flops=loss_flops(fixtures.model.spec, *work.tokens.shape),
    )


def setup_here(fixtures: Fixtures) -> Prepared:
    """Each head ablated at the last position alone."""
    work = fixtures.random(*_sized(fixtures, N_HERE))
    bridge, (n_layers, n_heads) = fixtures.bridge, fixtures.shape
    arguments = (bridge, work.tokens, work.answer, work.wrong)
    clean = naive.logit_diff(*arguments)

    def per_head(name: str, how: str, **options: Any) -> Baseline:
        return Baseline(
            name=name,
            how=how,
            shape=(len(work.tokens), n_layers, n_heads),
            n_iterations=n_layers * n_heads,
            step=lambda item: (
                naive_sweeps.ablated_here_logit_diff(*arguments, *divmod(item, n_heads), **options) - clean
            ),
            where=lambda item: (slice(None), *divmod(item, n_heads)),
        )

    return Prepared(
        workload=f"{work}, {np.prod(fixtures.shape)} heads, at the last position",
        n_tokens=work.n_tokens,
        baselines=(
            per_head("notebook", "run_with_hooks per head, hook_z[:, -1, head] = 0, full logits"),
            per_head("last logits", "the same with logits_to_keep=1", logits_to_keep=1),
        ),
        fast=lambda: _fast(fixtures, work, "here"),
        flops=here_flops(fixtures.model.spec, *work.tokens.shape),
    )


def setup_patch(fixtures: Fixtures) -> Prepared:
    """Each head's value at each position, from the next prompt of the batch."""
    work = fixtures.workload(N_PAIRS)
    work = Workload(
        prompts=work.prompts, tokens=work.tokens[:N_PAIRS], answer=work.answer[:N_PAIRS], wrong=work.wrong[:N_PAIRS]
    )
    bridge, (n_layers, n_heads) = fixtures.bridge, fixtures.shape
    n_prompts, n_pos = work.tokens.shape
    # The base is the corrupt prompt, as in transformer_lens.patching.
    base = work.tokens.roll(1, dims=0)
    arguments = (bridge, base, work.answer, work.wrong)
    values = naive_sweeps.cached_z(bridge, work.tokens)
    clean = naive.logit_diff(*arguments)

    def place(item: int) -> tuple[int, int, int]:
        layer, rest = divmod(item, n_heads * n_pos)
        return layer, *divmod(rest, n_pos)

    def per_patch(name: str, how: str, **options: Any) -> Baseline:
        def step(item: int) -> torch.Tensor:
            layer, head, pos = place(item)
            patched = naive_sweeps.patched_logit_diff(*arguments, values[layer], layer, head, pos, **options)
            return patched - clean

        return Baseline(
            name=name,
            how=how,
            shape=(n_prompts, n_layers, n_heads, n_pos),
            n_iterations=n_layers * n_heads * n_pos,
            step=step,
            where=lambda item: (slice(None), *place(item)),
        )

    return Prepared(
        workload=f"{n_prompts} pairs x {n_pos} tokens, {np.prod(fixtures.shape)} heads x {n_pos} positions",
        n_tokens=work.n_tokens,
        baselines=(
            per_patch("notebook", "run_with_hooks per head and position, full logits, as get_act_patch_*"),
            per_patch("last logits", "the same with logits_to_keep=1", logits_to_keep=1),
        ),
        fast=lambda: _fast(fixtures, work, "patch"),
        flops=patch_flops(fixtures.model.spec, n_prompts, n_pos),
    )


def _fast(fixtures: Fixtures, work: Workload, what: Literal["loss", "here", "patch"]) -> Array:
    import fastinterp

    model = fixtures.model
    if what == "loss":
        found = fastinterp.ablate(model, work.prompts, metric="loss")["loss_zero_total"]
        return np.asarray(found.transpose("layer", "head", "prompt", "pos").values[..., :-1])
    if what == "here":
        found = fastinterp.ablate(model, work.prompts, pos=-1)["logit_diff_zero_total"]
        return np.asarray(found.transpose("prompt", "layer", "head").values)
    pairs = PromptSet.of(
        work.tokens.tolist(),
        corrupt=work.tokens.roll(1, dims=0).tolist(),
        answer=work.answer.tolist(),
        wrong=work.wrong.tolist(),
    )
    found = fastinterp.activation_patch(model, pairs, "z", by="head_position")["logit_diff_patch_z"]
    return np.asarray(found.transpose("prompt", "layer", "head", "edit_pos").values)


def _through(spec: ModelSpec) -> int:
    """Operations of one token through what lies behind an edited head, summed over heads."""
    block = spec.flops_per_token_block()
    mlp = 0 if spec.parallel else 2 * (3 if spec.mlp.kind == "gated" else 2) * spec.d_model * spec.mlp.d_mlp
    above = spec.n_layers * (spec.n_layers - 1) // 2
    return spec.n_heads * (spec.n_layers * mlp + above * block)


def loss_flops(spec: ModelSpec, n_prompts: int, n_pos: int) -> float:
    """Operations of the definition; the formula stands at the top of this file."""
    tokens, scored = n_prompts * n_pos, n_prompts * (n_pos - 1)
    runs = spec.n_layers * spec.n_heads + 1
    forward = spec.n_layers * spec.flops_per_token_block()
    return float(tokens * (forward + _through(spec)) + runs * scored * 2 * spec.d_model * spec.d_vocab)


def here_flops(spec: ModelSpec, n_prompts: int, n_pos: int) -> float:
    """Operations of the definition; the formula stands at the top of this file."""
    forward = spec.n_layers * spec.flops_per_token_block()
    return float(n_prompts * (n_pos * forward + _through(spec)))


def patch_flops(spec: ModelSpec, n_prompts: int, n_pos: int) -> float:
    """Operations of the definition; the formula stands at the top of this file."""
    forward = spec.n_layers * spec.flops_per_token_block()
    behind = n_pos * (n_pos + 1) // 2
    return float(n_prompts * (2 * n_pos * forward + behind * _through(spec)))


CASES = (
    Case(
        name="ablate_loss",
        what="zero ablation of every head, loss at every token",
        naive_way="hook loop over all heads, cross-entropy",
        setup=setup_loss,
    ),
    Case(
        name="ablate_here",
        what="zero ablation of every head at the last position of long prompts",
        naive_way="hook loop over all heads",
        setup=setup_here,
    ),
    Case(
        name="patch_heads_by_pos",
        what="every head's value at every position patched from the other prompt of a pair",
        naive_way="a run with hooks per head and position",
        setup=setup_patch,
    ),
)
