"""Pictures a second of the lab's renderer on one core: one thing; three things and a word."""

import pytest
import torch

from training.lab import atlas, renderer, worlds
from training.lab.renderer import Layout, generator, grounds, render, things, writing

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]
PICTURES = 512


@pytest.mark.parametrize("crowded", [False, True], ids=["single", "crowded"])
def bench_render(benchmark, crowded):
    """Layouts are made before: they cost less than a twentieth."""
    g = generator("bench")
    pool = atlas.load().pick(range(1000), worlds.SEEN)
    sprite = renderer.choose(pool, (PICTURES, 3) if crowded else (PICTURES,), g)
    text = writing(["cat", "hot dog"] * (PICTURES // 2), g) if crowded else None
    layout = Layout(grounds(PICTURES, g), things(sprite, g), text)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(render, (layout,), rounds=5, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info["pictures_per_second"] = round(PICTURES / benchmark.stats["median"])
