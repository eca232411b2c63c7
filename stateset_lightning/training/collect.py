"""A prompt batch becomes completions with their scores: all sampling and scoring that an episode needs."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.environments.conversation import Conversation
from stateset_lightning.environments.play import Limits, Play
from stateset_lightning.environments.player import Player
from stateset_lightning.errors import ConfigError, RewardError
from stateset_lightning.policy import Policy, end_of_sequence_ids
from stateset_lightning.policy.precision import sampling_dtype
from stateset_lightning.ranks import Ranks
from stateset_lightning.rewards import Scorer
from stateset_lightning.rollout import InProcessEngine, RemoteEngine, RolloutConfig, RolloutEngine
from stateset_lightning.rollout.targets import Targets
from stateset_lightning.seeding import sample_seeds
from stateset_lightning.threads import Interruption, heartbeat
from stateset_lightning.training.resample import Replacements, Sample, resample
from stateset_lightning.training.sampling_ahead import SamplingAhead
from stateset_lightning.training.turns import score_by_turns
from stateset_lightning.types import Metrics, PromptBatch, Scores, answered


def ready_engine(
    engine: RolloutEngine | None, tokenizer: PreTrainedTokenizerBase, sampling: RolloutConfig, precision: str
) -> RolloutEngine:
    """The engine, made ready for a run of this Trainer precision; by default the one in this process."""
    engine = InProcessEngine(tokenizer) if engine is None else engine
    if isinstance(engine, InProcessEngine):
        engine.dtype = sampling_dtype(precision)
    elif sampling.keep_sampling_mask:
        raise ConfigError(f"model.rollout.keep_sampling_mask=true: {type(engine).__name__} returns none; leave it out")
    elif isinstance(engine, RemoteEngine):
        engine.setup(tokenizer, sampling)
    return engine


@dataclass(frozen=True)
class Collection:
    """All that was sampled for an episode.

    Args:
        sample: What the episode trains on.
        trained: Every sample that could have been trained on: the first, and those that dynamic sampling drew.
        is_dynamic: Whether dynamic sampling could draw any.
        baseline: A greedy completion of each prompt, for an algorithm that compares with it.
        seconds: That training waited.
        seconds_ahead: That sampling ahead took beside the training before; 0 if this episode was not sampled ahead,
            None in a run that never does.
        costs: What the rewards have counted, by metric.
        engine_metrics: What the engine has counted.
    """

    sample: Sample
    trained: list[Sample]
    is_dynamic: bool
    baseline: Sample | None
    seconds: float
    seconds_ahead: float | None
    costs: dict[str, float]
    engine_metrics: Metrics

    def groups_of_all_ranks(self, ranks: Ranks) -> tuple[list[int], Tensor]:
        """Rows and total scores [P, G] of all groups, replaced ones too, in order of position, which is unique."""
        of_samples = (zip(s.batch.positions, s.batch.rows or [], s.totals_PG, strict=True) for s in self.trained)
        of_ranks = ranks.gather(list(chain(*of_samples)))
        groups = sorted(chain(*of_ranks), key=lambda group: group[0])
        return [row for _, row, _ in groups], torch.stack([totals_G for _, _, totals_G in groups])


@dataclass(frozen=True)
class Sampler:
    """An engine and a scorer that work at the same time: a completion is scored while others are still decoded.

    Args:
        engine: Samples.
        scorer: Scores.
        config: How is sampled.
        seed: The run's.
        ahead: For a run that samples an episode while the one before is trained on.
        replacements: Where dynamic sampling gets prompts from.
        targets: Stand for samples of training prompts, one for each; None where the engine samples.
        player: Has environments answer completions; None in runs of single turns.
    """

    engine: RolloutEngine
    scorer: Scorer
    config: RolloutConfig
    seed: int
    ahead: SamplingAhead[Sample] | None = None
    replacements: Replacements | None = None
    targets: Targets | None = None
    player: Player | None = None

    def collect(self, policy: Policy, batch: PromptBatch, *, greedy_baseline: bool = False) -> Collection:
        """Samples and scores what an episode needs.

        Ranks may sample different numbers of rounds (dynamic sampling), so nothing here waits for another rank.
        """
        start = time.perf_counter()
        ahead = None if self.ahead is None else self.ahead.take(batch.episode_index)
        first, seconds_ahead = (self.sample(policy, batch), 0.0) if ahead is None else ahead
        sample, trained = first, [first]
        if rounds := self.config.dynamic_sampling:
            assert self.replacements is not None, "checked before the run"
            sample, drawn = resample(partial(self.sample, policy), self.replacements, first, rounds)
            trained += drawn
        baseline = self.sample(policy, sample.batch, num_generations=1, greedy=True) if greedy_baseline else None
        seconds = time.perf_counter() - start
        ahead_s = None if self.ahead is None else seconds_ahead
        counted = self.engine.pop_metrics() if isinstance(self.engine, RemoteEngine) else {}
        return Collection(sample, trained, rounds > 0, baseline, seconds, ahead_s, self.scorer.take_counts(), counted)

    def start_next(self, policy: Policy, episode: int, upcoming: Callable[[], PromptBatch | None]) -> None:
        """Begins to sample the next episode, beside the training on this one, if the run samples ahead.

        Args:
            policy: As it is now; the samples of the next episode come from it.
            episode: This one.
            upcoming: The next episode's prompts; None where the run ends before it.
        """
        heartbeat.doing(f"training on episode {episode}")
        if self.ahead is not None and (batch := upcoming()) is not None:
            self.engine.sync(policy)
            draw = partial(self._draw, policy, batch, self.config.num_generations, False)
            self.ahead.start(batch.episode_index, draw)

    def sample(
        self, policy: Policy, batch: PromptBatch, num_generations: int | None = None, *, greedy: bool = False
    ) -> Sample:
        """Completions of all prompts and their scores; by default `config.num_generations` of each; or their targets.

        Noise follows from the seed, the split, the episode and the positions.
        """
        if self.targets is not None and batch.split == "train":
            return self._draw(policy, batch, 1, greedy)  # the engine needs no new weights
        if self.ahead is not None:
            self.ahead.wait()
        heartbeat.doing(f"sampling {_place(batch)}")
        self.engine.sync(policy)
        return self._draw(policy, batch, num_generations or self.config.num_generations, greedy)

    def check_difference(self, row: Mapping[str, float], policy: Policy) -> None:
        """The sampler computed the policy that is trained, by the metrics of an optimizer step that used fresh samples.

        Raises:
            SamplingError: If their log-probs differ by more than float error.
        """
        if isinstance(self.engine, InProcessEngine) and self.targets is None and not policy.has_dropout:
            self.engine.check_difference(row.get("policy/sampling_difference", 0.0), self.config.temperature)

    def _draw(self, policy: Policy, batch: PromptBatch, num_generations: int, greedy: bool) -> Sample:
        seeds_N = sample_seeds(self.seed, batch.split, batch.episode_index, batch.positions, num_generations)
        heartbeat.doing(f"sampling {_place(batch)}")
        metrics: Metrics = {}
        told, turns = dict[int, dict[str, Any]](), dict[int, list[tuple[int, float]]]()
        with self.scorer.start(len(seeds_N), policy.device, num_generations) as session, ExitStack() as environments:

            def score_conversation(n: int, conversation: Conversation, reward: float | None) -> None:
                assert self.player is not None
                turns[n] = conversation.credits(reward, self.player.config.turn_discount)
                told[n] = conversation.told(reward)
                if conversation.failure is not None:
                    session.fail(n, conversation.failure)
                    return
                given, num_tokens = conversation.columns(reward), sum(conversation.sampled)
                environments.callback(copy(conversation).let_go)  # when all is scored, and not by the player
                conversation.driver = None
                session.submit(n, conversation.turns, given, completion_tokens=num_tokens)

            def score(n: int, text: str, num_tokens: int) -> None:
                prompt = n // num_generations
                turns = answered(batch.conversations[prompt], text)
                session.submit(n, turns, batch.scenarios[prompt].columns(), completion_tokens=num_tokens)

            if self.targets is not None and batch.split == "train":
                rollout = self.targets.rollout(batch, score)
            elif self.player is not None:
                given = batch, num_generations, self.config, seeds_N, self._limits(policy), self.engine, greedy
                batch, rollout, metrics = Play(self.player, *given).run(score_conversation)
            else:
                asked = batch.prompt_tokens, num_generations, self.config, seeds_N
                rollout = self.engine.generate(*asked, greedy=greedy, on_finished=score)
            if batch.split != "train" and isinstance(self.engine, InProcessEngine) and rollout.sampled_T.any():
                last = rollout if self.player is None else None  # of conversations, their last turns
                self.engine.check(last, self.config.temperature)  # training compares all that it trains on
            heartbeat.doing(f"scoring {_place(batch)}")
            scores, numbers = session.collect(), sorted(told)
            of_turns = [turns[n] for n in numbers]
            if self.player is not None:
                metrics = metrics | score_by_turns(scores.totals_N, of_turns)
            return Sample(batch, rollout, scores, metrics, [told[n] for n in numbers], of_turns)

    def _limits(self, policy: Policy) -> Limits:
        assert self.player is not None
        # An engine of ours has found them before, for which a template runs in a process of its own.
        ends = getattr(self.engine, "ends", None) or end_of_sequence_ids(policy.model, self.player.encoder.tokenizer)
        return Limits(ends, getattr(self.engine, "max_length", policy.context_length) or math.inf)


def _place(batch: PromptBatch) -> str:
    return f"episode {batch.episode_index}" if batch.split == "train" else f"for {batch.split}"


def collect_together(
    sampler: Sampler, policy: Policy, batch: PromptBatch, algorithm: Algorithm, ranks: Ranks
) -> Collection:
    """What an episode needs. If a signal cuts off the wait of one rank, all end alike, and can save together.

    Raises:
        Interruption: On every rank.
        RewardError: On every rank, if the rewards of all ranks together failed too often; not where nothing
            is trained on what they say.
    """
    collection, code = None, 0
    try:
        collection = sampler.collect(policy, batch, greedy_baseline=algorithm.needs_greedy_baseline)
    except Interruption as interruption:
        code = interruption.code
    if code := max(ranks.gather(code)):
        raise Interruption(code)
    assert collection is not None
    if algorithm.trains_on_rewards:
        check_failures([sample.scores for sample in collection.trained], sampler.scorer.max_failures, ranks)
    if collection.baseline is not None:
        check_failures([collection.baseline.scores], sampler.scorer.max_failures, ranks)
    return collection


def check_failures(scores: Sequence[Scores], max_failures: float, ranks: Ranks) -> None:
    """Stops the run when rewards failed too often; every rank comes to the same end.

    Raises:
        RewardError: If more than `max_failures` of the completions of all ranks have no score; with the counts and the
            last failure's traceback.
    """
    totals_N = torch.cat([some.totals_N for some in scores])
    counts = ranks.gather((int(totals_N.isnan().sum()), totals_N.numel()))
    failed, total = (sum(numbers) for numbers in zip(*counts, strict=True))
    if failed <= max_failures * total:
        return
    mine = [failure for some in scores for failure in some.failures]
    failures = [failure for of_rank in ranks.gather(mine) for failure in of_rank]
    kinds = sorted(Counter(f"{failure.reward}/{failure.error}" for failure in failures).items())
    shown = ", ".join(f"{kind}: {count}" for kind, count in kinds)
    allowed = f"more than max_reward_failures={max_failures:g} allows ({shown})"
    last = max(failures, key=lambda failure: (bool(failure.traceback), failure.completion))
    told = f"The last failure, of reward '{last.reward}' on completion {last.completion}: {last.error}: {last.message}"
    raise RewardError(f"{failed} of {total} completions have no score, {allowed}. {told}\n{last.traceback}".rstrip())
