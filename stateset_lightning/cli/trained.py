"""A checkpoint, model folder or model name -> model, tokenizer and prompts as in training: what two commands load."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from stateset_lightning.cli.overlays import read_yaml
from stateset_lightning.data.prompts import PromptEncoder
from stateset_lightning.environments import EnvironmentConfig
from stateset_lightning.errors import CheckpointError, ConfigError, log
from stateset_lightning.files import keep_inputs
from stateset_lightning.policy import end_of_sequence_ids, load_model, load_tokenizer
from stateset_lightning.policy.config import LoadingOptions, PolicyConfig, check_saved
from stateset_lightning.policy.lora import config_from_plain, inject, is_adapted
from stateset_lightning.policy.lora_state import base_digest, check_base
from stateset_lightning.rollout import RolloutConfig
from stateset_lightning.rollout.sampling import StopStrings
from stateset_lightning.run.checkpoint_io import check_weights, newest_checkpoints, read_checkpoint
from stateset_lightning.run.find_checkpoint import find_among
from stateset_lightning.run.folder import CHECKPOINTS, CONFIGS

_WEIGHTS = "policy.model."
_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")  # so called in a generation config, too
_SCRIPTED = (None, "stateset_lightning.environments.ScriptedUser")  # factories that run nothing of anybody's
_PROMPT_OPTIONS = ("system_prompt", "use_chat_template", "chat_template_kwargs", "parse_special_tokens")


@dataclass(frozen=True)
class TrainedModel:
    """A model with what its training says about using it.

    `config` is the run's resolved config, empty where none is found, and `found_config` its file, if nobody has named
    that; `checkpoint` is all of the checkpoint but its weights, empty for a plain model.
    """

    source: str
    policy: PolicyConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rollout: RolloutConfig
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    found_config: Path | None = None

    @property
    def is_adapted(self) -> bool:
        """Whether the model has an adapter that is not merged."""
        return is_adapted(self.model)

    def generation_config(self) -> GenerationConfig:
        """Samples as training did, and ends with all tokens and strings that ended a completion there.

        The base's own penalties are not in it: they were no part of training. Greedy answers, as in an evaluation, are
        asked for by `do_sample=False`: transformers saves no temperature in a greedy config.
        """
        stop = StopStrings(self.rollout.stop, self.tokenizer, end_of_sequence_ids(self.model, self.tokenizer))
        options = {"do_sample": True} | {name: getattr(self.rollout, name) for name in _SAMPLING}
        options["top_k"] = options["top_k"] or 0  # None: transformers would take 50
        options |= {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        return GenerationConfig(**options, eos_token_id=sorted(stop.ends), stop_strings=stop.strings or None)

    def encoder(self, system_prompt: str | None = None) -> PromptEncoder:
        """Makes prompts as in training, with another system prompt if one is given."""
        given = (self.config.get("data") or {}) | ({} if system_prompt is None else {"system_prompt": system_prompt})
        options = {name: value for name in _PROMPT_OPTIONS if (value := given.get(name)) is not None}
        check_saved("data", PromptEncoder, options)
        return PromptEncoder(tokenizer=self.tokenizer, **options)

    def environment(self) -> EnvironmentConfig | None:
        """What answers the model; None: nothing, so that it answers once. The name of an environment has code run: that
        is not for a config to say which nobody has named.
        """
        given = self.config.get("model", {}).get("environment")
        check_saved("model.environment", EnvironmentConfig, given or {})
        environment = EnvironmentConfig.of(given)
        if environment is None or self.found_config is None or environment.factory in _SCRIPTED:
            return environment
        why = "which is code, and runs where you name the config: --config %s. Without it, a prompt is answered once"
        log.info("the run has conversations with %r, " + why, environment.factory, self.found_config)
        return None


def load_trained(source: str, config: str | None = None, loading: LoadingOptions | None = None) -> TrainedModel:
    """Loads what a run has trained, or any model.

    Args:
        source: A checkpoint file, `last` or `best` of the runs below `runs`, a folder of checkpoints for the newest, a
            folder that `save_pretrained` wrote, or a Hugging Face id. Without a run, the model's generation config says
            how it is sampled.
        config: The run's resolved config; by default the one in the run's folder. It says how prompts are made
            and, if it is named, what answers the model; of the model itself nothing.
        loading: What only the user decides; a checkpoint's own are not used.

    Raises:
        CheckpointError: If the checkpoint is damaged, or none of this package's.
        ConfigError: If the model cannot be loaded, the config cannot be read, or it has an adapter over a plain model.
    """
    loading = loading or LoadingOptions()
    given = _read_config(Path(config)) if config else {}
    file = _checkpoint_of(source)
    keep_inputs(file)
    if file is None:
        options = (given.get("model") or {}).get("policy")
        if isinstance(options, Mapping) and (adapter := options.get("adapter")):
            raise ConfigError(f"{config}: model.policy.adapter={adapter!r} is left out here: give its run's checkpoint")
        policy = PolicyConfig(source, **vars(loading))
        tokenizer = load_tokenizer(policy)
        model = load_model(policy, tokenizer=tokenizer)
        return TrainedModel(source, policy, model, tokenizer, _sampling_of(model), config=given)
    checkpoint = read_checkpoint(file, check_sums=True, map_location="cpu")
    weights, saved = checkpoint.pop("state_dict"), checkpoint["hyper_parameters"]
    policy = PolicyConfig.from_checkpoint(saved["policy"], loading)
    check_saved("model.rollout", RolloutConfig, saved["rollout"])
    rollout = RolloutConfig(**saved["rollout"])
    model, seed = _load(source, policy, weights, checkpoint["stateset"]), checkpoint["stateset"]["seed"]
    found = None if given else _find_config(file, checkpoint)
    read = given if found is None else _read_config(found)
    return TrainedModel(source, policy, model, load_tokenizer(policy), rollout, seed, read, checkpoint, found)


def _sampling_of(model: PreTrainedModel) -> RolloutConfig:
    """How a model is sampled by its generation config; what that leaves out, or switches off, is our default."""
    saved = model.generation_config.to_dict() if model.generation_config else {}
    stop = saved.get("stop_strings") or []
    options = {name: value for name in _SAMPLING if (value := saved.get(name)) not in (None, 0, -1)}
    options["stop"] = [stop] if isinstance(stop, str) else stop
    check_saved("generation_config", RolloutConfig, options)
    return RolloutConfig(**options)


def _checkpoint_of(source: str) -> Path | None:
    """The checkpoint that is meant, as in the other commands; None for a model's folder or file, or its id."""
    path = Path(source).expanduser()
    is_file = path.suffix == ".ckpt" or (path.is_file() and path.suffix != ".gguf")
    if not (source in ("last", "best") or is_file or newest_checkpoints(path, "**/*.ckpt")):
        folder = source.partition("/")[0]
        if not path.exists() and (Path(folder).is_dir() or folder == "runs" or path.suffix in (".pt", ".safetensors")):
            raise CheckpointError(f"ckpt_path={source}: there is no such file or folder in {Path.cwd()}")
        return None
    file = find_among([("runs", "**/*.ckpt")], str(path))
    log.info("%s: %s", source, file)
    return Path(file)


