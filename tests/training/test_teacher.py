"""A teacher in a run: what is refused, that a student moves towards it, and that a run resumes exactly."""

from __future__ import annotations

import copy
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import fit, make_data, make_module, weights
from vllm_stub import running

from stateset_lightning import RolloutConfig
from stateset_lightning.algorithm import GKD, Clipped, OnPolicyDistillation
from stateset_lightning.errors import ConfigError, NonFiniteError, RewardError
from stateset_lightning.policy import Group, LoRAConfig, Policy, PolicyConfig, compared_with, load_model, load_tokenizer
from stateset_lightning.rollout import VLLMTeacher
from stateset_lightning.training.teacher import check_same_tokenizer, teacher_logprobs

SERVED = VLLMTeacher(["http://127.0.0.1:1"])
ROLLOUT = {"num_generations": 4, "max_new_tokens": 5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": GKD()}, r"algorithm=GKD learns from a teacher: set model\.teacher\.model_name"),
        ({"algorithm": OnPolicyDistillation()}, "algorithm=OnPolicyDistillation learns from a teacher"),
        ({"algorithm": Clipped(), "teacher": "tiny"}, "teacher=tiny has no effect on model.algorithm=Clipped"),
        ({"algorithm": GKD(), "teacher": SERVED}, "vLLM gives no whole distributions; set model.teacher.model_name"),
        (
            {
                "algorithm": OnPolicyDistillation(),
                "teacher": SERVED,
                "rollout": RolloutConfig(**ROLLOUT, temperature=0.7),
            },
            "rollout.temperature=0.7, .*: vLLM's log-probs are at 1, of all tokens",
        ),
        (
            {"algorithm": GKD(), "teacher": "tiny", "rollout": RolloutConfig(top_k=5, keep_sampling_mask=True)},
            "keep_sampling_mask=true: model.algorithm=GKD compares whole distributions",
        ),
        (
            {"algorithm": GKD(), "teacher": PolicyConfig("tiny", lora=LoRAConfig())},
            "model.teacher.lora is an option of model.policy, and of no teacher",
        ),
        (
            {"algorithm": GKD(), "teacher": PolicyConfig("tiny", float32_matmul="high")},
            "model.teacher.float32_matmul is an option of model.policy",
        ),
    ],
    ids=["none for GKD", "none", "not read", "server for GKD", "temperature", "mask", "trained", "of the process"],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_module(**options)


def test_a_model_that_is_not_there_is_named_as_the_teachers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher\.model_name='/nowhere'"):
        fit(tmp_path, make_module(algorithm=GKD(), teacher="/nowhere"), max_steps=1)


@pytest.mark.parametrize(("known", "ends"), [(0, True), (1, True), (2, False), (4, False)])
def test_a_run_ends_where_the_teacher_knows_too_few_log_probs(known: int, ends: bool) -> None:
    class Teacher(VLLMTeacher):
        def score_without_gradient(self, groups: Any, temperature: float = 1.0) -> Any:
            return torch.tensor([-1.0] * known + [math.nan] * (4 - known)), torch.empty(0)

    says = rf"model\.teacher knows no log-prob for {4 - known} of 4 tokens, NaN, null or -inf"
    with pytest.raises(NonFiniteError, match=says) if ends else nullcontext():
        teacher_logprobs(Teacher(SERVED.urls), [], 1.0)


@pytest.mark.parametrize("algorithm", [GKD(), OnPolicyDistillation()], ids=["GKD", "sampled token"])
def test_rewards_that_are_only_shown_may_all_fail(
    tmp_path: Path, algorithm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(turns: Any, context: Any) -> float:
        raise OSError("away")

    with caplog.at_level(logging.INFO, logger="stateset_lightning"):
        module = make_module(algorithm=algorithm, teacher="tiny", reward=fails)
        fit(tmp_path, module, max_steps=1)
    assert module.metrics.last["reward_failures/fails/OSError"] == 16
    assert module.metrics.last["policy/empty_steps"] == 0
    roles = [line.partition(", ")[0] for line in caplog.messages if "parameters" in line]
    assert roles == ["policy: tiny", "teacher: tiny"]
    with pytest.raises(RewardError, match="away"):
        fit(tmp_path, make_module(algorithm=type(algorithm)(reward_weight=0.1), teacher="tiny", reward=fails))


def test_other_tokens_are_refused(tiny_tokenizer: Any) -> None:
    check_same_tokenizer(PolicyConfig("tiny"), copy.deepcopy(tiny_tokenizer), tiny_tokenizer)
    padded, longer, ending = (copy.deepcopy(tiny_tokenizer) for _ in range(3))
    padded.pad_token = padded.eos_token  # as one without a pad token is loaded
    check_same_tokenizer(PolicyConfig("tiny"), padded, tiny_tokenizer)
    longer.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match=r"model_name='other': its tokenizer is not the policy's \(vocabulary differ"):
        check_same_tokenizer(PolicyConfig("other"), longer, tiny_tokenizer)
    ending.eos_token = "a"
    with pytest.raises(ConfigError, match=r"\(end of sequence, special tokens differ\)"):
        check_same_tokenizer(PolicyConfig("other"), ending, tiny_tokenizer)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model, disturbed: its teacher is the model as it was."""
    folder = tmp_path_factory.mktemp("student")
    model, generator = load_model(PolicyConfig("tiny")), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.7 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    load_tokenizer(PolicyConfig("tiny")).save_pretrained(folder)
    return str(folder)


class Rows(Callback):
    """The newest value of a metric after each step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.values.append(pl_module.metrics.last[self.name])


