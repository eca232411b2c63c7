"""GRPOLightningModule: wires sampling, scoring, advantages and loss into Lightning's automatic optimisation.

A training step is one micro-step of an episode. The first one samples the prompts, scores the completions and makes the
episode; every one returns the loss of its part. Clipping, accumulation, precision, schedules and checkpoints are Lightning's.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from stateset_lightning.algorithm import GRPO, Algorithm
from stateset_lightning.bad_steps import is_bad, spoil_if_not_finite, write_bad_step
from stateset_lightning.callbacks.episodes import call_episode_hook
from stateset_lightning.collection import Collector, Sampler, check_failures, prepared
from stateset_lightning.episode import Episode, Part
from stateset_lightning.evaluation import Evaluation, EvaluationConfig
from stateset_lightning.loss import part_loss, seeded_dropout, zero_loss
from stateset_lightning.metrics import RunMetrics
from stateset_lightning.policy import AdapterReference, Policy, PolicyConfig, load_model, load_tokenizer, make_reference
from stateset_lightning.policy.precision import weights_dtype
from stateset_lightning.policy.schedule import Schedule, given_options
from stateset_lightning.records import CompletionRecord, make_records
from stateset_lightning.redaction import redacted
from stateset_lightning.resumable import ResumableModule
from stateset_lightning.rewards import Reward, Scorer, as_rewards
from stateset_lightning.rollout import InProcessEngine, RemoteEngine, RolloutConfig, RolloutEngine
from stateset_lightning.run_checks import (
    check_bad_steps,
    check_sampling_difference,
    check_strategy,
    check_weights,
    checks_of_run,
    optimizer_steps_of_run,
)
from stateset_lightning.sampling_ahead import next_batch, sampling_ahead
from stateset_lightning.seeding import derive_seed
from stateset_lightning.sharding import total_norm
from stateset_lightning.types import PromptBatch, Scores

PROGRESS_BAR = ("train/reward", "completion/mean_tokens", "work/tokens_per_s")


class GRPOLightningModule(ResumableModule):
    """Improves a language model on prompts whose answers can be scored, by group-relative policy optimisation.

    Args:
        policy: The model: a name or folder, or a `PolicyConfig`. With `load_from_checkpoint`, the checkpoint's, but for `LoadingOptions`.
        reward: What scores a completion: a list of reward functions, one, or a plain function `f(turns, context)`.
        rollout: How completions are sampled.
        algorithm: How scores become a loss; see `stateset_lightning.algorithm`.
        evaluation: What `validate` and `test` sample beside a greedy completion per prompt, and what counts as solved.
        engine: What samples, such as a `VLLMEngine`; by default the policy in this process.
        optimizer: Called with the trainable parameters.
        lr_scheduler: A `Schedule`, or a torch scheduler called with the optimizer; stepped once per optimizer step.
        reward_timeout: Seconds that a reward may take for one completion, unless it has a time-out of its own.
        reward_concurrency: Rewards that run at a time.
        max_reward_failures: Share of an episode's completions whose reward may fail before the run stops.
        max_tokens_per_step: Tokens that a micro-step forwards at most: groups are taken apart where that keeps it. Micro-steps are
            of even work in any case; what cannot be kept is counted (`work/over_budget_tokens`) and announced.
        max_bad_steps: Optimizer steps in a row that may be skipped because loss or gradient is not finite, before the run stops.
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
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008 (frozen)
        engine: RolloutEngine | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0),
        lr_scheduler: Schedule | LRSchedulerCallable | None = None,
        reward_timeout: Annotated[float, Gt(0)] | None = None,
        reward_concurrency: Annotated[int, Ge(1)] = 16,
        max_reward_failures: Annotated[float, Ge(0), Le(1)] = 0.5,
        max_tokens_per_step: Annotated[int, Ge(1)] | None = None,
        max_bad_steps: Annotated[int, Ge(0)] = 10,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        self.policy_config = PolicyConfig.of(policy)
        self.rollout = RolloutConfig(**rollout) if isinstance(rollout, Mapping) else rollout
        self.algorithm = copy.copy(algorithm)
        self.algorithm.setup(self.rollout.max_new_tokens, samples_elsewhere=isinstance(engine, RemoteEngine))
        self.rewards = as_rewards(reward)
        self.evaluation = EvaluationConfig(**evaluation) if isinstance(evaluation, Mapping) else evaluation
        self.evaluation.check_rewards([reward.name for reward in self.rewards])
        self._make_scorer = partial(
            Scorer, self.rewards, timeout=reward_timeout, max_concurrency=reward_concurrency, max_failures=max_reward_failures
        )
        self.scorer = self._make_scorer()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.max_tokens_per_step = max_tokens_per_step
        self.max_bad_steps = max_bad_steps
        self.tokenizer = load_tokenizer(self.policy_config)
        # Plain containers only: a checkpoint must load with `weights_only=True`.
        hyperparameters = {"policy": redacted(self.policy_config.to_dict()), "rollout": asdict(self.rollout), "seed": seed}
        self.save_hyperparameters(hyperparameters, logger=False)

        self.policy: Policy | None = None
        self._reference: tuple[Policy | AdapterReference, ...] = ()  # in a tuple, so that it is no submodule: not trained, not saved
        self.engine = engine
        self._ahead = sampling_ahead(self.rollout, engine)
        self._step_of_pass = 0
        self._episode_ends = False  # with this micro-step
        self._samples_are_fresh = False  # whether the weights are those that sampled
        self._collect_seconds = 0.0
        self.metrics = RunMetrics()
        self._evaluated: list[Scores] = []  # of a split so far
        self._evaluation = Evaluation([reward.name for reward in self.rewards], self.evaluation)
        self.last_records: list[CompletionRecord] = []
        """Completions of the newest episode or evaluation batch of this rank, for callbacks."""
        self._episode_records: list[CompletionRecord] = []

    # Set-up ------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self._step_started = None  # an earlier run may have ended inside an optimizer step
        self.scorer = self._make_scorer()

    def teardown(self, stage: str) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self.scorer.close()

    def configure_model(self) -> None:
        """Loads the weights, once; called by the Trainer after the data has been read and checked."""
        if self._trainer is not None:
            check_strategy(self.trainer)
        precision = "32-true" if self._trainer is None else str(self.trainer.precision)
        dtype = weights_dtype(self.policy_config.dtype, precision)
        if self.policy is None:
            self.policy = Policy(load_model(self.policy_config, dtype, self.seed), self.policy_config)
        self._shard_policy()
        self.engine = prepared(self.engine, self.tokenizer, self.rollout, precision)
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        if fits and self.algorithm.needs_reference and not self._reference:
            self._reference = (make_reference(self._sampled_policy, dtype),)

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
        for check in checks_of_run(self.trainer, self):
            check()
        self._loaded_policy.train()  # transformers loads in evaluation mode, where gradient checkpointing does nothing
        if isinstance(self.reference, Policy):
            self.reference.to(self.device)

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
        self._episode_ends = batch.micro_step == batch.num_micro_steps - 1
        if self._episode_ends:
            self._episode_states = None  # the next checkpoint comes after the episode's end
        bar = {name: self.metrics.last[name] for name in PROGRESS_BAR if name in self.metrics.last}
        self.log_dict(bar, prog_bar=True, logger=False, batch_size=1)
        micro_step = batch.micro_step % batch.steps_per_episode
        self._step_of_pass = micro_step // self._accumulate
        self._samples_are_fresh = batch.micro_step < self._accumulate
        loss = self._loss(episode.part(micro_step), episode.index, batch.micro_step)
        factor = self._ranks.world * self._accumulate
        self.metrics.step.add({"policy/loss": (loss.detach(), 1.0 / factor)})
        # DDP averages over ranks and Lightning divides by the accumulation: the sum over tokens is meant.
        return spoil_if_not_finite(loss) * factor

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = total_norm([p.grad for p in self._loaded_policy.parameters() if p.grad is not None])
        empty = self._episode is not None and self._episode.active_by_step[self._step_of_pass] == 0
        bad = not empty and is_bad(norm)
        if empty or bad:
            # None rather than zero, on which AdamW would still move the weights. The same on every rank: gradients are reduced by now.
            optimizer.zero_grad(set_to_none=True)
        if bad:
            assert self._episode is not None
            file = write_bad_step(self.trainer, self._episode, self._step_of_pass, norm, self._episode_records, self.tokenizer)
            rank_zero_warn(f"the gradient is not finite ({norm}): optimizer step skipped; see what it would have trained in {file}")
        if not empty:
            self._bad_steps = self._bad_steps + 1 if bad else 0
        self.metrics.step.add({"policy/empty_steps": (float(empty), 1), "policy/bad_steps": (float(bad), 1)})
        self.metrics.step.add({"policy/grad_norm": (0.0 if empty or bad else norm, 1)})
        check_bad_steps(self._bad_steps, self.max_bad_steps, self.trainer.global_step + 1)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        lr = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        check_weights(self._loaded_policy.parameters(), self.trainer.global_step + 1)
        optimizer.zero_grad(set_to_none=True)  # or they would lie beside the cache while the next episode is sampled
        assert self._step_started is not None
        seconds = time.perf_counter() - self._step_started
        self.metrics.step.add({"lr": (lr, 1), "time/step_s": (seconds, 1), "time/train_s": (seconds - self._collect_seconds, 1)})
        self._step_started, self._collect_seconds = None, 0.0
        self._publish(self.trainer.global_step + 1)
        if self._episode is not None and self._episode_ends:  # before any checkpoint of this step: a resumed run would not call it again
            call_episode_hook(self.trainer, "on_episode_end", self._episode.index, self.metrics.last)

    def _collect(self, batch: PromptBatch) -> Episode:
        """Samples, scores and plans an episode."""
        call_episode_hook(self.trainer, "on_episode_start", batch.episode_index)
        start = time.perf_counter()
        with self._gathered():
            collected = self._collector.collect(batch)
        episode, sample = collected.episode, collected.sample
        # Gathered now and not when a checkpoint is written, which would hang if one rank had failed by then.
        self._episode_states = self._ranks.gather(episode.state_dict()) if batch.num_micro_steps > 1 else None
        self.last_records = self._episode_records = make_records(sample.batch, sample.rollout, sample.scores, episode.advantages_N.tolist())
        self.metrics.add_episode(collected.metrics, sample.rollout, batch.episode_index, self._ranks)
        self._show()
        self._collect_seconds = time.perf_counter() - start
        return episode

    def _loss(self, part: Part, episode: int, micro_step: int) -> Tensor:
        if not part.groups:
            return zero_loss(self._loaded_policy)
        drops = self.policy_config.has_dropout
        seed = derive_seed(self.seed, "dropout", episode, micro_step, self._ranks.rank) if drops else None
        with seeded_dropout(self.device, seed):
            loss, metrics = part_loss(self._loaded_policy, self.algorithm, part, self.rollout.temperature)
        self.metrics.step.add(metrics)
        return loss

    # Evaluation --------------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One greedy completion per prompt, as rows for a file. Rewards that fail are null: there may be no target."""
        rollout, scores = self._sampler.sample(self._sampled_policy, batch, 1, greedy=True)
        self.last_records = make_records(batch, rollout, scores)
        return [record.to_dict() for record in self.last_records]

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _evaluate(self, batch: PromptBatch) -> None:
        rollout, scores = self._sampler.sample(self._sampled_policy, batch, 1, greedy=True)
        self.last_records = make_records(batch, rollout, scores)
        samples = None
        if count := self.evaluation.samples:
            sampler = replace(self._sampler, config=self.evaluation.sampling(self.rollout))
            samples = sampler.sample(self._sampled_policy, batch, count, greedy=False)
            self._evaluated.append(samples[1])
        self._evaluated.append(scores)
        self._evaluation.update(batch.scenarios, (rollout, scores), samples)

    def _log_evaluation(self, stage: str) -> None:
        self._release()
        evaluated, self._evaluated = self._evaluated, []
        check_failures(self.scorer, evaluated, self._ranks)  # a mean over what little is left would choose the best checkpoint
        values = {f"{stage}/{name}": value for name, value in self._evaluation.compute().items()}
        self._evaluation.reset()
        # "step" is Lightning's name for the x-axis; without it, it counts from 0 and ours, like `max_steps`, from 1.
        values["step"] = float(self.trainer.global_step)
        # They are of all ranks already: "max" leaves them as they are to the last bit, and Lightning, which cannot know, does not advise.
        self.log_dict(values, sync_dist=True, reduce_fx="max")

    # Small things ------------------------------------------------------------------------------------------------------------

    @property
    def _sampler(self) -> Sampler:
        assert self.engine is not None, "configure_model() makes the engine"
        system_prompt = getattr(getattr(self.trainer, "datamodule", None), "system_prompt", None)
        return Sampler(self.engine, self.scorer, self.rollout, self.seed, system_prompt, self._ahead)

    @property
    def _collector(self) -> Collector:
        data: Any = getattr(self.trainer, "datamodule", None)
        asks = getattr(data, "curriculum", None) is not None
        return Collector(
            self._sampler,
            self.algorithm,
            self._sampled_policy,
            self.reference,
            self._ranks,
            self._accumulate,
            self.max_tokens_per_step,
            replacements=getattr(data, "replacements", None),
            report=data.report_rewards if asks else None,
            upcoming=partial(next_batch, self.trainer),
        )

    @property
    def reference(self) -> Policy | AdapterReference | None:
        """The reference policy, while a run trains with one."""
        return self._reference[0] if self._reference else None

    @property
    def _loaded_policy(self) -> Policy:
        assert self.policy is not None, "configure_model() loads the policy"
        return self.policy

    def _publish(self, step: int) -> None:
        """To every logger at once: a value that `self.log` gets at an episode's start is lost under `log_every_n_steps`."""
        coefficients = {name: value for name, value in self.algorithm.state_dict().items() if name.endswith("_coefficient")}
        self.metrics.step.add({f"policy/{name}": (value, 1) for name, value in coefficients.items()})
        row = self.metrics.end_step(self._ranks)
        if self._samples_are_fresh and isinstance(self.engine, InProcessEngine) and not self.policy_config.has_dropout:
            dtype = self.engine.dtype or self._loaded_policy.model.dtype
            check_sampling_difference(row, dtype, self.rollout.temperature)
        if not row["policy/empty_steps"] and not row["policy/bad_steps"]:
            self.algorithm.adapt(row)  # the same means on every rank
        self._show()
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(row, step=step)

    def _show(self) -> None:
        """The newest values for callbacks that monitor; `self.log` is slow for so many, and the loggers have theirs."""
        self.trainer.callback_metrics.pop("step", None)  # the last validation's: every later checkpoint would be named by it
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.metrics.last.items()})
