"""Which tools a completion calls, in each form, and what is malformed in those that cannot be read."""

import copy
from pathlib import Path

import pytest
from environments.plain_functions import add

from stateset_lightning.environments.tool_calls import Call, Malformed, find_calls
from stateset_lightning.environments.tools import schema_of

ADD = Call("add", {"a": 1, "b": 2})
NOW = Call("now", {})
HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
TAGGED = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>2</parameter>\n</function></tool_call>"
)
GEMMA = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|turn>model\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
            "close": "<tool_call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"string_delims": [['<|"|>', '<|"|>']], "unquoted_keys": True},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
TYPED = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content": "text"},
    },
}
# As Llama's: the end of a turn closes a call.
WAITING = copy.deepcopy(TYPED)
WAITING["fields"]["tool_calls"] |= {
    "open_pattern": r'\{"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*',
    "close": "}<|end|>",
    "content": "json",
    "content_args": {},
}


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (HERMES, [ADD]),
        (f"Let me see.\n{HERMES}\n{HERMES}", [ADD, ADD]),
        (HERMES.removesuffix("</tool_call>"), [ADD]),
        ('<tool_call>[{"name": "now"}, {"name": "add", "arguments": {"a": 1, "b": 2}}]</tool_call>', [NOW, ADD]),
        ('<tool_call>{"name": "now", "arguments": null}; {"name": "now", "arguments": {}}</tool_call>', [NOW, NOW]),
        ('<tool_call>{"name": "say", "arguments": {"a": "2\nlines"}}</tool_call>', [Call("say", {"a": "2\nlines"})]),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "now", "arguments": {}}]', [ADD, NOW]),
        ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]now[CALL_ID]x1[ARGS]{}', [ADD, NOW]),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('{"type": "function", "name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', [NOW, NOW]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ("<|python_tag|>search.call(query='it')", [Call("search.call", {"query": "it"})]),
        ("[add(a=1, b=2)]", [ADD]),
        ('[add(a=1, b=2), say(text="[f(x=1)]", to=["a", {"b": None}], loud=True, times=-2)]',
         [ADD, Call("say", {"text": "[f(x=1)]", "to": ["a", {"b": None}], "loud": True, "times": -2})]),
        ("<|python_start|>[add(a=1, b=2), now()]<|python_end|>", [ADD, NOW]),
        ("<|tool_call_start|>[add(a=1, b=2)]<|tool_call_end|>I add.", [ADD]),
        (f"<think>Perhaps {HERMES}</think>{HERMES}", [ADD]),
        (TAGGED, [ADD]),
        (f"{TAGGED}\n{TAGGED.removesuffix('</function></tool_call>')}", [ADD, ADD]),
        ("<tool_call>\n<function=now>\n</function>\n</tool_call>", [NOW]),
        ("<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value><arg_key>b</arg_key><arg_value>2</arg_value>",
         [ADD]),
        ("<tool_call><function=say><parameter=text>\n 1\n\n<b>2</b>\n</parameter>"
         '<parameter=to>\n["a", {"b": null}]\n</parameter><parameter=loud>True</parameter></function></tool_call>',
         [Call("say", {"text": " 1\n\n<b>2</b>", "to": ["a", {"b": None}], "loud": True})]),
    ],
)  # fmt: skip
def test_every_form_is_read(text, calls):
    assert find_calls(text) == calls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The sum is 3.",
        '{"name": "Ada", "age": 36}',
        "[1, 2]",
        "[see here](https://example.org)",
        "add(a=1, b=2)",
        "Call [add(a=1, b=2)] and see.",
        f"<think>{HERMES}</think>3",
        f"Hm</think>3<think>{HERMES}",
    ],
)
def test_other_texts_are_answers(text):
    assert find_calls(text) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1}</tool_call>', "Expecting ',' delimiter"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}}</tool_call>', "Expecting value"),
        ('<tool_call>{"arguments": {"a": 1}}</tool_call>', '"name"'),
        ('<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', '"arguments"'),
        ("<tool_call></tool_call>", "invalid syntax"),
        ("<tool_call>12</tool_call>", "calls are written"),
        ('{"name": "add", "parameters": {"a": 1', "Expecting"),
        ("[add(1, 2)]", "[name(argument=value)]"),
        ("[add(a=1, b=2)", "was never closed"),
        ("[add(a=open('/etc/passwd').read())]", "plain values"),
        ("[add(**{'a': 1}, b=c)]", "plain values"),
        ("[add(a={[]: 1})]", "plain values"),
        ("<tool_call>" + '[{"a":' * 10_000, "recursion"),
        ("[add(a=" + "(" * 5_000 + ")" * 5_000 + ")]", "too many nested"),
        ("[add(a=1 +" + " \x00)]", "null bytes"),
        (TAGGED.replace("2</parameter>", "2"), "the end of one is missing"),
        (TAGGED.replace("<parameter=b>", "b = "), "between tags"),
        ("<tool_call>add\n<arg_key>a</arg_key></tool_call>", "the end of one is missing"),
        (TAGGED.replace("1\n</parameter>", "1\n"), "between tags"),
        ("<tool_call>True</tool_call>", "calls are written"),
    ],
    ids=range(20),
)  # fmt: skip
def test_malformed_calls_say_why(text, reason):
    (found,) = find_calls(text)
    assert isinstance(found, Malformed)
    assert reason in found.reason
    assert "\n" not in found.reason


