"""THE forward. Everything that fastinterp computes goes through it, or through the block it is made of.

    tokens -> embed -> [norm -> attention -> +] [norm -> MLP -> +] x n_layers -> norm -> unembed -> logits

No family is named here: ``ModelSpec`` decides. ``taps`` reads and replaces activations on the way.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fastinterp.errors import OptionError, UnknownActivationError
from fastinterp.model.attention import Frame, attend, attend_from, continuing_frame, make_frame, project_qkv
from fastinterp.model.decode import KeyValueCache
from fastinterp.model.intervene import NO_TAPS, Taps
from fastinterp.model.mlp import mlp_residual
from fastinterp.model.norms import tapped_norm, write_norm
from fastinterp.model.prefix import PrefixTree, prefix_tree
from fastinterp.model.products import affine
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights, Weights

# What forward_at can capture: everything that is one row per token, in the last block as in the others.
PACKED_SITES = frozenset(
    {
        "embed",
        "pos_embed",
        "resid_pre",
        "z",
        "attn_raw",
        "ln1_post_scale",
        "attn_out",
        "resid_mid",
        "mlp_in",
        "pre",
        "pre_linear",
        "post",
        "mlp_raw",
        "ln2_post_scale",
        "mlp_out",
        "resid_post",
    }
)


def forward(
    spec: ModelSpec, weights: Weights, tokens: Int[Tensor, "batch pos"], *, taps: Taps = NO_TAPS
) -> Float[Tensor, "batch pos d_model"]:
    """Returns the final residual stream, before the last norm (see :func:`final_logits`).

    Sequences are padded on the right with any valid token; nothing real attends to padding. Memory: a few
    ``[batch, pos, d_mlp]`` tensors plus what the taps keep.
    """
    check_taps(spec, taps)
    resid = embed(weights, tokens, taps)
    frame = make_frame(spec, tokens.shape[1], device=resid.device, dtype=resid.dtype)
    return run_blocks(spec, weights, resid, frame, taps)


def extend(
    spec: ModelSpec,
    weights: Weights,
    tokens: Int[Tensor, "batch new"],
    n_new: Int[Tensor, " batch"],
    past: KeyValueCache,
    *,
    taps: Taps = NO_TAPS,
) -> Float[Tensor, "batch new d_model"]:
    """Continues sequences whose keys and values are in ``past``, and adds those of the new tokens to it.

    Returns the final residual of the new tokens; of row ``b`` only the first ``n_new[b]`` count, the rest is padding.
    """
    check_taps(spec, taps)
    resid = embed(weights, tokens, taps, positions=past.positions(tokens.shape[1]))
    frame = continuing_frame(spec, past, tokens.shape[1], dtype=resid.dtype)
    resid = run_blocks(spec, weights, resid, frame, taps)
    past.advance(n_new)
    return resid


def forward_at(
    spec: ModelSpec,
    weights: Weights,
    tokens: Int[Tensor, "batch pos"],
    n_tokens: Int[Tensor, " batch"],
    at: Int[Tensor, " batch"],
    *,
    taps: Taps = NO_TAPS,
) -> Float[Tensor, "batch d_model"]:
    """Returns the final residual at one position per prompt, and captures activations there: ``[batch, ...]``.

    The same numbers as :func:`forward`, with less work: equal beginnings of the prompts are computed once, padding not
    at all, and of the last block only keys and values everywhere. Captures can be of the residual stream and what is
    written to it (``PACKED_SITES``); other taps, and edits, raise :class:`~fastinterp.errors.OptionError`.
    """
    unfit = sorted({name for name, _ in taps.wanted} - PACKED_SITES) + sorted(name for name, _ in taps.edits)
    if unfit:
        raise OptionError(
            f"forward_at cannot tap {unfit[0]!r} (only capture {', '.join(sorted(PACKED_SITES))}): use forward"
        )
    check_taps(spec, taps)
    tree = prefix_tree(tokens, n_tokens)
    taps = dataclasses.replace(taps, at=(torch.zeros_like(at), tree.nodes_at(at)))
    resid = embed(weights, tokens, taps, tree)
    frame = make_frame(spec, tree.n_pos, device=resid.device, dtype=resid.dtype, tree=tree)
    resid = run_blocks(spec, weights, resid, frame, taps, stop=spec.n_layers - 1)
    return block_at(spec, weights.blocks[-1], spec.n_layers - 1, resid, frame, at, taps).squeeze(0)


def check_taps(spec: ModelSpec, taps: Taps) -> None:
    """Raises :class:`~fastinterp.errors.UnknownActivationError` for what this architecture does not have."""
    for name, layer in {*taps.wanted, *taps.edits}:
        reason = missing_because(spec, name)
        if reason:
            where = name if layer is None else f"{name} of layer {layer}"
            raise UnknownActivationError(f"there is no {where} in a {spec.family} model: {reason}")


def missing_because(spec: ModelSpec, name: str) -> str | None:
    """Says why this architecture does not have an activation, or returns ``None`` if it has it."""
    if spec.parallel and name == "resid_mid":
        return "its attention and MLP read the same residual; use resid_pre, or attn_out and mlp_out"
    if not spec.post_norms and name.startswith(("ln1_post", "ln2_post")):
        return "nothing is normalised after attention and MLP"
    if spec.position.kind != "rotary" and name in ("rot_q", "rot_k"):
        return "its queries and keys are not rotated; use q and k"
    if spec.position.kind != "learned" and name == "pos_embed":
        return "it has no position embedding"
    if spec.mlp.kind == "plain" and name == "pre_linear":
        return "its MLP has no gate; use pre"
    return None


def embed(
    weights: Weights,
    tokens: Int[Tensor, "batch pos"],
    taps: Taps = NO_TAPS,
    tree: PrefixTree | None = None,
    *,
    positions: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Returns the residual stream before the first block; positions count from each sequence's first token.

    With a ``tree`` it is packed: ``[1, node, d_model]``. ``positions`` are other ones than ``0, 1, 2, ...``.
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    if tree is not None:
        tokens, positions = tokens[tree.row, tree.pos][None], tree.pos
    resid = taps("embed", None, F.embedding(tokens, weights.W_E))
    if weights.W_pos is not None:
        resid = resid + taps("pos_embed", None, weights.W_pos[positions].expand_as(resid))
    return resid


def run_blocks(
    spec: ModelSpec,
    weights: Weights,
    resid: Float[Tensor, "*rows d_model"],
    frame: Frame,
    taps: Taps = NO_TAPS,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Returns the residual stream in front of block ``stop`` (or after the last), given it in front of ``start``."""
    for layer in range(start, spec.n_layers if stop is None else stop):
        resid = block(spec, weights.blocks[layer], layer, resid, frame, taps)
    return resid


