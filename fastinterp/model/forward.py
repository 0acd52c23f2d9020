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
from fastinterp.model.norms import tapped_norm
from fastinterp.model.prefix import PrefixTree, prefix_tree
from fastinterp.model.products import FEW_ROWS, STEADY_ROWS, Exact, affine
from fastinterp.model.spec import Activation, ModelSpec
from fastinterp.model.weights import BlockWeights, NormWeights, Weights

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

HIDDEN = frozenset({"pre", "pre_linear", "post"})
"""Sites of the hidden layer of an MLP."""

MLP_ROWS = 256


def mlp_rows(n_rows: int) -> int:
    """How many of the rows of an MLP are computed at a time on a CPU: a quarter, in multiples of ``MLP_ROWS``.

    As fast as all at once; much fewer are slower. But 8 of up to 16, which is as fast too: a run in so little memory
    has little beside its hidden layer. Never so that a single row is left: by itself a product sums it in another
    order. So of 9 rows 5, and of more one more.
    """
    if n_rows <= FEW_ROWS:
        return 5 if n_rows == STEADY_ROWS + 1 else STEADY_ROWS
    some = -(-n_rows // (4 * MLP_ROWS)) * MLP_ROWS
    return some + 1 if n_rows > some and n_rows % some == 1 else some


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
    return _after_attention(
        spec, w, layer, resid, attend(spec, layer, *project_qkv(spec, w, layer, resid, frame, taps), frame, taps), taps
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
        return mlp_residual(spec, w, layer, resid, taps, after=after)
    return mlp_residual(spec, w, layer, taps("resid_mid", layer, after), taps)


def mlp_residual(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    resid: Float[Tensor, "*rows d_model"],
    taps: Taps = NO_TAPS,
    *,
    after: Float[Tensor, "*rows d_model"] | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Returns ``resid_post``: the second half of a block.

    ``resid`` is what the MLP reads, ``resid_mid``; it writes to the same, or to ``after`` (parallel blocks).
    """
    # A tensor of its own, since its gradient is that of the MLP alone.
    mlp_in = taps("mlp_in", layer, resid.view_as(resid)) if taps.wants("mlp_in", layer) else resid
    x = tapped_norm(spec, "ln2", layer, mlp_in, w.ln2, taps)
    mlp_raw = taps("mlp_raw", layer, mlp(spec, w, layer, x, taps))
    mlp_out = taps("mlp_out", layer, write_norm(spec, "ln2_post", layer, mlp_raw, w.ln2_post, taps))
    return taps("resid_post", layer, (resid if after is None else after) + mlp_out)


def write_norm(
    spec: ModelSpec,
    name: str,
    layer: int,
    written: Float[Tensor, "*rows d_model"],
    weights: NormWeights | None,
    taps: Taps = NO_TAPS,
) -> Float[Tensor, "*rows d_model"]:
    """Returns what a sublayer adds to the residual: its output, through the post-norm where there is one."""
    return written if weights is None else tapped_norm(spec, name, layer, written, weights, taps)


def mix_heads(
    w: BlockWeights, layer: int, z: Float[Tensor, "*rows head d_head"], taps: Taps = NO_TAPS
) -> Float[Tensor, "*rows d_model"]:
    """Returns ``attn_out = sum_h z_h W_O[h] + b_O``; per-head ``result`` only if somebody wants it."""
    if not taps.wants("result", layer):
        return w.products("W_O", z.flatten(-2), w.W_O.flatten(0, 1), w.b_O)
    result = taps("result", layer, torch.einsum("...he,hed->...hd", z, w.W_O))
    attn_out = result.sum(-2)
    return attn_out if w.b_O is None else attn_out + w.b_O


def mlp(
    spec: ModelSpec, w: BlockWeights, layer: int, x: Float[Tensor, "*rows d_model"], taps: Taps = NO_TAPS
) -> Float[Tensor, "*rows d_model"]:
    """Returns the MLP's output for a normalised residual.

    Memory: ``d_mlp`` for ``mlp_rows`` rows at a time on a CPU, under ``torch.no_grad()`` and where nobody taps it.
    """
    if not _by_rows(w, x, taps, layer):
        hidden = w.products("W_gate_in", x, w.W_gate_in, w.b_gate_in)
        if spec.mlp.kind == "plain":
            post = activate(spec.mlp.activation, taps("pre", layer, hidden))
        else:
            gate, linear = hidden.chunk(2, dim=-1)
            gate = activate(spec.mlp.activation, taps("pre", layer, gate))
            post = gate * taps("pre_linear", layer, linear)
            del gate, linear, hidden
        return w.products("W_out", taps("post", layer, post), w.W_out, w.b_out)
    n_rows = x.shape[:-1].numel()
    some = mlp_rows(n_rows)
    if n_rows <= some:
        return _mlp_of_some(spec, w, x)
    rows = x.reshape(n_rows, -1)
    # Not like the rows: autocast decides the dtype, and vmap whether there is one output or many.
    piece = _mlp_of_some(spec, w, rows[:some])
    out = piece.new_empty(n_rows, piece.shape[-1])
    out[:some] = piece
    del piece
    for first in range(some, n_rows, some):
        out[first : first + some] = _mlp_of_some(spec, w, rows[first : first + some])
    return out.view(*x.shape[:-1], -1)


def _by_rows(w: BlockWeights, x: Tensor, taps: Taps, layer: int) -> bool:
    """Whether the rows of an MLP can be computed some at a time, and its hidden layer be overwritten."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and isinstance(w.products, Exact)
        and not taps.wants_any(HIDDEN, layer)
    )


def _mlp_of_some(spec: ModelSpec, w: BlockWeights, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    hidden = w.products("W_gate_in", x, w.W_gate_in, w.b_gate_in)
    if spec.mlp.kind == "plain":
        hidden = activate(spec.mlp.activation, hidden, inplace=True)
    else:
        gate, linear = hidden.chunk(2, dim=-1)
        hidden = activate(spec.mlp.activation, gate, inplace=True) * linear
        del gate, linear
    return w.products("W_out", hidden, w.W_out, w.b_out)


def activate(
    activation: Activation, x: Float[Tensor, "*rows d_mlp"], *, inplace: bool = False
) -> Float[Tensor, "*rows d_mlp"]:
    """The MLP's nonlinearity; with ``inplace``, ``x`` may be overwritten."""
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu_quick":
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return F.relu(x, inplace=inplace)
        case "silu":
            return F.silu(x, inplace=inplace)


def final_logits(
    spec: ModelSpec, weights: Weights, resid: Float[Tensor, "*rows d_model"], *, taps: Taps = NO_TAPS
) -> Float[Tensor, "*rows d_vocab"]:
    """Returns the logits of a final residual. Memory: ``d_vocab`` per row; metrics and analyses do without it."""
    logits = affine(tapped_norm(spec, "ln_final", None, resid, weights.ln_final, taps), weights.W_U, weights.b_U)
    return logits if spec.final_softcap is None else spec.final_softcap * torch.tanh(logits / spec.final_softcap)
