"""A model's parameters and settings under the attributes that TransformerLens gives them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastinterp.model.model import Model
from fastinterp.model.weights import BlockWeights, NormWeights

ACT_FN = {"gelu": "gelu", "gelu_tanh": "gelu_new", "gelu_quick": "quick_gelu", "relu": "relu", "silu": "silu"}


@dataclass(frozen=True, kw_only=True)
class HookedConfig:
    """What notebooks read from ``model.cfg``. ``n_key_value_heads`` is ``None`` where every head has its own."""

    model_name: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int | None
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    eps: float
    act_fn: str
    gated_mlp: bool
    normalization_type: str
    positional_embedding_type: str
    parallel_attn_mlp: bool
    attn_scale: float
    device: torch.device
    dtype: torch.dtype
    default_prepend_bos: bool
    use_attn_result: bool
    use_attn_in: bool
    use_split_qkv_input: bool
    use_hook_mlp_in: bool


def config_of(model: Model, flags: set[str], default_prepend_bos: bool) -> HookedConfig:
    """Returns the settings of a model as TransformerLens names them."""
    spec = model.spec
    folded = model.weights.ln_final.w is None
    kind = {"layer": "LN", "rms": "RMS"}[spec.norm.kind]
    attention = spec.attention
    return HookedConfig(
        model_name=model.origin.source,
        n_layers=spec.n_layers,
        n_heads=attention.n_heads,
        n_key_value_heads=None if attention.group == 1 else attention.n_kv_heads,
        d_model=spec.d_model,
        d_head=attention.d_head,
        d_mlp=spec.mlp.d_mlp,
        d_vocab=spec.d_vocab,
        d_vocab_out=spec.d_vocab,
        n_ctx=spec.n_ctx,
        eps=spec.norm.eps,
        act_fn=ACT_FN[spec.mlp.activation],
        gated_mlp=spec.mlp.kind == "gated",
        normalization_type=kind + "Pre" if folded else kind,
        positional_embedding_type={"learned": "standard", "rotary": "rotary"}[spec.position.kind],
        parallel_attn_mlp=spec.parallel,
        attn_scale=1.0 / attention.scale,
        device=model.device,
        dtype=model.dtype,
        default_prepend_bos=default_prepend_bos,
        use_attn_result="use_attn_result" in flags,
        use_attn_in="use_attn_in" in flags,
        use_split_qkv_input="use_split_qkv_input" in flags,
        use_hook_mlp_in="use_hook_mlp_in" in flags,
    )


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
