"""Edits made in a request: other heads, features, neurons or directions than any artifact has, tried out at once, and
sealed by one call, so that the way from exploring to deploying needs no notebook.

POST /v1/edits takes an arm that is served (`of`) and fields of its mechanism's config to change. The patch made of that
is verified and proved like any arm, and is then an arm: requests name it by its digest, at any strength, beside others
in one batch. It is gone when EXPLORED newer ones were made, or with the process; with `keep` its sealed folder stays in
the home's runs/, where `patchbay push` takes it. Nobody gets it who does not name it. Scope: explore.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from bentos.http import answer
from bentos.runtime.arms import choose
from bentos.settings import check_signed
from patches import artifact
from patches.engine.patch import Patch
from registry import config, kept
from registry.errors import BadRequest, ConfigError, NotReady, PatchbayError, PatchError
from registry.home import home
from registry.systems import system

if TYPE_CHECKING:
    from bentos.desk import Desk

MAX_CHANGES = 16


class Edit(BaseModel):
    """Body of POST /v1/edits."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    of: str = "champion"
    """Arm whose config and tensors are begun with, by any name that `model` may have; `base`: with no tensors"""
    change: Annotated[dict[str, Any], Field(min_length=1, max_length=MAX_CHANGES)]
    """Fields of the mechanism's config and their values, such as {"heads": [[7, 2]]}"""
    keep: bool = False
    """Whether the sealed folder stays, for `patchbay push`"""


async def explore(desk: Desk, request: Request, body: Edit) -> Response:
    """Make an edit, prove it and serve it by its digest; seal it for good with `keep`."""
    table = desk.table()
    arm = choose(table, body.of, None, request.state.token.tenant, "compare" in request.state.token.scopes).arm
    about = await asyncio.to_thread(_made, desk, arm, body)
    try:
        known = await asyncio.to_thread(desk.runtime.explore, about["digest"], about.pop("patch"))
    except (PatchError, NotReady) as e:  # no such site, or numbers that are not finite: the request's fault
        raise BadRequest(f"change: {e}") from None
    if body.keep:
        about |= await asyncio.to_thread(_kept, about["digest"], desk.runtime.settings.system)
    out = {"model": f"sha256:{about['digest']}", "known": known, **about}
    return answer({"object": "edit", **out}, 200 if known else 201)


def _made(desk: Desk, arm: str | None, body: Edit) -> dict[str, Any]:
    """Build and seal the edit. Raises BadRequest naming the field that does not fit."""
    r = desk.runtime
    row = system(r.settings.system)
    if row.patch is None:
        raise BadRequest(f"{row.name} is changed by other weights or a search, which no request can name.")
    begun = r.subject.arms.get(arm) if arm is not None else None
    if arm is not None and not isinstance(begun, Patch):
        raise BadRequest(f"of: {body.of[:60]!r} is not a patch that is served here.")
    try:
        patch = varied(row.load_patch(), begun if isinstance(begun, Patch) else None, body.change)
    except (ConfigError, PatchError) as e:
        raise BadRequest(f"change: {e}") from None
    with tempfile.TemporaryDirectory(prefix=".explored-", dir=home()) as part:
        sealed = Path(part, "sealed")
        parents = [arm] if arm is not None else []
        try:
            about = artifact.save(patch, row.name, sealed, base=r.base.label, parents=parents)
            check_signed(sealed, about.digest)  # where signers are named, only what one of them signed is served
        except PatchbayError as e:
            raise BadRequest(f"change: {e}") from None
        kept.keep(sealed, about.digest)
    return {"digest": about.digest, "config": asdict(patch.config), "patch": patch}


def _kept(digest: str, name: str) -> dict[str, str]:
    """Keep the sealed folder of an edit that was proved, where `patchbay push` takes it."""
    folder = home() / "runs" / f"{name}-{digest[:16]}"
    kept.copied(home() / "artifacts" / digest, digest, folder)
    return {"sealed": folder.name, "next": f"patchbay push {folder.name}"}


def varied(cls: Any, begun: Patch | None, change: dict[str, Any]) -> Patch:
    """The patch with fields of its config changed. Of an edit of features, rows of tensors follow the features.

    begun: the patch that is changed; None: one without tensors. Raises ConfigError and PatchError naming what is wrong.
    """
    values = {**(asdict(begun.config) if begun is not None else {}), **_tuples(change)}
    tensors = dict(begun.tensors) if begun is not None else {}
    made = config.parse(cls.Config, values)
    if begun is not None and (pick := getattr(begun, "narrowed", None)) is not None:
        tensors = pick(made)
    patch: Patch = cls(made, tensors)
    return patch


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that configs have."""
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    return {k: _tuples(v) for k, v in value.items()} if isinstance(value, dict) else value
