"""Export CLIP's two towers to ONNX Runtime, unpatched or with one patch traced into the graphs.

A folder holds image.onnx, (B, 3, H, W) -> (B, k), and text.onnx, (B, context) ids -> (B, k): unit features, B dynamic.
Exports are run at once and must match torch (`PARITY`), so a sealed folder has been checked. Activation edits that run
on every row are traced; weight edits are in the weights. Rows of one batch cannot name arms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from patches.engine.patch import Patch
from patches.families.base import Base
from patches.families.onnx import check_provider, kept, session, write_graph
from registry import manifest
from registry.errors import PatchError
from registry.manifest import Manifest

PARITY = 1e-4
"""Largest difference between torch and ONNX Runtime in any coordinate of a unit embedding"""
TOWERS = ("image", "text")


class _Tower(nn.Module):
    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model(**{self.name: x})[f"{self.name}_features"]
        return features


def export_towers(
    base: Base, folder: Path, patch: Patch | None = None, *, system: str = "", parents: Sequence[str] = ()
) -> Manifest:
    """Write and seal both towers of `base` (float32, on a CPU), with `patch` at full strength if given.

    system, parents: provenance for the manifest. Raises PatchError if ONNX Runtime's results differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if patch is not None:
            stack.enter_context(patch.apply(base.model, root=base.root))
        for name in TOWERS:
            tower = _Tower(base.model, name).eval()
            write_graph(tower, _probe(base, name, 2), folder / f"{name}.onnx", "x", ["features"])
        _check_parity(folder, base)
    config = {"context": base.model.context_length, "image_size": list(base.processor.size)}
    return manifest.write(folder, kind="model", system=system, base=base.label, config=config, parents=list(parents))


def fold(about: Manifest, patch: Patch, base: Base, folder: Path) -> Manifest:
    """Write both towers with `patch` traced into their graphs to `folder`, check and seal them."""
    return export_towers(base, folder, patch, system=about.system, parents=[about.digest])


def prepared(
    base: Base, provider: str, patch: Patch | None = None, *, system: str = "", digest: str = "", threads: int = 0
) -> Towers:
    """Load the towers of `base`, with `patch` (of that digest) if given, from home()/exports, exported if missing.

    base: a copy without any hooks. An export takes some seconds. Raises as `export_towers` and `Towers`.
    """
    name = f"onnx-{base.digest[:16]}-{digest[:16] or 'base'}"
    parents = [digest] if digest else []
    folder = kept(name, base, lambda f: export_towers(base, f, patch, system=system, parents=parents))
    return Towers(folder, provider, threads)


class Towers:
    """An exported folder's towers, running in ONNX Runtime."""

    def __init__(self, folder: Path, provider: str = "cpu", threads: int = 0) -> None:
        """Load both graphs. provider: cpu or cuda; threads: per call, 0 for all cores.

        Raises NotReady if the provider is missing.
        """
        self.sessions = {name: session(folder / f"{name}.onnx", provider, threads) for name in TOWERS}

    def __call__(self, tower: str, x: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) or token ids (B, context) to unit features (B, k)."""
        return torch.from_numpy(self.sessions[tower].run(None, {"x": x.cpu().numpy()})[0])


def _probe(base: Base, tower: str, count: int) -> Tensor:
    random = torch.Generator().manual_seed(count)
    if tower == "image":
        return torch.randn(count, 3, *base.processor.size, generator=random)
    words = ["cat", "a dog on snow", "7", "the word pizza", "a photo of a big red bus"][:count]
    tokens: Tensor = base.processor.text(words)
    return tokens


@torch.inference_mode()
def _check_parity(folder: Path, base: Base) -> None:
    """Compare torch and ONNX Runtime at another batch size than was traced. Raises PatchError."""
    towers = Towers(folder)
    for name in TOWERS:
        x = _probe(base, name, 5)
        try:
            got = towers(name, x)
        except Exception as e:  # ONNX Runtime has its own exception type for each failure
            why = " ".join(str(e).split())[:200]
            raise PatchError(f"ONNX Runtime cannot run the traced {name} tower ({why}). Serve with torch.") from None
        worst = float((got - _Tower(base.model, name)(x)).abs().max())
        if not worst <= PARITY:  # written so that NaN fails, too
            raise PatchError(
                f"ONNX Runtime's {name} embeddings differ from torch's by {worst:.1e}; {PARITY:.0e} is allowed, so "
                "they were not sealed. Serve with torch."
            )


__all__ = ["PARITY", "TOWERS", "Towers", "check_provider", "export_towers", "fold", "prepared"]
