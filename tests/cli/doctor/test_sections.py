"""`doctor`: what it says of a config, what it finds wrong with it, and that it leaves no trace."""

import re
from pathlib import Path

import pytest
import yaml
from vllm_stub import running

from stateset_lightning.cli.doctor import measure
from stateset_lightning.cli.main import main
from stateset_lightning.training import checks as run_checks


def test_a_sound_config_is_described(examine):
    code, said = examine("--data.max_prompt_tokens", "20")
    assert code == 0
    for text in (
        "model_name: tiny",
        "train: 8 rows of 11 to 11 tokens, 11.0 on average",
        "policy: tiny, 1,034,368 parameters, float32, packed scoring",
        "model: qwen2, Qwen2ForCausalLM; layers of full_attention; packed scoring; sampled by InProcessEngine",
        "prompt      rows:1: What is 0 + 1?",
        "one of 8, which have ",
        "reward      ",
        "an episode: 1 optimizer steps, about ",
        "4 episodes an epoch",
        "the run: 6 optimizer steps, 6 episodes, 1.5 epochs, about 0:00:",
        "no contradictions: the run can start",
    ):
        assert text in said, (text, said)
    assert "train.jsonl" not in said


def test_dropped_rows_and_leaked_prompts_are_told(examine):
    rows = [{"prompt": f"What is {i} + 1?" + " Please." * (4 if i < 2 else 0), "target": "1"} for i in range(8)]
    code, said = examine(
        "--data.max_prompt_tokens=20", "--data.overlong_prompts=drop", "--data.validation=rows.jsonl", rows=rows
    )
    assert code == 0
    assert "2 of 8 prompts have more than data.max_prompt_tokens=20 tokens and are dropped" in said
    assert "train: 6 rows of 11 to 11 tokens, 11.0 on average" in said
    assert "note: 6 prompts of validation are among those of training" in said


@pytest.mark.parametrize("steps", [6, 7])
def test_a_validation_that_never_comes_is_told(examine, steps):
    interval = {"val_check_interval": 7, "check_val_every_n_epoch": None, "max_steps": steps}
    code, said = examine(data={"validation": "rows.jsonl"}, trainer=interval)
    assert code == 0
    assert ("note: validation never runs: trainer.val_check_interval=7, the run has 6 micro-steps" in said) == (
        steps == 6
    )


def test_half_precision_that_only_costs_time_is_told(examine, monkeypatch):
    for has_products in (False, True):
        monkeypatch.setattr(run_checks, "has_bfloat16_products", lambda has_products=has_products: has_products)
        code, said = examine("--sample=false", trainer={"precision": "bf16-mixed"})
        assert code == 0
        assert ("note: trainer.precision=bf16-mixed with float32 weights: slow on this CPU" in said) != has_products
    assert "slow on this CPU" not in examine("--sample=false")[1]


@pytest.mark.parametrize(
    ("load", "threads", "environment", "is_told"),
    [
        (9.0, 2, {}, True),
        (1.0, 2, {}, False),
        (9.0, 1, {}, False),
        (9.0, 2, {"OMP_WAIT_POLICY": "passive"}, False),
    ],
    ids=["busy", "idle", "one thread", "told already"],
)
def test_threads_that_spin_on_a_busy_machine_are_told(examine, monkeypatch, load, threads, environment, is_told):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = examine(data={"max_prompt_tokens": 3})[1]  # which ends it early
    assert ("note: the machine is busy (load average 9.0, 4 cores), where threads" in said) == is_told
    assert ("spin: start with OMP_WAIT_POLICY=passive" in said) == is_told


def test_without_sampling_the_target_is_scored(examine):
    code, said = examine("--sample", "false")
    assert code == 0
    assert "target      1" in said
    assert "reward      1.000 = exact_match 1.000" in said


def asks(**options):
    environment = {"factory": "doctor_rewards.Asks", "options": options, "max_turns": 3, "max_tokens": 60}
    reward = [{"class_path": "stateset_lightning.rewards." + name} for name in ("EnvironmentReward", "ExactMatch")]
    return {"environment": environment, "reward": reward}


def test_conversations_are_played_and_scored(examine):
    code, out = examine(model=asks())
    assert code == 0
    assert re.search(r"conversation \[assistant\] .*\[user\] Sure\? \[assistant\] ", out)
    assert re.search(r"one of \d+, which have [\d.]+ tokens on average; ended by environment \(\d+\)", out)
    assert re.search(r"reward      [\d.]+ = environment 0.500, exact_match", out), out
    assert "conversations of 60 tokens, sampled" in out


def test_an_environment_that_fails_is_a_problem_with_its_place(examine):
    code, out = examine(model=asks(fails=True))
    assert code == 1
    problem = r"problem: model.environment fails on scenario \S+ \((\d+) of \1 conversations\): .*Asks.step: "
    place = r"RuntimeError: no board\n  raised at .*doctor_rewards.py:\d+, in step\nproblems: 1"
    assert re.search(problem + place, out)


