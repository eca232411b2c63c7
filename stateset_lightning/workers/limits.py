"""Chat templates are foreign code, which comes with a model's folder: it runs in a fork with limits of time and memory.

The sandbox of transformers keeps a template from the system, but not from a loop without end, nor from `'x' * 10**10`.
"""

import os
import resource
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any, NoReturn

from stateset_lightning.errors import DataError

SECONDS = 5.0  # of processor time, for each item
_BYTES = 2**31  # beyond what this process has
_LOST_SECONDS = 120.0  # a fork of a process with threads may find a lock that nobody opens any more


def limited(items: Iterator[Any], what: str) -> Iterator[Any]:
    """What an iterator yields that runs foreign code; each item is made in a fork of this process, with limits.

    A fork, as it starts in milliseconds and has what it needs. It must touch neither a GPU nor another thread's things.
    The limit of memory is Linux's only.

    Args:
        items: Of anything that can be pickled.
        what: Whose code it is, for the error.

    Raises:
        DataError: If an item takes too much, or that error of the iterator itself.
    """
    ours, theirs = Pipe(duplex=False)
    is_told = "TOKENIZERS_PARALLELISM" in os.environ
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # a fork that is not told prints a warning
    if not (child := os.fork()):
        _send(items, theirs)
    if not is_told:
        del os.environ["TOKENIZERS_PARALLELISM"]
    theirs.close()
    try:
        with suppress(EOFError):
            while ours.poll(_LOST_SECONDS):
                found, error = ours.recv()
                yield from found
                if error is not None:
                    raise error
                if not found:
                    return
        raise DataError(f"{what} was stopped: more than {SECONDS:g} s or {_BYTES >> 30} GiB; mend the template")
    finally:
        with suppress(OSError), ours:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def rendered(tokenizer: Any, *calls: Mapping[str, Any]) -> list[str]:
    """The texts of a tokenizer's chat template by the arguments of each call; "" where it refuses a conversation.

    Raises:
        DataError: If it takes too much.
    """

    def text(arguments: Mapping[str, Any]) -> str:
        system = {"role": "system", "content": "Context"}  # without which some refuse
        for conversation in (arguments["conversation"], [system, *arguments["conversation"]]):
            with suppress(Exception):  # whatever foreign code raises
                return str(tokenizer.apply_chat_template(**{**arguments, "conversation": conversation}, tokenize=False))
        return ""

    return list(limited(map(text, calls), f"the chat template of {tokenizer.name_or_path!r}"))


def _send(items: Iterator[Any], pipe: connection.Connection) -> NoReturn:
    """Be the fork: the kernel ends it at its time, whatever it does."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGPROF})  # the parent ends it
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        with suppress(OSError, ValueError):  # there is no /proc, or a lower limit
            most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        for item in items:
            pipe.send(([item], None))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
        pipe.send(([], None))
    except DataError as error:
        pipe.send(([], error))
    finally:
        os._exit(0)
