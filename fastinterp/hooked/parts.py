"""The parts of a model by their paths, as TransformerLens has them: parameters, hook points, and something to call.

Calling a part computes what it computes within a run, of whatever it is given; hooks on what lies inside of it run.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.errors import OptionError, nearest
from fastinterp.hooked.hooks import HookPoints
from fastinterp.hooked.parameters import parameter
from fastinterp.model.attention import attend, make_frame, ready
from fastinterp.model.forward import block, mix_heads
from fastinterp.model.intervene import Taps
from fastinterp.model.mlp import mlp
from fastinterp.model.model import Model, check_tokens
from fastinterp.model.norms import tapped_norm
from fastinterp.model.products import affine
from fastinterp.model.weights import BlockWeights, NormWeights

Resid = Float[Tensor, "batch pos d_model"]
NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")


class Part:
    """A part of the model by its path, such as ``blocks.0.attn``: its parameters, hook points and parts."""

    def __init__(self, path: str, model: Model, points: HookPoints) -> None:
        self._path, self._model, self._points = path, model, points

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = f"{self._path}.{name}"
        if path in self._points.by_name:
            return self._points.by_name[path]
        if name.startswith(("W_", "b_")) and self._path.startswith("blocks."):
            return parameter(self._model, self._block, name)
        inside = {known[len(self._path) + 1 :] for known in self._points.by_name if known.startswith(self._path + ".")}
        if any(known.startswith(name + ".") for known in inside):
            kind = {"attn": AttentionPart, "mlp": MLPPart}.get(name, NormPart if name in NORMS else Part)
            return kind(path, self._model, self._points)
        raise AttributeError(f"{self._path} has no {name!r}{nearest(name, inside)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(
                f"{self._path}.{name} cannot be set: replace activations with hooks, or change the parameter in place"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<{self._path}>"

    @property
    def _layer(self) -> int:
        return int(self._path.split(".")[1])

    @property
    def _block(self) -> BlockWeights:
        return self._model.weights.blocks[self._layer]

    def _taps(self) -> Taps:
        return self._points.taps(root=False)

    def _checked(self, x: Any, *, n_axes: int | None = None) -> Tensor:
        d_model = self._model.spec.d_model
        if not isinstance(x, Tensor) or x.shape[-1:] != (d_model,) or x.ndim != (n_axes or x.ndim):
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            wanted = f"[batch, pos, {d_model}]" if n_axes else f"[..., {d_model}]"
            raise OptionError(f"{self._path} is called with {wanted}, not {given}")
        return x.to(device=self._model.device, dtype=self._model.dtype)


class BlockPart(Part):
    """A block; call it with the residual stream in front of it."""

    def __call__(self, resid_pre: Any) -> Resid:
        """Returns ``resid_post``."""
        x = self._checked(resid_pre, n_axes=3)
        frame = make_frame(self._model.spec, x.shape[1], device=x.device, dtype=x.dtype)
        return block(self._model.spec, self._block, self._layer, x, frame, self._taps())


class AttentionPart(Part):
    """The attention of a block; call it with what ``ln1`` returns."""

    def __call__(self, query_input: Any, key_input: Any = None, value_input: Any = None, **others: Any) -> Resid:
        """Returns the output of the heads and ``b_O``, before a post-norm.

        Raises:
            OptionError: inputs of keys and values that differ from that of the queries (replace ``hook_k_input`` and
                ``hook_v_input`` with hooks), or a cache or mask.
        """
        for name, other in (("key_input", key_input), ("value_input", value_input)):
            if other is not None and other is not query_input:
                raise OptionError(f"{name} must be query_input: replace hook_{name[0]}_input with a hook instead")
        if any(value is not None for value in others.values()):
            raise OptionError(f"{self._path} takes an input only, not {', '.join(others)}")
        spec, w, layer, taps = self._model.spec, self._block, self._layer, self._taps()
        x = self._checked(query_input, n_axes=3)
        frame = make_frame(spec, x.shape[1], device=x.device, dtype=x.dtype)
        qkv = affine(x, w.W_QKV, w.b_QKV).unflatten(-1, (-1, spec.attention.d_head))
        n, n_kv = spec.attention.n_heads, spec.attention.n_kv_heads
        q = taps("q", layer, qkv[..., :n, :])
        k = taps("k", layer, qkv[..., n : n + n_kv, :])
        v = taps("v", layer, qkv[..., n + n_kv :, :])
        q, k = ready(spec, layer, q, w.q_norm, frame), ready(spec, layer, k, w.k_norm, frame)
        if spec.position.kind == "rotary":
            q, k = taps("rot_q", layer, q), taps("rot_k", layer, k)
        z = taps("z", layer, attend(spec, layer, q, k, v, frame, taps))
        return taps("attn_raw", layer, mix_heads(w, layer, z, taps))


class MLPPart(Part):
    """The MLP of a block; call it with what ``ln2`` returns."""

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Returns its output, before a post-norm."""
        taps, layer = self._taps(), self._layer
        return taps("mlp_raw", layer, mlp(self._model.spec, self._block, layer, self._checked(x), taps))


class NormPart(Part):
    """A norm; call it with what it normalises."""

    @property
    def _weights(self) -> NormWeights:
        name = self._path.rsplit(".", 1)[-1]
        weights = self._model.weights.ln_final if name == "ln_final" else getattr(self._block, name)
        assert isinstance(weights, NormWeights)
        return weights

    def __getattr__(self, name: str) -> Any:
        if name in ("w", "b"):
            value = getattr(self._weights, name)
            if value is None:
                raise AttributeError(
                    f"{self._path} has no {name!r}: it is folded into the next matrix, or the model has none"
                )
            return value
        return super().__getattr__(name)

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Returns it normalised, with the norm's weight and bias where these are not folded into the next matrix."""
        name = self._path.rsplit(".", 1)[-1]
        layer = None if name == "ln_final" else self._layer
        return tapped_norm(self._model.spec, name, layer, self._checked(x), self._weights, self._taps())


class Embedding:
    """An embedding, ``W_E`` or ``W_pos``; call it with tokens."""

    def __init__(self, model: Model, name: str) -> None:
        self._model, self._name = model, name

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name != self._name or getattr(self._model.weights, name) is None:
            raise AttributeError(f"this part of the model has no {name!r}")
        table: Tensor = getattr(self._model.weights, name)
        return table

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Returns the embedding of the tokens, or of their positions; hooks (``hook_embed``) stand behind it.

        Raises :class:`~fastinterp.errors.TokenRangeError` and its like for tokens that the model cannot take.
        """
        tokens = torch.atleast_2d(torch.as_tensor(tokens, device=self._model.device))
        check_tokens(self._model.spec, tokens)
        table: Tensor = getattr(self, self._name)
        if self._name == "W_E":
            return table[tokens]
        return table[: tokens.shape[1]].expand(*tokens.shape, -1)


class Unembed:
    """The unembedding; call it with a normalised residual stream."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding matrix."""
        return self._model.weights.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Its bias, zero if there is none."""
        b_U = self._model.weights.b_U
        return self.W_U.new_zeros(self.W_U.shape[1]) if b_U is None else b_U

    def __call__(self, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Returns ``x @ W_U + b_U``: neither the norm in front nor a softcap behind."""
        return affine(x, self.W_U, self._model.weights.b_U)
