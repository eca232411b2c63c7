"""What must hold between the rewards and the rows that they score, before anything is sampled."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from stateset_lightning.algorithm import Algorithm
from stateset_lightning.algorithm.supervised import MaximumLikelihood
from stateset_lightning.errors import ConfigError
from stateset_lightning.rewards import EnvironmentReward, GroupReward, RewardFunction
from stateset_lightning.rewards.functions import STAND_INS, TARGET_NAMES, WITHOUT_ALARMS, alarm_in
from stateset_lightning.types import Scenario


def check_baseline(rewards: Sequence[RewardFunction], needs_greedy_baseline: bool) -> None:
    """A baseline has the scores of what is compared with it.

    Raises:
        ConfigError: If it is one greedy completion, and a reward compares the completions of a prompt.
    """
    if needs_greedy_baseline and (names := [r.name for r in rewards if isinstance(r, GroupReward) and r.weight]):
        compares = f"reward '{names[0]}' compares the completions of a prompt, and this algorithm has one greedy one"
        raise ConfigError(f"{compares} to score: leave it out, or choose another algorithm")


def check_environment(environment: Any, rewards: Sequence[RewardFunction], algorithm: Algorithm) -> None:
    """Rewards that ask for environments have some; where turns have advantages, environment and algorithm go with them.

    Raises:
        ConfigError: If not.
    """
    if environment is not None and (found := alarm_in([*environment.factories().values()])):
        fails = "whose time-outs are signals and raise on the thread of an environment: code that catches that goes on"
        rank_zero_warn(f"model.environment may use {found}, {fails} without it. math_verify: {WITHOUT_ALARMS}")
    asking = [reward.name for reward in rewards if "environments" in getattr(reward, "required", ())]
    if environment is None and asking:
        raise ConfigError(f"reward '{asking[0]}' takes environments, and there are none: set model.environment")
    name, problem = type(algorithm).__name__, ""
    if not any(isinstance(reward, EnvironmentReward) and reward.weight for reward in rewards):
        problem = "needs the environment's reward: add EnvironmentReward to model.reward"
    elif algorithm.weighs_completions or algorithm.needs_greedy_baseline:
        problem = f"{name} has one advantage for a whole completion: choose another algorithm, such as GSPOToken"
    elif isinstance(algorithm, MaximumLikelihood) or not getattr(algorithm, "reward_weight", 1):
        problem = f"{name} weighs nothing by rewards: choose another algorithm"
    if problem and environment is not None and environment.turn_rewards != "sum":
        raise ConfigError(f"model.environment.turn_rewards={environment.turn_rewards}: {problem}, or set it to sum")


def check_rewards(splits: Mapping[Any, Iterable[Scenario]], rewards: Sequence[RewardFunction]) -> None:
    """Rewards that rows or sources name exist, and rows have what their rewards need; scoring would find out.

    A column that only some rows lack is announced, with their number.

    Raises:
        ConfigError: With the first scenarios that name others; or if no row has a column that its reward needs.
    """
    known = [reward.name for reward in rewards]
    needing = [reward for reward in rewards if reward.missing({})]  # a column or more
    for split, scenarios in splits.items():
        unknown, scored, lacking = list[str](), Counter[str](), Counter[tuple[str, str]]()
        columns: dict[str, Any] = {}
        for scenario in scenarios:
            names = known if scenario.rewards is None else scenario.rewards
            if others := sorted(set(names).difference(known)):
                unknown.append(f"data.{split}: {scenario.id}: {', '.join(others)}")
            for reward in [reward for reward in needing if reward.name in names]:
                columns = scenario.columns()
                scored[reward.name] += 1
                lacking.update((reward.name, column) for column in reward.missing(columns))
        if unknown:
            have = f"that model.reward does not have ({', '.join(known)})"
            raise ConfigError(f"{len(unknown)} scenarios name rewards {have}: {'; '.join(unknown[:5])}")
        for (name, column), count in lacking.items():
            if count == scored[name] and column not in STAND_INS:
                none = f"reward '{name}' needs the column {column}, and no scenario of data.{split} has it"
                raise ConfigError(f"{none}; {_remedy(column, columns)}")
            fate = f"gets {STAND_INS[column]}" if column in STAND_INS else "fails, see reward_failures"
            rank_zero_warn(f"{count} of {scored[name]} rows of data.{split} lack {column}: there reward {name} {fate}")


def _remedy(column: str, columns: Mapping[str, Any]) -> str:
    """What to do about a column that no row has, by the columns of one row."""
    likely = TARGET_NAMES if column in TARGET_NAMES else ()
    has_target = bool(likely) and columns.get("target") is not None
    hidden = {"id", "rewards", "target" if has_target else ""}  # the target may be no column of the file
    present = [name for name, value in columns.items() if value is not None and name not in hidden]
    plain = {name.strip().lower(): name for name in present}
    near = [plain[word] for word in (column, *get_close_matches(column, plain), *likely) if word in plain]
    fields = f"set data.fields.{column}={near[0]!r}" if near else f"name one by data.fields.{column}"
    use_target = ", let it take the target" if has_target else ""
    return f"there are {', '.join(map(repr, present))}: {fields}{use_target}, or leave the reward out"
