"""Writing a store: one writer thread commits each block by one journal transaction, or not at all."""

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.errors import StoreError, check_choice
from fastinterp.store.begin import Begun, begin
from fastinterp.store.byte_queue import ByteQueue
from fastinterp.store.chunks import ChunkWriter
from fastinterp.store.journal import BlockRow, Durability
from fastinterp.store.schema import MEGABYTE, STATUS_CODES, ArraySpec, StoreSpec

# What a Python string costs beside its characters, for the bound of the queue.
STRING_OVERHEAD = 64


class StoreWriter:
    """The one writer of a store; use it as a context manager.

    Durable against the death of the process by default; ``durability="power"`` also forces every chunk and
    its directories to the disk before the journal names them.

    Example:
        >>> with StoreWriter.open("run.zarr", spec) as writer:  # doctest: +SKIP
        ...     for block in writer.missing:
        ...         writer.write(block, compute(spec.prompts_of(block)))
    """

    def __init__(self, spec: StoreSpec, begun: Begun, *, durability: Durability, queue_bytes: int) -> None:
        self._spec = spec
        self._begun = begun
        self._committed = set(begun.committed)
        self._taken = set(begun.committed)
        self._error: tuple[int, BaseException] | None = None
        self._reported = False
        self._chunks = ChunkWriter(begun.paths.zarr, spec, durability)
        self._queue: ByteQueue[tuple[int, dict[str, NDArray[Any]]]] = ByteQueue(queue_bytes)
        # A daemon, so that a second interrupt ends the process at once instead of waiting for the disk.
        self._thread = threading.Thread(target=self._run, name="fastinterp-store-writer", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        path: str | Path,
        spec: StoreSpec,
        *,
        durability: Durability = "process",
        queue_bytes: int = 256 * MEGABYTE,
    ) -> "StoreWriter":
        """Creates the store at ``path``, or resumes the one there after checking what it holds.

        Raises:
            StoreError: the folder is missing or not writable, ``path`` is something else, or is damaged.
            StoreLockedError: another process is writing it; raised at once.
            StoreMismatchError: it was begun with another specification; one line for each field that differs.
            PlanError: the disk has less room than the missing blocks need.
        """
        check_choice("durability", durability, ("process", "power"))
        if queue_bytes < 1:
            raise StoreError(f"queue_bytes={queue_bytes}: expected at least 1")
        begun = begin(path, spec, durability)
        try:
            return cls(spec, begun, durability=durability, queue_bytes=queue_bytes)
        except BaseException:
            begun.journal.close()
            begun.lock.release()
            raise

    @property
    def path(self) -> Path:
        """Absolute path of the zarr."""
        return self._begun.paths.zarr

    @property
    def resumed(self) -> bool:
        """Whether the store was there already."""
        return self._begun.resumed

    @property
    def damaged(self) -> Mapping[int, str]:
        """Blocks whose commit was taken back on resuming, and what was wrong with each."""
        return self._begun.damaged

    @property
    def committed(self) -> frozenset[int]:
        """Blocks that are committed by now; it grows while the writer works."""
        return frozenset(self._committed.copy())

    @property
    def missing(self) -> list[int]:
        """Blocks that are not committed by now, in order."""
        committed = self.committed
        return [block for block in range(self._spec.n_blocks) if block not in committed]

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for the disk; at most ``queue_bytes``, or a single block that is larger."""
        return self._queue.held

    def write(self, block: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Hands over every array of ``block``, copied; waits while the queue is full.

        ``arrays`` has exactly the arrays of the specification, each with ``len(spec.prompts_of(block))``
        rows; float32 values are taken for a float16 array, if they fit.

        Raises:
            StoreError: names, shapes, dtypes or the block are wrong; or the writer thread failed earlier.
        """
        self._raise_failure()
        n_rows = len(self._spec.prompts_of(block))
        if block in self._taken:
            raise StoreError(f"block {block} was written already: write only the blocks in StoreWriter.missing")
        names, expected = set(arrays), {array.name for array in self._spec.arrays}
        if names != expected:
            raise StoreError(
                f"block {block} must have exactly the arrays of the specification:"
                f" missing {sorted(expected - names)}, not in it {sorted(names - expected)}"
            )
        checked = {array.name: _checked(array, arrays[array.name], n_rows) for array in self._spec.arrays}
        nbytes = sum(_memory(array) for array in checked.values())
        if not self._queue.put((block, checked), nbytes):
            self._raise_failure()
            raise StoreError(f"{self.path} is closed: open it again to write more blocks")
        self._taken.add(block)

    def close(self) -> None:
        """Waits until everything handed over is committed; calling it again does nothing.

        An interrupt during the wait drops what is queued; the block at hand is finished, then the lock freed.

        Raises:
            StoreError: the writer thread failed and no call to :meth:`write` has said so yet.
        """
        self._queue.close()
        try:
            self._thread.join()
        except BaseException:
            self._queue.abandon()
            raise
        if not self._reported:
            self._raise_failure()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def _raise_failure(self) -> None:
        if self._error is None:
            return
        block, error = self._error
        self._reported = True
        raise StoreError(
            f"{self.path}: writing block {block} failed ({type(error).__name__}: {error});"
            f" {len(self._committed)} of {self._spec.n_blocks} blocks are committed and intact:"
            " remove the cause, then run the same command again to resume"
        ) from error

    def _run(self) -> None:
        block = -1
        try:
            while (item := self._queue.get()) is not None:
                (block, arrays), nbytes = item
                del item
                try:
                    rows = self._chunks.write(block, arrays)
                    self._begun.journal.commit(_block_row(block, arrays), rows)
                finally:
                    del arrays
                    self._queue.done(nbytes)
                self._committed.add(block)
        except BaseException as error:
            self._error = (block, error)
            self._queue.abandon()
        finally:
            # Here and not in close(): after an interrupted close the lock must outlive the block at hand.
            self._begun.journal.close()
            self._begun.lock.release()


