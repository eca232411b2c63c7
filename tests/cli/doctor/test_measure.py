"""What doctor measures of an episode: the config's own sizes, both cases, and no weight changed."""

import re

import pytest
import torch

from stateset_lightning.cli.doctor import measure, sections
from stateset_lightning.policy import Policy, PolicyConfig, load_model
from stateset_lightning.rollout import InProcessEngine

PHASE = re.compile(r"^  (first step|as sampled|worst case) +(\S+) +(?:> )?[\d.,]+ s, [\d.,]+ MB$", re.MULTILINE)


@pytest.fixture
def seen(monkeypatch):
    """What sampling and training were given: (prompts, completions of each) and groups, in order."""
    seen = {"sampled": [], "trained": []}
    generate, score = InProcessEngine.generate, Policy.score

    def watched_generate(self, prompts, *args, **kwargs):
        rollout = generate(self, prompts, *args, **kwargs)
        seen["sampled"].append((prompts, rollout.lengths_N.tolist()))
        return rollout

    def watched_score(self, groups, *args, **kwargs):
        if torch.is_grad_enabled():
            seen["trained"].append([(len(group.prompt), list(map(len, group.completions))) for group in groups])
        return score(self, groups, *args, **kwargs)

    monkeypatch.setattr(InProcessEngine, "generate", watched_generate)
    monkeypatch.setattr(Policy, "score", watched_score)
    return seen


ROWS = [{"prompt": f"What is {i} + 1?" + "?" * i, "target": "1"} for i in range(8)]


@pytest.mark.parametrize(("micro_steps", "share"), [(2, 4), (4, 2)], ids=["a group", "a part of a group"])
def test_an_episode_of_the_configs_sizes_is_sampled_and_one_of_its_micro_steps_trained(
    examine, seen, micro_steps, share
):
    steps = f"--data.steps_per_episode={micro_steps}", f"--trainer.accumulate_grad_batches={micro_steps}"
    code, said = examine(*steps, rows=ROWS)
    assert code == 0
    (spread, lengths), (longest, worst_lengths) = seen["sampled"]
    assert [len(prompt) for prompt in spread] == [11, 15]  # rows 0 and 4
    assert [len(prompt) for prompt in longest] == [18, 17]
    assert len(lengths) == 2 * 4
    assert worst_lengths == [5] * 8
    assert seen["trained"] == [[(1, [1])], [(11, lengths[:share])], [(18, [5] * share)]]
    assert PHASE.findall(said) == [
        ("as sampled", "load"),
        ("first step", "training"),
        ("first step", "update"),
        ("as sampled", "sampling"),
        ("as sampled", "scoring"),
        ("as sampled", "training"),
        ("as sampled", "update"),
        ("worst case", "sampling"),
        ("worst case", "training"),
        ("worst case", "update"),
    ]
    assert f"as sampled: a micro-step of {share} completions, " in said
    assert f"{11 + sum(lengths[:share])} tokens (each prompt once per group)" in said
    assert f"a micro-step of {share} completions, {18 + 5 * share} tokens (each prompt once per group)" in said


def test_the_worst_case_of_conversations_is_their_last_turn_and_all_their_tokens(examine, seen):
    user = {"factory": "stateset_lightning.environments.ScriptedUser", "options": {"responses": ["Sure?"]}}
    environment = {**user, "max_turns": 3, "max_tokens": 30}
    assert examine(rows=ROWS, model={"environment": environment})[0] == 0
    *turns, (begun, lengths) = seen["sampled"]
    assert len(turns) > 1
    assert len(turns[0][0]) == 2
    assert [len(prompt) for prompt in begun] == [18 + 25] * 4 + [17 + 25] * 4
    assert lengths == [5] * 8
    assert seen["trained"][-1] == [(18, [30] * 4), (17, [30] * 4)]


