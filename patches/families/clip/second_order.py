"""Second-order lens: an MLP neuron's contribution to CLIP's embedding through the attention heads of later layers.

Gandelsman, Efros, Steinhardt, "Interpreting the second-order effects of neurons in CLIP", arXiv 2406.04341, section 4.
Neuron n of the MLP of layer l writes p_s w_n into the stream at token s. Every later head (l', h) reads it with its
values, moves it to the class token and writes it, from where it goes straight to the output. Attention patterns and
norm denominators are held fixed; the neuron's effects on queries and keys, on later MLPs, over several heads in a row,
and directly, are left out (`follow` restores each, which measures its cost):

    phi_n = sum_{l' > l, h} S[(l', h), n] U[n, (l', h)]
    S[(l', h), n] = sum_s A^{l',h}_{0s} p_s / (sigma^{l'}_s sigma_post)
    U[n, (l', h)] = P^T diag(gamma_post) C W_O^h W_V^h diag(gamma_1^{l'}) C w_n,     C = I - 11^T / D

Only the scalars S depend on the image; the vectors U are the model's. `ln="official"` omits both C, as the authors'
code does, which spreads means and biases evenly over all components (`official`).

**Coordinates.** phi_n lies in the span of G = heads x later layers vectors. With U_n^T = Q_n R_n (QR), c = R_n s has
the length of phi_n and all its angles, so norms and principal directions are problems of size G, not k, and nothing of
size images x neurons x k is ever formed. "Rank 1 explains x %" is out of at most G directions.

Shapes: B images, T tokens (class token first), D width, N neurons of a layer, H heads, G = (L - 1 - l) H later heads in
the order (layer, head), r = min(G, k), k joint space.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor

from patches.engine.read import record
from patches.families import clip
from patches.families.base import Base
from patches.families.clip.direct import full, readout
from registry.errors import Invalid

Norms = Literal["own", "official"]
Moves = Literal["norms", "patterns", "hops", "mlps", "direct"]
MOVES: tuple[Moves, ...] = ("norms", "patterns", "hops", "mlps", "direct")
"""What the lens holds fixed, in the order in which `training/second_order/questions.py` releases it"""


@dataclass(frozen=True, eq=False)
class NeuronLens:
    """Image-independent part of the second-order effects of one layer's neurons."""

    layer: int
    basis: Tensor
    """Q (N, r, k) with orthonormal rows"""
    size: Tensor
    """R (N, r, G) of the QR decomposition"""
    heads: int
    """Number of heads per block"""
    ln: Norms
    """Centring of the norms: own, or official as in the authors' code"""

    @property
    def neurons(self) -> int:
        return len(self.size)

    def write(self, neurons: Sequence[int] | slice = slice(None)) -> Tensor:
        """Return the vectors U (n, G, k) of some neurons; of all of them it is as large as the basis."""
        return self.size[neurons].mT @ self.basis[neurons]

    def coordinates(self, s: Tensor) -> Tensor:
        """Return coordinates c (N, B, r) of phi for scalars S (B, G, N), in each neuron's own orthonormal basis."""
        return s.permute(2, 0, 1) @ self.size.mT

    def total(self, c: Tensor) -> Tensor:
        """Sum effects with coordinates c (N, B, r) over neurons: (B, k)."""
        return c.transpose(0, 1).flatten(1) @ self.basis.flatten(0, 1)

    def against(self, texts: Tensor) -> Tensor:
        """Compute U t (N, G, M) for texts (M, k): <phi_n, t> = S_n . (U_n t)."""
        return self.size.mT @ (self.basis @ texts.T)

    def head(self, g: int) -> tuple[int, int]:
        """Return the (layer, head) of an index in G."""
        return self.layer + 1 + g // self.heads, g % self.heads


def check_layer(base: Base, layer: int) -> None:
    """Check that a layer has second-order effects.

    Raises Invalid naming those that have, NotFound for an unsupported architecture.
    """
    readout(base)
    last = len(base.model.visual.transformer.resblocks) - 2
    if not 0 <= layer <= last:
        raise Invalid(
            f"Layer {layer} has no second-order effects; layers 0 to {last} of {base.name} have attention after them."
        )


