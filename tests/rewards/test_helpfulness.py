"""HelpfulnessReward: relevant answers score high, gaming does not pay."""

import pytest

from stateset_lightning.rewards import HelpfulnessReward
from stateset_lightning.types import Turn

PHOTOSYNTHESIS = "What is photosynthesis?"
GRAVITY = "Explain how gravity keeps the moon in orbit"
GOOD = "Photosynthesis is the process by which plants turn sunlight, water and carbon dioxide into sugar and oxygen."


def result(prompt, answer, target=None):
    return HelpfulnessReward(weight=1.0).compute_reward(
        [Turn("user", prompt), Turn("assistant", answer)], {"target": target}
    )


def score(prompt, answer, target=None):
    value = result(prompt, answer, target).score
    assert 0 <= value <= 1
    return value


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PHOTOSYNTHESIS, GOOD),
        (PHOTOSYNTHESIS, f"Sure! {GOOD}"),
        (
            "What is Python?",
            "Python is a programming language known for readable code. It is used for web servers and data analysis.",
        ),
        (
            GRAVITY,
            "Gravity pulls the Moon toward Earth while it moves sideways,"
            " so it keeps falling around the planet in an orbit.",
        ),
        (
            "My order has not arrived. What can I do?",
            "Your order may be delayed: check the tracking link, and if it has not arrived by "
            "Friday, contact the carrier or ask us for a refund.",
        ),
    ],
)
def test_relevant_answers_score_high(prompt, answer):
    assert score(prompt, answer) > 0.6


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        (PHOTOSYNTHESIS, ""),
        (PHOTOSYNTHESIS, " \n...!"),
        (PHOTOSYNTHESIS, "Great question! I'd be happy to help. Thank you for asking. I hope this helps!"),
        (
            PHOTOSYNTHESIS,
            (
                "Certainly! Here is the answer to your question. Let me know if you have any other questions. Feel free"
                " to ask."
            ),
        ),
        (PHOTOSYNTHESIS, "I'm sorry, but I can't help with that. As an AI language model I don't know."),
        (PHOTOSYNTHESIS, "photosynthesis " * 50),
        (PHOTOSYNTHESIS, "What is photosynthesis? What is photosynthesis?"),
        (GRAVITY, GRAVITY + "."),
        (GRAVITY, "gravity moon orbit keeps"),
        (GRAVITY, "gravity moon orbit force planet mass acceleration satellite velocity earth"),
        (GRAVITY, "The gravity of the moon keeps the gravity in the orbit of the moon. " * 10),
        (PHOTOSYNTHESIS, "the of and is to a in that it was"),
    ],
)
def test_empty_stock_echoed_and_stuffed_answers_score_low(prompt, answer):
    assert score(prompt, answer) < 0.2


def test_off_topic_prose_scores_far_below_an_answer():
    off_topic = "The best pizza in town is served at the corner by a friendly waiter."
    assert score(PHOTOSYNTHESIS, off_topic) < 0.4 < score(PHOTOSYNTHESIS, GOOD)


def test_padding_costs():
    filler = " ".join(f"The number {i} of the list stands beside w{i} in the box {i * i}." for i in range(300))
    assert score(PHOTOSYNTHESIS, f"{GOOD} {filler}") < 0.5 * score(PHOTOSYNTHESIS, GOOD)
    assert score(PHOTOSYNTHESIS, f"{GOOD} " * 10) < 0.3


def test_stock_phrases_and_the_question_in_front_only_cost():
    assert score(PHOTOSYNTHESIS, f"Great question! I'd be happy to help. {GOOD}") < score(PHOTOSYNTHESIS, GOOD)
    assert score(PHOTOSYNTHESIS, f"{PHOTOSYNTHESIS} {GOOD}") < score(PHOTOSYNTHESIS, GOOD)


def test_agreement_with_a_target_decides():
    question = "What is the capital of France?"
    right, wrong = (score(question, f"{city} is the capital of France.", "Paris") for city in ("Paris", "Lyon"))
    assert right > 0.6 > 0.2 > wrong
    assert score(question, "Paris", "Paris") > 0.6
    assert score(question, "Paris", ["Lutetia", "Paris"]) > 0.6
    assert score("What is 8 times 9?", "It is 72.", 72) > 0.6
    assert score("What is 8 times 9?", "It is 721.", 72) < 0.4


def test_breakdown_gives_the_parts():
    parts = result(PHOTOSYNTHESIS, GOOD, "plants turn light into sugar").breakdown
    assert set(parts) == {
        "relevance",
        "informativeness",
        "prose",
        "stock",
        "repetition",
        "echo",
        "brevity",
        "agreement",
    }
    assert parts["relevance"] == 1.0
    assert parts["agreement"] == 0.75  # plant, turn, sugar; not light


def test_it_is_deterministic_and_needs_no_context():
    turns = [Turn("user", PHOTOSYNTHESIS), Turn("assistant", GOOD)]
    assert HelpfulnessReward().compute_reward(turns).score == HelpfulnessReward().compute_reward(turns).score > 0.6
    assert HelpfulnessReward().compute_reward([]).score == 0
