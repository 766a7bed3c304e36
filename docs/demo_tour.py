"""The systems of pictures and clips in one request each: what `make demo` shows after its long story.

What a system's fit made ships in `patches/lab/sealed`, or is small enough to be fitted here; it is pushed, served in
this process by the very application that BentoML serves, and asked by the requests a user would send. Pictures are
written to `folder`.
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
DEMO = SEALED.parent / "demo"
"""artifacts of recipes that are called demo, which take minutes to fit: small and quick to measure"""


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


def clip_sae(served: Served, folder: Path, count: int = 16) -> str:
    """Pictures with a wrong word on them, of classes and words no fit has seen, drawn with both answers."""
    from matplotlib.figure import Figure

    from training.lab import worlds

    data = worlds.WORLDS["typographic"]("test", count, 7, word="wrong")
    batch = data.read(range(count))
    arrays = [x.permute(1, 2, 0).numpy() for x in batch.image]
    coded = [{"data": picture(array)} for array in arrays]
    body = {"images": coded, "labels": list(data.classes), "model": "challenger", "patchbay": {"compare": True}}
    rows = served.post("/v1/classify", body)["results"]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    right = {"base": 0, "patched": 0}
    for array, label, row, axis in zip(arrays, batch.label.tolist(), rows, figure.subplots(2, 8).flat, strict=True):
        axis.imshow(array)
        axis.axis("off")
        said = {"base": row["base"]["label"], "patched": row["label"]}
        for y, (side, word) in enumerate(said.items()):
            ok = word == data.classes[label]
            right[side] += ok
            axis.text(0.5, -0.1 - 0.14 * y, f"{side}: {word}", transform=axis.transAxes, ha="center", fontsize=8,
                      color="#0a6b4c" if ok else "#ad2018")  # fmt: skip
    told = f"a wrong word on each of {count} pictures: right {right['base']} (base), {right['patched']} (patched)"
    figure.suptitle(told)
    figure.savefig(folder / "clip_sae.png", dpi=110, bbox_inches="tight")
    return f"{told}: [bold]{folder / 'clip_sae.png'}[/]"


def _attacked() -> tuple[str, str, dict[str, str]]:
    """What a picture of the test split shows, the wrong word on it, and the picture."""
    from training.lab import worlds

    data = worlds.WORLDS["typographic"]("test", 8, 7, word="wrong")
    batch = data.read(range(1))
    image = picture(batch.image[0].permute(1, 2, 0).numpy())
    return data.classes[int(batch.label[0])], batch.extras["word"][0], {"data": image}


def clip_heads(served: Served, folder: Path) -> str:
    """Where in a picture its written word is, as the base's heads and the patched model's see it."""
    thing, word, image = _attacked()
    body = {"image": image, "text": word, "against": thing, "model": "challenger", "compare": True, "format": ["png"]}
    got = served.post("/v1/explain/segment", body)
    sides = {"base": got["base"], "patched": got}
    files = [base64.b64decode(side["png"].rpartition(",")[2]) for side in sides.values()]
    _grid(files, 2, folder / "clip_heads.png")
    labels = {"images": [image], "labels": [thing, word], "model": "challenger", "patchbay": {"compare": True}}
    (row,) = served.post("/v1/classify", labels)["results"]
    return (
        f"a {thing} that says {word!r}: the base says {row['base']['label']}, without its text heads {row['label']}; "
        f"where the word is read: [bold]{folder / 'clip_heads.png'}[/]"
    )


def second_order(served: Served, folder: Path) -> str:
    """What a picture shows, in the words of the neurons that fire."""
    thing, word, image = _attacked()
    body = {"images": [image], "model": "challenger", "compare": True, "top": 5}
    (row,) = served.post("/v1/explain/attributes", body)["results"]
    (folder / "second_order.png").write_bytes(base64.b64decode(image["data"]))
    told = {k: ", ".join(a["text"] for a in row[k]["attributes"]) for k in ("base", "patched") if k in row}
    return f"a {thing} that says {word!r}, in the neurons' words: " + "; ".join(f"{k}: {v}" for k, v in told.items())


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
    f.__name__: f for f in (clip_sae, clip_heads, second_order, vlm_erasure, w2w, diffusion_cf, videomae, toto, mils)
}
"""system -> what the demo asks of it"""


def tour(folder: Path, patchbay: Callable[..., None], say: Callable[[str], None]) -> dict[str, float]:
    """Push, serve and ask every system of TOUR whose sealed artifact ships here; seconds that each took."""
    seconds = {}
    for name, show in TOUR.items():
        began = time.monotonic()
        if (place := SEALED / name).is_dir():
            patchbay("push", str(place.relative_to(ROOT)))
        else:
            patchbay("fit", f"{name}/demo")
            patchbay("push", str(next((folder / "runs").glob(f"{name}-*"))))
        with Served(name) as served:
            say(f"  {show(served, folder)}")
        seconds[name] = time.monotonic() - began
    return seconds
