"""The shortcuts of these tests: what they know is known of the same weights and the bundled template alone."""

from __future__ import annotations

import os

import bundled_shortcuts
import pytest
import torch
from bundled_shortcuts import FOR_REAL, exact_once, limited_unless_bundled
from transformers import PreTrainedModel

from stateset_lightning.policy import PolicyConfig, load_model
from stateset_lightning.tiny import TINY_FOLDER


class Difference:
    """Of a probe; counts how often a model was compared."""

    def __init__(self, off: float) -> None:
        self.off, self.count = off, 0

    def __call__(self, model: PreTrainedModel) -> float:
        self.count += model.config.vocab_size == 384  # a twin has a smaller vocabulary
        return self.off


def test_a_model_is_compared_again_where_its_weights_or_the_path_are_others(tiny_model: PreTrainedModel) -> None:
    exact = Difference(0.0)
    for _ in range(2):
        assert exact_once(tiny_model, "here", exact) is None
        assert exact_once(load_model(PolicyConfig("tiny")), "here", exact) is None
    assert exact.count == 1
    exact_once(tiny_model, "there", exact)
    assert exact.count == 2
    with torch.no_grad():
        next(tiny_model.parameters())[0, 0] += 1e-3
    exact_once(tiny_model, "here", exact)
    assert exact.count == 3


def test_what_is_not_exact_is_compared_every_time(tiny_model: PreTrainedModel) -> None:
    off = Difference(0.1)
    for count in (1, 2):
        assert exact_once(tiny_model, "off", off) == "in a probe its log-probs were off by 1.0e-01 nats"
        assert off.count == count


def test_another_template_goes_into_a_fork() -> None:
    ours = os.getpid()
    (bundled,) = limited_unless_bundled((os.getpid() for _ in range(1)), f"the chat template of {str(TINY_FOLDER)!r}")
    (other,) = limited_unless_bundled((os.getpid() for _ in range(1)), "the chat template of '/some/model'")
    assert bundled == ours
    assert other != ours


@pytest.mark.parametrize("place", FOR_REAL)
def test_the_rooms_that_this_is_about_go_the_real_way(
    place: str, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (bundled_shortcuts.ROOT / place).exists()
    monkeypatch.setenv("PYTEST_CURRENT_TEST", f"{place}test_some.py::test_it (call)")
    exact = Difference(0.0)
    for count in (1, 2):
        assert exact_once(tiny_model, "really", exact) is None
        assert exact.count == count
