"""OPT: as GPT-2 with relu; its table of positions begins with two rows that no token uses."""

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, default_attention_scale

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


def to_spec(config: Config) -> ModelSpec:
    """Reads an ``OPTConfig``; 350m, which normalises after the sublayers and projects its embeddings, is refused."""
    n_layers, d_model, n_heads = (
        config.need(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    d_head = d_model // n_heads
    config.expect("do_layer_norm_before", (True,), True)
    config.expect("word_embed_proj_dim", (d_model,), d_model)
    config.expect("layer_norm_elementwise_affine", (True,), True)
    config.expect("_remove_final_layer_norm", (False,), False)
    config.expect("enable_bias", (True, False), True)  # says which keys the checkpoint must have
    return ModelSpec(
        family="opt",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("max_position_embeddings"),
        norm=Norm(kind="layer", eps=1e-5),
        position=Position(kind="learned"),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=d_head,
            scale=default_attention_scale(d_head),
            window=(None,) * n_layers,
        ),
        mlp=Mlp(
            kind="plain",
            d_mlp=config.need("ffn_dim"),
            activation=config.convert("activation_function", ACTIVATIONS, "relu"),
        ),
    )


BLOCK = "decoder.layers.{layer}."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

FAMILY = Family(
    name="opt",
    model_types=("opt",),
    to_spec=to_spec,
    prefix="model.",
    model={
        "W_E": Source(keys=("decoder.embed_tokens.weight",)),
        "W_pos": Source(keys=("decoder.embed_positions.weight",), skip=2),
        "ln_final.w": Source(keys=("decoder.final_layer_norm.weight",)),
        "ln_final.b": Source(keys=("decoder.final_layer_norm.bias",)),
        "W_U": Source(keys=("lm_head.weight?",), layout="transposed"),
    },
    block={
        "ln1.w": Source(keys=(BLOCK + "self_attn_layer_norm.weight",)),
        "ln1.b": Source(keys=(BLOCK + "self_attn_layer_norm.bias",)),
        "W_QKV": linear(BLOCK, *QKV),
        "b_QKV": biases(BLOCK, *QKV, flag="enable_bias"),
        "W_O": linear(BLOCK, "self_attn.out_proj"),
        "b_O": biases(BLOCK, "self_attn.out_proj", flag="enable_bias"),
        "ln2.w": Source(keys=(BLOCK + "final_layer_norm.weight",)),
        "ln2.b": Source(keys=(BLOCK + "final_layer_norm.bias",)),
        "W_gate_in": linear(BLOCK, "fc1"),
        "b_gate_in": biases(BLOCK, "fc1", flag="enable_bias"),
        "W_out": linear(BLOCK, "fc2"),
        "b_out": biases(BLOCK, "fc2", flag="enable_bias"),
    },
    ignored=(r"decoder\.version",),
)
