"""How many bytes the activations of a model take per token, and what a block makes of them on the way."""

from dataclasses import dataclass
from functools import cached_property

from fastinterp.model.mlp import mlp_rows
from fastinterp.model.products import FEW_ROWS, STEADY_ROWS, piece_rows
from fastinterp.model.spec import ModelSpec
from fastinterp.names import activation
from fastinterp.sweep.precision import Precision

_TILE_BYTES = 1 << 20  # of logits, in the kernels on a CPU
_PRODUCT_BYTES = 1 << 22  # a block of rounded operands


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of a model's activations in bytes: of one token, or of one token and key."""

    spec: ModelSpec
    itemsize: int
    device_type: str = "cpu"

    @property
    def wide(self) -> int:
        """Bytes of a number in at least float32."""
        return max(4, self.itemsize)

    @cached_property
    def d(self) -> int:
        """The residual."""
        return self.spec.d_model * self.itemsize

    @cached_property
    def z(self) -> int:
        """All heads' mixed values."""
        return self.spec.n_heads * self.spec.d_head * self.itemsize

    @cached_property
    def kv(self) -> int:
        """All heads' keys."""
        return self.spec.attention.n_kv_heads * self.spec.d_head * self.itemsize

    @cached_property
    def qkv(self) -> int:
        """Queries, keys and values."""
        return self.z + 2 * self.kv

    @cached_property
    def post(self) -> int:
        """The MLP's hidden layer."""
        return self.spec.mlp.d_mlp * self.itemsize

    @cached_property
    def hidden(self) -> int:
        """What the MLP's first product gives."""
        return self.post * (2 if self.spec.mlp.kind == "gated" else 1)

    @cached_property
    def scores(self) -> int:
        """All heads' scores with one key."""
        return self.spec.n_heads * self.itemsize

    @cached_property
    def rope(self) -> int:
        """Rotary tables: cosine and sine, with the angles that they are made from."""
        each = {rope: rope.dims * (self.itemsize + 4) for rope in self.spec.position.rope}
        return sum(each.values())

    def site(self, name: str) -> int:
        """An activation that has one value per token."""
        widths = {"d_model": self.d, "d_mlp": self.post}
        dims = activation(name).dims
        if "query_pos" in dims:
            return 0
        heads = {"head": self.z, "kv_head": self.kv}
        return next((heads[dim] for dim in dims if dim in heads), widths.get(dims[-1], self.d))

    @cached_property
    def norm(self) -> int:
        """What a norm makes: its value, and copies on the way."""
        if self.spec.norm.kind == "layer":
            return self.d
        upcast = 2 * self.spec.d_model * self.wide if self.itemsize < 4 else 0
        return 2 * self.d + upcast

    @property
    def formed(self) -> bool:
        """Whether attention forms its scores in any case."""
        # No fused attention of float32 on a GPU has groups of queries.
        grouped = self.device_type == "cuda" and self.itemsize >= 4 and self.spec.attention.group > 1
        return self.spec.attention.softcap is not None or grouped

    def filled_up(self, rows: int) -> int:
        """Rows of what a product of so many gives on a CPU: few are multiplied together with rows of zeros."""
        filled = STEADY_ROWS if rows <= STEADY_ROWS else FEW_ROWS
        return rows if self.device_type != "cpu" else max(rows, filled)

    def attention(self, tokens: int, slots: int, n_keys: int, *, formed: bool) -> int:
        """From the residual to ``z`` spread over the slots, for all heads."""
        tokens, turned = self.filled_up(tokens), self._turned
        mixed = self.qkv + 2 * self.z
        scores = 4 * self.scores * n_keys if formed else 0
        windowed = any(w is not None and w < n_keys for w in self.spec.attention.window)
        bias = n_keys * n_keys * self.itemsize if windowed else 0
        before = tokens * (self.norm + self.qkv + turned) + (tokens * 3 * self.z if turned else 0)
        mixing = tokens * (self.qkv + turned) + slots * (mixed + scores) + bias
        return max(before, mixing)

    @property
    def _turned(self) -> int:
        attention, rotary = self.spec.attention, self.spec.position.kind == "rotary"
        return self.z + self.kv if rotary or attention.qk_norm else 0

    def mlp(self, tokens: int, *, by_rows: bool) -> int:
        """From ``resid_mid`` to ``resid_post``, beside what is kept of the attention.

        ``by_rows``: of the hidden layer, ``mlp_rows`` rows at a time.
        """
        written = 2 * self.d + (self.norm if self.spec.post_norms else 0)
        activation = self.spec.mlp.activation
        if not by_rows:
            acted = self.post * (3 if activation == "gelu_quick" else 2)
            return tokens * self.norm + self.filled_up(tokens) * (self.hidden + max(acted, written + self.post))
        # The first product; what is activated, where it cannot be the same tensor; that times the other half.
        acted = self.hidden + self.post * {"silu": 0, "relu": 0, "gelu_quick": 3}.get(activation, 1)
        if self.spec.mlp.kind == "gated":
            acted += self.post
        some = self.filled_up(min(tokens, mlp_rows(tokens) + (tokens > FEW_ROWS)))
        # A product in pieces has one of them beside all rows, and the last of them is copied to be filled up.
        piece, copied = piece_rows(some), min(some, FEW_ROWS)
        first = (some + piece) * self.hidden + copied * self.d
        second = some * self.post + (some + piece) * self.d + copied * self.post
        return tokens * self.norm + max(tokens * self.d + max(some * acted, first, second), tokens * written)

    def block(self, tokens: int, slots: int, n_keys: int, *, formed: bool, by_rows: bool) -> int:
        """A whole block of ``tokens`` packed tokens that attention spreads over ``slots``."""
        return max(self.attention(tokens, slots, n_keys, formed=formed), self._kept(tokens, by_rows=by_rows))

    def _kept(self, tokens: int, *, by_rows: bool) -> int:
        """The MLP, and what is kept of the attention meanwhile."""
        kept = (1 if by_rows else 2) * self.d + (self.norm if self.spec.post_norms else 0)
        return tokens * kept + self.mlp(tokens, by_rows=by_rows)

    def ends(self, rows: int, slots: int, scores: int, *, by_rows: bool) -> int:
        """A block of prompts' ends, whose attention forms scores of ``scores`` bytes; keys are spread for it."""
        tokens = self.filled_up(rows)
        attention = tokens * (self.norm + self.qkv + self._turned + self.qkv + 5 * self.z) + 4 * scores
        return 2 * slots * self.kv + max(attention, self._kept(rows, by_rows=by_rows))

    def products(self, rows: int, precision: Precision) -> int:
        """Rounded operands of one product."""
        if precision == "exact":
            return 0
        n_in = max(self.d, self.z, self.post) // self.itemsize * 4
        n_out = max(self.d, self.qkv, self.hidden) // self.itemsize
        if self.device_type != "cpu":
            return 2 * rows * n_in + 2 * n_in * n_out
        some_rows = min(rows, max(256, _PRODUCT_BYTES // n_in))
        columns = min(n_out, max(64, _PRODUCT_BYTES // n_in))
        return 4 * some_rows * n_in + 3 * columns * n_in

    @property
    def recorded(self) -> int:
        """What goes into the products of a block, and comes out."""
        return 3 * self.d + self.qkv + self.z + self.hidden + self.post

    def tile(self, rows: int, *, buffers: int = 1) -> int:
        """Tiles of logits of some rows, and the part of the unembedding that is copied to another dtype."""
        if self.device_type != "cpu":
            return 0
        logits = min(_TILE_BYTES * max(1, self.wide // 4), min(rows, 512) * min(self.spec.d_vocab, 2048) * self.wide)
        copied = min(self.spec.d_vocab, 2048) * self.spec.d_model * 4 if self.itemsize < 4 else 0
        return 2 * buffers * logits + copied + rows * 64
