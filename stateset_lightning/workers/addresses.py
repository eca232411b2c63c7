"""Addresses of HTTP servers, as users give them."""

import re
from urllib.parse import SplitResult, urlsplit

from stateset_lightning.errors import ConfigError


def http_address(key: str, url: str) -> tuple[SplitResult, str]:
    """The parts of an address, and the address without user and password.

    Args:
        key: The option that gives it, for the error.
        url: Such as http://127.0.0.1:8000.

    Raises:
        ConfigError: If it is none.
    """
    try:
        parts = urlsplit(url)
        # What has another port than a number, or too long a part in the host's name, is a ValueError.
        is_address = re.fullmatch(r"https?://[!-~]+", url) and parts.port != 0 and (parts.hostname or "").encode("idna")
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"{key}: {url.rpartition('@')[2]!r} is no address: give one such as http://127.0.0.1:8000")
    return parts, parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def is_this_machine(url: str) -> bool:
    return re.fullmatch(r"(.+\.)?localhost|127(\.\d+){3}|0\.0\.0\.0|::1?", urlsplit(url).hostname or "") is not None
