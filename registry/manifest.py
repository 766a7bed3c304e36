"""An artifact is a folder of data files plus manifest.json, which is written last.

So a folder with a manifest is complete, and the manifest's digest names the artifact: it covers the
config, the base, the parents, the tensors' names, types and shapes, and the sha256 of every file.
What may change later (aliases, metrics, benchmarks) is the store's, never the manifest's.

`read` trusts nothing: no links, no path that leaves the folder, no unlisted file, no header larger
than an honest one, every byte hashed. It needs no torch: the tensor header of a safetensors file is
eight bytes of length and that much JSON (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from registry.errors import BadArtifact, ConfigError, Linked, Odd, Outside, Oversize, Tampered, Unsealed, WrongBase

NAME = "manifest.json"
Kind = Literal["patch", "model", "search", "finding", "report"]
"""a finding is something to read, and was called report in schema 1"""
SCHEMA = 2
ROLE = "base"
"""the role of the one base that most artifacts have"""
DIGEST = re.compile(r"[0-9a-f]{64}")

MAX_MANIFEST_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
"""Bytes that the header of one safetensors file may have; a 70B checkpoint's index is under 1 MiB"""
MAX_FILES = 4096


@dataclass(frozen=True)
class Manifest:
    """What an artifact is. Equal manifests are the same artifact, wherever the folder lies."""

    kind: Kind
    system: str
    bases: dict[str, str]
    """role -> name@digest of the models this was made from; empty for a model trained from nothing"""
    config: dict[str, Any]
    files: dict[str, str]
    """relative path -> sha256"""
    tensors: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """safetensors path -> tensor name -> [dtype, shape]"""
    parents: list[str] = field(default_factory=list)
    """digests of the artifacts this one was made from: an SAE, a subspace, a data set"""
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """64 hex digits: the identity of the artifact."""
        return digest_of(self.plain())

    @property
    def base(self) -> str:
        """name@digest of the base that patches go on; of the first role where there are several; "" if none."""
        return self.bases.get(ROLE) or next(iter(self.bases.values()), "")

    @property
    def base_digest(self) -> str:
        """64 hex digits of that base."""
        return self.base.rpartition("@")[2]

    def plain(self) -> dict[str, Any]:
        """What manifest.json says. Schema 1 knew one base; its words are kept, for the digest is over them."""
        out = asdict(self)
        if self.schema == 1:
            out["base"] = out.pop("bases").get(ROLE, "")
        return out


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, finite numbers only.

    Raises ConfigError for NaN or infinity, and for what JSON cannot say.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as e:
        raise ConfigError(f"This cannot be sealed: {e}. Use finite numbers, text, lists and dicts.") from None


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def write(folder: Path, **about: Any) -> Manifest:
    """Seal `folder`: hash what is in it, then put the manifest there in one rename.

    about: fields of `Manifest`; `base` in place of `bases` where there is one base.
    """
    names = _walk(folder)
    said = json.loads(canonical(about))
    base = said.pop("base", "")
    said.setdefault("bases", {ROLE: base} if base else {})
    # the oldest schema that can say it, so that what was sealed before is the same artifact when it is made again
    old = said["bases"].keys() <= {ROLE} and said["kind"] in ("patch", "model", "report")
    manifest = Manifest(
        files={name: sha256(folder / name) for name in names},
        tensors={name: _tensors(folder / name) for name in names if name.endswith(".safetensors")},
        **{"schema": 1 if old else SCHEMA, **said},
    )
    part = folder / f".{NAME}.part"
    with part.open("wb") as f:
        f.write(canonical(manifest.plain()))
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, folder / NAME)
    return manifest


def read(folder: Path, *, digest: str | None = None, base: str | None = None) -> Manifest:
    """The manifest of a sealed folder, after checking every file against it.

    `digest`: the artifact it must be. `base`: the digest of the base it is to be used on.
    """
    folder = Path(folder)
    manifest = parse(folder)
    if digest is not None and manifest.digest != digest:
        raise Tampered(
            f"{folder} holds artifact {manifest.digest[:16]}, not {digest[:16]}: its manifest was swapped. "
            "Pull it again."
        )
    if base is not None and manifest.base and not same_base(manifest.base_digest, base):
        raise WrongBase(
            f"{folder} was made from {manifest.base[:80]}, not from base {base[:16]}. Fit it again on this base."
        )
    present = set(_walk(folder))
    if extra := sorted(present - manifest.files.keys()):
        raise Tampered(f"{folder / extra[0]} was not sealed with the artifact. Remove it or pull the artifact again.")
    for name, want in manifest.files.items():
        file = folder / name
        if name not in present:
            kind = "is a folder now" if os.path.isdir(file) else "is missing"  # Path.is_dir raises for a name too long
            raise Tampered(f"{file} was sealed and {kind}. Pull the artifact again.")
        if (have := sha256(file)) != want:
            size = file.stat().st_size
            raise Tampered(
                f"{file} is not what was sealed: {size} bytes of sha256 {have[:16]}, not {want[:16]}. "
                "Pull the artifact again."
            )
        if name.endswith(".safetensors") and _tensors(file) != manifest.tensors.get(name):
            raise Tampered(f"{file} holds other tensors than its manifest lists. Pull the artifact again.")
    return manifest


