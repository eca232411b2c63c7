"""Which tools a completion calls, in the forms that chat templates have. Reading them executes nothing.

- Between tags, `<tool_call>...</tool_call>` and its kin: JSON (Hermes, Qwen), calls as Python writes them (Llama 4,
  LFM), or a name whose arguments have tags of their own (Qwen 3.5, GLM).
- After `[TOOL_CALLS]`: a list of JSON objects, or `name[ARGS]{...}` (Mistral).
- As the whole text: JSON (Llama 3), or `[name(argument=value)]` (Llama 3.2).
- What the tokenizer's own `response_template` says, where it has one: then this alone is read, if it can be.

Never read: arguments without their names, several forms in one text, and what stands in a model's thoughts.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stateset_lightning.errors import one_line


@dataclass(frozen=True, slots=True)
class Call:
    """A tool that the model calls. Whether there is such a tool, and whether it takes the arguments, is not said."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Malformed:
    """What is meant as a call, but is none.

    Args:
        text: What the model wrote.
        reason: What is wrong with it, in a line.
    """

    text: str
    reason: str


Schemas = Sequence[Mapping[str, Any]]
_OPEN = r"<tool_call>|<\|tool_call_start\|>|<\|tool_call\|>|<\|python_start\|>|<\|python_tag\|>|\[TOOL_CALLS\]"
_CLOSE = r"</tool_call>|<\|tool_call_end\|>|<\|/tool_call\|>|<\|python_end\|>"
# The last one need not be closed: a stop string cuts itself off.
_REGION = re.compile(rf"(?:{_OPEN})(.*?)(?={_OPEN}|{_CLOSE}|\Z)", re.DOTALL)

# A whole text that is meant as calls; JSON of another kind is an answer.
_TYPE = r'(?:"type"\s*:\s*"function"\s*,\s*)?'
_BARE_JSON = re.compile(rf'\[?\s*\{{\s*{_TYPE}"name"\s*:\s*"[^"]*"\s*,\s*"(?:parameters|arguments)"\s*:')
_BARE_PYTHON = re.compile(r"\[\s*[A-Za-z_][\w.]*\((?:.*\)\s*\]\Z|\s*[A-Za-z_]\w*\s*=)", re.DOTALL)

_FUNCTION = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>)?", re.DOTALL)
_NAME = re.compile(r"([\w.-]+)\s*((?=<arg_key>).*|)", re.DOTALL)
_VALUE = r"\r?\n?((?:(?!<parameter=|<arg_key>).)*?)\r?\n?"  # an end that is missing does not make one of two values
_ARGUMENT = re.compile(rf"\s*<(?:parameter=([^<>]+)>|arg_key>([^<>]+)</arg_key>\s*<arg_value>){_VALUE}", re.DOTALL)
_WORDS = {"True": True, "False": False, "None": None}  # as templates write what Python prints
_JSON = json.JSONDecoder(strict=False)  # models write line breaks into texts
_BETWEEN_JSON = re.compile(r"[\s;,]*")
_NAMED_JSON = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\][\w-]*\s*)?(?:\[ARGS\]\s*)?(?=\{)")


def find_calls(text: str, tokenizer: Any = None, schemas: Schemas = ()) -> list[Call | Malformed]:
    """The tool calls of a completion, in their order; a completion without any is an answer.

    Args:
        text: The completion, with its special tokens, without the one that ends it.
        tokenizer: Whose `response_template` is used, if it has one.
        schemas: JSON schemas of the tools, which tell "7" from 7 where texts have no quotes.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0]
    failure: list[Call | Malformed] = []
    if getattr(tokenizer, "response_template", None) is not None:
        # Some templates wait for the token that ends a turn, which the text does not have; others choke on it.
        for ending in ("", tokenizer.eos_token or ""):
            try:
                message = tokenizer.parse_response(text + ending, prefix="", tools=list(schemas))
            except Exception as error:  # whatever a template's parsers make of a model's text
                failure = [Malformed(text, one_line(error))]  # the forms below may say more of each call
            else:
                return [_as_call(call) for call in message.get("tool_calls") or ()]
    bare = text.strip()
    regions = _REGION.findall(text) or ([bare] if _BARE_JSON.match(bare) or _BARE_PYTHON.match(bare) else [])
    return [call for region in regions for call in _read(region.strip(), schemas)] or failure


def _read(text: str, schemas: Schemas) -> list[Call | Malformed]:
    """The calls between two tags."""
    try:
        if tagged := _FUNCTION.fullmatch(text) or _NAME.fullmatch(text):
            properties = {tool["name"]: tool["parameters"]["properties"] for tool in (s["function"] for s in schemas)}
            if tagged[2] or tagged[1] in properties or text.startswith("<"):
                return [_of_tags(tagged[1], tagged[2], properties.get(tagged[1], {}))]
        if re.match(r"\{|\[\s*[{\]]", text):
            return [_as_call(item) for item in _json_items(text)]
        if named := _NAMED_JSON.match(text):
            return [_as_call({"name": named[1], "arguments": _json_items(text[named.end() :])[0]})]
        body = ast.parse(text, mode="eval").body
        return [_of_python(node) for node in (body.elts if isinstance(body, ast.List) else [body])]
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return [Malformed(text, one_line(error))]


def _json_items(text: str) -> list[Any]:
    """Values of JSON that follow each other; the items of those that are lists.

    Raises:
        ValueError: If there is anything else between or behind them.
    """
    items: list[Any] = []
    end = 0
    while end < len(text):
        value, end = _JSON.raw_decode(text, end)
        items += value if isinstance(value, list) else [value]
        end = _BETWEEN_JSON.match(text, end).end()  # type: ignore[union-attr]  # it may be empty
    return items


def _as_call(value: Any) -> Call | Malformed:
    call = value.get("function", value) if isinstance(value, dict) else value
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, dict):
            return Call(call["name"], arguments)
    return Malformed(json.dumps(value), 'a call is an object {"name": text, "arguments": object}')


def _of_tags(name: str, text: str, properties: Mapping[str, Any]) -> Call | Malformed:
    """A call of which each argument has tags; `properties` are the schemas of the tool's parameters."""
    arguments = {}
    *written, rest = re.split("</parameter>|</arg_value>", text)
    for argument in written:
        if (found := _ARGUMENT.fullmatch(argument)) is None:
            return Malformed(argument, "an argument is its name and its value, between tags")
        key = (found[1] or found[2]).strip()
        arguments[key] = _typed(found[3], properties.get(key, {}))
    return Malformed(rest, "no argument, or the end of one is missing") if rest.strip() else Call(name, arguments)


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """A value without quotes: what its schema says is text, else as JSON or Python write it."""
    if schema.get("type") == "string":
        return None if schema.get("nullable") and text in ("null", "None") else text
    with suppress(ValueError, RecursionError):
        return _WORDS[text] if text in _WORDS else json.loads(text)
    return text


def _of_python(node: ast.expr) -> Call | Malformed:
    if isinstance(node, ast.Call) and not node.args:
        with suppress(ValueError, TypeError):
            arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
            return Call(ast.unparse(node.func), arguments)
    return Malformed(ast.unparse(node), "calls are written [name(argument=value)], with plain values")
