"""What a run is made of, as one flat mapping: kept in its checkpoints, compared on resume and, at the start, by ranks.

A key is an option's (`model.rollout.temperature`), with its value, or names contents (`base weights`, `rows of
data.train`), with their digest. Options follow from the signatures of the classes: a new one is remembered without a
word here.
"""

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from stateset_lightning.errors import ConfigError
from stateset_lightning.ranks import Ranks
from stateset_lightning.redaction import redacted
from stateset_lightning.training.data import data_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from stateset_lightning.module import GRPOLightningModule

# What changes on resume only where `accept_changes` names it, and the keys of it: of the last three only the class.
KINDS = {"base": r"base weights", "rows": r"rows of .*", "tokenizer": r"tokenizer", "template": r"chat template"}
KINDS |= {"rewards": r"model\.reward(\..*)?", "optimizer": r"model\.optimizer", "scheduler": r"model\.lr_scheduler"}
KINDS |= {"algorithm": r"model\.algorithm", "environment": r"model\.environment(\..*)?"}
CONTENTS = "base", "rows", "tokenizer", "template"  # known by a digest
REASONS = {"base": "model.policy.", "rows": "data.", "template": "data."}  # options that may be why they have changed

# Options that may differ among ranks, each with a disk of its own: the contents of these places are compared.
PLACES = re.compile(r"data\.(train|validation|test|predict)|.*\.(model_name|adapter|logger)")
# Not described as an option: made of several, made by it when it is called, or known by a digest.
TEMPLATE_OPTIONS = "use_chat_template", "chat_template_kwargs", "parse_special_tokens"  # of `data`; digested in order
BY_THEMSELVES = "trainer.callbacks", "model.reward", "model.optimizer", "model.lr_scheduler", "data.tokenizer"

# Where types come from whose `repr` says all, and no address.
PLAIN_TYPES = "builtins", "re", "datetime", "pathlib", "pathlib._local", "numpy", "torch"

LONGEST_VALUE = 200  # characters; of a longer one the start is kept, and a digest

# Something of each kind that tokenizers treat in ways of their own.
PROBE = "Aé ß 12345 don't\n\t{}  <x>#### 日本 🙂"


def made_of(trainer: "Trainer", module: "GRPOLightningModule") -> dict[str, Any]:
    """All but optimizer and scheduler, which are made later; the weights as they were loaded."""
    policy, tokenizer = module.policy, module.tokenizer
    data: Any = data_of(trainer)
    assert policy is not None, "configure_model() loads it"
    found: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "lightning")}
    found["base weights"] = policy.base_digest
    vocabulary = sorted(tokenizer.get_vocab().items())
    found["tokenizer"] = digest(vocabulary, tokenizer.eos_token_id, tokenizer(PROBE)["input_ids"])
    parts = {"trainer": trainer, "model": module, "data": data}
    options = {f"{part}.{name}": value for part, made in parts.items() for name, value in options_of(made).items()}
    options |= {"model.policy": module.policy_config, "model.engine": vars(module)["given_arguments"].get("engine")}
    if data is not None:
        options |= {f"data.{split}": spec if isinstance(spec, str) else "" for split, spec in data.specs.items()}
        splits = ["train", "validation"] if data.is_given("validation") else ["train"]
        found |= {f"rows of data.{split}": _rows_digest(data, split) for split in splits}
        how = [options[f"data.{name}"] for name in TEMPLATE_OPTIONS]
        found["chat template"] = digest(how[0] is not False and tokenizer.chat_template, how)
    for key in [key for key in options if key not in BY_THEMSELVES]:
        found |= flat(key, options[key])
    found["model.reward"] = ", ".join(reward.name for reward in module.rewards)
    for reward in module.rewards:
        found |= flat(f"model.reward.{reward.name}", reward, is_object=True)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        found |= flat(f"trainer.callbacks.{type(callback).__name__}", callback, is_object=True)
    # Where its output goes is no part of what a run is made of.
    return {key: value for key, value in found.items() if not key.endswith(("dirpath", "default_root_dir"))}


def made_by(groups: Sequence[Mapping[str, Any]], optimizer: Any = None, scheduler: Any = None) -> dict[str, Any]:
    """The same of the optimizer and the scheduler.

    Args:
        groups: Options of the optimizer's parameter groups, as it was made with them.
        optimizer: None where only its options are known.
        scheduler: A `Schedule` or a torch scheduler, as it was made; None without one.
    """
    named = {f"model.optimizer {name}": [group.get(name) for group in groups] for name in groups[0]}
    found = {key: flat(key, values[0] if len(groups) == 1 else values)[key] for key, values in named.items()}
    if optimizer is not None:
        found["model.optimizer"] = type(optimizer).__name__ + f" of {len(groups)} groups" * (len(groups) > 1)
        found |= flat("model.lr_scheduler", scheduler, is_object=True)
    return found


