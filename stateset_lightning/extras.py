"""Optional libraries, asked for where an option needs them."""

from __future__ import annotations

import importlib.util

from stateset_lightning.errors import ConfigError


def require(module: str, extra: str, what: str) -> None:
    """The library of an extra of this package is installed; nothing is imported.

    Args:
        module: To import.
        extra: That brings it, `pip install "stateset-lightning[extra]"`.
        what: The option or reward that needs it, for the error.

    Raises:
        ConfigError: If it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f'{what} needs the library {module.replace("_", "-")}: pip install "stateset-lightning[{extra}]"'
        )
