"""Qwen2 (biases of queries, keys and values) and Qwen3 (queries and keys normalised): otherwise as Llama."""

import dataclasses

from fastinterp.families import llama
from fastinterp.families.base import Family, Source, biases, linear
from fastinterp.families.config import Config
from fastinterp.families.windows import FULL, SLIDING, read_windows
from fastinterp.model.spec import ModelSpec


def to_spec(config: Config) -> ModelSpec:
    """Reads a ``Qwen2Config`` or ``Qwen3Config``."""
    spec = llama.to_spec(config)
    config.expect("use_mrope", (False,), False)
    kind = config.need("model_type")
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    first = config.get("max_window_layers", 28)
    default = [FULL if layer < first else SLIDING for layer in range(spec.n_layers)]
    attention = dataclasses.replace(
        spec.attention,
        window=read_windows(config, window, default),
        qk_norm=kind == "qwen3",
    )
    return dataclasses.replace(spec, family=kind, attention=attention, default_prepend_bos=False)


BLOCK = "layers.{layer}."

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    to_spec=to_spec,
    prefix="model.",
    model=llama.FAMILY.model,
    block={**llama.FAMILY.block, "b_QKV": biases(BLOCK, *llama.QKV), "b_O": Source(keys=())},
    ignored=llama.FAMILY.ignored,
)

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    to_spec=to_spec,
    prefix="model.",
    model=llama.FAMILY.model,
    block={
        **llama.FAMILY.block,
        "W_QKV": linear(BLOCK, *llama.QKV),
        "q_norm": Source(keys=(BLOCK + "self_attn.q_norm.weight",)),
        "k_norm": Source(keys=(BLOCK + "self_attn.k_norm.weight",)),
    },
    ignored=llama.FAMILY.ignored,
)
