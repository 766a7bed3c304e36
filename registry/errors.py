"""Every error of patchbay. A message says what is wrong, with the value, and the way out.

    PatchbayError
    ├── ConfigError        a config field does not exist, is missing, or does not fit
    ├── Invalid            a value that cannot be used, wherever it came from    (HTTP 400, exit status 2)
    │   ├── TooLarge       it is beyond a stated limit                      (HTTP 413)
    │   ├── TooLong        a prompt does not fit the model's context        (HTTP 400)
    │   └── BadRequest     what a caller sent over HTTP cannot be answered  (HTTP 400)
    │       ├── Unauthorised   no token, or one we do not know              (HTTP 401)
    │       ├── Forbidden      a known token without the scope              (HTTP 403)
    │       └── TooMany        more than the rate or the queue allows       (HTTP 429)
    ├── NotFound           a reference, system, alias or digest we do not have   (HTTP 404)
    ├── Conflict           someone else was first; read again and decide again   (HTTP 409)
    ├── NotReady           the service or the device is not what was declared    (HTTP 503)
    │   └── NoMemory       one job does not fit beside the others           (HTTP 503)
    ├── Failed             a model's step failed for this job alone         (HTTP 500)
    ├── PatchError         a patch cannot do what was asked of it
    └── BadArtifact        the folder is not the artifact its manifest describes
        ├── Unsealed       no manifest: the fit did not finish
        ├── Tampered       a byte, a file or the manifest itself is not what was sealed
        ├── Outside        a path that leaves the folder
        ├── Linked         a symbolic link where a file should be
        ├── Odd            a pipe, a folder or a device where a file should be
        ├── Oversize       a header or a file beyond its limit
        ├── NotFinite      a tensor holds NaN or infinity
        ├── Unsigned       nobody whom this deployment believes has signed it
        └── WrongBase      fitted on another base than the one it is applied to

The command line prints the message alone; the services map `status` in one place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar


class PatchbayError(Exception):
    """The root: catch this to catch all of ours."""

    status: ClassVar[int] = 500
    """the HTTP status a service answers with"""
    code: ClassVar[str | None] = None
    """what OpenAI's API calls it, for clients that act on it"""


class ConfigError(PatchbayError):
    """A config has a field that does not exist, is missing or does not fit; the message names it."""

    status = 400


class Invalid(PatchbayError):
    """A value cannot be used; the message names it and what would do."""

    status = 400


class BadRequest(Invalid):
    """What a caller sent over HTTP cannot be answered; the message names the value and what would do."""


class TooLarge(Invalid):
    """A body, a prompt or a count is beyond the stated limit."""

    status = 413


class TooLong(Invalid):
    """A prompt, alone or with the answer that was asked for, does not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorised(BadRequest):
    """No bearer token, or one that is not known."""

    status = 401


class Forbidden(BadRequest):
    """The token is known but lacks the scope this call needs."""

    status = 403


class TooMany(BadRequest):
    """More calls than the token's quotas, or than the queue holds."""

    status = 429
    retry_s: int = 2
    """seconds after which it is worth another try"""


class NotFound(PatchbayError):
    """A reference, a system, an alias or a digest that is not here."""

    status = 404


class Conflict(PatchbayError):
    """The record moved since it was read: read it again and decide again."""

    status = 409


class NotReady(PatchbayError):
    """Something declared is missing: the device, a digest, a warm model."""

    status = 503


class NoMemory(NotReady):
    """Memory ran out, and this job was the largest of its batch."""


class Failed(PatchbayError):
    """A model's step failed for this job and for no other: it raised, or its numbers are not finite."""


class PatchError(PatchbayError):
    """A patch cannot do what was asked of it; the message says what can be done instead."""


class BadArtifact(PatchbayError):
    """The folder is not the artifact its manifest describes."""


class Unsealed(BadArtifact):
    """The folder has no manifest: whatever made it did not finish."""


class Tampered(BadArtifact):
    """A byte, a file or the manifest itself is not what was sealed."""


class Outside(BadArtifact):
    """The manifest names a path that leaves the folder."""


class Linked(BadArtifact):
    """The folder holds a symbolic link; artifacts are plain files."""


class Oversize(BadArtifact):
    """A manifest, a tensor header or a file is larger than any honest one."""


class Odd(BadArtifact):
    """The folder holds something that is no file: a pipe, a socket, a device, a folder of that name."""


class NotFinite(BadArtifact):
    """A tensor holds NaN or infinity; what it touches would be neither answer nor error."""


class Unsigned(BadArtifact):
    """Nobody whom this deployment believes has signed the artifact."""


class WrongBase(BadArtifact):
    """The artifact was made from another base than the one it is to be used on."""


_SECRET = re.compile(r"(?<=://)[^/@\s]+@")
_NAMED_SECRET = re.compile(
    r"(?i)(\bbearer\s+|\b(?:password|passwd|secret|api[_-]?key|access[_-]?token|authorization)[\"']?\s*[=:]\s*[\"']?)"
    r"(?!bearer\b)[^\s\"',;&]+"
)
_PLACE = re.compile(r"(?<![\w.:/])/(?!v1/)(?:[\w.@+~-]+/)+(?=[\w.@+~-])")


def plain(text: str) -> str:
    """A message as strangers may read it: no passwords in addresses, of paths on this machine the last part alone."""
    return _PLACE.sub(".../", _SECRET.sub("***@", text))


def unsecret(text: str) -> str:
    """A message without the passwords in addresses, without bearer tokens and what is named a key or a password."""
    return _NAMED_SECRET.sub(r"\1***", _SECRET.sub("***@", text))


def nearest(word: str, among: Iterable[str], most: int = 40) -> str:
    """Names as an error lists them, those that look most like `word` first."""
    names = list(among)
    import difflib  # only who mistypes waits for it

    like = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    ordered = [*like, *(n for n in names if n not in like)]
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
