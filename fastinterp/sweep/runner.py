"""Runs all variants of a batch in one pass over the layers.

A variant of layer ``l`` equals the clean run below ``l``. So the pass carries the clean residual and a growing stack of
edited ones: at every layer the stack takes one step, and the variants of that layer join it. Each weight matrix is then
read once per layer for all variants, and no layer is computed for a variant before its edit. Residuals are kept per
node of the batch's prefix tree, so padding and repeated beginnings are not computed.

    operations = nodes x sum over variants of (MLP of its layer, unless parallel, + every block above)
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.model.attention import affine, make_frame
from fastinterp.model.forward import block, block_at, embed, forward, mix_heads, mlp_residual, write_norm
from fastinterp.model.intervene import Capture, Taps
from fastinterp.model.model import Model
from fastinterp.model.prefix import PrefixTree, prefix_tree
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
    n_tokens: Int[Tensor, " batch"] | None = None,
    at: Int[Tensor, " batch"] | None = None,
    residual_bytes: int = RESIDUAL_BYTES,
) -> Iterator[tuple[list[int], Float[Tensor, "variant batch *pos d_model"]]]:
    """Yields ``(indices into variants, final residuals)`` group by group until every variant has come once.

    Equivalent to ``forward(spec, weights, tokens, taps=Taps.of(n_layers, edits=variant.edits))`` for each variant, at
    real tokens; what stands at padding is undefined.

    Args:
        tokens: right-padded prompts.
        n_tokens: their lengths; without it every position counts as real.
        at: read the final residual at this position of each prompt only; the last block then computes little else.
        residual_bytes: the residuals of one group's variants stay below this; more groups repeat the clean run.

    Raises:
        SiteRangeError: a layer or head that the model does not have.

    Memory: ``residual_bytes`` (twice that where every position is read) plus the activations of one step.
    """
    variants = [variant.resolved(model.spec) for variant in variants]
    joining = [i for i, v in enumerate(variants) if v.enters_by_heads]
    joining.sort(key=lambda i: variants[i].first_layer)
    share = all(edit.same_everywhere for i in joining for edit in variants[i].edits)
    tree = prefix_tree(tokens, n_tokens, share=share)
    each = max(tree.n_nodes, tree.node.numel()) * model.spec.d_model * model.weights.W_E.element_size()
    size = max(1, residual_bytes // each)
    for start in range(0, len(joining), size):
        indices = joining[start : start + size]
        yield indices, _Pass(model, tokens, tree, at).run([variants[i] for i in indices])
    for index, variant in enumerate(variants):
        if not variant.enters_by_heads:
            taps = Taps.of(model.spec.n_layers, edits=variant.edits)
            final = forward(model.spec, model.weights, tokens, taps=taps)
            yield [index], (final if at is None else final[torch.arange(len(at), device=at.device), at])[None]


class _Pass:
    """One pass over the layers for a group of variants."""

    def __init__(
        self, model: Model, tokens: Int[Tensor, "batch pos"], tree: PrefixTree, at: Int[Tensor, " batch"] | None
    ) -> None:
        self.spec, self.weights, self.tree, self.at = model.spec, model.weights, tree, at
        self.n_pos = tokens.shape[1]
        self.clean = embed(model.weights, tokens, tree=tree)
        self.frame = make_frame(model.spec, tree.n_pos, device=self.clean.device, dtype=self.clean.dtype, tree=tree)
        # Attention spreads keys and values over all positions, whatever the tree saves elsewhere.
        self.step_variants = max(1, step_tokens(self.clean.device) // max(tree.n_nodes, tree.node.numel() // 2))

    def run(self, variants: Sequence[Variant]) -> Float[Tensor, "variant batch *pos d_model"]:
        """Returns the final residual of each variant, which must come in the order of their layers."""
        spec = self.spec
        stack = self.clean.new_empty(len(variants), *self.clean.shape[1:])
        entered = 0
        for layer, w in enumerate(self.weights.blocks):
            new = [variant for variant in variants[entered:] if variant.first_layer == layer]
            if layer == spec.n_layers - 1 and self.at is not None:
                return self._run_last(w, stack, entered, new)
            for part in self._parts(stack[:entered]):
                part.copy_(block(spec, w, layer, part, self.frame))
            if entered < len(variants):
                taps = self._taps(layer)
                self.clean = block(spec, w, layer, self.clean, self.frame, taps)
                joined = stack[entered : entered + len(new)]
                clean = {name: value for (name, _), value in taps.values.items()}
                for variant, out in zip(new, joined, strict=True):
                    out.copy_(_entering(spec, w, variant, clean, self.tree.row, self.tree.pos)[0])
                if not spec.parallel:
                    for part in self._parts(joined):
                        part.copy_(mlp_residual(spec, w, layer, part))
                entered += len(new)
        return self.tree.spread(stack)[:, :, : self.n_pos]

    def _run_last(
        self, w: BlockWeights, stack: Float[Tensor, "variant node d_model"], entered: int, new: Sequence[Variant]
    ) -> Float[Tensor, "variant batch d_model"]:
        """The last block, at the one position per prompt that is read."""
        assert self.at is not None
        spec, layer, rows = self.spec, self.spec.n_layers - 1, torch.arange(len(self.at), device=self.at.device)
        final = stack.new_empty(len(stack), len(rows), spec.d_model)
        for part, out in zip(self._parts(stack[:entered]), self._parts(final[:entered]), strict=True):
            out.copy_(block_at(spec, w, layer, part, self.frame, self.at))
        if new:
            taps = self._taps(layer)
            block_at(spec, w, layer, self.clean, self.frame, self.at, taps)
            clean = {name: value[None] for (name, _), value in taps.values.items()}
            for variant, out in zip(new, final[entered:], strict=True):
                out.copy_(_entering(spec, w, variant, clean, rows, self.at)[0])
            if not spec.parallel:
                final[entered:] = mlp_residual(spec, w, layer, final[entered:])
        return final

    def _taps(self, layer: int) -> Taps:
        """What the clean run shows to the variants of a layer."""
        names = ("z", *_entering_from(self.spec))
        return Taps.of(self.spec.n_layers, capture=[Capture(name=name, layers=(layer,)) for name in names])

    def _parts(self, stack: Tensor) -> Sequence[Tensor]:
        """Cuts a stack of residuals into steps."""
        return stack.split(self.step_variants) if len(stack) else ()


def _entering_from(spec: ModelSpec) -> tuple[str, ...]:
    """Which activations of the clean run a variant is made from, beside ``z``."""
    if spec.parallel:
        return ("resid_post",)
    return ("attn_out", "resid_mid") if spec.post_norms else ("resid_mid",)


def _entering(
    spec: ModelSpec,
    w: BlockWeights,
    variant: Variant,
    clean: Mapping[str, Tensor],
    rows: Int[Tensor, " n"],
    pos: Int[Tensor, " n"],
) -> Float[Tensor, "1 n d_model"]:
    """Returns the variant's ``resid_mid``: the clean one plus what the edited heads write differently.

    In a parallel block the MLP sees nothing of it, and ``resid_post`` is returned at once.
    """
    edited = z = clean["z"]
    heads: set[int] = set()
    for edit in variant.edits:
        edited = edit.gathered(rows, pos).apply(edited)
        heads |= set(range(z.shape[-2])) if edit.head is None else {edit.head % z.shape[-2]}
    if spec.post_norms:
        # From all heads: a norm would blow up the rounding of a difference, where the edited heads are most of the sum.
        written = write_norm(spec, "ln1_post", 0, mix_heads(w, 0, edited), w.ln1_post)
        return clean["resid_mid"] + (written - clean["attn_out"])
    chosen = sorted(heads)
    change = affine((edited - z)[..., chosen, :].flatten(-2), w.W_O[chosen].flatten(0, 1), None)
    return clean["resid_post" if spec.parallel else "resid_mid"] + change
