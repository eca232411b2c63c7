"""The sections that doctor prints, one after the other; what goes wrong in one is a problem, and the next goes on."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from stateset_lightning.cli.config import StatesetCLI
from stateset_lightning.cli.doctor.measure import LIMIT, SAMPLED, WORST, EpisodeMeasurement, Meter
from stateset_lightning.cli.messages import without_traceback
from stateset_lightning.cli.overlays import dump_yaml
from stateset_lightning.data.prompts import first_row
from stateset_lightning.errors import UserError, one_line
from stateset_lightning.module import GRPOLightningModule
from stateset_lightning.redaction import redacted
from stateset_lightning.rollout import InProcessEngine
from stateset_lightning.run.checkpoint import check_resumable
from stateset_lightning.run.checkpoint_io import local_path, read_checkpoint
from stateset_lightning.run.find_checkpoint import find_resumed
from stateset_lightning.training.checks import checks_before_weights, checks_of_run, no_validation
from stateset_lightning.training.collect import ready_engine
from stateset_lightning.training.schedule import optimizer_steps_of_run
from stateset_lightning.types import FinishReason, PromptBatch, RewardFailure, Rollout, Scores

SPINS = "where threads of torch that wait for one another spin: start with OMP_WAIT_POLICY=passive in the environment"
TEXT = 300  # characters of a prompt or completion that are shown


class Doctor(StatesetCLI):
    """Takes the command line of `fit`, and looks at all that the run is made of instead of starting it.

    What it finds is printed as soon as it is known.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--sample", type=bool, default=True)

    def before_fit(self) -> None:
        """Prints all sections.

        Raises:
            SystemExit: Always, with code 1 if there are problems, else 0.
        """
        self.asked, self.module, self.data = self.config.fit, self.model, self.datamodule
        self.problems, self.notes = list[str](), list[str]()
        meter = Meter(self.trainer.strategy.root_device, self.problems)
        self.episode = EpisodeMeasurement(self.trainer, self.module, self.data, meter)
        given = redacted(yaml.safe_load(self._parser("fit").dump(self.asked, skip_default=True)))
        print("config, without defaults")
        _show(*dump_yaml({key: given[key] for key in given if key not in ("config", "sample")}).splitlines())
        cores, load = os.cpu_count() or 1, os.getloadavg()[0]
        uses_threads = meter.device.type == "cpu" and torch.get_num_threads() > 1
        if load > cores and uses_threads and "OMP_WAIT_POLICY" not in os.environ:
            self.notes.append(f"the machine is busy (load average {load:.1f}, {cores} cores), {SPINS}")
        # As `fit` does, without its set-up of loggers, checkpoints and processes.
        self.trainer.datamodule = self.data  # type: ignore[attr-defined]
        self.data.trainer = self.module.trainer = self.trainer
        self.trainer.strategy.connect(self.module)
        self.data.tokenizer = self.data.tokenizer or self.module.tokenizer
        with self._section("data"):
            self.data.setup("fit")
            self._show_data()
        has_data = not self.problems  # without, most checks have nothing to look at
        with self._section("model"):
            self.episode.load()
            if self.module.policy is not None:
                self._make_optimizer_and_engine()
                _show(model_row(self.module))
        if has_data and self.module.policy is not None:
            self._check()
        if self.problems:
            self.notes.append("reward, time and memory are looked at when there is no problem before them")
        else:
            with self._section(f"an episode, seconds and peak memory of each phase (stopped after {LIMIT:g} s)"):
                self._measure()
        self.module.teardown("fit")
        for line in [*(f"note: {note}" for note in self.notes), *(f"problem: {each}" for each in self.problems)]:
            print(line)
        print(f"problems: {len(self.problems)}" if self.problems else "no contradictions: the run can start")
        raise SystemExit(1 if self.problems else 0)

    def _show_data(self) -> None:
        for split in self.data.num_scenarios:
            scenarios, prompts = self.data.served(split)
            lengths = prompts.lengths
            tokens = f"{lengths.min()} to {lengths.max()} tokens, {lengths.mean():.1f} on average"
            of_first = f" (the first {len(lengths):,})" if len(lengths) < len(scenarios) else ""
            _show(f"{split}: {len(scenarios):,} rows of {tokens}{of_first}")
            _show(f"first row: {first_row(self.module.tokenizer, scenarios.known[0], prompts[0])}")
        if "validation" in self.data.num_scenarios:
            seen = set(map(tuple, self.data.served("train")[1]))
            if both := sum(tuple(prompt) in seen for prompt in self.data.served("validation")[1]):
                self.notes.append(f"{both} prompts of validation are among those of training: its reward will flatter")
        self.data.train_dataloader()  # refuses a curriculum beside overfit_batches

    def _make_optimizer_and_engine(self) -> None:
        module = self.module
        # refuses a schedule without an end, and options that the optimizer does not take
        made = module.configure_optimizers()
        self.trainer.optimizers = [made["optimizer"] if isinstance(made, dict) else made]
        if self.asked.sample and not isinstance(module.engine, InProcessEngine | None):
            self.notes.append("nothing is sampled: model.engine's servers are left alone")
            self.asked.sample = False
        if self.asked.sample:
            module.engine = ready_engine(module.engine, module.tokenizer, module.rollout, str(self.trainer.precision))

    # An episode
    # ------------------------------------------------------------------------------------------------------------------

    def _measure(self) -> None:
        self.episode.take_first_step()
        scenario = self.data.served("train")[0].scenarios[0]
        _show(f"prompt      {scenario.id}: {_shortened(scenario.turns()[-1].content)}")
        sample = self._sample if self.module.environment is None else self._play
        if (rollout := sample() if self.asked.sample else None) is not None:
            _show(f"{SAMPLED}: {self.episode.train(rollout)}")
        else:
            text = "" if scenario.target is None else str(scenario.target)
            _show(f"target      {_shortened(text)}")
            length = len(self.module.tokenizer(text, add_special_tokens=False)["input_ids"])
            size = 1 if self.module.scorer.scores_alone else self.module.rollout.num_generations
            self._score([0], [text] * size, [length] * size)
        _show(f"{WORST}: {self.episode.run_worst_case(self.asked.sample)}")
        self._show_length_of_run(rollout is not None)

    def _sample(self) -> Rollout | None:
        """Samples an episode, and shows a completion and its scores."""
        if (rollout := self.episode.sample()) is not None:
            cut = rollout.finish_reasons.count(FinishReason.LENGTH)
            kind = "target" if self.episode.on_targets else "completion"
            _show_first(rollout, kind, f"{cut} are cut at max_new_tokens")
            self._score(self.episode.spread_rows(), rollout.texts, rollout.lengths_N.tolist())
        return rollout

    def _play(self) -> Rollout | None:
        """The same of conversations."""
        if (sample := self.episode.play()) is None:
            return None
        causes_N = [told["ended_by"] for told in sample.told]
        causes = ", ".join(f"{cause} ({count})" for cause, count in Counter(causes_N).most_common())
        _show_first(sample.rollout, "conversation", f"ended by {causes}")
        self._show_scores(sample.batch, sample.scores, causes_N)
        return sample.rollout

    def _score(self, rows: list[int], texts: Sequence[str], lengths: Sequence[int]) -> None:
        if self.module.environment is not None:
            self.notes.append("model.environment: nothing is scored, as no conversations were played to their ends")
            return
        batch = self.episode.batch(rows)
        if (scores := self.episode.score(batch, texts, lengths)) is not None:
            self._show_scores(batch, scores)

    def _show_scores(self, batch: PromptBatch, scores: Scores, causes_N: Sequence[str] = ()) -> None:
        """Shows the first completion's scores; each reward that fails is a problem, and so is the environment.

        Args:
            batch: The prompts, with as many completions each.
            scores: Of all completions.
            causes_N: What ended each, if they are conversations.
        """

        def what_fails(failure: RewardFailure) -> str:
            has_no_end = bool(causes_N) and causes_N[failure.completion] == "failure"
            return "model.environment" if has_no_end else f"reward {failure.reward}"

        parts = [f"{name} {value:.3f}" for name, value in zip(scores.names, scores.values_NF[0].tolist(), strict=True)]
        _show(f"reward      {scores.totals_N[0]:.3f} = {', '.join(parts)}")
        failed = Counter(what for what, _ in {(what_fails(failure), failure.completion) for failure in scores.failures})
        for what, failure in {what_fails(failure): failure for failure in reversed(scores.failures)}.items():
            place = without_traceback(f"{failure.error}: {failure.message}\n{failure.traceback}").strip()
            scenario = batch.scenarios[failure.completion * len(batch) // len(scores.totals_N)].id
            count = f"{failed[what]} of {len(scores.totals_N)} {'conversations' if causes_N else 'completions'}"
            self.problems.append(f"{what} fails on scenario {scenario} ({count}): {place}")

    def _show_length_of_run(self, is_measured: bool) -> None:
        steps, per_epoch = self.episode.optimizer_steps, self.data.episodes_per_epoch
        seconds, is_longer = self.episode.seconds()
        about = ", more than" if is_longer else ", about"
        each = f"{about} {seconds:,.1f} s" if is_measured else ""
        _show(f"an episode: {steps} optimizer steps{each}; {per_epoch:,} episodes an epoch")
        if (run := optimizer_steps_of_run(self.trainer)) is None:
            _show("the run has no end in optimizer steps")
            return
        episodes = run / steps
        total = f"{about} {timedelta(seconds=round(episodes * seconds))} without validation" if is_measured else ""
        _show(f"the run: {run:,} optimizer steps, {episodes:,.0f} episodes, {episodes / per_epoch:.1f} epochs{total}")

    # Contradictions
    # ------------------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        trainer, module = self.trainer, self.module
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for check in [*checks_before_weights(self.data, module), *checks_of_run(trainer, module)]:
                with self._section():
                    check()
        self.notes += [str(warning.message) for warning in caught]
        if self.data.is_given("validation") and (never := no_validation(trainer, self.data)):
            self.notes.append(never)  # Lightning says nothing of it
        if (path := self.asked.ckpt_path) is not None and path != "hpc":
            with self._section():
                if (found := find_resumed(trainer, path)) and (file := local_path(found)):
                    state = read_checkpoint(file)["stateset"]
                    check_resumable(state, module.seed, trainer.accumulate_grad_batches, trainer.world_size)

    @contextmanager
    def _section(self, title: str | None = None) -> Iterator[None]:
        """What stops a section is a problem, and the next one goes on."""
        if title is not None:
            print(title)
        try:
            yield
        except UserError as error:
            if (problem := without_traceback(str(error))) not in self.problems:  # two sections may come upon one
                self.problems.append(problem)


def model_row(module: GRPOLightningModule) -> str:
    """What was decided for the model when it was loaded, as a row of docs/models.md: class, layers, scoring, engine."""
    assert module.policy is not None
    policy, config = module.policy, module.policy.model.config.get_text_config()
    kinds = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
    model = f"model: {config.model_type}, {type(policy.model).__name__}; layers of {', '.join(kinds)}"
    engine = type(module.engine).__name__ if module.engine else "nothing here"
    return f"{model}; {policy.scoring} scoring; sampled by {engine}"


def _show_first(rollout: Rollout, kind: str, ends: str) -> None:
    """Shows the first text, and how long all are and how they end."""
    length = f"{rollout.lengths_N.double().mean():.1f} tokens on average"
    count = f"one of {len(rollout.texts)}, which have {length}; {ends}"
    _show(f"{kind:11} {_shortened(rollout.texts[0])}", f"            {count}")


def _show(*lines: str) -> None:
    for line in lines:
        print(f"  {line}")


def _shortened(text: str) -> str:
    shown = one_line(text, TEXT + 1)
    return shown if len(shown) <= TEXT else f"{shown[:TEXT]}..."
