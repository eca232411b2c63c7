"""Remove secrets (API keys, tokens, passwords) from what is saved with a run, logged or printed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_NAME = (
    r"(?:[\w.-]*[_.-])?(?:api_?keys?|(?:access|private|secret)_?keys?|secrets?|passwords?|passphrases?|credentials?|authorization)"
    r"|[\w.-]+[_-]token"
)
_SECRET_NAME = re.compile(rf"token|{_NAME}", re.IGNORECASE)
_HARMLESS_NAME = re.compile(r"(?:\w+_)?(?:pad|eos|bos|unk|sep|cls|mask|stop|end)_token", re.IGNORECASE)
# The keys of known providers, anywhere in a text, and passwords in addresses.
_SECRET_VALUE = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[opsu]_\w{20,}|github_pat_\w{20,}|xox[bp]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{30,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_ASSIGNMENT = re.compile(rf"\b({_NAME})(['\"]?\s*[=:]\s*['\"]?)([^\s'\",}}\])]+)", re.IGNORECASE)
_SHORTEST = 8  # the values of shorter environment variables are no secrets, and would hide ordinary words


def is_secret_name(name: str) -> bool:
    """Whether a key of this name holds a secret: `api_key`, `hf_token`; but not `max_new_tokens` or `eos_token`."""
    return _SECRET_NAME.fullmatch(name) is not None and _HARMLESS_NAME.fullmatch(name) is None


def redacted(value: Any, name: str = "") -> Any:
    """A copy of plain containers without secrets: what has a secret name or looks like a key becomes `***`.

    Empty values stay.
    """
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item, name) for item in value)
    if is_secret_name(name) and isinstance(value, str | bytes) and value:
        return HIDDEN
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """A text without secrets.

    Replaced by `***` are texts that look like keys, the value in `api_key=...`, and the values of environment variables
    with a secret name.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret_name(name):
            text = text.replace(value, HIDDEN)
    text = _SECRET_VALUE.sub(HIDDEN, text)
    return _ASSIGNMENT.sub(
        lambda match: match[0] if not is_secret_name(match[1]) else f"{match[1]}{match[2]}{HIDDEN}", text
    )
