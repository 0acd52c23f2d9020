"""The run that replacements of ``SOURCE`` are taken from, layer by layer beside the clean run."""

from collections.abc import Iterable, Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.model.attention import make_frame
from fastinterp.model.forward import block, embed, forward
from fastinterp.model.intervene import Capture, Edit, Taps
from fastinterp.model.model import Model
from fastinterp.model.products import EXACT, Products
from fastinterp.model.spec import ModelSpec
from fastinterp.model.weights import Weights
from fastinterp.names import activation


class SourceRun:
    """A forward of other prompts of the same shape that shows the activations of one layer at a time."""

    def __init__(
        self,
        model: Model,
        tokens: Int[Tensor, "batch pos"],
        products: Products = EXACT,
        *,
        begin: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
    ) -> None:
        """``begin``: a layer, and the residual in front of it."""
        self.model, self.products = model, products
        self.layer, self.resid = (0, embed(model.weights, tokens)) if begin is None else begin
        self.frame = make_frame(model.spec, tokens.shape[1], device=self.resid.device, dtype=self.resid.dtype)

    def step(self, layer: int, edits: Iterable[Edit]) -> dict[str, Tensor]:
        """Runs block ``layer``, and returns the activations that edits of it take from here."""
        spec = self.model.spec
        assert layer == self.layer
        sites = {edit.site for edit in edits if edit.layer == layer and isinstance(edit.replacement, str)}
        taps = Taps.of(spec.n_layers, capture=[Capture(name=site, layers=(layer,)) for site in sorted(sites)])
        w = self.model.weights.blocks[layer].multiplied_by(self.products)
        self.resid = block(spec, w, layer, self.resid, self.frame, taps)
        self.layer += 1
        return {name: value for (name, _), value in taps.values.items()}

    @staticmethod
    def resolve_all(
        spec: ModelSpec, weights: Weights, tokens: Int[Tensor, "batch pos"] | None, edits: Sequence[Edit]
    ) -> list[Edit]:
        """Returns edits of any layers with their values from a whole source run."""
        wanted = {(edit.site, edit.layer) for edit in edits if isinstance(edit.replacement, str)}
        if not wanted:
            return list(edits)
        assert tokens is not None
        captures = [
            Capture(name=site, layers=(layer,) if activation(site).per_layer else None) for site, layer in wanted
        ]
        taps = Taps.of(spec.n_layers, capture=captures)
        forward(spec, weights, tokens, taps=taps)
        resolved = []
        for edit in edits:
            if isinstance(edit.replacement, str):
                layer = edit.layer if activation(edit.site).per_layer else None
                edit = edit.sourced(taps.values[edit.site, layer])
            resolved.append(edit)
        return resolved


def sourced(edits: Iterable[Edit], values: Mapping[str, Tensor]) -> tuple[Edit, ...]:
    """Returns edits of one layer with what stands for the source resolved."""
    # By way of a list, as in Variant.at_layer.
    return tuple([edit.sourced(values[edit.site]) if isinstance(edit.replacement, str) else edit for edit in edits])
