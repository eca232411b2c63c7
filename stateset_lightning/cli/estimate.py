"""How much memory and work a run takes, before it runs: what can be counted is counted, the rest follows from a forward
of one group.

Memory is that of one device without sharding, in bytes. Letters: P prompts and N = P * G completions of an episode on
this device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stateset_lightning.policy import Policy
from stateset_lightning.policy.head import CHUNK_BYTES
from stateset_lightning.rollout.cache import make_cache
from stateset_lightning.rollout.cpu_decoding import has_llama_layers, is_supported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_COPIES = 5
"""float32 copies of [rows, V] that sampling one token holds: logits, log-probs, probabilities, and their sum in
float64.
"""

PREFILL_COPIES = 4
"""Copies of the widest layer's output that the prompts' forward holds."""

_PROBE = 8  # tokens


@dataclass(frozen=True)
class Episode:
    """The size of an episode on one device; lengths are means over its prompts and completions."""

    prompts: int
    num_generations: int
    prompt_tokens: float
    completion_tokens: float
    micro_steps: int
    """Of a pass (`steps_per_episode`)."""
    max_tokens_per_step: int | None = None

    @property
    def completions(self) -> int:
        return self.prompts * self.num_generations

    def micro_step_tokens(self, packed: bool) -> int:
        """Tokens that a micro-step forwards: a prompt once per group where scoring is packed, once per completion where
        it is not.
        """
        rows = math.ceil(self.completions / self.micro_steps)
        prompts = math.ceil(self.prompts / self.micro_steps) if packed else rows
        tokens = math.ceil(prompts * self.prompt_tokens + rows * self.completion_tokens)
        return min(tokens, self.max_tokens_per_step or tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    cache: int
    """Keys and values while sampling."""
    sampling: int
    """Its workspace: logits, the prompts' forward, weights that are cast or laid out anew for it."""
    activations: int
    head: int
    """Chunks of logits with their gradients, and the float32 gradient of the output embedding."""
    process: int = 0
    """What a process on a CPU has before it has a model."""

    @property
    def phases(self) -> dict[str, int]:
        """The peak of each phase. A backward pass frees activations while it makes gradients; both are counted in
        full.
        """
        lasting = self.weights + self.optimizer + self.reference + self.process
        return {
            "sampling": lasting + self.cache + self.sampling,
            "training": lasting + self.gradients + self.activations + self.head,
            "update": lasting + 2 * self.gradients,  # most optimizers work on a copy
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def memory_of(
    policy: Policy,
    episode: Episode,
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    has_reference: bool,
    saved_per_token: float,
    rows: int,
    capacity: int,
    sampling_dtype: torch.dtype,
    process: int = 0,
) -> Memory:
    """What a run of such episodes takes.

    Args:
        policy: As it will be trained.
        episode: Its size.
        optimizer: Makes the optimizer.
        has_reference: Whether a second model is loaded.
        saved_per_token: Bytes that a forward keeps for its backward pass; see `saved_bytes`.
        rows: Completions decoded at a time; 0 if they are sampled elsewhere.
        capacity: Tokens of a row of the cache: the longest prompt and `max_new_tokens`.
        sampling_dtype: That sampling computes in.
        process: What there is before the model.
    """
    trained = tensor_bytes(p for p in policy.parameters() if p.requires_grad)
    weights = tensor_bytes(policy.parameters()) + tensor_bytes(policy.buffers())
    config = policy.model.config.get_text_config()
    embedding = policy.model.get_output_embeddings()
    vocabulary = config.vocab_size if embedding is None else embedding.weight.shape[0]
    tokens = episode.micro_step_tokens(policy.uses_packed_scoring)
    activations = saved_per_token * tokens
    layers = config.num_hidden_layers
    if policy.config.gradient_checkpointing:  # what each layer gets, and one layer in full
        activations = activations / layers + tokens * layers * config.hidden_size * policy.model.dtype.itemsize
    # A prompt's cache becomes its group's layer by layer, so both exist in part.
    copies = 1 + 1 / episode.num_generations + 1 / layers
    chunk = min(
        CHUNK_BYTES, 4 * vocabulary * math.ceil(episode.completions / episode.micro_steps * episode.completion_tokens)
    )
    head_is_trained = embedding is not None and embedding.weight.requires_grad
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=int(optimizer_ratio(optimizer) * trained),
        reference=weights if has_reference else 0,
        cache=int(cache_elements(policy.model) * sampling_dtype.itemsize * rows * capacity * copies),
        sampling=_sampling_bytes(
            policy.model, rows, rows / episode.num_generations * episode.prompt_tokens, sampling_dtype, vocabulary
        ),
        activations=int(activations),
        head=(
            3 * chunk + (4 * vocabulary * config.hidden_size if head_is_trained else 0)
            if policy.uses_chunked_head
            else 0
        ),
        process=process,
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_ratio(make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Bytes of optimizer state per byte of a trained weight, found by a step on a matrix that is thrown away."""
    matrix = nn.Parameter(torch.zeros(64, 64))
    matrix.grad = torch.zeros_like(matrix)
    optimizer = make([matrix])
    optimizer.step()
    return (
        tensor_bytes(value for value in optimizer.state[matrix].values() if isinstance(value, Tensor) and value.dim())
        / matrix.nbytes
    )


@torch.no_grad()
def cache_elements(model: PreTrainedModel) -> float:
    """Numbers that the cache holds per token, all layers together."""
    cache = make_cache(model, _PROBE)
    model(input_ids=torch.full((1, _PROBE), 3, device=model.device), past_key_values=cache, use_cache=True)
    return sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) / _PROBE


def saved_bytes(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside the weights."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in weights}
    held = []  # so that no address comes twice
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            held.append(tensor.detach())
            total += storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return total


def _sampling_bytes(model: nn.Module, rows: int, prefilled: float, dtype: torch.dtype, vocabulary: int) -> int:
    """Workspace of sampling `rows` completions at a time, whose prompts have `prefilled` tokens together."""
    if rows == 0:
        return 0
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    widest = max((layer.out_features for layer in linears if layer.out_features != vocabulary), default=0)
    # the lean decoder copies few
    laid_out = [layer.weight for layer in linears if is_supported(layer)] if not has_llama_layers(model) else []
    copied = laid_out or [weight for weight in model.parameters() if weight.dtype != dtype]
    copies = dtype.itemsize * sum(weight.numel() for weight in copied)
    return int(LOGITS_COPIES * 4 * rows * vocabulary + PREFILL_COPIES * dtype.itemsize * prefilled * widest + copies)
