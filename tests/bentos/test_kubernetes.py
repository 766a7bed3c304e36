"""The manifests against the published schemas, and the health and metadata that KServe asks for."""

import copy
import os
from pathlib import Path

import httpx
import pytest
import yaml

from bentos.build import kubernetes
from registry.manifest import Manifest

from .conftest import SYSTEM

ABOUT = Manifest("patch", SYSTEM, {"base": "pypi:smollm2@" + "0" * 64}, {}, {})
FOLDER = Manifest("patch", SYSTEM, {"base": "local:mine@" + "0" * 64}, {}, {})


def documents(file, about=ABOUT):
    written = kubernetes.files("attention-sink", f"{SYSTEM}:0123-4567", "registry.example/sink:1", about)[file]
    return list(yaml.safe_load_all(written))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0,cuda:1"])
@pytest.mark.parametrize("about", [ABOUT, FOLDER], ids=["wheel", "folder"])
def test_plain_kubernetes_is_what_its_schemas_say(about, device, monkeypatch):
    """Every document against kubernetes' own schemas, strictly: an unknown field is an error. A wrong one is found."""
    checker = pytest.importorskip("kubernetes_validate", reason="the checker comes with the group `dev`")
    monkeypatch.setenv("PATCHBAY_DEVICE", device)
    found = documents("kubernetes.yaml", about)
    kinds = ["Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"]
    assert [d["kind"] for d in found] == kinds
    for document in found:
        for version in ("1.29", checker.latest_version()):
            checker.validate(document, version, strict=True)
    wrong = copy.deepcopy(found[3])
    wrong["spec"]["metrics"][0]["pods"]["target"]["averageValu"] = "1"
    with pytest.raises(checker.ValidationError):
        checker.validate(wrong, checker.latest_version(), strict=True)
    container = found[0]["spec"]["template"]["spec"]["containers"][0]
    gpus = {"cpu": None, "cuda": 1, "cuda:0,cuda:1": 2}[device]
    assert container["resources"].get("limits", {}).get("nvidia.com/gpu") == gpus


def test_it_scales_with_rows_in_flight_and_never_loses_two_pods_at_once():
    deployment, _, budget, scaler = documents("kubernetes.yaml")
    assert "replicas" not in deployment["spec"]  # the autoscaler's
    assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert budget["spec"]["maxUnavailable"] == 1
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "patchbay_queue_rows"
    chosen = deployment["spec"]["selector"]["matchLabels"]
    assert budget["spec"]["selector"]["matchLabels"] == chosen
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["envFrom"] == [{"secretRef": {"name": "attention-sink-env", "optional": True}}]


def test_kserves_inference_service_is_what_its_definition_says():
    """Its definition is not ours to carry: name a file of it, as KServe publishes it, in KSERVE_CRD."""
    jsonschema = pytest.importorskip("jsonschema")
    (document,) = documents("kserve.yaml")
    predictor = document["spec"]["predictor"]
    assert predictor["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    if not (file := os.environ.get("KSERVE_CRD")):
        pytest.skip("KSERVE_CRD names no serving.kserve.io_inferenceservices.yaml")
    crd = yaml.safe_load(Path(file).read_text())
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1beta1"]
    strict = _closed(schema)
    jsonschema.Draft7Validator(strict).validate(document)
    wrong = copy.deepcopy(document)
    wrong["spec"]["predictor"]["canaryTraficPercent"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(strict).validate(wrong)


def _closed(schema):
    """The same schema, but a field that it does not name is an error, as it is for an API server that is asked to be
    strict."""
    if not isinstance(schema, dict):
        return [_closed(s) for s in schema] if isinstance(schema, list) else schema
    out = {k: _closed(v) for k, v in schema.items()}
    if schema.get("type") == "object" and "properties" in schema and "additionalProperties" not in schema:
        out["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        if schema["properties"].get("metadata") == {"type": "object"}:
            out["properties"]["metadata"] = {"type": "object"}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
    return out


def test_health_and_metadata_are_open_inference_protocols(service, run_async):
    async def work():
        async with service() as s:
            get = s.http.get
            assert (await get("/v2/health/live")).json() == {"live": True}
            assert (await get("/v2/health/ready")).json() == {"ready": True}
            assert set((await get("/v2")).json()) == {"name", "version", "extensions"}
            about = (await get(f"/v2/models/{SYSTEM}")).json()
            assert about["name"] == SYSTEM
            assert about["versions"][0] == s.digests[0]
            assert set(about) == {"name", "versions", "platform", "inputs", "outputs"}
            one = f"/v2/models/{SYSTEM}/versions/{s.digests[1]}"
            assert (await get(f"{one}/ready")).json() == {"name": SYSTEM, "ready": True}
            assert (await get(one)).json()["versions"] == [s.digests[1]]
            for path in ("/v2/models/another", f"/v2/models/{SYSTEM}/versions/1", "/v2/models/another/ready"):
                assert (await get(path)).status_code == 404, path
            s.runtime.problem = "gone"
            for path in ("/v2/health/ready", f"/v2/models/{SYSTEM}/ready"):
                got: httpx.Response = await get(path)
                assert (got.status_code, got.json()["ready"]) == (503, False)
            s.runtime.problem = ""

    run_async(work())
