"""Which tokens of a batch have to be computed: real ones, and of equal beginnings only one.

A causal model gives the same activations wherever the tokens up to a position are the same. Prompts of one template, or
with one few-shot header, or just with BOS in front, begin alike; padding need not be computed at all.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

# Fused attention adds up a query's keys in an order that depends on how many there are, unless they are a multiple.
POSITIONS_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class PrefixTree:
    """The distinct beginnings of a batch, numbered.

    ``node[b, p]`` is the number of the beginning of prompt ``b`` that ends at position ``p`` (0 at padding, which
    nothing real attends to). ``row[n]`` and ``pos[n]`` say where node ``n`` first occurs. Positions are padded to a
    multiple of ``POSITIONS_MULTIPLE`` and there are at least two nodes: a prompt's sums are then added up in the same
    order whatever it is batched with.
    """

    node: Int[Tensor, "batch pos"]
    row: Int[Tensor, " node"]
    pos: Int[Tensor, " node"]

    @property
    def n_pos(self) -> int:
        """Positions of the spread values: those of the longest prompt, padded."""
        return self.node.shape[1]

    @property
    def n_nodes(self) -> int:
        """How many tokens have to be computed."""
        return len(self.row)

    def nodes_at(self, pos: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Returns the node of every prompt at a position of its own."""
        return self.node[torch.arange(len(pos), device=pos.device), pos]

    def spread(self, values: Shaped[Tensor, "variant node *rest"]) -> Shaped[Tensor, "variant batch pos *rest"]:
        """Returns every prompt's values, with equal beginnings repeated; a view if nothing was packed."""
        if self.n_nodes == self.node.numel():
            apart: Tensor = values.unflatten(1, self.node.shape)
            return apart
        # index_select copies whole rows, several times as fast as indexing with a tensor.
        spread: Tensor = values.index_select(1, self.node.flatten()).unflatten(1, self.node.shape)
        return spread

    def pack(self, values: Shaped[Tensor, "variant batch pos *rest"]) -> Shaped[Tensor, "variant node *rest"]:
        """Returns one value per node."""
        if self.n_nodes == self.node.numel():
            return values.flatten(1, 2)
        return values.flatten(1, 2).index_select(1, self.row * self.n_pos + self.pos)


def prefix_tree(
    tokens: Int[Tensor, "batch pos"], n_tokens: Int[Tensor, " batch"] | None = None, *, share: bool = True
) -> PrefixTree:
    """Finds the distinct beginnings; ``share=False`` leaves out padding alone, so that prompts can differ in edits."""
    n_prompts, n_pos = tokens.shape
    lengths = [n_pos] * n_prompts if n_tokens is None else n_tokens.tolist()
    rows: list[int] = []
    positions: list[int] = []
    nodes = [[0] * (n_pos + -n_pos % POSITIONS_MULTIPLE) for _ in range(n_prompts)]
    known: dict[tuple[int, int], int] = {}
    for b, ids in enumerate(tokens.tolist()):
        parent = -1
        for p in range(lengths[b]):
            edge = (parent, ids[p])
            parent = known.get(edge, -1) if share else -1
            if parent < 0:
                parent = known[edge] = len(rows)
                rows.append(b)
                positions.append(p)
            nodes[b][p] = parent
    if len(rows) == 1:
        rows, positions = rows * 2, positions * 2
    device = tokens.device
    return PrefixTree(
        node=torch.tensor(nodes, device=device),
        row=torch.tensor(rows, device=device),
        pos=torch.tensor(positions, device=device),
    )
