"""What is changed in each run of a sweep, and how such a run departs from the clean one."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from jaxtyping import Int
from torch import Tensor

from fastinterp.errors import OptionError
from fastinterp.model.attention import SPLIT_INPUTS, check_split_inputs
from fastinterp.model.forward import check_taps, missing_because
from fastinterp.model.intervene import Edit, Taps
from fastinterp.model.spec import ModelSpec
from fastinterp.names import activation, check_index

BEFORE = frozenset({"resid_pre", "attn_in", "ln1_scale", "ln1_normalized"})
"""Sites in front of the attention that all heads read."""

INPUTS = frozenset({"q_input", "k_input", "v_input"})
"""Every head's own copies of the residual, in front of the norm."""

ATTENTION = INPUTS | {"q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern"}
"""Sites that change what some heads mix, and nothing else of the attention."""

HEADS = frozenset({"z", "result"})
"""Sites that change what some heads write."""

WRITE_NORM = frozenset({"ln1_post_scale", "ln1_post_normalized"})
"""Sites inside of the norm of what all heads write."""

WRITTEN = frozenset({"attn_raw", "attn_out", "resid_mid"})
"""Sites between the heads and the MLP, each a sum with the clean one."""

AFTER = frozenset({"post", "mlp_raw", "mlp_out", "resid_post"})
"""Sites behind the MLP's nonlinearity."""

BEHIND = frozenset({"ln_final_scale", "ln_final_normalized"})
"""Sites that no final residual depends on."""

Stage = Literal["block", "heads", "post", "forward"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One edited run: its edits are made together, and no other variant's are."""

    edits: tuple[Edit, ...]

    def __post_init__(self) -> None:
        """Refuses a variant that changes nothing."""
        if not self.edits:
            raise OptionError("a variant needs at least one edit: Variant(edits=(Edit(site='z', layer=0, head=0),))")

    def resolved(self, spec: ModelSpec) -> "Variant":
        """Returns the variant with layers counted from the first.

        Raises:
            SiteRangeError: a layer, head or neuron that the model does not have.
            UnknownActivationError: a site that this architecture does not have.
            OptionError: a site behind the final residual, or two that cannot be edited in one run.
        """
        edits = []
        for edit in self.edits:
            layer = check_index("layer", edit.layer, spec.n_layers)
            site = activation(edit.site)
            if missing_because(spec, edit.site):
                check_taps(spec, Taps(wanted=frozenset({(edit.site, layer if site.per_layer else None)})))
            if edit.site in BEHIND:
                raise OptionError(
                    f"{edit.site} is behind the final residual, with which a sweep ends: edit resid_post of layer "
                    f"{spec.n_layers - 1}, or give the taps to final_logits"
                )
            dims = site.dims
            if edit.head is not None:
                n_heads = spec.attention.n_kv_heads if "kv_head" in dims else spec.n_heads
                check_index("kv_head" if "kv_head" in dims else "head", edit.head, n_heads)
            if edit.neuron is not None:
                check_index("neuron", edit.neuron, spec.mlp.d_mlp)
            edits.append(edit if edit.layer == layer else dataclasses.replace(edit, layer=layer))
        for layer in {edit.layer for edit in edits if edit.site in SPLIT_INPUTS}:
            check_split_inputs(spec, layer, {edit.site for edit in edits if edit.layer == layer})
        if all(edit is given for edit, given in zip(edits, self.edits, strict=True)):
            return self
        return Variant(edits=tuple(edits))

    @property
    def first_layer(self) -> int:
        """The layer below which the run is the clean run."""
        return min(edit.layer for edit in self.edits)

    def at_layer(self, layer: int) -> tuple[Edit, ...]:
        """The edits of one layer, in the order given."""
        # By way of a list: a tuple made from a generator is one of ten, cut short. Of those cut short the interpreter
        # keeps up to 2000 for later, and makes the next one of ten anew.
        return tuple([edit for edit in self.edits if edit.layer == layer])

    def stage(self, spec: ModelSpec) -> Stage:
        """Where the run departs from the clean one.

        ``heads``: by what heads of its first layer write; ``post``: by what the MLP of that layer writes; ``block``:
        that block is run with the edits made; ``forward``: outside of the blocks, the whole model is.
        """
        if not all(activation(edit.site).per_layer for edit in self.edits):
            return "forward"
        sites = {edit.site for edit in self.at_layer(self.first_layer)}
        if sites <= AFTER:
            return "post"
        if sites & (BEFORE | WRITE_NORM) or (spec.parallel and not sites <= ATTENTION | HEADS):
            return "block"
        return "heads" if sites & (ATTENTION | HEADS | WRITTEN) else "block"

    def needs_whole_sequences(self, spec: ModelSpec) -> bool:
        """Whether a block is run with edits of its scores or patterns, which are those of whole sequences."""
        by_query = [edit.layer for edit in self.edits if edit.by_query]
        return bool(by_query) and (max(by_query) > self.first_layer or self.stage(spec) == "block")

    @property
    def enters_by_heads(self) -> bool:
        """Whether all edits are of ``z`` in one layer, so that the run differs only by what those heads write."""
        return all(edit.site == "z" and edit.layer == self.first_layer for edit in self.edits)

    def start(self, n_tokens: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Returns the position of every prompt in front of which nothing is changed, at most its last."""
        first = n_tokens - 1
        for edit in self.edits:
            if edit.positions is None:
                return torch.zeros_like(n_tokens)
            # The first True of a row; a row of False has none, and argmax gives 0.
            found = edit.positions.int().argmax(-1)
            first = torch.minimum(first, torch.where(edit.positions.any(-1), found, first))
        return first


class Variants(Sequence[Variant]):
    """Variants that are made when they are asked for: thousands of them would take megabytes."""

    def __init__(self, n_variants: int, make: Callable[[int], Variant]) -> None:
        """``make`` returns the variant of an index, an equal one every time."""
        self._n_variants, self._make = n_variants, make

    def __len__(self) -> int:
        """How many there are."""
        return self._n_variants

    @overload
    def __getitem__(self, index: int) -> Variant: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Variant]: ...

    def __getitem__(self, index: int | slice) -> Variant | Sequence[Variant]:
        """Makes one variant, or some."""
        chosen = range(self._n_variants)[index]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(i) for i in chosen]


def head_variants(spec: ModelSpec) -> list[Variant]:
    """Returns one variant per head, layer by layer, that replaces the head's ``z`` by zero at every position."""
    return [
        Variant(edits=(Edit(site="z", layer=layer, head=head, replacement=0.0),))
        for layer in range(spec.n_layers)
        for head in range(spec.n_heads)
    ]
