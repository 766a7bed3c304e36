"""Pictures a second of what reads CLIP, on the GPU if there is one: a forward, what heads add, what neurons say.

At ViT-B/32's size with random weights (a cost does not depend on them) and on lab:clip; the last four layers' heads and
the neurons of three layers, as in the papers.
"""

import resource

import pytest
import torch
from open_clip import get_model_config

from patches.families import clip
from patches.families.base import Base, load_base
from patches.families.clip import maps
from patches.families.clip.direct import Lens
from patches.families.clip.second_order import EffectMoments, lens, look, scalars
from training.tasks import textspan

from .conftest import DEVICE, Benched
from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]


def base_of(name: str) -> Base:
    if name == "lab:clip":
        return load_base(name, "clip", DEVICE)
    base = clip.new({"model_cfg": get_model_config(name), "preprocess_cfg": {}})
    base.model.to(DEVICE)
    return base


def memory_gb() -> float:
    """Peak of the GPU, or of the process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@torch.inference_mode()
@pytest.mark.parametrize("name", ["ViT-B-32", "lab:clip"])
def bench_readers(benchmark, name):
    base, count = base_of(name), 256 if DEVICE == "cuda" else 32
    x = torch.randn(count, 3, *base.processor.size, device=DEVICE)
    direct = Lens(base)
    last = range(max(0, direct.layers - 4), direct.layers)
    neurons = [n for n in ((8, 9, 10) if direct.layers == 12 else (4, 5, 6)) if n < direct.layers - 1]
    kept = {n: EffectMoments(lens(base, n)) for n in neurons}
    texts = torch.nn.functional.normalize(torch.randn(8, direct.readout.map.shape[1], device=DEVICE), dim=1)

    def second_order(moments: bool) -> None:
        seen = look(base, x, neurons)
        for n in neurons:
            s = scalars(seen, n)
            if moments:
                kept[n].add(s)

    variants = {
        "forward": lambda: base.model(image=x),
        "heads": lambda: direct.read(x),
        "heads, moments": lambda: textspan.moments(direct, [x], last),
        "heads, maps of 8 texts": lambda: maps.grid(direct, x, texts),
        "neurons": lambda: second_order(False),
        "neurons, moments": lambda: second_order(True),
    }

    def done(work):
        def run():
            work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return run

    variants = {k: done(v) for k, v in variants.items()}
    times = interleave(variants, 20 if DEVICE == "cuda" else 5, warmup=2)
    out = {k: ratio(t, times["forward"]) for k, t in times.items()}
    rate = {k: count / sorted(t)[len(t) // 2] for k, t in times.items()}
    benchmark.pedantic(variants["heads"], rounds=1)
    Benched(base, None, None, "clip_heads").about(
        benchmark, batch=count, ratios={k: vars(v) for k, v in out.items()}, images_per_s=rate, peak_gb=memory_gb()
    )
    print(f"\n{name} on {DEVICE}, {count} pictures at once, peak {memory_gb():.2f} GB")
    for k, v in out.items():
        print(f"  {k:24} {rate[k]:9.1f} pictures/s   x{v.median:.2f} [{v.low:.2f}, {v.high:.2f}] of a forward")
    assert all(r > 0 for r in rate.values())
