"""The parts and parameters of a ``HookedTransformer``, and what follows from parameters alone."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.errors import SiteRangeError, UnsupportedConfigError, nearest
from fastinterp.hooked.factored_matrix import FactoredMatrix
from fastinterp.hooked.hooks import HookPoint, HookPoints
from fastinterp.hooked.parameters import named, stacked
from fastinterp.hooked.parts import BlockPart, Embedding, NormPart, Unembed
from fastinterp.model.model import Model
from fastinterp.names import head_label

STACKED = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_out")
# What TransformerLens has and this does not, and what to type instead.
INSTEAD = {
    "all_composition_scores": "multiply the circuits: (model.OV[0, 3] @ model.QK[1, 2]).norm()",
    "load_state_dict": "HookedTransformer.from_pretrained(directory)",
    "original_model": "model.model, whose weights are model.model.weights",
    "enable_compatibility_mode": "from_pretrained(...), which processes the weights as that does",
    "process_weights_": "from_pretrained(..., fold_ln=True), which processes when it loads",
    "load_and_process_state_dict": "from_pretrained(...), which processes when it loads",
    "fold_layer_norm": "from_pretrained(..., fold_ln=True)",
    "center_writing_weights": "from_pretrained(..., center_writing_weights=True)",
    "center_unembed": "from_pretrained(..., center_unembed=True)",
    "fold_value_biases": "from_pretrained(..., fold_value_biases=True)",
    "refactor_factored_attn_matrices": "from_pretrained(..., refactor_factored_attn_matrices=True)",
    "set_ungroup_grouped_query_attention": "model.W_K.repeat_interleave(n_heads // n_key_value_heads, 1)",
    "sample_datapoint": "fastinterp.PromptSet.read(path) for prompts of your own",
    "modules": "model.mod_dict, or model.named_parameters()",
    "named_modules": "model.mod_dict.items()",
    "train": "another library to train with: parameters take no part in the gradient here",
    "cache_all": "logits, cache = model.run_with_cache(tokens)",
    "add_caching_hooks": "logits, cache = model.run_with_cache(tokens, names_filter=...)",
    "get_caching_hooks": "logits, cache = model.run_with_cache(tokens, names_filter=...)",
    "remove_all_hook_fns": "model.reset_hooks()",
    "hook_points": "model.hook_dict.values()",
    "W_pos": "model.W_E: its positions are rotary, there is no table of them",
    "W_E_pos": "model.W_E: its positions are rotary, there is no table of them",
    "n_params_total": "sum(p.numel() for p in model.parameters())",
}


class HeadLabels(list[str]):
    """A list, which may also be called: a property in TransformerLens 4, a method before."""

    def __call__(self) -> "HeadLabels":
        """Returns itself."""
        return self


class ParameterSurface:
    """The attributes of :class:`~fastinterp.hooked.transformer.HookedTransformer` that speak of parameters."""

    model: Model
    points: HookPoints

    # Parts --------------------------------------------------------------------------------------------------------

    @property
    def unembed(self) -> Unembed:
        """The unembedding."""
        return Unembed(self.model)

    @property
    def ln_final(self) -> NormPart:
        """The final norm."""
        return NormPart("ln_final", self.model, self.points)

    @property
    def blocks(self) -> list[BlockPart]:
        """The blocks: ``model.blocks[3].attn.W_O``, ``model.blocks[3].attn.hook_z``, ``model.blocks[3].mlp(x)``."""
        return [BlockPart(f"blocks.{layer}", self.model, self.points) for layer in range(self.model.spec.n_layers)]

    @property
    def embed(self) -> Embedding:
        """The embedding: ``model.embed.W_E``, ``model.embed(tokens)``."""
        return Embedding(self.model, "W_E")

    @property
    def pos_embed(self) -> Embedding:
        """The position embedding: ``model.pos_embed.W_pos``, ``model.pos_embed(tokens)``."""
        return Embedding(self.model, "W_pos")

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """All hook points by name."""
        return self.points.by_name

    @property
    def mod_dict(self) -> dict[str, Any]:
        """All parts and hook points by name: ``model.mod_dict["blocks.3.attn"]``."""
        parts: dict[str, Any] = {"embed": self.embed, "unembed": self.unembed, "ln_final": self.ln_final}
        if self.model.weights.W_pos is not None:
            parts["pos_embed"] = self.pos_embed
        for number, block in enumerate(self.blocks):
            parts[f"blocks.{number}"] = block
        for name in self.points.by_name:
            path = name.split(".")
            if len(path) == 4:
                parts.setdefault(".".join(path[:3]), getattr(parts[".".join(path[:2])], path[2]))
        return parts | self.points.by_name

    # Parameters -----------------------------------------------------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.model.weights.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The position embedding; raises :class:`AttributeError` for models without one."""
        if self.model.weights.W_pos is None:
            raise AttributeError  # __getattr__ says why
        return self.model.weights.W_pos

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """``W_E`` on top of ``W_pos``, a copy; raises :class:`AttributeError` for models without ``W_pos``."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix."""
        return self.model.weights.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The bias of the unembedding, zero if there is none."""
        return self.unembed.b_U

    def __getattr__(self, name: str) -> Any:
        if name in STACKED:
            return stacked(self.model, name)
        points = self.__dict__.get("points")
        if points is not None and name in points.by_name:
            return points.by_name[name]
        if name in INSTEAD:
            raise AttributeError(f"HookedTransformer has no {name!r}: type {INSTEAD[name]}")
        raise AttributeError(f"HookedTransformer has no {name!r}{nearest(name, self._attributes())}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in STACKED:
            raise AttributeError(
                f"{name} cannot be set: it is a copy of the parameters of all blocks. Replace activations with hooks, "
                "or change one block's own tensor in place (model.model.weights.blocks[0])"
            )
        super().__setattr__(name, value)

    def _attributes(self) -> list[str]:
        return [name for name in dir(type(self)) if not name.startswith("_")] + list(STACKED)

    def parameters(self) -> Iterator[Tensor]:
        """Yields the parameters that the model has; they take no part in the gradient."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yields them as ``("blocks.0.attn.W_Q", tensor)``: views, so that changing one in place changes the model."""
        return named(self.model, complete=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all parameters by TransformerLens's names, zeros for biases that the model does not have."""
        return dict(named(self.model, complete=True))

    def tl_parameters(self) -> dict[str, Tensor]:
        """Returns the same as :meth:`state_dict`."""
        return self.state_dict()

    # Circuits -----------------------------------------------------------------------------------------------------

    @property
    def OV(self) -> FactoredMatrix:
        """What every head writes for what it reads: ``W_V @ W_O``, ``[layer, head, d_model, d_model]``, factored."""
        return FactoredMatrix(self._per_head("W_V"), stacked(self.model, "W_O"))

    @property
    def QK(self) -> FactoredMatrix:
        """What every head attends to: ``W_Q @ W_K^T``, ``[layer, head, d_model, d_model]``, factored.

        Without the scale of the scores, biases, rotary positions and norms of queries and keys.
        """
        return FactoredMatrix(stacked(self.model, "W_Q"), self._per_head("W_K").transpose(-2, -1))

    def _per_head(self, name: str) -> Float[Tensor, "layer head d_model d_head"]:
        """A matrix of the KV heads, repeated for every query head that reads it."""
        return stacked(self.model, name).repeat_interleave(self.model.spec.attention.group, 1)

    @property
    def all_head_labels(self) -> HeadLabels:
        """``["L0H0", "L0H1", ...]``."""
        spec = self.model.spec
        return HeadLabels(head_label(layer, head) for layer in range(spec.n_layers) for head in range(spec.n_heads))

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Returns the sum of the biases that the layers before ``layer`` wrote to the residual stream.

        ``mlp_input`` adds ``b_O`` of ``layer`` itself, which its MLP sees (not in a parallel block).

        Raises:
            SiteRangeError: a layer outside of 0 to ``n_layers``.
            UnsupportedConfigError: the biases go through a norm before they arrive, at a scale of its own in each run.
        """
        spec, blocks = self.model.spec, self.model.weights.blocks
        if not 0 <= layer <= spec.n_layers - bool(mlp_input):
            raise SiteRangeError(f"layer {layer} is out of range: 0 to {spec.n_layers - bool(mlp_input)}")
        used = [block.b_O for block in blocks[: layer + (mlp_input and not spec.parallel)]]
        used += [block.b_out for block in blocks[:layer]] if include_mlp_biases else []
        given = [bias for bias in used if bias is not None]
        if spec.post_norms and given:
            raise UnsupportedConfigError(
                "the biases of this model go through a norm after each sublayer: take the entry 'bias' of "
                "cache.get_full_resid_decomposition(return_labels=True)"
            )
        total = self.W_E.new_zeros(spec.d_model)
        for bias in given:
            total = total + bias
        return total
