"""What an offline W&B run has stored: its history rows, read from its own file (a LevelDB log of protocol buffers)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32768
FIRST_PARTS, LAST_PARTS = (1, 2), (1, 4)  # a record may be whole (1), or be split at the ends of blocks


def records(file: Path) -> Iterator[bytes]:
    content, position, record = file.read_bytes(), HEADER, b""
    assert content.startswith(b":W&B")
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # too little for a header: zeros
            position += BLOCK - position % BLOCK
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        part = content[position + HEADER : position + HEADER + size]
        record = part if kind in FIRST_PARTS else record + part
        position += HEADER + size
        if kind in LAST_PARTS:
            yield record


def history(file: Path, seconds: float = 60) -> list[dict[str, Any]]:
    """The rows that were logged, in order. W&B's process may write the last of them when `wandb.finish()` has
    returned.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + seconds
    while True:
        found = []
        for data in records(file):
            found.append(Record())
            found[-1].ParseFromString(data)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            break
        assert time.monotonic() < deadline, f"{file} has not ended"
        time.sleep(0.2)
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]
