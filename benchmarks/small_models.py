"""The smallest model of every class that transformers has for causal language models, saved to disk.

A configuration is made small by rules on the names of its fields, whatever its class: few dimensions, one layer of each
type of layer, and thresholds that short texts pass (`WINDOW`, `LONG`). What the rules cannot know stands in
`EXCEPTIONS`. Weights are random, but large enough that outputs vary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stateset_lightning.policy import PolicyConfig, load_tokenizer

VOCABULARY, PAD, EOS = 384, 0, 1  # the bundled tokenizer's
# Of sliding and chunked attention, and of what an indexer selects. Longer than the rows (33 tokens) by which the
# package probes real weights, so that its probes of a twin alone can know what is beyond.
WINDOW = 48
POSITIONS = 1024  # also of models that have fewer: every check fits
LONG = 64  # original_max_position_embeddings: beyond it, long-context tables of rotary frequencies change

RULES: list[tuple[str, int]] = [
    (r"(decoder_)?vocab_size(_per_layer_input)?|n_words", VOCABULARY),
    (
        r"hidden_size|d_model|n_embd|dim_model|embedding_dim|embedding_size|hidden_size_global|backbone_hidden_size|emb_dim",
        64,
    ),
    (r"(num_(key_value_)?heads|n_heads?|num_attention_heads|num_kv_heads|num_key_value_heads|kv_n_heads)", 4),
    (r"(encoder|decoder)_attention_heads|swa_num_(attention|key_value)_heads|num_query_groups", 4),
    (r"linear_num_(key_|value_)?heads|(num_)?(decoder|encoder)_attention_heads", 4),
    (r"(\w+_)?head_dim|d_kv|dim_head|kv_channels|qk_nope_head_dim|mamba_d_head|mamba_headdim", 16),
    (r"rotary_dim|rotary_ndims", 8),
    (r"attention_hidden_size", 64),
    (r"(\w+_)?lora_rank|laurel_rank|adapter_rank|gated_norm_rank|hc_lowrank", 16),
    (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|n_inner|dff|dim_ff|(\w+_)?ffn_hidden_size|lru_width", 64),
    (r"hidden_size_per_layer_input", 16),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_(tok|token)|moe_topk|moe_top_k|moe_k|top_k_experts", 2),
    (r"n_groups?|topk_group|num_expert_group|mamba_n_?groups|o_groups|n_shared_experts|num_shared_experts", 1),
    (r"(num_)?hidden_layers|n_layers?|num_layers|num_blocks|(encoder|decoder)_layers", 2),
    (r"depth", 2),
    (r"mamba_d_state|state_size|ssm_state_size", 16),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"(mamba_)?chunk_size|block_size", 16),
    (r"index(er)?_n_heads", 16),  # with few, many keys score 0, and which of equals are selected is left open
    (r"keep_window_size", POSITIONS),  # as of Doge's checkpoints, so that no top-k has to break ties
    (r"sliding_window(_size)?|attention_chunk_size|index_topk|local_attention(_window_len)?", WINDOW),
    (r"attention_window_size|window_size|local_attn_chunk_length|lsh_attn_chunk_length", WINDOW),
    (r"original_max_position_embeddings", LONG),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|model_max_length", POSITIONS),
    (r"encoder_hash_byte_group_vocab|ngram_vocab_size_base", 512),
    (r"floor_scale|log_scaling_n_floor", LONG),
]
"""Name of a field, and the most that it may be."""

LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types", "attention_layers")
"""Of one entry per layer, which says of what type the layer is."""

INDICES = r"\w+_(ids|idxs|indices)|moe_layers|mlp_only_layers|cross_attention_layers"
"""Of the numbers of layers."""

TOKENS = {"eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": PAD, "bos_token_id": 2}

UNSET = {"head_dim": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_routed_experts": 4}
"""What a class may leave to the checkpoint."""

RANGES = r"init_std|initializer_range|initializer_factor|init_method_std|emb_init_std"

_MAMBA_ATTENTION = ["linear_attention", "full_attention"]
_QWEN4 = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": WINDOW}
_QWEN4 |= {"indexer_compress_ratio": 4}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blt": {
        "vocab_size": VOCABULARY,
        **{f"{part}_config": {"vocab_size": VOCABULARY} for part in ("patcher", "encoder", "decoder")},
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "xlstm": {"qk_dim_factor": 1.0},
    "granitemoehybrid": {"layer_types": _MAMBA_ATTENTION, "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dots3_note": {
        "text_config": {"head_dim": 32},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"head_dim": 32},
    "emu3": {
        "vq_config": {"base_channels": 32},
        "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},  # shared ones are a variant
    "mamba2": {"num_heads": 8},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}, "vision_config": {"embed_dim": 64}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        **{"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [32, 32], "vocab_size": VOCABULARY},
        "attn_layers": ["local", "lsh"],
    },
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "hybrid_layer_ids": [1]},
}
"""By model type, what its class wants beyond the rules."""


@dataclass(frozen=True)
class Entry:
    """A model to check.

    Args:
        model_type: As transformers names it.
        changes: To its small configuration, where one class has several ways to compute.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)


