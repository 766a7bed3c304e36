"""What others made comes in: a folder or file is told for what it is, and adapters and vectors become sealed patches.

    look(place)             -> what it is and what to do with it, whatever lies there; nothing large is read
    bring(place, base, ...) -> a peft adapter, a LoRA of diffusers or steering vectors as a sealed folder of the system
                               `added_<family>`, which is pushed, served and compared like any other
    send(folder, out)       -> the same in the layout it came in; dictionaries in SAELens'

Steering vectors are a safetensors file of one vector per layer, whose keys end in the layer's number or name a block
("direction.12", "12", "model.layers.12", "blocks.12.hook_resid_post"); what is added enters after that block.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patches import artifact
from patches.adapters import DIFFUSERS, PEFT, PEFT_CONFIG, Adapter, read_adapter, write_adapter
from patches.checkpoints import check_fetched, check_files, check_whole, json_object, reading
from patches.families.base import Base, load_base
from patches.families.family import families, family
from patches.mechanisms.added import AddedConfig, AddedEdit
from patches.sae_files import ABOUT, SCOPE, WEIGHTS, load_sae
from registry import manifest
from registry.errors import BadArtifact, Conflict, NotFound, PatchbayError, PatchError
from registry.manifest import Manifest
from registry.systems import IMPORTS

VECTORS = "vectors.safetensors"
LAYER = re.compile(r"^(?:.*[._])?(\d{1,4})(?:\.hook_resid_post|\.weight)?$")
SAE = "sae"
"""folder of an artifact with its dictionary"""


@dataclass(frozen=True)
class Found:
    """What a folder or file is."""

    kind: str
    """artifact, adapter, vectors, dictionary, model, gguf"""
    text: str
    """for people: what it is, and what to do with it"""
    reference: str = ""
    """Reference of a model, as `base=` takes it"""
    family: str = ""
    """Family of a model"""


def look(place: Path) -> Found:
    """What lies at `place`. Raises NotFound or BadArtifact, in one line with the way out, for what is damaged or
    unknown."""
    if place.is_file():
        return _file(place)
    if not place.is_dir():
        raise NotFound(f"There is nothing at {place}.")
    sealed = manifest.read(place) if (place / manifest.NAME).is_file() else None
    # converted bases are sealed, and no system's; a shipped dictionary lies where a patch has none
    if sealed is not None and sealed.system and not (place / WEIGHTS).is_file():
        return Found("artifact", f"a sealed {sealed.kind} of {sealed.system}, sha256:{sealed.digest[:16]}. Next: "
                     f"patchbay push {place}")  # fmt: skip
    check_files(place)
    if (place / PEFT_CONFIG).is_file() or (place / DIFFUSERS).is_file():
        return _adapter(place)
    if (place / SCOPE).is_file() or (place / WEIGHTS).is_file():
        sae = load_sae(place)
        (F, D), at = sae.decoder.shape, f" at {sae.site}" if sae.site else ""
        what = f"a sparse autoencoder of {F:,} {sae.activation} features of width {D}{at}"
        return Found("dictionary", f"{what}. Next: patchbay fit clip_sae dictionary={place}")
    refused: PatchbayError | None = None
    for name in families():
        try:
            told = family(name).knows(place)
        except PatchbayError as e:  # a Toto's network is a Llama without a tokenizer: only its own family tells
            refused = refused or e
            continue
        if told:
            ref = f"local-dir:{place}"
            return Found("model", f"a base of the family {name}: {told}. Next: base={ref}", ref, name)
    if refused is not None:
        raise refused
    if ggufs := sorted(place.glob("*.gguf")):
        return _file(ggufs[0])
    if tensors := sorted(place.glob("*.safetensors")):
        return _file(tensors[0])
    config = json_object(place / "config.json") if (place / "config.json").is_file() else {}
    if kind := config.get("model_type") or config.get("architectures"):
        raise NotFound(f"{place} is a model of type {str(kind)[:60]!r}, which no family here reads.")
    if deeper := sorted({f.parent for f in place.glob("*/*") if f.suffix in (".safetensors", ".gguf", ".json")}):
        raise NotFound(f"{place} holds folders and nothing that is known. Name one of them: {deeper[0]}")
    raise NotFound(f"{place} holds nothing that is known: no model, adapter, dictionary or artifact.")


def _file(file: Path) -> Found:
    check_fetched(file)
    if file.suffix == ".gguf":
        with file.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise NotFound(f"{file} is no GGUF file: it does not begin with GGUF. Get it again.")
        return Found("gguf", f"a GGUF file, dequantised once when it is read. Next: base=gguf:{file}", f"gguf:{file}")
    if file.suffix != ".safetensors":
        raise NotFound(f"{file} is no file that is read. Give a folder, or a .safetensors or .gguf file.")
    check_whole(file)
    keys = _keys(file)
    if any(".lora_A" in k for k in keys):
        return _adapter(file)
    if keys and all(LAYER.match(k) for k in keys) and all(len(shape) == 1 for shape in keys.values()):
        return Found("vectors", f"steering vectors of {len(keys)} layers, width {next(iter(keys.values()))[0]}. Next: "
                     f"patchbay import {file} base=REF")  # fmt: skip
    first = next(iter(keys), "none")[:60]
    raise NotFound(f"{file} holds {len(keys)} tensors ({first} ...): no adapter, vectors or dictionary that is known.")


def _adapter(place: Path) -> Found:
    about = json_object(place / PEFT_CONFIG) if (place / PEFT_CONFIG).is_file() else {}
    kind = str(about.get("peft_type", "LORA"))
    if kind != "LORA" or about.get("use_dora"):
        kind = "DoRA" if about.get("use_dora") else kind
        raise NotFound(
            f"{place} is an adapter of type {kind[:20]!r}; LoRA alone is read. Merge it into its base with peft, and "
            "use that."
        )
    adapter = read_adapter(place)
    of = about.get("base_model_name_or_path")
    return Found("adapter", f"a LoRA adapter of {len(adapter.factors)} modules, rank {adapter.rank}"
                 f"{f', of {of}' if of else ''}. Next: patchbay import {place} base=REF")  # fmt: skip


def _keys(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with reading(str(file)), safe_open(file, "pt") as f:
        return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118


# ---- in -----------------------------------------------------------------------------------------------------------


def bring(place: Path, ref: str, out: Path, kind: str = "", amount: float = 1.0) -> Manifest:
    """Seal an adapter or vectors at `place` for the base `ref` as a patch in the folder `out`.

    kind: family of the base; by default the first that reads it and has the modules. Raises NotFound for what is
    neither, BadArtifact for what is another base's, Conflict if `out` exists.
    """
    found = look(place)
    if found.kind not in ("adapter", "vectors"):
        raise NotFound(f"{place} is {found.text}")
    if out.exists():
        raise Conflict(f"{out} exists already. Name another --out.")
    names = [kind] if kind else [row.family for row in IMPORTS.values()]
    why = ""
    for name in names:
        if not any(row.family == name for row in IMPORTS.values()):
            raise NotFound(
                f"Nothing is added to {name} bases; to {', '.join(r.family for r in IMPORTS.values())} it is."
            )
        try:
            base = load_base(ref, name)
        except NotFound as e:
            why = why or str(e)
            continue
        patch = added(place, base, amount) if found.kind == "adapter" else vectors(place, base, amount)
        with patch.apply(base.model, root=base.root):
            pass  # every site is one of the base's
        row = next(row for row in IMPORTS.values() if row.family == name)
        return artifact.save(patch, row.name, out, base=base.label)
    raise NotFound(why or f"{ref[:80]!r} is read by none of {', '.join(names)}.")


def added(place: Path, base: Base, amount: float = 1.0) -> AddedEdit:
    """A LoRA adapter as a patch of `base`. Raises BadArtifact unless every module is one of its own with fitting
    shapes."""
    with reading(str(place)):
        adapter = read_adapter(place)
    own = dict(base.model.named_modules())
    pairs = {_own(own, name, place): (a, amount * b) for name, (a, b) in adapter.factors.items()}
    Adapter(pairs).check(base.model, str(place))
    tensors = {f"{side}.{site}": x for site, (a, b) in pairs.items() for side, x in (("a", a), ("b", b))}
    made = "peft" if (place / PEFT_CONFIG).is_file() else "diffusers"
    return AddedEdit(AddedConfig(factors=tuple(sorted(pairs)), made=made), tensors)


def _own(modules: Mapping[str, nn.Module], name: str, place: Path) -> str:
    """The module path of `base` that an adapter's `name` means, whatever its library calls the root."""
    for path in (name, f"model.{name}", f"denoiser.{name}"):
        if path in modules:
            return path
    raise BadArtifact(f"{place} changes {name[:80]!r}, which this base does not have; it is another base's.")


