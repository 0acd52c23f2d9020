"""StableLM: layer norm in front of a gated MLP, a part of every head rotated."""

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.llama import ACTIVATIONS, GATE_IN, QKV
from fastinterp.families.rotary import read_rope
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, default_attention_scale


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``StableLmConfig``; 12b, with a norm per head and parallel blocks, is refused."""
    n_layers, d_model, n_heads = (
        config.need(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    d_head = d_model // n_heads
    config.expect("use_parallel_residual", (False,), False)
    config.expect("qk_layernorm", (False,), False)
    config.expect("use_qkv_bias", (True, False), False)  # says which keys the checkpoint must have
    return ModelSpec(
        family="stablelm",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("max_position_embeddings"),
        norm=Norm(kind="layer", eps=config.need("layer_norm_eps")),
        position=Position(kind="rotary", rope=(read_rope(config, d_head, share="partial"),) * n_layers),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads", n_heads),
            d_head=d_head,
            scale=default_attention_scale(d_head),
            window=(None,) * n_layers,
        ),
        mlp=Mlp(
            kind="gated",
            d_mlp=config.need("intermediate_size"),
            activation=config.convert("hidden_act", ACTIVATIONS, "silu"),
        ),
    )


BLOCK = "layers.{layer}."

FAMILY = Family(
    name="stablelm",
    model_types=("stablelm",),
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
        "b_QKV": biases(BLOCK, *QKV, flag="use_qkv_bias"),
        "W_O": linear(BLOCK, "self_attn.o_proj"),
        "b_O": Source(keys=()),
        "ln2.w": Source(keys=(BLOCK + "post_attention_layernorm.weight",)),
        "ln2.b": Source(keys=(BLOCK + "post_attention_layernorm.bias",)),
        "W_gate_in": linear(BLOCK, *GATE_IN),
        "b_gate_in": Source(keys=()),
        "W_out": linear(BLOCK, "mlp.down_proj"),
        "b_out": Source(keys=()),
    },
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
