"""Class directions in the conditioning space, from a few unpaired pictures a class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.diffusion_cf.domains import Pictures


@dataclass(frozen=True, eq=False)
class Bank:
    """Unit conditions of labelled pictures: what means and neighbours are taken of."""

    e: Tensor
    """(n, k) of unit norm"""
    label: Tensor
    sprite: Tensor
    classes: tuple[str, ...]
    domains: tuple[str, ...]

    def means(self) -> Tensor:
        """(C, k) mean of unit conditions per class, not rescaled (the paper's mu_c)."""
        return torch.stack([self.e[self.label == c].mean(0) for c in range(len(self.classes))])

    def directions(
        self, source: Tensor, target: Tensor, without: Tensor | None = None, k: int = 0, near: Tensor | None = None
    ) -> Tensor:
        """(m, k) mu_target - mu_source for rows of classes (m,).

        without: (m,) sprites left out of the source class's mean, so that no edited picture is in its own.
        k, near: means over the k nearest to `near` (m, k) alone (the paper's neighbour means); 0: all.
        """
        out = []
        for i, (a, b) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
            left = self.label == a
            if without is not None and bool((left & (self.sprite != without[i])).any()):
                left = left & (self.sprite != without[i])
            ends = []
            for mask in (self.label == b, left):
                e = self.e[mask]
                if k and near is not None and len(e) > k:
                    e = e[(e @ near[i]).topk(k).indices]
                ends.append(e.mean(0))
            out.append(ends[0] - ends[1])
        return torch.stack(out)

    def few(self, count: int, seed: int) -> Bank:
        """`count` pictures of each class, as many different sprites among them as there are. Raises nothing if there
        are fewer."""
        g = torch.Generator().manual_seed(seed)
        keep = []
        for c in range(len(self.classes)):
            mine = torch.where(self.label == c)[0]
            mine = mine[torch.randperm(len(mine), generator=g)]
            seen: dict[int, int] = {}
            turn = []
            for i in mine.tolist():
                s = int(self.sprite[i])
                turn.append((seen.get(s, 0), i))
                seen[s] = seen.get(s, 0) + 1
            keep += [i for _, i in sorted(turn, key=lambda x: x[0])[:count]]
        at = torch.tensor(keep)
        return Bank(self.e[at], self.label[at], self.sprite[at], self.classes, self.domains)


def bank(vectors: Tensor, pictures: Pictures) -> Bank:
    """The bank of pictures with conditions (n, ...)."""
    return Bank(
        F.normalize(vectors.flatten(1), dim=-1), pictures.label, pictures.sprite, pictures.classes, pictures.domains
    )


def elsewhere(b: Bank, source: Tensor, target: Tensor, directions: Tensor, seed: int) -> Tensor:
    """The control: directions (m, k) to the mean of a random class of another domain, each of its row's norm."""
    g, means = torch.Generator().manual_seed(seed), b.means()
    out = []
    for i, a in enumerate(source.tolist()):
        other = [c for c, d in enumerate(b.domains) if d != b.domains[a]]
        c = other[int(torch.randint(len(other), (1,), generator=g))] if other else int(target[i])
        out.append(means[c] - means[a])
    made: Tensor = F.normalize(torch.stack(out), dim=-1) * directions.norm(dim=-1, keepdim=True)
    return made


def isotropic(directions: Tensor, seed: int) -> Tensor:
    """A second control: directions (m, k) of equal norm drawn from the sphere."""
    g = torch.Generator().manual_seed(seed)
    drawn = F.normalize(torch.randn(directions.shape, generator=g), dim=-1)
    made: Tensor = drawn * directions.norm(dim=-1, keepdim=True)
    return made


def shrunk(b: Bank, source: int, target: int, weight: float = 0.1) -> Tensor:
    """(k,) the normal of a shrunk linear discriminant between two classes, of unit norm: decides, rather than moves."""
    centred = _within(b, source, target)
    cov = centred.T @ centred / len(centred)
    cov = (1 - weight) * cov + weight * cov.trace() / len(cov) * torch.eye(len(cov))
    ends = [b.e[b.label == c].mean(0) for c in (source, target)]
    return F.normalize(torch.linalg.solve(cov, ends[1] - ends[0]), dim=0)


def needed(b: Bank, vectors: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """(m,) steps in class gaps that bring conditions (m, k) of classes (m,) to the target's mean along the shrunk
    discriminant: 1 for a picture like its class's mean, less for one that lies nearer to the border; 0 to 2."""
    e, means, out = F.normalize(vectors.flatten(1), dim=-1), b.means(), []
    normals: dict[tuple[int, int], Tensor] = {}
    for x, a, c in zip(e, source.tolist(), target.tolist(), strict=True):
        if (a, c) not in normals:
            normals[a, c] = shrunk(b, a, c)
        w = normals[a, c]
        out.append((means[c] - x) @ w / ((means[c] - means[a]) @ w).clamp_min(1e-9))
    return torch.stack(out).clamp(0.0, 2.0)


def decided(b: Bank, directions: Tensor, source: Tensor, target: Tensor, count: int = 10, seed: int = 0) -> Tensor:
    """Directions (m, k) of classes (m,) without what varies within classes and not between them: the first `count`
    components of the variation within both, as far as the means lie no further apart along them than those of
    shuffled labels do in one of 20 draws."""
    g, kept = torch.Generator().manual_seed(seed), {}
    for a, c in sorted(set(zip(source.tolist(), target.tolist(), strict=True))):
        within = _within(b, a, c)
        v = torch.linalg.svd(within, full_matrices=False).Vh[:count]
        x = torch.cat([b.e[b.label == a], b.e[b.label == c]]) @ v.T
        n = int((b.label == a).sum())
        apart = (x[n:].mean(0) - x[:n].mean(0)).abs()
        drawn = [x[torch.randperm(len(x), generator=g)] for _ in range(200)]
        limit = torch.stack([(y[n:].mean(0) - y[:n].mean(0)).abs() for y in drawn]).quantile(0.95, dim=0)
        kept[a, c] = v[apart <= limit]
    taken = (kept[pair] for pair in zip(source.tolist(), target.tolist(), strict=True))
    return torch.stack([d - d @ v.T @ v for d, v in zip(directions, taken, strict=True)])


def _within(b: Bank, source: int, target: int) -> Tensor:
    """(n, k) conditions of two classes, each less its class's mean."""
    xs = [b.e[b.label == c] for c in (source, target)]
    return torch.cat([x - x.mean(0) for x in xs])
