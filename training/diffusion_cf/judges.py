"""What a counterfactual is worth: does it flip, is it the class it claims to be, how much did it change, and what
else moved.

Two judges that no fit ever asks: a CNN over all concept names that saw neither CLIP nor a diffusion model, and the
lab's CLIP by the names of the two classes. The second shares its image tower with the conditioning (not its text
tower, which the fit does not use), so the first is the one to believe. Numbers are over pictures; intervals are
bootstrapped over sprites, because pictures of one sprite are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.diffusion_cf.domains import Pictures

CORNER = 6
"""pixels of a corner, where the lab's pictures show their ground"""


class Judge(Protocol):
    """Scores of pictures over classes."""

    @property
    def name(self) -> str:
        """What its measures are called after."""

    def scores(self, pictures: Tensor) -> Tensor:
        """(n, M) for pictures (n, 3, H, W); M classes of the judge's own."""

    def column(self, name: str) -> int:
        """Which of the judge's classes is called `name`."""


@dataclass(frozen=True, eq=False)
class Network:
    """The lab's CNN over all names of the atlas."""

    net: Any
    names: tuple[str, ...]
    name: str = "cnn"

    def scores(self, pictures: Tensor) -> Tensor:
        from training.lab import judge

        return judge.logits(self.net, sized(pictures))

    def column(self, name: str) -> int:
        return self.names.index(name)


@dataclass(frozen=True, eq=False)
class ZeroShot:
    """A CLIP's zero-shot classifier over names."""

    base: Any
    names: tuple[str, ...]
    weights: Tensor
    """(k, M)"""
    name: str = "clip"

    def scores(self, pictures: Tensor) -> Tensor:
        v = self.base.model.visual
        x = F.interpolate(pictures, size=v.image_size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(m)[:, None, None] for m in (self.base.processor.mean, self.base.processor.std))
        with torch.no_grad():
            e = torch.cat([F.normalize(v(part), dim=-1) for part in torch.split((x - mean) / std, 64)])
        return e @ self.weights

    def column(self, name: str) -> int:
        return self.names.index(name)


def lab_judges(classes: Sequence[str], which: Sequence[str] = ("cnn", "clip"), others: int = 188) -> list[Judge]:
    """The lab's judges: the CNN over all names of the atlas, CLIP over `classes` and `others` more, drawn at random."""
    from training.lab import atlas, judge

    names = atlas.load().names
    out: list[Judge] = []
    if "cnn" in which:
        out.append(Network(judge.load(), names))
    if "clip" in which:
        from patches.families import clip
        from patches.families.base import load_base

        base = load_base("lab:clip", "clip")
        rest = [n for n in names if n not in classes]
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:others].tolist()
        asked = (*classes, *(rest[i] for i in order))
        out.append(ZeroShot(base, asked, clip.zero_shot(base, asked)))
    return out


@dataclass(frozen=True, eq=False)
class Judged:
    """One number per picture for every measure."""

    values: Mapping[str, Tensor]
    """name -> (n,) float"""
    sprite: Tensor
    domain: tuple[str, ...]
    """Domain of each picture"""

    def summary(self) -> dict[str, list[float]]:
        """name -> [mean, low, high, n pictures], 95 % bootstrap over sprites."""
        return {k: interval(v, self.sprite) for k, v in self.values.items()}

    def by_domain(self, name: str) -> dict[str, list[float]]:
        """The same of one measure for each domain."""
        out = {}
        for d in dict.fromkeys(self.domain):
            at = torch.tensor([x == d for x in self.domain])
            out[d] = interval(self.values[name][at], self.sprite[at])
        return out


