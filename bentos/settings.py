"""Deployment settings of a service, and the checks that are possible before anything is loaded.

The process that a command starts with checks them, and the one that serves again, so torch is imported here only to
answer what it alone knows.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry import kept, manifest, signing
from registry.ab import ledger as ledgers
from registry.ab.database import ENV
from registry.ab.ledger import BASE
from registry.errors import ConfigError, NotFound, NotReady, PatchbayError
from registry.signing import SIGSTORE
from registry.systems import system

CARRIED = Path(__file__).parents[1] / "carried"
"""Sealed folder inside a Bento that it was built to serve; absent in a checkout"""
BESIDE = CARRIED.with_name("beside")
"""Folder inside a Bento with more sealed folders, by digest: the challenger that was built in beside the champion"""


def carried() -> list[Path]:
    """The sealed folders of this Bento, the one that names it first; none in a checkout."""
    more = sorted(f for f in BESIDE.iterdir() if f.is_dir()) if BESIDE.is_dir() else []
    return [CARRIED, *more] if CARRIED.is_dir() else []


def sealed(digest: str) -> Path:
    """The verified sealed folder of an artifact: carried, on this host, from the bucket, or from MLflow if it is
    installed (a Bento has none). Raises NotFound."""
    if (found := kept.find(digest, carried())) is not None:
        return found
    try:
        from registry import store
    except ImportError:
        raise NotFound(
            f"sha256:{digest[:16]} is neither in this Bento nor in a store it may ask. Build it in (patchbay build), "
            "or push it with PATCHBAY_STORE=s3://bucket/prefix and set the same here."
        ) from None
    return store.pull(digest)


def check_signed(folder: Path, digest: str) -> None:
    """Refuse an artifact that nobody of PATCHBAY_SIGNERS has signed, if that is set. Raises Unsigned.

    Signatures are those on this host or in this Bento, else those in MLflow if it is installed.
    """
    if not signing.signers():
        return
    found = signing.bundles(digest)
    if not found:
        with contextlib.suppress(ImportError, PatchbayError):
            from registry import store

            found = store.kept_files(digest, "signatures", signing.place(digest))
    signing.require(folder, found)


@dataclass(frozen=True)
class Settings:
    """Deployment settings of a service, from environment variables, alike for a Bento and a laptop."""

    system: str
    base: str | None = None
    """Reference of the base; None: the one in the artifact's manifest"""
    device: str = "cpu"
    """torch device of the base"""
    dtype: str = ""
    """dtype of the weights: fp32, bf16 or fp16; empty: as the reference says, else the device's own"""
    slots: int = 32
    """Largest number of rows in one batch"""
    context: int = 4096
    """Largest number of tokens in a row, prompt and answer"""
    kv_gib: float = 0.0
    """Largest size in GiB of all rows' keys and values; 0: free memory less a reserve"""
    arm_gib: float = 0.0
    """Largest size in GiB of the weights of one arm of kind `model`; 0: free memory"""
    provider: str = ""
    """Provider of ONNX Runtime (cpu or cuda) for families that it can run; empty: torch"""
    pinned: Path | None = None
    """Sealed folder of the only patch to serve, or of the bare base; then neither ledger nor store is used"""
    beside: tuple[Path, ...] = ()
    """More sealed folders that a pinned deployment serves; the first is its challenger"""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings from PATCHBAY_* environment variables.

        A Bento serves what it carries; with PATCHBAY_DB it follows the ledger there instead, and what it carries is
        what it need not pull. Raises NotFound for an unknown system.
        """
        given, inside = env.get("PATCHBAY_PINNED"), carried()
        alone = not given and bool(inside) and not env.get(ENV)
        pinned = Path(given) if given else inside[0] if alone else None
        named = pinned or (inside[0] if inside else None)
        name = manifest.read(named).system if named else env.get("PATCHBAY_SYSTEM", "")
        return cls(
            system=system(name).name,
            base=env.get("PATCHBAY_BASE") or None,
            device=env.get("PATCHBAY_DEVICE") or "cpu",
            dtype=env.get("PATCHBAY_DTYPE", ""),
            slots=_count(env, "PATCHBAY_SLOTS", 32, 4096),
            context=_count(env, "PATCHBAY_CONTEXT", 4096, 1 << 20),
            kv_gib=_gibibytes(env, "PATCHBAY_KV_GIB"),
            arm_gib=_gibibytes(env, "PATCHBAY_ARM_GIB"),
            provider=env.get("PATCHBAY_PROVIDER", ""),
            pinned=pinned,
            beside=tuple(inside[1:]) if alone else (),
        )


def _gibibytes(env: Mapping[str, str], name: str) -> float:
    """A number of GiB from 0. Raises ConfigError naming the variable and the value."""
    text = env.get(name) or "0"
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0.0 <= found < 1e6:
        raise ConfigError(f"{name}={text[:40]!r} is no number of GiB from 0. Leave it out.")
    return found


FOLDERS = ("PATCHBAY_CACHE", "PATCHBAY_PICTURES", "PATCHBAY_PINNED", "PATCHBAY_TOKENS")
"""variables that hold a path"""


def _count(env: Mapping[str, str], name: str, usual: int, most: int) -> int:
    """A whole number from 1 to `most`. Raises ConfigError naming the variable and the value."""
    text = env.get(name) or str(usual)
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise ConfigError(f"{name}={text[:40]!r} is no whole number from 1 to {most:,}. Leave it out for {usual:,}.")
    return int(text)


def placed(env: Mapping[str, str]) -> dict[str, str]:
    """The same environment for a process that works in another folder: relative paths become absolute ones, also in
    references of bases and in MLflow's address."""
    out = dict(env)
    for name in FOLDERS:
        if out.get(name):
            out[name] = str(Path(out[name]).expanduser().absolute())
    if out.get("PATCHBAY_BASE"):
        out["PATCHBAY_BASE"] = ",".join(_absolute(ref) for ref in out["PATCHBAY_BASE"].split(","))
    if out.get("PATCHBAY_SIGNERS"):
        named = [s.strip() for s in out["PATCHBAY_SIGNERS"].split(",")]
        out["PATCHBAY_SIGNERS"] = ",".join(s if s.startswith(SIGSTORE) else str(Path(s).absolute()) for s in named)
    address = out.get("MLFLOW_TRACKING_URI", "")
    if address.startswith("sqlite:///") and not address.startswith("sqlite:////"):
        out["MLFLOW_TRACKING_URI"] = f"sqlite:///{Path(address[10:]).absolute()}"
    return out


