"""Templates of prompts over the columns of a row (Jinja2): the user's own, and those of shapes that are recognised.

They run in Jinja2's sandbox: they are the user's word, but the values that they see are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from string import ascii_uppercase
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from stateset_lightning.errors import ConfigError, one_line


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


@lru_cache
def _environment() -> SandboxedEnvironment:
    """Renders the user's templates and this file's, over data that nobody has looked at."""
    # A missing value is no text: not "None", not "nan".
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, finalize=lambda value: "" if value is None or value != value else value
    )
    environment.filters |= {"lettered": _lettered, "passages": _passages}
    return environment


@lru_cache
def compiled(template: str) -> Template:
    return _environment().from_string(template)


def columns_of(template: str, key: str) -> list[str]:
    """The columns that a template names, which stands in the config under this key.

    Raises:
        ConfigError: If it is no template.
    """
    try:
        compiled(template)  # knows unknown filters, too
        return sorted(meta.find_undeclared_variables(_environment().parse(template)) - {"row"})
    except TemplateSyntaxError as error:
        raise ConfigError(f"data.{key}={template!r:.200} is no Jinja2 template: {one_line(error)}") from error


def _lettered(choices: Any) -> str:
    """A line for each choice: `A. red`; of a list, or of {text, label} (ARC)."""
    if choices is None or isinstance(choices, str):
        return choices or ""
    texts, labels = (choices["text"], choices["label"]) if isinstance(choices, Mapping) else (choices, ascii_uppercase)
    return "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=False))


def _passages(value: Any) -> str:
    """Texts below each other; of a text, a list, or {title, sentences} (HotpotQA)."""
    if isinstance(value, Mapping):
        pairs = zip(value["title"], value["sentences"], strict=True)
        value = [f"{title}: {''.join(sentences)}" for title, sentences in pairs]
    return "\n\n".join(value) if isinstance(value, list) else value or ""
