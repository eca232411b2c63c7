"""Placeholder until merged."""

from typing import Any

from stateset_lightning.environments.base import as_reply, as_reward, as_turns
from stateset_lightning.environments.conversation import Opening


class _Own:
    def __init__(self, environment: Any) -> None:
        self.environment = environment

    def reset(self, columns: Any, seed: int) -> Opening:
        return Opening(as_turns(self.environment.reset(columns, seed)))

    def step(self, text: str) -> Any:
        return as_reply(self.environment.step(text))

    def get_reward(self) -> float | None:
        return as_reward(self.environment.get_reward()) if hasattr(self.environment, "get_reward") else None

    def schemas(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        pass


def as_environment(environment: Any) -> Any:
    return _Own(environment)
