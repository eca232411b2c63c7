"""What can go wrong when weights are loaded from a folder or a hub, as errors that name the option."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from stateset_lightning.errors import ConfigError


@contextmanager
def loading_errors(option: str) -> Iterator[None]:
    """While something is loaded for `option` (`key=value`).

    Raises:
        ConfigError: In place of whatever transformers, peft or the file raises.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{option} cannot be loaded: its weights are a pickle file with more in it than tensors, which could run code; convert it to "
            "safetensors where you trust it"
        ) from error
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{option} cannot be loaded: {first_line(error)}") from error


def check_complete(option: str, missing: Iterable[str], kind: str) -> None:
    """No weight of a loaded model is random.

    Args:
        option: `key=value`.
        missing: Names of the weights that the file did not have.
        kind: What should have been given.

    Raises:
        ConfigError: If there are any.
    """
    if names := sorted(missing):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ConfigError(
            f"{option} cannot be loaded: it has no weights for {', '.join(names[:3])}{more}, which would be random; give a complete {kind}"
        )


def first_line(error: BaseException) -> str:
    """What an error says, without the page of advice that often follows."""
    text = str(error).strip()
    hint = ""
    if "trust_remote_code" in text:
        hint = "; set model.policy.trust_remote_code=true if you trust its authors (generate and export: --trust_remote_code)"
    return text.split("\n")[0][:300] + hint
