"""What passes between rooms, and the letters that name tensor axes.

An episode is one prompt batch sampled, scored and trained on (the guide's word): completions are sampled for its
prompts once, the rewards score them, and the policy is then updated on them for `num_iterations` passes of
`steps_per_episode` micro-steps each. A data loader serves the same prompts at each of these micro-steps.

Letters, used as suffixes of names throughout (`logprobs_T`, `scores_NF`):
    P   prompts of a batch (on this rank unless said otherwise)
    G   completions per prompt
    N   completions, N = P * G; completion n belongs to prompt n // G
    T   completion tokens of all N completions, packed one behind the other, without padding
    V   vocabulary
    F   reward functions
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # torch takes a second to import, and reward workers and `--help` do without it
    from torch import Tensor

    from stateset_lightning.policy import SamplingMask

# Score of a reward that does not apply to a completion (it returned None). NaN is the score of a reward that
# failed.
NOT_APPLICABLE = float("-inf")

# Types of devices that have no float64: Apple's GPUs. What needs it is computed on the host there.
WITHOUT_FLOAT64 = {"mps"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. Attribute access, item access and `.get` all work, so that rewards may treat it as a mapping."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str

    def __getitem__(self, key: str) -> str:
        return {"role": self.role, "content": self.content}[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in ("role", "content") else default

    def keys(self) -> Iterator[str]:
        return iter(("role", "content"))

    def __deepcopy__(self, memo: Any) -> Turn:
        return self  # nothing in it can change


def answered(conversation: Sequence[Turn], text: str) -> list[Turn]:
    """A conversation with its completion. Where the prompt has opened the answer (`<think>`), that comes before it."""
    if (last := conversation[-1]).role == "assistant":
        return [*conversation[:-1], Turn("assistant", last.content + text)]
    return [*conversation, Turn("assistant", text)]


class Scenario(BaseModel):
    """One prompt to be answered, with all that its rewards need. Any further column is kept.

    Exactly one of `prompt` and `messages` is given. `context` is the instruction that the answer must follow; it
    becomes the system turn. `rewards` names the reward functions that score this scenario; None means all of them.
    `messages` end with a turn of the assistant only where a completion is to go on from it (a prefill).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[tuple[Turn, ...], Field(min_length=1)] | None = None
    context: str | None = None
    topic: str | None = None
    target: Any = None
    rewards: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _one_question(self) -> Scenario:
        if (self.prompt is None) == (self.messages is None):
            given = "both" if self.prompt is not None else "neither"
            raise ValueError(f"exactly one of 'prompt' and 'messages' must be given, not {given}")
        return self

    def turns(self, system_prompt: str | None = None) -> list[Turn]:
        """The conversation to be answered: system turn (`system_prompt`, then `context`), then the messages."""
        turns = list(self.messages) if self.messages is not None else [Turn("user", self.prompt or "")]
        instructions = [text for text in (system_prompt, self.context) if text]
        if instructions and turns[0].role == "system":
            instructions.append(turns.pop(0).content)
        return [Turn("system", "\n\n".join(instructions)), *turns] if instructions else turns

    def columns(self) -> dict[str, Any]:
        """All columns by name: what rewards get as their `context`."""
        return {**{name: getattr(self, name) for name in type(self).model_fields}, **(self.model_extra or {})}


# What columns hold ----------------------------------------------------------------------------------------------------


ABSENT = object()  # what stands at a path that is not there

# numpy prints no commas: Python would join the texts of a list.
_PRINTED_BY_NUMPY = re.compile(r"""['"]\s+['"]|array\(""")


def is_nested(text: str) -> bool:
    """Whether a text begins as a list or a mapping does."""
    return text.lstrip()[:1] in ("[", "{")


def read_literal(value: Any) -> Any:
    """A list or mapping that was written as text, as JSON or as Python prints it (pandas' `to_csv`); else the value."""
    if isinstance(value, str) and is_nested(value) and len(value) <= 1_000_000:  # Python's parser takes much memory
        for read in (json.loads, *(() if _PRINTED_BY_NUMPY.search(value) else (ast.literal_eval,))):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                return read(value.strip())
    return value


