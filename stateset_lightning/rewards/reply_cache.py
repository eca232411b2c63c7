"""Replies of a judge, by what was asked: one SQLite file that several processes may share, or memory."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

from stateset_lightning.errors import ConfigError

_WAIT_SECONDS = 30.0  # for another process's write


class ReplyCache:
    """Keeps the newest replies.

    Args:
        path: The file, made where there is none; None keeps replies in memory, for this process.
        max_replies: Replies at most; the oldest make room.

    Raises:
        ConfigError: If the file cannot be opened, or is no cache.
    """

    def __init__(self, path: str | None, max_replies: int) -> None:
        self._max_replies = max_replies
        self._lock = threading.Lock()
        try:
            if path is not None:
                Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            file = ":memory:" if path is None else str(Path(path).expanduser())
            self._connection = sqlite3.connect(
                file, timeout=_WAIT_SECONDS, check_same_thread=False, isolation_level=None
            )
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS replies (number INTEGER PRIMARY KEY, key TEXT UNIQUE, reply TEXT NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"cache={path!r} cannot be opened: {error}; give a file of its own, or leave it out"
            ) from error

    def get(self, key: str) -> str | None:
        """The reply under `key`, if there is one."""
        with self._lock:
            row = self._connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; on disk at once."""
        with self._lock:
            self._connection.execute("INSERT OR REPLACE INTO replies (key, reply) VALUES (?, ?)", (key, reply))
            self._connection.execute(
                "DELETE FROM replies WHERE number <= (SELECT MAX(number) FROM replies) - ?", (self._max_replies,)
            )

    def close(self) -> None:
        with self._lock:
            self._connection.close()
