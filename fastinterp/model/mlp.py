"""The second half of a block: norm, MLP, sum; on a CPU some rows at a time."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fastinterp.model.intervene import NO_TAPS, Taps
from fastinterp.model.norms import normalize, tapped_norm, write_norm
from fastinterp.model.products import FEW_ROWS, STEADY_ROWS, Exact, Swift
from fastinterp.model.spec import Activation, ModelSpec
from fastinterp.model.weights import BlockWeights

HIDDEN = frozenset({"pre", "pre_linear", "post"})
"""Sites of the hidden layer of an MLP."""

_AROUND = frozenset(
    {"mlp_in", "ln2_scale", "ln2_normalized", "mlp_raw", "ln2_post_scale", "ln2_post_normalized", "mlp_out"}
)

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


def mlp_residual(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    resid: Float[Tensor, "*rows d_model"],
    taps: Taps = NO_TAPS,
    *,
    after: Float[Tensor, "*rows d_model"] | None = None,
    reuse: bool = False,
) -> Float[Tensor, "*rows d_model"]:
    """Returns ``resid_post``: the second half of a block.

    ``resid`` is what the MLP reads, ``resid_mid``; it writes to the same, or to ``after`` (parallel blocks). With
    ``reuse`` nobody else needs what it writes to: in a sweep the result may take its place.
    """
    if _by_rows(w, resid, taps, layer) and not taps.wants_any(_AROUND, layer):
        return taps("resid_post", layer, _residual_by_rows(spec, w, resid, resid if after is None else after, reuse))
    # A tensor of its own, since its gradient is that of the MLP alone.
    mlp_in = taps("mlp_in", layer, resid.view_as(resid)) if taps.wants("mlp_in", layer) else resid
    x = tapped_norm(spec, "ln2", layer, mlp_in, w.ln2, taps)
    mlp_raw = taps("mlp_raw", layer, mlp(spec, w, layer, x, taps))
    mlp_out = taps("mlp_out", layer, write_norm(spec, "ln2_post", layer, mlp_raw, w.ln2_post, taps))
    return taps("resid_post", layer, (resid if after is None else after) + mlp_out)


def _residual_by_rows(
    spec: ModelSpec,
    w: BlockWeights,
    resid: Float[Tensor, "*rows d_model"],
    base: Float[Tensor, "*rows d_model"],
    reuse: bool,
) -> Float[Tensor, "*rows d_model"]:
    """The MLP's norms and the sum too for ``mlp_rows`` rows at a time, so that there is one new residual at most."""

    def some(read: Tensor, written: Tensor) -> Tensor:
        mlp_raw = _mlp_of_some(spec, w, normalize(spec.norm, read, w.ln2))
        mlp_out = mlp_raw if w.ln2_post is None else normalize(spec.norm, mlp_raw, w.ln2_post)
        return written + mlp_out

    # The dtype and the number of outputs are known without autocast and vmap, which no sweep has.
    in_place = reuse and isinstance(w.products, Swift) and base.is_contiguous()
    return _in_pieces(some, resid, base, into=base if in_place else None)


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
    return _in_pieces(lambda some: _mlp_of_some(spec, w, some), x)


def _in_pieces(
    some: Callable[..., Float[Tensor, "*piece d_model"]],
    *operands: Float[Tensor, "*rows d_model"],
    into: Float[Tensor, "*rows d_model"] | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Calls ``some`` with ``mlp_rows`` rows of the operands at a time; several pieces go to ``into``, if given.

    What is put together is no view: torch lets nobody add to part of a view with gradients that was made without them.
    """
    rows = operands[0].shape[:-1]
    n_rows = rows.numel()
    size = mlp_rows(n_rows)
    if n_rows <= size:
        return some(*operands)
    flat = [each.reshape(n_rows, each.shape[-1]) for each in operands]
    piece = some(*[each[:size] for each in flat])
    # Made like a piece, not like the rows: autocast decides the dtype, and vmap whether there is one output or many.
    out = piece.new_empty(*rows, piece.shape[-1]) if into is None else into
    by_row = out.view(n_rows, out.shape[-1])
    by_row[:size] = piece
    del piece
    for first in range(size, n_rows, size):
        by_row[first : first + size] = some(*[each[first : first + size] for each in flat])
    return out


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
