"""Sealed folders in an S3-compatible store, by digest: `PATCHBAY_STORE=s3://bucket/prefix`.

What services on other machines pull from without MLflow. One object per file under `<prefix>/<digest>/`; the manifest
is put last, so what has one is whole, and got first: its sha256 is the digest asked for, and it says which other files
there are. Whoever gets a folder verifies it as any other (`registry.kept`), so the store need not be trusted. Keys and
endpoint come from AWS's own variables (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from registry import manifest
from registry.errors import ConfigError, NotReady, Oversize, Tampered

ENV = "PATCHBAY_STORE"
EXTRA = "pip install 'patchbay[s3]'"
CONNECT_S, READ_S = 5, 60
"""Longest wait in seconds for a connection to the store, and for the next bytes of an object"""


class Address(NamedTuple):
    """Where sealed folders lie in the store."""

    bucket: str
    prefix: str
    """ends with a slash if it is not empty"""

    def key(self, digest: str, name: str) -> str:
        """The key of a file of an artifact."""
        return f"{self.prefix}{digest}/{name}"

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"


def address() -> Address | None:
    """What PATCHBAY_STORE names; None without it. Raises ConfigError for what is no such address."""
    text = os.environ.get(ENV)
    if not text:
        return None
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w!.*'()/-]*))?", text)
    if found is None or ".." in text:
        raise ConfigError(f"{ENV}={text[:80]!r} is no address of a store. Write s3://bucket or s3://bucket/prefix.")
    prefix = (found[2] or "").strip("/")
    return Address(found[1], f"{prefix}/" if prefix else "")


def put(folder: Path, digest: str) -> bool:
    """Put a verified sealed folder there, its manifest last. False if the store has it already, or there is none."""
    at = address()
    if at is None or _manifest(at, digest) is not None:
        return False
    client = _client()
    for name in (*manifest.read(folder, digest=digest).files, manifest.NAME):
        with _said(at):
            client.upload_file(str(folder / name), at.bucket, at.key(digest, name))
    return True


def get(digest: str, folder: Path) -> bool:
    """Bring an artifact to `folder`, which is made; False if the store has none of that digest.

    Only the manifest is verified here, against the digest. Raises Tampered if it is not the one asked for, NotReady if
    the store cannot be reached or lacks one of the files.
    """
    at = address()
    raw = _manifest(at, digest) if at is not None else None
    if at is None or raw is None:
        return False
    folder.mkdir(parents=True)
    (folder / manifest.NAME).write_bytes(raw)
    about = manifest.parse(folder)
    if about.digest != digest:
        raise Tampered(f"{at} holds artifact {about.digest[:16]} under {digest[:16]}. Put the right one there again.")
    for name in about.files:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with _said(at):
            _client().download_file(at.bucket, at.key(digest, name), str(file))
    return True


def _manifest(at: Address, digest: str) -> bytes | None:
    """The bytes of an artifact's manifest; None if there is none. Raises Oversize for more than a manifest has."""
    with _said(at):
        client = _client()
        try:
            body = client.get_object(Bucket=at.bucket, Key=at.key(digest, manifest.NAME))["Body"]
        except client.exceptions.NoSuchKey:
            return None
        raw: bytes = body.read(manifest.MAX_MANIFEST_BYTES + 1)
    if len(raw) > manifest.MAX_MANIFEST_BYTES:
        raise Oversize(f"{at}{digest[:16]}: its manifest is larger than {manifest.MAX_MANIFEST_BYTES} bytes; none is.")
    return raw


@cache
def _client() -> Any:
    """The one client of this process; boto3's are safe to share between threads."""
    try:
        import boto3
        from botocore.config import Config
    except ModuleNotFoundError:
        raise ConfigError(f"{ENV} names an S3-compatible store and its client is not installed: {EXTRA}") from None
    settings = Config(connect_timeout=CONNECT_S, read_timeout=READ_S, retries={"total_max_attempts": 2})
    return boto3.client("s3", config=settings)


@contextmanager
def _said(at: Address) -> Iterator[None]:
    """What the client raises inside the block comes out as NotReady naming the store."""
    try:
        yield
    except Exception as e:
        if (type(e).__module__ or "").partition(".")[0] not in ("botocore", "boto3", "s3transfer"):
            raise
        text = str(e).partition("\n")[0][:200]
        raise NotReady(f"The store {at} failed: {text} Check {ENV}, AWS_ENDPOINT_URL and the keys.") from None
