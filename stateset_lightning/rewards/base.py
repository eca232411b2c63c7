"""What a reward is, what built-in rewards read from a conversation, and what a call of a reward comes to.

A reward is a function of a conversation that ends in a completion, with a weight, a name and a time-out. It returns a
number (`float`, `int`, `bool`, a numpy or torch scalar), a `RewardResult`, `{"score": number}`, `(score, info)`, or
None for "does not apply". Whatever else it does (raise, take too long, return NaN or no number) fails the completion.
"""

# No `from __future__ import annotations`: jsonargparse would then drop the bounds of rewards' annotated types (4.53).
import copy
import inspect
import math
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

from stateset_lightning.errors import ConfigError, DataError, RewardError, bounded
from stateset_lightning.redaction import redacted_text
from stateset_lightning.threads import forked_child_ends
from stateset_lightning.types import ABSENT, NOT_APPLICABLE, Turn, as_target, at_path, text_of

# A conversation; its last turn is the completion.
Turns = Sequence[Turn]

# All columns of the scenario by name (`target`, ...), and `completion_tokens`, the completion's number of tokens.
Context = Mapping[str, Any] | None

T = TypeVar("T")

# What a reward is called with: a conversation and columns, or several.
Given = tuple[Any, ...]


@dataclass
class RewardResult:
    """A score and what it is made of.

    Attributes:
        score: The reward of the completion; any finite number.
        breakdown: Named parts of the score, for logs and sample tables. They do not enter the score.
        metadata: Anything else; it is not kept.
    """

    score: float
    breakdown: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def snake_case(class_name: str) -> str:
    """`JSONValidReward` -> `json_valid`."""
    name = class_name.removesuffix("Reward") or class_name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).strip("_").lower()


@dataclass(kw_only=True, init=False, eq=False, repr=False)
class RewardFunction(ABC):
    """Base class of all rewards: subclass it and write `compute_reward`, as `def` or `async def`.

    A subclass may define its own `__init__` without calling this one: the defaults are class attributes. Or it is
    decorated by `options`.

    Args:
        weight: Factor of this reward in a completion's total. A reward of weight 0 is held out: it is computed and
            logged, and neither its scores nor its failures affect the training. Beside the trained rewards it shows
            whether answers get better, or only better at gaming those.
        name: In logs and in a scenario's `rewards` column; by default the class name in snake case without `Reward`.
        timeout: Seconds that one completion may take; None means no limit of its own. A `def` reward with a time-out
            runs in a worker process that can be killed, so it must be picklable, and what it stores on itself stays in
            that process. An `async def` reward is cancelled at its next `await`: one that blocks (`time.sleep`, a slow
            regular expression) cannot be stopped and holds up all other async rewards, so write blocking work as plain
            `def`.
        turns: What it takes for the answer, in conversations of several turns: the model's `last` turn, or `all` of
            them, joined by line breaks. An option of built-in rewards and functions.
    """

    weight: float = 1.0
    name: str = None  # type: ignore[assignment]  # None is that of the class
    timeout: float | None = None
    turns: Literal["last", "all"] = "last"
    # Columns without which it cannot score: a run whose rows have none of one is refused at the start.
    needs: Collection[str] = field(default=(), init=False)
    # Whether it scores several completions in a call, by its `compute_rewards`.
    scores_several = False
    compute_rewards: ClassVar[Callable[..., Any]]

    def __init__(self, *, weight: float = 1.0, name: str | None = None, timeout: float | None = None) -> None:
        self.weight, self.timeout = weight, timeout
        if name:
            self.name = name

    def __init_subclass__(cls) -> None:
        cls.name = vars(cls).get("name") or snake_case(cls.__name__)

    def __post_init__(self) -> None:
        self.name = self.name or type(self).name
        self._set_up()

    def _set_up(self) -> None:  # noqa: B027 (a hook)
        """Check the options, and make of them what is needed; called when all are set."""

    @abstractmethod
    def compute_reward(self, turns: Turns, context: Context = None) -> Any:
        """Score the conversation's last turn.

        Args:
            turns: The conversation; the last turn is the completion.
            context: All columns of the scenario (`target`, ...), and `completion_tokens`, the completion's number of
                tokens.

        Returns:
            A number, a `RewardResult`, or None if this reward does not apply.
        """

    def missing(self, columns: Mapping[str, Any]) -> list[str]:
        """The columns that it needs and this scenario has not."""
        return [name for name in self.needs if (found := at_path(columns, name)) is None or found is ABSENT]

    def take_counts(self) -> Mapping[str, float]:
        """What this reward has counted since the last call (tokens bought, say).

        Logged as `cost/<name>/<key>`, summed over ranks.
        """
        return {}


