"""Plain BentoML with the same work as `tests.bench.others`: its own API method, its defaults."""

from __future__ import annotations

from typing import Any

import bentoml

from tests.bench.others import PATH, Work


@bentoml.service(name="plain", workers=1)
class Plain:
    """One picture, the labels' probabilities."""

    def __init__(self) -> None:
        self.work = Work()

    @bentoml.api(route=PATH)
    def classify(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        return self.work({"images": images})
