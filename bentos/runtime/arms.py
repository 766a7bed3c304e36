"""Routing: map a request's wish and the routing table to an arm. Pure functions; a table is an immutable snapshot.

A wish is `base | champion | challenger | sha256:<digest or 8 hex digits of it> | auto`, from the header X-Patchbay-Arm
or the field `model` (which may also be the base's name, the system's, or system@champion). `auto`, or none, means the
live experiment, which assigns the unit, if there is one; else the champion.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from registry.ab.experiment import CONTROL, OWNER, TREATMENT, Arm, Experiment, assign
from registry.ab.ledger import BASE
from registry.errors import BadRequest, NotFound

UNIT = re.compile(r"[\x21-\x7e]{1,128}")


def unit_of(user: str | None) -> str | None:
    """Convert an OpenAI request's `user` into a unit: itself if it is a valid one, else its hash; None if empty."""
    if not user or UNIT.fullmatch(user):
        return user or None
    return f"user-{hashlib.sha256(user.encode(errors='surrogatepass')).hexdigest()[:40]}"


class NoModel(NotFound):
    """The requested model is not an arm of this service."""

    code = "model_not_found"


@dataclass(frozen=True)
class Table:
    """Routing table: what requests may ask for.

    Replaced as a whole when the ledger changes; a request keeps the one it began with.
    """

    system: str
    base: str
    """Name of the base"""
    base_digest: str
    champion: str
    """Digest of the champion, or "base" """
    challenger: str | None
    experiment: Experiment | None
    loaded: frozenset[str]
    """Digests of the arms in memory"""
    head: str
    """Hash of the ledger entry from which this table was built"""
    memory: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Bytes of the weights of `base` and, by digest, of each arm"""


@dataclass(frozen=True)
class Choice:
    """The arm chosen for one request."""

    label: str
    """Name in answers: base, champion, challenger, control, treatment or a digest"""
    digest: str
    """Digest of the arm, or "base" """
    experiment: Experiment | None = None
    """Experiment in which this answer is an exposure; None: none"""
    side: Arm | None = None
    unit: str | None = None
    owner: str = ""
    """Tenant of the token that named the unit; empty without a token file"""
    told: bool = True
    """Whether the caller may know the arm; in an experiment, callers without `compare` may not choose who gets which"""

    @property
    def counted(self) -> str:
        """The unit's name in the experiment's counts."""
        return owned(self.owner, self.unit or "")

    @property
    def shown(self) -> tuple[str, str]:
        """Label and digest as told to the caller."""
        return (self.label, self.digest) if self.told or self.experiment is None else ("auto", "")

    @property
    def arm(self) -> str | None:
        """Name of the arm on the base; None for the base itself."""
        return None if self.digest == BASE else self.digest


def owned(owner: str, unit: str) -> str:
    """Prefix a unit with its tenant, so that tenants' units never coincide."""
    return f"{owner}{OWNER}{unit}" if owner else unit


def choose(table: Table, wish: str | None, unit: str | None, owner: str = "", told: bool = True) -> Choice:
    """Choose the arm for a wish of `owner`, who may know it if `told`.

    Raises NotFound naming what can be asked for, BadRequest for a malformed unit.
    """
    if unit is not None and not UNIT.fullmatch(unit):
        raise BadRequest(f"unit {unit[:40]!r} must be 1 to 128 printable characters without spaces.")
    name = (wish or "auto").strip()
    for prefix in (table.system, table.base):
        if name == prefix:
            name = "auto" if prefix == table.system else BASE
        elif name.startswith((prefix + "@", prefix + "/")):  # answers name their arm with a slash
            name = name[len(prefix) + 1 :]
    if name == "auto":
        x = table.experiment
        if x is None:
            return Choice("champion", table.champion)
        unit = unit or secrets.token_hex(8)
        side = CONTROL if x.mode == "shadow" else assign(x, owned(owner, unit))
        return Choice(side, x.arm_digest(side), x, side, unit, owner, told)
    if name == BASE:
        return Choice(BASE, BASE)
    if name == "champion":
        return Choice("champion", table.champion)
    if name == "challenger" and table.challenger is not None:
        return Choice("challenger", table.challenger)
    prefix = name.removeprefix("sha256:")
    if re.fullmatch(r"[0-9a-f]{8,64}", prefix):
        found = [d for d in table.loaded if d.startswith(prefix)]
        if len(found) == 1:
            return Choice(f"sha256:{found[0][:16]}", found[0])
        if found:
            raise BadRequest(f"sha256:{prefix} fits several loaded patches; write more digits.")
    can = ["auto", BASE, "champion", *(["challenger"] if table.challenger else [])]
    can += [f"sha256:{d[:16]}" for d in sorted(table.loaded)]
    raise NoModel(f"There is no model or arm {name[:80]!r} here. There are: {', '.join(can)}.")


def other(choice: Choice) -> Choice:
    """Return the treatment arm that a shadow request runs beside the control."""
    assert choice.experiment is not None
    return replace(choice, label=TREATMENT, digest=choice.experiment.treatment, side=TREATMENT)
