"""Prompt files as columns: ``.txt``, ``.jsonl``, ``.csv``, ``.parquet``."""

import csv
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.errors import PromptFileError, check_choice, nearest

COLUMNS = ("prompt", "answer", "wrong", "corrupt", "id")


@dataclass(frozen=True, kw_only=True)
class PromptTable:
    """The values of the columns that a file has, by our names, and the names of its other columns."""

    values: dict[str, list[Any]]
    other_columns: tuple[str, ...]


def read_table(path: Path, columns: Mapping[str, str] | None) -> PromptTable:
    """Reads the prompt columns of a file; ``columns`` maps our names to the file's where they differ.

    Raises :class:`~fastinterp.errors.PromptFileError` for everything that can be wrong with the file, and
    :class:`~fastinterp.errors.OptionError` for a key of ``columns`` that is not one of ours.
    """
    for name in columns or {}:
        check_choice("columns key", name, COLUMNS)
    if not path.exists():
        raise PromptFileError(f"there is no prompt file {path}")
    if path.is_dir():
        raise PromptFileError(f"{path} is a folder: give one prompt file ({', '.join(_READERS)})")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise PromptFileError(f"{path}: {path.suffix!r} files are not read, only {', '.join(_READERS)}")
    found = reader(path)
    if not found or not len(next(iter(found.values()))):
        raise PromptFileError(f"{path} holds no prompts")
    return _choose(path, found, dict(columns or {}))


def _choose(path: Path, found: dict[str, list[Any]], columns: dict[str, str]) -> PromptTable:
    wanted = {name: columns.get(name, name) for name in COLUMNS}
    for name, column in wanted.items():
        if column not in found and (name == "prompt" or name in columns):
            there = ", ".join(map(repr, found))
            raise PromptFileError(
                f"{path} has no column {column!r}, only {there}{nearest(column, found)}. "
                f'Say which column holds the {name}: columns={{"{name}": "<its name in the file>"}} '
                f"(--column {name}=<its name in the file>)"
            )
    values = {name: found[column] for name, column in wanted.items() if column in found}
    if path.suffix.lower() == ".csv":
        # A CSV cell cannot say "nothing", it can only be empty. An empty prompt stays: tokenising rejects it.
        values = {name: cells if name == "prompt" else [c or None for c in cells] for name, cells in values.items()}
    used: Collection[str] = set(wanted.values())
    return PromptTable(values=values, other_columns=tuple(name for name in found if name not in used))


def _text(path: Path) -> str:
    try:
        # utf-8-sig: spreadsheets write a byte-order mark, which must not become part of the first prompt.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def _lines(path: Path) -> list[str]:
    # Not splitlines(): that also cuts at U+2028, form feeds and others, which may stand inside a prompt.
    lines = _text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return ("line " if len(numbers) == 1 else "lines ") + shown + more


def _read_txt(path: Path) -> dict[str, list[Any]]:
    lines = _lines(path)
    blank = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if blank and len(blank) < len(lines):
        raise PromptFileError(f"{path} has a blank line where a prompt should be: {_listed(blank)}. Remove it")
    return {"prompt": [] if blank else lines}


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    numbers = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise PromptFileError(f"{path}, line {number}: nested too deeply") from None
        except json.JSONDecodeError as error:
            raise PromptFileError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise PromptFileError(f'{path}, line {number}: expected {{"prompt": "..."}}, got {type(row).__name__}')
        rows.append(row)
        numbers.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _read_csv(path: Path) -> dict[str, list[Any]]:
    """All values are text; an empty cell of an optional column means that there is none."""
    _text(path)
    rows: list[list[str]] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for row in reader:
                if rows and row and len(row) != len(rows[0]):
                    raise PromptFileError(
                        f"{path}, line {reader.line_num}: {len(row)} cells, the header has {len(rows[0])} "
                        "(a prompt with a comma needs quotes around it)"
                    )
                if row:
                    rows.append(row)
        except csv.Error as error:
            raise PromptFileError(f"{path}, line {reader.line_num}: {error}; .jsonl has no such limits") from error
    if not rows:
        return {}
    header = rows[0]
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        raise PromptFileError(f"{path} has two columns {twice[0]!r}: rename one of them")
    return {name: [row[column] for row in rows[1:]] for column, name in enumerate(header)}


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    # Imported here: pyarrow takes a moment, and only this format needs it.
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptFileError(f"{path} cannot be read as parquet: {error}") from error
    return dict(table.to_pydict())


_READERS: dict[str, Callable[[Path], dict[str, list[Any]]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
