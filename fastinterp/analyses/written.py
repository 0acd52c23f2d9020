"""What every head writes, in the form that the kernels take: one row per token that is looked at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.analyses.base import Pos, final_scale, positions
from fastinterp.model.forward import forward, forward_at
from fastinterp.model.intervene import Capture, Taps
from fastinterp.model.model import Model
from fastinterp.model.norms import apply_affine, center, divide
from fastinterp.model.weights import NormWeights
from fastinterp.names import check_index
from fastinterp.prompts import Batch
from fastinterp.sweep.resident import give_back


@dataclass(frozen=True, kw_only=True)
class Written:
    """The heads' outputs at some tokens: ``(z[layer][row, head] @ W_O[layer][head]) @ W_U`` is a head's contribution.

    The layers are those that were asked for. ``z`` is divided by the frozen scales of the final norm and of post-norms;
    ``W_O`` is centred and multiplied by weights where those norms do that. ``x`` is the normalised final residual of
    the same rows. ``prompt`` and ``pos`` say where a row comes from. ``scale`` is the final norm's, ``others`` what
    else was asked for, ``[row, ...]``. At least float32.
    """

    x: Float[Tensor, "row d_model"]
    z: dict[int, Float[Tensor, "row head d_head"]]
    W_O: dict[int, Float[Tensor, "head d_head d_model"]]
    divisor: dict[int, Float[Tensor, "row 1"]]
    scale: Float[Tensor, "row 1"]
    others: dict[tuple[str, int | None], Tensor]
    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]

    def removed(
        self, replacement: Callable[[int], Float[Tensor, "#row head d_head"]] | None, *, in_place: bool = False
    ) -> dict[int, Float[Tensor, "row head d_head"]]:
        """What is taken away of every layer's ``z`` where a layer's ``replacement`` stands in its place; None for zero.

        Replacements are values in front of any norm. ``in_place``: ``z`` becomes it, and is not needed any more.
        """
        if replacement is None:
            return self.z
        found = {}
        for layer, z in self.z.items():
            other = replacement(layer) / self.divisor[layer][..., None]
            found[layer] = z.sub_(other) if in_place else z - other
        return found

    def spread(self, values: Tensor, batch: Batch, *, every_position: bool) -> Tensor:
        """Puts ``[row, ...]`` back as ``[batch, ...]`` or ``[batch, pos, ...]``; padding is NaN, or -1 for integers."""
        if not every_position:
            return values
        empty = torch.nan if values.is_floating_point() else -1
        out = values.new_full((*batch.tokens.shape, *values.shape[1:]), empty)
        out[self.prompt, self.pos] = values
        return out


def heads_write(
    model: Model,
    batch: Batch,
    pos: Pos,
    layers: Sequence[int],
    *,
    scored_only: bool = False,
    others: Sequence[Capture] = (),
) -> Written:
    """Runs the model and returns what the heads of some layers write at ``pos``, or at every real token for ``"all"``.

    ``scored_only`` leaves out each prompt's last token, which predicts none of its own; ``others`` are activations that
    are wanted at the same tokens. Memory: ``z`` of these layers at these tokens, those of some prompts twice (see
    :func:`prompts_at_once`), and weights of one layer's size per layer where a norm's centring or weight has not been
    folded in.
    """
    spec, weights = model.spec, model.weights
    layers = [check_index("layer", layer, spec.n_layers) for layer in layers]
    at = positions(pos, batch)
    prompt, where = _looked_at(batch, at, scored_only=scored_only)
    names = ["z", "ln1_post_scale"] if spec.post_norms else ["z"]
    captures = [*(Capture(name=name, layers=tuple(layers)) for name in names), *others]
    wide = torch.promote_types(model.dtype, torch.float32)
    final = batch.tokens.new_empty(len(prompt), spec.d_model, dtype=wide)
    scale = final.new_empty(len(prompt), 1)
    # One block for all layers, which the system takes back whole.
    z = final.new_empty(len(layers), len(prompt), spec.n_heads, spec.d_head)
    captured: dict[tuple[str, int | None], Tensor] = {("z", layer): z[i] for i, layer in enumerate(layers)}

    def run(prompts: slice) -> None:
        """Keeps of some prompts what is looked at; nothing else outlives their run."""
        part = batch.part(prompts)
        edges = torch.tensor([prompts.start, prompts.stop], device=prompt.device)
        rows = slice(*torch.searchsorted(prompt, edges).tolist())
        taps = Taps.of(spec.n_layers, capture=captures)
        if at is None:
            here: tuple[Any, ...] = (prompt[rows] - prompts.start, where[rows])
            resid = forward(spec, weights, part.tokens, taps=taps)
        else:
            here = (slice(None),)
            resid = forward_at(spec, weights, part.tokens, part.n_tokens, at[prompts], taps=taps)
        final[rows] = resid[here].to(wide)
        scale[rows] = final_scale(model, resid, part, every_position=at is None)[here].to(wide)
        for key in list(taps.values):
            value = taps.values.pop(key)[here]
            if key not in captured:
                captured[key] = value.new_empty(len(prompt), *value.shape[1:], dtype=wide)
            captured[key][rows] = value

    step = prompts_at_once(model.device.type, len(batch), batch.tokens.shape[1], every_position=at is None)
    for first in range(0, len(batch), step):
        run(slice(first, first + step))
    give_back(model.device)
    x = apply_affine(divide(center(spec.norm, final), scale), weights.ln_final)
    W_O, divisors = {}, {}
    for layer in layers:
        w, divisor = weights.blocks[layer], scale
        if w.ln1_post is not None:
            divisor = divisor * captured.pop(("ln1_post_scale", layer))
        W_O[layer] = towards_logits(model, w.W_O.to(wide), w.ln1_post)
        divisors[layer] = divisor
        captured["z", layer].div_(divisor[..., None])
    return Written(
        x=x.to(wide),
        z={layer: captured.pop(("z", layer)) for layer in layers},
        W_O=W_O,
        divisor=divisors,
        scale=scale,
        others=captured,
        prompt=prompt,
        pos=where,
    )


def prompts_at_once(device_type: str, n_prompts: int, n_pos: int, *, every_position: bool) -> int:
    """How many prompts of a batch go through the model together.

    All, where one position of each is kept: equal beginnings are computed once then. Few, where every position is,
    because a run holds what they write a second time.
    """
    if not every_position:
        return n_prompts
    return max(1, min(n_prompts, (512 if device_type == "cpu" else 1 << 14) // n_pos))


def _looked_at(
    batch: Batch, at: Int[Tensor, " batch"] | None, *, scored_only: bool
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """The prompt and the position of every row."""
    if at is not None:
        return torch.arange(len(batch), device=at.device), at
    mask = batch.mask
    if scored_only:
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < batch.last[:, None])
    prompt, where = mask.nonzero(as_tuple=True)
    return prompt, where


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
