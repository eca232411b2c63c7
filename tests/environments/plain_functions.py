"""Tools as a user writes them."""

import asyncio
import threading


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def divide(a: float, b: float) -> float:
    """Divides.

    Args:
        a: By b.
        b: Not zero.
    """
    return a / b


def look_up(word: str) -> dict:
    """Looks a word up.

    Args:
        word: To look up.
    """
    return {"word": word, "meanings": ["größe", None]}


async def fetch(name: str) -> str:
    """Fetches a page.

    Args:
        name: Of the page.
    """
    await asyncio.sleep(0)
    return f"page {name}"


ended = []  # names of the calls below that came to their end
go_on = threading.Event()


def slow() -> str:
    """Waits until it may go on."""
    go_on.wait(20)
    ended.append("slow")
    return "late"


async def slow_fetch() -> str:
    """Takes its time."""
    try:
        await asyncio.sleep(20)
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise
    return "late"


def leave() -> None:
    """Ends the program."""
    raise SystemExit(3)


def untyped(a):
    """Has no types."""


def undocumented(a: int) -> int:
    return a
