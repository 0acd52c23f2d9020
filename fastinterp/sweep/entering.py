"""How a run departs from the clean one in its first edited layer, with as little computed again as the edits allow.

``heads``: what the edited heads write differently is added to the clean ``resid_mid``. Where queries, keys, values or
patterns are edited, the attention of those heads is computed again first; where a head's own copy of the residual is,
that copy is normalised and projected before. ``post``: what the MLP writes differently is added to the clean
``resid_post``.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.model.attention import Frame, attend, ready
from fastinterp.model.forward import mix_heads
from fastinterp.model.intervene import Edit, Taps
from fastinterp.model.norms import normalize, write_norm
from fastinterp.model.products import Rounded, affine
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import BlockWeights
from fastinterp.names import activation
from fastinterp.sweep.rows import Rows
from fastinterp.sweep.taps import stack_edits
from fastinterp.sweep.variants import ATTENTION, INPUTS, Variant

NEURONS_AT_ONCE = 64
"""Rows of ``W_out`` that are copied together."""


def captured_for(spec: ModelSpec, variant: Variant) -> set[str]:
    """Returns the activations of the clean run, in its first edited layer, that a variant is made from."""
    sites = {edit.site for edit in variant.at_layer(variant.first_layer)}
    stage = variant.stage(spec)
    if stage == "block":
        return set()
    if stage == "post":
        return _captured_behind_mlp(spec, sites)
    names = {"z", *(("resid_post",) if spec.parallel else ("resid_mid",))}
    if spec.post_norms or sites & {"attn_raw", "attn_out"}:
        names |= {"attn_raw", "attn_out"}
    if sites & ATTENTION:
        names |= {"q", "k", "v"}
    if sites & INPUTS:
        names |= {"resid_pre"}
    return names


def _captured_behind_mlp(spec: ModelSpec, sites: set[str]) -> set[str]:
    names = {"resid_post"}
    if sites & {"post", "mlp_raw", "mlp_out"}:
        names |= {"mlp_out"}
    if sites & {"post"}:
        names |= {"post"}
    if spec.post_norms and sites & {"post", "mlp_raw"}:
        names |= {"mlp_raw"}
    return names


@dataclass(frozen=True, kw_only=True)
class Entrance:
    """The clean run in one layer, packed, and the rows of the stack that variants enter.

    ``clean`` holds ``[1, node, ...]``, at the rows themselves where ``at_rows``; ``sequences`` is the frame of whole
    prompts, of ``n_pos`` positions. Edits come with their values, nothing left to resolve.
    """

    spec: ModelSpec
    w: BlockWeights
    layer: int
    clean: Mapping[str, Tensor]
    rows: Rows
    sequences: Frame
    n_pos: int
    at_rows: bool = False
    here: dict[str, Tensor] = field(default_factory=dict)

    def enter(self, edits: Sequence[Edit], stage: Literal["heads", "post"]) -> Float[Tensor, "1 row d_model"]:
        """Returns the residual of a variant where it leaves the clean run; see ``Variant.stage``.

        ``heads``: ``resid_mid`` (``resid_post`` of a parallel block), all edits up to there made. ``post``:
        ``resid_post``, all edits made.
        """
        return self._behind_mlp(edits) if stage == "post" else self._behind_heads(edits)

    def _here(self, name: str) -> Tensor:
        """The clean values at the rows."""
        if name not in self.here:
            self.here[name] = self.clean[name] if self.at_rows else self.rows.of_clean(self.clean[name])
        return self.here[name]

    def _made(self, site: str, edits: Iterable[Edit], value: Tensor) -> Tensor:
        """Returns a value ``[1, row, ...]`` with the edits of its site made."""
        for edit in edits:
            if edit.site == site:
                value = edit.gathered(self.rows.row, self.rows.pos).apply(value)
        return value

    def _behind_heads(self, edits: Sequence[Edit]) -> Float[Tensor, "1 row d_model"]:
        spec, w = self.spec, self.w
        z, heads = self._here("z"), self._edited_heads(edits)
        edited = self._made("z", edits, self._mixed_again(edits, z))
        written = _change_of_heads(w, edited, z, heads) if heads else torch.zeros_like(self._residual())
        result_heads = self._heads_of(edits, {"result"})
        if result_heads:
            chosen = [edit for edit in edits if edit.site == "result"]
            result = torch.einsum("...he,hed->...hd", edited, w.W_O)
            written = written + (self._made("result", chosen, result) - result)[..., sorted(result_heads), :].sum(-2)
        if spec.post_norms or any(edit.site in ("attn_raw", "attn_out") for edit in edits):
            written = self._attention_written(edits, edited, written, {*heads, *result_heads})
        return self._made("resid_mid", edits, self._residual() + written)

    def _attention_written(
        self, edits: Sequence[Edit], z: Tensor, change: Tensor, heads: set[int]
    ) -> Float[Tensor, "1 row d_model"]:
        """What is added differently, through the edits of the sum of the heads and the norm behind it."""
        spec, w = self.spec, self.w
        clean_raw, clean_out = self._here("attn_raw"), self._here("attn_out")
        raw = clean_raw + change
        if spec.post_norms and heads and not any(edit.site == "result" for edit in edits):
            # From all heads: a norm would blow up the rounding of a difference, where the edited heads are most of it.
            raw = mix_heads(w, self.layer, z)
        raw = self._made("attn_raw", edits, raw)
        out = write_norm(spec, "ln1_post", self.layer, raw, w.ln1_post)
        return self._made("attn_out", edits, out) - clean_out

    def _residual(self) -> Float[Tensor, "1 row d_model"]:
        return self._here("resid_post" if self.spec.parallel else "resid_mid")

    def _heads_of(self, edits: Iterable[Edit], sites: Iterable[str]) -> set[int]:
        """The query heads that edits of some sites can change."""
        n_heads, group = self.spec.n_heads, self.spec.attention.group
        heads: set[int] = set()
        for edit in edits:
            if edit.site not in sites:
                continue
            if edit.head is None:
                return set(range(n_heads))
            if "kv_head" in activation(edit.site).dims:
                first = edit.head % self.spec.attention.n_kv_heads * group
                heads |= set(range(first, first + group))
            else:
                heads.add(edit.head % n_heads)
        return heads

    def _edited_heads(self, edits: Iterable[Edit]) -> set[int]:
        return self._heads_of(edits, {"z", *ATTENTION})

    def _mixed_again(self, edits: Sequence[Edit], z: Tensor) -> Tensor:
        """Returns ``z`` with the attention of the heads whose queries, keys, values or patterns are edited redone."""
        attention = [edit for edit in edits if edit.site in ATTENTION]
        if not attention:
            return z
        spec, group = self.spec, self.spec.attention.group
        heads = sorted(self._heads_of(attention, ATTENTION))
        of_kv = Counter(head // group for head in heads)
        kv_heads = sorted(of_kv)
        if len(set(of_kv.values())) > 1:
            # Attention takes as many query heads for one KV head as for another.
            heads = [kv * group + i for kv in kv_heads for i in range(group)]
        small = dataclasses.replace(
            spec, attention=dataclasses.replace(spec.attention, n_heads=len(heads), n_kv_heads=len(kv_heads))
        )
        moved = [_renumbered(edit, heads, kv_heads, spec) for edit in attention]
        tree = self.sequences.tree
        assert tree is not None
        taps = Taps(edits=stack_edits([moved], tree.row, tree.pos, self.n_pos))
        q = self._projected("q", heads, moved)
        k, v = self._projected("k", kv_heads, moved), self._projected("v", kv_heads, moved)
        q, k, v = taps("q", self.layer, q), taps("k", self.layer, k), taps("v", self.layer, v)
        q = ready(small, self.layer, q, self.w.q_norm, self.sequences)
        k = ready(small, self.layer, k, self.w.k_norm, self.sequences)
        q, k = taps("rot_q", self.layer, q), taps("rot_k", self.layer, k)
        mixed = z.clone()
        again = self.rows.of_clean(attend(small, self.layer, q, k, v, self.sequences, taps))
        mixed[..., heads, :] = again
        return mixed

    def _projected(
        self, name: Literal["q", "k", "v"], heads: Sequence[int], edits: Sequence[Edit]
    ) -> Float[Tensor, "1 node head d_head"]:
        """Queries, keys or values of some heads; those whose copy of the residual is edited are projected from it.

        The heads of the edits are numbered among ``heads``.
        """
        projected = self.clean[name][..., heads, :]
        chosen = [edit for edit in edits if edit.site == f"{name}_input"]
        if not chosen:
            return projected
        tree = self.sequences.tree
        assert tree is not None
        w, every = self.w, range(len(heads))
        own = sorted({head for edit in chosen for head in (every if edit.head is None else (edit.head,))})
        copies = self.clean["resid_pre"].unsqueeze(-2).expand(-1, -1, len(own), -1)
        for edit in chosen:
            among = edit if edit.head is None else dataclasses.replace(edit, head=own.index(edit.head))
            copies = among.gathered(tree.row, tree.pos).apply(copies)
        W, b = {"q": (w.W_Q, w.b_Q), "k": (w.W_K, w.b_K), "v": (w.W_V, w.b_V)}[name]
        of_model = [heads[i] for i in own]
        x = normalize(self.spec.norm, copies, w.ln1)
        if isinstance(w.products, Rounded):
            # What is changed is added to the rounded product, so that rounding is not taken for an effect.
            x = x - normalize(self.spec.norm, self.clean["resid_pre"], w.ln1).unsqueeze(-2)
            projected[..., own, :] += torch.einsum("...hd,hde->...he", x, W[of_model])
            return projected
        again = torch.einsum("...hd,hde->...he", x, W[of_model])
        projected[..., own, :] = again if b is None else again + b[of_model]
        return projected

    def _behind_mlp(self, edits: Sequence[Edit]) -> Float[Tensor, "1 row d_model"]:
        spec, w = self.spec, self.w
        resid_post = self._here("resid_post")
        if any(edit.site != "resid_post" for edit in edits):
            raw_change: Tensor | None = None
            if any(edit.site == "post" for edit in edits):
                raw_change = self._change_of_neurons(edits)
            out = clean_out = self._here("mlp_out")
            if raw_change is not None or any(edit.site == "mlp_raw" for edit in edits):
                raw = self._here("mlp_raw") if spec.post_norms else clean_out
                raw = raw if raw_change is None else raw + raw_change
                raw = self._made("mlp_raw", edits, raw)
                out = write_norm(spec, "ln2_post", self.layer, raw, w.ln2_post)
            resid_post = resid_post + (self._made("mlp_out", edits, out) - clean_out)
        return self._made("resid_post", edits, resid_post)

    def _change_of_neurons(self, edits: Sequence[Edit]) -> Float[Tensor, "1 row d_model"]:
        """What the MLP writes differently: of single neurons a product with their rows of ``W_out``."""
        chosen = [edit for edit in edits if edit.site == "post"]
        post = self._here("post")
        if any(edit.neuron is None for edit in chosen):
            return affine(self._made("post", chosen, post) - post, self.w.W_out, None)
        neurons = sorted({int(edit.neuron) % post.shape[-1] for edit in chosen if edit.neuron is not None})
        some = post[..., neurons]
        moved = [
            dataclasses.replace(edit, neuron=neurons.index(int(edit.neuron) % post.shape[-1]))
            for edit in chosen
            if edit.neuron is not None
        ]
        change = self._made("post", moved, some) - some
        # Rounded once, whatever the dtype.
        dtype = torch.promote_types(change.dtype, torch.float32)
        written = torch.zeros_like(self._here("resid_post"), dtype=dtype)
        for first in range(0, len(neurons), NEURONS_AT_ONCE):
            part = slice(first, first + NEURONS_AT_ONCE)
            written += change[..., part].to(dtype) @ self.w.W_out[neurons[part]].to(dtype)
        return written.to(change.dtype)


def _change_of_heads(w: BlockWeights, edited: Tensor, z: Tensor, heads: set[int]) -> Float[Tensor, "1 row d_model"]:
    """``(edited - z) @ W_O`` from the first to the last of the heads, so that no part of ``W_O`` is copied.

    Of heads in between nothing is changed, and zeros are added.
    """
    some = slice(min(heads), max(heads) + 1)
    return affine((edited[..., some, :] - z[..., some, :]).flatten(-2), w.W_O[some].flatten(0, 1), None)


def _renumbered(edit: Edit, heads: Sequence[int], kv_heads: Sequence[int], spec: ModelSpec) -> Edit:
    """Returns an edit for the heads that are computed again, numbered among themselves."""
    by_kv = "kv_head" in activation(edit.site).dims
    some = kv_heads if by_kv else heads
    if edit.head is not None:
        n_heads = spec.attention.n_kv_heads if by_kv else spec.n_heads
        return dataclasses.replace(edit, head=some.index(edit.head % n_heads))
    # All heads: then all are computed again.
    return edit
