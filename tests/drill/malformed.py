"""Requests that are no requests: every route, every field, with a seed; no answer may be a 5xx."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from typing import Any

from tests.bench.server import DOT

CHAT = {
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 2,
    "temperature": 1.0,
    "top_p": 0.9,
    "n": 1,
    "seed": 1,
    "stop": ["x"],
    "logit_bias": {"5": 1.0},
    "logprobs": True,
    "top_logprobs": 2,
    "user": "u",
    "patchbay": {"strength": 0.5},
    "stream": False,
}
COMPLETE = {"prompt": ["a", "b"], "max_tokens": 2, "temperature": 0.5, "logprobs": 1, "echo": True, "n": 1, "stop": "x"}
CLASSIFY = {"images": [{"data": DOT}], "labels": ["cat", "dog"], "top": 2, "user": "u", "patchbay": {"strength": 1.0}}
WORDS: dict[str, Any] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETE,
    "/v1/outcomes": {"outcomes": [{"unit": "u", "value": 1, "key": "k"}]},
}
PICTURES: dict[str, Any] = {
    "/v1/classify": CLASSIFY,
    "/v1/outcomes": {"unit": "u", "value": 1},
    "/v1/explain/encode": {"image": {"data": DOT}, "top": 3},
    "/v1/explain/steer": {"image": {"data": DOT}, "labels": ["cat", "dog"], "features": {"1": 0.0}},
}
GETS = (
    "/v1/models",
    "/v1/experiments/live",
    "/v1/shadows",
    "/metrics",
    "/readyz",
    "/livez",
    "/openapi.json",
    "/",
    "/v1/explain/features",
    "/v1/explain/features/1",
    "/v1/explain/features/99999999999999999999",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**40,
    1e-40,
    5e-324,
    -0.0,
    1e308,
    0.1,
    "",
    " ",
    "x",
    "\x00",
    "\ud7ff",
    "\u202e",
    "a" * 5000,
    "../../etc/passwd",
    "file:///etc/passwd",
    "sha256:" + "0" * 64,
    "{{7*7}}",
    "%s%n",
    "data:image/png;base64,AAAA",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
    [1, "a"],
    ["x"] * 300,
    [5] * 300,
    {"5": float("1e30")},
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"data": 5}],
    [{"data": ""}],
    {"data": "AAAA"},
    {"strength": -1},
    {"ask": {}},
    {"ask": {"x": [[[]]]}},
    {"compare": True},
)


def body(rng: random.Random, good: Any) -> bytes:
    """A request that was good, and is not any more (now and then it still is)."""
    made = copy.deepcopy(good)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        made = _mutate(rng, made)
    raw = json.dumps(made).encode()
    how = rng.random()
    if how < 0.08:  # bytes
        cut = bytearray(raw)
        for _ in range(rng.choice((1, 2, 8))):
            cut[rng.randrange(len(cut))] = rng.randrange(256)
        return bytes(cut)
    if how < 0.12:
        return raw[: rng.randrange(len(raw))]
    if how < 0.14:
        depth = rng.choice((20, 40, 200, 1000, 5000))
        return raw[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
    if how < 0.16:
        return rng.choice((b"", b"null", b"[]", b"1", b'"x"', b"NaN", b"{" * 999, b"\xff\xfe", b'{"a":1e999}', raw * 2))
    return raw


def _mutate(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        how = rng.random()
        out = dict(value)
        if how < 0.12:
            del out[key]
        elif how < 0.2:
            out[rng.choice(("extra", "", "__class__", key + "x", "a" * 300))] = rng.choice(VALUES)
        elif how < 0.65:
            out[key] = rng.choice(VALUES)
        else:
            out[key] = _mutate(rng, value[key])
        return out
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], _mutate(rng, value[at]), *value[at + 1 :], *([value[at]] * rng.choice((0, 0, 1, 70)))]
    return rng.choice(VALUES)


HEADERS: tuple[dict[str, str], ...] = (
    {},
    {},
    {},
    {},
    {},
    {},
    {"x-patchbay-arm": "nobody"},
    {"x-patchbay-arm": "sha256:" + "f" * 64},
    {"x-patchbay-unit": "a b"},
    {"x-patchbay-unit": "x" * 500},
    {"authorization": "Bearer x"},
    {"authorization": "\t"},
    {"origin": "http://evil.example"},
    {"x-forwarded-for": "1.2.3.4"},
    {"accept": "text/plain"},
    {"x-patchbay-arm": "challenger"},
    {"x-patchbay-unit": "u%00"},
    {"content-length": "5"},
)
TYPES = ("application/json",) * 40 + (
    "application/json; charset=utf-16",
    "text/plain",
    "",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
)


async def attack(http: Any, rng: random.Random, routes: dict[str, Any], n: int) -> tuple[Counter[int], list[str]]:
    """n requests; statuses, and what brought a 5xx."""
    seen: Counter[int] = Counter()
    bad: list[str] = []
    for _ in range(n):
        if rng.random() < 0.08:
            method = rng.choice(("GET", "GET", "DELETE", "PUT", "HEAD"))
            path = rng.choice(GETS) + rng.choice(("", "?model=x", "?model=" + "y" * 300, "?top=-1", "/%00", "/../x"))
            got = await http.request(method, path)
            raw = b""
        else:
            path = rng.choice(sorted(routes))
            raw = body(rng, routes[path])
            headers = {**rng.choice(HEADERS), "content-type": rng.choice(TYPES)}
            headers.pop("content-length", None)
            got = await http.post(path, content=raw, headers=headers)
        seen[got.status_code] += 1
        if got.status_code >= 500:
            bad.append(f"{got.status_code} {path} {raw[:200]!r} -> {got.text[:200]}")
    return seen, bad
