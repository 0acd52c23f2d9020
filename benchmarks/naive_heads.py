"""What a TransformerLens user writes about single heads' logits; see ``naive.py``.

All start from one cached run, which is not timed: it is little beside hundreds of heads.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class CachedRun(NamedTuple):
    """The clean run: every head's ``z``, the final norm's scale, and logits."""

    z: list[Float[Tensor, "batch pos head d_head"]]
    scale: Float[Tensor, "batch pos 1"]
    logits: Float[Tensor, "batch pos d_vocab"]


@torch.no_grad()
def cached_run(bridge: Any, tokens: Int[Tensor, "batch pos"]) -> CachedRun:
    """Runs the model once."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(bridge.cfg.n_layers)]
    logits, cache = bridge.run_with_cache(tokens, names_filter=[*names, "ln_final.hook_scale"])
    return CachedRun([cache[name] for name in names], cache["ln_final.hook_scale"], logits)


def head_result(bridge: Any, run: CachedRun, layer: int, head: int) -> Float[Tensor, "batch pos d_model"]:
    """What one head writes to the residual stream."""
    return run.z[layer][:, :, head] @ bridge.blocks[layer].attn.W_O[head]


@torch.no_grad()
def head_topk(bridge: Any, run: CachedRun, layer: int, head: int, k: int) -> Float[Tensor, "batch pos two_k"]:
    """The head's logits, and of these the largest and the smallest."""
    return _both_ends((head_result(bridge, run, layer, head) / run.scale) @ bridge.W_U, k)


@torch.no_grad()
def head_topk_by_matrix(bridge: Any, run: CachedRun, layer: int, head: int, k: int) -> Float[Tensor, "batch pos two_k"]:
    """The same with the head's weights multiplied by ``W_U`` first, which is cheaper from some hundred tokens on."""
    return _both_ends((run.z[layer][:, :, head] / run.scale) @ (bridge.blocks[layer].attn.W_O[head] @ bridge.W_U), k)


def _both_ends(logits: Float[Tensor, "batch pos d_vocab"], k: int) -> Float[Tensor, "batch pos two_k"]:
    return torch.cat([logits.topk(k).values, logits.topk(k, largest=False).values], dim=-1)


@torch.no_grad()
def direct_losses(
    bridge: Any,
    run: CachedRun,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    head: int,
    *,
    twice: bool,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "mode batch scored"]:
    """Loss per token without the head's direct contribution, and with its mean in place, minus the clean loss.

    ``twice`` projects the difference from the mean as a notebook does; otherwise the mean is one vector, which is
    projected once. ``dtype`` is what all of it is computed in, from the cached run on.
    """
    logits, W_U = run.logits.to(dtype), bridge.W_U.to(dtype)
    result = run.z[layer][:, :, head].to(dtype) @ bridge.blocks[layer].attn.W_O[head].to(dtype)
    mean = result.mean((0, 1))
    direct = (result / run.scale) @ W_U
    around = ((result - mean) / run.scale) @ W_U if twice else direct - (mean @ W_U) / run.scale
    clean = _losses(logits, tokens)
    return torch.stack([_losses(logits - taken, tokens) - clean for taken in (direct, around)])


def _losses(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]) -> Tensor:
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