def options_of(value: Any) -> dict[str, Any]:
    """The options of an object: a dataclass's fields, else its constructors' parameters, as it keeps or got them."""
    if "__dataclass_fields__" in vars(type(value)):  # a class that inherits from one may have more
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    given = getattr(value, "given_arguments", {})
    constructors = [made for kind in type(value).__mro__ if inspect.isfunction(made := vars(kind).get("__init__"))]
    found: dict[str, Any] = {}
    for name, parameter in [item for made in constructors for item in inspect.signature(made).parameters.items()]:
        option = getattr(value, name, getattr(value, f"_{name}", given.get(name, parameter.default)))
        if option is not parameter.empty:
            found.setdefault(name, option)
    return found


def flat(key: str, value: Any, is_object: bool = False) -> dict[str, Any]:
    """An option; or an object, as its class and its options. Those within them that are no dataclass count as one."""
    if is_dataclass(value) or (is_object and value is not None):
        found = {key: type(value).__qualname__}
        for name, option in options_of(value).items():
            found |= flat(f"{key}.{name}", option)
        return found
    if value is None or type(value) in (bool, int, float):
        return {key: value}
    shown = redacted(value if type(value) is str else text(value), key)
    return {key: shown if len(shown) <= LONGEST_VALUE else f"{shown[:LONGEST_VALUE]}... ({digest(shown)})"}


def text(value: Any) -> str:
    """The same for equal values in every process; of an object that is no plain value, its class."""
    return json.dumps(value, default=_plain, skipkeys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, set | frozenset):
        return sorted(map(text, value))
    if "__dataclass_fields__" in vars(type(value)):
        return {"class": type(value).__qualname__, **options_of(value)}
    kind = type(value)
    return getattr(value, "__qualname__", repr(value) if kind.__module__ in PLAIN_TYPES else kind.__qualname__)


def digest(*values: Any) -> str:
    return sha256(text(values).encode()).hexdigest()[:16]


def _rows_digest(data: Any, split: str) -> str:
    """Of the scenarios that are served."""
    scenarios = data.served(split)[0]
    hashed = sha256(text([data.system_prompt, data.truncated[split] and data.max_prompt_tokens]).encode())
    hashed.update(scenarios.mixture.encode())
    for content in scenarios.contents():
        hashed.update(text(content).encode())
    return hashed.hexdigest()[:16]


# What differs ---------------------------------------------------------------------------------------------------------


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of each key that both have: another version may have more."""
    return {key: (value, then[key]) for key, value in now.items() if key in then and then[key] != value}


def told(changed: Mapping[str, tuple[Any, Any]], where: str) -> list[str]:
    """For messages: an option with its values, of contents only what they are."""
    values = {key: f"{key}={now}, and {then} {where}" for key, (now, then) in changed.items()}
    return [key if kind_of(key) in CONTENTS else shown for key, shown in values.items()]


def kind_of(key: str) -> str | None:
    """The name in `KINDS`; None of what may change."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, key)), None)


def accepted(names: str | Sequence[str] | set[str] | None) -> set[str]:
    """The names of `accept_changes`: a list, or text with commas.

    Raises:
        ConfigError: If one is unknown.
    """
    given = set(names.replace(" ", "").split(",") if isinstance(names, str) else names or ())
    if unknown := sorted(given - KINDS.keys()):
        raise ConfigError(f"accept_changes={unknown[0]} is unknown: its names are {', '.join(KINDS)}")
    return given


def check_same(now: Mapping[str, Any], then: Mapping[str, Any], accept: set[str]) -> set[str]:
    """A run goes on with what it is made of, unless told otherwise.

    Returns:
        The kinds of what has changed and is accepted.

    Raises:
        ConfigError: If anything else of `KINDS` has changed.
    """
    changed = differences(now, then)
    kinds = {kind for key in changed if (kind := kind_of(key))}
    if refused := kinds - accept:
        reasons = tuple(REASONS[kind] for kind in refused if kind in REASONS)
        shown = {key: pair for key, pair in changed.items() if kind_of(key) in refused or key.startswith(reasons)}
        differs = f"the checkpoint's run was made of something else ({'; '.join(told(shown, 'in the checkpoint'))})"
        flag = f"--accept_changes {','.join(sorted(kinds))} (in Python: module.accept_changes)"
        raise ConfigError(f"{differs}: resume with that, or go on with what is new by {flag}")
    return kinds


def check_ranks_agree(made: Mapping[str, Any], ranks: Ranks) -> None:
    """All ranks train the same run. They call it together, and end together.

    Raises:
        ConfigError: On every rank, if one differs from the first, with what differs.
    """
    first, *others = ranks.gather(made)
    for rank, other in enumerate(others, start=1):
        changed = {key: pair for key, pair in differences(other, first).items() if not PLACES.fullmatch(key)}
        if shown := "; ".join(told(changed, "on rank 0")):
            raise ConfigError(f"rank {rank} differs ({shown}): start all ranks with the same config, files, versions")
