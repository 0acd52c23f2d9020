"""Phi-1 and Phi-2: attention and MLP in parallel behind one norm, half of every head rotated, biases everywhere."""

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.gpt_neox import ACTIVATIONS
from fastinterp.families.rotary import read_rope
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, default_attention_scale


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``PhiConfig``."""
    n_layers, d_model, n_heads = (
        config.need(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    d_head = d_model // n_heads
    config.expect("qk_layernorm", (False,), False)
    return ModelSpec(
        family="phi",
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
            kind="plain",
            d_mlp=config.need("intermediate_size"),
            activation=config.convert("hidden_act", ACTIVATIONS, "gelu_new"),
        ),
        parallel=True,
        default_prepend_bos=False,
    )


BLOCK = "layers.{layer}."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

FAMILY = Family(
    name="phi",
    model_types=("phi",),
    to_spec=to_spec,
    prefix="model.",
    model={
        "W_E": Source(keys=("embed_tokens.weight",)),
        "ln_final.w": Source(keys=("final_layernorm.weight",)),
        "ln_final.b": Source(keys=("final_layernorm.bias",)),
        "W_U": Source(keys=("lm_head.weight?",), layout="transposed"),
        "b_U": Source(keys=("lm_head.bias",)),
    },
    # The MLP reads the same normalised residual as the attention: ln2 is ln1 once more.
    block={
        "ln1.w": Source(keys=(BLOCK + "input_layernorm.weight",)),
        "ln1.b": Source(keys=(BLOCK + "input_layernorm.bias",)),
        "W_QKV": linear(BLOCK, *QKV),
        "b_QKV": biases(BLOCK, *QKV),
        "W_O": linear(BLOCK, "self_attn.dense"),
        "b_O": biases(BLOCK, "self_attn.dense"),
        "ln2.w": Source(keys=(BLOCK + "input_layernorm.weight",)),
        "ln2.b": Source(keys=(BLOCK + "input_layernorm.bias",)),
        "W_gate_in": linear(BLOCK, "mlp.fc1"),
        "b_gate_in": biases(BLOCK, "mlp.fc1"),
        "W_out": linear(BLOCK, "mlp.fc2"),
        "b_out": biases(BLOCK, "mlp.fc2"),
    },
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
