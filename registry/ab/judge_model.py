"""Outcomes from a judge model: which of a shadow experiment's two answers is better, asked in both orders.

A judge prefers what it reads first (Zheng et al., arXiv 2306.05685), so a pair counts as won only if the same answer
wins in both orders, and else as a tie. The service counts outcomes once per key, so scoring twice changes nothing.
"""

from __future__ import annotations

from typing import Any

from registry.ab.experiment import CONTROL, TREATMENT, Arm
from registry.errors import NotReady

RUBRIC = "Which of two answers is better: correct, helpful and free of repetition? Reply with the single digit 1 or 2."
MAX_LETTERS = 4000


def score(
    http: Any, service: str, judge: str, model: str, *, key: str = "", token: str = "", rubric: str = RUBRIC
) -> dict[str, int]:
    """Score the pairs that the service at `service` keeps, by the OpenAI-compatible model at `judge`.

    http: an httpx.Client. key: of the judge. token: of the service, with the scopes compare and outcomes. Returns how
    many pairs the treatment won and lost, and ties. Raises NotReady if either does not answer.
    """
    asking = {"authorization": f"Bearer {key}"} if key else {}
    telling = {"authorization": f"Bearer {token}"} if token else {}
    found = {"won": 0, "lost": 0, "tied": 0}
    for pair in _json(http.get(f"{service}/v1/shadows", headers=telling))["shadows"]:
        first = _asked(http, judge, model, rubric, pair[CONTROL], pair[TREATMENT], asking)
        second = _asked(http, judge, model, rubric, pair[TREATMENT], pair[CONTROL], asking)
        worth = {("2", "1"): 1.0, ("1", "2"): 0.0}.get((first, second), 0.5)
        found["won" if worth == 1.0 else "lost" if worth == 0.0 else "tied"] += 1
        values: dict[Arm, float] = {CONTROL: 1.0 - worth, TREATMENT: worth}
        for arm, value in values.items():
            said = {"unit": pair["unit"], "value": value, "arm": arm, "key": f"judge-{pair['request']}-{arm}"}
            _json(http.post(f"{service}/v1/outcomes", json=said, headers=telling))
    return found


def _asked(http: Any, judge: str, model: str, rubric: str, one: Any, two: Any, headers: dict[str, str]) -> str:
    text = f"{rubric}\n\nAnswer 1:\n{str(one)[:MAX_LETTERS]}\n\nAnswer 2:\n{str(two)[:MAX_LETTERS]}"
    body = {"model": model, "max_tokens": 4, "temperature": 0, "messages": [{"role": "user", "content": text}]}
    got = _json(http.post(f"{judge}/v1/chat/completions", json=body, headers=headers))
    said = str(got["choices"][0]["message"]["content"])
    return next((letter for letter in said if letter in "12"), "")


def _json(got: Any) -> Any:
    if got.status_code != 200:
        raise NotReady(f"{got.request.url.host} answers {got.status_code}: {got.text[:200]}")
    return got.json()
