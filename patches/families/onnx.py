"""What every family needs of ONNX Runtime: providers, sessions, writing a graph, and keeping what was written."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patches.families.base import Base, check_device
from registry import manifest
from registry.errors import NotReady
from registry.home import home, part_prefix, swept

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MAX_INLINE_BYTES = 3 << 29
"""Bytes of weights that lie within their graph; a protobuf file ends at 2 GiB, so larger ones lie beside it"""


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


def session(file: Path, provider: str = "cpu", threads: int = 0) -> Any:
    """An onnxruntime.InferenceSession of a graph. provider: cpu or cuda; threads: of one call, 0 for all cores.

    Raises NotReady if the provider is missing or does not start.
    """
    import onnxruntime as ort

    check_provider(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    made = ort.InferenceSession(file, options, providers=[PROVIDERS[provider]])
    if made.get_providers()[0] != PROVIDERS[provider]:  # ONNX Runtime replaces it without a word
        raise NotReady(f"ONNX Runtime could not start {PROVIDERS[provider]}. Declare cpu.")
    return made


def kept(name: str, base: Base, write: Callable[[Path], Any]) -> Path:
    """The sealed folder home()/exports/<name> of `base`; write(folder) makes and seals it where it is missing."""
    folder = home() / "exports" / name
    if folder.exists():
        manifest.read(folder, base=base.digest)
        return folder
    with tempfile.TemporaryDirectory(dir=swept(folder.parent), prefix=part_prefix()) as part:
        write(Path(part) / "made")
        with contextlib.suppress(OSError):  # another process was first, with the same
            (Path(part) / "made").rename(folder)
    return folder


def write_graph(module: nn.Module, x: Tensor, file: Path, takes: str, gives: Sequence[str]) -> None:
    """Trace module(x) into an ONNX graph whose first dimension is free. takes, gives: names of input and outputs."""
    import onnx

    large = sum(p.nbytes for p in module.parameters()) > MAX_INLINE_BYTES
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            module, (x,), file, dynamo=True, input_names=[takes], output_names=list(gives),
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=large, verbose=False,
        )  # fmt: skip
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