def parse(folder: Path) -> Manifest:
    """The manifest of a folder as it stands, its files not looked at. Raises as `read` does."""
    file = folder / NAME
    if file.is_symlink():
        raise Linked(f"{file} is a symbolic link; artifacts are plain files. Pull the artifact again.")
    try:
        _check_plain(file)
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise Oversize(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes; no manifest is.")
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Unsealed(f"{folder} has no {NAME}: it was never sealed. Run the fit again.") from None
    except OSError as e:
        raise Tampered(f"{file} cannot be read ({e.strerror}). Pull the artifact again.") from None
    about = _json(file, raw)
    schema = about.get("schema", 1)
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise Tampered(f"{file} says schema {str(schema)[:40]!r}; it must be a number up to {SCHEMA}.")
    if schema > SCHEMA:
        raise Tampered(f"{file} is of schema {schema}, and this patchbay reads up to {SCHEMA}. Update patchbay.")
    key = "base" if schema == 1 else "bases"
    known = {f.name for f in fields(Manifest)} - {"bases"} | {key}
    for name in ("kind", "system", key, "config", "files"):
        if name not in about:
            raise Tampered(f"{file} of schema {schema} says nothing of {name!r}. Pull the artifact again.")
    if more := sorted(set(about) - known):
        raise Tampered(f"{file} says {more[0][:40]!r}, which no manifest of schema {schema} does. Update patchbay.")
    if schema == 1:
        about = {**about, "bases": {ROLE: about["base"]} if about["base"] else {}, "schema": 1}
        del about["base"]
    manifest = Manifest(**about)
    _check_types(file, manifest)
    for name in manifest.files:
        _inside(folder, name)
    listed = {n for n in manifest.files if n.endswith(".safetensors")}
    if odd := sorted(manifest.tensors.keys() - listed):
        raise Tampered(f"{file} lists tensors of {odd[0][:80]!r}, but no such file. Pull the artifact again.")
    if odd := sorted(listed - manifest.tensors.keys()):
        have = f"those of {len(manifest.tensors)} others" if "tensors" in about else "no tensors at all"
        raise Tampered(f"{file} lists {odd[0][:80]!r} and not its tensors, but {have}. Pull the artifact again.")
    return manifest


def _json(file: Path, raw: bytes) -> dict[str, Any]:
    """The object that a manifest's bytes say. Raises Tampered telling where they stop being one."""
    if not raw.strip():
        raise Tampered(f"{file} is empty. Pull the artifact again.")
    try:
        about = json.loads(raw, parse_constant=_refuse_constant)
    except UnicodeDecodeError as e:
        raise Tampered(f"{file} is no UTF-8 from byte {e.start} on. Pull the artifact again.") from None
    except json.JSONDecodeError as e:
        raise Tampered(f"{file} is no JSON from character {e.pos} on ({e.msg}). Pull the artifact again.") from None
    except RecursionError:
        raise Tampered(f"{file} nests deeper than any manifest. Pull the artifact again.") from None
    except ValueError as e:
        raise Tampered(f"{file}: {e}. Pull the artifact again.") from None
    if not isinstance(about, dict):
        raise Tampered(
            f"{file} holds a {type(about).__name__}, where a manifest is an object. Pull the artifact again."
        )
    return about


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is a number that no manifest has")


def _check_types(file: Path, manifest: Manifest) -> None:
    """Raises Tampered naming the first field that is of another type than a manifest's, and its value."""
    if manifest.kind not in get_args(Kind):
        raise Tampered(f"{file} says kind {str(manifest.kind)[:40]!r}; it must be one of {', '.join(get_args(Kind))}.")
    for name in ("bases", "config", "files", "tensors"):
        if not isinstance(part := getattr(manifest, name), dict):
            raise Tampered(f"{file}: {name} must be an object, not {str(part)[:40]!r}.")
    if not isinstance(manifest.parents, list):
        raise Tampered(f"{file}: parents must be a list, not {str(manifest.parents)[:40]!r}.")
    texts = [("system", manifest.system), *((f"files, {n[:40]!r}", d) for n, d in manifest.files.items())]
    texts += [(f"bases, {role[:40]!r}", base) for role, base in manifest.bases.items()]
    for name, text in [*texts, *(("parents", p) for p in manifest.parents)]:
        if not isinstance(text, str):
            raise Tampered(f"{file}: {name} must be a text, not {str(text)[:40]!r}.")


def _check_plain(file: Path) -> None:
    """Raises Odd for what is neither a file nor missing: reading a pipe would wait for ever."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise Odd(f"{file} is {kind} where a file should be. Pull the artifact again.")


def _inside(folder: Path, name: str) -> None:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\\" in name or "\0" in name:
        raise Outside(f"{folder} lists {name[:80]!r}, which lies outside it.")


def _walk(folder: Path) -> list[str]:
    """Relative names of every file but the manifest, sorted; links are refused, also to folders."""
    names = []
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(at) / name
            if path.is_symlink():
                raise Linked(f"{path} is a symbolic link; artifacts are plain files. Copy the file in its place.")
        for name in files:
            _check_plain(Path(at, name))
        names += [Path(at, f).relative_to(folder).as_posix() for f in files]
        if len(names) > MAX_FILES:
            raise Oversize(f"{folder} holds more than {MAX_FILES} files; no artifact does.")
    return sorted(set(names) - {NAME, f".{NAME}.part"})


def _tensors(file: Path) -> dict[str, list[Any]]:
    """name -> [dtype, shape] from the header of a safetensors file, its sizes checked against the file's."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > MAX_HEADER_BYTES or length + 8 > size:
            most = max(0, min(MAX_HEADER_BYTES, size - 8))
            raise Oversize(f"{file} claims a header of {length} bytes; the limit is {most}.")
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError):
            raise Tampered(f"{file} has no readable safetensors header.") from None
    try:
        return _listed(file, header, size - length - 8)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise Tampered(f"{file}: its safetensors header is not one ({type(e).__name__}: {str(e)[:60]}).") from None


