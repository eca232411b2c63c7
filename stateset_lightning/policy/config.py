"""What model is trained, and how it is loaded.

No `from __future__ import annotations` in files whose signatures the command line reads: jsonargparse 4.53 then loses
the bounds in `Annotated[...]` without a word (test_cli.py).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from stateset_lightning.errors import check_bounds

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter (LoRA, arXiv:2106.09685): it is trained, the model under it is not. Needs the extra `lora`."""

    rank: Annotated[int, Ge(1)] = 16
    """Rank of the update of each adapted matrix."""
    alpha: Annotated[int, Ge(1)] = 32
    """The update is multiplied by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """The layers: `all-linear` (each but the output embedding), a list of names, or a regular expression for whole
    names.
    """
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of the adapter's input, in training alone."""
    peft_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `peft.LoraConfig`, such as `use_rslora` or `rank_pattern`."""

    def __post_init__(self) -> None:
        check_bounds("model.policy.lora", type(self), vars(self))


@dataclass(frozen=True)
class PolicyConfig:
    """The policy: any causal language model that transformers loads."""

    model_name: str
    """`tiny` (bundled, offline), a folder written by `save_pretrained`, or a Hugging Face id. There is no default."""
    dtype: Dtype | None = None
    """Precision of the weights. None: float32, or the Trainer's when `trainer.precision` is `bf16-true` or
    `16-true`.
    """
    attn_implementation: str | None = None
    """Attention of transformers (`sdpa`, `eager`, ...). None: the model's default."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Every dropout of the model is set to this in training. Sampling and scoring without gradient never use
    dropout.
    """
    scoring: Literal["auto", "packed", "padded"] = "auto"
    """How log-probs are computed. `packed`: each prompt once per group; `padded`: a row per completion; `auto`: packed
    where exact.
    """
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
    """Go on from an adapter that peft has saved (a folder or a Hugging Face id). All but `lora.dropout` comes from its
    own config.
    """

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
        """A config from a model name, a mapping (as a checkpoint holds it) or a config."""
        if isinstance(policy, PolicyConfig):
            return policy
        return cls(model_name=policy) if isinstance(policy, str) else cls(**policy)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