def test_conversations_that_take_too_long_are_stopped(examine, monkeypatch):
    monkeypatch.setattr(measure, "LIMIT", 2.0)
    code, out = examine(model=asks(seconds=30))
    assert code == 0
    assert re.search(r"as sampled  sampling  > [\d.]+ s, ", out)
    assert "nothing is scored, as no conversations were played to their ends" in out


def test_without_sampling_no_conversation_is_scored(examine):
    code, out = examine("--sample=false", model=asks(fails=True))
    assert code == 0
    assert "note: model.environment: nothing is scored, as no conversations were played to their ends" in out


def test_servers_that_may_be_serving_a_run_get_no_weights(examine):
    with running() as server:
        engine = {"class_path": "stateset_lightning.rollout.VLLMEngine", "init_args": {"urls": [server.url]}}
        code, said = examine(model={"engine": engine})
        assert (code, server.stub.requests) == (0, [])
    assert "note: nothing is sampled: model.engine's servers are left alone" in said
    assert "reward      1.000 = exact_match 1.000" in said


def test_all_contradictions_are_found_at_once(examine):
    monitor = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/reward"}}
    trainer = {"accumulate_grad_batches": 2, "callbacks": [monitor]}
    code, said = examine(trainer=trainer, model={"rollout": {"max_new_tokens": 100_000}})
    problems = [line for line in said.splitlines() if line.startswith("problem: ")]
    assert code == 1
    assert len(problems) == 3
    for text in ("accumulate_grad_batches=2 must divide", "nothing to validate on", "max_new_tokens=100000"):
        assert any(text in problem for problem in problems), (text, problems)
    assert "\nproblems: 3\n" in said


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        (
            {"model": {"reward": [{"class_path": "doctor_rewards.Raises"}]}},
            "reward raises fails on scenario rows:1 (8 of 8 completions): KeyError",
        ),
        ({"model": {"reward": [{"class_path": "doctor_rewards.Silent"}]}}, "no reward applies to this completion"),
        ({"data": {"train": "none.jsonl"}}, "none.jsonl"),
        ({"data": {"max_prompt_tokens": 3}}, "8 of 8 prompts have more than data.max_prompt_tokens=3 tokens"),
        (
            {"model": {"policy": {"dtype": "float16"}}, "trainer": {"precision": "bf16-true"}},
            "contradicts trainer.precision",
        ),
        (
            {"model": {"lr_scheduler": {"decay": "cosine"}}, "trainer": {"max_steps": -1}},
            "needs trainer.max_steps, or total_steps",
        ),
        (
            {"model": {"rollout": {"temperatur": 1}}},
            "there is no key model.rollout.temperatur; did you mean model.rollout.temperature?",
        ),
        ({"trainer": {"max_step": 1}}, "there is no key"),
        (
            {"data": {"steps_per_episode": "auto"}, "trainer": {"accumulate_grad_batches": 2}},
            "data.steps_per_episode=auto chooses trainer.accumulate_grad_batches, too: leave it out",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_is_named_and_ends_with_code_1(examine, overlay, said):
    code, told = examine(**overlay)
    assert code == 1
    assert said in told
    assert "Traceback" not in told


def test_a_row_that_names_an_unknown_reward_is_found(examine):
    code, said = examine(rows=[{"prompt": "What is 1?", "target": "1", "rewards": ["exact_math"]}])
    assert code == 1
    assert "exact_math" in said


def test_what_a_terminal_would_obey_is_not_shown(examine):
    code, said = examine("--sample=false", rows=[{"prompt": "a\x1b[2Jb\nc" + "x" * 400, "target": "\x07"}])
    assert "rows:1: a [2Jb cxxx" in said
    assert "\x1b" not in said
    assert "xxx..." in said
    assert code == 0


def test_a_checkpoint_that_cannot_be_resumed_is_told(examine):
    examine("--sample=false")  # writes the rows
    run = main(
        [
            "fit",
            "--config",
            "config.yaml",
            "--trainer.max_steps=1",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
        ]
    )
    run.trainer.save_checkpoint("one.ckpt")
    code, said = examine("--sample=false", "--ckpt_path", "one.ckpt")
    assert (code, "resuming one.ckpt" in said) == (0, True)
    code, said = examine("--sample=false", "--ckpt_path", "one.ckpt", "--seed_everything", "4")
    assert code == 1
    assert "problem: seed_everything=4 differs from the checkpoint's 3" in said
    code, said = examine("--sample=false", "--ckpt_path", "rows.jsonl")
    assert code == 1
    assert "problem: " in said


def test_a_checkpoint_is_named_as_in_fit(examine):
    for name, expected in (("last", 0), ("best", 1), ("", 1)):
        code, said = examine("--sample=false", f"--ckpt_path={name}")
        assert code == expected, said
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}
    Path("save.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [checkpoint]}}))
    main(["fit", "--config", "config.yaml", "--config", "save.yaml", "--trainer.max_steps=1"])
    code, said = examine("--sample=false", "--ckpt_path=last")
    assert (code, "resuming runs/doctor/version_0/checkpoints/epoch=0-step=1.ckpt" in said) == (0, True)
    code, said = examine("--sample=false", "--ckpt_path=best")
    assert (code, "problem: ckpt_path=best: " in said, "has no best one by a `monitor`" in said) == (1, True, True)