def _listed(file: Path, header: dict[str, Any], room: int) -> dict[str, list[Any]]:
    header.pop("__metadata__", None)
    end = 0
    out = {}
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = about["data_offsets"]
        if start != end or stop < start or any(n < 0 for n in about["shape"]) or not math.isfinite(stop):
            raise Tampered(f"{file}: the bytes of {name[:80]!r} do not follow the ones before.")
        end = stop
        out[name] = [about["dtype"], about["shape"]]
    if end != room:
        raise Tampered(f"{file} has {room} bytes of tensors, but its header accounts for {end}.")
    return out


def take(folder: Path, about: Manifest, name: str) -> bytes:
    """A sealed file's bytes, which are the ones that were hashed: nobody can swap the file between check and use.

    Raises Tampered if they are not what was sealed, or were not sealed at all.
    """
    try:
        raw = (Path(folder) / name).read_bytes()
    except OSError as e:
        raise Tampered(f"{folder}/{name} cannot be read ({e.strerror}). Pull the artifact again.") from None
    if hashlib.sha256(raw).hexdigest() != about.files.get(name):
        raise Tampered(f"{folder}/{name} is not what was sealed. Pull the artifact again.")
    return raw


def sha256(file: Path) -> str:
    """64 hex digits of a file's bytes."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def is_digest(text: str) -> bool:
    return DIGEST.fullmatch(text) is not None


__all__ = ["BadArtifact", "Manifest", "canonical", "digest_of", "is_digest", "read", "sha256", "take", "write"]


# ---- bases --------------------------------------------------------------------------------------------------------


_EQUAL: dict[str, set[str]] = {}
"""digest that an earlier release gave to a base -> digests of those bases that this process has loaded"""


def equal_bases(digest: str, former: Iterable[str]) -> None:
    """Let artifacts that name one of the `former` digests of a base belong to the base of `digest`."""
    for old in former:
        _EQUAL.setdefault(old, set()).add(digest)


def same_base(sealed: str, have: str) -> bool:
    """Whether an artifact made from the base of digest `sealed` belongs to the loaded base of digest `have`."""
    return sealed == have or have in _EQUAL.get(sealed, ())


def split_dtype(ref: str) -> tuple[str, str]:
    """A base's reference without its dtype, and the rest: "pypi:smollm2?dtype=bf16" -> ("pypi:smollm2", "?dtype=bf16").
    The rest is empty where none is asked for."""
    bare, mark, dtype = ref.rpartition("?dtype=")
    return (bare, mark + dtype) if mark else (ref, "")