def test_targets_that_are_trained_on_are_measured_and_not_samples(examine, seen):
    algorithm = {"class_path": "stateset_lightning.algorithm.Supervised"}
    code, said = examine("--data.num_iterations=2", rows=ROWS, model={"algorithm": algorithm})
    assert code == 0
    assert seen["sampled"] == []
    # A target is "1" and the token that ends it; one for each prompt, and no old log-probs for a second pass.
    assert seen["trained"] == [[(1, [1])], [(11, [2]), (15, [2])], [(18, [5]), (17, [5])]]
    assert "sampling" not in [phase for _, phase in PHASE.findall(said)]
    assert "log-probs" not in [phase for _, phase in PHASE.findall(said)]
    assert "target      1\n              one of 2, which have 2.0 tokens on average; 0 are cut" in said
    assert "reward      1.000 = exact_match 1.000" in said
    assert "as sampled: a micro-step of 2 completions, 30 tokens" in said


def test_reference_and_old_log_probs_count_where_there_are_any(examine):
    grpo = {"class_path": "stateset_lightning.algorithm.GRPO", "init_args": {"beta": 0.1, "positive_coefficient": 0.1}}
    code, said = examine("--data.num_iterations=2", model={"algorithm": grpo})
    assert code == 0
    assert ("worst case", "log-probs") in PHASE.findall(said)
    assert "an episode: 2 optimizer steps, about " in said
    seconds = {phase: float(cost) for phase, cost in re.findall(r"as sampled +(\S+) +([\d.]+) s", said)}
    expected = seconds["sampling"] + seconds["scoring"] + seconds["log-probs"]
    expected += 2 * (seconds["training"] + seconds["update"])
    told = float(re.search(r"2 optimizer steps, about ([\d.]+) s", said)[1])
    assert told == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_weight_changes(examine, monkeypatch, precision):
    looked_at = []
    look = sections.Doctor.before_fit

    def keeps_the_model(self):
        try:
            look(self)
        finally:
            looked_at.append(self.module.policy.model)

    monkeypatch.setattr(sections.Doctor, "before_fit", keeps_the_model)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 10.0, "weight_decay": 0.5, "momentum": 0.9}}
    assert examine(model={"optimizer": sgd}, trainer={"precision": precision})[0] == 0
    loaded = load_model(PolicyConfig("tiny")).state_dict()
    for name, weight in looked_at[0].state_dict().items():
        assert torch.equal(weight, loaded[name]), name


def test_out_of_memory_in_training_is_a_result(examine, monkeypatch):
    score = Policy.score

    def needs_much(self, groups, *args, **kwargs):
        if torch.is_grad_enabled() and sum(len(group.completions) for group in groups) > 4:
            torch.empty(2**52)
        return score(self, groups, *args, **kwargs)

    monkeypatch.setattr(Policy, "score", needs_much)
    code, said = examine()
    problems = [line for line in said.splitlines() if line.startswith("problem: ")]
    remedy = "raise data.steps_per_episode and trainer.accumulate_grad_batches alike"
    assert [problem.split(": ")[1] for problem in problems] == [
        "out of memory on cpu, as sampled, training",
        "out of memory on cpu, worst case, training",
    ]
    assert all(remedy in problem for problem in problems)
    assert code == 1
    assert ("worst case", "sampling") in PHASE.findall(said)  # what can be measured still is
    assert examine("--data.steps_per_episode=2", "--trainer.accumulate_grad_batches=2")[0] == 0  # as it says


def test_out_of_memory_in_sampling_leaves_the_worst_case_of_training(examine, monkeypatch):
    monkeypatch.setattr(InProcessEngine, "generate", lambda *args, **kwargs: torch.empty(2**52))
    code, said = examine()
    assert code == 1
    assert "problem: out of memory on cpu, as sampled, sampling: lower model.rollout.max_batch_rows" in said
    assert "target      1" in said
    assert ("worst case", "training") in PHASE.findall(said)


def test_a_worst_case_that_takes_too_long_is_stopped(examine, monkeypatch):
    monkeypatch.setattr(measure, "LIMIT", 1.0)
    # Two thousand tokens take more than a second; the model ends its completions after a few.
    code, said = examine("--model.rollout.max_new_tokens=2000", "--data.batch_size=8")
    assert code == 0
    assert re.search(r"worst case +sampling +> 1\.\d\d s", said)
    assert re.search(r"as sampled +sampling +[\d.]+ s", said)
