"""What a Bento is made of, for those who must answer for it: bill of materials, licences, hashes, signatures.

Written beside a Bento: `sbom.cdx.json` (CycloneDX), `licences.json`, `requirements.hashed.txt` if hashes are asked for,
which then stand in the Bento's own requirements, too, so that its image installs those bytes or none. The Dockerfile is
held to a user without rights, a base image by digest where one is named, and a root that may be read only; `check` says
which of that a Dockerfile does not keep.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from registry import manifest, signing
from registry.errors import ConfigError, PatchbayError

IMAGE_VARIABLE = "PATCHBAY_IMAGE"
BY_DIGEST = re.compile(r"[\w./:-]+@sha256:[0-9a-f]{64}")
UNKNOWN = "unknown"
HASHES_S = 900.0
"""Longest wait in seconds for an index's hashes; a hundred packages take a minute or two"""
REPORT = "report.json"
"""what pip says, while it is read"""


def base_image(usual: str) -> str:
    """The image of a Bento: PATCHBAY_IMAGE, which must name a digest, else `usual`. Raises ConfigError."""
    named = os.environ.get(IMAGE_VARIABLE, "")
    if named and not BY_DIGEST.fullmatch(named):
        raise ConfigError(
            f"{IMAGE_VARIABLE}={named[:80]!r} names no digest, so what it means may change: name@sha256:<64 digits>."
        )
    return named or usual


def carry_signatures(context: Path, digests: Iterable[str], known: Callable[[str], Sequence[Path]]) -> bool:
    """Copy artifacts' bundles into a Bento's source, as signatures/<digest>/. Returns whether there are any.

    known: digest -> its bundles. What nobody believed has signed is found by the caller (`registry.signing.require`).
    """
    found = {digest: list(known(digest)) for digest in digests}
    for digest, bundles in found.items():
        for bundle in bundles:
            place = context / signing.CARRIED / digest
            place.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle, place / bundle.name)
    return any(found.values())


def known(digest: str) -> Sequence[Path]:
    """An artifact's bundles on this host, else those that the store has."""
    found = signing.bundles(digest)
    if not found:
        with contextlib.suppress(PatchbayError):
            store = importlib.import_module("registry.store")
            found = store.kept_files(digest, "signatures", signing.place(digest))
    return found


def write(folder: Path, with_hashes: bool = False, installs: Path | None = None) -> list[Path]:
    """Write bill of materials and licences of the Bento whose contents.json is in `folder`; returns the files.

    with_hashes: also the requirements with the index's hashes. installs: the requirements file that the image installs,
    which gets them, too. Raises ConfigError as `sbom` and `hashed`.
    """
    facts = json.loads((folder / "contents.json").read_text())
    requirements = [r for r in facts["requirements"] if "==" in r]
    made = {
        "sbom.cdx.json": sbom(facts["tag"], facts["artifact"], facts["base"], requirements),
        "licences.json": json.dumps(licence_list(requirements), indent=1),
    }
    if with_hashes:
        made["requirements.hashed.txt"] = "\n".join(hashed(requirements, folder)) + "\n"
        if installs is not None:
            installs.write_text(made["requirements.hashed.txt"])
    for name, text in made.items():
        (folder / name).write_text(text)
    return [folder / name for name in made]


def plain(requirements: Iterable[str]) -> list[str]:
    """The same lines without hashes; empty ones are left out."""
    return [line for r in requirements if (line := r.partition(" --hash=")[0].strip())]


def distributions(requirements: Iterable[str]) -> list[metadata.Distribution]:
    """The installed distributions of `name==version` lines; those that are not installed here are left out."""
    found = []
    for line in requirements:
        name, _, version = line.strip().partition("==")
        try:
            one = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if one.version.partition("+")[0] == version:
            found.append(one)
    return found


def licence(one: metadata.Distribution) -> str:
    """What a distribution says of its licence: an SPDX expression, its classifiers, its field; else UNKNOWN."""
    about = one.metadata
    expressions = about.get_all("License-Expression") or ()
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    # the field is free text, and may be a copyright's first line or a whole licence
    fields = [line for text in about.get_all("License") or () if (line := text.strip().partition("\n")[0])]
    said = [*expressions, ", ".join(c for c in classifiers if c != "OSI Approved"), *fields]
    return next((text[:120] for text in said if text), UNKNOWN)


