"""What a feature patch costs a CLIP, in process and over HTTP, in torch and in ONNX Runtime.

On lab:clip with random dictionaries (a cost does not depend on what features mean) of the size and the op that
`fit clip_sae/lab` ships and of others, or on the pushed artifact that PATCHBAY_BENCH names. Ratios compare what one
round measured side by side.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image

from patches import artifact
from patches.engine.patch import Patch, apply
from patches.families import clip
from patches.families.base import Base, load_base
from patches.families.clip.towers import PARITY, prepared
from patches.families.clip.worker import Embedder, Picture
from patches.mechanisms.features import SAE, edit
from registry.ab import ledger as ledgers
from registry.ab.ledger import Ledger
from registry.home import home

from .conftest import DEVICE, Benched, pushed
from .interleave import interleave, ratio
from .load import Load, load
from .server import Server, running

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
PATH, LABELS = "/v1/classify", ["cat", "dog", "bird", "fish", "apple", "pizza", "car", "tree"]
CALLS, ROUNDS = {1: 16, 8: 32, 32: 64}, {1: 24, 8: 5, 32: 4}


def dictionary(width: int, features: int, activation: str = "relu", seed: int = 0) -> SAE:
    """Random directions of one length; about 32 fire."""
    g = torch.Generator().manual_seed(seed)
    W = nnf.normalize(torch.randn(features, width, generator=g), dim=1)
    threshold = torch.full((features,), 3.0) if activation == "jumprelu" else None
    return SAE(W, torch.zeros(features), W, torch.zeros(width), activation, 32 * (activation == "topk"), threshold)


TOP_K = "top-k of 2,048"
SHIPPED = 200
"""features in the patch that `fit clip_sae/lab` makes"""


@dataclass(frozen=True)
class Eyes:
    """A CLIP and patches on it; `patched` is the one that is served."""

    base: Base
    patches: dict[str, Patch]
    system: str

    def about(self, benchmark: Any, **more: Any) -> None:
        Benched(self.base, self.patches["patched"], None, self.system).about(benchmark, **more)


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    torch.set_num_threads(THREADS)
    if found := pushed("clip"):
        return Eyes(found[0], {"patched": found[1].to(DEVICE)}, found[2])
    base = load_base("lab:clip", "clip", DEVICE)
    site = clip.site("block", 4)
    wide, top = dictionary(256, 2048, "jumprelu"), dictionary(256, 2048, "topk")
    made: dict[str, Patch] = {
        "patched": edit(wide, site, range(SHIPPED), "scale", 0.5),
        "preset of 600": edit(wide, site, range(600)),
        "preset of 50": edit(wide, site, range(50)),
        "top-k of 4,096": edit(dictionary(256, 4096, "topk"), site, range(250)),
        TOP_K: edit(top, site, range(250)),  # what ships is of this size
    }
    return Eyes(base, {k: p.to(DEVICE) for k, p in made.items()}, "clip_sae")


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 32])
def bench_look(eyes: Eyes, benchmark, batch: int, tmp_path, monkeypatch) -> None:
    """A batch through the image tower: base, patched by hooks, and both in ONNX Runtime."""
    monkeypatch.setenv("PATCHBAY_HOME", str(tmp_path))
    x = torch.randn(batch, 3, *eyes.base.processor.size, generator=torch.Generator().manual_seed(0))
    provider = "cuda" if eyes.base.device.type == "cuda" else "cpu"
    fresh = load_base(eyes.base.ref, "clip")
    engines = {
        "onnx, base": prepared(fresh, provider, threads=THREADS),
        "onnx, patched": prepared(fresh, provider, eyes.patches["patched"].to("cpu"), digest="p" * 64, threads=THREADS),
    }
    on_device = x.to(eyes.base.device)
    with apply(eyes.base.model, eyes.patches, root=eyes.base.root) as on:

        def run(arm: str | None) -> torch.Tensor:
            with on.rows([arm] * batch):
                y: torch.Tensor = eyes.base.model(image=on_device)["image_features"].cpu()
            return y

        for name, engine in engines.items():
            arm = None if name.endswith("base") else "patched"
            assert (engine("image", x) - run(arm)).abs().max() <= PARITY
        variants: dict[str, Any] = {"base": partial(run, None), "base again": partial(run, None)}
        variants |= {name: partial(run, name) for name in eyes.patches}
        variants |= {name: partial(engine, "image", x) for name, engine in engines.items()}
        times = interleave(variants, 60 if batch == 1 else 16)
        out = {k: ratio(t, times["base"]) for k, t in times.items()}
        benchmark.pedantic(partial(run, "patched"), rounds=3)
    rate = {k: batch / statistics.median(t) for k, t in times.items()}
    eyes.about(benchmark, ratios={k: vars(v) for k, v in out.items()}, batch=batch, images_per_s=rate)
    print(f"\nlook {batch}:", {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()})
    print("images/s:", {k: round(v, 1) for k, v in rate.items()})


def picture(i: int) -> str:
    noise = np.random.default_rng(i).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


PICTURES = [picture(i) for i in range(16)]


@pytest.fixture(scope="module")
def served(eyes: Eyes, tmp_path_factory) -> Iterator[dict[str, tuple[Server, str]]]:
    """name -> (server, arm): torch and ONNX Runtime, each with base and patched on one copy."""
    with pytest.MonkeyPatch.context() as env, contextlib.ExitStack() as stack:
        env.setenv("PATCHBAY_HOME", str(tmp_path_factory.mktemp("home")))
        env.setenv("PATCHBAY_DEVICE", eyes.base.device.type)
        folder, arms = home() / "artifacts" / "part", {"base": "base", "base again": "base"}
        roles = {"patched": ("champion", ledgers.promote), TOP_K: ("challenger", ledgers.challenge)}
        for name in (n for n in roles if n in eyes.patches):
            about = artifact.save(eyes.patches[name].to("cpu"), eyes.system, folder, base=eyes.base.label)
            folder.rename(folder.parent / about.digest)
            arms[name], take = roles[name]
            take(Ledger(), eyes.system, about.digest)
        start = partial(running, eyes.system, PATCHBAY_BASE=eyes.base.ref)
        torch_server = stack.enter_context(start())
        onnx = stack.enter_context(start(PATCHBAY_PROVIDER="cuda" if eyes.base.device.type == "cuda" else "cpu"))
        in_onnx = {f"onnx, {name}": (onnx, arms[name]) for name in ("base", "patched")}
        yield {**{name: (torch_server, arm) for name, arm in arms.items()}, **in_onnx}


@pytest.mark.parametrize("callers", CALLS)
def bench_classify(eyes: Eyes, served, benchmark, callers: int) -> None:
    """Closed loop, one picture a call: p50, p99, CPU-ms per call, pictures/s; equal answers."""
    loads: dict[str, list[Load]] = {name: [] for name in served}
    labels = expected(eyes)

    def body(arm: str, i: int) -> dict[str, Any]:
        return {"images": [{"data": PICTURES[i % len(PICTURES)]}], "labels": LABELS, "model": arm}

    def measure(name: str) -> None:
        server, arm = served[name]
        want = labels[name.removeprefix("onnx, ")]
        loads[name].append(
            load(
                server.url + PATH, partial(body, arm), CALLS[callers], callers, server.pid,
                want=lambda i: want[i % len(want)], read=lambda a: (a["results"][0]["label"], 1),
            )
        )  # fmt: skip

    interleave({name: partial(measure, name) for name in served}, ROUNDS[callers], warmup=1)
    for done in loads.values():
        del done[0]
    benchmark.pedantic(partial(measure, "patched"), rounds=1)
    del loads["patched"][-1]

    def against(name: str, field: str) -> Any:
        return ratio([getattr(a, field) for a in loads[name]], [getattr(b, field) for b in loads["base"]])

    def median(name: str, field: str) -> float:
        return statistics.median(getattr(one, field) for one in loads[name])

    kept = ("p50_ms", "p99_ms", "cpu_ms_per_call", "tokens_per_s", "peak_mb")
    failed = {name: sum(one.failed for one in done) for name, done in loads.items()}
    unequal = {name: sum(one.unequal for one in done) for name, done in loads.items()}
    eyes.about(
        benchmark, callers=callers, calls=CALLS[callers] * ROUNDS[callers], failed=failed, unequal=unequal,
        ratios={n: vars(against(n, "p50_ms")) for n in served},
        throughput={n: vars(against(n, "tokens_per_s")) for n in served},
        sides={f"http_c{callers}/{f}": {"base": median("base", f), "patched": median("patched", f)} for f in kept},
    )  # fmt: skip
    print(f"\nc = {callers}, {CALLS[callers] * ROUNDS[callers]} calls each; failed {failed}; unequal {unequal}")
    for name in served:
        r = against(name, "p50_ms")
        more = "  ".join(f"{f} {median(name, f):.1f} (x{against(name, f).median:.3f})" for f in kept)
        print(f"  {name:14} p50 x{r.median:.3f} [{r.low:.3f}, {r.high:.3f}]  {more}")
    assert not any(failed.values()), {name: [one.reasons for one in done] for name, done in loads.items()}
    assert not any(unequal.values())


@torch.inference_mode()
def expected(eyes: Eyes) -> dict[str, list[str]]:
    """The label of every picture by every arm, in this process."""
    weights = clip.zero_shot(eyes.base, LABELS).cpu()
    pictures = [Image.open(io.BytesIO(base64.b64decode(p))).convert("RGB") for p in PICTURES]
    x = eyes.base.processor.image(pictures)
    with apply(eyes.base.model, eyes.patches, root=eyes.base.root) as on:
        worker = Embedder(eyes.base, on)
        out = {}
        for name in ("base", "base again", *eyes.patches):
            done = worker.run([Picture(v, arm=name if name in eyes.patches else None) for v in x])
            out[name] = [LABELS[int((p.out @ weights).argmax())] for p in done]  # type: ignore[operator]
    return out
