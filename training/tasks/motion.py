"""Motion classification on the lab's clips: how video models are trained, probed and fine-tuned, with two CNN controls.

Shared by the systems that train on clips. Choose on `val`, report `test`. Every table includes a positive control, a
small CNN on frame differences (the labels are learnable from motion), and a negative one, the same CNN on the middle
frame (nothing but motion separates the classes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Generator, Tensor, nn

from patches.families.video.pixels import normalise
from patches.families.video.probe import Pooling, Probe
from training.lab.video import actions
from training.lab.worlds import MOTIONS

CLASSES = MOTIONS
POSITIVE, NEGATIVE = 0.75, 0.25
"""Validity gates on accuracy: a transformer's number counts only if the positive control exceeds the first and the
negative control stays below the second"""


@lru_cache(8)
def clips(split: str, n: int, seed: int = 0, frames: int = actions.FRAMES, size: int = actions.SIZE) -> actions.Clips:
    """Draw labelled clips of a lab split; cached, since rendering is slow."""
    return actions.draw(split, n, seed, frames, size)


def rate(step: int, steps: int, warm: int) -> float:
    """Return the learning rate at a step as a fraction of its peak: linear warm-up, then half a cosine down to 0."""
    return min((step + 1) / max(1, warm), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def optimiser_of(
    groups: list[dict[str, Any]], decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-15
) -> Any:
    """Create AdamW over parameter groups {"params", "peak"}, fused where the device supports it.

    eps is far below the usual 1e-8: losses on pixels in [0, 1] are so small that query gradients of a narrow model are
    around 1e-10, and with a larger eps these weights would never move.
    """
    device = groups[0]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=decay, fused=device in ("cpu", "cuda"))


def autocast(device: str, wanted: bool) -> Any:
    """Return an autocast scope to bfloat16 if `wanted`; a CPU without bfloat16 units is thirty times slower in it."""
    if not wanted:
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def set_rate(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to `share` of its peak."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share


@dataclass(frozen=True)
class Fitted:
    """A trained model and its training cost."""

    model: Any
    seconds: float
    """CPU seconds of this process"""
    train: float
    """Accuracy in [0, 1], averaged over the last fifth of the training steps"""


def train(
    model: nn.Module, inputs: Tensor, label: Tensor, steps: int, batch: int, groups: list[dict[str, Any]],
    seed: int, see: Callable[[Tensor], Tensor] = lambda x: x, smoothing: float = 0.0, decay: float = 0.05,
    warm: float = 0.1, bf16: bool = False,
) -> Fitted:  # fmt: skip
    """Train a classifier by AdamW and cross-entropy on shuffled batches of `inputs` (n, ...) and `label` (n,).

    groups: {"params", "peak"} each; see: transform of a batch before the model; warm: fraction of the steps.
    """
    g = Generator().manual_seed(seed)
    optimiser = optimiser_of(groups, decay)
    device = next(model.parameters()).device
    order, begun, right = torch.empty(0, dtype=torch.int64), time.process_time(), []
    model.train()
    for step in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(label), generator=g)])
        rows, order = order[:batch], order[batch:]
        set_rate(optimiser, rate(step, steps, int(warm * steps)))
        wanted = label[rows].to(device)
        with autocast(str(device), bf16):
            logits = model(see(inputs[rows].to(device)))
        off = nnf.cross_entropy(logits.float(), wanted, label_smoothing=smoothing)
        optimiser.zero_grad()
        off.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        right.append((logits.argmax(1) == wanted).float().mean().detach())  # read at the end: reading waits
    tail = right[-max(1, steps // 5) :]
    return Fitted(model.eval(), time.process_time() - begun, float(torch.stack(tail).mean()))


@torch.no_grad()
def answers(model: Callable[[Tensor], Tensor], inputs: Tensor, see: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Predict the class (n,) of each input, in batches of 100, on the model's device."""
    held = next(model.parameters()).device if isinstance(model, nn.Module) else inputs.device
    return torch.cat([model(see(part.to(held))).argmax(1).cpu() for part in inputs.split(100)])


# ---- controls -----------------------------------------------------------------------------------------------------


def differences(video: Tensor) -> Tensor:
    """Return frame differences (n, 3 (T - 1), R, R) of normalised clips, stacked as channels."""
    x = normalise(video)
    return (x[:, 1:] - x[:, :-1]).flatten(1, 2)


def middle(video: Tensor) -> Tensor:
    """Return the normalised middle frame (n, 3, R, R), which is independent of the class in the lab's actions."""
    return normalise(video[:, video.shape[1] // 2, None])[:, 0]


def control(
    see: Callable[[Tensor], Tensor],
    labelled: actions.Clips,
    test: actions.Clips,
    steps: int = 600,
    seed: int = 0,
    classes: int = len(CLASSES),
) -> tuple[Tensor, float]:
    """Train a three-layer CNN on the view `see` of clips; return its test outcomes (n,) bool, and CPU seconds."""
    torch.manual_seed(seed)
    channels, width, size = see(test.video[:1]).shape[1], 24, test.video.shape[-1]

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]

    model = nn.Sequential(
        *block(channels, width), *block(width, 2 * width), *block(2 * width, 4 * width), nn.Flatten(),
        nn.Linear(4 * width * (-(-size // 8)) ** 2, classes),
    )  # fmt: skip
    groups = [{"params": list(model.parameters()), "peak": 2e-3}]
    fitted = train(model, labelled.video, labelled.label, steps, 32, groups, seed, see, warm=0.03)
    return answers(model, test.video, see) == test.label, fitted.seconds


# ---- probes -------------------------------------------------------------------------------------------------------


def probe(
    features: Tensor, label: Tensor, pooling: Pooling = "attention", steps: int = 200, seed: int = 0,
    classes: int = len(CLASSES), peak: float = 5e-3,
) -> Probe:  # fmt: skip
    """Train a probe on frozen features (n, N, d): attention (or another) pooling over N tokens, then a linear layer."""
    torch.manual_seed(seed)
    model = Probe(features.shape[-1], classes, pooling)
    groups = [{"params": list(model.parameters()), "peak": peak}]
    made: Probe = train(model, features, label, steps, 64, groups, seed, decay=0.01).model
    return made