@dataclass_transform(eq_default=False, field_specifiers=(field,))
def options(cls: type[T]) -> type[T]:
    """Class decorator of a reward: its annotated attributes are its options, which are held against their bounds.

    It is a dataclass then, whose constructor takes `weight`, `name` and `timeout` as well.
    """
    return bounded(snake_case(cls.__name__))(dataclass(eq=False)(cls))


class BatchReward(RewardFunction):
    """A reward that scores many completions in one call, such as a model: subclass it and write `compute_rewards`.

    It is called once per episode, when all completions are sampled, in their order. Batches that fill up as completions
    finish would differ from run to run, and with them the last digits of the scores; and the model would compete with
    decoding for the device. It runs in a thread of the training process and cannot be stopped, so it has no time-out.
    """

    scores_several = True
    device: Any = "cpu"  # the policy's; set before each call

    @abstractmethod
    def compute_rewards(self, conversations: Sequence[Turns], contexts: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """Score the last turn of each conversation.

        Returns:
            One item per conversation: what `compute_reward` may return, or an exception, which fails this completion
            alone. What is raised fails all of them; a `ConfigError` ends the run.
        """

    def compute_reward(self, turns: Turns, context: Context = None) -> Any:
        (output,) = self.compute_rewards([turns], [context or {}])
        if isinstance(output, Exception):
            raise output
        return output


# What built-in rewards read from a conversation and its scenario -----------------------------------------------------


def completion(turns: Turns) -> str:
    """The text of the last turn."""
    return str(turns[-1].get("content", "")) if turns else ""


def joined(turns: Turns, num_turns: int) -> list[Turn]:
    """The conversation up to the model's turns, the last `num_turns` of the assistant's, and these as one turn."""
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"][-num_turns:]
    return [*turns[: places[0]], Turn("assistant", "\n".join(str(turns[i]["content"]) for i in places))]


def target_of(context: Context, reward: str, read: Callable[[Any], list[T]], problem: str) -> list[T]:
    """What a reward reads of the scenario's target.

    Args:
        context: The scenario's columns.
        reward: Name of the reward, for errors.
        read: Reads a target; it returns nothing of one that the reward cannot use.
        problem: Says then what is wrong with it: `holds no number`.

    Raises:
        DataError: If there is no target, or `read` returns nothing. A score of zero would train the policy as if the
            answer were wrong.
    """
    target, scenario = (context or {}).get("target"), (context or {}).get("id")
    try:
        if (answer := as_target(target)) is None:
            problem = "is missing: add the column, or leave this reward out of the row's 'rewards'"
        elif found := read(answer):
            return found
    except ValueError as error:
        problem = str(error)
    raise DataError(f"reward '{reward}' needs an answer, but target={target!r} of scenario {scenario!r} {problem}")


def target_texts(context: Context, reward: str, content: Callable[[str], object] = lambda text: True) -> list[str]:
    """The accepted answers of a scenario, as texts: its target, or each item if that is a list; `true` for True.

    Arguments are as of `target_of`; `content` is what counts of a text: by default an empty one is accepted.

    Raises:
        DataError: If there is no target, it is an empty list, or a text has no `content`.
    """

    def read(target: Any) -> list[str]:
        texts = list(map(text_of, target if isinstance(target, list) else [target]))
        return texts if all(map(content, texts)) else []

    return target_of(context, reward, read, "is empty")


# What a call of a reward comes to ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one reward said of one completion.

    `value` is its score, `NOT_APPLICABLE`, or NaN after a failure; then `error` names the exception's type. `changed`:
    it has changed the conversation or the columns that it was given.
    """

    value: float
    breakdown: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    message: str = ""
    traceback: str = ""
    changed: bool = False


def call(reward: RewardFunction, *given: Any) -> Any:
    """Call a reward with copies of what is given, a conversation and columns, and catch whatever it raises.

    Not only `Exception`: code under test may call exit(), a library written in Rust panics with a `BaseException`, and
    what is cancelled raises one. A user's Ctrl-C does not come here: rewards are called in threads other than the main
    one, or in processes.

    Returns:
        The outcome, or of a reward that scores several completions a list of outcomes; after a failure one outcome for
        all. If the reward returned an awaitable: a coroutine that ends in these.

    Raises:
        ConfigError: If a `BatchReward` does: its model cannot be loaded, say.
    """
    with forked_child_ends():
        try:
            # Its own copies: other calls, and later epochs, see nothing of what it changes. Of each item by itself.
            own: Given = tuple([*map(copy.deepcopy, p)] if isinstance(p, list) else copy.deepcopy(p) for p in given)
            output = reward.compute_rewards(*own) if reward.scores_several else reward.compute_reward(*own)
            read = partial(_outcomes, reward, own, given)
            return _awaited(read, output) if inspect.isawaitable(output) else read(output)
        except BaseException as error:
            if isinstance(reward, BatchReward) and isinstance(error, ConfigError):
                raise
            return failure(error)


async def call_async(reward: RewardFunction, *given: Any) -> Any:
    """Call an async reward."""
    outcome = call(reward, *given)
    return await outcome if inspect.iscoroutine(outcome) else outcome


def _outcomes(reward: RewardFunction, own: Given, given: Given, output: Any) -> Any:
    """Read what a reward returned, which was called with its `own` copies of what was `given`.

    Raises:
        RewardError: If a reward that scores several completions returned fewer or more items than these.
    """
    changed = False
    with suppress(Exception):  # the values of foreign classes: arrays say neither yes nor no
        changed = bool(own != given)
    if not reward.scores_several:
        return replace(to_outcome(output), changed=changed)
    number = len(given[0])
    if not isinstance(output, Iterable) or isinstance(output, Mapping | Set):
        raise RewardError(f"the reward returned {output!r:.80}, but must return a list of {number} scores")
    items = list(islice(output, number + 1))  # one more than needed: there may be no end
    if len(items) != number:
        raise RewardError(f"the reward returned {len(items)} scores for {number} completions")
    return [replace(_item_outcome(item), changed=changed) for item in items]


def to_outcome(output: Any) -> Outcome:
    """Read what a reward returned for a completion.

    Raises:
        RewardError: If there is no finite number in it, and it is not None.
    """
    match output:
        case None:
            return Outcome(NOT_APPLICABLE)
        case RewardResult(score=score, breakdown=beside) | {"score": score, **beside} | (score, Mapping() as beside):
            return Outcome(_finite(score), {str(name): value for name, value in (beside or {}).items()})
        case {"overall": score, **others}:  # EasyR1's
            return to_outcome((score, others))
        case (score, str() as info):
            return Outcome(_finite(score), {"info": info})
    return Outcome(_finite(output))


def _item_outcome(item: Any) -> Outcome:
    try:
        return failure(item) if isinstance(item, BaseException) else to_outcome(item)
    except BaseException as error:
        return failure(error)


def failure(error: BaseException) -> Outcome:
    """The outcome of a reward that raised `error`."""
    shown = traceback.TracebackException.from_exception(error)  # also of an exception that fails to print
    trace = redacted_text("".join(shown.format())) if error.__traceback__ else ""
    return Outcome(math.nan, {}, type(error).__name__, redacted_text(str(shown)), trace)


async def _awaited(read: Callable[[Any], Any], output: Awaitable[Any]) -> Any:
    with forked_child_ends():
        try:
            return read(await output)
        # Some would end the event loop. A call that was cancelled from outside has nobody who waits for it.
        except BaseException as error:
            return failure(error)


def _finite(value: Any) -> float:
    """A float from a number-like value. A string is no number: `float("nan")` and `float("1_0")` would both succeed."""
    if isinstance(value, str | bytes | bytearray):
        raise RewardError(f"the reward returned the {type(value).__name__} {value[:80]!r}, which is no number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: a tensor of several elements
        returned = f"the reward returned {value!r:.80} ({type(value).__name__}), no finite number"
        accepted = "a number, RewardResult(score, breakdown), {'score': number, ...}, (score, info), or None"
        raise RewardError(f"{returned}: return {accepted}") from error
    if not abs(number) <= 3.4028234e38:  # beyond it scores become infinite in the arithmetic that follows
        raise RewardError(f"the reward returned {number}, which is no finite float32 number")
    return number
