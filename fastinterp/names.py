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


HEADS: tuple[str, ...] = ("batch", "pos", "head", "d_head")
KV_HEADS: tuple[str, ...] = ("batch", "pos", "kv_head", "d_head")
HEAD_INPUT: tuple[str, ...] = ("batch", "pos", "head", "d_model")
KV_HEAD_INPUT: tuple[str, ...] = ("batch", "pos", "kv_head", "d_model")
SCALE: tuple[str, ...] = ("batch", "pos", "one")
SCORES: tuple[str, ...] = ("batch", "head", "query_pos", "key_pos")
NEURONS: tuple[str, ...] = ("batch", "pos", "d_mlp")

# In the order in which the forward comes to them.
ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation(name="embed", dims=RESID, hook="hook_embed", per_layer=False),
        Activation(name="pos_embed", dims=RESID, hook="hook_pos_embed", per_layer=False),
        _block("resid_pre", RESID, "hook_resid_pre"),
        _block("attn_in", HEAD_INPUT, "hook_attn_in"),
        _block("q_input", HEAD_INPUT, "hook_q_input"),
        _block("k_input", KV_HEAD_INPUT, "hook_k_input"),
        _block("v_input", KV_HEAD_INPUT, "hook_v_input"),
        _block("ln1_scale", SCALE, "ln1.hook_scale"),
        _block("ln1_normalized", RESID, "ln1.hook_normalized"),
        _block("q", HEADS, "attn.hook_q"),
        _block("k", KV_HEADS, "attn.hook_k"),
        _block("v", KV_HEADS, "attn.hook_v"),
        _block("rot_q", HEADS, "attn.hook_rot_q"),
        _block("rot_k", KV_HEADS, "attn.hook_rot_k"),
        _block("attn_scores", SCORES, "attn.hook_attn_scores"),
        _block("pattern", SCORES, "attn.hook_pattern"),
        _block("z", HEADS, "attn.hook_z"),
        _block("result", HEAD_INPUT, "attn.hook_result"),
        _block("attn_raw", RESID, "attn.hook_out"),
        _block("ln1_post_scale", SCALE, "ln1_post.hook_scale"),
        _block("ln1_post_normalized", RESID, "ln1_post.hook_normalized"),
        _block("attn_out", RESID, "hook_attn_out"),
        _block("resid_mid", RESID, "hook_resid_mid"),
        _block("mlp_in", RESID, "hook_mlp_in"),
        _block("ln2_scale", SCALE, "ln2.hook_scale"),
        _block("ln2_normalized", RESID, "ln2.hook_normalized"),
        _block("pre", NEURONS, "mlp.hook_pre"),
        _block("pre_linear", NEURONS, "mlp.hook_pre_linear"),
        _block("post", NEURONS, "mlp.hook_post"),
        _block("mlp_raw", RESID, "mlp.hook_out"),
        _block("ln2_post_scale", SCALE, "ln2_post.hook_scale"),
        _block("ln2_post_normalized", RESID, "ln2_post.hook_normalized"),
        _block("mlp_out", RESID, "hook_mlp_out"),
        _block("resid_post", RESID, "hook_resid_post"),
        Activation(name="ln_final_scale", dims=SCALE, hook="ln_final.hook_scale", per_layer=False),
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


def accumulated_labels(n_layers: int, *, has_mid: bool) -> list[str]:
    """Labels of the residual stream as it builds up: ``0_pre, 0_mid, 1_pre, ..., final_post``."""
    labels = []
    for layer in range(n_layers):
        labels += [f"{layer}_pre", f"{layer}_mid"] if has_mid else [f"{layer}_pre"]
    return [*labels, "final_post"]