def _checked(spec: ArraySpec, given: object, n_rows: int) -> NDArray[Any]:
    """Returns a copy of ``given`` in the dtype of ``spec``, ready to be written."""
    shape = (n_rows, *spec.shape[1:])
    if not isinstance(given, np.ndarray):
        raise StoreError(f"array {spec.name!r} is a {type(given).__name__}: expected numpy (tensor.cpu().numpy())")
    if given.shape != shape:
        raise StoreError(f"array {spec.name!r} has shape {given.shape}: expected {shape} for dims {spec.dims}")
    if spec.dtype == "str":
        return _checked_strings(spec, given)
    dtype = np.dtype(spec.dtype)
    if given.dtype == np.float32 and dtype == np.float16:
        with np.errstate(over="ignore"):
            half = given.astype(np.float16)
        if np.any(np.isinf(half) & np.isfinite(given)):
            largest = float(np.max(np.abs(given[np.isfinite(given)])))
            raise StoreError(f"array {spec.name!r} has values up to {largest:g}, float16 ends at 65504: use float32")
        return half
    if given.dtype != dtype:
        raise StoreError(
            f"array {spec.name!r} has dtype {given.dtype}: expected {dtype} (array.astype({spec.dtype!r}))"
        )
    if spec.name == "status" and not np.all((given >= STATUS_CODES["ok"]) & (given <= STATUS_CODES["rejected"])):
        raise StoreError(
            f"status has values {np.unique(given).tolist()}: a written prompt is 1 ok, 2 failed or 3 rejected"
        )
    return np.array(given, order="C", copy=True)


def _checked_strings(spec: ArraySpec, given: NDArray[Any]) -> NDArray[Any]:
    values = given.ravel().tolist()
    wrong = [value for value in values if not isinstance(value, str)]
    if wrong:
        raise StoreError(f"array {spec.name!r} holds {wrong[0]!r} ({type(wrong[0]).__name__}): expected str everywhere")
    try:
        "".join(values).encode()
    except UnicodeEncodeError as error:
        raise StoreError(f"array {spec.name!r} holds text that is not valid Unicode ({error})") from None
    strings = np.empty(given.shape, dtype=object)
    strings.ravel()[:] = values
    return strings


def _memory(array: NDArray[Any]) -> int:
    if array.dtype != object:
        return array.nbytes
    return sum(STRING_OVERHEAD + len(value) for value in array.ravel().tolist())


def _block_row(block: int, arrays: Mapping[str, NDArray[Any]]) -> BlockRow:
    if "status" not in arrays:
        return BlockRow(block=block, ok=len(next(iter(arrays.values()))), failed=0, rejected=0)
    count = np.bincount(arrays["status"].ravel(), minlength=len(STATUS_CODES))
    return BlockRow(
        block=block,
        ok=int(count[STATUS_CODES["ok"]]),
        failed=int(count[STATUS_CODES["failed"]]),
        rejected=int(count[STATUS_CODES["rejected"]]),
    )
