"""Attention by variable-length kernels: against a mask in full, against the buckets, in what it copies and launches."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from plain_kernels import plain_kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from policy.test_packed_attention import CASES, oracle, visible
from stateset_lightning.policy import Group, Policy, PolicyConfig, packed_attention, varlen_attention
from stateset_lightning.policy.packed_attention import ARGUMENT, Layout
