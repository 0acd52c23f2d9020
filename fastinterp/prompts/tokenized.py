"""Prompts as token ids, checked against a model, and the padded batches that are made of them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fastinterp.errors import PromptError
from fastinterp.prompts.bucketing import length_buckets

# Where and among how many prompts beginnings are compared.
_PLACES, _NEIGHBOURS = 8, 16


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A prompt that was left out, and why."""

    index: int
    id: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some prompts, padded on the right to the longest of them.

    ``indices`` are the rows of the prompt set. ``tokens`` (and ``corrupt``) are padded with 0, which is a
    real token id: use ``n_tokens``, ``last`` or ``mask`` to tell padding apart. ``answer`` and ``wrong`` hold
    the ids of the alternative answers, padded with -1; a row of -1 alone has no answer.
    """

    indices: Int[np.ndarray, " batch"]
    ids: tuple[str, ...]
    tokens: Int[Tensor, "batch pos"]
    n_tokens: Int[Tensor, " batch"]
    answer: Int[Tensor, "batch k"] | None
    wrong: Int[Tensor, "batch k_wrong"] | None
    corrupt: Int[Tensor, "batch pos"] | None

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.indices)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Position of every prompt's own last token."""
        return self.n_tokens - 1

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at real tokens, False at padding."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return positions[None, :] < self.n_tokens[:, None]

    def part(self, rows: slice) -> "Batch":
        """Returns some of the prompts, as wide as the batch."""
        of_prompts: dict[str, Any] = {
            field.name: None if (value := getattr(self, field.name)) is None else value[rows]
            for field in dataclasses.fields(self)
        }
        return dataclasses.replace(self, **of_prompts)

    def to(self, device: torch.device | str) -> "Batch":
        """Returns the batch with its tensors on ``device``."""
        tensors: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedPrompts:
    """Every row of a prompt set as token ids; what :meth:`fastinterp.prompts.PromptSet.tokenize` returns.

    Rows keep their index: a rejected row has an empty ``tokens`` (and ``corrupt``), ``n_tokens`` 0 and
    answers of -1, and is in no batch. ``answer`` and ``wrong`` are ``[prompt, alternative]``, padded with -1.
    ``texts`` are the prompts as text (token-id prompts decoded). ``prepend_bos`` says whether the text
    prompts begin with BOS.
    """

    tokens: tuple[Int[np.ndarray, "_"], ...]
    n_tokens: Int[np.ndarray, " prompt"]
    answer: Int[np.ndarray, "prompt k"] | None
    wrong: Int[np.ndarray, "prompt k_wrong"] | None
    corrupt: tuple[Int[np.ndarray, "_"], ...] | None
    rejected: tuple[Rejection, ...]
    texts: tuple[str, ...]
    ids: tuple[str, ...]
    prepend_bos: bool
    tokenizer_hash: str | None = None

    def __len__(self) -> int:
        """Number of rows, the rejected ones included."""
        return len(self.tokens)

    @property
    def accepted(self) -> Int[np.ndarray, " accepted"]:
        """Indices of the rows that are not rejected, ascending."""
        return np.flatnonzero(self.n_tokens > 0)

    @property
    def max_len(self) -> int:
        """Tokens of the longest accepted prompt (0 if there is none)."""
        return int(self.n_tokens.max(initial=0))

    def distinct_share(self) -> float:
        """Share of the tokens whose beginning no prompt before has; 1 without any prompt.

        Counted among prompts of similar length, which a batch is made of, in some places in the order of lengths; of
        those the largest. A header that all prompts have counts once, so that of many with a long one the share is
        small.
        """
        ordered = self.accepted[np.argsort(self.n_tokens[self.accepted], kind="stable")]
        n_places = min(_PLACES, -(-len(ordered) // _NEIGHBOURS))
        firsts = np.linspace(0, max(0, len(ordered) - _NEIGHBOURS), n_places).astype(int)
        return max((self._distinct_share(ordered[first : first + _NEIGHBOURS]) for first in firsts), default=1.0)

    def _distinct_share(self, rows: Int[np.ndarray, " row"]) -> float:
        known: dict[tuple[int, int], int] = {}
        for row in rows:
            node = -1
            for token in self.tokens[row].tolist():
                node = known.setdefault((node, token), len(known))
        return len(known) / int(self.n_tokens[rows].sum())

    def batches(self, token_budget: int, indices: Sequence[int] | np.ndarray | None = None) -> list[Batch]:
        """Returns the accepted prompts as right-padded batches of similar length, on the CPU.

        A batch holds at most ``token_budget`` tokens, padding included (``rows * longest``); a single prompt
        over the budget still gets a batch of its own. ``indices`` limits the rows; rejected ones among them
        are left out. The result depends on nothing but the arguments. Raises
        :class:`~fastinterp.errors.PromptError` for an index that is out of range or given twice,
        :class:`~fastinterp.errors.OptionError` for a budget below 1.

        >>> [batch.tokens.shape for batch in tokenized.batches(token_budget=4096)]  # doctest: +SKIP
        [torch.Size([256, 14]), torch.Size([44, 15])]
        """
        rows = self.accepted if indices is None else self._accepted_among(indices)
        return [self._batch(group) for group in length_buckets(self.n_tokens, rows, token_budget)]

    def _accepted_among(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = np.asarray(indices, dtype=np.int64)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise PromptError(f"there is no prompt {outside[0]}: the set has {len(self)} (0 to {len(self) - 1})")
        values, counts = np.unique(chosen, return_counts=True)
        if len(values) < len(chosen):
            raise PromptError(f"prompt {values[counts > 1][0]} is asked for twice: give every index once")
        return values[self.n_tokens[values] > 0]

    def _batch(self, rows: np.ndarray) -> Batch:
        return Batch(
            indices=rows,
            ids=tuple(self.ids[row] for row in rows),
            tokens=_pad_right([self.tokens[row] for row in rows]),
            n_tokens=torch.from_numpy(self.n_tokens[rows]),
            answer=None if self.answer is None else torch.from_numpy(self.answer[rows]),
            wrong=None if self.wrong is None else torch.from_numpy(self.wrong[rows]),
            corrupt=None if self.corrupt is None else _pad_right([self.corrupt[row] for row in rows]),
        )


def _pad_right(token_lists: Sequence[np.ndarray]) -> Int[Tensor, "batch pos"]:
    padded = np.zeros((len(token_lists), max(map(len, token_lists))), dtype=np.int64)
    for row, tokens in zip(padded, token_lists, strict=True):
        row[: len(tokens)] = tokens
    return torch.from_numpy(padded)
