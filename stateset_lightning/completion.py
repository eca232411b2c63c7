"""`stateset-lightning completion bash|zsh`: a script that lets the shell complete subcommands, flags and values.

The script holds all words, so that the Tab key does not wait for Python. Values are completed where a key takes one of
a few: choices, true or false, and the classes of this package, torch and Lightning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from stateset_lightning.cli_messages import CLASS_HOMES, CLASSES, PROGRAM
from stateset_lightning.generate import Arguments

OWN = ("generate", "export", "report", "convert")

ZSH = """\
autoload -U +X compinit && compinit -u
autoload -U +X bashcompinit && bashcompinit
"""
SCRIPT = """\
_{name}() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}" flags="" values=""
  COMPREPLY=()
  if [[ "$COMP_CWORD" == 1 ]]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
    return
  fi
  if [[ "$cur" == "=" ]]; then cur=""; elif [[ "$prev" == "=" ]]; then prev="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
  case "$command" in
{flags}
  esac
  case "$prev" in
{values}
  esac
  if [[ "$cur" == -* ]]; then values="$flags"; fi
  if [[ -n "$values" ]]; then COMPREPLY=($(compgen -W "$values" -- "$cur")); fi
}}
complete -o default -F _{name} {program}
"""


def main(words: Sequence[str]) -> None:
    """Runs the subcommand with the words that follow it.

    Raises:
        ConfigError: If the shell is none of the two.
    """
    parser = Arguments(
        prog=f"{PROGRAM} completion",
        description=(
            f"Print a script for the shell to complete names, flags and values: {PROGRAM} completion bash > FILE;"
            " source FILE"
        ),
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    print(script(parser.parse_args(words).shell), end="")


def script(shell: str) -> str:
    """The script for a shell; zsh runs the function of bash."""
    parsers = _parsers()
    nested = list(_nested_flags())
    flags = {
        name: sorted({*nested, *(flag for action in actions for flag in action.option_strings)})
        for name, actions in parsers.items()
    }
    flags |= {command: _flags_in_help(command) for command in OWN}
    flags |= {"doctor": [*flags["fit"], "--sample"], "completion": ["--help"]}
    values: dict[str, list[str]] = {}
    for action in (action for actions in parsers.values() for action in actions):
        if accepted := _accepted(action):
            values |= dict.fromkeys(action.option_strings, accepted)
    text = SCRIPT.format(
        program=PROGRAM,
        name=PROGRAM.replace("-", "_"),
        commands=" ".join(flags),
        flags=_cases("flags", flags),
        values=_cases("values", values),
    )
    return in_shell(shell, text)


def in_shell(shell: str, text: str) -> str:
    """The script with what a shell needs before it."""
    note = f"# {shell} completion of {PROGRAM}, made by `{PROGRAM} completion {shell}`; make it anew after an update.\n"
    return note + (ZSH if shell == "zsh" else "") + text


def _parsers() -> Mapping[str, list[Action]]:
    """The options of the subcommands that Lightning runs."""
    from stateset_lightning.lightning_cli import StatesetCLI

    class Built(Exception):
        pass

    class Parsers(StatesetCLI):
        def parse_arguments(self, *args: Any) -> NoReturn:
            raise Built(self._subcommand_parsers)

    try:
        Parsers([])
    except Built as built:
        return {name: parser._actions for name, parser in built.args[0].items()}
    raise AssertionError("LightningCLI parses after it has built its parsers")


def _nested_flags() -> Iterator[str]:
    """Of keys that are a name or a config: the parser knows of the options of either only when it has seen which it
    is.
    """
    for key, path in CLASSES.items():
        module, _, name = path.rpartition(".")
        yield from (
            f"--{key}.{field.name}" for field in dataclasses.fields(getattr(importlib.import_module(module), name))
        )


def _flags_in_help(command: str) -> list[str]:
    """The flags of an own subcommand; its help is what it promises."""
    with contextlib.redirect_stdout(io.StringIO()) as help_, contextlib.suppress(SystemExit):
        importlib.import_module(f"stateset_lightning.{command}").main(["--help"])
    return sorted({"--help", *re.findall(r"(?<![\w-])--[a-z][\w-]*", help_.getvalue())})


def _accepted(action: Action) -> list[str]:
    """The values that an option takes, if they are few enough to name."""
    home = CLASS_HOMES.get(action.dest)
    if home is not None:
        module = importlib.import_module(home)
        names = getattr(module, "__all__", dir(module))
        return [f"{home}.{name}" for name in names if isinstance(getattr(module, name, None), type)]
    return (
        list(dict.fromkeys(_choices(action._typehint)))
        if hasattr(action, "_typehint")
        else [str(c) for c in action.choices or ()]
    )


def _choices(hint: Any) -> Iterator[str]:
    if hint is bool:
        yield from ("true", "false")
    elif get_origin(hint) is Literal:
        yield from (str(value) for value in get_args(hint))
    elif get_origin(hint) not in (list, dict, tuple):
        for part in get_args(hint):
            yield from _choices(part)


def _cases(variable: str, words: Mapping[str, Sequence[str]]) -> str:
    """The arms of a `case`, one for all keys that have the same words."""
    keys: dict[str, list[str]] = {}
    for key, given in words.items():
        keys.setdefault(shlex.quote(" ".join(given)), []).append(key)
    return "\n".join(f"    {'|'.join(names)}) {variable}={text} ;;" for text, names in keys.items())
