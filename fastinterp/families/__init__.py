"""Model families: how a Hugging Face config and checkpoint map onto ``ModelSpec`` and ``Weights``.

A family is one file with a table, and one entry in ``FAMILIES``.
"""

from collections.abc import Mapping
from typing import Any

from fastinterp.families import gemma, gpt2, gpt_neo, gpt_neox, gptj, llama, opt, phi, phi3, qwen, stablelm, starcoder2
from fastinterp.families.base import Family
from fastinterp.families.build import build_weights
from fastinterp.families.config import Config
from fastinterp.model.spec import ModelSpec

FAMILIES: tuple[Family, ...] = (
    gpt2.FAMILY,
    llama.FAMILY,
    gpt_neo.FAMILY,
    gpt_neox.FAMILY,
    gptj.FAMILY,
    opt.FAMILY,
    qwen.QWEN2,
    qwen.QWEN3,
    gemma.GEMMA1,
    gemma.GEMMA2,
    gemma.GEMMA3,
    phi.FAMILY,
    phi3.FAMILY,
    starcoder2.FAMILY,
    stablelm.FAMILY,
)

__all__ = ["FAMILIES", "Config", "Family", "build_weights", "family_of", "read_spec"]


def read_spec(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[Family, ModelSpec]:
    """Returns family and spec of a Hugging Face config; ``defaults`` is the config of its class without arguments.

    Raises :class:`UnknownFamilyError` for a ``model_type`` that no family reads, :class:`UnsupportedConfigError` for a
    value that is not implemented, or a key that nobody read and that is neither harmless nor at its default.
    """
    family = family_of(str(values.get("model_type")))
    config = Config(values)
    spec = family.to_spec(config)
    config.refuse_unread(lambda key, value: defaults.get(key) == value)
    return family, spec


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
