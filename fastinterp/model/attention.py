"""Grouped-query causal attention: from the residual to ``z``, the mixed values of every head."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastinterp.errors import OptionError
from fastinterp.model.decode import KeyValueCache
from fastinterp.model.intervene import Taps
from fastinterp.model.norms import normalize, rms_norm, tapped_norm
from fastinterp.model.prefix import PrefixTree
from fastinterp.model.rope import rope_tables, rotate
from fastinterp.model.spec import ModelSpec, Rope
from fastinterp.model.weights import BlockWeights


@dataclass(frozen=True, kw_only=True)
class SharedKeys:
    """Keys and values, as attention takes them, of what stands in front of position ``start`` of each sequence.

    The rows ``[variant, node, ...]`` of a frame that has them are ``width`` positions from ``start`` on, sequence by
    sequence. Keys at ``start`` and behind are not looked at.
    """

    start: Int[Tensor, " batch"]
    width: int
    k: Float[Tensor, "batch key_pos kv_head d_head"]
    v: Float[Tensor, "batch key_pos kv_head d_head"]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What depends on the shape of the batch alone: rotary tables, and masks for windows shorter than the sequence.

    Prompts are padded on the right, so the causal mask already keeps padding from real tokens. With a ``tree`` the
    residual stream is packed, ``[variant, node, d_model]`` instead of ``[batch, pos, d_model]``: everything but the
    attention itself then acts per node, and the rotary tables are per node. With a ``past`` the tokens continue
    sequences whose keys and values are known; masks then have a batch axis. With ``shared`` the rows are the ends of
    sequences, whose beginnings all variants have in common.
    """

    n_pos: int
    rotations: Mapping[Rope, tuple[Tensor, Tensor]]
    masks: Mapping[int | None, Bool[Tensor, "*batch query_pos key_pos"]]
    tree: PrefixTree | None = None
    past: KeyValueCache | None = None
    shared: SharedKeys | None = None

    def mask(self, window: int | None) -> Bool[Tensor, "*batch query_pos key_pos"]:
        """True where a query may look."""
        return self.masks[window if window is not None and window < self.n_pos else None]


def make_frame(
    spec: ModelSpec,
    n_pos: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tree: PrefixTree | None = None,
    positions: Int[Tensor, " node"] | None = None,
) -> Frame:
    """Builds the tables for sequences of ``n_pos`` tokens, packed if there is a ``tree``.

    ``positions`` are those of rows that are no whole sequences; attention then needs ``shared`` keys.
    """
    everywhere = torch.arange(n_pos, device=device)
    if positions is None:
        positions = everywhere if tree is None else tree.pos
    return Frame(
        n_pos=n_pos,
        rotations=_rotations(spec, positions, dtype),
        masks=_masks(spec, everywhere, n_pos),
        tree=tree,
    )


def continuing_frame(spec: ModelSpec, past: KeyValueCache, n_new: int, *, dtype: torch.dtype) -> Frame:
    """Builds the tables for ``n_new`` more tokens of every sequence of a cache."""
    positions = past.positions(n_new)
    n_keys = past.n_keys(n_new)
    return Frame(
        n_pos=n_keys,
        rotations=_rotations(spec, positions, dtype),
        masks=_masks(spec, positions, n_keys),
        past=past,
    )


def _rotations(
    spec: ModelSpec, positions: Int[Tensor, "*rows"], dtype: torch.dtype
) -> dict[Rope, tuple[Tensor, Tensor]]:
    return {rope: rope_tables(rope, positions, dtype=dtype) for rope in dict.fromkeys(spec.position.rope)}


def _masks(
    spec: ModelSpec, positions: Int[Tensor, "*batch query_pos"], n_keys: int
) -> dict[int | None, Bool[Tensor, "*batch query_pos key_pos"]]:
    distance = positions[..., :, None] - torch.arange(n_keys, device=positions.device)
    masks: dict[int | None, Tensor] = {None: distance >= 0}
    for window in set(spec.attention.window):
        if window is not None and window < n_keys:
            masks[window] = (distance >= 0) & (distance < window)
    return masks


