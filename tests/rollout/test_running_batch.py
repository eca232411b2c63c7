"""Rows that come and go: their logits are those of the model alone, with prompts copied for each row or shared."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from recurrent_models import RECURRENT, small_family
from windowed_models import FAMILIES, random_tokens, windowed_model

from stateset_lightning.policy import Policy, PolicyConfig
from stateset_lightning.rollout.running_batch import SHARE_FROM, RunningBatch, SharingBatch, batch_kinds

STATES = ["qwen3_5_text", "lfm2", "falcon_h1", "mamba", "nemotron_h", "recurrent_gemma"]
PROMPTS = [[20, 31, 42, 53, 64], [75, 86], [97, 108, 119]]


def policy_model(model: Any) -> Any:
    """The model with the attention that can share prompts, where it is able to."""
    return Policy(model, PolicyConfig("random")).model


@pytest.mark.parametrize(
    ("kind", "name"), [(SharingBatch, "llama"), *((RunningBatch, name) for name in ["llama", *STATES])]
)
def test_logits_are_those_of_each_row_alone(
    make_model: Callable[..., Any], kind: type[RunningBatch], name: str
) -> None:
    model = small_family(name, RECURRENT[name]) if name in RECURRENT else policy_model(make_model(name))
    batch, rows = kind(model, max_new_tokens=8), []  # rows: prompt and completion of each
    tolerance = 1e-3 if name in RECURRENT else 1e-5  # a state sums up in chunks or token by token

    def check() -> None:
        expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        torch.testing.assert_close(batch.logits_BV, expected, atol=tolerance, rtol=tolerance)

    def admit(prompts: Sequence[list[int]], prompt_of_row: list[int]) -> None:
        batch.admit(prompts, prompt_of_row)
        rows.extend(list(prompts[p]) for p in prompt_of_row)
        check()

    def step(*tokens: int) -> None:
        batch.step(torch.tensor(tokens))
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        check()

    with torch.inference_mode():
        admit(PROMPTS[:2], [0, 0, 1])
        step(7, 8, 9)
        step(10, 11, 12)
        batch.keep(torch.tensor([1, 2]))
        del rows[0]
        step(13, 14)
        admit(PROMPTS[2:], [0, 0])
        step(15, 16, 17, 18)
        batch.keep(torch.tensor([2]))
        rows[:] = [rows[2]]
        step(19)
        batch.keep(torch.tensor([], dtype=torch.long))
        rows.clear()
        assert len(batch) == 0
        admit(PROMPTS[:1], [0])  # as if nothing had been before
        step(21)


def test_prompts_are_shared_where_that_is_possible_and_faster(make_model: Callable[..., Any]) -> None:
    model = policy_model(make_model("llama"))
    assert batch_kinds(model, SHARE_FROM)[0] is SharingBatch
    assert batch_kinds(model, SHARE_FROM - 1)[0] is RunningBatch
    assert batch_kinds(make_model("llama"), SHARE_FROM)[0] is RunningBatch  # its attention cannot
    assert batch_kinds(model.to(torch.bfloat16), SHARE_FROM)[0] is RunningBatch


@pytest.mark.parametrize("kind", [RunningBatch, SharingBatch])
def test_a_finished_row_stays_within_its_last_position(
    make_model: Callable[..., Any], kind: type[RunningBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy_model(make_model("llama"))
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][:, -1].tolist()), with_kwargs=True
    )
    batch = kind(model, max_new_tokens=3)
    with torch.inference_mode():
        batch.admit([[20] * 4], [0])
        for _ in range(2):
            batch.step(torch.tensor([7]))
        batch.admit([[30] * 6], [0])  # the first row has its three tokens, and has not left
        for _ in range(2):
            batch.step(torch.tensor([7, 8]))
    assert seen == [[3], [4], [5], [5], [6, 6], [6, 7]]


@pytest.mark.parametrize("family", FAMILIES)
def test_windowed_models_with_shared_prompts_decode_what_transformers_generates(family: str) -> None:
    """Prompts around the window of 7, rows that come later, and completions longer than it."""
    prompts, steps = random_tokens(SHARE_FROM, 4, 20, 7), 12
    plain, model = windowed_model(family), policy_model(windowed_model(family))
    expected = [
        plain.generate(
            torch.tensor([prompt]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0
        )
        for prompt in prompts
    ]
    assert batch_kinds(model, SHARE_FROM)[0] is SharingBatch
    batch = SharingBatch(model, steps)
    decoded: list[tuple[int, list[int]]] = []

    def decode(number: int) -> None:
        for _ in range(number):
            batch.logits_BV[:, 1] = -torch.inf  # the end, which transformers does not choose either
            tokens_B = batch.logits_BV.argmax(-1)
            batch.step(tokens_B)
            for (_, tokens), token in zip(decoded, tokens_B.tolist(), strict=True):
                tokens.append(token)

    with torch.inference_mode():
        batch.admit(prompts[:2], [0, 0, 1])
        decoded += [(p, []) for p in (0, 0, 1)]
        decode(8)
        batch.admit(prompts[2:], [0, 1, 1])
        decoded += [(p, []) for p in (2, 3, 3)]
        decode(4)
        batch.keep(torch.tensor([3, 4, 5]))
        finished, decoded[:] = decoded[:3], decoded[3:]
        decode(8)
    for p, tokens in [*finished, *decoded]:
        assert tokens == expected[p][0, len(prompts[p]) :].tolist()
