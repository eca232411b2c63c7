"""The run's data module, as training asks it, and whether its prompts are single turns or begin conversations."""

from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from stateset_lightning.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from stateset_lightning.datamodule import ScenarioDataModule
    from stateset_lightning.environments import EnvironmentConfig


def data_of(trainer: "Trainer") -> "ScenarioDataModule | None":
    """None where the Trainer got plain loaders of `PromptBatch`."""
    data = getattr(trainer, "datamodule", None)
    return data if hasattr(data, "replacements") else None


def are_scripts(trainer: "Trainer | None") -> bool:
    """Whether the run has conversations in which the user's texts of a scenario are said one after another."""
    environment = getattr(getattr(trainer, "lightning_module", None), "environment", None)
    return environment is not None and bool(environment.are_scripts)


def check_scripts(data: "ScenarioDataModule | None", environment: "EnvironmentConfig | None") -> None:
    """Where the scenarios' own texts answer the model, some have any.

    Raises:
        ConfigError: If none has; of a large split, none of the first.
    """
    if data is None or environment is None or not environment.are_scripts:
        return
    columns = [scenario.columns() for scenario in data.served("train")[0].known]
    if not any(row.get("replies") or len(row.get("user_responses") or ()) > 1 for row in columns):
        said = f"model.environment.max_turns={environment.max_turns} has the scenarios' own texts answer the model"
        raise ConfigError(f"{said}: give rows user_responses of several texts, or replies beside the prompt")


def tell_of_turns(environment: "EnvironmentConfig | None") -> None:
    """Announces whether prompts are answered once or begin conversations, and why."""
    max_turns = 1 if environment is None else environment.max_turns
    why = "no model.environment answers" if environment is None else f"model.environment.max_turns={max_turns}"
    rank_zero_info(f"{'conversations' if max_turns > 1 else 'single turns'}: {why}")
