"""A subject: what can be measured, logged, served and split-tested. Bases by role, and arms by name.

An arm is a *patch* (edits on a shared base: rows of one batch), a *model* (other weights of the same family: its own
copy in memory) or a *search* (a configuration over several bases). Evaluations, MLflow's pyfunc, exports and services
all run subjects, so training and serving cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from patches import artifact, devices
from patches.engine.edits import Edit, Weight
from patches.engine.patch import ONLY, Applied, Patch, apply
from patches.families.base import Base, load_base
from patches.families.family import Family, family
from patches.families.worker import Fleet, Worker, WorkerSettings
from registry import manifest
from registry.errors import BadArtifact, NotFound, NotReady, PatchError, WrongBase
from registry.manifest import Manifest
from registry.systems import System, system

BASE_ROLE = "base"
"""the role of the base that patches go on"""


@dataclass(frozen=True)
class Model:
    """An arm that is other weights of the same family."""

    base: Base


@dataclass(frozen=True)
class Search:
    """An arm that is a configuration of a search over the subject's bases."""

    config: Mapping[str, Any]
    folder: Path | None = None
    """the sealed folder, with the bank or the trace it was made from"""


Arm = Patch | Model | Search


@dataclass(frozen=True)
class NoConfig:
    """Nothing to set."""


@dataclass(frozen=True)
class Unchanged(Patch):
    """The patch that changes nothing: how a model's own weights bear the name of their arm."""

    Config = NoConfig
    config: NoConfig = field(default_factory=NoConfig)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def edits(self) -> Sequence[Edit]:
        return ()


