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
    xs = [b.e[b.label == c] for c in (source, target)]
    centred = torch.cat([x - x.mean(0) for x in xs])
    cov = centred.T @ centred / len(centred)
    cov = (1 - weight) * cov + weight * cov.trace() / len(cov) * torch.eye(len(cov))
    return F.normalize(torch.linalg.solve(cov, xs[1].mean(0) - xs[0].mean(0)), dim=0)
