"""GRPOLightningModule: Lightning's hooks, composed of the rooms; it holds no algorithm of its own.

A batch is a micro-step of an episode (see `training/step.py`). Clipping, schedules and checkpoints are Lightning's.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of annotated types (4.53).
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from stateset_lightning.algorithm import GRPO, Algorithm
from stateset_lightning.environments import EnvironmentConfig
from stateset_lightning.environments.player import Player
from stateset_lightning.errors import bounded
from stateset_lightning.evaluation import Evaluation, EvaluationConfig
from stateset_lightning.policy import AdapterReference, Policy, PolicyConfig, load_model, load_tokenizer
from stateset_lightning.policy.precision import weights_dtype
from stateset_lightning.ranks import Ranks
from stateset_lightning.redaction import redacted
from stateset_lightning.rewards import Reward, Scorer, as_rewards
from stateset_lightning.rollout import RemoteEngine, RolloutConfig, RolloutEngine, Targets, VLLMTeacher
from stateset_lightning.run.checkpoint import RunCheckpoint
from stateset_lightning.run.fsdp_strategy import SUPPORTED_STRATEGIES, FSDP2Strategy
from stateset_lightning.run.lightning_parts import RunsInTrainer
from stateset_lightning.run.records import make_records, write_bad_step
from stateset_lightning.seeding import run_seed
from stateset_lightning.threads import call_episode_hook
from stateset_lightning.training import checks
from stateset_lightning.training.collect import Sampler, ready_engine
from stateset_lightning.training.data import data_of, tell_of_turns
from stateset_lightning.training.episode import Episode
from stateset_lightning.training.evaluate import HeldOut
from stateset_lightning.training.fsdp import Shards, filled, reference_of, sharded
from stateset_lightning.training.metrics import PROGRESS_BAR, RunMetrics
from stateset_lightning.training.micro_steps import choose_micro_steps
from stateset_lightning.training.resample import Sample
from stateset_lightning.training.sampling_ahead import next_batch, sampling_ahead
from stateset_lightning.training.schedule import Schedule, given_options, make_optimizer, with_scheduler
from stateset_lightning.training.step import TrainingState, TrainingStep
from stateset_lightning.training.teacher import checked_teacher, make_teacher
from stateset_lightning.types import PromptBatch

if TYPE_CHECKING:
    from stateset_lightning.datamodule import ScenarioDataModule


@bounded("model")
class GRPOLightningModule(RunsInTrainer):
    """Improves a language model on prompts whose answers can be scored, by group-relative policy optimisation.

    Args:
        policy: The model: a name, folder or `PolicyConfig`. `load_from_checkpoint` takes only `LoadingOptions` of it.
        reward: What scores a completion: a list of reward functions, one, or a plain function `f(turns, context)`.
        rollout: How completions are sampled.
        environment: What answers completions, in conversations of several turns; None: a single turn.
        algorithm: How scores become a loss; see `stateset_lightning.algorithm`.
        evaluation: What `validate` and `test` sample beside a greedy completion per prompt, and what counts as solved.
        engine: What samples, such as a `VLLMEngine`; by default the policy in this process.
        teacher: For an algorithm that distils: a model as `policy` names one, or a `VLLMTeacher`.
        optimizer: Called with the trainable parameters.
        lr_scheduler: A `Schedule`, or a torch scheduler called with the optimizer; stepped once per optimizer step.
        reward_timeout: Seconds that a reward may take for one completion, unless it has a time-out of its own.
        reward_concurrency: Rewards that run at a time.
        max_reward_failures: Share of an episode's completions whose reward may fail before the run stops.
        max_tokens_per_step: Tokens that a micro-step forwards at most, where splitting groups can keep that.
        max_bad_steps: Optimizer steps in a row that may be skipped because their gradient is not finite.
        seed: Seed of all sampling; None for that of `seed_everything`.
    """

    accept_changes: str | Sequence[str] = ()  # of what a resumed run is made of: docs/reliability.md
    tokenizer: Any  # the policy's, loaded at once; the weights are loaded when a run starts

    def __init__(
        self,
        policy: str | PolicyConfig,
        *,
        reward: Reward,
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008 (frozen)
        environment: EnvironmentConfig | None = None,
        algorithm: Algorithm = GRPO(),  # noqa: B008 (copied, never changed)
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        teacher: str | PolicyConfig | VLLMTeacher | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable | None = None,
        reward_timeout: Annotated[float, Gt(0)] | None = None,
        reward_concurrency: Annotated[int, Ge(1)] = 16,
        max_reward_failures: Annotated[float, Ge(0), Le(1)] = 0.5,
        max_tokens_per_step: Annotated[int, Ge(1)] | None = None,
        max_bad_steps: Annotated[int, Ge(0)] = 10,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.policy_config = PolicyConfig.of(policy)
        self.rollout = RolloutConfig(**rollout) if isinstance(rollout, Mapping) else rollout
        self.algorithm = copy.copy(algorithm)
        self.environment = EnvironmentConfig.of(environment)
        most = self.rollout.max_new_tokens * (self.environment.max_turns if self.environment else 1)
        self.algorithm.setup(most, samples_elsewhere=isinstance(engine, RemoteEngine))
        self.teacher = checked_teacher(teacher, self.algorithm, self.rollout)
        self.rewards = as_rewards(reward)
        self.evaluation = EvaluationConfig(**evaluation) if isinstance(evaluation, Mapping) else evaluation
        self.evaluation.check_rewards([reward.name for reward in self.rewards])
        limits = {"timeout": reward_timeout, "max_concurrency": reward_concurrency, "max_failures": max_reward_failures}
        self._make_scorer: Callable[[], Scorer] = partial(Scorer, self.rewards, **limits)  # type: ignore[arg-type]
        self.scorer = self._make_scorer()
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.max_tokens_per_step, self.max_bad_steps = max_tokens_per_step, max_bad_steps
        self.tokenizer = load_tokenizer(self.policy_config)
        # Plain containers only: a checkpoint must load with `weights_only=True`.
        options = {"policy": redacted(asdict(self.policy_config)), "rollout": asdict(self.rollout), "seed": seed}
        self.save_hyperparameters(options, logger=False)

        self.policy: Policy | None = None
        self.engine = engine
        # In tuples, so that they are no submodules: not trained, not saved.
        self._reference: tuple[Policy | AdapterReference, ...] = ()
        self._teacher: tuple[Policy | VLLMTeacher, ...] = ()
        self._unsharded: Shards | None = None  # of a policy whose weights are sharded
        self._seed = seed
        self._data: ScenarioDataModule | None = None  # of the run, if it is ours
        self._ahead = sampling_ahead(self.rollout, engine)
        self._checkpoint = RunCheckpoint(self)
        self.state = TrainingState()
        self.metrics: RunMetrics = self.state.metrics  # of the run; `metrics.last` has the newest value of each
        self._held_out = HeldOut(Evaluation([reward.name for reward in self.rewards], self.evaluation))
        self._newest: tuple[Sample, list[float] | None] | None = None  # what `last_records` is made of

    # What callbacks may look at ---------------------------------------------------------------------------------------

    @property
    def episode(self) -> Episode | None:
        """What is being trained on, of this rank."""
        return self.state.episode

    @property
    def last_records(self) -> list[dict[str, Any]]:
        """Completions of the newest episode or evaluation batch of this rank; see `run.records.make_records`."""
        return [] if self._newest is None else make_records(*self._newest)

    @property
    def reference(self) -> Policy | AdapterReference | None:
        """The reference policy, while a run trains with one."""
        return self._reference[0] if self._reference else None

    @property
    def inside_optimizer_step(self) -> bool:
        """Whether a gradient is being accumulated or applied: a checkpoint made now could not be resumed exactly."""
        return self.state.started is not None

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the weights."""
        return self._unsharded is not None

    @property
    def seed(self) -> int:
        """The seed of all sampling: the one given, or that of `seed_everything`, also if that was called later."""
        return run_seed(self._seed)

    def setup(self, stage: str) -> None:
        tell_of_turns(self.environment)
        self._data = data_of(self.trainer)
        self.state.started = None  # an earlier run may have ended inside an optimizer step
        self.scorer = self._make_scorer()
        for check in checks.checks_before_weights(self._data, self) if stage == "fit" else []:
            check()

    def teardown(self, stage: str) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self.scorer.close()

    def configure_model(self) -> None:
        """Loads the weights, once; called by the Trainer after the data has been read and checked."""
        if self._trainer is not None:
            checks.check_strategy(self.trainer, SUPPORTED_STRATEGIES)
        precision = "32-true" if self._trainer is None else str(self.trainer.precision)
        dtype = weights_dtype(self.policy_config.dtype, precision, self.policy_config.is_adapted)
        if self.policy is None:
            self.policy = Policy(load_model(self.policy_config, dtype, self.seed, self.tokenizer), self.policy_config)
        prompt = self._data.longest_prompt if self._data and self.environment is None else None
        longest = (self.policy.context_length or 0) if prompt is None else prompt + self.rollout.max_new_tokens
        if fits := self._trainer is not None and self.trainer.state.fn == "fit":
            self._checkpoint.start()
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDP2Strategy) and self._unsharded is None:
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            self._unsharded = sharded(self.policy, mesh, self.trainer.strategy.root_device, self.engine)
        self.engine = ready_engine(self.engine, self.tokenizer, self.rollout, precision)
        on_targets = self.algorithm.trains_on_targets
        self._targets = Targets.of(self.tokenizer, self.rollout, self._data) if on_targets else None
        if fits and self.algorithm.needs_reference and not self._reference:
            self._reference = (reference_of(self._sampled_policy, dtype, self._unsharded),)
        self._checkpoint.prepare_for(longest)
        if fits:
            self._teacher = self._teacher or make_teacher(self.teacher, self._sampled_policy, dtype)
            choose_micro_steps(self.trainer, self._loaded_policy, self._data, self)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.optimizer, self._loaded_policy.parameters())
        self._checkpoint.given_options = given_options(optimizer)
        return with_scheduler(optimizer, self.lr_scheduler, self.trainer)

    def on_fit_start(self) -> None:
        for check in [*checks.checks_of_run(self.trainer, self), self._checkpoint.check_optimizer]:
            check()
        self._loaded_policy.train()  # transformers loads in evaluation mode, where gradient checkpointing does nothing
        if isinstance(self.reference, Policy):
            self.reference.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._checkpoint.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._checkpoint.load(checkpoint, training=self._trainer is not None and self.trainer.training)

    def on_train_start(self) -> None:
        self._checkpoint.restore_options()

    # Training ---------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, *args: Any) -> None:
        checks.check_batch(batch)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = on_train_batch_start  # type: ignore[assignment]

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-step, summed over its tokens with the weights of the whole optimizer step."""
        if begins := batch.micro_step == 0:
            call_episode_hook(self.trainer, "on_episode_start", batch.episode_index)
        loss = self._step.loss(batch)
        if begins:
            self._newest = self.state.sample_and_advantages
            self._show_metrics()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = self._step.check_gradient(optimizer)
        if norm is not None:
            assert self.state.episode is not None
            made_of, step = self.state.sample_and_advantages, self.state.step_of_pass
            records = [] if made_of is None else make_records(*made_of)
            file = write_bad_step(self.trainer, self.state.episode, step, norm, records, self.tokenizer)
            rank_zero_warn(f"the gradient is not finite ({norm}): optimizer step skipped; {file} has its completions")
        checks.check_bad_steps(self.state.bad_steps, self.max_bad_steps, self.trainer.global_step + 1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        lr = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step = self.trainer.global_step + 1
        row = self._step.finish(optimizer, lr, step)
        self._show_metrics()
        # To every logger at once: what `self.log` gets at an episode's start is lost under `log_every_n_steps`.
        for logger in self.trainer.loggers if self.trainer.is_global_zero else []:
            logger.log_metrics(row, step=step)
        # Before any checkpoint of this step: a resumed run would not call it again.
        if self.state.episode_ends and self.state.episode is not None:
            call_episode_hook(self.trainer, "on_episode_end", self.state.episode.index, self.metrics.last)

    # Evaluation -------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        # Here and not batch by batch: ranks may have different numbers of batches.
        if self._unsharded is not None:
            self._unsharded.fill()

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._newest = (self._held_out.answer(self._sampler, self._sampled_policy, batch), None)

    test_step = validation_step

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One greedy completion per prompt, as rows for a file. Rewards that fail are null: there may be no target."""
        self._newest = (self._sampler.sample(self._sampled_policy, batch, 1, greedy=True), None)
        return self.last_records

    def on_predict_epoch_end(self) -> None:
        if self._unsharded is not None:
            self._unsharded.empty()

    def on_validation_epoch_end(self) -> None:
        self.on_predict_epoch_end()
        metrics, stage = self._held_out.compute(self.scorer, Ranks.current()), "test" if self.trainer.testing else "val"
        values = {f"{stage}/{name}": value for name, value in metrics.items()}
        # Lightning's name for the x-axis; without it, it counts from 0 and ours, like `max_steps`, from 1.
        values["step"] = float(self.weights_step)
        # They are of all ranks already: "max" leaves them as they are to the last bit, without Lightning's advice.
        for name, value in values.items():
            self.log(name, value, prog_bar=name == f"{stage}/reward", sync_dist=True, reduce_fx="max")

    on_test_epoch_end = on_validation_epoch_end

    @property
    def _step(self) -> TrainingStep:
        data = self._data
        return TrainingStep(
            state=self.state,
            policy=self._loaded_policy,
            sampled_policy=self._sampled_policy,
            unsharded=nullcontext if self._unsharded is None else partial(filled, self._unsharded),
            reference=self.reference,
            teacher=self._teacher[0] if self._teacher else None,
            algorithm=self.algorithm,
            sampler=self._sampler,
            ranks=Ranks.current(),
            accumulate=self.trainer.accumulate_grad_batches,
            max_tokens_per_step=self.max_tokens_per_step,
            report=None if data is None or data.curriculum is None else data.report_rewards,
            upcoming=partial(next_batch, self.trainer),
        )

    @property
    def _sampler(self) -> Sampler:
        assert self.engine is not None, "configure_model() makes the engine"
        tell = partial(call_episode_hook, self._trainer, "on_turn_end", self._trainer, self)
        given = self.rollout, self._data, self.tokenizer, tell
        player = Player.of(self.environment, *given) if self.environment else None
        made = self._ahead, getattr(self._data, "replacements", None), self._targets, player
        return Sampler(self.engine, self.scorer, self.rollout, self.seed, *made)

    @property
    def _loaded_policy(self) -> Policy:
        assert self.policy is not None, "configure_model() loads it"
        return self.policy

    @property
    def _sampled_policy(self) -> Policy:  # of a sharded policy, while its unsharded copy is filled
        return self._loaded_policy if self._unsharded is None else self._unsharded.policy

    def _show_metrics(self) -> None:
        """The newest values for callbacks that monitor; `self.log` is slow for so many, and the loggers have theirs."""
        shown = self.trainer.callback_metrics
        shown.pop("step", None)  # the last validation's: every later checkpoint would be named by it
        shown.update({name: torch.tensor(value, dtype=torch.float32) for name, value in self.metrics.last.items()})
        self.trainer.progress_bar_metrics.update({k: v for k, v in self.metrics.last.items() if k in PROGRESS_BAR})
