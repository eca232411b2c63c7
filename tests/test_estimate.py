"""Memory of a run before it runs: what is counted, against numbers worked out by hand."""

import pytest
import torch

from stateset_lightning.estimate import Episode, Memory, cache_elements, memory_of, optimizer_ratio, saved_bytes
from stateset_lightning.policy import Policy, PolicyConfig

EPISODE = Episode(prompts=4, num_generations=8, prompt_tokens=10.0, completion_tokens=5.0, micro_steps=2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def estimate(policy, episode=EPISODE, **changes):
    options = {"optimizer": adamw, "has_reference": False, "saved_per_token": 1000.0, "rows": 32, "capacity": 20}
    return memory_of(policy, episode, **{**options, "sampling_dtype": torch.float32, **changes})


@pytest.mark.parametrize(
    ("make", "ratio"),
    [
        (adamw, 2),
        (lambda p: torch.optim.SGD(p, lr=1.0), 0),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), 1),
        (lambda p: torch.optim.Adafactor(p, lr=1.0), 2 / 64),  # a row and a column of the matrix
    ],
)
def test_optimizer_state_is_counted_not_guessed(make, ratio):
    assert optimizer_ratio(make) == ratio


def test_saved_bytes_are_those_of_activations_each_once():
    x, weight = torch.randn(4, 8), torch.randn(3, 8, requires_grad=True)

    def forward():
        y = torch.nn.functional.linear(x, weight).exp()  # keeps x, and its result
        return y * y  # keeps y, which is kept already

    assert saved_bytes(forward, [weight]) == 4 * 8 * 4 + 4 * 3 * 4


def test_the_cache_holds_keys_and_values_of_every_layer(make_model):
    assert cache_elements(make_model("llama")) == 2 * 2 * 2 * 8  # layers, keys and values, key heads, size of a head
    assert cache_elements(make_model("qwen3")) == 2 * 2 * 1 * 8


@pytest.mark.parametrize(
    ("packed", "budget", "tokens"),
    [(True, None, 2 * 10 + 16 * 5), (False, None, 16 * (10 + 5)), (True, 60, 60), (True, 500, 100)],
)
def test_tokens_of_a_micro_step(packed, budget, tokens):
    episode = Episode(4, 8, 10.0, 5.0, micro_steps=2, max_tokens_per_step=budget)
    assert episode.micro_step_tokens(packed) == tokens


def test_the_parts_of_a_policys_memory(tiny_model):
    policy = Policy(tiny_model, PolicyConfig("tiny"))
    found = estimate(policy)
    assert found.gradients == 4 * 1_034_368
    assert found.weights == found.gradients + sum(buffer.nbytes for buffer in policy.buffers())
    assert found.optimizer == 2 * found.gradients
    assert found.activations == 100 * 1000
    layers = tiny_model.config.num_hidden_layers
    assert found.cache == int(cache_elements(tiny_model) * 4 * 32 * 20 * (1 + 1 / 8 + 1 / layers))
    assert found.reference == 0
    assert estimate(policy, has_reference=True).reference == found.weights
    elsewhere = estimate(policy, rows=0)
    assert (elsewhere.cache, elsewhere.sampling) == (0, 0)
    halved = estimate(policy, sampling_dtype=torch.bfloat16)
    assert halved.cache == found.cache // 2


def test_gradient_checkpointing_keeps_what_each_layer_gets_and_one_layer(tiny_model):
    policy = Policy(tiny_model, PolicyConfig("tiny", gradient_checkpointing=True))
    layers, hidden = tiny_model.config.num_hidden_layers, tiny_model.config.hidden_size
    assert estimate(policy).activations == int(100 * 1000 / layers + 100 * layers * hidden * 4)


def test_a_phase_holds_what_lasts_and_what_is_its_own():
    memory = Memory(
        weights=100, gradients=10, optimizer=20, reference=3, cache=50, sampling=4, activations=60, head=5, process=1000
    )
    assert memory.phases == {"sampling": 1123 + 54, "training": 1123 + 75, "update": 1123 + 20}
    assert memory.peak == 1198
