"""The journal: one SQLite row for each committed chunk file, written after the files, a block at a time."""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastinterp.errors import StoreError
from fastinterp.store.schema import FORMAT_VERSION

Durability = Literal["process", "power"]
T = TypeVar("T")

_TABLES = """
CREATE TABLE blocks (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, block INTEGER NOT NULL UNIQUE,
    ok INTEGER NOT NULL, failed INTEGER NOT NULL, rejected INTEGER NOT NULL);
CREATE TABLE chunks (
    block INTEGER NOT NULL, array TEXT NOT NULL, chunk_key TEXT NOT NULL,
    crc32c INTEGER NOT NULL, nbytes INTEGER NOT NULL, PRIMARY KEY (block, array, chunk_key)) WITHOUT ROWID;
CREATE TABLE created (
    key TEXT PRIMARY KEY, crc32c INTEGER NOT NULL, nbytes INTEGER NOT NULL) WITHOUT ROWID;
"""
# A reader that describes a running store holds its shared lock for milliseconds.
_BUSY_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class ChunkRow:
    """One committed chunk file ``<array>/<chunk_key>``: size, and crc32c of the bytes before its trailer."""

    block: int
    array: str
    chunk_key: str
    crc32c: int
    nbytes: int

    @property
    def key(self) -> str:
        """Path of the file inside of the zarr."""
        return f"{self.array}/{self.chunk_key}"


@dataclass(frozen=True, kw_only=True)
class CreatedRow:
    """One file that creation wrote once: metadata (crc32c of the whole file) or the chunk of a coordinate."""

    key: str
    crc32c: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One committed block and how many of its prompts ended in which state."""

    block: int
    ok: int
    failed: int
    rejected: int


class Journal:
    """An open journal; one thread at a time may use it.

    Rollback-journal mode rather than WAL, because WAL leaves two more files and does not work over network
    file systems. A transaction that a kill cut off is rolled back by whoever opens the journal next.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    @classmethod
    def create(cls, path: Path, created: Sequence[CreatedRow], durability: Durability) -> None:
        """Makes an empty journal; a half-made one never has the final name."""
        partial = path.with_name(path.name + ".partial")
        journal = cls(partial, _connect(partial, "rwc", durability))

        def fill(connection: sqlite3.Connection) -> None:
            for table in _TABLES.split(";"):
                connection.execute(table)
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            rows = [(row.key, row.crc32c, row.nbytes) for row in created]
            connection.executemany("INSERT INTO created VALUES (?, ?, ?)", rows)

        try:
            journal._transaction(fill)
        finally:
            journal.close()
        partial.replace(path)

    @classmethod
    def open(cls, path: Path, durability: Durability = "process") -> "Journal":
        """Opens an existing journal; raises :class:`StoreError` if it is missing or damaged."""
        if not path.is_file():
            raise StoreError(f"{path} is missing: bring it back, or remove the store and its .d folder and start again")
        journal = cls(path, _connect(path, "rw", durability))
        try:
            version = journal._guarded(lambda connection: connection.execute("PRAGMA user_version").fetchone()[0])
            if version != FORMAT_VERSION:
                raise StoreError(f"{path} has journal version {version}, this fastinterp reads {FORMAT_VERSION}")
        except BaseException:
            journal.close()
            raise
        return journal

    def commit(self, block: BlockRow, rows: Sequence[ChunkRow]) -> None:
        """Commits a block with all of its chunks in one transaction."""

        def insert(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "INSERT INTO chunks VALUES (?, ?, ?, ?, ?)",
                [(row.block, row.array, row.chunk_key, row.crc32c, row.nbytes) for row in rows],
            )
            connection.execute(
                "INSERT INTO blocks (block, ok, failed, rejected) VALUES (?, ?, ?, ?)",
                (block.block, block.ok, block.failed, block.rejected),
            )

        self._transaction(insert)

    def forget(self, blocks: Sequence[int]) -> None:
        """Takes back the commit of ``blocks``, whose files turned out to be damaged."""

        def delete(connection: sqlite3.Connection) -> None:
            for table in ("chunks", "blocks"):
                connection.executemany(f"DELETE FROM {table} WHERE block = ?", [(block,) for block in blocks])

        self._transaction(delete)

    def blocks(self) -> list[BlockRow]:
        """Returns the committed blocks, oldest commit first."""
        query = "SELECT block, ok, failed, rejected FROM blocks ORDER BY sequence"
        return [BlockRow(block=a, ok=b, failed=c, rejected=d) for a, b, c, d in self._select(query)]

    def chunks(self) -> list[ChunkRow]:
        """Returns every committed chunk, by block and array."""
        query = "SELECT block, array, chunk_key, crc32c, nbytes FROM chunks ORDER BY block, array, chunk_key"
        return [ChunkRow(block=a, array=b, chunk_key=c, crc32c=d, nbytes=e) for a, b, c, d, e in self._select(query)]

    def created(self) -> list[CreatedRow]:
        """Returns the files that were written when the store was created."""
        query = "SELECT key, crc32c, nbytes FROM created ORDER BY key"
        return [CreatedRow(key=a, crc32c=b, nbytes=c) for a, b, c in self._select(query)]

    def bytes_by_array(self) -> Mapping[str, int]:
        """Returns the bytes on disk of the committed chunks of each array."""
        return dict(self._select("SELECT array, SUM(nbytes) FROM chunks GROUP BY array"))

    def close(self) -> None:
        """Closes the file; calling it again does nothing."""
        self._connection.close()

    def _select(self, query: str) -> list[Any]:
        return self._guarded(lambda connection: connection.execute(query).fetchall())

    def _transaction(self, change: Callable[[sqlite3.Connection], None]) -> None:
        def run(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            try:
                change(connection)
                connection.execute("COMMIT")
            except BaseException:
                # A failed COMMIT (disk full) may have rolled back by itself.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

        self._guarded(run)

    def _guarded(self, action: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return action(self._connection)
        except sqlite3.Error as error:
            raise _failure(self._path, error) from error


def _failure(path: Path, error: sqlite3.Error) -> StoreError:
    return StoreError(
        f"the journal {path} cannot be used ({error}): if the disk is full or read-only, change that and run"
        " the same command again; if the file is damaged, remove the store and its .d folder and start again"
    )


def _connect(path: Path, mode: Literal["rw", "rwc"], durability: Durability) -> sqlite3.Connection:
    # EXTRA also syncs the directory after the commit; NORMAL costs little and keeps the file from tearing.
    synchronous = "EXTRA" if durability == "power" else "NORMAL"
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    connection = None
    try:
        connection = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS
        )
        connection.execute(f"PRAGMA synchronous = {synchronous}")
    except sqlite3.Error as error:
        if connection is not None:
            connection.close()
        raise _failure(path, error) from error
    return connection
