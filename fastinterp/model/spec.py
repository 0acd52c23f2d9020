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
    """How long-context checkpoints stretch their rotary frequencies.

    ``linear`` divides all by ``factor``. ``llama3`` divides the long wavelengths, as set by ``low_freq_factor`` and
    ``high_freq_factor``. ``yarn`` does so between the dimensions that turn ``beta_fast`` and ``beta_slow`` times within
    ``original_n_ctx`` (rounded outwards if ``truncate``), and multiplies queries and keys by ``attention_factor``.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_n_ctx: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation of queries and keys in one layer: the first ``dims`` of a head turn, at wavelengths set by ``base``.

    ``halves`` pairs ``x[i]`` with ``x[i + dims/2]``, ``interleaved`` pairs ``x[2i]`` with ``x[2i + 1]``.
    """

    dims: int
    base: float = 10000.0
    layout: Literal["halves", "interleaved"] = "halves"
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class Position:
    """How the model knows where a token stands.

    ``learned``: ``W_pos`` is added to the embedding. ``rotary``: queries and keys of layer ``l`` turn by ``rope[l]``.
    """

    kind: Literal["learned", "rotary"]
    rope: tuple[Rope, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query causal attention.

    ``window[layer]`` limits how many keys a query sees (itself included). With ``qk_norm`` every query and key goes
    through an RMS norm of its own. ``softcap`` bounds the scaled scores: ``softcap * tanh(scores / softcap)``.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    scale: float
    window: tuple[int | None, ...]
    qk_norm: bool = False
    softcap: float | None = None

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
    """The whole architecture. Everything that ``forward`` does is decided by these fields and by which biases exist.

    ``parallel``: attention and MLP of a block both read ``resid_pre``, so that there is no ``resid_mid``.
    ``post_norms``: what attention and MLP write goes through a norm of its own (``ln1_post``, ``ln2_post``).
    ``final_softcap`` bounds the logits like :class:`Attention`'s ``softcap`` the scores.
    """

    family: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    norm: Norm
    position: Position
    attention: Attention
    mlp: Mlp
    parallel: bool = False
    post_norms: bool = False
    final_softcap: float | None = None
    default_prepend_bos: bool = True

    def __post_init__(self) -> None:
        """Refuses a combination that no model has."""
        assert not (self.parallel and self.post_norms)
        assert len(self.attention.window) == self.n_layers
        assert len(self.position.rope) == (self.n_layers if self.position.kind == "rotary" else 0)

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
