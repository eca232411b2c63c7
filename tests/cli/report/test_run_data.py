"""Files of a run -> the data of its page: what is kept, how much at most, and what is said about what is missing or
damaged.
"""

import json

import pytest
from report_runs import completion, evaluated, write_samples

from stateset_lightning.cli.report import run_data, write_report
from stateset_lightning.cli.report.run_data import read_run
from stateset_lightning.errors import ConfigError


def test_what_the_files_hold(run):
    data = read_run(run)
    assert data["run"] == "task/version_0"
    assert data["metrics"]["train/reward"] == [[1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5]]
    assert data["metrics"]["val/reward"] == [[0, 5], [0.25, 0.75]]
    assert [(group["step"], group["prompt"], len(group["completions"])) for group in data["train"]] == [
        (1, "What is 1 + 1?", 4),
        (5, "What is 1 + 1?", 2),
    ]
    first = data["train"][0]["completions"][0]
    assert (first["text"], first["reward"], first["logprobs_after"]) == ("2", 1.0, [-0.25, -1.5])
    assert "reward" not in data["train"][0]["completions"][3]  # it failed
    assert [(group["id"], [one["reward"] for one in group["completions"]]) for group in data["evaluations"]] == [
        ("v1", [0.0, 1.0]),
        ("v2", [1.0, 1.0]),
    ]
    assert data["facts"] == {"model": "tiny", "algorithm": "GRPO", "reward": "Right"}
    assert data["environment"]["python"] == "3.12.1"
    assert data["missing"] == []


def test_a_value_logged_twice_counts_once_and_nan_not_at_all(run):
    (run / "metrics.csv").write_text("a,step\n1,1\nnan,2\n,3\n2,1\ninf,4\ntext,5\n")
    assert read_run(run)["metrics"] == {"a": [[1], [2.0]]}


def test_long_curves_are_averaged_over_neighbours(run, monkeypatch):
    monkeypatch.setattr(run_data, "MAX_POINTS", 2)
    (run / "metrics.csv").write_text("a,step\n" + "".join(f"{k},{k}\n" for k in range(1, 6)))
    assert read_run(run)["metrics"]["a"] == [[3, 5], [2.0, 4.5]]


def test_many_episodes_prompts_and_evaluations_are_spread_over_the_run(run, monkeypatch):
    monkeypatch.setattr(run_data, "MOST", {"episodes": 3, "prompts": 2, "evaluations": 2})
    write_samples(
        run,
        [completion("x", 1.0, k) for k in range(1, 10)]
        + [evaluated(k, 0.0, f"v{i}") for k in range(5) for i in range(4)],
    )
    data = read_run(run)
    assert [group["step"] for group in data["train"]] == [1, 5, 9]
    assert [group["id"] for group in data["evaluations"]] == ["v0", "v3"]
    assert [one["step"] for one in data["evaluations"][0]["completions"]] == [0, 4]
    assert data["shown"] == {"episodes": [3, 9], "prompts": [2, 4], "evaluations": [2, 5]}


def test_the_page_is_bounded_whatever_the_completions(run, monkeypatch):
    write_samples(run, [completion("x" * 9000, 1.0, k) for k in range(1, 30)])
    monkeypatch.setattr(run_data, "MAX_SAMPLE_BYTES", 100_000)
    data = read_run(run)
    assert len(json.dumps(data["train"])) < 100_000
    assert [data["train"][0]["step"], data["train"][-1]["step"]] == [1, 29]
    assert data["train"][0]["completions"][0]["text"].endswith("… (3000 more characters in samples.jsonl)")
    assert data["shown"]["episodes"] == [len(data["train"]), 29]


def test_a_line_that_is_being_written_is_left_out(run):
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"split": "tr')
    assert len(read_run(run)["train"]) == 2


@pytest.mark.parametrize("gone", ["metrics.csv", "samples.jsonl", "config.yaml", "environment.json"])
def test_a_missing_file_is_named_and_the_rest_is_shown(run, gone):
    (run / gone).unlink()
    assert read_run(run)["missing"] == [gone]


