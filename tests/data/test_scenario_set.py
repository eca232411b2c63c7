"""Large splits: what is served is what a small split of the same rows serves; what cannot be told at the start."""

import json
import os
import tracemalloc
from itertools import islice
from unittest.mock import patch

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pyarrow import feather, parquet

from stateset_lightning import ScenarioDataModule
from stateset_lightning.data import content
from stateset_lightning.data.order import Curriculum
from stateset_lightning.data.reading import read_file
from stateset_lightning.data.sources import read_split
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.ranks import Ranks
from stateset_lightning.redaction import HIDDEN, redacted

ROWS = [
    {"prompt": f"What is {i}?\nSay é." if i % 3 else f"{i}", "target": str(i), "topic": "a" if i % 2 else None}
    for i in range(23)
]
for row in ROWS[::5]:
    row["context"] = "In words."
CELLS = {name: [row.get(name) for row in ROWS] for name in ("prompt", "target", "topic", "context")}


@pytest.fixture
def large(monkeypatch):
    """All splits of more than ten rows, and files of more than ten bytes, are large."""

    def make(bytes_too=True):
        monkeypatch.setattr(content, "LARGE_ROWS", 10)
        monkeypatch.setattr(content, "SAMPLE", 4)
        if bytes_too:
            monkeypatch.setattr(content, "LARGE_BYTES", 10)
            monkeypatch.setattr(content, "BLOCK", 17)

    return make


def write_rows(folder):
    table = pyarrow.table(CELLS)
    quoted = ["" if cell is None else '"' + cell + '"' for row in ROWS for cell in map(row.get, CELLS)]
    cells = [";".join(quoted[i : i + 4]) for i in range(0, len(quoted), 4)]
    (folder / "a.jsonl").write_text("\ufeff\n" + "\n \n".join(json.dumps(row) for row in ROWS))
    (folder / "b.jsonl").write_text(json.dumps(ROWS[3]))
    (folder / "a.csv").write_text("\r\n".join(["sep=;", "prompt;target;topic;context", *cells]))
    (folder / "a.json").write_text(json.dumps(ROWS))
    parquet.write_table(table, folder / "a.parquet", row_group_size=5)
    feather.write_feather(table, str(folder / "a.feather"), chunksize=4, compression="uncompressed")
    with pyarrow.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=6)


SPLITS = {
    **{suffix: f"a.{suffix}" for suffix in ("jsonl", "csv", "json", "parquet", "feather", "arrow")},
    "a list": ROWS,
    "a table": pyarrow.table(CELLS),
    "several files": ["a.csv", "b.jsonl"],
    "weighted sources": [
        {"path": "a.jsonl", "weight": 2, "name": "one"},
        {"path": "a.csv", "weight": 1, "rewards": ["x"], "name": "two"},
    ],
}


def batches(tokenizer, spec, ranks=1, start=None, count=13, **options):
    """What all ranks are served, and the state behind the last batch."""
    shown, states = [], []
    for rank in range(ranks):
        data = ScenarioDataModule(spec, batch_size=2, tokenizer=tokenizer, seed=3, **options)
        data._ranks = lambda rank=rank: Ranks(rank, ranks)
        data.setup("fit")
        loader = data.train_dataloader()
        if start is not None:
            loader.load_state_dict(start)
        served = iter(loader)
        for _ in range(count):
            batch = next(served, None) or next(served := iter(loader))
            shown.append([getattr(batch, name) for name in ("prompt_tokens", "conversations", "scenarios", "rows")])
            shown[-1] += [batch.positions, batch.episode_index, batch.micro_step]
        states.append({key: value for key, value in loader.state_dict().items() if key != "prompts"})
        if options.get("validation_fraction"):
            shown += [[b.prompt_tokens, b.scenarios] for b in data.val_dataloader()]
    return shown, states


CASES = {"shuffled": {}, "in order": {"shuffle": False}, "two ranks": {"ranks": 2}}
CASES |= {"held out": {"validation_fraction": 0.3}, "a curriculum": {"curriculum": Curriculum()}}
CASES |= {
    "two micro-steps": {"steps_per_episode": 2},
    "cut": {"max_prompt_tokens": 9, "overlong_prompts": "truncate_left"},
}


