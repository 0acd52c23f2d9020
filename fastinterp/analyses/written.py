"""What every head writes, in the form that the kernels take: one row per token that is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.analyses.base import Pos, final_scale, positions
from fastinterp.model.forward import forward, forward_at
from fastinterp.model.intervene import Capture, Taps
from fastinterp.model.model import Model
from fastinterp.model.norms import apply_affine, center, divide
from fastinterp.model.weights import NormWeights
from fastinterp.prompts import Batch


@dataclass(frozen=True, kw_only=True)
class Written:
    """The heads' outputs at some tokens: ``(z[layer][row, head] @ W_O[layer][head]) @ W_U`` is a head's contribution.

    ``z`` is divided by the frozen scales of the final norm and of post-norms; ``W_O`` is centred and multiplied by
    weights where those norms do that. ``x`` is the normalised final residual of the same rows. ``prompt`` and ``pos``
    say where a row comes from. ``scale`` is the final norm's, ``others`` what else was asked for, ``[row, ...]``. At
    least float32.
    """

    x: Float[Tensor, "row d_model"]
    z: list[Float[Tensor, "row head d_head"]]
    W_O: list[Float[Tensor, "head d_head d_model"]]
    divisor: list[Float[Tensor, "row 1"]]
    scale: Float[Tensor, "row 1"]
    others: dict[tuple[str, int | None], Tensor]
    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]

    def spread(self, values: Tensor, batch: Batch, *, every_position: bool) -> Tensor:
        """Puts ``[row, ...]`` back as ``[batch, ...]`` or ``[batch, pos, ...]``; padding is NaN, or -1 for integers."""
        if not every_position:
            return values
        empty = torch.nan if values.is_floating_point() else -1
        out = values.new_full((*batch.tokens.shape, *values.shape[1:]), empty)
        out[self.prompt, self.pos] = values
        return out


def heads_write(
    model: Model, batch: Batch, pos: Pos, *, scored_only: bool = False, others: Sequence[Capture] = ()
) -> Written:
    """Runs the model and returns what its heads write at ``pos``, or at every real token for ``"all"``.

    ``scored_only`` leaves out each prompt's last token, which predicts none of its own; ``others`` are activations that
    are wanted at the same tokens. Memory: ``z`` of all layers at
    these tokens, and weights of one layer's size per layer where a norm's centring or weight has not been folded in.
    """
    spec, weights = model.spec, model.weights
    names = ["z", "ln1_post_scale"] if spec.post_norms else ["z"]
    taps = Taps.of(spec.n_layers, capture=[*names, *others])
    at = positions(pos, batch)
    if at is None:
        resid = forward(spec, weights, batch.tokens, taps=taps)
        scale = final_scale(model, resid, batch, every_position=True)
        mask = batch.mask
        if scored_only:
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < batch.last[:, None])
        prompt, where = mask.nonzero(as_tuple=True)
        resid, scale = resid[prompt, where], scale[prompt, where]
        captured = {key: value[prompt, where] for key, value in taps.values.items()}
    else:
        resid = forward_at(spec, weights, batch.tokens, batch.n_tokens, at, taps=taps)
        scale = final_scale(model, resid, batch, every_position=False)
        prompt, where, captured = torch.arange(len(batch), device=at.device), at, taps.values
    wide = torch.promote_types(model.dtype, torch.float32)
    x = apply_affine(divide(center(spec.norm, resid.to(wide)), scale), weights.ln_final)
    z, W_O, divisors = [], [], []
    for layer, w in enumerate(weights.blocks):
        divisor = scale.to(wide)
        if w.ln1_post is not None:
            divisor = divisor * captured["ln1_post_scale", layer]
        W_O.append(towards_logits(model, w.W_O.to(wide), w.ln1_post))
        divisors.append(divisor)
        z.append(captured["z", layer].to(wide) / divisor[..., None])
    return Written(
        x=x.to(wide),
        z=z,
        W_O=W_O,
        divisor=divisors,
        scale=scale.to(wide),
        others={key: value.to(wide) for key, value in captured.items() if key[0] not in names},
        prompt=prompt,
        pos=where,
    )


def towards_logits(
    model: Model, directions: Float[Tensor, "*rows d_model"], post_norm: NormWeights | None = None
) -> Float[Tensor, "*rows d_model"]:
    """Returns directions so that ``@ W_U`` is what they add to the logits, but for the norms' scales.

    That is what the (post-norm and) final norm do linearly: centring, and weights that have not been folded in.
    """
    norm = model.spec.norm
    for weights in (post_norm, model.weights.ln_final):
        if weights is not None:
            directions = center(norm, directions)
            directions = directions if weights.w is None else directions * weights.w
    return directions
