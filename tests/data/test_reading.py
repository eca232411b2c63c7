"""Files -> raw rows: real line numbers, all bad rows, and a reason for whatever cannot be read."""

import os
import socket
import time
from pathlib import Path

import pytest

from stateset_lightning.cli.overlays import read_yaml
from stateset_lightning.data.reading import read_file
from stateset_lightning.data.rows import Problem, RawRow, raise_problems
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import DataError


def separate(readings):
    readings = list(readings)
    return [r for r in readings if isinstance(r, RawRow)], [r for r in readings if isinstance(r, Problem)]


def columns(path):
    rows, problems = separate(read_file(path))
    assert problems == []
    return [row.columns for row in rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "é"}\n{"prompt": "b"}\n'),
        ("a.json", '[{"prompt": "é"}, {"prompt": "b"}]'),
        ("a.csv", "prompt\né\nb\n"),
        ("a.yaml", "- prompt: é\n- prompt: b\n"),
        ("a.yml", "[{prompt: é}, {prompt: b}]"),
        ("a.JSONL", '\ufeff{"prompt": "é"}\r\n\r\n{"prompt": "b"}'),
        ("bom.csv", "\ufeffprompt\r\né\r\nb\r\n"),
    ],
)
def test_every_kind_gives_the_same_rows(write, name, content):
    assert columns(write(name, content)) == [{"prompt": "é"}, {"prompt": "b"}]


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(write):
    assert columns(write("a.jsonl", '{"prompt": "one\u2028two"}\n')) == [{"prompt": "one\u2028two"}]


def test_jsonl_reports_every_bad_line_with_its_number_and_column(write):
    path = write("a.jsonl", '{"prompt": "a"}\n\n{"prompt": }\n[1]\n{"prompt": "b"}\n')
    rows, problems = separate(read_file(path))
    assert [(row.number, row.place) for row in rows] == [(1, f"{path}:1"), (4, f"{path}:5")]
    assert problems == [
        Problem(f"{path}:3", "malformed JSON at column 12: Expecting value"),
        Problem(f"{path}:4", "a row must be a JSON object, not a list"),
    ]


def test_csv_rows_have_the_line_they_start_on_also_behind_a_cell_of_several_lines(write):
    path = write("a.csv", 'prompt,target\n"one\ntwo\nthree",1\nfour,2\nfive\nsix,6,6\n')
    rows, problems = separate(read_file(path))
    assert [(row.place, row.columns["target"]) for row in rows] == [(f"{path}:2", "1"), (f"{path}:5", "2")]
    assert [problem.place for problem in problems] == [f"{path}:6", f"{path}:7"]
    assert problems[0].reason == "1 cells, but the header has 2 (prompt, target)"
    assert "3 cells, but the header has 2" in problems[1].reason
    assert "quotes" in problems[1].reason


def test_an_unclosed_quote_is_reported_where_it_starts(write):
    path = write("a.csv", 'prompt\nfine\n"open\nmore\n')
    with pytest.raises(DataError, match=f"{path}:3: malformed CSV: unexpected end of data"):
        read_file(path)


def test_a_csv_cell_may_be_longer_than_the_default_limit_of_python(write):
    import csv

    before = csv.field_size_limit()
    assert columns(write("a.csv", "prompt\n" + "x" * 200_000 + "\n")) == [{"prompt": "x" * 200_000}]
    assert csv.field_size_limit() == before


