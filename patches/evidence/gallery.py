"""Gallery: compressed head contributions to the embeddings of N images, for exact nearest-neighbour search per head.

Each head's contribution c (k,) is stored as fp16 coordinates on the head's own principal directions: c = mean + code @
basis. Every query is one product with all images, in blocks, and an exact top-k; there is no approximate index. The
five analyses of CLIP-InterpreT, arXiv 2409.06579, query a gallery in three ways (by a property's heads, by an image in
one head, by a text in one head). Its authors' code compares raw contributions, which share a large constant, so a few
images are everybody's neighbours (`hubness`); `centred` subtracts the gallery's mean.

Files of a sealed folder: gallery.safetensors, gallery.json. Shapes: N images, L layers, H heads, r directions, k joint
space.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from patches.evidence import content, tensors
from patches.families.clip.direct import Lens, Share
from registry.errors import Invalid, NotFound

TENSORS, ABOUT = "gallery.safetensors", "gallery.json"
Metric = Literal["centred", "cosine", "raw"]
BLOCK = 4096
"""Number of images whose joint-space vectors are in memory at once"""
KEEP, DIRECTIONS = 0.99, 64
"""Fraction of a head's variance that its stored directions keep, and the largest number of them"""
THUMB = 48


@dataclass(frozen=True, eq=False)
class Gallery:
    """Head contributions of N images, compressed."""

    layers: tuple[int, ...]
    basis: Tensor
    """(L, H, r, k) orthonormal rows, zero beyond the directions a head needs"""
    mean: Tensor
    """(L, H, k) mean contribution over these images"""
    code: Tensor
    """(N, L, H, r) float16 coordinates on `basis`"""
    thumbs: Tensor
    """(N, 3, s, s) uint8 thumbnails"""
    names: tuple[str, ...]
    """Names of the images"""
    kept: float
    """Fraction of the images' variance that the codes keep, over all heads"""

    def __len__(self) -> int:
        return len(self.code)

    def place(self, heads: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Map (layer, head) pairs to storage indices. Raises NotFound naming the stored layers and heads."""
        H = self.code.shape[2]
        if not heads:
            raise Invalid("heads is empty; name at least one (layer, head).")
        for layer, head in heads:
            if layer not in self.layers or not 0 <= head < H:
                raise NotFound(
                    f"This gallery has no head {layer}.{head}; layers {', '.join(map(str, self.layers))}, "
                    f"heads 0 to {H - 1}."
                )
        return [(self.layers.index(layer), head) for layer, head in heads]

    def vectors(self, heads: Sequence[tuple[int, int]], rows: slice | Tensor, centred: bool) -> Tensor:
        """Reconstruct the mean contribution (n, k) float32 of `heads` to the images `rows`."""
        at = self.place(heads)
        total = sum(self.code[rows, i, h].float() @ self.basis[i, h].float() for i, h in at)
        assert isinstance(total, Tensor)
        if not centred:
            total = total + torch.stack([self.mean[i, h] for i, h in at]).sum(0)
        return total / len(at)

    def nearest(
        self, query: Tensor, heads: Sequence[tuple[int, int]], top: int, metric: Metric = "centred"
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest images (top,) and their scores, best first: <query, mean over heads of c>. Exact.

        query (k,): a text's embedding, or the same heads' contribution to another image (`ask`).
        """
        scores = []
        q = query.float() / (query.float().norm().clamp_min(1e-12) if metric == "cosine" else 1.0)
        for i in range(0, len(self), BLOCK):
            v = self.vectors(heads, slice(i, i + BLOCK), metric != "raw")
            scores.append(v @ q / (v.norm(dim=1).clamp_min(1e-12) if metric == "cosine" else 1.0))
        best = torch.cat(scores).topk(min(top, len(self)))
        return best.indices, best.values

    def ask(self, given: Tensor, heads: Sequence[tuple[int, int]], metric: Metric = "centred") -> Tensor:
        """Build the query (k,) for another image from all heads' contributions to its unit embedding (L, H, k).

        It is projected as stored images are, so that an image of the gallery is its own nearest neighbour.
        """
        total = torch.zeros(self.mean.shape[-1])
        for i, h in self.place(heads):
            B, mean = self.basis[i, h].float(), self.mean[i, h]
            total += (given[i, h].float() - mean) @ B.T @ B + (mean if metric == "raw" else 0.0)
        return total / len(heads)

    def hubness(self, heads: Sequence[tuple[int, int]], metric: Metric, top: int = 8, most: int = 2000) -> float:
        """Measure hubness: the skewness of how often an image is among the `top` nearest of others; 0 is even.

        Of the first `most` images.
        """
        n = min(len(self), most)
        v = self.vectors(heads, slice(0, n), metric != "raw")
        v = torch.nn.functional.normalize(v, dim=1) if metric == "cosine" else v
        near = (v @ v.T).fill_diagonal_(-torch.inf).topk(min(top, n - 1), 1).indices
        count = near.flatten().bincount(minlength=n).float()
        return float(((count - count.mean()) / count.std().clamp_min(1e-9)).pow(3).mean())


@torch.no_grad()
def make_gallery(
    lens: Lens, batches: Iterable[tuple[Tensor, Tensor, Sequence[str]]], layers: Sequence[int], basis: Tensor,
    share: Share = "own",
) -> Gallery:  # fmt: skip
    """Build a gallery from batches of (preprocessed images, uint8 images of any size, names).

    basis (L, H, r, k): each head's directions (`directions`). Raises Invalid without any image.
    """
    lens.check(layers)
    codes, thumbs, names = [], [], []
    total = torch.zeros(basis.shape[0], basis.shape[1], basis.shape[3], dtype=torch.float64)
    square = 0.0
    B = basis.float().cpu()
    for x, picture, name in batches:
        parts = lens.read(x, share=share)
        c = (parts.heads[:, list(layers)] / parts.norm[:, None, None, None]).float().cpu()
        codes.append(torch.einsum("blhk,lhrk->blhr", c, B))
        total += c.double().sum(0)
        square += float(c.double().square().sum())
        small = torch.nn.functional.interpolate(picture.float().cpu(), (THUMB, THUMB), mode="bilinear", antialias=True)
        thumbs.append(small.round().clamp(0, 255).to(torch.uint8))
        names += list(name)
    if not codes:
        raise Invalid("A gallery needs at least one picture.")
    code = torch.cat(codes)
    mean = total / len(code)
    middle = code.mean(0)
    variance = square / len(code) - float(mean.square().sum())
    kept = float((code - middle).double().square().sum()) / len(code) / max(variance, 1e-300)
    return Gallery(
        tuple(layers), B, mean.float(), (code - middle).half(), torch.cat(thumbs), tuple(names), min(kept, 1.0)
    )


@torch.no_grad()
def directions(covariance: Tensor, keep: float = KEEP, most: int = DIRECTIONS) -> Tensor:
    """Compute principal directions (L, H, r, k) of covariances (L, H, k, k) that keep a fraction of the variance."""
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
    part = values.cumsum(-1) / values.sum(-1, keepdim=True).clamp_min(1e-300)
    need = ((part < keep).sum(-1) + 1).clamp_max(min(most, values.shape[-1]))  # (L, H)
    r = int(need.max())
    basis = vectors.mT[..., :r, :].float()
    return basis * (torch.arange(r) < need[..., None].cpu()).to(basis)[..., None]


def save_gallery(g: Gallery, folder: Path) -> None:
    """Write a gallery into `folder`, before the folder is sealed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: getattr(g, n).contiguous() for n in ("basis", "mean", "code", "thumbs")}
    save_file(tensors, folder / TENSORS)
    about = {"layers": list(g.layers), "names": list(g.names), "kept": g.kept}
    (folder / ABOUT).write_text(json.dumps(about))


def load_gallery(folder: Path) -> Gallery:
    """Load the gallery of an artifact. Raises NotFound if it has none."""
    if not (folder / TENSORS).is_file():
        raise NotFound("This artifact carries no gallery; fit it again with gallery_images, or upload one.")
    about = json.loads(content(folder, ABOUT))
    return Gallery(tuple(about["layers"]), **tensors(folder, TENSORS), names=tuple(about["names"]), kept=about["kept"])


def joined(one: Gallery, two: Gallery) -> Gallery:
    """Concatenate two galleries about their common mean. Raises Invalid if their bases differ."""
    if one.layers != two.layers or not torch.equal(one.basis, two.basis):
        raise Invalid("The galleries have other heads or directions, so they cannot be joined.")
    n, m = len(one), len(two)
    mean = (one.mean * n + two.mean * m) / (n + m)
    code = torch.cat(
        [g.code.float() + torch.einsum("lhk,lhrk->lhr", g.mean - mean, g.basis.float()) for g in (one, two)]
    ).half()
    kept = (one.kept * n + two.kept * m) / (n + m)
    return Gallery(one.layers, one.basis, mean, code, torch.cat([one.thumbs, two.thumbs]), one.names + two.names, kept)
