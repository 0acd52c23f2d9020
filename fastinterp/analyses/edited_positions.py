"""At which positions something is ablated or patched: everywhere, at one of each prompt, or each by itself."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from fastinterp.errors import OptionError, SiteRangeError
from fastinterp.prompts import Batch, TokenizedPrompts

_CHECKED_TOKENS = 1 << 16

EditPos = int | slice | Sequence[int] | Literal["all", "each"]


def checked_edit_pos(pos: Any) -> EditPos:
    """Returns a choice of positions as text, a slice, an integer or a tuple of integers.

    NumPy integers, arrays and tensors are taken as the integers that they hold. Raises :class:`OptionError` for what is
    no choice of positions.
    """
    given = pos.tolist() if hasattr(pos, "tolist") else pos
    if isinstance(given, str) and given in ("all", "each"):
        return given  # type: ignore[return-value]
    if isinstance(given, slice) and given.step in (None, 1) and all(map(_is_bound, (given.start, given.stop))):
        return slice(*(None if bound is None else int(bound) for bound in (given.start, given.stop)))
    if _is_integer(given):
        return int(given)
    if isinstance(given, Sequence) and not isinstance(given, str) and given and all(map(_is_integer, given)):
        return tuple(int(each) for each in given)
    raise OptionError(
        f"pos={pos!r}: give 'all', an integer (-1 is each prompt's last token), a slice such as slice(1, None), "
        "one integer for each prompt, or 'each' for every position by itself"
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_bound(value: Any) -> bool:
    return value is None or _is_integer(value)


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
    if isinstance(pos, int):
        at = torch.full_like(lengths, pos)
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
        shown = pos if isinstance(pos, int | slice) else int(np.asarray(pos)[batch.indices[first]])
        raise SiteRangeError(
            f"pos={shown} is out of range for prompt {int(batch.indices[first])} (id {batch.ids[first]!r}), which has "
            f"{int(batch.n_tokens[first])} tokens"
        )
