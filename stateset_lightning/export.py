"""`stateset-lightning export`: a checkpoint -> a plain Hugging Face folder with a model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stateset_lightning.errors import ConfigError
from stateset_lightning.files import atomic_folder
from stateset_lightning.generate import Arguments, add_loading_options, loading_options

if TYPE_CHECKING:
    from stateset_lightning.policy import LoadingOptions
    from stateset_lightning.trained import TrainedModel

_log = logging.getLogger("stateset_lightning")

MERGE_ERROR = 0.05
"""Share of what an adapter adds, by norm, that rounding may change before it is announced."""

LIBRARIES = ("stateset-lightning", "lightning", "transformers", "torch")

CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [grpo, stateset-lightning]{base_line}
---

# {title}

`{base}`, trained by group-relative policy optimisation{steps}.

## Training

{training}
{metrics}
## Use

Answers are greedy by default, as in the evaluation above. In this folder:

```python
{load_code}
{prompt_code}
output = model.generate(**inputs, max_new_tokens={max_new_tokens})
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Made with {versions}.
"""

LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")"""

LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

tokenizer = AutoTokenizer.from_pretrained(".")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), ".")
model.generation_config = GenerationConfig.from_pretrained(".")"""


def main(words: Sequence[str]) -> None:
    """Runs the subcommand with the words that follow it.

    Raises:
        UserError: If the checkpoint cannot be read, or the folder not be written.
    """
    parser = Arguments(prog="stateset-lightning export", description="Write a plain Hugging Face folder.", allow_abbrev=False)
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint of a run, a model folder, or a Hugging Face id")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--config", help="the run's resolved config; by default the one in the run's folder")
    parser.add_argument("--merge", action="store_true", help="add the run's adapter into the model, for a whole one")
    parser.add_argument("--overwrite", action="store_true", help="take the place of a folder that is there")
    add_loading_options(parser)
    options = parser.parse_args(words)
    loading = loading_options(options)
    export(options.ckpt, options.out, config=options.config, overwrite=options.overwrite, merge=options.merge, loading=loading)
    print(f"exported: {options.out}")


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
        source: A checkpoint file, a model folder, or a Hugging Face id.
        out: The folder; there may be an empty one.
        config: The run's resolved config; by default the one in the run's folder.
        overwrite: Whether `out` may replace a folder with files in it.
        merge: Add the adapter into the model.
        loading: What only the user decides; a checkpoint's own are not used.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        ConfigError: If `out` is there already, the model cannot be loaded, or there is no adapter to merge.
    """
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        from stateset_lightning.policy import LoadingOptions
        from stateset_lightning.policy.adapters import is_adapted, write_adapter
        from stateset_lightning.trained import load_trained

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
    """What the model is, how it was trained and measured, and how to use it, in Markdown."""
    from stateset_lightning.policy.adapters import is_adapted

    base = trained.policy.public_name
    step = trained.checkpoint.get("stateset", {}).get("step")
    adapted = is_adapted(trained.model)
    encoder = trained.encoder()
    turns = [{"role": "system", "content": encoder.system_prompt}] if encoder.system_prompt else []
    if encoder.applies_template:
        messages = [*turns, {"role": "user", "content": "What is 2 + 2?"}]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True, **encoder.chat_template_kwargs}
        arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
        code = f"messages = {messages!r}\ninputs = tokenizer.apply_chat_template(messages, {arguments})"
    else:
        text = "\n\n".join([*(turn["content"] for turn in turns), "What is 2 + 2?"])
        code = f'inputs = tokenizer({text!r}, return_tensors="pt")'
    return CARD.format(
        base_line="" if trained.policy.is_local else f"\nbase_model: {base}",
        title=title,
        base=base,
        steps="" if step is None else f" for {step} optimizer steps",
        training=_training(trained.config) or "The run's config was not found.",
        metrics=_metrics(trained.checkpoint),
        prompt_code=code,
        library="peft" if adapted else "transformers",
        load_code=_load_adapter(base) if adapted else LOAD,
        max_new_tokens=trained.rollout.max_new_tokens,
        versions=", ".join(f"{library} {version(library)}" for library in LIBRARIES),
    )


def _load_adapter(base: str) -> str:
    if base == "tiny":
        return "from stateset_lightning.tiny import TINY_FOLDER\n" + LOAD_ADAPTER.format(base="TINY_FOLDER")
    return LOAD_ADAPTER.format(base=repr(base))


def _merge(trained: TrainedModel) -> None:
    from stateset_lightning.policy.adapters import is_adapted, merge_adapter

    if not is_adapted(trained.model):
        raise ConfigError(f"--merge: {trained.source} has no adapter")
    if (error := merge_adapter(trained.model)) > MERGE_ERROR:
        dtype = str(trained.model.dtype).removeprefix("torch.")
        _log.warning("--merge: rounding to %s changes what the adapter adds by %.0f%%; without --merge it stays exact", dtype, 100 * error)


def _set_generation(trained: TrainedModel) -> None:
    """Greedy, ended by all tokens that ended a completion in training: a base's own penalties and temperature were no part of that."""
    from transformers import GenerationConfig

    from stateset_lightning.policy.loading import end_of_sequence_ids

    tokenizer = trained.tokenizer
    ends = sorted(end_of_sequence_ids(trained.model, tokenizer))
    options = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    trained.model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=trained.rollout.max_new_tokens, **options)


def _training(config: Mapping[str, Any]) -> str:
    """Task, rewards, algorithm and sampling, as a list; empty without a config."""
    if not config:
        return ""
    model, data = config["model"], config.get("data") or {}
    rollout = model.get("rollout") or {}
    task = data.get("train")
    lines = [f"- task: `{Path(task).name}`"] if isinstance(task, str) else []
    if data.get("system_prompt"):
        lines.append(f"- system prompt: {data['system_prompt']!r}")
    given = model.get("reward") or []
    for reward in given if isinstance(given, list) else [given]:
        options = (reward.get("init_args") or {}) if isinstance(reward, dict) else {}
        weight = options.get("weight")
        share = "" if weight is None else f", weight {weight:g}" if weight else ", held out"
        lines.append(f"- reward: `{_class_name(reward)}`{share}")
    lines.append(f"- algorithm: `{_class_name(model.get('algorithm') or 'GRPO')}`")
    sampling = {key: rollout[key] for key in ("num_generations", "max_new_tokens", "temperature") if key in rollout}
    lines.append(f"- sampling: {', '.join(f'{key} {value}' for key, value in sampling.items())}")
    return "\n".join(lines) + "\n"


def _metrics(checkpoint: Mapping[str, Any]) -> str:
    """A table of the first and the last validation before the checkpoint; empty if there was none."""
    states = checkpoint.get("callbacks") or {}
    validations: list[Any] = next((state["validations"] for name, state in states.items() if name.startswith("RunSummary")), [])
    if not validations:
        return ""
    (first_step, first), (last_step, last) = validations[0], validations[-1]
    rows = [f"| {name} | {first[name]:.4g} | {value:.4g} |" for name, value in last.items() if name in first]
    return "\n".join(["## Validation", "", f"| metric | after step {first_step} | after step {last_step} |", "|---|---|---|", *rows, ""])


def _class_name(given: Any) -> str:
    path = given.get("class_path", "") if isinstance(given, dict) else str(given)
    return str(path).rpartition(".")[2]