def judged(judges: Sequence[Judge], source: Pictures, target: Tensor, made: Tensor) -> Judged:
    """Measures of counterfactuals `made` (n, 3, H, W) of `source`, meant to be of classes `target` (n,).

    flip_<judge>: it says target rather than the source's class. flip_both. top1_<judge>: of all its classes it says
    target. neither_<judge>: it says neither of the two. l1, l2, distance (the CNN's features). ground: mean change
    at the corners.
    """
    out: dict[str, Tensor] = {}
    rows = torch.arange(len(made))
    for j in judges:
        columns = torch.tensor([j.column(name) for name in source.classes])
        a, b = columns[source.label], columns[target]
        scores = j.scores(made)
        out[f"flip_{j.name}"] = (scores[rows, b] > scores[rows, a]).float()
        best = scores.argmax(1)
        out[f"top1_{j.name}"] = (best == b).float()
        out[f"neither_{j.name}"] = ((best != b) & (best != a)).float()
    out["flip_both"] = torch.stack([v for k, v in out.items() if k.startswith("flip_")]).amin(0)
    change = made - source.x
    out["l1"] = change.abs().flatten(1).mean(1)
    out["l2"] = change.pow(2).flatten(1).mean(1).sqrt()
    if nets := [j.net for j in judges if isinstance(j, Network)]:
        from training.lab import judge

        out["distance"] = judge.distance(nets[0], sized(made), sized(source.x))
    c = CORNER
    corners = torch.stack([change[..., y, x] for y in (slice(c), slice(-c, None)) for x in (slice(c), slice(-c, None))])
    out["ground"] = corners.abs().mean((0, 2, 3, 4))
    domains = tuple(source.domains[i] for i in source.label.tolist())
    return Judged(out, source.sprite, domains)


def sized(pictures: Tensor, side: int = 64) -> Tensor:
    """Pictures at the size the CNN was trained on."""
    if pictures.shape[-1] == side:
        return pictures
    return F.interpolate(pictures, size=side, mode="bilinear", align_corners=False, antialias=True)


def interval(v: Tensor, group: Tensor, draws: int = 1000) -> list[float]:
    """Mean of (n,), its 95 % bootstrap interval over groups (n,), n."""
    ids, at = torch.unique(group, return_inverse=True)
    totals = torch.zeros(len(ids)).index_add_(0, at, v.float())
    counts = torch.zeros(len(ids)).index_add_(0, at, torch.ones(len(v)))
    picks = torch.randint(len(ids), (draws, len(ids)), generator=torch.Generator().manual_seed(0))
    means = (totals[picks].sum(1) / counts[picks].sum(1)).sort().values
    low, high = means[int(0.025 * draws)], means[int(0.975 * draws) - 1]
    return [round(float(x), 4) for x in (v.float().mean(), low, high)] + [len(v)]


def paired(a: Tensor, b: Tensor, group: Tensor) -> list[float]:
    """Mean of a - b with its interval, over the same pictures."""
    return interval(a - b, group)


def nearest_real(train: Pictures, vectors_train: Tensor, vectors: Tensor, target: Tensor) -> Tensor:
    """The baseline that generates nothing: for each row the train picture of its target class with the nearest
    condition."""
    near = F.normalize(vectors.flatten(1), dim=-1) @ F.normalize(vectors_train.flatten(1), dim=-1).T
    near = near.masked_fill(train.label[None] != target[:, None], -torch.inf)
    return train.x[near.argmax(1)]


@dataclass(frozen=True, eq=False)
class Trained:
    """A small CNN fitted on train pictures of a user's own domain, whose classes it alone knows."""

    net: Any
    names: tuple[str, ...]
    name: str = "cnn"

    def scores(self, pictures: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.net(2 * sized(pictures) - 1)
        return out

    def column(self, name: str) -> int:
        return self.names.index(name)


def own_judges(config: Any, test: Pictures, steps: int = 300) -> list[Judge]:
    """Judges of a folder's domain: a CNN trained on its train split (no diffusion model, no CLIP in it), and nothing
    else offline. How often it is wrong is the row `originals` of every report.
    """
    from training.diffusion_cf import domains
    from training.lab import judge

    train = domains.folder(Path(config.data), "train", (64, 64))
    torch.manual_seed(config.seed)
    net = judge.network(len(test.classes))
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    g = torch.Generator().manual_seed(config.seed)
    net.train()
    for _ in range(steps):
        at = torch.randint(len(train), (min(32, len(train)),), generator=g)
        x = train.x[at]
        x = torch.where(torch.rand(len(x), 1, 1, 1, generator=g) < 0.5, x.flip(-1), x)
        x = (
            x * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1, generator=g)) + 0.05 * torch.randn(x.shape, generator=g)
        ).clamp(0, 1)
        loss = F.cross_entropy(net(2 * x - 1), train.label[at], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return [Trained(net.eval().requires_grad_(False), test.classes)]
