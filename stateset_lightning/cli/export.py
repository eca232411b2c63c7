"""`stateset-lightning export`: a checkpoint -> a plain Hugging Face folder with a model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateset_lightning.cli.arguments import Arguments, loading_options
from stateset_lightning.cli.messages import class_name
from stateset_lightning.errors import ConfigError
from stateset_lightning.files import atomic_folder, keep_inputs

if TYPE_CHECKING:
    from stateset_lightning.cli.trained import TrainedModel
    from stateset_lightning.data import PromptEncoder
    from stateset_lightning.policy import LoadingOptions

_log = logging.getLogger("stateset_lightning")

MERGE_ERROR = 0.05
"""Share of what an adapter adds, by norm, that rounding may change before it is announced."""

LIBRARIES = ("stateset-lightning", "lightning", "transformers", "torch")


def main(words: Sequence[str]) -> None:
    """Runs the subcommand with the words that follow it.

    Raises:
        UserError: If the checkpoint cannot be read, or the folder not be written.
    """
    parser = Arguments("export", "Write a plain Hugging Face folder.")
    parser.add_argument("ckpt", metavar="CKPT", help="as --ckpt_path of generate")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--config", help="the run's resolved config; by default the one in the run's folder")
    parser.add_argument("--merge", action="store_true", help="add the run's adapter into the model, for a whole one")
    parser.add_argument("--overwrite", action="store_true", help="take the place of a folder that is there")
    parser.add_loading_options()
    given = parser.parse_args(words)
    loading = loading_options(given)
    export(given.ckpt, given.out, config=given.config, overwrite=given.overwrite, merge=given.merge, loading=loading)
    print(f"exported: {given.out}")


def export(
    source: str,
    out: str | Path,
    *,
    config: str | None = None,
    overwrite: bool = False,
    merge: bool = False,
    loading: LoadingOptions | None = None,
) -> None:
    """Writes model (safetensors), tokenizer, generation config and model card to `out`, which is whole or absent.

    Of a model with an adapter, the adapter alone is written, as peft loads it, unless it is merged.

    Args:
        source: A checkpoint file, `last` or `best`, a run's folder, a model folder, or a Hugging Face id.
        out: The folder; there may be an empty one.
        config: The run's resolved config; by default the one in the run's folder.
        overwrite: Whether `out` may replace a folder with files in it.
        merge: Add the adapter into the model.
        loading: What only the user decides; a checkpoint's own are not used.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        ConfigError: If `out` is there already, the model cannot be loaded, or there is no adapter to merge.
    """
    keep_inputs(source, config)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        from stateset_lightning.cli.trained import load_trained
        from stateset_lightning.policy import LoadingOptions
        from stateset_lightning.policy.lora import is_adapted, write_adapter

        trained = load_trained(source, config, loading or LoadingOptions())
        _set_generation(trained)
        if merge:
            _merge(trained)
        if is_adapted(trained.model):
            write_adapter(trained.model, trained.policy.public_name, folder)
            trained.model.generation_config.save_pretrained(folder)
        else:
            trained.model.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(trained, Path(out).name), encoding="utf-8")


def model_card(trained: TrainedModel, title: str) -> str:
    """What the model is, how it was trained and measured, and how to use it, in Markdown (see model_card.md)."""
    from jinja2 import Environment

    from stateset_lightning.policy.lora import is_adapted

    # Foreign files say much of this: no value ends its line.
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=lambda value: _one_line(str(value))
    )
    environment.filters["repr"] = repr
    template = environment.from_string(files(__package__).joinpath("model_card.md").read_text(encoding="utf-8"))
    callbacks = trained.checkpoint.get("callbacks") or {}
    return template.render(
        title=title,
        base=trained.policy.public_name,
        is_local=trained.policy.is_local,
        library="peft" if is_adapted(trained.model) else "transformers",
        step=trained.checkpoint.get("stateset", {}).get("step"),
        validations=next(
            (state["validations"] for name, state in callbacks.items() if name.startswith("RunSummary")), []
        ),
        max_new_tokens=trained.rollout.max_new_tokens,
        versions=", ".join(f"{library} {version(library)}" for library in LIBRARIES),
        **_training(trained.config),
        **_prompt(trained.encoder()),
    )


def _training(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of task, rewards, algorithm and sampling; empty without a config."""
    if not config:
        return {}
    model, data = config["model"], config.get("data") or {}
    rollout, task, rewards = model.get("rollout") or {}, data.get("train"), model.get("reward") or []
    sampling = {key: rollout[key] for key in ("num_generations", "max_new_tokens", "temperature") if key in rollout}
    return {
        "task": Path(task).name if isinstance(task, str) else None,
        "system_prompt": data.get("system_prompt"),
        "rewards": [
            (class_name(reward), (reward.get("init_args") or {}).get("weight") if isinstance(reward, dict) else None)
            for reward in (rewards if isinstance(rewards, list) else [rewards])
        ],
        "algorithm": class_name(model.get("algorithm") or "GRPO"),
        "sampling": ", ".join(f"{key} {value}" for key, value in sampling.items()),
    }


def _prompt(encoder: PromptEncoder) -> dict[str, Any]:
    """What the card's code needs to ask as in training."""
    turns = [{"role": "system", "content": encoder.system_prompt}] if encoder.system_prompt else []
    turns.append({"role": "user", "content": "What is 2 + 2?"})
    if not encoder.applies_template:
        return {"text": "\n\n".join(turn["content"] for turn in turns)}
    options = 'add_generation_prompt=True, return_tensors="pt", return_dict=True'
    if encoder.chat_template_kwargs:
        options += f", **{encoder.chat_template_kwargs!r}"
    return {"messages": turns, "options": options}


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _merge(trained: TrainedModel) -> None:
    from stateset_lightning.policy.lora import is_adapted, merge_adapter

    if not is_adapted(trained.model):
        raise ConfigError(f"--merge: {trained.source} has no adapter")
    if (error := merge_adapter(trained.model)) > MERGE_ERROR:
        dtype = str(trained.model.dtype).removeprefix("torch.")
        _log.warning(
            "--merge: rounding to %s changes what the adapter adds by %.0f%%; without --merge it stays exact",
            dtype,
            100 * error,
        )


def _set_generation(trained: TrainedModel) -> None:
    """Greedy, and ended by all tokens that ended a completion in training.

    The base's own penalties and temperature go: they were no part of training.
    """
    from transformers import GenerationConfig

    from stateset_lightning.policy import end_of_sequence_ids

    tokenizer = trained.tokenizer
    ends = sorted(end_of_sequence_ids(trained.model, tokenizer))
    options = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    trained.model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=trained.rollout.max_new_tokens, **options
    )
