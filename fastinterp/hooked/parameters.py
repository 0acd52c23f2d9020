"""A model's parameters and settings under the attributes that TransformerLens gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.hooked.hooks import HookPoints
from fastinterp.model.attention import affine
from fastinterp.model.model import Model
from fastinterp.model.norms import normalize
from fastinterp.model.weights import BlockWeights, NormWeights

ACT_FN = {"gelu": "gelu", "gelu_tanh": "gelu_new", "gelu_quick": "quick_gelu", "relu": "relu", "silu": "silu"}


@dataclass(frozen=True, kw_only=True)
class HookedConfig:
    """What notebooks read from ``model.cfg``. ``n_key_value_heads`` is ``None`` where every head has its own."""

    model_name: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int | None
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    d_vocab_out: int
    n_ctx: int
    eps: float
    act_fn: str
    gated_mlp: bool
    normalization_type: str
    positional_embedding_type: str
    parallel_attn_mlp: bool
    attn_scale: float
    device: torch.device
    dtype: torch.dtype
    default_prepend_bos: bool
    use_attn_result: bool
    use_attn_in: bool
    use_split_qkv_input: bool
    use_hook_mlp_in: bool


def config_of(model: Model, flags: set[str], default_prepend_bos: bool) -> HookedConfig:
    """Returns the settings of a model as TransformerLens names them."""
    spec = model.spec
    folded = model.weights.ln_final.w is None
    kind = {"layer": "LN", "rms": "RMS"}[spec.norm.kind]
    attention = spec.attention
    return HookedConfig(
        model_name=model.origin.source,
        n_layers=spec.n_layers,
        n_heads=attention.n_heads,
        n_key_value_heads=None if attention.group == 1 else attention.n_kv_heads,
        d_model=spec.d_model,
        d_head=attention.d_head,
        d_mlp=spec.mlp.d_mlp,
        d_vocab=spec.d_vocab,
        d_vocab_out=spec.d_vocab,
        n_ctx=spec.n_ctx,
        eps=spec.norm.eps,
        act_fn=ACT_FN[spec.mlp.activation],
        gated_mlp=spec.mlp.kind == "gated",
        normalization_type=kind + "Pre" if folded else kind,
        positional_embedding_type={"learned": "standard", "rotary": "rotary"}[spec.position.kind],
        parallel_attn_mlp=spec.parallel,
        attn_scale=1.0 / attention.scale,
        device=model.device,
        dtype=model.dtype,
        default_prepend_bos=default_prepend_bos,
        use_attn_result="use_attn_result" in flags,
        use_attn_in="use_attn_in" in flags,
        use_split_qkv_input="use_split_qkv_input" in flags,
        use_hook_mlp_in="use_hook_mlp_in" in flags,
    )


def stacked(model: Model, name: str) -> Tensor:
    """Returns a parameter of all blocks, ``[layer, ...]``, a copy; raises :class:`AttributeError` if there is none."""
    return torch.stack([parameter(model, block, name) for block in model.weights.blocks])


def parameter(model: Model, block: BlockWeights, name: str) -> Tensor:
    """Returns a block's parameter; a bias that the model does not have is zero, as in TransformerLens."""
    value = getattr(block, name)
    if isinstance(value, Tensor):
        return value
    spec, attention = model.spec, model.spec.attention
    shapes: dict[str, tuple[int, ...]] = {
        "b_Q": (attention.n_heads, attention.d_head),
        "b_K": (attention.n_kv_heads, attention.d_head),
        "b_V": (attention.n_kv_heads, attention.d_head),
        "b_O": (spec.d_model,),
        "b_in": (spec.mlp.d_mlp,),
        "b_out": (spec.d_model,),
    }
    if name not in shapes:
        raise AttributeError(f"this model has no {name}: its MLP has no gate")
    return block.W_O.new_zeros(shapes[name])


class Part:
    """A part of the model by its path, such as ``blocks.0.attn``: its parameters, hook points and parts."""

    def __init__(self, path: str, points: HookPoints, parameters: Callable[[str], Tensor] | None = None) -> None:
        self._path, self._points, self._parameters = path, points, parameters

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = f"{self._path}.{name}"
        if path in self._points.by_name:
            return self._points.by_name[path]
        if name.startswith(("W_", "b_")) and self._parameters is not None:
            return self._parameters(name)
        if any(known.startswith(path + ".") for known in self._points.by_name):
            return Part(path, self._points, self._parameters)
        raise AttributeError(f"{self._path} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(
                f"{self._path}.{name} cannot be set: replace activations with hooks, or change the parameter in place"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<{self._path}>"


class Table:
    """An embedding as a part of the model: it has one parameter."""

    def __init__(self, model: Model, name: str) -> None:
        self._model, self._name = model, name

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("__") or name != self._name or getattr(self._model.weights, name) is None:
            raise AttributeError(f"this part of the model has no {name!r}")
        table: Tensor = getattr(self._model.weights, name)
        return table


class FinalNorm(Part):
    """The norm in front of the unembedding; call it with a residual stream."""

    def __init__(self, model: Model, points: HookPoints) -> None:
        super().__init__("ln_final", points)
        self._model = model

    @property
    def _weights(self) -> NormWeights:
        return self._model.weights.ln_final

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Returns the normalised residual; no hooks run."""
        return normalize(self._model.spec.norm, resid, self._weights)


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
