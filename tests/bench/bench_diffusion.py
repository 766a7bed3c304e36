"""What a direction costs a diffusion model: base and patched interleaved; eight rows that differ against eight
alike, and against one after the other; and the picture that stock diffusers draws.

On lab:diffusion with random class means (a cost does not depend on what they mean), or on the pushed artifact that
PATCHBAY_BENCH names. Ratios compare what one round measured side by side.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as nnf

from patches.engine.patch import apply
from patches.families import diffusion
from patches.families.base import load_base
from patches.families.diffusion import Denoiser, Denoising
from patches.families.diffusion.schedule import noise
from patches.families.worker import WorkerSettings
from patches.mechanisms.direction import DirectionConfig, DirectionEdit

from .conftest import DEVICE, Benched, pushed
from .interleave import interleave, ratio

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

STEPS, ROWS = 2, 8


@pytest.fixture(scope="module")
def easel() -> Benched:
    """What is benched: a base with a patch on its conditioning or its weights."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if found := pushed("render"):
        return Benched(found[0], found[1], None, found[2])
    base = load_base("lab:diffusion", "diffusion", DEVICE)
    g = torch.Generator().manual_seed(0)
    means = nnf.normalize(torch.randn(ROWS, *base.model.conditions["image"], generator=g), dim=1)
    names = tuple(f"class {i}" for i in range(ROWS))
    patch = DirectionEdit(DirectionConfig("given.image", names, ("things",) * ROWS), {"means": means})
    return Benched(base, patch, None, "diffusion_cf")


def rows(base, arms, different=True):
    """Guided rows; different: each its own seed and, of the direction, its own classes."""
    told = base.model.image(torch.rand(1, 3, *base.model.size, generator=torch.Generator().manual_seed(0)))[0]
    out = []
    for i, arm in enumerate(arms):
        own = i if different else 0
        said = {"class": torch.tensor([1.0, float(own % ROWS), float((own + 1) % ROWS), 1.0 + own / 8])}
        out.append(
            Denoising(
                condition=told,
                other=told,
                guidance=2.0,
                steps=STEPS,
                seed=own,
                arm=arm,
                decode=False,
                params=said if arm is not None else {},
            )
        )
    return out


def bench_rows(easel, benchmark):
    """Eight guided rows in one batch: base, patched alike, patched each its own way; and one by one."""
    base = easel.base
    with apply(base.model, {"patch": easel.patch}, root=base.root) as on:
        subject = type("S", (), {"base": base, "applied": on})()
        worker = Denoiser(subject, WorkerSettings(slots=ROWS))

        def alone():
            for row in rows(base, ["patch"] * ROWS):
                worker.run([row])

        variants = {
            "base": lambda: worker.run(rows(base, [None] * ROWS)),
            "base again": lambda: worker.run(rows(base, [None] * ROWS)),
            "patched alike": lambda: worker.run(rows(base, ["patch"] * ROWS, different=False)),
            "patched each its own": lambda: worker.run(rows(base, ["patch"] * ROWS)),
            "half base, half patched": lambda: worker.run(rows(base, [None, "patch"] * (ROWS // 2))),
            "one by one": alone,
        }
        times = interleave(variants, rounds=6, warmup=1)
        out = {name: ratio(t, times["base"]) for name, t in times.items()}
        own = ratio(times["patched each its own"], times["patched alike"])
        benchmark.pedantic(variants["patched each its own"], rounds=2)
    easel.about(benchmark, rows=ROWS, steps=STEPS, ratios={k: vars(v) for k, v in out.items()},
                sides={"rows_own_over_alike": {"base": 1.0, "patched": own.median}})  # fmt: skip
    print("\nrows:", {k: f"{v.median:.3f} [{v.low:.3f}, {v.high:.3f}]" for k, v in out.items()})
    print(f"each its own over alike: {own.median:.3f} [{own.low:.3f}, {own.high:.3f}]")


def bench_parity(easel, benchmark):
    """Our DDIM against diffusers' own scheduler, step by step on the same noise: the largest difference of a latent."""
    from diffusers import DDIMScheduler

    base = easel.base
    told = base.model.text(["a picture of a dog face"])[0]
    with apply(base.model, {}, root=base.root) as on:
        row = Denoising(condition=told, guidance=3.0, steps=4, seed=5, decode=False)
        benchmark.pedantic(lambda: Denoiser(type("S", (), {"base": base, "applied": on})()).run([row]), rounds=1)
    scheduler = DDIMScheduler.from_config(dict(base.model.schedule.config))
    scheduler.set_timesteps(4)
    x = noise(base.model.shape, 5)[None]
    with torch.inference_mode():
        for t in scheduler.timesteps:
            out = base.model.rows(torch.cat([x] * 2), torch.tensor([float(t)] * 2), [told, base.model.null()])
            own, other = out.cpu().split(1)
            x = scheduler.step(other + 3.0 * (own - other), t, x, use_clipped_model_output=True).prev_sample
    off = float((row.out - x[0]).abs().max())
    assert off < 1e-4
    easel.about(benchmark, difference=off)
    print(f"\nlargest difference from diffusers' own loop: {off:.1e}")


def bench_inversions(easel, benchmark):
    """What a picture's edit takes by each inversion, against the fixed point, eight pictures in a batch."""
    base = easel.base
    picture = torch.rand(3, *base.model.size, generator=torch.Generator().manual_seed(1))
    levels = diffusion.levels(base.model, 4)
    with apply(base.model, {"patch": easel.patch}, root=base.root) as on:
        worker = Denoiser(type("S", (), {"base": base, "applied": on})(), WorkerSettings(slots=ROWS))

        def run(method):
            begun = [diffusion.changed(base.model, picture, seed=i, decode=False) for i in range(2)]
            for row in begun:
                row.program = diffusion.Edit(method, levels)
            worker.run(begun)

        variants = {m: (lambda m=m: run(m)) for m in ("fixed_point", "ddim", "edit_friendly", "o_belm", "edict")}
        times = interleave(variants, rounds=4, warmup=1)
        out = {name: ratio(t, times["fixed_point"]) for name, t in times.items()}
        benchmark.pedantic(variants["ddim"], rounds=1)
    easel.about(benchmark, ratios={k: vars(v) for k, v in out.items()})
    print("\ninversions:", {k: f"{v.median:.2f} [{v.low:.2f}, {v.high:.2f}]" for k, v in out.items()})
