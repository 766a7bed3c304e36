"""Patch <-> sealed folder. One save and one load for every mechanism; no pickle anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as loads
from safetensors.torch import save_file
from torch import Tensor

from patches import devices
from patches.engine.patch import Patch
from registry import config, manifest
from registry.errors import BadArtifact, ConfigError, NotFinite, Tampered
from registry.manifest import Manifest
from registry.systems import system

TENSORS = "patch.safetensors"


def save(patch: Patch, name: str, folder: Path, *, base: str, parents: Iterable[str] = ()) -> Manifest:
    """Seal `patch` of system `name`, made from `base` (name@digest), in `folder`, with the evidence that lies there.

    Raises NotFinite, sealing nothing, for a tensor with NaN or infinity.
    """
    check_finite(patch.tensors, f"a patch of {name}")
    folder.mkdir(parents=True, exist_ok=True)
    if patch.tensors:
        save_file({k: v.detach().cpu().contiguous() for k, v in patch.tensors.items()}, folder / TENSORS)
    about: dict[str, Any] = {"kind": "patch", "system": name, "base": base, "config": asdict(patch.config)}
    return manifest.write(folder, **about, parents=list(parents))


def load(
    folder: Path, *, digest: str | None = None, base: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Manifest, Patch]:
    """The patch in a sealed folder, every byte checked. `digest`, `base`: what it must be and belong to; device: where
    its tensors shall lie, which is where the base does."""
    about = manifest.read(folder, digest=digest, base=base)
    if about.kind != "patch":
        raise BadArtifact(f"{folder} holds a {about.kind} of {about.system}, not a patch.")
    cls = system(about.system).load_patch()
    tensors = loads(manifest.take(folder, about, TENSORS)) if TENSORS in about.files else {}
    check_finite(tensors, str(folder))
    try:
        return about, cls(config.parse(cls.Config, about.config), tensors).to(devices.first(str(device)))
    except ConfigError as e:
        raise Tampered(f"{folder} holds no config of {about.system}: {e}") from None


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises NotFinite naming the first tensor with NaN or infinity."""
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            bad = int((~x.isfinite()).sum())
            raise NotFinite(f"{where}: {bad} of {x.numel()} numbers of {name[:80]!r} are NaN or infinite. Fit again.")
