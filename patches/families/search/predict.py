"""Pictures in, captions out: what MLflow's pyfunc runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patches.families.clip import labelled
from patches.families.search.config import Budget
from patches.families.search.worker import Searching, SearchWorker, answer
from patches.families.worker import WorkerSettings
from registry.errors import Invalid

if TYPE_CHECKING:
    from patches.subject import Subject


def predict(subject: Subject, frame: Any, params: Mapping[str, Any]) -> Any:
    """A DataFrame of caption and score, one row per row of `frame`; all rows are searched for together.

    image: bytes, base64, or a path below $PATCHBAY_PICTURES. steps: rounds, -1 for as many as the configuration says;
    calls: texts scored, 0 likewise. Raises Invalid naming the row.
    """
    import pandas as pd

    if "image" not in frame.columns:
        raise Invalid(f"The table has no column 'image'; it has {', '.join(map(str, frame.columns))[:80]}.")
    steps, calls = int(params["steps"]), int(params["calls"])
    budget = Budget(steps=None if steps < 0 else steps, calls=calls or None)
    jobs = []
    for i, value in enumerate(frame["image"]):
        try:
            pixels = subject.base.processor.image(labelled.picture_of(value))
        except Invalid as e:
            raise type(e)(f"Row {i}: {e}") from None
        jobs.append(Searching(arm=subject.only, strength=float(params["strength"]), inputs={"pixels": pixels},
                              budget=budget))  # fmt: skip
    SearchWorker(subject, WorkerSettings()).run(jobs)
    made = [answer(job) for job in jobs]
    return pd.DataFrame([{"caption": a.text, "score": a.score} for a in made])
