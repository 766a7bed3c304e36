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

from bentos.desk import application, calls, openapi
from bentos.http import Tokens
from bentos.runtime import Settings
from registry import experiment as experiments
from registry import ledger as ledgers
from registry.ledger import Ledger
from registry.systems import system

from .conftest import CONFIGS, SYSTEM, seal

CALLS = calls(system(SYSTEM))
OPERATIONS = [(m, path) for path, methods in openapi(CALLS, SYSTEM)["paths"].items() for m in methods]
EXAMPLES = 25


@pytest.fixture(scope="module")
def schema(tmp_path_factory, tiny_llm):
    """The document as the running service gives it; its calls go through the application in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("home")))
        digests = [seal(tiny_llm, c) for c in CONFIGS[:2]]
        ledgers.promote(Ledger(), SYSTEM, digests[0])
        x = experiments.begin(SYSTEM, control=digests[0], treatment=digests[1], share=0.5)
        ledgers.split(Ledger(), SYSTEM, experiments.plain(x))
        yield schemathesis.openapi.from_asgi("/openapi.json", application(Settings(SYSTEM, base="tiny"), Tokens(None)))
        shutdown_lifespans()


def plain(body: Any, lengths: set[str]) -> Any:
    """The same body, asking for one token (how long an answer may be is not what is tested), whole numbers as such.

    JSON Schema calls 4.0 an integer; we do not, and no client sends it.
    """
    if isinstance(body, list):
        return [plain(v, set()) for v in body]
    if isinstance(body, dict):
        return {k: plain(v, set()) for k, v in body.items()} | dict.fromkeys(lengths, 1)
    return int(body) if isinstance(body, float) and body.is_integer() else body


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_body_brings_a_5xx(schema, method, path, mode):
    operation = schema[path][method.upper()]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # nothing in it can be wrong
    model = {c.path: c.body for c in CALLS}[path]
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
        answer = case.call()
        seen[answer.status_code] += 1
        case.validate_response(answer, checks=[not_a_server_error, status_code_conformance, negative_data_rejection])
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    throw()
    print(method, path, mode, dict(seen))
    if mode is GenerationMode.NEGATIVE:
        assert set(seen) <= {400, 413, 415}
    elif path != "/v1/outcomes":  # no generated unit was ever answered
        assert seen[200] > 0
