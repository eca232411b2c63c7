"""Conversations as they are sampled, trained and scored, with environments that answer, and with some that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from module_runs import fit, make_data, make_module, weights

from stateset_lightning import RolloutConfig
from stateset_lightning.data.prompts import PromptEncoder
from stateset_lightning.environments import EnvironmentConfig, Tools
from stateset_lightning.environments.play import Limits, Play
from stateset_lightning.environments.player import Player
from stateset_lightning.environments.tools import CALL_COUNTS
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import Group, Policy, PolicyConfig, end_of_sequence_ids, load_model
from stateset_lightning.rewards import EnvironmentReward, FunctionReward
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.rollout.running_batch import RunningBatch
from stateset_lightning.seeding import sample_seeds
from stateset_lightning.types import FinishReason, PromptBatch, Scenario, Turn

ROLLOUT = RolloutConfig(num_generations=3, max_new_tokens=6)


class Asks:
    """Asks for one more sum `times` times, and gives 1 for each answer that has a digit."""

    def __init__(self, times: int = 1) -> None:
        self.left = times

    def reset(self, scenario: Mapping[str, Any], seed: int) -> None:
        self.scenario = scenario

    def step(self, text: str) -> tuple[str, float, bool]:
        self.left -= 1
        return "What is 5 + 9?", float(any(c.isdigit() for c in text)), self.left < 0


class Opens(Asks):
    """Begins with a turn of its own, which is the same for a group."""

    def reset(self, scenario: Mapping[str, Any], seed: int) -> str:  # type: ignore[override]
        return f"What is {seed % 7} + 1?"


class Raises(Asks):
    def step(self, text: str) -> Any:
        raise RuntimeError("no more sums")


class Hangs(Asks):
    def step(self, text: str) -> Any:
        time.sleep(2)


class Nonsense(Asks):
    def step(self, text: str) -> Any:
        return "a reply alone"


class NoNumber(Asks):
    def get_reward(self) -> float:
        return float("nan")


class NeverBegins(Asks):
    def reset(self, scenario: Mapping[str, Any], seed: int) -> None:
        raise KeyError("target")


class Lies(Asks):
    def step(self, text: str) -> Any:
        return "What is 1 + 1?", 1.0, "no"


@pytest.fixture(scope="module")
def policy() -> Policy:
    config = PolicyConfig("tiny")
    return Policy(load_model(config, torch.float32, 1), config)


@pytest.fixture
def play(policy: Policy, tiny_tokenizer: Any) -> Callable[..., Any]:
    def play(factory: Any, sampling: RolloutConfig = ROLLOUT, **options: Any) -> Any:
        config = EnvironmentConfig(factory, **options)
        encoder = PromptEncoder(tokenizer=tiny_tokenizer)
        scenarios = [Scenario(id=str(a), prompt=f"What is {a} + 14?", target=str(a + 14)) for a in (3, 58)]
        tokens = [list(prompt) for prompt in encoder.encode(scenarios, "data.train").tokens]
        batch = PromptBatch(tokens, [scenario.turns() for scenario in scenarios], scenarios, [0, 1], 0)
        told = lambda turn, conversations: None  # noqa: E731
        player, engine = Player.of(config, sampling, None, tiny_tokenizer, told), InProcessEngine(tiny_tokenizer)
        ended: dict[int, Any] = {}
        engine.sync(policy)
        seeds = sample_seeds(1, "train", 0, [0, 1], 3)
        limits = Limits(end_of_sequence_ids(policy.model, tiny_tokenizer), 128)
        on_ended = lambda n, conversation, reward: ended.update({n: (conversation, reward)})  # noqa: E731
        batch, rollout, metrics = Play(player, batch, 3, sampling, seeds, limits, engine).run(on_ended)
        return batch, rollout, [ended[n] for n in range(6)], metrics

    return play


@pytest.mark.parametrize("factory", [Asks, Opens], ids=["asks", "opens"])
def test_a_conversation_is_what_was_sampled_and_the_templates_text_between(
    play: Callable[..., Any], policy: Policy, tiny_tokenizer: Any, factory: Any
) -> None:
    batch, rollout, ended, metrics = play(factory, options={"times": 2})
    between = PromptEncoder(tokenizer=tiny_tokenizer).between_answers([Turn("user", "What is 5 + 9?")], "</s>")
    parts = zip(rollout.completions(), rollout.sampled_T.split(rollout.lengths_N.tolist()), ended, strict=True)
    for tokens, sampled_T, (conversation, reward) in parts:
        turns = [turn.content for turn in conversation.turns if turn.role == "assistant"]
        assert len(turns) == conversation.num_turns
        others = [token for token, is_sampled in zip(tokens, sampled_T.tolist(), strict=True) if not is_sampled]
        assert len(others) == (len(turns) - 1) * (len(others) // max(len(turns) - 1, 1))
        assert "What is 5 + 9?" in tiny_tokenizer.decode(others) or len(turns) == 1
        assert reward == sum(any(c.isdigit() for c in turn) for turn in turns[: len(conversation.rewards)])
    assert between
    masks = [part.tolist() for part in rollout.sampled_T.split(rollout.lengths_N.tolist())]
    groups = [
        Group(prompt, rollout.completions()[3 * p : 3 * p + 3], masks[3 * p : 3 * p + 3])
        for p, prompt in enumerate(batch.prompt_tokens)
    ]
    with torch.no_grad():
        scored_T, _ = policy.score(groups)
    torch.testing.assert_close(scored_T, rollout.logprobs_T[rollout.sampled_T], atol=1e-4, rtol=0)
    turns, conversations = metrics["conversation/turns"]
    assert conversations == 6
    assert turns == sum(conversation.num_turns for conversation, _ in ended) > 6


def test_tools_that_nobody_calls_are_counted_as_such(play: Callable[..., Any]) -> None:
    _, _, _, metrics = play(Tools, options={"functions": ["environments.plain_functions.add"]})
    assert {name: metrics[f"conversation/{name}"] for name in CALL_COUNTS} == dict.fromkeys(CALL_COUNTS, (0.0, 6.0))


def test_conversations_repeat_and_turns_have_noise_of_their_own(play: Callable[..., Any]) -> None:
    (_, first, *_), (_, again, *_) = play(Asks), play(Asks)
    assert first.completions() == again.completions()
    assert len({tuple(tokens) for tokens in first.completions()}) > 1


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"options": {"times": 0}}, "environment"),
        ({"options": {"times": 9}, "max_turns": 2}, "turns"),
        ({"options": {"times": 9}, "max_tokens": 12}, "tokens"),
        ({"options": {"times": 9}, "sampling": RolloutConfig(num_generations=3, max_new_tokens=1)}, "length"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_ends_a_conversation_is_counted(play: Callable[..., Any], options: dict[str, Any], cause: str) -> None:
    _, rollout, ended, metrics = play(Asks, **options)
    causes = [conversation.ended for conversation, _ in ended]
    assert cause in causes
    assert metrics[f"conversation/ended_by_{cause}"] == (float(causes.count(cause)), 6.0)
    cut = [reason == FinishReason.LENGTH for reason in rollout.finish_reasons]
    assert cut == [one in ("length", "tokens") for one in causes]


@pytest.mark.parametrize(("max_new_tokens", "limit"), [(4, 1024), (256, 2048)])
def test_short_answers_leave_room_for_replies(max_new_tokens: int, limit: int) -> None:
    assert EnvironmentConfig(Asks, max_turns=4).most_tokens(max_new_tokens) == limit
    assert EnvironmentConfig(Asks, max_turns=4, max_tokens=12).most_tokens(max_new_tokens) == max(12, max_new_tokens)


@pytest.mark.parametrize(
    ("context", "score"),
    [
        ({"environment_reward": None, "ended_by": "length"}, 0.0),
        ({"environment_reward": None, "ended_by": "tokens"}, 0.0),
        ({"environment_reward": 0.5, "ended_by": "length"}, 0.5),
        ({"environment_reward": None, "ended_by": "turns"}, None),  # the environment gives none: it does not apply
    ],
)
def test_a_conversation_that_is_cut_off_before_any_reward_has_none_to_its_credit(
    context: dict[str, Any], score: float | None
) -> None:
    assert EnvironmentReward().compute_reward([], context) == score


@pytest.mark.parametrize("factory", [Raises, Hangs, Nonsense, NoNumber, NeverBegins, Lies], ids=lambda f: f.__name__)
def test_an_environment_that_fails_never_trains(tmp_path: Path, factory: Any) -> None:
    made = iter(range(10_000))

    def some_fail() -> Any:
        return factory() if next(made) % 2 else Asks()

    environment = EnvironmentConfig(some_fail, max_turns=2, timeout=0.3)
    module = make_module(environment=environment, reward=EnvironmentReward(), max_reward_failures=1.0)
    fit(tmp_path, module, max_steps=1)
    sample, _ = module.state.sample_and_advantages
    failed = sample.scores.totals_N.isnan()
    assert 0 < failed.sum() < len(failed)
    assert {failure.error for failure in sample.scores.failures} <= {"EnvironmentFailure", "RuntimeError", "KeyError"}
    assert not module.episode.active_N[failed].any()


def test_a_failed_reset_leaves_its_group_its_prompt(play: Callable[..., Any]) -> None:
    made = iter(range(100))
    batch, rollout, ended, _ = play(lambda: NeverBegins() if next(made) % 3 == 0 else Opens())
    assert min(map(len, batch.prompt_tokens)) > 5
    failed = [conversation.failure is not None for conversation, _ in ended]
    assert failed == [length == 0 for length in rollout.lengths_N.tolist()]
    assert 0 < sum(failed) < 6


def test_where_all_environments_fail_nothing_is_sampled_nor_checked(tmp_path: Path) -> None:
    module = make_module(environment=NeverBegins, max_reward_failures=1.0)
    fit(tmp_path, module, max_steps=1, limit_val_batches=1, val_check_interval=1)
    assert module.metrics.last["conversation/ended_by_failure"] == 1


class Turns(Callback):
    def __init__(self) -> None:
        self.told: list[tuple[str, int, list[Any]]] = []

    async def on_turn_end(self, trainer: Any, pl_module: Any, turn: int, conversations: Any) -> None:
        assert trainer.lightning_module is pl_module
        self.told.append((str(trainer.state.stage.value), turn, list(conversations)))


def test_callbacks_are_told_of_each_turn_of_the_conversations_that_take_it(tmp_path: Path) -> None:
    turns, module = Turns(), make_module(environment=EnvironmentConfig(Asks, max_turns=2), rollout=ROLLOUT)
    fit(tmp_path, module, max_steps=1, callbacks=[turns], limit_val_batches=1, val_check_interval=1)
    places = [(stage, turn) for stage, turn, _ in turns.told]
    assert places == [("train", 1), ("train", 2), ("validate", 1), ("validate", 2)]
    first, second = turns.told[0][2], turns.told[1][2]
    assert len(first) == 12
    assert [one.id for one in second] == [one.id for one in first if not one.ended]
    assert {one.reply for one in first if not one.ended} == {(Turn("user", "What is 5 + 9?"),)}
    assert {(one.reply, one.ended) for one in second} <= {((), "turns"), ((), "environment"), ((), "length")}
    said = [text for text in module.state.collection.sample.rollout.texts if text.startswith("[assistant]")]
    assert sorted(one.text for one in second) == sorted(text.rpartition("[assistant] ")[2] for text in said)


class Refused(Asks):
    """Answers with a turn that the bundled template takes, and the one of this test does not."""

    def step(self, text: str) -> Any:
        return [{"role": "tool", "content": "5"}], None, False


def test_turns_that_a_template_refuses_fail_their_conversation(play: Callable[..., Any], tiny_tokenizer: Any) -> None:
    template = tiny_tokenizer.chat_template
    try:
        tiny_tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
            + template
        )
        _, _, ended, metrics = play(Refused)
    finally:
        tiny_tokenizer.chat_template = template
    assert "no tools" in str(next(c.failure for c, _ in ended if c.failure))
    assert metrics["conversation/ended_by_failure"][0] > 0


class Closes(Asks):
    closed: ClassVar[list[int]] = []

    def close(self) -> None:
        self.closed.append(1)


class Remembers(Closes):
    closed: ClassVar[list[int]] = []

    def step(self, text: str) -> Any:
        self.last = text
        return super().step(text)


def plain_function(turns: Any, context: Any) -> float:
    return float("environments" not in context)


def test_environments_are_closed_however_they_end(play: Callable[..., Any]) -> None:
    class Fails(Closes):
        def step(self, text: str) -> Any:
            raise RuntimeError("gone")

    for factory in (Closes, Fails):
        Closes.closed.clear()
        play(factory)
        deadline = time.monotonic() + 5
        while len(Closes.closed) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(Closes.closed) == 6


@pytest.mark.parametrize("takes_lists", [True, False])
def test_rewards_get_the_environment_that_the_conversation_was_with_before_it_is_closed(
    tmp_path: Path, takes_lists: bool
) -> None:
    Remembers.closed.clear()
    seen: list[tuple[Remembers, str, int]] = []

    def of_one(completion: str, environments: list[Remembers]) -> float:
        seen.extend((environment, completion, len(Remembers.closed)) for environment in environments)
        return float(len(environments))

    def of_lists(completions: list[str], environments: list[Remembers], **kwargs: Any) -> list[float]:
        return [of_one(completions[0], environments)]

    def plain(turns: Any, context: Any) -> float:
        return float("environments" not in context)

    slow = FunctionReward(plain_function, timeout=60)  # in a process, to which no environment can be sent
    rewards = [of_lists if takes_lists else of_one, plain, slow]
    module = make_module(environment=EnvironmentConfig(Remembers, max_turns=2), reward=rewards)
    fit(tmp_path, module, max_steps=1)
    assert module.metrics.last["reward/plain"] == module.metrics.last["reward/plain_function"] == 1
    assert len({id(environment) for environment, *_ in seen}) == len(seen) == 16
    assert all(environment.last == completion and not closed for environment, completion, closed in seen)
    deadline = time.monotonic() + 5
    while len(Remembers.closed) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(Remembers.closed) == 16


def test_a_reward_that_cannot_have_an_environment_is_refused(tmp_path: Path) -> None:
    def asks(completions: Any, environments: Any) -> list[float]:
        return [1.0]

    def may_have_none(completions: Any, environments: Any = None) -> list[float]:
        return [float(environments is None)]

    with pytest.raises(
        ConfigError, match=r"reward 'asks' takes environments, and there are none: set model\.environment"
    ):
        fit(tmp_path, make_module(reward=asks))
    with pytest.raises(ConfigError, match=r"reward 'asks' takes environments, which live .* leave out timeout"):
        make_module(reward=asks, environment=Asks, reward_timeout=5.0)
    assert (
        fit(tmp_path, make_module(reward=may_have_none), max_steps=1).lightning_module.metrics.last["train/reward"] == 1
    )


def test_a_single_turn_is_todays_run_bit_by_bit(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", make_module())
    played = fit(tmp_path / "played", make_module(environment=EnvironmentConfig(Asks, max_turns=1)))
    a, b = weights(plain), weights(played)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_of_conversations_learns_from_sampled_tokens_alone(tmp_path: Path) -> None:
    module = make_module(environment=Asks, rollout=ROLLOUT)
    fit(tmp_path, module, limit_val_batches=1, val_check_interval=1)
    last = module.metrics.last
    assert last["conversation/turns"] > 1
    assert last["policy/sampling_difference"] < 1e-4
    assert module.episode.sampled_T is not None


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(Exception, match=r"model.environment.factory='nowhere.Nothing' cannot be imported"):
        EnvironmentConfig("nowhere.Nothing").factories()
    with pytest.raises(Exception, match=r"factory=5 is no class or function"):
        EnvironmentConfig(5)


def test_a_run_resumed_inside_an_episode_of_conversations_ends_bit_by_bit_as_if_not(tmp_path: Path) -> None:
    def run(name: str, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        keep_all = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"callbacks": [keep_all], "enable_checkpointing": True, "max_steps": 4}
        module = make_module(environment=EnvironmentConfig(Opens, options={"times": 2}), rollout=ROLLOUT)
        data = make_data(validation=None, num_iterations=2)
        return weights(fit(tmp_path, module, data, ckpt_path=ckpt_path, **options))

    straight = run("straight")
    for cut in (1, 2):  # inside an episode, and between two
        resumed = run(f"from-{cut}", tmp_path / "straight" / f"step={cut}.ckpt")
        assert all(torch.equal(resumed[name], value) for name, value in straight.items()), f"resumed from step {cut}"


class TakesItsTime(Asks):
    """Answers after a while that differs from run to run."""

    pauses: ClassVar[Iterator[int]]

    def step(self, text: str) -> tuple[str, float, bool]:
        time.sleep(next(self.pauses) % 7 / 100)
        return super().step(text)


def test_conversations_are_the_same_whoever_answers_first(play: Callable[..., Any]) -> None:
    played = []
    for step in (1, 3, 5):
        TakesItsTime.pauses = count(step, step)
        batch, rollout, ended, _ = play(TakesItsTime, options={"times": 2}, parts=2)
        logprobs = torch.where(rollout.sampled_T, rollout.logprobs_T, torch.zeros(1))
        played.append((batch.prompt_tokens, rollout.completions(), logprobs.tolist(), [r for _, r in ended]))
    assert played[0] == played[1] == played[2]
    whole = play(Asks, options={"times": 2})[1]
    assert whole.completions() == played[0][1]


class WaitsForTheOther(Asks):
    """That of the first scenario answers when the second one's conversations have gone on."""

    other_went_on = threading.Event()

    def step(self, text: str) -> tuple[str, float, bool]:
        if "58" not in self.scenario["prompt"]:
            assert self.other_went_on.wait(10)
        elif self.left == 0:
            self.other_went_on.set()
        return super().step(text)


