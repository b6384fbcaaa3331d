"""Ctrl-C and SIGTERM: the first asks to stop, the second insists."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The run was told to stop, by the signal `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class _State:
    """Signals belong to the process, and so does this."""

    handling = False
    quiet = False
    pending: int | None = None
    deferring = 0
    farewell: Callable[[], None] | None = None


@contextmanager
def handled(quiet: bool = False) -> Iterator[None]:
    """Within it, SIGINT and SIGTERM raise Interrupted. Does nothing inside another, or outside the main thread.

    Args:
        quiet: say nothing to people when a checkpoint is to be waited for.
    """
    if _State.handling or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    _State.handling, _State.pending, _State.quiet = True, None, quiet
    try:
        for signum, handler in before.items():
            if handler is not signal.SIG_IGN:  # as a shell has it for what it starts in the background
                signal.signal(signum, _handle)
        yield
    finally:
        _State.handling = False
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)


def reclaim() -> None:
    """Hear signals as `handled` does, after somebody else has put a handler in front."""
    if _State.handling and signal.getsignal(signal.SIGTERM) not in (_handle, signal.SIG_IGN):
        signal.signal(signal.SIGTERM, _handle)


@contextmanager
def deferred() -> Iterator[None]:
    """Within it, a first signal waits for `check`; a second one still interrupts at once."""
    _State.deferring += 1
    try:
        yield
    finally:
        _State.deferring -= 1
    check()


@contextmanager
def farewell(call: Callable[[], None]) -> Iterator[None]:
    """Within it, a first signal calls `call` before it interrupts."""
    _State.farewell = call
    try:
        yield
    finally:
        _State.farewell = None


def pending() -> int | None:
    """The signal that waits for `check`, if any."""
    return _State.pending


def check() -> None:
    """Raises Interrupted if a signal came meanwhile."""
    if _State.pending is not None:
        raise Interrupted(_State.pending)


def _handle(signum: int, _frame: object) -> None:
    first, _State.pending = _State.pending is None, signum
    if first and (_State.deferring or _State.farewell):
        with suppress(OSError):  # whoever read it may be gone with the same signal
            if not _State.quiet:
                os.write(2, b"stopping, with a checkpoint; once more stops at once\n")
        if _State.deferring:
            return
        assert _State.farewell is not None
        _State.farewell()
    raise Interrupted(signum)
