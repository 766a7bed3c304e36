"""What MLflow's pyfunc answers for a video model: one row of the table for every clip."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patches.families.pictures import unpacked
from patches.families.video.decode import Limits, fit, read
from patches.families.video.worker import Clip
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject


def predict(subject: Subject, frame: Any, params: Mapping[str, Any]) -> Any:
    """A DataFrame of label, probability and features (a JSON list), one row per row of `frame`.

    clip: bytes or base64 of a video, an animated picture or a zip file of pictures. label is "" for a checkpoint
    without a classifier. Raises Invalid naming the row.
    """
    import pandas as pd

    if "clip" not in frame.columns:
        raise Invalid(f"The table has no column 'clip'; it has {', '.join(map(str, frame.columns))[:80]}.")
    model = subject.alone(subject.only).model
    layer = int(params["layer"])
    jobs = []
    for i, value in enumerate(frame["clip"]):
        try:
            video = fit(read(_bytes(value), Limits()), model.frames, model.size)
        except Invalid as e:
            raise type(e)(f"Row {i}: {e}") from None
        wants: list[Any] = ["features", "scores"] if model.head else ["features"]
        jobs.append(Clip(video, wants=wants, arm=subject.only, strength=float(params["strength"]),
                         layer=None if layer < 0 else layer))  # fmt: skip
    subject.worker().run(jobs)
    out = []
    for job in jobs:
        assert job.out is not None
        at = int(job.scores.argmax()) if job.scores is not None else -1
        out.append({
            "label": model.classes[at] if job.scores is not None else "",
            "probability": float(job.scores[at]) if job.scores is not None else 0.0,
            "features": json.dumps([round(x, 6) for x in job.out.tolist()]),
        })  # fmt: skip
    return pd.DataFrame(out)


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if not isinstance(value, str):
        raise Invalid(f"clip must be bytes or base64, not {type(value).__name__}.")
    return unpacked(value, "clip")
