"""Runs VideoMAE in ONNX Runtime: bytes of clips in, last features and class scores out, one graph per checkpoint.

The graph is written from the base (with one patch at full strength in it, if given), kept in home()/exports, and must
answer as torch does (`PARITY`, of the largest number) at another batch size than was traced, or it is not kept.
Toto decodes token by token and runs in torch alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.engine.patch import Patch
from patches.families.base import Base
from patches.families.onnx import check_provider, kept, session, write_graph
from patches.families.video.model import MaskedVideo
from registry import manifest
from registry.errors import NotReady, PatchError
from registry.manifest import Manifest

PARITY = 1e-3
"""largest difference of a feature or score between torch and ONNX Runtime, as a part of the largest (or of 1)"""
FILE = "video.onnx"


class _Graph(nn.Module):
    """The part of a model that is traced."""

    def __init__(self, model: MaskedVideo) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> Any:
        out = self.model(clips=clips)
        last = out["states"][-1]
        return (last, out["scores"]) if out["scores"] is not None else (last,)


def export(base: Base, folder: Path, patch: Patch | None = None, *, parents: Sequence[str] = ()) -> Manifest:
    """Write, check and seal the graph of a VideoMAE. Raises PatchError for a Toto, or if parity is missed."""
    if not isinstance(base.model, MaskedVideo):
        raise PatchError(f"{base.name} decodes token by token, which is no one graph; it runs in torch.")
    folder.mkdir(parents=True, exist_ok=True)
    graph = _Graph(base.model).eval()
    with contextlib.ExitStack() as stack:
        if patch is not None:
            stack.enter_context(patch.apply(base.model, root=base.root))
        clips = _clips(base.model, 2)
        write_graph(graph, clips, folder / FILE, "clips", ["features", "scores"][: len(graph(clips))])
        _check(folder, graph, base.model)
    config = {"frames": base.model.frames, "image_size": base.model.size}
    return manifest.write(folder, kind="model", system="", base=base.label, config=config, parents=list(parents))


def prepared(base: Base, provider: str, patch: Patch | None = None, *, digest: str = "", threads: int = 0) -> Engine:
    """The engine of a base, or of one patch of that digest on it; written if it is not there. Raises as `export`."""
    if not isinstance(base.model, MaskedVideo):
        raise NotReady(f"{base.name} is a Toto, which runs in torch alone. Leave PATCHBAY_PROVIDER out.")
    name = f"video-{base.digest[:16]}-{digest[:16] or 'base'}"
    folder = kept(name, base, lambda f: export(base, f, patch, parents=[digest] if digest else []))
    return Engine(folder, provider, threads)


class Engine:
    """An exported graph in ONNX Runtime."""

    def __init__(self, folder: Path, provider: str = "cpu", threads: int = 0) -> None:
        self.session = session(folder / FILE, provider, threads)

    def __call__(self, clips: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bytes (b, T, 3, R, R) -> last features (b, N, d), and class scores (b, C) or None."""
        got = self.session.run(None, {"clips": clips.cpu().numpy()})
        return torch.from_numpy(got[0]), torch.from_numpy(got[1]) if len(got) > 1 else None


def _clips(model: MaskedVideo, count: int) -> Tensor:
    g = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, model.frames, 3, model.size, model.size), generator=g, dtype=torch.uint8)


@torch.inference_mode()
def _check(folder: Path, graph: _Graph, model: MaskedVideo) -> None:
    engine, clips = Engine(folder), _clips(model, 5)
    for name, want, got in zip(("features", "scores"), graph(clips), engine(clips), strict=False):
        assert got is not None
        worst = float((got - want.float()).abs().max()) / max(1.0, float(want.abs().max()))
        if not worst <= PARITY:  # also if it is NaN
            raise PatchError(
                f"ONNX Runtime's {name} differ from torch's by {worst:.1e} of the largest; {PARITY:.0e} is allowed, so "
                "the graph was not kept. Serve with torch."
            )


__all__ = ["PARITY", "Engine", "check_provider", "export", "prepared"]