def _load(source: str, policy: PolicyConfig, state: Mapping[str, Tensor], saved: Mapping[str, Any]) -> PreTrainedModel:
    """The policy's base, with the checkpoint's weights or adapter; what adapter it started from is not needed."""
    weights = {name.removeprefix(_WEIGHTS): value for name, value in state.items() if name.startswith(_WEIGHTS)}
    adapter = saved.get("adapter")
    if adapter is None:  # as it was trained
        dtype = next((value.dtype for value in weights.values() if value.is_floating_point()), torch.float32)
    else:
        dtype = getattr(torch, name := str(adapter["base"]["dtype"]), None)  # type: ignore[assignment]
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{source}: {name!r:.80} is no dtype")
    model = load_model(replace(policy, lora=None, adapter=None), dtype)
    expected: Mapping[str, Tensor] = model.state_dict()
    if adapter is not None:
        inject(model, config_from_plain(adapter["config"]), source)
        base = {"model_name": policy.model_name, "revision": policy.revision, "digest": base_digest(model)}
        check_base(base, adapter["base"])
        expected = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    check_weights(expected, weights, f"{policy.model_name}, which the run started from")
    model.load_state_dict(weights, strict=adapter is None)
    if adapter is None:  # adapted modules are no longer where transformers would tie them
        model.tie_weights()
    return model.eval()


def _find_config(file: Path, checkpoint: Mapping[str, Any]) -> Path | None:
    folder = next((place for place in file.absolute().parents if place.name == CHECKPOINTS), file.absolute().parent)
    for place, name in product([folder.parent, Path(checkpoint["stateset"]["run_folder"])], CONFIGS):
        if (place / name).is_file():
            return place / name
    log.info("%s: no config of its run is found: prompts get no system prompt, and the tokenizer's template", file)
    return None


def _read_config(path: Path) -> dict[str, Any]:
    content = read_yaml(path, str(path), "a run's resolved config")
    model = content.get("model")
    parts = [content.get("data"), model.get("environment")] if isinstance(model, Mapping) else [""]
    if not all(isinstance(part, Mapping | None) for part in parts):
        raise ConfigError(f"{path} is no config of a run, which has model: and data:")
    return content
