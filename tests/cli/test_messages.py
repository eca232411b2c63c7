"""What the parser says, shortened to a line that names key, value and remedy; and the bounds that it enforces."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path
from typing import Annotated, get_args, get_origin

import lightning.pytorch  # noqa: F401 (here, so that its log handlers do not hold the stream of the first test)
import pytest
from cli_runs import overlay

import stateset_lightning
from stateset_lightning.cli.main import main
from stateset_lightning.cli.messages import without_traceback


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.rollout.num_generations", "0", "greater than or equal to 2"),
        ("model.rollout.max_new_tokens", "0", "greater than or equal to 1"),
        ("model.rollout.temperature", "-1", "greater than 0"),
        ("model.rollout.top_k", "0", "greater than or equal to 1"),
        ("model.rollout.top_p", "2", "less than or equal to 1"),
        ("model.rollout.min_p", "0", "greater than 0"),
        ("model.rollout.max_batch_rows", "0", "greater than or equal to 1"),
        ("model.reward_timeout", "0", "greater than 0"),
        ("model.reward_concurrency", "0", "greater than or equal to 1"),
        ("model.max_reward_failures", "1.5", "less than or equal to 1"),
        ("model.evaluation.samples", "-1", "greater than or equal to 0"),
        ("model.evaluation.temperature", "0", "greater than 0"),
        ("model.evaluation.top_p", "1.5", "less than or equal to 1"),
        ("model.max_tokens_per_step", "0", "greater than or equal to 1"),
        ("model.max_bad_steps", "-1", "greater than or equal to 0"),
        ("model.rollout.dynamic_sampling", "-1", "greater than or equal to 0"),
        ("model.rollout.sampling_ahead", "2", "less than or equal to 1"),
        ("model.policy.dropout", "1", "less than 1"),
        ("model.policy.head_chunk_tokens", "0", "greater than 0"),
        ("model.policy.lora.rank", "0", "greater than or equal to 1"),
        ("model.policy.lora.alpha", "0", "greater than or equal to 1"),
        ("model.policy.lora.dropout", "1", "less than 1"),
        ("model.algorithm.epsilon_low", "1", "less than 1"),
        ("model.algorithm.epsilon_high", "0", "greater than 0"),
        ("model.algorithm.beta", "-0.1", "greater than or equal to 0"),
        ("model.algorithm.constant_length", "0", "greater than or equal to 1"),
        ("model.lr_scheduler.warmup_steps", "-1", "greater than or equal to 0"),
        ("model.lr_scheduler.final_factor", "2", "less than or equal to 1"),
        ("model.lr_scheduler.total_steps", "0", "greater than or equal to 1"),
        ("data.batch_size", "0", "greater than or equal to 1"),
        ("data.eval_batch_size", "0", "greater than or equal to 1"),
        ("data.num_iterations", "0", "greater than or equal to 1"),
        ("data.steps_per_episode", "0", "greater than or equal to 1"),
        ("data.max_prompt_tokens", "0", "greater than or equal to 1"),
        ("data.validation_fraction", "1", "less than 1"),
        ("samples.every_n_episodes", "0", "greater than or equal to 1"),
        ("model.evaluation.solved_at", ".inf", "less than inf"),
        ("samples.num_prompts", "0", "greater than or equal to 1"),
        ("samples.max_tokens", "-1", "greater than or equal to 0"),
        ("samples.max_megabytes", "0", "greater than or equal to 1"),
    ],
)
def test_bounds_are_enforced(config, capsys, key, value, said):
    extra = []
    if key.startswith("model.lr_scheduler"):
        extra = [
            "--config",
            overlay(
                "s.yaml", {"model": {"lr_scheduler": {"class_path": "stateset_lightning.training.schedule.Schedule"}}}
            ),
        ]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", config, *extra, f"--{key}", value])
    assert stopped.value.code == 2
    assert f"{key}={value}: must be" in (message := capsys.readouterr().err)
    assert said in message


def test_no_bounded_signature_is_read_from_a_string():
    """Under `from __future__ import annotations` jsonargparse 4.53 drops the bounds without a word."""
    bounded = 0
    for found in pkgutil.walk_packages(stateset_lightning.__path__, "stateset_lightning."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        source = inspect.getsource(module)
        # The one talks of bounds and has none; the other's are held from Python, and no config reaches it.
        if found.name in ("stateset_lightning.errors", "stateset_lightning.rewards.scorer"):
            continue
        uses_bounds = re.search(r"Annotated\[[^\]]*\b(Ge|Gt|Le|Lt)\(", source)
        bounded += bool(uses_bounds)
        assert not (uses_bounds and re.search(r"^from __future__ import annotations$", source, re.MULTILINE)), (
            found.name
        )
    assert bounded >= 8


def test_every_bounded_key_stands_in_the_table_above():
    """A new bounded option of module, data or rollout needs a row: the parser must know its bound."""
    from stateset_lightning.datamodule import ScenarioDataModule
    from stateset_lightning.evaluation import EvaluationConfig
    from stateset_lightning.module import GRPOLightningModule
    from stateset_lightning.rollout import RolloutConfig

    table = {row[0] for row in test_bounds_are_enforced.pytestmark[0].args[1]}

    def is_bounded(hint):
        return get_origin(hint) is Annotated or any(get_origin(part) is Annotated for part in get_args(hint))

    for prefix, cls in (("data", ScenarioDataModule), ("model", GRPOLightningModule)):
        for name, parameter in inspect.signature(cls).parameters.items():
            assert not is_bounded(parameter.annotation) or f"{prefix}.{name}" in table
    for key, cls in (("rollout", RolloutConfig), ("evaluation", EvaluationConfig)):
        for field in dataclasses.fields(cls):
            assert not is_bounded(field.type) or f"model.{key}.{field.name}" in table


def test_a_traceback_is_cut_to_the_users_last_place():
    package = Path(stateset_lightning.__file__).parent
    trace = f'File "/a/mine.py", line 3, in score\n  1 / 0\nFile "{package}/rewards/text.py", line 9, in target_of\n'
    said = without_traceback("It failed.\nTraceback (most recent call last):\n" + trace)
    assert said == "It failed.\n  raised at /a/mine.py:3, in score"
    assert without_traceback("no trace") == "no trace"


USER = """
from stateset_lightning.rewards import RewardFunction
class Base(RewardFunction):
    def compute_reward(self, turns, context=None):
        return 0.0