@torch.no_grad()
def lens(base: Base, layer: int, ln: Norms = "own") -> NeuronLens:
    """Build the lens on the neurons of `layer` (0-based). Raises Invalid for the last layer, whose effects are zero."""
    check_layer(base, layer)
    own, home = ln == "own", readout(base)
    blocks, to_y = base.model.visual.transformer.resblocks, home.map if own else home.plain  # (D, k)
    w = full(blocks[layer].mlp.c_proj.weight)  # (D, N)
    w = w - w.mean(0) if own else w
    parts = []
    for block in blocks[layer + 1 :]:
        value, out = _values(block.attn)
        M = (out.T @ to_y).unflatten(0, (block.attn.heads, -1))  # (H, e, k)
        v = (value @ (full(block.ln_1.weight)[:, None] * w)).unflatten(0, (block.attn.heads, -1))  # (H, e, N)
        parts.append((v.mT @ M).transpose(0, 1))  # (N, H, k)
    U = torch.cat(parts, 1)  # (N, G, k)
    Q, R = torch.linalg.qr(U.mT)
    return NeuronLens(layer, Q.mT.contiguous(), R, blocks[layer].attn.heads, ln)


@torch.no_grad()
def reading(base: Base, layer: int, texts: Tensor, ln: Norms = "own") -> Tensor:
    """Compute U t (N, G, M) for texts (M, k) directly from the weights, without the lens' bases."""
    check_layer(base, layer)
    own, home = ln == "own", readout(base)
    blocks, to_y = base.model.visual.transformer.resblocks, home.map if own else home.plain
    w = full(blocks[layer].mlp.c_proj.weight)
    w = w - w.mean(0) if own else w
    said, parts = to_y @ full(texts).to(to_y).T, []  # (D, M)
    for block in blocks[layer + 1 :]:
        value, out = _values(block.attn)
        by_head = (out.T @ said).unflatten(0, (block.attn.heads, -1))  # (H, e, M)
        read = value.unflatten(0, (block.attn.heads, -1)).mT @ by_head  # (H, D, M)
        parts.append((w.T @ (full(block.ln_1.weight)[:, None] * read)).transpose(0, 1))  # (N, H, M)
    return torch.cat(parts, 1)


def by_token(seen: Look, layer: int, say: Tensor) -> Tensor:
    """Compute what all neurons of a layer contribute to <y, t> through later heads, by the token they fire at.

    Returns (B, M, T). say: U t (N, G, M). The sum over tokens is <sum_n phi_n, t>.
    """
    pull = seen.pull[:, layer - seen.first :].flatten(1, 2)  # (B, G, T)
    told = seen.p[layer] @ say.flatten(1)  # (B, T, G M)
    return torch.einsum("bgt,btgm->bmt", pull, told.unflatten(2, say.shape[1:]))


def _values(attn: Any) -> tuple[Tensor, Tensor]:
    """Return W_V (D, D) with heads as rows and W_O (D, D) with heads as columns."""
    return full(attn.in_proj_weight[2 * attn.in_proj_weight.shape[1] :]), full(attn.out_proj.weight)


# ---- what a picture brings ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Look:
    """What one forward records for the lenses of some layers."""

    p: dict[int, Tensor]
    """Layer -> (B, T, N) neuron activations"""
    pull: Tensor
    """(B, L - 1 - first, H, T): A_0s / (sigma_s sigma_post) of the blocks after the first of these layers"""
    first: int
    """The first layer that was asked for"""
    y: Tensor
    """(B, k) embedding before normalisation"""
    about: dict[str, Tensor]
    """Statistics that `official` needs: pattern (B, l', H, T), mean and sigma of ln_1 (B, l', T), and of ln_post
    (B,)"""

    def __len__(self) -> int:
        return len(self.y)


@torch.no_grad()
def look(base: Base, x: Tensor, layers: Sequence[int], keep: bool = False) -> Look:
    """Record one forward on preprocessed images x (B, 3, h, w) for `layers`. keep: fill `about`.

    Applied patches take effect. Statistics of the norms are computed in at least float32.
    """
    for layer in layers:
        check_layer(base, layer)
    visual, first = base.model.visual, min(layers)
    later = range(first + 1, len(visual.transformer.resblocks))
    norms = [f"visual.transformer.resblocks.{i}.ln_1" for i in later]
    patterns = [clip.site("pattern", i) for i in later]
    neurons = {layer: clip.site("neurons", layer) for layer in layers}
    with (
        record(base.model, [*norms, clip.site("ln_post")], "input", lambda z: _spread(z, visual.ln_post.eps)) as stats,
        record(base.model, neurons.values(), "input") as acts,
        record(base.model, patterns, keep=lambda a: a[:, :, 0]) as rows,
        record(base.model, ["visual"]) as out,
    ):
        base.model(image=x.to(base.device, visual.proj.dtype))
    A = torch.stack([rows[s][0] for s in patterns], 1)  # (B, l', H, T)
    mean, sigma = torch.stack([stats[s][0] for s in norms], 1).unbind(-1)  # (B, l', T)
    mean_post, sigma_post = stats[clip.site("ln_post")][0].unbind(-1)
    if mean_post.ndim == 2:  # depends on whether the class token is taken before or after the norm
        mean_post, sigma_post = mean_post[:, 0], sigma_post[:, 0]
    pull = A / (sigma[:, :, None] * sigma_post[:, None, None, None])
    more = {"pattern": A, "mean": mean, "sigma": sigma, "mean_post": mean_post, "sigma_post": sigma_post}
    p = {layer: acts[s][0].to(pull.dtype) for layer, s in neurons.items()}
    return Look(p, pull, first, out["visual"][0].to(pull.dtype), more if keep else {})


