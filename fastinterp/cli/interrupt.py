"""SIGINT and SIGTERM: the first stops after the current step and keeps what is finished, the second stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The run was asked to stop. Not an ``Exception``, so that nothing on the way takes it for a failure."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


@contextmanager
def interruptible() -> Iterator[None]:
    """Within it, the first SIGINT or SIGTERM raises :class:`Interrupted`; a second one ends the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: FrameType | None) -> None:
        for again in before:
            signal.signal(again, signal.SIG_DFL)
        raise Interrupted(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
