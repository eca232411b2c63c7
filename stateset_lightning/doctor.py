"""`stateset-lightning doctor`: what a config amounts to, before a long run. Trains nothing and writes nothing.

It resolves the config, reads the data, loads the model, samples one group, scores one completion, estimates memory and work, and makes
all checks that can be made before the first step.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from stateset_lightning.checkpoint_io import local_path, read_checkpoint
from stateset_lightning.cli_messages import without_traceback
from stateset_lightning.collection import prepared
from stateset_lightning.errors import UserError
from stateset_lightning.estimate import Episode, Memory, memory_of, saved_bytes
from stateset_lightning.lightning_cli import StatesetCLI
from stateset_lightning.metrics import peak_memory_mb
from stateset_lightning.policy import Group, Policy, load_model
from stateset_lightning.policy.precision import sampling_dtype, weights_dtype
from stateset_lightning.redaction import redacted
from stateset_lightning.resume import continue_run
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.run_checks import check_resumable, checks_of_run, optimizer_steps_of_run
from stateset_lightning.seeding import sample_seeds
from stateset_lightning.types import FinishReason, Scenario, conversation

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

GROUPS = 4
"""That are sampled, of prompts spread over the training data."""

BARS = 8
"""Of the histogram of prompt lengths."""

TEXT = 300
"""Characters of a prompt or completion that are shown."""


def main(words: Sequence[str]) -> None:
    """Runs the subcommand with the words that follow it.

    Raises:
        SystemExit: With code 0 or 1.
        UserError: If the command line or the config cannot be read.
    """
    DoctorCLI(["fit", *words])


class DoctorCLI(StatesetCLI):
    """Takes the command line of `fit`, and examines instead of fitting."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--sample", type=bool, default=True)

    def _run_subcommand(self, subcommand: str) -> None:
        problems = Examination(self).run()
        raise SystemExit(1 if problems else 0)