def project_qkv(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    frame: Frame,
    taps: Taps,
) -> tuple[
    Float[Tensor, "batch pos head d_head"],
    Float[Tensor, "batch pos kv_head d_head"],
    Float[Tensor, "batch pos kv_head d_head"],
]:
    """Returns queries, keys and values; the taps ``q`` and ``k`` see them before their norm and rotation."""
    attention = spec.attention
    x = tapped_norm(spec, "ln1", layer, resid, w.ln1, taps)
    qkv = w.products("W_QKV", x, w.W_QKV, w.b_QKV).unflatten(-1, (-1, attention.d_head))
    n, n_kv = attention.n_heads, attention.n_kv_heads
    # Three views rather than one split: hooks may then change them in place where gradients are recorded.
    q, k, v = qkv[..., :n, :], qkv[..., n : n + n_kv, :], qkv[..., n + n_kv :, :]
    if taps.wants_any(SPLIT_INPUTS, layer):
        q, k, v = _from_split_inputs(spec, w, layer, resid, taps, (q, k, v))
    q, k, v = taps("q", layer, q), taps("k", layer, k), taps("v", layer, v)
    q, k = ready(spec, layer, q, w.q_norm, frame), ready(spec, layer, k, w.k_norm, frame)
    if spec.position.kind == "rotary":
        q, k = taps("rot_q", layer, q), taps("rot_k", layer, k)
    return q, k, v


def ready(
    spec: ModelSpec,
    layer: int,
    x: Float[Tensor, "*rows head d_head"],
    norm_weights: Float[Tensor, " d_head"] | None,
    frame: Frame,
) -> Float[Tensor, "*rows head d_head"]:
    """Returns queries or keys as the attention takes them: with their norm and their rotation, where there are such."""
    if norm_weights is not None:
        x = rms_norm(spec.norm, x, norm_weights)
    if spec.position.kind == "rotary":
        rope = spec.position.rope[layer]
        x = rotate(rope, x, *frame.rotations[rope])
    return x


SPLIT_INPUTS = ("attn_in", "q_input", "k_input", "v_input")
SHARED_NORM = ("ln1_scale", "ln1_normalized")


def check_split_inputs(spec: ModelSpec, layer: int, edited: Collection[str]) -> None:
    """Raises :class:`~fastinterp.errors.OptionError` for sites of a layer that cannot be edited in one run."""
    if "attn_in" in edited and spec.attention.group > 1:
        raise _unclear_copies(spec, layer)
    # attn_in is the input of queries, keys and values.
    name = "q_input" if "attn_in" in edited else next((name for name in SPLIT_INPUTS if name in edited), None)
    norm = next((norm for norm in SHARED_NORM if norm in edited), None)
    if name is not None and norm is not None:
        raise _two_norms(layer, norm, name)


def _unclear_copies(spec: ModelSpec, layer: int) -> OptionError:
    return OptionError(
        f"attn_in of layer {layer} cannot be hooked: {spec.attention.n_heads} query heads share "
        f"{spec.attention.n_kv_heads} KV heads, and it is not clear whose copy those read; use q_input, k_input, "
        "v_input"
    )


def _two_norms(layer: int, norm: str, name: str) -> OptionError:
    return OptionError(
        f"{norm} of layer {layer} is replaced, but {name} gives every head a norm of its own: hook one or the other"
    )


def _from_split_inputs(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    taps: Taps,
    projected: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor]:
    """Queries, keys and values where every head's own copy of the residual is tapped.

    A copy that is only read is a view, and costs nothing; one that was replaced, or that a gradient shall flow to, is
    normalised and projected head by head.
    """
    attention = spec.attention
    shared = resid.unsqueeze(-2).expand(*resid.shape[:-1], attention.n_heads, -1)
    attn_in = taps("attn_in", layer, shared)
    wanted = taps.wants("attn_in", layer) and (attention.group == 1 or ("attn_in", layer) in taps.edits)
    common = attn_in is not shared or (attn_in.requires_grad and wanted)
    if common and attention.group > 1:
        raise _unclear_copies(spec, layer)
    n_kv = attention.n_kv_heads
    results = []
    for name, n_heads, W, b, done in (
        ("q_input", attention.n_heads, w.W_Q, w.b_Q, projected[0]),
        ("k_input", n_kv, w.W_K, w.b_K, projected[1]),
        ("v_input", n_kv, w.W_V, w.b_V, projected[2]),
    ):
        seen = attn_in if common else resid.unsqueeze(-2).expand(*resid.shape[:-1], n_heads, -1)
        own = taps(name, layer, seen)
        if common or own is not seen or (own.requires_grad and taps.wants(name, layer)):
            for norm in SHARED_NORM:
                if taps.changes(norm, layer):
                    raise _two_norms(layer, norm, name)
            done = torch.einsum("...hd,hde->...he", normalize(spec.norm, own, w.ln1), W)
            done = done if b is None else done + b
        results.append(done)
    return results


