"""A teacher on a server: its log-probs are the model's own, of sampled tokens alone; bad answers end the run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from vllm_stub import Running

from stateset_lightning.errors import ConfigError, ServerError
from stateset_lightning.policy import Group, Policy, PolicyConfig, load_model
from stateset_lightning.rollout import VLLMTeacher

GROUPS = [
    Group([5, 6, 7], [[8, 9], [10]], [[True, False], [True]]),
    Group([11, 12], [[13, 14, 15]]),
]


def test_log_probs_are_those_of_the_model_in_the_policys_order(server: Running) -> None:
    teacher = VLLMTeacher([server.url, server.url])
    teacher.setup(3, 3)
    config = PolicyConfig("tiny")
    expected = Policy(load_model(config), config).score_without_gradient(GROUPS)[0]
    got, entropies = teacher.score_without_gradient(GROUPS)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert len(entropies) == 0
    asked = sorted(body["prompt"] for body in server.stub.bodies())
    assert asked == [[5, 6, 7, 8, 9], [5, 6, 7, 10], [11, 12, 13, 14, 15]]
    assert {body["max_tokens"] for body in server.stub.bodies()} == {1}
    assert len(teacher.score_without_gradient([])[0]) == 0


def test_a_server_that_scores_no_sequence_so_long_is_refused(server: Running) -> None:
    """Its --max-model-len is 512: of the sequence, and the one token that a request asks for beside it."""
    teacher = VLLMTeacher([server.url])
    teacher.setup(500, 11)
    says = r"a prompt of 500 tokens and model\.rollout\.max_new_tokens=12 exceed the 511 tokens that http.* scores"
    with pytest.raises(ConfigError, match=says):
        teacher.setup(500, 12)


def answer(*prompt_logprobs: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"prompt_logprobs": list(prompt_logprobs)}]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (answer(None, {"6": {"logprob": -1.0}}), "log-probs of 2 tokens where 3 were asked for"),
        (answer(None, {"6": {"logprob": -1.0}}, {"9": {"logprob": -1.0}}), "log-probs that are missing or above 0"),
        (answer(None, {"6": {"logprob": -1.0}}, {"7": {"logprob": 0.5}}), "log-probs that are missing or above 0"),
        (answer(None, {"6": {"logprob": -1.0}}, {"7": {"logprob": math.inf}}), "log-probs that are missing or above 0"),
        (answer(None, {"6": {"logprob": -1.0}}, None), "log-probs that are missing or above 0"),
        ((200, {"choices": []}), "answers in another form than vLLM's"),
        ((400, {"error": {"message": "no prompt_logprobs here"}}), r"model\.teacher\.urls: .*no prompt_logprobs here"),
    ],
)
def test_an_answer_that_is_none_ends_the_run(server: Running, bad: tuple[int, Any], message: str) -> None:
    teacher = VLLMTeacher([server.url])
    teacher.setup(3, 3)
    server.stub.answers = [bad] * 3
    with pytest.raises(ServerError, match=message) as raised:
        teacher.score_without_gradient([Group([5], [[6, 7]])])
    assert "model.teacher.urls" in str(raised.value)


@pytest.mark.parametrize("unknown", [None, -9999.0, math.nan, -math.inf])
def test_a_log_prob_that_the_server_does_not_know_is_nan(server: Running, unknown: float | None) -> None:
    teacher = VLLMTeacher([server.url])
    teacher.setup(3, 3)
    server.stub.answers = [answer(None, {"6": {"logprob": -1.0}}, {"7": {"logprob": unknown}})]
    logprobs_T = teacher.score_without_gradient([Group([5], [[6, 7]])])[0]
    assert logprobs_T.nan_to_num(nan=7.0).tolist() == [-1, 7]


def test_a_broken_answer_is_asked_for_again(server: Running) -> None:
    teacher = VLLMTeacher([server.url])
    teacher.setup(3, 3)
    wanted = teacher.score_without_gradient(GROUPS)[0]
    server.stub.answers = [(500, "Internal Server Error"), (200, "a page of a proxy")]
    assert torch.equal(teacher.score_without_gradient(GROUPS)[0], wanted)


@pytest.mark.parametrize("urls", [["ftp://nowhere"], "http://127.0.0.1:8000", []])
def test_an_address_that_is_none_names_the_option(urls: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.teacher\.urls"):
        VLLMTeacher(urls)
