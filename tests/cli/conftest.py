"""The command line called in this process, a prompt file, and what the tests look at in a store."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastinterp.cli import main

# One token each for the tiny tokenizer, with the space in front.
NAMES = ("Mary", "John", "Alice", "Bob", "Tom", "Sarah")
TEMPLATES = (
    "When {a} and {b} went to the shops, {b} gave the bag to",
    "{a} and",
    "Then {a} and {b} had a long argument near the old river bank, and afterwards {b} said to",
    "The quick brown fox jumps over {a}",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs ``fastinterp ARGUMENTS``; an exception that would be a traceback fails the test."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fastinterp", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return Result(code=code, out=printed.out, err=printed.err)

    return call


def make_rows(n: int = 22) -> list[dict[str, Any]]:
    """Returns ``n`` different prompts of 2 to 30 tokens with answers."""
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b][:n]
    return [
        {
            "id": f"row-{i}",
            "prompt": TEMPLATES[i % len(TEMPLATES)].format(a=a, b=b),
            "answer": f" {a}",
            "wrong": f" {b}",
        }
        for i, (a, b) in enumerate(pairs)
    ]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """22 prompts, which make four blocks; to be changed at will."""
    return make_rows()


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """Writes rows as .jsonl."""
    return write_rows


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 22 prompts as a file."""
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", make_rows())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def read_files(store: Path) -> dict[str, Any]:
    """Every file of a store by path; the metadata of the group without the time at which it was made."""
    files: dict[str, Any] = {
        file.relative_to(store).as_posix(): file.read_bytes() for file in store.rglob("*") if file.is_file()
    }
    group = json.loads(files["zarr.json"])
    del group["attributes"]["created"]
    return files | {"zarr.json": group}


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, Any]]:
    return read_files
