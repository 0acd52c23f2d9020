"""Keys and values of what has been read, so that a sequence can be continued without reading it again."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.model.spec import ModelSpec


class KeyValueCache:
    """Rotated keys, and values, of every layer for sequences of different lengths.

    Sequence ``b`` has ``n_tokens[b]`` entries that count; what lies behind them (padding) is never looked at, and
    overwritten as the sequence grows. Memory: ``2 * n_layers * batch * capacity * n_kv_heads * d_head`` elements.
    """

    def __init__(self, spec: ModelSpec, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype) -> None:
        """Makes room for ``capacity`` tokens per sequence."""
        shape = (batch, capacity, spec.attention.n_kv_heads, spec.d_head)
        self.capacity = capacity
        self.n_tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0
        self._k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(spec.n_layers)]
        self._v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(spec.n_layers)]
        self._rows = torch.arange(batch, device=device)[:, None]

    def positions(self, n_new: int) -> Int[Tensor, "batch new"]:
        """Positions of the next ``n_new`` tokens of every sequence."""
        return self.n_tokens[:, None] + torch.arange(n_new, device=self.n_tokens.device)

    def n_keys(self, n_new: int) -> int:
        """How many keys the longest sequence has once ``n_new`` tokens are added."""
        return min(self.longest + n_new, self.capacity)

    def extended(
        self,
        layer: int,
        k: Float[Tensor, "batch new kv_head d_head"],
        v: Float[Tensor, "batch new kv_head d_head"],
        n_keys: int,
    ) -> tuple[Float[Tensor, "batch key_pos kv_head d_head"], Float[Tensor, "batch key_pos kv_head d_head"]]:
        """Writes a layer's new keys and values behind the old ones and returns the first ``n_keys``."""
        assert self.longest + k.shape[1] <= self.capacity
        at = self.positions(k.shape[1])
        # Under an autocast the new ones have another dtype.
        self._k[layer][self._rows, at] = k.detach().to(self._k[layer].dtype)
        self._v[layer][self._rows, at] = v.detach().to(self._v[layer].dtype)
        return self._k[layer][:, :n_keys].to(k.dtype), self._v[layer][:, :n_keys].to(v.dtype)

    def advance(self, n_new: Int[Tensor, " batch"]) -> None:
        """Counts the tokens that were added to every sequence; the rest of them was padding."""
        self.n_tokens = self.n_tokens + n_new
        self.longest = int(self.n_tokens.max())
