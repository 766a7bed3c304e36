"""The verbs about trust: sign, verify, audit."""

from __future__ import annotations

import argparse
import importlib
import os
from dataclasses import asdict
from typing import Any

from registry.errors import ConfigError
from registry.systems import SYSTEMS
from registry.verbs.said import Says, artifact, read_manifest, table, the_bundles, the_ledger, the_store, when, who

DECIDED = ("promote", "rollback", "stop", "split", "ramp", "sign")


def sign(args: argparse.Namespace) -> Says:
    """sign an artifact (OpenSSF Model Signing) with a key, or an identity through Sigstore; the ledger keeps who"""
    if (args.key is None) == (not args.sigstore):
        raise ConfigError("Sign with --key FILE (an elliptic-curve private key), or with --sigstore; one of them.")
    signing, store, ledgers = importlib.import_module("registry.signing"), the_store(), the_ledger()
    folder = store.pull(artifact(args.ref))
    about = read_manifest(folder)
    bundle = signing.sign(folder, args.key)
    store.log_file(about.digest, bundle, "signatures")
    how = "sigstore" if args.key is None else args.key.name
    facts = {"digest": about.digest, "bundle": bundle.name, "key": how}
    ledgers.signed(ledgers.Ledger(), about.system, {"signature": facts}, who=who())
    text = f"{bundle}\nsha256:{about.digest[:16]} of {about.system} is signed ({how}); the ledger keeps it."
    return Says(text, bundle=str(bundle), digest=about.digest)


def verify(args: argparse.Namespace) -> Says:
    """every byte of an artifact against its digest, and its signatures against those believed"""
    signing = importlib.import_module("registry.signing")
    digest = artifact(args.ref)
    folder = the_store().pull(digest)
    found = the_bundles(digest)
    believed = signing.signers({"PATCHBAY_SIGNERS": args.signer} if args.signer else os.environ)
    if not believed:
        text = f"{folder}\nsha256:{digest} is what was sealed. {len(found)} signatures; whose? --signer PUBLIC.pem"
        return Says(text, digest=digest, signed=None, signatures=len(found))
    by = signing.verify(folder, found, believed)
    return Says(f"{folder}\nsha256:{digest} is what was sealed, and signed by {by}.", digest=digest, signed=by)


def audit(args: argparse.Namespace) -> Says:
    """who decided what, when and why: promoted, forced, rolled back, signed; after recomputing the ledger's chain"""
    ledger = the_ledger().Ledger()
    names = [args.system] if args.system else sorted(SYSTEMS)
    checked = sum(ledger.verify(name) for name in names)
    entries = [e for name in names for e in ledger.history(name, 1_000_000)]
    entries = sorted((e for e in entries if args.all or e.action in DECIDED or _forced(e)), key=lambda e: e.seq)
    rows = [(when(e.at), e.system, e.action, e.who, _about(e), _forced(e) or None) for e in entries]
    shown = table(("when", "system", "action", "who", "what", "forced"), rows)
    return Says(
        f"{shown}\n{checked} entries, and their chain holds.", entries=[asdict(e) for e in entries], checked=checked
    )


def _forced(e: Any) -> str:
    return str((e.evidence or {}).get("forced", ""))


def _about(e: Any) -> str:
    evidence = e.evidence or {}
    if e.action == "sign":
        said = evidence.get("signature", {})
        return f"sha256:{str(said.get('digest'))[:16]} with {said.get('key')}"
    if e.action in ("split", "ramp") and e.experiment:
        return f"{e.experiment['name']} {e.experiment['share']:.0%} sha256:{e.experiment['treatment'][:16]}"
    if e.action == "challenge":
        return f"challenger {str(e.challenger)[:16]}"
    why = f", {evidence['why']}" if evidence.get("why") else ""
    return f"champion {e.champion[:16]}{why}"
