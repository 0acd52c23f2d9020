"""StarCoder2: layer norm and a plain MLP as GPT-2, rotary positions and grouped queries as Llama, biases everywhere."""

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.gpt_neox import ACTIVATIONS
from fastinterp.families.rotary import read_rope
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, default_attention_scale


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``Starcoder2Config``."""
    n_layers, d_model, n_heads = (
        config.need(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    d_head = config.get("head_dim", d_model // n_heads)
    config.expect("use_bias", (True, False), True)  # says which keys the checkpoint must have
    config.expect("norm_type", ("layer_norm",), "layer_norm")
    config.expect("mlp_type", ("default",), "default")
    config.expect("scale_attn_weights", (True,), True)
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "layer_norm_epsilon"):
        config.get(key)  # checkpoints have them, transformers reads none of them
    return ModelSpec(
        family="starcoder2",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("max_position_embeddings"),
        norm=Norm(kind="layer", eps=config.need("norm_epsilon")),
        position=Position(kind="rotary", rope=(read_rope(config, d_head),) * n_layers),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads", n_heads),
            d_head=d_head,
            scale=default_attention_scale(d_head),
            window=(config.get("sliding_window"),) * n_layers,
        ),
        mlp=Mlp(
            kind="plain",
            d_mlp=config.need("intermediate_size"),
            activation=config.convert("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        ),
        default_prepend_bos=False,
    )


BLOCK = "layers.{layer}."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

FAMILY = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    to_spec=to_spec,
    prefix="model.",
    model={
        "W_E": Source(keys=("embed_tokens.weight",)),
        "ln_final.w": Source(keys=("norm.weight",)),
        "ln_final.b": Source(keys=("norm.bias",)),
        "W_U": Source(keys=("lm_head.weight?",), layout="transposed"),
    },
    block={
        "ln1.w": Source(keys=(BLOCK + "input_layernorm.weight",)),
        "ln1.b": Source(keys=(BLOCK + "input_layernorm.bias",)),
        "W_QKV": linear(BLOCK, *QKV),
        "b_QKV": biases(BLOCK, *QKV, flag="use_bias"),
        "W_O": linear(BLOCK, "self_attn.o_proj"),
        "b_O": biases(BLOCK, "self_attn.o_proj", flag="use_bias"),
        "ln2.w": Source(keys=(BLOCK + "post_attention_layernorm.weight",)),
        "ln2.b": Source(keys=(BLOCK + "post_attention_layernorm.bias",)),
        "W_gate_in": linear(BLOCK, "mlp.c_fc"),
        "b_gate_in": biases(BLOCK, "mlp.c_fc", flag="use_bias"),
        "W_out": linear(BLOCK, "mlp.c_proj"),
        "b_out": biases(BLOCK, "mlp.c_proj", flag="use_bias"),
    },
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
