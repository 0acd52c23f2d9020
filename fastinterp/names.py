"""Activation names, the dims they have, and the TransformerLens hook point each stands for."""

from dataclasses import dataclass
from typing import Literal

from fastinterp.errors import SiteRangeError, UnknownActivationError, nearest

RESID: tuple[str, ...] = ("batch", "pos", "d_model")


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One place of the forward that can be read or replaced.

    ``dims`` are the axes of the tensor; ``hook`` is the TransformerLens hook point, ``{layer}`` filled in per layer.
    """

    name: str
    dims: tuple[str, ...]
    hook: str
    per_layer: bool = True


def _block(name: str, dims: tuple[str, ...], hook: str) -> Activation:
    return Activation(name=name, dims=dims, hook="blocks.{layer}." + hook)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(name="embed", dims=RESID, hook="hook_embed", per_layer=False),
        Activation(name="pos_embed", dims=RESID, hook="hook_pos_embed", per_layer=False),
        _block("resid_pre", RESID, "hook_resid_pre"),
        _block("ln1_scale", ("batch", "pos", "one"), "ln1.hook_scale"),
        _block("ln1_normalized", RESID, "ln1.hook_normalized"),
        _block("q", ("batch", "pos", "head", "d_head"), "attn.hook_q"),
        _block("k", ("batch", "pos", "kv_head", "d_head"), "attn.hook_k"),
        _block("v", ("batch", "pos", "kv_head", "d_head"), "attn.hook_v"),
        _block("attn_scores", ("batch", "head", "query_pos", "key_pos"), "attn.hook_attn_scores"),
        _block("pattern", ("batch", "head", "query_pos", "key_pos"), "attn.hook_pattern"),
        _block("z", ("batch", "pos", "head", "d_head"), "attn.hook_z"),
        _block("result", ("batch", "pos", "head", "d_model"), "attn.hook_result"),
        _block("attn_out", RESID, "hook_attn_out"),
        _block("resid_mid", RESID, "hook_resid_mid"),
        _block("ln2_scale", ("batch", "pos", "one"), "ln2.hook_scale"),
        _block("ln2_normalized", RESID, "ln2.hook_normalized"),
        _block("pre", ("batch", "pos", "d_mlp"), "mlp.hook_pre"),
        _block("pre_linear", ("batch", "pos", "d_mlp"), "mlp.hook_pre_linear"),
        _block("post", ("batch", "pos", "d_mlp"), "mlp.hook_post"),
        _block("mlp_out", RESID, "hook_mlp_out"),
        _block("resid_post", RESID, "hook_resid_post"),
        Activation(name="ln_final_scale", dims=("batch", "pos", "one"), hook="ln_final.hook_scale", per_layer=False),
        Activation(name="ln_final_normalized", dims=RESID, hook="ln_final.hook_normalized", per_layer=False),
    )
}


def activation(name: str) -> Activation:
    """Returns the activation called ``name``; raises :class:`UnknownActivationError` with the nearest names."""
    if name not in ACTIVATIONS:
        raise UnknownActivationError(
            f"there is no activation {name!r}{nearest(name, ACTIVATIONS)} (all: {', '.join(ACTIVATIONS)})"
        )
    return ACTIVATIONS[name]


def check_index(what: Literal["layer", "head", "kv_head", "neuron"], index: int, size: int) -> int:
    """Returns ``index`` counted from the start (negatives from the end); raises :class:`SiteRangeError`."""
    if not -size <= index < size:
        raise SiteRangeError(f"{what} {index} is out of range: the model has {size} (0 to {size - 1})")
    return index % size


def head_label(layer: int, head: int) -> str:
    """Returns the label of a head as TransformerLens prints it, such as ``L9H6``."""
    return f"L{layer}H{head}"


def residual_labels(n_layers: int, *, has_pos_embed: bool) -> list[str]:
    """Labels of the additive components of the final residual, in the order in which they are written."""
    labels = ["embed", "pos_embed"] if has_pos_embed else ["embed"]
    for layer in range(n_layers):
        labels += [f"{layer}_attn_out", f"{layer}_mlp_out"]
    return labels


def accumulated_labels(n_layers: int) -> list[str]:
    """Labels of the residual stream as it builds up: ``0_pre, 0_mid, 1_pre, ..., final_post``."""
    labels = []
    for layer in range(n_layers):
        labels += [f"{layer}_pre", f"{layer}_mid"]
    return [*labels, "final_post"]
