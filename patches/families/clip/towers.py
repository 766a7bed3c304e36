"""CLIP's two towers for ONNX Runtime: a base as it is, or with one patch traced into its graphs.

A folder holds image.onnx, (B, 3, H, W) -> (B, k), and text.onnx, (B, context) ids -> (B, k): unit features, B free.
What is written is run at once and must answer as torch does (`PARITY`), so a folder that is sealed was checked.
An edit that runs on every row traces as it stands; weight edits are in the weights. Rows of one batch cannot name arms.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.engine.patch import Patch
from patches.families.base import Base, check_device
from registry import manifest
from registry.errors import NotReady, PatchError
from registry.home import home
from registry.manifest import Manifest

PARITY = 1e-4
"""the largest difference of a number of a unit embedding between torch and ONNX Runtime"""
TOWERS = ("image", "text")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MAX_INLINE_BYTES = 3 << 29
"""a protobuf file ends at 2 GiB; larger weights lie beside their graph"""


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

    system, parents: what the manifest says made this. Raises PatchError if ONNX Runtime answers differently.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if patch is not None:
            stack.enter_context(patch.apply(base.model, root=base.root))
        for name in TOWERS:
            tower = _Tower(base.model, name).eval()
            _write(tower, _probe(base, name, 2), folder / f"{name}.onnx")
        _check_parity(folder, base)
    config = {"context": base.model.context_length, "image_size": list(base.processor.size)}
    return manifest.write(folder, kind="model", system=system, base=base.label, config=config, parents=list(parents))


def fold(about: Manifest, patch: Patch, base: Base, folder: Path) -> Manifest:
    """Both towers with `patch` traced into their graphs, written to `folder`, checked and sealed."""
    return export_towers(base, folder, patch, system=about.system, parents=[about.digest])


def prepared(
    base: Base, provider: str, patch: Patch | None = None, *, system: str = "", digest: str = "", threads: int = 0
) -> Towers:
    """The towers of `base`, with `patch` (of that digest) in them if given: kept in home()/exports, written if missing.

    base: a copy nobody has hooks on. Takes some seconds the first time. Raises as `export_towers` and `Towers`.
    """
    folder = home() / "exports" / f"onnx-{base.digest[:16]}-{digest[:16] or 'base'}"
    if folder.exists():
        manifest.read(folder, base=base.digest)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
            export_towers(base, Path(part) / "towers", patch, system=system, parents=[digest] if digest else [])
            with contextlib.suppress(OSError):  # another process was first, with the same
                (Path(part) / "towers").rename(folder)
    return Towers(folder, provider, threads)


def check_provider(provider: str) -> None:
    """Raises NotReady for a provider that ONNX Runtime or this machine does not have."""
    import onnxruntime as ort

    known = ort.get_available_providers()
    if PROVIDERS.get(provider) not in known:
        raise NotReady(
            f"ONNX Runtime has no provider {provider[:20]!r} here. It has: {', '.join(known)}. Declare cpu or cuda."
        )
    if provider == "cuda":
        check_device("cuda")


class Towers:
    """The towers of an exported folder in ONNX Runtime."""

    def __init__(self, folder: Path, provider: str = "cpu", threads: int = 0) -> None:
        """provider: cpu or cuda; threads: of one call, 0 for all cores. Raises NotReady if the provider is missing."""
        import onnxruntime as ort

        check_provider(provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.sessions = {
            name: ort.InferenceSession(folder / f"{name}.onnx", options, providers=[PROVIDERS[provider]])
            for name in TOWERS
        }
        for session in self.sessions.values():  # a provider that fails to start is replaced without a word
            if session.get_providers()[0] != PROVIDERS[provider]:
                raise NotReady(f"ONNX Runtime could not start {PROVIDERS[provider]}. Declare cpu.")

    def __call__(self, tower: str, x: Tensor) -> Tensor:
        """(B, k) unit features of images (B, 3, H, W) or token ids (B, context)."""
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
    """At another batch size than was traced."""
    towers = Towers(folder)
    for name in TOWERS:
        x = _probe(base, name, 5)
        try:
            got = towers(name, x)
        except Exception as e:  # ONNX Runtime's own kinds, one for each way to fail
            why = " ".join(str(e).split())[:200]
            raise PatchError(f"ONNX Runtime cannot run the traced {name} tower ({why}). Serve with torch.") from None
        worst = float((got - _Tower(base.model, name)(x)).abs().max())
        if not worst <= PARITY:  # also if it is NaN
            raise PatchError(
                f"ONNX Runtime's {name} embeddings differ from torch's by {worst:.1e}; {PARITY:.0e} is allowed, so "
                "they were not sealed. Serve with torch."
            )


def _write(tower: nn.Module, x: Tensor, file: Path) -> None:
    import onnx

    large = sum(p.nbytes for p in tower.parameters()) > MAX_INLINE_BYTES
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            tower,
            (x,),
            file,
            dynamo=True,
            input_names=["x"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=large,
            verbose=False,
        )
    # the exporter notes in every node where on this machine its code lies; that is nobody's business
    model: Any = onnx.load(file, load_external_data=False)
    for part in (model.graph, *model.functions):
        for node in part.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
        part.ClearField("metadata_props")
        for value in part.value_info:
            value.ClearField("metadata_props")
    model.ClearField("metadata_props")
    onnx.save(model, file)
