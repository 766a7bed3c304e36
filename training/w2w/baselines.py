"""Baselines of w2w: a slider per attribute, a low-rank adapter of one picture, the nearest training identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from patches.engine.patch import ONLY, apply
from patches.families.diffusion.identity import denoising_target, spread
from patches.mechanisms.subspace import AdapterSet, AdapterSetConfig, start
from training.lab.faces import BINARY
from training.w2w import population
from training.w2w.draw import joined, read
from training.w2w.measure import Lab, Moved, compare, summary


def sliders(lab: Lab, latents: Tensor, steps: int, rows: int = 24, lr: float = 2e-2, push: float = 2.0) -> Tensor:
    """(5, d) one adapter per binary attribute, after Concept Sliders (arXiv 2311.12092).

    Under the plain prompt it makes the base answer out + push / 2 * (out(with) - out(without)).
    """
    c, pipe, g = lab.config, lab.base.model, Generator().manual_seed(3)
    layers, k = lab.space.config.layers, len(BINARY)
    device = next(pipe.parameters()).device
    theta = start(layers).expand(k, -1).clone().to(device).requires_grad_(True)
    opt = torch.optim.Adam([theta], lr, betas=(0.9, 0.99))
    plain = torch.tensor([[1] + [0] * 7]).expand(k * rows, -1)
    on, off = plain.clone(), plain.clone()
    for i in range(k):
        on[i * rows : (i + 1) * rows, 3 + i], off[i * rows : (i + 1) * rows, 3 + i] = 2, 1
    texts = [pipe.embed(x) for x in (plain, on, off)]
    adapters = AdapterSet(AdapterSetConfig(layers, c.scale), {"theta": theta})
    for i in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - 0.9 * i / steps)
        x0 = latents[torch.randint(0, len(latents), (k * rows,), generator=g)]
        t = spread(k, rows, g)
        x, _ = denoising_target(pipe.schedule, x0, t, torch.randn(x0.shape, generator=g))
        x, t = x.to(device), t.to(device)
        with torch.no_grad():
            plainly, withs, without = (pipe(sample=x, timestep=t, text=text) for text in texts)
        with apply(pipe, {ONLY: adapters}):
            loss = (pipe(sample=x, timestep=t, text=texts[0]) - plainly - push / 2 * (withs - without)).square()
        opt.zero_grad()
        loss.flatten(1).mean(1).view(k, rows).mean(1).sum().backward()
        opt.step()
    return theta.detach().cpu()


def slid(lab: Lab, slider: Tensor, strengths: tuple[float, ...], pictures: int = 2) -> dict[float, dict[str, Any]]:
    """Flips when sliders (5, d) are added to people's adapters, at several weights."""
    before = lab.draw(lab.theta, pictures, 11)
    p0 = read(lab.judge, before, pictures)
    out: dict[float, dict[str, Any]] = {}
    for s in strengths:
        moved: list[Moved] = []
        for i, name in enumerate(BINARY):
            if name not in lab.space.config.attributes:
                continue
            sign = 1 - 2 * (lab.labels[:, i] > 0.5).float()
            layers, theta = joined(lab.space.config.layers, lab.theta, slider[i], sign * s)
            moved.append(compare(lab, i, before, p0, lab.draw(theta, pictures, 11, layers=layers)))
        out[s] = dict(summary(moved))
    return out


def one_picture(lab: Lab, shots: population.Shots) -> Tensor:
    """(n, d) adapters trained on the first picture of each person, for as long as coefficients are fitted to it."""
    c, m = lab.config, shots.latents.shape[1]
    first = population.Shots(shots.latents[:, :1], lambda index, g: shots.contexts(index * m, g))
    return population.train(
        lab.base.model, lab.space.config.layers, first, steps=c.inversion.steps, rows=c.inversion.rows, lr=c.lr,
        seed=c.inversion.seed, scale=c.scale,
    )  # fmt: skip


def nearest_person(lab: Lab, shots: population.Shots, train_latents: Tensor) -> Tensor:
    """(n,) the training person with the picture whose latent is nearest to each person's first picture.

    train_latents (N, M, ...): what a look-up without any model of weights can do.
    """
    x, pool = shots.latents[:, 0].flatten(1), train_latents.flatten(2)
    return torch.cdist(x, pool.flatten(0, 1)).view(len(x), *pool.shape[:2]).amin(2).argmin(1)
