"""An environment with Gymnasium's interface and text spaces."""

import numpy as np


class CountdownEnv:
    """Counts down from a number drawn with the seed: each step must say the number that it is at."""

    metadata = {"render_modes": []}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.left = int(np.random.default_rng(seed).integers(2, 5))
        self.options = options
        self.closed = False
        return f"count down from {self.left}", {}

    def step(self, action: str):
        right = action.strip() == str(self.left)
        self.left -= 1
        observation = "go on" if right else np.array([self.left])
        return observation, np.float64(right), np.bool_(self.left == 0), not right, {"right": right}

    def has_wrapper_attr(self, name: str) -> bool:
        """Checks if the attribute `name` exists in the environment."""
        return hasattr(self, name)

    def close(self):
        self.closed = True
