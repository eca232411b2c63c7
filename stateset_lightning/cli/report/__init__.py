"""`stateset-lightning report`: the files of a run -> one HTML page that needs nothing else.

The page's script fills it from JSON that stands in the page. Completions are untrusted: the JSON cannot end its
element, the script only sets text, and the page's policy lets no other script run and nothing be fetched.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from jinja2.utils import htmlsafe_json_dumps

from stateset_lightning.cli.arguments import Arguments
from stateset_lightning.cli.report.run_data import read_run
from stateset_lightning.files import atomic_write, keep_inputs
from stateset_lightning.redaction import json_text
from stateset_lightning.run.folder import REPORT


def main(words: Sequence[str]) -> None:
    """Runs the subcommand with the words that follow it.

    Raises:
        UserError: If the folder holds no run, or the page cannot be written.
    """
    parser = Arguments("report", "Write one HTML page about a run.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, such as runs/single_turn/version_0; it may go on")
    parser.add_argument("-o", "--output", metavar="FILE", help="the page; by default report.html in the run's folder")
    options = parser.parse_args(words)
    print(f"report: {write_report(options.run, options.output)}")


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run and returns its path; it is whole or absent.

    Args:
        run: The run's folder.
        output: The page; None for `report.html` in the run's folder.

    Raises:
        ConfigError: If the folder holds no run, or one of its files is damaged.
        DiskError: If the page cannot be written.
    """
    path = Path(run, REPORT) if output is None else Path(output)
    page = render(read_run(Path(run)))
    keep_inputs(*(file for file in Path(run).rglob("*") if file.name != REPORT))
    with atomic_write(path) as file:
        file.write(page.encode(errors="replace"))
    return path


def render(data: Mapping[str, Any]) -> str:
    """The page, with the data of `read_run` in it."""
    folder = files(__package__)
    page, style, script = (folder.joinpath(f"page.{end}").read_text("utf-8") for end in ("html", "css", "js"))
    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(page)
    return template.render(title=data["run"], style=style, script=script, data=script_safe(data), digest=_digest)


# JSON without the characters that could end a script element, or begin a comment or an entity.
script_safe = partial(htmlsafe_json_dumps, dumps=json_text, separators=(",", ":"))


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
