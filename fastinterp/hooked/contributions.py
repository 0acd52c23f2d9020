"""What heads, neurons and biases wrote to the residual stream, read out of a cache.

Everything goes through one :class:`Readout`: the norms at whose scale a contribution is frozen, and the directions that
it is projected onto. With a projection nothing of size ``[.., unit, d_model]`` is formed.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.errors import OptionError, SiteRangeError
from fastinterp.model.model import Model
from fastinterp.model.norms import center, norm_scale
from fastinterp.model.spec import ModelSpec, Norm
from fastinterp.model.weights import BlockWeights, NormWeights

SliceInput = SupportsIndex | slice | tuple[int | None, ...] | list[int] | list[bool] | None
"""An integer (which drops the axis), ``(stop,)``, ``(start, stop)``, ``(start, stop, step)``, a slice, or a list,
array or tensor of indices or booleans; ``None`` is everything."""

Stack = Float[Tensor, "component *rows d_out"]


def model_of(model: Any) -> Model:
    """Returns the :class:`Model` of a ``HookedTransformer``, or the model itself."""
    found = getattr(model, "model", model)
    if not isinstance(found, Model):
        raise OptionError(
            f"this cache has no model ({type(found).__name__} instead): set cache.model, or make it with "
            "ActivationCache(cache_dict, model)"
        )
    return found


def is_integer(index: SliceInput) -> bool:
    """Whether the index is one integer, which drops its axis."""
    return not (index is None or isinstance(index, slice | tuple | list)) and torch.as_tensor(index).ndim == 0


def take(x: Tensor, index: SliceInput, dim: int, what: str = "position") -> Tensor:
    """Returns ``x`` at ``index`` along ``dim``; raises :class:`SiteRangeError` for what is not there."""
    if index is None:
        return x
    size = x.shape[dim]
    if isinstance(index, tuple | slice):
        span = index if isinstance(index, slice) else slice(*index)
        return x[(slice(None),) * (dim % x.ndim) + (span,)]
    chosen = torch.as_tensor(index.tolist() if isinstance(index, np.ndarray | np.generic) else index, device=x.device)
    if chosen.dtype == torch.bool and chosen.shape == (size,):
        chosen = chosen.nonzero()[:, 0]
    if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.ndim > 1:
        raise OptionError(
            f"{what}s cannot be taken by {index!r}: give an integer, (start, stop), or a list of integers"
        )
    outside = chosen[(chosen < -size) | (chosen >= size)]
    if outside.numel():
        raise SiteRangeError(f"{what} {int(outside.flatten()[0])} is out of range: there are {size} (0 to {size - 1})")
    if chosen.ndim == 0:
        return x.select(dim, int(chosen))
    return x.index_select(dim, chosen.long() % size)


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What becomes of a contribution to the residual stream: ``frozen`` norms, one after the other, then ``project``.

    All of it is linear: a norm's own bias is left out, so that the contributions still sum to the whole.
    """

    norm: Norm
    frozen: tuple[tuple[Float[Tensor, "*rows 1"], NormWeights], ...] = ()
    project: Float[Tensor, "d_model n_out"] | None = None

    def after(self, scale: Float[Tensor, "*rows 1"], weights: NormWeights) -> "Readout":
        """Returns the readout of what goes through one more norm first."""
        return Readout(norm=self.norm, frozen=((scale, weights), *self.frozen), project=self.project)

    def __call__(self, x: Float[Tensor, "*stack d_model"]) -> Float[Tensor, "*stack d_out"]:
        """Reads contributions out."""
        for scale, weights in self.frozen:
            x = (center(self.norm, x) / scale).to(x.dtype)
            x = x if weights.w is None else x * weights.w.to(x.device)
        if self.project is None:
            return x
        wide = torch.promote_types(x.dtype, self.project.dtype)
        return x.to(wide) @ self.project.to(wide)

    def unit(
        self, x: Float[Tensor, "*rows unit n_in"], W: Float[Tensor, "unit n_in d_model"]
    ) -> Float[Tensor, "unit *rows d_out"]:
        """Reads out ``x[unit] @ W[unit]`` of every unit; with a projection, this goes through ``W @ project``."""
        wide = torch.promote_types(x.dtype, W.dtype)
        x, W = x.to(wide), W.to(device=x.device, dtype=wide)
        if self.project is None:
            return self(torch.einsum("...un,und->u...d", x, W))
        onto = self.project
        for scale, weights in reversed(self.frozen):
            onto = onto if weights.w is None else onto * weights.w.to(onto.device)[:, None]
            onto = center(self.norm, onto.t()).t()
            x = (x / scale.unsqueeze(-1)).to(x.dtype)
        wide = torch.promote_types(wide, onto.dtype)
        return torch.einsum("...un,und->u...d", x.to(wide), W.to(wide) @ onto.to(wide))


