"""How a run takes hold of its store: create it, or resume it after everything that is there was checked."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.errors import StoreError, StoreMismatchError
from fastinterp.store.chunks import create_zarr, find_fault, sync_files
from fastinterp.store.journal import ChunkRow, Durability, Journal
from fastinterp.store.lock import StoreLock
from fastinterp.store.paths import (
    StorePaths,
    check_disk,
    check_parent,
    check_side,
    group_attributes,
    read_run_json,
    write_run_json,
)
from fastinterp.store.schema import MEGABYTE, StoreSpec

# Chunks written shortly before a crash are the ones at risk; reading them all again would take minutes.
RECENT_BLOCKS = 8
RECENT_BYTES = 1024 * MEGABYTE


# What a hash that differs says.
MEANINGS = {
    "identity.input_hash": " (the prompts, answers or ids are not the same)",
    "identity.weights_sha256": " (the weights are not the same)",
    "identity.tokenizer_hash": " (the tokenizer is not the same)",
}


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A store that is locked, complete in its metadata and has no file of a block that is not committed."""

    paths: StorePaths
    lock: StoreLock
    journal: Journal
    resumed: bool
    committed: frozenset[int]
    damaged: Mapping[int, str]


def check_target(path: str | Path) -> None:
    """Raises :class:`StoreError` if no store can be begun or resumed at ``path``; changes nothing.

    Also raises :class:`StoreLockedError` if somebody is writing it. Worth calling before a model is loaded.
    """
    paths = StorePaths.of(path)
    if not os.path.lexists(paths.zarr):
        check_parent(paths)
        return
    group_attributes(paths.zarr)
    check_side(paths)
    StoreLock.acquire(paths.lock, paths.zarr).release()


def begin(path: str | Path, spec: StoreSpec, durability: Durability) -> Begun:
    """Locks and creates or resumes the store at ``path``.

    Raises:
        StoreError: no folder to write to, something else is at ``path``, or the store lost a part.
        StoreLockedError: somebody else is writing it.
        StoreMismatchError: it was begun with another specification.
        PlanError: the disk is too small for what is still to be written.
    """
    paths = StorePaths.of(path)
    if os.path.lexists(paths.zarr):
        group_attributes(paths.zarr)
        check_side(paths)
    else:
        check_parent(paths)
        check_disk(paths, spec.nbytes())
        paths.side.mkdir(exist_ok=True)
    lock = StoreLock.acquire(paths.lock, paths.zarr)
    try:
        # Looked at again: another process may have created it while this one waited for the lock.
        resumed = os.path.lexists(paths.zarr)
        _sweep_side(paths)
        if resumed:
            return _resume(paths, lock, spec, durability)
        _create(paths, spec, durability)
        journal = Journal.open(paths.journal, durability)
        return Begun(paths=paths, lock=lock, journal=journal, resumed=False, committed=frozenset(), damaged={})
    except BaseException:
        lock.release()
        raise


