"""Grouped-query causal attention: from the normalised residual to ``z``, the mixed values of every head."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastinterp.model.intervene import Taps
from fastinterp.model.prefix import PrefixTree
from fastinterp.model.rope import rope_tables, rotate
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights

STEADY_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What depends on the shape of the batch alone: rotary tables, and masks for windows shorter than the sequence.

    Prompts are padded on the right, so the causal mask already keeps padding from real tokens. With a ``tree`` the
    residual stream is packed, ``[variant, node, d_model]`` instead of ``[batch, pos, d_model]``: everything but the
    attention itself then acts per node, and the rotary tables are per node.
    """

    n_pos: int
    cos: Float[Tensor, "pos 1 half"] | None
    sin: Float[Tensor, "pos 1 half"] | None
    masks: dict[int | None, Bool[Tensor, "query_pos key_pos"]]
    tree: PrefixTree | None = None

    def mask(self, window: int | None) -> Bool[Tensor, "query_pos key_pos"]:
        """True where a query may look."""
        return self.masks[window if window is not None and window < self.n_pos else None]


def make_frame(
    spec: ModelSpec, n_pos: int, *, device: torch.device, dtype: torch.dtype, tree: PrefixTree | None = None
) -> Frame:
    """Builds the tables for sequences of ``n_pos`` tokens, packed if there is a ``tree``."""
    cos = sin = None
    if spec.position.kind == "rotary":
        cos, sin = rope_tables(spec.position, n_pos, device=device, dtype=dtype)
    positions = torch.arange(n_pos, device=device)
    distance = positions[:, None] - positions[None, :]
    masks: dict[int | None, Tensor] = {None: distance >= 0}
    for window in set(spec.attention.window):
        if window is not None and window < n_pos:
            masks[window] = (distance >= 0) & (distance < window)
    if tree is not None and cos is not None and sin is not None:
        cos, sin = cos[tree.pos], sin[tree.pos]
    return Frame(n_pos=n_pos, cos=cos, sin=sin, masks=masks, tree=tree)


def project_qkv(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    x: Float[Tensor, "batch pos d_model"],
    frame: Frame,
    taps: Taps,
) -> tuple[
    Float[Tensor, "batch pos head d_head"],
    Float[Tensor, "batch pos kv_head d_head"],
    Float[Tensor, "batch pos kv_head d_head"],
]:
    """Returns queries, keys and values; queries and keys are rotated, their taps see them before the rotation."""
    attention = spec.attention
    qkv = affine(x, w.W_QKV, w.b_QKV).unflatten(-1, (-1, attention.d_head))
    q, k, v = qkv.split([attention.n_heads, attention.n_kv_heads, attention.n_kv_heads], dim=-2)
    if taps.wants("q", layer):
        q = taps("q", layer, q)
    if taps.wants("k", layer):
        k = taps("k", layer, k)
    if taps.wants("v", layer):
        v = taps("v", layer, v)
    if frame.cos is not None and frame.sin is not None:
        q, k = rotate(q, frame.cos, frame.sin), rotate(k, frame.cos, frame.sin)
    return q, k, v


def attend(
    spec: ModelSpec,
    layer: int,
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch pos kv_head d_head"],
    v: Float[Tensor, "batch pos kv_head d_head"],
    frame: Frame,
    taps: Taps,
) -> Float[Tensor, "batch pos head d_head"]:
    """Returns ``z = softmax(scale * q k^T + mask) v`` per head; fused unless scores or pattern are tapped.

    Packed queries, keys and values are spread over the prompts for this and ``z`` is packed again.
    """
    if (tree := frame.tree) is not None:
        spread = dataclasses.replace(frame, tree=None)
        q, k, v = (tree.spread(part).flatten(0, 1) for part in (q, k, v))
        return tree.pack(attend(spec, layer, q, k, v, spread, taps).unflatten(0, (-1, len(tree.node))))
    attention = spec.attention
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    window = attention.window[layer]
    windowed = window is not None and window < frame.n_pos
    if not (taps.wants("attn_scores", layer) or taps.wants("pattern", layer)):
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=frame.mask(window) if windowed else None,
            is_causal=not windowed,
            scale=attention.scale,
            enable_gqa=attention.group > 1,
        )
        return z.transpose(1, 2)
    k, v = (t.repeat_interleave(attention.group, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * attention.scale).masked_fill(~frame.mask(window), -torch.inf)
    scores = taps("attn_scores", layer, scores)
    pattern = taps("pattern", layer, scores.softmax(-1))
    return (pattern @ v).transpose(1, 2)


def attend_from(
    spec: ModelSpec,
    layer: int,
    q: Float[Tensor, "variant batch head d_head"],
    k: Float[Tensor, "variant node kv_head d_head"],
    v: Float[Tensor, "variant node kv_head d_head"],
    frame: Frame,
    query_pos: Int[Tensor, " batch"],
) -> Float[Tensor, "variant batch head d_head"]:
    """Like :func:`attend` for packed keys and values, with one query per prompt, at ``query_pos``."""
    attention, tree = spec.attention, frame.tree
    assert tree is not None
    k, v = (tree.spread(part).flatten(0, 1) for part in (k, v))
    allowed = frame.mask(attention.window[layer])[query_pos].repeat(len(q), 1)
    z = F.scaled_dot_product_attention(
        q.flatten(0, 1).unsqueeze(2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed[:, None, None, :],
        scale=attention.scale,
        enable_gqa=attention.group > 1,
    )
    return z.squeeze(2).view(q.shape)


def affine(
    x: Float[Tensor, "*rows n_in"], W: Float[Tensor, "n_in n_out"], b: Float[Tensor, " n_out"] | None
) -> Float[Tensor, "*rows n_out"]:
    """Returns ``x @ W + b``.

    On the CPU, a few rows go through the matrix product together with rows of zeros: the product of fewer than
    ``STEADY_ROWS`` rows is no faster, and sums in another order, so that a row's value would depend on its company.
    """
    n_rows = x.shape[:-1].numel()
    if x.device.type != "cpu" or not 1 < n_rows < STEADY_ROWS:
        return F.linear(x, W.t(), b)
    padded = F.pad(x.reshape(n_rows, -1), (0, 0, 0, STEADY_ROWS - n_rows))
    return F.linear(padded, W.t(), b)[:n_rows].view(*x.shape[:-1], -1)
