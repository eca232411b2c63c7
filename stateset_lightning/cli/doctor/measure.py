"""An episode on the device, for real: sampled, scored, and one of its micro-steps trained, with the config's own sizes.

Two cases are measured: lengths as they are sampled, and the worst case: the longest prompts, every completion of
`max_new_tokens`, every conversation as long as it may be. No weight changes. Letters: N completions, T completion
tokens.

Of each phase seconds and peak memory: what is allocated on a CUDA device, and elsewhere what is resident of the whole
process. Running out of either is a result.
"""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from stateset_lightning.datamodule import ScenarioDataModule
from stateset_lightning.environments.player import Player
from stateset_lightning.module import GRPOLightningModule
from stateset_lightning.policy import AdapterReference, Group, Policy, load_model, make_reference
from stateset_lightning.policy.precision import sampling_dtype, weights_dtype
from stateset_lightning.rollout import InProcessEngine, Targets
from stateset_lightning.seeding import sample_seeds
from stateset_lightning.threads import heartbeat
from stateset_lightning.training.collect import Sampler, answered
from stateset_lightning.training.episode import MicroBatch, groups_of
from stateset_lightning.training.loss import micro_batch_loss
from stateset_lightning.training.metrics import peak_memory_mb
from stateset_lightning.training.micro_steps import choose_micro_steps, longest_completion
from stateset_lightning.training.resample import Sample
from stateset_lightning.training.teacher import make_teacher, with_comparison
from stateset_lightning.types import PromptBatch, Rollout, Scores

SAMPLED, WORST = "as sampled", "worst case"

# Seconds after which a phase is stopped: a large model on a CPU must not take hours.
LIMIT = 120.0

# The phases, and what to change where one runs out of memory.
#
# `log-probs`: the reference's and the old ones, computed once per episode; `training`: forward and backward of a
# micro-step; `update`: the optimizer's step.
REMEDIES = {
    "load": "set model.policy.lora (no second model for a reference) or trainer.precision, or choose a smaller model",
    "sampling": "lower model.rollout.max_batch_rows or model.rollout.max_new_tokens, or, as conversations are scored"
    " beside it, use a smaller reward model",
    "scoring": "lower data.batch_size, or use a smaller reward model",
    "log-probs": "lower model.rollout.max_new_tokens or data.max_prompt_tokens",
    "training": "raise data.steps_per_episode and trainer.accumulate_grad_batches alike, or set"
    " model.policy.gradient_checkpointing or model.policy.lora",
    "update": "set model.policy.lora, or choose an optimizer with less state",
}

Result = TypeVar("Result")


class TooSlow(BaseException):
    """A phase takes longer than its limit. No `Exception`: what environments raise while they are waited for is."""


class Meter:
    """Runs phases, and prints what each costs.

    `costs` keeps, by (case, phase), seconds, peak memory in MB, and whether the phase was stopped at its limit, so that
    both are lower bounds.

    Args:
        device: The one whose memory counts.
        problems: Gets a line for each phase that runs out of memory.
    """

    def __init__(self, device: torch.device, problems: list[str]) -> None:
        self.device = device
        self.problems = problems
        self.costs: dict[tuple[str, str], tuple[float, float, bool]] = {}

    def run(self, case: str, phase: str, work: Callable[[], Result], limit: float | None = None) -> Result | None:
        """The result of `work`; None if it was stopped or ran out of memory.

        It is stopped by a signal: when the operation that runs has ended, which may be a backward pass.

        Args:
            case: Which sizes are measured, in a word.
            phase: A key of `REMEDIES`.
            work: Called once, in the main thread.
            limit: Seconds, by default `LIMIT`; 0 for none.
        """

        def stop(*_: Any) -> None:
            raise TooSlow

        heartbeat.doing(f"{phase}, {case}")
        result, stopped = None, False
        garbage_collection_cuda()
        _reset_peak_memory(self.device)
        before = signal.signal(signal.SIGALRM, stop)
        start = time.perf_counter()
        try:
            signal.setitimer(signal.ITIMER_REAL, LIMIT if limit is None else limit)
            result = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except TooSlow:
            stopped = True
        except RuntimeError as error:
            if not is_oom_error(error):
                raise
            self.problems.append(f"out of memory on {self.device}, {case}, {phase}: {REMEDIES[phase]}")
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        seconds, peak = time.perf_counter() - start, peak_memory_mb(self.device)
        self.costs[case, phase] = seconds, peak, stopped
        heartbeat.say(f"  {case:11} {phase:9} {'> ' * stopped}{seconds:,.2f} s, {peak:,.1f} MB")
        return result


def _reset_peak_memory(device: torch.device) -> None:
    """Begins a new peak, where the system can: a process outside Linux has one peak since its start."""
    if device.type == "cuda":
        torch.cuda.init()  # before it there are no statistics to reset
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)


