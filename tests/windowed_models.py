"""Small models with sliding windows, a family for each way to attend; soft caps and sinks too."""

from typing import Any

import model_sizes
import torch
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = 7
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
SIZES = {**model_sizes.SIZES, "vocab_size": 256, "max_position_embeddings": 4096, "sliding_window": WINDOW}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma2": {**MIXED, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 8},
    "gpt_oss": {**MIXED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": MIXED,
    "cohere2": {**MIXED, "logit_scale": 1.0},
    "exaone4": {**MIXED, "sliding_window_pattern": 2},
}


def windowed_model(family: str, **changes: Any) -> Any:
    """The same weights at every call, float32, with the attention that transformers chooses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # norms and sinks, away from the trivial
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def random_tokens(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
