"""The model: loading, packed shared-prefix scoring, chunked log-probabilities, learning-rate schedules."""

from stateset_lightning.policy.config import PolicyConfig
from stateset_lightning.policy.loading import context_length, end_of_sequence_ids, load_model, load_tokenizer, resolve_model_name
from stateset_lightning.policy.policy import Group, Policy

__all__ = [
    "Group",
    "Policy",
    "PolicyConfig",
    "context_length",
    "end_of_sequence_ids",
    "load_model",
    "load_tokenizer",
    "resolve_model_name",
]
