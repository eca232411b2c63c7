"""A folder -> a repository of models on the Hugging Face hub, with the token that the user is logged in by."""

from pathlib import Path

from stateset_lightning.errors import ConfigError, told_as

# What an earlier model may have left in a repository: it would be loaded beside the new one, or in its place.
_OF_A_MODEL = ["*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", "chat_template*"]
_LOG_IN = "log in by `hf auth login`, or set HF_TOKEN, with a token that may write"


def made_repository(name: str) -> str:
    """The repository `owner/name`; where there is none, a private one is made.

    Raises:
        ConfigError: If the user is not logged in, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ConfigError(f"--push {name}: no token of the Hugging Face hub is found: {_LOG_IN}")
    # Errors are of huggingface_hub, of the library that it speaks HTTP with, or of Xet.
    with told_as(ConfigError, f"--push {name}: ", after=f"; check the name and the connection, and {_LOG_IN}"):
        return str(HfApi().create_repo(name, private=True, exist_ok=True).repo_id)


def upload(folder: str | Path, repository: str) -> str:
    """Uploads a folder, in place of the model that the repository holds; its other files stay.

    Returns:
        The repository's address.

    Raises:
        ConfigError: If the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    say = f"; {folder} is complete: `hf upload {repository} {folder}` tries again"
    with told_as(ConfigError, f"--push {repository}: ", after=say):
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder, delete_patterns=_OF_A_MODEL).repo_url)
