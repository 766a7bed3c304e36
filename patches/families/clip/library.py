"""Import open_clip without what it imports and no base of ours uses, which took half of a service's start.

open_clip is made for timm's image towers and transformers' text towers as well, which `checks` refuses, and goes on
without them where they are not installed. torchvision asks torch's compiler, three seconds of import, whether it is
there at all when it pools boxes, which no CLIP does.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import threading
from types import ModuleType
from typing import Any

from patches import lean

TOWERS = ("timm", "transformers")
COMPILER = "torch._dynamo.utils"


def open_clip(part: str) -> Any:
    """The module `open_clip.<part>`; in a process that only serves, without other libraries' towers."""
    if "open_clip" not in sys.modules:
        _torchvision()
        absent = _Absent(TOWERS if lean.only_serves else ())
        sys.meta_path.insert(0, absent)
        try:
            import open_clip  # noqa: F401 - as a statement: what a Bento needs is found by its imports
        finally:
            sys.meta_path.remove(absent)
    return importlib.import_module(f"open_clip.{part}")


class _Absent(importlib.abc.MetaPathFinder):
    """Libraries that this thread does not find while it imports; other threads do."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.thread = names, threading.get_ident()

    def find_spec(self, name: str, *_: Any) -> None:
        if name in self.names and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{name} is not imported for open_clip's sake.", name=name)


class _Later(ModuleType):
    """The module of torch's compiler that torchvision imports one function from; imported when that is used."""

    def is_compile_supported(self, device: Any) -> Any:
        return self.real().is_compile_supported(device)

    def real(self) -> Any:
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return importlib.import_module(COMPILER)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)


def _torchvision() -> None:
    if "torchvision" in sys.modules or COMPILER in sys.modules:
        return
    later = _Later(COMPILER)
    sys.modules[COMPILER] = later
    try:
        import torchvision  # noqa: F401 - as a statement, like the one above
    finally:
        if sys.modules.get(COMPILER) is later:
            del sys.modules[COMPILER]
