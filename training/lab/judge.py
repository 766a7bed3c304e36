"""An independent classifier of the atlas's concepts, for judging generated drawings.

A residual CNN that shares no weights and no training with CLIP or with a diffusion model.

It was trained on rendered images of seven styles (one NVIDIA H100, 20 s: 1,227 steps of batch 512, label smoothing .1,
affine jitter, noise) and ships in 4 bits a weight. On real sprites its top-1 accuracy over 1,198 names is 98.7 % on the
styles trained on and 58 % on the held-out one. `distance` compares its features as LPIPS compares VGG's; it is not
LPIPS and is always reported as "the judge's distance".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patches.families.diffusion.packed import load_packed

FOLDER = Path(__file__).parent / "judge"


class Residual(nn.Module):
    """Residual block: two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(True),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer),
        )  # fmt: skip
        self.b = nn.Identity() if inner == outer and stride == 1 else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inner, h, w) to (B, outer, h / stride, w / stride)."""
        return F.relu(self.a(x) + self.b(x))


def network(classes: int = 1198) -> nn.Sequential:
    """Build the network: images (B, 3, 64, 64) in [-1, 1] to logits (B, classes)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), Residual(64, 64, 1), Residual(64, 64, 1), Residual(64, 128, 2), Residual(128, 128,
        1), Residual(128, 256, 2), Residual(256, 256, 1), Residual(256, 384, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(384, classes),
    )  # fmt: skip


@cache
def load() -> nn.Sequential:
    """Load the shipped classifier in eval mode; its classes are the atlas's names in their order."""
    net = network()
    missing, unexpected = net.load_state_dict(load_packed(FOLDER), strict=False)
    assert not unexpected
    assert all("num_batches" in k for k in missing), missing
    return net.eval().requires_grad_(False)


@torch.no_grad()
def logits(net: nn.Module, pictures: Tensor, batch: int = 64) -> Tensor:
    """Classify images (B, 3, 64, 64) in [0, 1]; returns logits (B, classes)."""
    return torch.cat([net(2 * x - 1) for x in torch.split(pictures, batch)])


@torch.no_grad()
def features(net: nn.Sequential, pictures: Tensor) -> list[Tensor]:
    """Return the channel-normalised activations of the first five residual blocks, each (B, channels, h, w)."""
    out: list[Tensor] = []
    h = 2 * pictures - 1
    for layer in list(net)[:6]:
        h = layer(h)
        out.append(F.normalize(h, dim=1))
    return out[1:]


def distance(net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Compute the perceptual distance (B,) of image batches x and y (B, 3, 64, 64) in [0, 1].

    It is the squared difference of `features`, summed over channels, averaged over positions and blocks.
    """
    pairs: Sequence[tuple[Tensor, Tensor]] = list(zip(features(net, x), features(net, y), strict=True))
    return torch.stack([(a - b).pow(2).sum(1).mean((1, 2)) for a, b in pairs]).mean(0)