class Subject:
    """Bases with arms. Arms come and go while it runs; rows of one batch may use different ones."""

    def __init__(
        self, bases: Base | Mapping[str, Base], arms: Mapping[str, Arm] | None = None, about: Family | None = None
    ) -> None:
        """about: the family; by default that of the base."""
        self.bases: dict[str, Base] = {BASE_ROLE: bases} if isinstance(bases, Base) else dict(bases)
        self.family = about if about is not None else family(self.base.family)
        self.folder: Path | None = None
        """the sealed folder it was loaded from, for what else is in it"""
        arms = dict(arms or {})
        patches = {name: arm.to(self.base.device) for name, arm in arms.items() if isinstance(arm, Patch)}
        self.applied: Applied = apply(self.base.model, patches, root=self.base.root)
        """the patches among the arms, on the base"""
        self.arms: dict[str, Arm] = dict(patches)
        self._fleet: Fleet | None = None
        self._settings = WorkerSettings()
        for name in arms.keys() - patches.keys():
            self.add(name, arms[name])

    @classmethod
    def load(
        cls, folder: Path | str, bases: Base | str | Mapping[str, Base | str] | None = None, device: str = "cpu"
    ) -> Subject:
        """The sealed artifact in `folder` as the arm "patch", on `bases` or those it names. All is verified."""
        folder = Path(folder)
        about = manifest.read(folder)
        row = system(about.system)
        wanted = bases if isinstance(bases, Mapping) else {row.role: bases} if bases is not None else {}
        if alone(about):
            made = cls({row.role: load_weights(folder, about, device)}, {}, family(row.family))
            made.folder = folder
            return made
        loaded = load_bases(row, about, wanted, device)
        bare = about.kind == "model" and not about.files  # names a base and nothing else
        arms = {} if bare else {ONLY: load_arm(folder, about, str(next(iter(loaded.values())).device))}
        made = cls(loaded, arms, family(row.family))
        made.folder = folder
        return made

    @property
    def base(self) -> Base:
        """The base that patches go on; of a search, that of its first role."""
        return self.bases[BASE_ROLE] if BASE_ROLE in self.bases else next(iter(self.bases.values()))

    @property
    def only(self) -> str | None:
        """The arm that was loaded by itself, if it was; else None, the base."""
        return ONLY if ONLY in self.arms else None

    def add(self, name: str, arm: Arm) -> None:
        """One more arm. Raises PatchError or NotReady, changing nothing."""
        if name in self.arms:
            raise PatchError(f"There is an arm {name!r} already; remove it first.")
        if isinstance(arm, Patch):
            arm = arm.to(self.base.device)
            self.applied.add(name, arm)
        elif isinstance(arm, Model) and self._fleet is not None:
            self._man(name, arm)
        self.arms = {**self.arms, name: arm}

    def remove(self, name: str) -> None:
        """One arm less, with its weights if it has any of its own."""
        if self._fleet is not None:
            self._fleet.models = {k: v for k, v in self._fleet.models.items() if k != name}
        self.applied.remove(name)
        self.arms = {k: v for k, v in self.arms.items() if k != name}

    def worker(self, settings: WorkerSettings | None = None) -> Worker[Any]:
        """A worker over all arms, those to come as well; call it once, and let one thread own it."""
        self._settings = settings or WorkerSettings()
        worker = self.family.worker(self, self._settings)
        if self.family.load_folder is None:
            return worker
        self._fleet = Fleet(worker)
        for name, arm in self.arms.items():
            if isinstance(arm, Model):
                self._man(name, arm)
        return self._fleet

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that weights take: of the bases together (`base`), and of each arm beside them by its name."""
        out = {BASE_ROLE: sum(_weight(base.model) for base in self.bases.values())}
        for name, arm in self.arms.items():
            tensors = arm.tensors.values() if isinstance(arm, Patch) else ()
            out[name] = _weight(arm.base.model) if isinstance(arm, Model) else sum(t.nbytes for t in tensors)
        return out

    def alone(self, arm: str | None) -> Base:
        """The base whose forward is that arm's: a model's own, else the shared one."""
        found = self.arms.get(arm) if arm is not None else None
        return found.base if isinstance(found, Model) else self.base

    def predict(self, frame: Any, params: Mapping[str, Any]) -> Any:
        """What the family's table says: one answer per row of a DataFrame."""
        defaults = {name: default for name, (_, default) in self.family.table.params.items()}
        return self.family.predict(self, frame, {**defaults, **params})

    def __call__(self, rows: Sequence[str | None] | None = None, **inputs: Any) -> Any:
        """The base's own forward by keyword, rows as `Applied.rows`. Gradients off."""
        with torch.inference_mode():
            if rows is None:
                return self.base.model(**inputs)
            with self.applied.rows(rows):
                return self.base.model(**inputs)

    def close(self) -> None:
        """Take every patch off; the base is bit for bit what it was. `with Subject(...)` does it at the end."""
        self.applied.revert()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _man(self, name: str, arm: Model) -> None:
        """A worker of its own for a model, whose rows bear the arm's name there, too."""
        assert self._fleet is not None
        own = Subject(arm.base, {name: Unchanged()}, self.family)
        self._fleet.models = {**self._fleet.models, name: self.family.worker(own, self._settings)}


def load_bases(row: System, about: Manifest, given: Mapping[str, Base | str], device: str) -> dict[str, Base]:
    """role -> base of an artifact: as given, else as its manifest names it. Raises WrongBase if a digest differs."""
    if missing := sorted(row.bases.keys() - about.bases.keys() - given.keys()):
        raise BadArtifact(f"sha256:{about.digest[:16]} names no base for the role {missing[0]!r} of {row.name}.")
    out = {}
    for role, kind in row.bases.items():
        found = given.get(role) or about.bases[role].rpartition("@")[0]
        base = found if isinstance(found, Base) else load_base(found, kind, device)
        if role in about.bases and not manifest.same_base(about.bases[role].rpartition("@")[2], base.digest):
            raise WrongBase(
                f"sha256:{about.digest[:16]} was made from {about.bases[role]}, not from {base.label}. "
                "Fit it again on this base."
            )
        out[role] = base
    return out


