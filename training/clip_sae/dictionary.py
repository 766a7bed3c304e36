"""Trainable sparse autoencoders on the activations of a site (training loop: train.py; metrics: quality.py).

    f = act(E n(x) + b),  x^ = f W + c,  rows of W of unit norm          x (N, D) tokens, f (N, F), E and W (F, D)

- **topk**: the k largest pre-activations of a token (Gao et al., arXiv 2406.04093). Loss: fraction of variance
  unexplained, plus AuxK on dead features if asked for.
- **batchtopk**: the N k largest of a batch, so that tokens share a budget (Bussmann et al., arXiv 2412.06410). Shipped
  as jumprelu, with the threshold at which k features fire on average.
- **vanilla**: ReLU; squared error relative to each token's distance from the mean, L1 on activations, ghost gradients
  for dead features: the objective of the dictionaries of Joseph et al., arXiv 2504.08729.

After the one dense product that finds the active (token, feature) pairs, only these pairs are touched: decoding and
both gradients are embedding bags, so a step costs little more than encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from patches.engine.read import upto
from patches.mechanisms.features import EPS, SAE, Normalise, normalised
from registry.config import STRICT
from registry.errors import ConfigError

Chunks = Callable[[int], Tensor]
"""Chunk number -> (N, D) tokens, deterministic"""


@dataclass(frozen=True)
class SAEConfig:
    """Hyperparameters of a sparse autoencoder and its training."""

    __pydantic_config__ = STRICT

    method: Literal["topk", "batchtopk", "vanilla"] = "batchtopk"
    features: int = 4096
    """Number of features"""
    k: int = 32
    """Active features per token, of topk and batchtopk"""
    l1: float = 1e-5
    """Weight of the L1 penalty, for the activation `vanilla`"""
    steps: int = 600
    """Optimiser steps"""
    batch: int = 4096
    """Tokens per step, over all processes together"""
    passes: int = 1
    """Passes over each chunk, each in another order; more than 1 where reading activations dominates the cost"""
    lr: float = 1e-3
    """Peak learning rate of Adam"""
    warmup: int = 50
    """Steps of linear warm-up"""
    end_lr: float = 0.1
    """Last learning rate as a share of lr, reached by a cosine"""
    clip: float = 1.0
    """Largest norm of the gradient"""
    normalise: Literal["scale", "none", "layer_norm", "norm"] = "scale"
    """Input normalisation. scale: one mean and one factor for all tokens, folded into the shipped weights; the others
    are stored as an option of the shipped SAE"""
    dead_after: int = 100
    """Steps without firing after which a feature counts as dead"""
    dead: Literal["resample", "auxiliary", "leave"] = "resample"
    """Treatment of dead features. resample: every `dead_after` steps of the first two thirds, restart them at residuals
    of badly reconstructed tokens. auxiliary: AuxK, or ghost gradients for vanilla"""
    auxiliary: float = 1 / 32
    """Weight of the AuxK loss"""
    seed: int = 0


# ---- activations -------------------------------------------------------------------------------------------------


def tokens_of(x: Tensor, which: Literal["all", "cls", "patches"]) -> Tensor:
    """Select the class token, the patches or all tokens of activations, and flatten them: (B, T, D) -> (N, D)."""
    part = {"all": x, "cls": x[:, :1], "patches": x[:, 1:]}[which]
    return part.reshape(-1, x.shape[-1])


def activations(
    model: nn.Module,
    site: str,
    images: Callable[[int], Tensor],
    which: Literal["all", "cls", "patches"] = "all",
    batch: int = 64,
) -> Chunks:
    """Return a function from chunk number to the model's activations at `site` (N, D); the forward stops there.

    images: chunk number -> preprocessed images (B, 3, h, w).
    """

    @torch.no_grad()
    def chunk(number: int) -> Tensor:
        parts = torch.split(images(number), batch)
        return torch.cat([tokens_of(upto(model, [site], image=part)[site].float(), which) for part in parts])

    return chunk


# ---- one step ----------------------------------------------------------------------------------------------------


class Encode(torch.autograd.Function):
    """Sparse encoding: pre-activations of the (token, feature) pairs that fire, with gradients for those alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, bias: Tensor, k: int, whole: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        pre = torch.addmm(bias, x, encoder.T)
        if whole:
            at = largest_of(pre.view(-1), len(x) * k).sort().values
            rows, features, values = at // len(bias), at % len(bias), pre.view(-1)[at]
        else:
            top = pre.topk(k, dim=1, sorted=False)
            rows = torch.arange(len(x), device=x.device).repeat_interleave(k)
            features, values = top.indices.flatten(), top.values.flatten()
        ctx.save_for_backward(x, rows, features)
        ctx.shape = encoder.shape
        ctx.mark_non_differentiable(rows, features)
        return values, rows, features

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, rows, features = ctx.saved_tensors
        bias = grad.new_zeros(ctx.shape[0]).index_add_(0, features, grad)
        return None, _by_feature(x, rows, features, grad, ctx.shape[0]), bias, None, None