def on_device(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """Returns the weight where the activations are: a cache may have been moved to the CPU."""
    return None if weight is None else weight.to(x.device)


def stacked(parts: Iterable[Float[Tensor, "unit *rows d_out"]], n: int) -> Stack:
    """Concatenates parts that have ``n`` rows together, one at a time, so that they are not held twice."""
    stack, filled = None, 0
    parts = iter(parts)
    for part in parts:
        if part.requires_grad and stack is None:
            # Autograd would copy the whole stack once for each part.
            return torch.cat([part, *parts])
        if stack is None:
            stack = part.new_empty((n, *part.shape[1:]))
        stack = stack.to(torch.promote_types(stack.dtype, part.dtype))
        stack[filled : filled + len(part)] = part
        filled += len(part)
    assert stack is not None
    assert filled == n
    return stack


def with_remainder(parts: Iterable[Tensor], whole: Tensor) -> Iterator[Tensor]:
    """Yields the parts and, last, what they lack to the whole."""
    for part in parts:
        whole = whole - part.sum(0)
        yield part
    yield whole[None]


class Contributions(ABC):
    """A cache, as far as it knows what every part of the model wrote."""

    model: Any
    has_batch_dim: bool

    @abstractmethod
    def __getitem__(self, key: Any) -> Tensor:
        """Returns an activation by name."""

    @abstractmethod
    def stored(self, name: str, layer: int | None = None) -> Tensor | None:
        """Returns an activation of ``fastinterp.names`` if it is stored."""

    @property
    def spec(self) -> ModelSpec:
        """The architecture of the model."""
        return model_of(self.model).spec

    def _weights(self, layer: int) -> BlockWeights:
        return model_of(self.model).weights.blocks[layer]

    # Where in the model ---------------------------------------------------------------------------------------------

    def _layer(self, layer: int | None, mlp_input: bool = False) -> int:
        n = self.spec.n_layers
        if layer is None or layer == -1:
            layer = n
        if not 0 <= layer <= n:
            raise SiteRangeError(f"layer {layer} is out of range: 0 to {n}; {n}, -1 and None are the final residual")
        if mlp_input and layer == n:
            raise SiteRangeError(f"mlp_input=True needs a layer that has an MLP: 0 to {n - 1}, not the final residual")
        return layer

    def _n_attn(self, layer: int, mlp_input: bool) -> int:
        """How many layers' attention wrote to this input; in a parallel block the MLP does not see its attention."""
        return layer + (mlp_input and not self.spec.parallel)

    def _input(self, layer: int, mlp_input: bool) -> Tensor:
        """The residual stream in front of a layer, which is also what the layer before left."""
        if mlp_input:
            return self["mlp_in", layer]
        if layer == self.spec.n_layers or (layer and self.stored("resid_pre", layer) is None):
            return self["resid_post", layer - 1]
        return self["resid_pre", layer]

    def _embeds(self) -> list[tuple[str, Tensor]]:
        names = ["embed", "pos_embed"] if self.spec.position.kind == "learned" else ["embed"]
        return [(name, self[name]) for name in names]

    # What its norm did ----------------------------------------------------------------------------------------------

    def _norm(self, layer: int, mlp_input: bool) -> NormWeights:
        if layer == self.spec.n_layers:
            return model_of(self.model).weights.ln_final
        return self._weights(layer).ln2 if mlp_input else self._weights(layer).ln1

    def _scale(
        self, layer: int, mlp_input: bool, pos_slice: SliceInput, batch_slice: SliceInput = None
    ) -> Float[Tensor, "*rows 1"]:
        if layer == self.spec.n_layers:
            scale = self["ln_final_scale"]
        else:
            scale = self["ln2_scale" if mlp_input else "ln1_scale", layer]
        scale = take(scale, pos_slice, -2)
        return take(scale, batch_slice, 0, "prompt") if self.has_batch_dim else scale

    def _readout(
        self,
        layer: int,
        mlp_input: bool,
        pos_slice: SliceInput,
        apply_ln: bool,
        project: Float[Tensor, "d_model n_out"] | None = None,
        batch_slice: SliceInput = None,
    ) -> Readout:
        readout = Readout(norm=self.spec.norm, project=project)
        if not apply_ln:
            return readout
        return readout.after(self._scale(layer, mlp_input, pos_slice, batch_slice), self._norm(layer, mlp_input))

    # What was written -----------------------------------------------------------------------------------------------

    def _result(self, layer: int) -> Tensor | None:
        """The stored head results, if they are that (a bridge keeps something else under this name)."""
        result = self.stored("result", layer)
        shape = (self.spec.n_heads, self.spec.d_model)
        fits = result is not None and result.ndim == 3 + self.has_batch_dim and result.shape[-2:] == shape
        return result if fits else None

    def _heads(self, layer: int, pos_slice: SliceInput, readout: Readout) -> Float[Tensor, "head *rows d_out"]:
        w = self._weights(layer)
        if w.ln1_post is not None:
            readout = readout.after(self._post_scale("ln1_post_scale", layer, pos_slice), w.ln1_post)
        result = self._result(layer)
        if result is not None:
            return readout(take(result, pos_slice, -3).movedim(-2, 0))
        return readout.unit(take(self["z", layer], pos_slice, -3), w.W_O)

    def _neurons(
        self, layer: int, pos_slice: SliceInput, neuron_slice: SliceInput, readout: Readout
    ) -> Float[Tensor, "neuron *rows d_out"]:
        w = self._weights(layer)
        if w.ln2_post is not None:
            readout = readout.after(self._post_scale("ln2_post_scale", layer, pos_slice), w.ln2_post)
        post = take(take(self["post", layer], pos_slice, -2), neuron_slice, -1, "neuron")
        return readout.unit(post.unsqueeze(-1), take(w.W_out, neuron_slice, 0, "neuron").unsqueeze(1))

    def _post_scale(self, name: str, layer: int, pos_slice: SliceInput) -> Float[Tensor, "*rows 1"]:
        """The scale of a post-norm in the run; without it, that of what went into the norm."""
        scale = self.stored(name, layer)
        if scale is not None:
            return take(scale, pos_slice, -2)
        w = self._weights(layer)
        raw = self.stored("attn_raw" if name == "ln1_post_scale" else "mlp_raw", layer)
        if raw is not None:
            return norm_scale(self.spec.norm, take(raw, pos_slice, -2))
        if name == "ln2_post_scale":
            written, b = _product(take(self["post", layer], pos_slice, -2), w.W_out), w.b_out
        elif (result := self._result(layer)) is not None:
            written, b = take(result, pos_slice, -3).sum(-2), w.b_O
        else:
            written, b = _product(take(self["z", layer], pos_slice, -3).flatten(-2), w.W_O.flatten(0, 1)), w.b_O
        return norm_scale(self.spec.norm, written if b is None else written + b.to(written.device))

    def _biases(self, n_attn: int, n_mlp: int, pos_slice: SliceInput) -> Float[Tensor, "*rows d_model"]:
        """The sum of ``b_O`` of the first ``n_attn`` layers and ``b_out`` of the first ``n_mlp``, as they arrived."""
        like = take(self["embed"], pos_slice, -2)
        total = torch.zeros_like(like)
        sites = [("ln1_post", "b_O", layer) for layer in range(n_attn)]
        sites += [("ln2_post", "b_out", layer) for layer in range(n_mlp)]
        for post_norm, name, layer in sites:
            w = self._weights(layer)
            b, norm = on_device(getattr(w, name), like), getattr(w, post_norm)
            if norm is None:
                total = total if b is None else total + b
                continue
            if b is not None:
                frozen = ((self._post_scale(f"{post_norm}_scale", layer, pos_slice), norm),)
                total = total + Readout(norm=self.spec.norm, frozen=frozen)(b.expand_as(like))
            total = total if norm.b is None else total + norm.b.to(like.device)
        return total


def _product(x: Tensor, W: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, W.dtype)
    return x.to(wide) @ W.to(device=x.device, dtype=wide)
