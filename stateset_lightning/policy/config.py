"""What model is trained, and how it is loaded.

No `from __future__ import annotations` in files whose signatures the command line reads: jsonargparse 4.53 then loses the bounds in
`Annotated[...]` without a word (test_cli.py).
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from stateset_lightning.bounds import check_bounds
from stateset_lightning.errors import CheckpointError

_log = logging.getLogger("stateset_lightning")

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter (LoRA, arXiv:2106.09685): it is trained, the model under it is not. Needs the extra `lora`."""

    rank: Annotated[int, Ge(1)] = 16
    """Rank of the update of each adapted matrix."""
    alpha: Annotated[int, Ge(1)] = 32
    """The update is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """The layers: `all-linear` (each but the output embedding), a list of names, or a regular expression for whole names."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of the adapter's input, in training alone."""
    peft_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `peft.LoraConfig`, such as `use_rslora` or `rank_pattern`."""

    def __post_init__(self) -> None:
        check_bounds("model.policy.lora", type(self), vars(self))


@dataclass(frozen=True)
class LoadingOptions:
    """Which code a model runs with and what it is told: for its user to say, never for a file. Each field is that of `PolicyConfig`."""

    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)


FROM_CHECKPOINT = ("model_name", "dtype", "gradient_checkpointing", "dropout", "scoring", "head_chunk_tokens", "lora", "adapter")
"""What a checkpoint may say of its policy. Every other field of `PolicyConfig` is one of `LoadingOptions` (test_config.py)."""


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: any causal language model that transformers loads."""

    model_name: str
    """`tiny` (bundled, offline), a folder written by `save_pretrained`, or a Hugging Face id. There is no default."""
    dtype: Dtype | None = None
    """Precision of the weights. None: float32, or the Trainer's when `trainer.precision` is `bf16-true` or `16-true`."""
    attn_implementation: str | None = None
    """Attention of transformers (`sdpa`, `eager`, ...). None: the model's default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Every dropout of the model is set to this in training. Sampling and scoring without gradient never use dropout."""
    scoring: Literal["auto", "packed", "padded"] = "auto"
    """How log-probs are computed. `packed`: each prompt once per group; `padded`: a row per completion; `auto`: packed where exact."""
    head_chunk_tokens: Annotated[int, Gt(0)] | None = None
    """Completion tokens whose logits exist at a time. None: as many as keep a chunk of logits at 64 MiB."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    trust_remote_code: bool = False
    """Run code that comes with a Hugging Face id. Off unless you trust its authors."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `AutoModelForCausalLM.from_pretrained`, such as `quantization_config`."""
    lora: LoRAConfig | None = None
    """Train a low-rank adapter and leave the model as it is. None: train the model."""
    adapter: str | None = None
    """Go on from an adapter that peft has saved (a folder or a Hugging Face id). All but `lora.dropout` comes from its own config."""

    def __post_init__(self) -> None:
        if isinstance(self.lora, Mapping):
            object.__setattr__(self, "lora", LoRAConfig(**self.lora))
        check_bounds("model.policy", type(self), vars(self))

    @property
    def has_dropout(self) -> bool:
        """Whether any dropout is at work in training."""
        return self.dropout > 0 or (self.lora is not None and self.lora.dropout > 0)

    @property
    def is_local(self) -> bool:
        """Whether the model is bundled or a folder, and no Hugging Face id."""
        path = Path(self.model_name)
        return self.model_name == "tiny" or path.is_absolute() or path.expanduser().exists()

    @property
    def public_name(self) -> str:
        """The model's name as others may read it: of a folder its last part, which says nothing about the machine."""
        return Path(self.model_name).name if self.is_local else self.model_name

    @classmethod
    def of(cls, policy: "str | Mapping[str, Any] | PolicyConfig") -> "PolicyConfig":
        """A config from a model name, a mapping (taken for a checkpoint's: `from_checkpoint`) or a config."""
        if isinstance(policy, PolicyConfig):
            return policy
        return cls(model_name=policy) if isinstance(policy, str) else cls.from_checkpoint(policy)

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], loading: LoadingOptions = LoadingOptions()) -> "PolicyConfig":
        """The policy that a checkpoint names, loaded with the user's options and none of the file's own.

        Args:
            saved: `hyper_parameters.policy` of the checkpoint, as anybody may have written it.
            loading: The user's. An option that the file has and the user has not given is left out, which is announced.

        Raises:
            CheckpointError: If the checkpoint names no model, or has an option that this version does not know.
        """
        if unknown := sorted(map(str, saved.keys() - {item.name for item in fields(cls)})):
            raise CheckpointError(f"the checkpoint's model.policy.{unknown[0]} is unknown here: load it with the version that wrote it")
        if not isinstance(saved.get("model_name"), str):
            raise CheckpointError(f"the checkpoint's model.policy.model_name={saved.get('model_name')!r:.80} is no model's name")
        for item in fields(LoadingOptions):
            if (value := saved.get(item.name)) and not getattr(loading, item.name):
                flag = _flag(item.name, value)
                _log.warning("the run's model.policy.%s is not taken from a checkpoint: give %.200s where you trust it", item.name, flag)
        return cls(**{name: saved[name] for name in FROM_CHECKPOINT if name in saved}, **vars(loading))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _flag(name: str, value: Any) -> str:
    """How `generate` and `export` are told a loading option; without the control characters that a file may hold."""
    if name == "trust_remote_code":
        return "--trust_remote_code"
    return f"--{name} '{json.dumps(value, default=str)}'" if isinstance(value, Mapping) else f"--{name} {value!a}"
