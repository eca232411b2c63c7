"""Decoding by a graph, as far as a CPU shows it: its steps called one after the other, and recorded and replayed as a
CUDA graph does, with the same operations on the same addresses. Tokens and log-probs are those of the eager engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stateset_lightning.errors import ConfigError, NonFiniteError
from stateset_lightning.policy import LoRAConfig, Policy, PolicyConfig, load_model
from stateset_lightning.policy.probes import own_logprobs
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, cuda_decoding, probe, running_batch
from stateset_lightning.rollout.cpu_decoding import has_llama_layers
from stateset_lightning.rollout.cuda_decoding import LOOK_EVERY, GraphBatch
from stateset_lightning.rollout.decoding import Decoding
from stateset_lightning.seeding import sample_seeds

KNOWN = ["llama", "mistral", "qwen2", "qwen3"]
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")  # of tests for a GPU alone; cpu rehearses them
PROMPTS = [[20, 31, 42], [53, 64, 75, 86, 97, 108, 119], [130], [141, 152, 163, 174, 185], [55] * 9]
MANY_ENDS = [1, *range(345, 360)]
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh", "lift_fresh_copy"}
"""What a graph cannot record: the host would read from the device, or the device from the host."""


class Recording(TorchDispatchMode):
    """The operations of a call, with the very tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in WAITS
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor a tensor that was changed in place
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """As if there were CUDA graphs on this CPU; those that have been recorded."""
    made: list[Recording] = []

    def recorded(advance: Callable[[], None], device: torch.device) -> Recording:
        made.append(Recording())
        with made[-1]:
            advance()
        return made[-1]

    monkeypatch.setattr(cuda_decoding, "_recorded", recorded)
    for module in (cuda_decoding, running_batch, probe):
        monkeypatch.setattr(module, "WITH_GRAPHS", ("cpu",))
    return made


def engine_of(model: Any, tokenizer: Any, ends: list[int]) -> InProcessEngine:
    model.generation_config.eos_token_id = ends
    engine = InProcessEngine(tokenizer)
    engine.sync(Policy(model, PolicyConfig("random")))
    return engine


def same_samples(engine: InProcessEngine, **options: Any) -> tuple[int, int]:
    """Samples eagerly and by steps of a graph; the row-steps of both."""
    greedy = options.pop("greedy", False)
    size, seeds = (1, range(5)) if greedy else (3, sample_seeds(7, "train", 0, range(5), 3))
    rollouts, reports, steps = [], [], []
    for decoding in ("eager", "graph"):
        sampling = RolloutConfig(max_new_tokens=40, decoding=decoding, **options)  # type: ignore[arg-type]
        reports.append([])
        report = lambda *done: reports[-1].append(done)  # noqa: E731
        rollouts.append(engine.generate(PROMPTS, size, sampling, seeds, greedy=greedy, on_finished=report))
        steps.append(engine.decoded_rows)
    eager, graph = rollouts
    assert (graph.completions(), graph.finish_reasons, graph.texts) == (
        *(eager.completions(), eager.finish_reasons, eager.texts),
    )
    torch.testing.assert_close(graph.logprobs_T, eager.logprobs_T, atol=1e-5, rtol=0)
    if eager.sampling_mask is not None:
        assert graph.sampling_mask is not None
        for name in ("ids_K", "counts_T"):
            assert torch.equal(getattr(graph.sampling_mask, name), getattr(eager.sampling_mask, name))
    assert sorted(reports[1]) == sorted(reports[0])
    lengths = set(eager.lengths_N.tolist())
    assert min(lengths) < LOOK_EVERY < max(lengths) <= 40
    return steps[0], steps[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {"greedy": True}),
        ("qwen3", {"max_batch_rows": 6}),  # two groups, and others that wait
        ("llama", {"max_batch_rows": 2, "temperature": 1.3}),  # less than a group
        ("qwen2", {"top_k": 40, "top_p": 0.9, "min_p": 0.001, "stop": ["7"]}),
        ("qwen2", {"top_k": 40, "keep_sampling_mask": True, "max_batch_rows": 6}),
    ],
)
def test_samples_are_those_of_the_eager_engine(
    make_model: Callable[..., Any], tiny_tokenizer: Any, recordings: list[Recording], name: str, options: dict[str, Any]
) -> None:
    engine = engine_of(make_model(name), tiny_tokenizer, MANY_ENDS)
    same_samples(engine, **options)
    replays = sum(recording.replays for recording in recordings)
    assert replays > 5 * len(recordings) / 2  # by replaying, not by recording every step


