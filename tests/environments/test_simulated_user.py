"""SimulatedUser against a server on loopback that answers as told: requests, ends, failures, costs, the cache."""

import asyncio

import pytest
from judge_server import serving

from stateset_lightning.environments import EnvironmentFailure, Reply, SimulatedUser, simulated_user
from stateset_lightning.environments.base import as_reply, as_turns, tool_methods
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.types import Turn

INSTRUCTIONS = "You are {name} and wait for a parcel."
ROW = {"id": "s1", "prompt": "Where is it?", "messages": None, "context": "Be brief.", "name": "Ada {x}"}
UNASKED = {**ROW, "prompt": None}
TOLD = """You play the user in a conversation with an assistant. Who you are, and what you want:

You are Ada {x} and wait for a parcel.

Write what this user says next and nothing else: no notes, no name in front. Stay this user whatever the assistant \
says, and do none of the assistant's work. When you have got what you want, or would give up, answer \
with [END] alone."""
GREETING = ("user", "Hello, how can I help you?")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(simulated_user, "_clients", {})  # a later server may get an earlier one's port
    with serving() as server:
        server.replies = ["At what time?"]
        yield server


def user(server, **options):
    return SimulatedUser("m", INSTRUCTIONS, base_url=server.url, **options)


def play(environment, *said, row=ROW, seed=7):
    """What the environment gives at its reset and for each text."""

    async def play_() -> list[object]:
        given = [await environment.reset(row, seed)]
        return given + [await environment.step(text) for text in said]

    return asyncio.run(play_())


def chat(request):
    return [(message["role"], message["content"]) for message in request["messages"]]


def costs(reply):
    return {name.removeprefix("cost/simulated_user/"): count for name, count in reply.counts.items()}


def test_what_is_asked_and_what_comes_of_it(server):
    server.replies = ["At what time?\n", "Thanks."]
    opening, first, second = play(user(server), "It comes today.", "At noon.")
    assert opening is None
    assert first == as_reply(first) == Reply((Turn("user", "At what time?"),), None, False, first.counts)
    assert second.turns == (Turn("user", "Thanks."),)
    begin = [("system", TOLD), GREETING, ("assistant", "Where is it?"), ("user", "It comes today.")]
    assert [chat(request) for request in server.requests] == [
        begin,
        [*begin, ("assistant", "At what time?"), ("user", "At noon.")],
    ]
    for request in server.requests:
        assert {**request, "messages": 0} == {"model": "m", "messages": 0, "max_completion_tokens": 512, "seed": 7}


def test_an_environment_that_is_reset_begins_anew(server):
    environment = user(server, request={"temperature": 0.5}, max_tokens=9)
    for seed in (1, 2):
        play(environment, "It comes today.", seed=seed)
    first, second = server.requests
    assert first == {**second, "seed": 1}
    assert (first["temperature"], first["max_completion_tokens"]) == (0.5, 9)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("system", "Secret."), ("user", "a")], [GREETING, ("assistant", "a"), ("user", "b")]),
        ([("assistant", "Hi."), ("user", "a")], [("user", "Hi."), ("assistant", "a"), ("user", "b")]),
        ([("user", "a"), ("user", "c")], [GREETING, ("assistant", "a\n\nc"), ("user", "b")]),
        (
            [("user", "a"), ("assistant", "c"), ("tool", "t"), ("assistant", "d"), ("user", "e")],
            [GREETING, ("assistant", "a"), ("user", "c\n\nd"), ("assistant", "e"), ("user", "b")],
        ),
        ([("user", "a"), ("assistant", "I say: ")], [GREETING, ("assistant", "a"), ("user", "I say: b")]),
    ],
    ids=["system", "assistant first", "two of the user", "tools", "prefill"],
)
def test_the_roles_are_turned_round(server, turns, expected):
    row = {**UNASKED, "messages": tuple(Turn(*turn) for turn in turns)}
    opening, _ = play(user(server), "b", row=row)
    assert opening is None
    assert chat(server.requests[0]) == [("system", TOLD), *expected]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [(None, GREETING), ((Turn("assistant", "Hi."),), ("user", "Hi."))],
    ids=["none", "greeted"],
)
def test_without_a_turn_of_the_user_it_says_the_first_words(server, messages, expected):
    server.replies = ["I wait for a parcel.", "At what time?"]
    opening, reply = play(user(server), "It comes today.", row={**UNASKED, "messages": messages})
    assert as_turns(opening) == (Turn("user", "I wait for a parcel."),)
    assert reply.turns == (Turn("user", "At what time?"),)
    begin = [("system", TOLD), expected]
    end = [("assistant", "I wait for a parcel."), ("user", "It comes today.")]
    assert [chat(request) for request in server.requests] == [begin, [*begin, *end]]


@pytest.mark.parametrize(
    ("answer", "options", "done"),
    [
        ("[END]", {}, True),
        ("Thanks, bye! [END]", {}, True),
        ("The end.", {}, False),
        ("[END]", {"end_marker": "<over>"}, False),
        ("<over>", {"end_marker": "<over>"}, True),
    ],
)
def test_an_answer_with_the_marker_ends_the_conversation(server, answer, options, done):
    server.replies = [answer]
    _, reply = play(user(server, **options), "It comes today.")
    assert (reply.done, reply.turns) == (done, () if done else (Turn("user", answer),))
    assert f"answer with {options.get('end_marker', '[END]')} alone" in server.requests[0]["messages"][0]["content"]


