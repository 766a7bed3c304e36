"""Ways of changing a sealed folder behind its manifest's back; each must be refused in words of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from registry import manifest
from registry.errors import PatchbayError

FILE = "patch.safetensors"
Change = Callable[[Path], None]


def _edit(key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / manifest.NAME
        about = json.loads(file.read_text())
        about[key] = value
        file.write_text(json.dumps(about))

    return change


def _drop(key: str) -> Change:
    def change(folder: Path) -> None:
        file = folder / manifest.NAME
        about = json.loads(file.read_text())
        del about[key]
        file.write_text(json.dumps(about))

    return change


def _listed(name: str, digest: str = "0" * 64) -> Change:
    def change(folder: Path) -> None:
        file = folder / manifest.NAME
        about = json.loads(file.read_text())
        about["files"][name] = digest
        file.write_text(json.dumps(about))

    return change


def _raw(data: bytes) -> Change:
    return lambda folder: (folder / manifest.NAME).write_bytes(data) and None  # type: ignore[func-returns-value]


def _header(make: Callable[[dict[str, Any]], Any], length: Callable[[int], int] = lambda n: n) -> Change:
    """Another safetensors header, sealed again, so that only the header itself is wrong."""

    def change(folder: Path) -> None:
        file = folder / FILE
        raw = file.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        header = make(json.loads(raw[8 : 8 + n]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", length(len(text))) + text + raw[8 + n :])
        about = json.loads((folder / manifest.NAME).read_text())
        about["files"][FILE] = manifest.sha256(file)
        (folder / manifest.NAME).write_text(json.dumps(about))

    return change


def _first(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], Any]:
    def made(header: dict[str, Any]) -> Any:
        change(header[sorted(header)[0]])
        return header

    return made


def _bytes(change: Callable[[bytearray], Any]) -> Change:
    def run(folder: Path) -> None:
        raw = bytearray((folder / FILE).read_bytes())
        change(raw)
        (folder / FILE).write_bytes(bytes(raw))

    return run


def _flip(at: int) -> Change:
    def flip(raw: bytearray) -> None:
        raw[at] ^= 1

    return _bytes(flip)


def _instead(make: Callable[[Path], Any], name: str = FILE) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


def changes() -> Iterator[tuple[str, Change]]:
    """(what, how) of 78 ways."""
    for key, value in (
        ("kind", "virus"),
        ("kind", ["patch"]),
        ("kind", None),
        ("kind", "finding"),
        ("kind", "search"),
        ("kind", "model"),
        ("system", 5),
        ("system", "second_order"),
        ("system", "nobody"),
        ("base", 5),
        ("base", "tiny:0@" + "f" * 64),
        ("base", ""),
        ("config", []),
        ("config", None),
        ("config", {"x": 1}),
        ("files", []),
        ("files", {}),
        ("files", {FILE: 5}),
        ("files", {FILE: "short"}),
        ("tensors", []),
        ("tensors", {}),
        ("tensors", {FILE: {}}),
        ("tensors", {"other.safetensors": {}}),
        ("parents", "x"),
        ("parents", [5]),
        ("parents", ["a" * 64]),
        ("schema", 99),
        ("schema", 2),
        ("schema", "1"),
        ("more", 1),
    ):
        yield f"manifest: {key} is {str(value)[:30]!r}", _edit(key, value)
    for key in ("kind", "system", "base", "config", "files", "tensors"):
        yield f"manifest: no {key}", _drop(key)
    for name in ("../x", "/etc/passwd", "a/../../x", "a\\..\\x", "a\0b", "", ".", "x" * 300, "missing.txt"):
        yield f"manifest: lists {name[:20]!r}", _listed(name)
    for what, raw in (
        ("empty", b""),
        ("half", b'{"kind": "pat'),
        ("a list", b"[]"),
        ("a word", b'"x"'),
        ("not UTF-8", b"\xff\xfe{}"),
        ("deep", b"[" * 100_000),
        ("large", b" " * (2 << 20)),
        ("NaN", b'{"kind": NaN}'),
    ):
        yield f"manifest: {what}", _raw(raw)
    yield "manifest: gone", lambda folder: (folder / manifest.NAME).unlink()
    yield "manifest: a folder", _instead(Path.mkdir, manifest.NAME)
    yield "manifest: a pipe", _instead(os.mkfifo, manifest.NAME)
    yield "manifest: a link", _instead(lambda p: p.symlink_to("/etc/hostname"), manifest.NAME)
    for at in (0, 12, -1):
        yield f"file: a bit at {at}", _flip(at)
    yield "file: cut", _bytes(lambda raw: raw.__delitem__(slice(-8, None)))
    yield "file: longer", _bytes(lambda raw: raw.extend(b"\0" * 8))
    yield "file: empty", _bytes(bytearray.clear)
    yield "file: gone", lambda folder: (folder / FILE).unlink()
    yield "file: a folder", _instead(Path.mkdir)
    yield "file: a pipe", _instead(os.mkfifo)
    yield "file: a socket", _instead(_socket)
    yield "file: a link", _instead(lambda p: p.symlink_to("/etc/hostname"))
    yield "file: one more", lambda folder: (folder / "run.py").write_text("x") and None  # type: ignore[func-returns-value]
    yield "folder: a link in it", lambda folder: (folder / "more").symlink_to("/etc")
    yield "folder: a pipe in it", lambda folder: os.mkfifo(folder / "pipe")
    yield "header: claims a terabyte", _header(lambda h: h, lambda n: 1 << 40)
    yield "header: claims nothing", _header(lambda h: h, lambda n: 0)
    yield "header: not JSON", _header(lambda h: b"{" * 50)
    yield "header: a list", _header(lambda h: [])
    yield "header: overlaps", _header(_first(lambda t: t.update(data_offsets=[0, 0])))
    yield "header: no offsets", _header(_first(lambda t: t.pop("data_offsets")))
    yield "header: offsets are words", _header(_first(lambda t: t.update(data_offsets=["a", "b"])))
    yield "header: a shape of words", _header(_first(lambda t: t.update(shape=["x"])))


def attack(sealed: Path, load: Callable[[Path], Any], place: Path) -> tuple[int, list[str], int]:
    """(ways, those not refused as they must be, different words); `load` must refuse each."""
    wrong, said, n = [], set(), 0
    for what, change in changes():
        folder = place / f"try{n}"
        shutil.copytree(sealed, folder)
        change(folder)
        n += 1
        try:
            load(folder)
            wrong.append(f"{what}: loaded")
        except PatchbayError as e:
            said.add((type(e).__name__, str(e).replace(str(folder), "")))
        except Exception as e:  # anything else is an escape
            wrong.append(f"{what}: {type(e).__name__}: {e}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return n, wrong, len(said)
