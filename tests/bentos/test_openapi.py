"""What the OpenAPI document allows and what it forbids, thrown at the service: never a 5xx, never an unknown status."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.specs.openapi.checks import negative_data_rejection, status_code_conformance

from bentos.app import application, calls
from bentos.desk import ROUTES
from bentos.openapi import openapi
from bentos.runtime import Settings
from bentos.tokens import Tokens
from registry.ab import experiment as experiments
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.home import home
from registry.systems import system
from tests.bentos.shapes.test_classify import coded, picture

from .conftest import CONFIGS, HEADS, NEURONS, PICTURES, SYSTEM, seal, seal_features, seal_heads, seal_neurons

PNG = coded(picture())

EXAMPLES = 25
OPERATIONS = [
    (name, m, path)
    for name in (SYSTEM, PICTURES, NEURONS, HEADS)
    for path, methods in openapi(calls(system(name)), name)["paths"].items()
    for m in methods
    if name == SYSTEM or path not in openapi(ROUTES, "")["paths"]  # the desk's own once
    if name not in (NEURONS, HEADS) or path != "/v1/classify"  # the same shape as of PICTURES
]


@pytest.fixture(scope="module")
def schemas(tmp_path_factory, tiny_llm, tiny_clip):
    """The documents as running services give them; their calls go through the application in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("home")))
        home().mkdir(parents=True, exist_ok=True)
        pairs = {
            SYSTEM: [seal(tiny_llm, c) for c in CONFIGS[:2]],
            PICTURES: [seal_features(tiny_clip, range(9), seed) for seed in (0, 1)],
            NEURONS: [seal_neurons(tiny_clip, range(9), layer) for layer in (0, 1)],
            HEADS: [seal_heads(seed) for seed in (0, 1)],
        }
        made = {}
        for name, digests in pairs.items():
            ledgers.promote(Ledger(), name, digests[0])
            x = experiments.begin(name, control=digests[0], treatment=digests[1], share=0.5)
            ledgers.split(Ledger(), name, experiments.plain(x))
            app = application(Settings(name, base="tiny"), Tokens(None))
            made[name] = schemathesis.openapi.from_asgi("/openapi.json", app)
        yield made, str(home())
        shutdown_lifespans()


FITTING = {"image": {"data": PNG}, "images": [{"data": PNG}], "features": [1], "labels": ["cat", "dog"],
           "true": "cat", "wrong": "dog", "heads": ["1.0"], "texts": ["cat", "dog"]}  # fmt: skip
"""what no generator hits upon: a picture, a feature and a head there are, labels that differ"""
EITHER = {"/v1/explain/neighbours": ("text", "property", "gallery"), "/v1/explain/gallery": ("gallery", "names")}
"""fields that leave no room for FITTING's, or whose values only a former answer tells"""


def plain(body: Any, lengths: set[str]) -> Any:
    """The same body, asking for one token (how long an answer may be is not what is tested), whole numbers as such.

    JSON Schema calls 4.0 an integer; we do not, and no client sends it.
    """
    if isinstance(body, list):
        return [plain(v, set()) for v in body]
    if isinstance(body, dict):
        fitting = {k: v for k, v in FITTING.items() if k in body}
        return {k: plain(v, set()) for k, v in body.items()} | dict.fromkeys(lengths, 1) | fitting
    return int(body) if isinstance(body, float) and body.is_integer() else body


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("name", "method", "path"), OPERATIONS)
def test_no_body_brings_a_5xx(schemas, monkeypatch, name, method, path, mode):
    schemas, place = schemas
    monkeypatch.setenv("PATCHBAY_HOME", place)  # an application starts at its first call, and reads on later
    operation = schemas[name][path][method.upper()]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # nothing in it can be wrong
    model = {c.path.replace(":path}", "}"): c.body for c in calls(system(name))}[path]
    lengths = {"max_tokens", "max_completion_tokens"} & (model.model_fields.keys() if model else set())
    seen: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES if operation.body else 3, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def throw(case):
        if mode is GenerationMode.POSITIVE:
            case.body = plain(case.body, lengths)
            if isinstance(case.body, dict) and case.body.keys() & {"image", "images"}:
                case.body = {k: v for k, v in case.body.items() if k not in EITHER.get(path, ())}
        answer = case.call()
        seen[answer.status_code] += 1
        case.validate_response(answer, checks=[not_a_server_error, status_code_conformance, negative_data_rejection])
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    throw()
    print(method, path, mode, dict(seen))
    if mode is GenerationMode.NEGATIVE:
        assert set(seen) <= {400, 404, 413, 415}  # 404: an unknown model was seen first
    elif path == "/v1/explain/examples":  # these artifacts carry none
        assert set(seen) == {404}
    elif path not in (
        "/v1/outcomes",
        "/v1/models/{model}",
        "/v1/explain/features/{feature}",
        "/v1/explain/neurons/{layer}/{neuron}",
        "/v1/explain/heads/{head}",
        "/v1/explain/gallery/{gallery}",
        "/v1/edits",
        "/v2/models/{name}",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/versions/{version}",
        "/v2/models/{name}/versions/{version}/ready",
    ):  # no generated unit was answered, no generated name is served
        assert seen[200] > 0