def sbom(tag: str, artifact: str, base: str, requirements: Sequence[str]) -> str:
    """CycloneDX 1.6 as JSON: the Bento, its artifact and base (name@digest), each pinned distribution with licence.

    Raises ConfigError without the library.
    """
    try:
        model = importlib.import_module("cyclonedx.model")
        bom = importlib.import_module("cyclonedx.model.bom")
        component = importlib.import_module("cyclonedx.model.component")
        licences = importlib.import_module("cyclonedx.contrib.license.factories")
        output = importlib.import_module("cyclonedx.output")
        schema = importlib.import_module("cyclonedx.schema")
        urls = importlib.import_module("packageurl")
    except ImportError:
        raise ConfigError("A bill of materials needs cyclonedx-python-lib: pip install 'patchbay[sbom]'.") from None
    kinds, hashes = component.ComponentType, model.HashAlgorithm.SHA_256
    made, factory = bom.Bom(), licences.LicenseFactory()
    name, _, version = tag.partition(":")
    made.metadata.component = component.Component(name=name, version=version, type=kinds.APPLICATION, bom_ref=tag)

    def data(kind: Any, named: str, digest: str) -> None:
        sha = [model.HashType(alg=hashes, content=digest)]
        made.components.add(component.Component(name=named, version=digest[:16], type=kind, hashes=sha, bom_ref=digest))

    parts = {}
    data(kinds.MACHINE_LEARNING_MODEL, f"{name} artifact", artifact)
    ref, _, digest = base.rpartition("@")
    if manifest.is_digest(digest):
        data(kinds.MACHINE_LEARNING_MODEL, ref, digest)
    found = distributions(requirements)
    for one in found:
        key = canonicalize_name(one.metadata["Name"])
        purl = urls.PackageURL("pypi", name=key, version=one.version.partition("+")[0])
        said = licence(one)
        parts[key] = component.Component(
            name=key, version=one.version, type=kinds.LIBRARY, purl=purl, bom_ref=str(purl),
            licenses=[factory.make_from_string(said)] if said != UNKNOWN else [],
        )  # fmt: skip
        made.components.add(parts[key])
    made.register_dependency(made.metadata.component, list(made.components))
    for one in found:
        needs = {canonicalize_name(Requirement(line).name) for line in one.requires or ()}
        key = canonicalize_name(one.metadata["Name"])
        made.register_dependency(parts[key], [parts[need] for need in sorted(needs & parts.keys() - {key})])
    text: str = output.make_outputter(made, schema.OutputFormat.JSON, schema.SchemaVersion.V1_6).output_as_string(
        indent=1
    )
    return text


def licence_list(requirements: Iterable[str]) -> dict[str, list[str]]:
    """Licence -> distributions under it, as they say themselves."""
    out: dict[str, list[str]] = {}
    for one in distributions(requirements):
        out.setdefault(licence(one), []).append(f"{one.metadata['Name']}=={one.version}")
    return {k: sorted(v) for k, v in sorted(out.items())}


def hashed(requirements: Sequence[str], folder: Path) -> list[str]:
    """The requirements with the index's sha256 of what pip would install here, for `pip install --require-hashes`.

    Asks the index that pip is set up with, which takes a minute. Raises ConfigError saying what pip said.
    """
    report = folder / REPORT
    command = [
        sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report",
        str(report), *requirements,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HASHES_S, check=False)
        if done.returncode or not report.is_file():
            raise ConfigError(f"pip cannot say the hashes of these requirements: {done.stderr.strip()[-300:]}")
        found = json.loads(report.read_text())["install"]
    except subprocess.TimeoutExpired:
        raise ConfigError(f"pip did not say the hashes of these requirements within {HASHES_S:g} s.") from None
    finally:
        report.unlink(missing_ok=True)
    lines = []
    for one in found:
        sha = one["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        about = one["metadata"]
        if not sha:
            raise ConfigError(
                f"The index that pip is set up with has no sha256 of {about['name']}=={about['version']}."
            )
        lines.append(f"{about['name'].lower()}=={about['version']} --hash=sha256:{sha}")
    return sorted(lines)


def check(dockerfile: str) -> list[str]:
    """What a Dockerfile does not keep: a user that is not root, a base by digest. Empty: it keeps all of it."""
    lines = [line.strip() for line in dockerfile.splitlines()]
    users = [line.split()[1] for line in lines if line.upper().startswith("USER ")]
    bases = [line.split()[1] for line in lines if line.upper().startswith("FROM ")]
    wrong = []
    if not users or users[-1] in ("root", "0"):
        wrong.append("it runs as root")
    if any("@sha256:" not in base and not base.startswith("base-") for base in bases):
        wrong.append(
            f"its base image {bases[0]} is named by a tag, which may change ({IMAGE_VARIABLE}=name@sha256:...)"
        )
    return wrong
