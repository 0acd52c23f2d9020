"""``model.cfg``: a model's settings under the names that TransformerLens gives them."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fastinterp.errors import nearest
from fastinterp.model.model import Model

ACT_FN = {"gelu": "gelu", "gelu_tanh": "gelu_new", "gelu_quick": "quick_gelu", "relu": "relu", "silu": "silu"}
# TransformerLens's word for a softcap that is not there.
NO_SOFTCAP = -1.0
# What says nothing about a loaded model, and where to look instead.
INSTEAD = {
    "checkpoint_index": "the revision of the hub: load(name, revision=...)",
    "checkpoint_value": "the revision of the hub: load(name, revision=...)",
    "from_checkpoint": "the revision of the hub: load(name, revision=...)",
    "rotary_dim": "model.model.spec.position.rope[layer].dims: the positions of this model are not rotary",
    "rotary_base": "model.model.spec.position.rope[layer].base: the positions of this model are not rotary",
    "num_experts": "nothing: no supported model has experts",
    "experts_per_token": "nothing: no supported model has experts",
    "architecture": "model.model.spec.family",
    "post_embedding_ln": "nothing: no supported model has it",
}


@dataclass(frozen=True, kw_only=True)
class HookedConfig:
    """What notebooks read from ``model.cfg``.

    ``n_key_value_heads`` is ``None`` where every head has its own. ``n_params`` counts the matrices of the blocks:
    neither embeddings nor biases nor norms. ``rotary_dim`` and ``rotary_base`` are the first
    layer's. The softcaps are -1 where there is none. ``window_size`` is the narrowest window of ``attn_types``.
    """

    model_name: str
    tokenizer_name: str | None
    original_architecture: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int | None
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    n_params: int
    eps: float
    act_fn: str
    gated_mlp: bool
    normalization_type: str
    final_rms: bool
    uses_rms_norm: bool
    use_normalization_before_and_after: bool
    use_qk_norm: bool
    positional_embedding_type: str
    parallel_attn_mlp: bool
    attn_only: bool
    attention_dir: str
    attn_scale: float
    use_attn_scale: bool
    use_local_attn: bool
    window_size: int | None
    attn_types: list[str] | None
    attn_scores_soft_cap: float
    output_logits_soft_cap: float
    device: torch.device
    n_devices: int
    dtype: torch.dtype
    default_prepend_bos: bool
    default_padding_side: str
    use_attn_result: bool
    use_attn_in: bool
    use_split_qkv_input: bool
    use_hook_mlp_in: bool
    rotary: tuple[int, float] | None = dataclasses.field(default=None, repr=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        rotary = self.__dict__.get("rotary")
        if rotary is not None and name in ("rotary_dim", "rotary_base"):
            return rotary[name == "rotary_base"]
        if name in INSTEAD:
            raise AttributeError(f"model.cfg has no {name!r}; what there is: {INSTEAD[name]}")
        raise AttributeError(
            f"model.cfg has no {name!r}{nearest(name, self.__dict__)} (model.model.spec has the whole architecture)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as a dictionary."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rotary = values.pop("rotary")
        return values if rotary is None else values | {"rotary_dim": rotary[0], "rotary_base": rotary[1]}


def config_of(model: Model, flags: set[str], default_prepend_bos: bool) -> HookedConfig:
    """Returns the settings of a model as TransformerLens names them."""
    spec, attention = model.spec, model.spec.attention
    folded = model.weights.ln_final.w is None
    kind = {"layer": "LN", "rms": "RMS"}[spec.norm.kind]
    windows = [window for window in attention.window if window is not None]
    rope = spec.position.rope[0] if spec.position.rope else None
    matrices = 3 if spec.mlp.kind == "gated" else 2
    heads = 2 * attention.n_heads + 2 * attention.n_kv_heads
    return HookedConfig(
        model_name=model.origin.source,
        tokenizer_name=getattr(model.tokenizer, "name_or_path", None) or None,
        original_architecture=spec.family,
        n_layers=spec.n_layers,
        n_heads=attention.n_heads,
        n_key_value_heads=None if attention.group == 1 else attention.n_kv_heads,
        d_model=spec.d_model,
        d_head=attention.d_head,
        d_mlp=spec.mlp.d_mlp,
        d_vocab=spec.d_vocab,
        d_vocab_out=spec.d_vocab,
        n_ctx=spec.n_ctx,
        n_params=spec.n_layers * spec.d_model * (heads * attention.d_head + matrices * spec.mlp.d_mlp),
        eps=spec.norm.eps,
        act_fn=ACT_FN[spec.mlp.activation],
        gated_mlp=spec.mlp.kind == "gated",
        normalization_type=kind + "Pre" if folded else kind,
        final_rms=spec.norm.kind == "rms",
        uses_rms_norm=spec.norm.kind == "rms",
        use_normalization_before_and_after=spec.post_norms,
        use_qk_norm=attention.qk_norm,
        positional_embedding_type={"learned": "standard", "rotary": "rotary"}[spec.position.kind],
        parallel_attn_mlp=spec.parallel,
        attn_only=False,
        attention_dir="causal",
        attn_scale=1.0 / attention.scale,
        use_attn_scale=attention.scale != 1.0,
        use_local_attn=bool(windows),
        window_size=min(windows, default=None),
        attn_types=["global" if window is None else "local" for window in attention.window] if windows else None,
        attn_scores_soft_cap=NO_SOFTCAP if attention.softcap is None else attention.softcap,
        output_logits_soft_cap=NO_SOFTCAP if spec.final_softcap is None else spec.final_softcap,
        device=model.device,
        n_devices=1,
        dtype=model.dtype,
        default_prepend_bos=default_prepend_bos,
        default_padding_side="right",
        use_attn_result="use_attn_result" in flags,
        use_attn_in="use_attn_in" in flags,
        use_split_qkv_input="use_split_qkv_input" in flags,
        use_hook_mlp_in="use_hook_mlp_in" in flags,
        rotary=None if rope is None else (rope.dims, rope.base),
    )
