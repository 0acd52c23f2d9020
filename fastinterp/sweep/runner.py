"""Runs all variants of a batch in one pass over the layers.

A variant of layer ``l`` equals the clean run below ``l``. So the pass carries the clean residual and a growing stack of
edited ones: at every layer the stack takes one step, and the variants of that layer join it. Per layer each weight
matrix is then read once for all variants, and no layer is computed for a variant before its edit.

    operations = sum over variants of (MLP of its layer + every block above), instead of n_layers blocks each
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.model.attention import Frame, make_frame
from fastinterp.model.forward import block, block_at, embed, forward, mlp_residual
from fastinterp.model.intervene import NO_TAPS, Capture, Taps
from fastinterp.model.model import Model
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights
from fastinterp.sweep.variants import Variant

RESIDUAL_BYTES = 1 << 30


def step_tokens(device: torch.device) -> int:
    """Tokens that go through a block together: enough rows for the matrix product, few enough for the cache."""
    return 1024 if device.type == "cpu" else 1 << 17


@torch.no_grad()
def run_variants(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    variants: Sequence[Variant],
    *,
    at: Int[Tensor, " batch"] | None = None,
    residual_bytes: int = RESIDUAL_BYTES,
) -> Iterator[tuple[list[int], Float[Tensor, "variant batch *pos d_model"]]]:
    """Yields ``(indices into variants, final residuals)`` group by group until every variant has come once.

    Equivalent to ``forward(spec, weights, tokens, taps=Taps.of(n_layers, edits=variant.edits))`` for each variant.

    Args:
        tokens: right-padded prompts.
        at: read the final residual at this position of each prompt only; the last block then computes little else.
        residual_bytes: the residuals of one group's variants stay below this; more groups repeat the clean run.

    Memory: ``residual_bytes`` plus the activations of one step.
    """
    fast = sorted((i for i, v in enumerate(variants) if v.enters_by_heads), key=lambda i: variants[i].first_layer)
    each = tokens.numel() * model.spec.d_model * model.weights.W_E.element_size()
    size = max(1, residual_bytes // each)
    for start in range(0, len(fast), size):
        indices = fast[start : start + size]
        yield indices, _run_group(model, tokens, [variants[i] for i in indices], at)
    for index, variant in enumerate(variants):
        if not variant.enters_by_heads:
            taps = Taps.of(model.spec.n_layers, edits=variant.edits)
            final = forward(model.spec, model.weights, tokens, taps=taps)
            yield [index], (final if at is None else final[torch.arange(len(at)), at])[None]


def _run_group(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    variants: Sequence[Variant],
    at: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "variant batch *pos d_model"]:
    spec, weights = model.spec, model.weights
    clean = embed(spec, weights, tokens)
    frame = make_frame(spec, tokens.shape[1], device=clean.device, dtype=clean.dtype)
    stack = clean.new_empty(len(variants), *clean.shape)
    entered = 0
    for layer, w in enumerate(weights.blocks):
        last = layer == spec.n_layers - 1
        if last and at is not None:
            final = clean.new_empty(len(variants), len(tokens), spec.d_model)
            _step_last(spec, w, stack[:entered], final[:entered], frame, at)
        else:
            final = stack
            _step(spec, w, layer, stack[:entered], frame)
        joining = [variant for variant in variants[entered:] if variant.first_layer == layer]
        if not joining and entered == len(variants):
            continue
        taps = Taps.of(spec.n_layers, capture=[Capture(name=name, layers=(layer,)) for name in ("z", "resid_mid")])
        taps.at = at if last else None
        clean = block(spec, w, layer, clean, frame, taps)
        z, resid_mid = taps.values["z", layer], taps.values["resid_mid", layer]
        for variant in joining:
            _enter(w, variant, z, resid_mid, final[entered], at if last else None)
            entered += 1
        _finish_block(spec, w, layer, final[entered - len(joining) : entered])
    return final


def _enter(
    w: BlockWeights,
    variant: Variant,
    z: Float[Tensor, "batch *pos head d_head"],
    resid_mid: Float[Tensor, "batch *pos d_model"],
    out: Float[Tensor, "batch *pos d_model"],
    at: Int[Tensor, " batch"] | None,
) -> None:
    """Writes the variant's ``resid_mid``: the clean one plus what the edited heads write differently."""
    edited = z if at is None else z.unsqueeze(1)
    heads: set[int] = set()
    for edit in variant.edits:
        edited = edit.at(at).apply(edited)
        heads |= set(range(z.shape[-2])) if edit.head is None else {edit.head % z.shape[-2]}
    change = (edited if at is None else edited.squeeze(1)) - z
    chosen = sorted(heads)
    torch.add(resid_mid, change[..., chosen, :].flatten(-2) @ w.W_O[chosen].flatten(0, 1), out=out)


def _step(
    spec: ModelSpec,
    w: BlockWeights,
    layer: int,
    stack: Float[Tensor, "variant batch pos d_model"],
    frame: Frame,
) -> None:
    """Moves every residual of the stack through one block, in place."""
    sequences = stack.flatten(0, 1)
    for part in sequences.split(max(1, step_tokens(stack.device) // stack.shape[2])):
        part.copy_(block(spec, w, layer, part, frame, NO_TAPS))


def _step_last(
    spec: ModelSpec,
    w: BlockWeights,
    stack: Float[Tensor, "variant batch pos d_model"],
    final: Float[Tensor, "variant batch d_model"],
    frame: Frame,
    at: Int[Tensor, " batch"],
) -> None:
    """Moves every residual through the last block, at the positions that are read."""
    sequences, out = stack.flatten(0, 1), final.flatten(0, 1)
    positions = at.repeat(len(stack))
    size = max(1, step_tokens(stack.device) // stack.shape[2])
    for start in range(0, len(sequences), size):
        part = slice(start, start + size)
        out[part] = block_at(spec, w, spec.n_layers - 1, sequences[part], frame, positions[part])


def _finish_block(
    spec: ModelSpec, w: BlockWeights, layer: int, resid_mid: Float[Tensor, "variant batch *pos d_model"]
) -> None:
    """Replaces ``resid_mid`` by ``resid_post``, in place."""
    for part in resid_mid.flatten(0, -2).split(step_tokens(resid_mid.device)):
        part.copy_(mlp_residual(spec, w, layer, part))
