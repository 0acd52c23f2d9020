"""GPT-J: attention and MLP in parallel behind one norm, rotary positions with neighbouring dimensions paired."""

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.gpt2 import ACTIVATIONS
from fastinterp.model.spec import Attention, Mlp, ModelSpec, Norm, Position, Rope, default_attention_scale


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``GPTJConfig``."""
    n_layers, d_model, n_heads = (config.need(key) for key in ("n_layer", "n_embd", "n_head"))
    d_head = d_model // n_heads
    for key in ("rotary", "scale_attn_weights"):
        config.expect(key, (True,), True)  # the first checkpoint has them
    rope = Rope(dims=config.get("rotary_dim", d_head), base=10000.0, layout="interleaved")
    return ModelSpec(
        family="gptj",
        n_layers=n_layers,
        d_model=d_model,
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("n_positions"),
        norm=Norm(kind="layer", eps=config.need("layer_norm_epsilon")),
        position=Position(kind="rotary", rope=(rope,) * n_layers),
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=d_head,
            scale=default_attention_scale(d_head),
            window=(None,) * n_layers,
        ),
        mlp=Mlp(
            kind="plain",
            d_mlp=config.get("n_inner", 4 * d_model),
            activation=config.convert("activation_function", ACTIVATIONS, "gelu_new"),
        ),
        parallel=True,
    )


BLOCK = "h.{layer}."

FAMILY = Family(
    name="gptj",
    model_types=("gptj",),
    to_spec=to_spec,
    prefix="transformer.",
    model={
        "W_E": Source(keys=("wte.weight",)),
        "ln_final.w": Source(keys=("ln_f.weight",)),
        "ln_final.b": Source(keys=("ln_f.bias",)),
        "W_U": Source(keys=("lm_head.weight?",), layout="transposed"),
        "b_U": Source(keys=("lm_head.bias",)),
    },
    # The MLP reads the same normalised residual as the attention: ln2 is ln1 once more.
    block={
        "ln1.w": Source(keys=(BLOCK + "ln_1.weight",)),
        "ln1.b": Source(keys=(BLOCK + "ln_1.bias",)),
        "W_QKV": linear(BLOCK, "attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "b_QKV": Source(keys=()),
        "W_O": linear(BLOCK, "attn.out_proj"),
        "b_O": Source(keys=()),
        "ln2.w": Source(keys=(BLOCK + "ln_1.weight",)),
        "ln2.b": Source(keys=(BLOCK + "ln_1.bias",)),
        "W_gate_in": linear(BLOCK, "mlp.fc_in"),
        "b_gate_in": biases(BLOCK, "mlp.fc_in"),
        "W_out": linear(BLOCK, "mlp.fc_out"),
        "b_out": biases(BLOCK, "mlp.fc_out"),
    },
    ignored=(r"h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
)
