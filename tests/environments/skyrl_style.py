"""Environments with SkyRL-Gym's interface: made for each conversation, `init(prompt)`, `step(action)`."""

from typing import Any, TypedDict


class StepOutput(TypedDict):
    observations: list[dict[str, str]]
    reward: float
    done: bool
    metadata: dict[str, Any]


class SumEnv:
    """Asks again until the sum is right, or the turns are used up."""

    made = 0

    def __init__(self, env_config: dict[str, Any], extras: dict[str, Any] = {}):  # noqa: B006  # as SkyRL writes it
        assert "ground_truth" in extras["reward_spec"]
        self.truth = extras["reward_spec"]["ground_truth"]
        self.max_turns = extras.get("max_turns", 1)
        self.turns = 0
        type(self).made += 1

    def init(self, prompt):
        self.chat = list(prompt)
        return prompt, {}

    def step(self, action: str) -> StepOutput:
        self.turns += 1
        self.chat.append({"role": "assistant", "content": action})
        right = action == self.truth
        done = right or self.turns >= self.max_turns
        observations = [] if done else [{"role": "user", "content": f"not {action}, try again"}]
        return StepOutput(observations=observations, reward=float(right), done=done, metadata={"turns": self.turns})

    def close(self):
        self.chat = []


class Output:
    def __init__(self, observations, reward, done):
        self.observations, self.reward, self.done = observations, reward, done


class PromptingEnv:
    """Writes its own prompt, and answers with an object."""

    def init(self, prompt):
        first = {"role": "assistant", "content": "Yes?"}
        return [{"role": "user", "content": "Hello"}, first, {"role": "user", "content": "1 + 1?"}], {}

    def step(self, action):
        return Output([], 0.5, True)
