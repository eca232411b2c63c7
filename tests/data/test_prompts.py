"""Scenarios -> tokens. The byte tokenizer of conftest makes token counts equal to bytes plus special tokens."""

import pytest

from stateset_lightning.data.prompts import PromptEncoder
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.types import Scenario

HI = Scenario(id="hi", prompt="hi", context="Be kind")
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{"
    " messages[0]['content'] }}"
)


def prompts(*texts):
    return [Scenario(id=f"s{i}", prompt=text) for i, text in enumerate(texts)]


def test_the_template_gets_the_system_turn_and_opens_the_answer(tokenizer):
    encoder = PromptEncoder(tokenizer=tokenizer, system_prompt="You help")
    (tokens,) = encoder.encode([HI], "data.train").tokens
    assert tokenizer.decode(tokens) == "<bos><system>You help\n\nBe kind\n<user>hi\n<assistant>"
    assert tokens.count(tokenizer.bos_token_id) == 1
    same = tokenizer.apply_chat_template(
        [{"role": t.role, "content": t.content} for t in HI.turns("You help")], add_generation_prompt=True
    )
    assert tokens == same["input_ids"]


def test_template_variables_are_passed_on(tokenizer):
    encoder = PromptEncoder(tokenizer=tokenizer, chat_template_kwargs={"tone": "dry"})
    (tokens,) = encoder.encode(prompts("a"), "data.train").tokens
    assert tokenizer.decode(tokens) == "<bos><user>a\n(dry)<assistant>"


@pytest.mark.parametrize("append_eos", [False, True])
def test_plain_text_has_a_bos_but_never_an_eos(make_tokenizer, append_eos):
    encoder = PromptEncoder(tokenizer=make_tokenizer(template=None, append_eos=append_eos))
    assert not encoder.applies_template
    (tokens,) = encoder.encode([HI], "data.train").tokens
    assert encoder.tokenizer.decode(tokens) == "<bos>Be kind\n\nhi"


def test_plain_text_can_be_asked_for(tokenizer):
    (tokens,) = PromptEncoder(tokenizer=tokenizer, use_chat_template=False).encode(prompts("a"), "data.train").tokens
    assert tokenizer.decode(tokens) == "<bos>a"


def test_batches_of_texts_keep_their_order(tokenizer):
    many = prompts(*(str(i) for i in range(1500)))
    encoded = PromptEncoder(tokenizer=tokenizer, use_chat_template=False).encode(many, "data.train")
    assert [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in encoded.tokens] == [
        str(i) for i in range(1500)
    ]
    assert encoded.kept == list(range(1500))


def test_a_template_without_system_role_names_the_scenario_and_its_own_message(make_tokenizer):
    encoder = PromptEncoder(tokenizer=make_tokenizer(template=NO_SYSTEM))
    with pytest.raises(
        DataError,
        match=r"data.train: the chat template refuses scenario 'hi' \(roles: system, user\): System role not supported",
    ):
        encoder.encode([*prompts("a"), HI], "data.train")


def test_a_prompt_without_tokens_is_an_error(make_tokenizer):
    encoder = PromptEncoder(tokenizer=make_tokenizer(template="{% if false %}{% endif %}"))
    with pytest.raises(DataError, match=r"data.test: the prompt of scenario 's0' has no tokens"):
        encoder.encode(prompts("a"), "data.test")


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {"use_chat_template": True}, "data.use_chat_template=true, but the tokenizer has no chat template"),
        (None, {"chat_template_kwargs": {"tone": 1}}, "have no effect without a chat template"),
        ("x", {"chat_template_kwargs": {"tokenize": True}}, "'tokenize' is set by the data module"),
    ],
)
def test_options_that_cannot_be_honoured(make_tokenizer, template, options, message):
    with pytest.raises(ConfigError, match=message):
        PromptEncoder(tokenizer=make_tokenizer(template=template), **options)


def limited(tokenizer, policy, limit=4):
    encoder = PromptEncoder(
        tokenizer=tokenizer, use_chat_template=False, max_prompt_tokens=limit, overlong_prompts=policy
    )
    return encoder.encode(prompts("abc", "abcd", "ab", "abcdefg"), "data.train")  # 4, 5, 3 and 8 tokens


def test_overlong_prompts_are_an_error_that_says_what_to_set(tokenizer):
    with pytest.raises(DataError) as error:
        limited(tokenizer, "error")
    assert (
        str(error.value)
        == "data.train: 2 of 4 prompts have more than data.max_prompt_tokens=4 tokens: s1 (5), s3 (8); "
        "set data.max_prompt_tokens=8, or data.overlong_prompts to drop or truncate_left"
    )


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    encoded = limited(tokenizer, "drop")
    assert (encoded.kept, encoded.num_dropped, encoded.num_truncated) == ([0, 2], 2, 0)
    assert [len(tokens) for tokens in encoded.tokens] == [4, 3]


def test_overlong_prompts_keep_their_last_tokens(tokenizer):
    encoded = limited(tokenizer, "truncate_left")
    assert (encoded.kept, encoded.num_dropped, encoded.num_truncated) == ([0, 1, 2, 3], 0, 2)
    assert [tokenizer.decode(tokens) for tokens in encoded.tokens] == ["<bos>abc", "abcd", "<bos>ab", "defg"]


def test_dropping_everything_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"data.max_prompt_tokens=2 drops all 4 prompts; the shortest has 3 tokens"):
        limited(tokenizer, "drop", limit=2)
