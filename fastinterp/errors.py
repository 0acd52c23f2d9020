"""Every error that fastinterp raises on purpose.

Each class is also a subclass of the builtin that fits, so that ``except ValueError`` keeps working. A message says what
was given, what was expected and what to type instead.
"""

import difflib
from collections.abc import Iterable


class FastinterpError(Exception):
    """Base of all errors raised on purpose; the command line prints its message without a traceback."""

    def __str__(self) -> str:
        """Returns the message as it is; a ``KeyError`` would put it in quotes."""
        return Exception.__str__(self)


# Models -----------------------------------------------------------------------------------------------------------


class ModelSourceError(FastinterpError, ValueError):
    """The model source is not a hub name, a directory, a ``.gguf`` file, a Hugging Face model or a bridge."""


class UnknownFamilyError(FastinterpError, ValueError):
    """No family reads this ``model_type``."""


class UnsupportedConfigError(FastinterpError, ValueError):
    """A config value that the family does not implement; the message names the key."""


class CheckpointKeyError(FastinterpError, ValueError):
    """The checkpoint has keys that the family does not know, lacks keys that it needs, or has a wrong shape."""


class NonFiniteError(FastinterpError, ArithmeticError):
    """NaN or infinity in weights or activations."""


class UnknownActivationError(FastinterpError, ValueError, KeyError):
    """No activation has this name, or a cache does not hold it; the message suggests the nearest ones."""


class SiteRangeError(FastinterpError, IndexError):
    """A layer, head or position that the model or prompt does not have."""


# Prompts ----------------------------------------------------------------------------------------------------------


class PromptError(FastinterpError, ValueError):
    """Base of what can be wrong with prompts."""


class PromptFileError(PromptError):
    """The prompt file is missing, unreadable, empty, or lacks a column."""


class EmptyPromptError(PromptError):
    """A prompt without a token."""


class PromptTooLongError(PromptError):
    """A prompt longer than the model's context."""


class AnswerTokenError(PromptError):
    """An answer that is missing, or is not one token; the message shows its tokenisation."""


class AnswerSpaceWarning(UserWarning):
    """An answer without the leading space that continues its prompt: usually another token than the one meant."""


class PromptPairError(PromptError):
    """Clean and corrupt prompt of one row differ in length."""


class TokenRangeError(PromptError):
    """A token id outside of the model's vocabulary."""


class TokenizerMissingError(PromptError):
    """Text was given, but the model has no tokenizer."""


# Analyses, engine and store ---------------------------------------------------------------------------------------


class OptionError(FastinterpError, ValueError):
    """An option whose value is not one of those offered."""


class InputTypeError(FastinterpError, TypeError):
    """A model or prompts of a kind that the analysis does not take; the message says what to type."""


class MetricError(FastinterpError, ValueError):
    """A metric that does not fit the prompts or the analysis."""


class PlanError(FastinterpError, RuntimeError):
    """The plan cannot be carried out: too little disk or memory."""


class StoreError(FastinterpError, RuntimeError):
    """The store is not there, is not a fastinterp store, or is damaged."""


class StoreLockedError(StoreError):
    """Another process is writing the store."""


class StoreMismatchError(StoreError):
    """The existing store was begun with another specification; the message shows the difference."""


def nearest(given: object, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the nearest known word, or ``""``."""
    close = difflib.get_close_matches(str(given), list(known), n=3, cutoff=0.5)
    if not close:
        return ""
    return "; did you mean " + " or ".join(repr(word) for word in close) + "?"


def check_choice(option: str, given: str, choices: Iterable[str]) -> None:
    """Raises :class:`OptionError` unless ``given`` is among ``choices``."""
    choices = list(choices)
    if given not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise OptionError(f"{option}={given!r} is not known: choose from {listed}{nearest(given, choices)}")