@pytest.mark.parametrize("parts", [1, 2])
def test_conversations_are_the_same_whether_or_not_their_caches_are_kept(
    play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    prefilled: list[int] = []
    admit = RunningBatch.admit

    def counted(batch: RunningBatch, prompts: Any, rows: Any) -> None:
        if batch.max_new_tokens == ROLLOUT.max_new_tokens:  # not those of the probe
            prefilled.append(len(prompts))
        admit(batch, prompts, rows)

    monkeypatch.setattr(RunningBatch, "admit", counted)
    _, kept, _, _ = play(Asks, options={"times": 3}, parts=parts)
    assert prefilled == [2 // parts] * parts  # first turns alone
    monkeypatch.setattr(InProcessEngine, "keeping_caches", nullcontext)
    _, anew, _, metrics = play(Asks, options={"times": 3}, parts=parts)
    assert len(prefilled) > 3 * parts
    assert metrics["conversation/turns"][0] > 12
    assert kept.completions() == anew.completions()
    torch.testing.assert_close(kept.logprobs_T, anew.logprobs_T, atol=1e-4, rtol=0)


def test_parts_do_not_wait_for_each_others_environments(play: Callable[..., Any]) -> None:
    WaitsForTheOther.other_went_on.clear()
    assert play(WaitsForTheOther, timeout=0.5)[3]["conversation/ended_by_failure"] == (3.0, 6.0)
    WaitsForTheOther.other_went_on.clear()
    _, _, ended, _ = play(WaitsForTheOther, parts=2)
    assert not any(conversation.failure for conversation, _ in ended)
    assert play(Asks, parts=9)[3]["conversation/turns"] == play(Asks)[3]["conversation/turns"]


class Own(Asks):
    """Begins each conversation in its own way, whatever the seed."""

    made = 0

    def reset(self, scenario: Mapping[str, Any], seed: int) -> str:  # type: ignore[override]
        Own.made += 1
        return f"What is {Own.made} + 1?"


def test_conversations_of_a_group_that_begin_differently_share_what_they_have_in_common(
    play: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    batch, rollout, ended, _ = play(Own, options={"times": 0})
    for n, (tokens, (conversation, _)) in enumerate(zip(rollout.completions(), ended, strict=True)):
        whole = tiny_tokenizer.decode([*batch.prompt_tokens[n // 3], *tokens])
        assert conversation.turns[-2].content in whole
    assert len({conversation.turns[-2].content for conversation, _ in ended}) == 6
    assert not rollout.sampled_T[0]
