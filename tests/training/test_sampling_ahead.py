"""Sampling ahead: what is drawn when, from which weights, and that nothing gets lost: errors, validation, the run's
end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from module_runs import SCENARIOS, DigitReward, fit, make_data, make_module, make_trainer, weights
from vllm_stub import Running, running

from stateset_lightning import GRPOLightningModule, PolicyConfig, RolloutConfig
from stateset_lightning.algorithm import DPPO, GRPO, GSPO
from stateset_lightning.algorithm.terms import Mismatch
from stateset_lightning.errors import ConfigError, ServerError
from stateset_lightning.policy import LoRAConfig
from stateset_lightning.rollout import VLLMEngine
from stateset_lightning.training.sampling_ahead import SamplingAhead


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as server:
        yield server


def make(server: Running, **overrides: Any) -> GRPOLightningModule:
    options: dict[str, Any] = {
        "reward": DigitReward(),
        "rollout": RolloutConfig(num_generations=2, max_new_tokens=3, sampling_ahead=1),
        "engine": VLLMEngine([server.url], max_wait_minutes=0.3 / 60),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        **overrides,
    }
    return GRPOLightningModule(PolicyConfig("tiny", lora=LoRAConfig(rank=2)), **options)


def small_data(**overrides: Any) -> Any:
    return make_data(**{"train": SCENARIOS[:6], "batch_size": 2, "validation": None, **overrides})


class Rows(Callback):
    """Metrics of every optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.rows.append(dict(pl_module.metrics.last))


def salts(server: Running) -> list[str]:
    """Version of the weights, of each sampled completion in order."""
    return [body["cache_salt"].rsplit("-", 1)[1] for body in server.stub.samples()]


def test_each_episode_is_sampled_from_the_weights_before_the_one_that_trains(tmp_path: Path, server: Running) -> None:
    rows = Rows()
    fit(tmp_path, make(server), small_data(), max_steps=3, callbacks=[rows])
    assert [row["work/sampled_ahead"] for row in rows.rows] == [0.0, 1.0, 1.0]
    # Version 1: as at the start, for episodes 0 and 1; 2: after the first step, for episode 2. Nothing behind the run's
    # end.
    assert salts(server) == ["1"] * 8 + ["2"] * 4
    assert all(row["mismatch/kl"] < 1e-3 for row in rows.rows[:1])
    assert rows.rows[1]["mismatch/kl"] > rows.rows[0]["mismatch/kl"]  # a step off-policy, and seen as such


def test_prompts_and_noise_are_those_of_a_run_that_does_not_sample_ahead(tmp_path: Path, server: Running) -> None:
    asked = []
    for ahead in (0, 1):
        server.stub.requests.clear()
        rollout = RolloutConfig(num_generations=2, max_new_tokens=2, sampling_ahead=ahead)
        fit(tmp_path, make(server, rollout=rollout), small_data(num_iterations=2), max_steps=5)
        bodies = server.stub.samples()
        asked.append(
            [
                sorted((body["seed"], tuple(body["prompt"])) for body in bodies[i : i + 4])
                for i in range(0, len(bodies), 4)
            ]
        )
    assert asked[0] == asked[1]
    assert len(asked[0]) == 3  # episodes, of two optimizer steps each


def test_validation_waits_for_what_is_being_drawn(tmp_path: Path, server: Running) -> None:
    """Or the server would get other weights in the middle of it."""
    module = make(server)
    options = {"max_steps": 2, "limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit(tmp_path, module, small_data(validation=SCENARIOS[:2]), **options)
    # Episodes 0 and 1 from version 1, validation from 2, and, episode 1 trained, validation from 3.
    assert salts(server) == ["1"] * 8 + ["2"] * 2 + ["3"] * 2


def test_one_module_is_validated_trained_and_trained_again(tmp_path: Path, server: Running) -> None:
    module, data = make(server), small_data(validation=SCENARIOS[:2])
    make_trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    for _ in range(2):
        rows = Rows()
        fit(tmp_path, module, data, callbacks=[rows], max_steps=2)
        assert [row["work/sampled_ahead"] for row in rows.rows] == [0.0, 1.0]


def test_an_error_in_the_thread_ends_the_run(tmp_path: Path, server: Running) -> None:
    goes_away_after(server, completions=4)
    module = make(server)
    with pytest.raises(ServerError, match=f"{server.url} has been away"):
        fit(tmp_path, module, small_data(), max_steps=3)
    assert module.trainer.global_step == 1  # the first episode was trained meanwhile


def test_a_run_goes_on_from_its_checkpoint_after_the_server_was_away(tmp_path: Path, server: Running) -> None:
    rollout = RolloutConfig(num_generations=2, max_new_tokens=3)

    def run(ckpt_path: Path | None = None) -> Any:
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"max_steps": 3, "enable_checkpointing": True, "callbacks": [keep], "ckpt_path": ckpt_path}
        return fit(tmp_path, make(server, rollout=rollout), small_data(), **options)

    complete = server.stub.complete
    goes_away_after(server, completions=8)
    with pytest.raises(ServerError, match="start it again, then the run with --ckpt_path last"):
        run()
    server.stub.complete = complete  # type: ignore[method-assign]
    server.stop()
    server.start()
    assert run(tmp_path / "step=2.ckpt").global_step == 3


