"""GPT-2: layer norm, learned positions, plain MLP, biases everywhere, tied unembedding."""

from fastinterp.families.base import Family, Source
from fastinterp.families.config import Config
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, default_attention_scale

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``GPT2Config``."""
    n_layers, d_model, n_heads = config.need("n_layer"), config.need("n_embd"), config.need("n_head")
    d_head = d_model // n_heads
    config.expect("scale_attn_by_inverse_layer_idx", (False,), False)
    config.get("reorder_and_upcast_attn")  # a precision trick; the value computed is the same
    config.expect("add_cross_attention", (False,), False)
    scaled = config.expect("scale_attn_weights", (True, False), True)
    return ModelSpec(
        family="gpt2",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("n_positions"),
        norm=Norm(kind="layer", eps=config.need("layer_norm_epsilon")),
        position=Position(kind="learned"),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=d_head,
            scale=default_attention_scale(d_head) if scaled else 1.0,
            window=(None,) * n_layers,
        ),
        mlp=Mlp(
            kind="plain",
            d_mlp=config.get("n_inner", 4 * d_model),
            activation=config.convert("activation_function", ACTIVATIONS, "gelu_new"),
        ),
    )


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    to_spec=to_spec,
    prefix="transformer.",
    model={
        "W_E": Source(keys=("wte.weight",)),
        "W_pos": Source(keys=("wpe.weight",)),
        "ln_final.w": Source(keys=("ln_f.weight",)),
        "ln_final.b": Source(keys=("ln_f.bias",)),
        "W_U": Source(keys=("lm_head.weight?",), layout="transposed"),
    },
    block={
        "ln1.w": Source(keys=("h.{layer}.ln_1.weight",)),
        "ln1.b": Source(keys=("h.{layer}.ln_1.bias",)),
        "W_QKV": Source(keys=("h.{layer}.attn.c_attn.weight",)),
        "b_QKV": Source(keys=("h.{layer}.attn.c_attn.bias",)),
        "W_O": Source(keys=("h.{layer}.attn.c_proj.weight",)),
        "b_O": Source(keys=("h.{layer}.attn.c_proj.bias",)),
        "ln2.w": Source(keys=("h.{layer}.ln_2.weight",)),
        "ln2.b": Source(keys=("h.{layer}.ln_2.bias",)),
        "W_gate_in": Source(keys=("h.{layer}.mlp.c_fc.weight",)),
        "b_gate_in": Source(keys=("h.{layer}.mlp.c_fc.bias",)),
        "W_out": Source(keys=("h.{layer}.mlp.c_proj.weight",)),
        "b_out": Source(keys=("h.{layer}.mlp.c_proj.bias",)),
    },
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)