def vectors(place: Path, base: Base, amount: float = 1.0) -> AddedEdit:
    """Steering vectors as a patch of `base`. Raises BadArtifact for a layer or a width that is not the base's."""
    file = place if place.is_file() else next(iter(sorted(place.glob("*.safetensors"))))
    pattern = family(base.family).sites.get("block")
    if pattern is None:
        raise PatchError(f"{base.family} bases have no blocks that a vector could be added to.")
    own, tensors = dict(base.model.named_modules()), {}
    with reading(str(file)):
        held = load_file(file)
    for key, v in held.items():
        found = LAYER.match(key)
        site = pattern.format(i=int(found[1])) if found else ""
        if site not in own:
            raise BadArtifact(f"{file}: {key[:60]!r} names no layer of this base.")
        tensors[f"v.{site}"] = v.float()
    width = base.model.config.get_text_config().hidden_size if hasattr(base.model.config, "get_text_config") else None
    if odd := [k for k, v in tensors.items() if width is not None and v.shape != (width,)]:
        raise BadArtifact(f"{file}: the vector of {odd[0][2:]} has {len(tensors[odd[0]])} numbers, this base {width}.")
    sites = tuple(sorted(k[2:] for k in tensors))
    return AddedEdit(AddedConfig(vectors=sites, amount=amount, made="vectors"), tensors)


