"""Signatures of sealed folders: OpenSSF Model Signing bundles, kept beside the seal and never inside it.

A bundle is a Sigstore bundle whose DSSE envelope holds an in-toto statement; its list of files names manifest.json,
whose sha256 is the artifact's digest, so who signed signed that identity (https://github.com/sigstore/model-transparency).
Signed with an elliptic-curve key, or with an identity through Sigstore. PATCHBAY_SIGNERS names whom this deployment
believes; where it is set, what none of them signed is not promoted, split, served or put in a Bento, and --force
changes nothing about it. The library is the extra `signing`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from registry import manifest
from registry.errors import ConfigError, Unsigned
from registry.home import home

SUFFIX = ".sig"
MAX_BUNDLE_BYTES = 1 << 20
MAX_BUNDLES = 32
SIGSTORE = "sigstore:"
LIBRARY = "model_signing"
CARRIED = "signatures"
"""Folder of a Bento's source that has the bundles of what it carries, by digest"""


def place(digest: str) -> Path:
    """Folder of an artifact's bundles on this host."""
    return home() / "signatures" / digest


def sign(folder: Path, key: Path | None = None, token: str = "") -> Path:
    """Sign the sealed folder; returns the bundle, kept under its key's or its identity's name.

    key: PEM file of an elliptic-curve private key. token: identity token for Sigstore instead, "" for the one that the
    environment (a CI runner) gives. Raises ConfigError for a key that cannot be used, BadArtifact for the folder.
    """
    about = manifest.read(folder)
    signing = _library("signing").Config()
    if key is not None:
        if not key.is_file():
            raise ConfigError(f"There is no key file {key}. Make one: openssl ecparam -name prime256v1 -genkey -noout")
        config = signing.use_elliptic_key_signer(private_key=key)
    else:
        config = signing.use_sigstore_signer(
            **({"identity_token": token} if token else {"use_ambient_credentials": True})
        )
    place(about.digest).mkdir(parents=True, exist_ok=True)
    part = place(about.digest) / f".{os.getpid()}.part"
    try:
        config.sign(folder, part)
        made = part.with_name(f"{manifest.sha256(part)[:16]}{SUFFIX}")
        os.replace(part, made)
    except Exception as e:
        raise ConfigError(f"{folder.name} cannot be signed with {key or 'Sigstore'}: {_why(e)}.") from None
    finally:
        part.unlink(missing_ok=True)
    return made


def signers(env: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Whom this deployment believes: public key files and sigstore:<identity>@<issuer>. Raises ConfigError.

    Empty: signatures are not asked for.
    """
    named = tuple(s.strip() for s in env.get("PATCHBAY_SIGNERS", "").split(",") if s.strip())
    for one in named:
        if one.startswith(SIGSTORE):
            if "@https://" not in one:
                raise ConfigError(f"PATCHBAY_SIGNERS: {one[:80]!r} must be sigstore:<identity>@https://<issuer>.")
        elif not Path(one).is_file():
            raise ConfigError(f"PATCHBAY_SIGNERS: there is no public key file {one[:200]}.")
    return named


def verify(folder: Path, bundles: Iterable[Path], believed: Iterable[str]) -> str:
    """Whoever of `believed` signed exactly what lies in the sealed folder. Raises Unsigned saying why nobody did."""
    about, why = manifest.read(folder), []
    for bundle in sorted(bundles)[:MAX_BUNDLES]:
        if bundle.stat().st_size > MAX_BUNDLE_BYTES:
            why.append(f"{bundle.name} is larger than any bundle")
            continue
        for one in believed:
            try:
                _verifier(one).verify(folder, bundle)
            except ConfigError:
                raise
            except Exception as e:  # the library has an error of its own for every way to be wrong
                why.append(f"{bundle.name} is not of {Path(one).name}: {_why(e)}")
            else:
                return one
    said = "; ".join(why)[:400] or "it has no signature"
    raise Unsigned(
        f"sha256:{about.digest[:16]} is signed by nobody whom this deployment believes ({said}). Sign it: "
        f"patchbay sign sha256:{about.digest[:16]} --key KEY, or change PATCHBAY_SIGNERS."
    )


def require(folder: Path, bundles: Iterable[Path], env: Mapping[str, str] = os.environ) -> str:
    """Who signed, where PATCHBAY_SIGNERS wants a signature; "" where it does not. Raises Unsigned."""
    believed = signers(env)
    return verify(folder, bundles, believed) if believed else ""


def bundles(digest: str) -> list[Path]:
    """An artifact's bundles on this host: those kept here, and in a Bento those that it carries."""
    carried = Path(__file__).parents[1] / CARRIED / digest
    return sorted([*place(digest).glob(f"*{SUFFIX}"), *carried.glob(f"*{SUFFIX}")])


def _verifier(one: str) -> Any:
    config = _library("verifying").Config()
    if one.startswith(SIGSTORE):
        identity, _, issuer = one.removeprefix(SIGSTORE).rpartition("@")
        return config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
    return config.use_elliptic_key_verifier(public_key=Path(one))


def _library(part: str) -> Any:
    try:
        # by name, so that a Bento which needs no signatures need not carry the library
        return importlib.import_module(f"{LIBRARY}.{part}")
    except ImportError:
        raise ConfigError(
            "Signatures need the extra `signing`, which is not installed: pip install 'patchbay[signing]'."
        ) from None


def _why(e: Exception) -> str:
    return f"{type(e).__name__}: {str(e).partition(chr(10))[0][:160]}"
