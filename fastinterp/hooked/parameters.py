"""A model's parameters under the names that TransformerLens gives them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastinterp.model.model import Model
from fastinterp.model.weights import BlockWeights, NormWeights


def stacked(model: Model, name: str) -> Tensor:
    """Returns a parameter of all blocks, ``[layer, ...]``, a copy; raises :class:`AttributeError` if there is none."""
    return torch.stack([parameter(model, block, name) for block in model.weights.blocks])


def parameter(model: Model, block: BlockWeights, name: str) -> Tensor:
    """Returns a block's parameter; a bias that the model does not have is zero, as in TransformerLens."""
    value = getattr(block, name)
    if isinstance(value, Tensor):
        return value
    spec, attention = model.spec, model.spec.attention
    shapes: dict[str, tuple[int, ...]] = {
        "b_Q": (attention.n_heads, attention.d_head),
        "b_K": (attention.n_kv_heads, attention.d_head),
        "b_V": (attention.n_kv_heads, attention.d_head),
        "b_O": (spec.d_model,),
        "b_in": (spec.mlp.d_mlp,),
        "b_out": (spec.d_model,),
    }
    if name not in shapes:
        raise AttributeError(f"this model has no {name}: its MLP has no gate")
    return block.W_O.new_zeros(shapes[name])


def named(model: Model, *, complete: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters under TransformerLens's names, views where they are stored fused.

    ``complete`` adds zeros for the biases that the model does not have, as TransformerLens does.
    """
    weights = model.weights
    yield "embed.W_E", weights.W_E
    if weights.W_pos is not None:
        yield "pos_embed.W_pos", weights.W_pos
    for layer, block in enumerate(weights.blocks):
        path = f"blocks.{layer}"
        yield from _norm(f"{path}.ln1", block.ln1)
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            if complete or getattr(block, name) is not None:
                yield f"{path}.attn.{name}", parameter(model, block, name)
        for name, weight in (("q_norm", block.q_norm), ("k_norm", block.k_norm)):
            if weight is not None:
                yield f"{path}.attn.{name}.w", weight
        yield from _norm(f"{path}.ln1_post", block.ln1_post)
        # One norm can serve both.
        if complete or block.ln2.w is None or block.ln2.w is not block.ln1.w:
            yield from _norm(f"{path}.ln2", block.ln2)
        for name in ("W_gate", "W_in", "W_out", "b_in", "b_out"):
            if getattr(block, name) is not None or (complete and name.startswith("b_")):
                yield f"{path}.mlp.{name}", parameter(model, block, name)
        if block.gated and block.b_gate_in is not None:
            yield f"{path}.mlp.b_gate", block.b_gate_in[: model.spec.mlp.d_mlp]
        yield from _norm(f"{path}.ln2_post", block.ln2_post)
    yield from _norm("ln_final", weights.ln_final)
    yield "unembed.W_U", weights.W_U
    if weights.b_U is not None:
        yield "unembed.b_U", weights.b_U
    elif complete:
        yield "unembed.b_U", weights.W_U.new_zeros(weights.W_U.shape[1])


def _norm(path: str, norm: NormWeights | None) -> Iterator[tuple[str, Tensor]]:
    for name in ("w", "b"):
        value = None if norm is None else getattr(norm, name)
        if value is not None:
            yield f"{path}.{name}", value
