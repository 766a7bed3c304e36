"""Steerability of SAE features: clamp a feature and measure how CLIP's probabilities over a vocabulary change.

Joseph et al., arXiv 2504.08729. P_i(v) = softmax_v(scale * y_i t_v), y_i the unit image embedding; with feature f
clamped to s at every token, delta_f(v) = mean_i [P~_i(v) - P_i(v)]. Steerability S_f = sum_v delta_f(v)^2, power max_v
delta_f(v), specificity S_f / power, concept argmax_v; steerable if S_f > 0.1; coverage: distinct concepts of steerable
features.

**After the last block** nothing mixes tokens any more, so only the class token's edit z + a w counts (a = s - f), and

    y = (A + a B) / sigma + C,   sigma^2 = Var z + 2 a Cov(z, w) + a^2 Var w + eps
    A = (gamma * (z - mean z)) P,   B = (gamma * (w - mean w)) P,   C = beta P

Logits are then a combination of three tables of words, A T^T (images), B T^T (features), C T^T, and |y|^2 needs only
their inner products: no forward, no product per (image, feature). **Before it**, the input of the next block is cached
and only the rest of the tower runs, many features in one batch. Nothing of size images x features x words is ever
stored. Shapes: B images, T tokens, D width, F features, k joint space, V words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patches.families import clip
from patches.families.base import Base
from training.progress import tqdm

STEERABLE = 0.1
"""S_f above which a feature counts as steerable"""


@dataclass(frozen=True)
class Steerability:
    """Steerability metrics per feature."""

    score: Tensor
    """(F,) steerability S_f, at most 2"""
    power: Tensor
    """(F,) largest increase of a word's probability"""
    concept: Tensor
    """(F,) int64 index of the word whose probability rises most"""

    @property
    def specificity(self) -> Tensor:
        """(F,) specificity S_f / power"""
        return self.score / self.power.clamp_min(1e-12)

    def summary(self) -> dict[str, float]:
        """Summarise number and fraction of steerable features, their distinct concepts, and means over all features."""
        on = self.score > STEERABLE
        return {
            "features": len(self.score),
            "steerable": int(on.sum()),
            "steerable_share": float(on.float().mean()),
            "coverage": len(set(self.concept[on].tolist())),
            "power": float(self.power.mean()),
            "score": float(self.score.mean()),
            "specificity": float(self.specificity.mean()),
        }


