"""Instructions for a model on a server: a text in which a scenario's columns may stand, in braces."""

import re
from collections.abc import Mapping
from typing import Any

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.types import ABSENT, at_path

# A brace that is written twice, or a column in braces.
_BRACES = re.compile(r"\{\{|\}\}|\{([^\W\d]\w*(?:[.\[][\w.\[\]]+)?)\}")


class Instructions:
    """A text whose `{column}` is replaced by the scenario's column, also at a dotted path (`{extra_info.answer}`).

    What a column holds is put in as it is: braces in it name nothing.

    Args:
        key: What errors call the text, such as `model_judge.rubric`.
        text: The text; `{{` is a brace.
        say: What the text should say, for the error about an empty one.

    Attributes:
        columns: That it names.

    Raises:
        ConfigError: If the text is empty, or has a brace that is neither doubled nor part of a column.
    """

    def __init__(self, key: str, text: str, say: str) -> None:
        self._key, self._text = key, text
        if not text.strip():
            raise ConfigError(f"{key} is empty: say {say}")
        if brace := re.search(r"\{[^{}]*\}?|\}", _BRACES.sub("", text)):
            raise ConfigError(f"{key} names the column '{brace[0]}'; write {{{{ and }}}} for braces")
        self.columns = [column for column in _BRACES.findall(text) if column]

    def filled(self, scenario: Mapping[str, Any]) -> str:
        """The text for a scenario.

        Raises:
            DataError: If the scenario lacks a column.
        """
        values = {name: at_path(scenario, name) for name in self.columns}
        if absent := [name for name, value in values.items() if value is None or value is ABSENT]:
            raise DataError(f"scenario {scenario.get('id')!r} has no column '{absent[0]}', which {self._key} names")
        return _BRACES.sub(lambda part: str(values[part[1]]) if part[1] else part[0][0], self._text)
