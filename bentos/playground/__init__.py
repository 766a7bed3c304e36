"""The page every service mounts at `/`: see the patch work, base beside patched.

One page, made once at import: `index.html` with the files of `panels/` in its script, each a panel or two for a shape
of API (a constant in capitals with `needs` and `mount`). It asks /openapi.json what this service offers and shows the
panels that fit, so it names no system and no service. Nothing in it comes from elsewhere, and its headers hold it to
that: only the script and the style in the page may run (by their sha256), and it may talk to its own service alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

from bentos.playground import panels

HERE = Path(__file__).parent
PLACE, NAMES = "// the files of panels/ stand here\n", "/* theirs */"
"""in index.html: where the files go, and where the names of their panels do"""
EXAMPLE = "/* example */"
"""in index.html: where the data URI of example.webp goes"""
ORDER = ("see", "generate", "caption", "classify", "video", "render", "heads", "neurons")
"""files in the order of their panels on the page; others follow by name, and the live experiment stands last"""
PANEL = re.compile(r"^const ([A-Z]+) = \{\n  needs:", re.M)


def assembled() -> str:
    """The page with every panel in it."""

    def place(file: Path) -> tuple[bool, int, str]:
        return file.stem == "experiment", (*ORDER, file.stem).index(file.stem), file.stem

    files = [f.read_text(encoding="utf-8") for f in sorted(Path(panels.__file__).parent.glob("*.js"), key=place)]
    names = [name for text in files for name in PANEL.findall(text)]
    html = (HERE / "index.html").read_text(encoding="utf-8")
    assert html.count(PLACE) == html.count(NAMES) == html.count(EXAMPLE) == 1
    picture = base64.b64encode((HERE / "example.webp").read_bytes()).decode()
    html = html.replace(PLACE, "\n".join(files)).replace(NAMES, ", ".join(names))
    return html.replace(EXAMPLE, f"data:image/webp;base64,{picture}")


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
    html = assembled()
    return html, {
        "content-security-policy": policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
