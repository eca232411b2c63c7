"""What a precision means for the weights, for sampling, and for how far two computations of a log-prob may differ."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
from torch import nn

from stateset_lightning.errors import ConfigError
from stateset_lightning.policy.config import Dtype

# Mean absolute difference in nats of a sampled token's log-prob between sampler and trainer, by the coarser of their
# dtypes. Several times what float error amounts to at temperature 1: with models of 1M parameters and random ones of
# four architectures it is below 1e-6 in float32 and up to 0.019 in bfloat16 (weights cast for sampling, autocast in
# training). A wrong mask, position, adapter or model costs tenths of a nat or more.
LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}

_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "32-true": torch.float32, "64-true": torch.float64}
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


# What products of float32 round their factors to, by `torch.set_float32_matmul_precision`: TF32 has float16's digits.
_FACTORS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


def weights_dtype(dtype: Dtype | None, precision: str, is_adapted: bool = False) -> torch.dtype:
    """Dtype of the weights: the policy's own, or the Trainer's.

    Args:
        dtype: `model.policy.dtype`.
        precision: `trainer.precision`, as Lightning names it.
        is_adapted: Whether an adapter alone is trained, which is float32 whatever the model is: mixed precision then
            takes a model of the dtype that it computes in.

    Raises:
        ConfigError: If both are set and differ, or this package does not know the Trainer's precision.
    """
    if precision not in (known := {**_TRUE, **_MIXED}):
        raise ConfigError(f"trainer.precision={precision!r} is not supported: use one of {', '.join(sorted(known))}")
    wanted = _TRUE.get(precision, torch.float32)  # mixed precision keeps float32 weights
    if dtype is None:
        return wanted
    own: torch.dtype = getattr(torch, dtype)
    # The default precision, 32-true, leaves the weights as they are; the others convert them.
    if own != wanted and precision != "32-true" and not (is_adapted and own == _MIXED.get(precision)):
        given = f"model.policy.dtype={dtype!r} contradicts trainer.precision={precision!r}"
        raise ConfigError(f"{given} (which needs {str(wanted).removeprefix('torch.')} weights): set one of them")
    return own


def sampling_dtype(precision: str) -> torch.dtype | None:
    """What weights are cast to while sampling; None leaves them as they are."""
    return _MIXED.get(precision)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products of this dtype are as exact as."""
    return _FACTORS[torch.get_float32_matmul_precision()] if dtype == torch.float32 else dtype


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 with all digits, while the context lasts."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by oneDNN; elsewhere torch does it one number after the other."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def replaced_parameters(
    modules: Iterable[nn.Module], replacement: Callable[[nn.Parameter], nn.Parameter]
) -> Iterator[None]:
    """Other parameters in place of the modules' own (not of their children's), while the context lasts.

    Not other data in the same parameters: a change of dtype, even undone, detaches the hooks by which DDP reduces
    gradients.
    """
    places = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
    try:
        for module, name, weight in places:
            module._parameters[name] = replacement(weight)
        yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Weights of this dtype in place of the model's own, while the context lasts; quantized ones stay."""

    @cache  # tied weights stay tied
    def cast(weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(weight.detach().to(dtype), requires_grad=False) if weight.is_floating_point() else weight

    return replaced_parameters(model.modules(), cast)
