"""A stand-in for a GPU: tensors that say they are on a device of their own and hold real values on the CPU.

    with PretendCuda() as gpu: ...       `gpu.move(module)` moves a module there

It raises where devices are mixed, as a GPU does, and counts by file and line what costs time there: operations that
wait for the device (`.item()`, `.tolist()`, a boolean index, `repeat_interleave` without `output_size`, ...), uploads
from the host, and launches. It sees no kernels, precisions, streams or memory.

It stands on private parts of PyTorch (seen in 2.13) and registers its device for good: use it in a process of its own.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
VIEWS = """_reshape_alias _unsafe_view alias as_strided chunk detach diagonal expand lift_fresh narrow permute select
    slice split split_with_sizes squeeze t transpose unbind unfold unsqueeze view view_as_real"""
NO_LAUNCH = {*VIEWS.split(), "empty", "empty_like", "empty_strided", "is_same_size", "new_empty", "new_empty_strided"}
NO_LAUNCH |= {"resize_", "set_", "sym_size"}
INDEXING = ("index", "index_put", "index_put_")


class _Backend(_DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def manual_seed_all(seed: int) -> None: ...

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False


# A CPU build of PyTorch has no guard for CUDA devices, which autograd asks for streams; one device may be added.
_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
CUDA = torch.device(NAME, 0)
ACTIVE: list[PretendCuda] = []


def is_there(device: Any) -> bool:
    """Whether a device argument names the stand-in."""
    return isinstance(device, str | torch.device) and torch.device(device).type == NAME


class OnDevice(torch.Tensor):
    """A tensor of the stand-in device; `elem` holds its values."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
            requires_grad=elem.requires_grad,
        )
        made.elem = elem
        if elem.dtype == torch.float64:
            note("float64", "made")
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:
        return f"OnDevice({self.elem!r})"

    def tolist(self) -> Any:  # the stock one reads the host's memory
        note("wait", "tolist")
        return self.elem.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a device tensor to numpy: use Tensor.cpu() to copy it to host memory first")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


# What PyTorch makes below the modes, such as an index that is a list.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl(
    "empty_strided",
    lambda size, stride, **options: OnDevice(torch.empty_strided(size, stride, dtype=options.get("dtype"))),
    "PrivateUse1",
)
_LIBRARY.impl(
    "empty.memory_format",
    lambda size, **options: OnDevice(torch.empty(size, dtype=options.get("dtype"))),
    "PrivateUse1",
)


def _copy_from(source: torch.Tensor, target: OnDevice, non_blocking: bool = False) -> OnDevice:
    note("upload", "host index" if non_blocking else "host index and wait")
    target.elem.copy_(source)
    return target


_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")

# Autocast: products are cast, all else is left as it is.
_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _cast_product(operation: Any) -> Any:
    def product(*tensors: torch.Tensor | None) -> torch.Tensor:
        dtype = torch.get_autocast_dtype(NAME)
        cast = (x.to(dtype) if x is not None and x.dtype == torch.float32 else x for x in tensors)
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operation(*cast)

    return product


for _name in ("linear", "matmul", "mm", "bmm"):
    _LIBRARY.impl(_name, _cast_product(getattr(torch.ops.aten, _name)), "AutocastPrivateUse1")


def run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """One operation of PyTorch: checked, counted, computed on the CPU."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    device = kwargs.get("device")
    to_device = name == "_to_copy" and is_there(device)
    to_host = name == "_to_copy" and device is not None and torch.device(device).type == "cpu"
    if not here and not is_there(device):
        return func(*args, **kwargs)
    if name == "_has_compatible_shallow_copy_type":  # `Module.to` then replaces the parameter
        return False
    generators = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
    if here and any(generator.device.type == "cpu" for generator in generators):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' (in {name})")
    if here and not to_device and any(x.dim() > 0 for x in tensors if not isinstance(x, OnDevice)):
        _note_mixed(name, args, kwargs)
    _note_cost(func, name, args, kwargs, to_host)

    plain_args, plain_kwargs = tree_map(lambda x: x.elem if isinstance(x, OnDevice) else x, (args, dict(kwargs)))
    if "device" in plain_kwargs:
        plain_kwargs["device"] = torch.device("cpu")
    plain_kwargs.pop("pin_memory", None)
    out = func(*plain_args, **plain_kwargs)
    if to_host:
        return out
    same = {id(x.elem): x for x in here}  # in-place operations return what they were given

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else OnDevice(x)

    return tree_map(wrapped, out)


def _note_mixed(name: str, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Copies between devices and indices from the host are allowed; nothing else is."""
    is_quick = kwargs.get("non_blocking", len(args) > 2 and args[2])
    if name == "copy_":
        note("upload" if isinstance(args[0], OnDevice) else "wait", name if is_quick else f"{name} and wait")
    elif name in INDEXING and isinstance(args[0], OnDevice):
        note("upload", "host index and wait")
    else:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu (in {name})")


