"""Patch <-> sealed folder. One save and one load for every mechanism; no pickle anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from patches.engine.patch import Patch
from registry import config, manifest
from registry.errors import BadArtifact
from registry.manifest import Manifest
from registry.systems import system

TENSORS = "patch.safetensors"


def save(patch: Patch, name: str, folder: Path, *, base: str, parents: Iterable[str] = ()) -> Manifest:
    """Seal `patch` of system `name`, made from `base` (name@digest), in `folder`, with the evidence that lies there."""
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
    tensors = load_file(folder / TENSORS) if TENSORS in about.files else {}
    return about, cls(config.parse(cls.Config, about.config), tensors).to(device)