# ---- out ----------------------------------------------------------------------------------------------------------


def send(folder: Path, out: Path) -> str:
    """Write what a sealed patch adds in the layout that others read; says which. Raises PatchError for a patch that no
    other library knows, Conflict if `out` exists."""
    if out.exists():
        raise Conflict(f"{out} exists already. Name another --out.")
    about: Any = manifest.read(folder)
    if (folder / SAE / ABOUT).is_file() and (folder / SAE / WEIGHTS).is_file():
        out.mkdir(parents=True)
        for name in (ABOUT, WEIGHTS):
            shutil.copyfile(folder / SAE / name, out / name)
        return "a dictionary in SAELens' layout"
    if about.kind == "patch":
        _, patch = artifact.load(folder)
        if isinstance(patch, AddedEdit) and patch.config.vectors:
            out.mkdir(parents=True)
            kept: dict[str, Tensor] = {}
            for site in patch.config.vectors:
                layer = re.findall(r"\.(\d+)", site)[-1]
                kept[f"direction.{layer}"] = patch.config.amount * patch.tensors[f"v.{site}"]
            save_file(kept, out / VECTORS)
            return "steering vectors, direction.<layer>"
        pairs = patch.pairs() if isinstance(patch, AddedEdit) else getattr(patch, "factors", dict)()
        if pairs:
            write_adapter(Adapter({k.removeprefix("denoiser."): v for k, v in pairs.items()}), out)
            return f"a LoRA adapter as peft ({PEFT}) and as diffusers ({DIFFUSERS}) write it"
    raise PatchError(f"sha256:{about.digest[:16]} of {about.system} is nothing that another library reads. Fold it: "
                     "patchbay export REF")  # fmt: skip
