"""Cases that do not hold, one for each thing that the harness looks for: `tests/test_hostile.py` sees it find them."""

from __future__ import annotations

import base64
import os
import subprocess
from pathlib import Path

from cases import Place, Plan


def exit_code(place: Place) -> None:
    """`convert` of no file ends with 2, and 0 is expected."""


def traceback(place: Place) -> None:
    raise RuntimeError("a mistake of ours")


def printed_secret(place: Place) -> None:
    os.write(1, b"key: " + place.secret("DB_PASSWORD").encode())


def written_secret(place: Place) -> None:
    encoded = base64.b64encode(b"user:" + place.secret("api_key").encode())
    Path("runs/header.txt").write_bytes(b"Basic " + encoded)


def changed_file(place: Place) -> None:
    Path("rows.jsonl").write_text("{}")


def file_elsewhere(place: Place) -> None:
    place.root.joinpath("executed").touch()


def file_gone(place: Place) -> None:
    Path("config.yaml").unlink()


def left_process(place: Place) -> None:
    subprocess.Popen(["sleep", "300"], start_new_session=True)


ALL = (exit_code, traceback, printed_secret, written_secret, changed_file, file_elsewhere, file_gone, left_process)


def plan(place: Place) -> Plan:
    place.config()
    place.secret("api_key")
    breaks = ALL[place.seed % len(ALL)]
    codes = (0,) if breaks is exit_code else (1, 2)
    return Plan(["convert", "nowhere.yaml"], breaks.__name__, codes=codes, inside=lambda: breaks(place))