def goes_away_after(server: Running, completions: int) -> None:
    """Probes do not count."""
    complete, count = server.stub.complete, 0

    def counted(body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal count
        count += "n" not in body
        if count > completions:
            threading.Thread(target=server.stop).start()
            return 500, "gone"
        return complete(body)

    server.stub.complete = counted  # type: ignore[method-assign]


def test_taking_waiting_and_forgetting() -> None:
    ahead: SamplingAhead[str] = SamplingAhead()
    assert ahead.take(0) is None
    gate = threading.Event()
    ahead.start(3, lambda: f"{gate.wait(60)}")
    threading.Timer(0.05, gate.set).start()
    ahead.wait()
    taken = ahead.take(3)
    assert taken is not None
    assert taken[0] == "True"
    assert 0.04 < taken[1] < 60
    assert ahead.take(3) is None  # once
    ahead.start(4, lambda: "of another episode")
    assert ahead.take(5) is None

    def fails() -> str:
        raise ZeroDivisionError

    ahead.start(6, fails)
    ahead.wait()  # says nothing yet
    with pytest.raises(ZeroDivisionError):
        ahead.take(6)
    gate.clear()
    ended = threading.Event()
    ahead.start(7, lambda: f"{gate.wait(60)}{ended.set()}")
    ahead.close()
    assert not ended.is_set()  # it did not wait
    gate.set()


def test_where_it_cannot_be_is_refused(tmp_path: Path, server: Running) -> None:
    with pytest.raises(ConfigError, match=r"sampling_ahead=1 .* dynamic_sampling=2 draws others by their rewards"):
        RolloutConfig(sampling_ahead=1, dynamic_sampling=2)
    with pytest.raises(ConfigError, match="which the engine in this process cannot, whose weights are the policy's"):
        make_module(rollout=RolloutConfig(sampling_ahead=1))


# The correction
# -----------------------------------------------------------------------------------------------------------------


def test_truncated_importance_sampling_is_the_default_with_servers(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "stateset_lightning"):
        assert make(server, algorithm=GRPO()).algorithm.mismatch == Mismatch("token_tis")
    assert (
        "mismatch: Mismatch(kind='token_tis', low=None, high=None), since another process samples (kind: none"
        in caplog.text
    )
    # its ratio is of whole completions
    assert make(server, algorithm=GSPO()).algorithm.mismatch == Mismatch("sequence_tis")
    # DPPO's own ratio has the sampler's log-probs.
    assert make(server, algorithm=DPPO()).algorithm.mismatch == Mismatch("none")
    given = Mismatch("icepop")
    assert make(server, algorithm=GRPO(mismatch=given)).algorithm.mismatch == given
    assert make_module().algorithm.mismatch is None


def test_no_correction_where_none_is_asked_for(tmp_path: Path, server: Running) -> None:
    ends = []
    for mismatch in (Mismatch("none"), Mismatch("token_tis"), Mismatch("token_tis", high=1e-3)):
        rollout = RolloutConfig(num_generations=2, max_new_tokens=3)
        trainer = fit(
            tmp_path, make(server, rollout=rollout, algorithm=GRPO(mismatch=mismatch)), small_data(), max_steps=1
        )
        ends.append(weights(trainer))
    name = next(name for name in ends[0] if "lora_B" in name)
    # on-policy: all weights are 1 but for float error
    torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"mismatch.high=2.0 has no effect on kind='none'"):
        Mismatch("none", high=2.0)
