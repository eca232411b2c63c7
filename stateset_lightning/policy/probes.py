"""What vouches for a shortcut: small inputs, a small twin of the model that passes every threshold, float noise.

A shortcut (packed rows, a decoding step of our own) is compared with the model's own forward on two models: the real
one with few tokens, and a twin of the same class in which windows and other thresholds are so short that the probe
passes all of them.
"""

import copy
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from stateset_lightning.errors import ConfigError, SamplingError
from stateset_lightning.policy.precision import LOGPROB_TOLERANCE, cast_parameters, exact_products, product_dtype
from stateset_lightning.policy.text_model import context_length, use_one_rope_table

# Largest difference between two paths that counts as the same, in nats: far above float error, far below a wrong mask.
PROBE_TOLERANCE = 1e-3

# Keys of a configuration (whole, as regular expressions), and the value that a twin has for them at most: thresholds at
# which a model changes what it computes, shorter than the probes, and sizes that change nothing but the cost.
SCALED = {
    r"(\w+_)?(window|chunk)(_size|_len|_length)?|index_topk|indexer_budget|floor_scale|log_scaling_n_floor": 8,
    "original_max_position_embeddings": 16,
    "vocab_size(_per_layer_input)?|(moe_)?intermediate_size": 64,
}

_vouched: set[tuple[Any, ...]] = set()

# Times the measured noise: sampler and scorer have their own each, and other contexts have more of it.
NOISE_FACTOR = 4

NOISE_TOKENS = 64


def probe_tokens(count: int, start: int = 0) -> list[int]:
    """Token ids of no pattern that every model, and every twin, has."""
    return [3 + (17 * i * i + 5 * i) % 59 for i in range(start, start + count)]