@pytest.mark.parametrize(
    ("spec", "options"),
    [*((spec, {}) for spec in SPLITS.values()), *((SPLITS["csv"], options) for options in CASES.values())],
    ids=[*SPLITS, *CASES],
)
def test_what_is_served_is_what_a_small_split_serves(tmp_path, monkeypatch, tokenizer, large, spec, options):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    small = batches(tokenizer, spec, **options)
    for bytes_too in (False, True):
        large(bytes_too)
        assert type(read_split(spec, "train").scenarios).__name__ == "ServedScenarios"
        assert batches(tokenizer, spec, **options) == small


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_large_split_resumes_exactly_and_refuses_other_rows(tmp_path, monkeypatch, tokenizer, large, ranks):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    large()
    whole, _ = batches(tokenizer, "a.jsonl", ranks, count=9)
    _, states = batches(tokenizer, "a.jsonl", ranks, count=4)
    rest, _ = batches(tokenizer, "a.jsonl", ranks, start=states[0], count=5)
    assert [rest[5 * rank : 5 * rank + 5] for rank in range(ranks)] == [
        whole[9 * rank + 4 : 9 * rank + 9] for rank in range(ranks)
    ]
    data = ScenarioDataModule("a.jsonl", batch_size=2, tokenizer=tokenizer, seed=3)
    data.setup("fit")
    state = data.train_dataloader().state_dict()
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace('"target": "22"', '"target": "21"'))
    changed = ScenarioDataModule("a.jsonl", batch_size=2, tokenizer=tokenizer, seed=3)
    changed.setup("fit")
    with pytest.raises(ConfigError, match="what the prompts of data"):
        changed.train_dataloader().load_state_dict(state)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.arrow"])
def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, tokenizer, large, name):
    write_rows(tmp_path)
    large()
    data = ScenarioDataModule(str(tmp_path / name), batch_size=2, tokenizer=tokenizer, seed=3)
    data.setup("fit")
    served = iter(data.train_dataloader())
    next(served)
    with (tmp_path / name).open("r+b") as file:
        file.write(b"\n")
    os.utime(tmp_path / name, (1, 1))
    with pytest.raises(DataError, match=rf"{name}: the file has changed since this run first read it"):
        next(served)


LATE = {
    "malformed": ('{"prompt": ', r"data.train: 1 row cannot be used; .*\n.*a.jsonl:22: malformed JSON at column 12"),
    "no text": ('{"prompt": 3}', r"a.jsonl:22: the prompt must be text, not a number"),
    "not UTF-8": (b'{"prompt": "\xff"}', r"a.jsonl:22: not valid UTF-8 \(byte 0xff\)"),
    "too long": (json.dumps({"prompt": "x" * 99}), r"1 of 1 prompts have more than data.max_prompt_tokens=80 tokens"),
    "several": (
        json.dumps({"context": "x", "user_responses": ["a", "b"]}),
        r"a.jsonl:\d+ makes 2 scenarios; give a row for each",
    ),
}


@pytest.mark.parametrize("is_large", [False, True])
def test_where_they_are_a_script_user_responses_are_one_scenario(tmp_path, large, is_large):
    rows = [{"context": "x", "user_responses": [f"a{i}", "b"][: 1 + i % 2]} for i in range(24)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if is_large:
        large()
    scenarios = read_split(str(tmp_path / "a.jsonl"), "train", are_scripts=True).scenarios
    assert len(scenarios) == 24
    for row, scenario in zip(rows, scenarios, strict=True):
        assert (scenario.prompt, scenario.columns()["user_responses"]) == (
            row["user_responses"][0],
            row["user_responses"],
        )
    assert (scenarios[23].id, scenarios[23].context) == ("a:24", "x")


@pytest.mark.parametrize(("late", "said"), LATE.values(), ids=LATE)
def test_what_cannot_be_used_is_an_error_when_it_is_served(tmp_path, tokenizer, large, late, said):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(row).encode() for row in ROWS]
    rows[21] = late if isinstance(late, bytes) else late.encode()
    if "user_responses" in str(late):
        rows[0] = rows[21]  # a column that none of the first rows has is no prompt
    path.write_bytes(b"\n".join(rows))
    large()
    data = ScenarioDataModule(str(path), batch_size=1, tokenizer=tokenizer, shuffle=False, max_prompt_tokens=80)

    def serve():
        data.setup("fit")
        return list(islice(data.train_dataloader(), 22))

    with pytest.raises(DataError, match=said):
        serve()


