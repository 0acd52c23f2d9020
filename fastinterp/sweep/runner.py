"""Runs all variants of a batch in one pass over the layers.

A variant of layer ``l`` equals the clean run below ``l``. So the pass carries the clean residual and a growing stack of
edited ones: at every layer the stack takes one step, and the variants of that layer join it. Each weight matrix is then
read once per layer for all variants, and no layer is computed for a variant before its edit. Residuals are kept per node
of the batch's prefix tree, so padding and repeated beginnings are not computed.

    operations = nodes x sum over variants of (MLP of its layer + every block above)
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.model.attention import Frame, attend, attend_from, make_frame, project_qkv
from fastinterp.model.forward import embed, forward, mix_heads, mlp_residual
from fastinterp.model.intervene import NO_TAPS, Taps
from fastinterp.model.model import Model
from fastinterp.model.norms import normalize
from fastinterp.model.weights import BlockWeights
from fastinterp.sweep.prefix import PrefixTree, prefix_tree
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

    Memory: ``residual_bytes`` plus the activations of one step.
    """
    joining = [i for i, v in enumerate(variants) if v.enters_by_heads]
    joining.sort(key=lambda i: variants[i].first_layer)
    share = all(edit.same_everywhere for i in joining for edit in variants[i].edits)
    tree = prefix_tree(tokens, n_tokens, share=share)
    each = max(tree.n_nodes, tokens.numel()) * model.spec.d_model * model.weights.W_E.element_size()
    size = max(1, residual_bytes // each)
    for start in range(0, len(joining), size):
        indices = joining[start : start + size]
        yield indices, _Pass(model, tokens, tree, at).run([variants[i] for i in indices])
    for index, variant in enumerate(variants):
        if not variant.enters_by_heads:
            taps = Taps.of(model.spec.n_layers, edits=variant.edits)
            final = forward(model.spec, model.weights, tokens, taps=taps)
            yield [index], (final if at is None else final[torch.arange(len(at)), at])[None]


class _Pass:
    """One pass over the layers for a group of variants."""

    def __init__(
        self, model: Model, tokens: Int[Tensor, "batch pos"], tree: PrefixTree, at: Int[Tensor, " batch"] | None
    ) -> None:
        self.spec, self.weights, self.tree, self.at = model.spec, model.weights, tree, at
        self.clean = embed(model.spec, model.weights, tokens)[tree.row, tree.pos][None]
        # Rotary tables per node serve the projections, masks per position the attention.
        self.frame = make_frame(model.spec, tokens.shape[1], device=self.clean.device, dtype=self.clean.dtype)
        self.node_frame = _at_nodes(self.frame, tree)
        self.step_variants = max(1, step_tokens(self.clean.device) // tree.n_nodes)

    def run(self, variants: Sequence[Variant]) -> Float[Tensor, "variant batch *pos d_model"]:
        stack = self.clean.new_empty(len(variants), *self.clean.shape[1:])
        entered = 0
        for layer, w in enumerate(self.weights.blocks):
            last = layer == self.spec.n_layers - 1
            new = [variant for variant in variants[entered:] if variant.first_layer == layer]
            entered_after = entered + len(new)
            if last and self.at is not None:
                return self._run_last(w, stack, entered, new)
            for part in self._parts(stack[:entered]):
                z = self._attention(w, layer, part)
                part.copy_(self._finish(w, layer, part + mix_heads(w, layer, z)))
            if entered < len(variants):
                z = self._attention(w, layer, self.clean)
                resid_mid = self.clean + mix_heads(w, layer, z)
                for variant, out in zip(new, stack[entered:entered_after], strict=True):
                    out.copy_(_entering(w, variant, z, resid_mid, self.tree.row, self.tree.pos)[0])
                for part in self._parts(stack[entered:entered_after]):
                    part.copy_(self._finish(w, layer, part))
                self.clean = self._finish(w, layer, resid_mid)
            entered = entered_after
        return stack[:, self.tree.node]

    def _run_last(
        self, w: BlockWeights, stack: Float[Tensor, "variant node d_model"], entered: int, new: Sequence[Variant]
    ) -> Float[Tensor, "variant batch d_model"]:
        """The last block, at one position per prompt: only keys and values are needed everywhere."""
        assert self.at is not None
        layer, rows = self.spec.n_layers - 1, torch.arange(len(self.at), device=self.at.device)
        last = self.tree.node[rows, self.at]
        final = stack.new_empty(len(stack), len(rows), self.spec.d_model)
        for part, out in zip(self._parts(stack[:entered]), self._parts(final[:entered]), strict=True):
            torch.add(part[:, last], mix_heads(w, layer, self._attention_at(w, layer, part)), out=out)
        if new:
            z = self._attention_at(w, layer, self.clean)
            resid_mid = self.clean[:, last] + mix_heads(w, layer, z)
            for variant, out in zip(new, final[entered:], strict=True):
                out.copy_(_entering(w, variant, z, resid_mid, rows, self.at)[0])
        return self._finish(w, layer, final)

    def _parts(self, stack: Tensor) -> Sequence[Tensor]:
        """Cuts a stack of residuals into steps."""
        return stack.split(self.step_variants) if len(stack) else ()

    def _finish(
        self, w: BlockWeights, layer: int, resid_mid: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """Returns ``resid_post``."""
        return mlp_residual(self.spec, w, layer, resid_mid)

    def _attention(
        self, w: BlockWeights, layer: int, resid: Float[Tensor, "variant node d_model"]
    ) -> Float[Tensor, "variant node head d_head"]:
        """Returns ``z`` of every node: projections per node, attention per prompt."""
        x = normalize(self.spec.norm, resid, w.ln1)
        parts = project_qkv(self.spec, w, layer, x, self.node_frame, NO_TAPS)
        if self.tree.is_whole_batch:
            q, k, v = (part.reshape(-1, *self.tree.node.shape[1:], *part.shape[2:]) for part in parts)
            z = attend(self.spec, layer, q, k, v, self.frame, NO_TAPS)
            return z.reshape(parts[0].shape)
        q, k, v = (part[:, self.tree.node].flatten(0, 1) for part in parts)
        z = attend(self.spec, layer, q, k, v, self.frame, NO_TAPS).unflatten(0, (len(resid), -1))
        return z[:, self.tree.row, self.tree.pos]

    def _attention_at(
        self, w: BlockWeights, layer: int, resid: Float[Tensor, "variant node d_model"]
    ) -> Float[Tensor, "variant batch head d_head"]:
        """Returns ``z`` at the position of each prompt that is read."""
        assert self.at is not None
        x = normalize(self.spec.norm, resid, w.ln1)
        q, k, v = project_qkv(self.spec, w, layer, x, self.node_frame, NO_TAPS)
        rows = torch.arange(len(self.at), device=self.at.device)
        q = q[:, self.tree.node[rows, self.at]].flatten(0, 1)
        k, v = (part[:, self.tree.node].flatten(0, 1) for part in (k, v))
        z = attend_from(self.spec, layer, q, k, v, self.frame, self.at.repeat(len(resid)))
        return z.unflatten(0, (len(resid), -1))


def _at_nodes(frame: Frame, tree: PrefixTree) -> Frame:
    if frame.cos is None or frame.sin is None:
        return frame
    return dataclasses.replace(frame, cos=frame.cos[tree.pos], sin=frame.sin[tree.pos])


def _entering(
    w: BlockWeights,
    variant: Variant,
    z: Float[Tensor, "1 n head d_head"],
    resid_mid: Float[Tensor, "1 n d_model"],
    rows: Int[Tensor, " n"],
    pos: Int[Tensor, " n"],
) -> Float[Tensor, "1 n d_model"]:
    """Returns the variant's ``resid_mid``: the clean one plus what the edited heads write differently."""
    edited = z
    heads: set[int] = set()
    for edit in variant.edits:
        edited = edit.gathered(rows, pos).apply(edited)
        heads |= set(range(z.shape[-2])) if edit.head is None else {edit.head % z.shape[-2]}
    chosen = sorted(heads)
    change = (edited - z)[..., chosen, :].flatten(-2)
    return resid_mid + change @ w.W_O[chosen].flatten(0, 1)
