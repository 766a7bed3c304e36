"""A judge model's verdicts as outcomes: only what wins in both orders wins, and every pair is told once."""

import json

import httpx
import pytest

from registry.ab.judge_model import score
from registry.errors import NotReady

PAIRS = [
    {"request": "r1", "unit": "a", "control": "bad", "treatment": "good"},
    {"request": "r2", "unit": "b", "control": "good", "treatment": "bad"},
    {"request": "r3", "unit": "c", "control": "same", "treatment": "same"},
]


def world(told, status=200):
    """A service with three pairs, and a judge that likes "good", and else whatever it reads first."""

    def answer(request):
        if request.url.path == "/v1/shadows":
            return httpx.Response(status, json={"shadows": PAIRS})
        body = json.loads(request.content)
        if request.url.path == "/v1/outcomes":
            told.append(body)
            return httpx.Response(200, json={})
        text = body["messages"][0]["content"]
        said = "2" if "Answer 2:\ngood" in text else "Answer 1."
        return httpx.Response(200, json={"choices": [{"message": {"content": said}}]})

    return httpx.Client(transport=httpx.MockTransport(answer))


def test_a_pair_is_won_in_both_orders_or_tied_and_told_under_its_key():
    told = []
    with world(told) as http:
        assert score(http, "http://s", "http://j", "m") == {"won": 1, "lost": 1, "tied": 1}
    worth = {(one["unit"], one["arm"]): one["value"] for one in told}
    assert worth == {("a", "control"): 0.0, ("a", "treatment"): 1.0, ("b", "control"): 1.0, ("b", "treatment"): 0.0,
                     ("c", "control"): 0.5, ("c", "treatment"): 0.5}  # fmt: skip
    assert len({one["key"] for one in told}) == len(told) == 6


def test_a_service_that_refuses_is_said():
    with world([], 403) as http, pytest.raises(NotReady, match="403"):
        score(http, "http://s", "http://j", "m")