def at_path(value: Any, path: str) -> Any:
    """What stands at a dotted path (`reward_model.ground_truth`, `answers.text[0]`) in a row, or in any value.

    A name that itself has a dot wins. Of a list of mappings, a name takes that of each. Below a missing value
    everything is missing: None. `ABSENT` if there is no such place.
    """
    value = read_literal(of_numpy(value))
    if value is None:
        return None
    if isinstance(value, Mapping):
        for end in [len(path), *(step.start() for step in reversed(list(re.finditer(r"[.\[]", path))))]:
            if path[:end] in value:
                found, rest = value[path[:end]], path[end:].removeprefix(".")
                return at_path(found, rest) if rest else found
    elif isinstance(value, list | tuple):
        if (index := re.match(r"\[(-?\d+)\]\.?", path)) is None:
            each = [at_path(item, path) for item in value]
            return ABSENT if ABSENT in each else each
        if -len(value) <= int(index[1]) < len(value):
            found, rest = value[int(index[1])], path[index.end() :]
            return at_path(found, rest) if rest else found
    return ABSENT


def of_numpy(value: Any) -> Any:
    """A value of numpy as Python's; a short float by its shortest text: 0.1, not 0.10000000149011612."""
    if not hasattr(value, "tolist"):
        return value
    is_short = getattr(getattr(value, "dtype", None), "kind", "") == "f" and value.dtype.itemsize < 8
    return (value.astype(str).astype(float) if is_short else value).tolist()


