"""`stateset-lightning convert`: the guide's YAML becomes a config that `fit` runs, and nothing is lost without a
word.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from guide_yaml import GUIDE

from stateset_lightning.cli.convert import convert
from stateset_lightning.cli.main import main
from stateset_lightning.errors import ConfigError


def guide(**changes: Any) -> dict[str, Any]:
    """The guide's YAML with keys such as `training__seed` changed; None removes one."""
    content = copy.deepcopy(yaml.safe_load(GUIDE))
    for path, value in changes.items():
        section, _, name = path.partition("__")
        (content[section] if name else content)[name or section] = value
        if value is None:
            del (content[section] if name else content)[name or section]
    return content


def test_the_guides_example() -> None:
    config, notes = convert(guide())
    assert config["model"]["policy"] == {"model_name": "gpt2"}
    assert config["model"]["rollout"] == {"max_new_tokens": 50, "temperature": 0.7}
    assert config["model"]["optimizer"]["init_args"] == {"lr": 5e-5, "weight_decay": 0.0}  # YAML reads `5e-5` as text
    assert config["data"]["train"] == yaml.safe_load(GUIDE)["environment"]["scenarios"]
    assert config["data"]["batch_size"] == 2  # as many as there are
    assert config["model"]["environment"] == {"max_turns": 1}  # which is single-turn
    assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (20, -1)
    assert len(notes) == 1
    assert "model.reward is HelpfulnessReward" in notes[0]


MULTI = {"training__max_turns": 3, "environment__max_turns": 3, "agent__type": "MultiTurnAgent"}


@pytest.mark.parametrize("said", [*({key: MULTI[key]} for key in [*MULTI][:2]), MULTI])
def test_the_multi_turn_one(said: dict[str, Any]) -> None:
    config, _ = convert(guide(**{"training__max_turns": None, **said}))
    assert config["model"]["environment"] == {"max_turns": 3}
    assert config["data"] == {"train": yaml.safe_load(GUIDE)["environment"]["scenarios"], "batch_size": 1}
    assert config["trainer"]["logger"]["init_args"]["name"] == "multi_turn"


def test_every_training_option_of_the_guide() -> None:
    options = {
        "weight_decay": 0.01,
        "per_device_train_batch_size": 8,
        "bf16": True,
        "fp16": False,
        "max_grad_norm": 0.5,
        "seed": 7,
    }
    config, notes = convert(
        guide(**{f"training__{name}": value for name, value in options.items()}, training__max_steps_per_episode=100)
    )
    assert config["model"]["optimizer"]["init_args"] == {"lr": 5e-5, "weight_decay": 0.01}
    assert (config["data"]["batch_size"], config["seed_everything"]) == (8, 7)
    assert (config["trainer"]["precision"], config["trainer"]["gradient_clip_val"]) == ("bf16-mixed", 0.5)
    assert convert(guide(training__fp16=True))[0]["trainer"]["precision"] == "16-mixed"
    assert notes[0].startswith(
        "training.max_steps_per_episode=100 is not carried over: an episode here is one batch of prompts"
    )


