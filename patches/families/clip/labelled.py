"""CLIP's MLflow prediction: images and candidate labels in, the most probable label and its probability out."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image as Pillow

from patches.evidence.label_set import FILE, LabelSet, load_label_set
from patches.families.clip.embeddings import TEMPLATES, logit_scale, zero_shot
from patches.families.clip.table import EXAMPLE, TABLE
from patches.families.clip.worker import Picture, made
from patches.families.pictures import opened, read
from patches.families.worker import WorkerSettings
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject

__all__ = ["TABLE", "example", "predict"]

FOLDER = "PATCHBAY_PICTURES"
"""Environment variable: folder under which images may be named by path. Unset, paths are refused, since a table may
come from a request"""


def predict(subject: Subject, frame: Any, params: Mapping[str, Any]) -> Any:
    """Classify the rows of a DataFrame; returns a DataFrame of label and probability.

    image: bytes, base64, or a path below $PATCHBAY_PICTURES; labels: a list, a JSON list, or empty for the label set
    that was sealed with the patch. Raises Invalid naming the row.
    """
    import pandas as pd

    if "image" not in frame.columns:
        raise Invalid(f"The table has no column 'image'; it has {', '.join(map(str, frame.columns))[:80]}.")
    rows = [_row(i, values) for i, values in enumerate(frame.to_dict("records"))]
    sets: dict[tuple[str, ...], LabelSet] = {}
    for labels, _ in rows:
        if labels not in sets:
            sets[labels] = _label_set(subject, labels)
    pixels = [subject.base.processor.image(picture)[0] for _, picture in rows]
    jobs = [Picture(x, arm=subject.only, strength=float(params["strength"])) for x in pixels]
    made(subject, WorkerSettings()).run(jobs)
    out = []
    for (labels, _), job in zip(rows, jobs, strict=True):
        assert job.out is not None
        p = sets[labels].logits(job.out[None])[0].softmax(0)
        at = int(p.argmax())
        out.append({"label": sets[labels].classes[at], "probability": float(p[at])})
    return pd.DataFrame(out)


def _row(index: int, values: Mapping[str, Any]) -> tuple[tuple[str, ...], Pillow.Image]:
    try:
        return _labels(values.get("labels")), picture_of(values["image"])
    except Invalid as e:
        raise type(e)(f"Row {index}: {e}") from None


def picture_of(value: Any) -> Pillow.Image:
    """Decode an image given as bytes, base64, or a path below $PATCHBAY_PICTURES. Raises Invalid."""
    if isinstance(value, Pillow.Image):
        return value.convert("RGB")
    if isinstance(value, bytes | bytearray):
        return opened(bytes(value))
    if isinstance(value, Path) or (isinstance(value, str) and _named(value) is not None):
        file = value if isinstance(value, Path) else _named(value)
        assert file is not None
        return opened(file.read_bytes())
    if isinstance(value, str):
        return read(value)
    raise Invalid(f"image must be bytes, base64 or a path, not {type(value).__name__}.")


def _named(value: str) -> Path | None:
    """Resolve a path below $PATCHBAY_PICTURES; None for text that is no such path."""
    folder = os.environ.get(FOLDER)
    if not folder or len(value) > 4096:
        return None
    root = Path(folder).resolve()
    file = (root / value).resolve()
    try:
        return file if file.is_relative_to(root) and file.is_file() else None
    except (OSError, ValueError):
        return None


def _labels(value: Any) -> tuple[str, ...]:
    if value is None or (isinstance(value, float) and value != value):  # pandas gives NaN for a missing value
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Invalid(f"labels are no JSON list: {value[:60]!r}.") from None
    if not isinstance(value, Sequence) and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or len(value) < 2 or not all(isinstance(v, str) for v in value):
        raise Invalid(f"labels must be a list of at least two texts, not {value!r:.60}.")
    return tuple(value)


@torch.inference_mode()
def _label_set(subject: Subject, labels: tuple[str, ...]) -> LabelSet:
    """Return the classifier, with the logit scale folded into its weights."""
    scale = logit_scale(subject.base)
    if labels:
        return LabelSet(labels, (scale * zero_shot(subject.base, labels, TEMPLATES)).cpu())
    if subject.folder is None or not (subject.folder / FILE).is_file():
        raise Invalid("There is no column 'labels', and no label set was sealed with this model. Name some labels.")
    found = load_label_set(subject.folder)
    return LabelSet(found.labels, scale * found.weights)


def example() -> bytes:
    """Return the bytes of the example image."""
    return base64.b64decode(EXAMPLE)
