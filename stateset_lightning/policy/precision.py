"""What `trainer.precision` means for the weights and for sampling."""

from __future__ import annotations

import torch

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.config import Dtype

_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "32-true": torch.float32, "64-true": torch.float64}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def weights_dtype(dtype: Dtype | None, precision: str) -> torch.dtype:
    """Dtype of the weights: the policy's own, or the Trainer's.

    Raises:
        ConfigError: If both are set and differ, or the Trainer's precision is none that this package knows.
    """
    if precision not in {**_TRUE, **_MIXED}:
        raise ConfigError(f"trainer.precision={precision!r} is not supported: use one of {', '.join(sorted({**_TRUE, **_MIXED}))}")
    wanted = _TRUE.get(precision, torch.float32)  # mixed precision keeps float32 weights
    if dtype is None:
        return wanted
    own: torch.dtype = getattr(torch, dtype)
    # The default precision, 32-true, leaves the weights as they are; the others convert them.
    if own != wanted and precision != "32-true":
        raise ConfigError(
            f"model.policy.dtype={dtype!r} contradicts trainer.precision={precision!r} (which needs {str(wanted).removeprefix('torch.')} "
            "weights): set one of them"
        )
    return own


def sampling_dtype(precision: str) -> torch.dtype | None:
    """What weights are cast to while sampling; None leaves them as they are."""
    return _MIXED.get(precision)
