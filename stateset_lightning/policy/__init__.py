"""The model scores tokens: loading, adapters, each prompt computed once per group, log-probs chunk by chunk."""

from stateset_lightning.policy.config import LoadingOptions, LoRAConfig, PolicyConfig
from stateset_lightning.policy.ends import end_of_sequence_ids
from stateset_lightning.policy.head import Comparison, compared_with
from stateset_lightning.policy.loading import AdapterReference, load_model, load_tokenizer, make_reference
from stateset_lightning.policy.lora import save_adapter
from stateset_lightning.policy.policy import Group, Policy
from stateset_lightning.policy.sampling_mask import SamplingMask
from stateset_lightning.policy.text_model import context_length

__all__ = ["AdapterReference", "Comparison", "Group", "LoRAConfig", "LoadingOptions", "Policy", "PolicyConfig"]
__all__ += ["SamplingMask", "compared_with", "context_length", "end_of_sequence_ids", "load_model", "load_tokenizer"]
__all__ += ["make_reference", "save_adapter"]