class Decode(torch.autograd.Function):
    """Sparse decoding (N, D): for each token the sum of value * W[feature] over its active features."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: Tensor, features: Tensor, decoder: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(values, rows, features, decoder)
        return _bags(decoder, features, _starts(rows, count), values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        values, rows, features, decoder = ctx.saved_tensors
        with torch.enable_grad():  # autograd owns the kernel for the pairwise dot products <grad of bag, row of W>
            free = values.detach().requires_grad_()
            out = _bags(decoder, features, _starts(rows, len(grad)), free)
            mine = torch.autograd.grad(out, free, grad)[0]
        return mine, None, None, _by_feature(grad, rows, features, values, len(decoder)), None


def _bags(table: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    return nnf.embedding_bag(index, table.detach(), starts, mode="sum", per_sample_weights=weights)


def _starts(sorted_rows: Tensor, count: int) -> Tensor:
    """Return the offset of each row's first pair in the sorted list of pairs."""
    return torch.searchsorted(sorted_rows, torch.arange(count, device=sorted_rows.device))


def _by_feature(x: Tensor, rows: Tensor, features: Tensor, weights: Tensor, count: int) -> Tensor:
    """Sum weight * x[token] over each feature's tokens: (F, D)."""
    ordered = features.sort(stable=True)
    return _bags(x, rows[ordered.indices], _starts(ordered.values, count), weights[ordered.indices])


