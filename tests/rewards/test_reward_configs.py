"""The rewards that are models or libraries, from the command line: their options, bounds and inherited arguments."""

import contextlib
import io

import pytest
import yaml

from stateset_lightning.cli.main import main

REWARDS = [
    ("MathEquivalence", {"timeout": 3.0, "target_marker": "=>"}, {"timeout": 0}, "greater than 0"),
    (
        "RewardModel",
        {"model_name": "a/b", "label": "good", "batch_size": 4, "dtype": "bfloat16", "weight": 0.5},
        {"batch_size": 0},
        "batch_size",
    ),
    (
        "EmbeddingSimilarity",
        {"model_name": "a/b", "prefix": "query: ", "max_tokens": 9, "name": "near"},
        {"max_tokens": 0},
        "max_tokens",
    ),
    (
        "ModelJudge",
        {"model": "m", "rubric": "Good?", "base_url": "http://x/v1", "score_range": [1.0, 5.0]},
        {"max_concurrency": 0},
        "max_concurrency",
    ),
    ("ReasoningGymReward", {"answer_pattern": "<a>(.*)</a>", "allow_code": True}, {"timeout": -1}, "timeout"),
]


def parse(tmp_path, name, options):
    reward = {"class_path": f"stateset_lightning.rewards.{name}", "init_args": options}
    config = {"model": {"policy": {"model_name": "tiny"}, "reward": [reward]}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(tmp_path / "c.yaml"), "--print_config"])
    return stopped.value.code, out.getvalue()


@pytest.mark.parametrize(("name", "options", "bad", "said"), REWARDS)
def test_options_are_known_and_bounded(name, options, bad, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pytest"])
    code, printed = parse(tmp_path, name, options)
    assert code == 0
    (reward,) = yaml.safe_load(printed)["model"]["reward"]
    assert reward["init_args"] == {**reward["init_args"], **options}
    code, _ = parse(tmp_path, name, {**options, **bad})
    assert code == 2
    assert said in capsys.readouterr().err
    code, _ = parse(tmp_path, name, {**options, "no_such_option": 1})
    assert code == 2
    assert "no_such_option" in capsys.readouterr().err
