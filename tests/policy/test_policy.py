"""Every way to score against oracles that are slow and plain, in values and in gradients."""

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from plain_kernels import plain_kernels
from torch import Tensor
from transformers import PretrainedConfig
from windowed_models import FAMILIES, WINDOW, random_tokens, windowed_model

from stateset_lightning.algorithm import GKD
from stateset_lightning.errors import ConfigError
from stateset_lightning.policy import (
    Group,
    LoRAConfig,
    Policy,
    PolicyConfig,
    compared_with,
    context_length,
    end_of_sequence_ids,
    head,
    packed_attention,
)

GROUPS = [
    Group([20, 31, 42, 53, 64, 75], [[86, 97, 108, 119, 130, 141], [152], [163, 174]]),
    Group([185], [[196, 207, 218]]),
    Group([33, 44, 55, 66, 77, 88, 99, 111, 122, 133], [[21], [22], [144, 155, 166, 177, 188]]),
]
NUM_TOKENS = 19
PACKED = ("llama", "qwen2", "qwen3", "gpt2", "gemma2")


def make_policy(model: Any, **options: Any) -> Policy:
    return Policy(model, PolicyConfig("random", **options))


def eager(make_model: Callable[..., Any]) -> Any:
    """A model that could be packed, but for the attention that its user has set."""
    model = make_model("llama")
    model.set_attn_implementation("eager")
    return model