def test_items_of_json_and_yaml_are_counted(write):
    path = write("a.yaml", "- prompt: a\n- just text\n- 1: b\n")
    rows, problems = separate(read_file(path))
    assert rows[0].place == f"{path} item 1"
    assert problems == [
        Problem(f"{path} item 2", "a row must be a mapping of columns, not text"),
        Problem(f"{path} item 3", "column names must be strings, not 1; put it in quotes"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.csv", "  \n", "the file is empty"),
        ("a.csv", "prompt\n", "a.csv has no rows"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.csv", "prompt,a,a\n1,2,3\n", "the header names the column 'a' twice"),
        ("a.json", '{"scenarios": []}', "must hold a list of rows, not a mapping with the keys scenarios"),
        (
            "a.json",
            '{"a": 1}\n{"a": 2}\n',
            "a.json:2: malformed JSON at column 1: Extra data; for one JSON object per line, name the file .jsonl",
        ),
        ("a.yaml", "- ok: 1\n- a: b: c\n", "a.yaml:2: malformed YAML"),
        ("a.yaml", "- prompt: !!timestamp '2024-13-40'\n", "a.yaml: malformed YAML: month must be in 1..12"),
        ("a.json", "[" * 100_000, "a.json: malformed JSON: "),
        ("a.yaml", "- !!python/object/apply:os.system ['true']\n", "malformed YAML: could not determine a constructor"),
        (
            "a.txt",
            "prompt",
            "unknown suffix '.txt'; known: .jsonl, .ndjson, .json, .csv, .tsv, .yaml, .yml, .parquet",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a"}\n{"prompt": "\xff"}\n',
            "a.jsonl:2: not valid UTF-8 (byte 0xff); save the file as UTF-8",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why(write, name, content, message):
    with pytest.raises(DataError) as error:
        read_split(write(name, content), "train")
    assert message in str(error.value)


def test_a_directory_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"is a directory; give a file, or a glob such as"):
        read_file(tmp_path)
    with pytest.raises(DataError, match="cannot be read \\(No such file or directory\\)"):
        read_file(tmp_path / "a.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_says_so(write):
    path = write("a.jsonl", "{}")
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        read_file(path)


def test_deep_nesting_and_long_numbers_are_problems_not_crashes(write):
    path = write("a.jsonl", '{"a": ' + "[" * 100_000 + "\n" + '{"a": ' + "1" * 5000 + "}\n")
    _, problems = separate(read_file(path))
    assert [problem.reason.startswith("malformed JSON: ") for problem in problems] == [True, True]


def test_twenty_problems_are_shown_and_the_rest_counted():
    with pytest.raises(DataError) as error:
        raise_problems("data.train", [Problem(f"f:{i}", "bad") for i in range(1, 24)])
    lines = str(error.value).splitlines()
    assert lines[0] == "data.train: 23 rows cannot be used; correct or remove:"
    assert lines[1] == "  f:1: bad"
    assert lines[-2:] == ["  f:20: bad", "  ... and 3 more"]
    raise_problems("data.train", [])


BOMB = "- &a0 {x: 1, prompt: a}\n" + "".join(
    f"- &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
)
TOO_MUCH = {
    "lists in YAML": ("a.yaml", "- prompt: a\n- x: " + "[" * 1_000_000, r"a.yaml:2: .*nested more than 100 deep"),
    "mappings in YAML": ("a.yaml", "- " + "{a: " * 40_000, r"a.yaml:1: .*nested more than 100 deep"),
    "blocks in YAML": ("a.yaml", "- " * 40_000, r"a.yaml:1: .*nested more than 100 deep"),
    "merged aliases": ("a.yaml", BOMB, r"a.yaml:1: more than \d+ values"),
    "an alias of itself": ("a.yaml", "- prompt: a\n  x: &x [*x]", "the x holds .* nested more than 100 deep"),
    "a key twice": ("a.yaml", "- prompt: a\n  x: 1\n  prompt: b", "a.yaml:3: the key prompt stands in line 1 already"),
    "a date that is none": (
        "a.yaml",
        "- {prompt: a, x: !!timestamp '2024-13-40'}",
        "malformed YAML: month must be in 1..12",
    ),
    "digits in YAML": (
        "a.yaml",
        f"- prompt: a\n  x: {'1' * 1_000_000}",
        "a.yaml:2: an integer of 1,000,000 characters",
    ),
    "hexadecimal digits": ("a.yaml", f"- prompt: a\n  x: 0x{'f' * 9000}", "a.yaml:2: an integer of 9,002 characters"),
    "base 60": ("a.yaml", f"- prompt: a\n  x: 1{':59' * 200_000}", "a.yaml:2: an integer of 600,001 characters"),
    "digits in JSON lines": ("a.jsonl", '{"prompt": "a"}\n{"x": ' + "1" * 1_000_000 + "}", "a.jsonl:2: malformed JSON"),
    "digits that just pass": (
        "a.jsonl",
        '{"prompt": "a", "x": [' + "1" * 4200 + "]}",
        "a.jsonl:1: the x holds an integer",
    ),
    "lists in JSON lines": (
        "a.jsonl",
        '{"prompt": "a", "x": ' + "[" * 500 + "]" * 500 + "}",
        "a.jsonl:1: the x .* deep",
    ),
    "lists in JSON": ("a.json", '[{"x": ' + "[" * 1_000_000, "a.json: malformed JSON: maximum recursion"),
    "half of a character": (
        "a.jsonl",
        '{"prompt": "a", "x": [{"y": "\\udc00"}]}',
        r"a.jsonl:1: the x holds \\udc00, half",
    ),
    "half of a character as name": (
        "a.jsonl",
        '{"prompt": "a", "\\ud800": 1}',
        r"a.jsonl:1: the \\ud800 holds \\ud800",
    ),
    "half of a character as key": (
        "a.jsonl",
        '{"prompt": "a", "x": {"\\ud800": 1}}',
        r"a.jsonl:1: the x holds \\ud800",
    ),
    "columns": (
        "a.csv",
        ",".join(map(str, range(30_000))) + "\n" + "1," * 29_999 + "1",
        r"it has: 0, 1, [\d, ]*, \.\.\.",
    ),
    "a quote that stays open": (
        "a.csv",
        'prompt\n"' + "a\n" * 100_000,
        "a.csv:2: malformed CSV: unexpected end of data",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_what_is_too_much_or_cannot_be_written_is_refused_in_time_with_its_place(write, name, content, said):
    path, begin = write(name, content), time.perf_counter()
    with pytest.raises(DataError, match=said) as error:
        read_split(str(path), "train")
    assert time.perf_counter() - begin < 5
    assert len(str(error.value)) < 1000


NO_FILES = {
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "standard input": lambda path: path.symlink_to("/dev/stdin"),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(path.name),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "yaml", "parquet"])
@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES.keys())
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, make, suffix):
    monkeypatch.chdir(tmp_path)
    make(Path(f"rows.{suffix}"))
    for spec in (f"rows.{suffix}", [{"path": f"rows.{suffix}"}]):
        with pytest.raises(DataError, match=rf"rows\.{suffix} is a (directory|device, a pipe or a socket)"):
            read_split(spec, "train")


WORDS = [
    "yes",
    "NO",
    "on",
    "Off",
    "1:30",
    "1:30.5",
    "0123",
    "-0123",
    "0x1F",
    "0b11",
    "1_000",
    "2024-01-02",
    ".inf",
    ".NaN",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_yaml_1_1_alone_takes_for_something_else_is_text(write, word):
    """Also deep inside a row, as a key, merged, and in rows that stand in a config or in the guide's YAML."""
    row = f"{{prompt: a, target: {word}, {word}: {{deep: [{word}]}}}}"
    wanted = {"prompt": "a", "target": word, word: {"deep": [word]}}
    assert columns(write("a.yaml", f"- &row {row}\n- <<: *row\n  x: 1\n")) == [wanted, {**wanted, "x": 1}]
    for keys in ("data: {train", "data: {predict", "environment: {scenarios"):
        section, name = keys.split(": {")
        config = read_yaml(write("config.yaml", f"{keys}: [{row}], enough: yes}}\n"), "config", "keys")
        assert config[section] == {name: [wanted], "enough": True}  # an option is as YAML 1.1 and flags have it


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("False", False), ("null", None), ("~", None), ("5", 5), ("-0.5", -0.5), ("1.5e+3", 1500.0)],
)
def test_what_yaml_1_2_reads_as_no_text_is_none(write, word, value):
    rows = columns(write("a.yaml", f"- {{prompt: a, target: {word}}}\n- {{prompt: a, target: '{word}'}}\n"))
    assert [row["target"] for row in rows] == [value, word]


def test_a_quote_behind_a_space_is_one_also_where_the_header_has_none(write):
    path = write("a.csv", 'prompt,target\n"What, now?", "4"\nb, 5\n')
    assert [row.columns["target"] for row in read_file(path)] == ["4", "5"]
    path = write("b.csv", 'prompt,target\nThe capital is, Paris\n"He said, ""hi"" and", left\n')
    assert [row.columns["target"] for row in read_file(path)] == [" Paris", " left"]