def test_what_is_not_carried_over_is_named_without_secrets() -> None:
    _, notes = convert(guide(agent__role="tutor", wandb={"api_key": "0123456789abcdef" * 2}, environment__persona=[1]))
    assert [note.split(" ")[0].split("=")[0] for note in notes[:3]] == ["agent.role", "environment.persona", "wandb"]
    assert "'tutor' is not carried over" in notes[0]
    assert "0123456789abcdef" not in "".join(notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"environment__max_turns": 10},
            "environment.max_turns=10, training.max_turns=1: give one max_turns, above 1 for a MultiTurnAgent",
        ),
        ({"agent__type": "MultiTurnAgent"}, "agent.type=MultiTurnAgent, training.max_turns=1: give one max_turns"),
        ({"agent__type": "MultiTurnAgent", "training__max_turns": None}, "agent.type=MultiTurnAgent: give one"),
        ({"agent__type": "Agent", "training__max_turns": 3}, "agent.type=Agent, training.max_turns=3: give one"),
        ({"training__max_turns": "many"}, "training.max_turns='many' must be a whole number"),
        ({"agent__type": "Robot"}, "agent.type='Robot' must be 'MultiTurnAgent' or 'Agent' or 'agent', or left out"),
        ({"environment__type": "task"}, "environment.type='task' must be 'ConversationEnvironment' or 'conversation'"),
        ({"environment__scenarios": "rows.json"}, "environment.scenarios='rows.json' must be a list of scenarios"),
        ({"environment__scenarios": []}, "environment.scenarios=\\[\\] must be a list"),
        ({"agent__model_name": None}, "agent.model_name is missing"),
        ({"training__num_episodes": None}, "training.num_episodes is missing"),
        ({"training__num_episodes": 2.5}, "training.num_episodes=2.5 must be a whole number"),
        ({"training__num_episodes": True}, "training.num_episodes=True must be a whole number"),
        ({"training__learning_rate": "fast"}, "training.learning_rate='fast' must be a number"),
        ({"training__learning_rate": "nan"}, "training.learning_rate='nan' must be a number"),
        ({"training__bf16": "yes please"}, "training.bf16='yes please' must be true or false"),
        ({"training__bf16": True, "training__fp16": True}, "training.bf16 and training.fp16 are both true"),
        ({"training": [1]}, "training=\\[1\\] must be a mapping"),
    ],
)
def test_what_cannot_be_converted_is_an_error_that_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(guide(**changes))


def test_the_command_writes_a_config_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "guide.yaml", tmp_path / "ours.yaml"
    source.write_text(GUIDE)
    main(["convert", str(source)])
    printed = capsys.readouterr()
    assert yaml.safe_load(printed.out) == convert(guide())[0]
    assert "HelpfulnessReward" in printed.err
    main(["convert", str(source), "-o", str(target)])
    assert capsys.readouterr().out == f"stateset-lightning fit --config {target}\n"
    assert target.read_text() == printed.out
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(source), "-o", str(target)])
    assert "the file is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("agent: [", "malformed YAML"),
        (
            "model: {}\n",
            "must hold the keys agent, environment, training, but holds model",
        ),
        ("3\n", "not a mapping of keys but 3; it must hold the keys agent, environment, training"),
    ],
)
def test_a_file_that_is_none_of_the_guides(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "guide.yaml").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(tmp_path / "guide.yaml")])
    error = capsys.readouterr().err
    assert message in error
    assert "guide.yaml" in error


@pytest.mark.slow  # the first run of a process imports Lightning
@pytest.mark.parametrize("max_turns", [1, 3])
def test_the_converted_config_trains(max_turns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "guide.yaml").write_text(yaml.safe_dump(guide(training__max_turns=max_turns)))
    main(["convert", str(tmp_path / "guide.yaml"), "-o", str(tmp_path / "ours.yaml")])
    short = [
        "--model.policy.model_name=tiny",
        "--model.rollout.max_new_tokens=8",
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--baseline=true",
        "--data.validation=" + json.dumps(guide()["environment"]["scenarios"]),
    ]
    cli = main(["fit", f"--config={tmp_path / 'ours.yaml'}", *short, f"--trainer.logger.init_args.save_dir={tmp_path}"])
    assert cli is not None
    assert cli.trainer.global_step == 2
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == 5e-5
    assert cli.model.rollout.temperature == 0.7
    number = 2 if max_turns == 1 else 1  # the one scenario's user_responses, or their conversation
    assert cli.datamodule.num_scenarios == {"train": number, "validation": number}
    run = tmp_path / ("single_turn" if max_turns == 1 else "multi_turn") / "version_0"
    assert (run / "checkpoints" / "last.ckpt").exists()
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert all(("turns" in row) == (max_turns > 1) for row in rows)
    capsys.readouterr()
    main(
        ["generate", "--device=cpu", f"--ckpt_path={run}", "--prompt", json.dumps({"user_responses": ["Hm?", "Why?"]})]
    )
    assert ("[end] ended_by=" in capsys.readouterr().out) == (max_turns > 1)