def _sweep_side(paths: StorePaths) -> None:
    """Removes what a killed creation left: half-made zarr, journal, run.json."""
    for leftover in paths.side.glob("*.partial*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _create(paths: StorePaths, spec: StoreSpec, durability: Durability) -> None:
    """Makes everything under other names; with the rename of the zarr, last, the store exists."""
    if paths.journal.exists():
        journal = Journal.open(paths.journal)
        committed = len(journal.blocks())
        journal.close()
        if committed:
            raise StoreError(
                f"{paths.side} records {committed} committed blocks, but {paths.zarr} is gone:"
                f" move the zarr back beside it, or remove {paths.side} to start again"
            )
    paths.logs.mkdir(exist_ok=True)
    created = create_zarr(paths.creating, spec)
    Journal.create(paths.journal, created, durability)
    write_run_json(paths, spec)
    if durability == "power":
        sync_files(paths.creating, [row.key for row in created])
        sync_files(paths.side, ["run.json", "journal.sqlite"])
    paths.creating.rename(paths.zarr)
    if durability == "power":
        sync_files(paths.zarr.parent, [])


def _resume(paths: StorePaths, lock: StoreLock, spec: StoreSpec, durability: Durability) -> Begun:
    group_attributes(paths.zarr)
    check_side(paths)
    check_same(paths, read_run_json(paths)[0], spec)
    journal = Journal.open(paths.journal, durability)
    try:
        for created in journal.created():
            fault = find_fault(paths.zarr, created, read=True)
            if fault:
                raise StoreError(
                    f"{paths.zarr / created.key} {fault}; it was written once, when the store was created:"
                    f" bring it back from a copy, or remove {paths.zarr} and {paths.side} and start again"
                )
        damaged = _find_damage(paths, journal, spec)
        if damaged:
            journal.forget(sorted(damaged))
        _sweep_zarr(paths, spec, {row.key for row in journal.chunks()})
        committed = frozenset(row.block for row in journal.blocks())
        missing = spec.n_blocks - len(committed)
        check_disk(paths, spec.nbytes() * missing // spec.n_blocks)
    except BaseException:
        journal.close()
        raise
    return Begun(paths=paths, lock=lock, journal=journal, resumed=True, committed=committed, damaged=damaged)


def _find_damage(paths: StorePaths, journal: Journal, spec: StoreSpec) -> dict[int, str]:
    """Returns the first fault of each block: every chunk by size, those of the last commits by checksum."""
    rows: dict[int, list[ChunkRow]] = {}
    for row in journal.chunks():
        rows.setdefault(row.block, []).append(row)
    damaged: dict[int, str] = {}
    bytes_read = 0
    for age, committed in enumerate(reversed(journal.blocks())):
        block, chunks = committed.block, rows.pop(committed.block, [])
        read = age < RECENT_BLOCKS and bytes_read < RECENT_BYTES
        bytes_read += sum(row.nbytes for row in chunks)
        if {row.key for row in chunks} != set(_keys(spec, block)):
            damaged[block] = f"the journal does not list every chunk of block {block}"
            continue
        for row in chunks:
            fault = find_fault(paths.zarr, row, read=read)
            if fault:
                damaged[block] = f"{row.key} {fault}"
                break
    return damaged


def _keys(spec: StoreSpec, block: int) -> Iterator[str]:
    for array in spec.arrays:
        for key in spec.chunk_keys(array, block):
            yield f"{array.name}/{key}"


def _sweep_zarr(paths: StorePaths, spec: StoreSpec, committed: set[str]) -> None:
    """Removes temporary files, and the chunks of blocks that were not committed and are computed again."""
    prefixes = tuple(f"{array.name}/c/" for array in spec.arrays)
    for folder, _, files in os.walk(paths.zarr):
        for name in files:
            path = Path(folder, name)
            key = path.relative_to(paths.zarr).as_posix()
            if name.endswith(".partial") or (key.startswith(prefixes) and key not in committed):
                path.unlink()


def check_same(paths: StorePaths, there: Mapping[str, Any], spec: StoreSpec) -> None:
    """Raises :class:`StoreMismatchError` with one line for each field in which the specifications differ.

    Causes stand in front of what follows from them: prompts, model and options, then sizes and arrays.
    """
    store, run = dict(_flat(there)), dict(_flat(spec.to_json()))
    if store == run:
        return
    lines = [
        f"{field.removeprefix('identity.')}: store has {_shown(store, field)}, this run has {_shown(run, field)}"
        + MEANINGS.get(field, "")
        for field in sorted(store.keys() | run.keys(), key=_rank)
        if field not in store or field not in run or store[field] != run[field]
    ]
    raise StoreMismatchError(
        f"{paths.zarr} was begun with another specification:\n"
        + "\n".join(lines)
        + "\nGive the same options and input again to resume it, or another path to start a new store."
    )


def _rank(field: str) -> tuple[int, str]:
    """Prompts first, the rest of the identity next, shapes of arrays last."""
    if field in MEANINGS:
        return list(MEANINGS).index(field), field
    order = ("identity.", "n_prompts", "")
    return len(MEANINGS) + next(i for i, prefix in enumerate(order) if field.startswith(prefix)), field


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(fields: Mapping[str, Any], field: str) -> str:
    if field not in fields:
        return "no such field"
    text = json.dumps(fields[field])
    if len(text) <= 100:
        return text
    # Long lists may begin alike; the hash shows that they differ.
    return f"{text[:80]}... ({len(text)} characters, sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"
