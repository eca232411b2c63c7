"""Scenarios -> prompt tokens: chat template or plain text, special tokens in a text, and overlong prompts.

A tokenizer reads `<|im_end|>` as one token wherever it stands, in a scenario's text as in the chat template's own.
Unless that is wanted, special tokens in a scenario's text are encoded as plain text: no text can end a turn, open
another or end the sequence.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import mark_control_tokens

from stateset_lightning.data import content
from stateset_lightning.data.ragged import RaggedTokens
from stateset_lightning.data.scenario_set import ServedScenarios
from stateset_lightning.errors import ConfigError, DataError, log, one_line, told_as
from stateset_lightning.types import Scenario, Turn
from stateset_lightning.workers import limited, rendered

# What happens to prompts longer than `data.max_prompt_tokens`.
OverlongPolicy = Literal["error", "drop", "truncate_left"]

_BATCH = 256  # texts that are rendered, and tokenized, at a time
_MOST_CHARACTERS, _MOST_TIMES = 2**16, 10  # that a template writes of its own, and of what it is given
_IDS_SHOWN = 5
_OF_TURNS = "of an environment's turns"  # what messages call the dummy scenario that they are rendered in
_Rendered = tuple[str, str, str | None]  # a prompt without its prefill, this, and the scenario's id if it is marked
# Thoughts that a template puts before an answer without any: `<think></think>`, or the end alone.
_NO_THOUGHTS = re.compile(r"([<\[]([^<>\[\]]+)[>\]]\s*[<\[]/\2[>\]]|</[^<>]+>)\s*$")
_TAG = re.compile(r"[<\[◁]([^\s<>\[\]◁▷]+)[>\]▷]")
_DATE = re.compile(r"""strftime_now\(\s*(['"])(.{0,99}?)\1\s*\)""")
_RESERVED = {"conversation", "add_generation_prompt", "tokenize", "continue_final_message"}
_RESERVED |= {"return_tensors", "return_dict", "sanitize_control_tokens"}


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompt tokens of the scenarios that are kept: `tokens[i]` belongs to scenario `kept[i]`.

    Of a large split all are kept, and `tokens` are those of the first. `opened[i]` is what the prompt has of its
    answer; see `PromptEncoder._opened`.
    """

    tokens: RaggedTokens
    kept: Sequence[int]
    num_dropped: int = 0
    num_truncated: int = 0
    opened: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Makes prompt tokens of scenarios.

    Args:
        tokenizer: A transformers tokenizer.
        system_prompt: Comes before each scenario's own context in the system turn.
        use_chat_template: Whether the tokenizer's chat template makes the prompts; None: if it has one. Otherwise the
            contents of the turns are joined by blank lines and get the special tokens that the tokenizer adds to every
            text, except for an end of sequence.
        chat_template_kwargs: Further variables of the template (`enable_thinking`, say).
        max_prompt_tokens: Length of the longest prompt that is accepted; None accepts all.
        overlong_prompts: What happens to longer ones.
        parse_special_tokens: Whether special tokens in a scenario's own text (`<|im_end|>`, say) are encoded as such.
            By default they are plain text, so that no text changes who speaks.
        now: When it is, for templates that write the date; None: when a prompt is made.

    Raises:
        ConfigError: If options contradict each other or the tokenizer.
    """

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None = None
    use_chat_template: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    overlong_prompts: OverlongPolicy = "error"
    parse_special_tokens: bool = False
    now: datetime | None = None
    _with_tools: "dict[str, PromptEncoder]" = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.use_chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("data.use_chat_template=true, but the tokenizer has no chat template; set it to false")
        if reserved := [name for name in self.chat_template_kwargs if name in _RESERVED]:
            raise ConfigError(f"data.chat_template_kwargs: '{reserved[0]}' is set by the data module; remove it")
        if self.chat_template_kwargs and not self.applies_template:
            given = dict(self.chat_template_kwargs)
            raise ConfigError(f"data.chat_template_kwargs={given} have no effect without a chat template; remove them")

    @property
    def applies_template(self) -> bool:
        """Whether the tokenizer's chat template makes the prompts (otherwise: plain text)."""
        wanted = self.use_chat_template
        return bool(getattr(self.tokenizer, "chat_template", None)) if wanted is None else wanted

    def with_tools(self, schemas: list[dict[str, Any]]) -> "PromptEncoder":
        """Makes prompts of whole conversations, with the schemas of these tools; once for those that are alike."""
        if (key := str(schemas)) not in self._with_tools:
            options = {**self.chat_template_kwargs, **({"tools": schemas} if schemas else {})}
            whole = replace(self, chat_template_kwargs=options, system_prompt=None, max_prompt_tokens=None)
            self._with_tools[key] = whole
        return self._with_tools[key]

    def encode(self, scenarios: Sequence[Scenario], key: str, is_tried: bool = False) -> EncodedPrompts:
        """Prompt tokens of the scenarios of the split `key` (`data.train`, say).

        Args:
            scenarios: Some of its scenarios, or all. Of a large split, the first are encoded.
            key: Its name, for messages.
            is_tried: Whether the template has made prompts of other scenarios of the split, and all was said of them.

        Raises:
            DataError: If the template refuses a scenario or takes too much (see `limited`), a prompt has no tokens,
                prompts are too long under `overlong_prompts="error"`, or all are dropped.
            ConfigError: If overlong prompts of a large split are to be dropped: only the encoded prompt shows which.
        """
        if isinstance(scenarios, ServedScenarios):
            if self.overlong_prompts == "drop":
                raise ConfigError(f"data.overlong_prompts=drop needs all of {key} at once; set it to truncate_left")
            return replace(self.encode(scenarios[: content.SAMPLE], key), kept=range(len(scenarios)))
        parts = (scenarios[start : start + _BATCH] for start in range(0, len(scenarios), _BATCH))
        batches: Iterator[list[_Rendered]] = ([self._rendered(each, key) for each in part] for part in parts)
        if self.applies_template and not is_tried:  # foreign code
            batches = limited(batches, f"{key}: the chat template of {self.tokenizer.name_or_path!r}")
        # The tokenizer works without Python's lock: while it encodes a batch, the next ones arrive.
        with ThreadPoolExecutor(1) as thread:
            encoded = list(thread.map(partial(self._tokenize, key), batches))
        tokens = RaggedTokens.concatenate(batch for batch, *_ in encoded)
        if len(empty := np.flatnonzero(tokens.lengths == 0)):
            raise DataError(f"{key}: the prompt of scenario '{scenarios[empty[0]].id}' has no tokens; give it a text")
        if (marked := sum(count for *_, count in encoded)) and not is_tried:
            shown = ", ".join(special_tokens(self.tokenizer)[:_IDS_SHOWN])
            held = f"{key}: the text of {marked} of {len(scenarios)} scenarios holds special tokens ({shown})"
            log.warning("%s, encoded as plain text; data.parse_special_tokens=true encodes them as such", held)
        found = self._limit_lengths(scenarios, tokens, key)
        opened = [text for _, texts, _ in encoded for text in texts]
        return replace(found, opened=[opened[i] for i in found.kept])

    def _opened(self, text: str) -> str:
        """What a prompt has of its answer: a template may open that (`<think>`).

        What it opens and closes again (thoughts that are switched off) is no part of the answer.
        """
        if not self._assistant_header:
            return ""
        _, found, opened = text.rpartition(self._assistant_header)
        *others, last = ["", *(tag.strip("|") for tag in _TAG.findall(opened))]
        is_closed = "/" in last or last in others[1:]  # `</think>`; Gemma 4 has `<|channel>` and `<channel|>`
        return opened.lstrip() if found and not is_closed else ""

    @cached_property
    def _assistant_header(self) -> str:
        """What stands between the user's text and the assistant's in a conversation that goes on; "" if not in prompts.

        The last answer of a conversation would not tell: templates keep its thoughts, and open them. Where the template
        refuses a plain conversation, rewards see no text that it opens.
        """
        asked, said = {"role": "user", "content": "Question"}, {"role": "assistant", "content": "Its-answer"}
        if not self.applies_template:
            return ""
        goes_on = {"conversation": [asked, said, {**asked, "content": "Next"}], **self._template_kwargs}
        begins = {"conversation": [asked], "add_generation_prompt": True, **self._template_kwargs}
        answered, prompt = rendered(self.tokenizer, goes_on, begins)
        before = answered.partition(said["content"])[0].rpartition(asked["content"])[2]
        header = _NO_THOUGHTS.sub("", before).rstrip()
        return header if prompt.rpartition(asked["content"])[2].startswith(header) else ""

    @cached_property
    def writes_date(self) -> bool:
        """Whether the template asks for the date."""
        return self.applies_template and "strftime_now" in str(self.tokenizer.chat_template)

    @cached_property
    def _template_kwargs(self) -> dict[str, Any]:
        if (now := self.now) is None or not self.writes_date:
            return dict(self.chat_template_kwargs)
        # In its text: transformers lets a caller replace no function of a template.
        written = _DATE.sub(lambda call: repr(now.strftime(call[2])), self.tokenizer.get_chat_template())
        return {"chat_template": written, **self.chat_template_kwargs}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Finds the special tokens that are to be plain text; longer tokens first, for those that hold others."""
        tokens = [] if self.parse_special_tokens else sorted(special_tokens(self.tokenizer), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # (?!) is never found

    def _rendered(self, scenario: Scenario, key: str) -> _Rendered:
        """A prompt as text; it is marked where the scenario's own text holds special tokens."""
        messages = [{"role": turn.role, "content": turn.content} for turn in scenario.turns(self.system_prompt)]
        is_marked = any(self._special_pattern.search(message["content"]) for message in messages)
        prefill = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        if is_marked and self.applies_template:
            messages = mark_control_tokens(messages, self._special_pattern)
        return self._text(scenario, messages, key), prefill, scenario.id if is_marked else None

    def _text(self, scenario: Scenario, messages: list[dict[str, str]], key: str) -> str:
        if not self.applies_template:
            return "\n\n".join(message["content"] for message in messages)
        options = {"add_generation_prompt": True, "tokenize": False, **self._template_kwargs}
        most = _MOST_CHARACTERS + _MOST_TIMES * len(str([messages, self.chat_template_kwargs]))
        try:
            text = str(self.tokenizer.apply_chat_template(messages, **options))
            if len(text) > most:
                raise ValueError(f"it makes a text of {len(text):,} characters, more than {most:,}")
            # Templates may write tools' turns as JSON, and take words with which they are told something (`/no_think`).
            words = re.findall(r"\w+", messages[-1]["content"]) if messages[-1]["role"] == "user" else []
            if text and words and max(words, key=len) not in text:
                raise ValueError("it leaves out the last turn; it may be written for lists of parts, and not for texts")
            return text
        except Exception as error:  # a template is foreign code
            roles = [message["role"] for message in messages]
            refused = f"{key}: the chat template refuses scenario '{scenario.id}' (roles: {', '.join(roles)})"
            say = "if it takes no system turn, leave out data.system_prompt and the scenarios' context; "
            say = f"{say if roles[0] == 'system' else ''}data.use_chat_template=false joins the turns as plain text"
            raise DataError(f"{refused}: {one_line(error) or type(error).__name__}; {say}") from error

    def _tokenize(self, key: str, batch: Sequence[_Rendered]) -> tuple[RaggedTokens, list[str], int]:
        """The tokens of a batch, what they open, and how many of its scenarios hold special tokens in their text."""
        # Without a template, turns are joined by blank lines.
        between = "" if self.applies_template else "\n\n"
        texts = [f"{text}{between}{prefill}" if prefill else text for text, prefill, _ in batch]
        opened = [self._opened(text) + prefill for text, prefill, _ in batch]
        # A template writes the special tokens itself: adding the tokenizer's would double the first one.
        is_plain = not self.applies_template
        options = {"add_special_tokens": is_plain, "split_special_tokens": is_plain and not self.parse_special_tokens}
        # `verbose=False`: transformers would warn of prompts longer than the model's context.
        options |= {"return_attention_mask": False, "verbose": False}
        tokens: list[list[int]] = self.tokenizer(texts, **options)["input_ids"]
        if self.applies_template:
            for i, (text, prefill, marked) in enumerate(batch):
                if marked is not None:
                    whole = text + mark_control_tokens(prefill, self._special_pattern)
                    tokens[i] = self._tokenize_as_text(whole, marked, key)
        else:
            first, appends_eos = self.added
            # The model would take the end of the prompt for the end of its answer.
            tokens = [prompt[:-1] for prompt in tokens] if appends_eos else tokens
            # Markup may begin with what the tokenizer puts before every text (BOS): once is enough.
            tokens = [p[len(first) :] if first and p[: 2 * len(first)] == first * 2 else p for p in tokens]
        return RaggedTokens.from_lists(tokens), opened, sum(marked is not None for *_, marked in batch)

    def _tokenize_as_text(self, text: str, scenario: str, key: str) -> list[int]:
        """Prompt tokens in which only the template's own special tokens are such, not those in the scenario's text."""
        why = f"{key}: scenario '{scenario}' holds a special token that cannot be written as plain text: "
        with told_as(DataError, why, ValueError, after="; remove it, or set data.parse_special_tokens=true"):
            ids = self.tokenizer(text, sanitize_control_tokens=True, add_special_tokens=False)["input_ids"]
        return [int(i) for i in ids]

    def between_answers(self, turns: Sequence[Turn], ended: str) -> list[int]:
        """Tokens that stand between an answer and the next one: what the chat template writes there for these turns.

        They are the difference that the turns make to a dummy conversation, so an answer's own tokens never change:
        a template that drops earlier thoughts, or trims an answer, drops and trims nothing here.

        Args:
            turns: That the answer gets.
            ended: What the answer has of its end already, as text: of an end-of-turn token, or a stop string.

        Raises:
            DataError: If the template refuses such turns.
        """
        texts = [turn.content for turn in turns]
        options = {"add_special_tokens": False, "verbose": False}
        if not self.applies_template:
            split = {"split_special_tokens": not self.parse_special_tokens}
            return list(self.tokenizer("".join(f"\n\n{text}" for text in texts), **options, **split)["input_ids"])
        asked = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Its-answer"}]
        answers = [{"role": turn.role, "content": turn.content} for turn in turns]
        if is_marked := any(self._special_pattern.search(text) for text in texts):
            answers = mark_control_tokens(answers, self._special_pattern)
        whole = self._text(Scenario(id=_OF_TURNS, prompt="-"), [*asked, *answers], "model.environment")
        behind = whole.partition(asked[1]["content"])[2]
        before, found, rest = behind.partition(ended) if ended else (behind, "", "")
        text = rest if found and not before.strip() else behind
        if is_marked:
            return self._tokenize_as_text(text, _OF_TURNS, "model.environment")
        # As what comes behind an end of turn: some tokenizers put a space before a text.
        is_token = found and text is rest and ended in special_tokens(self.tokenizer)  # no token reaches beyond it
        before = ended if is_token else str(self.tokenizer.eos_token or "")
        whole_ids: list[int] = self.tokenizer(before + text, **options)["input_ids"]
        return whole_ids[len(self.tokenizer(before, **options)["input_ids"]) :]

    @cached_property
    def added(self) -> tuple[list[int], bool]:
        """Tokens that the tokenizer puts before every text, and whether it puts an end of sequence behind it."""
        eos = self.tokenizer.eos_token_id
        ids: list[int] = self.tokenizer("a")["input_ids"]
        without = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        appends_eos = eos is not None and ids[-1:] == [eos] and without[-1:] != [eos]
        return ids[: len(ids) - len(without) - appends_eos], appends_eos

    def _limit_lengths(self, scenarios: Sequence[Scenario], tokens: RaggedTokens, key: str) -> EncodedPrompts:
        lengths, limit = tokens.lengths, self.max_prompt_tokens
        whole = EncodedPrompts(tokens, list(range(len(tokens))))
        if limit is None or not (overlong := np.flatnonzero(lengths > limit).tolist()):
            return whole
        if self.overlong_prompts == "truncate_left":
            cut = RaggedTokens.from_lists([prompt[-limit:] for prompt in tokens])
            return replace(whole, tokens=cut, num_truncated=len(overlong))
        if self.overlong_prompts == "error":
            shown = ", ".join(f"{scenarios[i].id} ({lengths[i]})" for i in overlong[:_IDS_SHOWN])
            more = f" and {len(overlong) - _IDS_SHOWN} more" if len(overlong) > _IDS_SHOWN else ""
            many = f"{len(overlong)} of {len(tokens)} prompts have more than data.max_prompt_tokens={limit} tokens"
            say = f"or, if the model has room for them, data.max_prompt_tokens={lengths.max()}"
            raise DataError(f"{key}: {many}: {shown}{more}; set data.overlong_prompts to drop or truncate_left {say}")
        kept = np.flatnonzero(lengths <= limit).tolist()
        if not kept:
            raise DataError(f"{key}: data.max_prompt_tokens={limit} drops all prompts, the shortest of {lengths.min()}")
        return EncodedPrompts(RaggedTokens.from_lists([tokens[i] for i in kept]), kept, num_dropped=len(overlong))


def first_row(tokenizer: PreTrainedTokenizerBase, scenario: Scenario, tokens: Sequence[int]) -> str:
    """A scenario as the model sees it, and its target; cut."""
    return f"{tokenizer.decode(tokens)!r:.400}, target {scenario.target!r:.100}"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that must not be read out of a text: the special ones, and those that the chat template writes.

    The latter are added tokens that stand in the template's source; whitespace among them is ordinary text.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content]
    return [t.content for t in added if t.special or (t.content.strip() and t.content in template)]


def asked(scenario: Scenario, opened: str, system_prompt: str | None = None) -> list[Turn]:
    """A scenario's turns, and one of the assistant if its prompt has `opened` the answer."""
    turns = scenario.turns(system_prompt)
    if opened and turns[-1].role == "assistant":
        turns.pop()  # a prefill, with which `opened` ends
    return [*turns, Turn("assistant", opened)] if opened else turns