class NoFile(Base):
    def __init__(self):
        open("/nonexistent")
class NoEntry(Base):
    def __init__(self):
        {}["k"]
class Wrapped(Base):
    def __init__(self):
        try:
            {}["k"]
        except KeyError as error:
            raise RuntimeError("no judge") from error
class Needs(Base):
    def __init__(self, url: str):
        pass
"""
SCHEDULE = '{"class_path": "stateset_lightning.training.schedule.Schedule", "init_args": {"decay": "cos"}}'


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model.policy.dtype fp16", "model.policy.dtype=fp16: must be one of float32, bfloat16, float16 or null"),
        ("--model.algorithm.kl k3", "model.algorithm.kl=k3: must be a mapping"),
        ("--model.algorithm.kl.place no", "model.algorithm.kl.place=no: must be one of loss, reward"),
        ("--model.algorithm.scale std", "model.algorithm.scale=std: must be one of group, batch, none"),
        ("--model.lr_scheduler.decay cos", "model.lr_scheduler.decay=cos: must be one of constant, linear, cosine"),
        (f"--model.lr_scheduler={SCHEDULE}", "model.lr_scheduler.decay=cos: must be one of constant, linear, cosine"),
        ("--model.lr_scheduler StepLR", "missing: model.lr_scheduler.step_size; set it"),
        ("--model.lr_scheduler StepL", "torch.optim.lr_scheduler has no StepL; did you mean StepLR?"),
        ("--model.reward.weight high", "model.reward.weight=high: must be a number"),
        ("--model.optimizer.lr abc", "model.optimizer.lr=abc: must be a number"),
        ("--model.lr 1", "there is no key model.lr; did you mean model.optimizer.init_args.lr?"),
        ("--model.learning_rate 1", "did you mean model.optimizer.init_args.lr?"),
        ("--lr 1", "there is no key lr; did you mean model.optimizer.init_args.lr?"),
        ("--model.beta 1", "did you mean model.algorithm.init_args.beta?"),
        ("--model.temperature 1", "did you mean model.rollout.temperature?"),
        ("--max_steps 1", "did you mean trainer.max_steps?"),
        ("--model.reward={class_path: torch.optim.AdamW}", "torch.optim.AdamW: it is no RewardFunction"),
        ("--model.reward={clas_path: ExactMatch}", "model.reward: there is no key clas_path; did you mean class_path?"),
        ("--model.reward=[{class_path: ExactMatch, init_args: [1]}]", "model.reward: init_args=[1]: must be a mapping"),
        ("--model.reward=[{class_path: ExactMatch, weight: 1}]", "model.reward: there is no key weight beside class_"),
        (
            "--model.reward=[{class_path: ExactMatch, init_args: {weight: high}}, Contains]",
            "model.reward[0].weight=high: must be a number",
        ),
        ("--trainer.callbacks={class_path: Timer, init_args: {interval: 5}}", "trainer.callbacks.interval=5: must be"),
        ("--model.policy.lora.rnk 5", "model.policy.lora: there is no key rnk; did you mean rank?"),
        ("--model.reward broken_syntax.A", "model.reward: class_path broken_syntax.A: SyntaxError: "),
        ("--model.reward broken_syntax.A", "broken_syntax.py:2)"),
        ("--model.reward broken_import.A", "No module named 'nowhere_at_all' ("),
        ("--model.reward broken_raise.A", "RuntimeError: no licence ("),
        ("--model.reward user_rewards.NoFile", "model.reward: NoFile: FileNotFoundError: "),
        ("--model.reward user_rewards.NoFile", "user_rewards.py:8)"),
        ("--model.reward user_rewards.NoEntry", "model.reward: NoEntry: KeyError: 'k' ("),
        ("--model.reward user_rewards.Wrapped", "model.reward: Wrapped: RuntimeError: no judge ("),
        ("--model.reward user_rewards.Needs", "missing: model.reward.url; set it"),
        ("--trainer.callbacks Timer --trainer.callbacks.interval x", "trainer.callbacks: Timer: "),
        ("--trainer.accelerator nope", "trainer: Trainer: ValueError: You selected an invalid accelerator name"),
        ("--trainer.gradient_clip_algorithm abc", "`gradient_clip_algorithm` abc is invalid"),
        ("--model.engine VLLMEngine", "missing: model.engine.urls; set it"),
        ("--model.engine VLLMEngin", "stateset_lightning.rollout has no VLLMEngin; did you mean VLLMEngine?"),
        ("--model.engine RemoteEngine", "model.engine=RemoteEngine: must be a RolloutEngine"),
        ("--model.engine VLLMEngine --model.engine.urls=[a] --model.engine.transfer mpi", "one of files, ipc, nccl"),
        ("--trainer.logger TensorBoardLoger", "did you mean TensorBoardLogger?"),
        ("--config={data: [1]}", "data=[1]: must be a mapping"),
        ("--data.batch_size 1e9", "data.batch_size=1e9: must be an integer greater than or equal to 1"),
        ("--seed_everything -1", "seed_everything=-1: must be an integer greater than or equal to 0"),
        ("--data.batch_size", "argument --data.batch_size: expected one argument"),
    ],
)
def test_the_true_cause_and_its_key_are_told_in_one_line(config, monkeypatch, tmp_path, capsys, flags, said):
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in {
        "user_rewards": USER,
        "broken_syntax": "x = 1\ndef f(:\n",
        "broken_import": "import nowhere_at_all",
        "broken_raise": "raise RuntimeError('no licence')",
    }.items():
        Path(f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    words = [flags] if "{" in flags else flags.split()
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", config, *words])
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set")]
    assert len(told) == 1
    assert told[0].startswith("stateset-lightning: error: ")
    assert said in told[0]
