"""What a TransformerLens user writes about edits of single heads at some positions, or read at every token."""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from benchmarks.naive import difference


@torch.no_grad()
def losses(bridge: Any, tokens: Int[Tensor, "batch pos"], **forward_options: Any) -> Float[Tensor, "batch scored"]:
    """Loss of every token but the first."""
    logits = bridge(tokens, return_type="logits", **forward_options)
    return _token_losses(logits, tokens)


def in_float64(bridge: Any) -> Any:
    """Returns a copy that computes in float64, for what float32 rounds off too much to compare with."""
    return copy.deepcopy(bridge).double()


@torch.no_grad()
def ablated_losses(
    bridge: Any, tokens: Int[Tensor, "batch pos"], layer: int, head: int
) -> Float[Tensor, "batch scored"]:
    """The same with the ``z`` of one head set to zero, by a hook."""

    def zero_head(z: Tensor, hook: Any) -> Tensor:
        z[:, :, head] = 0.0
        return z

    logits = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_head)], return_type="logits")
    return _token_losses(logits, tokens)


@torch.no_grad()
def ablated_losses_of_layer(
    bridge: Any, tokens: Int[Tensor, "batch pos"], layer: int
) -> Float[Tensor, "head batch scored"]:
    """The same for all heads of a layer in one run, the batch repeated once per head."""
    n_heads = bridge.cfg.n_heads

    def zero_one_head_per_copy(z: Tensor, hook: Any) -> Tensor:
        copies = z.unflatten(0, (n_heads, len(tokens)))
        for head in range(n_heads):
            copies[head, :, :, head] = 0.0
        return z

    repeated = tokens.repeat(n_heads, 1)
    logits = bridge.run_with_hooks(
        repeated, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_one_head_per_copy)], return_type="logits"
    )
    return _token_losses(logits, repeated).unflatten(0, (n_heads, len(tokens)))


def _token_losses(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


@torch.no_grad()
def ablated_here_logit_diff(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    answer: Int[Tensor, " batch"],
    wrong: Int[Tensor, " batch"],
    layer: int,
    head: int,
    **forward_options: Any,
) -> Float[Tensor, " batch"]:
    """The logit difference with ``z`` of one head set to zero at the last position alone."""

    def zero_head(z: Tensor, hook: Any) -> Tensor:
        z[:, -1, head] = 0.0
        return z

    logits = bridge.run_with_hooks(
        tokens,
        fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero_head)],
        return_type="logits",
        **forward_options,
    )
    return difference(logits, answer, wrong)


@torch.no_grad()
def cached_z(bridge: Any, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "batch pos head d_head"]]:
    """The values of all heads, layer by layer."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(bridge.cfg.n_layers)]
    _, cache = bridge.run_with_cache(tokens, names_filter=names)
    return [cache[name] for name in names]


@torch.no_grad()
def patched_logit_diff(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    answer: Int[Tensor, " batch"],
    wrong: Int[Tensor, " batch"],
    values: Float[Tensor, "batch pos head d_head"],
    layer: int,
    head: int,
    pos: int,
    **forward_options: Any,
) -> Float[Tensor, " batch"]:
    """The logit difference with one head's value at one position taken from another run.

    What ``patching.get_act_patch_attn_head_out_by_pos`` does for each entry.
    """

    def patch(z: Tensor, hook: Any) -> Tensor:
        z[:, pos, head] = values[:, pos, head]
        return z

    logits = bridge.run_with_hooks(
        tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", patch)], return_type="logits", **forward_options
    )
    return difference(logits, answer, wrong)
