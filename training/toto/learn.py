"""Trains Toto: a k-means tokenizer over patches, then a Llama on the tokens of clips and pictures, next token by next.

Clips are tokenised once and kept as int16 ids; a batch is a function of (seed, step), as in training/videomae. Pictures
are packed as the paper packs them: as many unrelated ones as a clip has frames, behind the start token 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from patches.families.video.convolved import Convolved
from patches.families.video.tokens import RESERVED, Codebook, TokenVideo, kmeans, sequence
from patches.families.video.untrained import llama
from training.lab.video import actions
from training.tasks.motion import autocast, optimiser_of, rate, set_rate
from training.toto.sizes import Size


@dataclass(frozen=True)
class Plan:
    """How to train."""

    steps: int = 400
    batch: int = 32
    peak: float = 3e-3
    decay: float = 0.1
    warm: float = 0.05
    pictures: float = 0.2
    """share of sequences that are packed pictures (ImageNet's share in the paper)"""
    seed: int = 0
    bf16: bool = False


def tokenizer(
    video: Tensor, count: int = 256, patch: int = 4, shrink: int = 2, residual: bool = True, seed: int = 0,
    points: int = 40_000,
) -> Codebook:  # fmt: skip
    """Fit a codebook of `count` centres to clips of bytes.

    residual: half of the centres are for first frames, half for differences, which are mostly nothing: patches that do
    not change are one point.
    """
    g = Generator().manual_seed(seed)
    shape = Codebook(torch.zeros(1, 3 * patch**2), patch, shrink, residual)
    x = torch.cat([shape.patches(part) for part in video.split(256)])
    if not residual:
        every = x.flatten(0, 2)
        return Codebook(kmeans(_some(every, points, g), count, g), patch, shrink, residual)
    first, later = x[:, 0].flatten(0, 1), x[:, 1:].flatten(0, 2)
    moving = later[later.abs().amax(1) > 0.02]
    centres = [torch.zeros(1, x.shape[-1]), kmeans(_some(first, points, g), count // 2, g)]
    centres.append(kmeans(_some(moving, points, g), count - count // 2 - 1, g))
    return Codebook(torch.cat(centres), patch, shrink, residual)


def _some(x: Tensor, count: int, g: Generator) -> Tensor:
    return x[torch.randint(len(x), (min(count, len(x)),), generator=g)]


def tokenise(video: Tensor, codebook: Codebook | Convolved) -> Tensor:
    """Clips -> ids (n, 1 + T n + 1) int64."""
    return torch.cat([sequence(codebook.encode(part)) for part in video.split(128)])


def tokenise_pictures(video: Tensor, codebook: Codebook | Convolved, frames: int, g: Generator) -> Tensor:
    """Frames of different clips, shuffled, packed by `frames` behind the mark for pictures."""
    stills = video[:, 0][torch.randperm(len(video), generator=g)]
    stills = stills[: len(stills) // frames * frames]
    # each stands for itself
    codes = torch.cat([codebook.encode(part[:, None].to(codebook.codes.device)) for part in stills.split(512)])
    return sequence(codes.view(-1, frames, codes.shape[-1]), "pictures")


def new(size: Size, codebook: Codebook | Convolved, frames: int, image: int, seed: int = 0) -> TokenVideo:
    """A model of random weights."""
    torch.manual_seed(seed)
    positions = frames * (image // codebook.cell) ** 2 + 2
    spread = min(0.1, 0.8 / math.sqrt(size.width)) if size.width <= 128 else 0.02
    lm = llama(size.width, size.depth, size.heads, RESERVED + len(codebook.codes), positions, size.hidden, spread,
               tied=size.tied)  # fmt: skip
    return TokenVideo(lm, codebook, frames, image)


def fit(model: TokenVideo, clips: Tensor, pictures: Tensor, plan: Plan, held: Tensor | None = None) -> dict[str, Any]:
    """Train on ids; the log has the loss on held-out clips, whole and by frame, and the compute that was spent."""
    optimiser = optimiser_of(
        [{"params": list(model.lm.parameters()), "peak": plan.peak}], plan.decay, (0.9, 0.95), 1e-12
    )
    begun, losses = time.process_time(), []
    model.lm.train()
    for step in range(plan.steps):
        g = Generator().manual_seed(plan.seed * 1_000_003 + step)
        stills = round(plan.pictures * plan.batch) if len(pictures) else 0
        ids = torch.cat([
            clips[torch.randint(len(clips), (plan.batch - stills,), generator=g)],
            pictures[torch.randint(max(1, len(pictures)), (stills,), generator=g)],
        ])  # fmt: skip
        set_rate(optimiser, rate(step, plan.steps, int(plan.warm * plan.steps)))
        device = model.codebook.codes.device
        with autocast(str(device), plan.bf16):
            off = model.nll(ids.to(device)).mean()
        optimiser.zero_grad()
        off.backward()
        nn.utils.clip_grad_norm_(model.lm.parameters(), 1.0)
        optimiser.step()
        losses.append(off.detach())
    cpu = time.process_time() - begun
    model.lm.eval()
    body = sum(p.numel() for k, p in model.lm.named_parameters() if "embed_tokens" not in k and "lm_head" not in k)
    tokens = plan.steps * plan.batch * (clips.shape[1] - 2)
    out = {
        "steps": plan.steps,
        "clips": plan.steps * plan.batch,
        "cpu_s": round(cpu, 1),
        "body": body,
        "clips_per_cpu_s": round(plan.steps * plan.batch / max(cpu, 1e-9), 1),
        "tokens": tokens,
        "flops": 6 * body * tokens,
        "loss": [round(float(x), 4) for x in losses[:: max(1, plan.steps // 20)]],
    }
    return out | (held_out(model, held) if held is not None else {})


@torch.no_grad()
def held_out(model: TokenVideo, ids: Tensor) -> dict[str, Any]:
    """Next-token loss of held-out clips: the mean, its standard error over clips, and by frame."""
    each = torch.cat([model.nll(part) for part in ids.split(100)])
    by_frame = each.view(len(each), model.frames, -1).mean((0, 2))
    clip = each.mean(1)
    return {
        "nll": round(float(clip.mean()), 5),
        "nll_se": round(float(clip.std() / len(clip) ** 0.5), 5),
        "n": len(clip),
        "nll_by_frame": [round(x, 4) for x in by_frame.tolist()],
    }


@torch.no_grad()
def features(model: TokenVideo, ids: Tensor) -> Tensor:
    """(layers + 1, n, T n, d) of clips' ids."""
    device, size = model.codebook.codes.device, max(1, 12_800 // ids.shape[1])
    return torch.cat([torch.stack(model.token_states(part.to(device))).cpu() for part in ids.split(size)], 1)


def by_layer(model: TokenVideo, *videos: Tensor) -> Iterator[list[Tensor]]:
    """For the embedding and each layer the features (n, T n, d) of sets of clips. All layers are held together where
    that is less than 4 GiB, else clips are read again for each."""
    ids = [tokenise(video, model.codebook) for video in videos]
    width = model.lm.config.hidden_size
    if 4 * width * (model.depth + 1) * sum(x.numel() for x in ids) < 4 << 30:
        yield from ([x[layer] for x in every] for every in [[features(model, x) for x in ids]]
                    for layer in range(model.depth + 1))  # fmt: skip
        return
    for layer in range(model.depth + 1):
        yield [torch.cat([features(model, one)[layer] for one in x.split(1)]) for x in ids]


def pool(n: int, frames: int, image: int, seed: int = 30) -> Tensor:
    """Unlabelled clips of the lab's train split."""
    return actions.draw("train", n, seed, frames, image).video