def largest_of(flat: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest values.

    A sample gives a lower bound for them, so only values above it are sorted.
    """
    sample = flat[:: max(1, flat.numel() // 65536)]
    guess = sample.topk(max(1, min(len(sample), 2 * len(sample) * count // flat.numel() + 16))).values[-1]
    near = (flat >= guess).nonzero()[:, 0]
    if len(near) < count:
        return flat.topk(count, sorted=False).indices
    return near[flat[near].topk(count, sorted=False).indices]


class Dictionary(nn.Module):
    """Parameters of a sparse autoencoder in training, on normalised inputs."""

    def __init__(self, config: SAEConfig, width: int) -> None:
        super().__init__()
        self.config = config
        F = config.features
        if config.method != "vanilla" and not 0 < config.k <= F:
            raise ConfigError(f"k={config.k} of {F} features; k must be at least 1 and at most that.")
        generator = torch.Generator().manual_seed(config.seed)
        rows = nnf.normalize(torch.randn(F, width, generator=generator), dim=1)
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows)
        self.bias, self.decoder_bias = nn.Parameter(torch.zeros(F)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("idle", torch.zeros(F, dtype=torch.long))
        """Steps since each feature last fired"""

    mean: Tensor
    factor: Tensor
    idle: Tensor

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Initialise scale and centre from the first tokens (N, D)."""
        if self.config.normalise == "scale":
            self.mean.copy_(x.mean(0))
            self.factor.copy_((x.shape[1] / (x - self.mean).square().sum(1).mean().clamp_min(EPS)).sqrt())
        n = self.normal(x)
        self.decoder_bias.copy_(geometric_median(n))
        self.bias.copy_(-(self.encoder @ self.decoder_bias))

    @torch.no_grad()
    def fresh(self, x: Tensor, count: int, seed: int) -> Tensor:
        """Propose directions (count, D) of unit norm for dead features.

        They are residuals of tokens sampled in proportion to their squared error (Bricken et al. 2023).
        """
        n, c = self.normal(x[:4096]), self.config
        pre = torch.addmm(self.bias, n, self.encoder.T)
        if c.method != "vanilla":  # k per token is a good enough approximation for choosing tokens
            top = pre.topk(c.k, dim=1)
            pre = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
        left = n - pre.relu() @ self.decoder - self.decoder_bias
        chance = left.square().sum(1).cpu()
        drawn = torch.multinomial(chance, count, count > len(n), generator=torch.Generator().manual_seed(seed))
        return nnf.normalize(left[drawn.to(left.device)], dim=1)

    @torch.no_grad()
    def restart(self, dead: Tensor, rows: Tensor) -> None:
        """Restart the features `dead` (count,) along `rows` (count, D)."""
        self.decoder[dead], self.encoder[dead] = rows, rows
        self.bias[dead] = -(rows @ self.decoder_bias)
        self.idle[dead] = 0

    def normal(self, x: Tensor) -> Tensor:
        """Normalise inputs by the stored mean and factor."""
        if self.config.normalise == "scale":
            return (x - self.mean) * self.factor
        return normalised(x, self.config.normalise)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, fraction of variance unexplained, and which features fired (F,), for tokens x (N, D)."""
        return self._vanilla(x) if self.config.method == "vanilla" else self._sparse(x)

    def _sparse(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, n = self.config, self.normal(x)
        values, rows, features = Encode.apply(n, self.encoder, self.bias, c.k, c.method == "batchtopk")
        values = values.relu()
        back = Decode.apply(values, rows, features, self.decoder, len(n)) + self.decoder_bias
        left = n - back
        variance = (n - n.mean(0)).square().sum()
        share = left.square().sum() / variance
        fired = torch.zeros(c.features, device=x.device).index_add_(0, features, (values.detach() > 0).float())
        loss = share
        dead = (self.idle > c.dead_after).nonzero()[:, 0]
        if len(dead) and c.dead == "auxiliary":
            # AuxK: the dead features nearest to firing explain the residual of the living ones; without ReLU, because
            # features far below zero would get no gradient
            target = left.detach()
            top = (n @ self.encoder[dead].T + self.bias[dead]).topk(
                min(len(dead), x.shape[1] // 2), dim=1, sorted=False
            )
            weak = nnf.embedding_bag(dead[top.indices], self.decoder, per_sample_weights=top.values, mode="sum")
            loss = loss + c.auxiliary * (target - weak).square().sum() / target.square().sum().clamp_min(EPS)
        return loss, share.detach(), fired

    def _vanilla(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, n = self.config, self.normal(x)
        pre = torch.addmm(self.bias, n, self.encoder.T)
        f = pre.relu()
        left = n - (f @ self.decoder + self.decoder_bias)
        far = (n - n.mean(0)).norm(dim=1, keepdim=True).clamp_min(EPS)
        error = (left.square() / far).mean()
        loss = error + c.l1 * f.sum(1).mean()
        dead = (self.idle > c.dead_after).nonzero()[:, 0]
        if len(dead) and c.dead == "auxiliary":
            # ghost gradients: exp(pre) of the dead features, scaled to half the norm of the residual
            target = left.detach()
            ghost = pre[:, dead].clamp(max=20).exp() @ self.decoder[dead]
            size = target.norm(dim=1, keepdim=True) / (1e-6 + 2 * ghost.norm(dim=1, keepdim=True))
            off = (ghost * size.detach() - target).square() / (target - target.mean(0)).norm(dim=1, keepdim=True)
            loss = loss + (error.detach() / (off.detach() + 1e-6) * off).mean()
        share = left.detach().square().sum() / (n - n.mean(0)).square().sum()
        return loss, share, (f.detach() > 0).sum(0).float()

    @torch.no_grad()
    def ship(self, site: str = "") -> SAE:
        """Return the autoencoder on raw inputs: the data's mean and scale are folded in, rows of W keep unit norm."""
        c = self.config
        shift, factor = (self.mean, self.factor) if c.normalise == "scale" else (torch.zeros_like(self.mean), 1.0)
        how: Normalise = "none" if c.normalise == "scale" else c.normalise
        return SAE(
            encoder=self.encoder.detach().clone(),
            bias=self.bias / factor - self.encoder @ shift,
            decoder=self.decoder.detach().clone(),
            decoder_bias=self.decoder_bias / factor + shift,
            activation="relu" if c.method == "vanilla" else "topk",
            k=0 if c.method == "vanilla" else c.k,
            normalise=how,
            site=site,
        )


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 20) -> Tensor:
    """Compute the geometric median (D,) of the rows of x (N, D) by Weiszfeld's iteration."""
    at = x.mean(0)
    for _ in range(iterations):
        weight = 1 / (x - at).norm(dim=1, keepdim=True).clamp_min(EPS)
        at = (x * weight).sum(0) / weight.sum()
    return at
