"""The model scores tokens: loading, adapters, each prompt computed once per group, log-probs chunk by chunk."""

# `X as X`: this is exported, to type checkers as well (PEP 484).
from stateset_lightning.policy.config import LoadingOptions as LoadingOptions
from stateset_lightning.policy.config import LoRAConfig as LoRAConfig
from stateset_lightning.policy.config import PolicyConfig as PolicyConfig
from stateset_lightning.policy.loading import AdapterReference as AdapterReference
from stateset_lightning.policy.loading import check_complete as check_complete
from stateset_lightning.policy.loading import check_vocabulary as check_vocabulary
from stateset_lightning.policy.loading import load_model as load_model
from stateset_lightning.policy.loading import load_tokenizer as load_tokenizer
from stateset_lightning.policy.loading import loading_errors as loading_errors
from stateset_lightning.policy.loading import make_reference as make_reference
from stateset_lightning.policy.loading import resolve_model_name as resolve_model_name
from stateset_lightning.policy.policy import Group as Group
from stateset_lightning.policy.policy import Policy as Policy
from stateset_lightning.policy.policy import context_length as context_length
from stateset_lightning.policy.policy import end_of_sequence_ids as end_of_sequence_ids
from stateset_lightning.policy.policy import save_adapter as save_adapter
