"""A device that is none: its tensors say that they lie on FAR and have their numbers on the CPU.

So code for a GPU runs, gives the same numbers, and fails as on a GPU where it mixes devices. Kernels, streams and
memory are not in it.

    with everywhere(monkeypatch):
        base.model.to(FAR)
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

FAR = "lazy"
"""a device type that torch knows and does nothing for"""
DEVICE = torch.device(FAR, 0)
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
BY_INDEX = {aten.index, aten.index_put, aten.index_put_}


class There(Tensor):
    """A tensor on FAR; `here` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def tolist(self) -> Any:
        return self.here.tolist()

    def __repr__(self) -> str:
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Far(TorchDispatchMode):
    """Within it FAR can be asked for, by this thread."""

    def __enter__(self) -> Any:
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(values, device=FAR): made here, then moved
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():  # an inference tensor's operator: autograd, which takes `to` apart, was skipped
            with Far():
                return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FAR in this thread and in all that start meanwhile; what of torch looks at devices by name lets it pass."""

    def enter(mode: Any) -> None:  # a wrapped tensor cannot be an inference tensor
        mode.plain = torch.no_grad() if mode.mode else torch.enable_grad()
        mode.plain.__enter__()

    def run(thread: threading.Thread, start: Any = threading.Thread.run) -> None:
        with Far():
            start(thread)

    monkeypatch.setattr(torch.inference_mode, "__enter__", enter)
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda mode, *error: mode.plain.__exit__(*error))
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(threading.Thread, "run", run)
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` would keep the old class
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every operator is small
    try:
        with Far():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def _here(x: Any) -> Any:
    return x.here if isinstance(x, There) else x


def _leaves(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """What an operator is given, members of lists of tensors one by one; operators nest no deeper."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, list | tuple):
            yield from x
        else:
            yield x


def _mapped(fn: Callable[[Any], Any], x: Any) -> Any:
    return type(x)(map(fn, x)) if isinstance(x, list | tuple) else fn(x)


@cache
def _aliases(func: Any) -> bool:
    """Whether an operator's result shares memory with what it was given, by its schema."""
    return any(a.alias_info is not None for a in (*func._schema.arguments, *func._schema.returns))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU; its result lies where a GPU's would."""
    tensors = [x for x in _leaves(args, kwargs) if isinstance(x, Tensor)]
    far = any(isinstance(x, There) for x in tensors)
    device = kwargs.get("device")
    if not far and device is None:
        return func(*args, **kwargs)
    if far and func not in MOVES:
        for x in tensors:  # a number may come from anywhere, and so may an index
            index = func.overloadpacket in BY_INDEX and x.dtype in (torch.int64, torch.bool, torch.uint8)
            if not isinstance(x, There) and x.ndim and not index:
                raise RuntimeError(f"{func} got a tensor {tuple(x.shape)} on the CPU beside tensors on {FAR}.")
    goes = far if device is None else torch.device(device).type == FAR
    if func is aten.copy_.default:
        goes = isinstance(args[0], There)
    on_cpu = {k: _mapped(_here, v) for k, v in kwargs.items() if k != "pin_memory"}
    if device is not None:
        on_cpu["device"] = torch.device("cpu")
    out = func(*[_mapped(_here, x) for x in args], **on_cpu)
    aliases = far and _aliases(func)
    same = {id(_here(x)): x for x in tensors} if aliases else {}  # what was changed in place is what was given

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return same[id(x)] if id(x) in same else There(x) if goes else x

    out = _mapped(back, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if aliases else out
