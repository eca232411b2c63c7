"""Errors that a user can mend: each names the key or file, shows the value and says what to do.

The command line prints them in a line or two, without a traceback. Our own mistakes are `assert`s and keep theirs.
"""


class UserError(ValueError):
    """Something the user gave cannot be honoured. Base of every error of this package."""


class ConfigError(UserError):
    """An option, or a combination of options, cannot be honoured."""


class DataError(UserError):
    """A scenario file or row cannot be used."""


class NonFiniteError(UserError):
    """Logits or gradients are NaN or infinite: the policy has diverged, or overflows its precision."""


class SamplingError(UserError):
    """The sampler and the trainer do not compute the same policy."""


class ServerError(UserError):
    """A sampling server refuses what it is asked, with this HTTP status, or stays away."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class RewardError(UserError):
    """Rewards failed more often than `max_reward_failures` allows, or returned what is no score."""


class DiskError(UserError):
    """A file cannot be written: the disk is full, or the folder read-only."""


class CheckpointError(ConfigError):
    """A checkpoint is damaged, or is none of this package."""
