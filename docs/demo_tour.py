"""The systems of pictures and clips in one request each: what `make demo` shows after its two long stories.

Each system's sealed lab artifact ships here, so nothing is fitted: it is pushed, served in this process by the very
application that BentoML serves, and asked by the requests a user would send. Pictures are written to `folder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SEALED = ROOT / "patches" / "lab" / "sealed"
"""lab artifacts, one folder per system, as `fit` sealed them"""


class Served:
    """A system's service in this process, asked as over HTTP."""

    def __init__(self, name: str) -> None:
        from starlette.testclient import TestClient

        from bentos.app import application
        from bentos.runtime import Settings

        self.client = TestClient(application(Settings(system=name)), base_url="http://127.0.0.1")

    def __enter__(self) -> Served:
        self.client.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self.client.__exit__(*why)

    def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        """The answer of a request that must succeed: JSON, or bytes of a picture."""
        answer = self.client.post(path, json=body, headers=headers)
        if answer.status_code >= 400:
            raise SystemExit(f"POST {path} gave {answer.status_code}: {answer.text[:400]}")
        return answer.json() if "json" in answer.headers["content-type"] else answer.content

    def get(self, path: str) -> Any:
        """The JSON that a GET gives."""
        return self.client.get(path).raise_for_status().json()
