"""What a checkpoint holds of a policy with an adapter: the adapter, its config, and a digest of the model under it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.config import PolicyConfig
from stateset_lightning.policy.lora import NAME, adapter_off, is_adapted, plain_config, trained_names

VALUES_PER_MATRIX = 1024  # that the digest of the model under the adapter is made of

# Keys of peft's config: its bookkeeping, and what may change when a run is resumed.
_BOOKKEEPING = {"inference_mode", "peft_version", "auto_mapping", "task_type"}
_MAY_CHANGE = _BOOKKEEPING | {"lora_dropout", "base_model_name_or_path", "revision"}


class AdapterState:
    """The adapter of a policy, and where it started.

    Args:
        model: With its adapter, new or loaded, before anything is trained, moved or sharded.
        config: What the model was made from.
    """

    def __init__(self, model: PreTrainedModel, config: PolicyConfig) -> None:
        self.model = model
        self.names = trained_names(model)
        name, revision, dtype = config.model_name, config.revision, str(model.dtype).removeprefix("torch.")
        self.base = {"model_name": name, "revision": revision, "dtype": dtype, "digest": base_digest(model)}
        # Where the adapter started; None where that is the model without it: not of one that was loaded, nor with
        # biases, which stay as they are trained when it is off.
        start: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._trained().items()}
        self.start = None if config.adapter is None and model.peft_config[NAME].bias == "none" else start

    def _trained(self) -> dict[str, nn.Parameter]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name] for name in self.names}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides the adapter's weights: plain containers and tensors."""
        return {"config": plain_config(self.model), "base": self.base, "start": self.start}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes the start of the run that is resumed.

        Raises:
            ConfigError: If the checkpoint's adapter has another config, or was trained on another model.
        """
        mine, theirs = plain_config(self.model), saved["config"]
        for name in sorted((mine.keys() | theirs.keys()) - _MAY_CHANGE):
            if (here := mine.get(name)) != (there := theirs.get(name)):
                raise ConfigError(f"model.policy.lora: {name}={here} differs from {there} of the checkpoint's adapter")
        check_base(self.base, saved["base"])
        if (self.start is None) != (saved["start"] is None):
            here = "is not given, but was" if self.start is None else "is given, but was not"
            raise ConfigError(f"model.policy.adapter {here} when the run started, as the reference: give it as before")
        self.start = saved["start"]

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The policy as it started, while the context lasts; for passes without gradient."""
        if self.start is None:
            with adapter_off(self.model):
                yield
            return
        now = {name: p.detach().clone() for name, p in self._trained().items()}
        try:
            self._fill(self.start)
            yield
        finally:
            self._fill(now)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._trained().items():
            value = values[name].to(p.device)
            if isinstance(p, DTensor) and not isinstance(value, DTensor):
                value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(value)
        torch.clear_autocast_cache()  # of casts of what was there before


def base_digest(model: nn.Module) -> str:
    """A digest of some values of each weight under an adapter, or of all, before any is trained.

    Rounded to bfloat16: equal for float32 and bfloat16 weights.
    """
    hashed = sha256()
    weights = [weight for weight in model.parameters() if not (is_adapted(model) and weight.requires_grad)]
    for weight in weights:
        values = weight.detach().flatten()
        # An odd step: an even one might read a single column only.
        values = values[:: len(values) // VALUES_PER_MATRIX | 1]
        values = values.bfloat16().view(torch.int16) if values.is_floating_point() else values
        hashed.update(values.cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def check_base(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Checks that the model under an adapter is the one that the adapter was trained on, whatever its name.

    Raises:
        ConfigError: If not.
    """
    if mine["digest"] != saved["digest"]:
        mine_is, saved_is = (" at ".join(filter(None, [x["model_name"], x["revision"]])) for x in (mine, saved))
        what = f"model.policy.model_name={mine_is} is not the model that the checkpoint's adapter was trained on"
        raise ConfigError(f"{what} ({saved_is}): other weights (fit goes on all the same with --accept_changes base)")


def keep_only_in_state_dict(holder: nn.Module, names: Sequence[str]) -> None:
    """From now on `holder.state_dict()` has only these names, and `load_state_dict` is strict about these only."""
    names = tuple(names)

    def drop_others(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        kept = {prefix + name for name in names}
        for name in [name for name in state if name.startswith(prefix) and name not in kept]:
            del state[name]

    def forgive_others(module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name.endswith(names)]

    holder.register_state_dict_post_hook(drop_others)
    holder.register_load_state_dict_post_hook(forgive_others)


def check_same_kind(adapter: AdapterState | None, saved: Mapping[str, Any] | None) -> None:
    """Checks that policy and checkpoint both have an adapter, or both have none.

    Raises:
        ConfigError: If not.
    """
    if adapter is None and saved is not None:
        held = f"an adapter of rank {saved['config']['r']} on {saved['base']['model_name']}"
        raise ConfigError(f"checkpoint holds {held}, and model.policy has none: set model.policy.lora as in its run")
    if adapter is not None and saved is None:
        raise ConfigError("the checkpoint holds a whole model and no adapter: set model.policy.lora to null")
