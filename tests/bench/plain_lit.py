"""LitServe with the same work as `tests.bench.others`, one worker: `python -m tests.bench.plain_lit PORT`.

A file of its own, for LitServe starts its worker anew and looks the class up there.
"""

from __future__ import annotations

import sys
from typing import Any

import litserve

from tests.bench.others import PATH, Work


class Plain(litserve.LitAPI):
    """One picture, the labels' probabilities."""

    def setup(self, device: str) -> None:
        del device
        self.work = Work()

    def decode_request(self, request):  # without types, by which LitServe would look for a form
        return request

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        return self.work(x)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Plain(api_path=PATH), accelerator="cpu", workers_per_device=1, healthcheck_path="/readyz"
    )
    server.run(port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False, log_level="warning")
