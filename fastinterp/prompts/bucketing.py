"""Cutting prompts of mixed lengths into batches that waste little on padding."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from fastinterp.errors import OptionError


def length_buckets(
    n_tokens: Int[np.ndarray, " prompt"], indices: Sequence[int] | np.ndarray, token_budget: int
) -> list[np.ndarray]:
    """Returns ``indices`` as groups of similar length, each within ``rows * longest <= token_budget``.

    Indices are sorted by (length, index) and taken greedily, so that the grouping depends on nothing but the
    arguments. A prompt that exceeds the budget by itself gets a group of its own. Raises
    :class:`~fastinterp.errors.OptionError` for a budget below 1.

    >>> [group.tolist() for group in length_buckets(np.array([4, 2, 9, 2]), [0, 1, 2, 3], 8)]
    [[1, 3], [0], [2]]
    """
    if token_budget < 1:
        raise OptionError(f"token_budget={token_budget} is not positive: give the tokens of one batch, such as 8192")
    chosen = np.asarray(indices, dtype=np.int64)
    ordered = chosen[np.lexsort((chosen, n_tokens[chosen]))]
    groups: list[list[int]] = []
    for index in ordered.tolist():
        # Ascending order: the prompt that joins is the longest of its group.
        if groups and (len(groups[-1]) + 1) * int(n_tokens[index]) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [np.array(group, dtype=np.int64) for group in groups]