def run(folder: Path, student: str, algorithm: Any, teacher: Any = "tiny", **options: Any) -> Any:
    rollout = {"num_generations": 2, "max_new_tokens": 4, **options.pop("rollout", {})}
    module = make_module(
        student,
        algorithm=algorithm,
        teacher=teacher,
        reward=lambda turns, context: 1.0,  # every group is constant
        rollout=RolloutConfig(**rollout),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    )
    return fit(folder, module, options.pop("data", None), **options).lightning_module


@pytest.mark.parametrize(
    ("algorithm", "metric", "temperature"),
    [(OnPolicyDistillation(), "policy/teacher_kl", 1.0), (GKD(jsd_beta=1.0), "policy/divergence", 0.8)],
    ids=["sampled token", "GKD"],
)
def test_a_student_moves_towards_its_teacher_where_no_reward_differs(
    tmp_path: Path, student: str, algorithm: Any, metric: str, temperature: float
) -> None:
    rows = Rows(metric)
    rollout = {"num_generations": 16, "temperature": temperature}
    run(tmp_path, student, algorithm, rollout=rollout, max_steps=10, callbacks=[rows])
    assert 0 < sum(rows.values[-3:]) < 0.3 * sum(rows.values[:3])


def test_a_served_teacher_trains_as_one_in_the_process_and_none_is_in_the_state(tmp_path: Path, student: str) -> None:
    ours = run(tmp_path, student, OnPolicyDistillation(reward_weight=0.5), max_steps=1)
    assert not any("teacher" in name for name in ours.state_dict())
    with running() as server:
        served = VLLMTeacher([server.url])
        theirs = run(tmp_path, student, OnPolicyDistillation(reward_weight=0.5), served, max_steps=1)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, atol=1e-4, rtol=0)


@pytest.mark.parametrize("algorithm", [OnPolicyDistillation(reward_weight=0.5), GKD()], ids=["sampled token", "GKD"])
def test_a_run_resumed_inside_an_episode_ends_bit_identical(tmp_path: Path, student: str, algorithm: Any) -> None:
    data = {"num_iterations": 2, "steps_per_episode": 2}
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 3, "enable_checkpointing": True}
    straight = run(tmp_path, student, algorithm, data=make_data(**data), callbacks=[keep], **options)
    restored = {"data": make_data(**data), "ckpt_path": tmp_path / "step=1.ckpt"}
    resumed = run(tmp_path, student, algorithm, **restored, **options)
    for name, value in weights(straight.trainer).items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_completion_whose_reward_failed_is_distilled(tmp_path: Path, student: str) -> None:
    def fails(turns: Any, context: Any) -> float:
        raise ValueError("no")

    module = make_module(
        student,
        algorithm=GKD(),
        teacher="tiny",
        reward=fails,
        max_reward_failures=1.0,
        rollout=RolloutConfig(num_generations=2, max_new_tokens=4),
    )
    last = fit(tmp_path, module, max_steps=1).lightning_module.metrics.last
    assert last["work/skipped"] == 0
    assert last["policy/divergence"] > 0.01
    assert last["policy/grad_norm"] > 0


def test_a_teacher_is_compared_with_by_the_products_that_it_scores_with(tiny_tokenizer: Any) -> None:
    """In bfloat16 its own head multiplies in float32 (on a CPU), unless `head_dtype` says otherwise."""
    config = PolicyConfig("tiny", dtype="bfloat16")
    teacher = Policy(load_model(config), config)
    groups = [Group([5, 6, 7], [[8, 9, 10, 11]])]
    wanted_T = teacher.score_without_gradient(groups, 1.0)[0]
    seen: list[torch.Tensor] = []

    def divergence(logps_TV: torch.Tensor, teacher_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(teacher_TV)
        return torch.zeros(len(logps_TV)), logps_TV

    compared_with(teacher, groups, 1.0, divergence)(torch.zeros(4, teacher.model.config.vocab_size), slice(0, 4))
    got_T = seen[0].gather(-1, torch.tensor([[8], [9], [10], [11]]))[:, 0]
    torch.testing.assert_close(got_T, wanted_T, atol=1e-5, rtol=0)
