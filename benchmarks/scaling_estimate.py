"""What several devices need and where they stop helping, by formula: the tables of docs/scaling.md.

`tests/test_docs.py` compares them.

    python benchmarks/scaling_estimate.py

Bytes that a layer keeps for its backward pass are measured on a small layer of the same proportions; all else is
counted. Device figures are those of the data sheets. Letters: N parameters, W devices, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROWS, CAPACITY = 64, 1024  # completions decoded at a time; tokens of prompt and completion
STEP_TOKENS = 8192  # of a micro-step
SCORED_TOKENS = 65_536  # of a forward without gradient (`policy.TOKENS_WITHOUT_GRADIENT`)
# bytes per parameter of the whole policy: float32 and its cast copy, or bfloat16
SAMPLING = {"bf16-mixed": 6, "bf16-true": 2}
TRAINING = {"bf16-mixed": 16, "bf16-true": 8}  # weights, gradients, AdamW's two moments
PEAK, SHARE = 989e12, 0.4  # H100, bfloat16, dense; the share of it that training reaches
LINKS = {"NVLink (450 GB/s)": 450e9, "InfiniBand (50 GB/s)": 50e9}  # per device and direction


@dataclass(frozen=True)
class Model:
    """A Llama-like model; tied: one matrix for embeddings and head."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_dim: int = 128
    tied: bool = False

    @property
    def block(self) -> int:
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def ends(self) -> int:
        """Embeddings, head and the last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.block + self.ends

    @property
    def cache(self) -> int:
        """Bytes of keys and values of all rows, bfloat16; during the prompts' expansion a little more."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim * ROWS * CAPACITY

    @property
    def activations(self) -> int:
        """Bytes of a micro-step with gradient checkpointing: what each layer gets, one layer in full, two chunks of
        logits.
        """
        return STEP_TOKENS * (2 * self.layers * self.hidden + layer_bytes(self)) + 2 * 64 * 2**20


MODELS = [
    Model("1.5B", 28, 1536, 8960, 12, 2, 151936, tied=True),
    Model("8B", 32, 4096, 14336, 32, 8, 128256),
    Model("32B", 64, 5120, 27648, 40, 8, 152064),
    Model("70B", 80, 8192, 28672, 64, 8, 128256),
]


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
        forward()
    return total


@cache
def layer_bytes(model: Model) -> int:
    """Bytes per token that a layer keeps in bfloat16, measured with every size divided by the same number: they are
    linear in it.
    """
    scale = model.hidden // 128
    kept = []
    for layers in (1, 2):
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=128,
            intermediate_size=round(model.intermediate / scale),
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=max(1, round(8 * model.kv_heads / model.heads)),
        )
        small = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros(1, 64, dtype=torch.long)
        kept.append(
            saved_bytes(lambda small=small, ids=ids: small.model(ids, use_cache=False), small.parameters()) / 64
        )
    return round((kept[1] - kept[0]) * scale)


def ddp(model: Model, precision: str) -> tuple[float, float]:
    """Bytes per device in (training, sampling): everything everywhere, and DDP's buckets, as large as the gradients."""
    gradient = 4 if precision == "bf16-mixed" else 2
    training = (TRAINING[precision] + gradient) * model.parameters + model.activations
    cast = 2 * model.parameters if precision == "bf16-mixed" else 0
    return training, TRAINING[precision] * model.parameters + cast + model.cache


def fsdp2(model: Model, precision: str, devices: int) -> tuple[float, float]:
    """Shards, and on top in training two blocks and the ends, whole, with gradients; in sampling the whole policy."""
    weight = 4 if precision == "bf16-mixed" else 2
    training = (
        TRAINING[precision] * model.parameters / devices
        + weight * (3 * model.block + 2 * model.ends)
        + model.activations
    )
    shards = (TRAINING[precision] - weight) * model.parameters / devices
    return training, shards + SAMPLING[precision] * model.parameters + model.cache


def served(model: Model, precision: str, devices: int) -> float:
    """Bytes per device of FSDP2 where servers sample: training, or scoring whole batches of tokens without gradient."""
    weight = 4 if precision == "bf16-mixed" else 2
    kept = 2 * SCORED_TOKENS * (2 * model.hidden + 3 * model.intermediate)
    scoring = TRAINING[precision] * model.parameters / devices + weight * (2 * model.block + model.ends) + kept
    return max(fsdp2(model, precision, devices)[0], scoring)


def choice_table() -> str:
    """What a device must hold, in training or in sampling, whichever is more, for the ways to train a model."""
    ways = {
        "LoRA, one device": lambda model: 2 * model.parameters + max(model.activations, model.cache),
        "LoRA, servers sample": lambda model: 2 * model.parameters + model.activations,
        "all weights, DDP": lambda model: max(ddp(model, "bf16-true")),
        "FSDP2, 8": lambda model: max(fsdp2(model, "bf16-true", 8)),
        "FSDP2, 8, servers": lambda model: served(model, "bf16-true", 8),
        "FSDP2, 64, servers": lambda model: served(model, "bf16-true", 64),
    }
    lines = [f"| model | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for model in MODELS:
        cells = [f"{size / 1e9:.0f}" for size in (way(model) for way in ways.values())]
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory_table() -> str:
    lines = ["| model | precision | one device, DDP | FSDP2, 8 | FSDP2, 64 |", "|---|---|---|---|---|"]
    for model in MODELS:
        for precision in TRAINING:
            cells = [ddp(model, precision), fsdp2(model, precision, 8), fsdp2(model, precision, 64)]
            shown = " | ".join(f"{training / 1e9:.0f} / {sampling / 1e9:.0f}" for training, sampling in cells)
            lines.append(f"| {model.name} | {precision} | {shown} |")
    return "\n".join(lines)


def traffic_table() -> str:
    """Training a token takes 8 N operations with checkpointing; the bytes are proportional to N as well, which
    cancels.
    """
    lines = ["| | bytes per device | tokens on " + " | tokens on ".join(LINKS) + " |", "|---|---|---|---|"]
    seconds = 8 / (PEAK * SHARE)  # per token and parameter
    for name, per_parameter in (
        ("DDP, optimizer step", 2 * 4),
        ("FSDP2, micro-step", 3 * 4),
        ("FSDP2 in bf16-true, micro-step", 3 * 2),
    ):
        tokens = " | ".join(f"{per_parameter / link / seconds:,.0f}" for link in LINKS.values())
        lines.append(f"| {name} | {per_parameter} N | {tokens} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(choice_table(), memory_table(), traffic_table(), sep="\n\n")
