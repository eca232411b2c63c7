"""Rewards that see all completions of a prompt: when they run, on what, and what their failures are."""

import asyncio
import math
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from judge_server import serving
from module_runs import DigitReward, fit, make_data, make_module

from stateset_lightning import RewardFunction, RolloutConfig
from stateset_lightning.algorithm import ReMax
from stateset_lightning.errors import ConfigError
from stateset_lightning.evaluation import EvaluationConfig
from stateset_lightning.rewards import (
    ExactMatch,
    GroupReward,
    RelativeJudge,
    RelativeLength,
    Scorer,
    as_rewards,
    failure_counts,
)
from stateset_lightning.types import NOT_APPLICABLE, Turn

NAN = math.nan


def run(rewards, groups, lengths=None, **options):
    """Scores of groups of answers, each to a prompt of its own; all of one size."""
    size = len(groups[0])
    with Scorer(rewards, **options) as scorer, scorer.start(len(groups) * size, num_generations=size) as session:
        # The last first: what a reward gets does not depend on which completion ends when.
        for n in reversed(range(len(groups) * size)):
            answer = groups[n // size][n % size]
            turns = [Turn("user", f"q{n // size}"), Turn("assistant", answer)]
            columns = {"id": f"s{n // size}", "target": "4", "hints": ["a"]}
            session.submit(n, turns, columns, completion_tokens=len(answer) if lengths is None else lengths[n])
        return session.collect()


class Fails(RewardFunction):
    """Fails on `bad`, and does not apply to `none`."""

    def compute_reward(self, turns, context=None):
        text = turns[-1].content
        if text == "bad":
            raise ValueError("bad")
        return None if text == "none" else float(len(text))


class Rank(GroupReward):
    """The place of each answer by length; keeps what it was called with."""

    def __init__(self, **common):
        super().__init__(**common)
        self.calls = []

    def compute_rewards(self, conversations_G, context, scores):
        texts = [turns[-1].content for turns in conversations_G]
        self.calls.append((conversations_G[0][0].content, texts, dict(context), dict(scores)))
        return [sorted(texts, key=len).index(text) for text in texts]


def test_it_sees_the_whole_group_in_order_with_the_other_rewards_scores():
    rank = Rank()
    scores = run(
        [rank, Fails(name="length"), ExactMatch(), Rank(name="other")], [["bb", "4", "bad"], ["none", "c", "dd"]]
    )
    first, second = sorted(rank.calls, key=lambda call: call[0])
    assert first[:2] == ("q0", ["bb", "4", "bad"])
    assert second[:2] == ("q1", ["none", "c", "dd"])
    assert (first[2]["target"], first[2]["completion_tokens"], first[2]["hints"]) == ("4", [2, 1, 3], ["a"])
    assert first[3].keys() == {"length", "exact_match"}
    assert first[3]["length"][:2] == [2.0, 1.0]
    assert math.isnan(first[3]["length"][2])
    assert second[3] == {"length": [None, 1.0, 2.0], "exact_match": [0.0, 0.0, 0.0]}
    assert scores.values_NF[:, 0].tolist() == [1.0, 0.0, 2.0, 2.0, 0.0, 1.0]
    assert scores.totals_N[:2].tolist() == [1 + 2 + 0 + 1, 0 + 1 + 1 + 0]
    assert scores.totals_N[2].isnan()


class Async(GroupReward):
    """Waits for the others: works only if several prompts are scored at a time."""

    def __init__(self, **common):
        super().__init__(**common)
        self.inside = 0

    async def compute_rewards(self, conversations_G, context, scores):
        self.inside += 1
        deadline = time.monotonic() + 30
        while self.inside < 3 and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return [float(self.inside == 3)] * len(conversations_G)


class Blocking(GroupReward):
    def __init__(self, **common):
        super().__init__(**common)
        self.barrier = threading.Barrier(3)

    def compute_rewards(self, conversations_G, context, scores):
        self.barrier.wait(30)
        return [1.0] * len(conversations_G)


@pytest.mark.parametrize("reward", [Async(), Blocking()], ids=["async", "blocking"])
def test_several_prompts_are_scored_at_a_time(reward):
    assert run(reward, [["a", "b"]] * 3).totals_N.tolist() == [1.0] * 6


class Returns(GroupReward):
    """Returns what the first answer of the group names."""

    def compute_rewards(self, conversations_G, context, scores):
        context["hints"].append("seen")
        return {
            "fine": [1.0, (0.5, {"why": "half"})],
            "one fails": [NAN, 2.0],
            "an exception": [ValueError("this one"), 2.0],
            "one does not apply": [None, 2.0],
            "too few": [1.0],
            "too many": iter(lambda: 1.0, None),
            "nothing": None,
        }[conversations_G[0][-1].content]


@pytest.mark.parametrize(
    ("what", "values", "failures"),
    [
        ("fine", [1.0, 0.5], {}),
        ("one fails", [NAN, 2.0], {"reward_failures/returns/RewardError": 1}),
        ("an exception", [NAN, 2.0], {"reward_failures/returns/ValueError": 1}),
        ("one does not apply", [NOT_APPLICABLE, 2.0], {"reward_failures/all/NotApplicable": 1}),
        ("too few", [NAN, NAN], {"reward_failures/returns/RewardError": 2}),
        ("too many", [NAN, NAN], {"reward_failures/returns/RewardError": 2}),
        ("nothing", [NAN, NAN], {"reward_failures/returns/RewardError": 2}),
        ("no such key", [NAN, NAN], {"reward_failures/returns/KeyError": 2}),
    ],
)
def test_a_failure_is_no_zero_and_stays_in_its_group(what, values, failures, caplog):
    scores = run(Returns(), [[what, "b"], ["fine", "b"]])
    expected = torch.tensor([*values, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(scores.values_NF[:, 0], expected, equal_nan=True)
    assert failure_counts(scores) == failures
    assert sum("'returns' changes its columns" in record.message for record in caplog.records) <= 1


class Slow(GroupReward):
    def compute_rewards(self, conversations_G, context, scores):
        if conversations_G[0][-1].content == "hang":
            time.sleep(60)
        return [float(len(scores))] * len(conversations_G)


def test_a_time_out_is_of_one_prompt_and_its_process_is_killed():
    scores = run([Slow(timeout=3), ExactMatch(weight=0.0)], [["hang", "a"], ["b", "c"]])
    assert failure_counts(scores) == {"reward_failures/slow/TimeoutError": 2}
    assert scores.totals_N[2:].tolist() == [1.0, 1.0]


def test_of_one_completion_it_says_nothing_and_that_is_said_once(caplog):
    with Scorer([Rank(), ExactMatch()]) as scorer:
        for _ in range(2):
            with scorer.start(2) as session:
                for n in range(2):
                    session.submit(n, [Turn("user", "q"), Turn("assistant", "4")], {"target": "4"})
                scores = session.collect()
    assert scores.values_NF.tolist() == [[NOT_APPLICABLE, 1.0]] * 2
    assert scores.totals_N.tolist() == [1.0, 1.0]
    assert sum("'rank' compares the completions of a prompt" in record.message for record in caplog.records) == 1


class Wrong(GroupReward):
    def compute_rewards(self, conversations_G, context):
        return []


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            [RelativeLength("exact"), ExactMatch()],
            "'relative_length' reads the scores of exact, but there is exact_match",
        ),
        ([RelativeLength("relative_length")], "reads the scores of relative_length, but there is no other reward"),
        (
            [Wrong()],
            r"'wrong' must accept \(conversations, context, scores\), but has compute_rewards\(conversations_G",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(rewards, message):
    with pytest.raises(ConfigError, match=message):
        as_rewards(rewards)


def test_a_greedy_baseline_cannot_be_compared(tmp_path):
    module = make_module(reward=[DigitReward(), Rank()], algorithm=ReMax())
    with pytest.raises(ConfigError, match="reward 'rank' compares the completions of a prompt, and this algorithm"):
        fit(tmp_path, module)


def test_the_example_of_the_page_works():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    namespace = {}
    exec(page.partition("## Rewards that compare")[2].partition("```python\n")[2].partition("```")[0], namespace)
    scores = run([namespace["Rare"](), ExactMatch(weight=0.0)], [["4", "4", "5", "4 "]])
    assert scores.totals_N.tolist() == [0.5, 0.5, 0.0, 1.0]


# In a run -------------------------------------------------------------------------------------------------------------


class Shortest(GroupReward):
    """1 for the shortest of a group; all completions must be of one prompt, whose columns these are."""

    sizes: set = set()

    def compute_rewards(self, conversations_G, context, scores):
        assert {turns[0].content for turns in conversations_G} == {context["prompt"]}
        assert len(scores["digit"]) == len(context["completion_tokens"]) == len(conversations_G)
        self.sizes.add(len(conversations_G))
        shortest = min(len(turns[-1].content) for turns in conversations_G)
        return [float(len(turns[-1].content) == shortest) for turns in conversations_G]


@pytest.mark.parametrize("dynamic_sampling", [0, 2])
def test_it_trains_and_validation_with_samples_has_it_too(tmp_path, dynamic_sampling):
    rollout = RolloutConfig(num_generations=4, max_new_tokens=5, dynamic_sampling=dynamic_sampling)
    reward = Shortest()
    reward.sizes = set()
    options = {"rollout": rollout, "evaluation": EvaluationConfig(samples=3)}
    module = make_module(reward=[reward, DigitReward()], **options)
    trainer = fit(tmp_path, module, limit_val_batches=1, val_check_interval=2, max_steps=2)
    assert reward.sizes == {4, 3}
    metrics = trainer.callback_metrics
    assert 0 < metrics["reward/shortest"] <= 1
    assert metrics["val/reward"].isfinite()
    assert "val/reward/shortest" not in metrics
    assert metrics["val/avg@3"] > metrics["val/reward"]


def test_a_run_of_such_rewards_alone_validates_what_is_held_out(tmp_path):
    reward = Shortest()
    module = make_module(reward=[reward, DigitReward(weight=0.0)])
    trainer = fit(tmp_path, module, limit_val_batches=1, val_check_interval=2, max_steps=2)
    assert trainer.global_step == 2
    assert trainer.callback_metrics["val/reward/digit"].isfinite()


# Relative length ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "lengths", "expected"),
    [
        # by hand: 0.5 - (length - 2) / (6 - 2); the wrong one is shorter than all right ones
        (["4", "4", "4", "5"], [2, 3, 6, 1], [0.5, 0.25, -0.5, 0.0]),
        (["4", "5", "5", "5"], [2, 3, 6, 1], [0.0] * 4),
        (["4", "4", "5", "5"], [3, 3, 6, 1], [0.0] * 4),
        (["5", "5", "5", "5"], [2, 3, 6, 1], [0.0] * 4),
    ],
)
def test_among_the_right_answers_shorter_is_better(answers, lengths, expected):
    scores = run([RelativeLength("exact_match"), ExactMatch(weight=0.0)], [answers], lengths)
    assert scores.totals_N.tolist() == expected


# The relative judge ---------------------------------------------------------------------------------------------------

TEXT = re.compile(r"<answer-(\d+)-([0-9a-f]{16})>\n(.*?)\n</answer-\1-\2>", re.DOTALL)


@pytest.fixture
def server():
    with serving() as server:
        yield server


def by_length(request):
    """Scores answers by their lengths, at most 10, in the order in which they are shown."""
    shown = TEXT.findall(request["messages"][1]["content"])
    assert [int(number) for number, _, _ in shown] == list(range(1, len(shown) + 1))
    return f"Hm.\nScores: {', '.join(str(min(10, len(text))) for _, _, text in shown)}"


def judge(server, **options):
    return RelativeJudge("m", "Longer is better than {target}.", base_url=server.url, **options)


def test_all_answers_of_a_prompt_are_judged_in_one_request(server):
    server.replies = [by_length]
    reward = judge(server)
    groups = [["aaa", "b", "aaa", "dddddddddddd"], ["ee", "f", "gggg", "hhhhh"]]
    scores = run(reward, groups)
    assert scores.totals_N.tolist() == pytest.approx([0.3, 0.1, 0.3, 1.0, 0.2, 0.1, 0.4, 0.5])
    assert scores.breakdowns[0]["relative_judge"]["score"] == 3
    assert len(server.requests) == 2
    for request in server.requests:
        instructions, material = (message["content"] for message in request["messages"])
        shown = TEXT.findall(material)
        assert f"{len(shown)} numbers" in instructions
        assert "Longer is better than 4." in instructions
        assert len({mark for _, mark, _ in shown}) == 1  # which no answer holds, since it is a hash of them
        assert sorted(text for *_, text in shown) in [sorted({*group}) for group in groups]
    assert run(reward, groups).totals_N.tolist() == scores.totals_N.tolist()
    counts = reward.take_counts()
    assert (counts["calls"], counts["cache_hits"], counts["prompt_tokens"]) == (2, 2, 200)


def test_the_order_of_answers_depends_on_them_alone_and_favours_no_place(server):
    server.replies = [by_length]
    reward = judge(server)
    run(reward, [["a", "bb", "ccc"], ["ccc", "a", "bb"]])
    orders = [[text for *_, text in TEXT.findall(r["messages"][1]["content"])] for r in server.requests]
    assert sorted(orders[0]) == ["a", "bb", "ccc"]
    server.requests.clear()
    run(reward, [[f"first {i}", f"second {i}"] for i in range(64)])
    places = [TEXT.findall(request["messages"][1]["content"])[0][2].startswith("first") for request in server.requests]
    assert 16 < sum(places) < 48


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("Scores: 1", "does not end with a line 'Scores: ...' of 2"),
        ("Scores: 1, 2, 3", "of 2"),
        ("Scores: 1, 11", "the judge's score is 'Scores: 1, 11', outside 0 to 10"),
        ("the first is better", "does not end with a line 'Scores: ...' of 2"),
        (("Scores: 1, 2", "length"), "was cut off"),
        (404, "no"),
    ],
)
def test_any_other_reply_fails_the_prompt_and_names_the_server(server, reply, message):
    server.replies = [reply]
    scores = run(judge(server, max_retries=0), [["a", "b"]])
    assert scores.totals_N.isnan().all()
    assert len(scores.failures) == 2
    assert scores.failures[0].message.startswith(f"{server.url}: ")
    assert message in scores.failures[0].message


