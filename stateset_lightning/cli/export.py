"""`stateset-lightning export`: a checkpoint -> a plain Hugging Face folder with a model card, here and on the hub."""

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from stateset_lightning.cli.arguments import Arguments, loading_options
from stateset_lightning.cli.messages import class_name
from stateset_lightning.cli.push import made_repository, upload
from stateset_lightning.errors import ConfigError, log
from stateset_lightning.files import atomic_folder, keep_inputs

if TYPE_CHECKING:
    from stateset_lightning.cli.trained import TrainedModel

MERGE_ERROR = 0.05  # share of what an adapter adds, by norm, that rounding may change before it is announced


def main(words: Sequence[str]) -> None:
    """Writes model (safetensors), tokenizer, generation config and model card to a folder, which is whole or absent.

    Of a model with an adapter, the adapter alone is written, as peft loads it, unless it is merged. A repository of the
    hub is made before anything is loaded, with the token that the user is logged in by.

    Args:
        words: Those that follow the subcommand.

    Raises:
        CheckpointError: If the checkpoint is damaged.
        ConfigError: If the folder has files in it, the model cannot be loaded, there is no adapter to merge, or the hub
            cannot be reached or refuses.
        DiskError: If the folder cannot be written.
    """
    parser = Arguments("export", "Write a plain Hugging Face folder.")
    parser.add_argument("ckpt", metavar="CKPT", help="as --ckpt_path of generate")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--merge", action="store_true", help="add the run's adapter into the model, for a whole one")
    parser.add_argument("--overwrite", action="store_true", help="take the place of a folder that is there")
    parser.add_argument("--push", metavar="REPO", help="upload it, too: owner/name on the hub; a new one is private")
    parser.add_loading_options()
    given = parser.parse_args(words)
    keep_inputs(given.ckpt, given.config, Path.cwd())  # which nobody means to have replaced
    with atomic_folder(Path(given.out), overwrite=given.overwrite) as folder:
        repository = None if given.push is None else made_repository(given.push)
        from stateset_lightning.cli.trained import load_trained
        from stateset_lightning.policy.loading import resolve_model_name
        from stateset_lightning.policy.lora import adapter_weights, write_adapter
        from stateset_lightning.policy.text_model import copy_processor, is_composite

        trained = load_trained(given.ckpt, given.config, loading_options(given))
        trained.model.generation_config = trained.generation_config()
        if given.merge:
            _merge(trained)
        if trained.is_adapted:
            write_adapter(trained.model, trained.policy.public_name, folder, adapter_weights(trained.model))
            trained.model.generation_config.save_pretrained(folder)
        else:
            trained.model.save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
        if is_composite(trained.model.config) and not trained.is_adapted:
            copy_processor(resolve_model_name(trained.policy.model_name), folder, revision=trained.policy.revision)
        (folder / "README.md").write_text(model_card(trained, Path(given.out).name), encoding="utf-8")
    print(f"exported: {given.out}" + ("" if repository is None else f", {upload(given.out, repository)}"))


def model_card(trained: "TrainedModel", title: str) -> str:
    """What the model is, how it was trained and measured, and how to use it, in Markdown (see model_card.md)."""
    from jinja2 import Environment

    # Foreign files say much of this: no value ends its line.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_one_line)
    environment.filters |= {"repr": _literal, "class_name": class_name}
    template = environment.from_string(files(__package__).joinpath("model_card.md").read_text(encoding="utf-8"))
    libraries = (f"{name} {version(name)}" for name in ("stateset-lightning", "lightning", "transformers", "torch"))
    return template.render(title=title, trained=trained, encoder=trained.encoder(), versions=", ".join(libraries))


def _one_line(value: object) -> str:
    return "".join(character if character.isprintable() else " " for character in str(value))


def _literal(value: object) -> str:
    """A value as code has it; no backticks in it end the block of code."""
    return repr(value).replace("```", r"\x60\x60\x60")


def _merge(trained: "TrainedModel") -> None:
    from stateset_lightning.policy.lora import merge_adapter

    if not trained.is_adapted:
        raise ConfigError(f"--merge: {trained.source} has no adapter")
    if (error := merge_adapter(trained.model)) > MERGE_ERROR:
        dtype = str(trained.model.dtype).removeprefix("torch.")
        log.warning("--merge: rounding to %s changes the update by %.0f%%, exact without --merge", dtype, 100 * error)
