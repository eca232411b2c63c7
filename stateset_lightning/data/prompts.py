"""Scenarios -> prompt tokens: chat template or plain text, and what happens to prompts that are too long."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from stateset_lightning.errors import ConfigError, DataError
from stateset_lightning.types import Scenario

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OverlongPolicy = Literal["error", "drop", "truncate_left"]

_BATCH = 1024
_IDS_SHOWN = 5
_RESERVED_TEMPLATE_KWARGS = ("conversation", "add_generation_prompt", "tokenize", "continue_final_message", "return_tensors", "return_dict")


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompt tokens of the scenarios that were kept: `tokens[i]` belongs to scenario `kept[i]`."""

    tokens: list[list[int]]
    kept: list[int]
    num_dropped: int = 0
    num_truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Makes prompt tokens of scenarios.

    Args:
        tokenizer: A transformers tokenizer.
        system_prompt: Stands before each scenario's own context in the system turn.
        use_chat_template: None uses the tokenizer's template if it has one. Otherwise the contents of the turns are joined by
            blank lines and get the tokenizer's own special tokens, except for an end of sequence.
        chat_template_kwargs: Further variables of the template (`enable_thinking`, say).
        max_prompt_tokens: Longest prompt that is accepted; None accepts all.
        overlong_prompts: What happens to longer ones.
    """

    tokenizer: "PreTrainedTokenizerBase"
    system_prompt: str | None = None
    use_chat_template: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_prompt_tokens: int | None = None
    overlong_prompts: OverlongPolicy = "error"

    def __post_init__(self) -> None:
        if self.use_chat_template and not self._has_template:
            raise ConfigError("data.use_chat_template=true, but the tokenizer has no chat template; set it to false for plain text")
        if reserved := [name for name in self.chat_template_kwargs if name in _RESERVED_TEMPLATE_KWARGS]:
            raise ConfigError(f"data.chat_template_kwargs: '{reserved[0]}' is set by the data module; remove it")
        if self.chat_template_kwargs and not self.applies_template:
            raise ConfigError(
                f"data.chat_template_kwargs={dict(self.chat_template_kwargs)} have no effect without a chat template; remove them"
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
        make_text = self._templated if self.applies_template else self._plain
        tokens = self._tokenize([make_text(scenario, key) for scenario in scenarios])
        for scenario, prompt in zip(scenarios, tokens, strict=True):
            if not prompt:
                raise DataError(f"{key}: the prompt of scenario '{scenario.id}' has no tokens; give it a text that the tokenizer knows")
        return self._limit(scenarios, tokens, key)

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _templated(self, scenario: Scenario, key: str) -> str:
        from jinja2 import TemplateError

        conversation = [{"role": turn.role, "content": turn.content} for turn in scenario.turns(self.system_prompt)]
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False, **dict(self.chat_template_kwargs)
            )
        except (TemplateError, TypeError, ValueError) as error:
            has_system = conversation[0]["role"] == "system"
            advice = "if it takes no system turn, leave out data.system_prompt and the scenarios' context; " if has_system else ""
            raise DataError(
                f"{key}: the chat template refuses scenario '{scenario.id}' (roles: {', '.join(t['role'] for t in conversation)}): "
                f"{error}; {advice}data.use_chat_template=false joins the turns as plain text"
            ) from error
        return str(text)

    def _plain(self, scenario: Scenario, key: str) -> str:
        return "\n\n".join(turn.content for turn in scenario.turns(self.system_prompt))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        # A template writes the special tokens itself: adding the tokenizer's would double the first one.
        add_special_tokens = not self.applies_template
        tokens: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            # `verbose=False`: lengths are our own policy, and transformers would warn of the model's.
            batch = self.tokenizer(
                list(texts[start : start + _BATCH]), add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
            )
            tokens += [list(ids) for ids in batch["input_ids"]]
        if add_special_tokens and self._appends_eos():
            # The model would take the end of the prompt for the end of its answer.
            tokens = [prompt[:-1] for prompt in tokens]
        return tokens

    def _appends_eos(self) -> bool:
        eos = self.tokenizer.eos_token_id
        with_special = self.tokenizer("a")["input_ids"]
        without = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return eos is not None and with_special[-1:] == [eos] and without[-1:] != [eos]

    def _limit(self, scenarios: Sequence[Scenario], tokens: list[list[int]], key: str) -> EncodedPrompts:
        everything = list(range(len(tokens)))
        limit = self.max_prompt_tokens
        overlong = [i for i in everything if limit is not None and len(tokens[i]) > limit]
        if limit is None or not overlong:
            return EncodedPrompts(tokens, everything)
        if self.overlong_prompts == "truncate_left":
            return EncodedPrompts([prompt[-limit:] for prompt in tokens], everything, num_truncated=len(overlong))
        if self.overlong_prompts == "error":
            shown = ", ".join(f"{scenarios[i].id} ({len(tokens[i])})" for i in overlong[:_IDS_SHOWN])
            more = f" and {len(overlong) - _IDS_SHOWN} more" if len(overlong) > _IDS_SHOWN else ""
            longest = max(len(tokens[i]) for i in overlong)
            raise DataError(
                f"{key}: {len(overlong)} of {len(tokens)} prompts have more than data.max_prompt_tokens={limit} tokens: {shown}{more}; "
                f"set data.max_prompt_tokens={longest}, or data.overlong_prompts to drop or truncate_left"
            )
        kept = [i for i in everything if len(tokens[i]) <= limit]
        if not kept:
            shortest = min(len(prompt) for prompt in tokens)
            raise DataError(f"{key}: data.max_prompt_tokens={limit} drops all {len(tokens)} prompts; the shortest has {shortest} tokens")
        return EncodedPrompts([tokens[i] for i in kept], kept, num_dropped=len(overlong))