def _spread(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Return mean and norm denominator (..., 2) over features, from (z - mean)^2, which avoids cancellation."""
    z = full(z)
    mean = z.mean(-1, keepdim=True)
    return torch.cat([mean, ((z - mean).square().mean(-1, keepdim=True) + eps).sqrt()], -1)


def scalars(seen: Look, layer: int) -> Tensor:
    """Compute the scalars S (B, G, N) of a layer."""
    pull = seen.pull[:, layer - seen.first :].flatten(1, 2)  # (B, G, T)
    return pull @ seen.p[layer]


def effects(at: NeuronLens, s: Tensor, neurons: Sequence[int] | slice = slice(None)) -> Tensor:
    """Compute phi (B, n, k) of some neurons. For all of them it is large: prefer `NeuronLens.coordinates`."""
    return s.permute(2, 0, 1)[neurons].matmul(at.write(neurons)).transpose(0, 1)


@torch.no_grad()
def official(base: Base, at: NeuronLens, seen: Look) -> Tensor:
    """Compute phi (B, N, k) as the authors' code defines it: times 100 / |y|, with shares of every mean and bias.

    c_proj's bias counts for 1/N; ln_1's mean and beta and the values' bias for 1/((1 + 2l') N); the output projection's
    for 1/((1 + 2l') H N); ln_post's mean and beta for 1/((1 + 2l')(1 + 2L) H N). None of these depends on the neuron,
    so all neurons of an image are off by the same vector.
    """
    if at.ln != "official" or not seen.about:
        raise Invalid("The authors' definition needs lens(..., ln='official') and look(..., keep=True).")
    visual, a = base.model.visual, seen.about
    blocks, H, N = visual.transformer.resblocks, at.heads, at.neurons
    L, i0 = len(blocks), at.layer - seen.first
    offset = torch.zeros_like(seen.y)
    out_bias = blocks[at.layer].mlp.c_proj.bias / N  # (D,)
    for i, block in enumerate(blocks[at.layer + 1 :]):
        number = at.layer + 1 + i
        share = (1 + 2 * number) * N
        A, mean, sigma = (a[k][:, i0 + i] for k in ("pattern", "mean", "sigma"))  # (B, H, T), (B, T), (B, T)
        D = len(out_bias)
        value, out = _values(block.attn)
        x = block.ln_1.weight * (out_bias - (mean / share)[..., None]) / sigma[..., None] + block.ln_1.bias / share
        v = nnf.linear(x, value, block.attn.in_proj_bias[2 * D :] / share).unflatten(-1, (H, -1))  # (B, T, H, e)
        z = torch.einsum("bht,bthe->bhe", A, v)
        o = torch.einsum("bhe,dhe->bd", z, out.unflatten(1, (H, -1))) + block.attn.out_proj.bias / share
        one = share * (1 + 2 * L) * H
        gain = visual.ln_post.weight / a["sigma_post"][:, None]
        offset += (gain * (o - H * a["mean_post"][:, None] / one) + H * visual.ln_post.bias / one) @ visual.proj
    phi = effects(at, scalars(seen, at.layer)) + offset[:, None]
    return 100 * phi / seen.y.norm(dim=1)[:, None, None]


# ---- directions: moments of many pictures ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Directions:
    """Principal direction, threshold and strongest images of each neuron of a layer, over many images."""

    direction: Tensor
    """Unit directions r (N, k) of the effects on the images with the largest effects"""
    axis: Tensor
    """(N, r): the same direction in a neuron's own coordinates"""
    reader: Tensor
    """(N, G): U_n r_n, so that x_n = <phi_n - mean, r_n> = (S - mean S) . reader"""
    mean: Tensor
    """(N, G) mean of the scalars S"""
    threshold: Tensor
    """(N,) smallest kept norm |phi - mean|; an effect below it is not significant"""
    explained: Tensor
    """(N, 3) fraction of the kept images' energy in the first three directions, out of at most G"""
    explained_all: Tensor
    """(N,) fraction of the variance over all images along r_n"""
    carriers: Tensor
    """(N, G) each later head's fraction of the summed variances of what heads carry of the neuron"""
    spread: Tensor
    """(N,) standard deviation of phi over all images"""
    picture: Tensor
    """(N, K) int64 images with the largest effects, largest first"""
    projection: Tensor
    """(N, K) projections x_n of those images"""
    exact: Tensor
    """(N,) bool: whether these are provably the K largest"""
    seen: int
    """Number of images"""

    def projections(self, s: Tensor) -> Tensor:
        """Compute x (B, N) for scalars S (B, G, N)."""
        return torch.einsum("bgn,ng->bn", s, self.reader) - (self.mean * self.reader).sum(1)

    def centred(self, at: NeuronLens, s: Tensor) -> Tensor:
        """Return phi - mean in coordinates (N, B, r)."""
        return at.coordinates(s - self.mean.T)

    def significant(self, c: Tensor) -> Tensor:
        """Return (N, B) bool: whether effects (from `centred`) reach the threshold, with a tolerance for rounding."""
        return c.norm(dim=2) >= self.threshold[:, None] * (1 - 1e-5)


class EffectMoments:
    """Accumulates sums over a stream of images from which `Directions` follow; memory does not depend on their number.

    The K largest effects are relative to the mean, which is known only at the end. So K x spare are kept by their
    distance from the first batch's mean, and the triangle inequality then proves for which neurons none can be missing.
    """

    def __init__(self, at: NeuronLens, keep: int = 100, spare: int = 4) -> None:
        if keep < 1:
            raise Invalid(f"keep={keep}: a direction needs at least one picture.")
        self.at, self.keep, self.room, self.n = at, keep, keep * spare, 0

    @torch.no_grad()
    def add(self, s: Tensor) -> None:
        """Add the scalars S (B, G, N) of the next images."""
        c = self.at.coordinates(s)  # (N, B, r)
        if not self.n:
            self.origin = c.mean(1, keepdim=True)
            self.s0 = s.mean(0).T  # (N, G)
            N, _, r = c.shape
            wide = torch.float64  # for the sums only
            self.c1, self.c2 = c.new_zeros(N, r, dtype=wide), c.new_zeros(N, r, r, dtype=wide)
            self.s1, self.s2 = (torch.zeros_like(self.s0, dtype=wide) for _ in range(2))
            self.kept, self.norm = c.new_zeros(N, 0, r), c.new_zeros(N, 0)
            self.number = torch.zeros(N, 0, dtype=torch.int64, device=c.device)
        d, e = c - self.origin, s.permute(2, 0, 1) - self.s0[:, None]
        self.c1 += d.sum(1)
        self.c2 += d.mT @ d
        self.s1 += e.sum(1)
        self.s2 += e.square().sum(1)
        B = d.shape[1]
        norm = torch.cat([self.norm, d.norm(dim=2)], 1)
        number = torch.cat([self.number, torch.arange(self.n, self.n + B, device=d.device).expand(len(d), B)], 1)
        self.norm, at = norm.topk(min(self.room, norm.shape[1]), 1)
        self.number = number.gather(1, at)
        self.kept = torch.cat([self.kept, d], 1).gather(1, at[..., None].expand(-1, -1, d.shape[2]))
        self.n += B

    @torch.no_grad()
    def result(self) -> Directions:
        """Compute the directions. Raises Invalid if there was no image."""
        if not self.n:
            raise Invalid("Directions need pictures; the stream was empty.")
        n, at = self.n, self.at
        shift = self.c1 / n  # from the origin of the sums to the mean
        e = self.kept - shift.to(self.kept)[:, None]
        norms, order = e.norm(dim=2).topk(min(self.keep, e.shape[1]), 1)
        e = e.gather(1, order[..., None].expand(-1, -1, e.shape[2]))  # (N, K, r)
        values, vectors = torch.linalg.eigh((e.mT @ e).double())
        axis = vectors[..., -1].to(e)
        x = (e @ axis[..., None])[..., 0]
        turn = torch.where((x > 0).sum(1) > x.shape[1] // 2, 1.0, -1.0).to(e)  # most images project positively
        axis, x = axis * turn[:, None], x * turn[:, None]
        values = values.flip(1).clamp_min(0)
        share = values[:, :3] / values.sum(1, keepdim=True).clamp_min(1e-300)
        cov = self.c2 / n - shift[..., None] * shift[:, None]
        total = cov.diagonal(dim1=1, dim2=2).sum(1).clamp_min(0)
        a = axis.double()
        along = (a[:, None] @ cov @ a[..., None])[:, 0, 0]
        s1 = self.s1 / n
        carried = (self.s2 / n - s1.square()).clamp_min(0) * at.size.double().square().sum(1)  # (N, G)
        full = self.n > self.norm.shape[1]
        beyond = self.norm[:, -1] + shift.norm(dim=1).to(self.norm)
        return Directions(
            direction=(axis[:, None] @ at.basis)[:, 0],
            axis=axis,
            reader=(at.size.mT @ axis[..., None])[..., 0],
            mean=self.s0 + s1.to(self.s0),
            threshold=norms[:, -1],
            explained=nnf.pad(share, (0, 3 - share.shape[1])).to(e),
            explained_all=(along / total.clamp_min(1e-300)).to(e),
            carriers=(carried / carried.sum(1, keepdim=True).clamp_min(1e-300)).to(e),
            spread=total.sqrt().to(e),
            picture=self.number.gather(1, order),
            projection=x,
            exact=norms[:, -1] >= beyond if full else torch.ones_like(norms[:, -1], dtype=torch.bool),
            seen=n,
        )


def directions(at: NeuronLens, stream: Iterable[Tensor], keep: int = 100) -> Directions:
    """Compute directions from a stream of scalars S (B, G, N)."""
    moments = EffectMoments(at, keep)
    for s in stream:
        moments.add(s)
    return moments.result()


# ---- replacing effects -------------------------------------------------------------------------------------------

Replacement = Literal["mean", "significant", "insignificant", "rank1"]


def replaced(at: NeuronLens, known: Directions, s: Tensor, how: Replacement, neurons: Tensor | None = None) -> Tensor:
    """Compute the change (B, k) of y when a layer's second-order effects are replaced.

    By their mean over images (mean), by it only where they reach a neuron's threshold (significant) or do not
    (insignificant), or by mean + x_n r_n (rank1).

    neurons: (N,) bool, whose effects; default all. Sections 4.2 and 4.3 of the paper.
    """
    c = known.centred(at, s)  # (N, B, r)
    if how == "rank1":
        c = c - (c @ known.axis[..., None]) * known.axis[:, None]
    elif how != "mean":
        large = known.significant(c)
        c = c * (large if how == "significant" else ~large)[..., None]
    if neurons is not None:
        c = c * neurons[:, None, None]
    return -at.total(c)


# ---- what the lens leaves out ------------------------------------------------------------------------------------


@torch.no_grad()
def follow(base: Base, layer: int, z: Tensor, delta: Tensor, moves: Collection[Moves] = ()) -> Tensor:
    """Compute how y changes (B, k) when `delta` (B, T, D) is added to the stream z (B, T, D) after `layer`.

    moves: what is recomputed for the changed stream instead of held fixed. With none, the change is exactly the lens's;
    with all of MOVES it is the true one. patterns: queries and keys; hops: later heads read what other later heads
    wrote; mlps: of later blocks; direct: the class token's own share of delta.
    """
    if odd := set(moves) - set(MOVES):
        raise Invalid(f"moves: {sorted(odd)[0]!r:.40} is none of {', '.join(MOVES)}.")
    visual = base.model.visual
    shift, arrived = delta, delta[:, 0] if "direct" in moves else torch.zeros_like(delta[:, 0])

    def normed(norm: Any, plain: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        mean, sigma = _spread(plain, norm.eps).split(1, -1)
        mean2, sigma2 = _spread(moved, norm.eps).split(1, -1)
        sigma2 = sigma2 if "norms" in moves else sigma
        return tuple(
            (x - m) / s * norm.weight + norm.bias for x, m, s in ((plain, mean, sigma), (moved, mean2, sigma2))
        )  # type: ignore[return-value]

    def attend(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        qkv = nnf.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, e)
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), v

    for block in visual.transformer.resblocks[layer + 1 :]:
        one, two = normed(block.ln_1, z, z + shift)
        (A, v), (A2, v2) = attend(block.attn, one), attend(block.attn, two)
        given, given2 = (
            block.attn.out_proj((a @ u).transpose(1, 2).flatten(2))
            for a, u in ((A, v), (A2 if "patterns" in moves else A, v2))
        )
        z = z + given
        more = given2 - given
        arrived = arrived + more[:, 0]
        if "hops" in moves:
            shift = shift + more
        one, two = normed(block.ln_2, z, z + shift)
        plain = block.mlp(one)
        if "mlps" in moves:
            more = block.mlp(two) - plain
            shift, arrived = shift + more, arrived + more[:, 0]
        z = z + plain
    one, two = normed(visual.ln_post, z[:, 0], z[:, 0] + arrived)
    out: Tensor = (two - one) @ visual.proj
    return out