def _note_cost(func: Any, name: str, args: Any, kwargs: Mapping[str, Any], to_host: bool) -> None:
    size_is_known = name == "repeat_interleave" and (
        kwargs.get("output_size") is not None or func._overloadname == "self_int"
    )
    if to_host:
        note("wait", "to(cpu)")
    elif name in WAITS and not size_is_known:
        note("wait", name)
    elif name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        note("wait", f"{name} by a mask")
    elif name not in NO_LAUNCH:
        note("launch", name)


def note(kind: str, name: str) -> None:
    for mode in ACTIVE:
        mode.note(kind, name)


@dataclass
class Report:
    """Operations that were launched by name; uploads, waits and float64 tensors by place in the code.

    An upload that waits says so: those of pageable memory do, unless they are `non_blocking`.
    """

    launches: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    float64: Counter[str] = field(default_factory=Counter)  # tensors that Apple's GPUs could not hold

    @property
    def blocking(self) -> Counter[str]:
        """The uploads that wait."""
        return Counter({place: count for place, count in self.uploads.items() if "and wait" in place})

    def __str__(self) -> str:
        return f"{self.launches.total()} launches, {self.waits.total()} waits, {self.uploads.total()} uploads"


class _Factories(TorchDispatchMode):
    """Catches what PyTorch's composite operations make on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class PretendCuda(TorchFunctionMode):
    """The stand-in device while the context lasts; `report` counts what the package `only` did on it."""

    def __init__(self, only: str = "stateset_lightning") -> None:
        super().__init__()
        self.only = only
        self.report = Report()
        self._factories = _Factories()

    def __enter__(self) -> PretendCuda:
        ACTIVE.append(self)
        self._moves = patch.object(torch.nn.Module, "to", _moved_module)
        self._moves.start()
        super().__enter__()
        self._factories.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._factories.__exit__(*exception)
        self._moves.stop()
        ACTIVE.remove(self)
        super().__exit__(*exception)

    def take(self) -> Report:
        """The report since the last call."""
        report, self.report = self.report, Report()
        return report

    def note(self, kind: str, name: str) -> None:
        if kind == "launch":
            self.report.launches[name] += 1
            return
        frames = [frame for frame in traceback.extract_stack() if f"/{self.only}/" in frame.filename]
        place = "elsewhere"
        if frames:
            place = f"{frames[-1].filename.split(f'/{self.only}/')[-1]}:{frames[-1].lineno} {frames[-1].name}"
        counts = {"wait": self.report.waits, "upload": self.report.uploads, "float64": self.report.float64}
        counts[kind][f"{place} [{name}]"] += 1

    @staticmethod
    def move(module: torch.nn.Module) -> torch.nn.Module:
        """Parameters and buffers go to the device; tied ones stay tied."""
        moved: dict[int, Any] = {}
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None and not isinstance(parameter, OnDevice):
                    made = torch.nn.Parameter(OnDevice(parameter.detach()), requires_grad=parameter.requires_grad)
                    child._parameters[name] = moved.setdefault(id(parameter), made)
            for name, buffer in child._buffers.items():
                if buffer is not None and not isinstance(buffer, OnDevice):
                    child._buffers[name] = moved.setdefault(id(buffer), OnDevice(buffer.detach()))
        return module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return _to(name, args[0], args[1:], kwargs)
        if name == "is_available" or not is_there(kwargs.get("device")):
            return func(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        if any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs))):
            out = func(*args, **kwargs)
            return out if isinstance(out, OnDevice) else OnDevice(out)
        kwargs.pop("pin_memory", None)
        if name in ("tensor", "as_tensor"):
            note("upload", f"{name} and wait")
        else:
            note("launch", name)
        return OnDevice(func(*args, **kwargs))


_STOCK_TO = torch.nn.Module.to


def _moved_module(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`Module.to`, which would untie weights where their data cannot be replaced in place."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    if not is_there(device):
        return _STOCK_TO(module, *args, **kwargs)
    return PretendCuda.move(module if dtype is None else _STOCK_TO(module, dtype))


def _to(name: str, x: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """`Tensor.to`, `cpu` and `cuda`: the arguments are a device, a dtype, both, or another tensor."""
    given = [*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")]
    devices = [torch.device(value) for value in given if isinstance(value, str | torch.device)]
    dtypes = [value for value in given if isinstance(value, torch.dtype)]
    for other in (value for value in given if isinstance(value, torch.Tensor)):
        devices, dtypes = [other.device], [other.dtype]
    if name in ("cpu", "cuda"):
        devices = [CUDA if name == "cuda" else torch.device("cpu")]
    dtype = dtypes[0] if dtypes else x.dtype
    if devices and devices[0].type == NAME and not isinstance(x, OnDevice):
        note("upload", "to(cuda)" if kwargs.get("non_blocking") else "to(cuda) and wait")
        x = OnDevice(x.detach())
    elif devices and devices[0].type == "cpu" and isinstance(x, OnDevice):
        return torch.ops.aten._to_copy(x, device=torch.device("cpu"), dtype=dtype)
    return x if dtype == x.dtype else torch.ops.aten._to_copy(x, dtype=dtype)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The stock operation, which has no implementation for an added device."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]