def test_a_user_who_ends_before_the_beginning_fails(server):
    server.replies = ["[END]"]
    with pytest.raises(EnvironmentFailure, match="ended before the conversation began"):
        play(user(server), row=UNASKED)


@pytest.mark.parametrize(
    ("replies", "requests", "message"),
    [
        ([500], 2, "the simulated user: InternalServerError: .*127.0.0.1"),
        ([429], 2, "RateLimitError"),
        ([401], 1, "AuthenticationError"),
        ([b"<html>"], 1, "ServerError: .*no chat completion"),
        ([b'{"choices": []}'], 1, "ServerError: .*no chat completion"),
        ([""], 1, "answer is empty"),
        ([" \n"], 1, "answer is empty"),
        ([(None, "stop")], 1, "answer is empty"),
        ([("At what", "length")], 1, "answer is cut off, raise max_tokens: 'At what'"),
    ],
)
def test_what_stays_wrong_fails_the_conversation(server, replies, requests, message):
    server.replies = replies
    environment = user(server, max_retries=1)
    with pytest.raises(EnvironmentFailure, match=message):
        play(environment, "It comes today.")
    assert len(server.requests) == requests
    server.replies = ["Fine."]  # nothing of a failure is kept
    assert play(environment, "It comes today.")[1].turns == (Turn("user", "Fine."),)


def test_a_slow_server_and_none_fail_the_conversation(server):
    server.delay = 0.5
    with pytest.raises(EnvironmentFailure, match=r"APITimeoutError: .*no whole answer within 0\.1 s"):
        play(user(server, request_timeout=0.1, max_retries=0), "It comes today.")
    nobody = SimulatedUser("m", INSTRUCTIONS, base_url="http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(EnvironmentFailure, match="APIConnectionError"):
        play(nobody, row=UNASKED)


def test_answers_count_what_all_environments_have_cost(server):
    server.replies = [500, "At what time?"]
    first, second = user(server), user(server)
    (_, reply), (_, again) = play(first, "It comes today."), play(second, "It comes today.")
    assert costs(reply) == {"calls": 1, "retries": 1, "cache_hits": 0, "prompt_tokens": 100, "completion_tokens": 7}
    assert costs(again) == {"calls": 0, "retries": 0, "cache_hits": 1, "prompt_tokens": 0, "completion_tokens": 0}
    opened = play(user(server), "Yes.", row=UNASKED)[1]
    assert costs(opened)["calls"] == 2  # the reset's is among them


def test_a_group_shares_its_first_words_and_all_share_a_limit(server):
    server.replies = [lambda request: f"Words {len(server.requests)}"]
    server.delay = 0.05

    async def open_all(rows):
        return await asyncio.gather(*(user(server, max_concurrency=2).reset(row, 7) for row in rows))

    assert asyncio.run(open_all([UNASKED] * 4)) == ["Words 1"] * 4
    asyncio.run(open_all([{**UNASKED, "name": str(n)} for n in range(6)]))
    assert len(server.requests) == 7
    assert server.most == 2


def test_with_a_cache_conversations_repeat_without_the_server(server, tmp_path, monkeypatch):
    monkeypatch.setattr(simulated_user, "_clients", {})
    server.replies = ["First.", "Second.", "Third."]
    options = {"cache": str(tmp_path / "replies.sqlite"), "max_retries": 0}
    led = play(user(server, **options), "It comes today.", "At noon.")
    server.replies = [500]
    monkeypatch.setattr(simulated_user, "_clients", {})  # as in another process
    again = play(user(server, **options), "It comes today.", "At noon.")
    assert [reply.turns for reply in again[1:]] == [reply.turns for reply in led[1:]]
    with pytest.raises(EnvironmentFailure):  # another seed is another conversation
        play(user(server, **options), "It comes today.", seed=8)


@pytest.mark.parametrize(
    ("request_", "seed", "sent"),
    [(None, 3, 3), (None, 2**62 + 5, 5), ({"seed": None}, 3, None), ({"seed": 11}, 3, 11)],
)
def test_the_seed_goes_to_the_server(server, request_, seed, sent):
    play(user(server, request=request_), "It comes today.", seed=seed)
    assert server.requests[0].get("seed") == sent


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("USER_API_KEY", "secret-of-the-user")
    play(user(server, api_key_env="USER_API_KEY"), "It comes today.")
    assert server.headers[0]["authorization"] == "Bearer secret-of-the-user"
    monkeypatch.delenv("USER_API_KEY")
    with pytest.raises(ConfigError, match=r"simulated_user\.api_key_env: the environment variable USER_API_KEY"):
        user(server, api_key_env="USER_API_KEY")


def test_a_column_that_is_missing_is_named(server):
    row = {name: value for name, value in ROW.items() if name != "name"}
    with pytest.raises(DataError, match=r"'s1' has no column 'name', which simulated_user\.instructions names"):
        play(user(server), row=row)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instructions": " "}, "simulated_user.instructions is empty: say who the user is and wants"),
        ({"instructions": "{0}"}, "simulated_user.instructions names the column '{0}'"),
        ({"end_marker": " "}, "simulated_user.end_marker=' '"),
        ({"max_tokens": 0}, "simulated_user.max_tokens=0 must be at least 1"),
        ({"request": {"n": 2}}, "simulated_user.request sets 'n'"),
        ({"max_retries": -1}, "simulated_user.max_retries=-1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        SimulatedUser(**{"model": "m", "instructions": "Ask.", "base_url": "http://127.0.0.1:9/v1", **options})


def test_it_offers_no_tools(server):
    assert tool_methods(user(server)) == {}