def own_logprobs(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Log-probs [S, V] behind each token by the model's own forward, of one row, without cache or mask."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().log_softmax(-1)


@torch.no_grad()
def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether a token's log-probs depend on those that follow it, as an encoder's do."""
    ids = probe_tokens(6)
    whole, prefix = (own_logprobs(model, ids[:length])[:4] for length in (6, 4))
    return float((whole - prefix).abs().mean()) > LOGPROB_TOLERANCE[model.dtype]


@torch.no_grad()
def check_own_forward(model: PreTrainedModel, name: str) -> None:
    """The model's own forward, which every path is compared with, runs on tokens alone, and is a function of them.

    Args:
        model: In evaluation mode.
        name: Of the model, for the error.

    Raises:
        ConfigError: If it raises, or if two calls differ: on the real weights, or on a twin where one can be made.
    """
    kind, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    try:
        is_function = _repeats(model)
    except Exception as error:  # whatever it lacks: a library, an encoder's output, a kernel for a dtype
        why = f"{name}: {kind} does not run in {dtype} on text alone ({reason_of(error)})"
        raise ConfigError(f"{why}: use another, or trainer.precision=32-true and model.policy.dtype=float32") from error
    with suppress(Exception):  # a twin that cannot be made, or does not run, says nothing about the model
        is_function = is_function and _repeats(make_twin(model))
    if not is_function:
        why = "gives other log-probs at each call for the same tokens, as it draws random numbers also in evaluation"
        raise ConfigError(f"{name}: {kind} {why}: use another model")


def _repeats(model: PreTrainedModel) -> bool:
    ids = probe_tokens(min(NOISE_TOKENS, context_length(model) or NOISE_TOKENS))
    first, again = own_logprobs(model, ids), own_logprobs(model, ids)
    return not float((first - again).abs().mean()) > LOGPROB_TOLERANCE[model.dtype]


def reason_of(error: Exception) -> str:
    """A probe that raises vouches for nothing; what it says, for the announcement."""
    return f"a probe raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"


@exact_products()
@torch.no_grad()
def exact_on(model: PreTrainedModel, path: str, difference: Callable[[PreTrainedModel], float]) -> str | None:
    """Why a shortcut does not give the model's own log-probs; None if it does, on the real weights and on a twin.

    Args:
        model: The real one.
        path: The shortcut's name; a twin vouches once for all models of its class and configuration.
        difference: The largest difference of a log-prob, in nats, on a model.
    """
    attention = model.config.get_text_config()._attn_implementation
    key = type(model), model.config.to_json_string(), path, attention, model.device.type
    try:
        off, limit = difference(model), PROBE_TOLERANCE
        if off > limit and model.dtype.itemsize < 4:
            # The largest of all tokens is far above the noise, which is the mean over likely ones.
            limit = max(limit, 10 * NOISE_FACTOR * float_noise(model, model.dtype))
            if off > limit:  # rounding can have a router choose another expert, which is no fault of the path
                with cast_parameters(model, torch.float32):
                    off, limit = difference(model), PROBE_TOLERANCE
        if off <= limit and key not in _vouched:
            off, limit = difference(make_twin(model)), PROBE_TOLERANCE
    except Exception as error:  # whatever a model's code raises on a path that it was not written for
        return reason_of(error)
    if not off <= limit:
        return f"in a probe its log-probs were off by {off:.1e} nats"
    _vouched.add(key)
    return None


def make_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A small model of the same class in float32: one layer of each kind, short thresholds, random weights."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    for part in filter(None, [config, *(getattr(config, key, None) for key in config.sub_configs)]):
        _shrink(part)
    if config._attn_implementation not in ("eager", "stateset_prefix"):
        config._attn_implementation = "sdpa"  # other kernels may not take float32
    # On the CPU, as the generator is; Lightning's default device may be another one.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), no_init_weights():
        twin = type(model)(config)
    generator = torch.Generator().manual_seed(0)
    for name, p in twin.named_parameters():
        # Matrices of gain 1, so that attention is far from uniform; norms and biases near their usual values.
        scale, offset = (p.shape[-1] ** -0.5, 0.0) if p.dim() > 1 else (0.1, float(name.endswith("weight")))
        p.data.normal_(generator=generator).mul_(scale).add_(offset)
    use_one_rope_table(twin, 64)  # one table, as every run has, where rotary frequencies depend on the length
    return twin.to(model.device, torch.float32).eval().requires_grad_(False)


def _shrink(config: PretrainedConfig) -> None:
    num_layers = getattr(config, "num_hidden_layers", 1)
    lists = {key: x for key, x in vars(config).items() if "layer" in key and isinstance(x, list)}
    kinds_of_layers = {key: x for key, x in lists.items() if all(isinstance(y, str) or y in (0, 1) for y in x)}
    per_layer = {key: x for key, x in kinds_of_layers.items() if len(x) == num_layers}
    # Where kinds follow from other keys, the first layers are kept, as many as have all kinds.
    kinds = list(zip(*per_layer.values(), strict=True)) or getattr(config, "layer_types", None) or [()]
    if shared := getattr(config, "num_kv_shared_layers", None) or 0:  # the last ones, which have no cache of their own
        kinds = [(kind, i >= num_layers - shared) for i, kind in enumerate(kinds)]
    kept = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    if shared:
        config.num_kv_shared_layers = sum(i >= num_layers - shared for i in kept)
    for key, value in per_layer.items():
        setattr(config, key, [value[i] for i in kept])
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(kept) if per_layer else kept[-1] + 1
    if hasattr(config, "pad_token_id"):
        config.pad_token_id = 0  # the model's may lie beyond the twin's vocabulary
    for key, value in vars(config).items():
        if (scaled := _scaled(key, value)) != value:
            setattr(config, key, scaled)


def _scaled(key: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _scaled(inner, item) for inner, item in value.items()}
    limits = [most for pattern, most in SCALED.items() if re.fullmatch(pattern, str(key))]
    return min([value, *limits]) if isinstance(value, int) and value else value


# Float noise ----------------------------------------------------------------------------------------------------------


def check_sampler(difference: float, limit: float, dtype: torch.dtype) -> None:
    """Sampler and trainer are the same policy: log-probs differ by float error alone.

    Args:
        difference: Mean absolute difference in nats per token.
        limit: See `sampler_limit`.
        dtype: That the sampler computes in.

    Raises:
        SamplingError: If they differ by more, or are not finite.
    """
    if not difference <= limit:
        what = f"the log-probs of sampling and of training differ by {difference:.2g} nats per token"
        why = f"where float error ({dtype}) is below {limit:.2g}: gradients would be wrong"
        remedy = "Set model.policy.scoring to padded; where it does not help, decoding with a cache is what differs"
        raise SamplingError(f"{what}, {why}. {remedy}")


def sampler_limit(model: PreTrainedModel, dtype: torch.dtype, temperature: float, ids: Sequence[int]) -> float:
    """The most that sampling and scoring may differ by, in nats per token.

    Args:
        model: The policy's; what float error amounts to is measured on it where `dtype` is shorter than float32.
        dtype: That the sampler computes in.
        temperature: Divides the logits, and so multiplies their error.
        ids: A text as they are sampled, prompt and completion: errors are large where the model is not sure.
    """
    limit, dtype = LOGPROB_TOLERANCE[torch.float32] / min(temperature, 1.0), product_dtype(dtype)
    return limit if dtype.itemsize >= 4 else max(limit, NOISE_FACTOR * float_noise(model, dtype, ids, temperature))


@torch.no_grad()
def float_noise(model: PreTrainedModel, dtype: torch.dtype, ids: Sequence[int] = (), temperature: float = 1.0) -> float:
    """Nats by which a sampled token's log-prob in `dtype` differs from that in float32, on average over a text.

    Of the text the last `NOISE_TOKENS` count; without a text, as many of no meaning. Where weights are sharded or
    cannot be cast, the noise is taken from `LOGPROB_TOLERANCE`.
    """
    fallback = LOGPROB_TOLERANCE[dtype] / NOISE_FACTOR / min(temperature, 1.0)
    if not all(type(p) is nn.Parameter for p in model.parameters()):
        return fallback

    text, logprobs = list(ids or probe_tokens(NOISE_TOKENS))[-NOISE_TOKENS:], []
    try:
        for to in (torch.float32, dtype):
            with exact_products(), torch.autocast(model.device.type, enabled=False), cast_parameters(model, to):
                logprobs.append((own_logprobs(model, text) / temperature).log_softmax(-1))
    except RuntimeError:  # there is no memory for a float32 copy, or a part of the model fixes its dtype
        return fallback
    exact, rounded = logprobs
    noise = float((exact.exp() * (rounded - exact).abs()).sum(-1).mean())
    return noise if math.isfinite(noise) else fallback
