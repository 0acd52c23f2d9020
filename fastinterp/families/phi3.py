"""Phi-3: as Llama, with queries, keys and values, and the two halves of the MLP, in one matrix each."""

import dataclasses

from fastinterp.families import llama
from fastinterp.families.base import Family, Source, linear
from fastinterp.families.config import Config
from fastinterp.model.spec import ModelSpec


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``Phi3Config``; checkpoints with a long context (``longrope``) are refused."""
    spec = llama.to_spec(config, share="partial")
    config.get("original_max_position_embeddings")  # read by longrope alone
    window = config.get("sliding_window")
    attention = dataclasses.replace(spec.attention, window=(window,) * spec.n_layers)
    return dataclasses.replace(spec, family="phi3", attention=attention)


BLOCK = "layers.{layer}."

FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    to_spec=to_spec,
    prefix="model.",
    model=llama.FAMILY.model,
    block={
        "ln1.w": Source(keys=(BLOCK + "input_layernorm.weight",)),
        "W_QKV": linear(BLOCK, "self_attn.qkv_proj"),
        "b_QKV": Source(keys=()),
        "W_O": linear(BLOCK, "self_attn.o_proj"),
        "b_O": Source(keys=()),
        "ln2.w": Source(keys=(BLOCK + "post_attention_layernorm.weight",)),
        "W_gate_in": linear(BLOCK, "mlp.gate_up_proj"),
        "b_gate_in": Source(keys=()),
        "W_out": linear(BLOCK, "mlp.down_proj"),
        "b_out": Source(keys=()),
    },
    ignored=llama.FAMILY.ignored,
)