def block(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    frame: Frame,
    taps: Taps = NO_TAPS,
) -> Float[Tensor, "batch pos d_model"]:
    """Returns the residual stream after block ``layer``."""
    resid = taps("resid_pre", layer, resid)
    # No name here keeps queries, keys, values or z: they are freed before the MLP, whose hidden layer is the largest.
    # Nor does a call with *arguments: attention goes on with copies of them.
    left = list(project_qkv(spec, w, layer, resid, frame, taps))
    return _after_attention(
        spec, w, layer, resid, attend(spec, layer, left.pop(0), left.pop(0), left.pop(0), frame, taps), taps
    )


def block_at(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    resid: Float[Tensor, "variant node d_model"],
    frame: Frame,
    at: Int[Tensor, " batch"],
    taps: Taps = NO_TAPS,
) -> Float[Tensor, "variant batch d_model"]:
    """Returns the residual after block ``layer`` at one position per prompt, from a packed residual.

    In the last block, where only some positions are read, keys and values are all that is needed everywhere.
    """
    assert frame.tree is not None
    resid = taps("resid_pre", layer, resid)
    q, k, v = project_qkv(spec, w, layer, resid, frame, NO_TAPS)
    last = frame.tree.nodes_at(at)
    z = attend_from(spec, layer, q[:, last], k, v, frame, at, NO_TAPS)
    del q, k, v
    # From here on there is one row per prompt. A single one is doubled: by itself a product sums it in another order.
    rows = torch.arange(len(at), device=at.device)
    if alone := z.shape[:2].numel() == 1:
        z, last = z.expand(1, 2, -1, -1), last.expand(2)
    taps = dataclasses.replace(taps, at=(torch.zeros_like(rows), rows))
    resid = _after_attention(spec, w.multiplied_by(w.products.at(last)), layer, resid[:, last], z, taps)
    return resid[:, :1] if alone else resid


def _after_attention(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    resid: Float[Tensor, "*rows d_model"],
    z: Float[Tensor, "*rows head d_head"],
    taps: Taps,
) -> Float[Tensor, "*rows d_model"]:
    """The rest of a block, row by row."""
    attn_raw = taps("attn_raw", layer, mix_heads(w, layer, taps("z", layer, z), taps))
    attn_out = taps("attn_out", layer, write_norm(spec, "ln1_post", layer, attn_raw, w.ln1_post, taps))
    after = resid + attn_out
    del z, attn_raw, attn_out
    if spec.parallel:
        return mlp_residual(spec, w, layer, resid, taps, after=after, reuse=True)
    reuse = not taps.wants("resid_mid", layer)
    return mlp_residual(spec, w, layer, taps("resid_mid", layer, after), taps, reuse=reuse)


def mix_heads(
    w: BlockWeights, layer: int, z: Float[Tensor, "*rows head d_head"], taps: Taps = NO_TAPS
) -> Float[Tensor, "*rows d_model"]:
    """Returns ``attn_out = sum_h z_h W_O[h] + b_O``; per-head ``result`` only if somebody wants it."""
    if not taps.wants("result", layer):
        return w.products("W_O", z.flatten(-2), w.W_O.flatten(0, 1), w.b_O)
    result = taps("result", layer, torch.einsum("...he,hed->...hd", z, w.W_O))
    attn_out = result.sum(-2)
    return attn_out if w.b_O is None else attn_out + w.b_O


def final_logits(
    spec: ModelSpec, weights: Weights, resid: Float[Tensor, "*rows d_model"], *, taps: Taps = NO_TAPS
) -> Float[Tensor, "*rows d_vocab"]:
    """Returns the logits of a final residual. Memory: ``d_vocab`` per row; metrics and analyses do without it."""
    logits = affine(tapped_norm(spec, "ln_final", None, resid, weights.ln_final, taps), weights.W_U, weights.b_U)
    return logits if spec.final_softcap is None else spec.final_softcap * torch.tanh(logits / spec.final_softcap)