def _weight(model: Any) -> int:
    """Bytes of a module's parameters and buffers; 0 of what is no module."""
    if not isinstance(model, torch.nn.Module):
        return 0
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def load_arm(folder: Path, about: Manifest, device: str = "cpu", limit: float = 0.0) -> Arm:
    """What a verified folder holds, as an arm. limit: GiB that a model's own weights may take; 0: what is free.

    Raises NotReady for a model that does not fit, with sizes.
    """
    if about.kind == "patch":
        return artifact.load(folder, digest=about.digest, device=device)[1]
    if about.kind == "search":
        return Search(about.config, folder)
    if about.kind == "model":
        if alone(about):
            raise NotFound(
                f"sha256:{about.digest[:16]} is a model that stands alone: {system(about.system).family} arms are "
                "patches, or it was made from no base. Load it as a base: local-dir:<folder>."
            )
        made = load_weights(folder, about, device, limit)
        artifact.check_finite(dict(made.model.named_parameters()), str(folder))
        return Model(made)
    raise BadArtifact(f"{folder} holds a {about.kind} of {about.system}: something to read, not to run.")


def alone(about: Manifest) -> bool:
    """Whether it is a model with nothing beside it: made from no base, or an exported checkpoint of a family whose arms
    are patches. Such a one is loaded as the base itself."""
    if about.kind != "model" or not about.files:
        return False
    return not about.bases or family(system(about.system).family).load_folder is None


def load_weights(folder: Path, about: Manifest, device: str, limit: float = 0.0) -> Base:
    """The weights in a verified folder of kind "model". Raises NotReady if they do not fit in memory, with sizes."""
    check_memory(about, device, limit)
    kind = family(system(about.system).family)
    if kind.load_folder is not None:
        return replace(kind.load_folder(folder, device), family=kind.name)
    return load_base(f"local-dir:{folder}", kind.name, device)


def check_servable(folder: Path, name: str, bases: Mapping[str, str]) -> None:
    """Raises what would keep a sealed folder from being an arm of system `name` on bases with these digests (role ->
    digest; none: on any). Whether it answers well, only a service finds out."""
    about = manifest.read(folder)
    row = system(name)
    if about.system != name:
        raise BadArtifact(f"{folder} is of {about.system}, not of {name}.")
    for role, label in about.bases.items():
        if role in bases and not manifest.same_base(label.rpartition("@")[2], bases[role]):
            raise WrongBase(f"{folder} was made from {label[:80]}, not from the base {bases[role][:16]}.")
    if about.kind == "patch":
        if any(isinstance(e, Weight) for e in artifact.load(folder)[1].edits()):
            raise PatchError(f"{folder} edits weights, which rows of one batch share. Fold it: patchbay export")
    elif about.kind == "model":
        if alone(about):
            raise NotFound(f"{folder} is a model that stands alone, and no arm of {name}.")
    elif about.kind != "search" or not row.roles:
        raise BadArtifact(f"{folder} holds a {about.kind} of {about.system}: something to read, not to run.")


def check_memory(about: Manifest, device: str, limit: float = 0.0) -> None:
    """Raises NotReady if the weights of an artifact, in float32, are more than `limit` GiB, or than what is free."""
    numbers = sum(math.prod(shape) for file in about.tensors.values() for _, shape in file.values())
    if limit and 4 * numbers > limit * 2**30:
        raise NotReady(
            f"sha256:{about.digest[:16]} needs {4 * numbers / 2**30:.3g} GiB beside the base; {limit:g} GiB are "
            "allowed for an arm here (PATCHBAY_ARM_GIB)."
        )
    device = devices.first(device)
    free = torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
    if 4 * numbers > free:
        raise NotReady(
            f"sha256:{about.digest[:16]} needs {4 * numbers / 2**30:.1f} GiB beside the base, and {free / 2**30:.1f} "
            f"GiB are free on {device}. Serve it on a larger machine, or alone as a base."
        )
