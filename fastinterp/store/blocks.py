"""How many prompts make one block, the unit in which a run is written, committed and resumed."""

from fastinterp.errors import StoreError
from fastinterp.store.schema import MEGABYTE

MAX_RESULT_CHUNK = 4 * MEGABYTE
MAX_PROMPTS = 512
MAX_PROMPTS_SWEEP = 64
# From this many prompts on, a killed run keeps at least a quarter of its work at a time.
MIN_PROMPTS_TO_SPLIT = 16


def choose_block_size(n_prompts: int, bytes_per_prompt: int, *, sweep: bool) -> int:
    """Returns how many prompts are written and committed together.

    The rule is deliberate and depends on its arguments alone, so that a resumed run finds the same blocks
    whatever its batch size or number of workers. A chunk of the widest result (``bytes_per_prompt``) stays
    within 4 MB. A block has at most 512 prompts, and at most 64 where a sweep is among the analyses, because
    a block of an sweep takes minutes and a killed run loses the blocks that it had not finished. From
    16 prompts on there are at least 4 blocks.

    Raises:
        StoreError: no prompts, or a negative size.

    Example:
        >>> choose_block_size(10_000, 12 * 12 * 4, sweep=True)
        64
    """
    if n_prompts < 1 or bytes_per_prompt < 0:
        raise StoreError(f"n_prompts={n_prompts}, bytes_per_prompt={bytes_per_prompt}: expected at least 1 and 0")
    most = MAX_PROMPTS_SWEEP if sweep else MAX_PROMPTS
    size = min(most, n_prompts, MAX_RESULT_CHUNK // max(1, bytes_per_prompt))
    if n_prompts >= MIN_PROMPTS_TO_SPLIT:
        size = min(size, -(-n_prompts // 4))
    return max(1, size)
