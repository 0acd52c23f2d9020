"""The ends of a pair's prompts: what stands in front of the first token that differs is the same in both runs.

Whatever is patched there has the value that it had, so only the ends need gradients, and only they differ between the
runs. The beginning is run once; the ends attend to its keys and values.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from fastinterp.model.attention import continuing_frame
from fastinterp.model.decode import KeyValueCache
from fastinterp.model.forward import embed, run_blocks
from fastinterp.model.model import Model
from fastinterp.prompts import Batch

# Above this share of the tokens, whole prompts are run: attention to a beginning is slower for each token.
_ENDS_SHARE = 0.75


class Ends(KeyValueCache):
    """Rows ``[row, width, ...]`` that are ``width`` positions of each prompt from its ``start`` on.

    Holds keys and values of the beginnings, and their final residual. Unlike in decoding, new keys and values are
    not kept, and gradients flow to them. With ``copies`` there are several runs of the ends, one behind the other.
    """

    def __init__(
        self,
        beginning: KeyValueCache,
        resid: Float[Tensor, "batch common d_model"],
        start: Int[Tensor, " batch"],
        width: int,
        n_pos: int,
        copies: int = 1,
    ) -> None:
        self._beginning, self._resid, self._start = beginning, resid, start
        self.width, self.n_pos, self.copies = width, n_pos, copies
        self._k, self._v = beginning._k, beginning._v
        self.at = self.positions(width)

    def positions(self, n_new: int) -> Int[Tensor, "row new"]:
        """Positions of the ends, all below ``n_pos``."""
        at = self._start[:, None] + torch.arange(n_new, device=self._start.device)
        return at.repeat(self.copies, 1)

    def n_keys(self, n_new: int) -> int:
        """Keys of a whole prompt."""
        return self.n_pos

    def extended(
        self,
        layer: int,
        k: Float[Tensor, "row new kv_head d_head"],
        v: Float[Tensor, "row new kv_head d_head"],
        n_keys: int,
    ) -> tuple[Float[Tensor, "row key_pos kv_head d_head"], Float[Tensor, "row key_pos kv_head d_head"]]:
        """Returns a layer's keys and values of whole prompts."""
        return self.placed(k, self._k[layer]), self.placed(v, self._v[layer])

    def whole(self, resid: Float[Tensor, "row width d_model"]) -> Float[Tensor, "row pos d_model"]:
        """Returns final residuals of whole prompts."""
        return self.placed(resid, self._resid)

    def placed(
        self, ends: Shaped[Tensor, "row width *rest"], beginning: Shaped[Tensor, "batch common *rest"] | None = None
    ) -> Shaped[Tensor, "row pos *rest"]:
        """Returns the ends at their positions, behind what they begin with (without it: 0)."""
        whole = ends.new_zeros(len(ends), self.n_pos, *ends.shape[2:])
        if beginning is not None:
            whole[:, : beginning.shape[1]] = beginning.repeat(self.copies, *[1] * (beginning.ndim - 1))
        whole[torch.arange(len(ends), device=ends.device)[:, None], self.at] = ends
        return whole

    def of(self, whole: Shaped[Tensor, "row pos *rest"]) -> Shaped[Tensor, "row width *rest"]:
        """Returns what stands at the ends."""
        return whole[torch.arange(len(whole), device=whole.device)[:, None], self.at]

    def repeated(self, n: int) -> "Ends":
        """Returns ``n`` copies of these rows."""
        return Ends(self._beginning, self._resid, self._start, self.width, self.n_pos, n * self.copies)


@torch.no_grad()
def common_beginning(model: Model, base: Batch, source: Int[Tensor, "batch pos"]) -> Ends | None:
    """Runs what the prompts of each pair have in common; None where that is too little to be of use.

    Memory: keys and values of all layers at the beginnings, and their final residual.
    """
    differs = (base.tokens != source) & base.mask
    first = torch.where(differs.any(1), differs.int().argmax(1), base.last)
    n_pos = base.tokens.shape[1]
    width = int((base.n_tokens - first).max())
    if width > _ENDS_SHARE * n_pos:
        return None
    start = first.clamp(max=n_pos - width)
    tokens = base.tokens[:, : int(start.max())]
    spec, weights = model.spec, model.weights
    resid = embed(weights, tokens)
    cache = KeyValueCache(spec, len(tokens), tokens.shape[1], device=resid.device, dtype=resid.dtype)
    resid = run_blocks(spec, weights, resid, continuing_frame(spec, cache, tokens.shape[1], dtype=resid.dtype))
    return Ends(cache, resid, start, width, n_pos)
