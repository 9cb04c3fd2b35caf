"""A second device that a machine without an accelerator can have: "side", whose tensors hold CPU tensors.

Every operation runs on the CPU with its usual results; but a tensor of the one device is none of the other,
and an operation that mixes them is refused, as CUDA refuses it. Numbers (tensors without a dimension) of the
CPU are taken, and tensors of the CPU as indices, and as the source of a copy. What a `device=` was forgotten
for, what is moved too late or not at all, what is read by NumPy, is found here without a GPU; not what CUDA's
kernels compute otherwise, or lack.

Importing this module registers the device, before the first backward, for the whole of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "side"
_CPU = torch.device("cpu")
_COPIES = ("aten._to_copy", "aten.copy_", "aten._foreach_copy_", "aten.set_")
_INDEXED = ("aten.index.", "aten.index_put", "aten._index_put_impl_", "aten._unsafe_index")
_JOINED = ("aten.cat.", "aten.stack.")  # where a tensor without a dimension is like any other


class DeviceMismatchError(RuntimeError):
    """An operation was given tensors of several devices."""


class SideTensor(Tensor):
    """A tensor of the device; `held` has its values, and shares their memory with its views."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Any, /, device: Any = None, **parameter: Any) -> Any:
        if device is None:  # Accelerate makes a parameter as one of the type that it found
            return nn.Parameter(held, requires_grad=parameter["requires_grad"])
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # What torch does for its own tensors in C++ alone ---------------------------------------------

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {self.device}"

    def __format__(self, spec: str) -> str:
        return format(self.held, spec)

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(_indices(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(_indices(key), value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone()
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = (
                nn.Parameter(copied, self.requires_grad)
                if is_parameter
                else copied.requires_grad_(self.requires_grad)
            )
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # a file of the CPU's tensors

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor of {self.device} to numpy: copy it to host memory first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **kwargs)

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def storage(self) -> Any:
        return self.held.storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @property
    def data(self) -> Any:
        return Tensor.data.__get__(self)  # pyright: ignore[reportAttributeAccessIssue]

    @data.setter
    def data(self, value: Any) -> None:
        Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        self.held = value.held


def _indices(key: Any) -> Any:
    """Return an index with tensors of the CPU in the place of lists."""
    if isinstance(key, list):
        return torch.tensor(key)
    return tuple(map(_indices, key)) if isinstance(key, tuple) else key


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for group in _groups(str(func), args, tensors):
        if len({tensor.device for tensor in group}) > 1:
            shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in group]
            raise DeviceMismatchError(f"{func}: expected all tensors on one device, got {shapes}")
    wanted = kwargs.get("device")
    ours = next((tensor.device for tensor in tensors if isinstance(tensor, SideTensor)), _CPU)
    device = ours if wanted is None else torch.device(wanted)
    if device.type == NAME and device.index is None:
        device = torch.device(NAME, 0)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != device.type:
        raise DeviceMismatchError(f"{func}: a generator of {generator.device} for a tensor of {device}")
    on_cpu = {"device": _CPU, "pin_memory": False} if wanted is not None else {}
    inner = {name: on_cpu.get(name, value) for name, value in kwargs.items()}
    found = func(*tree_map(_held, args), **tree_map(_held, inner))
    by_held = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, SideTensor)}

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in by_held:  # in place
            same = by_held[id(value)]
            if same.shape != value.shape:  # resized
                Tensor.data.__set__(same, SideTensor(value, same.device))  # pyright: ignore[reportAttributeAccessIssue]
            return same
        return SideTensor(value, device) if device.type == NAME else value

    return tree_map(back, found)


def _groups(name: str, args: Any, tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of an operation's tensors that must be of one device."""
    if name.startswith(_COPIES):
        return
    if name.startswith(_INDEXED):
        for index in args[1]:
            if index is not None and isinstance(index, SideTensor):
                yield [args[0], index]
        if "put" in name:
            yield _sized([args[0], args[2]])
    elif name.startswith(_JOINED):
        yield tensors
    elif name.startswith("aten._foreach"):  # tensor by tensor
        lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
        yield from (_sized(group) for group in zip(*lists, strict=True))
    else:
        yield _sized(tensors)


def _sized(tensors: Any) -> list[Tensor]:
    """Return tensors without the numbers of the CPU among them."""
    return [tensor for tensor in tensors if tensor.dim() > 0 or isinstance(tensor, SideTensor)]


def _held(value: Any) -> Any:
    return value.held if isinstance(value, SideTensor) else value


def _by_way_of_the_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a factory that has its tensor moved: torch writes numbers into memory of the CPU alone."""

    def made(data: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_side(device):
            return make(data, dtype=dtype, device=device, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        found = make(data, dtype=dtype, **kwargs).to(device)
        return found.requires_grad_() if requires_grad else found

    return made


def _is_side(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


class _Module(_DummyBackendModule):
    """What torch asks of a device's module, beside what the base has."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()  # random numbers are drawn on the CPU

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend(NAME, _Module())
DEVICE = torch.device(NAME, 0)
_KERNELS = torch.library.Library("_", "IMPL")
_KERNELS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # autocast changes nothing
_KERNELS.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
_device_constructors()  # which remembers, for `with torch.device(...)`, what these names are before this
for _name in ("tensor", "as_tensor"):
    setattr(torch, _name, _by_way_of_the_cpu(getattr(torch, _name)))