def test_a_malformed_call_leaves_its_neighbours_as_they_are():
    found = find_calls(f"{HERMES}<tool_call>add 1</tool_call>{HERMES}")
    assert [type(call) for call in found] == [Call, Malformed, Call]
    found = find_calls('[TOOL_CALLS][{"name": 3}, {"name": "now", "arguments": {}}]')
    assert [type(call) for call in found] == [Malformed, Call]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (str, "7", "7"),
        (int, "7", 7),
        (float, "7.5", 7.5),
        (bool, "True", True),
        (list[int], "[1, 2]", [1, 2]),
        (str | None, "None", None),
        (str | None, "7", "7"),
        (str, "None", "None"),
        (str, "\r\n 7\r\n\r\n", " 7\r\n"),
        (int | str, "...", "..."),
        (int, "open('x')", "open('x')"),
        (int, "[" * 5_000, "[" * 5_000),
    ],
)
def test_the_schema_tells_texts_from_values_where_there_are_no_quotes(kind, value, expected):
    def take(value):
        """Takes it.

        Args:
            value: What is taken.
        """

    take.__annotations__["value"] = kind
    text = f"<tool_call><function=take><parameter= value >{value}</parameter></function></tool_call>"
    assert find_calls(text, schemas=[schema_of(take)]) == [Call("take", {"value": expected})]


def test_a_tool_may_be_called_by_its_name_alone():
    assert find_calls("<tool_call>add\n</tool_call>", schemas=[schema_of(add)]) == [Call("add", {})]


@pytest.mark.parametrize(
    "start",
    [
        "<tool_call>a<arg_key>",
        "<tool_call><function=a><parameter=b>",
        "[TOOL_CALLS]a",
        "<tool_call>[",
        '{"name": "',
        "[a(",
        "<think>",
        "{",
    ],
)
def test_long_texts_take_no_long_time(start):
    find_calls(start + " " * 50_000 + "x")
    find_calls(start * 3_000)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    """`tokenizer(template)` -> the bundled tokenizer with a response template."""

    def with_template(template):
        changed = copy.copy(tiny_tokenizer)
        changed.response_template = template
        return changed

    return with_template


def test_a_tokenizers_own_template_is_used(tokenizer):
    gemma = 'Now <|tool_call>call:say{text:<|"|>a {b}<|"|>,times:2}<tool_call|><|tool_call>call:now{}<tool_call|>'
    assert find_calls(gemma) == []
    assert find_calls(gemma, tokenizer(GEMMA)) == [Call("say", {"text": "a {b}", "times": 2}), NOW]
    assert find_calls("Now it is 3.", tokenizer(GEMMA)) == []


def test_a_template_gives_arguments_the_types_of_the_schema(tokenizer):
    arguments = "<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>"
    text = f"<tool_call>\n<function=add>\n{arguments}\n</function>\n</tool_call>"
    assert find_calls(text, tokenizer(TYPED), [schema_of(add)]) == [ADD]
    assert find_calls(text, tokenizer(TYPED)) == [Call("add", {"a": "1", "b": "2"})]


def test_a_template_that_waits_for_the_end_of_the_turn_gets_it(tokenizer):
    assert find_calls('{"name": "add", "parameters": {"a": 1, "b": 2}}', tokenizer(WAITING)) == [ADD]


def test_what_a_template_cannot_read_is_malformed(tokenizer):
    text = "<|tool_call>call:add{a:}<tool_call|>"
    (found,) = find_calls(text, tokenizer(GEMMA))
    assert isinstance(found, Malformed)
    assert found.text == text
    assert "JSON" in found.reason or "json" in found.reason


def test_what_transformers_make_of_chat_templates_is_read(tiny_tokenizer):
    """Calls as the templates of several models write them, which TRL brings along."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    both = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in (ADD, ADD)]
    for name, number in [
        ("qwen2_5", 2),
        ("qwen3", 2),
        ("qwen3_vl", 2),
        ("llama3_1", 1),
        ("llama3_2", 1),
        ("lfm2_2_5", 2),
        ("qwen3_6", 2),
        ("nemotron_3_nano", 2),
        ("glm4moe", 2),
    ]:
        template = (folder / f"{name}.jinja").read_text()
        options = {"chat_template": template, "tools": [schema_of(add)], "tokenize": False}
        asked = [{"role": "user", "content": "1 + 2?"}]
        prompt = tiny_tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
        called = [*asked, {"role": "assistant", "content": "", "tool_calls": both[:number]}]
        text = tiny_tokenizer.apply_chat_template(called, **options)
        begun = prompt.removesuffix("<think>\n")
        assert text.startswith(begun)
        answer = text.removeprefix(begun).rstrip().removesuffix("<|im_end|>").removesuffix("<|eot_id|>")
        assert find_calls(answer, schemas=[schema_of(add)]) == [ADD] * number, name
