"""Manifests of a Bento for Kubernetes: a Deployment that scales with its rows in flight, and KServe's InferenceService.

`kubernetes.yaml` holds Deployment, Service, PodDisruptionBudget and HorizontalPodAutoscaler, which asks for the gauge
`patchbay_queue_rows` (rows waiting or running) of every pod, as an adapter of Prometheus provides it. `kserve.yaml`
holds an InferenceService whose probes are Open Inference Protocol v2's (`bentos.oip`). Whatever replicas share comes
from one optional Secret: the database they follow, the store they pull from, its keys.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from bentos.hosted import workers
from registry.manifest import Manifest

PORT = 3000
REQUESTS = {"cpu": "2", "memory": "3Gi"}
"""a 135M language model in float32 peaks at 1.7 GB; a larger base needs more"""
TOKENS = "/etc/patchbay/tokens.json"
FOLDER = "/base"
SCRAPED = {"prometheus.io/scrape": "true", "prometheus.io/path": "/metrics", "prometheus.io/port": str(PORT)}
HOME = "/var/lib/patchbay"
REPLICAS = (2, 8)
"""fewest and most pods; of one alone every move of a node would be an outage"""
ROWS = 16
"""rows in flight per pod that autoscaling aims at: half a batch, so that there is room while others start"""
GRACE_S = 15
"""seconds from the signal to end until the kill; a service is gone by 10"""


def files(name: str, tag: str, image: str, about: Manifest) -> dict[str, str]:
    """The manifests of a Bento: file name -> YAML, with what they need said on top."""
    made = {}
    for file, documents in (("kubernetes.yaml", deployment), ("kserve.yaml", kserve)):
        plain = json.loads(json.dumps(documents(name, tag, image, about)))  # what is shared would become a YAML anchor
        made[file] = _header(name, tag, image, about) + yaml.safe_dump_all(plain, sort_keys=False)
    return made


def _header(name: str, tag: str, image: str, about: Manifest) -> str:
    """What to do before these manifests are applied."""
    lines = [
        f"the image:   bentoml containerize {tag} --image-tag {image}   (and push it where the cluster finds it)",
        f"the callers: kubectl create secret generic {name}-tokens --from-file=tokens.json",
        f"to follow a ledger (else it serves what it carries): kubectl create secret generic {name}-env",
        "             --from-literal=PATCHBAY_DB=postgresql://... [--from-literal=PATCHBAY_STORE=s3://... and AWS_...]",
        "to scale:    an adapter that gives the pods' gauge patchbay_queue_rows to the autoscaler",
    ]
    if about.base.startswith("local:"):
        lines.append(f"the base:    its folder, in a PersistentVolumeClaim named {name}-base")
    return "".join(f"# {line}\n" for line in ("Needs", *lines))


def deployment(name: str, tag: str, image: str, about: Manifest) -> list[dict[str, Any]]:
    """A Deployment, its Service, how many pods may be away at once, and how many there are; for any cluster."""
    chosen = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "patchbay"}
    labels = {**chosen, "app.kubernetes.io/version": tag.partition(":")[2]}
    # a base may be converted or fetched at the first start, which takes minutes
    start = {"httpGet": {"path": "/readyz", "port": PORT}, "periodSeconds": 5, "failureThreshold": 120}
    container = {"name": name, **_container(name, image, about), "startupProbe": start}
    apart = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    pod = {"containers": [container], "volumes": _volumes(name, about), "terminationGracePeriodSeconds": GRACE_S}
    template = {
        "metadata": {"labels": labels, "annotations": {**_annotations(about), **SCRAPED}},
        "spec": {**pod, "topologySpreadConstraints": [{**apart, "labelSelector": {"matchLabels": chosen}}]},
    }
    # of the new pods one more than wanted, of the old ones none less: a pod that starts loads a base first
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    rows = {"metric": {"name": "patchbay_queue_rows"}, "target": {"type": "AverageValue", "averageValue": str(ROWS)}}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    calm = {"scaleDown": {"stabilizationWindowSeconds": 300}}
    return [
        {
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "labels": labels},
            # how many there are is the autoscaler's; a number here would undo its choice at every apply
            "spec": {"selector": {"matchLabels": chosen}, "strategy": rolling, "template": template},
        },
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels},
            "spec": {"selector": chosen, "ports": [{"name": "http", "port": 80, "targetPort": PORT}]},
        },
        {
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": name, "labels": labels},
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": chosen}},
        },
        {
            "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": name, "labels": labels},
            "spec": {"scaleTargetRef": target, "minReplicas": REPLICAS[0], "maxReplicas": REPLICAS[1],
                     "metrics": [{"type": "Pods", "pods": rows}], "behavior": calm},
        },
    ]  # fmt: skip


def kserve(name: str, tag: str, image: str, about: Manifest, canary: int = 10) -> list[dict[str, Any]]:
    """An InferenceService: applied over an older one, it gets `canary` percent of the calls.

    KServe splits by weight and knows no units; who belongs to which arm of an experiment stays with our own service.
    """
    container = {"name": "kserve-container", **_container(name, image, about)}
    container["readinessProbe"]["httpGet"]["path"] = "/v2/health/ready"
    container["livenessProbe"]["httpGet"]["path"] = "/v2/health/live"
    container["livenessProbe"]["initialDelaySeconds"] = 600  # there is no startup probe to wait for
    predictor = {
        "minReplicas": REPLICAS[0], "maxReplicas": REPLICAS[1], "canaryTrafficPercent": canary,
        "containers": [container], "volumes": _volumes(name, about),
    }  # fmt: skip
    labels = {"app.kubernetes.io/part-of": "patchbay", "app.kubernetes.io/version": tag.partition(":")[2]}
    meta = {"name": name, "labels": labels, "annotations": _annotations(about)}
    kind = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService"}
    return [{**kind, "metadata": meta, "spec": {"predictor": predictor}}]


def _container(name: str, image: str, about: Manifest) -> dict[str, Any]:
    """What both kinds of deployment run. Ports have no names and the pod no security context: Knative takes neither."""
    env = {"PATCHBAY_TOKENS": TOKENS, "PATCHBAY_HOME": HOME, "PATCHBAY_CACHE": f"{HOME}/cache"}
    env["BENTOML_HOME"] = f"{HOME}/bentoml"  # the root may be read only; BentoML writes where it is told
    mounts = [{"name": "tokens", "mountPath": str(Path(TOKENS).parent), "readOnly": True}]
    mounts += [{"name": "home", "mountPath": HOME}, {"name": "tmp", "mountPath": "/tmp"}]
    if about.base.startswith("local:"):
        env["PATCHBAY_BASE"] = f"local-dir:{FOLDER}"
        mounts.append({"name": "base", "mountPath": FOLDER, "readOnly": True})
    device = os.environ.get("PATCHBAY_DEVICE", "cpu")
    resources: dict[str, Any] = {"requests": dict(REQUESTS)}
    if device.startswith("cuda"):
        env |= {"PATCHBAY_DEVICE": device, "PATCHBAY_WORKERS": str(workers())}
        resources["limits"] = {"nvidia.com/gpu": workers() * (device.count(",") + 1)}
    return {
        "image": image,
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "env": [{"name": k, "value": v} for k, v in env.items()],
        "envFrom": [{"secretRef": {"name": f"{name}-env", "optional": True}}],
        "resources": resources,
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": PORT}, "periodSeconds": 5, "timeoutSeconds": 3},
        "livenessProbe": {"httpGet": {"path": "/livez", "port": PORT}, "periodSeconds": 10, "timeoutSeconds": 5},
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1034,  # BentoML's user
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": mounts,
    }


def _volumes(name: str, about: Manifest) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [{"name": "tokens", "secret": {"secretName": f"{name}-tokens"}}]
    volumes.append({"name": "home", "emptyDir": {}})
    if about.base.startswith("local:"):
        volumes.append({"name": "base", "persistentVolumeClaim": {"claimName": f"{name}-base", "readOnly": True}})
    volumes.append({"name": "tmp", "emptyDir": {}})
    return volumes


def _annotations(about: Manifest) -> dict[str, str]:
    return {"patchbay/artifact": f"sha256:{about.digest}", "patchbay/base": about.base}
