"""Reads which layers attend to a window only."""

from collections.abc import Sequence

from fastinterp.errors import UnsupportedConfigError
from fastinterp.families.config import Config

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(config: Config, window: int | None, default: Sequence[str]) -> tuple[int | None, ...]:
    """Returns the window of every layer: ``window`` where ``layer_types`` (or ``default``, if missing) says sliding.

    Raises :class:`UnsupportedConfigError` for another kind of attention, and for a wrong number of layers.
    """
    kinds = config.get("layer_types", default)
    if len(kinds) != len(default) or not set(kinds) <= {FULL, SLIDING}:
        raise UnsupportedConfigError(
            f"config layer_types={kinds!r} is not supported: only {FULL!r} or {SLIDING!r}, for {len(default)} layers"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)
