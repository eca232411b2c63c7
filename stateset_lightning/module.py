"""GRPOLightningModule: wires sampling, scoring, advantages and loss into Lightning's automatic optimisation.

A training step is one micro-step of an episode. The first one samples the prompts, scores the completions and makes the
episode; every one returns the loss of its part. Clipping, accumulation, precision, schedules and checkpoints are Lightning's.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from stateset_lightning.algorithm import GRPO, Algorithm
from stateset_lightning.callbacks.episodes import call_episode_hook
from stateset_lightning.collection import Sampler, add_fixed_logprobs, check_failures, work_metrics
from stateset_lightning.episode import Episode, Part, Plan, make_episode
from stateset_lightning.evaluation import RewardMeans
from stateset_lightning.loss import part_loss
from stateset_lightning.metrics import RunMetrics, episode_metrics
from stateset_lightning.policy import Policy, PolicyConfig, context_length, load_model, load_tokenizer
from stateset_lightning.policy.precision import sampling_dtype, weights_dtype
from stateset_lightning.policy.schedule import Schedule, given_options, keep_given_options
from stateset_lightning.ranks import Ranks
from stateset_lightning.records import CompletionRecord, make_records
from stateset_lightning.rewards import Reward, Scorer, as_rewards
from stateset_lightning.rollout import InProcessEngine, RolloutConfig, RolloutEngine
from stateset_lightning.run_checks import check_bad_steps, check_resumable, check_reward_names, check_run, optimizer_steps_of_run
from stateset_lightning.seeding import derive_seed, run_seed
from stateset_lightning.types import PromptBatch

PROGRESS_BAR = ("train/reward", "completion/mean_tokens", "work/tokens_per_s")


class GRPOLightningModule(LightningModule):
    """Improves a language model on prompts whose answers can be scored, by group-relative policy optimisation.

    Args:
        policy: The model: a name or folder, or a `PolicyConfig`.
        reward: What scores a completion: a list of reward functions, one, or a plain function `f(turns, context)`.
        rollout: How completions are sampled.
        algorithm: How scores become a loss; see `stateset_lightning.algorithm`.
        optimizer: Called with the trainable parameters.
        lr_scheduler: A `Schedule`, or a torch scheduler called with the optimizer; stepped once per optimizer step.
        reward_timeout: Seconds that a reward may take for one completion, unless it has a time-out of its own.
        reward_concurrency: Rewards that run at a time.
        max_reward_failures: Share of an episode's completions whose reward may fail before the run stops.
        seed: Seed of all sampling; None for that of `seed_everything`.
    """

    tokenizer: Any
    """The policy's tokenizer, loaded at once; the weights are loaded when a run starts."""

    def __init__(
        self,
        policy: str | PolicyConfig,
        *,
        reward: Reward,
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008 (frozen)
        algorithm: Algorithm = GRPO(),  # noqa: B008 (copied, never changed)
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable | None = None,
        reward_timeout: Annotated[float, Gt(0)] | None = None,
        reward_concurrency: Annotated[int, Ge(1)] = 16,
        max_reward_failures: Annotated[float, Ge(0), Le(1)] = 0.5,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.policy_config = PolicyConfig.of(policy)
        self.rollout = RolloutConfig(**rollout) if isinstance(rollout, Mapping) else rollout
        self.algorithm = copy.copy(algorithm)
        self.algorithm.setup(self.rollout.max_new_tokens)
        self.rewards = as_rewards(reward)
        self._make_scorer = partial(
            Scorer, self.rewards, timeout=reward_timeout, max_concurrency=reward_concurrency, max_failures=max_reward_failures
        )
        self.scorer = self._make_scorer()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._given_seed = seed
        self.tokenizer = load_tokenizer(self.policy_config)
        # Plain containers only: a checkpoint must load with `weights_only=True`.
        self.save_hyperparameters({"policy": self.policy_config.to_dict(), "rollout": asdict(self.rollout), "seed": seed}, logger=False)

        self.policy: Policy | None = None
        self._reference: tuple[Policy, ...] = ()  # in a tuple, so that it is no submodule: not trained, not saved
        self.engine: RolloutEngine | None = None
        self._episode: Episode | None = None
        self._step_of_pass = 0
        self._step_started: float | None = None
        self._collect_seconds = 0.0
        self._bad_steps = 0
        self._episode_states: list[dict[str, Any]] | None = None  # of all ranks, while a checkpoint would need them
        self.metrics = RunMetrics()
        self._eval_rewards: RewardMeans | None = None
        self._given_options: list[dict[str, Any]] = []
        self._saved_options: list[dict[str, Any]] | None = None  # those of the run that is resumed
        self.last_records: list[CompletionRecord] = []
        """Completions of the newest episode or evaluation batch of this rank, for callbacks."""

    # Set-up ------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.scorer = self._make_scorer()

    def teardown(self, stage: str) -> None:
        self.scorer.close()

    def configure_model(self) -> None:
        """Loads the weights, once; called by the Trainer after the data has been read and checked."""
        precision = "32-true" if self._trainer is None else str(self.trainer.precision)
        dtype = weights_dtype(self.policy_config.dtype, precision)
        if self.policy is None:
            self.policy = Policy(load_model(self.policy_config, dtype), self.policy_config)
        if self.engine is None:
            self.engine = InProcessEngine(self.tokenizer)
        if isinstance(self.engine, InProcessEngine):
            self.engine.dtype = sampling_dtype(precision)
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        if fits and self.algorithm.needs_reference and not self._reference:
            # From the source, not from the policy: that may have been trained or restored since.
            self._reference = (Policy(load_model(self.policy_config, dtype), self.policy_config).requires_grad_(False),)
        self._eval_rewards = self._eval_rewards or RewardMeans([reward.name for reward in self.rewards])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self._loaded_policy.parameters() if p.requires_grad])
        self._given_options = given_options(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        if isinstance(self.lr_scheduler, Schedule):
            scheduler: Any = self.lr_scheduler.build(optimizer, optimizer_steps_of_run(self.trainer))
        else:
            scheduler = self.lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        rewards = [reward.name for reward in self.rewards]
        check_reward_names(self.trainer, rewards)
        names = [f"val/{name}" for name in RewardMeans.logged_names(rewards)]
        check_run(self.trainer, names, context_length(self._loaded_policy.model), self.rollout.max_new_tokens)
        self._loaded_policy.train()  # transformers loads in evaluation mode, where gradient checkpointing does nothing
        for reference in self._reference:
            reference.to(self.device)

    def on_train_start(self) -> None:
        if self._saved_options is not None:  # optimizer and scheduler have been restored by now
            scheduler = self.lr_schedulers()
            keep_given_options(self.optimizers(use_pl_optimizer=False), scheduler, self._given_options, self._saved_options)  # type: ignore[arg-type]
            self._saved_options = None

    # Training ----------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-step, summed over its tokens with the weights of the whole optimizer step."""
        if self._step_started is None:
            self._step_started = time.perf_counter()
        if batch.micro_step == 0:
            self._episode = self._collect(batch)
        episode = self._episode
        if episode is None or episode.index != batch.episode_index:
            raise RuntimeError(
                f"micro-step {batch.micro_step} of episode {batch.episode_index} came without the episode's first micro-step"
            )
        if batch.micro_step == batch.num_micro_steps - 1:
            self._episode_states = None  # the next checkpoint comes after the episode's end
        bar = {name: self.metrics.last[name] for name in PROGRESS_BAR if name in self.metrics.last}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=1)
        micro_step = batch.micro_step % batch.steps_per_episode
        self._step_of_pass = micro_step // self._accumulate
        loss = self._loss(episode.part(micro_step), episode.index, batch.micro_step)
        factor = self._ranks.world * self._accumulate
        self.metrics.step.add({"policy/loss": (loss.detach(), 1.0 / factor)})
        # DDP averages over ranks and Lightning divides by the accumulation: the sum over tokens is meant.
        return loss * factor

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self._loaded_policy.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        empty = self._episode is not None and self._episode.active_by_step[self._step_of_pass] == 0
        bad = not empty and not math.isfinite(norm)
        if empty or bad:
            # None rather than zero, on which AdamW would still move the weights. The same on every rank: gradients are reduced by now.
            optimizer.zero_grad(set_to_none=True)
        if not empty:
            self._bad_steps = self._bad_steps + 1 if bad else 0
        self.metrics.step.add({"policy/empty_steps": (float(empty), 1), "policy/bad_steps": (float(bad), 1)})
        self.metrics.step.add({"policy/grad_norm": (0.0 if empty or bad else norm, 1)})
        check_bad_steps(self._bad_steps, self.trainer.global_step + 1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        lr = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad(set_to_none=True)  # or they would lie beside the cache while the next episode is sampled
        assert self._step_started is not None
        seconds = time.perf_counter() - self._step_started
        self.metrics.step.add({"lr": (lr, 1), "time/step_s": (seconds, 1), "time/train_s": (seconds - self._collect_seconds, 1)})
        self._step_started, self._collect_seconds = None, 0.0
        self._publish(self.trainer.global_step + 1)

    def on_train_batch_end(self, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        if batch.micro_step == batch.num_micro_steps - 1:
            call_episode_hook(self.trainer, "on_episode_end", batch.episode_index, self.metrics.last)

    def _collect(self, batch: PromptBatch) -> Episode:
        """Samples, scores and plans an episode."""
        call_episode_hook(self.trainer, "on_episode_start", batch.episode_index)
        start = time.perf_counter()
        rollout, scores = self._sampler.sample(self._loaded_policy, batch, self.rollout.num_generations, greedy=False)
        seconds = time.perf_counter() - start
        check_failures(self.scorer, scores, self._ranks)
        plan = Plan(len(batch), self.rollout.num_generations, batch.steps_per_episode, self._accumulate, self._ranks)
        episode = make_episode(batch.episode_index, rollout, scores, [reward.weight for reward in self.rewards], self.algorithm, plan)
        several_steps = batch.num_micro_steps > self._accumulate
        add_fixed_logprobs(episode, self._loaded_policy, self._reference, self.rollout.temperature, several_steps=several_steps)
        # Gathered now and not when a checkpoint is written, which would hang if one rank had failed by then.
        self._episode_states = self._ranks.gather(episode.state_dict()) if batch.num_micro_steps > 1 else None
        self.last_records = make_records(batch, rollout, scores, episode.advantages_N.tolist())
        work = work_metrics(rollout, scores, episode, self._loaded_policy, seconds, self._ranks.world)
        metrics = {**episode_metrics(rollout, scores, episode.advantages_N, self._ranks.world), **work}
        self.metrics.add_episode(metrics, rollout, batch.episode_index, self._ranks)
        self._show()
        self._collect_seconds = time.perf_counter() - start
        return episode

    def _loss(self, part: Part, episode: int, micro_step: int) -> Tensor:
        if not part.groups:
            return self._zero_loss()
        with self._seeded_dropout(episode, micro_step):
            loss, metrics = part_loss(self._loaded_policy, self.algorithm, part, self.rollout.temperature)
        self.metrics.step.add(metrics)
        return loss

    def _zero_loss(self) -> Tensor:
        """Zero, but a function of every parameter: under DDP each rank must take part in every reduction."""
        return torch.stack([p.flatten()[0] for p in self._loaded_policy.parameters() if p.requires_grad]).sum() * 0.0

    @contextmanager
    def _seeded_dropout(self, episode: int, micro_step: int) -> Iterator[None]:
        """Dropout draws from the global generator: a seeded fork of it resumes exactly and leaves it untouched."""
        if self.policy_config.dropout == 0:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(self.seed, "dropout", episode, micro_step, self._ranks.rank))
            yield

    # Evaluation --------------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One greedy completion per prompt, as rows for a file. Rewards that fail are null: there may be no target."""
        rollout, scores = self._sampler.sample(self._loaded_policy, batch, 1, greedy=True)
        self.last_records = make_records(batch, rollout, scores)
        return [record.to_dict() for record in self.last_records]

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, batch: PromptBatch) -> None:
        rollout, scores = self._sampler.sample(self._loaded_policy, batch, 1, greedy=True)
        self.last_records = make_records(batch, rollout, scores)
        assert self._eval_rewards is not None
        self.scorer.check_failures(scores)  # a mean over what little is left would choose the best checkpoint
        self._eval_rewards.update(scores.values_NF.to(self.device), scores.totals_N.to(self.device), rollout.lengths_N.to(self.device))

    def _log_evaluation(self, stage: str) -> None:
        assert self._eval_rewards is not None
        values = {f"{stage}/{name}": value for name, value in self._eval_rewards.compute().items()}
        self._eval_rewards.reset()
        # "step" is Lightning's name for the x-axis; without it, it counts from 0 and ours, like `max_steps`, from 1.
        self.log_dict({**values, "step": float(self.trainer.global_step)}, rank_zero_only=False)

    # Checkpoints -------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for logger in self.trainer.loggers:
            logger.save()  # metrics up to here survive together with the checkpoint
        checkpoint["stateset"] = {
            "seed": self.seed,
            "algorithm": self.algorithm.state_dict(),
            "episode": self._episode_states,
            "metrics": self.metrics.state_dict(),
            "accumulate": self._accumulate,
            "optimizer_options": self._given_options,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["stateset"]
        self.algorithm.load_state_dict(state["algorithm"])
        self.metrics.load_state_dict(state["metrics"])
        if self._trainer is None or not self.trainer.training:
            return
        self._saved_options = state["optimizer_options"]
        check_resumable(state, self.seed, self._accumulate, self._ranks.world)
        if (episodes := state["episode"]) is not None:
            self._episode, self._episode_states = Episode.from_state_dict(episodes[self._ranks.rank]), episodes

    # Small things ------------------------------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """The seed of all sampling: the one given, or that of `seed_everything`, also if it was called after this was made."""
        return run_seed() if self._given_seed is None else self._given_seed

    @property
    def _sampler(self) -> Sampler:
        assert self.engine is not None, "configure_model() makes the engine"
        system_prompt = getattr(getattr(self.trainer, "datamodule", None), "system_prompt", None)
        return Sampler(self.engine, self.scorer, self.rollout, self.seed, system_prompt)

    @property
    def _loaded_policy(self) -> Policy:
        assert self.policy is not None, "configure_model() loads the policy"
        return self.policy

    @property
    def _ranks(self) -> Ranks:
        return Ranks(self.trainer.global_rank, self.trainer.world_size) if self._trainer is not None else Ranks()

    @property
    def _accumulate(self) -> int:
        return int(self.trainer.accumulate_grad_batches)

    def _publish(self, step: int) -> None:
        """To every logger at once: a value that `self.log` gets at an episode's start is lost under `log_every_n_steps`."""
        row = self.metrics.end_step(self._ranks)
        self._show()
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(row, step=step)

    def _show(self) -> None:
        """The newest values for callbacks that monitor; `self.log` is slow for so many, and the loggers have theirs."""
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.metrics.last.items()})
