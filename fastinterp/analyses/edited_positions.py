"""At which positions something is ablated or patched: everywhere, at one of each prompt, or each by itself."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from fastinterp.errors import OptionError, SiteRangeError
from fastinterp.prompts import Batch, TokenizedPrompts

_CHECKED_TOKENS = 1 << 16

EditPos = int | slice | Sequence[int] | Literal["all", "each"]


def check_edit_pos(pos: Any) -> None:
    """Raises :class:`OptionError` for what is no choice of positions."""
    if isinstance(pos, str):
        good = pos in ("all", "each")
    elif isinstance(pos, slice):
        good = pos.step in (None, 1)
    else:
        good = not isinstance(pos, bool) and (isinstance(pos, int | np.integer) or _is_column(pos))
    if not good:
        raise OptionError(
            f"pos={pos!r}: give 'all', an integer (-1 is each prompt's last token), a slice such as slice(1, None), "
            "one integer for each prompt, or 'each' for every position by itself"
        )


def _is_column(pos: Any) -> bool:
    return np.ndim(pos) == 1 and np.asarray(pos).dtype.kind in "iu"


def check_edited(pos: EditPos, prompts: TokenizedPrompts) -> None:
    """Raises what :func:`edited_positions` would for any of the prompts, before a model runs."""
    for batch in prompts.batches(_CHECKED_TOKENS):
        edited_positions(pos, batch, len(prompts))


def edited_positions(pos: EditPos, batch: Batch, n_prompts: int) -> Bool[Tensor, "batch pos"] | None:
    """Returns where a batch is edited; None for everywhere.

    Raises:
        SiteRangeError: a prompt has no such position, or a slice leaves nothing of it.
        OptionError: there is not one position for each of the ``n_prompts``.
    """
    if isinstance(pos, str):
        return None
    device = batch.tokens.device
    everywhere = torch.arange(batch.tokens.shape[1], device=device)[None]
    lengths = batch.n_tokens[:, None]
    if isinstance(pos, slice):
        bounds = torch.tensor([pos.indices(int(n))[:2] for n in batch.n_tokens], device=device)
        mask = (everywhere >= bounds[:, :1]) & (everywhere < bounds[:, 1:])
        _check(mask.any(-1), pos, batch)
        return mask
    if isinstance(pos, int | np.integer):
        at = torch.full_like(lengths, int(pos))
    else:
        given = np.asarray(pos)
        if len(given) != n_prompts:
            raise OptionError(
                f"pos has {len(given)} positions for {n_prompts} prompts: give one for each, or one for all"
            )
        at = torch.from_numpy(given[batch.indices].astype(np.int64)).to(device)[:, None]
    at = torch.where(at < 0, at + lengths, at)
    _check(((at >= 0) & (at < lengths))[:, 0], pos, batch)
    return everywhere == at


def _check(good: Tensor, pos: Any, batch: Batch) -> None:
    if not bool(good.all()):
        first = int((~good).nonzero()[0, 0])
        shown = pos if isinstance(pos, int | np.integer | slice) else int(np.asarray(pos)[batch.indices[first]])
        raise SiteRangeError(
            f"pos={shown} is out of range for prompt {int(batch.indices[first])} (id {batch.ids[first]!r}), which has "
            f"{int(batch.n_tokens[first])} tokens"
        )