def attend(
    spec: ModelSpec,
    layer: int,
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch pos kv_head d_head"],
    v: Float[Tensor, "batch pos kv_head d_head"],
    frame: Frame,
    taps: Taps,
) -> Float[Tensor, "batch pos head d_head"]:
    """Returns ``z = softmax(scale * q k^T + mask) v`` per head; fused unless scores or pattern are tapped or capped.

    Packed queries, keys and values are spread over the prompts for this and ``z`` is packed again.
    """
    if frame.shared is not None:
        assert not taps.wants_any(("attn_scores", "pattern"), layer), "scores and patterns are those of whole sequences"
        return attend_behind(spec, layer, q, k, v, frame.shared)
    if (tree := frame.tree) is not None:
        spread = dataclasses.replace(frame, tree=None)
        # One after the other: what was packed is freed, where each has memory of its own.
        q = tree.spread(q).flatten(0, 1)
        k = tree.spread(k).flatten(0, 1)
        v = tree.spread(v).flatten(0, 1)
        return tree.pack(attend(spec, layer, q, k, v, spread, taps).unflatten(0, (-1, len(tree.node))))
    if frame.past is not None:
        k, v = frame.past.extended(layer, k, v, frame.n_pos)
    window = spec.attention.window[layer]
    causal = frame.past is None and (window is None or window >= frame.n_pos)
    mask = frame.mask(window)
    return _mix(spec, layer, q, k, v, mask if mask.ndim == 2 else mask.unsqueeze(1), taps, is_causal=causal)


def attend_behind(
    spec: ModelSpec,
    layer: int,
    q: Float[Tensor, "variant node head d_head"],
    k: Float[Tensor, "variant node kv_head d_head"],
    v: Float[Tensor, "variant node kv_head d_head"],
    shared: SharedKeys,
) -> Float[Tensor, "variant node head d_head"]:
    """Like :func:`attend` for the ends of sequences, whose beginnings all variants share.

    One product per sequence and KV head gives the scores of all variants' queries with the shared keys. Memory: the
    scores, ``variant * node * head * (key_pos + width)``.
    """
    attention, width = spec.attention, shared.width
    n_variants, n_kv, group, d_head = len(q), attention.n_kv_heads, attention.group, attention.d_head
    n_batch, n_shared = len(shared.start), int(shared.start.max())
    # [batch, kv_head, variant, width, group, ..]: the rows of one product lie together.
    queries = q.view(n_variants, n_batch, width, n_kv, group, d_head).permute(1, 3, 0, 2, 4, 5).contiguous()
    own_k, own_v = (x.unflatten(1, (n_batch, width)).permute(1, 3, 0, 2, 4) for x in (k, v))
    common_k, common_v = (x[:, :n_shared].transpose(1, 2) for x in (shared.k, shared.v))
    scores = q.new_empty(*queries.shape[:-1], n_shared + width)
    scores[..., :n_shared] = (queries.flatten(2, 4) @ common_k.transpose(-1, -2)).unflatten(2, queries.shape[2:5])
    scores[..., n_shared:] = (queries.flatten(3, 4) @ own_k.transpose(-1, -2)).unflatten(3, (width, group))
    scores *= attention.scale
    if attention.softcap is not None:
        scores = scores.div_(attention.softcap).tanh_().mul_(attention.softcap)
    allowed = _behind_mask(shared, n_shared, attention.window[layer])
    pattern = scores.masked_fill_(~allowed[:, None, None, :, None], -torch.inf).softmax(-1)
    z = (pattern[..., :n_shared].flatten(2, 4) @ common_v).unflatten(2, queries.shape[2:5])
    z = z + (pattern[..., n_shared:].flatten(3, 4) @ own_v).unflatten(3, (width, group))
    mixed: Tensor = z.permute(2, 0, 3, 1, 4, 5).reshape(q.shape)
    return mixed


