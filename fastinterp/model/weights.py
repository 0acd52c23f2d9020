"""The parameters of a model, in TransformerLens's names and orientation (activations multiply from the left).

The forward wants few, large matrix products, people want ``W_Q[head]``. Both are served by one storage: the fused
matrices are stored, and the per-head names are views of them.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.errors import CheckpointKeyError, NonFiniteError
from fastinterp.model.products import EXACT, Products
from fastinterp.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class NormWeights:
    """Weight and bias of one norm; both are ``None`` once they are folded into the next matrix."""

    w: Tensor | None = None
    b: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """One transformer block. Biases and norms that the model does not have are ``None``.

    ``products`` multiplies activations with the matrices; a sweep of reduced precision puts another one in its place.
    """

    ln1: NormWeights
    W_QKV: Float[Tensor, "d_model qkv"]
    b_QKV: Float[Tensor, " qkv"] | None
    W_O: Float[Tensor, "head d_head d_model"]
    b_O: Float[Tensor, " d_model"] | None
    ln2: NormWeights
    W_gate_in: Float[Tensor, "d_model gate_in"]
    b_gate_in: Float[Tensor, " gate_in"] | None
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"] | None
    q_norm: Float[Tensor, " d_head"] | None = None
    k_norm: Float[Tensor, " d_head"] | None = None
    ln1_post: NormWeights | None = None
    ln2_post: NormWeights | None = None
    products: Products = EXACT

    def multiplied_by(self, products: Products) -> "BlockWeights":
        """Returns the block with its products done in another way."""
        return self if products is self.products else dataclasses.replace(self, products=products)

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.W_O.shape[1]

    @property
    def _splits(self) -> tuple[int, int]:
        """Columns of ``W_QKV`` where keys and where values begin."""
        queries = self.W_O.shape[0] * self.d_head
        return queries, (queries + self.W_QKV.shape[1]) // 2

    def _heads(self, start: int, stop: int) -> Tensor:
        d_model = self.W_QKV.shape[0]
        return self.W_QKV[:, start:stop].reshape(d_model, -1, self.d_head).transpose(0, 1)

    def _head_biases(self, start: int, stop: int) -> Tensor | None:
        return None if self.b_QKV is None else self.b_QKV[start:stop].view(-1, self.d_head)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query matrices, a view."""
        return self._heads(0, self._splits[0])

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key matrices per KV head, a view."""
        return self._heads(*self._splits)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value matrices per KV head, a view."""
        return self._heads(self._splits[1], self.W_QKV.shape[1])

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"] | None:
        """Query biases, a view."""
        return self._head_biases(0, self._splits[0])

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"] | None:
        """Key biases, a view."""
        return self._head_biases(*self._splits)

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"] | None:
        """Value biases, a view; ``None`` once folded into ``b_O``."""
        return self._head_biases(self._splits[1], self.W_QKV.shape[1])

    @property
    def gated(self) -> bool:
        """Whether ``W_gate_in`` holds a gate beside ``W_in``."""
        return self.W_gate_in.shape[1] == 2 * self.W_out.shape[0]

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        """The gate's matrix, a view; ``None`` for a plain MLP."""
        return self.W_gate_in[:, : self.W_out.shape[0]] if self.gated else None

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """The MLP's input matrix, a view."""
        return self.W_gate_in[:, -self.W_out.shape[0] :]

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"] | None:
        """The MLP's input bias, a view."""
        return None if self.b_gate_in is None else self.b_gate_in[-self.W_out.shape[0] :]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All parameters. ``W_pos`` is ``None`` for rotary models, ``b_U`` for models without an unembedding bias."""

    W_E: Float[Tensor, "d_vocab d_model"]
    W_pos: Float[Tensor, "n_ctx d_model"] | None
    blocks: tuple[BlockWeights, ...]
    ln_final: NormWeights
    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"] | None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yields ``(name, tensor)`` of every stored parameter, fused ones as one tensor, in a fixed order."""
        yield from _named("", self)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Weights":
        """Returns the weights on ``device`` in ``dtype``; tensors that are there already are not copied."""
        moved: Weights = _map(self, lambda tensor: tensor.to(device=device, dtype=dtype))
        return moved

    def check_finite(self) -> None:
        """Raises :class:`NonFiniteError` naming the first parameter that holds NaN or infinity."""
        for name, tensor in self.named():
            if not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"weight {name!r} holds NaN or infinity: the checkpoint is damaged, or its dtype overflowed "
                    "(load it with dtype=torch.float32)"
                )

    def sha256(self) -> str:
        """Returns a hash of every parameter's name, shape, dtype and bytes."""
        digest = hashlib.sha256()
        for name, tensor in self.named():
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _named(prefix: str, part: object) -> Iterator[tuple[str, Tensor]]:
    assert dataclasses.is_dataclass(part)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield prefix + field.name, value
        elif isinstance(value, tuple):
            for index, block in enumerate(value):
                yield from _named(f"{prefix}{field.name}.{index}.", block)
        elif dataclasses.is_dataclass(value):
            yield from _named(f"{prefix}{field.name}.", value)


def _map(part, function):  # type: ignore[no-untyped-def]
    """Applies ``function`` to every tensor of a (nested) weights dataclass."""
    changes = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = function(value)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(_map(block, function) for block in value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _map(value, function)
    return dataclasses.replace(part, **changes)


def check_shapes(spec: ModelSpec, weights: Weights) -> None:
    """Raises :class:`CheckpointKeyError` for a parameter whose shape does not follow from the spec."""
    attention, d_model = spec.attention, spec.d_model
    qkv = (attention.n_heads + 2 * attention.n_kv_heads) * attention.d_head
    gate_in = spec.mlp.d_mlp * (2 if spec.mlp.kind == "gated" else 1)
    block_shapes: dict[str, tuple[int, ...]] = {
        "W_QKV": (d_model, qkv),
        "b_QKV": (qkv,),
        "W_O": (attention.n_heads, attention.d_head, d_model),
        "b_O": (d_model,),
        "W_gate_in": (d_model, gate_in),
        "b_gate_in": (gate_in,),
        "W_out": (spec.mlp.d_mlp, d_model),
        "b_out": (d_model,),
        "q_norm": (attention.d_head,),
        "k_norm": (attention.d_head,),
        "w": (d_model,),
        "b": (d_model,),
    }
    shapes = block_shapes | {
        "W_E": (spec.d_vocab, d_model),
        "W_pos": (spec.n_ctx, d_model),
        "W_U": (d_model, spec.d_vocab),
        "b_U": (spec.d_vocab,),
    }
    for block in weights.blocks[:1]:
        for name, wanted in (
            ("q_norm", attention.qk_norm),
            ("k_norm", attention.qk_norm),
            ("ln1_post", spec.post_norms),
            ("ln2_post", spec.post_norms),
        ):
            if (getattr(block, name) is not None) != wanted:
                raise CheckpointKeyError(f"the blocks have {'no' if wanted else 'a'} {name}, the config says otherwise")
    if len(weights.blocks) != spec.n_layers:
        raise CheckpointKeyError(f"the checkpoint has {len(weights.blocks)} blocks, the config says {spec.n_layers}")
    for name, tensor in weights.named():
        expected = shapes[name.rsplit(".", 1)[-1]]
        if tuple(tensor.shape) != expected:
            raise CheckpointKeyError(f"weight {name!r} has shape {tuple(tensor.shape)}, the config asks for {expected}")
