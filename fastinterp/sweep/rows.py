"""At which tokens a stack of edited runs is computed: at all, or from some position of every prompt on."""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from fastinterp.model.attention import Frame, SharedKeys, make_frame
from fastinterp.model.prefix import PrefixTree
from fastinterp.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tokens of a stack ``[variant, row, d_model]``.

    Without a ``start`` they are the nodes of the prefix tree. With one they are ``width`` positions of every prompt
    from ``start[b]`` on; in front of it every variant is the clean run, whose keys and values it sees. ``row`` and
    ``pos`` say which prompt and position a row is, ``node`` which node of the tree (None: the same one).
    """

    tree: PrefixTree
    frame: Frame
    row: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]
    start: Int[Tensor, " batch"] | None = None
    width: int = 0
    node: Int[Tensor, " row"] | None = None

    @classmethod
    def whole(cls, spec: ModelSpec, tree: PrefixTree, dtype: torch.dtype) -> "Rows":
        """All tokens of the batch."""
        frame = make_frame(spec, tree.n_pos, device=tree.row.device, dtype=dtype, tree=tree)
        return cls(tree=tree, frame=frame, row=tree.row, pos=tree.pos)

    @classmethod
    def behind(
        cls,
        spec: ModelSpec,
        tree: PrefixTree,
        start: Int[Tensor, " batch"],
        n_tokens: Int[Tensor, " batch"],
        dtype: torch.dtype,
    ) -> "Rows":
        """The ends of the prompts. Rows behind a shorter prompt's last token repeat it, and nobody reads them."""
        width = int((n_tokens - start).max())
        pos = torch.minimum(start[:, None] + torch.arange(width, device=start.device), n_tokens[:, None] - 1).flatten()
        row = torch.arange(len(start), device=start.device).repeat_interleave(width)
        frame = make_frame(spec, tree.n_pos, device=start.device, dtype=dtype, positions=pos)
        return cls(tree=tree, frame=frame, row=row, pos=pos, start=start, width=width, node=tree.node[row, pos])

    @property
    def n_rows(self) -> int:
        """Rows of one variant."""
        return len(self.row)

    def of_clean(self, values: Shaped[Tensor, "variant node *rest"]) -> Shaped[Tensor, "variant row *rest"]:
        """Returns the clean run's values at these rows."""
        return values if self.node is None else values.index_select(1, self.node)

    def seeing(self, k: Tensor, v: Tensor) -> Frame:
        """Returns the frame of a layer in which the clean run has these keys and values, ``[1, node, ...]``."""
        if self.start is None:
            return self.frame
        shared = SharedKeys(start=self.start, width=self.width, k=self.tree.spread(k)[0], v=self.tree.spread(v)[0])
        return dataclasses.replace(self.frame, shared=shared)

    def read(
        self, values: Shaped[Tensor, "variant row *rest"], at: Int[Tensor, " batch"]
    ) -> Shaped[Tensor, "variant batch *rest"]:
        """Returns the values at one position per prompt; in front of ``start``, those at ``start``."""
        if self.start is None:
            return values.index_select(1, self.tree.nodes_at(at))
        first = torch.arange(len(at), device=at.device) * self.width
        return values.index_select(1, first + (at - self.start).clamp(min=0))


def at_positions(tree: PrefixTree, frame: Frame, at: Int[Tensor, " batch"]) -> Rows:
    """One row per prompt, for what needs no attention."""
    rows = torch.arange(len(at), device=at.device)
    return Rows(tree=tree, frame=frame, row=rows, pos=at, node=tree.nodes_at(at))
