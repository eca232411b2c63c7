"""Files of a run -> the data of its page: what is kept, how much at most, and what is said about what is missing or
damaged.
"""

import json

import pytest
from report_runs import completion, evaluated, write_samples

from stateset_lightning.cli.report import run_data
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
    for name, limit in (("MAX_EPISODES", 3), ("MAX_PROMPTS", 2), ("MAX_EVALUATIONS", 2)):
        monkeypatch.setattr(run_data, name, limit)
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
    [
        ("metrics.csv", "a,b\n1,2\n", "no column `step`"),
        ("metrics.csv", "a,step\n1,x\n", r"line 2: the step is 'x', which is no number"),
        ("samples.jsonl", '{"split": "train"}\n', "line 1 is no sample of a run"),
        ("samples.jsonl", "[]\n", "line 1 is no sample of a run"),
        ("config.yaml", "a: [", "cannot be read as YAML"),
        ("environment.json", "{", "cannot be read as JSON"),
    ],
)
def test_a_damaged_file_is_named(run, name, content, said):
    (run / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name}.*{said}"):
        read_run(run)
