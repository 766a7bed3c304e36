"""The page every service mounts at `/`: see the patch work, base beside patched.

One static file, `index.html`. It asks /openapi.json what this service offers and shows the panels that fit, so it names
no system and no service. Nothing in it comes from elsewhere, and its headers hold it to that: only the script and the
style in the file may run (by their sha256), and it may talk to its own service alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

INDEX = Path(__file__).parent / "index.html"


def policy(html: str) -> str:
    """The Content-Security-Policy that lets the inline scripts and styles of `html` run, and nothing else."""

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(f.encode()).digest()).decode()}'" for f in found)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page() -> HTMLResponse:
    """The page with its headers."""
    html, headers = _read()
    return HTMLResponse(html, headers=headers)


@cache
def _read() -> tuple[str, dict[str, str]]:
    html = INDEX.read_text(encoding="utf-8")
    return html, {
        "content-security-policy": policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
