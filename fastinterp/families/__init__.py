"""Model families: how a Hugging Face config and checkpoint map onto ``ModelSpec`` and ``Weights``.

A family is one file with a table, and one entry in ``FAMILIES``.
"""

from fastinterp.families import gpt2, llama
from fastinterp.families.base import Family
from fastinterp.families.build import build_weights
from fastinterp.families.config import Config

FAMILIES: tuple[Family, ...] = (gpt2.FAMILY, llama.FAMILY)

__all__ = ["FAMILIES", "Config", "Family", "build_weights", "family_of"]


def family_of(model_type: str) -> Family:
    """Returns the family that reads this Hugging Face ``model_type``."""
    from fastinterp.errors import UnknownFamilyError, nearest

    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = [model_type for family in FAMILIES for model_type in family.model_types]
    raise UnknownFamilyError(
        f"model_type {model_type!r} is not supported: known are {', '.join(known)}{nearest(model_type, known)}"
    )
