"""What a decoder-only transformer is made of, as data: orthogonal choices instead of model families."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "silu"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The normalisation in front of every sublayer and of the unembedding.

    ``layer``: ``(x - mean(x)) / sqrt(var(x) + eps)``; ``rms``: ``x / sqrt(mean(x^2) + eps)``.
    """

    kind: Literal["layer", "rms"]
    eps: float


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How long-context checkpoints stretch their rotary frequencies (``linear`` uses ``factor`` alone)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_ctx: int = 8192


@dataclass(frozen=True, kw_only=True)
class Position:
    """How the model knows where a token stands.

    ``learned``: ``W_pos`` is added to the embedding. ``rotary``: the first ``rotary_dims`` of every query and key are
    rotated, halves paired (``x[i]`` with ``x[i + rotary_dims/2]``), with wavelengths set by ``base``.
    """

    kind: Literal["learned", "rotary"]
    rotary_dims: int = 0
    base: float = 10000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query causal attention; ``window[layer]`` limits how many keys a query sees (itself included)."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    scale: float
    window: tuple[int | None, ...]

    @property
    def group(self) -> int:
        """Query heads that share one key/value head; query head ``h`` reads KV head ``h // group``."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """``plain``: ``act(x W_in + b_in) W_out``; ``gated``: ``(act(x W_gate) * (x W_in)) W_out``, plus biases."""

    kind: Literal["plain", "gated"]
    d_mlp: int
    activation: Activation


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The whole architecture. Everything that ``forward`` does is decided by these fields and by which biases exist."""

    family: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    norm: Norm
    position: Position
    attention: Attention
    mlp: Mlp
    default_prepend_bos: bool = True

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return self.attention.n_heads

    @property
    def d_head(self) -> int:
        """Width of one head, independent of ``d_model``."""
        return self.attention.d_head

    def to_dict(self) -> dict[str, Any]:
        """Returns the spec as plain JSON types, as it is written into a store."""
        return dataclasses.asdict(self)

    def flops_per_token_block(self) -> int:
        """Multiply-adds times two of the matrix products of one block for one token (attention scores excluded)."""
        heads = self.attention.n_heads + 2 * self.attention.n_kv_heads
        attention = self.d_model * heads * self.d_head + self.attention.n_heads * self.d_head * self.d_model
        matrices = 3 if self.mlp.kind == "gated" else 2
        return 2 * (attention + matrices * self.d_model * self.mlp.d_mlp)


def default_attention_scale(d_head: int) -> float:
    """``1 / sqrt(d_head)``, the usual factor on attention scores."""
    return 1.0 / math.sqrt(d_head)
