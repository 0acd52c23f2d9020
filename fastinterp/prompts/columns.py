"""Turns what people give (lists, arrays, tensors, ``None``, NaN) into the values of a prompt set."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from fastinterp.errors import PromptError

Prompt: TypeAlias = str | tuple[int, ...]
"""Text, or token ids."""

Answer: TypeAlias = str | int | tuple[str | int, ...]
"""Text, a token id, or several alternatives, whose logits the metrics average."""


def prompt_column(name: str, given: Iterable[Any]) -> tuple[Prompt | None, ...]:
    """Returns a column of prompts: text or token ids, ``None`` where one is missing."""
    return tuple(_prompt(name, row, value) for row, value in enumerate(_column(name, given)))


def answer_column(name: str, given: Iterable[Any]) -> tuple[Answer | None, ...]:
    """Returns a column of answers: text, a token id or alternatives, ``None`` where one is missing."""
    return tuple(_answer(name, row, value) for row, value in enumerate(_column(name, given)))


def id_column(given: Iterable[Any] | None, size: int) -> tuple[str, ...]:
    """Returns the ids as text; the row number where one is missing."""
    column = _column("ids", given) if given is not None else [None] * size
    return tuple(
        str(row) if value is None else str(_checked_text("id", row, str(value))) for row, value in enumerate(column)
    )


def _column(name: str, given: Iterable[Any]) -> list[Any]:
    if isinstance(given, str):
        raise PromptError(f"{name} is the text {given!r}: give a list with one value per prompt, [{given!r}]")
    return [_plain(value) for value in given]


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists; NaN, with which pandas marks a missing value, as ``None``."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and value != value else value


def _checked_text(name: str, row: int, text: str | None) -> str | None:
    """Refuses half of a surrogate pair, which no tokenizer and no file can hold."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"{name} of row {row} is not valid Unicode ({error.reason}): {text!a:.80}") from None
    return text


def _token_id(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _prompt(name: str, row: int, value: Any) -> Prompt | None:
    if value is None or isinstance(value, str):
        return _checked_text(name, row, value)
    if isinstance(value, Sequence):
        tokens = tuple(_token_id(token) for token in value)
        if None not in tokens:
            return tokens  # type: ignore[return-value]
    raise PromptError(f"{name} of row {row} must be text or a list of token ids, got {value!r:.80}")


def _answer(name: str, row: int, value: Any) -> Answer | None:
    if value is None or isinstance(value, str):
        return _checked_text(name, row, value)
    single = _token_id(value)
    if single is not None:
        return single
    if isinstance(value, Sequence) and len(value):
        alternatives = tuple(
            _checked_text(name, row, item) if isinstance(item, str) else _token_id(item) for item in map(_plain, value)
        )
        if None not in alternatives:
            return alternatives  # type: ignore[return-value]
    raise PromptError(
        f"{name} of row {row} must be text, a token id, or a list of alternatives of these, got {value!r:.80}"
    )
