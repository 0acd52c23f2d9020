"""Gemma 1, 2 and 3 (text): norms that multiply by ``1 + weight``, a scaled embedding, a gelu gate.

Gemma 2 adds norms after the sublayers, bounded scores and logits, and windows in every other layer. Gemma 3 normalises
queries and keys instead of bounding scores, and its windowed layers turn by a base of their own.
"""

import math

from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.rotary import read_rope
from fastinterp.families.windows import FULL, SLIDING, read_windows
from fastinterp.model.spec import Activation, Attention, Mlp, ModelSpec, Norm, Position

ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def gemma1(config: Config) -> ModelSpec:
    """Reads a ``GemmaConfig``."""
    # Early checkpoints say hidden_act="gelu" and mean the tanh form, as transformers runs them too.
    config.expect("hidden_act", ("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
    config.expect("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    n_layers, d_head = config.need("num_hidden_layers"), config.need("head_dim")
    return _spec(
        config,
        "gemma",
        position=Position(kind="rotary", rope=(read_rope(config, d_head),) * n_layers),
        scale=d_head**-0.5,
        window=(None,) * n_layers,
        activation="gelu_tanh",
        newer=False,
    )


def gemma2(config: Config) -> ModelSpec:
    """Reads a ``Gemma2Config``."""
    config.get("hidden_act")  # checkpoints have it beside hidden_activation, which is what counts
    n_layers = config.need("num_hidden_layers")
    return _spec(
        config,
        "gemma2",
        position=Position(kind="rotary", rope=(read_rope(config, config.need("head_dim")),) * n_layers),
        scale=config.need("query_pre_attn_scalar") ** -0.5,
        window=_windows(config, full_every=2),
        activation=config.convert("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        newer=True,
        qk_norm=False,
    )


def gemma3(config: Config) -> ModelSpec:
    """Reads a ``Gemma3TextConfig``."""
    d_head = config.need("head_dim")
    window = _windows(config, full_every=config.get("sliding_window_pattern", 6))  # an older spelling of layer_types
    ropes = {kind: read_rope(config, d_head, layer_type=kind) for kind in (FULL, SLIDING)}
    config.get("rope_local_base_freq")  # an older spelling of rope_parameters
    config.expect("attn_logit_softcapping", (None,))  # the config class has it, the model does not read it
    return _spec(
        config,
        "gemma3",
        position=Position(
            kind="rotary",
            rope=tuple(ropes[FULL if size is None else SLIDING] for size in window),
        ),
        scale=config.need("query_pre_attn_scalar") ** -0.5,
        window=window,
        activation=config.convert("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        newer=True,
        qk_norm=True,
    )


def _windows(config: Config, *, full_every: int) -> tuple[int | None, ...]:
    default = [SLIDING if (layer + 1) % full_every else FULL for layer in range(config.need("num_hidden_layers"))]
    return read_windows(config, config.need("sliding_window"), default)


def _spec(
    config: Config,
    family: str,
    *,
    position: Position,
    scale: float,
    window: tuple[int | None, ...],
    activation: Activation,
    newer: bool,
    qk_norm: bool = False,
) -> ModelSpec:
    n_heads = config.need("num_attention_heads")
    config.expect("attention_bias", (True, False), False)  # says which keys the checkpoint must have
    config.expect("use_bidirectional_attention", (False,), False)
    return ModelSpec(
        family=family,
        n_layers=config.need("num_hidden_layers"),
        d_model=config.need("hidden_size"),
        d_vocab=config.need("vocab_size"),
        n_ctx=config.need("max_position_embeddings"),
        norm=Norm(kind="rms", eps=config.need("rms_norm_eps")),
        position=position,
        attention=Attention(
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads", n_heads),
            d_head=config.need("head_dim"),
            scale=scale,
            window=window,
            qk_norm=qk_norm,
            softcap=config.get("attn_logit_softcapping") if newer else None,
        ),
        mlp=Mlp(kind="gated", d_mlp=config.need("intermediate_size"), activation=activation),
        post_norms=newer,
        final_softcap=config.get("final_logit_softcapping") if newer else None,
    )


def _norm(name: str) -> Source:
    """A norm's weight, which is stored without the 1 that is added to it."""
    return Source(keys=(name + ".weight",), plus=1.0)


def _embedding_scale(spec: ModelSpec) -> float:
    return math.sqrt(spec.d_model)


LAYER = "layers.{layer}."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

MODEL = {
    "W_E": Source(keys=("embed_tokens.weight",), times=_embedding_scale),
    "ln_final.w": _norm("norm"),
    "W_U": Source(keys=("lm_head.weight?",), layout="transposed"),
}
BLOCK = {
    "ln1.w": _norm(LAYER + "input_layernorm"),
    "W_QKV": linear(LAYER, *QKV),
    "b_QKV": biases(LAYER, *QKV, flag="attention_bias"),
    "W_O": linear(LAYER, "self_attn.o_proj"),
    "b_O": biases(LAYER, "self_attn.o_proj", flag="attention_bias"),
    "ln2.w": _norm(LAYER + "post_attention_layernorm"),
    "W_gate_in": linear(LAYER, "mlp.gate_proj", "mlp.up_proj"),
    "b_gate_in": Source(keys=()),
    "W_out": linear(LAYER, "mlp.down_proj"),
    "b_out": Source(keys=()),
}
POST_NORMS = {
    "ln1_post.w": _norm(LAYER + "post_attention_layernorm"),
    "ln2.w": _norm(LAYER + "pre_feedforward_layernorm"),
    "ln2_post.w": _norm(LAYER + "post_feedforward_layernorm"),
}
QK_NORM = {"q_norm": _norm(LAYER + "self_attn.q_norm"), "k_norm": _norm(LAYER + "self_attn.k_norm")}
IGNORED = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

GEMMA1 = Family(
    name="gemma",
    model_types=("gemma",),
    to_spec=gemma1,
    prefix="model.",
    model=MODEL,
    block=BLOCK,
    ignored=IGNORED,
)
GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    to_spec=gemma2,
    prefix="model.",
    model=MODEL,
    block=BLOCK | POST_NORMS,
    ignored=IGNORED,
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    to_spec=gemma3,
    prefix="model.",
    model=MODEL,
    block=BLOCK | POST_NORMS | QK_NORM,
    ignored=IGNORED,
)
