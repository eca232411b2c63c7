"""The package's attention and head for a GPU, switched: off on a GPU to see what they give, on on a CPU to rehearse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from harness import IS_GPU
from plain_kernels import plain_kernels

from stateset_lightning.policy import head as head_file, packed_attention


@contextmanager
def kernels(attention: bool = True, head: bool = True) -> Iterator[None]:
    """Scoring with the GPU's attention and head, or without; on a CPU through plain twins of PyTorch's operators.

    Args:
        attention: False has buckets of padded rows.
        head: False has products in float32, a hundred tokens and the whole vocabulary at a time.
    """
    with ExitStack() as stack:
        if not IS_GPU:
            stack.enter_context(plain_kernels())
        for file, is_wanted in ((packed_attention, attention), (head_file, head)):
            if not is_wanted:
                stack.enter_context(patch.object(file, "on_gpu", lambda x: False))
        yield