def test_a_folder_without_a_run_is_refused_and_its_newest_run_named(run, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"holds no run: there is neither metrics.csv nor samples.jsonl in it; did you mean .*version_0\?",
    ):
        read_run(run.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="fit writes them with a CSVLogger and the samples callback"):
        read_run(tmp_path / "empty")
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("config.yaml", "a: [", "cannot be read as YAML"), ("environment.json", "{", "cannot be read as JSON")],
)
def test_a_damaged_file_is_named(run, name, content, said):
    (run / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name}.*{said}"):
        read_run(run)


@pytest.mark.parametrize(
    ("name", "line", "damage"),
    [
        ("metrics.csv", 3, b"1,0.1,0.1"),  # a cell for each column, or none
        ("metrics.csv", 3, b'1,"0.1,0.1,0.5,0.4,,,'),  # a quote that nothing ends
        ("metrics.csv", 3, b"x,0.1,0.1,0.5,0.4,,,"),
        ("metrics.csv", 3, b"inf,0.1,0.1,0.5,0.4,,,"),
        ("metrics.csv", 3, b"1,\xff,0.1,0.5,0.4,,,"),
        ("samples.jsonl", 3, b'{"split": "train"}'),
        ("samples.jsonl", 3, b"[]"),
        ("samples.jsonl", 3, b'{"split": "train", "step": 1, "id": "a", "completion": null, "episode": 0}'),
        ("samples.jsonl", 3, b'{"split": "dev", "step": 1, "id": "a", "completion": "x"}'),
        ("samples.jsonl", 3, b"{" + b"\0" * 99),
        ("samples.jsonl", 3, b"[" * 99_999),
        ("samples.jsonl", 3, b"9" * 5000),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_damaged_line_costs_that_line_and_is_told_once(run, caplog, name, line, damage):
    before = read_run(run)
    lines = (run / name).read_bytes().split(b"\n")
    lines[line - 1] = damage
    (run / name).write_bytes(b"\n".join(lines))
    data = read_run(run)
    if name == "metrics.csv":
        assert data["metrics"]["train/reward"] == [[2, 3, 4, 5], [0.2, 0.3, 0.4, 0.5]]
        assert data["train"] == before["train"]
    else:
        assert [len(group["completions"]) for group in data["train"]] == [3, 2]
        assert data["metrics"] == before["metrics"]
    assert caplog.messages == [f"{run / name}, line {line}: damaged, left out (1 in all)"]


def test_other_line_separators_of_unicode_end_no_line(run, caplog):
    text = "one\u2028two\x85three\x0bfour"
    rows = json.dumps(completion(text, 1.0), ensure_ascii=False) + "\n"
    (run / "samples.jsonl").write_text(rows, encoding="utf-8", newline="")
    assert read_run(run)["train"][0]["completions"][0]["text"] == text
    assert not caplog.messages


NEW = {"config.yaml": "model: {}\n", "environment.json": "{}"}
BEGINNINGS = {
    "an empty folder": {},
    "a config": {"config.yaml": NEW["config.yaml"]},
    "no row yet": NEW,
    "empty files": {**NEW, "metrics.csv": "", "samples.jsonl": ""},
    "half a header": {**NEW, "metrics.csv": "step,train/re"},
    "a header": {**NEW, "metrics.csv": "step,train/reward\n"},
    "half a row": {**NEW, "metrics.csv": "step,train/reward\n1,0.", "samples.jsonl": '{"split": "tr'},
    "a broken header": {**NEW, "metrics.csv": "\0\0\0\0\n1,0.5\n"},
}


@pytest.mark.parametrize("files", BEGINNINGS.values(), ids=BEGINNINGS.keys())
def test_a_run_that_has_just_begun_has_a_page(tmp_path, files):
    folder = tmp_path / "version_0"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    data = read_run(folder)
    assert data["metrics"] == {}
    assert data["train"] == data["evaluations"] == []
    assert set(data["missing"]) == {"metrics.csv", "samples.jsonl", "config.yaml", "environment.json"} - set(files)
    assert write_report(folder).read_text().endswith("</html>\n")
