"""Read and change models: edits, patches, bases, subjects. The public face; everything else is reached by its module.

    from patches import Act, Patch, Subject, apply, artifact, load_base, record

Names are imported when they are first used, so `import patches` alone costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patches.engine.edits import Act, Bias, Edit, Inputs, Side, Weight
    from patches.engine.patch import Applied, Patch, apply
    from patches.engine.read import record
    from patches.families.base import Base, load_base
    from patches.families.family import Family, family
    from patches.families.worker import Job, Worker
    from patches.subject import Model, Search, Subject

_HOMES = {
    "patches.engine.edits": ("Act", "Bias", "Edit", "Inputs", "Side", "Weight"),
    "patches.engine.patch": ("Applied", "Patch", "apply"),
    "patches.engine.read": ("record",),
    "patches.families.base": ("Base", "load_base"),
    "patches.families.family": ("Family", "family"),
    "patches.families.worker": ("Job", "Worker"),
    "patches.subject": ("Model", "Search", "Subject"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Act", "Applied", "Base", "Bias", "Edit", "Family", "Inputs", "Job", "Model", "Patch", "Search", "Side", "Subject",
    "Weight", "Worker", "apply", "family", "load_base", "record",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"patches has no {name!r}. It has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
