"""Pictures by request: a prompt or a picture in, a picture out. What MLflow's table and the HTTP shape ask of a
diffusion model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import Tensor

from patches.engine.patch import Patch
from patches.families.base import Base
from patches.families.diffusion.base import Pipe
from patches.families.diffusion.worker import Denoiser, Denoising, Edit
from patches.families.pictures import read
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject

TOP = 0.9
"""Share of the schedule that a picture is inverted up to. Above it a picture's own noise has little to say, and a
schedule with zero terminal signal has none at its last level"""
LEVELS = 8


def levels(pipe: Pipe, count: int = LEVELS) -> tuple[int, ...]:
    """The levels a picture is inverted along, highest first."""
    return tuple(pipe.schedule.levels(count, round(TOP * len(pipe.schedule.alphas)) - 1))


def drawn(pipe: Pipe, prompt: str, *, guidance: float = 3.0, **row: Any) -> Denoising:
    """A row that draws what a prompt says. row: fields of Denoising."""
    return Denoising(condition=pipe.text([prompt])[0], guidance=guidance, **row)


def changed(pipe: Pipe, picture: Tensor, *, guidance: float = 2.0, count: int = LEVELS, **row: Any) -> Denoising:
    """A row that inverts a picture (3, H, W) in 0..1 and regenerates it under an arm, guidance starting from the
    picture's own condition: without an arm it gives the picture back. A base that reads text alone is told nothing."""
    told = pipe.image(picture[None])[0] if "image" in pipe.conditions else pipe.null()
    return Denoising(
        condition=told, other=told, guidance=guidance, start=pipe.latents(picture[None])[0].cpu(),
        program=Edit(levels=levels(pipe, count)), **row,
    )  # fmt: skip


def prepare(patch: Patch | None, row: Denoising, said: Mapping[str, Any] | None, base: Base, run: Any) -> None:
    """Make a row say what a request says to its mechanism. Raises Invalid for what the mechanism does not take."""
    if not said:
        return
    if patch is None or patch.Ask is None:
        raise Invalid("This arm takes nothing from a request; leave `ask` out.")
    try:
        ask = patch.Ask.model_validate(said)
    except ValidationError as e:
        first = e.errors()[0]
        raise Invalid(f"ask.{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    patch.prepare(row, ask, base, run)


def predict(subject: Subject, frame: Any, params: Mapping[str, Any]) -> Any:
    """A DataFrame with a PNG in base64 for each row of `frame`: drawn from its prompt, or its image changed by the arm.

    ask: JSON of what the mechanism takes. Raises Invalid naming the row.
    """
    import pandas as pd

    worker = Denoiser(subject)
    patch = subject.arms.get(subject.only) if subject.only else None
    jobs = []
    for i, values in enumerate(frame.to_dict("records")):
        try:
            row = _row(subject.base, values, params, subject.only)
            prepare(
                patch if isinstance(patch, Patch) else None, row, _said(values.get("ask")), subject.base, worker.run
            )
        except Invalid as e:
            raise type(e)(f"Row {i}: {e}") from None
        jobs.append(row)
    worker.run(jobs)
    return pd.DataFrame({"image": [png(subject.base, job) for job in jobs]})


def _row(base: Base, values: Mapping[str, Any], params: Mapping[str, Any], arm: str | None) -> Denoising:
    prompt, image = (v if isinstance(v := values.get(k), str) and v else None for k in ("prompt", "image"))
    how: dict[str, Any] = {"arm": arm, "strength": float(params["strength"]), "seed": int(params["seed"])}
    if image is not None:
        return changed(base.model, base.processor.image(read(image)), **how)
    if prompt is None:
        raise Invalid("it has neither a prompt nor an image.")
    return drawn(base.model, prompt, guidance=float(params["guidance"]), steps=int(params["steps"]), **how)


def _said(value: Any) -> Mapping[str, Any] | None:
    if not isinstance(value, str) or not value:
        return None
    try:
        said = json.loads(value)
    except ValueError:
        raise Invalid(f"ask is no JSON: {value[:60]!r}.") from None
    if not isinstance(said, dict):
        raise Invalid(f"ask must be a JSON object, not {value[:60]!r}.")
    return said


def png(base: Base, row: Denoising) -> str:
    """A finished row's picture as PNG in base64. Raises what the row failed with."""
    if row.error is not None:
        raise row.error
    assert row.picture is not None
    out = io.BytesIO()
    base.processor.picture(row.picture).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
