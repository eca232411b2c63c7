"""What model is trained, and how it is loaded.

No `from __future__ import annotations` in files whose signatures the command line reads: jsonargparse 4.53 then loses
the bounds in `Annotated[...]` without a word (test_cli.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Lt
from pydantic import TypeAdapter, ValidationError

from stateset_lightning.errors import CheckpointError, bounded, log

Dtype = Literal["float32", "bfloat16", "float16"]


@bounded("model.policy.lora")
@dataclass(frozen=True)
class LoRAConfig:
    """A low-rank adapter (LoRA, arXiv:2106.09685): it is trained, the model under it is not. Needs the extra `lora`.

    Args:
        rank: Rank of the update of each adapted matrix.
        alpha: The update is multiplied by alpha / rank.
        target_modules: The adapted layers: `all-linear` (every linear layer but the output embedding), a list of names,
            or a regular expression that matches whole names.
        dropout: Dropout of the adapter's input, in training only.
        peft_kwargs: Further arguments of `peft.LoraConfig`, such as `use_rslora` or `rank_pattern`.
    """

    rank: Annotated[int, Ge(1)] = 16
    alpha: Annotated[int, Ge(1)] = 32
    target_modules: str | list[str] = "all-linear"
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    peft_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """Which code a model runs with, and what it is told: the user decides this, never a checkpoint.

    Args:
        revision: Branch, tag or commit of a Hugging Face id.
        attn_implementation: Attention of transformers (`sdpa`, `eager`, ...). None: the model's default.
        trust_remote_code: Run code that comes with a Hugging Face id. Off unless you trust its authors.
        model_kwargs: Further arguments of `AutoModelForCausalLM.from_pretrained`, such as `quantization_config`.
    """

    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)


@bounded("model.policy")
@dataclass(frozen=True)
class PolicyConfig(LoadingOptions):
    """The policy: any causal language model that transformers loads.

    A checkpoint may set the options below; those inherited from `LoadingOptions` are the user's only.

    Args:
        model_name: `tiny` (bundled, offline), a folder written by `save_pretrained`, a .gguf file with its tokenizer
            beside it, or a Hugging Face id. There is no default.
        dtype: Precision of the weights. None: float32, or the Trainer's when `trainer.precision` is `bf16-true` or
            `16-true`.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        dropout: Every dropout of the model is set to this in training. Sampling and scoring without gradient never use
            dropout.
        scoring: How log-probs are computed. `packed`: each prompt once per group; `padded`: a row per completion;
            `auto`: packed where exact.
        head_chunk_tokens: Completion tokens whose logits exist at a time. None: as many as keep a chunk of logits at
            64 MiB; on a GPU 4096, and a part of the vocabulary at a time.
        head_dtype: Precision of the products that give logits in training. `model`: as the rest of the model computes;
            `float32`: exact for weights of fewer bits too. None: `float32` where such products would be rounded, with
            weights in half precision on a CPU, else `model` (docs/speed-and-memory.md).
        lora: Train a low-rank adapter and leave the model as it is. None: train the model.
        adapter: Continue from an adapter that peft has saved (a folder or a Hugging Face id). All but `lora.dropout`
            comes from its own config.
        float32_matmul: How exact products of float32 are on a GPU (`torch.set_float32_matmul_precision`): `high` has
            TF32's ten bits and is several times as fast; None leaves torch's setting, which is `highest`.
        router_aux_loss: Coefficient of the loss that has routers use all experts (docs/algorithms.md). 0: none.
    """

    model_name: str
    dtype: Dtype | None = None
    gradient_checkpointing: bool = False
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    scoring: Literal["auto", "packed", "padded"] = "auto"
    head_chunk_tokens: Annotated[int, Gt(0)] | None = None
    head_dtype: Literal["float32", "model"] | None = None
    lora: LoRAConfig | None = None
    adapter: str | None = None
    float32_matmul: Literal["highest", "high", "medium"] | None = None
    router_aux_loss: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.lora, Mapping):
            check_saved("model.policy.lora", LoRAConfig, self.lora)
            object.__setattr__(self, "lora", LoRAConfig(**self.lora))

    @property
    def is_adapted(self) -> bool:
        """Whether an adapter is trained, and the model under it is not."""
        return self.lora is not None or self.adapter is not None

    @property
    def has_dropout(self) -> bool:
        """Whether training uses any dropout."""
        return self.dropout > 0 or (self.lora is not None and self.lora.dropout > 0)

    @property
    def public_name(self) -> str:
        """The model's name as others may read it: of a folder only its last part, which says nothing of the machine."""
        path = Path(self.model_name)
        return path.name if path.is_absolute() or path.expanduser().exists() else self.model_name

    @classmethod
    def of(cls, policy: "str | Mapping[str, Any] | PolicyConfig") -> "PolicyConfig":
        """A config from a model name, a config, or a mapping, which is read like a checkpoint's (`from_checkpoint`)."""
        if isinstance(policy, PolicyConfig):
            return policy
        return cls(model_name=policy) if isinstance(policy, str) else cls.from_checkpoint(policy)

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], loading: LoadingOptions = LoadingOptions()) -> "PolicyConfig":
        """The policy that a checkpoint names, loaded with the user's options and none of the file's own.

        Args:
            saved: `hyper_parameters.policy` of the checkpoint; anybody may have written it.
            loading: The user's options. Where the file sets one and the user does not, it stays unset, and a warning
                says so.

        Raises:
            CheckpointError: If the checkpoint names no model, or has an option that is none of this version's.
        """
        users = {item.name: getattr(loading, item.name) for item in fields(LoadingOptions)}
        for name, given in users.items():
            if (value := saved.get(name)) and not given:
                told = "the run's model.policy.%s=%.200s is not taken from a checkpoint: give --%s where you trust it"
                log.warning(told, name, ascii(value), name)
        options = {"model_name": None, **{name: value for name, value in saved.items() if name not in users}}
        check_saved("model.policy", cls, options)
        return cls(**options, **users)

    def completed(self, saved: Mapping[str, Any], names: Sequence[str]) -> "PolicyConfig":
        """This policy with what it leaves open as in a checkpoint's run, which is announced.

        Args:
            saved: `hyper_parameters.policy` of the checkpoint; anybody may have written it. An adapter is taken from
                here only where it is a folder: nothing is fetched at a checkpoint's word.
            names: The options that may be taken.

        Raises:
            CheckpointError: If the value of one cannot be used.
        """
        open_ones = [name for name in names if getattr(self, name) is None and saved.get(name) is not None]
        taken = {name: saved[name] for name in open_ones if name != "adapter" or Path(str(saved[name])).is_dir()}
        check_saved("model.policy", type(self), taken)
        for name, value in taken.items():
            log.info("model.policy.%s=%s, as in the checkpoint's run", name, value)
        return replace(self, **taken)


def check_saved(key: str, cls: type, saved: Mapping[str, Any]) -> None:
    """Holds what a checkpoint, or a config beside it, says of a class's options against their types.

    Raises:
        CheckpointError: Naming the first option that this version does not know, or whose value does not fit.
    """
    hints = get_type_hints(cls, include_extras=True)
    for name, value in saved.items():
        if name not in hints:
            raise CheckpointError(f"checkpoint: {key}.{name} is unknown here: load it with the version that wrote it")
        try:
            TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            raise CheckpointError(f"checkpoint or its config: {key}.{name}={value!r:.80} cannot be used") from error