def test_rows_leave_when_half_have_finished_and_others_take_their_place(
    make_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without graphs: the steps are called; and with prompts that are prefilled one or two at a time."""
    monkeypatch.setattr(cuda_decoding, "PREFILL_TOKENS", 14)
    engine = engine_of(make_model("llama"), tiny_tokenizer, MANY_ENDS)
    eager, graph = same_samples(engine, max_batch_rows=6)
    assert graph < 15 * 40  # in one batch, whoever has finished
    assert eager < graph


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_eager_decoding_looks_rarely_where_looking_waits(
    make_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = engine_of(make_model(name), tiny_tokenizer, MANY_ENDS)
    seeds = sample_seeds(7, "train", 0, range(5), 3)
    sampling = RolloutConfig(max_new_tokens=40, max_batch_rows=9, decoding="eager", stop=["7"])
    expected = engine.generate(PROMPTS, 3, sampling, seeds)
    assert 40 in expected.lengths_N.tolist()
    looks: list[int] = []
    stock = Decoding._look
    monkeypatch.setattr(running_batch, "tokens_between_looks", lambda device: LOOK_EVERY)
    monkeypatch.setattr(Decoding, "_look", lambda *args: looks.append(args[1]) or stock(*args))
    rollout = engine.generate(PROMPTS, 3, sampling, seeds)
    assert rollout.completions() == expected.completions()
    assert (rollout.finish_reasons, rollout.texts) == (expected.finish_reasons, expected.texts)
    torch.testing.assert_close(rollout.logprobs_T, expected.logprobs_T, atol=1e-5, rtol=0)
    assert set(looks) <= {LOOK_EVERY, 40 % LOOK_EVERY}


@torch.inference_mode()
@pytest.mark.parametrize("name", KNOWN)
def test_rows_that_have_ended_take_other_tokens_and_go_on(
    make_model: Callable[..., Any], recordings: list[Recording], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """In another order, one of them twice, without what they have decoded too far; two rows at a time."""
    monkeypatch.setattr(cuda_decoding, "PREFILL_TOKENS", 6)
    model = make_model(name)
    batch, tokens_B = GraphBatch(model, 8), torch.zeros(3, dtype=torch.long)
    batch.admit(PROMPTS[:2], [0, 1, 1])
    for tokens in ([5, 6, 7], [8, 9, 10]):
        tokens_B.copy_(torch.tensor(tokens))
        batch.repeat(lambda: batch.step(tokens_B), 1)
    kept = [batch.kept(2, 8), batch.kept(0, 5), batch.kept(2, 8)]
    rows = [[*PROMPTS[1], 7, 13, 14, 15], [*PROMPTS[0], 5, 8, 16], [*PROMPTS[1], 7, 17, 18]]
    batch = GraphBatch(model, 8)
    batch.resume(kept, rows)
    for tokens in ([], [21, 22, 23], [24, 25, 26]):
        if tokens:
            tokens_B.copy_(torch.tensor(tokens))
            batch.repeat(partial(batch.step, tokens_B), 1)
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        expected = torch.stack([own_logprobs(model, row)[-1] for row in rows])
        torch.testing.assert_close(batch.logits_BV.log_softmax(-1), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_adapter_is_computed_beside_the_weights_or_merged_into_them(
    adapted_policy: Policy, recordings: list[Recording]
) -> None:
    policy, model = adapted_policy, adapted_policy.model
    assert cuda_decoding.obstacle_to_graph(model) is None
    assert probe.difference_of_decoding(GraphBatch, model, decodes=False) < 1e-4
    assert recordings
    with policy.merged_adapter():
        assert cuda_decoding.obstacle_to_graph(model) is None
        assert probe.difference_of_decoding(GraphBatch, model, decodes=False) < 1e-4


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "LoRA"])
def test_what_training_alone_needs_slows_no_sampling(lora: LoRAConfig | None) -> None:
    config = PolicyConfig("tiny", gradient_checkpointing=True, dropout=0.1, lora=lora)
    model = Policy(load_model(config, torch.float32, 1), config).train().model
    assert cuda_decoding.obstacle_to_graph(model) is None
    assert has_llama_layers(model) or lora is not None  # an adapter in float32 is merged while sampling


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}),
    ],
)
def test_what_it_does_not_know_is_decoded_eagerly_and_announced_or_refused(
    make_model: Callable[..., Any],
    tiny_tokenizer: Any,
    recordings: list[Recording],
    caplog: pytest.LogCaptureFixture,
    name: str,
    changes: dict[str, Any],
) -> None:
    engine = engine_of(make_model(name, **changes), tiny_tokenizer, MANY_ENDS)
    for _ in range(2):
        engine.generate(PROMPTS, 2, RolloutConfig(max_new_tokens=4), range(10))
    said = [message for message in caplog.messages if "is sampled" in message]
    assert len(said) == 1
    assert "random is sampled without a CUDA graph, which is slower: it knows plain layers of llama" in said[0]
    assert recordings == []
    message = r"model.rollout.decoding='graph' cannot decode random: it knows .*; set it to auto or eager"
    with pytest.raises(ConfigError, match=message):
        engine.generate(PROMPTS, 2, RolloutConfig(max_new_tokens=4, decoding="graph"), range(10))


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_graph_that_is_not_exact_is_not_used(
    make_model: Callable[..., Any],
    tiny_tokenizer: Any,
    recordings: list[Recording],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """Of a card whose kernel is missing, or computes something else."""
    attend = cuda_decoding._attend_one

    def faulty(seen_BC: torch.Tensor, *args: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        return attend(seen_BC.roll(1, 1), *args)

    monkeypatch.setattr(cuda_decoding, "_attend_one", faulty)
    engine = engine_of(make_model("llama"), tiny_tokenizer, MANY_ENDS)
    engine.generate(PROMPTS, 2, RolloutConfig(max_new_tokens=4), range(10))
    engine.check(None, 1.0)
    assert "is sampled without a CUDA graph, which is slower: " in caplog.text
    assert ("no kernel image" in caplog.text) == (fault == "raises")


def test_the_graph_is_taken_where_there_is_one_and_announced_once(
    make_model: Callable[..., Any], tiny_tokenizer: Any, recordings: list[Recording], caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(make_model("llama"), tiny_tokenizer, MANY_ENDS)
    caplog.set_level("INFO")
    for _ in range(2):
        engine.generate(PROMPTS, 2, RolloutConfig(max_new_tokens=4), range(10))
    assert len(recordings) > 2
    assert [message for message in caplog.messages if "is sampled" in message] == [
        "random is sampled by a CUDA graph of each step (model.rollout.decoding=eager does without)."
    ]
    count = len(recordings)
    engine.generate(PROMPTS, 2, RolloutConfig(max_new_tokens=4, decoding="eager"), range(10))
    assert len(recordings) == count


def test_logits_that_are_not_finite_end_the_run(make_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    engine = engine_of(make_model("llama"), tiny_tokenizer, MANY_ENDS)
    sampling = RolloutConfig(max_new_tokens=20, decoding="graph")
    engine.generate(PROMPTS, 2, sampling, range(10))
    engine.policy.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the policy's logits are not finite"):
        engine.generate(PROMPTS, 2, sampling, range(10))


@pytest.mark.parametrize("counts", [None, [3, 2, 1]])
def test_the_kernel_takes_these_arguments(counts: list[int] | None) -> None:
    """PyTorch's own shape function accepts the call that a GPU would get; nothing is computed."""
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        cache = torch.empty(2, 3, 40, 2, 64, dtype=torch.bfloat16, device=device)
        query = torch.empty(3 if counts is None else sum(counts), 14, 64, dtype=torch.bfloat16, device=device)
        used_B = torch.empty(3, dtype=torch.int32, device=device)
        attend = cuda_decoding._attention(cache, used_B, counts)
        assert attend.func is cuda_decoding._flash  # type: ignore[attr-defined]
        assert (attend.args[2] == 1) == (counts is None)  # type: ignore[attr-defined]
        assert attend(query, cache, 0.125).shape == query.shape


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", KNOWN)
def test_on_a_gpu_a_graph_samples_what_the_cpu_does(
    make_model: Callable[..., Any], tiny_tokenizer: Any, name: str
) -> None:
    seeds, rollouts = sample_seeds(7, "train", 0, range(5), 3), []
    ways = (("cpu", torch.float32, "eager"), (DEVICE, torch.float32, "graph"), (DEVICE, torch.bfloat16, "graph"))
    for device, dtype, decoding in ways:
        sampling = RolloutConfig(max_new_tokens=40, max_batch_rows=9, decoding=decoding)  # type: ignore[arg-type]
        engine = engine_of(make_model(name).to(device, dtype), tiny_tokenizer, MANY_ENDS)
        rollouts.append(engine.generate(PROMPTS, 3, sampling, seeds))
        engine.check(None, 1.0)  # its log-probs are those of scoring
    pairs = zip(rollouts[0].completions(), rollouts[1].completions(), strict=True)
    assert sum(a == b for a, b in pairs) >= 14  # of 15: a uniform number may lie at a boundary
