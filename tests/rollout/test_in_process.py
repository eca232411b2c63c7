"""The engine against transformers' `generate`, against `Policy.score`, and against itself in every other batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stateset_lightning.errors import ConfigError, NonFiniteError
from stateset_lightning.policy import Group, Policy, PolicyConfig
from stateset_lightning.rollout import (
    FinishReason,
    InProcessEngine,
    Rollout,
    RolloutConfig,
    decoding,
    in_process,
    running_batch,
)
from stateset_lightning.rollout.cpu_decoding import has_llama_layers
from stateset_lightning.rollout.sampling import filter_probabilities
from stateset_lightning.seeding import sample_seeds

PROMPTS = [
    [20, 31, 42],
    [53, 64, 75, 86, 97, 108, 119],
    [130],
    [141, 152, 163, 174, 185],
    [33, 44],
    [55] * 9,
    [66, 77, 88],
    [99, 110, 121, 132],
]
MANY_ENDS = [1, *range(320, 360)]
"""End-of-sequence tokens: so many that completions end early and at different times."""
G = 4
SAMPLING = RolloutConfig(num_generations=G, max_new_tokens=12)


@pytest.fixture
def make_engine(make_model: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., InProcessEngine]:
    def make(name: str, ends: Any = MANY_ENDS, dtype: torch.dtype | None = None, **changes: Any) -> InProcessEngine:
        model = make_model(name, **changes)
        model.generation_config.eos_token_id = ends
        engine = InProcessEngine(tiny_tokenizer, dtype)
        engine.sync(Policy(model, PolicyConfig("random")))
        with engine._sampling_mode():
            for decodes in (has_llama_layers(model), False):  # probes are made now, and counted by no test
                engine._exact_way(running_batch.batch_kinds(model, 1), decodes)
        return engine

    return make


def generate(
    engine: InProcessEngine, positions: list[int], sampling: RolloutConfig = SAMPLING, **options: Any
) -> dict[tuple[int, int], Any]:
    """(position, sample) -> tokens, log-probs, finish reason and text of each completion of the prompts at
    `positions`.
    """
    num_generations = 1 if options.get("greedy") else G
    seeds = sample_seeds(7, "train", 0, positions, num_generations)
    rollout = engine.generate([PROMPTS[p] for p in positions], num_generations, sampling, seeds, **options)
    logprobs = rollout.logprobs_T.split(rollout.lengths_N.tolist())
    keys = [(p, sample) for p in positions for sample in range(num_generations)]
    return dict(
        zip(keys, zip(rollout.completions(), logprobs, rollout.finish_reasons, rollout.texts, strict=True), strict=True)
    )


def assert_same(got: dict[tuple[int, int], Any], expected: dict[tuple[int, int], Any]) -> None:
    for key, (tokens, logprobs, reason, text) in got.items():
        assert (tokens, reason, text) == (expected[key][0], *expected[key][2:])
        torch.testing.assert_close(logprobs, expected[key][1], atol=1e-5, rtol=0)


def script(monkeypatch: pytest.MonkeyPatch, token_at: Callable[[int, int], int]) -> None:
    """Makes completion n (also its seed) sample `token_at(n, step)`, with log-prob -1, whatever the model says."""

    def uniforms(seeds_N: list[int], num_draws: int) -> Any:
        return (torch.tensor(seeds_N)[:, None] * 1000 + torch.arange(num_draws)[None]).double().numpy()

    def sample_tokens(
        logits_BV: torch.Tensor, noise_B: torch.Tensor, sampling: RolloutConfig, keep: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = [token_at(int(x) // 1000, int(x) % 1000) for x in noise_B.tolist()]
        return torch.tensor(tokens), torch.full((len(tokens),), -1.0)

    monkeypatch.setattr(decoding, "uniforms", uniforms)
    monkeypatch.setattr(decoding, "sample_tokens", sample_tokens)


def record_forwards(engine: InProcessEngine) -> list[tuple[int, int]]:
    """Shape of the tokens of each forward from now on."""
    shapes: list[tuple[int, int]] = []
    engine.policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


# The same completions in any company ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share_from", [0, 256])  # every prompt is shared, or none of these short ones
def test_a_completion_is_the_same_in_every_batch(
    make_engine: Callable[..., InProcessEngine], architecture: str, share_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_batch, "SHARE_FROM", share_from)
    engine = make_engine(architecture)
    positions = list(range(8))
    together = generate(engine, positions)
    lengths = {len(tokens) for tokens, *_ in together.values()}
    assert min(lengths) < 4
    assert max(lengths) == 12
    for position in positions:
        assert_same(generate(engine, [position]), together)
    assert_same(generate(engine, [5, 0, 7, 2, 6, 1, 4, 3]), together)
    for rows in (1, 3, 5, 9, 12, 20):  # less than a group, no multiple of one, and some groups that others join
        small = RolloutConfig(num_generations=G, max_new_tokens=12, max_batch_rows=rows)
        assert_same(generate(engine, positions, small), together)


def test_a_completion_is_the_same_with_and_without_early_finishers_beside_it(
    make_engine: Callable[..., InProcessEngine], architecture: str
) -> None:
    with_finishers = generate(make_engine(architecture), list(range(8)))
    without = generate(make_engine(architecture, ends=1), list(range(8)))
    truncated = {key: value for key, value in with_finishers.items() if value[2] is FinishReason.LENGTH}
    assert 3 < len(truncated) < 29
    assert_same(truncated, without)
    for key, (tokens, logprobs, _, _) in with_finishers.items():
        assert tokens == without[key][0][: len(tokens)]
        torch.testing.assert_close(logprobs, without[key][1][: len(tokens)], atol=1e-5, rtol=0)


def test_completions_of_a_group_differ_and_follow_their_seeds(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("llama")
    rollout = engine.generate([PROMPTS[0]], 4, SAMPLING, [11, 12, 11, 13])
    first, second, third, fourth = rollout.completions()
    assert first == third
    assert len({tuple(first), tuple(second), tuple(fourth)}) == 3


def test_top_k_of_one_samples_the_greedy_completion(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("qwen3")
    greedy = generate(engine, [1, 4], greedy=True)
    sampled = generate(engine, [1, 4], RolloutConfig(num_generations=G, max_new_tokens=12, top_k=1))
    for (position, _), (tokens, *_) in sampled.items():
        assert tokens == greedy[position, 0][0]


# Against oracles -----------------------------------------------------------------------------------------------------


def test_greedy_agrees_with_transformers_on_left_padded_prompts(
    make_engine: Callable[..., InProcessEngine], make_model: Callable[..., Any], architecture: str
) -> None:
    model = make_model(architecture)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=MANY_ENDS, pad_token_id=0
    )
    ours = generate(make_engine(architecture), list(range(8)), greedy=True)
    for position, row in enumerate(output[:, width:].tolist()):
        tokens = ours[position, 0][0]
        assert tokens == row[: len(tokens)]
        assert set(row[len(tokens) :]) <= {0}


@pytest.mark.parametrize(("temperature", "share_from"), [(1.0, 256), (0.6, 256), (0.6, 0)])
def test_sampled_logprobs_are_those_that_the_policy_scores(
    make_engine: Callable[..., InProcessEngine],
    architecture: str,
    temperature: float,
    share_from: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running_batch, "SHARE_FROM", share_from)
    engine = make_engine(architecture)
    sampling = RolloutConfig(num_generations=G, max_new_tokens=12, temperature=temperature, top_k=50, top_p=0.95)
    sampled = generate(engine, list(range(8)), sampling)
    groups = [Group(PROMPTS[p], [sampled[p, sample][0] for sample in range(G)]) for p in range(8)]
    logprobs_T, _ = engine.policy.score(groups, temperature)
    sampled_T = torch.cat([logprobs for _, logprobs, _, _ in sampled.values()])
    torch.testing.assert_close(sampled_T, logprobs_T.detach(), atol=1e-5, rtol=0)


FILTERS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6, "temperature": 0.5},
    "min_p": {"min_p": 0.3},
    "all": {"top_k": 60, "top_p": 0.9, "min_p": 0.2, "temperature": 0.7},
}


@pytest.mark.parametrize(
    ("name", "decoding"), [*((name, "eager") for name in FILTERS), ("top_p", "graph"), ("all", "plain")]
)
def test_a_kept_mask_is_what_the_filters_left_and_log_probs_are_over_it(
    make_engine: Callable[..., InProcessEngine], name: str, decoding: str
) -> None:
    """The same tokens as without it, also where rows leave and others take their place."""
    engine, options = make_engine("llama"), {"max_new_tokens": 20, "max_batch_rows": 6, "stop": ["7"], **FILTERS[name]}
    if decoding == "plain":
        engine._exact_way = lambda *_: (None, True)  # type: ignore[assignment]
    else:
        options["decoding"] = decoding
    seeds = sample_seeds(7, "train", 0, range(5), G)
    plain, kept = (
        engine.generate(PROMPTS[:5], G, RolloutConfig(**options, keep_sampling_mask=keeps), seeds)
        for keeps in (False, True)
    )
    assert plain.sampling_mask is None
    assert kept.completions() == plain.completions()
    assert len(set(kept.lengths_N.tolist())) > 4
    mask, temperature = kept.sampling_mask, options.get("temperature", 1.0)
    assert mask is not None
    lists, texts = iter(mask.ids_K.split(mask.counts_T.tolist())), kept.completions()
    with torch.no_grad():
        for n, tokens in enumerate(texts):
            prompt = PROMPTS[n // G]
            logits = engine.policy.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            for probs in filter_probabilities((logits / temperature).softmax(-1), RolloutConfig(**options)):
                assert next(lists).tolist() == probs.nonzero().flatten().tolist()
    parts = mask.split([int(lengths.sum()) for lengths in kept.lengths_N.split(G)])
    groups = [Group(prompt, texts[p * G : (p + 1) * G], mask=parts[p]) for p, prompt in enumerate(PROMPTS[:5])]
    logprobs_T, _ = engine.policy.score_without_gradient(groups, temperature)
    torch.testing.assert_close(kept.logprobs_T, logprobs_T, atol=1e-5, rtol=0)
    assert (kept.logprobs_T - plain.logprobs_T).max() > 0.1


def test_a_greedy_completion_has_no_mask(make_engine: Callable[..., InProcessEngine]) -> None:
    rollout = make_engine("llama").generate(
        PROMPTS, 1, RolloutConfig(max_new_tokens=4, top_k=2, keep_sampling_mask=True), range(8), greedy=True
    )
    assert rollout.sampling_mask is None


def test_the_bundled_model_answers_like_transformers(tiny_model: Any, tiny_tokenizer: Any) -> None:
    prompts = [
        tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in ("What is 3 + 4?", "What is 12 * 3?")
    ]
    expected = [
        tiny_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
        )
        for prompt in prompts
    ]
    engine = InProcessEngine(tiny_tokenizer)
    engine.sync(Policy(tiny_model, PolicyConfig("tiny")))
    rollout = engine.generate(prompts, 1, RolloutConfig(max_new_tokens=16), [0, 1], greedy=True)
    assert rollout.completions() == [
        row[0, len(prompt) :].tolist() for row, prompt in zip(expected, prompts, strict=True)
    ]
    assert rollout.finish_reasons == [FinishReason.STOP] * 2
    assert rollout.texts == [tiny_tokenizer.decode(tokens[:-1]) for tokens in rollout.completions()]


# Ends ----------------------------------------------------------------------------------------------------------------


def test_the_end_token_is_among_the_tokens_and_not_in_the_text(
    make_engine: Callable[..., InProcessEngine], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = tiny_tokenizer.encode("hello")
    script(monkeypatch, lambda n, step: [*hello, 1][step] if n == 0 else hello[step % len(hello)])
    rollout = make_engine("llama", ends=1).generate([PROMPTS[0]], 2, RolloutConfig(max_new_tokens=8), [0, 1])
    assert rollout.completions()[0] == [*hello, 1]
    assert rollout.texts[0] == "hello"
    assert rollout.finish_reasons == [FinishReason.STOP, FinishReason.LENGTH]
    assert rollout.lengths_N.tolist() == [len(hello) + 1, 8]
    assert rollout.logprobs_T.tolist() == [-1.0] * (len(hello) + 9)


def test_an_end_at_the_last_token_is_a_stop_and_no_truncation(
    make_engine: Callable[..., InProcessEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, lambda n, step: 1 if (n, step) == (0, 3) else 30)
    rollout = make_engine("llama", ends=1).generate([PROMPTS[0]], 2, RolloutConfig(max_new_tokens=4), [0, 1])
    assert rollout.lengths_N.tolist() == [4, 4]
    assert rollout.finish_reasons == [FinishReason.STOP, FinishReason.LENGTH]


@pytest.mark.parametrize(("ends", "length"), [(None, 5), (40, 2), ([40, 41], 2), ([41, 99], 3)])
def test_the_ends_of_the_generation_config_count_beside_the_tokenizers(
    make_engine: Callable[..., InProcessEngine], monkeypatch: pytest.MonkeyPatch, ends: Any, length: int
) -> None:
    script(monkeypatch, lambda n, step: [30, 40, 41, 42, 1][step])
    rollout = make_engine("llama", ends=ends).generate([PROMPTS[0]], 1, RolloutConfig(max_new_tokens=8), [0])
    assert rollout.lengths_N.tolist() == [length]
    assert rollout.finish_reasons == [FinishReason.STOP]


def test_one_token_per_completion_needs_the_prefill_alone(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("llama", ends=1)
    longer = generate(engine, [0, 1])
    shapes = record_forwards(engine)
    single = generate(engine, [0, 1], RolloutConfig(num_generations=G, max_new_tokens=1))
    assert shapes == [(2, 7)]
    assert engine.decoded_rows == 8
    for key, (tokens, _, reason, _) in single.items():
        assert tokens == longer[key][0][:1]
        assert reason == (FinishReason.STOP if tokens == [1] else FinishReason.LENGTH)


def test_a_stop_string_across_tokens_ends_a_completion_and_is_cut_from_its_text(
    make_engine: Callable[..., InProcessEngine], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tiny_tokenizer.encode("say helloworld again")
    script(monkeypatch, lambda n, step: tokens[step])
    rollout = make_engine("llama", ends=1).generate(
        [PROMPTS[0]], 1, RolloutConfig(max_new_tokens=len(tokens), stop=["###", "llowo"]), [0]
    )
    assert rollout.texts == ["say he"]
    assert rollout.finish_reasons == [FinishReason.STOP]
    kept = tiny_tokenizer.decode(rollout.completions()[0])
    assert "llowo" in kept
    assert "llowo" not in tiny_tokenizer.decode(rollout.completions()[0][:-1])


# Callbacks and state -------------------------------------------------------------------------------------------------


def test_each_completion_is_reported_once_and_at_once(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("llama")
    forwards = record_forwards(engine)
    calls: list[tuple[int, str, int, int]] = []
    seeds = sample_seeds(7, "train", 0, range(8), G)
    rollout = engine.generate(
        PROMPTS, G, SAMPLING, seeds, on_finished=lambda n, text, tokens: calls.append((n, text, tokens, len(forwards)))
    )
    assert sorted(n for n, *_ in calls) == list(range(32))
    for n, text, tokens, forwards_then in calls:
        assert text == rollout.texts[n]
        assert tokens == rollout.lengths_N[n]
        assert forwards_then == tokens  # the prefill predicts the first token, each further forward one more
    assert min(c[3] for c in calls) < len(forwards)


def test_an_exception_leaves_modes_and_weights_as_they_were(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("gpt2", dtype=torch.bfloat16)
    model = engine.policy.model
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    seen: list[Any] = []

    def fail(n: int, text: str, tokens: int) -> None:
        seen.extend([model.training, *(parameter.dtype for parameter in model.parameters())])
        raise KeyError("reward")

    with pytest.raises(KeyError, match="reward"):
        generate(engine, [0, 1], on_finished=fail)
    assert set(seen) == {False, torch.bfloat16}
    assert [module.training for module in model.modules()] == modes
    assert [parameter.data_ptr() for parameter in model.parameters()] == storages
    assert all(torch.equal(parameter, old) for parameter, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["qwen2", "llama"])  # tied and untied embeddings
def test_a_cast_for_sampling_is_undone_bit_for_bit(make_engine: Callable[..., InProcessEngine], name: str) -> None:
    engine = make_engine(name, dtype=torch.bfloat16)
    model = engine.policy.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    half = generate(engine, [0, 1])
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (name == "qwen2")
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])
    full = generate(make_engine(name), [0, 1])
    difference = max(
        (half[key][1][:1] - full[key][1][:1]).abs().max().item() for key in full if half[key][0][0] == full[key][0][0]
    )
    assert 1e-5 < difference < 0.2  # bfloat16 was at work


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_hooks_on_gradients_survive_sampling(
    make_engine: Callable[..., InProcessEngine], dtype: torch.dtype | None
) -> None:
    # By such hooks DDP reduces gradients. A parameter whose data change their dtype, even for a while, loses them
    # without a word.
    engine = make_engine("llama", dtype=dtype)
    parameters = list(engine.policy.parameters())
    nodes = [parameter.expand_as(parameter).grad_fn.next_functions[0][0] for parameter in parameters]
    fired: list[int] = []
    for i, node in enumerate(nodes):
        node.register_hook(lambda *_, i=i: fired.append(i))
    generate(engine, [0, 1])
    engine.policy.score([Group([3, 4], [[5, 6]])])[0].sum().backward()
    assert sorted(set(fired)) == list(range(len(parameters)))


def test_dropout_is_off_while_sampling_in_training_mode(make_engine: Callable[..., InProcessEngine]) -> None:
    dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    engine = make_engine("gpt2", **dropout)
    expected = generate(engine, [0, 1, 2])
    engine.policy.model.train()
    assert_same(generate(engine, [0, 1, 2]), expected)
    assert engine.policy.model.training


def test_a_model_can_be_trained_after_its_rotary_frequencies_grew_in_sampling(
    make_engine: Callable[..., InProcessEngine],
) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    engine = make_engine("llama", rope_parameters=rope, max_position_embeddings=64, ends=[])
    before = [buffer.clone() for buffer in engine.policy.model.buffers()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_process, "check_length", lambda *arguments: None)
        generate(engine, [1], RolloutConfig(num_generations=G, max_new_tokens=70))
    assert any(not torch.equal(old, new) for old, new in zip(before, engine.policy.model.buffers(), strict=True))
    assert not any(buffer.is_inference() for buffer in engine.policy.model.buffers())  # DDP writes into them
    engine.policy.score([Group(PROMPTS[1], [[5, 6, 7]])], 1.0)[0].sum().backward()


def test_gradient_checkpointing_does_not_disturb_sampling(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("llama")
    expected = generate(engine, [0, 1])
    engine.policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine.policy.model.train()
    assert_same(generate(engine, [0, 1]), expected)


def test_sampling_neither_reads_nor_advances_the_global_generator(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("llama")
    torch.manual_seed(1)
    first = generate(engine, [0])
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same(generate(engine, [0]), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_follows_the_weights_as_they_are_now(
    make_engine: Callable[..., InProcessEngine], make_model: Callable[..., Any]
) -> None:
    engine = make_engine("llama", ends=1)
    before = generate(engine, [0], greedy=True)
    with torch.no_grad():
        engine.policy.model.lm_head.weight.mul_(-1)
    after = generate(engine, [0], greedy=True)
    ids = torch.tensor([PROMPTS[0]])
    assert after[0, 0][0][0] == engine.policy.model(ids).logits[0, -1].argmax()
    assert after[0, 0][0] != before[0, 0][0]


# Work ----------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_once_for_its_group(make_engine: Callable[..., InProcessEngine]) -> None:
    engine = make_engine("llama")
    shapes = record_forwards(engine)
    generate(engine, list(range(8)))
    assert shapes[0] == (8, 9)  # 8 prompts for 32 completions, as wide as the longest
    assert shapes[1][0] <= 32
    assert all(width == 1 for _, width in shapes[1:])
    assert [rows for rows, _ in shapes[1:]] == sorted((rows for rows, _ in shapes[1:]), reverse=True)
    assert shapes[-1][0] < 32


def test_finished_rows_leave_once_less_than_three_quarters_run(
    make_engine: Callable[..., InProcessEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1, 2, 2, 4]
    script(monkeypatch, lambda n, step: 1 if step == lengths[n] - 1 else 30)
    engine = make_engine("llama", ends=1)
    shapes = record_forwards(engine)
    rollout = engine.generate([PROMPTS[0], PROMPTS[1]], 2, RolloutConfig(max_new_tokens=9), [0, 1, 2, 3])
    assert rollout.lengths_N.tolist() == lengths
    # Step 1 samples 4 rows from the prefill; 3 of 4 go on, which is no reason to compact, so step 2 has 4 rows; then 1
    # of 4 goes on alone.
    assert shapes == [(2, 7), (4, 1), (1, 1), (1, 1)]
    assert engine.decoded_rows == 4 + 4 + 1 + 1
    engine.generate([PROMPTS[0], PROMPTS[1]], 2, RolloutConfig(max_new_tokens=9, max_batch_rows=2), [0, 1, 2, 3])
    assert engine.decoded_rows == (2 + 1) + (2 + 2 + 1 + 1)  # 1 of 2 goes on: compacted, in either batch


def test_waiting_prompts_take_the_place_of_finished_rows(
    make_engine: Callable[..., InProcessEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1, 1, 6, 6, 2, 2, 1, 5]  # four prompts, two completions each
    script(monkeypatch, lambda n, step: 1 if step == lengths[n] - 1 else 30)
    engine = make_engine("llama", ends=1)
    shapes = record_forwards(engine)
    prompts = [PROMPTS[p] for p in (0, 1, 3, 5)]
    finished: list[int] = []
    config = RolloutConfig(max_new_tokens=9, max_batch_rows=4)
    rollout = engine.generate(
        prompts, 2, config, list(range(8)), on_finished=lambda n, text, tokens: finished.append(n)
    )
    assert rollout.lengths_N.tolist() == lengths
    assert [tokens[:-1] for tokens in rollout.completions()] == [[30] * (length - 1) for length in lengths]
    # Token 1 of prompts 0 and 1 (4 rows) finishes prompt 0, so prompt 2 is prefilled and joins; after two more tokens
    # it leaves, and prompt 3 joins. Alone, batch after batch, the four prompts would take 6 + 5 tokens instead of 8.
    assert shapes[:3] == [(2, 7), (2, 1), (1, 5)]
    assert [shape for shape in shapes if shape[1] > 1] == [(2, 7), (1, 5), (1, 9)]
    assert engine.decoded_rows == 6 * 4 + 2 * 1  # always four rows, until only the last one is left
    assert finished[:2] == [0, 1]
    assert sorted(finished) == list(range(8))


@pytest.mark.parametrize("share_from", [0, 256])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_finished_rows_do_not_run_beyond_the_models_positions(
    make_engine: Callable[..., InProcessEngine], monkeypatch: pytest.MonkeyPatch, name: str, share_from: int
) -> None:
    monkeypatch.setattr(running_batch, "SHARE_FROM", share_from)
    engine = make_engine(name)
    seen: list[int] = []
    engine.policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    for seed in range(3):  # rows that have finished stay beside others that came later
        seeds = sample_seeds(seed, "train", 0, range(24), 2)
        engine.generate(
            [[20 + p] * 6 for p in range(24)],
            2,
            RolloutConfig(num_generations=2, max_new_tokens=24, max_batch_rows=8),
            seeds,
        )
    assert max(seen) <= 6 + 24 - 1


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_prompt_too_long_for_the_models_positions_is_refused_with_the_numbers(
    make_engine: Callable[..., InProcessEngine],
) -> None:
    engine = make_engine("gpt2", n_positions=20)
    with pytest.raises(
        ConfigError,
        match=r"prompt of 9 tokens and model.rollout.max_new_tokens=12 exceed the model's 20 positions: lower"
        r" max_new_tokens to 11, or shorten the prompt to 8 \(in a run: data.max_prompt_tokens=8 and",
    ):
        generate(engine, list(range(8)))
    fits = RolloutConfig(num_generations=G, max_new_tokens=11)
    assert max(len(tokens) for tokens, *_ in generate(engine, list(range(8)), fits).values()) == 11


@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_end_the_run(make_engine: Callable[..., InProcessEngine], greedy: bool) -> None:
    engine = make_engine("llama")
    engine.policy.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the policy's logits are not finite: its weights have diverged"):
        generate(engine, [0, 1], greedy=greedy)


def test_a_rollout_splits_into_completions(make_engine: Callable[..., InProcessEngine]) -> None:
    rollout = make_engine("llama").generate(PROMPTS[:3], 2, SAMPLING, range(6))
    assert isinstance(rollout, Rollout)
    assert rollout.num_generations == 2
    assert rollout.prompt_tokens == PROMPTS[:3]
    assert [len(tokens) for tokens in rollout.completions()] == rollout.lengths_N.tolist()
    assert [token for tokens in rollout.completions() for token in tokens] == rollout.completion_tokens_T.tolist()
    assert rollout.logprobs_T.dtype == torch.float32
    assert rollout.sampled_T.tolist() == [True] * len(rollout.completion_tokens_T)
    assert not rollout.logprobs_T.is_inference()  # autograd saves it for the backward pass


def test_a_sliding_window_under_sdpa_hides_old_tokens(
    make_engine: Callable[..., InProcessEngine], make_model: Callable[..., Any]
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = make_model("qwen2", **window)
    assert (model.config._attn_implementation, model.config.layer_types) == (
        "sdpa",
        ["full_attention", "sliding_attention"],
    )
    ours = generate(make_engine("qwen2", ends=1, **window), [1, 5, 0], greedy=True)
    for position in (1, 5, 0):  # two of them longer than the window; together they are padded
        expected = model.generate(
            torch.tensor([PROMPTS[position]]), max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0
        )
        assert ours[position, 0][0] == expected[0, len(PROMPTS[position]) :].tolist()
    engine = make_engine("qwen2", **window)
    sampled = generate(engine, list(range(8)))
    groups = [Group(PROMPTS[p], [sampled[p, sample][0] for sample in range(G)]) for p in range(8)]
    sampled_T = torch.cat([logprobs for _, logprobs, _, _ in sampled.values()])
    torch.testing.assert_close(sampled_T, engine.policy.score(groups)[0].detach(), atol=1e-5, rtol=0)