class EpisodeMeasurement:
    """Measures the phases of an episode.

    Args:
        trainer: Of the run; with its optimizer once anything is trained.
        module: Gets its policy from `load`; its engine must be ready for `sample`.
        data: Set up.
        meter: Runs the phases.
    """

    def __init__(self, trainer: Trainer, module: GRPOLightningModule, data: ScenarioDataModule, meter: Meter) -> None:
        self.trainer, self.module, self.data, self.meter = trainer, module, data, meter
        self.policy: Policy
        self.reference: Policy | AdapterReference | None = None
        self.optimizer_steps = data.num_iterations * data.steps_per_episode // trainer.accumulate_grad_batches
        self.on_targets = module.algorithm.trains_on_targets
        self.num_generations = 1 if self.on_targets else module.rollout.num_generations
        # Whether the policy scores an episode before it is trained on.
        several = self.optimizer_steps > 1 and not self.on_targets
        self.needs_old = several or module.algorithm.selects_tokens or module.algorithm.kl_in_reward

    def load(self) -> None:
        """Policy and reference, on the device; not by `configure_model`, which would shard the policy."""
        module, device = self.module, self.meter.device
        config = module.policy_config
        dtype = weights_dtype(config.dtype, str(self.trainer.precision), config.is_adapted)

        def load() -> None:
            model = load_model(module.policy_config, dtype, module.seed, module.tokenizer).to(device)
            module.policy = self.policy = Policy(model, module.policy_config).train()
            self.longest_completion = longest_completion(self.policy, self.data, module)
            self.policy.prepare_for(self.data.longest_prompt + self.longest_completion)
            if module.algorithm.needs_reference:
                self.reference = make_reference(self.policy, dtype)
                if isinstance(self.reference, Policy):
                    self.reference.to(device)
            module._teacher = make_teacher(module.teacher, self.policy, dtype)
            choose_micro_steps(self.trainer, self.policy, self.data, module)

        self.meter.run(SAMPLED, "load", load, limit=0)

    def take_first_step(self) -> None:
        """A step of one token: every later one finds the optimizer's state in memory, and the device ready."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0 * group["lr"]  # see `_update`
        self.meter.run("first step", "training", lambda: self._backward([Group([3], [[3]])]))
        self.meter.run("first step", "update", self._update)

    def sample(self) -> Rollout | None:
        """An episode of prompts spread over the training data; where targets are trained on, with these."""
        if self.on_targets:
            targets = Targets.of(self.module.tokenizer, self.module.rollout, self.data)
            return targets.rollout(self.batch(self.spread_rows()), lambda *_: None)
        chosen = [self.data.served("train")[1][i] for i in self.spread_rows()]
        return self._sample(SAMPLED, chosen, self.num_generations, self.module.engine, self.module.rollout.stop)

    def play(self) -> Sample | None:
        """An episode of conversations with their scores, which rewards compute while others are still played."""
        module = self.module
        assert module.environment is not None
        assert module.engine is not None
        # Callbacks are not told of turns: none of them has been set up.
        player = Player.of(module.environment, module.rollout, self.data, module.tokenizer, lambda turn, taken: None)
        sampler = Sampler(module.engine, module.scorer, module.rollout, module.seed, player=player)
        batch = self.batch(self.spread_rows())
        return self.meter.run(SAMPLED, "sampling", lambda: sampler.sample(self.policy, batch))

    def batch(self, rows: list[int]) -> PromptBatch:
        """The prompts at these rows of the training data."""
        return self.data.served_prompts("train").batch(rows, rows, "train", episode_index=0)

    def score(self, batch: PromptBatch, texts: Sequence[str], lengths: Sequence[int]) -> Scores | None:
        """Scores of completions of so many tokens: the same number for each prompt."""

        def score() -> Scores:
            size = len(texts) // len(batch)
            with self.module.scorer.start(len(texts), self.meter.device, size) as session:
                for n, text in enumerate(texts):
                    turns = answered(batch.conversations[n // size], text)
                    session.submit(n, turns, batch.scenarios[n // size].columns(), completion_tokens=lengths[n])
                return session.collect()

        return self.meter.run(SAMPLED, "scoring", score)

    def train(self, rollout: Rollout) -> str:
        """Trains a micro-step of these completions; says how large it is."""
        # An engine may return no tokens.
        return self._train(SAMPLED, rollout.prompt_tokens, [tokens or [3] for tokens in rollout.completions()])

    def run_worst_case(self, samples: bool) -> str:
        """The worst case, with sampling or without; says what was done. Nothing can be sampled afterwards.

        A conversation's is its last turn, with all before it prefilled, row by row: more than goes on from a cache.
        """
        module, prompts, limit = self.module, self.data.served("train")[1], self.longest_completion
        rows = np.resize(np.argsort(-prompts.lengths, kind="stable"), self.data.batch_size).tolist()
        longest = [prompts[i] for i in rows]
        completions = [(prompt * limit)[:limit] for prompt in longest for _ in range(self.num_generations)]
        samples = samples and not self.on_targets
        if samples:
            self.policy.model.generation_config = None  # it names tokens that end a completion, too
            # No token of this tokenizer ends a completion, so that each is sampled to `max_new_tokens`.
            endless: Any = SimpleNamespace(eos_token_id=-1, pad_token_id=-1, decode=lambda tokens, **_: "")
            engine = InProcessEngine(endless, sampling_dtype(str(self.trainer.precision)))
            each = 1 if module.environment is None else self.num_generations
            before = limit - module.rollout.max_new_tokens
            begun = [(prompt * (1 + limit))[: len(prompt) + before] for prompt in longest for _ in range(each)]
            self._sample(WORST, begun, self.num_generations // each, engine, stop=[])
        share = self._train(WORST, longest, completions)
        how = "sampled on past the end of sequence, trained" if samples else "trained"
        what = "completions" if module.environment is None else "conversations"
        return f"the longest prompts, {what} of {limit} tokens, {how} with made-up tokens; {share}"

    def seconds(self) -> tuple[float, bool]:
        """Of an episode as sampled, one phase after the other; and whether it is only known to take longer."""
        times = {"training": self.data.num_iterations * self.data.steps_per_episode, "update": self.optimizer_steps}
        costs = {phase: cost for (case, phase), cost in self.meter.costs.items() if case == SAMPLED and phase != "load"}
        seconds = sum(times.get(phase, 1) * seconds for phase, (seconds, _, _) in costs.items())
        return seconds, any(stopped for _, _, stopped in costs.values())

    def spread_rows(self) -> list[int]:
        """The rows of the training data that `sample` takes; some of them twice where there are too few."""
        size = self.data.batch_size
        return [i * len(self.data.served("train")[1]) // size for i in range(size)]

    def _sample(self, case: str, prompts: list[list[int]], size: int, engine: Any, stop: list[str]) -> Rollout | None:
        config = replace(self.module.rollout, stop=stop)
        seeds_N = sample_seeds(self.module.seed, "doctor", 0, range(len(prompts)), size)
        engine.sync(self.policy)
        return self.meter.run(case, "sampling", lambda: engine.generate(prompts, size, config, seeds_N))

    def _train(self, case: str, prompts: list[list[int]], completions: Sequence[Sequence[int]]) -> str:
        """Log-probs of all completions, a micro-step with its share of them, and the update; says what was trained.

        The share is the first of equal ones: a group is split where it ends inside it.
        """
        temperature, tokens = self.module.rollout.temperature, [torch.tensor(completion) for completion in completions]
        groups = groups_of(prompts, tokens, range(len(tokens)))
        share = groups_of(prompts, tokens, range(math.ceil(len(tokens) / self.data.steps_per_episode)))
        if scorers := [scorer for scorer in (self.policy if self.needs_old else None, self.reference) if scorer]:
            self.meter.run(case, "log-probs", lambda: [s.score_without_gradient(groups, temperature) for s in scorers])
        self.meter.run(case, "training", lambda: self._backward(share))
        self.meter.run(case, "update", self._update)
        self.trainer.optimizers[0].zero_grad(set_to_none=True)  # also of what was stopped
        rows = [len(group.prompt) + len(completion) for group in share for completion in group.completions]
        size, form = len(rows) * max(rows), "a padded row per completion"
        if self.policy.uses_packed_scoring:
            size, form = sum(len(g.prompt) + g.num_completion_tokens for g in share), "each prompt once per group"
        return f"a micro-step of {len(rows)} completions, {size:,} tokens ({form})"

    def _backward(self, groups: Sequence[Group]) -> None:
        """Loss and gradient of a micro-step, as in training, where every completion counts."""
        algorithm = self.module.algorithm
        if self.trainer.accumulate_grad_batches > 1:  # it finds the gradient of the micro-steps before
            for weight in self.policy.parameters():
                weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        lengths_N = torch.tensor([len(completion) for group in groups for completion in group.completions])
        zeros_T = torch.zeros(int(lengths_N.sum()))
        batch = MicroBatch(
            groups=list(groups),
            advantages_N=torch.ones(len(lengths_N)),
            weights_N=torch.ones(len(lengths_N)) / len(zeros_T),
            lengths_N=lengths_N,
            sampling_logprobs_T=zeros_T,
            old_logprobs_T=zeros_T if self.needs_old else None,
            ref_logprobs_T=zeros_T if self.reference else None,
            select_T=zeros_T == 0 if algorithm.selects_tokens else None,
            teacher_logprobs_T=zeros_T,
            right_N=torch.ones(len(lengths_N)),
        )
        teacher, temperature = (*self.module._teacher, None)[0], self.module.rollout.temperature
        with self.trainer.precision_plugin.forward_context():
            batch = with_comparison(batch, algorithm, teacher, temperature)
            loss, _ = micro_batch_loss(self.policy, algorithm, batch, temperature, 0, 1)
        loss.backward()

    def _update(self) -> None:
        """The optimizer's step with gradients and learning rate of zero: as much work, and no weight changes."""
        self.trainer.optimizers[0].zero_grad(set_to_none=False)
        self.trainer.optimizers[0].step()
