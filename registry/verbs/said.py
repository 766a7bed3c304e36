"""What the verbs share: what they answer, tables for people, references, and what a service could not serve."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from registry.errors import ConfigError, Conflict, NotFound, PatchbayError
from registry.systems import SYSTEMS


class Says(dict[str, Any]):
    """What a verb answers: a mapping for programs, `text` for people."""

    def __init__(self, text: str, **values: Any) -> None:
        super().__init__(values)
        self.text = text
        self.status = 0
        """exit status of the command line"""


def the_store() -> Any:
    return importlib.import_module("registry.store")


def the_ledger() -> Any:
    return importlib.import_module("registry.ab.ledger")


def read_manifest(folder: Path | str) -> Any:
    return importlib.import_module("registry.manifest").read(Path(folder))


def resolve(ref: str) -> str:
    digest: str = the_store().resolve(ref, the_ledger().Ledger())
    return digest


def artifact(ref: str) -> str:
    """The digest that a reference means. Raises NotFound for the base, which is no artifact."""
    digest = resolve(ref)
    if digest == "base":
        raise NotFound(f"{ref[:80]} is the base itself, which is no artifact. Name one: SYSTEM@challenger")
    return digest


def mirror(store: Any, name: str) -> str:
    """Show the ledger's champion and challenger as MLflow aliases; a warning if MLflow cannot be reached."""
    head = the_ledger().Ledger().head(name)
    warning = store.mirror(name, head.champion, head.challenger) if head else None
    return f" ({warning})" if warning else ""


def check_digest(name: str, digest: str, forced: str | None) -> dict[str, Any] | None:
    """Raises Conflict for what the store has and a service could not serve, or what has not passed its gate.

    forced: why it should go all the same. Returns what the ledger is to keep of that.
    """
    if digest == "base":
        return None
    folder = the_store().pull(digest)
    check_signed(folder, digest)
    why = check_served(name, folder, read_manifest(folder), forced)
    ledgers = the_ledger()
    try:
        ledgers.check_gate(ledgers.Ledger(), name, digest)
    except Conflict as e:
        if not forced:
            raise
        why = {**(why or {"forced": forced}), "gate": str(e)}
        with contextlib.suppress(PatchbayError):  # the ledger keeps the reason; MLflow shows it where it can
            the_store().log_forced(digest, forced)
    return why


def check_signed(folder: Path, digest: str) -> str:
    """Who signed an artifact, where PATCHBAY_SIGNERS wants that; "" elsewhere. Raises Unsigned."""
    signing = importlib.import_module("registry.signing")
    who: str = signing.require(folder, the_bundles(digest)) if signing.signers() else ""
    return who


def the_bundles(digest: str) -> list[Path]:
    """An artifact's signatures: those on this host, else those that the store has."""
    signing = importlib.import_module("registry.signing")
    found: list[Path] = signing.bundles(digest)
    if not found:
        with contextlib.suppress(PatchbayError):
            the_store().kept_files(digest, "signatures", signing.place(digest))
            found = signing.bundles(digest)
    return found


def check_served(name: str, folder: Path, about: Any, forced: str | None) -> dict[str, Any] | None:
    """Raises Conflict for what a service of this system could not serve beside its champion. As `check_digest`."""
    head = the_ledger().Ledger().head(name)
    bases: dict[str, str] = {}
    if head and head.champion not in ("base", about.digest):
        now = read_manifest(the_store().pull(head.champion)).bases
        bases = {role: label.rpartition("@")[2] for role, label in now.items()}
    try:
        importlib.import_module("patches.subject").check_servable(folder, name, bases)
    except PatchbayError as e:
        if not forced:
            raise Conflict(
                f"A service of {name} could not serve this beside its champion; --force REASON does it still. {e}"
            ) from None
        return {"forced": forced, "served": str(e)}
    return None


def name_of(ref: str, folder: Path | None = None) -> str:
    """The system that a reference names, or that made the sealed folder it leads to."""
    name = ref.partition("@")[0]
    return name if name in SYSTEMS else read_manifest(folder or the_store().pull(resolve(ref))).system


def page(url: str) -> str:
    """An address of MLflow's page if it answers, else how to start it."""
    return url if url and the_store().page_answers() else "See it in MLflow: patchbay ui" if url else ""


def free(host: str, port: int) -> None:
    """Raises Conflict if somebody listens there already."""
    if not 0 < port < 65536:
        raise ConfigError(f"--port {port} is none; a port is a number from 1 to 65535.")
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise Conflict(f"{host}:{port} cannot be served on ({e.strerror or e}). Take another: --port N") from None


def who() -> str:
    """Whoever decides, for the ledger: PATCHBAY_WHO, else the user that this process runs as."""
    with contextlib.suppress(OSError, KeyError, ImportError):  # a uid without a name, as in many containers
        return os.environ.get("PATCHBAY_WHO") or getpass.getuser()
    return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def short(digest: str) -> str:
    return digest if digest == "base" else f"sha256:{digest[:16]}"


def when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))


def compared(name: str, a: Any, b: Any) -> tuple[Any, ...]:
    """One metric of two arms as a row: values with intervals, difference, n, and which way is better."""
    both = [m for m in (a, b) if m is not None]
    n = "/".join(dict.fromkeys(str(m.n) for m in both if m.n is not None))
    better = next((m.better for m in both if m.better), "")
    return name, measured(a), measured(b), b.value - a.value if len(both) == 2 else None, n or None, better or None


def measured(m: Any) -> str | None:
    """A measured number with its 95 % interval, if it has one."""
    if m is None:
        return None
    return f"{m.value:.4g}" + (f" [{m.low:.3g}, {m.high:.3g}]" if m.low is not None else "")


def columns(columns: dict[str, list[Any]]) -> str:
    """A table given by its columns; those with nothing in them are left out."""
    some = {name: cells for name, cells in columns.items() if any(c is not None for c in cells)}
    return table(tuple(some), list(zip(*some.values(), strict=True)))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def text(cell: Any) -> str:
        return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)

    cells = [list(head), *([text(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
