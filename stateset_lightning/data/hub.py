"""Data sets of the Hugging Face hub -> raw rows, through the optional `datasets` library.

A hub id is `owner/name`, `owner/name:config` or `owner/name:config:split`. No code of a data set is ever run.
"""

import re

from stateset_lightning.data.rows import ListRows
from stateset_lightning.errors import DataError, imported


def is_hub_id(text: str) -> bool:
    """Whether `text` looks like `owner/name`, with or without a configuration and a split behind colons."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}", text) is not None


def read_hub(hub_id: str, split: str) -> ListRows:
    """All rows of a data set on the hub; without a split in `hub_id`, of its split of this name (for predict: test).

    Raises:
        ConfigError: If `datasets` is not installed.
        DataError: If the data set, its configuration or its split cannot be loaded.
    """
    name, config, wanted = [*hub_id.split(":"), None, None][:3]
    what = f"'{hub_id}' is no file here"
    datasets = imported("datasets", "hub", f"{what}, and a hub id")
    try:
        rows = datasets.load_dataset(name, config, split=wanted or ("test" if split == "predict" else split))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:  # RuntimeError: a script
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{what} and no data set of the hub: {reason}; write owner/name:config:split") from error
    return ListRows(rows, hub_id)
