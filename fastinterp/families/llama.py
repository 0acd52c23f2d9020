"""Llama, Mistral, SmolLM2: RMS norm, rotary positions, grouped-query attention, gated MLP."""

from typing import Any

from fastinterp.errors import UnsupportedConfigError
from fastinterp.families.base import Family, Source
from fastinterp.families.config import Config
from fastinterp.model.spec import (
    Attention,
    Mlp,
    ModelSpec,
    Norm,
    Position,
    RopeScaling,
    default_attention_scale,
)

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``LlamaConfig`` or ``MistralConfig``."""
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
        position=rotary(config, d_head),
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


def rotary(config: Config, d_head: int) -> Position:
    """Reads base and scaling from ``rope_parameters``, or from the older ``rope_theta`` and ``rope_scaling``."""
    rope: dict[str, Any] = dict(config.get("rope_scaling", {})) | dict(config.get("rope_parameters", {}))
    base = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    rope.pop("type", None)
    needed = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }
    if kind not in needed:
        raise UnsupportedConfigError(
            f"config rope_type={kind!r} is not supported: only {' or '.join(map(repr, needed))}"
        )
    for key in sorted(needed[kind] - set(rope)):
        raise UnsupportedConfigError(f"config rope_parameters lacks {key!r}, which rope_type={kind!r} needs")
    for key in sorted(set(rope) - needed[kind]):
        if rope[key] is not None:
            raise UnsupportedConfigError(f"config rope_parameters[{key!r}]={rope[key]!r} is not supported")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling(kind="linear", factor=float(rope["factor"]))
    elif kind == "llama3":
        scaling = RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_n_ctx=int(rope["original_max_position_embeddings"]),
        )
    return Position(kind="rotary", rotary_dims=d_head, base=float(base), scaling=scaling)


def _linear(*names: str, bias_if: str | None = None) -> Source:
    """The weights of ``nn.Linear`` layers, or the biases that they have if a config flag says so."""
    if bias_if:
        return Source(keys=tuple(f"layers.{{layer}}.{name}.bias?{bias_if}" for name in names))
    return Source(keys=tuple(f"layers.{{layer}}.{name}.weight" for name in names), layout="transposed")


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
        "W_QKV": _linear(*QKV),
        "b_QKV": _linear(*QKV, bias_if="attention_bias"),
        "W_O": _linear("self_attn.o_proj"),
        "b_O": _linear("self_attn.o_proj", bias_if="attention_bias"),
        "ln2.w": Source(keys=("layers.{layer}.post_attention_layernorm.weight",)),
        "W_gate_in": _linear(*GATE_IN),
        "b_gate_in": _linear(*GATE_IN, bias_if="mlp_bias"),
        "W_out": _linear("mlp.down_proj"),
        "b_out": _linear("mlp.down_proj", bias_if="mlp_bias"),
    },
    ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