class _Tally:
    """Accumulates P~ - P over images, per feature and word, and computes the metrics from it."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, after: Tensor, before: Tensor) -> None:
        """Add a batch. after: (features, V) mean over images of P~; before: (V,) mean of P."""
        delta = after - before
        top = delta.max(1)
        self.parts.append((delta.square().sum(1), top.values, top.indices))

    def result(self) -> Steerability:
        return Steerability(*(torch.cat(p).cpu() for p in zip(*self.parts, strict=True)))


def probabilities(y: Tensor, words: Tensor, scale: float) -> Tensor:
    """Compute the probabilities (..., V) of embeddings y (..., k) of any length. words: (V, k) of unit norm."""
    return (scale * torch.nn.functional.normalize(y, dim=-1) @ words.T).softmax(-1)


@torch.inference_mode()
def after_last_block(
    base: Base,
    z: Tensor,
    decoder: Tensor,
    activation: Tensor,
    value: Tensor | float,
    words: Tensor,
    cells: int = 1 << 20,
    quiet: bool = True,
) -> Steerability:
    """Clamp every feature to `value` at the output of the last block, in closed form.

    z (B, D): the class token there. decoder (F, D); the identity for the residual's own dimensions ("neurons").
    activation (B, F): the features' actual activations at the class token. value: one number, or (F,). cells: images x
    features x words processed at once.
    """
    visual, scale = base.model.visual, clip.logit_scale(base)
    gamma, beta, eps, P = visual.ln_post.weight, visual.ln_post.bias, visual.ln_post.eps, visual.proj
    z, decoder = z.float(), decoder.float()
    zc, wc = z - z.mean(1, keepdim=True), decoder - decoder.mean(1, keepdim=True)
    D = z.shape[1]
    A, C = (zc * gamma) @ P, beta @ P  # (B, k), (k,)
    B = (wc * gamma) @ P  # (F, k)
    before = probabilities(A / (zc.square().mean(1, keepdim=True) + eps).sqrt() + C, words, scale).mean(0)
    tables = (A @ words.T, B @ words.T, C @ words.T)  # (B, V), (F, V), (V,)
    inner = {"aa": A.square().sum(1)[:, None], "ac": (A @ C)[:, None], "cc": C @ C}  # (B, 1), (B, 1), ()
    step = max(1, cells // (len(z) * len(words)))
    tally = _Tally()
    for i in tqdm(range(0, len(decoder), step), "steerability", disable=True if quiet else None, leave=False):
        at = slice(i, i + step)
        b = B[at]
        a = (value[at] if isinstance(value, Tensor) else value) - activation[:, at]  # (B, n)
        variance = zc.square().mean(1)[:, None] + 2 * a * (zc @ wc[at].T) / D + a.square() * wc[at].square().mean(1)
        sigma = (variance + eps).sqrt()
        square = (inner["aa"] + 2 * a * (A @ b.T) + a.square() * b.square().sum(1)) / sigma.square()
        square = square + 2 * (inner["ac"] + a * (b @ C)) / sigma + inner["cc"]
        long = scale / square.clamp_min(1e-12).sqrt()  # (B, n) factor from dot products to logits
        u = (long / sigma).T  # (n, B)
        mix = torch.stack([u * a.T, long.T], 2)  # (n, B, 2) on the rows of (B_f, C)
        rows = torch.stack([tables[1][at], tables[2].expand(len(b), -1)], 1)  # (n, 2, V)
        logits = torch.baddbmm(u[:, :, None] * tables[0], mix, rows)  # (n, B, V)
        tally.add(logits.softmax(-1).mean(1), before)
    return tally.result()


@torch.inference_mode()
def after_block(
    base: Base,
    layer: int,
    z: Tensor,
    decoder: Tensor,
    activation: Callable[[slice], Tensor],
    value: Tensor | float,
    words: Tensor,
    batch: int = 256,
    cls_only: bool = False,
    quiet: bool = True,
) -> Steerability:
    """Clamp every feature to `value` at the output of any block, by running the rest of the tower.

    z (B, T, D): the residual stream after `layer`. activation: slice of features -> their actual activations (B, T, n).
    batch: images x features per forward. cls_only: clamp at the class token alone.
    """
    scale = clip.logit_scale(base)
    before = probabilities(rest(base, z, layer), words, scale).mean(0)
    step = max(1, batch // len(z))
    tally = _Tally()
    for i in tqdm(range(0, len(decoder), step), "steerability", disable=True if quiet else None, leave=False):
        at = slice(i, min(i + step, len(decoder)))
        a = (value[at] if isinstance(value, Tensor) else value) - activation(at)  # (B, T, n)
        if cls_only:
            a = torch.cat([a[:, :1], torch.zeros_like(a[:, 1:])], 1)
        moved = z[None] + a.permute(2, 0, 1)[..., None] * decoder[at, None, None]  # (n, B, T, D)
        after = probabilities(rest(base, moved.flatten(0, 1), layer), words, scale)  # (n * B, V)
        tally.add(after.view(-1, len(z), len(words)).mean(1), before)
    return tally.result()


def rest(base: Base, z: Tensor, layer: int) -> Tensor:
    """Run the tower from the residual stream z (B, T, D) after block `layer` to image features (B, k), not normalised.

    Hooks inside the last block see the class token only; hooks on the block itself are not called.
    """
    visual: Any = base.model.visual
    blocks = visual.transformer.resblocks[layer + 1 :]
    for block in blocks[:-1]:
        z = block(z)
    for block in blocks[-1:]:  # of the last block's output only the class token is used
        x = block.ln_1(z)
        z = z[:, :1] + block.ls_1(block.attention(x[:, :1], x, x))
        z = z + block.ls_2(block.mlp(block.ln_2(z)))
    features: Tensor = visual.ln_post(z[:, 0]) @ visual.proj
    return features