def test_what_is_told_at_the_start(tmp_path, tokenizer, large, caplog):
    write_rows(tmp_path)
    large()
    path = str(tmp_path / "a.jsonl")
    data = ScenarioDataModule(path, tokenizer=tokenizer, max_prompt_tokens=77)
    with caplog.at_level("INFO", "stateset_lightning"):
        data.setup("fit")
    assert "the first 4 rows of a file are checked now: bad rows" in caplog.text
    assert data.longest_prompt == 77
    assert data.num_scenarios == {"train": 23}
    with pytest.raises(ConfigError, match=r"overlong_prompts=drop needs all of .* at once; set it to truncate_left"):
        ScenarioDataModule(path, tokenizer=tokenizer, max_prompt_tokens=9, overlong_prompts="drop").setup("fit")
    (tmp_path / "open.csv").write_text("prompt\n" + "a\n" * 20 + '"open')
    with pytest.raises(DataError, match=r"open.csv:22: malformed CSV: .*no row after it was read"):
        read_split(str(tmp_path / "open.csv"), "train")
    (tmp_path / "bad.jsonl").write_text("{\n" * 20)
    with pytest.raises(DataError, match=r"bad.jsonl:4: malformed"):
        read_split(str(tmp_path / "bad.jsonl"), "train")


def test_what_late_rows_say_is_no_secret(tmp_path, tokenizer, large, monkeypatch):
    write_rows(tmp_path)
    large()
    monkeypatch.setenv("MY_API_KEY", "What is 22?")
    assert redacted({"text": "What is 22?"}) == {"text": HIDDEN}
    data = ScenarioDataModule(str(tmp_path / "a.jsonl"), batch_size=23, tokenizer=tokenizer)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    assert redacted({"text": "What is 22?"}) == {"text": "What is 22?"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_of_many_rows_little_is_kept(tmp_path, tokenizer, monkeypatch, name):
    monkeypatch.setattr(content, "LARGE_ROWS", 1000)
    with (tmp_path / name).open("w") as file:
        file.write("prompt,target\n" if name == "a.csv" else "")
        for i in range(100_000):
            row = {"prompt": f"What is {i}?", "target": str(i)}
            file.write(f"{row['prompt']},{i}\n" if name == "a.csv" else json.dumps(row) + "\n")
    size = (tmp_path / name).stat().st_size
    tracemalloc.start()
    data = ScenarioDataModule(str(tmp_path / name), batch_size=8, tokenizer=tokenizer, seed=1)
    data.setup("fit")
    next(iter(data.train_dataloader()))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < size + 64 * 100_000
    assert peak < 3 * size + 80 * 100_000


SOME_LINES = ['{"prompt": "a"}', '{"prompt": "é\u2028", "x": [1]}', "", " ", "\u00a0", "[1]", "{", '{"prompt": ""}']
LINES = st.lists(st.sampled_from(SOME_LINES) | st.text(max_size=5), max_size=9)
SOME_CELLS = ["prompt", "a", "é", '"', '"', ",", ";", "\n", "\r\n", "\r", "x y", " "]
CELLS_TEXT = st.lists(st.sampled_from(SOME_CELLS), max_size=30)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\n\n"])).map(lambda each: (".jsonl", each[1].join(each[0])))
    | CELLS_TEXT.map(lambda cells: (".csv", "prompt" + "".join(cells)))
    | CELLS_TEXT.map(lambda cells: (".csv", "prompt;x\n" + "".join(cells))),
    st.integers(1, 40),
)
def test_any_text_has_the_rows_of_a_large_file_that_it_has_as_a_small_one(tmp_path, text, block):
    path = tmp_path / f"a{text[0]}"
    path.write_bytes(text[1].encode(errors="surrogatepass"))
    read = []
    for size in (2**28, 0):
        with patch.multiple(content, LARGE_BYTES=size, BLOCK=block if not size else 2**24):
            try:
                read.append([*map(str, read_file(path))])
            except DataError as error:
                read.append(str(error))
    whole = read[0] if isinstance(read[0], str) else ""
    if any(told in whole for told in ("UTF-8", "one JSON value", "several lines", "empty")):
        return  # of a large file, its rows are problems
    assert read[0] == read[1]