_FACTORS = [1.0 + i / 8 for i in range(8)]
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": _FACTORS}
_LONGROPE["original_max_position_embeddings"] = LONG
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
_WINDOW_IN_EVERY_OTHER = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

_TWO_KINDS = ["sliding_attention", "full_attention"]
_SHARED_KEYS = {"num_hidden_layers": 6, "layer_types": _TWO_KINDS * 3, "num_kv_shared_layers": 2}

VARIANTS = {
    "gemma4_text+shared": Entry("gemma4_text", _SHARED_KEYS),
    "gemma3n_text+shared": Entry(
        "gemma3n_text", {**_SHARED_KEYS, "intermediate_size": [64] * 6, "activation_sparsity_pattern": [0.0] * 6}
    ),
    "phi3+longrope": Entry("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": LONG}),
    "llama+dynamic": Entry("llama", {"rope_parameters": _DYNAMIC, "max_position_embeddings": LONG}),
    "qwen2+window": Entry("qwen2", {**_WINDOW_IN_EVERY_OTHER, "layer_types": None}),
    "falcon+alibi": Entry("falcon", {"alibi": True}),
    "gpt_neox+serial": Entry("gpt_neox", {"use_parallel_residual": False}),
}
"""Other ways to compute than a class's default."""

COMPOSITES = ("mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""With a text model inside that a causal language model's user would train, though transformers maps none."""


def entries() -> dict[str, Entry]:
    """Everything that is checked, by name."""
    types = [*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *COMPOSITES]
    return {**{model_type: Entry(model_type) for model_type in types}, **VARIANTS}


def small_config(entry: Entry) -> PretrainedConfig:
    """The configuration of an entry's class, made small."""
    kind = CONFIG_MAPPING[entry.model_type]
    given = EXCEPTIONS.get(entry.model_type, {})
    options = _small(kind(), given)
    options |= {"tie_word_embeddings": False} if "tie_word_embeddings" in options else {}
    options |= {"is_decoder": True} if "is_decoder" in options and "encoder_layers" not in options else {}
    return kind(
        **{
            **options,
            **{key: value for key, value in given.items() if not isinstance(options.get(key), dict)},
            **entry.changes,
        }
    )


def _small(config: PretrainedConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What to call the configuration's class with."""
    values = config.to_dict()
    options: dict[str, Any] = {}
    layers = _layers_of_each_type(values)
    for key, value in values.items():
        if key in config.sub_configs and isinstance(inner := getattr(config, key), PretrainedConfig):
            options[key] = {**_small(inner, given.get(key, {})), **given.get(key, {})}
            options[key]["model_type"] = inner.model_type
        elif isinstance(value, list) and len(layers) and len(value) == _depth(values):
            options[key] = [value[i] for i in layers]
        elif isinstance(value, list) and re.fullmatch(INDICES, key):
            options[key] = [i for i in value if isinstance(i, int) and i < max(len(layers), 2)]
        elif isinstance(value, int) and not isinstance(value, bool) and (limit := _limit(key, values)) is not None:
            options[key] = limit if limit == POSITIONS else min(value, limit)
        elif re.fullmatch(RANGES, key):
            options[key] = 0.1
        elif key in ("is_decoder", "tie_word_embeddings") or "drop" in key:
            options[key] = value if isinstance(value, bool) else 0.0 if isinstance(value, float) else value
        elif key in TOKENS:
            options[key] = TOKENS[key]
        elif key == "per_layer_config" and isinstance(value, Mapping):
            options[key] = {
                layers.index(int(layer)): _small_layer(values, changes)
                for layer, changes in value.items()
                if int(layer) in layers
            }
        elif value is None and key in UNSET:
            options[key] = UNSET[key]
        elif isinstance(value, Mapping) and "original_max_position_embeddings" in value:
            options[key] = {**value, "original_max_position_embeddings": LONG}
    return options


def _small_layer(values: Mapping[str, Any], changes: Mapping[str, int]) -> dict[str, int]:
    """What one layer has other than the rest of the model."""
    small = {key: min(value, _limit(key, {**values, **changes}) or value) for key, value in changes.items()}
    if {"head_dim", "qk_nope_head_dim", "qk_rope_head_dim"} <= small.keys():
        small["head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    return small


def _limit(key: str, values: Mapping[str, Any]) -> int | None:
    """The most that a field may be; None to leave it."""
    if re.fullmatch(r"(num_)?hidden_layers|n_layers?|num_layers", key) and (layers := _layers_of_each_type(values)):
        return len(layers)
    limit = next((limit for pattern, limit in RULES if re.fullmatch(pattern, key)), None)
    if re.fullmatch(r"\w*(key_value|kv)_(n_)?heads", key):  # groups of query heads stay groups
        heads = next((values[k] for k in ("num_attention_heads", "n_head", "n_heads") if values.get(k)), 0)
        return 2 if values[key] != heads else 4
    if key == "linear_num_key_heads" and values[key] != values.get("linear_num_value_heads"):
        return 2
    return 32 if key == "qk_head_dim" else limit


def _depth(values: Mapping[str, Any]) -> int:
    """Layers, as the configuration has them; 0 if it does not list their types."""
    return max((len(values[key]) for key in LISTS if isinstance(values.get(key), list)), default=0)


def _layers_of_each_type(values: Mapping[str, Any]) -> list[int]:
    """The first layer of each combination of types, in order."""
    depth = _depth(values)
    lists = [values[key] for key in LISTS if isinstance(values.get(key), list) and len(values[key]) == depth]
    seen: dict[str, int] = {}
    for i, kinds in enumerate(zip(*lists, strict=True)):
        seen.setdefault(str(kinds), i)
    return sorted(seen.values())


def full_class(config: PretrainedConfig) -> Any:
    """The class that a checkpoint of the hub names: of a composite one the whole, not its text model alone."""
    if config.get_text_config() is config:
        return AutoModelForCausalLM
    whole = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    is_whole = config.model_type in whole
    return modeling_auto.AutoModelForImageTextToText if is_whole else AutoModelForCausalLM


def small_model(entry: Entry) -> PreTrainedModel:
    """The same weights at every call: float32, evaluation mode, biases and norms away from trivial initial values."""
    config = small_config(entry)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = full_class(config).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and re.search(r"bias|norm|ln", name):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model.eval()


def save_small_model(entry: Entry, folder: Path) -> PreTrainedModel:
    """The model on disk, with the bundled tokenizer, as a user's would be."""
    model = small_model(entry)
    if (size := model.num_parameters()) > 30_000_000:
        raise ValueError(f"the rules leave it with {size:,} parameters")
    model.save_pretrained(folder)
    load_tokenizer(PolicyConfig("tiny")).save_pretrained(folder)
    return model
