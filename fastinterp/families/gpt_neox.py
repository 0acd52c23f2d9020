"""GPT-NeoX and Pythia: attention and MLP in parallel, and only the first part of every head is rotated."""

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.rotary import read_rope
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, default_attention_scale

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``GPTNeoXConfig``."""
    n_layers, d_model, n_heads = (
        config.need(key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    d_head = d_model // n_heads
    config.expect("attention_bias", (True, False), True)  # says which keys the checkpoint must have
    for key in ("rotary_pct", "rotary_emb_base"):
        config.get(key)  # older spellings, which transformers turns into rope_parameters
    return ModelSpec(
        family="gpt_neox",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("max_position_embeddings"),
        norm=Norm(kind="layer", eps=config.need("layer_norm_eps")),
        position=Position(kind="rotary", rope=(read_rope(config, d_head, share="partial"),) * n_layers),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=d_head,
            scale=default_attention_scale(d_head),
            window=(None,) * n_layers,
        ),
        mlp=Mlp(
            kind="plain",
            d_mlp=config.need("intermediate_size"),
            activation=config.convert("hidden_act", ACTIVATIONS, "gelu"),
        ),
        parallel=config.expect("use_parallel_residual", (True, False), True),
        default_prepend_bos=False,
    )


BLOCK = "layers.{layer}."

FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    to_spec=to_spec,
    prefix="gpt_neox.",
    model={
        "W_E": Source(keys=("embed_in.weight",)),
        "ln_final.w": Source(keys=("final_layer_norm.weight",)),
        "ln_final.b": Source(keys=("final_layer_norm.bias",)),
        # Checkpoints call it embed_out, models in memory lm_head.
        "W_U": Source(keys=("lm_head.weight?", "embed_out.weight?"), layout="transposed"),
    },
    block={
        "ln1.w": Source(keys=(BLOCK + "input_layernorm.weight",)),
        "ln1.b": Source(keys=(BLOCK + "input_layernorm.bias",)),
        "W_QKV": Source(keys=(BLOCK + "attention.query_key_value.weight",), layout="per_head_qkv"),
        "b_QKV": Source(keys=(BLOCK + "attention.query_key_value.bias?attention_bias",), layout="per_head_qkv"),
        "W_O": linear(BLOCK, "attention.dense"),
        "b_O": biases(BLOCK, "attention.dense", flag="attention_bias"),
        "ln2.w": Source(keys=(BLOCK + "post_attention_layernorm.weight",)),
        "ln2.b": Source(keys=(BLOCK + "post_attention_layernorm.bias",)),
        "W_gate_in": linear(BLOCK, "mlp.dense_h_to_4h"),
        "b_gate_in": biases(BLOCK, "mlp.dense_h_to_4h"),
        "W_out": linear(BLOCK, "mlp.dense_4h_to_h"),
        "b_out": biases(BLOCK, "mlp.dense_4h_to_h"),
    },
    ignored=(r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)", r"rotary_emb\.inv_freq"),
)
