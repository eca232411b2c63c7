"""Scenarios -> prompt tokens: chat template or plain text, and what happens to prompts that are too long."""

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from stateset_lightning.data.ragged import PackedTokens, garbage_left_alone
from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.types import Scenario

_log = logging.getLogger(__name__)

Conversation = list[dict[str, str]]
"""Turns as chat templates take them."""

OverlongPolicy = Literal["error", "drop", "truncate_left"]

_BATCH = 1024
_IDS_SHOWN = 5
_RESERVED_TEMPLATE_KWARGS = (
    "conversation",
    "add_generation_prompt",
    "tokenize",
    "continue_final_message",
    "return_tensors",
    "return_dict",
    "sanitize_control_tokens",
)


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompt tokens of the scenarios that were kept: `tokens[i]` belongs to scenario `kept[i]`."""

    tokens: PackedTokens
    kept: list[int]
    num_dropped: int = 0
    num_truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Makes prompt tokens of scenarios.

    Args:
        tokenizer: A transformers tokenizer.
        system_prompt: Stands before each scenario's own context in the system turn.
        use_chat_template: None uses the tokenizer's template if it has one. Otherwise the contents of the turns are
            joined by blank lines and get the tokenizer's own special tokens, except for an end of sequence.
        chat_template_kwargs: Further variables of the template (`enable_thinking`, say).
        max_prompt_tokens: Longest prompt that is accepted; None accepts all.
        overlong_prompts: What happens to longer ones.
        parse_special_tokens: Whether control tokens in a scenario's own text (`<|im_end|>`, say) count as such. By
            default they are plain text, so that no text changes who speaks.
    """

    tokenizer: "PreTrainedTokenizerBase"
    system_prompt: str | None = None
    use_chat_template: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    overlong_prompts: OverlongPolicy = "error"
    parse_special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.use_chat_template and not self._has_template:
            raise ConfigError(
                "data.use_chat_template=true, but the tokenizer has no chat template; set it to false for plain text"
            )
        if reserved := [name for name in self.chat_template_kwargs if name in _RESERVED_TEMPLATE_KWARGS]:
            raise ConfigError(f"data.chat_template_kwargs: '{reserved[0]}' is set by the data module; remove it")
        if self.chat_template_kwargs and not self.applies_template:
            raise ConfigError(
                f"data.chat_template_kwargs={dict(self.chat_template_kwargs)} have no effect without a chat template;"
                " remove them"
            )

    @property
    def applies_template(self) -> bool:
        """Whether prompts are made by the tokenizer's chat template (otherwise: plain text)."""
        return self._has_template if self.use_chat_template is None else self.use_chat_template

    def encode(self, scenarios: Sequence[Scenario], key: str) -> EncodedPrompts:
        """Prompt tokens of the scenarios of the split `key`.

        Raises:
            DataError: If the template refuses a scenario, a prompt has no tokens, prompts are too long under
                `overlong_prompts="error"`, or all are dropped.
        """
        # The tokenizer works without Python's lock: it runs beside the templates.
        with garbage_left_alone(), ThreadPoolExecutor(1) as beside:
            parts = list(beside.map(self._tokenize, self._batches(scenarios, key)))
        tokens = PackedTokens.concatenate([packed for packed, _ in parts])
        if len(empty := (tokens.lengths == 0).nonzero()[0]):
            raise DataError(
                f"{key}: the prompt of scenario '{scenarios[empty[0]].id}' has no tokens; give it a text that the"
                " tokenizer knows"
            )
        if marked := sum(count for _, count in parts):
            _log.warning(
                "%s: the text of %d of %d scenarios holds control tokens (%s); they are encoded as plain text. "
                "data.parse_special_tokens=true takes them for what they are",
                *(key, marked, len(scenarios), ", ".join(self._control_tokens[:_IDS_SHOWN])),
            )
        return self._limit(scenarios, tokens, key)

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    @cached_property
    def _control_tokens(self) -> list[str]:
        return control_tokens(self.tokenizer)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str] | None:
        return None if self.parse_special_tokens else pattern_of(self._control_tokens)

    def _batches(self, scenarios: Sequence[Scenario], key: str) -> Iterator["_Batch"]:
        for start in range(0, len(scenarios), _BATCH):
            part = scenarios[start : start + _BATCH]
            conversations = [
                [{"role": turn.role, "content": turn.content} for turn in s.turns(self.system_prompt)] for s in part
            ]
            pattern = self._control_pattern
            marked = [
                i
                for i, turns in enumerate(conversations)
                if pattern and any(pattern.search(turn["content"]) for turn in turns)
            ]
            texts = (
                self._templated(part, conversations, key)
                if self.applies_template
                else [_plain(turns) for turns in conversations]
            )
            yield _Batch(key, part, texts, {i: conversations[i] for i in marked})

    def _templated(self, scenarios: Sequence[Scenario], conversations: list[Conversation], key: str) -> list[str]:
        options = {"add_generation_prompt": True, "tokenize": False, **self.chat_template_kwargs}
        try:
            return [str(text) for text in self.tokenizer.apply_chat_template(conversations, **options)]
        except Exception:  # a template is foreign code; which conversation it fails on is found below
            texts = []
            for scenario, conversation in zip(scenarios, conversations, strict=True):
                try:
                    texts.append(str(self.tokenizer.apply_chat_template(conversation, **options)))
                except Exception as error:
                    raise _refusal(key, scenario, conversation, error) from error
            return texts

    def _tokenize(self, batch: "_Batch") -> tuple[PackedTokens, int]:
        """The batch's tokens, and how many of its scenarios hold control tokens in their text."""
        # A template writes the special tokens itself: adding the tokenizer's would double the first one.
        add_special_tokens = not self.applies_template
        options: dict[str, Any] = (
            {} if self.applies_template else {"split_special_tokens": not self.parse_special_tokens}
        )
        # `verbose=False`: lengths are our own policy, and transformers would warn of the model's.
        tokens: list[list[int]] = self.tokenizer(
            batch.texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False, **options
        )["input_ids"]
        if self.applies_template:
            for i, conversation in batch.marked.items():
                tokens[i] = self._as_text(batch, i, conversation)
        elif self._appends_eos:
            # The model would take the end of the prompt for the end of its answer.
            tokens = [prompt[:-1] for prompt in tokens]
        return PackedTokens.pack(tokens), len(batch.marked)

    def _as_text(self, batch: "_Batch", i: int, conversation: Conversation) -> list[int]:
        try:
            return encode_as_text(self.tokenizer, self._control_tokens, conversation, self.chat_template_kwargs)
        except ValueError as error:
            raise DataError(
                f"{batch.key}: the text of scenario '{batch.scenarios[i].id}' holds a control token that this tokenizer"
                f" cannot write as plain text: {error}; remove it from the text, or set data.parse_special_tokens=true"
            ) from error

    @cached_property
    def _appends_eos(self) -> bool:
        eos = self.tokenizer.eos_token_id
        with_special = self.tokenizer("a")["input_ids"]
        without = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return eos is not None and with_special[-1:] == [eos] and without[-1:] != [eos]

    def _limit(self, scenarios: Sequence[Scenario], tokens: PackedTokens, key: str) -> EncodedPrompts:
        lengths, limit = tokens.lengths, self.max_prompt_tokens
        everything = list(range(len(tokens)))
        overlong = [] if limit is None else (lengths > limit).nonzero()[0].tolist()
        if limit is None or not overlong:
            return EncodedPrompts(tokens, everything)
        if self.overlong_prompts == "truncate_left":
            return EncodedPrompts(
                PackedTokens.pack([prompt[-limit:] for prompt in tokens]), everything, num_truncated=len(overlong)
            )
        if self.overlong_prompts == "error":
            shown = ", ".join(f"{scenarios[i].id} ({lengths[i]})" for i in overlong[:_IDS_SHOWN])
            more = f" and {len(overlong) - _IDS_SHOWN} more" if len(overlong) > _IDS_SHOWN else ""
            raise DataError(
                f"{key}: {len(overlong)} of {len(tokens)} prompts have more than data.max_prompt_tokens={limit} tokens:"
                f" {shown}{more}; set data.max_prompt_tokens={lengths.max()}, or data.overlong_prompts to drop or"
                " truncate_left"
            )
        kept = (lengths <= limit).nonzero()[0].tolist()
        if not kept:
            raise DataError(
                f"{key}: data.max_prompt_tokens={limit} drops all {len(tokens)} prompts; the shortest has"
                f" {lengths.min()} tokens"
            )
        return EncodedPrompts(PackedTokens.pack([tokens[i] for i in kept]), kept, num_dropped=len(overlong))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some scenarios with their prompts as text; `marked` has the conversations of those that hold control tokens."""

    key: str
    scenarios: Sequence[Scenario]
    texts: list[str]
    marked: dict[int, Conversation]


def _plain(conversation: Conversation) -> str:
    return "\n\n".join(turn["content"] for turn in conversation)


def _refusal(key: str, scenario: Scenario, conversation: Conversation, error: Exception) -> DataError:
    has_system = conversation[0]["role"] == "system"
    advice = (
        "if it takes no system turn, leave out data.system_prompt and the scenarios' context; " if has_system else ""
    )
    return DataError(
        f"{key}: the chat template refuses scenario '{scenario.id}' (roles:"
        f" {', '.join(t['role'] for t in conversation)}): {error}; {advice}data.use_chat_template=false joins the turns"
        " as plain text"
    )


# MERGED: Control tokens in a scenario's text: found, so that text never ends a turn, opens another or ends the sequence.
#
# A tokenizer reads `<|im_end|>` as one token wherever it stands, in a user's text as in the template's own.
#


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokenizer's special tokens, and other added tokens that its chat template writes (whitespace aside, which is
    ordinary text).
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = tokenizer.added_tokens_decoder.values()
    return [
        t.content for t in added if t.content and (t.special or (not t.content.isspace() and t.content in template))
    ]


def pattern_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Finds any of the tokens in a text; None if there are none."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def encode_as_text(
    tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], conversation: Conversation, kwargs: Mapping[str, Any]
) -> list[int]:
    """Prompt tokens of a conversation whose contents hold some of `tokens`: these are spelt out there, but not in the
    template's own text.

    Raises:
        ValueError: If the tokenizer has no other way to write such a token.
    """
    own = copy.copy(tokenizer)
    own.chat_control_tokens = list(tokens)
    ids = own.apply_chat_template(
        conversation, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False, **kwargs
    )
    return [int(i) for i in ids]
