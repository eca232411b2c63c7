"""A model as llama.cpp's converter would write it, for tests of what reads GGUF."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaForCausalLM


def write_gguf(
    path: Path, model: LlamaForCausalLM, *more: str, add: Callable[[gguf.GGUFWriter], None] = lambda writer: None
) -> None:
    """Writes a model with its matrices in 8 bits (Q8_0, blocks of 32), its other weights as they are.

    Args:
        path: The file.
        model: Of hidden sizes that 32 divides.
        more: Names of further tensors, which no class of transformers has.
        add: Adds further metadata, such as a tokenizer's.
    """
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    add(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for count in (count for kind, count in heads.items() if kind in name):  # rotary pairs stand beside each other
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        quantized = gguf.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), quantized, raw_dtype=kind)
    for name in more:
        writer.add_tensor(name, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
