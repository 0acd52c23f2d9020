"""Prompts of mixed lengths, and what the tests of the engine look at in a store."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastinterp.prompts import PromptSet

# One token each for the tiny tokenizer, with the space in front.
NAMES = ("Mary", "John", "Alice", "Bob", "Tom", "Sarah")
TEMPLATES = (
    "When {a} and {b} went to the shops, {b} gave the bag to",
    "{a} and",
    "Then {a} and {b} had a long argument near the old river bank, and afterwards {b} said to",
    "The quick brown fox jumps over {a}",
)


def sentences(n: int) -> PromptSet:
    """Returns ``n`` different prompts of 2 to 30 tokens, each with an id, an answer and a wrong answer."""
    pairs = [(a, b) for a in NAMES for b in NAMES if a != b][:n]
    return PromptSet.of(
        [TEMPLATES[i % len(TEMPLATES)].format(a=a, b=b) for i, (a, b) in enumerate(pairs)],
        answer=[f" {a}" for a, _ in pairs],
        wrong=[f" {b}" for _, b in pairs],
        ids=[f"row-{i}" for i in range(len(pairs))],
    )


@pytest.fixture(scope="session")
def make_sentences() -> Callable[[int], PromptSet]:
    return sentences


@pytest.fixture(scope="session")
def prompts() -> PromptSet:
    """22 prompts: four blocks, of which the last is shorter."""
    return sentences(22)


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
