"""The systems of pictures and clips in one request each: what `make demo` shows after its two long stories.

Each system's sealed lab artifact ships here, so nothing is fitted: it is pushed, served in this process by the very
application that BentoML serves, and asked by the requests a user would send. Pictures are written to `folder`.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
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


def picture(array: Any) -> str:
    """A uint8 picture (H, W, 3) as a PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def vlm_erasure(served: Served, folder: Path) -> str:
    """A picture whose caption invents a thing, and the caption with what is not believed erased."""
    about = served.get("/v1/generate?model=challenger")
    lines = []
    for shown in about["examples"][:3]:
        part = {"type": "image_url", "image_url": {"url": shown["picture"]}}
        asked = {
            "role": "user",
            "content": [part, {"type": "text", "text": shown.get("question", "Describe the picture.")}],
        }
        body = {
            "model": "challenger", "messages": [asked], "max_tokens": 24, "temperature": 0,
            "patchbay": {"compare": True, "ask": {"erase": "auto"}},
        }  # fmt: skip
        base, patched = served.post("/v1/chat/completions", body)["choices"]
        lines.append(f"base    {base['message']['content']}\n  patched {patched['message']['content']}")
    (folder / "vlm_erasure.json").write_text(json.dumps(about["examples"][:3])[:100_000])
    return "\n  ".join(lines)


def diffusion_cf(served: Served, folder: Path) -> str:
    """A drawing on its way into the class that differs from its own by little."""
    from training.diffusion_cf import data

    image, source, target = data.example()
    body = {"image": picture(image), "model": "challenger", "ask": {"target": target, "source": source}}
    strip = served.post("/v1/render/counterfactual", body, accept="image/png")
    (folder / "diffusion_cf.png").write_bytes(strip)
    return f"a {source} on its way to a {target}: {folder / 'diffusion_cf.png'}"


def w2w(served: Served, folder: Path) -> str:
    """Four people, each drawn as they are and moved along one attribute, eight rows of one batch."""
    rows = [
        {"prompt": "a person", "seed": 1, "ask": {"person": p, **({"attributes": {name: 2.0}} if moved else {})}}
        for p, name in enumerate(("beard", "glasses", "hat", "bald"))
        for moved in (False, True)
    ]
    got = served.post("/v1/render/sample", {"model": "challenger", "rows": rows})
    _grid([base64.b64decode(row["b64_json"]) for row in got["data"]], 2, folder / "w2w.png")
    return f"beard, glasses, hat, bald: {folder / 'w2w.png'}"


def videomae(served: Served, folder: Path) -> str:
    """A clip, and what the model makes of it from a tenth of its patches; base beside patched."""
    body = {
        "clips": [_film()],
        "model": "challenger",
        "wants": ["scores", "reconstruction"],
        "patchbay": {"compare": True},
    }
    (row,) = served.post("/v1/video", body)["results"]
    (folder / "videomae.png").write_bytes(base64.b64decode(row["reconstruction"].rpartition(",")[2]))
    return f"says {row['label']} (base: {row['base']['label']}); its reconstruction: {folder / 'videomae.png'}"


def toto(served: Served, folder: Path) -> str:
    """A clip's first frames, continued token by token."""
    (row,) = served.post("/v1/video", {"clips": [_film()], "model": "challenger", "wants": ["rollout"]})["results"]
    (folder / "toto.webp").write_bytes(base64.b64decode(row["rollout"].rpartition(",")[2]))
    return f"the clip continued: {folder / 'toto.webp'}"


def mils(served: Served, folder: Path) -> str:
    """A caption that is searched for, round by round."""
    from training.lab import worlds

    array = worlds.WORLDS["coco"]("test", 4, 3).read(range(1)).image[0].permute(1, 2, 0).numpy()
    body = {"image": {"data": picture(array)}, "model": "challenger", "budget": {"seconds": 20}}
    job = served.post("/v1/caption", body)
    until = time.monotonic() + 60
    while job["state"] not in ("done", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.3)
        job = served.get(f"/v1/jobs/{job['id']}")
    result = job["result"]
    return f"after {result['rounds']} rounds: {result['caption']!r}"


def _film() -> dict[str, str]:
    """One clip of the lab's actions as an animated WebP."""
    raise NotImplementedError


def _grid(files: list[bytes], columns: int, place: Path) -> None:
    """Pictures side by side, a row for every `columns`."""
    from PIL import Image

    tiles = [Image.open(io.BytesIO(f)).convert("RGB").resize((160, 160)) for f in files]
    sheet = Image.new("RGB", (160 * columns, 160 * (len(tiles) // columns)), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (160 * (i % columns), 160 * (i // columns)))
    sheet.save(place)


TOUR: dict[str, Callable[[Served, Path], str]] = {
    f.__name__: f for f in (vlm_erasure, w2w, diffusion_cf, videomae, toto, mils)
}
"""system -> what the demo asks of it"""


def tour(folder: Path, patchbay: Callable[..., None], say: Callable[[str], None]) -> dict[str, float]:
    """Push, serve and ask every system of TOUR whose sealed artifact ships here; seconds that each took."""
    seconds = {}
    for name, show in TOUR.items():
        began = time.monotonic()
        patchbay("push", str((SEALED / name).relative_to(ROOT)))
        with Served(name) as served:
            say(f"  {show(served, folder)}")
        seconds[name] = time.monotonic() - began
    return seconds
