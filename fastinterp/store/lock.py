"""One writer at a time: an advisory ``flock`` that the kernel drops with the process, however it dies."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from fastinterp.errors import StoreError, StoreLockedError


class StoreLock:
    """The held lock of one store; made by :meth:`acquire`, given back by :meth:`release`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, store: Path) -> "StoreLock":
        """Takes the lock file ``path`` of ``store`` at once or not at all.

        Raises:
            StoreLockedError: another process, or another writer of this one, holds it; names pid and host.
            StoreError: the file cannot be written, or its file system has no ``flock``.
        """
        while True:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise StoreError(
                    f"{path} cannot be opened for writing ({error.strerror}): change its permissions, or give"
                    " another path"
                ) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Somebody may have deleted the file in between: a lock on an orphan protects nothing.
                if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    break
            except BlockingIOError:
                os.close(descriptor)
                raise StoreLockedError(_locked_message(path, store)) from None
            except OSError as error:
                os.close(descriptor)
                raise StoreError(
                    f"{path} cannot be locked ({error.strerror}): put the store on a file system with flock"
                    " (a local disk)"
                ) from error
            os.close(descriptor)
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder, 0)
        return cls(descriptor)

    def release(self) -> None:
        """Gives the lock back; calling it again does nothing."""
        if self._descriptor is None:
            return
        # Emptied, so that nobody is ever told the pid of a run that ended in order.
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None


def _locked_message(path: Path, store: Path) -> str:
    who, advice = "another process", "wait until it ends"
    # The holder writes its name right after it got the lock, so an empty file is worth a second look.
    for _ in range(5):
        try:
            holder = json.loads(path.read_text())
            who = f"process {holder['pid']} on host {holder['host']}"
            advice = f"wait until it ends, or stop it (kill {holder['pid']})"
            break
        except (ValueError, KeyError, OSError):
            time.sleep(0.02)
    return f"{store} is being written by {who} (lock {path}): {advice}, then run the same command again"
