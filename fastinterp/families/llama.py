"""Llama, Mistral, SmolLM2: RMS norm, rotary positions, grouped-query attention, gated MLP."""

from typing import Literal

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.rotary import read_rope
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, default_attention_scale

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def to_spec(config: Config, *, share: Literal["whole", "partial"] = "whole") -> ModelSpec:
    """Reads a ``LlamaConfig`` or ``MistralConfig``; ``share`` as for :func:`read_rope`."""
    n_layers, d_model, n_heads = (
        config.need(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    d_head = config.get("head_dim", d_model // n_heads)
    for key in ("attention_bias", "mlp_bias"):
        config.expect(key, (True, False), False)  # says which keys the checkpoint must have
    window = config.get("sliding_window")  # Llama models do not read it, even where a config has it
    return ModelSpec(
        family="llama",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("max_position_embeddings"),
        norm=Norm(kind="rms", eps=config.need("rms_norm_eps")),
        position=Position(kind="rotary", rope=(read_rope(config, d_head, share=share),) * n_layers),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads", n_heads),
            d_head=d_head,
            scale=default_attention_scale(d_head),
            window=(window if config.get("model_type") == "mistral" else None,) * n_layers,
        ),
        mlp=Mlp(
            kind="gated",
            d_mlp=config.need("intermediate_size"),
            activation=config.convert("hidden_act", ACTIVATIONS, "silu"),
        ),
    )


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_IN = ("mlp.gate_proj", "mlp.up_proj")

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral"),
    to_spec=to_spec,
    prefix="model.",
    model={
        "W_E": Source(keys=("embed_tokens.weight",)),
        "ln_final.w": Source(keys=("norm.weight",)),
        "W_U": Source(keys=("lm_head.weight?",), layout="transposed"),
    },
    block={
        "ln1.w": Source(keys=("layers.{layer}.input_layernorm.weight",)),
        "W_QKV": linear("layers.{layer}.", *QKV),
        "b_QKV": biases("layers.{layer}.", *QKV, flag="attention_bias"),
        "W_O": linear("layers.{layer}.", "self_attn.o_proj"),
        "b_O": biases("layers.{layer}.", "self_attn.o_proj", flag="attention_bias"),
        "ln2.w": Source(keys=("layers.{layer}.post_attention_layernorm.weight",)),
        "W_gate_in": linear("layers.{layer}.", *GATE_IN),
        "b_gate_in": biases("layers.{layer}.", *GATE_IN, flag="mlp_bias"),
        "W_out": linear("layers.{layer}.", "mlp.down_proj"),
        "b_out": biases("layers.{layer}.", "mlp.down_proj", flag="mlp_bias"),
    },
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
