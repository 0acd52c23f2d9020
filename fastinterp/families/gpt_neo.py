"""GPT-Neo and TinyStories: as GPT-2, but attention is not scaled, and every other layer looks at a window only."""

from fastinterp.errors import UnsupportedConfigError
from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.gpt2 import ACTIVATIONS
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``GPTNeoConfig``."""
    n_layers, d_model, n_heads = (config.need(key) for key in ("num_layers", "hidden_size", "num_heads"))
    kinds = config.get("attention_layers") or [
        kind for pattern, times in config.need("attention_types") for kind in pattern * times
    ]
    config.get("attention_types")
    if len(kinds) != n_layers or not set(kinds) <= {"global", "local"}:
        raise UnsupportedConfigError(
            f"config attention_layers={kinds!r} is not supported: only 'global' or 'local', for {n_layers} layers"
        )
    window = config.get("window_size", 256)
    return ModelSpec(
        family="gpt_neo",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("max_position_embeddings"),
        norm=Norm(kind="layer", eps=config.need("layer_norm_epsilon")),
        position=Position(kind="learned"),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=d_model // n_heads,
            scale=1.0,
            window=tuple(window if kind == "local" else None for kind in kinds),
        ),
        mlp=Mlp(
            kind="plain",
            d_mlp=config.get("intermediate_size", 4 * d_model),
            activation=config.convert("activation_function", ACTIVATIONS, "gelu_new"),
        ),
    )


BLOCK = "h.{layer}."
QKV = ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")

FAMILY = Family(
    name="gpt_neo",
    model_types=("gpt_neo",),
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
        "ln1.w": Source(keys=(BLOCK + "ln_1.weight",)),
        "ln1.b": Source(keys=(BLOCK + "ln_1.bias",)),
        "W_QKV": linear(BLOCK, *QKV),
        "b_QKV": Source(keys=()),
        "W_O": linear(BLOCK, "attn.attention.out_proj"),
        "b_O": biases(BLOCK, "attn.attention.out_proj"),
        "ln2.w": Source(keys=(BLOCK + "ln_2.weight",)),
        "ln2.b": Source(keys=(BLOCK + "ln_2.bias",)),
        "W_gate_in": linear(BLOCK, "mlp.c_fc"),
        "b_gate_in": biases(BLOCK, "mlp.c_fc"),
        "W_out": linear(BLOCK, "mlp.c_proj"),
        "b_out": biases(BLOCK, "mlp.c_proj"),
    },
    ignored=(r"h\.\d+\.attn\.attention\.(bias|masked_bias)",),
)
