"""Small models with recurrent layers, a family for each kind of state; alone, beside attention, and within a layer."""

from typing import Any

import torch
from model_sizes import SIZES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

GATED = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**GATED, **LINEAR},
    "qwen3_next": {**GATED, **LINEAR, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**MAMBA, "mamba_n_heads": 4, "mamba_d_ssm": 32},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 1},
    "nemotron_h": {
        "layers_block_type": ["moe", "mamba", "attention"],
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
        **{"moe_intermediate_size": 16, "n_routed_experts": 4},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 64},
}


def small_family(name: str, options: dict[str, Any]) -> Any:
    """The same weights at every call, float32, evaluation mode."""
    config = CONFIG_MAPPING[name](**{**SIZES, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:  # biases and norms, away from the trivial
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()
