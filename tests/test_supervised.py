"""Runs that learn by maximum likelihood: of targets (`Supervised`), or of what is best of samples (`RAFT`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from module_runs import (
    SCENARIOS,
    DigitReward,
    GradientRecorder,
    assert_same_end,
    end_state,
    fit,
    make_data,
    make_module,
    relative_difference,
)
from torch.nn.utils.rnn import pad_sequence

from stateset_lightning import RewardFunction, RolloutConfig
from stateset_lightning.algorithm import RAFT, Algorithm, Clipped, Supervised
from stateset_lightning.callbacks import SampleWriter
from stateset_lightning.data.order import Curriculum
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.policy import LoRAConfig, PolicyConfig, load_model
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.types import Rollout

END = 1  # of the bundled tokenizer
UNEVEN = [{**row, "target": [row["target"] * (1 + i % 3), "another"]} for i, row in enumerate(SCENARIOS)]


def supervised(policy: Any = "tiny", **options: Any) -> Any:
    rollout = RolloutConfig(num_generations=4, max_new_tokens=8)
    return make_module(policy, **{"algorithm": Supervised(), "rollout": rollout, **options})


class Counting(InProcessEngine):
    """Counts what it is asked for."""

    calls: list[str]

    def sync(self, policy: Any) -> None:
        self.calls.append("sync")
        super().sync(policy)

    def generate(self, *args: Any, **kwargs: Any) -> Rollout:
        self.calls.append("generate")
        return super().generate(*args, **kwargs)


def counting(tokenizer: Any) -> Counting:
    engine = Counting(tokenizer)
    engine.calls = []
    return engine


class Fails(RewardFunction):
    def compute_reward(self, turns: Any, context: Any = None) -> float:
        raise RuntimeError("never")


def trained(module: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of all that the newest episode trains."""
    episode = module.episode
    completions = episode.completion_tokens_T.split(episode.lengths_N.tolist())
    chosen = episode.active_N.nonzero().flatten().tolist()
    return [(episode.prompt_tokens[n // episode.num_generations], completions[n].tolist()) for n in chosen]


@pytest.mark.parametrize(
    ("algorithm", "data"),
    [
        (Supervised(), {}),
        (Supervised(), {"steps_per_episode": 3}),
        (RAFT(), {"steps_per_episode": 2}),
    ],
    ids=["supervised", "micro-steps", "RAFT"],
)
def test_the_gradient_is_that_of_transformers_own_loss(tmp_path: Path, algorithm: Algorithm, data: Any) -> None:
    """Of one batch with labels: -100 in the prompt, the mean over all other tokens."""
    recorder, module = GradientRecorder(), supervised(algorithm=algorithm)
    steps = data.get("steps_per_episode", 1)
    rows = make_data(train=UNEVEN, batch_size=8, validation=None, **data)
    fit(tmp_path, module, rows, max_steps=1, accumulate_grad_batches=steps, callbacks=[recorder])
    texts = trained(module)
    assert len(texts) == 8  # one for each prompt
    assert len({len(completion) for _, completion in texts}) > 1
    if isinstance(algorithm, Supervised):
        assert sorted(len(completion) for _, completion in texts) == sorted(len(r["target"][0]) + 1 for r in UNEVEN)
        assert {completion[-1] for _, completion in texts} == {END}
        assert "policy/sampling_difference" not in module.metrics.last
        assert not [name for name in module.metrics.last if name.startswith("groups/")]
    model = load_model(PolicyConfig("tiny"))
    ids = pad_sequence([torch.tensor(p + c) for p, c in texts], batch_first=True, padding_value=0)
    labels = [torch.tensor([-100] * len(p) + c) for p, c in texts]
    mask = pad_sequence([torch.ones_like(label) for label in labels], batch_first=True)
    loss = model(ids, attention_mask=mask, labels=pad_sequence(labels, batch_first=True, padding_value=-100)).loss
    loss.backward()
    theirs = {f"policy.model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    mine = {name: gradient for name, gradient in recorder.steps[0].items() if name in theirs}
    assert len(mine) == len(recorder.steps[0])
    assert relative_difference(mine, theirs) < 1e-5
    assert module.metrics.last["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_targets_are_learned_and_scored_and_validation_samples(tmp_path: Path) -> None:
    module = supervised(reward=DigitReward())
    module.engine = engine = counting(module.tokenizer)
    rows = make_data(batch_size=8, eval_batch_size=8, validation=SCENARIOS)
    trainer = fit(tmp_path, module, rows, max_steps=20, val_check_interval=20, check_val_every_n_epoch=None,
                  limit_val_batches=1.0)  # fmt: skip
    assert engine.calls == ["sync", "generate"]  # for the validation, and none for training
    even = [sum(digit in "02468" for digit in row["target"]) / len(row["target"]) for row in SCENARIOS]
    assert module.metrics.last["train/reward"] == pytest.approx(sum(even) / len(even))  # of the targets
    answers = {record["id"]: (record["completion"], record["target"]) for record in module.last_records}
    assert sum(completion == target for completion, target in answers.values()) >= 7
    assert trainer.callback_metrics["val/num_completions"] == 8


def test_a_reward_that_fails_stops_no_supervised_step(tmp_path: Path) -> None:
    module = supervised(reward=Fails())
    fit(tmp_path, module, max_steps=2)
    failed = {name: count for name, count in module.metrics.last.items() if name.startswith("reward_failures/")}
    assert list(failed.values()) == [4]
    assert len(trained(module)) == 4
    assert module.metrics.last["policy/grad_norm"] > 0


def test_a_raft_step_of_which_no_group_is_good_enough_trains_nothing(tmp_path: Path) -> None:
    module = supervised(algorithm=RAFT(minimum_reward=9))
    fit(tmp_path, module, max_steps=1)
    assert module.metrics.last["policy/empty_steps"] == 1
    untrained = load_model(PolicyConfig("tiny")).state_dict()
    assert all(torch.equal(module.policy.model.state_dict()[name], value) for name, value in untrained.items())


@pytest.mark.parametrize("policy", ["tiny", PolicyConfig("tiny", lora=LoRAConfig(rank=2))], ids=["full", "LoRA"])
def test_a_run_resumed_inside_an_episode_of_targets_ends_bit_by_bit_as_if_not(tmp_path: Path, policy: Any) -> None:
    def run(folder: Path, **options: Any) -> Any:
        data = make_data(num_iterations=2, steps_per_episode=4, validation=None)
        keep = ModelCheckpoint(folder / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return fit(folder, supervised(policy), data, accumulate_grad_batches=2, enable_checkpointing=True,
                   callbacks=[keep, SampleWriter(every_n_episodes=1)],
                   **{"logger": CSVLogger(folder, "run", version=0), **options})  # fmt: skip

    straight = end_state(tmp_path / "a", run(tmp_path / "a", max_steps=5))
    run(tmp_path / "b", max_steps=2)  # of an episode's four optimizer steps
    kept = tmp_path / "b" / "kept" / "step=2.ckpt"
    assert_same_end(straight, end_state(tmp_path / "b", run(tmp_path / "b", max_steps=5, ckpt_path=kept)))


MISSING = [{"prompt": "a", "target": "b"}, {"prompt": "c", "target": " "}, {"prompt": "d", "id": "mine", "target": []}]
LONG = [{"prompt": "a", "target": "123456789"}]


@pytest.mark.parametrize(
    ("rows", "rollout", "data", "says"),
    [
        (MISSING, {}, {}, r"2 scenarios \(train:2, mine\) have no target: name its column"),
        (LONG, {}, {}, r"\(train:1\) have a target of more than model\.rollout\.max_new_tokens=8 tokens: set it to 10"),
        (
            SCENARIOS,
            {"dynamic_sampling": 2},
            {},
            r"model\.rollout\.dynamic_sampling=2 has no effect: Supervised trains",
        ),
        (SCENARIOS, {"top_k": 5, "keep_sampling_mask": True}, {}, r"rollout\.keep_sampling_mask=True has no effect"),
        (SCENARIOS, {}, {"curriculum": Curriculum()}, r"data\.curriculum=.* has no effect: Supervised trains on one"),
    ],
    ids=["missing", "long", "dynamic sampling", "mask", "curriculum"],
)
def test_what_cannot_be_trained_on_is_refused_at_the_start(
    tmp_path: Path, rows: Any, rollout: Any, data: Any, says: str
) -> None:
    module = supervised(rollout=RolloutConfig(max_new_tokens=8, **rollout))
    with pytest.raises((DataError, ConfigError), match=says):
        fit(tmp_path, module, make_data(train=rows, validation=None, **data))
    assert module.policy is None  # no weights were loaded for it


def test_a_run_goes_on_with_another_algorithm_only_where_that_is_meant(tmp_path: Path) -> None:
    """Between episodes: what an episode keeps, was made for its own algorithm. Step count and optimizer go on."""
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    data = {"num_iterations": 2, "validation": None}
    fit(tmp_path, supervised(), make_data(**data), callbacks=[keep], enable_checkpointing=True, max_steps=2)
    inside, at_end = ({"ckpt_path": tmp_path / f"step={step}.ckpt", "max_steps": 3} for step in (1, 2))
    with pytest.raises(ConfigError, match=r"model\.algorithm=Clipped, and Supervised in the checkpoint"):
        fit(tmp_path, supervised(algorithm=Clipped()), make_data(**data), **at_end)
    module = supervised(algorithm=Clipped())
    module.accept_changes = "algorithm"
    with pytest.raises(ConfigError, match="accept_changes=algorithm inside an episode: take its end's checkpoint"):
        fit(tmp_path, module, make_data(**data), **inside)
    module = supervised(algorithm=Clipped())
    module.accept_changes = "algorithm"
    trainer = fit(tmp_path, module, make_data(**data), **at_end)
    assert trainer.global_step == 3
    assert module.episode is not None
    assert module.episode.index == 1
    assert module.episode.num_generations == 4  # samples again
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 3


def test_a_target_goes_on_from_what_its_prompt_has_of_the_answer(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is "}]
    rows = [{"messages": messages, "target": "It is 2"}, {"messages": messages, "target": "2"}]
    module = supervised()
    data = make_data(train=rows, batch_size=2, validation=None, final_assistant_turn="prefill")
    fit(tmp_path, module, data, max_steps=1)
    (first, of_first), (second, of_second) = trained(module)
    assert first == second
    assert of_first == of_second == [*module.tokenizer("2")["input_ids"], END]