class Examination:
    """One look at all that a run is made of; each part is printed as it is found."""

    def __init__(self, cli: StatesetCLI) -> None:
        self.parser, self.config = cli._parser("fit"), cli.config.fit
        self.trainer, self.module, self.data = cli.trainer, cli.model, cli.datamodule
        self.device = self.trainer.strategy.root_device
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.groups: list[Group] = []

    def run(self) -> list[str]:
        """Prints what it finds; returns the problems."""
        self._show_config()
        # As `fit` does, without its set-up of loggers, checkpoints and processes.
        self.trainer.datamodule = self.data  # type: ignore[attr-defined]
        self.data.trainer = self.module.trainer = self.trainer
        self.data.tokenizer = self.data.tokenizer or self.module.tokenizer
        with self._part("data"):
            self.data.setup("fit")
            self._show_data()
        has_data = not self.problems  # without, most checks have nothing to look at
        process = 0 if self.device.type == "cuda" else int(peak_memory_mb(self.device) * 2**20)
        with self._part("model"):
            self._load()
        policy = self.module.policy
        if has_data and policy is not None:
            self._check()
        if self.problems or policy is None:
            self.notes.append("reward, memory and work are looked at when there is no problem before them")
        else:
            with self._part("reward"):
                self._score(policy)
            with self._part("memory and work"):
                self._show_memory_and_work(policy, process)
        self.module.teardown("fit")
        return self._verdict()

    def _show_config(self) -> None:
        given = redacted(yaml.safe_load(self.parser.dump(self.config, skip_default=True)))
        shown = {key: value for key, value in given.items() if key not in ("config", "sample")}
        print("config, without defaults")
        _show(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=120).splitlines())

    def _show_data(self) -> None:
        for split in ("train", "validation"):
            if split not in self.data.num_scenarios:
                continue
            scenarios, prompts = self.data.served(split)
            lengths, dropped, cut = prompts.lengths, self.data.dropped[split], self.data.truncated[split]
            limit = self.data.max_prompt_tokens
            share = "" if limit is None else f", {(dropped + cut) / (len(lengths) + dropped):.1%} above data.max_prompt_tokens={limit}"
            fate = f"; {dropped} dropped, {cut} cut to their last tokens" if limit is not None else ""
            tokens = f"{lengths.min()} to {lengths.max()} tokens, {lengths.mean():.1f} on average"
            _show([f"{split}: {len(lengths):,} rows of {tokens}{share}{fate}", *_histogram(lengths)])
            if topics := Counter(s.topic for s in scenarios.scenarios if s.topic is not None):
                common = ", ".join(f"{topic} {count}" for topic, count in topics.most_common(BARS))
                _show([f"{len(topics)} topics: {common}{', ...' if len(topics) > BARS else ''}"])
        if "validation" in self.data.num_scenarios:
            seen = {tuple(prompt) for prompt in self.data.served("train")[1]}
            if both := sum(tuple(prompt) in seen for prompt in self.data.served("validation")[1]):
                self.notes.append(f"{both} prompts of the validation are among those of the training: its reward will flatter")
        self.data.train_dataloader()  # refuses a curriculum beside overfit_batches

    def _load(self) -> None:
        """The policy on its device; not by `configure_model`, which would shard it."""
        module, precision = self.module, str(self.trainer.precision)
        dtype = weights_dtype(module.policy_config.dtype, precision)
        module.policy = Policy(load_model(module.policy_config, dtype, module.seed).to(self.device), module.policy_config)
        made = module.configure_optimizers()  # refuses a schedule without an end, and options that the optimizer does not take
        self.trainer.optimizers = [made["optimizer"] if isinstance(made, dict) else made]
        if self.config.sample and not isinstance(module.engine, InProcessEngine | None):
            self.notes.append("a target is scored instead of a completion: sampling would load weights into the servers of model.engine")
            self.config.sample = False
        if self.config.sample:
            module.engine = prepared(module.engine, module.tokenizer, module.rollout, precision)

    # A few groups, one reward --------------------------------------------------------------------------------------------------

    def _score(self, policy: Policy) -> None:
        """Samples groups of a few training prompts and scores one completion; without sampling, a target."""
        scenarios, prompts = self.data.served("train")
        scenario = scenarios.scenarios[0]
        _show([f"prompt      {scenario.id}: {_shortened(scenario.turns()[-1].content)}"])
        if self.config.sample:
            count = min(GROUPS, len(prompts))
            text, num_tokens = self._sample(policy, [prompts[i * len(prompts) // count] for i in range(count)])
        else:
            text = "" if scenario.target is None else str(scenario.target)
            tokens = self.module.tokenizer(text, add_special_tokens=False)["input_ids"]
            _show([f"target      {_shortened(text)}"])
            self.groups, num_tokens = [Group(prompts[0], [tokens or prompts[0][-1:]])], len(tokens)
        self._call_rewards(scenario, text, num_tokens)

    def _sample(self, policy: Policy, prompts: list[list[int]]) -> tuple[str, int]:
        """The first completion, and its number of tokens."""
        module, size = self.module, self.module.rollout.num_generations
        module.engine.sync(policy)
        seeds_N = sample_seeds(module.seed, "doctor", 0, range(len(prompts)), size)
        rollout = module.engine.generate(prompts, size, module.rollout, seeds_N)
        completions = [tokens or prompts[0][-1:] for tokens in rollout.completions()]  # an engine may return an empty one
        self.groups = [Group(prompt, completions[p * size : (p + 1) * size]) for p, prompt in enumerate(prompts)]
        truncated, count = sum(reason == FinishReason.LENGTH for reason in rollout.finish_reasons), len(completions)
        mean = rollout.lengths_N.double().mean()
        _show([f"completion  {_shortened(rollout.texts[0])}"])
        _show([f"            one of {count}, which have {mean:.1f} tokens on average; {truncated} are cut at max_new_tokens"])
        if truncated == count:
            limit = module.rollout.max_new_tokens
            self.notes.append(f"all {count} completions are cut at model.rollout.max_new_tokens={limit}: raise it, if they should end")
        return rollout.texts[0], int(rollout.lengths_N[0])

    def _call_rewards(self, scenario: Scenario, text: str, num_tokens: int) -> None:
        turns = conversation(scenario, text, self.data.system_prompt)
        with self.module.scorer.start(1) as session:
            session.submit(0, turns, scenario.columns(), completion_tokens=num_tokens)
            scores = session.collect()
        parts = [f"{name} {value:.3f}" for name, value in zip(scores.names, scores.values_NF[0].tolist(), strict=True)]
        _show([f"reward      {scores.totals_N[0]:.3f} = {', '.join(parts)}, in {scores.seconds:.2f} s"])
        for failure in scores.failures:
            place = without_traceback(f"{failure.error}: {failure.message}\n{failure.traceback}")
            self.problems.append(f"reward {failure.reward} fails on scenario {scenario.id}: {place.strip()}")

    # Memory and work -----------------------------------------------------------------------------------------------------------

    def _show_memory_and_work(self, policy: Policy, process: int) -> None:
        module, data, lengths = self.module, self.data, self.data.served("train")[1].lengths
        typical = Episode(
            prompts=data.batch_size,
            num_generations=module.rollout.num_generations,
            prompt_tokens=float(lengths.mean()),
            completion_tokens=float(np.mean([len(completion) for group in self.groups for completion in group.completions])),
            micro_steps=data.steps_per_episode,
            max_tokens_per_step=module.max_tokens_per_step,
        )
        longest = np.sort(lengths)[-data.batch_size :]
        largest = replace(typical, prompt_tokens=float(longest.mean()), completion_tokens=module.rollout.max_new_tokens)
        here = isinstance(module.engine, InProcessEngine | None)
        options: dict[str, Any] = {
            "optimizer": module.optimizer,
            "has_reference": module.algorithm.needs_reference and policy.adapter is None,
            "saved_per_token": self._saved_per_token(policy),
            "rows": min(typical.completions, module.rollout.max_batch_rows) if here else 0,
            "capacity": int(lengths.max()) + module.rollout.max_new_tokens,
            "sampling_dtype": sampling_dtype(str(self.trainer.precision)) or policy.model.dtype,
            "process": process,
        }
        usual, most = memory_of(policy, typical, **options), memory_of(policy, largest, **options)
        _show(_memory_lines(usual, most, options["saved_per_token"], policy.uses_packed_scoring))
        if usual.peak > (available := _memory_of_device(self.device)):
            self.problems.append(
                f"the run needs about {_size(usual.peak)} of memory and {self.device} has {_size(available)}: raise data.steps_per_episode "
                "and trainer.accumulate_grad_batches alike, lower model.rollout.max_batch_rows, or set "
                "model.policy.gradient_checkpointing or model.policy.lora"
            )
        _show(self._work_lines(policy, typical))

    def _saved_per_token(self, policy: Policy) -> float:
        """Measured on the sampled groups, in evaluation mode: without dropout, and as if nothing was recomputed."""
        if policy.uses_packed_scoring:
            tokens = sum(len(group.prompt) + group.num_completion_tokens for group in self.groups)
        else:
            rows = [len(group.prompt) + len(completion) for group in self.groups for completion in group.completions]
            tokens = len(rows) * max(rows)
        with self.trainer.precision_plugin.forward_context():
            weights = [*policy.parameters(), *policy.buffers()]
            return saved_bytes(lambda: policy.score(self.groups, self.module.rollout.temperature), weights) / tokens

    def _work_lines(self, policy: Policy, episode: Episode) -> list[str]:
        module, data, trainer = self.module, self.data, self.trainer
        steps = data.num_iterations * data.steps_per_episode // trainer.accumulate_grad_batches
        prompts, completions = episode.prompts * episode.prompt_tokens, episode.completions * episode.completion_tokens
        trained = replace(episode, micro_steps=1, max_tokens_per_step=None).micro_step_tokens(policy.uses_packed_scoring)
        fixed = int(steps > 1) + int(module.algorithm.needs_reference)
        flops = 2.0 * policy.model.num_parameters() * (prompts + completions + trained * (3 * data.num_iterations + fixed))
        run = optimizer_steps_of_run(trainer)
        lines = [
            f"an episode samples {episode.completions} completions of {episode.completion_tokens:.1f} tokens: forwards "
            f"{prompts:,.0f} prompt + {completions:,.0f} completion tokens",
            f"and trains on at most {trained:,} tokens, {data.num_iterations} x forward and backward"
            + (f", after {fixed} forward(s) without gradient" if fixed else ""),
            f"{steps} optimizer steps an episode, {data.episodes_per_epoch:,} episodes an epoch; {flops:.1e} FLOP each (no attention)",
        ]
        if run is None:
            return [*lines, "the run has no end in optimizer steps"]
        episodes = run / steps
        epochs = episodes / data.episodes_per_epoch
        return [*lines, f"the run: {run:,} optimizer steps, {episodes:,.0f} episodes, {epochs:.1f} epochs, {flops * episodes:.1e} FLOP"]

    # Contradictions ------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for check in checks_of_run(self.trainer, self.module):
                with self._part():
                    check()
        self.notes += [str(warning.message) for warning in caught]
        self._check_validates()
        if (path := self.config.ckpt_path) is not None and path != "hpc":
            with self._part():
                found = continue_run(self.trainer, path)
                if found is not None and local_path(found) is not None:
                    state = read_checkpoint(Path(found), map_location="cpu", mmap=True)["stateset"]
                    check_resumable(state, self.module.seed, self.trainer.accumulate_grad_batches, self.trainer.world_size)

    def _check_validates(self) -> None:
        """Lightning says nothing of an interval that is longer than the run."""
        interval, steps = self.trainer.val_check_interval, optimizer_steps_of_run(self.trainer)
        if not self.data.has_validation or steps is None or isinstance(interval, float) or self.trainer.check_val_every_n_epoch is not None:
            return
        if interval > (micro_steps := steps * self.trainer.accumulate_grad_batches):
            self.notes.append(f"validation never runs: trainer.val_check_interval={interval}, and the run has {micro_steps:,} micro-steps")

    @contextmanager
    def _part(self, title: str | None = None) -> Iterator[None]:
        """A part of the examination; what stops it is a problem, and the next part goes on."""
        if title is not None:
            print(title)
        try:
            yield
        except UserError as error:
            self.problems.append(without_traceback(str(error)))
        except torch.OutOfMemoryError as error:
            self.problems.append(f"out of memory already here: {str(error).splitlines()[0]}")

    def _verdict(self) -> list[str]:
        for note in self.notes:
            print(f"note: {note}")
        for problem in self.problems:
            print(f"problem: {problem}")
        print(f"problems: {len(self.problems)}" if self.problems else "no contradictions: the run can start")
        return self.problems


def _show(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"  {line}")


def _shortened(text: str) -> str:
    """On one line, without what a terminal would obey."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= TEXT else f"{shown[:TEXT]}..."


def _histogram(lengths: np.ndarray) -> list[str]:
    counts, edges = np.histogram(lengths, bins=np.unique(np.linspace(lengths.min(), lengths.max() + 1, BARS + 1).astype(int)))
    width = max(len(str(edges[-1])), 1)
    return [
        f"  {first:>{width}}-{last - 1:<{width}} {'#' * round(30 * count / counts.max()):<30} {count:,}"
        for first, last, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _memory_lines(usual: Memory, most: Memory, per_token: float, packed: bool) -> list[str]:
    names = ("weights", "gradients", "optimizer", "reference", "cache", "sampling", "activations", "head", "process")
    rows = [(name, getattr(usual, name), getattr(most, name)) for name in names if getattr(most, name)]
    rows += [(f"peak of {name}", size, most.phases[name]) for name, size in usual.phases.items()]
    lines = [f"{name:18} {_size(a):>10}" + (f"   at most {_size(b):>10}" if a != b else "") for name, a, b in rows]
    form = "each prompt once per group" if packed else "a padded row per completion"
    return [*lines, f"activations: {per_token / 2**10:,.1f} KB a token ({form}), measured on the sample; at most: all at max_new_tokens"]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GB" if num_bytes >= 10 * 2**30 else f"{num_bytes / 2**20:,.1f} MB"


def _memory_of_device(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
