"""Serve a system on Ray Serve instead of BentoML: `PATCHBAY_SYSTEM=... serve run bentos.ray_serve:application`.

The same application, hosted by Ray's replicas: PATCHBAY_REPLICAS of them, each on a GPU of its own if PATCHBAY_DEVICE
names one (Ray shows a replica only its own, which is `cuda`). Replicas are one service through PATCHBAY_DB, as others
are: arms are hashes of units, one of the replicas judges.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from starlette.applications import Starlette

REPLICAS = "PATCHBAY_REPLICAS"


def _application() -> Starlette:
    """Made in the replica: what it holds cannot be sent there."""
    from bentos.hosted import hosted

    return hosted(lambda: False, parent=False)


def bound() -> Any:
    """The deployment, as `serve.run` takes it."""
    gpus = float(os.environ.get("PATCHBAY_DEVICE", "").startswith("cuda"))
    given = {k: v for k, v in os.environ.items() if k.startswith(("PATCHBAY_", "MLFLOW_", "AWS_", "HF_", "OMP_"))}
    made: Any = serve.deployment(
        serve.ingress(_application)(_Replica), name="patchbay", num_replicas=int(os.environ.get(REPLICAS) or 1),
        max_ongoing_requests=512,  # the service has a queue and limits of its own
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus, "runtime_env": {"env_vars": given}},
    )  # fmt: skip
    return made.bind()


class _Replica:
    """What Ray makes of a process; the application does the rest."""


def __getattr__(name: str) -> Any:
    """`application`, made when somebody asks for it: reading the environment is not for an import."""
    if name != "application":
        raise AttributeError(name)
    return bound()
