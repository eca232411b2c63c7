"""The process of the command line: how it ends on a signal at any moment, and that it outlives its reader.

Imports nothing heavy: a signal that comes before `begin` ends the process in Python's own way.
"""

import _thread
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

EXIT_CODES = {128 + number: number for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

_LEAVE_SECONDS = 4.0  # for what is to be closed; user code and libraries may hang there


class Output(io.FileIO):
    """Drops what is written once nobody can read it any more: a run must not die of a print."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            with suppress(OSError):
                os.write(2, f"descriptor {self.fileno()} is gone ({error.strerror}): its output is dropped\n".encode())
            return len(data)


def begin() -> None:
    """From here on the process ends with 128 + the number of a signal, and prints whether or not somebody reads it."""
    _on_signals(lambda number, frame: leave(128 + number))
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # one that was closed; a file would take its place
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        now = getattr(sys, name) or io.TextIOWrapper(io.BytesIO())  # None where it was closed
        stream = io.BufferedWriter(Output(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, now.encoding, now.errors, line_buffering=True))


def leave(code: int) -> NoReturn:
    """Ends the process with this exit code: after 4 seconds at the latest, at once on another signal.

    Raises:
        SystemExit: Always. A library may swallow it, or hang while it closes something.
    """
    _on_signals(lambda *_: os._exit(code))
    sys.unraisablehook = lambda unraisable: None  # the signal may have come inside a destructor
    _thread.start_new_thread(_leave_later, (code,))  # not `threading`, whose locks this handler may have interrupted
    raise SystemExit(code)


def _leave_later(code: int) -> None:
    time.sleep(_LEAVE_SECONDS)
    os._exit(code)


def _on_signals(handler: Callable[[int, Any], object]) -> None:
    for number in EXIT_CODES.values():
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, handler)