def as_target(value: Any) -> Any:
    """A target as rewards compare it: text, true/false, a finite number, a list of these, or None if it is missing.

    A float that is an integer is that integer (pandas makes 5.0 of 5 where another row has none); NaN is missing. A
    decimal that no float holds is its text. Of a mapping with `ground_truth` (verl) or a list `text` (SQuAD), it is
    that; of messages, the text of the last one.

    Raises:
        ValueError: If it is none of these; it says what it is: "is a mapping with a, b".
    """
    value = of_numpy(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        if "ground_truth" not in value and not isinstance(value.get("text"), list | tuple):
            raise ValueError(f"is a mapping with {', '.join(map(str, value)) or 'nothing'}")
        return as_target(value["ground_truth"] if "ground_truth" in value else value["text"])
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
        if items and isinstance(items[-1], Mapping) and isinstance(items[-1].get("content"), str):
            return items[-1]["content"]
        items = [as_target(item) for item in items]
        if odd := [item for item in items if item is None or isinstance(item, list)]:
            raise ValueError(f"is a list that holds {'a list' if isinstance(odd[0], list) else 'a missing item'}")
        return items
    if isinstance(value, Real | Decimal):
        number = float(value)
        if math.isinf(number):
            raise ValueError(f"is {value}, no finite number")
        if isinstance(value, Decimal) and value != Decimal(repr(number)) and not math.isnan(number):
            return int(value) if value == int(value) else f"{value:f}"
        number = int(number) if number.is_integer() and abs(number) < 2**53 else number
        return None if math.isnan(number) else number
    raise ValueError(f"is {value!r:.40}, a {type(value).__name__}")


def text_of(item: Any) -> str:
    """An item of a target as an answer has it: `true` for True; a float in full, for no model writes 1e-05."""
    if isinstance(item, float):
        return f"{Decimal(repr(item)):f}"
    return str(item).lower() if isinstance(item, bool) else str(item)


@dataclass(slots=True, eq=False, repr=False)
class PromptBatch:
    """The P prompts of one episode on this rank, and which of the episode's micro-steps this is.

    Known to nobody as a dataclass: Lightning's half-precision plugins walk through dataclasses and containers, token
    by token.

    Args:
        prompt_tokens: Tokens of each prompt.
        conversations: Turns of each prompt, with the system turn (the data module's system prompt, then the scenario's
            context), and a turn of the assistant where the prompt opens its answer. What a reward sees is these turns
            and the completion, which goes on from such a turn.
        scenarios: The scenario of each prompt.
        positions: Index of each prompt in the episode's batch of all ranks (outside training: in the whole split).
            Sampling seeds are derived from it, so completions depend neither on the number of ranks nor, outside
            training, on the batch size.
        episode_index: Counts the run's episodes; 0 outside training.
        micro_step: Which of the episode's micro-steps this is, from 0.
        num_micro_steps: Micro-steps of the episode, all passes together.
        steps_per_episode: Micro-steps of one pass over the episode.
        split: The split that the scenarios belong to.
        rows: Index of each scenario in its split; None in a batch that no data module made.
    """

    prompt_tokens: list[list[int]]
    conversations: list[list[Turn]]
    scenarios: list[Scenario]
    positions: list[int]
    episode_index: int
    micro_step: int = 0
    num_micro_steps: int = 1
    steps_per_episode: int = 1
    split: Literal["train", "validation", "test", "predict", "generate"] = "train"
    rows: list[int] | None = None

    def __len__(self) -> int:
        return len(self.scenarios)


del PromptBatch.__dataclass_fields__


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # the model ended it (an end-of-sequence token or a stop string)
    LENGTH = "length"  # `max_new_tokens` were sampled: the completion is truncated


@dataclass(frozen=True, slots=True)
class Rollout:
    """N = P * G completions, packed. The end-of-sequence token is among the tokens, but not in the text.

    Args:
        prompt_tokens: Of the P prompts.
        completion_tokens_T: int64; the tokens of all completions, one completion behind the other.
        lengths_N: int64; tokens of each completion, sampled or not. Their sum is T.
        logprobs_T: float32, nats: log-softmax of the logits divided by the temperature, before top-k, top-p and min-p
            (with a `sampling_mask`, over what it keeps). Of no meaning where `sampled_T` is False, NaN where a server
            gave none. None of targets.
        sampled_T: bool; whether the model sampled the token, or should have (a target): only these are trained on.
        finish_reasons: Why each completion ended.
        texts: Of the completions, without the tokens that end one, padding, and what a stop string cuts off.
        sampling_mask: Of all T tokens, where the run keeps it (`RolloutConfig.keep_sampling_mask`).
    """

    prompt_tokens: list[list[int]]
    completion_tokens_T: Tensor
    lengths_N: Tensor
    logprobs_T: Tensor | None
    sampled_T: Tensor
    finish_reasons: list[FinishReason]
    texts: list[str]
    sampling_mask: SamplingMask | None = None

    @property
    def num_generations(self) -> int:
        return len(self.texts) // len(self.prompt_tokens)

    @property
    def sampled_lengths_N(self) -> Tensor:
        """How many tokens of each completion the model sampled, int64."""
        completion_T = self.lengths_N.new_tensor(range(len(self.lengths_N))).repeat_interleave(self.lengths_N)
        return self.lengths_N.new_zeros(len(self.lengths_N)).index_add_(0, completion_T, self.sampled_T.long())

    def completions(self) -> list[list[int]]:
        """The tokens of each completion, as lists."""
        return [part.tolist() for part in self.completion_tokens_T.cpu().split(self.lengths_N.tolist())]


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """A reward that raised, timed out or returned no finite number for a completion."""

    completion: int
    reward: str
    error: str  # name of the exception type
    message: str
    traceback: str = ""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the rewards said of N completions.

    `values_NF` holds NaN where a reward failed and `NOT_APPLICABLE` where it does not apply. `totals_N` is the weighted
    sum over the rewards that apply, NaN after a failure, without those of weight 0. `breakdowns[n]` is by reward.
    """

    names: tuple[str, ...]
    values_NF: Tensor
    totals_N: Tensor
    breakdowns: list[dict[str, Mapping[str, Any]]] = field(default_factory=list)
    failures: list[RewardFailure] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """What a policy loss sees: the sampled tokens of some completions, packed.

    `lengths_N` counts each completion's sampled tokens (their sum is T). `advantages_N` holds one per completion;
    `advantages_T`, where turns or a teacher give one per token, takes its place in the policy loss. `select_T` marks
    the tokens that a selection keeps; None keeps all. `sampling_logprobs_T` is NaN where the sampler gave none: a loss
    takes `sampler_logprobs`, which has the old ones there. `divergences_T`: of the policy's distributions, a teacher's.
    """

    logprobs_T: Tensor
    old_logprobs_T: Tensor
    advantages_N: Tensor
    lengths_N: Tensor
    ref_logprobs_T: Tensor | None = None
    sampling_logprobs_T: Tensor | None = None
    entropies_T: Tensor | None = None
    select_T: Tensor | None = None
    advantages_T: Tensor | None = None
    right_N: Tensor | None = None  # 0 if not right, else what makes the loss's mean one over right completions alone
    teacher_logprobs_T: Tensor | None = None
    divergences_T: Tensor | None = None


# Metrics as (sum, count): they add up over micro-steps and ranks, and are divided once.
Metrics = dict[str, tuple["Tensor | float", "Tensor | float"]]
