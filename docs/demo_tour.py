"""The systems of pictures and clips in one request each: what `make demo` shows after its two long stories.

Each system's sealed lab artifact ships here, so nothing is fitted: it is pushed, served in this process by the very
application that BentoML serves, and asked by the requests a user would send. Pictures are written to `folder`.
"""

from __future__ import annotations

import base64
import io
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
    """Pictures whose captions invent a thing, and the captions with what is not believed erased."""
    lines = []
    for n, shown in enumerate(served.get("/v1/generate?model=challenger")["examples"][:3]):
        (folder / f"vlm_erasure-{n}.png").write_bytes(base64.b64decode(shown["png"].rpartition(",")[2]))
        text = {"type": "text", "text": shown.get("question", "Describe the picture.")}
        asked = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": shown["png"]}}, text]}
        body = {
            "model": "challenger", "messages": [asked], "max_tokens": 24, "temperature": 0,
            "patchbay": {"compare": True, "ask": {"erase": "auto"}},
        }  # fmt: skip
        base, patched = served.post("/v1/chat/completions", body)["choices"]
        lines += [f"base     {base['message']['content']}", f"patched  {patched['message']['content']}"]
    return "\n  ".join(lines)


def diffusion_cf(served: Served, folder: Path) -> str:
    """A drawing that no fit has seen on its way into the class that differs from its own by little."""
    from training.diffusion_cf.config import Config
    from training.diffusion_cf.rows import pictures

    test = pictures(Config(), served.client.app.state.desk.runtime.base, "test", 1)  # type: ignore[attr-defined]
    at = test.label.tolist().index(test.classes.index("leopard"))
    array = (255 * (test.x[at].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)).round().byte().numpy()
    body = {"image": picture(array), "model": "challenger", "ask": {"target": "tiger", "source": "leopard"}}
    strip = served.post("/v1/render/counterfactual", body, accept="image/png")
    (folder / "diffusion_cf.png").write_bytes(strip)
    return f"a leopard on its way to a tiger: [bold]{folder / 'diffusion_cf.png'}[/]"


def w2w(served: Served, folder: Path) -> str:
    """Two people, each drawn as they are and one and two gaps along one attribute: six rows of one batch."""
    rows = [
        {"prompt": "a person", "seed": 1, "ask": {"person": p, "attributes": {name: by}}}
        for p, name in ((0, "beard"), (2, "hat"))
        for by in (0.0, 1.0, 2.0)
    ]
    got = served.post("/v1/render/sample", {"model": "challenger", "rows": rows})
    if refused := [row["error"]["message"] for row in got["data"] if row.get("error")]:
        raise SystemExit(f"w2w refused a row: {refused[0]}")
    _grid([base64.b64decode(row["b64_json"]) for row in got["data"]], 3, folder / "w2w.png")
    return f"two people on their way to a beard and a hat: [bold]{folder / 'w2w.png'}[/]"


def videomae(served: Served, folder: Path) -> str:
    """A clip, what the model makes of it from a tenth of its patches, and what it calls the motion."""
    wants = {"wants": ["scores", "reconstruction"], "patchbay": {"compare": True}}
    (row,) = served.post("/v1/video", {"clips": [_film()], "model": "challenger", **wants})["results"]
    _save(row["reconstruction"]["strip"], folder / "videomae.png")
    said = f"says {row['label']} (base: {row['base']['label']})" if "label" in row else "has no classes"
    return f"{said}; clip, what it saw, what it made: [bold]{folder / 'videomae.png'}[/]"


def toto(served: Served, folder: Path) -> str:
    """A clip's first frames, continued token by token."""
    (row,) = served.post("/v1/video", {"clips": [_film()], "model": "challenger", "wants": ["rollout"]})["results"]
    _save(row["rollout"]["strip"], folder / "toto.png")
    return f"{row['rollout']['given']} frames, continued: [bold]{folder / 'toto.png'}[/]"


def mils(served: Served, folder: Path) -> str:
    """A caption that is searched for, round by round, beside the best line of the bank."""
    from training.lab import worlds

    array = worlds.WORLDS["coco"]("test", 4, 3).read(range(1)).image[0].permute(1, 2, 0).numpy()
    body = {"image": picture(array), "model": "challenger", "wait": 60, "patchbay": {"compare": True}}
    got = served.post("/v1/captions", body)
    (folder / "mils.png").write_bytes(base64.b64decode(body["image"]))
    found = got.get("result", got)
    curve = ", ".join(f"{score:.3f}" for score in found["curve"][:6])
    return f"base     {found['base']['text']}\n  searched {found['text']} (best score by round: {curve} ...)"


def _film() -> dict[str, str]:
    """One clip of the lab's actions, of the test split, as an animated WebP."""
    from PIL import Image

    from training.lab.video import actions

    clip = actions.draw("test", 1).video[0]  # (T, 3, H, W) uint8
    frames = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in clip]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=80, lossless=True)
    return {"data": base64.b64encode(file.getvalue()).decode()}


def _save(url: str, place: Path) -> None:
    place.write_bytes(base64.b64decode(url.rpartition(",")[2]))


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
