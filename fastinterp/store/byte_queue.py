"""A queue that is bounded in bytes: a slow disk slows the computation instead of filling the memory."""

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteQueue(Generic[T]):
    """First in, first out between one producer and one consumer; holds at most ``limit`` bytes.

    An item counts until the consumer says :meth:`done`, because its memory is in use until then. An item
    larger than the limit passes when it is alone.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[tuple[T, int]] = deque()
        self._held = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes that are queued or being worked on."""
        return self._held

    def put(self, item: T, nbytes: int) -> bool:
        """Adds an item, waiting for room; returns False if the queue was closed in the meantime."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._held or self._held + nbytes <= self._limit)
            if self._closed:
                return False
            self._items.append((item, nbytes))
            self._held += nbytes
            self._changed.notify_all()
            return True

    def get(self) -> tuple[T, int] | None:
        """Returns the next item and its bytes, waiting for one; None once the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._closed)
            return self._items.popleft() if self._items else None

    def done(self, nbytes: int) -> None:
        """Says that an item taken with :meth:`get` needs its memory no longer."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Takes no more items; those inside are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Closes the queue and drops what is inside."""
        with self._changed:
            self._closed = True
            self._held -= sum(nbytes for _, nbytes in self._items)
            self._items.clear()
            self._changed.notify_all()