def naive_scores(model: Any, groups: Sequence[Group], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """One completion at a time, all its logits at once."""
    logprobs, entropies = [], []
    for group in groups:
        for completion in group.completions:
            logits = model(torch.tensor([[*group.prompt, *completion]])).logits[0].float() / temperature
            logp = logits[len(group.prompt) - 1 : -1].log_softmax(-1)
            logprobs.append(logp[range(len(completion)), list(completion)])
            entropies.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def masked_scores(model: Any, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """The packed sequence under an explicit mask [1, 1, S, S]: who sees whom is decided token by token."""
    tokens = []  # (group, completion or -1 for the prompt, position, id)
    for g, group in enumerate(groups):
        tokens += [(g, -1, i, token) for i, token in enumerate(group.prompt)]
        for c, completion in enumerate(group.completions):
            tokens += [(g, c, len(group.prompt) + i, token) for i, token in enumerate(completion)]
    mask = torch.tensor([[a[0] == b[0] and b[1] in (-1, a[1]) and b[2] <= a[2] for b in tokens] for a in tokens])
    ids, positions = torch.tensor([[t[3] for t in tokens]]), torch.tensor([[t[2] for t in tokens]])
    logp = model(ids, attention_mask=mask[None, None], position_ids=positions).logits[0].log_softmax(-1)
    place = {token[:3]: i for i, token in enumerate(tokens)}
    logprobs, entropies = [], []
    for g, c, position, token in tokens:
        if c >= 0:
            source = place.get((g, c, position - 1), place.get((g, -1, position - 1)))
            assert source is not None
            logprobs.append(logp[source, token])
            entropies.append(-(logp[source].exp() * logp[source]).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(model: Any, scores: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Of a sum with different weights for every token's log-prob and entropy, by name of the parameter."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(scores[0]))
    (scores[0] * weights + scores[1] * weights.flip(0) * 0.3).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """1e-5 relative for every parameter; some have a gradient of zero (attention's key bias), which float noise is
    measured beside.
    """
    floor = 0.01 * max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm().item() <= 1e-5 * max(gradient.norm().item(), floor), name


def assert_same_scores(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert len(got[0]) == len(got[1]) == len(expected[0])
    torch.testing.assert_close(got[0].detach(), expected[0].detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1].detach(), expected[1].detach(), atol=1e-5, rtol=0)


@pytest.fixture
def attention_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has attention and head take one of their ways: "buckets", "recomputed" ones, or "kernels" as on a GPU."""
    with ExitStack() as stack:

        def choose(way: str) -> None:
            monkeypatch.setattr(packed_attention, "RECOMPUTE_FROM", 0 if way == "recomputed" else 512)
            if way == "kernels":
                monkeypatch.setattr(head, "GPU_CHUNK_TOKENS", 7)
                monkeypatch.setattr(head, "GPU_CHUNK_BYTES", 4 * 7 * 100)  # so a vocabulary of 384 in four parts
                stack.enter_context(plain_kernels())

        yield choose


# Values and gradients
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("scoring", "way"), [("auto", "buckets"), ("auto", "recomputed"), ("auto", "kernels"), ("padded", "buckets")]
)
def test_scores_and_gradients_are_those_of_one_row_at_a_time(
    make_model: Callable[..., Any],
    architecture: str,
    scoring: str,
    way: str,
    checkpointing: bool,
    attention_of: Callable[[str], None],
) -> None:
    attention_of(way)
    plain = make_model(
        architecture, **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if architecture == "gpt2" else {})
    )
    policy = make_policy(copy.deepcopy(plain), scoring=scoring)
    assert policy.uses_chunked_head
    assert policy.uses_packed_scoring == (scoring == "auto" and architecture in PACKED)
    if checkpointing:
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.model.train()
    layers = policy.model.base_model.h if architecture == "gpt2" else policy.model.base_model.layers
    forwards: list[int] = []
    layers[0].mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    expected = naive_scores(plain, GROUPS)
    got = policy.score(GROUPS)
    assert len(got[0]) == NUM_TOKENS
    assert got[0].std() > 0.3  # outputs vary, or the comparison says little
    assert_same_scores(got, expected)
    assert_same_gradients(gradients(policy.model, got), gradients(plain, expected))
    assert len(forwards) == (2 if checkpointing else 1)  # recomputed in backward, or not


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["buckets", "recomputed", "kernels"])
def test_windowed_models_are_packed_with_the_scores_and_gradients_of_their_own_forward(
    family: str, way: str, attention_of: Callable[[str], None]
) -> None:
    attention_of(way)
    # Prompts and completions on both sides of the window, of one length in a bucket and of several.
    tokens = random_tokens(3 * WINDOW, 12, 5, 9, 4, 3, 11, 33, 1, 2)
    groups = [Group(tokens[0], tokens[1:4]), Group(tokens[4], tokens[5:7]), Group(tokens[7], tokens[8:])]
    plain, policy = windowed_model(family), make_policy(windowed_model(family), scoring="packed")
    for some in (groups, groups[:1]):
        expected, got = naive_scores(plain, some), policy.score(some)
        assert expected[0].std() > 0.3
        assert_same_scores(got, expected)
        assert_same_gradients(gradients(policy.model, got), gradients(plain, expected))
    longer = windowed_model(family, sliding_window=WINDOW + 1)
    assert (naive_scores(longer, groups)[0] - naive_scores(plain, groups)[0]).abs().max() > 1e-3


def test_a_window_that_attention_is_not_told_of_is_found_by_the_probe(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Qwen2-MoE, whose window stands in the mask alone; far longer than the probe."""
    model = windowed_model("mistral", sliding_window=1000)
    correct = packed_attention.packed_attention
    monkeypatch.setattr(
        packed_attention, "packed_attention", lambda *args, sliding_window, **options: correct(*args, **options)
    )
    policy = make_policy(model)
    assert not policy.uses_packed_scoring
    assert "in a probe its log-probs were off" in caplog.text
    assert (model.config.sliding_window, model.config._attn_implementation) == (1000, "sdpa")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_packed_scores_and_gradients_are_those_of_an_explicit_mask(make_model: Callable[..., Any], name: str) -> None:
    plain = make_model(name)
    policy = make_policy(make_model(name), scoring="packed")
    expected, got = masked_scores(plain, GROUPS), policy.score(GROUPS)
    assert_same_scores(got, expected)
    assert_same_gradients(gradients(policy.model, got), gradients(plain, expected))


@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_temperature_divides_the_logits(make_model: Callable[..., Any], architecture: str, scoring: str) -> None:
    plain = make_model(architecture)
    policy = make_policy(make_model(architecture), scoring=scoring, head_chunk_tokens=4)
    expected, got = naive_scores(plain, GROUPS, 0.7), policy.score(GROUPS, 0.7)
    assert_same_scores(got, expected)
    assert_same_gradients(gradients(policy.model, got), gradients(plain, expected))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_groups_scores_do_not_depend_on_its_neighbours(make_model: Callable[..., Any], name: str) -> None:
    policy = make_policy(make_model(name))
    together = policy.score(GROUPS)
    alone = [policy.score([group]) for group in GROUPS]
    assert_same_scores((torch.cat([a[0] for a in alone]), torch.cat([a[1] for a in alone])), together)
    one_by_one = policy.score(
        [Group(group.prompt, [completion]) for group in GROUPS for completion in group.completions]
    )
    assert_same_scores(one_by_one, together)


@pytest.mark.parametrize(("scoring", "tokens"), [("packed", 6 + 9 + 1 + 3 + 10 + 7), ("padded", 7 * 15)])
def test_packed_scoring_computes_a_prompt_once_per_group(
    make_model: Callable[..., Any], scoring: str, tokens: int
) -> None:
    policy = make_policy(make_model("llama"), scoring=scoring)
    seen: list[int] = []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    policy.score(GROUPS)
    assert seen == [tokens]  # prompts of 6, 1 and 10 with 9, 3 and 7 completion tokens; or 7 rows of 10 + 5


def test_no_score_reaches_beyond_its_own_past(make_model: Callable[..., Any]) -> None:
    policy = make_policy(make_model("llama"))
    before, _ = policy.score(GROUPS)
    changed = [*GROUPS[:2], Group(GROUPS[2].prompt, [[21], [23], [144, 155, 200, 177, 188]])]
    after, _ = policy.score(changed)
    differs = ((before - after).abs() > 1e-5).nonzero().flatten().tolist()
    assert differs == [13, 16, 17, 18]  # the changed tokens 13 and 16, and what follows the latter


# Choosing a path
# ----------------------------------------------------------------------------------------------------------------------


def test_packed_scoring_is_refused_where_it_is_not_exact(make_model: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"scoring='packed' is not exact for random: its attention is 'eager'.*use auto or padded"
    ):
        make_policy(eager(make_model), scoring="packed")


def test_the_slower_path_is_announced_once_with_the_reason(
    make_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="stateset_lightning"):
        policy = make_policy(eager(make_model))
        policy.score(GROUPS)
        policy.score(GROUPS)
    assert [record.getMessage() for record in caplog.records] == [
        "random is scored a row per completion, prompt repeated: its attention is 'eager', not 'sdpa'."
    ]


@pytest.mark.parametrize("scoring", ["packed", "padded", "auto"])
def test_the_path_that_was_asked_for_is_not_announced(
    make_model: Callable[..., Any], caplog: pytest.LogCaptureFixture, scoring: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="stateset_lightning"):
        make_policy(make_model("llama"), scoring=scoring)
    assert caplog.records == []


def test_a_wrong_packed_path_is_found_by_the_probe(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    correct = packed_attention._make_rows

    def blind(prompts: Any, completions: Any, device: Any) -> Any:
        """Completions that do not see the first token of their prompt."""
        buckets, rows_S = correct(prompts, completions, device)
        for bucket in buckets:
            bucket.mask[..., 0] = False
        return buckets, rows_S

    monkeypatch.setattr(packed_attention, "_make_rows", blind)
    with pytest.raises(ConfigError, match="in a probe its log-probs were off by"):
        make_policy(make_model("llama"), scoring="packed")
    model = make_model("llama")
    assert not make_policy(model).uses_packed_scoring
    assert model.config._attn_implementation == "sdpa"


def test_a_model_whose_logits_are_scaled_is_scored_with_its_own_head(
    make_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def scaled() -> Any:
        model = make_model("llama")
        model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 2.0))
        return model

    plain = scaled()
    policy = make_policy(scaled())
    assert not policy.uses_chunked_head
    assert "scored with all logits in memory" in caplog.text
    expected, got = naive_scores(plain, GROUPS, 0.7), policy.score(GROUPS, 0.7)
    assert_same_scores(got, expected)
    assert_same_gradients(gradients(policy.model, got), gradients(plain, expected))
    with pytest.raises(ConfigError, match="head_dtype='float32' is not possible for random: in a probe its log-probs"):
        make_policy(scaled(), head_dtype="float32")


def test_a_float32_head_multiplies_half_weights_without_rounding(make_model: Callable[..., Any]) -> None:
    asked = ("model", "float32", None)
    policies = [make_policy(make_model("llama").bfloat16(), head_dtype=dtype) for dtype in asked]
    with torch.no_grad():
        hidden_TH, head = policies[0]._packed(GROUPS), policies[0].model.get_output_embeddings()
        exact = (hidden_TH.double() @ head.weight.double().t()).log_softmax(-1)
        targets = [token for group in GROUPS for completion in group.completions for token in completion]
        expected = exact[range(NUM_TOKENS), targets]
        rounded, ours, unless_told = ((policy.score(GROUPS)[0] - expected).abs().mean().item() for policy in policies)
    assert ours < 1e-6 < 1e-3 < rounded
    assert unless_told == ours


def test_a_model_can_carry_a_second_policy(make_model: Callable[..., Any]) -> None:
    first = make_policy(make_model("llama"))
    second = make_policy(first.model)
    assert second.uses_packed_scoring
    assert_same_scores(second.score(GROUPS), first.score(GROUPS))


def test_a_copy_scores_like_the_original(make_model: Callable[..., Any]) -> None:
    policy = make_policy(make_model("qwen2"))
    reference = copy.deepcopy(policy)
    expected = policy.score(GROUPS)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    assert_same_scores(reference.score(GROUPS), expected)


def test_saving_does_not_write_the_packed_attention_into_the_folder(
    make_model: Callable[..., Any], tmp_path: Any
) -> None:
    make_policy(make_model("llama"), scoring="packed").model.save_pretrained(tmp_path)
    assert "stateset" not in (tmp_path / "config.json").read_text()


# Without gradient
# ----------------------------------------------------------------------------------------------------------------------


def test_scores_without_gradient_have_no_graph_and_no_dropout_and_leave_the_mode(
    make_model: Callable[..., Any],
) -> None:
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    policy = make_policy(make_model("gpt2", **dropout))
    expected = naive_scores(make_model("gpt2"), GROUPS)
    for training in (True, False):
        policy.model.train(training)
        got = policy.score_without_gradient(GROUPS)
        assert_same_scores(got, expected)
        assert not got[0].requires_grad
        assert not got[1].requires_grad
        assert policy.model.training == training
    policy.model.train()
    assert (policy.score(GROUPS)[0] - expected[0]).abs().max() > 0.05  # with dropout it is another thing


def test_an_exception_in_scoring_leaves_the_mode(make_model: Callable[..., Any]) -> None:
    policy = make_policy(make_model("llama"))
    policy.model.train()
    with pytest.raises(IndexError):
        policy.score_without_gradient([Group([10_000], [[1]])])
    assert policy.model.training


def test_nothing_to_score_gives_nothing(make_model: Callable[..., Any]) -> None:
    logprobs, entropies = make_policy(make_model("llama")).score_without_gradient([])
    assert logprobs.shape == entropies.shape == (0,)


def test_frozen_weights_get_no_gradient_and_the_others_the_same(make_model: Callable[..., Any]) -> None:
    policy, plain = make_policy(make_model("llama")), make_model("llama")
    policy.model.lm_head.weight.requires_grad_(False)
    got = policy.score(GROUPS)
    weights = torch.linspace(-1, 1, NUM_TOKENS)
    (got[0] * weights).sum().backward()
    (naive_scores(plain, GROUPS)[0] * weights).sum().backward()
    assert policy.model.lm_head.weight.grad is None
    theirs = plain.model.layers[0].mlp.up_proj.weight.grad
    torch.testing.assert_close(
        policy.model.model.layers[0].mlp.up_proj.weight.grad, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5
    )


def test_bfloat16_weights_are_scored_packed_within_their_precision(make_model: Callable[..., Any]) -> None:
    policy = make_policy(make_model("llama").bfloat16())
    assert policy.uses_packed_scoring
    logprobs, entropies = policy.score(GROUPS)
    assert logprobs.dtype == entropies.dtype == torch.float32
    expected, _ = naive_scores(make_model("llama"), GROUPS)
    assert (logprobs - expected).abs().mean() < 0.05


# Tokens that the policy has not sampled
# ----------------------------------------------------------------------------------------------------------------------

MASKS = [
    [[True, False, False, True, True, False], [False], [False, True]],
    [[False, False, False]],  # a group of which nothing is scored
    [[True], [False], [True, False, True, True, False]],
]
MIXED = [Group(group.prompt, group.completions, mask) for group, mask in zip(GROUPS, MASKS, strict=True)]
SAMPLED = [token for mask in MASKS for completion in mask for token in completion]


@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_only_sampled_tokens_are_scored(
    make_model: Callable[..., Any], architecture: str, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(make_model(architecture), scoring=scoring)
    assert policy.uses_packed_scoring == (scoring == "auto" and architecture in PACKED)
    everything = policy.score(GROUPS)
    expected = everything[0][SAMPLED], everything[1][SAMPLED]
    expected_gradients = gradients(policy.model, expected)
    rows: list[int] = []
    computed = head._logits
    monkeypatch.setattr(head, "_logits", lambda hidden, *rest: rows.append(len(hidden)) or computed(hidden, *rest))
    got = policy.score(MIXED)
    assert len(got[0]) == 8
    assert_same_scores(got, expected)
    assert_same_gradients(gradients(policy.model, got), expected_gradients)
    assert rows == [8, 8]  # forward and backward: the head computes nothing for other tokens
    assert_same_scores(policy.score_without_gradient(MIXED), expected)


def test_only_sampled_tokens_are_scored_by_a_model_s_own_head(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 2.0))
    policy = make_policy(model)
    assert not policy.uses_chunked_head
    everything = policy.score(GROUPS)
    expected = everything[0][SAMPLED], everything[1][SAMPLED]
    got = policy.score(MIXED)
    assert_same_scores(got, expected)
    assert_same_gradients(gradients(policy.model, got), gradients(policy.model, expected))


@pytest.mark.parametrize("scoring", ["packed", "padded"])
def test_a_batch_without_sampled_tokens_scores_nothing_and_trains_nothing(
    make_model: Callable[..., Any], scoring: str
) -> None:
    policy = make_policy(make_model("qwen2"), scoring=scoring)
    logprobs, entropies = policy.score([MIXED[1]])
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


def test_a_group_knows_its_numbers_of_tokens() -> None:
    assert [group.num_completion_tokens for group in MIXED] == [group.num_completion_tokens for group in GROUPS]
    assert [group.num_completion_tokens for group in GROUPS] == [9, 3, 7]
    assert [sum(map(len, group.sampled_places)) for group in GROUPS] == [9, 3, 7]
    assert [sum(map(len, group.sampled_places)) for group in MIXED] == [4, 0, 4]


def test_a_mask_that_does_not_fit_the_completions_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Group([1], [[2, 3], [4]], [[True, True], [True, True]])


# What else callers ask of a policy
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("configured", "expected"), [(None, {1}), (5, {1, 5}), ([5, 6], {1, 5, 6}), ([], {1})])
def test_end_tokens_are_the_tokenizers_and_the_generation_configs(
    make_model: Callable[..., Any], tiny_tokenizer: Any, configured: Any, expected: set[int]
) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = configured
    assert end_of_sequence_ids(model, tiny_tokenizer) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"n_positions": 7}, 7),
        ({"max_position_embeddings": 9}, 9),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_the_context_length_is_what_the_config_says(config: dict[str, Any], expected: int | None) -> None:
    assert context_length(SimpleNamespace(config=PretrainedConfig(**config))) == expected  # type: ignore[arg-type]


def test_a_policy_says_whether_training_uses_dropout(make_model: Callable[..., Any]) -> None:
    assert not make_policy(make_model("llama")).has_dropout
    assert make_policy(make_model("llama"), dropout=0.1).has_dropout
    assert make_policy(make_model("llama"), lora=LoRAConfig(dropout=0.1)).has_dropout


def test_without_an_adapter_nothing_is_merged(make_model: Callable[..., Any]) -> None:
    policy = make_policy(make_model("llama"))
    places = dict(policy.named_parameters())
    with policy.merged_adapter():
        assert all(parameter is places[name] for name, parameter in policy.named_parameters())


def test_scoring_enters_few_of_our_files(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """What a reader must know of the policy to follow a training step."""
    policy = make_policy(make_model("qwen2"))
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.parent.name == "policy" and path.parent.parent.name == "stateset_lightning":
            entered.add(path.stem)

    sys.setprofile(note)
    try:
        policy.score_without_gradient(MIXED)
        policy.score(GROUPS)[0].sum().backward()
        with policy.merged_adapter():
            end_of_sequence_ids(policy.model, tiny_tokenizer)
        assert not policy.has_dropout
        assert policy.context_length == 128
    finally:
        sys.setprofile(None)
    assert entered == {"policy", "ends", "head", "packed_attention", "recomputed_layers"}


@pytest.mark.parametrize("vocabulary", [384, 390], ids=["same", "padded"])
@pytest.mark.parametrize("chunked", [(True, True), (True, False), (False, True), (False, False)])
def test_a_teacher_of_another_architecture_is_compared_with_whatever_the_heads_are(
    make_model: Callable[..., Any], chunked: tuple[bool, bool], vocabulary: int
) -> None:
    """Against all logits of each completion alone; the teacher has soft caps, and tokens that nobody knows."""
    student, teacher = make_policy(make_model("llama")), make_policy(make_model("gemma2", vocab_size=vocabulary))
    teacher.requires_grad_(False)
    student.uses_chunked_head, teacher.uses_chunked_head = chunked
    divergence = GKD(jsd_beta=0.3).divergence
    comparison = compared_with(teacher, GROUPS, 0.7, divergence)
    logprobs, _, divergences = student.score(GROUPS, 0.7, comparison)
    plain, theirs = make_model("llama"), make_model("gemma2", vocab_size=vocabulary)
    expected = []
    for group in GROUPS:
        for completion in group.completions:
            ids, places = torch.tensor([[*group.prompt, *completion]]), slice(len(group.prompt) - 1, -1)
            ours, other = (model(ids).logits[0, places, :384].float() / 0.7 for model in (plain, theirs))
            expected.append(divergence(ours.log_softmax(-1), other.detach().log_softmax(-1))[0])
    torch.testing.assert_close(divergences, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert float(divergences.min()) > 1e-3
    weights = torch.linspace(-1.0, 2.0, NUM_TOKENS)
    mine = gradients(student.model, (weights * divergences, 0 * logprobs))
    assert_same_gradients(mine, gradients(plain, (weights * torch.cat(expected), 0 * logprobs.detach())))