def _absolute(ref: str) -> str:
    scheme, _, path = ref.partition(":")
    return f"{scheme}:{Path(path).expanduser().absolute()}" if scheme in ("local-dir", "gguf") and path else ref


def check(s: Settings, head: ledgers.Entry | None) -> dict[str, str]:
    """Check settings before loading; return the reference of each base: role -> reference.

    Raises NotReady saying what to do.
    """
    row = system(s.system)
    if s.device != "cpu":
        importlib.import_module("patches.families.base").check_device(s.device)
    if s.provider:
        engine = _family(row.family).engine
        if engine is None:
            raise NotReady(
                f"PATCHBAY_PROVIDER={s.provider[:20]!r}: {row.family} bases run in torch alone; leave it out."
            )
        importlib.import_module(engine).check_provider(s.provider)
    refs = _named(s, head)
    refs |= dict(zip(row.bases, (s.base or "").split(","), strict=False)) if s.base else {}
    if s.dtype:
        refs = {role: f"{manifest.split_dtype(ref)[0]}?dtype={s.dtype}" for role, ref in refs.items()}
    for role, kind in row.bases.items():
        if not refs.get(role):
            one = ",".join(_family(kind).example for kind in row.bases.values())
            raise NotReady(
                f"{s.system} has no patch yet, so its {role if row.roles else 'base'} is unknown. Push one, or set "
                f"PATCHBAY_BASE, for instance to {one}."
            )
        if refs[role].startswith("local:"):
            raise NotReady(
                f"The base is the folder {refs[role][6:]!r} of the machine where the patch was fitted. Put it here, "
                "and set PATCHBAY_BASE=local-dir:<folder> (or gguf:<file>)."
            )
        del kind
    return {role: refs[role] for role in row.bases}


def _family(name: str) -> Any:
    return importlib.import_module("patches.families.family").family(name)


def _named(s: Settings, head: ledgers.Entry | None) -> dict[str, str]:
    """Return role -> reference, as named by the pinned artifact, the champion or the challenger."""
    folder = s.pinned or next(iter(carried()), None)
    for digest in (head.champion, head.challenger) if head and folder is None else ():
        if digest and digest != BASE:
            folder = sealed(digest)
            break
    if folder is None:
        return {}
    return {role: label.rpartition("@")[0] for role, label in manifest.read(folder).bases.items()}
