"""References to artifacts, and which digest each of them means now."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry import manifest, systems
from registry.errors import ConfigError, NotFound, NotReady
from registry.home import home

if TYPE_CHECKING:
    from registry.ab.ledger import Ledger
from registry.kept import sealed_digest
from registry.store.mlflow_client import BASE, number_of, versions


@dataclass(frozen=True)
class Ref:
    """A parsed reference: a system and which of its artifacts, or a digest (prefix), or a sealed folder."""

    system: str = ""
    which: str = ""
    """champion | challenger | base | a version number"""
    digest: str = ""
    """64 hex digits, or a prefix of at least 8"""
    folder: Path | None = None


# ---- references ------------------------------------------------------------------------------------------------


def parse_ref(text: str) -> Ref:
    """`system`, `system@champion|challenger|base|<version>`, `sha256:<8 to 64 hex>`, or a path (with a slash or a dot).

    Raises ConfigError or NotFound, and looks nothing up.
    """
    if text.startswith("sha256:") or manifest.is_digest(text):
        digest = text.removeprefix("sha256:").lower()
        if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
            raise ConfigError(f"{text[:80]!r} is not a digest: write sha256: and 8 to 64 hex digits.")
        return Ref(digest=digest)
    if "/" in text or text.startswith((".", "~")):
        return Ref(folder=Path(text).expanduser())
    name, at, which = text.partition("@")
    if name not in systems.SYSTEMS and re.fullmatch(r"[0-9a-f]{8,63}", name):
        raise ConfigError(f"{text[:80]!r} looks like a digest; write sha256:{name}.")
    systems.system(name)
    if at and not re.fullmatch(r"champion|challenger|base|[1-9][0-9]{0,8}", which):
        raise ConfigError(f"{text[:80]!r}: after the @ comes champion, challenger, base or a version number.")
    return Ref(system=name, which=which or "champion")


def resolve(ref: str | Ref, ledger: Ledger) -> str:
    """The digest a reference means now, or "base". Champion and challenger are the ledger's, never MLflow's aliases.

    Raises NotFound, or ConfigError for a prefix or a version that several artifacts share.
    """
    ref = parse_ref(ref) if isinstance(ref, str) else ref
    if ref.folder is not None:
        return manifest.read(ref.folder).digest
    if ref.digest:
        return ref.digest if manifest.is_digest(ref.digest) else _by_prefix(ref.digest)
    if ref.which == BASE:
        return BASE
    if ref.which.isdigit():
        return _by_version(ref.system, ref.which)
    head = ledger.head(ref.system)
    if ref.which == "champion":
        return head.champion if head else BASE
    if head is None or head.challenger is None:
        raise NotFound(f"{ref.system} has no challenger. Push one: `patchbay push FOLDER`.")
    return head.challenger


def _by_prefix(prefix: str) -> str:
    found = {folder.name for folder in (home() / "artifacts").glob(f"{prefix}*") if manifest.is_digest(folder.name)}
    found |= {
        d for folder in (home() / "runs").glob(f"*-{prefix[:16]}*") if (d := sealed_digest(folder)).startswith(prefix)
    }
    down = ""
    try:
        found |= {v.tags["patch.digest"] for v in versions(f"tags.`patch.digest` LIKE '{prefix}%'")}
    except NotReady as e:
        down = f" {e}"
    if len(found) == 1:
        return found.pop()
    if found:
        raise ConfigError(f"sha256:{prefix} is ambiguous: {', '.join(sorted(found))}. Write more digits.")
    raise NotFound(f"No artifact begins with sha256:{prefix}. `patchbay list` shows what there is.{down}")


def _by_version(name: str, version: str) -> str:
    same = [v for v in versions(f"tags.`system` = '{name}'") if str(number_of(v)) == version]
    if len(same) == 1:
        return str(same[0].tags["patch.digest"])
    if same:
        several = ", ".join(f"{v.name} has sha256:{v.tags['patch.digest'][:16]}" for v in same)
        raise ConfigError(f"{name}@{version} is ambiguous: {several}. Name the digest.")
    raise NotFound(f"{name} has no version {version}. `patchbay list {name}` shows its versions.")