@pytest.mark.parametrize(
    "reply", ["Scores: [7, 9.5]", "**Scores: 7; 9.5**", "scores: 7 9.5", "So:\n\nScores: 7, 9.5.\n"]
)
def test_the_ways_in_which_models_write_a_line_of_scores(server, reply):
    server.replies = [reply]
    assert sorted(run(judge(server), [["a", "b"]]).totals_N.tolist()) == [0.7, 0.95]


def test_the_judge_trains(server, tmp_path):
    server.replies = [by_length]
    module = make_module(reward=[judge(server), DigitReward(weight=0.5)])
    fit(tmp_path, module, make_data(), max_steps=1)
    assert module.metrics.last["cost/relative_judge/calls"] + module.metrics.last["cost/relative_judge/cache_hits"] == 4


@pytest.mark.parametrize("made", [lambda n: dict.fromkeys(range(n), 1.0), lambda n: {float(i) for i in range(n)}])
def test_a_mapping_or_set_is_no_list_of_scores(made):
    """Its keys would be taken for scores, and a set has no order."""

    class Mapped(GroupReward):
        def compute_rewards(self, conversations, context, scores):
            return made(len(conversations))

    with Scorer([Mapped()]) as scorer, scorer.start(2, num_generations=2) as session:
        for n in range(2):
            session.submit(n, [Turn("user", "q"), Turn("assistant", "a")], {"target": "4"})
        scores = session.collect()
    assert scores.values_NF.isnan().all()
    assert "must return a list of 2 scores" in scores.failures[0].message
