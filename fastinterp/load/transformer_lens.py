"""TransformerLens 4.3 bridges: their parameters as they are now, in compatibility mode or not."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastinterp.errors import CheckpointKeyError
from fastinterp.families import Family, read_spec
from fastinterp.model.model import Model, Origin, Processing
from fastinterp.model.process import process_weights
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights, NormWeights, Weights, check_shapes


def load_bridge(
    bridge: Any, *, tokenizer: Any | None, device: torch.device, dtype: torch.dtype, processing: Processing
) -> Model:
    """Copies the parameters of a bridge.

    In compatibility mode they are processed already, and ``processing="none"`` keeps them so; processing twice changes
    nothing.
    """
    hf_config = bridge.original_model.config
    family, spec = read_spec(hf_config.to_dict(), type(hf_config)().to_dict())
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        given = dict(bridge.tl_parameters()) | _further_norms(bridge, spec)
        parameters = {k: v.detach().to(device=device, dtype=exact) for k, v in given.items()}
        weights = weights_from_transformer_lens(spec, family, parameters)
        check_shapes(spec, weights)
        weights.check_finite()
        if processing == "transformer_lens":
            weights = process_weights(spec, weights)
    # A bridge in compatibility mode has its norms folded, unless it was asked not to.
    folded = all(norm.w is None for norm in (weights.ln_final, *(block.ln1 for block in weights.blocks)))
    weights = weights.to(dtype=dtype)
    weights.check_finite()
    return Model(
        spec=dataclasses.replace(spec, default_prepend_bos=bool(bridge.cfg.default_prepend_bos)),
        weights=weights,
        tokenizer=bridge.tokenizer if tokenizer is None else tokenizer,
        origin=Origin(source=str(bridge.cfg.model_name), processing="transformer_lens" if folded else "none"),
    )


def _further_norms(bridge: Any, spec: ModelSpec) -> dict[str, Tensor]:
    """Returns the norms that ``tl_parameters`` leaves out: of queries and keys, and after the sublayers."""
    names = ["attn.q_norm", "attn.k_norm"] if spec.attention.qk_norm else []
    names += ["ln1_post", "ln2_post"] if spec.post_norms else []
    found = {}
    for layer, block in enumerate(bridge.blocks):
        for name in names:
            part = block
            for step in name.split("."):
                part = getattr(part, step, None)
            weight = getattr(part, "weight", None)
            if isinstance(weight, Tensor):
                found[f"blocks.{layer}.{name}.w"] = weight
    return found


def weights_from_transformer_lens(spec: ModelSpec, family: Family, parameters: Mapping[str, Tensor]) -> Weights:
    """Builds weights from TransformerLens's parameter names; raises for names that are left over or missing.

    A bridge holds embeddings and norms as the checkpoint stores them: what the family adds to or multiplies them by is
    done here.
    """
    rest = dict(parameters)
    group = spec.attention.group
    stored_without = family.block["ln1.w"].plus
    embed, shared_norm = family.model["W_E"], family.block["ln1.w"].keys == family.block["ln2.w"].keys

    def take(name: str) -> Tensor:
        if name not in rest:
            raise CheckpointKeyError(f"the bridge lacks the parameter {name!r}")
        return rest.pop(name)

    def bias(name: str) -> Tensor | None:
        value = rest.pop(name, None)
        # A bridge invents zeros for biases that the model does not have.
        return None if value is None or not bool((value != 0).any()) else value.clone()

    def norm(name: str) -> NormWeights:
        w, b = take(f"{name}.w") + stored_without, bias(f"{name}.b")
        return NormWeights(w=None if bool((w == 1).all()) else w, b=b)

    def heads(tensor: Tensor, n_heads: int) -> Tensor:
        # Key and value matrices of grouped-query models come repeated per query head.
        tensor = tensor[::group] if tensor.shape[0] != n_heads else tensor
        return tensor.transpose(0, 1).flatten(1) if tensor.ndim == 3 else tensor.flatten()

    def fused_bias(parts: list[tuple[Tensor | None, int]]) -> Tensor | None:
        if all(part is None for part, _ in parts):
            return None
        like = next(part for part, _ in parts if part is not None)
        return torch.cat([like.new_zeros(size) if part is None else part for part, size in parts])

    blocks = []
    for layer in range(spec.n_layers):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        attention = spec.attention
        counts = {"Q": attention.n_heads, "K": attention.n_kv_heads, "V": attention.n_kv_heads}
        biases = []
        for letter, count in counts.items():
            b = bias(f"{attn}.b_{letter}")
            biases.append((None if b is None else heads(b, count), count * attention.d_head))
        gated = spec.mlp.kind == "gated"
        W_gate_in = ([take(f"{mlp}.W_gate")] if gated else []) + [take(f"{mlp}.W_in")]
        b_gate_in = ([(bias(f"{mlp}.b_gate"), spec.mlp.d_mlp)] if gated else []) + [
            (bias(f"{mlp}.b_in"), spec.mlp.d_mlp)
        ]
        ln1 = norm(f"blocks.{layer}.ln1")
        qk_norms = [
            take(f"{attn}.{name}.w") + stored_without if attention.qk_norm else None for name in ("q_norm", "k_norm")
        ]
        blocks.append(
            BlockWeights(
                ln1=ln1,
                W_QKV=torch.cat([heads(take(f"{attn}.W_{letter}"), n) for letter, n in counts.items()], dim=-1),
                b_QKV=fused_bias(biases),
                W_O=take(f"{attn}.W_O").clone(),
                b_O=bias(f"{attn}.b_O"),
                ln2=ln1 if shared_norm else norm(f"blocks.{layer}.ln2"),
                W_gate_in=torch.cat(W_gate_in, dim=-1),
                b_gate_in=fused_bias(b_gate_in),
                W_out=take(f"{mlp}.W_out").clone(),
                b_out=bias(f"{mlp}.b_out"),
                q_norm=qk_norms[0],
                k_norm=qk_norms[1],
                ln1_post=norm(f"blocks.{layer}.ln1_post") if spec.post_norms else None,
                ln2_post=norm(f"blocks.{layer}.ln2_post") if spec.post_norms else None,
            )
        )
    weights = Weights(
        W_E=take("embed.W_E") * (1.0 if embed.times is None else embed.times(spec)),
        W_pos=take("pos_embed.W_pos")[family.model["W_pos"].skip :].clone() if "W_pos" in family.model else None,
        blocks=tuple(blocks),
        ln_final=norm("ln_final"),
        W_U=take("unembed.W_U").clone(),
        b_U=bias("unembed.b_U"),
    )
    if rest:
        raise CheckpointKeyError(f"the bridge has parameters that fastinterp does not know: {', '.join(sorted(rest))}")
    return weights
