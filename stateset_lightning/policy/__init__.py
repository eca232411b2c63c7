"""The model: loading, adapters, packed shared-prefix scoring, chunked log-probabilities, learning-rate schedules."""

from stateset_lightning.policy.adapters import save_adapter
from stateset_lightning.policy.config import LoadingOptions, LoRAConfig, PolicyConfig
from stateset_lightning.policy.loading import context_length, end_of_sequence_ids, load_model, load_tokenizer, resolve_model_name
from stateset_lightning.policy.policy import Group, Policy
from stateset_lightning.policy.reference import AdapterReference, make_reference

__all__ = [
    "AdapterReference",
    "Group",
    "LoRAConfig",
    "LoadingOptions",
    "Policy",
    "PolicyConfig",
    "context_length",
    "end_of_sequence_ids",
    "load_model",
    "load_tokenizer",
    "make_reference",
    "resolve_model_name",
    "save_adapter",
]
