"""Code of a stranger, in a model's folder: its import leaves the file `executed`."""

OWN_CODE = """
open({executed!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
class Engine:
    pass
"""