def _behind_mask(shared: SharedKeys, n_shared: int, window: int | None) -> Bool[Tensor, "batch width shared_and_width"]:
    """Where a query may look: at what stands in front of its sequence's start, and at its own rows up to itself."""
    step = torch.arange(shared.width, device=shared.start.device)
    position = torch.arange(n_shared, device=shared.start.device)
    distance = (shared.start[:, None] + step)[..., None] - position
    before = (position < shared.start[:, None])[:, None].expand_as(distance)
    own = (step[:, None] - step).expand(len(shared.start), -1, -1)
    if window is not None:
        before = before & (distance < window)
    inside = (own >= 0) if window is None else (own >= 0) & (own < window)
    return torch.cat([before, inside], dim=-1)


def attend_from(
    spec: ModelSpec,
    layer: int,
    q: Float[Tensor, "variant batch head d_head"],
    k: Float[Tensor, "variant node kv_head d_head"],
    v: Float[Tensor, "variant node kv_head d_head"],
    frame: Frame,
    query_pos: Int[Tensor, " batch"],
    taps: Taps,
) -> Float[Tensor, "variant batch head d_head"]:
    """Like :func:`attend` for packed keys and values, with one query per prompt, at ``query_pos``."""
    tree = frame.tree
    assert tree is not None
    n_variants = len(q)
    k, v = (tree.spread(part).flatten(0, 1) for part in (k, v))
    allowed = frame.mask(spec.attention.window[layer])[query_pos].repeat(n_variants, 1)
    z = _mix(spec, layer, q.flatten(0, 1).unsqueeze(1), k, v, allowed[:, None, None, :], taps, is_causal=False)
    apart: Tensor = z.squeeze(1).unflatten(0, (n_variants, -1))
    return apart


def _mix(
    spec: ModelSpec,
    layer: int,
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    mask: Bool[Tensor, "*#batch query_pos key_pos"],
    taps: Taps,
    *,
    is_causal: bool,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """The attention itself. ``is_causal`` says that the mask is the plain causal one, which needs no tensor."""
    attention = spec.attention
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if attention.softcap is None and not taps.wants_any(("attn_scores", "pattern"), layer):
        z: Tensor = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if is_causal else mask,
            is_causal=is_causal,
            scale=attention.scale,
            enable_gqa=attention.group > 1,
        )
        return z.transpose(1, 2)
    scores = taps("attn_scores", layer, attention_scores(spec, q, k, mask))
    pattern = taps("pattern", layer, scores.softmax(-1))
    n_kv, group = attention.n_kv_heads, attention.group
    z = pattern.unflatten(1, (n_kv, group)).flatten(2, 3) @ v
    mixed: Tensor = z.unflatten(2, (group, -1)).flatten(1, 2).transpose(1, 2)
    return mixed


def attention_scores(
    spec: ModelSpec,
    q: Float[Tensor, "batch head query_pos d_head"],
    k: Float[Tensor, "batch kv_head key_pos d_head"],
    mask: Bool[Tensor, "*#batch query_pos key_pos"],
) -> Float[Tensor, "batch head query_pos key_pos"]:
    """Returns what the softmax is taken of: -inf where a query may not look."""
    attention = spec.attention
    # The queries of a group as more rows of one product, so that keys and values are not repeated.
    n_kv, group = attention.n_kv_heads, attention.group
    rows = q.unflatten(1, (n_kv, group)).flatten(2, 3)
    scores: Tensor = (rows @ k.transpose(-1, -2)).unflatten(2, (group, -1)).flatten(1, 2) * attention.scale
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    return scores.masked_fill(~mask, -torch.inf)
