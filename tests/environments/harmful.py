"""Environments that would take the trainer with them."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

PATTERN = re.compile(r"(a+)+$")


class Harmful:
    """Does what the scenario says, mostly in its second answer; says which process it is in."""

    def reset(self, scenario: Any, seed: int) -> None:
        self.harm, self.answers = scenario["harm"], 0

    def step(self, text: str) -> Any:
        self.answers += 1
        if self.harm == "exits at once":
            os._exit(3)
        if self.answers == 2:
            match self.harm:
                case "spins":
                    PATTERN.match("a" * 60 + "b")  # holds the interpreter
                case "exits":
                    os._exit(3)
                case "raises":
                    raise KeyError("target")
        return f"pid {os.getpid()} torch {'torch' in sys.modules}", 1.0, self.answers == 2

    def close(self) -> None:
        if "file" in (self.harm or ""):
            with open(self.harm, "a") as file:
                file.write("closed\n")


class Waits(Harmful):
    """Takes half a second."""

    def step(self, text: str) -> Any:
        time.sleep(0.5)
        return None, 1.0, True


class Calls(Harmful):
    def add(self, a: int, b: int) -> int:
        """Adds.

        Args:
            a: One.
            b: Other.
        """
        return a + b

    def leave(self) -> str:
        """Ends the process."""
        os._exit(4)
